"""What the patterns say, against definitions written again from the papers; and what they refuse."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from vision_attn import PATTERNS, BlockList, Dense, Neighborhood, Pattern, Radial, SlidingTile, Window
from vision_attn.kernels.patterns import Circle, Halo, LengthDecay, PerHead, PowerStep, Streaming
from vision_attn.kernels.testing import random_pattern

SOME = [
    (Dense(), (4, 5)),
    (Neighborhood((3, 4), stride=(2, 1), dilation=(2, 1), causal=(True, False)), (7, 8)),
    (Window((3, 4), shift=(1, 2)), (7, 8)),
    (SlidingTile((2, 3), (3, 2)), (7, 8)),
    (Radial(0.5, 4, sink=False, thin=8), (5, 3, 4)),
    (Radial(0.5, 4, rule="block", thin=0), (5, 3, 4)),
    (Halo((2, 3), (1, 0)), (7, 8)),
    (Circle(3, pooled=2), (6, 8)),
    (Circle(2), (2, 5, 3)),
    (LengthDecay(2, (0.95, 0.85), period=2, gamma=0.5, first_frame=True, shape="linear"), (5, 3, 4)),
    (PowerStep(4, window=3, sink=2), (4, 7)),
    (Streaming(5, sink=2), (29,)),
    (PerHead(((2, Circle(2)), (1, Streaming(3)))), (4, 5)),
    (BlockList.from_mask(torch.rand(2, 4, 3) < 0.5, (5, 7), Neighborhood(3)), (4, 5)),
]


def axis_row(x, extent, window, stride, dilation, causal):
    """Keys of one query on one axis, straight from the definition of generalized neighborhood attention."""
    group, i = x % dilation, x // dilation
    length = math.ceil((extent - group) / dilation)
    if causal:
        leader = min((i // stride) * stride + stride - 1, length - 1)
        seen = [j for j in range(length) if max(0, leader - window + 1) <= j <= i]
    else:
        leader = min((i // stride) * stride + stride // 2, length - 1)
        start = sorted((0, leader - window // 2, length - window))[1]
        seen = range(start, start + window)
    return {group + dilation * j for j in seen}


@pytest.mark.parametrize("seed", range(60))
def test_neighborhood_is_the_definition(seed):
    pick = random.Random(seed)
    grid = tuple(pick.choice((1, 2, 3, 5, 7, 13)) for _ in range(pick.choice((1, 2))))
    dilation = tuple(pick.randint(1, n) for n in grid)
    window = tuple(pick.randint(1, n // d) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(pick.randint(1, w) for w in window)
    causal = tuple(pick.random() < 0.3 for _ in grid)
    pattern = Neighborhood(window, stride, dilation, causal)
    places = list(itertools.product(*map(range, grid)))
    options = list(zip(grid, window, stride, dilation, causal, strict=True))
    want = [[all(y in axis_row(x, *o) for x, y, o in zip(a, b, options, strict=True)) for b in places] for a in places]
    mask = pattern.mask(grid)
    assert mask.tolist() == want
    if not any(causal):
        assert (mask.sum(1) == math.prod(window)).all()


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 3)])
@pytest.mark.parametrize("grid", [(8, 12), (4, 8)])
def test_window_is_swin(grid, shift):
    """Roll the map, cut equal windows, and let only tokens of one region see each other, as Swin does."""
    size = 4
    tokens = torch.arange(math.prod(grid)).view(grid)
    regions = torch.zeros(grid, dtype=torch.long)
    count = 0
    cuts = [[slice(0, -size), slice(-size, -s), slice(-s, None)] if s else [slice(0, None)] for s in shift]
    for rows in cuts[0]:
        for columns in cuts[1]:
            regions[rows, columns] = count
            count += 1
    rolled = tokens.roll([-s for s in shift], (0, 1))
    want = torch.zeros(math.prod(grid), math.prod(grid), dtype=torch.bool)
    for y in range(0, grid[0], size):
        for x in range(0, grid[1], size):
            inside = rolled[y : y + size, x : x + size].flatten()
            region = regions[y : y + size, x : x + size].flatten()
            want[inside[:, None], inside[None]] = region[:, None] == region[None]
    assert torch.equal(Window(size, shift).mask(grid), want)


def test_window_sizes_that_do_not_divide():
    groups = [{0, 1}, {2, 3, 4}, {5, 6, 7}, {8, 9}]
    assert [set(row.nonzero().flatten().tolist()) for row in Window(3, 2).mask((10,))] == [g for g in groups for _ in g]


@pytest.mark.parametrize(
    "tile, window, grid", [(2, 3, (12,)), (3, 3, (9, 15)), ((2, 3, 4), (3, 1, 1), (6, 6, 8)), (4, 5, (20,))]
)
def test_sliding_tile_is_a_strided_neighborhood(tile, window, grid):
    pattern = SlidingTile(tile, window)
    tiles, windows = (v if isinstance(v, tuple) else (v,) * len(grid) for v in (tile, window))
    equal = Neighborhood(tuple(t * w for t, w in zip(tiles, windows, strict=True)), stride=tile)
    assert torch.equal(pattern.mask(grid), equal.mask(grid))


def test_sliding_tile_even_windows_and_short_tiles():
    assert SlidingTile(3, 99).mask((10,)).all()
    rows = [set((row.nonzero().flatten() // 3).tolist()) for row in SlidingTile(3, 2).mask((10,))[::3]]
    assert rows == [{0, 1}, {0, 1}, {1, 2}, {2, 3}]


def radial_pairs(pattern, frames, positions):
    """The token rule of the paper, pair by pair."""
    mask = torch.zeros(frames * positions, frames * positions, dtype=torch.bool)
    power = 2 ** (math.floor(math.log2(positions)) + 1)
    for i, j in itertools.product(range(frames), repeat=2):
        t = abs(i - j)
        base = power / 2 ** (0 if t == 0 else math.floor(math.log2(t)) + 1)
        if pattern.sink and j == 0:
            width = positions
        elif base < pattern.thin and t % int(pattern.thin / base) != 0:
            continue
        else:
            width = positions if t <= 1 else max(base * pattern.decay, pattern.block)
        for a, b in itertools.product(range(positions), repeat=2):
            mask[i * positions + a, j * positions + b] = abs(a - b) <= width
    return mask


def radial_blocks(pattern, frames, positions):
    """The block rule of the paper on whole canvases of densities, for sequences of whole blocks."""
    tokens = radial_pairs(pattern, frames, positions)
    block = pattern.block
    kept = torch.zeros(frames * positions // block, frames * positions // block, dtype=torch.bool)
    across = math.ceil(positions / block)
    for i, j in itertools.product(range(frames), repeat=2):
        size = 2 * (positions + block)
        canvas = torch.zeros(size, size)
        y, x = i * positions % block, j * positions % block
        pair = tokens[i * positions : (i + 1) * positions, j * positions : (j + 1) * positions]
        canvas[y : y + positions, x : x + positions] = pair.float()
        for r, c in itertools.product(range(across), repeat=2):
            density = canvas[r * block : (r + 1) * block, c * block : (c + 1) * block].mean(0)
            row, column = i * positions // block + r, j * positions // block + c
            if (density > 0).any() and row < len(kept) and column < len(kept):
                kept[row, column] |= bool((density > 1 / 3).sum() / (density > 0).sum() > 0.6)
    return kept


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("frames, positions, block", [(9, 16, 4), (5, 20, 4), (4, 24, 16), (6, 14, 4), (17, 8, 2)])
@pytest.mark.parametrize("decay, thin", [(1.0, 128), (0.3, 0), (0.45, 8)])
def test_radial_is_the_definition(frames, positions, block, decay, thin, sink):
    pattern = Radial(decay, block, sink, thin=thin)
    grid = (frames, positions)
    assert torch.equal(pattern.mask(grid), radial_pairs(pattern, frames, positions))
    whole = frames * positions // block
    ours = dataclasses.replace(pattern, rule="block").block_map(grid)
    assert torch.equal(ours[:whole, :whole], radial_blocks(pattern, frames, positions))
    assert ours[whole:].all() and ours[:, whole:].all()


# frames x positions, decay, block, sink: densities of both rules in percent, blocks per row least / most / all
PUBLISHED = [
    ((18, 3840), 0.2, 128, True, 26.9, 28.7, (92, 162, 540)),
    ((18, 3840), 1.0, 128, True, 40.8, 43.1, (126, 270, 540)),
    ((21, 3600), 0.2, 128, True, 24.5, 26.2, (98, 184, 590)),
    ((21, 1560), 0.2, 128, True, 30.7, 33.9, (60, 98, 255)),
    ((41, 3600), 1.0, 128, True, 24.6, 26.0, (164, 347, 1153)),
    ((20, 3840), 0.8, 64, True, 34.7, 34.9, (214, 472, 1200)),
    ((30, 3840), 0.95, 128, False, 25.9, 27.5, (144, 281, 900)),
    ((128, 3600), 1.0, 128, False, 10.0, 10.9, (218, 446, 3600)),
    ((28, 1590), 1.0, 128, True, 33.9, 36.7, (78, 149, 347)),
]


@pytest.mark.parametrize("grid, decay, block, sink, token, blocks, rows", PUBLISHED)
def test_radial_densities_of_published_shapes(grid, decay, block, sink, token, blocks, rows):
    pattern = Radial(decay, block, sink)
    assert round(100 * pattern.density(grid), 1) == token
    whole = math.prod(grid) // block
    kept = dataclasses.replace(pattern, rule="block").block_map(grid)[:whole, :whole]
    assert round(100 * kept.double().mean().item(), 1) == blocks
    assert (kept.sum(1).min().item(), kept.sum(1).max().item(), whole) == rows


def test_radial_block_rule_with_text():
    """HunyuanVideo: 256 text tokens are two more blocks that see and are seen by all."""
    kept = Radial(0.95, 128, False, rule="block").block_map((30, 3840))
    assert round(100 * ((kept.sum() + 2 * 900 * 2 + 4) / 902**2).item(), 1) == 27.8


@pytest.mark.parametrize("pattern, grid", SOME, ids=lambda p: getattr(p, "name", None))
def test_json_round_trip(pattern, grid):
    import json

    data = json.loads(json.dumps(pattern.to_dict()))
    again = Pattern.from_dict(data)
    assert type(again) is type(pattern) and again.to_dict() == pattern.to_dict()
    assert torch.equal(again.mask(grid), pattern.mask(grid))
    if not isinstance(pattern, BlockList):
        assert again == pattern and hash(again) == hash(pattern) and eval(repr(pattern)) == pattern


@pytest.mark.parametrize("pattern, grid", SOME, ids=lambda p: getattr(p, "name", None))
def test_frozen_and_usable_as_a_key(pattern, grid):
    assert {pattern: 1}[pattern] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.name_of_anything = 1


@pytest.mark.parametrize("seed", range(150))
def test_density_and_predicate_agree_with_the_mask(seed):
    pattern, grid = random_pattern(random.Random(seed))
    mask = pattern.mask(grid)
    assert pattern.density(grid) == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_density_of_lists_per_head():
    pattern, grid = SOME[-1]
    assert pattern.density(grid) == pytest.approx(pattern.mask(grid).double().mean().item())


def test_registry_names():
    assert list(PATTERNS) == [
        "dense", "neighborhood", "window", "sliding-tile", "halo", "circle", "radial", "length-decay", "power-step",
        "streaming", "block-list", "per-head",
    ]  # fmt: skip
    assert all(cls.name == name for name, cls in PATTERNS.items())


REFUSED = [
    (lambda: Neighborhood(0), ValueError, "window must be at least 1"),
    (lambda: Neighborhood(True), TypeError, "must be an int"),
    (lambda: Neighborhood(3.0), TypeError, "must be an int"),
    (lambda: Neighborhood((3, 3, 3, 3)), ValueError, "has 4 entries"),
    (lambda: Neighborhood((3, 3), stride=(1, 1, 1)), ValueError, "different numbers of axes"),
    (lambda: Neighborhood((5, 3), stride=4), ValueError, "stride 4 is larger than window 3 on axis 1"),
    (lambda: Neighborhood(3, dilation=0), ValueError, "dilation must be at least 1"),
    (lambda: Neighborhood(3, causal=1), TypeError, "causal must be a bool"),
    (lambda: Neighborhood(9).check((12, 8)), ValueError, "larger than the grid, which has 8 tokens on axis 1"),
    (lambda: Neighborhood(3, dilation=3).check((8,)), ValueError, "times dilation 3.*at most 2"),
    (lambda: Neighborhood((3, 3)).check((8,)), ValueError, "2 entries but the grid has 1 axes"),
    (lambda: Dense().check((2, 2, 2, 2)), ValueError, "has 4 axes; allowed: 1 or 2 or 3"),
    (lambda: Dense().check((0, 2)), ValueError, "at least 1"),
    (lambda: Neighborhood(7).check((10**7, 10**7)), ValueError, "100000000000000 tokens; allowed: up to 2147483647"),
    (lambda: Dense().check([2, 2]), TypeError, "tuple of ints"),
    (lambda: Window(3, 3), ValueError, "shift 3 on axis 0 must be smaller"),
    (lambda: Window(9).check((8,)), ValueError, "larger than the grid"),
    (lambda: Window(3, -1), ValueError, "at least 0"),
    (lambda: SlidingTile(9, 1).check((8,)), ValueError, "larger than the grid"),
    (lambda: SlidingTile(2, 0), ValueError, "window must be at least 1"),
    (lambda: Radial(0.0), ValueError, "above 0"),
    (lambda: Radial(math.inf), ValueError, "finite"),
    (lambda: Radial("1"), TypeError, "a number"),
    (lambda: Radial(block=0), ValueError, "at least 1"),
    (lambda: Radial(block=1.5), TypeError, "must be an int"),
    (lambda: Radial(thin=-1), ValueError, "at least 0"),
    (lambda: Radial(sink=1), TypeError, "True or False"),
    (lambda: Radial(rule="tokens"), ValueError, "'token', 'block'"),
    (lambda: Radial().check((7,)), ValueError, r"\(frames, h, w\)"),
    (lambda: Radial(rule="block").check((9, 6, 6)), ValueError, "would not see themselves; use rule='token'"),
    (lambda: BlockList(0, torch.zeros(1, 1).int(), torch.ones(1).int()), ValueError, "positive int"),
    (lambda: BlockList(2, torch.zeros(1, 1), torch.ones(1).int()), TypeError, "int32 or int64"),
    (lambda: BlockList(2, torch.zeros(3, 1).int(), torch.ones(2).int()), ValueError, "does not fit index"),
    (lambda: BlockList(2, torch.zeros(3).int(), torch.tensor(1)), ValueError, r"\[query blocks, slots\]"),
    (lambda: BlockList(2, torch.zeros(1, 1).int(), torch.ones(1).int(), torch.ones(1).int()), ValueError, "pattern"),
    (lambda: BlockList(2, torch.zeros(1, 1).int(), torch.ones(1).int(), within=3), TypeError, "must be a pattern"),
    (lambda: BlockList.from_mask(torch.ones(2, 2), 2), TypeError, "bool tensor"),
    (lambda: BlockList.from_mask(torch.ones(2, 2) > 0, 2, SOME[-1][0]), TypeError, "another kind"),
    (lambda: BlockList.from_mask(torch.ones(2, 2) > 0, 2).check((6,)), ValueError, "2 rows, but 6 tokens"),
    (lambda: BlockList.from_mask(torch.ones(3, 9) > 0, 2).check((6,)), ValueError, "0 to 2"),
    (lambda: BlockList(2, torch.zeros(3, 2).int(), torch.full((3,), 3)).check((6,)), ValueError, "the 2 slots"),
    (lambda: BlockList(2, torch.zeros(3, 2).int(), torch.full((3,), 2)).check((6,)), ValueError, "twice"),
    (lambda: BlockList(2, torch.zeros(3, 1).int(), torch.ones(3).int(), torch.full((3,), 2), Dense()).check((6,)),
     ValueError, "between 0 and count"),
    (lambda: Pattern.from_dict({"pattern": "square"}), ValueError, "unknown pattern 'square'; allowed: dense, "),
    (lambda: Pattern.from_dict({"pattern": "window", "kernel": 2}), ValueError, "no option kernel; allowed: size"),
    (lambda: Pattern.from_dict({"pattern": "window"}), ValueError, "needs size"),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, words", REFUSED)
def test_refusals_say_what_to_do(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
