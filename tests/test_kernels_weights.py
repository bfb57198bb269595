"""Scores and weighted sums over neighborhoods, apart: against loops, against attend, gradients, memory."""

import functools
import itertools
import math
import random
import subprocess
import sys

import pytest
import torch

from vision_attn import Neighborhood, Window, attend
from vision_attn.kernels import bands
from vision_attn.kernels.testing import error, random_neighborhood
from vision_attn.kernels.weights import apply, scores


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Many chunks, of some batch entries and some tiles each."""
    monkeypatch.setattr(bands, "CHUNK_BYTES", 2**14)
    bands._kept.cache_clear()
    yield
    bands._kept.cache_clear()


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def windows(extent, window, dilation):
    """One axis by the formula of the papers: per query its keys, and the entries of the bias."""
    for x in range(extent):
        group, i = x % dilation, x // dilation
        length = math.ceil((extent - group) / dilation)
        start = min(max(i - window // 2, 0), length - window)
        yield [(group + dilation * (start + t), start + t - i + window - 1) for t in range(window)]


@pytest.mark.parametrize("grid, window, dilation", [
    ((11,), (5,), (2,)), ((9,), (4,), (1,)), ((6, 7), (3, 5), (2, 1)), ((5, 8), (2, 3), (2, 2)),
    ((3, 4, 5), (3, 2, 1), (1, 2, 3)),
])  # fmt: skip
def test_by_loops(grid, window, dilation):
    """Slots, the sign of the bias, borders, odd and even windows: one product at a time."""
    pattern = Neighborhood(window, dilation=dilation)
    q, k, v = randn(3, 1, *grid, 2, 3)
    bias = randn(2, *(2 * w - 1 for w in window))
    got = scores(q, k, pattern, scale=0.7, bias=bias)
    weights = randn(*got.shape)
    out = apply(weights, v, pattern)
    axes = [list(windows(*a)) for a in zip(grid, window, dilation, strict=True)]
    for x in itertools.product(*map(range, grid)):
        total = torch.zeros(2, 3, dtype=torch.float64)
        for slot, keys in enumerate(itertools.product(*(axis[i] for axis, i in zip(axes, x, strict=True)))):
            y, entry = zip(*keys, strict=True)
            for head in range(2):
                want = 0.7 * (q[(0, *x, head)] * k[(0, *y, head)]).sum() + bias[(head, *entry)]
                close(got[(0, *x, head, slot)], want)
                total[head] += weights[(0, *x, head, slot)] * v[(0, *y, head)]
        close(out[(0, *x)], total)


class Case:
    """A random neighborhood on a random grid, with inputs in some dtype and layout."""

    def __init__(self, seed):
        pick = random.Random(seed)
        torch.manual_seed(seed)
        sizes = {1: (1, 2, 17, 41), 2: (1, 2, 3, 5, 8, 13), 3: (1, 2, 3, 5)}
        rank = pick.choice((1, 2, 2, 3))
        self.grid = tuple(pick.choice(sizes[rank]) for _ in range(rank))
        self.pattern = random_neighborhood(pick, self.grid)
        batch, kv_heads, group = pick.choice((1, 2, 3)), pick.choice((1, 2)), pick.choice((1, 2, 3))
        window = self.pattern.window
        shapes = [(batch, *self.grid, kv_heads * group, 5), *[(batch, *self.grid, kv_heads, d) for d in (5, 3)]]
        shapes.append((kv_heads * group, *(2 * w - 1 for w in window)))
        self.leaves = [randn(*s) for s in shapes]
        self.layout = [pick.choice(("plain", "heads-first", "expanded")) for _ in range(3)] + ["plain"]
        self.weights = randn(*shapes[0][:-1], 3)

    def run(self, function, dtype):
        """Output, and the gradients of q, k, v and bias."""
        leaves = [t.to(dtype).requires_grad_() for t in self.leaves]
        views = {
            "plain": lambda t: t,
            "heads-first": lambda t: t.movedim(-2, 1).contiguous().movedim(1, -2),
            "expanded": lambda t: t[:1].expand_as(t),
        }
        q, k, v, bias = (views[layout](t) for layout, t in zip(self.layout, leaves, strict=True))
        out = function(q, k, v, self.pattern, bias=bias)
        return [out, *torch.autograd.grad((out * self.weights.to(dtype)).sum(), leaves)]


def both(q, k, v, pattern, **options):
    return apply(scores(q, k, pattern, **options).softmax(-1), v, pattern)


def eager(q, k, v, pattern, bias):
    """What one would write without this package, everything in the dtype of the inputs."""
    grid, group = tuple(q.shape[1:-2]), q.shape[-2] // k.shape[-2]
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q * q.shape[-1] ** -0.5) @ k.mT + pattern.spread_bias(bias, grid)
    return (s.masked_fill(~pattern.mask(grid), -math.inf).softmax(-1) @ v).transpose(1, 2).unflatten(1, grid)


@pytest.mark.parametrize("seed", range(40))
def test_scores_softmax_apply_is_attend(seed):
    """With strides, causal axes, grouped heads, a bias, views; the gradients of all four inputs too."""
    case = Case(seed)
    want = case.run(functools.partial(attend, backend="reference"), torch.float64)
    tiled = case.run(functools.partial(attend, backend="tiled"), torch.float64)
    for got, other, true in zip(case.run(both, torch.float64), tiled, want, strict=True):
        close(got, true)
        close(got, other)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        plain = case.run(eager, dtype)
        floor = torch.finfo(dtype).eps * max(t.abs().max().item() for t in want)
        for got, other, true in zip(case.run(both, dtype), plain, want, strict=True):
            assert got.dtype == dtype
            assert error(got, true) <= 8 * max(error(other, true), floor)


def test_tiles_of_one_shape_and_other_bands():
    """On the first rows windows do not move, on the first columns neither: such tiles follow each other."""
    q, k, v = randn(3, 1, 6, 6, 2, 4)
    pattern = Neighborhood(2, causal=True)
    close(both(q, k, v, pattern), attend(q, k, v, pattern, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    pattern = Neighborhood(5)
    q, k, v = (randn(1, 9, 8, 2, 24).to(dtype) for _ in range(3))
    bias, weights = randn(2, 9, 9).to(dtype), randn(1, 9, 8, 2, 25).to(dtype)
    for function, inputs in ((lambda q, k, b: scores(q, k, pattern, bias=b), (q, k, bias)),
                             (lambda w, v: apply(w, v, pattern), (weights, v))):  # fmt: skip
        want = function(*(t.double() for t in inputs))
        assert error(function(*inputs), want) <= 1.01 * error(want.to(dtype), want)


@pytest.mark.parametrize("seed", range(100, 108))
def test_in_many_chunks(seed, tiny_chunks):
    case = Case(seed)
    for a, b in zip(case.run(both, torch.float64), case.run(eager, torch.float64), strict=True):
        close(a, b)


def test_chunks_split_the_batch_and_the_tiles(tiny_chunks):
    parts = list(bands.chunks(Neighborhood(5), (12, 12), 4, 2, 4, torch.device("cpu"), False))
    tokens = torch.cat([c.query.flatten() for batch, c in parts if batch.start == 0])
    assert torch.equal(tokens.sort().values, torch.arange(144)) and len(parts) > 20
    assert {batch.start for batch, _ in parts} == {0, 1, 2, 3} and max(len(c.query) for _, c in parts) < 9


def test_slots_that_do_not_exist():
    """They score minus infinity, and what stands there does not matter, forwards or backwards."""
    pattern = Neighborhood((3, 2), causal=(True, False))
    q, k, v = (randn(1, 4, 3, 2, 4).requires_grad_() for _ in range(3))
    s = scores(q, k, pattern)
    absent = s.isinf()
    # rows 0, 1, 2, 3 have 1, 2, 3, 3 keys along the causal axis
    assert absent.view(1, 4, 3, 2, 3, 2).all(-1)[0, :, 0, 0].sum(-1).tolist() == [2, 1, 0, 0]
    weights = s.softmax(-1).detach()
    poisoned = weights.masked_fill(absent, math.nan).requires_grad_()
    out = apply(poisoned, v, pattern)
    close(out, attend(q, k, v, pattern))
    by_weights, by_v = torch.autograd.grad(out.sum(), (poisoned, v))
    assert (by_weights[absent] == 0).all() and by_v.isfinite().all()
    outer = torch.ones_like(s).masked_fill(absent, math.nan)
    assert all(g.isfinite().all() for g in torch.autograd.grad(s, (q, k), outer))


@pytest.mark.parametrize("pattern", [
    Neighborhood(3), Neighborhood((3, 4), dilation=2), Neighborhood(4, stride=3, causal=True),
])  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_those_that_see_it(pattern, bad):
    q, k, v = (randn(1, 9, 8, 2, 4) for _ in range(3))
    token, keys = 40, math.prod(p for p in (pattern.window,) * 2) if isinstance(pattern.window, int) else 12
    sees, weights = pattern.mask((9, 8))[:, token], torch.rand(1, 9, 8, 2, keys, dtype=torch.float64)
    for t in (k, v):
        t.view(72, 2, 4)[token, 1] = bad
    s, out = scores(q, k, pattern).flatten(0, 2), apply(weights, v, pattern).flatten(0, 2)
    strange = ~s.isfinite() & ~scores(q, torch.zeros_like(k), pattern).flatten(0, 2).isinf()
    assert torch.equal(strange.sum(-1)[:, 1], sees.long())  # one slot of each query that sees it
    assert torch.equal(~out.isfinite().all(-1)[:, 1], sees)
    assert not strange[:, 0].any() and out[:, 0].isfinite().all()
    # backwards: a bad query spoils the gradients of its own keys only
    q.view(72, 2, 4)[token, 1] = bad
    k = randn(1, 9, 8, 2, 4).requires_grad_()
    s = scores(q, k, pattern)
    grad = torch.autograd.grad(s, k, torch.ones_like(s))[0].flatten(0, 2)
    assert torch.equal(~grad.isfinite().all(-1)[:, 1], pattern.mask((9, 8))[token])


@pytest.mark.parametrize("pattern", [Neighborhood((2, 3), 2, (2, 1)), Neighborhood(3, causal=(True, False))])
def test_gradients_of_first_and_second_order(pattern):
    window = pattern.window if isinstance(pattern.window, tuple) else (3, 3)
    q, k, v = (randn(1, 4, 4, h, 2).requires_grad_() for h in (2, 1, 1))
    bias = randn(2, *(2 * w - 1 for w in window)).requires_grad_()

    def finite(q, k, bias):
        s = scores(q, k, pattern, bias=bias)
        return s.masked_fill(s.isinf(), 0)

    weights = randn(1, 4, 4, 2, math.prod(window)).requires_grad_()
    for function, inputs in ((finite, (q, k, bias)), (lambda w, v: apply(w, v, pattern), (weights, v))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiles_in_one_graph(mode):
    torch._dynamo.reset()
    pattern = Neighborhood((3, 5), dilation=(2, 1), causal=(False, True))
    leaves = [randn(*s).requires_grad_() for s in ((2, 6, 7, 4, 8), (2, 6, 7, 2, 8), (2, 6, 7, 2, 8), (4, 5, 9))]

    def model(q, k, v, bias):
        return both(q * 2, k, v, pattern, bias=bias).sin().sum()

    compiled = torch.compile(model, backend=mode, fullgraph=True)
    want = torch.autograd.grad(model(*leaves), leaves)
    for got, grad in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(got, grad)


def test_operators_are_registered_as_they_should_be():
    pattern, ops = Neighborhood((2, 3), causal=(True, False)), torch.ops.vision_attn
    q, k = (randn(2, 3, 4, h, 5).requires_grad_() for h in (4, 2))
    weights, table = randn(2, 3, 4, 4, 6).requires_grad_(), randn(6, 4, 6).requires_grad_()
    for op, inputs in (
        (ops.window_scores, (q, k, table, pattern.spell(), 0.5, 0.0)),
        (ops.window_sum, (weights, k, pattern.spell(), 0.5)),
        (ops.window_spread, (weights, q, pattern.spell(), 0.5, 2)),
        (ops.window_bias, (weights, pattern.spell())),
    ):
        torch.library.opcheck(op, inputs)


def test_zero_batch():
    q, k, v = (torch.randn(0, 5, 6, 2, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, requires_grad=True)
    out = both(q, k, v, Neighborhood(3), bias=bias)
    assert out.shape == (0, 5, 6, 2, 4)
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v, bias)] and not grads[-1].any()


def test_autocast_changes_nothing():
    q, k, v = torch.randn(3, 1, 6, 7, 2, 8)
    want = apply(scores(q, k, Neighborhood(3)), v, Neighborhood(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(scores(q, k, Neighborhood(3)), v, Neighborhood(3)), want)


PROBE = """
import resource, torch
torch.set_num_threads(1)
from vision_attn import Neighborhood
from vision_attn.kernels.weights import apply, scores
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(side, window):
    pattern = Neighborhood(window)
    k = torch.randn(1, side, side, 2, 64, requires_grad=True)
    w = scores(k, k, pattern)
    apply(w, k, pattern).sum().backward()
    return w.nbytes / 2**20
run(16, 3)
before = peak()
size = run(128, 9)
print(peak() - before - 2 * size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory the way Linux reports it")
def test_memory_stays_near_the_weights():
    """16384 tokens of 81 keys: weights and their gradient are 10 MB each, every key copied for every query 680 MB."""
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 120


def test_errors_say_what_is_allowed():
    q, pattern = torch.randn(1, 6, 7, 4, 8), Neighborhood(3)
    weights = torch.randn(1, 6, 7, 4, 9)
    for call, kind, words in (
        (lambda: scores(q, q, Window(3)), TypeError, "pattern must be a Neighborhood"),
        (lambda: scores(q, q.double(), pattern), TypeError, "q is torch.float32 but k is torch.float64"),
        (lambda: scores(q, q[:, :5], pattern), ValueError, r"batch and grid differ: q is \[1, 6, 7, 4, 8\]"),
        (lambda: scores(q, q[..., :3, :], pattern), ValueError, "q has 4 heads and k has 3"),
        (lambda: scores(q, q[..., :4], pattern), ValueError, "head_dim differs: q has 8, k has 4"),
        (lambda: scores(q, q, Neighborhood(7)), ValueError, "larger than the grid"),
        (lambda: scores(q, q, pattern, scale=-1), ValueError, "scale must be finite and above 0"),
        (lambda: scores(q, q, pattern, bias=torch.zeros(4, 3, 3)), ValueError, r"bias must be \[4, 5, 5\]"),
        (lambda: scores(q, q, pattern, bias=torch.zeros(4, 5, 5).half()), ValueError, "bias is torch.float16"),
        (lambda: scores(q, q, pattern, bias=1), TypeError, "bias must be a tensor, got int"),
        (lambda: scores(q[0, 0], q[0, 0], pattern), ValueError, r"q must be \[batch, \*grid, heads, size\]"),
        (lambda: scores(1, q, pattern), TypeError, "q must be a tensor, got int"),
        (lambda: scores(q.int(), q.int(), pattern), TypeError, "q is torch.int32; allowed: torch.float32"),
        (lambda: apply(q, q, pattern), ValueError, "weights have 8 slots but the windows of .* have 9 keys"),
        (lambda: apply(weights.half(), q, pattern), TypeError, "weights is torch.float16 but v is torch.float32"),
        (lambda: apply(weights, q[..., :0], pattern), ValueError, "the last size must be at least 1"),
    ):
        with pytest.raises(kind, match=words):
            call()
