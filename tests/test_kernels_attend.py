"""Properties of attend that hold for any backend, and the errors of the call."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import BlockList, Dense, Neighborhood, Radial, SlidingTile, Window, attend

BACKENDS = ("reference", "tiled")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def sdpa(q, k, v, **options):
    flat = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*flat, **options).transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(13,), (5, 7), (3, 4, 5)])
def test_a_window_as_large_as_the_grid_is_sdpa(grid, backend):
    q, k, v = randn(3, 2, *grid, 3, 8)
    close(attend(q, k, v, Neighborhood(grid), backend=backend), sdpa(q, k, v))
    close(attend(q, k, v, Dense(), scale=0.7, backend=backend), sdpa(q, k, v, scale=0.7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_equal_to_window_is_attention_per_window(backend):
    q, k, v = randn(3, 1, 8, 12, 2, 8)
    blocks = [t.unflatten(1, (2, 4)).unflatten(3, (4, 3)).transpose(2, 3).reshape(8, 12, 2, 8) for t in (q, k, v)]
    want = sdpa(*blocks).reshape(1, 2, 4, 4, 3, 2, 8).transpose(2, 3).reshape(q.shape)
    close(attend(q, k, v, Neighborhood((4, 3), stride=(4, 3)), backend=backend), want)
    close(attend(q, k, v, Window((4, 3)), backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "pattern", [Neighborhood(5, stride=2), Radial(0.5, 4, thin=4), SlidingTile(2, 3)], ids=lambda p: p.name
)
def test_permuting_heads_commutes(pattern, backend):
    q, k, v = randn(3, 1, 7, 9, 4, 8)
    order = [2, 0, 3, 1]
    want = attend(q, k, v, pattern, backend=backend)[..., order, :]
    close(attend(q[..., order, :], k[..., order, :], v[..., order, :], pattern, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_translation_leaves_the_interior_unchanged(stride, dilation, backend):
    pattern, step = Neighborhood(3, stride, dilation), stride * dilation
    q, k, v = randn(3, 1, 40, 2, 8)
    out, moved = (attend(*(t.roll(s, 1) for t in (q, k, v)), pattern, backend=backend) for s in (0, step))
    inside = slice(3 * step + 3 * dilation, -3 * step - 3 * dilation)
    close(moved.roll(-step, 1)[:, inside], out[:, inside])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_dilation_is_separate_calls_on_strided_views(backend, causal):
    q, k, v = randn(3, 1, 11, 13, 2, 8)
    out = attend(q, k, v, Neighborhood((3, 4), 2, (3, 2), causal), backend=backend)
    for i, j in itertools.product(range(3), range(2)):
        part = [t[:, i::3, j::2] for t in (q, k, v)]
        close(out[:, i::3, j::2], attend(*part, Neighborhood((3, 4), 2, 1, causal), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_key_sets_merge_by_their_lse(backend):
    """Also with queries that see nothing in one of the two calls."""
    q, k, v = randn(3, 1, 24, 2, 8)
    seen = torch.rand(6, 6) < 0.5
    seen[0], seen[1] = False, True
    parts = [attend(q, k, v, BlockList.from_mask(m, 4), return_lse=True, backend=backend) for m in (seen, ~seen)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    close(sum(o * (part - lse).exp()[..., None] for o, part in parts), attend(q, k, v, Dense()))
    close(lse, attend(q, k, v, Dense(), return_lse=True, backend=backend)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_lse_is_logsumexp(backend, dtype, allowed):
    q, k, v = torch.randn(3, 2, 6, 7, 2, 8, dtype=dtype)
    extra = torch.randn(2, 2, 3, 2, 8, dtype=dtype)
    pattern = Neighborhood((3, 4), causal=(False, True))
    scores = (
        torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, 2).double(), torch.cat([k.flatten(1, 2), extra[0]], 1).double())
        * 0.3
    )
    mask = F.pad(pattern.mask((6, 7)), (0, 3), value=True)
    want = scores.masked_fill(~mask[:, None], -math.inf).logsumexp(-1).view(2, 6, 7, 2)
    lse = attend(q, k, v, pattern, extra_kv=tuple(extra), scale=0.3, return_lse=True, backend=backend)[1]
    assert lse.dtype == dtype
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=allowed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_share_a_kv_head(backend):
    q, k, v = randn(1, 5, 6, 6, 8), randn(1, 5, 6, 2, 8), randn(1, 5, 6, 2, 8)
    repeated = attend(q, k.repeat_interleave(3, -2), v.repeat_interleave(3, -2), Neighborhood(3), backend=backend)
    close(attend(q, k, v, Neighborhood(3), backend=backend), repeated)


@pytest.mark.parametrize("lead", [(4,), (1, 4), (2, 1), (2, 4)])
def test_block_lists_per_batch_and_head(lead):
    """With KV heads that are shared: the lists belong to query heads."""
    q, k, v = (randn(2, 5, 6, h, 8).requires_grad_() for h in (4, 2, 2))
    pattern = BlockList.from_mask(torch.rand(*lead, 6, 5) < 0.5, (5, 7), Neighborhood(4))
    results = []
    for backend in BACKENDS:
        out, lse = attend(q, k, v, pattern, return_lse=True, backend=backend)
        loss = out.sin().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
        results.append([out, lse, *torch.autograd.grad(loss, (q, k, v))])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lse", [False, True])
def test_a_query_that_sees_nothing(backend, lse):
    q, k, v = (randn(1, 8, 2, 8).requires_grad_() for _ in range(3))
    pattern = BlockList.from_mask(torch.tensor([[False, False], [True, False]]), 4)
    result = attend(q, k, v, pattern, return_lse=lse, backend=backend)
    out = result[0] if lse else result
    assert (out[:, :4] == 0).all() and out[:, 4:].abs().min() > 0
    if lse:
        assert (result[1][:, :4] == -math.inf).all() and result[1][:, 4:].isfinite().all()
    for grad in torch.autograd.grad(out.sum() + (result[1][:, 4:].sum() if lse else 0), (q, k, v)):
        assert grad.isfinite().all()
    hidden = attend(
        q, k, v, pattern, extra_kv=(k[:, :1], v[:, :1]), extra_mask=torch.tensor([[False]]), backend=backend
    )
    close(hidden, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_extra_tokens_are_not_there(backend):
    q, k, v = randn(3, 2, 5, 6, 2, 8)
    extra = randn(2, 2, 4, 2, 8)
    visible = torch.tensor([[True, True, False, False], [True, True, False, False]])
    want = attend(q, k, v, Neighborhood(3), extra_kv=tuple(extra[:, :, :2]), backend=backend)
    close(attend(q, k, v, Neighborhood(3), extra_kv=tuple(extra), extra_mask=visible, backend=backend), want)
    none = attend(q, k, v, Neighborhood(3), extra_kv=(extra[0, :, :0], extra[1, :, :0]), backend=backend)
    close(none, attend(q, k, v, Neighborhood(3), backend=backend))


@pytest.mark.parametrize("pattern", [Neighborhood(3), Dense(), Radial(block=2, thin=0)], ids=lambda p: p.name)
def test_empty_batch(pattern):
    q = torch.randn(0, 5, 6, 2, 8, requires_grad=True)
    out, lse = attend(q, q, q[..., :4], pattern, return_lse=True)
    assert out.shape == (0, 5, 6, 2, 4) and lse.shape == (0, 5, 6, 2)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_gradients_numerically():
    q, k, v, ek, ev = (randn(1, *s).requires_grad_() for s in ((7, 2, 3), (7, 1, 3), (7, 1, 2), (2, 1, 3), (2, 1, 2)))

    def call(q, k, v, ek, ev):
        return attend(q, k, v, Neighborhood(3, 2, 2), extra_kv=(ek, ev), return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, ek, ev))


Q = torch.randn(2, 6, 7, 4, 8)
EXTRA = torch.randn(2, 3, 4, 8)
N = Neighborhood(3)

REFUSED = [
    (lambda: attend(Q, Q, Q, "neighborhood"), TypeError, r"pattern must be a pattern such as .* got 'neighborhood'"),
    (lambda: attend(None, Q, Q, N), TypeError, "q must be a tensor, got NoneType"),
    (lambda: attend(Q.int(), Q.int(), Q.int(), N), TypeError, "q is int32; allowed: float32"),
    (lambda: attend(Q > 0, Q > 0, Q > 0, N), TypeError, "q is bool"),
    (lambda: attend(Q, Q.double(), Q, N), TypeError, "k is float64 but q is float32; cast"),
    (lambda: attend(Q, Q.to("meta"), Q, N), ValueError, "k is on meta but q is on cpu; move"),
    (lambda: attend(Q[0, 0], Q[0, 0], Q[0, 0], N), ValueError, r"q must be \[batch, \*grid, .* got 3 dim"),
    (lambda: attend(Q, Q[0], Q, N), ValueError, "k has 4 dimensions but q has 5"),
    (lambda: attend(Q, Q[:1], Q, N), ValueError, "batch differs: q has 2, k has 1"),
    (lambda: attend(Q, Q[:, :5], Q, N), ValueError, r"k must lie on the grid of q, \(6, 7\); got \(5, 7\)"),
    (lambda: attend(Q, Q, Q[:, :, :5], N), ValueError, r"v must lie on the grid"),
    (lambda: attend(Q, Q[..., :3, :], Q[..., :3, :], N), ValueError, "q has 4 heads and k has 3.* multiple"),
    (lambda: attend(Q, Q, Q[..., :2, :], N), ValueError, "k has 4 heads but v has 2"),
    (lambda: attend(Q, Q[..., :5], Q, N), ValueError, "head_dim differs: q has 8, k has 5"),
    (lambda: attend(Q[..., :0], Q[..., :0], Q, N), ValueError, "head_dim must be at least 1"),
    (lambda: attend(Q, Q, Q, Neighborhood(7)), ValueError, "larger than the grid.*at most 6"),
    (lambda: attend(Q, Q, Q, Neighborhood((3, 3, 3))), ValueError, "3 entries but the grid has 2 axes"),
    (lambda: attend(Q, Q, Q, N, scale=0.0), ValueError, "scale must be finite and above 0, or None"),
    (lambda: attend(Q, Q, Q, N, scale=-1.0), ValueError, "above 0"),
    (lambda: attend(Q, Q, Q, N, scale=math.nan), ValueError, "finite"),
    (lambda: attend(Q, Q, Q, N, scale="1"), TypeError, "scale must be a number"),
    (lambda: attend(Q, Q, Q, N, extra_kv=EXTRA), TypeError, r"extra_kv must be a pair"),
    (lambda: attend(Q, Q, Q, N, extra_kv=(EXTRA, None)), TypeError, "extra values must be a tensor"),
    (lambda: attend(Q, Q, Q, N, extra_kv=(EXTRA, EXTRA[:, :2])), ValueError,
     r"extra values must be \[2, extra, 4, 8\].*\[2, 2, 4, 8\]"),
    (lambda: attend(Q, Q, Q, N, extra_kv=(EXTRA[..., :2, :],) * 2), ValueError, "extra keys must be"),
    (lambda: attend(Q, Q, Q, N, extra_mask=torch.ones(2, 3) > 0), ValueError, "extra_mask without extra_kv"),
    (lambda: attend(Q, Q, Q, N, extra_kv=(EXTRA, EXTRA), extra_mask=torch.ones(2, 3)), TypeError, "bool"),
    (lambda: attend(Q, Q, Q, N, extra_kv=(EXTRA, EXTRA), extra_mask=torch.ones(2, 2) > 0), ValueError,
     r"\[2, 3\]; got \[2, 2\]"),
    (lambda: attend(Q, Q, Q, N, backend="cudnn"), ValueError, "unknown backend 'cudnn'; allowed: natten, triton, flex"),
    (lambda: attend(*[Q.double()] * 3, N, backend="flex"), ValueError, "cannot do this: .*no float64. These can"),
    (lambda: attend(Q, Q, Q, Window(3), backend="natten"), ValueError, "only Neighborhood patterns"),
    (lambda: attend(Q, Q, Q, BlockList.from_mask(torch.ones(3, 3, 3) > 0, 14)), ValueError, "for 3 heads of q, but"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, words", REFUSED)
def test_refusals_say_what_was_got_and_what_is_allowed(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
