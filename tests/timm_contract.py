"""What timm's own model tests ask of a model, as functions of a registered name; `CHECKS` is the list.

timm's wheel does not carry its tests, so they are stated again here, with a few of ours: each check builds the model
with random weights, at the small sizes timm uses.
"""

from unittest import mock

import timm
import torch
from timm.layers import Format, get_channel_dim, get_spatial_dim, set_fused_attn
from timm.models import create_model, get_pretrained_cfg, group_parameters
from timm.models._features_fx import FeatureGraphNet

import vision_attn.backbones  # noqa: F401  registers the names


def parameters(name, **options):
    """Number of parameters, counted on the meta device."""
    nothing_to_draw = mock.patch("timm.layers.weight_init._trunc_normal_")  # slow on the meta device
    with torch.device("meta"), nothing_to_draw:
        return sum(p.numel() for p in create_model(name, **options).parameters())


def _size(name, target):
    cfg = get_pretrained_cfg(name)
    return (
        cfg.input_size if cfg.fixed_input_size else (cfg.input_size[0], *(min(s, target) for s in cfg.input_size[1:]))
    )


def _build(name, train=False, **options):
    torch.manual_seed(0)
    return create_model(name, **options).train(train)


def _image(name, target, batch=1, dtype=torch.float32):
    return torch.randn(batch, *_size(name, target), generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def forward(name):
    model = _build(name)
    images = [_image(name, 96, batch=2), _image(name, 128)]
    if not get_pretrained_cfg(name).fixed_input_size:
        images.append(torch.randn(1, 3, 96, 161))  # not square, not divisible
    for image in images:
        out = model(image)
        assert out.shape == (len(image), 1000)
        assert out.isfinite().all()
    two = model(images[0])  # rows of a batch do not see each other
    rounding = max(1e-4, 1e-5 * float(two.abs().max()))  # some say hundreds before they are trained
    torch.testing.assert_close(model(images[0][1:]), two[1:], rtol=1e-4, atol=rounding)


def backward(name):
    model = _build(name, train=True, num_classes=42)
    out = model(_image(name, 128, batch=2))
    assert out.shape == (2, 42)
    out.mean().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, f"no (finite) gradient: {missing}"


@torch.no_grad()
def default_cfg(name):
    model = _build(name)
    cfg, keys = model.default_cfg, model.state_dict().keys()
    image = _image(name, cfg["input_size"][-1])
    for entry in ("first_conv", "classifier"):
        names = cfg[entry] if isinstance(cfg[entry], (tuple, list)) else (cfg[entry],)
        assert all(f"{key}.weight" in keys for key in names), f"{entry} {names} not in the state dict"
    fmt = Format(getattr(model, "output_fmt", "NCHW"))
    space, channel = get_spatial_dim(fmt), get_channel_dim(fmt)
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[channel] == model.num_features
    assert pooled.shape == (1, model.head_hidden_size)
    if features.ndim == 4:
        assert tuple(features.shape[axis] for axis in space) == tuple(cfg["pool_size"])
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pooled)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.reset_classifier(0, "")
    unpooled = model(image)
    assert unpooled.ndim == features.ndim
    assert _build(name, num_classes=0, global_pool="")(image).shape == unpooled.shape
    model.reset_classifier(7, "avg")
    assert model(image).shape == (1, 7) and model.num_classes == 7


@torch.no_grad()
def features(name):
    image = _image(name, 96)
    model = _build(name, features_only=True)
    maps = model(image)
    fmt = Format(model.output_fmt if hasattr(model, "output_fmt") else "NCHW")
    assert len(maps) >= 3
    for channels, reduction, y in zip(model.feature_info.channels(), model.feature_info.reduction(), maps, strict=True):
        assert y.shape[get_channel_dim(fmt)] == channels and y.isfinite().all()
        assert [y.shape[axis] for axis in get_spatial_dim(fmt)] == [-(-s // reduction) for s in image.shape[2:]]
    getter = _build(name, features_only=True, feature_cls="getter")(image)
    assert [y.shape[1] for y in getter] == model.feature_info.channels()
    few = _build(name, features_only=True, out_indices=(0, 2))(image)
    assert [y.shape for y in few] == [maps[0].shape, maps[2].shape]


@torch.no_grad()
def intermediates(name):
    model, image = _build(name), _image(name, 96)
    final, maps = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image))
    info = model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info
    assert [y.shape[1] for y in maps] == [entry["num_chs"] for entry in info]
    last = model.forward_intermediates(image, indices=1, intermediates_only=True)
    assert len(last) == 1
    torch.testing.assert_close(last[0], maps[-1])
    early = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])
    model.prune_intermediate_layers([0, 1])
    for y, z in zip(model.forward_intermediates(image, intermediates_only=True), maps[:2], strict=True):
        torch.testing.assert_close(y, z)


@torch.no_grad()
def torchscript(name):
    image = _image(name, 128)
    with timm.layers.set_scriptable(True):
        model = _build(name)
    torch.testing.assert_close(torch.jit.script(model)(image), model(image), rtol=1e-3, atol=1e-4)


def fx(name):
    model, image = _build(name), _image(name, 96)
    with torch.no_grad():
        graph = FeatureGraphNet(_build(name), out_indices=(0, 1, 2))
        plain = model.forward_intermediates(image, indices=[0, 1, 2], intermediates_only=True, stop_early=True)
        for y, z in zip(graph(image), plain, strict=True):
            assert y.numel() == z.numel() and y.isfinite().all()
    train = FeatureGraphNet(_build(name, train=True, num_classes=42), out_indices=(0, 1, 2))
    sum(y.float().mean() for y in train(_image(name, 96, batch=2))).backward()
    assert all(p.grad is not None for p in train.parameters())


def checkpointing(name):
    def run(enable):
        model = _build(name).double()
        model.set_grad_checkpointing(enable)
        out = model(_image(name, 96, dtype=torch.float64))
        out.square().mean().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    torch.testing.assert_close(run(True), run(False))


@torch.no_grad()
def fused_equals_explicit(name):
    image = _image(name, 96, dtype=torch.float64)
    fused = timm.layers.use_fused_attn()
    try:
        outs = []
        for enable in (True, False):
            set_fused_attn(enable)
            outs.append(_build(name).double()(image))
    finally:
        set_fused_attn(fused)
    torch.testing.assert_close(*outs)


@torch.no_grad()
def half_precision(name):
    out = _build(name).bfloat16()(_image(name, 96, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@torch.no_grad()
def other_heads(name):
    model = _build(name, in_chans=1, num_classes=5, drop_path_rate=0.1)
    assert model(_image(name, 96)[:, :1]).shape == (1, 5)


def groups(name):
    with torch.device("meta"):
        model = create_model(name)
    names = {key for key, _ in model.named_parameters()}
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(key for layer in layers.values() for key in layer) == sorted(names)
        assert len(layers) > 3 and min(layers) == 0
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    assert set(skip) <= names, f"no such parameters: {set(skip) - names}"


CHECKS = [
    forward,
    backward,
    default_cfg,
    features,
    intermediates,
    torchscript,
    fx,
    checkpointing,
    fused_equals_explicit,
    half_precision,
    other_heads,
    groups,
]
