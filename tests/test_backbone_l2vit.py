"""L2ViT: sizes, timm's contract, published weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_module_linear import reference
from timm.models import generate_default_cfgs
from timm_contract import CHECKS, parameters

from vision_attn.backbones.entries import register_variants
from vision_attn.backbones.l2vit import L2ViT, checkpoint_filter_fn
from vision_attn.backbones.skeleton import cfg

COUNTS = {
    "l2vit_tiny": 28_596_781,
    "l2vit_small": 50_199_157,
    "l2vit_base": 88_577_188,
    "l2vit_base_384": 88_577_188,
}
TINY = {"depths": (2, 2, 2, 1), "dims": (8, 16, 32, 32), "num_heads": (1, 2, 4, 4)}
default_cfgs = generate_default_cfgs({"small_l2vit.untrained": cfg(first_conv="stem.proj.0")})
register_variants(globals(), L2ViT, {"small_l2vit": TINY}, checkpoint_filter_fn)


def test_every_name_is_counted():
    assert set(timm.list_models(module="l2vit")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("small_l2vit")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_published_sizes(check, name):
    check(name)


def test_windows():
    with torch.device("meta"):
        model = timm.create_model("l2vit_base_384", depths=(2, 2, 2, 2))
    assert [stage.blocks[0].attn.window for stage in model.stages] == [12] * 4
    assert [stage.blocks[1].attn.kind for stage in model.stages] == ["l2vit"] * 4


# -- weights of a small model, with the names and shapes of published files --

DIMS, DEPTHS, HEADS, WINDOW = (8, 12), (2, 3), (2, 3), 4


def build():
    model = L2ViT(DEPTHS, DIMS, HEADS, WINDOW, mlp_ratio=2.0, num_classes=5)
    return model.double().eval()


def published():
    generator, weights = torch.Generator().manual_seed(0), {}

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

    layer("downsample_layers.0.proj.proj.0", DIMS[0] // 2, 3, 3, 3)
    batch_norm("downsample_layers.0.proj.proj.1", DIMS[0] // 2)
    layer("downsample_layers.0.proj.proj.3", DIMS[0], DIMS[0] // 2, 3, 3)
    batch_norm("downsample_layers.0.proj.proj.4", DIMS[0])
    layer("downsample_layers.0.norm", DIMS[0])
    layer("downsample_layers.1.proj", DIMS[1], DIMS[0], 2, 2)
    layer("downsample_layers.1.norm", DIMS[0])
    for i, (dim, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        for j in range(depth):
            block = f"stages.{i}.{j}"
            layer(f"{block}.cpe.0.proj", dim, 1, 3, 3)
            if j % 2:
                weights[f"{block}.attn.temperature"] = torch.rand(HEADS[i], 1, 1, generator=generator).double()
                layer(f"{block}.norm3", dim)
                layer(f"{block}.local_mp.conv1", dim, 1, 7, 7)
                batch_norm(f"{block}.local_mp.bn", dim)
                layer(f"{block}.local_mp.conv2", dim, 1, 7, 7)
            else:
                layer(f"{block}.cpe.1.proj", dim, 1, 3, 3)
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", dim)
            layer(f"{block}.attn.qkv", 3 * dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            layer(f"{block}.mlp.fc1", 2 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 2 * dim)
    layer("norm", DIMS[-1])
    layer("head", 5, DIMS[-1])
    return weights


def logits(weights, image):
    """The model from its formulas, on maps `[batch, height, width, channels]`."""

    def of(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(x, name):
        return F.linear(x, *of(name))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *of(name))

    def conv(x, name, **options):
        return F.conv2d(x.permute(0, 3, 1, 2), *of(name), **options).permute(0, 2, 3, 1)

    def around(x, name):
        return conv(x, name, padding=weights[f"{name}.weight"].shape[-1] // 2, groups=x.shape[-1])

    def batch_norm(x, name):
        entries = weights[f"{name}.running_mean"], weights[f"{name}.running_var"], *of(name)
        return F.batch_norm(x.permute(0, 3, 1, 2), *entries).permute(0, 2, 3, 1)

    def windows(x, name, heads):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        qkv, out = linear(x, f"{name}.qkv").unflatten(-1, (3, heads, -1)), torch.zeros_like(x)
        for top in range(0, x.shape[1], WINDOW):
            for left in range(0, x.shape[2], WINDOW):
                part = qkv[:, top : top + WINDOW, left : left + WINDOW].flatten(1, 2)
                q, k, v = part.unbind(2)
                scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
                y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
                out[:, top : top + WINDOW, left : left + WINDOW] = y.unflatten(1, (WINDOW, WINDOW))
        return linear(out, f"{name}.proj")[:, :height, :width]

    def everywhere(x, name, heads):
        q, k, v = linear(x, f"{name}.qkv").unflatten(-1, (3, heads, -1)).unbind(3)
        out = reference("l2vit", q, k, v, temperature=weights[f"{name}.temperature"].flatten())
        return linear(out.flatten(3), f"{name}.proj")

    def block(x, name, heads, local):
        x = x + around(x, f"{name}.cpe.0.proj")
        x = x + (windows if local else everywhere)(norm(x, f"{name}.norm1"), f"{name}.attn", heads)
        if local:
            x = x + around(x, f"{name}.cpe.1.proj")
        else:
            y = F.gelu(around(norm(x, f"{name}.norm3"), f"{name}.local_mp.conv1"))
            x = x + around(batch_norm(y, f"{name}.local_mp.bn"), f"{name}.local_mp.conv2")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    stem = "downsample_layers.0"
    x = batch_norm(conv(image.permute(0, 2, 3, 1), f"{stem}.proj.proj.0", stride=2, padding=1), f"{stem}.proj.proj.1")
    x = batch_norm(conv(F.relu(x), f"{stem}.proj.proj.3", stride=2, padding=1), f"{stem}.proj.proj.4")
    x = norm(x, f"{stem}.norm")
    for i, depth in enumerate(DEPTHS):
        if i:
            x = norm(x, "downsample_layers.1.norm")
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = conv(x, "downsample_layers.1.proj", stride=2)
        for j in range(depth):
            x = block(x, f"stages.{i}.{j}", HEADS[i], local=j % 2 == 0)
    return linear(norm(x, "norm").mean((1, 2)), "head")


@torch.no_grad()
def test_published_weights():
    weights, model = published(), build()
    image = torch.randn(2, 3, 36, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for wrapped in (weights, {"model": weights}):
        model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    torch.testing.assert_close(model(image), logits(weights, image))
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_other_weights():
    for spoiled in ({}, {k: v for k, v in published().items() if "local_mp" not in k}):
        with pytest.raises(ValueError, match="not L2ViT weights"):
            checkpoint_filter_fn(spoiled, build())
