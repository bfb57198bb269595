"""ContMix against its formulas, token by token, in float64."""

import pytest
import torch
import torch.nn.functional as F

from vision_attn.modules import ContMix


def spread(kernels, rpb, window):
    """Weights of all pairs, `[batch, groups, height, width, height, width]`, from one kernel per token and group."""
    batch, height, width, groups, _ = kernels.shape
    weights = kernels.new_zeros(batch, groups, height, width, height, width)
    for i in range(height):
        for j in range(width):
            top, left = (
                min(max(at - window // 2, 0), n - window) for at, n in ((i, height), (j, width))
            )  # the window moves inward at borders
            rows, columns = top - i + window - 1, left - j + window - 1
            bias = rpb[:, rows : rows + window, columns : columns + window].flatten(1)
            kernel = (kernels[:, i, j] + bias).softmax(-1).unflatten(-1, (window, window))
            weights[:, :, i, j, top : top + window, left : left + window] = kernel
    return weights


def naive(layer, x, context, values, small, large):
    """Maps with channels last; norms with the statistics they have."""
    size = x.shape[1:3]
    x, context, values = (t.permute(0, 3, 1, 2) for t in (x, context, values))
    if min(size) < large:
        wide = int(large / size[0] * size[1]), int(large / size[1] * size[0])
        new = (large, wide[0]) if size[0] < size[1] else (wide[1], large)
        x, context, values = (F.interpolate(t, new, mode="bilinear") for t in (x, context, values))

    def project(part, t):
        norm = part[1]
        t = torch.einsum("oi,bihw->bohw", part[0].weight[:, :, 0, 0], t)
        shape = (1, -1, 1, 1)
        t = (t - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        return t * norm.weight.view(shape) + norm.bias.view(shape)

    groups, dim = layer.rpb1.shape[0], x.shape[1]
    query = project(layer.query, x).unflatten(1, (groups, -1)) * (dim / groups) ** -0.5
    key = project(layer.key, F.adaptive_avg_pool2d(context, 7)).flatten(2).unflatten(1, (groups, -1))
    kernels = torch.einsum("bgchw,bgcl,kl->bhwgk", query, key, layer.kernels.weight) + layer.kernels.bias
    halves = values.unflatten(1, (2, groups, -1))
    outs = []
    for half, kernel, rpb, window in (
        (halves[:, 0], kernels[..., : small**2], layer.rpb1, small),
        (halves[:, 1], kernels[..., small**2 :], layer.rpb2, large),
    ):
        outs.append(torch.einsum("bghwrs,bgcrs->bgchw", spread(kernel, rpb, window), half).flatten(1, 2))
    out = torch.cat(outs, 1)
    return F.adaptive_avg_pool2d(out, size).permute(0, 2, 3, 1)


def build(dim, context, heads, window, small):
    layer = ContMix(dim, context, heads, window, small, dtype=torch.float64)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else torch.nn.init.normal_(tensor)
    return layer.eval()


@pytest.mark.parametrize(
    "height, width, window, small",
    [(7, 11, 5, 3), (9, 8, 7, 5), (5, 5, 5, 5), (3, 8, 5, 3), (6, 2, 5, 3), (1, 1, 3, 1), (3, 3, 7, 5)],
)
def test_forward_and_gradients(height, width, window, small):
    torch.manual_seed(height * 100 + width)
    layer = build(16, 6, 2, window, small)
    x, values = torch.randn(2, 2, height, width, 16, dtype=torch.float64)
    context = torch.randn(2, height, width, 6, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, context, values)] + list(layer.parameters())
    grad = torch.randn_like(x)
    want = naive(layer, x, context, values, small, window)
    want_grads = torch.autograd.grad(want, inputs, grad)
    for layer.fused_attn in (True, False):
        out = layer(x, context, values)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
        for a, b in zip(torch.autograd.grad(out, inputs, grad), want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_values_default_to_x():
    layer = build(16, 6, 2, 5, 3)
    x, context = torch.randn(1, 7, 7, 16, dtype=torch.float64), torch.randn(1, 7, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), layer(x, context, x), rtol=0, atol=0)


def test_constant_values_stay():
    """Kernels sum to 1, also on a map that is enlarged."""
    layer = build(16, 6, 2, 7, 3)
    for size in ((9, 10), (4, 6)):
        x, context = torch.randn(1, *size, 16, dtype=torch.float64), torch.randn(1, *size, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x, context, torch.full_like(x, 0.3)), torch.full_like(x, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    layer = ContMix(32, 8, 2, 7).eval()
    x, context = torch.randn(1, 17, 13, 32), torch.randn(1, 17, 13, 8)
    exact = layer.double()(x.double(), context.double())
    for layer.fused_attn in (True, False):
        out = layer.to(dtype)(x.to(dtype), context.to(dtype))
        assert out.dtype == dtype and (out - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "dim 32 must be a multiple of 4 \\* num_heads, which is 12"),
        ({"num_heads": 0}, "multiple of"),
        ({"window": 3}, "small_window <= window; got 5 and 3"),
        ({"small_window": 0}, "small_window <= window; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ContMix(32, 8, **options)


def test_script():
    layer = ContMix(16, 8, 2, 5).eval()
    for size in ((9, 7), (3, 6)):
        x, context = torch.randn(1, *size, 16), torch.randn(1, *size, 8)
        torch.testing.assert_close(torch.jit.script(layer)(x, context), layer(x, context))
