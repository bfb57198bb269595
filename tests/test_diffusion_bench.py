"""`vision-attn bench diffusion`: rows, fits and files, on models of a few numbers; and the speeds, where asked for."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Neighborhood, Radial, attach  # noqa: E402
from vision_attn.apps import bench_diffusion  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.diffusion import bench, timings  # noqa: E402
from vision_attn.diffusion.installed import holders  # noqa: E402

QUICK = ["bench", "diffusion", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    from vision_attn.diffusion.loading import load

    pipe = load(device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attention(power: float, frames=(1, 2, 4, 8), what="x"):
    rows = []
    for times in frames:
        grid = (5 * times, 6, 6)
        tokens = math.prod(grid)
        rows.append(timings.timed("attention", "", grid, what, None, [tokens**power / 1e6], [1.0]))
    return rows


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_the_fit_finds_the_power(power):
    (found,) = timings.fits(attention(power))
    assert found["power"] == pytest.approx(power, abs=2e-3)
    tokens, frames = np.array([180, 360, 720, 1440.0]), np.array([5, 10, 20, 40.0])
    for name, curve in (("n_log_n", tokens * np.log(tokens)), ("n_log_frames", tokens * np.log(frames))):
        assert found[name] == pytest.approx(np.polyfit(np.log(tokens), np.log(curve), 1)[0], abs=1e-3)
    assert f"** {power:.2f}" in timings.fits_text(attention(power))
    assert "n log n is ** 1.16, n log(frames) ** 1.40" in timings.fits_text(attention(power))


def test_the_fit_says_how_the_pairs_grow():
    rows, window = attention(1.0) + attention(1.0, what="y"), Neighborhood(window=(5, 3, 3))
    for row in rows[4:]:
        row["density"] = window.density(tuple(map(int, row["grid"].split("x"))))
    assert [f["pairs"] for f in timings.fits(rows)] == [2.0, 1.0]
    assert "pairs ** 2.00" in timings.fits_text(rows) and "pairs ** 1.00" in timings.fits_text(rows)


def test_fits_are_per_way_and_frame_size_and_need_two_lengths():
    rows = attention(1.0) + attention(2.0, what="y") + attention(1.0, (1,), "z")
    rows.append(timings.timed("clip", "", (5, 6, 6), "x", None, [1.0], [1.0]))
    rows.append(timings.timed("attention", "", (5, 9, 9), "x", None, [1.0], [1.0]))
    assert [(f["what"], f["power"]) for f in timings.fits(rows)] == [("x", 1.0), ("y", 2.0)]
    assert timings.fits_text([]) == ""


def test_speed_ups_are_medians_of_the_ratios_in_turn():
    row = timings.timed("clip", "1x", (5, 6, 6), "w", Neighborhood((3, 99, 99)), [1.0, 2.0, 4.0], [3.0, 4.0, 40.0])
    assert (row["ms"], row["ms_min"], row["ms_max"]) == (2000, 1000, 4000)
    assert (row["speedup"], row["speedup_min"], row["speedup_max"]) == (3, 2, 10)
    assert row["density"] == 0.6 and "3, 6, 6" in row["pattern"]


def test_attention_is_what_attend_computes(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "attend", lambda q, k, v, pattern: seen.append((tuple(q.shape), pattern)))
    (rows,) = bench.growth([(3, 4, 5)], rounds=2, heads=2, head_dim=8, tell=str)
    assert [row["what"] for row in rows] == ["dense", "radial", "radial, thinned", "neighborhood"]
    patterns = {pattern for _, pattern in seen}
    assert patterns == {bench.RADIAL, bench.THINNED, Neighborhood((3, 4, 5))}
    assert {shape for shape, _ in seen} == {(1, 3, 4, 5, 2, 8)}
    assert rows[0]["speedup"] == 1.0 and rows[1]["density"] == round(bench.RADIAL.density((3, 4, 5)), 4)


def test_clips_are_drawn_with_what_the_row_says(pipe, monkeypatch):
    calls = []

    class Spy:
        def __init__(self, *given):
            calls.append(given[1])
            self.run = attach(*given)

        def __enter__(self):
            return self.run

        def __exit__(self, *exception):
            self.run.detach()

    monkeypatch.setattr(bench, "attach", Spy)
    monkeypatch.setitem(bench.CLIPS, "small", (5, 48))
    (rows,) = bench.clips(pipe, ["small"], steps=1, count=2, tell=str)
    assert [row["what"] for row in rows] == ["dense", "radial", "neighborhood"]
    assert calls.count(bench.RADIAL) == 3 and calls.count(Neighborhood((2, 6, 6))) == 3  # a warm-up and two clips
    for row in rows:
        assert 0 <= row["agreement"] <= 1 and row["count_error"] >= 0 and (row["steps"], row["clips"]) == (1, 2)
    assert not holders(pipe.transformer)


def test_overhead_rows(pipe):
    (rows,) = bench.overhead(pipe.transformer, [(2, 3, 3)], rounds=2, tell=str)
    assert [row["what"] for row in rows] == ["untouched", "full window", "window one frame shorter"]
    assert rows[1]["density"] == 1.0 and rows[2]["density"] == 0.5
    assert not holders(pipe.transformer)


def test_freeswim_with_and_without_cache(pipe, monkeypatch):
    small = np.random.default_rng(0).random((5, 48, 48, 3), dtype=np.float32)
    monkeypatch.setattr(bench, "_clip", lambda *given: small)
    given = []
    from vision_attn.diffusion import upscale

    plain = upscale.upscale_video

    def spy(*args, **kwargs):
        given.append((kwargs["cache_steps"], args[2:]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(upscale, "upscale_video", spy)
    (rows,) = bench.freeswim(pipe, side=96, steps=2, every=(2,), tell=str)
    assert [row["what"] for row in rows] == ["FreeSwim", "FreeSwim, cache_steps=2"]
    assert given[1:] == [(None, (96, 96)), (2, (96, 96))]
    assert rows[0]["size"] == "2x-large" and rows[1]["agreement"] != ""


def test_a_large_transformer_and_a_pattern_that_does_not_fit(monkeypatch):
    small = dict(MODELS["WanTransformer3DModel"].config)
    ways = {"dense": None, "radial": Radial(block=2, thin=4), "broken": Radial(rule="block", block=7, thin=0)}
    monkeypatch.setattr(bench, "WAN_PATTERNS", ways)
    (rows,) = bench.wan([(3, 4, 5)], rounds=1, device="cpu", dtype=torch.bfloat16, config=small, tell=str)
    assert [bool(row["ms"]) for row in rows] == [True, True, False]
    assert "random weights, bfloat16" in rows[0]["note"] and "diagonal" in rows[2]["note"]
    assert rows[2]["note"] in timings.as_text(rows)


def test_the_wan_sizes_are_those_of_the_checkpoint():
    from diffusers import WanTransformer3DModel

    sizes = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = WanTransformer3DModel(**{**bench.WAN, "num_layers": layers})
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[0] + 29 * (sizes[1] - sizes[0]) == pytest.approx(1.42e9, rel=0.01)
    for grid in bench.WAN_GRIDS:
        for pattern in bench.WAN_PATTERNS.values():
            if pattern is not None:
                timings.cut(pattern, grid).check(grid)


def rows_of(*args):
    yield attention(1.0)[:2]
    yield attention(1.0)[2:]


def test_rows_go_to_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_diffusion, "measured", rows_of)
    table = tmp_path / "a.csv"
    assert main([*QUICK, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    assert "time ~ tokens ** 1.00" in out and str(table) in out
    rows = timings.read_csv(table)
    assert [row["tokens"] for row in rows] == ["180", "360", "720", "1440"] and timings.fits(rows)[0]["power"] == 1
    assert main([*QUICK, "--csv", str(table), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4
    assert len(timings.read_csv(table)) == 8
    table.write_text("a,b\n")
    assert main([*QUICK, "--csv", str(table)]) == 2
    assert "other columns" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_rows(tmp_path, capsys, monkeypatch):
    def stop(*args):
        yield attention(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_diffusion, "measured", stop)
    assert main([*QUICK, "--csv", str(tmp_path / "a.csv")]) == 130
    assert "4 rows were measured, kept in" in capsys.readouterr().err
    assert len(timings.read_csv(tmp_path / "a.csv")) == 4 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--parts", "speed"], "Allowed: clips, growth, overhead, freeswim, wan"),
        (["--sizes", "9x"], "Allowed: 1x, 2x-long"),
        (["--device", "cpu", "--parts", "wan"], "where there is a CUDA GPU"),
    ],
)
def test_wrong_options(wrong, message, capsys):
    assert main([*QUICK, *wrong]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_rows_that_ship_show_what_is_said_of_them():
    rows = timings.read_csv(bench.RESULTS)
    faster = {(r["part"], r["size"] or r["grid"], r["what"]): float(r["speedup"]) for r in rows}
    large = "4x-long-4x-large"
    assert faster["clip", large, "radial"] >= 1.5 and faster["clip", large, "neighborhood"] >= 1.5
    assert faster["freeswim", "4x-large", "FreeSwim, cache_steps=2"] >= 1.8
    assert all(faster["overhead", grid, "full window"] > 1 / 1.03 for grid in ("5x6x6", "5x24x24"))
    power = {(f["frame"], f["what"]): f for f in timings.fits(rows)}
    trained, thinned = power["6x6", "radial"], power["24x24", "radial, thinned"]
    assert trained["power"] <= trained["n_log_n"] and thinned["power"] <= thinned["n_log_frames"]
    assert thinned["power"] == pytest.approx(
        thinned["pairs"], abs=0.03
    )  # on large frames it is what is kept that grows


@pytest.mark.slow
def test_radial_and_a_window_are_faster_where_attention_is_the_cost(pipe):
    """11520 tokens: attention is most of a call."""
    torch.set_num_threads(1)
    call = bench._call(pipe.transformer, (20, 24, 24), torch.float32, "cpu")
    times = {}
    with torch.no_grad():
        for name, pattern in (("dense", None), ("radial", bench.RADIAL), ("window", bench.WINDOW)):
            with bench._attached(pipe.transformer, pattern, (20, 24, 24)):
                call()
                times[name] = min(bench.clock(call, "cpu")[1] for _ in range(2))
    assert times["dense"] > 1.5 * times["radial"] and times["dense"] > 2 * times["window"]
