"""The layer of neighborhood attention against its definition, pair by pair, in float64."""

import pytest
import torch
import torch.nn.functional as F

from vision_attn.modules import NeighborhoodAttention


def entries(length, window, dilation, stride=1):
    """`[length, length]`: the entry of the bias that query and key of an axis share, -1 where they do not meet."""
    table = torch.full((length, length), -1)
    for query in range(length):
        group, place = query % dilation, query // dilation
        members = len(range(group, length, dilation))
        leader = min(place // stride * stride + stride // 2, members - 1)
        start = min(max(leader - window // 2, 0), members - window)
        for t in range(window):
            table[query, group + dilation * (start + t)] = start + t - place + window - 1
    return table


def attention(qkv, rpb, heads, window, dilation, stride=1):
    """Attention on a map `[batch, height, width, 3 * dim]` from all pairs of tokens, with windows `(rows, columns)`."""
    batch, height, width, _ = qkv.shape
    q, k, v = qkv.reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    rows = entries(height, window[0], dilation[0], min(stride, window[0]))[:, None, :, None]
    columns = entries(width, window[1], dilation[1], min(stride, window[1]))[None, :, None, :]
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if rpb is not None:
        centre = (rpb.shape[1] + 1) // 2
        scores = scores + rpb[:, rows + centre - window[0], columns + centre - window[1]].reshape(
            heads, height * width, height * width
        )
    seen = ((rows >= 0) & (columns >= 0)).reshape(height * width, height * width)
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, height, width, -1)


def naive(layer, x, heads, window, dilation, stride=1):
    """With the rule of NAT for small maps: zeros in the input."""
    height, width = x.shape[1:3]
    need = window * dilation
    x = F.pad(x, (0, 0, 0, max(0, need - width), 0, max(0, need - height)))
    out = attention(layer.qkv(x), layer.rpb, heads, (window, window), (dilation, dilation), stride)
    return layer.proj(out)[:, :height, :width]


def both(layer):
    for fused in (True, False):
        layer.fused_attn = fused
        yield layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "height, width, window, dilation, stride",
    [
        (7, 11, 3, 1, 1),
        (13, 9, 3, 3, 1),
        (11, 8, 5, 1, 3),
        (9, 10, 4, 2, 2),  # an even window
        (5, 13, 7, 1, 1),  # too small along one axis
        (1, 6, 3, 2, 1),  # one wide
        (2, 3, 5, 1, 1),  # too small along both
        (7, 7, 7, 1, 1),  # all see all
    ],
)
def test_forward_and_gradients(height, width, window, dilation, stride, bias):
    torch.manual_seed(height * 100 + width)
    layer = NeighborhoodAttention(6, 2, window, dilation, stride, rel_pos_bias=bias, dtype=torch.float64)
    torch.nn.init.normal_(layer.qkv.bias)  # padded tokens have keys and values of their own
    x = torch.randn(2, height, width, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, height, width, 6, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    want = naive(layer, x, 2, window, dilation, stride)
    want_grads = torch.autograd.grad(want, inputs, grad)
    for each in both(layer):
        out = each(x)
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad(out, inputs, grad), want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("entry, at", [((2, 0), (1, -2)), ((0, 3), (-2, 2)), ((1, 1), (0, 0)), ((1, 2), (0, 1))])
def test_bias_is_key_minus_query(entry, at):
    """One large entry of the bias makes an interior query look at exactly one key."""
    window, query = 3, (4, 5)
    if max(map(abs, at)) > window // 2:  # beyond half a window only at a border
        query = tuple(0 if a > 0 else 8 if a < 0 else q for a, q in zip(at, query, strict=True))
    layer = NeighborhoodAttention(4, 1, window, dtype=torch.float64)
    row, column = at[0] + window - 1, at[1] + window - 1
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.weight[8:] = torch.eye(4)
        layer.qkv.bias.zero_()
        layer.proj.weight.copy_(torch.eye(4))
        layer.proj.bias.zero_()
        layer.rpb.zero_()
        layer.rpb[0, row, column] = 1e4
    x = torch.randn(1, 9, 9, 4, dtype=torch.float64)
    for each in both(layer):
        out = each(x)[0, query[0], query[1]]
        torch.testing.assert_close(out, x[0, query[0] + at[0], query[1] + at[1]])


def test_no_bias_no_parameter():
    layer = NeighborhoodAttention(8, 2, 3, rel_pos_bias=False, qkv_bias=False)
    assert {name for name, _ in layer.named_parameters()} == {"qkv.weight", "proj.weight", "proj.bias"}
    assert NeighborhoodAttention(8, 2, 3).rpb.shape == (2, 5, 5)


@pytest.mark.parametrize(
    "height, width, window, dilation, stride, windows, dilations",
    [
        (5, 13, 7, 1, 1, (5, 7), (1, 1)),
        (8, 20, 3, 4, 1, (3, 3), (2, 4)),
        (1, 4, 3, 2, 1, (1, 3), (1, 1)),
        (6, 6, 3, 2, 1, (3, 3), (2, 2)),
        (2, 9, 5, 1, 4, (2, 5), (1, 1)),  # the stride must not be larger than the window
    ],
)
def test_shrink(height, width, window, dilation, stride, windows, dilations):
    layer = NeighborhoodAttention(6, 3, window, dilation, stride, small_map="shrink", dtype=torch.float64)
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    want = layer.proj(attention(layer.qkv(x), layer.rpb, 3, windows, dilations, stride))
    for each in both(layer):
        torch.testing.assert_close(each(x), want, rtol=1e-10, atol=1e-12)


def test_small_map_error():
    layer = NeighborhoodAttention(8, 2, 5, 2, small_map="error")
    assert layer(torch.randn(1, 10, 10, 8)).shape == (1, 10, 10, 8)
    with pytest.raises(ValueError, match="9 x 12 tokens but window times dilation is 10"):
        layer(torch.randn(1, 9, 12, 8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"num_heads": 0}, "multiple of num_heads"),
        ({"small_map": "grow"}, "allowed: 'pad', 'error', 'shrink'"),
        ({"window": 0}, "window must be at least 1"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"window": 3, "stride": 4}, "stride"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(16, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    layer = NeighborhoodAttention(32, 2, 5, 2).to(dtype)
    x = torch.randn(1, 23, 17, 32, dtype=dtype)
    exact = naive(layer.double(), x.double(), 2, 5, 2)
    for each in both(layer.to(dtype)):
        out = each(x)
        assert out.dtype == dtype
        assert (out - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast():
    layer, x = NeighborhoodAttention(16, 2, 3), torch.randn(1, 9, 9, 16)
    for each in both(layer):
        with torch.autocast("cpu", torch.bfloat16):
            assert (each(x).float() - naive(layer, x, 2, 3, 1)).abs().max() < 0.05


def test_attention_dropout():
    torch.manual_seed(0)
    layer, x = NeighborhoodAttention(16, 2, 3, attn_drop=0.5), torch.randn(1, 9, 9, 16)
    want = naive(layer, x, 2, 3, 1)
    assert (layer(x) - want).abs().max() > 1e-3
    mean = layer(x.expand(500, -1, -1, -1)).mean(0, keepdim=True)  # each image drops weights of its own
    torch.testing.assert_close(mean, want, rtol=0, atol=0.05)
    torch.testing.assert_close(layer.eval()(x), want)


def test_script_and_compile():
    layer = NeighborhoodAttention(16, 2, 5, 2)
    for x in (torch.randn(1, 12, 15, 16), torch.randn(2, 3, 11, 16)):
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
