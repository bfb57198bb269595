"""Swin + VSA and QFormer: sizes, timm's contract, and the published weights against an independent forward."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_varied_window import loop
from timm_contract import CHECKS, forward, parameters

from vision_attn.backbones.swin_vsa import SwinVSA, checkpoint_filter_fn

COUNTS = {
    "swin_tiny_vsa": 28_779_274,
    "swin_small_vsa": 50_549_338,
    "swin_base_vsa": 89_243_776,
    "qformer_tiny": 29_116_924,
    "qformer_tiny_decomposed": 29_103_586,
}
# The other checks ask more of the skeleton than of this family.
QUICK = {"forward", "backward", "default_cfg", "torchscript", "fx", "groups"}


def test_every_name_is_counted():
    assert set(timm.list_models(module="swin_vsa")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", [c for c in CHECKS if c.__name__ in QUICK], ids=lambda check: check.__name__)
def test_contract(check):
    check("swin_tiny_vsa")


def test_forward():
    forward("qformer_tiny_decomposed")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_whole_contract(check, name):
    check(name)


def test_windows_start_unmoved():
    for quadrangle in (None, "table"):
        model = SwinVSA(depths=(1, 1, 1), dim=8, num_heads=(1, 2, 4), quadrangle=quadrangle)
        for stage in model.stages:
            attn = stage.blocks[0].attn
            assert not attn.transform.weight.any() and not attn.transform.bias.any()
            assert 0.015 < attn.qkv.weight.std() < 0.025


def test_no_decay_of_the_bias_tables():
    model = SwinVSA(depths=(1, 1, 1), dim=8, num_heads=(1, 2, 4))
    assert model.no_weight_decay() == {f"stages.{i}.blocks.0.attn.relative_position_bias_table" for i in range(3)}


class Published:
    """A random state dict in the published layout, and what the published network makes of an image with it."""

    def __init__(self, kind, dim=12, heads=(1, 2, 4, 8), window=7):
        self.heads, self.window, self.weights = heads, window, {}
        self.add("patch_embed.proj", dim, 3, 4, 4)
        self.norm("patch_embed.norm", dim)
        numbers = 4 if kind == "vsa" else 9
        for i, head in enumerate(heads):
            width, key = dim * 2**i, f"layers.{i}.blocks.0"
            self.add(f"{key}.pos", width, 1, window, window)
            self.norm(f"{key}.norm1", width)
            self.norm(f"{key}.norm2", width)
            self.add(f"{key}.attn.qkv", 3 * width, width)
            self.add(f"{key}.attn.proj", width, width)
            self.add(f"{key}.attn.transform.2", numbers * head, width, 1, 1)
            if kind == "decomposed":
                for side in "hw":
                    self.weights[f"{key}.attn.rel_pos_{side}"] = self.random(2 * window - 1, width // head)
            else:
                self.weights[f"{key}.attn.relative_position_bias_table"] = self.random((2 * window - 1) ** 2, head)
                self.weights[f"{key}.attn.relative_position_index"] = torch.zeros(window**2, window**2).long()
            self.add(f"{key}.mlp.fc1", 4 * width, width)
            self.add(f"{key}.mlp.fc2", width, 4 * width)
            if i < len(heads) - 1:
                self.norm(f"layers.{i}.downsample.norm", 4 * width)
                self.add(f"layers.{i}.downsample.reduction", 2 * width, 4 * width, bias=False)
        self.norm("norm", dim * 2 ** (len(heads) - 1))
        self.add("head", 10, dim * 2 ** (len(heads) - 1))

    def random(self, *shape):
        return torch.randn(shape, dtype=torch.float64) * 0.3

    def add(self, key, *shape, bias=True):
        self.weights[f"{key}.weight"] = self.random(*shape) * 3 * math.prod(shape[1:]) ** -0.5
        if bias:
            self.weights[f"{key}.bias"] = self.random(shape[0])

    def norm(self, key, dim):
        self.weights[f"{key}.weight"], self.weights[f"{key}.bias"] = 1 + self.random(dim), self.random(dim)

    def pair(self, key):
        return self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias")

    def linear(self, x, key):
        return F.linear(x, *self.pair(key))

    def layer_norm(self, x, key):
        return F.layer_norm(x, x.shape[-1:], *self.pair(key))

    def attention(self, x, key, heads):
        names = {"qkv": "qkv", "proj": "proj", "transform": "transform.2"}
        parts = {name: self.pair(f"{key}.{theirs}") for name, theirs in names.items()}
        parts = {name: SimpleNamespace(weight=w.flatten(1), bias=b) for name, (w, b) in parts.items()}
        tables = ("relative_position_bias_table", "rel_pos_h", "rel_pos_w")
        tables = {name: self.weights.get(f"{key}.{name}") for name in tables}
        return loop(SimpleNamespace(**parts, **tables, window=self.window, num_heads=heads), x, "swin")

    def __call__(self, x):
        x = F.conv2d(x, *self.pair("patch_embed.proj"), stride=4).movedim(1, -1)
        x = self.layer_norm(x, "patch_embed.norm")
        for i, heads in enumerate(self.heads):
            key = f"layers.{i}.blocks.0"
            weight, bias = self.pair(f"{key}.pos")
            x = x + F.conv2d(x.movedim(-1, 1), weight, bias, padding=3, groups=x.shape[-1]).movedim(1, -1)
            x = x + self.attention(self.layer_norm(x, f"{key}.norm1"), f"{key}.attn", heads)
            y = F.gelu(self.linear(self.layer_norm(x, f"{key}.norm2"), f"{key}.mlp.fc1"))
            x = x + self.linear(y, f"{key}.mlp.fc2")
            if i < len(self.heads) - 1:
                quarters = [x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
                down = f"layers.{i}.downsample"
                x = self.linear(self.layer_norm(torch.cat(quarters, -1), f"{down}.norm"), f"{down}.reduction")
        return self.linear(self.layer_norm(x, "norm").mean((1, 2)), "head")


KINDS = {"vsa": None, "table": "table", "decomposed": "decomposed"}


@pytest.mark.parametrize("kind", KINDS)
def test_published_weights(kind):
    torch.manual_seed(0)
    published = Published(kind)
    model = SwinVSA((1,) * 4, 12, published.heads, quadrangle=KINDS[kind], num_classes=10).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published.weights}, model))
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(image), published(image))
    model.load_state_dict(checkpoint_filter_fn(model.state_dict(), model))  # our own names pass


def test_refuses_other_weights():
    model = SwinVSA((1,) * 4, 12, (1, 2, 4, 8), num_classes=10)
    with pytest.raises(ValueError, match="not Swin \\+ VSA or QFormer weights"):
        checkpoint_filter_fn(Published("decomposed").weights, model)
    with pytest.raises(ValueError, match="quadrangle 'v1'; allowed"):
        SwinVSA(quadrangle="v1")
