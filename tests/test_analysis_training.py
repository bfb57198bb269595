"""Saliency, efficient probing and sigma-reparametrisation against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
from vision_attn.analysis import (  # noqa: E402
    EfficientProbing,
    fit_probe,
    frozen_tokens,
    merge_sigma,
    saliency,
    to_sigma,
)

VIT = dict(img_size=64, depth=3, embed_dim=24, num_heads=2, num_classes=5)


def vit(**options):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **{**VIT, **options}).eval()
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
    return net


def captured(net, module, x, target):
    """Output of a module and the gradient of the chosen classes' sum, by retain_grad."""
    kept = []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    hook = net.get_submodule(module).register_forward_hook(keep)
    out = net(x)
    hook.remove()
    out.gather(1, target[:, None]).sum().backward()
    net.zero_grad()
    return kept[0].detach(), kept[0].grad


def unit(m):
    return torch.stack([(each - each.min()) / (each.max() - each.min()).clamp(min=1e-30) for each in m])


FORMULAS = {  # one image and one place at a time
    "normgrad": lambda a, g, mean: torch.outer(a, g).norm(),
    "normgrad-scaling": lambda a, g, mean: (a * g).norm(),
    "normgrad-positive": lambda a, g, mean: (a * g).clamp(min=0).norm(),
    "normgrad-bias": lambda a, g, mean: g.norm(),
    "gradcam": lambda a, g, mean: (a @ mean).clamp(min=0),
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("layout", ["tokens", "NCHW", "NHWC"])
def test_saliency_by_hand(kind, layout):
    torch.manual_seed(0)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([3, 1])
    if layout == "tokens":
        net, module = vit(), "blocks.1"
    elif layout == "NCHW":
        net, module = timm.create_model("resnet10t", num_classes=5).eval(), "layer3"
        x = torch.randn(2, 3, 64, 96)
    else:
        net, module = timm.create_model("nat_mini", num_classes=5, depths=(1, 1, 1, 1)).eval(), "stages.1"
        x = torch.randn(2, 3, 64, 96)
    found = saliency(net, x, kind, [module], target)
    a, g = captured(net, module, x.requires_grad_(), target)
    if layout == "tokens":
        a, g = (t[:, 1:].unflatten(1, (4, 4)) for t in (a, g))
    elif layout == "NCHW":
        a, g = (t.permute(0, 2, 3, 1) for t in (a, g))
    expected = torch.tensor(
        [
            [
                [FORMULAS[kind](a[i, r, c], g[i, r, c], g[i].mean((0, 1))) for c in range(a.shape[2])]
                for r in range(a.shape[1])
            ]
            for i in range(2)
        ]
    )
    torch.testing.assert_close(found, unit(expected), atol=1e-4, rtol=1e-4)
    assert found.shape[1:] == ((4, 4) if layout == "tokens" else a.shape[1:3])


def test_layers_are_multiplied_and_nothing_is_left_behind():
    net = timm.create_model("resnet10t", num_classes=5).train()  # the batch norms stay as they are in training mode
    net.eval()
    x = torch.randn(2, 3, 64, 64)
    one, two = (saliency(net, x, "normgrad", [name]) for name in ("layer2", "layer4"))
    both = saliency(net, x, "normgrad", ["layer4", "layer2"])
    product = one * F.interpolate(two[:, None], one.shape[1:], mode="bilinear")[:, 0]
    torch.testing.assert_close(both, unit(product), atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in net.parameters()) and x.grad is None and not x.requires_grad
    assert not any(m._forward_hooks for m in net.modules())
    with torch.no_grad():  # gradients are switched on where they are needed
        torch.testing.assert_close(saliency(net, x, "normgrad", ["layer2"]), one)
    assert saliency(net, x).shape == (2, 2, 2)  # of the last stage
    assert saliency(vit(), x, target=2).shape == (2, 4, 4)


def test_saliency_points_at_what_matters():
    """A model that adds up one corner of a map."""

    class Corner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Conv2d(3, 8, 8, stride=8)

        def forward(self, x):
            return self.map(x)[:, :, :2, 2:].relu().sum((2, 3))

    torch.manual_seed(0)
    for kind in ("normgrad", "normgrad-scaling", "normgrad-positive", "normgrad-bias"):
        found = saliency(Corner(), torch.randn(1, 3, 32, 32), kind, ["map"])[0]
        assert found[:2, 2:].max() == 1 and found[2:].max() == 0 and found[:, :2].max() == 0


def test_saliency_refuses():
    net, x = vit(), torch.randn(1, 3, 64, 64)
    for given, part in (
        (dict(kind="cam"), "normgrad, normgrad-scaling"),
        (dict(layers=["blocks.7"]), "no module blocks.7"),
        (dict(layers=["blocks.2"]), "do not reach the output"),
        (dict(layers=["head"]), "no map and no sequence"),
        (dict(target=5), "0 to 4"),
    ):
        with pytest.raises(ValueError, match=part):
            saliency(net, x, **given)
        assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match="give layers"):
        saliency(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2)), x)
    with pytest.raises(ValueError, match="must return"):
        saliency(net.patch_embed, x, layers=["proj"])


@pytest.mark.parametrize("queries, reduce", [(1, 1), (4, 1), (3, 2)])
def test_probing_is_the_formula(queries, reduce):
    torch.manual_seed(0)
    probe = EfficientProbing(24, 5, queries, reduce).double().eval()
    probe.norm.running_mean.normal_()
    probe.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    wanted = []
    for image in x:
        parts = []
        share = 24 // reduce // queries
        for j in range(queries):
            a = torch.softmax(24**-0.5 * image @ probe.cls_token[0, j], 0)
            v = image @ probe.v.weight.T[:, j * share : (j + 1) * share]
            parts.append((a[:, None] * v).sum(0))
            torch.testing.assert_close(probe.attention(image[None])[0, j], a)
        pooled = torch.cat(parts)
        pooled = (pooled - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
        wanted.append(probe.fc.weight @ pooled + probe.fc.bias)
    torch.testing.assert_close(probe(x), torch.stack(wanted))
    counted = sum(p.numel() for n, p in probe.named_parameters() if not n.startswith("fc"))
    assert counted == queries * 24 + 24**2 // reduce
    assert set(probe.state_dict()) >= {"cls_token", "v.weight", "fc.weight", "fc.bias"}
    assert EfficientProbing(24, 0, queries, reduce)(x.float()).shape == (3, 24 // reduce)


def test_probing_refuses_what_does_not_divide():
    for dim, queries, reduce in ((24, 5, 1), (24, 4, 4), (24, 0, 1)):
        with pytest.raises(ValueError, match="multiple of queries"):
            EfficientProbing(dim, 3, queries, reduce)


def needles(count, seed):
    """Noise tokens, among which one at a random place carries the class."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(4, 32, generator=torch.Generator().manual_seed(99))
    tokens = torch.randn(count, 40, 32, generator=generator)
    classes = torch.randint(4, (count,), generator=generator)
    at = torch.randint(40, (count,), generator=generator)
    tokens[range(count), at] = 3 * codes[classes] + 0.3 * torch.randn(count, 32, generator=generator)
    return tokens, classes, at


def test_a_probe_finds_the_token_that_matters():
    tokens, classes, _ = needles(512, 0)
    state = torch.random.get_rng_state()
    found = fit_probe(lambda x: x, [(tokens[:256], classes[:256]), (tokens[256:], classes[256:])], 4,
                      queries=4, epochs=30, lr=1e-2, batch=64)  # fmt: skip
    assert torch.equal(state, torch.random.get_rng_state())
    fresh, right, at = needles(256, 1)
    with torch.no_grad():
        accuracy = (found.probe(fresh).argmax(1) == right).float().mean()
        looks = found.probe.attention(fresh).mean(1).argmax(1)
    assert accuracy > 0.9, accuracy
    assert (looks == at).float().mean() > 0.8
    assert len(found.losses) == 30 and found.losses[-1] < 0.5 * found.losses[0] and found.accuracies[-1] > 0.95
    again = fit_probe(lambda x: x, [(tokens, classes)], 4, queries=4, epochs=30, lr=1e-2, batch=64)
    assert again.losses == found.losses


def test_probing_a_timm_model():
    for net, tokens in ((vit(), 16), (timm.create_model("resnet10t"), 4), (timm.create_model("nat_mini"), 4)):
        net.train()
        state = copy.deepcopy(net.state_dict())
        images = torch.randn(6, 3, 64, 64)
        features = frozen_tokens(net)
        assert features(images).shape[:2] == (6, tokens) and not features(images).requires_grad and net.training
        batches = [(images, torch.arange(6) % 2)]
        fit_probe(features, batches, 2, queries=2, epochs=2, batch=3)
        assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    channels = timm.create_model("resnet10t").eval()
    with torch.no_grad():
        expected = channels.forward_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(frozen_tokens(channels)(images), expected)


def test_fit_probe_refuses():
    tokens = torch.randn(4, 5, 8)
    with pytest.raises(ValueError, match="batches is empty"):
        fit_probe(lambda x: x, [], 2)
    with pytest.raises(ValueError, match="0 to 1"):
        fit_probe(lambda x: x, [(tokens, torch.arange(4))], 2, queries=2)
    with pytest.raises(ValueError, match=r"tokens \[batch, tokens, dim\]"):
        fit_probe(lambda x: x, [(tokens[0], torch.arange(5))], 5, queries=2)
    with pytest.raises(TypeError, match="forward_features"):
        frozen_tokens(torch.nn.Linear(2, 2))


def sigma(weight):
    return torch.linalg.matrix_norm(weight.flatten(1), 2)


def test_sigma_keeps_the_outputs_and_merges_back():
    for net in (vit(), timm.create_model("resnet10t", num_classes=5).eval()):
        x = torch.randn(2, 3, 64, 64)
        keys, before = list(net.state_dict()), net(x).detach()
        state = copy.deepcopy(net.state_dict())
        names = to_sigma(net)
        assert set(names) == {
            f"{n}.weight" for n, m in net.named_modules() if type(m).__name__.endswith(("Linear", "Conv2d"))
        }
        torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-4)
        assert merge_sigma(net) == names
        assert list(net.state_dict()) == keys
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, state[key], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-4)
        assert all(type(m).__name__[:12] != "Parametrized" for m in net.modules())


def test_a_step_of_the_power_iteration_and_its_gradient():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 2, dtype=torch.float64)
    to_sigma(layer)
    weight = layer.parametrizations.weight.original
    sigma_of = layer.parametrizations.weight[0]
    torch.testing.assert_close(sigma_of.gamma.detach(), sigma(weight.detach()))
    with torch.no_grad():
        sigma_of.u.copy_(F.normalize(torch.randn(12, dtype=torch.float64), dim=0))
        weight.normal_()
        sigma_of.gamma.fill_(1.7)
    u, matrix = sigma_of.u.clone(), weight.detach().flatten(1)
    v = F.normalize(matrix @ u, dim=0)
    after = F.normalize(matrix.T @ v, dim=0)
    layer.eval()
    torch.testing.assert_close(layer.weight.detach(), 1.7 * weight.detach() / (v @ matrix @ u))
    assert torch.equal(sigma_of.u, u)  # no step outside of training
    layer.train()
    new = layer.weight
    torch.testing.assert_close(sigma_of.u, after)
    torch.testing.assert_close(new.detach(), 1.7 * weight.detach() / (v @ matrix @ after))
    aim = torch.randn_like(new)
    (new * aim).sum().backward()

    def formula(w, gamma):  # u and v are constants
        return (gamma * w / (v @ w.flatten(1) @ after) * aim).sum()

    w, gamma = weight.detach().requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    formula(w, gamma).backward()
    torch.testing.assert_close(weight.grad, w.grad)
    torch.testing.assert_close(sigma_of.gamma.grad, gamma.grad)
    for _ in range(200):
        new = layer.weight
    torch.testing.assert_close(sigma(new.detach()), sigma_of.gamma.detach(), atol=1e-6, rtol=1e-6)


def test_sigma_trains_and_the_merged_model_is_the_trained_one():
    net = vit().train()
    to_sigma(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8) % 5
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    copied = copy.deepcopy(net)
    expected = net.eval()(x).detach()
    net.train()
    merge_sigma(net)
    assert net.training and all(m.training for m in net.modules())
    torch.testing.assert_close(net.eval()(x), expected, atol=1e-5, rtol=1e-4)
    assert len(merge_sigma(copied)) == len(to_sigma(net))


def test_sigma_of_multihead_attention_new_weights_and_no_norms():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    before = layer(x).detach()
    names = to_sigma(layer)
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight"} < set(names)
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-4)
    merge_sigma(layer)
    net = vit()
    to_sigma(net, reinitialise=True, remove_norms=True)
    weight = net.blocks[0].mlp.fc1.parametrizations.weight.original
    assert 0.015 < weight.std() < 0.025
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in net.modules())
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_sigma_refuses():
    with pytest.raises(ValueError, match="no Linear and no Conv2d"):
        to_sigma(torch.nn.ReLU())
    with pytest.raises(ValueError, match="nothing that to_sigma"):
        merge_sigma(torch.nn.Linear(2, 2))
    layer = torch.nn.Linear(2, 2)
    to_sigma(layer)
    with pytest.raises(ValueError, match="reparametrised already"):
        to_sigma(layer)
    torch.nn.init.zeros_((layer := torch.nn.Linear(2, 2)).weight)
    with pytest.raises(ValueError, match="weight: all zeros.*reinitialise=True"):
        to_sigma(layer)
    assert to_sigma(layer, reinitialise=True) == ["weight"]
