"""BiFormer: sizes, timm's contract, and the published weights against an independent forward."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_routing import loop
from timm_contract import CHECKS, parameters

from vision_attn.backbones.biformer import BiFormer, checkpoint_filter_fn
from vision_attn.modules import BiLevelRoutingAttention

COUNTS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}


def test_every_name_is_counted():
    assert set(timm.list_models(module="biformer")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("biformer_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "biformer_tiny"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_rest(check, name):
    check(name)


@pytest.mark.parametrize("name, heads", [("biformer_small", (2, 4, 8)), ("biformer_base", (3, 6, 12))])
def test_stages(name, heads):
    with torch.device("meta"):
        model = timm.create_model(name)
    routed = [stage.blocks[-1].attn for stage in model.stages[:3]]
    assert [(a.num_heads, a.topk, a.regions, a.form) for a in routed] == [
        (h, k, 7, "legacy") for h, k in zip(heads, (1, 4, 16), strict=True)
    ]
    assert model.stages[3].blocks[0].attn.num_heads == 8
    model.set_regions(16)  # as for detection
    assert {m.regions for m in model.modules() if isinstance(m, BiLevelRoutingAttention)} == {16}
    with pytest.raises(ValueError, match="at least 1"):
        model.set_regions(0)


class Published:
    """A random state dict in the published layout, and what the published network makes of an image with it."""

    def __init__(self, layout, dims=(32, 64, 96, 64), topk=(2, 3, 4), ratio=3):
        self.layout, self.dims, self.topk, self.weights = layout, dims, topk, {}
        stl, point = layout != "tiny", (1, 1) if layout == "nchw" else ()
        if stl:
            self.add("downsample_layers.0.0", dims[0], 3, 4, 4)
            self.norm("downsample_layers.0.1", dims[0])
        else:
            for i, (a, b) in ((0, (3, dims[0] // 2)), (3, (dims[0] // 2, dims[0]))):
                self.add(f"downsample_layers.0.{i}", b, a, 3, 3)
                self.norm(f"downsample_layers.0.{i + 1}", b)
        for i, dim in enumerate(dims):
            if i:
                side, conv = (2, 1) if stl else (3, 0)
                self.add(f"downsample_layers.{i}.{conv}", dim, dims[i - 1], side, side)
                self.norm(f"downsample_layers.{i}.{1 - conv}", dims[i - 1] if stl else dim)
            key = self.block(i)
            if not stl:
                self.add(f"{key}.pos_embed", dim, 1, 3, 3)
            for norm in ("norm1", "norm2"):
                self.norm(f"{key}.{norm}", dim, running=False)
            self.add(f"{key}.attn.lepe", dim, 1, 5, 5)
            out, into = ("wo", "qkv.qkv") if layout != "nchw" else ("output_linear", "qkv_linear")
            self.add(f"{key}.attn.{out if i < 3 else 'proj'}", dim, dim, *point)
            self.add(f"{key}.attn.{into if i < 3 else 'qkv'}", 3 * dim, dim, *point, bias=i < 3)
            self.add(f"{key}.mlp.0", ratio * dim, dim, *point)
            self.add(f"{key}.mlp.{2 if stl else 3}", dim, ratio * dim, *point)
        self.norm("norm", dims[-1])
        self.add("head", 10, dims[-1])

    def block(self, i):
        return f"stages.{i}.{'0' if self.layout == 'tiny' else 'blocks.0'}"

    def add(self, key, *shape, bias=True):
        # large enough that no part of the network is lost in rounding
        self.weights[f"{key}.weight"] = torch.randn(shape, dtype=torch.float64) * 1.5 * math.prod(shape[1:]) ** -0.5
        if bias:
            self.weights[f"{key}.bias"] = torch.randn(shape[0], dtype=torch.float64) * 0.3

    def norm(self, key, dim, running=True):
        self.weights[f"{key}.weight"] = torch.rand(dim, dtype=torch.float64) + 0.5
        self.weights[f"{key}.bias"] = torch.randn(dim, dtype=torch.float64) * 0.3
        if running:
            self.weights[f"{key}.running_mean"] = torch.randn(dim, dtype=torch.float64) * 0.3
            self.weights[f"{key}.running_var"] = torch.rand(dim, dtype=torch.float64) + 0.5
            self.weights[f"{key}.num_batches_tracked"] = torch.tensor(1)

    def pair(self, key):
        return self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias")

    def conv(self, x, key, **options):
        return F.conv2d(x, *self.pair(key), **options)

    def batch_norm(self, x, key):
        return F.batch_norm(x, self.weights[f"{key}.running_mean"], self.weights[f"{key}.running_var"], *self.pair(key))

    def linear(self, x, key):
        weight, bias = self.pair(key)
        return F.linear(x, weight.flatten(1), bias)

    def full(self, x, key):
        """Eight heads, and the convolution of the input or, in the nchw layout, of the values."""
        q, k, v = self.linear(x, f"{key}.qkv").chunk(3, -1)
        heads = [t.flatten(1, 2).unflatten(-1, (8, -1)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        source = v if self.layout == "nchw" else x
        local = self.conv(source.movedim(-1, 1), f"{key}.lepe", padding=2, groups=x.shape[-1]).movedim(1, -1)
        return self.linear(out + local, f"{key}.proj")

    def routed(self, x, key, i):
        out, into = ("wo", "qkv.qkv") if self.layout != "nchw" else ("output_linear", "qkv_linear")
        parts = {"qkv": into, "proj": out, "lepe": "lepe"}
        parts = {name: self.pair(f"{key}.{theirs}") for name, theirs in parts.items()}
        parts = {
            name: SimpleNamespace(weight=weight.flatten(1) if name != "lepe" else weight, bias=bias)
            for name, (weight, bias) in parts.items()
        }
        form = "nchw" if self.layout == "nchw" else "legacy"
        options = {"num_heads": x.shape[-1] // 32, "topk": self.topk[i], "regions": 7, "dim": x.shape[-1]}
        return loop(SimpleNamespace(**parts, **options, form=form, mask_padding=False), x)

    def __call__(self, x):
        stl = self.layout != "tiny"
        for i, dim in enumerate(self.dims):
            down = f"downsample_layers.{i}"
            if stl and i == 0:
                x = self.batch_norm(self.conv(x, f"{down}.0", stride=4), f"{down}.1")
            elif stl:
                x = self.conv(self.batch_norm(x, f"{down}.0"), f"{down}.1", stride=2)
            else:
                x = self.batch_norm(self.conv(x, f"{down}.0", stride=2, padding=1), f"{down}.1")
                if i == 0:
                    x = self.batch_norm(self.conv(F.gelu(x), f"{down}.3", stride=2, padding=1), f"{down}.4")
            key = self.block(i)
            if not stl:
                x = x + self.conv(x, f"{key}.pos_embed", padding=1, groups=dim)
            x = x.movedim(1, -1)
            y = F.layer_norm(x, (dim,), *self.pair(f"{key}.norm1"), eps=1e-6)
            x = x + (self.routed(y, f"{key}.attn", i) if i < 3 else self.full(y, f"{key}.attn"))
            y = F.layer_norm(x, (dim,), *self.pair(f"{key}.norm2"), eps=1e-6)
            x = x + self.linear(F.gelu(self.linear(y, f"{key}.mlp.0")), f"{key}.mlp.{2 if stl else 3}")
            x = x.movedim(-1, 1)
        return self.linear(self.batch_norm(x, "norm").mean((2, 3)), "head")


def _model(published):
    options = {"depths": (1, 1, 1, 1), "dims": published.dims, "topk": (*published.topk, 0), "num_classes": 10}
    stl = {"swin_layout": True, "form": "nchw" if published.layout == "nchw" else "legacy"}
    return BiFormer(**options, **(stl if published.layout != "tiny" else {})).double().eval()


@pytest.mark.parametrize("layout", ["tiny", "stl", "nchw"])
def test_published_weights(layout):
    torch.manual_seed(0)
    published = Published(layout)
    model, image = _model(published), torch.randn(1, 3, 68, 96, dtype=torch.float64)
    model.load_state_dict(checkpoint_filter_fn({"model": published.weights}, model))
    torch.testing.assert_close(model(image), published(image))
    model.load_state_dict(checkpoint_filter_fn(model.state_dict(), model))  # our own names pass


def test_refuses_other_weights():
    published = Published("tiny")
    model = _model(published)
    with pytest.raises(ValueError, match="not BiFormer weights"):
        checkpoint_filter_fn(timm.create_model("resnet18").state_dict(), model)
    del published.weights["stages.1.0.attn.wo.bias"]
    with pytest.raises(ValueError, match="1 are missing, such as stages.1.blocks.0.attn.proj.bias"):
        checkpoint_filter_fn(published.weights, model)
