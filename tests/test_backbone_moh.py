"""MoH-ViT: counts, timm's contract, published weights."""

import pytest
import timm
import torch
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.moh import MoHViT, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg
from vision_attn.modules import load_balance

COUNTS = {
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
}
# every way to split heads, in a model small enough for each run of the tests
TINY = {
    "dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "mlp_ratios": (2, 2, 2, 2),
    "shared_heads": (1, 2, 2, 1), "routed_heads": (0, 0, 2, 3),
}  # fmt: skip
default_cfgs = generate_default_cfgs({"tiny_moh.untrained": cfg(first_conv="stem.proj")})
register_variants(globals(), MoHViT, {"tiny_moh": TINY}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="moh")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("tiny_moh")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moh_transnext_small_75", "moh_transnext_base_50"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


def published(dim, depths, num_heads, mlp_ratios, shared_heads, routed_heads, num_classes=1000):
    """Names and shapes of a released file."""
    shapes = {"head.weight": (num_classes, dim * 8), "head.bias": (num_classes,)}

    def affine(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for i in range(4):
        c, heads = dim * 2**i, num_heads[i]
        affine(f"patch_embed{i + 1}.proj", c, *((c // 2, 3, 3) if i else (3, 7, 7)))
        affine(f"patch_embed{i + 1}.norm", c)
        affine(f"norm{i + 1}", c)
        for j in range(depths[i]):
            at = f"block{i + 1}.{j}."
            affine(f"{at}norm1", c)
            affine(f"{at}norm2", c)
            hidden = int(c * mlp_ratios[i] * 2 / 3)
            affine(f"{at}mlp.fc1", 2 * hidden, c)
            affine(f"{at}mlp.dwconv.dwconv", hidden, 1, 3, 3)
            affine(f"{at}mlp.fc2", c, hidden)
            at += "attn."
            shapes[f"{at}temperature"] = (heads, 1, 1)
            shapes[f"{at}query_embedding"] = (heads, 1, c // heads)
            affine(f"{at}proj", c, c)
            affine(f"{at}cpb_fc1", 512, 2)
            affine(f"{at}cpb_fc2", heads, 512)
            if i < 3:
                affine(f"{at}q", c, c)
                affine(f"{at}kv", 2 * c, c)
                affine(f"{at}sr", c, c, 1, 1)
                affine(f"{at}norm", c)
                shapes[f"{at}relative_pos_bias_local"] = (heads, 9)
                shapes[f"{at}learnable_tokens"] = (heads, c // heads, 9)
                shapes[f"{at}learnable_bias"] = (heads, 1, 9)
            else:
                affine(f"{at}qkv", 3 * c, c)
            if routed_heads[i]:
                shapes[f"{at}wg.weight"] = (heads - shared_heads[i], c)
                if shared_heads[i]:
                    shapes[f"{at}wg_0.weight"] = (2, c)
            if shared_heads[i] > 1:
                shapes[f"{at}wg_1.weight"] = (shared_heads[i], c)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_published_weights_load():
    model, weights = MoHViT(**TINY), published(**TINY)
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    ours = model.state_dict()
    assert len(ours) == len(weights)
    for name, place in {
        "patch_embed1.norm.weight": "stem.norm.weight",
        "patch_embed3.norm.weight": "stages.2.downsample.norm.weight",
        "norm1.weight": "stages.1.downsample.prenorm.weight",
        "norm4.bias": "norm.bias",
        "block3.1.attn.wg_0.weight": "stages.2.blocks.1.attn.router.wg_0.weight",
        "block4.0.attn.proj.weight": "stages.3.blocks.0.attn.proj.weight",
        "block1.0.mlp.dwconv.dwconv.bias": "stages.0.blocks.0.mlp.dwconv.bias",
        "head.weight": "head.fc.weight",
    }.items():
        assert torch.equal(ours[place], weights[name]), name
    again = checkpoint_filter_fn(ours, model)  # our own names pass
    assert again.keys() == ours.keys()


def test_wrong_weights_are_refused():
    model, weights = MoHViT(**TINY), published(**TINY)
    del weights["block3.1.attn.wg.weight"]
    with pytest.raises(ValueError, match="1 are missing, such as stages.2.blocks.1.attn.router.wg.weight"):
        checkpoint_filter_fn(weights, model)
    with pytest.raises(ValueError, match="not MoH-ViT weights"):
        checkpoint_filter_fn(timm.create_model("resnet10t").state_dict(), model)


def test_heads_are_balanced_over_the_whole_model():
    model = MoHViT(**TINY)
    with load_balance(model) as loss:
        model(torch.randn(1, 3, 96, 96))
    loss().backward()
    routed = [name for name, p in model.named_parameters() if p.grad is not None and "wg.weight" in name]
    assert len(routed) == 3
