"""Profiles, bounds, alarms, rollout and head masks against short formulations of their own."""

import math

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vision_towers import TOWERS  # noqa: E402

from vision_attn import Dense, Neighborhood, PerHead, attach  # noqa: E402
from vision_attn.analysis import (  # noqa: E402
    CollapseAlarm,
    entropy_bound,
    head_importance,
    head_mask,
    profile,
    record,
    rollout,
)
from vision_attn.analysis.calls import WeightsCall  # noqa: E402
from vision_attn.analysis.geometry import Place  # noqa: E402
from vision_attn.analysis.layer import Attention  # noqa: E402

PLACE = Place(1, (3, 5))


def made_up(batch=2, heads=3, query_place=PLACE, key_place=None, seed=0):
    torch.manual_seed(seed)
    key_place = key_place or query_place
    weights = (3 * torch.randn(batch, heads, query_place.tokens, key_place.tokens)).softmax(-1)
    return weights, Attention("made.up", 4, WeightsCall(weights), query_place, key_place)


def test_profile_by_hand():
    weights, attention = made_up()
    found = profile(attention)
    columns = 5
    for head in range(3):
        w = weights[:, head].double()
        entropy, distance, effective, off = [], [], [], []
        rings = [[] for _ in range(5)]
        for image in range(2):
            for query in range(15):
                row = w[image, 1 + query]
                entropy.append(float(-(row * row.log()).sum()))
                effective.append(float(1 / (row**2).sum()))
                off.append(float(row[0]))
                y, x = divmod(query, columns)
                total = 0.0
                for key in range(15):
                    dy, dx = key // columns - y, key % columns - x
                    total += float(row[1 + key]) * math.hypot(dy, dx)
                    rings[max(abs(dy), abs(dx))].append(float(row[1 + key]))
                distance.append(total / float(row[1:].sum()))
        mean = lambda x: sum(x) / len(x)  # noqa: E731
        assert float(found.entropy[head]) == pytest.approx(mean(entropy), abs=1e-5)
        assert float(found.distance[head]) == pytest.approx(mean(distance), abs=1e-5)
        assert float(found.effective_keys[head]) == pytest.approx(mean(effective), abs=1e-4)
        assert float(found.off_grid[head]) == pytest.approx(mean(off), abs=1e-6)
        assert found.rings[head].tolist() == pytest.approx([mean(r) for r in rings], abs=1e-6)
        column = w[:, 1:].mean((0, 1))
        assert (float(found.sink[head]), int(found.sink_key[head])) == (
            pytest.approx(float(column.max()), abs=1e-6),
            int(column.argmax()),
        )
        assert float(found.share[head]) == pytest.approx(mean(entropy) / math.log(16), abs=1e-6)
        assert found.bound[head] <= found.entropy[head]
    values = found.to_dict()
    assert values["name"] == "made.up" and values["layer"] == 4 and len(values["rings"][0]) == 5


def test_profile_with_pooled_keys_without_a_grid_and_sampled():
    _, pooled = made_up(query_place=Place(0, (4, 6)), key_place=Place(0, (2, 3)))
    weights = torch.zeros(1, 1, 24, 6)
    weights[..., 0] = 1  # everyone looks at the top left of 2 x 3 keys, each as large as 2 x 2 queries
    pooled = Attention("p", 0, WeightsCall(weights), Place(0, (4, 6)), Place(0, (2, 3)))
    offsets = [math.hypot((y + 0.5) / 2 - 0.5, (x + 0.5) / 2 - 0.5) for y in range(4) for x in range(6)]
    assert float(profile(pooled).distance) == pytest.approx(sum(offsets) / 24)
    nowhere = Attention("n", 0, WeightsCall(weights), Place(0, None), Place(0, None))
    found = profile(nowhere)
    assert found.distance is None and found.rings is None and float(found.sink) == 1
    assert float(found.entropy) == 0 and float(found.bound) == 0
    weights, attention = made_up(query_place=Place(1, (6, 6)))
    some = attention.sample(5)
    assert len(some) == 5 and some.min() >= 1 and len(set(some.tolist())) == 5
    expected = weights[:, :, some, 0].mean((0, 2))
    torch.testing.assert_close(profile(attention, most=5).off_grid.float(), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 50), st.floats(0, 30), st.integers(0, 10**6))
def test_entropy_is_never_below_its_bound(keys, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(keys, generator=generator, dtype=torch.float64)
    scores = (scores - scores.mean()) / scores.norm().clamp(min=1e-9) * size
    weights = scores.softmax(-1)
    entropy = -torch.special.xlogy(weights, weights).sum()
    assert entropy >= entropy_bound(scores.norm(), keys) - 1e-9
    # one large score and the others equal: the bound is reached
    worst = torch.full((keys,), -1.0 / (keys - 1), dtype=torch.float64)
    worst[0] = 1
    worst = worst / worst.norm() * size
    weights = worst.softmax(-1)
    reached = -torch.special.xlogy(weights, weights).sum()
    torch.testing.assert_close(reached, entropy_bound(worst.norm(), keys), atol=1e-9, rtol=1e-9)


def test_the_bound_of_one_key_and_of_none():
    assert entropy_bound(3.0, 1) == 0
    torch.testing.assert_close(entropy_bound(torch.zeros(2), torch.tensor([4, 9])), torch.tensor([4.0, 9.0]).log())


def test_alarm():
    alarm = CollapseAlarm(below=0.2, fall=0.5)
    assert alarm({"a": torch.tensor([0.9, 0.15, 0.3])}) == []  # low from the start is no fall
    assert alarm({"a": torch.tensor([0.5, 0.10, 0.3])}) == []
    (message,) = alarm({"a": torch.tensor([0.5, 0.12, 0.1])})
    assert message == "a head 2: entropy fell from 30% to 10% of the largest possible"
    assert len(alarm({"a": torch.tensor([0.19, 0.07, 0.3])})) == 2
    for wrong in ({"below": 0}, {"fall": 1.0}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            CollapseAlarm(**wrong)


def test_alarm_on_a_model_whose_scores_blow_up():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2).eval()
    images, alarm = torch.randn(2, 3, 64, 64), CollapseAlarm()
    with torch.no_grad(), record(net) as recording:
        net(images)
        assert alarm(recording.layers) == []
        net.blocks[1].attn.qkv.weight[:12] *= 3e4  # the queries of head 0
        net(images)
        (message,) = alarm(recording.layers)
    assert message.startswith("blocks.1.attn head 0: entropy fell from 100% to")


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("query", ["class", "mean", (1, 3), 7])
def test_rollout_is_the_product(heads, query):
    pairs = [made_up(seed=n) for n in range(3)]
    product = torch.eye(16).expand(2, 16, 16)
    for weights, _ in pairs:
        w = {"mean": weights.mean(1), "max": weights.amax(1), "min": weights.amin(1)}[heads]
        product = (0.3 * torch.eye(16) + 0.7 * w / w.sum(-1, keepdim=True)) @ product
    row = product[:, 1:].mean(1) if query == "mean" else product[:, {"class": 0, (1, 3): 9, 7: 7}[query]]
    found = rollout([a for _, a in pairs], query, heads, residual=0.3)
    torch.testing.assert_close(found, row[:, 1:].unflatten(1, (3, 5)), atol=1e-6, rtol=1e-5)


def test_rollout_refuses_what_does_not_fit():
    _, one = made_up()
    _, other = made_up(query_place=Place(1, (3, 4)))
    with pytest.raises(ValueError, match="same tokens in every layer"):
        rollout([one, other])
    with pytest.raises(ValueError, match="no class token"):
        rollout([made_up(query_place=Place(0, (3, 4)))[1]])
    for options, part in (({"heads": "sum"}, "mean, max, min"), ({"residual": 2}, "0 to 1")):
        with pytest.raises(ValueError, match=part):
            rollout([one], **options)
    with pytest.raises(ValueError, match="no layers"):
        rollout([])


def by_projection(net, name, gone, x):
    """Zero heads where they enter the output projection: the definition."""
    attention = net.get_submodule(name)
    heads = attention.num_heads

    def zero(module, args):
        parts = args[0].unflatten(-1, (heads, -1)).clone()
        parts[..., gone, :] = 0
        return (parts.flatten(-2), *args[1:])

    hook = attention.proj.register_forward_pre_hook(zero)
    with torch.no_grad():
        out = net(x)
    hook.remove()
    return out


MODELS = {
    "vit_tiny_patch16_224": dict(img_size=64, depth=3),
    "swin_tiny_patch4_window7_224": dict(img_size=56, depths=(2, 2), embed_dim=24, num_heads=(2, 4)),
    "nat_mini": {},
    "levit_128s": {},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_masked_heads_are_zero_before_the_projection(name, fused):
    torch.manual_seed(0)
    net = timm.create_model(name, **MODELS[name]).eval()
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
        if isinstance(module, torch.nn.BatchNorm1d):  # zeros at first, which would hide every change
            torch.nn.init.ones_(module.weight)
    x = torch.randn(2, 3, *(2 * [224 if "levit" in name else MODELS[name].get("img_size", 40)]))
    with torch.no_grad(), record(net) as recording:
        before = net(x)
    layer = recording.layers[1]
    with torch.no_grad():
        for gone, given in (([1], dict(heads=1)), ([0, 1], dict(heads=[0, 1]))):
            with head_mask(net, 1, **given):
                masked = net(x)
            torch.testing.assert_close(masked, by_projection(net, layer.name, gone, x), atol=1e-5, rtol=1e-4)
            assert not torch.allclose(masked, before, atol=1e-7)
        with head_mask(net, layer.name, 1, others=True):
            masked = net(x)
        rest = [head for head in range(layer.heads) if head != 1]
        torch.testing.assert_close(masked, by_projection(net, layer.name, rest, x), atol=1e-5, rtol=1e-4)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    "pattern", [Neighborhood(3), PerHead([(1, Neighborhood(3)), (2, Dense())])], ids=["one", "parts"]
)
def test_heads_of_an_attached_model(pattern):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), attach(net, pattern):
        for head in range(3):
            with head_mask(net, 0, head):  # of the last layer, only the class token would reach the output
                masked = net(x)
            torch.testing.assert_close(masked, by_projection(net, "blocks.0.attn", [head], x), atol=1e-6, rtol=1e-5)


def test_heads_of_multihead_attention():
    tower = next(t for t in TOWERS if t.name == "open_clip ViT")
    net, x = tower.build(), tower.images()
    layer = net.visual.transformer.resblocks[1].attn
    with torch.no_grad():
        before = net.encode_image(x)
        with head_mask(net, 1, 0):
            masked = net.encode_image(x)
        weight = layer.out_proj.weight.clone()
        layer.out_proj.weight[:, : layer.head_dim] = 0
        torch.testing.assert_close(masked, net.encode_image(x), atol=1e-5, rtol=1e-4)
        layer.out_proj.weight.copy_(weight)
        assert torch.equal(net.encode_image(x), before) and not torch.allclose(masked, before, atol=1e-4)


def test_gradients_flow_through_the_heads_that_stay():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    with head_mask(net, 0, 0):
        net(torch.randn(1, 3, 64, 64)).square().sum().backward()
    grad = net.blocks[0].attn.qkv.weight.grad.unflatten(0, (3, 3, 64))
    assert (grad[:, 0] == 0).all() and (grad[:, 1].abs().sum((1, 2)) > 0).all()


def test_masks_that_do_not_fit():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    x = torch.randn(1, 3, 64, 64)
    for layer, heads, part in (
        (2, 0, "no attention layer 2; it has 0 blocks.0.attn, 1 blocks.1.attn"),
        ("blocks.7.attn", 0, "no attention layer 'blocks.7.attn'"),
        (0, 3, r"heads 0 to 2; got \[3\]"),
        (0, [-1], r"heads 0 to 2; got \[-1\]"),
    ):
        with pytest.raises(ValueError, match=part):
            with head_mask(net, layer, heads):
                net(x)
    with pytest.raises(RuntimeError, match="own"):  # an error of the model is not hidden by ours
        with head_mask(net, 9, 0):
            net(x)
            raise RuntimeError("own")


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("measure", ["probability", "logit", "accuracy", "cosine"])
def test_importance(measure, others):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4).eval()
    with torch.no_grad():
        net.head.weight.normal_()
    x, target = torch.randn(6, 3, 64, 64), torch.arange(6) % 4
    given = target if measure == "accuracy" else None
    shown = []
    found = head_importance(net, x, measure, given, [1], others, progress=lambda items: [shown.extend(items), items][1])
    assert list(found) == ["blocks.1.attn"] and len(shown) == 3

    def features(logits, gone):
        if measure != "cosine":
            return logits
        kept = []
        hook = net.fc_norm.register_forward_hook(lambda m, a, out: kept.append(out))
        by_projection(net, "blocks.1.attn", gone, x)
        hook.remove()
        return kept[0]

    with torch.no_grad():
        whole = features(net(x), [])
    classes = target if measure == "accuracy" else whole.argmax(1)
    score = {
        "probability": lambda out: out.softmax(1)[range(6), classes].mean(),
        "logit": lambda out: out[range(6), classes].mean(),
        "accuracy": lambda out: (out.argmax(1) == classes).float().mean(),
        "cosine": lambda out: F.cosine_similarity(out, whole).mean(),
    }[measure]
    for head in range(3):
        gone = [h for h in range(3) if (h != head) == others]
        after = features(by_projection(net, "blocks.1.attn", gone, x), gone)
        torch.testing.assert_close(found["blocks.1.attn"][head], score(whole) - score(after), atol=1e-5, rtol=1e-3)


def test_importance_of_what_does_not_fit():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="probability, logit"):
        head_importance(net, x, "gain")
    with pytest.raises(ValueError, match="needs target"):
        head_importance(net, x, "accuracy")
    with pytest.raises(ValueError, match="must return"):
        head_importance(torch.nn.Sequential(net.patch_embed), x)
