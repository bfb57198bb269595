"""MedViTV2: sizes, timm's contract, published weights."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_neighborhood import attention
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.medvit import KAN, MedViT, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

COUNTS = {
    "medvit_tiny": 11_719_845,
    "medvit_small": 30_087_295,
    "medvit_base": 66_995_571,
    "medvit_large": 118_291_477,
}
SMALL = {"depths": (1, 2, 3, 1), "dims": (32, 128, 128, 160)}
default_cfgs = generate_default_cfgs({"test_medvit.untrained": cfg(first_conv="stem.0.0")})
register_variants(globals(), MedViT, {"test_medvit": SMALL}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="medvit")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("test_medvit")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_a_published_size(check):
    check("medvit_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_forward_of_published_sizes(name):
    """In float64: with random weights the norms of the KAN layers enlarge rounding errors some thousand times."""
    model = timm.create_model(name).double().eval()
    for size in ((96, 96), (96, 161)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        out = model(images)
        assert out.shape == (2, 1000) and out.isfinite().all()
        torch.testing.assert_close(model(images[1:]), out[1:])


def test_kan():
    layer, x = KAN(3, 5).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for i in range(2):
        for j in range(4):
            bumps = [
                1 - math.tanh((normed[i, j, c].item() - (-2 + 4 * g / 7)) / 0.33) ** 2
                for c in range(3)
                for g in range(8)
            ]
            want = layer.linear.weight @ torch.tensor(bumps, dtype=torch.float64)
            torch.testing.assert_close(layer(x)[i, j], want, rtol=1e-6, atol=1e-7)  # the grid was made in float32


def test_what_is_not_used_stays():
    """The weights that the released model only stores have no effect, and training leaves them alone."""
    torch.manual_seed(0)
    model, x = MedViT(**SMALL, num_classes=3), torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    unused = {name: p for name, p in model.named_parameters() if ".unused." in name or name.endswith(".grid")}
    assert len(unused) > 20 and all(p.grad.eq(0).all() for p in unused.values())
    assert {name for name in unused if name.endswith(".grid")} < model.no_weight_decay()
    before = model.eval()(x)
    with torch.no_grad():
        for name, p in unused.items():
            if ".unused." in name:
                p.normal_()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", [{"depths": (1, 1, 2, 1)}, {"dims": (32, 128, 130, 160)}, {"dims": (32, 64, 128, 160)}]
)
def test_bad_options(change):
    with pytest.raises(ValueError, match="must be|use 128 or more"):
        MedViT(**{**SMALL, **change})


IS_GLOBAL = (False, False, True, False, False, True, True)
STAGE = (0, 1, 1, 2, 2, 2, 3)


def attended(dim):
    """Channels of a global block that take part in attention: three quarters, in steps of 32, not much less."""
    near = max(32, int(int(dim * 0.75) + 16) // 32 * 32)
    return near if near >= 0.9 * int(dim * 0.75) else near + 32


def published(seed=0):
    """Random weights with the names and shapes of a published file."""
    shapes, inputs = {}, 3

    def conv(name, out, inputs, size=1):
        shapes[f"{name}.weight"] = (out, inputs, size, size)

    def linear(name, out, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inputs), (out,)

    def norm(name, dim):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (dim,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def gated(name, dim, kernel, ratio):
        hidden = dim * ratio
        conv(f"{name}.0", hidden, dim)
        norm(f"{name}.1", hidden)
        conv(f"{name}.3", hidden, 1, kernel)
        norm(f"{name}.4", hidden)
        linear(f"{name}.6.fc.0", ratio, hidden)
        linear(f"{name}.6.fc.2", hidden, ratio)
        conv(f"{name}.7", dim, hidden)
        norm(f"{name}.8", dim)

    for i, dim in enumerate((64, 32, 64, 64)):
        conv(f"stem.{i}.conv", dim, inputs, 3)
        norm(f"stem.{i}.norm", dim)
        inputs = dim
    for i, (whole, stage) in enumerate(zip(IS_GLOBAL, STAGE, strict=True)):
        name, dim = f"features.{i}", SMALL["dims"][stage]
        width = attended(dim) if whole else dim
        if inputs != width or (stage and STAGE[i - 1] != stage):
            conv(f"{name}.patch_embed.conv", width, inputs)
            norm(f"{name}.patch_embed.norm", width)
        norm(f"{name}.norm1", width)
        if whole:
            for part in "qkv":
                linear(f"{name}.e_mhsa.{part}", width, width)
            linear(f"{name}.e_mhsa.proj", width, width)
            if stage < 3:
                norm(f"{name}.e_mhsa.norm", width)
            rest = dim - width
            conv(f"{name}.projection.conv", rest, width)
            norm(f"{name}.projection.norm", rest)
            conv(f"{name}.mhca.group_conv3x3", rest, 32, 3)
            norm(f"{name}.mhca.norm", rest)
            conv(f"{name}.mhca.projection", rest, rest)
            for j, (a, b) in enumerate(((dim, 2 * dim), (2 * dim, dim))):
                kan = f"{name}.kan.layers.{j}"
                shapes[f"{kan}.layernorm.weight"] = shapes[f"{kan}.layernorm.bias"] = (a,)
                shapes[f"{kan}.rbf.grid"] = (8,)
                shapes[f"{kan}.spline_linear.weight"] = (b, 8 * a)
        else:
            linear(f"{name}.attn.qkv", 3 * dim, dim)
            shapes[f"{name}.attn.rpb"] = (dim // 32, 13, 13)
            linear(f"{name}.attn.proj", dim, dim)
        norm(f"{name}.norm2", dim)
        gated(f"{name}.conv.conv", dim, 3 if stage or whole else 7, 2 if whole else 3)
        inputs = dim
    norm("norm", inputs)
    linear("proj_head.0", 5, inputs)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else value
        weights[name] = value.abs() + 0.5 if "running_var" in name else value
        if name.endswith("grid"):
            weights[name] = torch.linspace(-1.5, 2.5, 8, dtype=torch.float64)
    return weights


def logits(weights, image, legacy):
    """The model from its formulas, on weights under their published names."""

    def conv(x, name, **options):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1], **options)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        w = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *w, eps=1e-5)

    def hard(x):
        return (x + 3).clamp(0, 6) / 6

    def gated(x, name):
        y = norm(conv(x, f"{name}.0"), f"{name}.1")
        y = norm(conv(y * hard(y), f"{name}.3"), f"{name}.4")
        y = y * hard(y)
        gate = hard(linear(linear(y.mean((2, 3)), f"{name}.6.fc.0").relu(), f"{name}.6.fc.2"))
        return x + norm(conv(y * gate[..., None, None], f"{name}.7"), f"{name}.8")

    def as_tokens(x):
        return x.reshape(len(x), *x.shape[2:], x.shape[1]) if legacy else x.permute(0, 2, 3, 1)

    def as_map(y, shape):
        return y.reshape(shape) if legacy else y.permute(0, 3, 1, 2)

    def kan(x, name):
        weight = weights[f"{name}.layernorm.weight"]
        x = F.layer_norm(x, weight.shape, weight, weights[f"{name}.layernorm.bias"])
        bumps = 1 - torch.tanh((x[..., None] - weights[f"{name}.rbf.grid"]) / 0.33) ** 2
        return linear(bumps.flatten(-2), f"{name}.spline_linear")

    x = image
    for i in range(4):
        x = norm(conv(x, f"stem.{i}.conv", stride=1 if i in (1, 2) else 2), f"stem.{i}.norm").relu()
    for i, (whole, stage) in enumerate(zip(IS_GLOBAL, STAGE, strict=True)):
        name = f"features.{i}"
        if stage and STAGE[i - 1] != stage:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        if f"{name}.patch_embed.conv.weight" in weights:
            x = norm(conv(x, f"{name}.patch_embed.conv"), f"{name}.patch_embed.norm")
        y = norm(x, f"{name}.norm1")
        if not whole:
            y = as_tokens(y)
            height, width, dim = y.shape[1:]
            y = F.pad(y, (0, 0, 0, max(0, 7 - width), 0, max(0, 7 - height)))
            rpb = weights[f"{name}.attn.rpb"]
            y = linear(attention(linear(y, f"{name}.attn.qkv"), rpb, dim // 32, (7, 7), (1, 1)), f"{name}.attn.proj")
            x = x + as_map(y[:, :height, :width], x.shape)
            x = x + gated(norm(x, f"{name}.norm2"), f"{name}.conv.conv")
            continue
        tokens = keys = y.flatten(2)  # batch, dim, tokens
        if stage < 3:
            run = (8, 4, 2)[stage] ** 2
            count = max(1, tokens.shape[2] // run)
            keys = torch.stack([tokens[:, :, j * run : (j + 1) * run].mean(2) for j in range(count)], 2)
            keys = norm(keys, f"{name}.e_mhsa.norm")
        q, k, v = (
            linear(t.mT, f"{name}.e_mhsa.{part}").unflatten(-1, (-1, 32)).transpose(1, 2)
            for part, t in zip("qkv", (tokens, keys, keys), strict=True)
        )
        y = ((q @ k.mT) * 32**-0.5).softmax(-1) @ v
        y = linear(y.transpose(1, 2).flatten(2), f"{name}.e_mhsa.proj")
        x = x + y.mT.reshape(x.shape)
        y = norm(conv(x, f"{name}.projection.conv"), f"{name}.projection.norm")
        mhca = norm(conv(y, f"{name}.mhca.group_conv3x3"), f"{name}.mhca.norm").relu()
        x = torch.cat([x, y + conv(mhca, f"{name}.mhca.projection")], 1)
        y = as_tokens(norm(x, f"{name}.norm2"))
        x = x + as_map(kan(kan(y, f"{name}.kan.layers.0"), f"{name}.kan.layers.1"), x.shape)
    return linear(norm(x, "norm").mean((2, 3)), "proj_head.0")


@pytest.mark.parametrize("legacy", [True, False])
def test_published_weights(legacy):
    weights, model = published(), MedViT(**SMALL, num_classes=5, legacy_reshape=legacy).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    for size in ((64, 96), (36, 20)):  # at the second, the pooled attention has fewer tokens than it averages
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model(image), logits(weights, image, legacy), rtol=1e-8, atol=1e-8)


def test_wrong_weights():
    model = MedViT(**SMALL, num_classes=5)
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="not MedViTV2 weights for this MedViT.*are missing"):
        checkpoint_filter_fn(dict(list(published().items())[:100]), model)
    with pytest.raises(ValueError, match="are unknown"):
        checkpoint_filter_fn(timm.create_model("resnet18").state_dict(), model)
    with pytest.raises(ValueError, match="are unknown"):  # more blocks than the model has
        checkpoint_filter_fn(published() | {"features.7.norm1.weight": torch.ones(160)}, model)
