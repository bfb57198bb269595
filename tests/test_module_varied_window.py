"""Varied-size windows and quadrangles against a loop over windows and heads, and against plain windows."""

import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Window, attend
from vision_attn.modules import QuadrangleAttention, VariedWindowAttention, varied_window

DTYPE = torch.float64
LAYERS = {
    "swin": lambda **o: VariedWindowAttention(12, 3, **{"window": 4, **o}),
    "classification": lambda **o: VariedWindowAttention(12, 3, **{"window": 4, "dialect": "classification", **o}),
    "detection": lambda **o: VariedWindowAttention(12, 3, **{"window": 4, "dialect": "detection", **o}),
    "wider": lambda **o: VariedWindowAttention(12, 3, **{"window": 4, "out_dim": 18, **o}),
    "quadrangle": lambda **o: QuadrangleAttention(12, 3, **{"window": 4, **o}),
    "decomposed": lambda **o: QuadrangleAttention(12, 3, **{"window": 4, "decomposed": True, **o}),
}


def _layer(kind, moved=0.3, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind](**options).to(DTYPE).eval()
    for parameter in layer.transform.parameters():
        torch.nn.init.normal_(parameter, std=moved)
    return layer


def _map(height, width, batch=2):
    return torch.randn(batch, height, width, 12, dtype=DTYPE, generator=torch.Generator().manual_seed(1))


def _read(image, x, y):
    """`image` `[height, width, channels]` between its tokens, at x and y in tokens: weights fall off like a tent."""
    column = (1 - (x[:, None] - torch.arange(image.shape[1])).abs()).clamp(min=0)
    row = (1 - (y[:, None] - torch.arange(image.shape[0])).abs()).clamp(min=0)
    return torch.einsum("py,px,yxc->pc", row, column, image)


def _moved(layer, m, x, y):
    """Points of a window relative to its middle after the move `m`, its shifts divided already."""
    m = [*m, *[m.new_zeros(())] * (9 - len(m))]
    zero, one = torch.zeros((), dtype=DTYPE), torch.ones((), dtype=DTYPE)

    def matrix(*rows):
        return torch.stack([torch.stack(row) for row in rows])

    turn = matrix((m[8].cos(), m[8].sin()), (-m[8].sin(), m[8].cos()))
    whole = turn @ matrix((one, m[4]), (m[5], one)) @ matrix((1 + m[2], zero), (zero, 1 + m[3]))
    whole = torch.cat([torch.cat([whole, torch.stack(m[:2])[:, None]], 1), torch.stack([m[6], m[7], one])[None]])
    x, y, depth = whole @ torch.stack([x, y, torch.ones_like(x)])
    return x / depth, y / depth


def loop(layer, x, dialect):
    """One window and head after the other, from the formulas of the papers."""
    size, heads, (height, width) = layer.window, layer.num_heads, x.shape[1:3]
    below, right = -height % size, -width % size
    top, left = (below // 2, right // 2) if dialect == "detection" else (0, 0)
    pad = [0, 0, left, right - left, top, below - top]
    qkv, x = F.pad(F.linear(x, layer.qkv.weight, layer.qkv.bias), pad), F.pad(x, pad)
    tall, wide, out_dim = x.shape[1], x.shape[2], layer.proj.weight.shape[0]
    by = {
        "swin": (wide // size, tall // size),
        "classification": (max(width // size, 1), max(height // size, 1)),
        "detection": (max(height // size, 1), max(width // size, 1)),
    }[dialect]
    slot = torch.arange(size, dtype=DTYPE) - (size - 1) / 2
    slot_y, slot_x = (t.flatten() for t in torch.meshgrid(slot, slot, indexing="ij"))
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    apart = pairs[:, None] - pairs + size - 1  # query - key
    out = torch.zeros(*x.shape[:3], out_dim, dtype=DTYPE)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (len(x), tall // size, wide // size))).tolist():
        box = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        moves = F.linear(F.leaky_relu(x[b][box].mean((0, 1))), layer.transform.weight, layer.transform.bias)
        for h, (move, part) in enumerate(zip(moves.chunk(heads), torch.arange(out_dim).chunk(heads), strict=True)):
            move = torch.cat([move[:2] / torch.tensor(by), move[2:]])
            u, v = _moved(layer, move, slot_x * 2 / (wide - 1), slot_y * 2 / (tall - 1))
            u = u * (wide - 1) / 2 + j * size + (size - 1) / 2
            v = v * (tall - 1) / 2 + i * size + (size - 1) / 2
            q = qkv[b][box].flatten(0, 1)[:, part]
            scores = q @ _read(qkv[b][..., out_dim + part], u, v).T * (x.shape[-1] // heads) ** -0.5
            if layer.relative_position_bias_table is not None:
                scores = scores + layer.relative_position_bias_table[apart[..., 0] * (2 * size - 1) + apart[..., 1], h]
            else:
                embedded = layer.rel_pos_h[apart[..., 0]] + layer.rel_pos_w[apart[..., 1]]
                scores = scores + torch.einsum("qd,qkd->qk", q, embedded)
            read = _read(qkv[b][..., 2 * out_dim + part], u, v)
            out[b][(*box, part)] = (scores.softmax(-1) @ read).view(size, size, -1)
    out = out[:, top : top + height, left : left + width]
    return F.linear(out, layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_points_are_sampled_as_few_are(dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 7, 2, 3, 4, generator=generator, dtype=dtype)
    points = 4 * torch.rand(2, 2, 6, 3, 100, generator=generator, dtype=dtype) - 2  # half of them outside
    points = (points + 1) * torch.tensor([3.0, 2.0]).view(2, 1, 1, 1, 1)  # x from 0 to 6 is inside, and y from 0 to 4
    points[:, :, 0, :, :10] = torch.tensor([4.0, 1.0]).view(2, 1, 1, 1)  # on a token
    points[:, :, 1, :, :3] = torch.tensor([[6.0, 0.0, 1e30], [4.0, 3.0, -1e30]])[:, None, None]
    results = []
    for parts in (600, 25):  # tokens in a call
        inputs = [t.clone().requires_grad_() for t in (maps, points)]
        out = torch.cat([varied_window.sample(inputs[0], some) for some in inputs[1].split(parts, 4)], 3)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert points.numel() >= 4096 > points[..., :25].numel()
    torch.testing.assert_close(*results)
    points[:, 0, 0, 0, 0] = torch.nan
    assert varied_window.sample(maps, points).shape == (2, 6, 3, 100, 8)


def _dialect(kind):
    return kind if kind in ("classification", "detection") else "swin"


@pytest.mark.parametrize("size", [(8, 12), (7, 13), (3, 2), (1, 9)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_loop(kind, size):
    layer, x = _layer(kind), _map(*size)
    expected = loop(layer, x, _dialect(kind))
    for fused in (True, False):
        layer.fused_attn = fused
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind):
    layer, grads = _layer(kind), []
    for way in (layer, lambda x: loop(layer, x, _dialect(kind))):
        x = _map(7, 9, batch=1).requires_grad_()
        way(x).square().mean().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    torch.testing.assert_close(*grads)
    assert grads[0][0].abs().min() > 0


@pytest.mark.parametrize("kind", ["swin", "quadrangle"])
@pytest.mark.parametrize("size", [(8, 12), (9, 6)], ids=str)
def test_starts_as_plain_windows(kind, size):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]().to(DTYPE), _map(*size)
    pad = [0, 0, 0, -size[1] % 4, 0, -size[0] % 4]
    q, k, v = F.pad(layer.qkv(x), pad).unflatten(-1, (3, 3, 4)).unbind(3)
    bias = layer.relative_position_bias_table.T.view(3, 7, 7).flip(1, 2)  # ours is query - key
    plain = attend(q, k, v, Window(4), bias=bias).flatten(3)[:, : size[0], : size[1]]
    torch.testing.assert_close(layer(x), layer.proj(plain))


def test_vit_dialects_start_moved():
    assert not LAYERS["swin"]().transform.weight.any()
    assert LAYERS["classification"]().transform.weight.abs().min() > 0


def test_a_shift_of_two_reads_the_next_window():
    layer, x = _layer("swin", 0), _map(4, 800, batch=1)
    with torch.no_grad():
        layer.transform.bias.view(3, 4)[:, 0] = 2  # 2 / windows of a width of 2: one window to the right
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 4)).unbind(3)
    k, v = (F.pad(t[:, :, 4:], [0, 0, 0, 0, 0, 4]) for t in (k, v))
    bias = layer.relative_position_bias_table.T.view(3, 7, 7).flip(1, 2)
    near = layer.proj(attend(q, k, v, Window(4), bias=bias).flatten(3))
    assert (layer(x) - near)[:, :, :-4].abs().max() < 0.05 * near.abs().max()


@pytest.mark.parametrize("pull", [0.0, 0.1])
def test_pull_adds_to_the_gradient_of_points_outside(pull):
    layer, seen = _layer("quadrangle", 0.8, pull=pull), []
    warp = layer.points

    def points(*args):
        out = warp(*args)
        out.register_hook(lambda grad: seen.append((out.detach(), grad)))
        return out

    layer.points = points
    layer(_map(9, 9)).sum().mul(0).backward()  # the loss itself says nothing
    (where, grad), = seen  # fmt: skip
    half = (12 - 1) / 2  # of the padded map
    where = where / half - 1
    assert (where.abs() > 1.001).any() and (where.abs() < 1).any()
    torch.testing.assert_close(grad * half, 10 * pull * where.sign() * (where.abs() > 1.001))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision(kind, dtype):
    layer, x = _layer(kind), _map(33, 41, batch=1)
    exact = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    # places hang on the rounded means, so an error there is felt as a shift
    assert (out.to(DTYPE) - exact).abs().mean() < 8 * torch.finfo(dtype).eps * exact.abs().mean() * math.sqrt(12)


@pytest.mark.parametrize("kind", LAYERS)
def test_scripts(kind):
    layer, x = _layer(kind), _map(9, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "dim 12"),
        ({"out_dim": 13}, "dim 13"),
        ({"window": 1}, "at least 2"),
        ({"dialect": "coco"}, "'swin', 'classification', 'detection'"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        VariedWindowAttention(12, **{"num_heads": 3, **options})


def test_refuses_maps():
    with pytest.raises(ValueError, match=r"\[batch, height, width, 12\]"):
        _layer("swin")(torch.randn(1, 8, 8, 11, dtype=DTYPE))
