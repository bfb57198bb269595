"""RAVLT and MALA: sizes, timm's contract, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_linear import reference, turning
from timm_contract import CHECKS, forward, parameters

from vision_attn.backbones.ravlt import RAVLT, checkpoint_filter_fn

COUNTS = {
    "ravlt_tiny": 14_897_768,
    "ravlt_small": 25_591_208,
    "ravlt_base": 48_241_288,
    "ravlt_large": 95_242_440,
    "mala_tiny": 16_449_128,
    "mala_small": 27_142_568,
    "mala_base": 49_792_648,
    "mala_large": 97_766_088,
}


def test_every_name_is_counted():
    assert set(timm.list_models(module="ravlt")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("ravlt_tiny")


def test_forward():
    forward("mala_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "ravlt_tiny"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_rest(check, name):
    check(name)


def test_initial_scales():
    model = RAVLT(dims=(16,) * 4, depths=(1,) * 4, num_heads=(2,) * 4, layer_scale=(1.0, 1.0, 1e-6, 1e-6))
    assert [stage.blocks[0].ls2.gamma[0].item() for stage in model.stages] == pytest.approx([1, 1, 1e-6, 1e-6])


# -- weights of small models, with the names and shapes of published files --

DIMS, DEPTHS, HEADS, PROJECTION = (16, 16, 32), (1, 2, 1), (2, 1, 2), 24


def build(kind, **options):
    sizes = {"dims": DIMS, "depths": DEPTHS, "num_heads": HEADS, "projection": PROJECTION, "mlp_ratio": 2.0}
    model = RAVLT(kind, **sizes, layer_scale=(1.0,) * 3, num_classes=5, **options)
    return model.double().eval()


def published(kind):
    """Random weights; NaLaFormer has linear layers where the others have 1 x 1 convolutions."""
    generator, weights = torch.Generator().manual_seed(0), {}
    point = () if kind == "nala" else (1, 1)

    def layer(name, *shape):
        fan = max(torch.Size(shape[1:]).numel(), 1)
        draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:1])]
        weights[f"{name}.weight"] = draws[0] / fan**0.5 if len(shape) > 1 else 1 + draws[0] / 4
        weights[f"{name}.bias"] = draws[1] / 4

    def batch_norm(name, dim):
        layer(name, dim)
        weights[f"{name}.running_mean"] = torch.randn(dim, generator=generator, dtype=torch.float64) / 4
        weights[f"{name}.running_var"] = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    half = DIMS[0] // 2
    for i, (inputs, outputs) in enumerate(((3, half), (half, half), (half, half), (half, DIMS[0]))):
        layer(f"patch_embed.proj.{3 * i}", outputs, inputs, 3, 3)
        batch_norm(f"patch_embed.proj.{3 * i + 1}", outputs)
    for i, (dim, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        weights[f"layers.{i}.RoPE.angle"] = torch.zeros(dim // HEADS[i] // 2)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            for norm in ("norm1.norm", "norm2.norm", *(["attn.ln"] if kind == "nala" else [])):
                layer(f"{block}.{norm}", dim)
            for conv in ("cpe1", "cpe2") if kind == "nala" else ("pos",):
                layer(f"{block}.{conv}", dim, 1, 3, 3)
            layer(f"{block}.attn.{'qkvg' if kind == 'nala' else 'qkvo'}", 4 * dim, dim, *point)
            layer(f"{block}.attn.lepe", dim, 1, 5, 5)
            layer(f"{block}.attn.{'out_proj' if kind == 'nala' else 'proj'}", dim, dim, *point)
            layer(f"{block}.ffn.fc1", 2 * dim, dim, *point)
            layer(f"{block}.ffn.fc2", dim, 2 * dim, *point)
            layer(f"{block}.ffn.dwconv", 2 * dim, 1, 3, 3)
            for n in (1, 2):
                weights[f"{block}.gamma_{n}"] = torch.rand(1, dim, 1, 1, generator=generator, dtype=torch.float64)
        if i + 1 < len(DIMS):
            layer(f"layers.{i}.downsample.reduction", DIMS[i + 1], dim, 3, 3)
            batch_norm(f"layers.{i}.downsample.norm", DIMS[i + 1])
    layer("proj", PROJECTION, DIMS[-1], *point)
    batch_norm("norm", PROJECTION)
    layer("head", 5, PROJECTION, 1, 1)
    return weights


def logits(kind, weights, image):
    """The model from its formulas, on maps `[batch, channels, height, width]` and published names."""

    def conv(x, name, **options):
        weight = weights[f"{name}.weight"]
        weight = weight[..., None, None] if weight.ndim == 2 else weight
        return F.conv2d(x, weight, weights[f"{name}.bias"], **options)

    def around(x, name, side):
        return conv(x, name, padding=side // 2, groups=x.shape[1])

    def batch_norm(x, name):
        entries = [weights[f"{name}.{e}"] for e in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *entries)

    def norm(x, name, eps=1e-6):
        entries = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *entries, eps).permute(0, 3, 1, 2)

    def attention(x, name, heads, linear):
        parts = conv(x, f"{name}.{'qkvg' if kind == 'nala' else 'qkvo'}").chunk(4, 1)
        q, k, v = (p.permute(0, 2, 3, 1).unflatten(-1, (heads, -1)) for p in parts[:3])
        turn = turning(x.shape[2:], q.shape[-1])
        if linear:
            out = reference(kind, q, k, v, turn=turn)
        else:
            q, k = (torch.einsum("nij,bnhj->bnhi", turn, t.flatten(1, 2)) for t in (q, k))
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
            out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.flatten(1, 2)).view(v.shape)
        out = out.flatten(3).permute(0, 3, 1, 2) + around(parts[2], f"{name}.lepe", 5)
        if kind == "nala":
            return conv(norm(out, f"{name}.ln", 1e-5) * F.silu(parts[3]), f"{name}.out_proj")
        return conv(out * parts[3], f"{name}.proj")

    def block(x, name, heads, linear):
        x = x + around(x, f"{name}.{'cpe1' if kind == 'nala' else 'pos'}", 3)
        x = x + weights[f"{name}.gamma_1"] * attention(norm(x, f"{name}.norm1.norm"), f"{name}.attn", heads, linear)
        if kind == "nala":
            x = x + around(x, f"{name}.cpe2", 3)
        y = F.gelu(conv(norm(x, f"{name}.norm2.norm"), f"{name}.ffn.fc1"))
        return x + weights[f"{name}.gamma_2"] * conv(y + around(y, f"{name}.ffn.dwconv", 3), f"{name}.ffn.fc2")

    x = image
    for i, stride in enumerate((2, 1, 1, 2)):
        x = batch_norm(conv(x, f"patch_embed.proj.{3 * i}", stride=stride, padding=1), f"patch_embed.proj.{3 * i + 1}")
        x = F.gelu(x) if i < 3 else x
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            x = block(x, f"layers.{i}.blocks.{j}", HEADS[i], linear=i < 2)
        if i + 1 < len(DIMS):
            down = f"layers.{i}.downsample"
            x = batch_norm(conv(x, f"{down}.reduction", stride=2, padding=1), f"{down}.norm")
    return conv(F.silu(batch_norm(conv(x, "proj"), "norm")).mean((2, 3), keepdim=True), "head").flatten(1)


@pytest.mark.parametrize("kind", ["rala", "mala"])
@torch.no_grad()
def test_published_weights(kind):
    check_published(kind)


def check_published(kind, **options):
    weights, model = published(kind), build(kind, **options)
    image = torch.randn(2, 3, 36, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for wrapped in (weights, {"model": weights}, {"state_dict": weights}):
        model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    torch.testing.assert_close(model(image), logits(kind, weights, image))
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: {k: v for k, v in w.items() if "lepe" not in k},
        lambda w: {**w, "layers.0.blocks.0.attn.rpb": torch.zeros(1)},
        lambda w: {f"backbone.{k}": v for k, v in w.items()},
        lambda w: {},
    ],
)
def test_other_weights(spoil):
    with pytest.raises(ValueError, match="not RAVLT, MALA or NaLaFormer weights"):
        checkpoint_filter_fn(spoil(published("rala")), build("rala"))


def test_weights_of_another_size():
    with pytest.raises(RuntimeError, match="size mismatch"):
        model = RAVLT(dims=(32, 16, 32), depths=DEPTHS, num_heads=HEADS, projection=PROJECTION, layer_scale=(1.0,) * 3)
        model.load_state_dict(checkpoint_filter_fn(published("rala"), model), strict=False)
