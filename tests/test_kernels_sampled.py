"""Windows that read between the tokens of a map, on the CPU kernel: against a loop in float64."""

import pytest
import torch
import torch.nn.functional as F

from vision_attn.kernels.native import build, sampled
from vision_attn.modules import QuadrangleAttention, VariedWindowAttention, varied_window

HERE = build.missing()
pytestmark = pytest.mark.skipif(bool(HERE), reason=f"no CPU kernel here: {HERE}")
PATHS = [name for name in build.PATHS if list(build.PATHS).index(name) <= list(build.PATHS).index(build._widest())]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is allocated and not written reads as NaN; small calls are taken, too."""
    torch.manual_seed(0)
    monkeypatch.setattr(sampled, "LEAST", 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def loop(q, k, v, points, bias, scale):
    """One window and head after the other."""
    q, k, v, points = (t.double() for t in (q, k, v, points))
    batch, height, width, heads, _ = q.shape
    size, out = round(points.shape[-1] ** 0.5), torch.zeros(*v.shape, dtype=torch.float64)
    ends = torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64)
    for b in range(batch):
        for n in range(height // size * (width // size)):
            top, left = n // (width // size) * size, n % (width // size) * size
            box = (b, slice(top, top + size), slice(left, left + size))
            for h in range(heads):
                places = (points[:, b, n, h].T / ends * 2 - 1)[None, None]
                read = [
                    F.grid_sample(t[b, ..., h, :].permute(2, 0, 1)[None], places, align_corners=True)[0, :, 0].T
                    for t in (k, v)
                ]
                scores = q[(*box, h)].flatten(0, 1) @ read[0].T * scale
                if bias is not None:
                    scores = scores + bias[0 if len(bias) == 1 else b * points.shape[2] + n, h].double()
                out[(*box, h)] = (scores.softmax(-1) @ read[1]).view(size, size, -1)
    return out


def inputs(batch, height, width, heads, head_dim, value_dim, size, spread=1.5):
    """Maps as parts of one tensor, and points of which some lie outside, and some on tokens."""
    packed = torch.randn(batch, height, width, heads, 2 * head_dim + value_dim)
    q, k, v = packed.split([head_dim, head_dim, value_dim], -1)
    windows = (height // size) * (width // size)
    points = spread * torch.rand(2, batch, windows, heads, size * size) - (spread - 1) / 2
    points *= torch.tensor([width - 1.0, height - 1.0]).view(2, 1, 1, 1, 1)
    points[:, :, 0, :, ::3] = points[:, :, 0, :, ::3].round()
    points[:, 0, 0, 0, 1] = torch.tensor([-1.0, height])
    points[:, 0, 0, 0, 2] = torch.tensor([1e30, -1e30])
    return q, k, v, points


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch, height, width, heads, head_dim, value_dim, size, bias", [
    (2, 14, 21, 3, 32, 32, 7, "shared"),
    (1, 8, 4, 2, 4, 4, 4, "of each window"),
    (3, 6, 4, 1, 17, 23, 2, None),
    (1, 9, 18, 2, 40, 80, 9, "shared"),
    (1, 5, 5, 5, 1, 1, 5, "shared"),
    (1, 24, 12, 2, 16, 144, 12, None),
])  # fmt: skip
def test_equals_the_loop(path, monkeypatch, batch, height, width, heads, head_dim, value_dim, size, bias):
    monkeypatch.setenv(build.SWITCH, path)
    q, k, v, points = inputs(batch, height, width, heads, head_dim, value_dim, size)
    many = {"shared": 1, "of each window": batch * points.shape[2]}.get(bias)
    bias = None if many is None else torch.randn(many, heads, size**2, size**2)
    want = loop(q, k, v, points, bias, 0.3)
    torch.testing.assert_close(sampled.sampled_windows(q, k, v, points, bias, 0.3).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_in_any_number_of_threads(threads):
    args, before = (*inputs(2, 14, 14, 4, 16, 16, 7), torch.randn(1, 4, 49, 49), 0.25), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = sampled.sampled_windows(*args)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), loop(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_a_number_stays_where_it_is_read(path, monkeypatch):
    monkeypatch.setenv(build.SWITCH, path)
    q, k, v, points = (t.clone() for t in inputs(1, 8, 8, 2, 16, 16, 4, spread=1.0))
    points[:, 0, :, :, :] = points[:, 0].clamp(0, 2)  # the last rows and columns of the map are not read
    clean = sampled.sampled_windows(q, k, v, points, None, 0.25)
    for t in (k, v):
        t[:, 4:], t[:, :, 4:] = torch.nan, torch.inf
    assert torch.equal(sampled.sampled_windows(q, k, v, points, None, 0.25), clean)
    points[0, 0, 1, 0, 3] = torch.nan
    out = sampled.sampled_windows(q, k, v, points, None, 0.25)
    assert out[0, :4, 4:, 0].isnan().all()
    out[0, :4, 4:, 0] = clean[0, :4, 4:, 0]
    assert torch.equal(out, clean)


LAYERS = {
    "swin": lambda **more: VariedWindowAttention(48, 3, window=4, **more),
    "detection": lambda **more: VariedWindowAttention(48, 3, window=7, dialect="detection", **more),
    "wider": lambda **more: VariedWindowAttention(48, 3, window=4, out_dim=96, dialect="classification", **more),
    "quadrangle": lambda **more: QuadrangleAttention(48, 3, window=7, **more),
    "quadrangle, decomposed": lambda **more: QuadrangleAttention(48, 3, window=7, decomposed=True, **more),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_take_it_and_say_the_same(kind, dtype, monkeypatch):
    layer, calls = LAYERS[kind]().eval(), []
    torch.nn.init.normal_(layer.transform.weight, std=0.3)
    x = torch.randn(2, 17, 22, 48)
    want = layer.double()(x.double())
    monkeypatch.setattr(
        varied_window, "sampled_windows", lambda *args: calls.append(sampled.sampled_windows(*args)) or calls[-1]
    )
    layer = layer.to(dtype)
    with torch.no_grad():
        out = layer(x.to(dtype))
        assert calls[-1] is not None
        layer.fused_attn = False
        plain = layer(x.to(dtype))
    assert len(calls) == 1
    assert (out - want).abs().max() < 2 * (plain - want).abs().max() + 1e-6
    layer.fused_attn = True
    layer(x.to(dtype)).sum().backward()
    assert calls[-1] is None and layer.transform.weight.grad.isfinite().all(), "gradients are torch's"


def test_what_it_leaves_to_torch(monkeypatch):
    args = (*inputs(1, 8, 8, 2, 8, 8, 4), None, 0.25)
    assert sampled.sampled_windows(*args) is not None
    assert sampled.sampled_windows(*(t.double() if isinstance(t, torch.Tensor) else t for t in args)) is None
    assert sampled.sampled_windows(args[0].clone().requires_grad_(), *args[1:]) is None
    for place, wrong in (
        (0, args[0][:, :6]),  # no whole windows
        (1, args[1][:, :4]),  # not the map of q
        (2, args[2][:, :, :, :1]),
        (3, args[3][:, :, :3]),
        (4, torch.zeros(1, 2, 9, 9)),
    ):
        assert sampled.sampled_windows(*args[:place], wrong, *args[place + 1 :]) is None, place
    monkeypatch.setattr(sampled, "LEAST", 8 * 8 * 2 + 1)
    assert sampled.sampled_windows(*args) is None
    monkeypatch.setattr(sampled, "LEAST", 1)
    monkeypatch.setenv(build.SWITCH, "0")
    assert sampled.sampled_windows(*args) is None
