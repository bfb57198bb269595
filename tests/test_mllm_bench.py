"""`vision-attn bench mllm`: rows and files on a model of a few numbers; and the speeds, where asked for."""

import csv
import itertools
import json
import statistics
import threading

import pytest
import torch

pytest.importorskip("transformers")

from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.mllm import VAR, FastV, UniformPrune, attach, bench, prefill_flops  # noqa: E402
from vision_attn.mllm.registry import make  # noqa: E402

QUICK = "bench mllm --layers 3 --width 64 --rounds 2 --new-tokens 3 --threads 1".split()


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for _ in range(2):
        assert main([*QUICK, "--methods", "fastv,uniform", "--keep", "0.5,0.1", "--csv", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["what"] for row in rows] == [
        "stock",
        "all kept",
        "fastv 0.5",
        "fastv 0.1",
        "uniform 0.5",
        "uniform 0.1",
    ]
    stock, same, half, _, _, tenth = rows
    assert stock["prefill_speedup"] == stock["token_ratio"] == 1 and stock["kept"] == ""
    assert same["kept"] == same["visual"] == 576 and tenth["kept"] == 58 and half["kept"] == 288
    config = bench.scaled_llava(3, 64).config.get_text_config()
    wanted = prefill_flops(config, [640] * 3) / prefill_flops(config, [640] * 2 + [352])
    assert half["flops_speedup"] == pytest.approx(wanted, rel=1e-3)
    assert all(row["prefill_ms"] < row["first_ms"] and row["token_ms"] > 0 for row in rows)
    written = list(csv.DictReader(path.open()))
    assert len(written) == 2 * len(rows) and written[0]["what"] == "stock"


def test_new_tokens_are_made_in_turn(monkeypatch):
    """A clock that counts how often it is read: nobody else reads it while a token is made."""
    reads = itertools.count()
    monkeypatch.setattr(bench, "_now", lambda model: next(reads))
    model, before = bench.scaled_llava(4, 64), threading.active_count()
    ways = {"stock": ()} | {name: (make(name, **bench.SETTINGS.get(name, {})),) for name in ("gift", "pai", "var")}
    found = bench.side_by_side(model, bench.prompt(model, words=8), ways, 5)
    assert found == dict.fromkeys(ways, [1] * 5) and next(reads) == 2 * 4 * 6
    with pytest.raises(ValueError, match="find_sinks"):
        bench.side_by_side(model, bench.prompt(model, words=8), {**ways, "var": (VAR(),)}, 2)
    assert threading.active_count() == before


def test_what_cannot_be_timed_is_said(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for wrong, said in (
        (["--methods", "fastvv"], "did you mean 'fastv'?"),
        (["--keep", "half"], "give shares such as 0.5,0.2"),
        (["--keep", "2"], "keep is a share"),
        (["--width", "65"], "must be a multiple of 64"),
        (["--csv", str(other)], "has other columns"),
    ):
        assert main([*QUICK, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert other.read_text() == "a,b\n1,2\n"


def test_no_map_of_all_pairs(monkeypatch):
    """At 2048 tokens nothing as large as half a map of all pairs is made, dropping or not."""
    model = bench.scaled_llava(2, 64)
    inputs = bench.prompt(model, words=2048 - 576)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(tensor) and tensor.shape[-2:].numel() > largest and tensor.ndim > 2:
                    largest = tensor.shape[-2:].numel()
            return out

    with torch.no_grad(), attach(model, UniformPrune(keep=1.0), FastV(keep=0.5, layer=1)), Watch():
        model(**inputs, logits_to_keep=1)
    assert 2048 * 64 <= largest < 2048 * 2048 / 2


@pytest.mark.slow
def test_as_fast_as_counting_predicts():
    """Reading the prompt at keep 0.2 gains at least 0.8 of what FLOPs predict; attaching costs under 3 %."""
    torch.set_num_threads(1)
    model = bench.scaled_llava()
    ways = {"all": (UniformPrune(keep=1.0),), "uniform": (UniformPrune(keep=0.2),), "fastv": (FastV(keep=0.2),)}
    with torch.no_grad():
        rows = {row["what"]: row for row in bench.measure(model, bench.prompt(model), ways, rounds=7)}
    for name in ("uniform", "fastv"):
        assert rows[name]["prefill_speedup"] > 0.8 * rows[name]["flops_speedup"]
    assert statistics.median([rows["all"]["prefill_speedup"], 1]) > 0.97
