"""Job files of every kind are read, and what is wrong in them is named by row and column before anything runs."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_attn.apps.batching import items, rows
from vision_attn.apps.batching.tasks import TASKS
from vision_attn.apps.cli import main

OK = '{"prompt": "a red circle"}\n'
ASK = '"task": "ask", "image": "example:1", "question": "is there a red circle in the image?"'


def row(**values):
    return json.dumps({"prompt": "a red circle", **values}) + "\n"


# What is in the file, by its ending; the row and the column that the message names; what else it says.
MALFORMED = {
    # JSONL that is none
    "broken json": (".jsonl", OK + '{"prompt": \n', 2, "12", "no JSON"),
    "single quotes": (".jsonl", "{'prompt': 'a red circle'}\n", 1, "2", "no JSON"),
    "two objects in a line": (".jsonl", OK.strip() + OK, 1, "27", "Extra data"),
    "comma at the end": (".jsonl", '{"prompt": "a",}\n', 1, "16", "no JSON"),
    "a list": (".jsonl", OK + '["a red circle"]\n', 2, "1", "write an object"),
    "a word": (".jsonl", OK + "true\n", 2, "1", "got true"),
    "deep nesting": (".jsonl", "[" * 100_000 + "\n", 1, "1", "too large"),
    "endless number": (".jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}\n", 1, "1", "too large"),
    "key twice": (".jsonl", '{"prompt": "a", "prompt": "b"}\n', 1, "prompt", "is there twice"),
    "key twice, with a dash": (".jsonl", '{"prompt": "a", "top-k": 1, "top_k": 1}', 1, "top_k", "is there twice"),
    "half a character": (".jsonl", '{"prompt": "a \\ud800"}\n', 1, "prompt", "surrogate"),
    # CSV that is none
    "csv without names": (".csv", "a red circle\na blue square\n", 1, "a red circle", "unknown column"),
    "csv name twice": (".csv", "prompt,prompt\na,b\n", 0, "prompt", "is there twice"),
    "csv name missing": (".csv", "prompt,,seed\na,b,1\n", 0, "2", "has no name"),
    "csv cell too many": (".csv", "prompt,seed\na,1\na red circle, moving,2\n", 2, "3", "3 cells under 2 names"),
    "csv cell missing": (".csv", "prompt,seed,steps\na red circle,2\n", 1, "steps", "ends after 2 of 3"),
    "csv quote open": (".csv", 'prompt,seed\n"a red circle,2\n', 1, "1", "no CSV"),
    "csv of semicolons": (".csv", "prompt;seed\na;1\n", 1, "prompt;seed", "separated by commas?"),
    "csv null byte": (".csv", "prompt,seed\na\0b,x\n", 1, "seed", "got x; give a whole number"),
    # Columns
    "unknown column": (".jsonl", OK + row(sed=3), 2, "sed", "did you mean seed?"),
    "unknown column in csv": (".csv", "prompt,stepps\na,3\n", 1, "stepps", "did you mean steps?"),
    "column of another task": (".jsonl", row(question="what?"), 1, "question", "unknown column"),
    "empty column name": (".jsonl", '{"prompt": "a", "": 1}\n', 1, "", "unknown column"),
    "prompt missing": (".jsonl", OK + '{"seed": 3}\n', 2, "prompt", "generate needs it"),
    "prompt empty": (".jsonl", '{"prompt": "  "}\n', 1, "prompt", "is empty"),
    "prompt null": (".jsonl", '{"prompt": null}\n', 1, "prompt", "is empty"),
    "prompt a number": (".jsonl", '{"prompt": 5}\n', 1, "prompt", "text in quotes"),
    "prompt a list": (".jsonl", '{"prompt": ["a", "b"]}\n', 1, "prompt", "got a list"),
    "prompt an object": (".jsonl", '{"prompt": {"text": "a"}}\n', 1, "prompt", "got an object"),
    "unknown task": (".jsonl", row(task="generat"), 1, "task", "did you mean generate?"),
    "task a number": (".jsonl", row(task=1), 1, "task", "text in quotes"),
    "id with a path": (".jsonl", row(id="../../etc/passwd"), 1, "id", "letters, digits"),
    "id with a dot": (".jsonl", row(id="a.json"), 1, "id", "letters, digits"),
    "id too long": (".jsonl", row(id="a" * 101), 1, "id", "up to 100"),
    "id twice": (".jsonl", row(id="cat") + OK + row(id="cat"), 3, "id", "row 1"),
    "id twice but for case": (".jsonl", row(id="cat") + row(id="CAT"), 2, "id", "row 1"),
    "the same twice": (".jsonl", row(seed=1) + row(seed=1), 2, "prompt", "the same as row 1"),
    # Values
    "seed negative": (".jsonl", row(seed=-1), 1, "seed", "got -1; give a whole number, at least 0"),
    "seed too large": (".jsonl", row(seed=2**32), 1, "seed", "at most 4294967295"),
    "seed a fraction": (".jsonl", row(seed=1.5), 1, "seed", "got 1.5; give a whole number"),
    "seed true": (".jsonl", row(seed=True), 1, "seed", "got true; give a whole number"),
    "seed in words": (".csv", "prompt,seed\na,1\nb,two\n", 2, "seed", "got two; give a whole number"),
    "steps zero": (".jsonl", row(steps=0), 1, "steps", "got 0; give a whole number, at least 1"),
    "guidance nan": (".jsonl", '{"prompt": "a", "guidance": NaN}', 1, "guidance", "finite"),
    "guidance infinite": (".csv", "prompt,guidance\na,inf\n", 1, "guidance", "finite"),
    "guidance negative": (".jsonl", row(guidance=-1), 1, "guidance", "at least 0"),
    "height": (".jsonl", row(height=50), 1, "height", "multiple of 16"),
    "width in words": (".jsonl", row(width="wide"), 1, "width", "'wide'"),
    "frames": (".jsonl", OK + row(frames=16), 2, "frames", "4n+1"),
    "times and frames": (".jsonl", row(frames=17, times=2), 1, "times", "give one"),
    "extend alone": (".jsonl", row(extend="riflex"), 1, "extend", "goes with"),
    "extend unknown": (".jsonl", row(extend="rifflex", times=2), 1, "extend", "'rifflex'"),
    "attention unknown": (".jsonl", row(attention="radail"), 1, "attention", "did you mean radial"),
    "window missing": (".jsonl", row(attention="streaming"), 1, "window", "needs --window"),
    "window too large": (".jsonl", row(attention="neighborhood", window=[3, 99, 3]), 1, "window", "99"),
    "window in words": (".jsonl", row(attention="neighborhood", window="3,x,3"), 1, "window", "'3,x,3'"),
    "window nested": (".jsonl", row(attention="neighborhood", window=[[3], 3, 3]), 1, "window", "got"),
    "option of another attention": (".jsonl", row(attention="radial", window=3), 1, "window", "belongs to"),
    "dense steps of dense": (".jsonl", row(dense_steps=1), 1, "dense_steps", "needs a sparse attention"),
    "all steps dense": (".jsonl", row(attention="radial", steps=2, dense_steps=2), 1, "dense_steps", "leaves none"),
    "sink": (".jsonl", row(attention="streaming", window=4, sink="four"), 1, "sink", "'four'"),
    "preset unknown": (".jsonl", row(preset="radial/none"), 1, "preset", "radial/none"),
    "preset and attention": (".jsonl", row(preset="radial/wan2.1-14b", attention="radial"), 1, "preset", "brings"),
    "model not there": (".jsonl", row(model="./none"), 1, "model", "there is no folder"),
    "lora not there": (".jsonl", row(lora="none.safetensors"), 1, "lora", "No such file"),
    # Other tasks
    "upscale: strength": (".jsonl", row(task="upscale", strength=2), 1, "strength", "got 2; give a number, above 0"),
    "upscale: height alone": (".jsonl", row(task="upscale", height=96), 1, "width", "go together"),
    "upscale: times and size": (".jsonl", row(task="upscale", times=2, height=96, width=96), 1, "times", "give one"),
    "upscale: video not there": (".jsonl", row(task="upscale", video="none.mp4"), 1, "video", "No such file"),
    "upscale: no video": (".jsonl", row(task="upscale", video="text.txt"), 1, "video", "no video can be read"),
    "caption: no picture given": (".jsonl", '{"task": "caption"}', 1, "image", "caption needs it"),
    "caption: picture not there": (".jsonl", '{"task": "caption", "image": "none.png"}', 1, "image", "No such file"),
    "caption: picture a folder": (".jsonl", '{"task": "caption", "image": "."}', 1, "image", "is a folder"),
    "caption: no picture": (".jsonl", '{"task": "caption", "image": "text.txt"}', 1, "image", "is not a picture"),
    "caption: cut picture": (".jsonl", '{"task": "caption", "image": "cut.png"}', 1, "image", "broken or cut off"),
    "caption: example": (".jsonl", '{"task": "caption", "image": "example:x"}', 1, "image", "example:0"),
    "caption: null byte": (".jsonl", '{"task": "caption", "image": "a\\u0000b"}', 1, "image", "null byte"),
    "ask: no question": (".jsonl", '{"task": "ask", "image": "example:1"}', 1, "question", "ask needs it"),
    "ask: unknown prune": (".jsonl", "{" + ASK + ', "prune": "fastw"}', 1, "prune", "fastv"),
    "ask: a steering method at prune": (".jsonl", "{" + ASK + ', "prune": "vcd"}', 1, "prune", "belongs to"),
    "ask: keep alone": (".jsonl", "{" + ASK + ', "keep": 0.2}', 1, "keep", "needs a method"),
    "ask: set alone": (".jsonl", "{" + ASK + ', "set": "layer=2"}', 1, "set", "none of the methods"),
    "ask: set a number": (".jsonl", "{" + ASK + ', "set": [3]}', 1, "set", "list of texts"),
    "ask: tokens": (".jsonl", "{" + ASK + ', "tokens": 0}', 1, "tokens", "got 0; give a whole number, at least 1"),
    "ask: model": (".jsonl", "{" + ASK + ', "model": "shapes-lava"}', 1, "model", "there is no folder"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    return tmp_path


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_job_files(case, folder, capsys):
    ending, text, number, column, part = MALFORMED[case]
    jobs = folder / f"jobs{ending}"
    jobs.write_text(text)
    code = main(["batch", str(jobs), "-o", str(folder / "out")])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    place = f"row {number} (line "
    problems = [line for line in err.splitlines() if line.startswith("  row ")]
    assert any(place in line and f", column {column}: " in line and part in line for line in problems), err
    assert not (folder / "out").exists()


def test_there_are_enough_of_them():
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize(
    "name, data, part",
    [
        ("jobs.jsonl", b"", "empty"),
        ("jobs.csv", b" \n\n", "empty"),
        ("jobs.csv", b"prompt,seed\n", "row 1 is missing"),
        ("jobs.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "row 2, column 16: byte 0xe9"),
        ("jobs.txt", b"\xff\xfea\x00", "row 1, column 1: byte 0xff"),
        ("jobs.json", b"[]", "add --format"),
        ("jobs.xlsx", b"PK", "add --format"),
    ],
)
def test_files_that_are_none(name, data, part, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    assert main(["batch", str(tmp_path / name), "-o", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err


def test_every_wrong_row_is_named_and_what_is_the_same_once(tmp_path, capsys):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("prompt,height,steps\na,50,1\nb,48,x\nc,50,1\n")
    assert main(["batch", str(jobs), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "3 rows are wrong" in err
    assert "row 1 (line 2), column height" in err and "(and in 1 more rows)" in err
    assert "row 2 (line 3), column steps" in err


def plan(path, task="generate", given=None, **more):
    column = TASKS[task].needed[0]
    return items.plan(rows.read(str(path), None, column), str(path), task=task, given=given or {}, **more)


def test_the_same_job_in_every_form(tmp_path, monkeypatch):
    forms = {
        "jobs.jsonl": row(seed=5, steps=2, window=[3, 5, 5], attention="neighborhood"),
        "jobs.csv": 'prompt,seed,steps,window,attention\na red circle,5,2,"3,5,5",neighborhood\n',
        "crlf.csv": '\ufeffprompt , seed,steps,window,attention\r\na red circle,5, 2,"3,5,5",neighborhood\r\n\r\n',
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = [plan(tmp_path / name)[0] for name in forms]
    (tmp_path / "jobs.txt").write_text("\n a red circle\n\n")
    given = {"steps": 2, "window": (3, 5, 5), "attention": "neighborhood"}
    found.append(plan(tmp_path / "jobs.txt", given=given, seed=5)[0])
    assert len({item.hash for item in found}) == len({item.name for item in found}) == 1
    assert found[0].settings["window"] == (3, 5, 5)

    for text, form in ((forms["jobs.jsonl"], None), ("a red circle\n", None), ("prompt\na red circle\n", "csv")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert rows.read("-", form)[0].values["prompt"] == "a red circle"


def test_cells_that_are_left_out_and_those_of_other_tasks(tmp_path):
    (tmp_path / "jobs.csv").write_text("task,prompt,image,steps,seed\n,a red circle,,,7\ncaption,,example:2,,\n")
    drawn, told = plan(tmp_path / "jobs.csv", given={"steps": 3, "model": None})
    assert drawn.settings["steps"] == 3 and drawn.settings["seed"] == 7 and drawn.endings == (".json", ".mp4")
    assert told.task == "caption" and "seed" not in told.settings and told.endings == (".json",)


def test_seeds_count_from_the_first_row_and_names_say_them(tmp_path):
    (tmp_path / "jobs.txt").write_text("a red circle\n\na red circle\n")
    first, second = plan(tmp_path / "jobs.txt", seed=40)
    assert (first.settings["seed"], second.settings["seed"]) == (40, 41)
    assert first.name.startswith("a-red-circle-40-") and first.hash != second.hash
    with pytest.raises(Exception, match="row 2 .*column seed: --seed 4294967295 counts past"):
        plan(tmp_path / "jobs.txt", seed=2**32 - 1)


def test_the_hash_is_of_what_decides_the_result(folder):
    def hash_of(text, **more):
        (folder / "jobs.jsonl").write_text(text)
        return plan(folder / "jobs.jsonl", **more)[0].hash

    one = hash_of(row())
    assert hash_of(row(id="other")) == one  # a name is no setting
    assert hash_of(row(error="out of memory")) == one  # nor is what failures.jsonl adds
    others = [hash_of(row(**{name: value})) for name, value in {"steps": 3, "seed": 1, "attention": "radial"}.items()]
    others.append(hash_of(row(), dtype="bfloat16"))
    assert len({one, *others}) == 5

    picture = '{"task": "caption", "image": "whole.png"}'
    before = hash_of(picture)
    Path(folder / "copy.png").write_bytes((folder / "whole.png").read_bytes())
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    assert hash_of(picture) != before  # the same name, another picture
    assert hash_of('{"task": "caption", "image": "./whole.png"}') == hash_of(picture)


def test_items_travel_as_plain_values(tmp_path):
    (tmp_path / "jobs.jsonl").write_text(row(window=[3, 5, 5], attention="neighborhood", causal=[True, False, False]))
    (item,) = plan(tmp_path / "jobs.jsonl")
    assert items.Item(**json.loads(json.dumps(item.to_dict())))  # Ray's rows
    again = tmp_path / "again.jsonl"
    again.write_text(json.dumps(item.failure("why")))
    assert plan(again)[0].hash == item.hash


def test_columns_are_the_options_of_the_commands():
    assert {"prompt", "seed", "steps", "attention", "window", "times", "lora"} <= set(TASKS["generate"].columns)
    assert {"image", "question", "prune", "method", "keep", "set", "tokens", "model"} == set(TASKS["ask"].columns)
    assert {"prompt", "video", "strength", "cache_steps"} <= set(TASKS["upscale"].columns)
    for task in TASKS.values():
        assert not {"output", "device", "overwrite", "json", "progress", "debug"} & set(task.columns)
