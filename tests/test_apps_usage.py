"""What the command line refuses, with one message and the right exit code, before it loads a model."""

import dataclasses
import os
import subprocess
import sys

import pytest
from test_loading import write_json_only

from vision_attn.apps.cli import COMMANDS, main
from vision_attn.apps.pattern_options import NAMES, PATTERNS
from vision_attn.kernels import patterns

GENERATE = ["generate", "a red circle", "-o", "{out}"]
SHOW = ["show", "neighborhood", "-o", "{out}/x.png"]
RADIAL = ["--attention", "radial"]
NEIGHBORHOOD = ["--attention", "neighborhood"]

# What is typed ({out}: an empty folder, {file}: a text file in it), then parts of the one message.
USAGE = {
    "no command": (["shw"], ["unknown command 'shw'", "did you mean show"]),
    "no such option": ([*GENERATE, "--windw", "3"], ["--windw", "--window"]),
    "unknown attention": ([*GENERATE, "--attention", "radail"], ["'radail'", "did you mean radial", "sliding-tile"]),
    "unknown pattern": (["show", "swin", "--grid", "8,8", "-o", "{out}/x.png"], ["'swin'", "neighborhood"]),
    "option of another attention": ([*GENERATE, *RADIAL, "--window", "3"], ["--window belongs to neighborhood, sl"]),
    "option with a dash": (
        [*SHOW, "--grid", "8,8", "--train-frames", "3"],
        ["--train-frames belongs to length-decay,"],
    ),
    "missing option with a dash": (["explain", "length-decay", "--grid", "8,8"], ["needs --train-frames, for example"]),
    "sink of streaming": (
        ["explain", "streaming", "--window", "4", "--sink", "--grid", "8"],
        ["sink=True", "must be an int"],
    ),
    "sink in words": (["explain", "streaming", "--window", "4", "--sink", "four", "--grid", "8"], ["'four'", "tokens"]),
    "sink and no sink": (
        ["explain", "radial", "--sink", "--no-sink", "--grid", "8,8"],
        ["--sink and --no-sink exclude each other"],
    ),
    "cells that do not fit": (
        ["explain", "circle", "--radius", "3", "--pooled", "4", "--grid", "8,10"],
        ["8 x 10 tokens", "cells of 4 x 4"],
    ),
    "option without attention": ([*GENERATE, "--decay", "0.2"], ["--decay belongs to radial", "dense"]),
    "dense steps of dense": ([*GENERATE, "--dense-steps", "1"], ["--dense-steps needs a sparse attention"]),
    "compare with itself": ([*GENERATE, "--compare"], ["--compare needs a sparse attention"]),
    "wrong rank": ([*GENERATE, *NEIGHBORHOOD, "--window", "3,3"], ["2 entries", "3 axes"]),
    "window larger than the grid": ([*GENERATE, *NEIGHBORHOOD, "--window", "5,7,5"], ["window 7", "at most 6"]),
    "stride larger than the window": (
        [*GENERATE, *NEIGHBORHOOD, "--window", "3", "--stride", "4"],
        ["stride 4", "window 3"],
    ),
    "no number": ([*GENERATE, *NEIGHBORHOOD, "--window", "3,x,3"], ["--window", "'3,x,3'"]),
    "zero window": ([*GENERATE, *NEIGHBORHOOD, "--window", "0"], ["at least 1"]),
    "negative window": ([*GENERATE, *NEIGHBORHOOD, "--window", "-3"], ["at least 1"]),
    "decay nan": ([*GENERATE, *RADIAL, "--decay", "nan"], ["decay must be finite"]),
    "rule": ([*GENERATE, *RADIAL, "--rule", "pixel"], ["'pixel'", "'token', 'block'"]),
    "tile larger than the grid": (
        [*GENERATE, "--attention", "sliding-tile", "--tile", "8", "--window", "1"],
        ["tile of 8", "at most 5"],
    ),
    "all steps dense": ([*GENERATE, *RADIAL, "--steps", "4", "--dense-steps", "4"], ["leaves none for radial"]),
    "prompt empty": (["generate", "  ", "-o", "{out}"], ["prompt 1 is empty"]),
    "second prompt empty": (["generate", "a red circle", "", "-o", "{out}"], ["prompt 2 is empty"]),
    "no prompt": (["generate", "-o", "{out}"], ["no prompt"]),
    "no output": (["generate", "a red circle"], ["'-o'"]),
    "prompts file missing": (["generate", "--prompts", "{out}/none.txt", "-o", "{out}"], ["none.txt", "No such file"]),
    "prompts file a folder": (["generate", "--prompts", "{out}", "-o", "{out}"], ["Is a directory"]),
    "frames": ([*GENERATE, "--frames", "16"], ["--frames: got 16", "4n+1", "13 and 17"]),
    "frames zero": ([*GENERATE, "--frames", "0"], ["--frames: got 0", "1 and 5"]),
    "height": ([*GENERATE, "--height", "50"], ["--height: got 50", "multiple of 16", "48 and 64"]),
    "width": ([*GENERATE, "--width", "-48"], ["--width: got -48", "multiple of 16"]),
    "steps": ([*GENERATE, "--steps", "0"], ["--steps: got 0; give a whole number, at least 1 and at most 1000."]),
    "seed negative": ([*GENERATE, "--seed", "-1"], ["--seed: got -1", "at least 0"]),
    "seed huge": ([*GENERATE, "--seed", "4294967296"], ["--seed: got 4294967296", "at most 4294967295"]),
    "seed counts past the end": (
        ["generate", "a", "b", "-o", "{out}", "--seed", "4294967295"],
        ["2 prompts count past"],
    ),
    "seed no number": ([*GENERATE, "--seed", "1.5"], ["--seed: got 1.5", "a whole number"]),
    "guidance nan": ([*GENERATE, "--guidance", "nan"], ["--guidance: got nan"]),
    "guidance negative": ([*GENERATE, "--guidance", "-1"], ["--guidance: got -1.0"]),
    "dtype": ([*GENERATE, "--dtype", "float8"], ["--dtype: got 'float8'", "float32, bfloat16, float16"]),
    "device": ([*GENERATE, "--device", "tpu"], ["--device: got 'tpu'", "auto, cpu, cuda"]),
    "show: no window": ([*SHOW, "--grid", "8,8"], ["neighborhood needs --window", "--window 5,9,9"]),
    "show: window larger": ([*SHOW, "--grid", "8,8", "--window", "9"], ["window 9", "at most 8"]),
    "show: rank 4": ([*SHOW, "--grid", "8,8,8,8", "--window", "3"], ["4 axes", "1 or 2 or 3"]),
    "show: grid zero": ([*SHOW, "--grid", "8,0", "--window", "3"], ["at least 1"]),
    "show: grid text": ([*SHOW, "--grid", "8x8", "--window", "3"], ["--grid", "'8x8'"]),
    "show: query outside": ([*SHOW, "--grid", "8,8", "--window", "3", "--query", "3,8"], ["--query (3, 8)", "(8, 8)"]),
    "show: query rank": ([*SHOW, "--grid", "8,8", "--window", "3", "--query", "3"], ["--query (3,)"]),
    "show: kind": (["show", "dense", "--grid", "8,8", "-o", "{out}/x.txt"], ["'x.txt'", ".png, .svg or .pdf"]),
    "show: radial on a line": (["show", "radial", "--grid", "64", "-o", "{out}/x.png"], ["(frames, h, w)"]),
    "batch: no output": (["batch", "jobs.jsonl"], ["'-o'"]),
    "batch: no jobs": (["batch", "{out}/none.csv", "-o", "{out}/x"], ["none.csv", "No such file"]),
    "batch: kind of file": (["batch", "jobs.xlsx", "-o", "{out}/x"], ["'jobs.xlsx'", ".jsonl, .csv or .txt"]),
    "batch: unknown column": (["batch", "-", "-o", "{out}/x", "--set", "stepps=3"], ["stepps", "did you mean steps?"]),
    "explain: heads": (["explain", "dense", "--grid", "8,8", "--heads", "0"], ["--heads"]),
    "explain: dtype": (["explain", "dense", "--grid", "8,8", "--dtype", "int8"], ["--dtype: got 'int8'", "float64"]),
    "explain: device": (
        ["explain", "dense", "--grid", "8,8", "--device", "gpu"],
        ["--device: got 'gpu'. Allowed: auto, cpu, cuda."],
    ),
    "batch: address alone": (
        ["batch", "-", "-o", "{out}/x", "--address", "auto"],
        ["--address is that of a Ray cluster", "add --engine ray"],
    ),
    "batch: ray and one GPU": (
        ["batch", "-", "-o", "{out}/x", "--engine", "ray", "--device", "cuda:0"],
        ["--device cuda:0", "use auto, cuda or cpu"],
    ),
    "batch: engine": (["batch", "-", "-o", "{out}/x", "--engine", "locl"], ["'locl'; did you mean local?", "ray"]),
    "batch: shard": (["batch", "-", "-o", "{out}/x", "--shard", "2/2"], ["--shard: got '2/2'", "0/2 and 1/2"]),
    "upscale: guidance": (["upscale", "a", "-o", "{out}", "--guidance", "nan"], ["--guidance: got nan", "at least 0"]),
    "upscale: strength": (["upscale", "a", "-o", "{out}", "--strength", "nan"], ["--strength: got nan", "at most 1"]),
    "upscale: shift": (["upscale", "a", "-o", "{out}", "--shift", "inf"], ["--shift: got inf", "above 0"]),
    "calibrate: guidance": (
        ["calibrate", "a", "-o", "{out}/p.json", "--guidance", "nan"],
        ["--guidance: got nan", "at least 0"],
    ),
    "calibrate: device": (["calibrate", "a", "-o", "{out}/p.json", "--device", "tpu"], ["--device: got 'tpu'", "cuda"]),
    "consistent: guidance": (
        ["consistent", "a", "--subject", "a", "-o", "{out}", "--guidance", "nan"],
        ["--guidance: got nan", "at least 0"],
    ),
    "consistent: seed": (
        ["consistent", "a", "--subject", "a", "-o", "{out}", "--seed", "4294967295"],
        ["--seed: 4294967295", "2 pictures count past"],
    ),
    "app: device": (["app", "--device", "tpu"], ["--device: got 'tpu'", "auto, cpu, cuda"]),
    "app: dtype": (["app", "--dtype", "int8"], ["--dtype: got 'int8'", "bfloat16"]),
    "app: tab": (["app", "patern"], ["'patern'; did you mean patterns?", "results"]),
    "bench kernels: csv a folder": (
        ["bench", "kernels", "--csv", "{out}"],
        ["--csv:", "is a folder; name a file in it"],
    ),
    "bench vision: sides": (["bench", "vision", "--sides", "999999"], ["--sides: got '999999'", "from 2 to 4096"]),
    "bench diffusion: parts": (["bench", "diffusion", "--parts", "clip"], ["'clip'; did you mean clips?", "growth"]),
    "bench mllm: no methods": (["bench", "mllm", "--methods", ","], ["--methods: got ','", "separated by commas"]),
    "completion: nothing": (["completion"], ["SHELL", "Allowed: bash, zsh, fish", "For example: "]),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, tmp_path, capsys):
    argv, parts = USAGE[case]
    code = main([entry.format(out=tmp_path) for entry in argv])
    assert_one_message(code, capsys, 2, parts)
    assert list(tmp_path.iterdir()) == []


def assert_one_message(code, capsys, expected, parts):
    out, err = capsys.readouterr()
    assert code == expected, err
    assert out == ""
    assert err.startswith("Error: ") and err.count("\n") <= 3 and "Traceback" not in err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    "data, part",
    [(b"", "empty"), (b"\n  \n", "empty"), (b"a caf\xe9 sign", "not UTF-8 text (byte 5)"), (b"\xff\xfea", "not UTF-8")],
)
def test_prompts_file_that_holds_no_prompts(data, part, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    code = main(["generate", "--prompts", str(file), "-o", str(tmp_path / "out")])
    assert_one_message(code, capsys, 2, ["prompts.txt", part])
    assert not (tmp_path / "out").exists()


def test_cuda_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code = main(["generate", "a red circle", "-o", str(tmp_path), "--device", "cuda"])
    assert_one_message(code, capsys, 2, ["--device: got 'cuda'", "no CUDA GPU", "use cpu or auto"])
    assert main(["explain", "dense", "--grid", "8,8", "--device", "cuda"]) == 0  # asks about a machine, uses none


@pytest.mark.parametrize(
    "model, part",
    [
        ("{tmp}/nowhere", "there is no folder"),
        ("{tmp}/empty", "no model_index.json"),
        ("{tmp}/file.safetensors", "single file"),
        ("{tmp}/pickles", "weights only as pickles (weights.bin), which can run code"),
        ("{tmp}/sana", "SanaTransformer2DModel is not supported"),
    ],
)
def test_model_that_cannot_be_used(model, part, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    pickles = write_json_only(tmp_path / "pickles", "WanPipeline", "WanTransformer3DModel")
    (pickles / "transformer" / "weights.bin").write_bytes(b"")
    write_json_only(tmp_path / "sana", "SanaPipeline", "SanaTransformer2DModel")
    out = tmp_path / "out"
    code = main(["generate", "a red circle", "-o", str(out), "--model", model.format(tmp=tmp_path)])
    assert_one_message(code, capsys, 1, [part])
    assert not out.exists()


def test_output_that_cannot_be_written(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for argv in (
        ["generate", "a red circle", "-o", str(blocked)],
        ["show", "dense", "--grid", "4,4", "-o", f"{blocked}/x.png"],
    ):
        assert_one_message(main(argv), capsys, 1, ["cannot write in", "choose another -o"])
    assert blocked.read_text() == "in the way"


def test_results_are_never_replaced_silently(tmp_path, capsys):
    (tmp_path / "a-red-circle-0.json").write_text("precious")
    code = main(["generate", "a red circle", "-o", str(tmp_path)])
    assert_one_message(code, capsys, 1, ["a-red-circle-0.json already there", "--overwrite"])
    picture = tmp_path / "x.png"
    picture.write_text("precious")
    code = main(["show", "dense", "--grid", "4,4", "-o", str(picture)])
    assert_one_message(code, capsys, 1, ["x.png already there", "--overwrite"])
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["precious", "precious"]


def test_unexpected_errors_are_one_line_too_and_debug_shows_where(tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise KeyError("inside")

    monkeypatch.setattr("vision_attn.kernels.draw.draw", broken)
    argv = ["show", "dense", "--grid", "4,4", "-o", str(tmp_path / "x.png")]
    assert_one_message(main(argv), capsys, 1, ["KeyError: 'inside'", "--debug"])
    for debug in ([*argv, "--debug"], ["--debug", *argv]):
        assert main(debug) == 1
        assert "Traceback" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_gpu_memory_says_what_to_do(tmp_path, capsys, monkeypatch):
    import torch

    def full(*args):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr("vision_attn.kernels.draw.draw", full)
    code = main(["show", "dense", "--grid", "4,4", "-o", str(tmp_path / "x.png")])
    assert_one_message(code, capsys, 1, ["out of GPU memory", "--frames"])


def test_options_on_the_command_line_are_the_fields_of_the_patterns():
    fields = {name: tuple(f.name for f in dataclasses.fields(cls)) for name, cls in patterns.PATTERNS.items()}
    del fields["block-list"], fields["per-head"]  # computed from data; made of other patterns
    assert fields == PATTERNS
    assert set(NAMES) == {option for own in PATTERNS.values() for option in own}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n    vision-attn {command}" in out.replace("\n  Examples:", "\n  Examples:\n") and "--debug" in out


def run_cli(*argv, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vision_attn.apps", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def test_the_command_itself_version_and_usage():
    import vision_attn

    done = run_cli("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"vision-attn, version {vision_attn.__version__}"
    done = run_cli("generate", "a red circle")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 3


def test_help_does_not_import_torch():
    code = (
        "import sys; from vision_attn.apps.cli import main; main(['generate', '-h']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
