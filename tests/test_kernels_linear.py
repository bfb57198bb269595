"""Linear attention and the gated scan: against all pairs and token-by-token loops, long inputs in half precision,
gradients, memory, the scan in C++."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.kernels import linear
from vision_attn.kernels.linear import gated_scan, gated_scan_both, linear_attention, token_mean
from vision_attn.kernels.native import build, scan
from vision_attn.kernels.testing import error

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def pairs(q, k, v, normalize=True, eps=1e-6, scale=1.0, key_mask=None):
    """All tokens x tokens, in the dtype of the inputs."""
    seen = torch.ones(k.shape[:-2], dtype=torch.bool) if key_mask is None else key_mask
    seen = seen.flatten(1)[:, None, None]
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.einsum("bnhd,bmhd->bhnm", q.flatten(1, -3), k.flatten(1, -3)) / count * seen
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhnm,bmhe->bnhe", weights * scale, v.flatten(1, -3)).view(*q.shape[:-1], v.shape[-1])


def loop(q, k, v, log_decay, scale=None, reverse=False):
    """Token by token, in the dtype of the inputs."""
    shape = v.shape
    q, k, v, log_decay = (t.flatten(1, -3) for t in (q, k, v, log_decay))
    order = range(q.shape[1])[:: -1 if reverse else 1]
    state, outs = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), {}
    for t in order:
        state = log_decay[:, t].exp()[..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outs[t] = (q[:, t, :, None] @ state).squeeze(2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.stack([outs[t] for t in range(q.shape[1])], 1).view(shape)


# -- linear attention


@pytest.mark.parametrize("grid, keys", [((7,), (7,)), ((3, 5), (3, 5)), ((2, 3, 4), (5, 2)), ((1, 1), (1,))])
@pytest.mark.parametrize("options", [{}, {"normalize": False, "scale": 0.3}, {"eps": 0.5, "scale": 2.0}])
def test_all_pairs(grid, keys, options):
    q, k, v = (torch.rand(2, *g, 3, d, dtype=torch.float64) for g, d in ((grid, 4), (keys, 4), (keys, 5)))
    close(linear_attention(q, k, v, **options), pairs(q, k, v, **options))
    mask = torch.rand(2, *keys) < 0.6
    k[~mask], v[~mask] = math.nan, math.inf
    clean = [t.masked_fill(~mask[..., None, None], 0) for t in (k, v)]
    got = linear_attention(q, k, v, key_mask=mask, **options)
    assert got.isfinite().all()
    close(got, pairs(q, *clean, key_mask=mask, **options))


def test_weights_sum_to_one_and_no_keys_give_zero():
    q, k = torch.rand(2, 1, 8, 9, 2, 4, dtype=torch.float64)
    close(linear_attention(q, k, torch.ones_like(k), eps=0.0), torch.ones_like(k))
    assert not linear_attention(q, k, k, key_mask=torch.zeros(1, 8, 9, dtype=torch.bool)).any()


@pytest.mark.parametrize("dtype", HALF)
def test_16384_tokens_of_large_features_in_half_precision(dtype):
    """The sums are a million times what float16 can hold."""
    q, k = (torch.rand(1, 128, 128, 2, 32) * 1000).to(dtype), (torch.rand(1, 128, 128, 2, 32) * 60000).to(dtype)
    v = (torch.randn(1, 128, 128, 2, 32) * 100 + 500).to(dtype)
    want = linear_attention(*(t.double() for t in (q, k, v)))
    got = linear_attention(q, k, v)
    assert got.dtype == dtype and got.isfinite().all()
    # no further off than rounding the true result to this dtype, and a little
    assert error(got, want) <= 1.1 * error(want.to(dtype), want)
    plain = torch.einsum(
        "bnhd,bhde->bnhe", q.flatten(1, 2), torch.einsum("bmhd,bmhe->bhde", k.flatten(1, 2), v.flatten(1, 2))
    )
    assert dtype != torch.float16 or not plain.isfinite().all()
    assert token_mean(k).isfinite().all() and token_mean(k).dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_gradients(normalize):
    q, k, v = (torch.rand(2, *g, 2, 3, dtype=torch.float64).requires_grad_() for g in ((2, 3), (5,), (5,)))
    mask = torch.tensor([[True, True, False, True, True]] * 2)

    def function(q, k, v):
        return linear_attention(q, k, v, normalize=normalize, key_mask=mask)

    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_linear_error_is_that_of_eager(dtype):
    leaves = [torch.rand(2, 9, 7, 2, 8).to(dtype) for _ in range(2)] + [torch.randn(2, 9, 7, 2, 8).to(dtype)]
    outer = torch.randn(2, 9, 7, 2, 8)
    check_budget(leaves, lambda *t: linear_attention(*t), pairs, outer)


def check_budget(leaves, function, plain, outer, factor=8):
    """Output and gradients are at most `factor` times as far off as the plain form in the same dtype."""

    def run(function, dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = function(*tensors)
        return [out, *torch.autograd.grad((out * outer.to(out.dtype)).sum(), tensors)]

    dtype = leaves[0].dtype
    want, other, got = run(plain, torch.float64), run(plain, dtype), run(function, dtype)
    for true, eager, ours in zip(want, other, got, strict=True):
        assert ours.dtype == dtype
        floor = torch.finfo(dtype).eps * true.abs().max().item()
        assert error(ours, true) <= factor * max(error(eager, true), floor)


# -- the kinds that are built on it, by their own formulas with sums over all pairs


def rotate(x):
    return x * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None, None]  # stands for any rotation by position


def sums(q, k):
    return torch.einsum("bnhd,bmhd->bnhm", q, k)


def times(weights, v):
    return torch.einsum("bnhm,bmhd->bnhd", weights, v)


KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


@kind
def elu(q, k, v):
    q, k, n = F.elu(q) + 1, F.elu(k) + 1, k.shape[1]
    a = sums(q, k)
    return linear_attention(q, k, v, eps=1e-6 / n), times(a, v) / (a.sum(-1, keepdim=True) + 1e-6)


@kind
def mala(q, k, v):
    q, k, s, n = F.elu(q) + 1, F.elu(k) + 1, q.shape[-1] ** -0.5, k.shape[1]
    z = s * (q * token_mean(k)).sum(-1, keepdim=True)
    got = linear_attention(rotate(q), rotate(k), v, normalize=False, scale=s)
    z0 = s * sums(q, k).mean(-1, keepdim=True)
    want = (1 + 1 / (z0 + 1e-6)) * s / n * times(sums(rotate(q), rotate(k)), v) - z0 * v.mean(1, keepdim=True)
    return (1 + 1 / (z + 1e-6)) * got - z * token_mean(v), want


@kind
def rala(q, k, v):
    q, k, s, n = F.elu(q) + 1, F.elu(k) + 1, q.shape[-1] ** -0.5, k.shape[1]
    weighted = k * n * (s * token_mean(q) * k).sum(-1, keepdim=True).softmax(1)
    mass = (q * token_mean(weighted)).sum(-1, keepdim=True)
    got = linear_attention(rotate(q), rotate(weighted), v, normalize=False) / (mass + 1e-6)
    a = n * torch.einsum("bhd,bmhd->bmh", s * q.mean(1), k).softmax(1)[..., None]
    want = times(sums(rotate(q), rotate(a * k)), v) / n / (sums(q, a * k).mean(-1, keepdim=True) + 1e-6)
    return got, want


@kind
def inline(q, k, v):
    s, n = q.shape[-1] ** -0.5, k.shape[1]
    got = linear_attention(q, k, v, normalize=False, scale=s)
    got = got + (1 - s * (q * token_mean(k)).sum(-1, keepdim=True)) * token_mean(v)
    a = s * sums(q, k)
    return got, times(a / n + (1 - a.mean(-1, keepdim=True)) / n, v)


@kind
def l2vit(q, k, v):
    q, k, n = q.relu(), k.relu(), k.shape[1]
    mass = (q * token_mean(k)).sum(-1, keepdim=True)
    a = sums(q, k)
    got = 0.7 * linear_attention(q, k, v, normalize=False) / mass.clamp(min=100 / n)
    return got, 0.7 * times(a, v) / a.sum(-1, keepdim=True).clamp(min=100)


@kind
def flow(q, k, v, e=1e-6):
    q, k, n, m = q.sigmoid(), k.sigmoid(), q.shape[1], k.shape[1]

    def mass(a, b, count):  # <a + e, sum b + e> + e
        return ((a + e) * (count * token_mean(b) + e)).sum(-1, keepdim=True) + e

    into, out = 1 / mass(q, k, m), 1 / mass(k, q, n)
    kept, given = mass(q, out * k, m), mass(k, into * q, n).clamp(-1, 1)
    values = given.softmax(1) * m * v
    got = (kept * n / m).sigmoid() * linear_attention(into * q, k, values, normalize=False, scale=m)

    def all_pairs(a, b):
        return torch.einsum("bnhd,bhd->bnh", a + e, b.sum(1) + e)[..., None] + e

    i, o = 1 / all_pairs(q, k), 1 / all_pairs(k, q)
    i2, o2 = all_pairs(q, o * k), all_pairs(k, i * q).clamp(-1, 1)
    return got, (i2 * n / m).sigmoid() * i * times(sums(q, k), m * o2.softmax(1) * v)


@kind
def nala(q, k, v):
    size = q.norm(dim=-1, keepdim=True) + 1e-6
    u, power = q / size, 3 * (0.5 + size.tanh())
    q = torch.cat([u.relu() ** power, (-u).relu() ** power], -1)
    k = torch.cat([(k**3).relu(), (-(k**3)).relu()], -1)
    a = sums(q, k) / k.shape[1]
    return linear_attention(q, k, v), times(a, v) / (a.sum(-1, keepdim=True) + 1e-6)


@kind
def lightnet(q, k, v):
    q, k, n = F.silu(q), k.softmax(1), k.shape[1]
    return linear_attention(q, k, v, normalize=False, scale=n), times(sums(q, k), v)


@pytest.mark.parametrize("name", KINDS)
def test_published_kinds_are_made_of_it(name):
    got, want = KINDS[name](
        randn(2, 11, 3, 8),
        randn(2, 9 if name == "flow" else 11, 3, 8),
        randn(2, 11, 3, 8)[:, : 9 if name == "flow" else 11],
    )
    close(got, want, 1e-9)


# -- gated scan


def gates(*shape, dtype=torch.float64):
    """From nearly none to nearly all forgotten, and exactly all of it here and there."""
    log = F.logsigmoid(torch.randn(shape, dtype=torch.float64) * 6)
    return log.masked_fill(torch.rand(shape) < 0.05, -math.inf).to(dtype)


@pytest.mark.parametrize("grid", [(1,), (2,), (3, 5), (31,), (32,), (33,), (2, 7, 9), (200,)])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_loop(grid, reverse):
    q, k, v = (randn(2, *grid, 3, d) for d in (4, 4, 5))
    log_decay = gates(2, *grid, 3, 4)
    close(gated_scan(q, k, v, log_decay, reverse=reverse), loop(q, k, v, log_decay, reverse=reverse), 1e-11)
    close(gated_scan(q, k, v, log_decay, scale=0.3), loop(q, k, v, log_decay, 0.3), 1e-11)


@pytest.mark.parametrize("tokens", [5, 100])
def test_both_directions_are_averaged(tokens):
    q, k, v = randn(3, 2, tokens, 3, 4)
    ahead, back = gates(2, 2, tokens, 3, 4)
    want = (loop(q, k, v, ahead) + loop(q, k, v, back, reverse=True)) / 2
    close(gated_scan_both(q, k, v, ahead, back), want, 1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_in_many_segments(reverse, monkeypatch):
    monkeypatch.setattr(linear, "SEGMENT_BYTES", 1)
    leaves = [randn(2, 100, 2, 3).requires_grad_() for _ in range(3)]
    leaves.append(gates(2, 100, 2, 3).requires_grad_())
    assert linear._length(4, 3, 3, 32) == 32
    got, want = gated_scan(*leaves, reverse=reverse), loop(*leaves, reverse=reverse)
    close(got, want, 1e-11)
    outer = randn(*got.shape)
    for a, b in zip(torch.autograd.grad(got, leaves, outer), torch.autograd.grad(want, leaves, outer), strict=True):
        close(a, b.nan_to_num(), 1e-10)
        assert a.isfinite().all()


def test_scan_gradients():
    q, k, v, log_decay = (randn(1, 7, 1, 2).requires_grad_() for _ in range(4))

    def function(q, k, v, log_decay):
        return gated_scan_both(q, k, v, F.logsigmoid(log_decay), F.logsigmoid(-log_decay))

    assert torch.autograd.gradcheck(function, (q, k, v, log_decay))
    assert torch.autograd.gradgradcheck(function, (q, k, v, log_decay), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("width", [0.1, 30.0])
def test_scan_error_is_that_of_the_loop(dtype, width):
    """Gates near 1, and gates so small that their inverse would overflow."""
    leaves = [randn(2, 90, 2, d).to(dtype) for d in (8, 8, 6)] + [(-width * torch.rand(2, 90, 2, 8)).to(dtype)]
    check_budget(leaves, gated_scan, loop, torch.randn(2, 90, 2, 6))


@pytest.mark.parametrize("dtype", HALF)
def test_scan_of_16384_tokens_in_half_precision(dtype):
    q, k, v = (torch.randn(1, 16384, 1, 4).to(dtype) for _ in range(3))
    log_decay = (F.logsigmoid(torch.randn(1, 16384, 1, 4)) / 16).to(dtype)
    want = gated_scan(*(t.double() for t in (q, k, v, log_decay)))
    got = gated_scan(q, k, v, log_decay)
    assert got.isfinite().all() and error(got, want) <= 1.1 * error(want.to(dtype), want)
    # nothing is forgotten: sums over all tokens, which float16 could not even count
    ones, never = torch.ones(1, 16384, 1, 1, dtype=dtype), torch.zeros(1, 16384, 1, 1, dtype=dtype)
    counted = gated_scan(ones, ones, ones, never, scale=1 / 16384).flatten()
    torch.testing.assert_close(
        counted.double(), torch.arange(1, 16385).double() / 16384, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_log_decay_in_float32_beside_half_inputs():
    """Gates so near 1 that half precision would round them to 1."""
    q = torch.ones(1, 4000, 1, 1, dtype=torch.float16)
    log_decay = torch.full((1, 4000, 1, 1), -1e-4)
    got = gated_scan(q, q, q, log_decay, scale=1e-3)
    assert error(got, loop(*(t.double() for t in (q, q, q, log_decay)), 1e-3)) < 2e-3


def test_a_bad_token_reaches_only_what_comes_after_it():
    for name, where in itertools.product("kv", (5, 40)):
        inputs = dict(zip("qkv", randn(3, 1, 70, 2, 4), strict=True))
        inputs[name][0, where, 1] = math.nan
        bad = ~gated_scan(**inputs, log_decay=-torch.rand(1, 70, 2, 4, dtype=torch.float64)).isfinite().all(-1)[0]
        assert not bad[:, 0].any() and torch.equal(bad[:, 1], torch.arange(70) >= where)


# -- gated scan in C++

PATHS = [] if build.missing() else list(build.PATHS)[: list(build.PATHS).index(build._widest()) + 1]
native = pytest.mark.skipif(not PATHS, reason=f"no CPU kernel here: {build.missing()}")


@pytest.fixture
def in_cpp(monkeypatch):
    """The other form is not to be used."""
    monkeypatch.setattr(linear, "_scan", lambda *args: pytest.fail("not computed by the kernel"))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch, in_cpp):
    monkeypatch.setenv(build.SWITCH, request.param)
    assert build.library().vision_attn_lanes() == {"portable": 4, "avx2": 8, "avx512": 16}[request.param]


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def inputs_of(batch, grid, heads, key_dim, value_dim, dtype=torch.float32):
    q, k, v = (randn(batch, *grid, heads, d).to(dtype) for d in (key_dim, key_dim, value_dim))
    return q, k, v, *(gates(batch, *grid, heads, key_dim, dtype=dtype) for _ in range(2))


def wide(*tensors):
    return [t.double() for t in tensors]


def near(got, want, eager):
    """Not much further off than the loop in the same dtype."""
    assert got.dtype == eager.dtype and got.shape == want.shape
    assert error(got, want) <= 4 * max(error(eager, want), torch.finfo(got.dtype).eps * want.abs().max().item())


@pytest.mark.parametrize(
    "batch, grid, heads, key_dim, value_dim",
    [
        (1, (300,), 1, 1, 1), (2, (5, 31), 3, 5, 9), (3, (7, 13), 2, 17, 33), (1, (257,), 1, 3, 70),
        (300, (1,), 1, 4, 4), (2, (2, 4, 8), 2, 32, 64), (1, (33, 8), 1, 100, 24), (5, (32,), 2, 8, 47),
    ],
)  # fmt: skip
def test_scan_in_cpp_is_the_loop(path, threads, batch, grid, heads, key_dim, value_dim):
    q, k, v, ahead, back = inputs_of(batch, grid, heads, key_dim, value_dim)
    for reverse in (False, True):
        eager, want = (loop(*f(q, k, v, ahead), reverse=reverse) for f in (lambda *t: t, wide))
        near(gated_scan(q, k, v, ahead, reverse=reverse), want, eager)
    eager, want = ((loop(q, k, v, a, -3.0) + loop(q, k, v, b, -3.0, True)) / 2 for q, k, v, a, b in
                   ((q, k, v, ahead, back), wide(q, k, v, ahead, back)))  # fmt: skip
    near(gated_scan_both(q, k, v, ahead, back, scale=-3.0), want, eager)


def test_scan_in_cpp_reads_rows_where_they_are(path):
    q, k, v, ahead, back = inputs_of(2, (9, 10), 3, 8, 8)
    packed = torch.stack([q, k, v], 3)  # as a projection gives them
    for change in (
        lambda t: t.movedim(-2, 1).contiguous().movedim(1, -2),  # heads first
        lambda t: t.mT.contiguous().mT,  # a row is not in one piece
        lambda t: F.pad(t, (1, 2))[..., 1:-2],
        lambda t: F.pad(t, (0, 0, 0, 0, 2, 3, 1, 1))[:, 1:-1, 2:-3],  # a part of a map
        lambda t: torch.complex(t, -t).conj().imag,  # a sign that is not in memory
        lambda t: packed[:, :, :, next(i for i, x in enumerate((q, k, v)) if x is t)] if any(
            x is t for x in (q, k, v)) else t,
    ):  # fmt: skip
        views = [change(t) for t in (q, k, v, ahead, back)]
        assert all(torch.equal(a, b) for a, b in zip(views, (q, k, v, ahead, back), strict=True))
        assert torch.equal(gated_scan_both(*views), gated_scan_both(q, k, v, ahead, back))
    rows = [t[:1, :1, :1].expand(2, 9, 10, -1, -1) for t in (q, k, v, ahead, back)]
    assert torch.equal(gated_scan_both(*rows), gated_scan_both(*(t.contiguous() for t in rows)))
    heads = [t[..., :1, :].expand(-1, -1, -1, 3, -1) for t in (q, k, v, ahead, back)]
    assert torch.equal(gated_scan_both(*heads), gated_scan_both(*(t.contiguous() for t in heads)))


@pytest.mark.parametrize("dtype", HALF)
def test_scan_in_cpp_in_half_precision(path, dtype):
    q, k, v, ahead, back = inputs_of(2, (11, 12), 2, 6, 10, dtype)
    for a, b in ((ahead, back), (ahead.float(), back.float()), (ahead, back.float())):
        got, (x, y, z, *logs) = gated_scan_both(q, k, v, a, b), wide(q, k, v, a, b)
        want = (loop(x, y, z, logs[0]) + loop(x, y, z, logs[1], reverse=True)) / 2
        assert got.dtype == dtype and error(got, want) <= 1.1 * error(want.to(dtype), want)
    never = torch.zeros(1, 16384, 1, 1)
    ones = torch.ones_like(never, dtype=dtype)
    counted = gated_scan(ones, ones, ones, never, scale=1 / 16384).flatten()
    torch.testing.assert_close(
        counted.double(), torch.arange(1, 16385).double() / 16384, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_scan_in_cpp_opens_gates_as_far_as_they_go(path):
    q, k, v, ahead, _ = inputs_of(1, (150,), 2, 5, 6)
    alone = (q * k).sum(-1, keepdim=True) * v
    for shut in (-math.inf, -88.0, -1e30):
        torch.testing.assert_close(gated_scan(q, k, v, torch.full_like(q, shut), scale=1.0), alone)
    open_ones = torch.zeros_like(q)
    near(gated_scan(q, k, v, open_ones), loop(*wide(q, k, v, open_ones)), loop(q, k, v, open_ones))
    logs = torch.stack([torch.full((30001,), -math.inf), torch.linspace(-100, 0, 30001)], 1).view(1, -1, 1, 1)
    first = (logs == -math.inf).float()  # forgets all, and brings in a 1 that the next token reads
    got = gated_scan(1 - first, first, first, logs, scale=1.0)[:, 1::2]
    torch.testing.assert_close(got.double(), logs[:, 1::2].double().exp(), rtol=1e-5, atol=2.4e-38)
    slow = -(10.0 ** -torch.arange(1, 8.0)).view(1, 1, -1, 1).expand(1, 300, -1, 1)  # gates next to 1
    ones = torch.ones_like(slow)
    near(gated_scan(ones, ones, ones, slow), loop(*wide(ones, ones, ones, slow)), loop(ones, ones, ones, slow))


@pytest.mark.parametrize("root", [1.0, 2.5, 16.0])
def test_scan_in_cpp_of_logits(path, root):
    q, k, v, *_ = inputs_of(2, (150,), 2, 5, 6)
    logits = [randn(*q.shape) * 8 for _ in range(2)]
    logits[0][:, 20::30], logits[1][:, 7::50], logits[1][:, ::9] = -math.inf, math.inf, 500.0
    got = scan.scan(q, k, v, *(x.float() for x in logits), 0.5, root)
    gate = [F.logsigmoid(x.float().double()) / root for x in logits]
    want = loop(*wide(q, k, v), gate[0], 0.5) + loop(*wide(q, k, v), gate[1], 0.5, True)
    assert error(got, want) < 1e-6 * want.abs().max()


def test_a_bad_token_in_cpp_reaches_only_what_comes_after_it(path):
    """Also past a gate that forgets everything: 0 times infinity."""
    for name, where, bad in itertools.product(("k", "v", "log_decay"), (5, 40), (math.nan, math.inf)):
        inputs = dict(zip("qkv", randn(3, 2, 70, 2, 4).float(), strict=True), log_decay=-torch.rand(2, 70, 2, 4))
        inputs["log_decay"][:, 45] = -math.inf
        inputs[name][:, where, 1] = bad if name != "log_decay" else math.nan
        found = ~gated_scan(**inputs).isfinite().all(-1)[0]
        assert not found[:, 0].any() and torch.equal(found[:, 1], torch.arange(70) >= where)


@native
def test_who_looks_on_gets_the_other_form():
    """Gradients, transforms and modes see what is done, and no one waits for a compiler for a few tokens."""
    q, k, v, ahead, back = inputs_of(1, (300,), 1, 4, 4)
    call = (q, k, v, ahead, back, 0.5)
    assert scan.scan(*call) is not None
    with torch.no_grad():
        assert scan.scan(q.clone().requires_grad_(), *call[1:]) is not None
    assert scan.scan(q.clone().requires_grad_(), *call[1:]) is None
    assert scan.scan(*(t.double() for t in call[:5]), 0.5) is None
    assert scan.scan(*(t[:, :255] for t in call[:5]), 0.5) is None
    assert scan.scan(*(t.to("meta") for t in call[:5]), 0.5) is None
    assert not gated_scan(*(t[..., :0] for t in (q, k)), v, ahead[..., :0], scale=0.5).any()
    assert scan.scan(q, k[:, :299], *call[2:]) is None and scan.scan(q, k, v[:, :299], *call[3:]) is None
    short = k[..., :2].contiguous()  # twice, as one tensor
    assert scan.scan(q, short, short, *call[3:]) is None
    want = gated_scan(q, k, v, ahead)
    twice = torch.vmap(gated_scan)(*(torch.stack([t, t]) for t in (q, k, v, ahead)))
    torch.testing.assert_close(twice, torch.stack([want, want]))
    for jvp in (torch.func.jvp, torch.autograd.functional.jvp):  # linear in v
        tangent = jvp(lambda v: gated_scan(q, k, v, ahead), (v,), (v,))[1]
        torch.testing.assert_close(tangent, want)
    with torch.autograd.forward_ad.dual_level():
        dual = gated_scan(q, k, torch.autograd.forward_ad.make_dual(v, v), ahead)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, want)
    with FlopCounterMode(display=False) as counter:
        gated_scan(q, k, v, ahead)
    assert counter.get_total_flops()


@native
def test_without_the_kernel(monkeypatch):
    q, k, v, ahead, back = inputs_of(1, (300,), 2, 4, 4)
    want = gated_scan_both(q, k, v, ahead, back)
    monkeypatch.setenv(build.SWITCH, "0")
    assert scan.scan(q, k, v, ahead, back, 0.5) is None
    torch.testing.assert_close(gated_scan_both(q, k, v, ahead, back), want)


# -- both


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("function, count", [(linear_attention, 3), (gated_scan, 4)])
def test_compiles_in_one_graph(function, count, mode):
    torch._dynamo.reset()
    leaves = [torch.rand(2, 12, 2, 4, dtype=torch.float64).neg().requires_grad_() for _ in range(count)]

    def model(*leaves):
        return function(*(t.sin() for t in leaves)).sin().sum()

    compiled = torch.compile(model, backend=mode, fullgraph=True)
    want = torch.autograd.grad(model(*leaves), leaves)
    for got, grad in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(got, grad)


def test_zero_batch_views_and_autocast():
    q = torch.randn(0, 5, 6, 2, 4, requires_grad=True)
    for out in (
        linear_attention(q, q, q),
        gated_scan(q, q, q, q),
        linear_attention(q, q, q, key_mask=torch.ones(0, 5, 6) > 0),
    ):
        assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    heads_first = torch.rand(1, 2, 5, 6, 4).movedim(1, -2)
    view = heads_first.expand(3, -1, -1, -1, -1)
    for function in (linear_attention, lambda *t: gated_scan(*t, -t[0])):
        want = function(view.contiguous(), view.contiguous(), view.contiguous())
        torch.testing.assert_close(function(view, view, view), want)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(view, view, view), want)


PROBE = """
import resource, torch
torch.set_num_threads(1)
from vision_attn.kernels.linear import gated_scan, linear_attention
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(tokens):
    q, k, v, g = (torch.rand(1, tokens, 4, 32).neg().requires_grad_() for _ in range(4))
    (gated_scan(q, k, v, g) + linear_attention(q, k, v, normalize=False)).sum().backward()
run(64)
before = peak()
run(16384)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory the way Linux reports it")
def test_memory_is_linear_and_small():
    """16384 tokens of 8 MB per tensor, 1 GB if every token kept its state."""
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200


def test_errors_say_what_is_allowed():
    q = torch.randn(1, 6, 7, 4, 8)
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    for call, kind, words in (
        (lambda: linear_attention(q, q.half(), q), TypeError, "k is torch.float16 but q is torch.float32"),
        (lambda: linear_attention(q, q, 1), TypeError, "v must be a tensor, got int"),
        (lambda: linear_attention(q.int(), q, q), TypeError, "q is torch.int32; allowed: torch.float32"),
        (lambda: linear_attention(q, q[:, :3], q), ValueError, "k and v must have the same tokens and heads"),
        (lambda: linear_attention(q, q[..., :4], q), ValueError, "q and k must have equal batch, heads and dim"),
        (lambda: linear_attention(q, q, q, key_mask=mask.float()), TypeError, "key_mask must be a bool tensor"),
        (lambda: linear_attention(q, q, q, key_mask=mask[:, :3]), ValueError, r"key_mask must be \[1, 6, 7\]"),
        (lambda: token_mean(q[0, 0, 0]), ValueError, r"x must be \[batch, \*grid, heads, dim\]"),
        (lambda: linear_attention(q, q[:, :0], q[:, :0]), ValueError, "k has no tokens"),
        (lambda: gated_scan(q, q, q, q[..., :1]), ValueError, "q, k, log_decay must have one shape"),
        (lambda: gated_scan(q, q, q.half(), q), TypeError, "v is torch.float16 but q is torch.float32"),
        (lambda: gated_scan(q, q, q, q.int()), TypeError, "log_decay is torch.int32"),
    ):
        with pytest.raises(kind, match=words):
            call()
