"""InLine-Swin and InLine-DeiT: sizes, timm's contract, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_linear import reference
from timm.models import generate_default_cfgs
from timm.models._features_fx import FeatureGraphNet
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.inline import (
    InLineDeiT,
    LinearSwin,
    _create_deit,
    checkpoint_filter_fn,
    deit_checkpoint_filter_fn,
)
from vision_attn.backbones.skeleton import cfg

COUNTS = {
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
}
SWIN = {"depths": (2, 2, 3, 1), "linear": (2, 2, 1, 0), "dim": 8, "num_heads": (1, 2, 4, 8)}
DEIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
deit_cfg = {"first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None, "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        "small_inline_swin.untrained": cfg(first_conv="stem.proj"),
        "small_inline_deit.untrained": cfg(input_size=(3, 96, 96), **deit_cfg),
    }
)
register_variants(globals(), LinearSwin, {"small_inline_swin": SWIN}, checkpoint_filter_fn)
register_variants(globals(), InLineDeiT, {"small_inline_deit": DEIT}, deit_checkpoint_filter_fn, build=_create_deit)
# nodes of a graph hold the class token too, so that features by fx have one token more; see test_fx_of_deit
REST = [check for check in CHECKS if check.__name__ != "fx"]


def test_every_name_is_counted():
    assert set(timm.list_models(module="inline")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("small_inline_swin")


@pytest.mark.parametrize("check", REST, ids=lambda check: check.__name__)
def test_contract_of_deit(check):
    check("small_inline_deit")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    if check in REST or "deit" not in name:
        check(name)


def test_fx_of_deit():
    image = torch.randn(2, 3, 96, 96)
    model = timm.create_model("small_inline_deit").eval()
    plain = model.forward_intermediates(image, intermediates_only=True)
    for tokens, y in zip(FeatureGraphNet(model, out_indices=(0, 1, 2))(image), plain, strict=True):
        torch.testing.assert_close(tokens[:, 1:].mT.unflatten(2, (6, 6)), y)


def test_types_of_attention():
    kinds = {}
    for size in ("tiny", "small", "base"):
        with torch.device("meta"):
            model = timm.create_model(f"inline_swin_{size}")
        kinds[size] = [
            "".join("I" if hasattr(block.attn, "kind") else "s" if block.attn.shift else "w" for block in stage.blocks)
            for stage in model.stages
        ]
    assert kinds["tiny"] == ["II", "II", "IIIIII", "ws"]
    assert kinds["small"] == ["II", "II", "ws" * 9, "ws"]
    assert kinds["base"] == ["II", "II", "II" + "ws" * 8, "ws"]


def test_deit_is_for_square_maps():
    model = timm.create_model("small_inline_deit", dynamic_img_size=True)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="a square map, without a mask; got 25 tokens"):
        model(torch.randn(1, 3, 64, 96))


# -- weights of small models, with the names and shapes of published files --

DIM, DEPTHS, HEADS, WINDOW = 8, (2, 3), (1, 2), 3


class Weights:
    """Random weights, and layers of them."""

    def __init__(self):
        self.generator, self.weights = torch.Generator().manual_seed(0), {}

    def layer(self, name, *shape, bias=True):
        fan = max(torch.Size(shape[1:]).numel(), 1)
        draws = [torch.randn(s, generator=self.generator, dtype=torch.float64) for s in (shape, shape[:1])]
        self.weights[f"{name}.weight"] = draws[0] / fan**0.5 if len(shape) > 1 else 1 + draws[0] / 4
        if bias:
            self.weights[f"{name}.bias"] = draws[1] / 4

    def table(self, name, *shape):
        self.weights[name] = torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")


def swin_weights(norm, attention):
    """Those of a small Swin; `norm(name, dim)` and `attention(name, i, dim)` add what a family has of its own."""
    own = Weights()
    own.layer("patch_embed.proj", DIM, 3, 4, 4)
    norm(own, "patch_embed.norm", DIM)
    for i, depth in enumerate(DEPTHS):
        dim = DIM * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            norm(own, f"{block}.norm1", dim)
            if j < 2 - i:
                attention(own, f"{block}.attn", i, dim)
            else:
                own.table(f"{block}.attn.relative_position_bias_table", (2 * WINDOW - 1) ** 2, HEADS[i])
                own.weights[f"{block}.attn.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2)
                own.weights[f"{block}.attn_mask"] = torch.zeros(1)
            own.layer(f"{block}.attn.qkv", 3 * dim, dim)
            own.layer(f"{block}.attn.proj", dim, dim)
            norm(own, f"{block}.norm2", dim)
            own.layer(f"{block}.mlp.fc1", 2 * dim, dim)
            own.layer(f"{block}.mlp.fc2", dim, 2 * dim)
    own.layer("layers.0.downsample.reduction", 2 * DIM, 4 * DIM, bias=False)
    norm(own, "layers.0.downsample.norm", 4 * DIM)
    norm(own, "norm", dim)
    own.layer("head", 5, dim)
    return own


def swin_logits(own, image, norm, attention):
    """A small Swin from its formulas; `norm(x, name)` and `attention(q, k, v, x, name)` of a family."""

    def windows(q, k, v, name, shift):
        """Windows by comparing the coordinates of tokens, on maps that windows divide."""
        grid = q.shape[1:3]
        y, z = (t.flatten() for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        cut = [(t - shift).div(WINDOW, rounding_mode="floor") for t in (y, z)]
        same = (cut[0][:, None] == cut[0]) & (cut[1][:, None] == cut[1])
        dy, dz = (t[:, None] - t + WINDOW - 1 for t in (y, z))
        bias = own.weights[f"{name}.relative_position_bias_table"][((2 * WINDOW - 1) * dy + dz).where(same, 0)]
        scores = torch.einsum("bihd,bjhd->bhij", q.flatten(1, 2), k.flatten(1, 2)) * q.shape[-1] ** -0.5
        weights = (scores + bias.permute(2, 0, 1)).masked_fill(~same, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v.flatten(1, 2)).view(v.shape)

    x = F.conv2d(image, own.weights["patch_embed.proj.weight"], own.weights["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            y = norm(x, f"{block}.norm1")
            q, k, v = own.linear(y, f"{block}.attn.qkv").unflatten(-1, (3, HEADS[i], -1)).unbind(3)
            if j < 2 - i:
                y = attention(q, k, v, y, f"{block}.attn")
            else:
                y = windows(q, k, v, f"{block}.attn", WINDOW // 2 if j % 2 else 0)
            x = x + own.linear(y.flatten(3), f"{block}.attn.proj")
            x = x + own.mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
        if i == 0:
            x = torch.cat([x[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
            x = own.linear(norm(x, "layers.0.downsample.norm"), "layers.0.downsample.reduction")
    return own.linear(norm(x, "norm").mean((1, 2)), "head")


def local(own, v, x, name, heads):
    """The convolution of v `[batch, height, width, channels]` with taps from the mean token of x."""

    def grouped(x, name):
        parts = (t.chunk(heads, axis) for t, axis in ((x, 1), (own.weights[f"{name}.weight"][..., 0], 0)))
        parts = [b @ w.T for b, w in zip(*parts, strict=True)]
        return torch.cat(parts, 1) + own.weights[f"{name}.bias"]

    taps = grouped(F.gelu(grouped(x, f"{name}.residual.0")), f"{name}.residual.2").view(len(v), -1, 1, 3, 3)
    maps = v.permute(0, 3, 1, 2)
    return torch.cat([F.conv2d(m[None], t, padding=1, groups=len(t)) for m, t in zip(maps, taps, strict=True)]).permute(
        0, 2, 3, 1
    )


def add_residual(own, name, i, dim, heads=HEADS):
    own.layer(f"{name}.residual.0", dim, dim // heads[i], 1)
    own.layer(f"{name}.residual.2", 9 * dim, dim // heads[i], 1)


@torch.no_grad()
def test_published_swin_weights():
    own = swin_weights(lambda own, name, dim: own.layer(name, dim), add_residual)
    options = {"linear": (2, 1), "depths": DEPTHS, "dim": DIM, "num_heads": HEADS, "window": WINDOW, "mlp_ratio": 2.0}
    model = LinearSwin(**options, num_classes=5).double().eval()
    image = torch.randn(2, 3, 48, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def attention(q, k, v, x, name):
        out = reference("inline", q, k, v)
        return out + local(own, v.flatten(3), x.mean((1, 2)), name, q.shape[3]).view(v.shape)

    for wrapped in (own.weights, {"model": own.weights}):
        model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    torch.testing.assert_close(model(image), swin_logits(own, image, own.norm, attention))
    spoiled = {name: value for name, value in own.weights.items() if "residual" not in name}
    with pytest.raises(ValueError, match="not InLine-Swin weights"):
        checkpoint_filter_fn(spoiled, model)


@torch.no_grad()
def test_published_deit_weights():
    own, dim, heads = Weights(), 12, 2
    own.layer("patch_embed.proj", dim, 3, 16, 16)
    own.table("cls_token", 1, 1, dim)
    own.table("pos_embed", 1, 17, dim)
    for j in range(2):
        block = f"blocks.{j}"
        for norm in ("norm1", "norm2"):
            own.layer(f"{block}.{norm}", dim)
        own.layer(f"{block}.attn.qkv", 3 * dim, dim)
        own.layer(f"{block}.attn.proj", dim, dim)
        add_residual(own, f"{block}.attn", 0, dim, [heads])
        own.layer(f"{block}.mlp.fc1", 4 * dim, dim)
        own.layer(f"{block}.mlp.fc2", dim, 4 * dim)
    own.layer("norm", dim)
    own.layer("head", 5, dim)
    model = InLineDeiT(img_size=64, embed_dim=dim, depth=2, num_heads=heads, num_classes=5).double().eval()
    model.load_state_dict(deit_checkpoint_filter_fn({"model": own.weights}, model))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = F.conv2d(image, own.weights["patch_embed.proj.weight"], own.weights["patch_embed.proj.bias"], stride=16)
    x = torch.cat([own.weights["cls_token"].expand(2, -1, -1), x.flatten(2).mT], 1) + own.weights["pos_embed"]
    for j in range(2):
        name = f"blocks.{j}.attn"
        y = own.norm(x, f"blocks.{j}.norm1", 1e-6)
        q, k, v = own.linear(y, f"{name}.qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        out = reference("inline", q, k, v).flatten(2)
        out[:, 1:] += local(own, v.flatten(2)[:, 1:].unflatten(1, (4, 4)), y.mean(1), name, heads).flatten(1, 2)
        x = x + own.linear(out, f"{name}.proj")
        x = x + own.mlp(own.norm(x, f"blocks.{j}.norm2", 1e-6), f"blocks.{j}.mlp")
    torch.testing.assert_close(model(image), own.linear(own.norm(x, "norm", 1e-6)[:, 0], "head"))
