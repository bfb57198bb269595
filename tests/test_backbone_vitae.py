"""ViTAEv2 + VSA: sizes, timm's contract, and the published weights against an independent forward."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_varied_window import loop
from timm_contract import CHECKS, parameters

from vision_attn.backbones.vitae import ViTAEv2, checkpoint_filter_fn

COUNTS = {
    "vitaev2_vsa_small": 19_773_300,
    "vitaev2_vsa_widepcm_small": 20_342_442,
    "vitaev2_vsa_widepcm_48m": 51_089_119,
    "vitaev2_vsa_widepcm_base": 93_711_532,
}
# The other checks ask more of the skeleton than of this family.
QUICK = {"forward", "backward", "default_cfg", "torchscript", "fx", "groups"}


def test_every_name_is_counted():
    assert set(timm.list_models(module="vitae")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", [c for c in CHECKS if c.__name__ in QUICK], ids=lambda check: check.__name__)
def test_contract(check):
    check("vitaev2_vsa_small")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_whole_contract(check, name):
    check(name)


def test_drop_path_rates_are_the_published_ones():
    with torch.device("meta"):
        model = timm.create_model("vitaev2_vsa_small", drop_path_rate=0.13)
    rates = [[getattr(cell.drop_path, "drop_prob", 0.0) for cell in stage.blocks] for stage in model.stages]
    steps = [[round(rate * 100) for rate in stage] for stage in rates]
    assert steps == [[0, 1], [2, 3], [2, 3, 4, 5, 6, 7, 8, 9], [8, 9]]


EMBEDS, DIMS, HEADS, GROUPS = (6, 6, 6, 12), (6, 12, 12, 24), (1, 2, 2, 4), (1, 2, 3, 4)
DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
WINDOW = 7


class Published:
    """A random state dict in the published layout, and what the published network makes of an image with it."""

    def __init__(self, wide):
        self.weights, width = {}, 3
        for i, (embed, dim, heads, groups) in enumerate(zip(EMBEDS, DIMS, HEADS, GROUPS, strict=True)):
            rc, nc, joined, kernel = f"layers.{i}.RC", f"layers.{i}.NC.0", embed * len(DILATIONS[i]), 3 if i else 7
            for j in range(len(DILATIONS[i])):
                self.add(f"{rc}.PRM.convs.{j}.0", embed, width, kernel, kernel)
            hidden = 2 * dim if wide else embed
            for key, before, sizes, ratio, group in (
                (rc, joined, (width, hidden, hidden, dim), 1, 1),
                (nc, dim, (dim, 4 * dim, dim, dim), 4, groups),
            ):
                for j, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
                    self.add(f"{key}.PCM.{3 * j}", b, a // group, 3, 3)
                    if j < 2:
                        self.norm(f"{key}.PCM.{3 * j + 1}", b, running=True)
                self.add(f"{key}.pos", before, 1, 7, 7)
                self.norm(f"{key}.norm1", before)
                self.norm(f"{key}.norm2", dim)
                self.add(f"{key}.attn.sampling_offsets.2", 2 * heads, before, 1, 1)
                self.add(f"{key}.attn.sampling_scales.2", 2 * heads, before, 1, 1)
                self.add(f"{key}.attn.qkv", 3 * dim, before, 1, 1)
                self.add(f"{key}.attn.proj", dim, dim, 1, 1)
                self.weights[f"{key}.attn.relative_position_bias_table"] = self.random((2 * WINDOW - 1) ** 2, heads)
                self.weights[f"{key}.attn.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2).long()
                self.add(f"{key}.mlp.fc1", ratio * dim, dim)
                self.add(f"{key}.mlp.fc2", dim, ratio * dim)
            width = dim
        self.add("head", 10, DIMS[-1])

    def random(self, *shape):
        return torch.randn(shape, dtype=torch.float64) * 0.3

    def add(self, key, *shape):
        self.weights[f"{key}.weight"] = self.random(*shape) * 3 * math.prod(shape[1:]) ** -0.5
        self.weights[f"{key}.bias"] = self.random(shape[0])

    def norm(self, key, dim, running=False):
        self.weights[f"{key}.weight"], self.weights[f"{key}.bias"] = 1 + self.random(dim), self.random(dim)
        if running:
            self.weights[f"{key}.running_mean"] = self.random(dim)
            self.weights[f"{key}.running_var"] = 1 + self.random(dim).abs()
            self.weights[f"{key}.num_batches_tracked"] = torch.tensor(1)

    def pair(self, key):
        return self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]

    def layer_norm(self, x, key, eps):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], *self.pair(key), eps=eps)

    def beside(self, x, key, strides, groups):
        for j, stride in enumerate(strides):
            x = F.conv2d(x, *self.pair(f"{key}.PCM.{3 * j}"), stride=stride, padding=1, groups=groups)
            if j < 2:
                norm = f"{key}.PCM.{3 * j + 1}"
                x = F.batch_norm(
                    x, self.weights[f"{norm}.running_mean"], self.weights[f"{norm}.running_var"], *self.pair(norm)
                )
                x = F.silu(x)
        return x

    def attention(self, x, key, heads, eps):
        x = x + F.conv2d(x, *self.pair(f"{key}.pos"), padding=3, groups=x.shape[1])
        x = self.layer_norm(x, f"{key}.norm1", eps)
        offsets, scales = (self.pair(f"{key}.attn.sampling_{what}.2") for what in ("offsets", "scales"))
        transform = [
            torch.cat([a.view(heads, 2, -1), b.view(heads, 2, -1)], 1) for a, b in zip(offsets, scales, strict=True)
        ]
        parts = {"transform": (transform[0].view(4 * heads, -1), transform[1].view(-1))}
        parts |= {name: self.pair(f"{key}.attn.{name}") for name in ("qkv", "proj")}
        parts = {name: SimpleNamespace(weight=w.flatten(1), bias=b) for name, (w, b) in parts.items()}
        table = self.weights[f"{key}.attn.relative_position_bias_table"]
        layer = SimpleNamespace(**parts, relative_position_bias_table=table, window=WINDOW, num_heads=heads)
        return loop(layer, x, "classification").movedim(-1, 1)

    def mlp(self, x, key, eps):
        x = F.gelu(F.linear(self.layer_norm(x, f"{key}.norm2", eps), *self.pair(f"{key}.mlp.fc1")))
        return F.linear(x, *self.pair(f"{key}.mlp.fc2")).movedim(-1, 1)

    def __call__(self, x):
        for i, (heads, groups) in enumerate(zip(HEADS, GROUPS, strict=True)):
            rc, nc, stride, kernel = f"layers.{i}.RC", f"layers.{i}.NC.0", 2 if i else 4, 3 if i else 7
            parts = []
            for j, dilation in enumerate(DILATIONS[i]):
                padding = math.ceil(((kernel - 1) * dilation + 1 - stride) / 2)
                conv = self.pair(f"{rc}.PRM.convs.{j}.0")
                parts.append(F.gelu(F.conv2d(x, *conv, stride=stride, padding=padding, dilation=dilation)))
            y = self.attention(torch.cat(parts, 1), rc, heads, 1e-5)
            y = y + self.beside(x, rc, (2, 1, 1) if i else (2, 2, 1), 1)
            x = y + self.mlp(y, rc, 1e-5)
            x = x + self.attention(x, nc, heads, 1e-6) + self.beside(x, nc, (1, 1, 1), groups)
            x = x + self.mlp(x, nc, 1e-6)
        return F.linear(x.mean((2, 3)), *self.pair("head"))


def _model(wide):
    sizes = {"embeds": EMBEDS, "dims": DIMS, "depths": (1,) * 4, "heads": HEADS, "reduction_heads": HEADS}
    groups = {"groups": GROUPS, "reduction_groups": (1, 1, 1, 1)}
    return ViTAEv2(**sizes, **groups, wide=wide, num_classes=10).double().eval()


@pytest.mark.parametrize("wide", [True, False])
def test_published_weights(wide):
    torch.manual_seed(0)
    published, model = Published(wide), _model(wide)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": published.weights}, model))
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(image), published(image))
    model.load_state_dict(checkpoint_filter_fn(model.state_dict(), model))  # our own names pass


def test_refuses_other_weights():
    published, model = Published(True), _model(True)
    with pytest.raises(ValueError, match="not ViTAEv2 \\+ VSA weights"):
        checkpoint_filter_fn(timm.create_model("resnet18").state_dict(), model)
    del published.weights["layers.2.RC.attn.sampling_scales.2.weight"]
    with pytest.raises(ValueError, match="1 are missing, such as stages.2.downsample.attn.transform.weight"):
        checkpoint_filter_fn(published.weights, model)
