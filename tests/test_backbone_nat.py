"""NAT, DiNAT, DiNAT_s and the isotropic models: sizes, timm's contract, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_neighborhood import attention
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, backward, features, forward, groups, parameters, torchscript

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.nat import NAT, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

COUNTS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}
SMALL = {"depths": (1, 2, 1, 2), "dim": 16, "num_heads": (1, 2, 4, 8), "dilations": (3, 2, 2, 1), "layer_scale": 0.1}
LAYOUTS = {"test_nat": "conv", "test_nat_merge": "merge", "test_nat_isotropic": "isotropic"}
default_cfgs = generate_default_cfgs(
    {
        "test_nat.untrained": cfg(first_conv="stem.proj.0"),
        "test_nat_merge.untrained": cfg(first_conv="stem.proj"),
        "test_nat_isotropic.untrained": cfg(first_conv="stem.proj", pool_size=(14, 14)),
    }
)
register_variants(
    globals(), NAT, {name: {**SMALL, "layout": layout} for name, layout in LAYOUTS.items()}, checkpoint_filter_fn
)


def test_every_name_is_counted():
    assert set(timm.list_models(module="nat")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("test_nat")


@pytest.mark.parametrize("name", ["test_nat_merge", "test_nat_isotropic"])
@pytest.mark.parametrize("check", [forward, backward, features, torchscript, groups], ids=lambda check: check.__name__)
def test_contract_of_other_layouts(check, name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat_mini", "nat_small", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_forward_of_published_sizes(name):
    forward(name)


@pytest.mark.parametrize(
    "name, stage, window, dilations, scale",
    [
        ("nat_small", 2, 7, [1, 1, 1, 1], True),
        ("dinat_small", 0, 7, [1, 8, 1], False),
        ("dinat_base", 1, 7, [1, 4, 1, 4], True),
        ("dinat_large_384", 2, 7, [1, 3, 1, 3], False),
        ("dinat_large_384_11x11", 0, 11, [1, 8, 1], False),
        ("dinat_s_tiny", 1, 7, [1, 4], False),
        ("dinat_s_large_384", 0, 7, [1, 13], False),
        ("nat_isotropic_small", 1, 7, [1, 1, 1], False),
        ("dinat_isotropic_small", 1, 7, [2, 1, 2], False),  # blocks 4 to 6: the turns do not start anew
        ("vitrpb_small", 3, 14, [1, 1, 1], False),
    ],
)
def test_windows(name, stage, window, dilations, scale):
    with torch.device("meta"):
        blocks = timm.create_model(name).stages[stage].blocks
    assert [block.attn.dilation for block in blocks][: len(dilations)] == dilations
    assert {block.attn.window for block in blocks} == {window}
    assert hasattr(blocks[0].ls1, "gamma") == scale


WEIGHTS = {  # small models: our options, and what the published files say of them
    "nat": {"depths": (2, 1), "layer_scale": 0.5, "mlp_ratio": 3.0},
    "dinat": {"depths": (1, 2), "dilations": (3, 2), "mlp_ratio": 2.0},
    "dinat_s": {"depths": (2, 1), "dilations": (2, 1), "layout": "merge", "mlp_ratio": 4.0},
    "isotropic": {"depths": (3, 3), "dilations": (2, 2), "layout": "isotropic", "mlp_ratio": 4.0},
}
DIM, WINDOW = 8, 3


def build(kind):
    heads = (2, 2) if kind == "isotropic" else (2, 4)
    options = {"dim": DIM, "num_heads": heads, "window": WINDOW, "num_classes": 5, **WEIGHTS[kind]}
    return NAT(**options).double().eval()


def published(kind, seed=0):
    """Random weights with the names and shapes of a published file."""
    options, shapes = WEIGHTS[kind], {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    if kind in ("nat", "dinat"):
        layer("patch_embed.proj.0", DIM // 2, 3, 3, 3)
        layer("patch_embed.proj.1", DIM, DIM // 2, 3, 3)
    else:
        side = 16 if kind == "isotropic" else 4
        layer("patch_embed.proj", DIM, 3, side, side)
    layer("patch_embed.norm", DIM)
    stages = [sum(options["depths"])] if kind == "isotropic" else options["depths"]
    for i, depth in enumerate(stages):
        dim, heads = DIM * 2**i, 2 * 2**i
        level = f"levels.{i}" if kind in ("nat", "dinat") else f"layers.{i}"
        for j in range(depth):
            block = f"layers.{j}" if kind == "isotropic" else f"{level}.blocks.{j}"
            layer(f"{block}.norm1", dim)
            layer(f"{block}.attn.qkv", 3 * dim, dim)
            shapes[f"{block}.attn.rpb"] = (heads, 2 * WINDOW - 1, 2 * WINDOW - 1)
            layer(f"{block}.attn.proj", dim, dim)
            layer(f"{block}.norm2", dim)
            hidden = int(dim * options["mlp_ratio"])
            layer(f"{block}.mlp.fc1", hidden, dim)
            layer(f"{block}.mlp.fc2", dim, hidden)
            if options.get("layer_scale"):
                shapes[f"{block}.gamma1"] = shapes[f"{block}.gamma2"] = (dim,)
        if i + 1 < len(stages):
            if kind == "dinat_s":
                layer(f"{level}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
                layer(f"{level}.downsample.norm", 4 * dim)
            else:
                layer(f"{level}.downsample.reduction", 2 * dim, dim, 3, 3, bias=False)
                layer(f"{level}.downsample.norm", 2 * dim)
    layer("norm", dim)
    layer("head", 5, dim)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def logits(kind, weights, image):
    """The model from its formulas, on weights under their published names."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def conv(x, name, **options):
        x = F.conv2d(x.permute(0, 3, 1, 2), weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)
        return x.permute(0, 2, 3, 1)

    def block(x, name, dilation):
        dim = x.shape[-1]
        heads, height, width = dim // 4, *x.shape[1:3]
        need = WINDOW * dilation
        y = F.pad(norm(x, f"{name}.norm1"), (0, 0, 0, max(0, need - width), 0, max(0, need - height)))
        window, dilation = (WINDOW, WINDOW), (dilation, dilation)
        y = attention(linear(y, f"{name}.attn.qkv"), weights[f"{name}.attn.rpb"], heads, window, dilation)
        y = linear(y, f"{name}.attn.proj")[:, :height, :width]
        x = x + y * weights.get(f"{name}.gamma1", 1)
        y = linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + y * weights.get(f"{name}.gamma2", 1)

    options = WEIGHTS[kind]
    dilations = options.get("dilations", (1, 1))
    x = image.permute(0, 2, 3, 1)
    if kind in ("nat", "dinat"):
        for i in range(2):
            x = conv(x, f"patch_embed.proj.{i}", stride=2, padding=1)
    else:
        x = conv(x, "patch_embed.proj", stride=16 if kind == "isotropic" else 4)
    x = norm(x, "patch_embed.norm")
    if kind == "isotropic":
        for j in range(sum(options["depths"])):
            x = block(x, f"layers.{j}", dilations[0] if j % 2 else 1)
    else:
        for i, depth in enumerate(options["depths"]):
            level = f"levels.{i}" if kind in ("nat", "dinat") else f"layers.{i}"
            for j in range(depth):
                x = block(x, f"{level}.blocks.{j}", dilations[i] if j % 2 else 1)
            if f"{level}.downsample.reduction.weight" not in weights:
                continue
            down = f"{level}.downsample"
            if kind == "dinat_s":
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
                x = linear(norm(x, f"{down}.norm"), f"{down}.reduction")
            else:
                x = norm(conv(x, f"{down}.reduction", stride=2, padding=1), f"{down}.norm")
    return linear(norm(x, "norm").mean((1, 2)), "head")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_published_weights(kind, wrapper):
    weights, model = published(kind), build(kind)
    size = (80, 112) if kind == "isotropic" else (36, 28)  # odd maps
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    extra = {"layers.0.attn.relative_position_index": torch.zeros(1)} if kind == "isotropic" else {}
    model.load_state_dict(checkpoint_filter_fn({wrapper: weights} if wrapper else {**weights, **extra}, model))
    torch.testing.assert_close(model(image), logits(kind, weights, image), rtol=1e-9, atol=1e-9)


def test_our_weights_pass():
    model = build("nat")
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_without_a_classifier():
    model = build("dinat")
    model.reset_classifier(0)
    model.load_state_dict(checkpoint_filter_fn(published("dinat"), model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: published("dinat_s"), "not NAT, DiNAT or DiNAT_s weights for this NAT.*are missing.*are unknown"),
        (lambda w: {k: v for k, v in list(w.items())[:20]}, "are missing, such as stages"),
        (lambda w: {k.replace("rpb", "bias_table"): v for k, v in w.items()}, "unknown, such as .*bias_table"),
        (lambda w: timm.create_model("resnet18").state_dict(), "are unknown, such as conv1.weight"),
        (lambda w: {}, "are missing"),
    ],
    ids=["another model", "truncated", "renamed", "another family", "empty"],
)
def test_wrong_weights(change, message):
    model = build("nat")
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(change(published("nat")), model)


def test_through_timm(tmp_path):
    """`pretrained=True` with a local file in the published layout."""
    names = timm.create_model("test_nat").state_dict()
    changes = (("stem.", "patch_embed."), ("stages.", "levels."), ("head.fc.", "head."))
    weights = {}
    for name, value in names.items():
        for i in (1, 2, 3):
            name = name.replace(f"stages.{i}.downsample", f"stages.{i - 1}.downsample")
        for ours, theirs in changes:
            name = name.replace(ours, theirs)
        weights[name] = torch.full_like(value, 0.01)
    torch.save(weights, tmp_path / "nat.pth")
    overlay = {"file": str(tmp_path / "nat.pth"), "num_classes": 1000}
    model = timm.create_model("test_nat", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    assert model.stages[2].downsample.norm.weight.eq(0.01).all()
    assert model.head.fc.weight.shape == (7, 128) and model.stem.proj[0].weight.shape[1] == 1
