"""Bi-level routing attention against a loop over regions, and its two limits: full and window attention."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Window, attend
from vision_attn.modules import BiLevelRoutingAttention
from vision_attn.modules import routing as routing_module


def _layer(dim=12, num_heads=3, **options):
    torch.manual_seed(0)
    return BiLevelRoutingAttention(dim, num_heads, **{"regions": 4, **options}).double().eval()


def _map(height, width, dim=12, batch=2):
    return torch.randn(batch, height, width, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loop(layer, x):
    """One region after the other, from the formulas of the paper; sizes and padding as the two codes have them."""
    (height, width), s, dim = x.shape[1:3], layer.regions, layer.dim
    if layer.form == "legacy":
        x = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    values = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    real = torch.ones(x.shape[1:3], dtype=torch.bool)
    h, w = max(x.shape[1] // s, 1), max(x.shape[2] // s, 1)
    below, right = -x.shape[1] % h, -x.shape[2] % w
    local = F.conv2d(values[..., 2 * dim :].movedim(-1, 1), layer.lepe.weight, layer.lepe.bias, padding=2, groups=dim)
    values, real = F.pad(values, (0, 0, 0, right, 0, below)), F.pad(real, (0, right, 0, below))
    out = torch.zeros_like(values[..., :dim])
    boxes = [
        (slice(i, i + h), slice(j, j + w))
        for i, j in itertools.product(range(0, real.shape[0], h), range(0, real.shape[1], w))
    ]
    for b in range(len(x)):
        means = [values[b][box][real[box]].mean(0) for box in boxes]
        for box, mean in zip(boxes, means, strict=True):
            fits = torch.stack([mean[:dim] @ other[dim : 2 * dim] for other in means])
            chosen = fits.argsort(descending=True)[: layer.topk].tolist()
            keys = torch.cat([values[b][boxes[c]].flatten(0, 1) for c in chosen])
            seen = torch.cat([real[boxes[c]].flatten() for c in chosen])
            for part in torch.arange(dim).chunk(layer.num_heads):
                scores = values[b][box].flatten(0, 1)[:, part] @ keys[:, dim + part].T * dim**-0.5
                if layer.mask_padding:
                    scores = scores.masked_fill(~seen, -torch.inf)
                out[b][(*box, part)] = (scores.softmax(-1) @ keys[:, 2 * dim + part]).view(h, w, -1)
    out = out[:, : x.shape[1], : x.shape[2]] + local.movedim(1, -1)
    return F.linear(out, layer.proj.weight, layer.proj.bias)[:, :height, :width]


SIZES = [(8, 12), (9, 11), (3, 5), (1, 7), (18, 17)]
FORMS = [{"form": "legacy"}, {"form": "nchw"}, {"form": "nchw", "mask_padding": True}]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_theloop(size, form, fused):
    layer, x = _layer(topk=3, **form), _map(*size)
    layer.fused_attn = fused
    torch.testing.assert_close(layer(x), loop(layer, x))


# block lists, one masked call, and block lists
@pytest.mark.parametrize(("many", "size"), [(0, (8, 11)), (2048, (8, 11)), (2048, (18, 17))], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_gradients(many, size, form, monkeypatch):
    monkeypatch.setattr(routing_module, "MANY", many)
    layer, grads = _layer(topk=2, **form), []
    for way in (layer, lambda x: loop(layer, x)):
        x = _map(*size).requires_grad_()
        way(x).square().mean().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    torch.testing.assert_close(*grads)


def test_small_maps_are_masked_until_there_are_many(monkeypatch):
    calls = []
    monkeypatch.setattr(routing_module, "attend", lambda *args, **options: calls.append(1) or attend(*args, **options))
    layer, x = _layer(topk=2).float(), _map(8, 9, batch=19).float()
    together = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(together, torch.cat([layer(one) for one in x.split(1)]))
    assert len(calls) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)  # may choose another region, so the bulk counts
    assert (rounded - together).abs().median() < 0.05 * together.abs().median()


def test_all_regions_are_full_attention():
    layer, x = _layer(topk=49, regions=7), _map(14, 21)
    q, k, v = layer.qkv(x).flatten(1, 2).view(2, -1, 3, 3, 4).permute(2, 0, 3, 1, 4)
    full = F.scaled_dot_product_attention(q, k, v, scale=12**-0.5).transpose(1, 2).reshape(x.shape)
    local = layer.lepe(layer.qkv(x)[..., 24:].movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(layer(x), layer.proj(full + local))
    layer.topk = 50  # more than there are
    torch.testing.assert_close(layer(x), layer.proj(full + local))


def test_regions_that_choose_themselves_are_windows(monkeypatch):
    monkeypatch.setattr(
        routing_module, "_choose", lambda tokens, *sizes: torch.arange(tokens.shape[1])[None, :, None].repeat(2, 1, 1)
    )
    qkv = _map(28, 35, 36)
    q, k, v = qkv.view(2, 28, 35, 3, 3, 4).unbind(3)
    windows = attend(q, k, v, Window(size=(4, 5)), scale=12**-0.5).flatten(3)
    torch.testing.assert_close(routing_module.routed_attention(qkv, 3, regions=7, topk=1), windows)


def test_kernels_get_lists_and_no_copies(monkeypatch):
    calls = []

    def spy(q, k, v, pattern, **options):
        calls.append((pattern, k.shape))
        return attend(q, k, v, pattern, **options)

    monkeypatch.setattr(routing_module, "attend", spy)
    monkeypatch.setattr(routing_module, "_by_copies", None)
    _layer(topk=4, regions=7)(_map(28, 28))
    (pattern, shape), = calls  # fmt: skip
    assert shape == (2, 28 * 28, 3, 4)
    assert pattern.block == (16, 16) and pattern.index.shape == (2, 1, 49, 4)


def test_number_of_regions_changes_after_loading():
    layer, x = _layer(topk=2), _map(18, 20)
    first = layer(x)
    layer.regions = 5
    torch.testing.assert_close(layer(x), loop(layer, x))
    assert not torch.allclose(layer(x), first)


def test_ties_may_be_broken_any_way():
    layer, x = _layer(topk=3), _map(28, 28)[:, :1, :1].expand(-1, 28, 28, -1)  # all regions fit equally
    one = _layer(topk=1)
    torch.testing.assert_close(layer(x), one(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_half_precision(dtype, form):
    layer, x = _layer(64, 2, topk=2, **form), _map(45, 43, 64, batch=1)
    exact, layer = layer(x), layer.to(dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    # a rounded mean may choose another region, so the bulk counts
    assert (out.double() - exact).abs().median() < 0.02 * exact.abs().median()


def test_scripts():
    layer, x = _layer(topk=3, form="nchw", mask_padding=True), _map(15, 17)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces():
    """In many images too, whose lists are for the CPU kernel otherwise."""
    layer, x = _layer(32, 2, topk=4, regions=7).float(), _map(14, 14, 32, batch=24).float()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(x.flip(0)), layer(x.flip(0)))


def test_compiles_without_breaks():
    layer, x = _layer(topk=3).float(), _map(28, 28).float()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "12 is not divisible by num_heads 5"),
        ({"topk": 0}, "at least 1"),
        ({"regions": 0}, "at least 1"),
        ({"form": "nhwc"}, "'legacy', 'nchw'"),
        ({"mask_padding": True}, "form='nchw'"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        BiLevelRoutingAttention(12, **{"num_heads": 3, **options})


def test_refuses_maps():
    with pytest.raises(ValueError, match=r"\[batch, height, width, 12\]"):
        _layer()(_map(14, 14, 11))
    with pytest.raises(ValueError, match=r"\[batch, height, width, 12\]"):
        _layer()(_map(14, 14)[0])
    with pytest.raises(ValueError, match="15 x 16 cannot be cut into 4 x 4"):
        _layer(auto_pad=False)(_map(15, 16))
