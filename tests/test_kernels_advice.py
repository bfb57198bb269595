"""The advice on windows and strides, against masks looked at tile by tile."""

import itertools
import json
import math
import random

import pytest
import torch

from vision_attn import Dense, Neighborhood, Pattern
from vision_attn.apps.cli import main
from vision_attn.kernels.advice import advise
from vision_attn.kernels.simulate import predict
from vision_attn.kernels.tiles import bound


def tiles_of(grid, sides):
    """The tokens of every tile of a grid cut at multiples of `sides`."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    for corner in itertools.product(*(range(0, n, s) for n, s in zip(grid, sides, strict=True))):
        yield tokens[tuple(slice(c, c + s) for c, s in zip(corner, sides, strict=True))].flatten()


def assert_no_tile_is_partly_filled(choice, grid):
    """From the mask: a query tile sees a tile of keys whole or not at all; or one box of keys, of whole tiles."""
    mask = choice.pattern.mask(grid)
    for queries in tiles_of(grid, choice.query_tile):
        rows = mask[queries]
        assert torch.equal(rows, rows[:1].expand_as(rows))
        keys = rows[0].view(grid).nonzero()
        sides = keys.amax(0) - keys.amin(0) + 1
        assert math.prod(sides.tolist()) == len(keys) and not any(sides % torch.tensor(choice.key_tile))
        if choice.aligned:
            for tile in tiles_of(grid, choice.key_tile):
                seen = rows[0][tile]
                assert seen.all() or not seen.any()


def overlap(pattern, grid, window):
    ours, theirs = pattern.mask(grid), Neighborhood(window).mask(grid)
    return ((ours & theirs).sum() / (ours | theirs).sum()).item()


@pytest.mark.parametrize("seed", range(30))
def test_choices_fill_their_tiles(seed):
    pick = random.Random(seed)
    grid = {1: (pick.choice((97, 128, 200)),), 2: (pick.choice((16, 21)), pick.choice((24, 37))), 3: (4, 9, 16)}
    grid = grid[pick.choice((1, 2, 3))]
    window = tuple(pick.randint(2, n) for n in grid)
    advice = advise(grid, window, tiles=(pick.choice((16, 32)), 16), device="none.json")
    assert advice.wanted.pattern == Neighborhood(window) and advice.wanted.overlap == 1
    choice = advice.nearest
    if choice is None:
        return
    assert math.prod(choice.query_tile) in (16, 32) and math.prod(choice.key_tile) == 16 and choice.full == 1
    assert_no_tile_is_partly_filled(choice, grid)
    assert choice.overlap == pytest.approx(overlap(choice.pattern, grid, window))
    by_tiles, full = bound(choice.pattern, grid, choice.query_tile, choice.key_tile, choice.aligned)
    assert (choice.bound, choice.full) == (by_tiles, full)


@pytest.mark.parametrize("grid, window", [((8, 12), (4, 8)), ((9, 16), (6, 8)), ((64,), (32,)), ((61,), (48,))])
def test_nothing_is_much_nearer(grid, window):
    """All strides, not only powers of two, and all shapes of tiles: none keeps much more, weighed with its padding."""
    shapes = [s for s in itertools.product([1, 2, 4, 8, 16], repeat=len(grid)) if math.prod(s) == 16]
    density = Neighborhood(window).density(grid)
    best = 0
    for stride in itertools.product(*(range(1, w + 1) for w in window)):
        pattern = Neighborhood(window, stride)
        kept = overlap(pattern, grid, window)
        if kept > best:
            for q, k in itertools.product(shapes, shapes):
                by_tiles, full = bound(pattern, grid, q, k)
                best = max(best, kept * by_tiles * density) if full == 1 else best
    choice = advise(grid, window, tiles=(16, 16), device="none.json").nearest
    assert best > 0 and choice.pattern.window == window
    assert choice.overlap * choice.bound * density >= 0.85 * best


# FLUX at 4096 x 4096 pixels, HunyuanVideo twice, Cosmos, Wan2.1: grid, window, stride, and the bound with its tiles
KNOWN = [
    ((256, 256), (80, 80), (16, 16), 10.24),
    ((30, 48, 80), (18, 24, 24), (2, 8, 8), 11.11),
    ((30, 48, 80), (30, 40, 40), (1, 8, 8), 2.4),
    ((16, 44, 80), (16, 32, 48), (1, 4, 8), 2.29),
    ((21, 45, 80), (12, 24, 40), (1, 16, 8), 6.15),
]


@pytest.mark.parametrize("grid, window, stride, speedup", KNOWN)
def test_problems_of_image_and_video_models(grid, window, stride, speedup):
    advice = advise(grid, window, device="none.json")
    choice = advice.nearest
    assert choice.pattern == Neighborhood(window, stride)
    assert (choice.full, round(choice.bound, 2)) == (1, speedup)
    assert advice.wanted.full < 1 and advice.wanted.bound < choice.bound
    assert choice.aligned == (grid != (21, 45, 80))  # 45 is odd: no aligned tile ends at both borders


def test_the_published_stride_of_hunyuan_is_no_nearer():
    published = Neighborhood((18, 24, 24), (16, 8, 8))
    assert bound(published, (30, 48, 80), (2, 8, 8), (2, 8, 8), aligned=True) == (pytest.approx(100 / 9), 1)
    assert advise((6, 48, 16), (4, 24, 8), device="none.json").nearest.overlap > overlap(
        Neighborhood((4, 24, 8), (4, 8, 8)), (6, 48, 16), (4, 24, 8)
    )


def test_windows_that_fill_no_tile_move():
    choice = advise((64, 64), 13, device="none.json").nearest
    assert choice.pattern.window == (12, 16) and choice.full == 1 and choice.overlap < 0.6
    nothing = advise((7, 7), 3, device="none.json")
    assert nothing.nearest is None and "no window near this one fills tiles" in str(nothing)


def test_predictions_and_break_even(tmp_path, monkeypatch):
    """Rates that make masks cost double: the nearest choice pays on smaller grids than stride 1."""
    rates = {"dense": 1e12, "full": 1e12, "masked": 5e11}
    profile = dict(device="a device", origin="made up", head_dim=64, bytes_per_s=1e15, flops_per_s={"float32": rates})
    path = tmp_path / "device.json"
    path.write_text(json.dumps(profile))
    options = dict(heads=2, head_dim=64, dtype=torch.float32, device=str(path))
    advice = advise((64, 64), 16, **options)
    assert advice.dense_seconds == pytest.approx(4 * 64 * 2 * 4096**2 / 1e12)
    assert advice.nearest.seconds < advice.wanted.seconds < advice.dense_seconds
    for choice in (advice.wanted, advice.nearest):
        at = choice.break_even
        smaller = tuple(round(n * 0.9) for n in at)
        assert predict(choice.pattern, at, **options) < predict(Dense(), at, **options)
        assert predict(choice.pattern, smaller, **options) >= predict(Dense(), smaller, **options)
    assert math.prod(advice.nearest.break_even) < math.prod(advice.wanted.break_even)
    text = str(advice)
    assert "predicted, not measured, for a device (made up):" in text
    assert f"faster than dense from about {'x'.join(map(str, advice.wanted.break_even))} tokens on" in text
    rates |= {"full": 1e6, "masked": 1e6}  # slower than dense at any size that is looked at
    path.write_text(json.dumps(profile))
    monkeypatch.setattr("vision_attn.kernels.advice.LARGEST", 2**14)
    slow = advise((64, 64), 16, **options)
    assert slow.wanted.break_even is None and "on no grid of these proportions" in str(slow)
    note = advise((64, 64), 16, head_dim=64, device=str(path)).note
    assert note == "the profile of a device has no rate for bfloat16, only for float32"


def test_json():
    advice = advise((256, 256), 80, heads=24)
    data = json.loads(json.dumps(advice.to_dict()))
    assert data["grid"] == [256, 256] and data["nearest"]["full"] == 1 and data["note"] is None
    assert Pattern.from_dict(data["nearest"]["pattern"]) == advice.nearest.pattern
    assert data["wanted"]["seconds"] == advice.wanted.seconds > data["nearest"]["seconds"] > 0
    assert json.dumps(advise((7, 7), 3, device="none.json").to_dict())


REFUSED = [
    (lambda: advise([64, 64], 7), TypeError, "tuple of ints"),
    (lambda: advise((64, 64), 65), ValueError, "window 65 is larger than the grid"),
    (lambda: advise((64, 64), (3, 3, 3)), ValueError, "3 entries but the grid has 2 axes"),
    (lambda: advise((64, 64), 7, tiles=(64, 48)), ValueError, r"two of 16, 32, 64 and 128.*got \(64, 48\)"),
    (lambda: advise((64, 64), 7, tiles=64), ValueError, "tiles must be two of"),
]


@pytest.mark.parametrize("make, kind, words", REFUSED)
def test_refusals_say_what_to_do(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no profile of this machine
    argv = ["explain", "neighborhood", "--grid", "256,256", "--window", "80", "--advise"]
    assert main([*argv, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "tiled" in out and "window 80x80, stride 16x16" in out and "no predicted times: this machine has no" in out
    assert main([*argv, "--device", "cuda", "--dtype", "bfloat16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["used"] and data["advice"]["nearest"]["pattern"]["stride"] == [16, 16]
    assert data["advice"]["nearest"]["seconds"] > 0
    for wrong in (["--stride", "2"], ["--causal", "true"]):
        assert main([*argv, *wrong]) == 2
        assert "neighborhood with --window only" in capsys.readouterr().err
    assert main(["explain", "dense", "--grid", "8,8", "--advise"]) == 2
