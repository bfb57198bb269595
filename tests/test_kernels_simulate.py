"""The simulator: published bounds to their last digit, times that follow from the rates, profiles, and the command."""

import json
import math

import pytest
import torch

from vision_attn import BlockList, Dense, Neighborhood, PerHead, Radial
from vision_attn.apps.cli import main
from vision_attn.kernels.bench import measure as measuring
from vision_attn.kernels.patterns import Circle, LengthDecay
from vision_attn.kernels.rates import PROFILES, load_profile
from vision_attn.kernels.simulate import gathered_pairs, predict, simulate
from vision_attn.kernels.tiles import best_bound, bound

# Grid, window, stride; then 1 / density, and for 64 x 64, 64 x 128, 128 x 64 and 128 x 128 queries x keys the bounds
# aligned / unaligned, in brackets the share of full tiles of the unaligned ones.
TABLE = """
256,256  80        1       10.24  8.96/8.96(76) 8.42/8.42 8.42/8.42(66) 7.91/8.33(64)
256,256  80        16      10.24  10.24/10.24(100) 10.24/10.24 10.24/10.24 10.24/10.24(100)
256,256  79        1       10.50  8.96/8.96 8.42/8.42 8.42/8.42 7.91/8.33
30,48,80 18,24,24  1       11.11  7.39/7.79(46) 6.69/7.53 6.85/7.20(38) 6.26/6.99
30,48,80 18,24,24  16,8,8  11.11  11.11/11.11(100) 11.11/11.11 11.11/11.11 11.11/11.11(100)
30,48,80 18,24,24  6,8,8   11.11  11.11/11.11(100) 11.11/11.11 11.11/11.11 11.11/11.11(100)
30,48,80 17,23,25  1       11.79  7.52/8.24 6.89/8.00 6.89/7.54 6.34/7.36
21,45,80 11,23,41  1       7.29   4.13/5.02(17) 3.79/4.94 3.79/4.52(24) 3.47/4.42(15)
21,45,80 12,24,40  1       6.56   3.99/4.79(58) 3.61/4.71(56) 3.73/4.39(48) 3.38/4.25(44)
21,45,80 12,24,40  4,8,8   6.56   5.61/6.15(100) 5.40/6.15(100) 5.32/5.87(100) 5.10/5.87(100)
21,45,80 9,15,24   1       23.3   11.1/13.1 10.1/12.7 10.1/11.3 8.6/10.8
56,56    7         1       64.0   7.1/13.2(0) 5.4/12.3 5.5/8.6 4.4/7.8
56,56    13        1       18.6   6.65/7.15(0) 4.86/6.60 4.86/5.20 3.55/4.76
64,64    13        1       24.2   8.46/9.85(0) 6.65/9.14 6.65/6.92 5.22/6.74
32768    2048      1       16.0   15.54/15.54 15.11/15.11 15.11/15.11 15.11/15.11
32768    2048      256     16.0   16.0/16.0 16.0/16.0 16.0/16.0 16.0/16.0
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


def ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def assert_prints(value: float, printed: str) -> None:
    """Equal to all digits that are printed; a half may go up (12.25 is printed as 12.3)."""
    half = 0.5 * 10 ** -len(printed.partition(".")[2])
    assert value == pytest.approx(float(printed), abs=half * (1 + 1e-9)), printed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_published_bounds(row):
    grid, window, stride = map(ints, row[:3])
    several = len(grid) > 1 and len(window) == 1
    pattern = Neighborhood(window[0] if several else window, stride[0] if len(stride) == 1 else stride)
    answer = simulate(pattern, grid)
    assert_prints(answer.bound, row[3])
    tiles = {(t.queries, t.keys, t.aligned): t for t in answer.tiles}
    assert len(tiles) == 8
    for entry, size in zip(row[4:], ((64, 64), (64, 128), (128, 64), (128, 128)), strict=True):
        aligned, _, rest = entry.partition("/")
        unaligned, _, full = rest.rstrip(")").partition("(")
        assert_prints(tiles[(*size, True)].bound, aligned)
        assert_prints(tiles[(*size, False)].bound, unaligned)
        assert not full or f"{tiles[(*size, False)].full:.0%}" == f"{full}%"


def test_of_equal_bounds_the_tiles_with_most_full_ones_are_taken():
    pattern, grid = Neighborhood(10), (21, 22)
    assert best_bound(pattern, grid, 16, 16)[1:] == ((8, 2), (4, 4))
    best, other = (bound(pattern, grid, queries, (4, 4)) for queries in ((8, 2), (2, 8)))
    assert best[0] == other[0] and best[1] > other[1]


def test_bounds_are_those_of_the_tiles_named():
    pattern, grid = Neighborhood((9, 15, 24), dilation=(2, 1, 1)), (21, 45, 80)
    for t in simulate(pattern, grid).tiles:
        assert math.prod(t.query_tile) == t.queries and math.prod(t.key_tile) == t.keys
        assert bound(pattern, grid, t.query_tile, t.key_tile, t.aligned) == (t.bound, t.full)
        assert best_bound(pattern, grid, t.queries, t.keys, t.aligned)[0] == t.bound


@pytest.mark.parametrize("pattern, grid", [(Neighborhood(80), (256, 256)), (Neighborhood((18, 24, 24)), (30, 48, 80))])
@pytest.mark.parametrize("strided", [False, True])
def test_h100_profile_fits_the_published_kernels_it_was_taken_from(pattern, grid, strided):
    """Kernel times without copies, aligned tiles of 128 x 128, and dense; the profile has two rates for all four."""
    published = {(256, 256): (97.4, 16.20, 7.91), (30, 48, 80): (283.3, 79.04, 23.36)}[grid]
    answer = simulate(pattern, grid, heads=24)
    assert answer.seconds["dense"] * 1e3 == pytest.approx(published[0], rel=0.04)
    tile = (16, 8) if len(grid) == 2 else (2, 8, 8)
    if strided:
        pattern = Neighborhood(pattern.window, stride=16 if len(grid) == 2 else (16, 8, 8))
    by_tiles, full = bound(pattern, grid, tile, tile, aligned=True)
    rates = load_profile("h100").flops_per_s["bfloat16"]
    flops = 4 * math.prod(grid) ** 2 * 128 * 24 / by_tiles
    taken = flops * (full / rates["full"] + (1 - full) / rates["masked"])
    assert taken * 1e3 == pytest.approx(published[2 if strided else 1], rel=0.04)
    if strided:
        same = next(
            t for t in simulate(pattern, grid, heads=24).tiles if (t.queries, t.keys, t.aligned) == (128, 128, 0)
        )
        assert same.seconds == pytest.approx(taken)


def test_bytes():
    answer = simulate(Neighborhood(80, stride=16), (256, 256), heads=24)
    tokens = 256 * 256 * 24 * 128 * 2
    assert answer.inputs_outputs == 4 * tokens and answer.copies == 8 * tokens
    tile = answer.tiles[-1]
    # every query tile of 128 reads the keys and values of its window of 80 x 80
    assert (tile.queries, tile.aligned, tile.loads) == (128, False, 65536 // 128 * 6400 * 2 * 128 * 2 * 24)
    aligned = answer.tiles[-2]
    assert aligned.seconds - tile.seconds == pytest.approx(answer.copies / answer.profile.bytes_per_s)


def test_time_is_the_slowest_of_arithmetic_cache_and_memory(tmp_path):
    def seconds(**changes):
        rates = {"dense": 1.0, "full": 1.0, "masked": 1.0}
        data = {"device": "d", "origin": "o", "head_dim": 16, "bytes_per_s": 1e30, "flops_per_s": {"float32": rates}}
        path = tmp_path / "p.json"
        path.write_text(json.dumps(data | changes))
        answer = simulate(Neighborhood(8, 8), (16, 16), head_dim=16, dtype=torch.float32, device=path)
        return answer.tiles[-1].seconds, answer.seconds["dense"]

    work = 4 * 16 * 256 * 128  # tiles of 128 queries and keys hold two windows: twice the pairs
    assert seconds() == (pytest.approx(work), pytest.approx(2 * work))
    assert seconds(bytes_per_s=1e-3)[0] == pytest.approx(4 * 256 * 16 * 4 / 1e-3)
    assert seconds(cache_bytes_per_s=1e-3)[0] == pytest.approx(2 * 128 * 2 * 16 * 4 / 1e-3)


def test_lists_and_shapes_inside_boxes():
    grid = (18, 48, 80)
    answer = simulate(Radial(0.2), grid, heads=12)
    lists = Radial(0.2).lists(grid)
    (tile,) = answer.tiles
    assert (tile.queries, tile.keys) == lists.block and answer.copies == 0
    assert tile.bound == pytest.approx(math.prod(grid) ** 2 / (int(lists.count.sum()) * math.prod(lists.block)))
    assert tile.full == pytest.approx(int(lists.full_count.sum()) / int(lists.count.sum()))
    assert tile.bound < answer.bound == pytest.approx(1 / 0.269, rel=0.01)
    assert all(t.full == 0 for t in simulate(Circle(16), (64, 64)).tiles)  # the corners of a box are outside the disc
    assert all(t.full == 0 for t in simulate(LengthDecay(4), (9, 8, 8)).tiles)  # every score is changed
    empty = simulate(BlockList.from_mask(torch.zeros(2, 2) > 0, 8), (16,))
    assert math.isinf(empty.bound) and json.loads(json.dumps(empty.to_dict(), allow_nan=False))["bound"] is None
    with pytest.raises(TypeError, match="one by one"):
        simulate(PerHead(((1, Dense()), (1, Neighborhood(3)))), (8, 8))


def test_predict():
    assert predict(Dense(), (128, 128), heads=8) == simulate(Neighborhood(3), (128, 128), heads=8).seconds["dense"]
    answer = simulate(Neighborhood(31), (128, 128), heads=8)
    assert predict(Neighborhood(31), (128, 128), heads=8) == min(t.seconds for t in answer.tiles) == answer.best[1]
    own = {"device": "cpu-example", "dtype": torch.float32, "head_dim": 64}
    answer = simulate(Neighborhood(13), (64, 64), **own)
    assert answer.best[1] == min(answer.seconds[way] for way in ("tiled", "cpu")) < answer.seconds["dense"]
    assert simulate(Dense(), (64, 64), **own).seconds == {"dense": predict(Dense(), (64, 64), **own)}
    with pytest.raises(ValueError, match="no rate for float32, only bfloat16, float16"):
        predict(Dense(), (8, 8), dtype=torch.float32)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.json")))
def test_shipped_profiles_name_their_sources(name):
    profile = load_profile(name)
    assert "measured" in profile.origin and profile.device
    assert profile.sources
    if name == "h100":
        assert "not measured by us" in profile.origin
        assert set(profile.sources) == {"bytes_per_s", "cache_bytes_per_s", "dense", "full", "masked"}


def test_profiles_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="simulate --measure"):
        load_profile("here")
    with pytest.raises(ValueError, match="no device profile 'a100'; allowed: .*h100"):
        load_profile("a100")
    for text in ("{}", "[1]", "no json", json.dumps(json.loads((PROFILES / "h100.json").read_text()) | {"x": 1})):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError, match="not a device profile"):
            load_profile(tmp_path / "p.json")
    wrong = json.loads((PROFILES / "h100.json").read_text()) | {"bytes_per_s": 0}
    (tmp_path / "p.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="above 0"):
        load_profile(tmp_path / "p.json")


def test_simulate_refuses():
    for options in ({"heads": 0}, {"head_dim": 1.5}):
        with pytest.raises(ValueError, match="at least 1"):
            simulate(Dense(), (8, 8), **options)
    with pytest.raises(ValueError, match="larger than the grid"):
        simulate(Neighborhood(9), (8, 8))
    with pytest.raises(TypeError, match="pattern must be"):
        simulate("dense", (8, 8))


def test_measuring_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(measuring.SAMPLES, "cpu", (torch.float32, 2, 16, 16, 5, None, 256))
    monkeypatch.setitem(measuring.COPY_BYTES, "cpu", 2**16)
    argv = ["simulate", "--measure", "--grid", "32,32", "--window", "5", "--head-dim", "16", "--device", "here"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out and "times faster than dense with" in out
    profile = load_profile("here")
    assert {"dense", "tiled"} <= profile.flops_per_s["float32"].keys() and profile.bytes_per_s > 1e6
    mine = tmp_path / "mine.json"
    assert main(["simulate", "--measure", "--device", str(mine), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"profile": str(mine)} and load_profile(mine).head_dim == 16
    assert main(["simulate", "--measure", "--device", str(mine)]) == 1
    assert "already there" in capsys.readouterr().err


def test_rates_of_full_and_masked_tiles_are_told_apart():
    """What a GPU is measured by: a machine with two rates gives them back."""
    strided, sliding, grid = Neighborhood(80, 16), Neighborhood(80), (256, 256)

    def rate(pattern, grid, pairs):
        by_tiles, queries, keys = best_bound(pattern, grid, 128, 128)
        full = bound(pattern, grid, queries, keys)[1]
        assert pairs == pytest.approx(math.prod(grid) ** 2 / by_tiles)
        return 1 / (full / 6.0 + (1 - full) / 2.0)

    assert measuring.tile_rates(rate, grid, strided, sliding) == pytest.approx({"full": 6.0, "masked": 2.0})


def test_gathered_pairs_count_what_tiled_gathers():
    from vision_attn.kernels.backends import tiled
    from vision_attn.kernels.problem import Problem
    from vision_attn.kernels.tiles import CHUNK_COST, KEY_COST, TILE_COST

    pattern, grid = Neighborhood(13), (40, 40)
    chunks = list(tiled._make(Problem(pattern, grid), torch.device("cpu")))
    pairs = sum(c.query.numel() * c.key.shape[1] for c in chunks)
    keys, tiles = sum(c.key.numel() for c in chunks), sum(len(c.query) for c in chunks)
    kinds = len({(c.query.shape[1], c.key.shape[1]) for c in chunks})
    extra = gathered_pairs(pattern, grid) - pairs - KEY_COST * keys - TILE_COST * tiles
    assert extra % CHUNK_COST == 0 and extra >= CHUNK_COST * kinds


def test_the_command(tmp_path, capsys):
    argv = ["simulate", "--grid", "30,48,80", "--window", "18,24,24", "--stride", "1"]
    picture = tmp_path / "bounds.png"
    assert main([*argv, "--heads", "24", "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    for part in ("at most 11.11 times", "7.39   41%", "7.79   46%", "6.85", "6.26", "2.83 GB", "5.66 GB", "unaligned"):
        assert part in out
    assert "predicted, not measured, for NVIDIA H100" in out and "published rates, not measured by us" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and out.endswith("bounds.png\n")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True and len(found["tiles"]) == 8 and found["dtype"] == "bfloat16"
    assert found["profile"]["sources"]["masked"]
    assert main([*argv, "--dtype", "float32"]) == 0
    assert "no rate for float32" in capsys.readouterr().out
    assert main(["simulate", "--pattern", "radial", "--decay", "0.2", "--grid", "18,48,80", "--head-dim", "64"]) == 0
    out = capsys.readouterr().out
    assert "listed" in out and "taken at head_dim 128, not 64" in out


@pytest.mark.parametrize(
    "argv, parts",
    [
        ([], ["nothing to do", "--grid 30,48,80"]),
        (["--grid", "8,8"], ["neighborhood needs --window"]),
        (["--grid", "8,8", "--window", "9"], ["window 9", "at most 8"]),
        (["--grid", "8,8", "--decay", "1"], ["--decay belongs to radial"]),
        (["--grid", "8,8", "--window", "3", "--device", "a100"], ["no device profile 'a100'", "h100", "here"]),
        (["--grid", "8,8", "--window", "3", "-o", "{out}/x.txt"], ["'x.txt'", ".png"]),
        (["--measure", "-o", "{out}/x.png"], ["give --grid"]),
        (["--grid", "8,8", "--window", "3", "--dtype", "int8"], ["--dtype", "'int8'"]),
    ],
)
def test_usage(argv, parts, tmp_path, capsys):
    assert main(["simulate", *(entry.format(out=tmp_path) for entry in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 2 and all(part in err for part in parts)
    assert list(tmp_path.iterdir()) == []
