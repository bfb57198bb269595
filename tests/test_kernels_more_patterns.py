"""Halos, circles, length decay, steps of powers of two and streaming, against masks and sums written from formulas."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Neighborhood, Pattern, attend
from vision_attn.kernels.patterns import Circle, Halo, LengthDecay, PowerStep, Streaming
from vision_attn.kernels.patterns.blocks import map_from_lists
from vision_attn.kernels.patterns.circle import pool_tokens

EXTENTS = {1: (1, 2, 17, 41, 97), 2: (1, 2, 3, 5, 7, 11), 3: (1, 2, 3, 5)}


def halo_sees(pattern, grid, query, key):
    for axis, (x, y) in enumerate(zip(query, key, strict=True)):
        block, halo = (v if isinstance(v, int) else v[axis] for v in (pattern.block, pattern.halo))
        if not x // block * block - halo <= y < (x // block + 1) * block + halo:
            return False
    return True


def circle_sees(pattern, grid, query, key):
    return (query[-2] - key[-2]) ** 2 + (query[-1] - key[-1]) ** 2 < pattern.radius**2


def power_sees(pattern, grid, query, key):
    i, j = number(grid, query), number(grid, key)
    apart = abs(i // pattern.block - j // pattern.block)
    seen = abs(i - j) < pattern.window or j < pattern.sink or apart in [2**p for p in range(20)]
    return seen and (j <= i or not pattern.causal)


def streaming_sees(pattern, grid, query, key):
    i, j = number(grid, query), number(grid, key)
    return j <= i and (i - j < pattern.window or j < pattern.sink)


def decay_sees(pattern, grid, query, key):
    positions = math.prod(grid[1:])
    last = pattern.train_frames * positions
    return not (pattern.first_frame and number(grid, query) <= positions and number(grid, key) > last)


def number(grid, place):
    return sum(x * math.prod(grid[axis + 1 :]) for axis, x in enumerate(place))


def random_halo(pick, grid):
    return Halo(tuple(pick.randint(1, n) for n in grid), tuple(pick.choice((0, 1, 2, 9)) for _ in grid))


def random_circle(pick, grid):
    return Circle(pick.choice((1, 2, 3, 5, 20)))


def random_power(pick, grid):
    return PowerStep(pick.choice((1, 2, 5, 16)), pick.choice((1, 3, 8, 200)), pick.choice((0, 3)), pick.random() < 0.5)


def random_streaming(pick, grid):
    return Streaming(pick.choice((1, 3, 8, 200)), pick.choice((0, 1, 7, 200)))


def random_decay(pick, grid):
    shape = pick.choice(("constant", "constant", "linear", "parabolic"))
    return LengthDecay(
        pick.randint(1, 3),
        alpha=pick.choice((0.9, 0.5, 0, 1)) if shape == "constant" else (0.95, 0.6),
        beta=0.3,
        period=pick.choice((None, 2, 1.5, 4)),
        gamma=pick.choice((0, 0.4, 1)),
        first_frame=pick.random() < 0.5,
        center_keys=pick.random() < 0.5,
        shape=shape,
    )


# what makes one that fits a grid, how many axes the grid may have, and the definition
KINDS = {
    "halo": (random_halo, (1, 2, 3), halo_sees),
    "circle": (random_circle, (2, 3), circle_sees),
    "power-step": (random_power, (1, 2, 3), power_sees),
    "streaming": (random_streaming, (1, 2, 3), streaming_sees),
    "length-decay": (random_decay, (2, 3), decay_sees),
}


def draw(kind, seed):
    make, ranks, sees = KINDS[kind]
    pick = random.Random(seed)
    rank = pick.choice(ranks)
    grid = tuple(pick.choice(EXTENTS[rank]) for _ in range(rank))
    pattern = make(pick, grid)
    places = list(itertools.product(*map(range, grid)))
    return pattern, grid, torch.tensor([[sees(pattern, grid, a, b) for b in places] for a in places])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(15))
def test_masks_are_the_definitions(kind, seed):
    pattern, grid, want = draw(kind, seed)
    assert torch.equal(pattern.mask(grid), want)
    assert pattern.density(grid) == pytest.approx(want.double().mean().item(), abs=1e-12)
    again = Pattern.from_dict(pattern.to_dict())
    assert again == pattern and eval(repr(pattern)) == pattern


@pytest.mark.parametrize("kind", ["power-step", "streaming", "length-decay"])
@pytest.mark.parametrize("seed", range(12))
def test_lists_cover_the_mask_and_full_blocks_are_full(kind, seed):
    pick = random.Random(seed)
    grid = (pick.choice((7, 9)), pick.choice((37, 53, 64)))
    pattern = KINDS[kind][0](pick, grid)
    pattern = PowerStep(pick.choice((32, 64, 128)), 70, 3, pattern.causal) if kind == "power-step" else pattern
    lists, tokens = pattern.lists(grid), math.prod(grid)
    columns = -(-tokens // lists.block[1])

    def spread(count):
        blocks = map_from_lists(lists.index, count, columns)
        return blocks.repeat_interleave(lists.block[0], 0)[:tokens].repeat_interleave(lists.block[1], 1)[:, :tokens]

    visited, full, mask = spread(lists.count), spread(lists.full_count), pattern.mask(grid)
    assert bool((mask <= visited).all()) and bool((full <= mask).all())
    holds = F.max_pool2d(mask[None].float(), lists.block, ceil_mode=True)[0] > 0
    assert lists.count.tolist() == holds.sum(1).tolist()  # nothing is visited in vain


def test_steps_of_whole_blocks_need_no_test_outside_the_window():
    lists = PowerStep(64, 64).lists((1024,))
    assert lists.block == (64, 64)
    # the block itself and, by its window, the one before are partly filled; the one before is full as a power of two
    assert (lists.count - lists.full_count).tolist() == [1] * 16
    assert lists.count.tolist() == [1 + len([p for p in (1, 2, 4, 8) if p <= row]) for row in range(16)]


@pytest.mark.parametrize("radius, keys", [(5, 69), (8, 193), (16, 793), (32, 3205)])
def test_circle_counts(radius, keys):
    """Of the published radii, and of one that tells `<` from `<=`: 3 * 3 + 4 * 4 = 5 * 5."""
    side = 2 * radius + 1
    row = Circle(radius).predicate((side, side))(torch.tensor([side * side // 2]), torch.arange(side * side))
    assert row.sum().item() == keys


@pytest.mark.parametrize("block, halo, grid", [(4, 1, (20,)), ((3, 2), (2, 3), (15, 14)), (5, 4, (23,))])
def test_halo_is_a_strided_neighborhood_away_from_the_border(block, halo, grid):
    def per_axis(value):
        return value if isinstance(value, tuple) else (value,) * len(grid)

    window = tuple(b + 2 * h for b, h in zip(per_axis(block), per_axis(halo), strict=True))
    ours, theirs = Halo(block, halo).mask(grid), Neighborhood(window, stride=block).mask(grid)
    inner = [
        all(x // b * b >= h and (x // b + 1) * b + h <= n for x, b, h, n in zip(place, *options, strict=True))
        for options in [(per_axis(block), per_axis(halo), grid)]
        for place in itertools.product(*map(range, grid))
    ]
    inner = torch.tensor(inner)
    assert 0 < inner.sum() < len(inner)
    assert torch.equal(ours[inner], theirs[inner])
    assert (ours[~inner].sum(1) < theirs[~inner].sum(1)).any()  # clipped there, shifted here


def tensors(seed, grid, batch=2, heads=4, kv_heads=2, dim=8, extra=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, *grid, heads, dim), (batch, *grid, kv_heads, dim), (batch, *grid, kv_heads, 5)]
    shapes += [(batch, extra, kv_heads, dim), (batch, extra, kv_heads, 5)] if extra else []
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def dense(q, k, v, allowed, change=lambda scores: scores):
    """Softmax over the allowed keys: flat tensors, bool `[..., queries, keys]`, and what changes scores."""
    key, value = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (k, v))
    scores = change(q.transpose(1, 2) @ key.transpose(-1, -2) / math.sqrt(q.shape[-1]))
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value).transpose(1, 2)


def assert_same(outputs, wanted, inputs, tolerance=1e-10):
    generator = torch.Generator().manual_seed(0)
    for got, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    losses = [sum((w * t).sum() for w, t in zip(weights, some, strict=True)) for some in (outputs, wanted)]
    grads = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(9))
def test_tiled_is_the_reference_with_gradients(kind, seed):
    """Every third has a mask over extra tokens; also compared with the formula where nothing is done to the scores."""
    pattern, grid, mask = draw(kind, seed)
    extra = (0, 3, 3)[seed % 3]
    inputs = tensors(seed, grid, extra=extra)
    visible = torch.tensor([[True, False, True], [False, True, True]]) if seed % 3 == 2 else None
    call = dict(extra_kv=tuple(inputs[3:]) or None, extra_mask=visible, return_lse=True)
    tiled, reference = (attend(*inputs[:3], pattern, **call, backend=b) for b in ("tiled", "reference"))
    assert_same(tiled, reference, inputs)
    if kind != "length-decay":
        q, k, v = (t.flatten(1, -3) for t in inputs[:3])
        key, value = (torch.cat(pair, 1) for pair in zip((k, v), inputs[3:], strict=True)) if extra else (k, v)
        shown = mask.expand(2, 1, *mask.shape)
        if extra:
            seen = torch.ones(2, extra, dtype=torch.bool) if visible is None else visible
            shown = torch.cat([shown, seen[:, None, None].expand(-1, 1, len(mask), -1)], -1)
        assert_same([tiled[0].flatten(1, -3)], [dense(q, key, value, shown)], inputs)


@pytest.mark.parametrize("pattern, grid", [
    (PowerStep(32, 40, 8), (1100,)), (Streaming(70, 5), (11, 101)), (Halo(8, 3), (29, 31)), (Circle(6), (29, 31)),
    (LengthDecay(3, period=2, gamma=0.25, first_frame=True), (7, 13, 12)),
])  # fmt: skip
def test_larger_than_one_tile(pattern, grid):
    q, k, v = tensors(0, grid, batch=1, heads=2, kv_heads=1)
    tiled, reference = (attend(q, k, v, pattern, backend=b, return_lse=True) for b in ("tiled", "reference"))
    assert_same(tiled, reference, [q, k, v])


@pytest.mark.parametrize("pattern", [Circle(3, pooled=2), LengthDecay(2, first_frame=True)], ids=str)
def test_keys_are_prepared_inside_compiled_graphs_too(pattern):
    *inputs, extra_k, extra_v = tensors(9, (4, 6), extra=3)
    visible = torch.tensor([[True, False, True], [False, True, True]])

    def call(q, k, v, extra_k, extra_v):
        return attend(q, k, v, pattern, extra_kv=(extra_k, extra_v), extra_mask=visible)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    inputs = [*inputs, extra_k, extra_v]
    assert_same([compiled(*inputs)], [call(*inputs)], inputs)


# ---- pooled tokens


@pytest.mark.parametrize("grid", [(6, 10), (3, 4, 6)])
@pytest.mark.parametrize("masked", [None, False, True])
def test_pooled_tokens_are_extra_tokens(grid, masked):
    inputs = tensors(1, grid, extra=0 if masked is None else 3)
    visible = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    frames = grid[0] if len(grid) == 3 else 1
    h, w = grid[-2:]

    def means(t):
        cells = [
            t.view(2, frames, h, w, *t.shape[-2:])[:, f, y : y + 2, x : x + 2].mean((1, 2))
            for f, y, x in itertools.product(range(frames), range(0, h, 2), range(0, w, 2))
        ]
        return torch.stack(cells, 1)

    pooled = means(inputs[1]), means(inputs[2])
    given = tuple(inputs[3:]) or None
    together = pooled if masked is None else tuple(torch.cat(pair, 1) for pair in zip(given, pooled, strict=True))
    ones = torch.ones(2, pooled[0].shape[1], dtype=torch.bool)
    mask = torch.cat([visible, ones], 1) if masked else None
    got = attend(*inputs[:3], Circle(3, pooled=2), extra_kv=given, extra_mask=visible, backend="tiled")
    want = attend(*inputs[:3], Circle(3), extra_kv=together, extra_mask=mask, backend="reference")
    assert_same([got], [want], inputs)


def test_pool_tokens_with_weights():
    tensor = torch.randn(2, 6, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    got = pool_tokens(tensor, 3, weight)
    kernel = weight.expand(8, 1, 3, 3)
    want = F.conv2d(tensor.permute(0, 3, 4, 1, 2).flatten(1, 2), kernel, stride=3, groups=8)
    want = want.view(2, 2, 4, -1).permute(0, 3, 1, 2)
    assert_same([got], [want], [tensor, weight])
    mean = pool_tokens(tensor, 3, torch.full((3, 3), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(pool_tokens(tensor, 3), mean)
    assert pool_tokens(torch.randn(1, 2, 4, 4, 3, 8, dtype=torch.bfloat16), 2).shape == (1, 8, 3, 8)
    assert pool_tokens(tensor.bfloat16(), 3, weight).dtype == torch.bfloat16


# ---- length decay


def decayed(q, k, v, pattern, grid, extra_kv=None, extra_mask=None, rule=None):
    """The published rule, pair by pair, in float64."""
    positions, tokens = math.prod(grid[1:]), math.prod(grid)
    trained = pattern.train_frames * positions
    factor = torch.ones(tokens, tokens, dtype=torch.float64)
    hidden = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i, j in itertools.product(range(tokens), repeat=2):
        x = abs(i - j) / tokens
        near, far = pattern.alpha if pattern.shape != "constant" else (pattern.alpha, pattern.alpha)
        x = x * x if pattern.shape == "parabolic" else x
        value = far * x + near * (1 - x)
        for m in (1, 2, 3, 4) if pattern.period else ():
            low, high = ((m * pattern.period + side * pattern.gamma) * positions for side in (-1, 1))
            value = pattern.beta if low <= abs(i - j) <= high else value
        factor[i, j] = 1 if abs(i - j) <= trained / 2 else value
        hidden[i, j] = pattern.first_frame and i <= positions and j > trained
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    allowed = ~hidden.expand(len(q), 1, -1, -1)
    if extra_kv is not None:
        k, v = torch.cat([k, extra_kv[0]], 1), torch.cat([v, extra_kv[1]], 1)
        extra_mask = torch.ones(extra_kv[0].shape[:2], dtype=torch.bool) if extra_mask is None else extra_mask
        allowed = torch.cat([allowed, extra_mask[:, None, None].expand(-1, 1, tokens, -1)], -1)
    if pattern.center_keys:
        seen = torch.ones(k.shape[:2], dtype=torch.bool)
        if extra_mask is not None:
            seen[:, tokens:] = extra_mask
        k = k - torch.stack([key[some].mean(0) for key, some in zip(k, seen, strict=True)])[:, None]

    def change(scores):
        factors = F.pad(factor, (0, scores.shape[-1] - tokens), value=1)
        return torch.where(scores >= 0, scores * factors, scores) if rule is None else rule(scores, factors)

    return dense(q, k, v, allowed, change)


DECAYS = [
    dict(), dict(alpha=0.85), dict(center_keys=False), dict(first_frame=True), dict(period=2, gamma=0.5),
    dict(period=1.5, gamma=0.25, beta=0.1), dict(period=1, gamma=0), dict(alpha=(0.95, 0.85), shape="linear"),
    dict(alpha=(0.9, 0.2), shape="parabolic", center_keys=False),
    dict(alpha=(0.95, 0.5), shape="linear", period=3, gamma=1, first_frame=True), dict(alpha=0, beta=1, period=3),
]  # fmt: skip


@pytest.mark.parametrize("options", DECAYS, ids=str)
@pytest.mark.parametrize("train_frames, grid", [(2, (6, 3, 2)), (1, (5, 7)), (3, (7, 1, 3)), (9, (4, 5)), (1, (3, 1))])
def test_length_decay_is_the_published_rule(options, train_frames, grid):
    pattern = LengthDecay(train_frames, **options)
    *inputs, extra_k, extra_v = tensors(3, grid, extra=3)
    visible = torch.tensor([[True, False, True], [False, True, True]])
    for backend, extra, mask in (
        ("reference", None, None),
        ("tiled", None, None),
        ("tiled", (extra_k, extra_v), None),
        ("reference", (extra_k, extra_v), visible),
        ("tiled", (extra_k, extra_v), visible),
    ):
        got = attend(*inputs, pattern, extra_kv=extra, extra_mask=mask, backend=backend).flatten(1, -3)
        want = decayed(*inputs, pattern, grid, extra, mask)
        assert_same([got], [want], [*inputs, *(extra or ())])


def test_length_decay_of_the_trained_length_still_reduces_distant_scores():
    """Half a training length reaches no further than half a video, so it acts on the trained length too."""
    q, k, v = tensors(4, (4, 6))
    pattern, plain = LengthDecay(4, 0.5, center_keys=False), LengthDecay(8, 0.5, center_keys=False)
    assert not torch.allclose(attend(q, k, v, pattern), attend(q, k, v, plain), atol=1e-3)
    want = dense(*(t.flatten(1, -3) for t in (q, k, v)), torch.ones(24, 24, dtype=torch.bool))
    torch.testing.assert_close(attend(q, k, v, plain).flatten(1, -3), want)


def test_adding_the_logarithm_is_another_method():
    q, k, v = tensors(5, (6, 5))
    pattern = LengthDecay(2, 0.7, center_keys=False)
    got = attend(q, k, v, pattern).flatten(1, -3)
    added = decayed(q, k, v, pattern, (6, 5), rule=lambda scores, factors: scores + factors.log())
    assert (got - added).abs().max() > 0.01


def test_rule_of_half_floats_and_scale():
    """The factor follows the dtype of the scores, and a scale does not change which scores are reduced."""
    rule = LengthDecay(1, 0.9).score_rule((4, 2))
    query, key = torch.zeros(3, dtype=torch.long), torch.tensor([1, 5, 5])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = torch.tensor([2.0, 2.0, -2.0], dtype=dtype)
        want = torch.tensor([2.0, 2.0 * 0.9, -2.0], dtype=dtype)
        assert rule(scores, query, key).dtype == dtype
        torch.testing.assert_close(rule(scores, query, key), want)
    exact = rule(torch.tensor([2.0], dtype=torch.float64), query[:1], key[1:2])
    assert exact.item() == 2 * 0.9
    q, k, v = tensors(6, (4, 3))
    once, twice = (attend(q * s, k, v, LengthDecay(1), scale=0.3 / s) for s in (1, 2))
    torch.testing.assert_close(once, twice)


def test_centred_keys_in_half_precision_keep_small_differences():
    """The mean is taken in float32: with a large common part nothing else would be left of half floats."""
    k = (torch.randn(1, 64, 64, 1, 8) * 0.01 + 3).half()
    centred, *_ = LengthDecay(1).prepare(k, k, None, None)
    want = k.double() - k.double().mean((1, 2), keepdim=True)
    assert centred.dtype == torch.float16 and (centred.double() - want).abs().max() < 2e-5


def test_a_masked_key_that_is_not_finite_stays_out_of_the_mean():
    q, k, v, extra_k, extra_v = tensors(7, (3, 4), extra=2)
    visible = torch.tensor([[True, False]] * 2)
    bad = extra_k.detach().clone()
    bad[:, 1] = math.nan
    want = attend(q, k, v, LengthDecay(1), extra_kv=(extra_k[:, :1], extra_v[:, :1]))
    got = attend(q, k, v, LengthDecay(1), extra_kv=(bad, extra_v), extra_mask=visible, backend="tiled")
    torch.testing.assert_close(got, want)


def test_published_setting_of_hunyuan():
    """33 latent frames of 2040 tokens, period 50 and gamma 4: the bands lie outside half a training length."""
    pattern, grid = LengthDecay(33, 0.9, 0.6, period=50), (99, 2040)
    assert pattern.untouched(grid) == 33 * 2040 // 2
    assert pattern.bands(grid) == [((50 * m - 4) * 2040, (50 * m + 4) * 2040) for m in (1, 2, 3, 4)]
    distance = torch.tensor([0, 33660, 33661, 46 * 2040 - 1, 46 * 2040, 54 * 2040, 54 * 2040 + 1])
    factor = pattern.multiplier(distance, grid, torch.float64)
    assert factor.tolist() == [1, 1, 0.9, 0.9, 0.6, 0.6, 0.9]


# ---- refusals

REFUSED = [
    (lambda: Halo(0, 1), ValueError, "block must be at least 1"),
    (lambda: Halo(2, -1), ValueError, "halo must be at least 0"),
    (lambda: Halo(2.0, 1), TypeError, "must be an int"),
    (lambda: Halo(9, 1).check((12, 8)), ValueError, "block of 9.*8 tokens on axis 1.*at most 8"),
    (lambda: Halo((2, 2), 1).check((8,)), ValueError, "2 entries but the grid has 1 axes"),
    (lambda: Halo(2, (1, 1)).check((8,)), ValueError, "2 entries but the grid has 1 axes"),
    (lambda: Circle(0), ValueError, "radius must be at least 1"),
    (lambda: Circle(2.5), TypeError, "radius must be an int"),
    (lambda: Circle(True), TypeError, "radius must be an int"),
    (lambda: Circle(3, pooled=1), ValueError, "pooled must be at least 2"),
    (lambda: Circle(3).check((9,)), ValueError, r"grid of \(h, w\) or \(t, h, w\); got \(9,\)"),
    (lambda: Circle(3, pooled=4).check((8, 10)), ValueError, "8 x 10 tokens.*cells of 4 x 4.*or pad"),
    (lambda: attend(*torch.randn(3, 1, 8, 10, 1, 4), Circle(3, pooled=4)), ValueError, "cannot be pooled"),
    (lambda: pool_tokens(torch.randn(2, 4, 4, 8), 2), ValueError, r"needs \[batch, h, w, heads, dim\]"),
    (lambda: pool_tokens(torch.randn(2, 4, 4, 1, 8), 3), ValueError, "4 x 4 tokens cannot be pooled"),
    (lambda: pool_tokens(torch.randn(2, 4, 4, 1, 8), 2, torch.ones(4)), ValueError, r"\[2, 2\].*got \[4\]"),
    (lambda: LengthDecay(0), ValueError, "train_frames must be at least 1"),
    (lambda: LengthDecay(2.5), TypeError, "train_frames must be an int"),
    (lambda: LengthDecay(2, alpha=1.1), ValueError, "alpha must be from 0 to 1"),
    (lambda: LengthDecay(2, alpha=math.nan), ValueError, "alpha must be from 0 to 1"),
    (lambda: LengthDecay(2, alpha="0.9"), TypeError, "alpha must be a number"),
    (lambda: LengthDecay(2, alpha=(0.95, 0.85)), ValueError, "shape 'constant' takes one number"),
    (lambda: LengthDecay(2, shape="linear"), ValueError, r"two numbers, near and far, such as \(0.95, 0.85\)"),
    (lambda: LengthDecay(2, shape="cubic"), ValueError, "'constant', 'linear', 'parabolic'"),
    (lambda: LengthDecay(2, beta=-0.1), ValueError, "beta must be from 0 to 1"),
    (lambda: LengthDecay(2, gamma=-1), ValueError, "gamma must be finite and at least 0"),
    (lambda: LengthDecay(2, period=0), ValueError, "period must be above 0, or None"),
    (lambda: LengthDecay(2, period=-3), ValueError, "period must be finite and above 0"),
    (lambda: LengthDecay(2, period=math.inf), ValueError, "period must be finite"),
    (lambda: LengthDecay(2, first_frame=1), TypeError, "first_frame must be True or False"),
    (lambda: LengthDecay(2, center_keys=None), TypeError, "center_keys must be True or False"),
    (lambda: LengthDecay(2).check((9,)), ValueError, r"grid of \(frames, h, w\) or \(frames, positions\)"),
    (lambda: PowerStep(0, 1), ValueError, "block must be at least 1"),
    (lambda: PowerStep(1, 0), ValueError, "window must be at least 1"),
    (lambda: PowerStep(1, 1, -1), ValueError, "sink must be at least 0"),
    (lambda: PowerStep(1, 1, causal=1), TypeError, "causal must be True or False"),
    (lambda: Streaming(0), ValueError, "window must be at least 1"),
    (lambda: Streaming(4, True), TypeError, "sink must be an int"),
    (lambda: Streaming(4).check((0,)), ValueError, "at least 1"),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, words", REFUSED)
def test_refusals_say_what_to_do(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
