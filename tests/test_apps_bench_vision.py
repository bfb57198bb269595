"""`vision-attn bench vision`: wrong layers get no time, memory grows linearly, files are whole."""

import json
from functools import partial

import pytest
import torch

from vision_attn import bench
from vision_attn.apps.cli import main
from vision_attn.kernels.bench.timing import peak_bytes

QUICK = ["bench", "vision", "--sides", "6,9", "--rounds", "1", "--threads", "1", "--layers", "neighborhood 7x7"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Wrong(torch.nn.Module):
    """A layer whose kernel forgets a hundredth."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.fused_attn, self.window = True, 3
        self.layer = torch.nn.Linear(dim, dim)

    def forward(self, x):
        return self.layer(x) * (1.01 if self.fused_attn else 1.0)


def test_a_wrong_layer_gets_no_time(monkeypatch, capsys):
    known = {"dense": bench.Dense, "wrong": Wrong}
    monkeypatch.setattr(bench, "layers", lambda: known)
    _, wrong, published = next(bench.run([6], rounds=1))
    assert (wrong["status"], wrong["ms"], published["status"]) == ("wrong", "", "ok")
    assert main(["bench", "vision", "--sides", "6", "--rounds", "1"]) == 1
    assert "wrong results, not timed: wrong on 6" in capsys.readouterr().err


def test_a_form_that_copies_too_much_is_not_run(monkeypatch):
    monkeypatch.setattr(bench, "MOST_BYTES", 1000)
    rows = next(bench.run([6], ["bi-level, 4 of 49 regions"], rounds=1))
    assert [row["status"] for row in rows] == ["ok", "ok", "too large"]
    assert "too large" in bench.as_text(rows) and rows[2]["speedup"] == ""


@pytest.mark.parametrize("name", [name for name in bench.layers() if name not in ("dense", "linear gla")])
def test_memory_is_linear_in_tokens(name):
    """Four times the tokens take about four times the memory; a matrix of weights would take sixteen, up from 39 MiB
    a head. Peaks below 16 MiB are compared as 16: there the allocator's habits are larger than the layer."""
    layer = bench.layers()[name](bench.DIM, bench.HEADS).eval()
    peaks = []
    with torch.no_grad():
        for side in (56, 112):
            call = partial(layer, torch.randn(1, side, side, bench.DIM))
            call()
            peaks.append(peak_bytes(call, "cpu"))
    if peaks[0] is None:
        pytest.skip("this system does not tell peak memory")
    assert peaks[1] < 5.5 * max(peaks[0], 16 * 2**20)


def test_rows_go_to_files(tmp_path, capsys):
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    assert main([*QUICK, "--csv", str(table), "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "neighborhood 7x7, as published" in out and str(picture) in out
    rows = bench.read_csv(table)
    assert [(r["layer"], r["form"], r["side"]) for r in rows[:3]] == [
        ("dense", "", "6"),
        ("neighborhood 7x7", "", "6"),
        ("neighborhood 7x7", "published", "6"),
    ]
    assert all(float(r["ms_min"]) <= float(r["ms"]) <= float(r["ms_max"]) for r in rows)
    text = bench.bench_table(table)
    assert "neighborhood 7x7, as published" in text and rows[0]["device_name"] in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main([*QUICK, "--csv", str(table)]) == 0 and len(bench.read_csv(table)) == 2 * len(rows)
    assert main([*QUICK, "-o", str(picture)]) == 1 and "--overwrite" in capsys.readouterr().err


def test_json(capsys):
    assert main([*QUICK, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in answer["rows"]} == {"dense", "neighborhood 7x7"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sides", "14,x"], "got '14,x'"),
        (["--sides", "1"], "give whole numbers from 2 to 4096"),
        (["--layers", "nope"], "unknown 'nope'. Allowed: dense"),
        (["-o", "a.txt"], "must end in .png"),
        (["--rounds", "0"], "--rounds: got 0; give a whole number, at least 1."),
    ],
)
def test_bad_options(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "vision", *options]) == 2
    assert message in capsys.readouterr().err


def test_another_csv_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert main([*QUICK, "--csv", str(tmp_path / "a.csv")]) == 2
    assert "other columns" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == "a,b\n1,2\n"


def test_growth_is_the_slope():
    rows = [
        {"layer": "a", "form": "", "status": "ok", "side": s, "tokens": s * s, "ms": s**2 / 7, "peak_mb": s**4}
        for s in (14, 56, 112, 224)
    ]
    (found,) = bench.growth(rows)
    assert found["time"] == pytest.approx(1) and found["memory"] == pytest.approx(2)
    assert "memory tokens ** 2.00" in bench.growth_text(rows)
