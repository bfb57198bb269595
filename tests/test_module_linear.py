"""Linear attention against formulas with explicit N x N weights, in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

from vision_attn.kernels.native import build
from vision_attn.modules.linear import KINDS, LinearAttention2d, linear_attention, scan
from vision_attn.modules.linear.cores import Softmax
from vision_attn.modules.linear.layer import ROTARY, AttentionFrame
from vision_attn.modules.linear.rotary import axial_turns, rotate
from vision_attn.modules.linear.scan import gla, gla_of_logits

GRIDS = [(5, 7), (1, 6), (4, 1), (1, 1)]


def draw(grid=(5, 7), batch=2, heads=3, dim=8, count=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, *grid, heads, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def turning(grid, dim):
    """The rotation of every token as a matrix, `[tokens, dim, dim]`."""
    pairs = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            speeds = 10000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
            angle = torch.cat([y * speeds, x * speeds])
            c, s = angle.cos(), angle.sin()
            blocks = [torch.stack([torch.stack([a, -b]), torch.stack([b, a])]) for a, b in zip(c, s, strict=True)]
            pairs.append(torch.block_diag(*blocks))
    return torch.stack(pairs)


def explicit(kind, q, k, v, turn=None, temperature=None, gates=None, feature=lambda x: x):
    """One head: q `[tokens, dim]`, k and v `[keys, dim]`."""
    n, d = k.shape
    spin = (lambda x: x) if turn is None else (lambda x: (turn @ x[..., None])[..., 0])
    if kind in ("relu", "slab", "l2vit"):
        q, k = q.clamp(min=0), k.clamp(min=0)
    elif kind in ("elu", "care", "mala", "rala"):
        q, k = F.elu(q) + 1, F.elu(k) + 1
    if kind in ("elu", "relu", "slab"):
        return spin(q) @ spin(k).T @ v / ((q @ k.T).sum(1, keepdim=True) + 1e-6)
    if kind == "care":
        return spin(q) @ spin(k).T / n @ v / ((q @ k.T).mean(1, keepdim=True) + 1e-6)
    if kind == "rala":
        a = n * ((q.mean(0) @ k.T) * d**-0.5).softmax(0)
        return spin(q) @ spin(a[:, None] * k).T / n @ v / ((q @ (a[:, None] * k).T).mean(1, keepdim=True) + 1e-6)
    if kind == "mala":
        s = (q @ k.T).mean(1, keepdim=True) * d**-0.5
        weights = (1 + 1 / (s + 1e-6)) * (spin(q) @ spin(k).T) * d**-0.5 / n - s / n
        return weights @ v
    if kind == "inline":
        scores = feature(q) @ feature(k).T * d**-0.5 / n
        return (scores + (1 - scores.sum(1, keepdim=True)) / n) @ v
    if kind == "l2vit":
        scores = q @ k.T
        return temperature * (scores @ v) / scores.sum(1, keepdim=True).clamp(min=100)
    if kind == "nala":
        norm = q.norm(dim=1, keepdim=True)
        p, u = 3 * (0.5 + norm.tanh()), q / norm
        q1, q2, k1, k2 = u.clamp(min=0) ** p, (-u).clamp(min=0) ** p, (k**3).clamp(min=0), (-(k**3)).clamp(min=0)
        return (
            (spin(q1) @ spin(k1).T + spin(q2) @ spin(k2).T)
            / n
            @ v
            / (((q1 @ k1.T) + q2 @ k2.T).mean(1, keepdim=True) + 1e-6)
        )
    if kind == "flow":
        e, m = 1e-6, len(q)
        q, k = q.sigmoid(), k.sigmoid()
        into = 1 / (((q + e) * (k.sum(0) + e)).sum(1) + e)
        out = 1 / (((k + e) * (q.sum(0) + e)).sum(1) + e)
        into2 = ((q + e) * ((out[:, None] * k).sum(0) + e)).sum(1) + e
        out2 = (((k + e) * ((into[:, None] * q).sum(0) + e)).sum(1) + e).clamp(-1, 1)
        values = n * out2.softmax(0)[:, None] * v
        return (into2 * m / n).sigmoid()[:, None] * (into[:, None] * q @ k.T) @ values
    if kind == "lightnet":
        return F.silu(q) @ k.softmax(0).T @ v
    decays = [torch.zeros(n, n, d, dtype=q.dtype) for _ in range(2)]
    for i in range(n):
        for j in range(n):
            if j <= i:
                decays[0][i, j] = gates[0][j + 1 : i + 1].prod(0)
            if j >= i:
                decays[1][i, j] = gates[1][i:j].prod(0)
    return d**-0.5 / 2 * torch.einsum("ic,jc,ijc->ij", q, k, decays[0] + decays[1]) @ v


def reference(kind, q, k, v, **options):
    """All heads and images, `[batch, *grid, heads, dim]`."""
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    if "gates" in options:
        options["gates"] = [x.flatten(1, -3) for x in options["gates"]]
    out = torch.empty_like(flat[0])
    for b in range(q.shape[0]):
        for h in range(q.shape[-2]):
            own = {**options}
            if "gates" in own:
                own["gates"] = [x[b, :, h] for x in own["gates"]]
            if "temperature" in own:
                own["temperature"] = own["temperature"][h]
            out[b, :, h] = explicit(kind, *(x[b, :, h] for x in flat), **own)
    return out.view(q.shape)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, grid):
    q, k, v = draw(grid)
    options, own = {}, {}
    if kind == "l2vit":
        options["temperature"] = own["temperature"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    if kind == "gla":
        gates = [x.sigmoid() for x in draw(grid, count=2, seed=1)]
        options = {"log_decay": gates[0].log(), "log_decay_back": gates[1].log()}
        own["gates"] = gates
    expected = reference(kind, q, k, v, **own)
    torch.testing.assert_close(linear_attention(q, k, v, kind, **options), expected)
    single = linear_attention(q.float(), k.float(), v.float(), kind, **{n: x.float() for n, x in options.items()})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ROTARY)
def test_formula_with_rotary_positions(kind, grid):
    q, k, v = draw(grid)
    out = linear_attention(q, k, v, kind, turns=axial_turns(q))
    torch.testing.assert_close(out, reference(kind, q, k, v, turn=turning(grid, 8)))


def test_l2vit_divides_by_what_it_sums_beyond_a_hundred():
    q, k, v = draw((11, 13))
    q, k = 3 * q, 3 * k
    temperature = torch.full((3,), 8**-0.5, dtype=torch.float64)
    assert ((q.clamp(min=0) * k.clamp(min=0).sum((1, 2), keepdim=True)).sum(-1) > 100).any()
    torch.testing.assert_close(linear_attention(q, k, v, "l2vit"), reference("l2vit", q, k, v, temperature=temperature))


@pytest.mark.parametrize(
    ("name", "feature"),
    [("relu", F.relu), ("leaky_relu", F.leaky_relu), ("exp", lambda x: (0.2 * x).exp())],
)
def test_features_of_inline(name, feature):
    q, k, v = draw()
    expected = reference("inline", q, k, v, feature=feature)
    torch.testing.assert_close(linear_attention(q, k, v, "inline", feature=name), expected)


@pytest.mark.parametrize("kind", ["elu", "mala", "inline", "care", "rala", "nala"])
def test_weights_sum_to_one(kind):
    q, k, v = draw((9, 10))
    tolerance = 1e-4 if kind == "nala" else 1e-5  # the constant in the divisor
    torch.testing.assert_close(
        linear_attention(q, k, torch.ones_like(v), kind), torch.ones_like(v), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"gla"}))
def test_other_keys_than_queries(kind):
    q, (k, v) = draw((3, 4), count=1)[0], draw((5, 6), count=2, seed=1)
    own = {"temperature": torch.full((3,), 8**-0.5, dtype=torch.float64)} if kind == "l2vit" else {}
    torch.testing.assert_close(linear_attention(q, k, v, kind), reference(kind, q, k, v, **own))


def test_grids_of_any_number_of_axes():
    q, k, v = draw((3, 4, 5))
    for kind in set(KINDS) - {"gla"}:
        flat = linear_attention(*(x.flatten(1, 3) for x in (q, k, v)), kind)
        torch.testing.assert_close(linear_attention(q, k, v, kind), flat.view(q.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    q, k, v = (x.requires_grad_() for x in draw((2, 3), batch=1, heads=2))
    options = {}
    if kind == "gla":
        options = dict(
            zip(("log_decay", "log_decay_back"), (-x.exp() for x in draw((2, 3), 1, 2, count=2)), strict=True)
        )
    elif kind in ROTARY:
        options = {"turns": axial_turns(q.detach())}
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, kind, **options), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_of_long_inputs(kind, dtype):
    """128 x 128 tokens with large features: finite, and as near as rounding lets it."""
    q, k, v = draw((128, 128), batch=1, heads=1, dtype=dtype)
    q, k = 8 * q, 8 * k
    options = {}
    if kind == "gla":
        k = k / 8
        options = {"log_decay": -k.abs(), "log_decay_back": -q.abs()}
    out = linear_attention(q, k, v, kind, **options)
    exact = linear_attention(q.double(), k.double(), v.double(), kind, **{n: x.double() for n, x in options.items()})
    assert out.dtype == dtype and out.isfinite().all()
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_sums_wide(kind):
    torch.manual_seed(0)
    layer = LinearAttention2d(16, 2, kind)
    x = 4 * torch.randn(1, 40, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer.double()(x.double())
    assert (out.double() - exact).norm() / exact.norm() < 0.05


def test_zero_input_is_finite_with_gradients():
    for kind in KINDS:
        q, k, v = (torch.zeros(1, 3, 3, 1, 8, requires_grad=True) for _ in range(3))
        options = {"log_decay": k * 0, "log_decay_back": k * 0} if kind == "gla" else {}
        out = linear_attention(q, k, v, kind, **options)
        out.sum().backward()
        assert out.isfinite().all() and all(x.grad is None or x.grad.isfinite().all() for x in (q, k, v)), kind


@pytest.mark.parametrize("strength", [0.01, 1.9, 3.0, 200.0])
@pytest.mark.parametrize("grid", [(7, 11), (3, 5)])
def test_scan_in_chunks_equals_token_by_token(grid, strength):
    """Mild gates take one path, strong ones another."""
    q, k, v, a, b = draw(grid, count=5)
    a, b = (-strength * t.sigmoid() for t in (a, b))
    inputs = [t.requires_grad_() for t in (q, k, v, a.detach(), b.detach())]
    out, slow = gla(*inputs), gla(*inputs, fused=False)
    torch.testing.assert_close(out, slow)
    torch.testing.assert_close(gla(*(t.float() for t in inputs)).double(), slow, rtol=1e-4, atol=1e-5)
    for fast, plain in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(slow.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("gate", [-0.5, -0.99, -1.5, -30.0])
def test_gates_that_close_have_gradients(gate):
    """640 tokens in float32: products of gates over a chunk must not overflow, also where a gradient squares them."""
    q, k, v = draw((20, 32), dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (q, k, v, torch.full_like(q, gate), torch.full_like(q, gate))]
    slow = [t.detach().double().requires_grad_() for t in inputs]
    got = torch.autograd.grad(gla(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(gla(*slow, fused=False).square().sum(), slow)
    for one, exact in zip(got, want, strict=True):
        assert (one - exact).norm() < 1e-5 * exact.norm()


def test_scan_of_several_segments():
    q, k, v, a, b = draw((35, 31), batch=1, heads=1, count=5)
    a, b = -a.sigmoid() / 16, -b.sigmoid() / 16
    torch.testing.assert_close(gla(q, k, v, a, b), gla(q, k, v, a, b, fused=False))


@pytest.mark.parametrize("fused", [True, False])
def test_gates_of_logits(fused):
    """In C++ in float32 without gradients, where there is a compiler; the other form elsewhere."""
    q, k, v, a, b = draw((12, 11), count=5)
    a[0, 0, 0], b[1, 2, 3] = -200, 300
    logits = torch.cat([a.flatten(3), b.flatten(3)], -1)
    expected = gla(q, k, v, F.logsigmoid(a) / 16, F.logsigmoid(b) / 16, fused=False)
    torch.testing.assert_close(gla_of_logits(q, k, v, logits, fused), expected)
    single = [t.float() for t in (q, k, v, logits)]
    torch.testing.assert_close(gla_of_logits(*single, fused).double(), expected, rtol=1e-4, atol=1e-5)
    mixed = gla_of_logits(*(t.bfloat16() for t in single[:3]), single[3], fused)
    assert mixed.dtype == torch.bfloat16
    rounded = gla_of_logits(*(t.bfloat16().double() for t in single[:3]), single[3].double())
    torch.testing.assert_close(mixed.double(), rounded, rtol=1e-2, atol=1e-2)
    leaves = [t.requires_grad_() for t in single]
    for t, slow in zip(
        torch.autograd.grad(gla_of_logits(*leaves, fused).square().sum(), leaves),
        torch.autograd.grad(gla_of_logits(*(t.double() for t in leaves), False).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(t, slow, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(bool(build.missing()), reason=f"no CPU kernel here: {build.missing()}")
def test_scan_of_a_layer_is_in_cpp(monkeypatch):
    layer = LinearAttention2d(16, 2, "gla")
    x = torch.randn(3, 14, 14, 16)
    with torch.no_grad():
        monkeypatch.setenv(build.SWITCH, "0")
        expected = layer(x)
        monkeypatch.delenv(build.SWITCH)
        monkeypatch.setattr(scan, "gla", lambda *args: pytest.fail("not computed by the kernel"))
        torch.testing.assert_close(layer(x), expected)


# -- the layer --


def frame(layer, x, core):
    """The layer from its parameters and a core of q, k, v."""
    heads = (layer.num_heads, layer.head_dim)
    parts = (x @ layer.qkv.weight.T + layer.qkv.bias).split(layer.dim, -1)
    v = parts[2] if layer.own_values else x
    out = core(*(t.unflatten(-1, heads) for t in (parts[0], parts[1], v))).flatten(3)
    if layer.lepe is not None:
        kernel = layer.lepe.weight
        out = out + F.conv2d(
            v.permute(0, 3, 1, 2), kernel, layer.lepe.bias, padding=kernel.shape[-1] // 2, groups=layer.dim
        ).permute(0, 2, 3, 1)
    if layer.gated and isinstance(layer.norm, torch.nn.LayerNorm):
        out = F.layer_norm(out, (layer.dim,), layer.norm.weight, layer.norm.bias) * F.silu(parts[-1])
    elif layer.gated:
        out = out * parts[-1]
    return out @ layer.proj.weight.T + layer.proj.bias


def randomise(layer):
    generator = torch.Generator().manual_seed(3)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p[0].numel(), 1) ** 0.5
    return layer.double()


def plus_local(layer, x, kind):
    """The core of a kind that has parameters, from its explicit formula."""

    def inline(q, k, v):
        mean = x.mean((1, 2))
        hidden = [F.linear(m, w[..., 0], b) for m, w, b in _grouped(mean, layer.core.taps[0], layer.num_heads)]
        hidden = F.gelu(torch.cat(hidden, -1))
        taps = [F.linear(m, w[..., 0], b) for m, w, b in _grouped(hidden, layer.core.taps[2], layer.num_heads)]
        taps = torch.cat(taps, -1).view(len(x), layer.dim, 3, 3)
        padded = F.pad(v.flatten(3), (0, 0, 1, 1, 1, 1))
        local = torch.zeros_like(v.flatten(3))
        for dy in range(3):
            for dx in range(3):
                shifted = padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
                local += shifted * taps[:, None, None, :, dy, dx]
        return reference("inline", q, k, v) + local.view(v.shape)

    def l2vit(q, k, v):
        return reference("l2vit", q, k, v, temperature=layer.core.temperature)

    def slab(q, k, v):
        table = layer.core.position
        if table.shape[1:3] != x.shape[1:3]:
            table = F.interpolate(table.permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        out = reference("slab", q, k + table.unflatten(-1, k.shape[-2:]), v)
        local = layer.core.local
        maps = [F.conv2d(v[..., h, :].permute(0, 3, 1, 2), local.weight, local.bias, padding=2, groups=layer.head_dim)
                for h in range(layer.num_heads)]  # fmt: skip
        return out + torch.stack([m.permute(0, 2, 3, 1) for m in maps], 3)

    def lightnet(q, k, v):
        out = reference("lightnet", q, k, v).flatten(3)
        gate = x @ layer.core.gate[0].weight.T @ layer.core.gate[1].weight.T
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.core.norm.weight
        return (out * gate * gate.sigmoid()).view(v.shape)

    def scan(q, k, v):
        logits = x @ layer.core.decay[0].weight.T @ layer.core.decay[1].weight.T + layer.core.decay[1].bias
        gates = logits.sigmoid() ** (1 / 16)
        return reference("gla", q, k, v, gates=[g.reshape(k.shape) for g in gates.split(layer.dim, -1)])

    return {"inline": inline, "l2vit": l2vit, "slab": slab, "lightnet": lightnet, "gla": scan}.get(
        kind, lambda q, k, v: reference(kind, q, k, v)
    )


def _grouped(x, conv, groups):
    return zip(x.chunk(groups, -1), conv.weight.chunk(groups), conv.bias.chunk(groups), strict=True)


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layer(kind, grid):
    options = {"size": (5, 7)} if kind == "slab" else {}
    layer = randomise(LinearAttention2d(16, 2, kind, **options))
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), frame(layer, x, plus_local(layer, x, kind)))


@pytest.mark.parametrize("gate", [False, True, "normed"])
@pytest.mark.parametrize("kind", ["mala", "care"])
@torch.no_grad()
def test_layer_with_everything(kind, gate):
    layer = randomise(LinearAttention2d(16, 2, kind, rope="axial", lepe=5, out_gate=gate))
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    turn = turning((5, 7), 8)
    torch.testing.assert_close(layer(x), frame(layer, x, lambda q, k, v: reference(kind, q, k, v, turn=turn)))


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_softmax_core(fused):
    core = Softmax(8)
    core.fused_attn = fused
    layer = randomise(AttentionFrame(16, 2, core, lepe=3))
    turn = turning((5, 7), 8)

    def softmax(q, k, v):
        spin = [torch.einsum("nij,bnhj->bnhi", turn, t.flatten(1, 2)) for t in (q, k)]
        weights = (torch.einsum("bihd,bjhd->bhij", *spin) * 8**-0.5).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v.flatten(1, 2)).view(v.shape)

    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), frame(layer, x, softmax))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_scripts_traces_and_trains(kind):
    torch.manual_seed(0)
    layer = LinearAttention2d(16, 2, kind, lepe=3, out_gate=True, rope="axial" if kind in ROTARY else None)
    x = torch.randn(2, 5, 6, 16)
    out = layer(x)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(layer)(x), out)
        torch.testing.assert_close(layer(x[1:]), out[1:])  # images do not see each other


def test_memory_of_a_large_map_is_linear():
    """Bytes that a call allocates, twice as many tokens: twice the bytes."""

    def allocated(side, kind):
        layer = LinearAttention2d(16, 2, kind)
        x = torch.randn(1, side, 32, 16)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as run:
            layer(x)
        return sum(max(e.self_cpu_memory_usage, 0) for e in run.events())

    for kind in set(KINDS) - {"gla"}:  # the scan allocates per chunk, and frees
        assert allocated(64, kind) < 2.1 * allocated(32, kind), kind


def test_rotation_keeps_relative_positions():
    x, y = draw((6, 6), batch=1, count=2)
    x, y = x[:, :1, :1].expand_as(x), y[:, :1, :1].expand_as(y)
    turned = [rotate(t, axial_turns(t)) for t in (x, y)]
    scores = torch.einsum("bijhd,bklhd->bhijkl", *turned)
    torch.testing.assert_close(scores[..., :-1, :-1, :-1, :-1], scores[..., 1:, 1:, 1:, 1:])
    assert not torch.allclose(scores[..., 0, 0, 0, 0], scores[..., 0, 0, 0, 1])
    assert not torch.allclose(scores[..., 0, 0, 1, 0], scores[..., 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "softmax"}, "kind 'softmax'; allowed: 'care'"),
        ({"num_heads": 3}, "dim 16 cannot be cut into 3 heads"),
        ({"rope": "axial", "kind": "flow"}, "rope='axial' is for kinds"),
        ({"rope": "rows"}, "rope 'rows'; allowed"),
        ({"rope": "axial", "num_heads": 4}, "multiple of 4 and at least 8; got 4"),
        ({"lepe": 4}, "odd"),
        ({"out_gate": "sigmoid"}, "out_gate 'sigmoid'; allowed"),
        ({"kind": "inline", "feature": "tanh"}, "feature 'tanh'; allowed"),
        ({"kind": "slab", "size": 0}, "size must be at least 1"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        LinearAttention2d(16, **{"num_heads": 2, **options})


def test_wrong_calls():
    with pytest.raises(TypeError, match="unknown options.*'rank'.*takes size"):
        LinearAttention2d(16, 2, "slab", rank=4)
    with pytest.raises(ValueError, match=r"must be \[batch, height, width, 16\]; got \[1, 4, 4, 8\]"):
        LinearAttention2d(16, 2)(torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match="must be"):
        LinearAttention2d(16, 2)(torch.zeros(1, 0, 4, 16))
    with pytest.raises(ValueError, match="kind 'dense'; allowed"):
        linear_attention(*draw(), kind="dense")
