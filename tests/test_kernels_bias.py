"""Additive biases, patterns per head, tokens that are not finite, and the registered operator."""

import itertools
import math

import pytest
import torch

from vision_attn import BlockList, Dense, Neighborhood, Radial, Window, attend, explain
from vision_attn.kernels.backends import BACKENDS, refuse
from vision_attn.kernels.patterns import PATTERNS, Pattern, PerHead
from vision_attn.kernels.problem import describe

BACKENDS_HERE = ("reference", "tiled", "cpu")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("pattern, grid", [
    (Neighborhood((3, 4), dilation=(2, 1)), (7, 6)), (Neighborhood(5, stride=3, causal=True), (13,)),
    (Neighborhood((2, 3, 1), stride=(2, 1, 1)), (4, 5, 2)), (Window((2, 3), (1, 0)), (5, 6)),
])  # fmt: skip
def test_relative_bias_by_its_formula(pattern, grid):
    """One pair at a time: the entry is key minus query, in steps of the dilation, plus the reach less one."""
    options = [getattr(pattern, n, 1) for n in ("size" if isinstance(pattern, Window) else "window", "dilation")]
    reach, dilation = ((o if isinstance(o, tuple) else (o,) * len(grid)) for o in options)
    q, k, v, bias = (
        randn(2, *grid, 2, 4),
        randn(2, *grid, 2, 4),
        randn(2, *grid, 2, 4),
        randn(2, *[2 * r - 1 for r in reach]),
    )
    mask, places = pattern.mask(grid), list(itertools.product(*map(range, grid)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, -3), k.flatten(1, -3)) / 2
    for (i, x), (j, y) in itertools.product(enumerate(places), enumerate(places)):
        if mask[i, j]:
            entry = [(b - a) // d + r - 1 for a, b, d, r in zip(x, y, dilation, reach, strict=True)]
            scores[:, :, i, j] += bias[(slice(None), *entry)]
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(1, -3)).view(q.shape)
    for backend in ("reference", "tiled"):
        torch.testing.assert_close(attend(q, k, v, pattern, bias=bias, backend=backend), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (4,), (1, 4), (3, 1)])
def test_block_bias_is_one_number_per_listed_block(lead):
    q, k, v = randn(3, 3, 5, 6, 4, 8)
    pattern = BlockList.from_mask(torch.rand(*lead, 5, 3) < 0.6, (7, 12))
    bias = randn(*pattern.index.shape).requires_grad_()
    dense = torch.zeros(*lead, 30, 30, dtype=torch.float64)
    for place in itertools.product(*map(range, pattern.count.shape)):
        for slot in range(int(pattern.count[place])):
            rows, column = slice(7 * place[-1], 7 * place[-1] + 7), 12 * int(pattern.index[(*place, slot)])
            dense[(*place[:-1], rows, slice(column, column + 12))] = bias.detach()[(*place, slot)]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    want = ((q @ k.transpose(-1, -2)) * 0.3 + dense).masked_fill(~pattern.mask((5, 6)), -1e300).softmax(-1)
    want = (want * pattern.mask((5, 6))) @ v
    q, k, v = (t.transpose(1, 2).unflatten(1, (5, 6)) for t in (q, k, v))
    results = []
    for backend in ("reference", "tiled"):
        out = attend(q, k, v, pattern, bias=bias, scale=0.3, backend=backend)
        torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), want, rtol=0, atol=1e-12)
        results.append(torch.autograd.grad(out.sin().sum(), bias)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert results[0].abs().max() > 0


def test_bias_gradient_numerically():
    q, k, v, bias = (randn(*s).requires_grad_() for s in ((1, 5, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2), (2, 5)))
    assert torch.autograd.gradcheck(
        lambda *t: attend(*t[:3], Neighborhood(3), bias=t[3], return_lse=True), (q, k, v, bias)
    )


PARTS = PerHead(((2, Neighborhood(3)), (4, Dense()), (2, Radial(0.5, 2, thin=0))))


def test_heads_follow_their_own_pattern():
    q, k, v = (randn(2, 4, 5, h, 8).requires_grad_() for h in (8, 4, 4))
    extra, visible = (randn(2, 3, 4, 8), randn(2, 3, 4, 8)), torch.rand(2, 3) < 0.6
    call = dict(extra_kv=extra, extra_mask=visible, return_lse=True)
    results = {}
    for backend in (None, "reference"):
        out, lse = attend(q, k, v, PARTS, backend=backend, **call)
        results[backend] = out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), (q, k, v))
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    keep = slice(2, 6)
    inputs = q[..., keep, :], *(t[..., 1:3, :] for t in (k, v))
    alone = attend(*inputs, Dense(), extra_kv=tuple(e[..., 1:3, :] for e in extra), extra_mask=visible)
    torch.testing.assert_close(results[None][0][..., keep, :], alone)


def test_per_head_describes_itself():
    assert Pattern.from_dict(PARTS.to_dict()) == PARTS
    assert PARTS.mask((4, 5)).shape == (8, 20, 20)
    assert PARTS.density((4, 5)) == pytest.approx(PARTS.mask((4, 5)).double().mean().item())
    answer = explain(PARTS, (4, 5), heads=8)
    assert [part.problem.heads for part in answer.parts] == [2, 4, 2] and "3 x 3" not in answer.used
    assert "Radial" in str(answer) and answer.to_dict()["parts"][1]["used"] == "tiled"


Q = torch.randn(1, 6, 8, 8)
REFUSED = [
    (lambda: attend(Q, Q, Q, PARTS), ValueError, "Radial needs a grid"),
    (lambda: attend(Q[..., :6, :], Q[..., :6, :], Q[..., :6, :], PARTS), ValueError, "for 8 heads, but q has 6"),
    (lambda: attend(Q, Q[..., :2, :], Q[..., :2, :], PerHead(((2, Dense()), (6, Dense())))), ValueError,
     "multiples of the 4"),
    (lambda: attend(Q, Q, Q, PerHead(((8, Dense()),)), bias=Q), ValueError, "takes no bias; call attend for each part"),
    (lambda: attend(Q, Q, None, PerHead(((8, Dense()),))), TypeError, "v must be a tensor"),
    (lambda: PerHead(((0, Dense()),)), ValueError, "at least 1"),
    (lambda: PerHead(((1, PerHead(((1, Dense()),))),)), TypeError, "none of them PerHead"),
    (lambda: PerHead(Dense()), TypeError, "pairs"),
    (lambda: attend(Q, Q, Q, Dense(), bias=Q), ValueError, "Dense takes no bias; Neighborhood, Window and"),
    (lambda: attend(Q, Q, Q, Neighborhood(3), bias=Q), ValueError, r"bias must be \[8, 5\] .*got \[1, 6, 8, 8\]"),
    (lambda: attend(Q, Q, Q, Neighborhood(3), bias=torch.randn(8, 5).double()), TypeError, "bias is float64 but q is"),
    (lambda: attend(Q, Q, Q, Neighborhood(3), bias=0), TypeError, "bias must be a tensor"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, words", REFUSED)
def test_refusals(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


SEEN = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]) > 0
SOME_BLOCKS = BlockList.from_mask(SEEN, (8, 10), Neighborhood(9))


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("which", ["key", "value", "extra key"])
@pytest.mark.parametrize("pattern, grid", [
    (Neighborhood((3, 5), dilation=(2, 1)), (9, 8)), (Window(4, 1), (17,)), (Dense(), (5, 6)),
    (Radial(0.5, 2, thin=0), (4, 3, 4)), (SOME_BLOCKS, (30,)),
], ids=lambda p: getattr(p, "name", ""))  # fmt: skip
@pytest.mark.parametrize("lse", [False, True])
def test_a_bad_token_reaches_only_the_queries_that_see_it(pattern, grid, which, backend, lse):
    """One token is NaN in one KV head and one batch entry: with every other query nothing happens."""
    q, k, v = (torch.randn(2, *grid, h, 8) for h in (4, 2, 2))
    extra, visible = torch.randn(2, 2, 3, 2, 8), torch.ones(2, 3, dtype=torch.bool)
    visible[1, 0] = False
    call = dict(extra_kv=tuple(extra), extra_mask=visible, return_lse=lse, backend=backend)
    with torch.no_grad():
        problem = describe(q, k, v, pattern, None, tuple(extra), visible, None, lse)
        if reasons := refuse(backend, problem):
            pytest.skip("; ".join(reasons))
        clean = attend(q, k, v, pattern, **call)
        if which == "extra key":
            extra[0, 1, 0, 1, 2] = math.nan  # hidden, so nobody sees it
            sees = torch.zeros(math.prod(grid), dtype=torch.bool)
        else:
            (k if which == "key" else v).view(2, -1, 2, 8)[1, 7, 1, 2] = math.nan
            sees = pattern.mask(grid)[:, 7]
        result = attend(q, k, v, pattern, **call)
    out, want = (r[0] if lse else r for r in (result, clean))
    bad, want = out.isnan().any(-1).view(2, -1, 4), want.view(2, -1, 4, 8)
    assert torch.equal(bad[1, :, 2], sees) and torch.equal(bad[1, :, 3], sees)
    assert not bad[0].any() and not bad[1, :, :2].any()
    assert (
        torch.equal(out.view(2, -1, 4, 8)[~bad], want[~bad])
        or (out.view(2, -1, 4, 8)[~bad] - want[~bad]).abs().max() < 1e-5
    )


def graph_call(pattern, bias_shape):
    leaves = [torch.randn(1, 6, 7, h, 8, requires_grad=True) for h in (4, 2, 2)]
    leaves += [torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(2)]
    bias = None if bias_shape is None else torch.randn(bias_shape, requires_grad=True)
    options = (None, pattern.tensors(), pattern.spell(), None, True, "tiled", True)
    return (*leaves, bias, *options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern, biased", [
    (Neighborhood(3), False), (Neighborhood(3, dilation=2), True), (Radial(block=4, thin=4), False),
    (BlockList.from_mask(torch.eye(4) > 0, 11), True),
], ids=lambda p: getattr(p, "name", str(p)))  # fmt: skip
def test_operator_keeps_the_rules_of_torch(pattern, biased):
    """Schema, fake tensors, and autograd of the registered operator, by torch's own check."""
    shape = pattern.bias_shape((6, 7), 4) if biased else None
    torch.library.opcheck(torch.ops.vision_attn.attend.default, graph_call(pattern, shape))


@pytest.mark.parametrize("pattern", [Neighborhood(3, dilation=2), BlockList.from_mask(torch.eye(4) > 0, 11), PARTS],
                         ids=lambda p: p.name)  # fmt: skip
def test_bias_and_parts_in_one_graph(pattern):
    torch._dynamo.reset()
    leaves = [torch.randn(1, 6, 7, h, 8, requires_grad=True) for h in (8, 4, 4)]
    if pattern is not PARTS:
        leaves.append(torch.randn(pattern.bias_shape((6, 7), 8), requires_grad=True))

    def model(q, k, v, bias=None):
        return attend(q * 2, k, v, pattern, bias=bias).sin().sum()

    want = torch.autograd.grad(model(*leaves), leaves)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, grad in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        torch.testing.assert_close(got, grad)


def test_every_backend_is_asked_about_bias_and_rules():
    """A backend that says it can, can: those that cannot take a bias give it as a reason."""
    q = torch.randn(1, 8, 8, 2, 16)
    problem = describe(q, q, q, Neighborhood(3), None, None, None, torch.randn(2, 5, 5), False)
    want = attend(q, q, q, Neighborhood(3), bias=torch.zeros(2, 5, 5))
    assert set(PATTERNS) >= {"per-head", "neighborhood"}
    for name in BACKENDS:
        if not refuse(name, problem):
            got = attend(q, q, q, Neighborhood(3), bias=torch.zeros(2, 5, 5), backend=name)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
