"""The native CPU kernel: right in every instruction set, and built so that nothing can go wrong with the library."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from vision_attn import BlockList, Dense, Halo, Neighborhood, Radial, SlidingTile, Window, attend, explain
from vision_attn.kernels.backends import cpu
from vision_attn.kernels.native import blocks, boxes, build, call, lines
from vision_attn.kernels.patterns import Circle, Separable
from vision_attn.kernels.patterns.base import plain_axis
from vision_attn.kernels.problem import Problem
from vision_attn.kernels.routes import Part
from vision_attn.kernels.testing import Case

HERE = build.missing()
pytestmark = pytest.mark.skipif(bool(HERE), reason=f"no CPU kernel here: {HERE}")
PATHS = [name for name in build.PATHS if list(build.PATHS).index(name) <= list(build.PATHS).index(build._widest())]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that is allocated and not written reads as NaN, so that an output left out cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def take(path, monkeypatch) -> int:
    """Go one path from here on; returns the lanes of its vectors."""
    monkeypatch.setenv(build.SWITCH, path)
    lanes = build.library().vision_attn_lanes()
    assert lanes == {"portable": 4, "avx2": 8, "avx512": 16}[path]
    return lanes


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_lines(monkeypatch):
    """The form with keys in the lanes wherever it is possible, fast or not; a list that grows with every call of it."""
    calls, plan = [], lines.plan
    monkeypatch.setattr(lines, "faster", lambda *args: True)
    monkeypatch.setattr(lines, "plan", lambda *args: calls.append(args) or plan(*args))
    return calls


@pytest.fixture
def of_few(monkeypatch):
    """The calls of the form for blocks of few queries."""
    calls, form = [], blocks.FewBlocks
    monkeypatch.setattr(blocks, "FewBlocks", lambda *args: calls.append(args) or form(*args))
    return calls


def reference(*args, **kwargs):
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    return attend(*double, backend="reference", **kwargs)


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_cases(path, first):
    """Output, lse and every gradient against the reference in float64: all patterns, dtypes, strides, extra tokens."""
    done = sum(Case(seed).compare("cpu") > 0 for seed in range(first, first + 100))
    assert done > 25


def test_random_cases_with_threads(threads):
    """Also splits the backward into bands that are added up."""
    assert sum(Case(seed).compare("cpu") > 0 for seed in range(400, 600)) > 50


@pytest.mark.parametrize("first", (0, 700))
def test_random_cases_by_lines(path, by_lines, first):
    """The same, of those that have no extra tokens; the others cannot take this form."""
    cases = [c for c in map(Case, range(first, first + 700)) if len(c.parts["leaves"]) == 3 + c.parts["biased"]]
    cases = [case for case in cases if isinstance(case.parts["pattern"], Separable)]
    assert sum(case.compare("cpu") > 0 for case in cases) > 60 and len(by_lines) > 50


@pytest.mark.slow
def test_many_random_cases(path, threads):
    assert sum(Case(seed).compare("cpu") > 0 for seed in range(600, 6000)) > 1500


@pytest.mark.slow
def test_many_random_cases_by_lines(path, threads, by_lines):
    assert sum(Case(seed).compare("cpu") > 0 for seed in range(600, 6000)) > 1500 and len(by_lines) > 500


LARGE = [
    (Neighborhood(13), (40, 37), 48, 48),
    (Neighborhood((3, 9, 5), stride=(1, 4, 2)), (5, 19, 11), 24, 80),
    (Neighborhood(101), (521,), 64, 64),
    (Neighborhood(7, dilation=3, causal=True), (29, 31), 33, 17),
    (Window((7, 7), (3, 3)), (23, 29), 16, 16),
    (Dense(), (601,), 40, 40),
    (Circle(7), (31, 17), 32, 32),
    (Circle(4, pooled=3), (3, 15, 12), 16, 24),
    (Radial(decay=0.3, block=16, thin=0), (7, 9, 13), 32, 32),
]


@pytest.mark.parametrize("pattern, grid, head_dim, value_dim", LARGE, ids=str)
def test_larger_grids(threads, monkeypatch, pattern, grid, head_dim, value_dim):
    """More keys than a chunk, many tiles, head dims that are no multiple of a vector."""
    extra = torch.randn(2, 9, 2, head_dim), torch.randn(2, 9, 2, value_dim)
    for _ in compare(monkeypatch, pattern, grid, head_dim, value_dim, *extra, extra_mask=torch.rand(2, 9) < 0.5):
        pass


def compare(monkeypatch, pattern, grid, head_dim, value_dim, *extra, biased=False, **options):
    """Output, lse and every gradient of every path against the reference in float64; yields the lanes of each."""
    q, k, v = (torch.randn(2, *grid, h, d) for h, d in ((4, head_dim), (2, head_dim), (2, value_dim)))
    weights = torch.randn(2, *grid, 4, value_dim), torch.randn(2, *grid, 4)
    bias = [torch.randn(pattern.bias_shape(grid, 4))] if biased else []

    def results(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, *extra, *bias)]
        given = dict(extra_kv=tuple(leaves[3 : 3 + len(extra)]) or None, bias=leaves[-1] if biased else None)
        given |= dict(return_lse=True, backend=backend, **options)
        outputs = attend(*leaves[:3], pattern, **given)
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    wanted = results(torch.float64, "reference")
    for path in PATHS:
        lanes = take(path, monkeypatch)
        for want, got in zip(wanted, results(torch.float32, "cpu"), strict=True):
            torch.testing.assert_close(
                got.double(), want, rtol=2e-5, atol=3e-5, msg=lambda text, path=path: f"{path}: {text}"
            )
        yield lanes


@dataclasses.dataclass(frozen=True)
class Blind(Separable):
    """Runs of four along an axis see themselves, but every other run sees nothing."""

    name = "blind"

    def axis(self, extent, index):
        ends = [(x // 4 * 4, min(x // 4 * 4 + 4, extent) if x // 4 % 2 else x // 4 * 4) for x in range(extent)]
        return plain_axis(ends)


LINES = [
    (Neighborhood(13), (40, 37), 48, 48),
    (Neighborhood((3, 9, 5), stride=(1, 4, 2)), (5, 19, 11), 24, 80),
    (Neighborhood((9, 33)), (13, 70), 32, 32),  # several vectors of keys
    (Neighborhood((2, 16)), (5, 61), 64, 20),  # one vector, for one or two columns only
    (Neighborhood((7, 5), dilation=(3, 1), causal=(False, True)), (29, 31), 33, 17),
    (Neighborhood((3, 4, 5), dilation=(2, 2, 1), causal=(True, False, False)), (7, 9, 11), 16, 16),
    (Neighborhood((3, 9)), (4, 700), 100, 128),  # too wide for the ring in one piece
    (Neighborhood(101), (521,), 64, 64),
    (Neighborhood((1, 3, 1)), (2, 11, 1), 8, 8),
    (Window((7, 7), (3, 3)), (23, 29), 16, 16),
    (SlidingTile(4, 3), (24, 24), 16, 24),
    (Halo((8, 4), (3, 1)), (21, 23), 16, 16),
    (Dense(), (9, 43), 40, 40),
    (Blind(), (21, 19), 16, 16),
]


@pytest.mark.parametrize("pattern, grid, head_dim, value_dim", LINES, ids=str)
def test_larger_grids_by_lines(threads, by_lines, monkeypatch, pattern, grid, head_dim, value_dim):
    for lanes in compare(monkeypatch, pattern, grid, head_dim, value_dim):
        assert by_lines == [(pattern, grid, lanes)]
        by_lines.clear()


BIASED = [
    (Neighborhood(7), (14, 17), 32, 32),
    (Neighborhood((3, 9, 5), stride=(1, 4, 2)), (5, 19, 11), 24, 20),
    (Neighborhood((2, 4, 5), dilation=(2, 2, 1), causal=(True, False, False)), (5, 9, 11), 16, 16),
    (Neighborhood((7, 5), dilation=(3, 1), causal=(False, True)), (29, 13), 33, 17),
    (Neighborhood(101), (221,), 16, 16),
    (Neighborhood((2, 16)), (5, 61), 16, 20),
    (Window((7, 6), (3, 4)), (23, 19), 16, 16),
]


@pytest.mark.parametrize("pattern, grid, head_dim, value_dim", [
    *BIASED,
    (Neighborhood(5, dilation=3), (19, 17), 8, 8),
    (Neighborhood(27), (30, 30), 8, 8),  # so many kinds of tiles that none is kept
], ids=str)  # fmt: skip
def test_relative_bias(threads, monkeypatch, pattern, grid, head_dim, value_dim):
    extra = torch.randn(2, 9, 2, head_dim), torch.randn(2, 9, 2, value_dim)
    options = dict(biased=True, extra_mask=torch.rand(2, 9) < 0.5)
    assert [*compare(monkeypatch, pattern, grid, head_dim, value_dim, *extra, **options)]


@pytest.mark.parametrize("pattern, grid, head_dim, value_dim", BIASED, ids=str)
def test_relative_bias_by_lines(threads, by_lines, monkeypatch, pattern, grid, head_dim, value_dim):
    for lanes in compare(monkeypatch, pattern, grid, head_dim, value_dim, biased=True):
        assert by_lines == [(pattern, grid, lanes)]
        by_lines.clear()


@pytest.mark.parametrize("form", ["boxes", "lines"])
def test_a_bias_that_hides(path, form, by_lines, monkeypatch):
    """Entries of minus infinity take pairs out, for one head all of them; NaN reaches the pairs of its entry only."""
    if form == "boxes":
        monkeypatch.setattr(lines, "faster", lambda *args: False)
    q, k, v = torch.randn(3, 1, 9, 13, 3, 8)
    bias = torch.randn(3, 9, 9)
    bias[0, 4, 4:] = bias[1] = -torch.inf
    out, lse = attend(q, k, v, Neighborhood(5), bias=bias, return_lse=True, backend="cpu")
    want, want_lse = reference(q, k, v, Neighborhood(5), bias=bias.double(), return_lse=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert not out[..., 1, :].any() and bool(by_lines) == (form == "lines")
    bias[2, 8, 3] = torch.nan  # four rows down, one column to the left: the upper border only
    spoiled = attend(q, k, v, Neighborhood(5), bias=bias, backend="cpu")
    hit = torch.zeros(1, 9, 13, 3, dtype=torch.bool)
    hit[:, 0, 1:, 2] = True
    assert torch.equal(spoiled[~hit], out[~hit]) and spoiled[hit].isnan().all()


@pytest.mark.parametrize("form", ["boxes", "lines"])
def test_a_bias_where_rows_are_there_for_others(path, form, by_lines, monkeypatch):
    """Rows of a cut grid whose result nobody wants see a key that may be out of reach."""
    if form == "boxes":
        monkeypatch.setattr(lines, "faster", lambda *args: False)
    whole, part = Neighborhood(5), Part(Neighborhood(5), (40, 11), 0, (3, 36), (17, 21))
    q, k, v = torch.randn(3, 1, 40, 11, 2, 8)
    bias = torch.randn(2, 9, 9)
    out = attend(*(t[:, 3:36] for t in (q, k, v)), part, bias=bias, backend="cpu")
    want = attend(q, k, v, whole, bias=bias, backend="reference")
    torch.testing.assert_close(out[:, 14:18], want[:, 17:21], rtol=1e-5, atol=1e-5)
    assert bool(by_lines) == (form == "lines")


def test_bias_in_a_compiled_graph():
    leaves = [torch.randn(1, 8, 9, h, 8, requires_grad=True) for h in (4, 2, 2)]
    leaves.append(torch.randn(4, 5, 5, requires_grad=True))

    def call(q, k, v, bias):
        return attend(q, k, v, Neighborhood(3), bias=bias, backend="cpu").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call))
    torch.testing.assert_close(got, want)


def test_when_lines_are_taken(monkeypatch):
    def taken(pattern, grid, lanes=16, **options):
        return lines.chosen(Problem(pattern, grid, **options), lanes)

    assert taken(Neighborhood(13), (64, 64)) and taken(Neighborhood((3, 13, 13), dilation=(2, 1, 1)), (20, 24, 24))
    assert not taken(Neighborhood(7), (64, 64)) and taken(Neighborhood(7), (64, 64), 8)  # the lanes are filled
    assert not taken(Neighborhood(127), (4096,)) and not taken(Neighborhood((1, 13)), (64, 64))  # lines are shared
    assert not taken(Neighborhood((8, 13, 13)), (8, 32, 32))
    monkeypatch.setattr(lines, "faster", lambda *args: True)
    assert taken(Neighborhood(3), (4096,))
    assert not taken(Neighborhood(3, dilation=(1, 2)), (64, 64)) and not taken(Circle(7), (64, 64))
    assert not taken(Neighborhood(13), (64, 64), extra=1) and not taken(Radial(block=16), (2, 8, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_tokens_by_lines(path, by_lines, bad):
    """A query that is not finite, a value, and keys: among others, and all that some queries see."""
    pattern, bad_keys = Neighborhood(5), torch.zeros(20, 40, dtype=torch.bool)
    bad_keys[9:16, 20:27] = True
    q, k, v = torch.randn(3, 1, 20, 40, 2, 24)
    clean, clean_lse = attend(q, k, v, pattern, return_lse=True, backend="cpu")
    q[0, 2, 3, 0, 5] = v[0, 4, 30, 1] = bad
    k[0, bad_keys, 1] = bad
    out, lse = attend(q, k, v, pattern, return_lse=True, backend="cpu")
    sees = pattern.mask((20, 40))
    by_score, by_value = (torch.zeros(1, 20, 40, 2, dtype=torch.bool) for _ in range(2))
    by_score[0, 2, 3, 0] = True
    by_score[..., 1] = (sees & bad_keys.flatten()).any(1).view(20, 40)
    by_value[..., 1] = sees[:, 4 * 40 + 30].view(20, 40)
    hit = by_score | by_value
    assert torch.equal(out[~hit], clean[~hit]) and torch.equal(lse[~by_score], clean_lse[~by_score])
    assert not out[by_value].isfinite().any() and len(by_lines) == 2
    if bad != bad:
        assert out[by_score].isnan().all() and lse[by_score].isnan().all()


def test_large_scores_by_lines(path, by_lines):
    q, k, v = torch.randn(3, 1, 20, 40, 1, 8)
    q, k = q * 30, k * 30 * torch.linspace(0, 1, 40)[:, None, None]
    out, lse = attend(q, k, v, Neighborhood(9), return_lse=True, backend="cpu")
    want, want_lse = reference(q, k, v, Neighborhood(9), return_lse=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)
    assert by_lines


def test_the_same_in_every_run(threads):
    q, k, v = (torch.randn(1, 24, 24, 1, 32, requires_grad=True) for _ in range(3))
    runs = []
    bias = torch.randn(1, 17, 17, requires_grad=True)
    for _ in range(5):
        out = attend(q, k, v, Neighborhood(9), bias=bias, backend="cpu")
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def listed(grid, block, lead=(), share=0.4):
    """Random lists, of which some are empty."""
    tokens = torch.Size(grid).numel()
    return BlockList.from_mask(torch.rand(*lead, *(-(-tokens // b) for b in block)) < share, block)


@pytest.mark.parametrize("grid, head_dim, value_dim, block, lead, share", [
    ((14, 14), 32, 32, (4, 4), (2, 4), 0.1),
    ((13, 17), 17, 16, (3, 5), (4,), 0.3),
    ((5, 7, 9), 40, 48, (8, 1), (1, 4), 0.1),
    ((301,), 16, 80, (1, 40), (2, 1), 0.6),  # many keys, and more vectors of a value than registers hold
    ((9, 11), 8, 112, (7, 2), (), 1.0),
    ((3, 2), 64, 64, (5, 6), (2, 4), 1.0),
    ((40, 100), 16, 16, (8, 1000), (), 1.0),
], ids=str)  # fmt: skip
def test_blocks_of_few_queries(threads, of_few, monkeypatch, grid, head_dim, value_dim, block, lead, share):
    pattern = listed(grid, block, lead, share)
    for lanes in compare(monkeypatch, pattern, grid, head_dim, value_dim):
        assert len(of_few) == (block[0] <= min(8, lanes) and value_dim % lanes == 0)
        of_few.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_few_queries_are_read_in_place(path, of_few, dtype):
    """Also where the last axis is not contiguous, or a tensor is one that repeats."""
    pattern, packed = listed((6, 10), (4, 6), (2, 4)), torch.randn(2, 6, 10, 3, 4, 16).to(dtype)
    across = torch.randn(2, 6, 16, 10, 4).to(dtype).movedim(2, -1)
    for q, k, v in (
        packed.unbind(3),
        (across, packed[:, :, :, 0], across.roll(1, 1)),
        (packed[:1, :1, :1, 0].expand(2, 6, 10, 4, 16),) * 3,
    ):
        out = attend(q, k, v, pattern, backend="cpu")
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(out.double(), reference(q, k, v, pattern), rtol=tolerance, atol=tolerance)
    assert len(of_few) == 3


def test_when_lists_are_not_for_few(of_few):
    """Queries that need a test, or tokens off the grid, are left to the other form; a block that is too large, too."""
    q, k, v, extra = torch.randn(4, 1, 64, 2, 16)
    eye = torch.eye(16) > 0
    for pattern in (BlockList.from_mask(eye, 4, within=Neighborhood(3)), BlockList.from_mask(torch.eye(4) > 0, 16)):
        attend(q, k, v, pattern, backend="cpu")
    attend(q, k, v, BlockList.from_mask(eye, 4), extra_kv=(extra, extra), backend="cpu")
    assert not of_few
    attend(q, k, v, BlockList.from_mask(eye, 4), backend="cpu")
    assert len(of_few) == 1 or build.instruction_set() == "portable"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize(
    "pattern, biased",
    [
        (Neighborhood(5), False), (Neighborhood(5), True), (BlockList.from_mask(torch.eye(8) > 0, 18), False),
        (BlockList.from_mask(torch.eye(36) > 0, 4), False),
    ],
    ids=["boxes", "boxes with bias", "blocks", "few"],
)  # fmt: skip
def test_a_bad_token_reaches_only_those_who_see_it(path, which, bad, pattern, biased):
    q, k, v = torch.randn(3, 1, 12, 12, 2, 16)
    bias = torch.randn(2, 9, 9) if biased else None
    clean = attend(q, k, v, pattern, bias=bias, backend="cpu")
    (k if which == "key" else v)[0, 6, 7, 1] = bad
    out = attend(q, k, v, pattern, bias=bias, backend="cpu").flatten(1, 2)
    sees = pattern.mask((12, 12))[:, 6 * 12 + 7]
    assert torch.equal(out[:, ~sees], clean.flatten(1, 2)[:, ~sees]) and torch.equal(
        out[..., 0, :], clean.flatten(1, 2)[..., 0, :]
    )
    if which == "value" or bad != bad:
        assert not out[0, sees, 1].isfinite().any()


@pytest.mark.parametrize("block", [4, 8, 32])
def test_rows_that_see_nothing(path, block):
    seen = torch.zeros(4, 4, dtype=torch.bool)
    seen[1, 2] = True
    q, k, v = (torch.randn(1, 4 * block, 1, 16, requires_grad=True) for _ in range(3))
    out, lse = attend(q, k, v, BlockList.from_mask(seen, block), return_lse=True, backend="cpu")
    blind = torch.arange(4 * block) // block != 1
    assert not out[0, blind].any() and (lse[0, blind] == -torch.inf).all() and lse[0, ~blind].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[0, ~blind].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][0, blind].any()


def test_lists_of_their_own_for_batch_and_heads(path):
    seen = torch.rand(2, 4, 6, 6) < 0.5
    pattern = BlockList.from_mask(seen, 16, within=Neighborhood(41, causal=True))
    q, k, v = (torch.randn(2, 90, h, 16) for h in (4, 2, 2))
    want = reference(q, k, v, pattern)
    torch.testing.assert_close(attend(q, k, v, pattern, backend="cpu").double(), want, rtol=1e-4, atol=1e-5)


def test_large_scores_and_small_ones(path):
    """The maximum is taken out before the exponential, chunk by chunk."""
    q, k, v = torch.randn(3, 1, 700, 1, 8)
    q, k = q * 30, k * 30 * torch.linspace(0, 1, 700)[:, None, None]
    out, lse = attend(q, k, v, Neighborhood(501), return_lse=True, backend="cpu")
    want, want_lse = reference(q, k, v, Neighborhood(501), return_lse=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


def test_backward_without_what_the_forward_kept():
    """As a compiled graph calls it."""
    q, k, v, outer = (torch.randn(1, 9, 9, 2, 16, requires_grad=True) for _ in range(4))
    relative = torch.randn(2, 9, 9, requires_grad=True)
    problem = Problem(Neighborhood(5), (9, 9), heads=2, kv_heads=2, head_dim=16, value_dim=16, in_graph=True)
    for bias, leaves in ((None, (q, k, v)), (relative, (q, k, v, relative))):
        want = torch.autograd.grad(attend(q, k, v, Neighborhood(5), bias=bias, backend="cpu"), leaves, outer)
        with torch.no_grad():
            got = cpu.backward(problem, q, k, v, 0.25, None, None, bias, None, None, outer, None)
        assert got[3:5] == [None] * 2 and [g is not None for g in got].count(True) == len(leaves)
        for a, b in zip([g for g in got if g is not None], want, strict=True):
            torch.testing.assert_close(a, b)


def test_no_tokens_at_all_and_one():
    q = torch.randn(0, 5, 2, 8, requires_grad=True)
    assert attend(q, q, q, Neighborhood(3), backend="cpu").shape == (0, 5, 2, 8)
    one = torch.randn(1, 1, 1, 1)
    torch.testing.assert_close(attend(one, one, one, Neighborhood(1), backend="cpu"), one)


def test_reasons():
    answers = {
        "no float64": dict(dtype=torch.float64),
        "only cpu tensors": dict(device="cuda"),
    }
    for reason, options in answers.items():
        assert any(reason in r for r in cpu.limits(Problem(Neighborhood(3), (8, 8), **options)))
    blocks = BlockList.from_mask(torch.eye(4) > 0, 16)
    assert cpu.limits(Problem(blocks, (8, 8), bias=True)) == ["BlockList has no relative bias, the only kind it takes"]
    assert not cpu.limits(Problem(Window(3), (8, 8), bias=True)) and not cpu.limits(Problem(blocks, (8, 8)))


@pytest.mark.skipif(build.instruction_set() == "portable", reason="there tiled is as fast")
def test_maps_of_backbones_are_left_to_it():
    """With a relative bias, also where every token sees every other; small calls are not worth compiling for."""
    for side, batch, heads, used in ((56, 1, 2, "cpu"), (14, 16, 2, "cpu"), (7, 32, 16, "cpu"), (7, 4, 16, "masked")):
        assert explain(Neighborhood(7), (side, side), batch=batch, heads=heads, bias=True).used == used
    assert explain(Neighborhood(7), (7, 7), batch=32, heads=16).used == "tiled"  # nothing to leave out, nothing to add


@pytest.mark.parametrize("pattern", [Neighborhood(5), Neighborhood(13), Radial()], ids=str)
def test_defaults_of_torch_are_not_its_own(pattern):
    """A default dtype or device other than float32 and cpu: memory of the wrong size, or elsewhere."""
    grid = (4, 16, 16) if isinstance(pattern, Radial) else (32, 32)
    leaves = [torch.randn(1, *grid, 2, 8).requires_grad_() for _ in range(3)]
    bias = [torch.randn(2, *[2 * pattern.window - 1] * 2).requires_grad_()] if grid == (32, 32) else []

    def run():
        for cached in (boxes.plan, boxes.places, lines.plan, blocks._kept):
            cached.cache_clear()
        call._kept.__dict__.clear()
        plain = attend(*leaves, pattern, backend="cpu")
        out = attend(*leaves, pattern, backend="cpu", bias=bias[0]) if bias else plain
        return [plain, out, *torch.autograd.grad((plain + out.square()).sum(), leaves + bias)]

    want = run()
    for setting, value, usual in (
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
        (torch.set_default_device, "meta", None),
    ):
        setting(value)
        try:
            got = run()
        finally:
            setting(usual)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_block_lists_under_another_default_device():
    """Made for one call, of wide integers, with nothing to test inside: no guard runs, so nothing may be made there."""
    seen = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    lists = BlockList.from_mask(seen, 64)
    lists = dataclasses.replace(lists, index=lists.index.long(), count=lists.count.long())
    q, k, v = torch.randn(3, 1, 256, 2, 16)
    want = attend(q, k, v, lists, backend="cpu")
    with torch.device("meta"):
        assert torch.equal(attend(q, k, v, lists, backend="cpu"), want)


# The build. A stand-in for the compiler hands out the library that is there already, so that this takes no minutes.

COMPILER = """
    import os, shutil, sys, time
    if "--version" in sys.argv: sys.exit(print("stand-in 1.0"))
    with open({log!r}, "a") as file: file.write("called\\n")
    {how}
    shutil.copyfile({library!r}, sys.argv[sys.argv.index("-o") + 1])
"""
USE = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("build", {build!r})
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build._widest = lambda: "portable"  # what finds it out imports torch, which takes seconds
    assert build.library().vision_attn_lanes() == 4 and build.load() and not build.missing()
    assert "torch" not in sys.modules
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Start processes with a cache of their own and a compiler that does as told."""
    monkeypatch.setenv(build.SWITCH, "portable")
    library, log = str(build._find() or build._build()), tmp_path / "log"
    monkeypatch.delenv(build.SWITCH)

    def start(how="", **env) -> subprocess.Popen:
        script = tmp_path / "compiler.py"
        script.write_text(textwrap.dedent(COMPILER).format(log=str(log), how=how, library=library))
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": f"{sys.executable} {script}"} | env
        call = [sys.executable, "-c", textwrap.dedent(USE).format(build=build.__file__)]
        return subprocess.Popen(call, env=os.environ | env, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def run(how="", code=0, **env) -> str:
        process = start(how, **env)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == code, said
        return said

    run.start, run.cache, run.log = start, tmp_path / "cache" / "vision-attn", log
    run.calls = lambda: len(log.read_text().split())
    return run


def libraries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix != ".lock")


def test_built_once_with_a_line_of_progress(machine):
    said = machine()
    assert said.count("building the CPU kernel (once, about") == 1 and "built in" in said
    assert machine() == "" and machine.calls() == 1


def test_processes_that_build_together(machine):
    running = [machine.start("time.sleep(1)") for _ in range(4)]
    said = "".join(process.communicate(timeout=120)[1] for process in running)
    assert [p.returncode for p in running] == [0] * 4, said
    assert machine.calls() == 1 and len(libraries(machine.cache)) == 1


def test_a_build_that_was_killed_leaves_nothing_broken(machine):
    process = machine.start("time.sleep(30)")
    while not machine.log.exists():  # the compiler has started, and would sit there for a while
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.communicate()
    (part,) = machine.cache.glob("*.part")
    os.utime(part, (0, 0))
    started = time.monotonic()
    assert "built in" in machine() and not part.exists()
    assert time.monotonic() - started < 25  # its lock did not outlive it


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_library_is_built_again(machine, damage):
    machine()
    (library,) = libraries(machine.cache)
    data = library.read_bytes()
    middle = len(data) // 2
    library.write_bytes({
        "truncated": data[:middle], "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"", "text": b"not a library",
    }[damage])  # fmt: skip
    assert "built in" in machine() and library.read_bytes() == data


def test_a_compiler_that_fails_is_quoted(machine):
    how = "sys.exit(print('kernel.cpp:1: error: no such thing', file=sys.stderr) or 3)"
    assert "ended with 3: kernel.cpp:1: error: no such thing" in machine(how, code=1)
    assert libraries(machine.cache) == []


def test_a_build_that_failed_is_a_reason_and_not_tried_again(monkeypatch):
    tried = []
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_failed", {})
    monkeypatch.setattr(build, "_find", lambda: None)
    monkeypatch.setattr(build, "_build", lambda: tried.append(1) or (_ for _ in ()).throw(OSError("disk full")))
    q, k, v = torch.randn(3, 1, 8, 8, 1, 8)
    assert not cpu.missing("cpu") and not cpu.load() and not cpu.load() and len(tried) == 1
    assert cpu.missing("cpu") == ["the CPU kernel could not be built: disk full"]
    with pytest.raises(ValueError, match="could not be built: disk full"):
        attend(q, k, v, Neighborhood(3), backend="cpu")
    assert attend(q, k, v, Neighborhood(3)).isfinite().all() and len(tried) == 1


def test_a_library_for_something_else_is_refused(machine):
    """It loads, but is not the kernel."""
    how = "import _ctypes; shutil.copyfile(_ctypes.__file__, sys.argv[sys.argv.index('-o') + 1]); sys.exit()"
    assert "could not be built" in machine(how, code=1)


def test_a_cache_that_cannot_be_written(machine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = machine(XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    assert "cannot be written" in said and str(tmp_path / "vision-attn-") in said


def test_no_home(machine, tmp_path):
    machine(XDG_CACHE_HOME="", HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert libraries(tmp_path / ".cache" / "vision-attn")


def test_switched_off(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert "switched off by VISION_ATTN_NATIVE=0" in str(explain(Neighborhood(3), (8, 8)))
    assert explain(Neighborhood(13), (64, 64)).used == "tiled"
    with pytest.raises(ValueError, match="switched off"):
        attend(*torch.randn(3, 1, 8, 8, 1, 8), Neighborhood(3), backend="cpu")


def test_a_switch_that_means_nothing(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "sse9")
    assert "allowed: 0, 1, portable, avx2, avx512" in build.missing()[0]


def test_no_compiler(monkeypatch, tmp_path):
    """The reason is said, and tiled is used."""
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert "no C++ compiler found" in build.missing()[0] and "install one" in build.missing()[0]
    q, k, v = torch.randn(3, 1, 64, 64, 1, 8)
    assert explain(Neighborhood(13), (64, 64)).used == "tiled"
    torch.testing.assert_close(attend(q, k, v, Neighborhood(13)), attend(q, k, v, Neighborhood(13), backend="tiled"))


def test_explaining_does_not_build(monkeypatch):
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_build", lambda: pytest.fail("explain must not build"))
    explain(Neighborhood(13), (64, 64))
