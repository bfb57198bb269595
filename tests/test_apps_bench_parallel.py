"""`vision-attn bench parallel`: bytes that processes received are those of the formula, and the results are equal."""

import csv
import json

from vision_attn.apps.cli import main
from vision_attn.kernels.bench import parallel


def test_measured_bytes_are_the_formula():
    rows = parallel.measure("strong", 2, (8, 32), window=5, heads=4, head_dim=8, rounds=1)
    assert {row["way"] for row in rows} == {"halo", "all-gather", "ulysses"}
    for row in rows:
        assert row["received"] == row["predicted"] > 0 and row["difference"] < 1e-5 and row["ms"] > 0, row
    halo = next(row for row in rows if row["way"] == "halo")
    assert halo["received"] == 2 * 4 * 8 * 4 * 8 * 2  # keys and values, heads, dims, bytes, rows, columns


def test_the_rows_that_are_kept():
    with open(parallel.RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    ways = {row["way"]: row for row in rows if row["scaling"] == "strong"}
    assert all(int(row["received"]) == int(row["predicted"]) for row in rows)
    assert int(ways["halo"]["received"]) <= 0.1 * int(ways["all-gather"]["received"])
    assert float(ways["all-gather"]["ms"]) >= 1.5 * float(ways["halo"]["ms"])
    weak = [row for row in rows if row["scaling"] == "weak" and row["way"] in ("one process", "halo")]
    assert [int(row["ranks"]) for row in weak] == [1, 2, 4]


def test_the_command(tmp_path, capsys, monkeypatch):
    row = {
        "scaling": "weak", "ranks": 1, "grid": "64x128", "axis": 1, "window": 13, "heads": 4, "head_dim": 64,
        "way": "one process", "received": 0, "predicted": 0, "ms": 1.0, "ms_min": 1.0, "ms_max": 1.0, "difference": 0.0,
        "cores": 2, "date": "2026-01-01",
    }  # fmt: skip
    monkeypatch.setattr(parallel, "measure", lambda *problem, rounds: [row])
    path = tmp_path / "p.csv"
    command = ["bench", "parallel", "--ranks", "1", "--csv", str(path)]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [row]
    assert path.read_text().splitlines()[0] == ",".join(parallel.COLUMNS)
    assert main(command) == 1  # it is there already
    assert main(["bench", "parallel", "--ranks", "0"]) == 2
    assert "from 1 to 64" in capsys.readouterr().err
    row["difference"] = 0.1
    assert main(["bench", "parallel", "--ranks", "1"]) == 1
    assert "one process on 1" in capsys.readouterr().err
