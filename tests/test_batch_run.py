"""Batch jobs run, stop, fail and go on; what is made does not depend on any of that."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn import __version__
from vision_attn.apps import batch, media
from vision_attn.apps.batching import items, manifest, rows, runner, tasks
from vision_attn.apps.cli import main

STILL = ["--set", "frames=1", "--set", "steps=1", "--device", "cpu"]
WORDS = ["a red circle moves right", "a blue square moves up", "a green triangle moves left"]


@pytest.fixture
def jobs(tmp_path):
    path = tmp_path / "jobs.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture
def painted(monkeypatch):
    """`generate` without a model: one colour by the seed. Returns the seeds of each call; seeds in `.bad` fail, and
    calls of more than `.room` rows are out of memory."""

    class Calls(list):
        bad: dict = {}
        room = 99
        opened = 0

    calls = Calls()

    def opens(settings, device, dtype):
        calls.opened += 1

    def make(model, group):
        seeds = [settings["seed"] for settings in group]
        calls.append(seeds)
        if len(group) > calls.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        for seed in seeds:
            if seed in calls.bad:
                raise calls.bad[seed]
        return [_painted(settings) for settings in group]

    task = dataclasses.replace(tasks.TASKS["generate"], open=opens, make=make)
    monkeypatch.setitem(tasks.TASKS, "generate", task)
    return calls


def _painted(settings):
    record = {"prompt": settings["prompt"], "seed": settings["seed"], "negative": None, "steps": 1, "guidance": 1}
    record |= {"width": 8, "height": 8, "model": "paint", "attention": {"pattern": "dense"}}
    image = np.full((8, 8, 3), settings["seed"] % 256, np.uint8)
    return tasks.Made(record, lambda paths: media.write_picture(paths[".png"], image, record))


def run(jobs, out, *more):
    return main(["batch", str(jobs), "-o", str(out), *STILL, *more])


def results(out):
    """Name -> bytes of everything but the diary."""
    diary = ("manifest", "failures", ".lock")
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(diary)}


def events(out, kind):
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


# With the models


def test_pictures_carry_their_settings_and_shards_make_the_same_bytes(jobs, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(jobs, one) == 0
    assert "3 made, 0 were there, 0 failed" in capsys.readouterr().out
    assert run(jobs, two, "--shard", "1/2") == 0 and len(results(two)) == 2
    assert run(jobs, two, "--shard", "0/2") == 0
    assert results(one) == results(two) and len(results(one)) == 6

    sidecar = one / next(name for name in results(one) if name.startswith("a-blue") and name.endswith(".json"))
    record = json.loads(sidecar.read_text())
    with Image.open(sidecar.with_suffix(".png")) as image:
        inside = json.loads(image.text["vision-attn"])
        assert image.text["parameters"].startswith("a blue square moves up\nSteps: 1, CFG scale: 3.0, Seed: 1, ")
    assert inside["seed"] == record["seed"] == 1
    assert inside["versions"]["vision-attn"] == __version__
    assert record.keys() - inside.keys() == {"id", "task", "hash"} and "seconds" not in record
    pictures = [data for name, data in results(one).items() if name.endswith(".png")]
    assert len(set(pictures)) == 3


def test_a_batch_is_the_same_pictures_up_to_rounding(jobs, tmp_path):
    more = ["--set", "attention=radial", "--set", "frames=5"]
    assert run(jobs, tmp_path / "one", *more) == 0
    assert run(jobs, tmp_path / "three", *more, "--batch-size", "3") == 0
    made = [sorted(out.glob("*.mp4")) for out in (tmp_path / "one", tmp_path / "three")]
    assert len(made[0]) == 3 and [path.name for path in made[0]] == [path.name for path in made[1]]
    clips = [[frames_of(path) for path in paths] for paths in made]
    for at in range(3):
        apart = np.abs(clips[0][at].astype(int) - clips[1][at])
        assert apart.mean() < 0.5
        assert np.abs(clips[0][at].astype(int) - clips[1][at - 1]).mean() > 5 * apart.mean()
    with av.open(str(made[0][0])) as container:
        assert json.loads(container.metadata["comment"])["attention"]["pattern"] == "radial"


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_other_tasks(tmp_path, capsys):
    """Also that a failing row costs itself only, and that words that the built-in model does not know are said."""
    clip = np.zeros((5, 48, 48, 3), np.uint8)
    media.write_video(tmp_path / "small.mp4", clip, 8, {"prompt": "a", "height": 48, "width": 48})
    question = {"task": "ask", "image": "example:3", "question": "is there a red circle in the image?"}
    asked = [
        {"task": "upscale", "id": "large", "prompt": "a red circle", "video": "small.mp4", "steps": 2, "times": 2},
        {"task": "caption", "id": "told", "image": "example:3"},
        {**question, "id": "plain"},
        {**question, "id": "pruned", "prune": ["fastv"], "keep": 0.2, "set": "fastv.layer=1"},
        {**question, "id": "unknown", "question": "is there a zebra in the image?"},
        {"id": "drawn", "prompt": "a purple circle", "frames": 1, "steps": 1},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, asked)))
    out = tmp_path / "out"
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(out), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "row 5 (unknown) failed: the built-in model does not know 'zebra'" in err
    assert "row 6 (drawn): the built-in model does not know purple" in err
    assert "1 of 6 rows failed" in err and "--retry-failed" in err

    large = json.loads((out / "large.json").read_text())
    assert (large["height"], large["small_height"]) == (96, 48)
    assert frames_of(out / "large.mp4").shape[1] == 96 * media.enlargement(96, 96)
    told, plain, pruned = (json.loads((out / f"{name}.json").read_text()) for name in ("told", "plain", "pruned"))
    assert "there is" in told["answer"] or "a " in told["answer"]
    assert plain["answer"] in ("yes", "no") and plain["methods"] == []
    assert pruned["methods"] and pruned["report"]
    answers = {event["id"]: event.get("answer") for event in events(out, "done")}
    assert answers["told"] == told["answer"]
    assert not (out / "unknown.json").exists()


# Going on


def test_what_is_done_is_skipped_and_what_is_gone_is_made_again(jobs, tmp_path, painted, capsys):
    out = tmp_path / "out"
    assert run(jobs, out) == 0
    first = results(out)
    assert painted == [[0], [1], [2]]
    assert run(jobs, out) == 0
    assert "0 made, 3 were there" in capsys.readouterr().out and len(painted) == 3
    gone = [name for name in first if name.endswith(".png")][0]
    (out / gone).unlink()  # as if killed between the sidecar and the picture
    cut = [name for name in first if name.endswith(".json")][1]
    (out / cut).unlink()
    (out / cut).with_suffix(".png").unlink()
    assert run(jobs, out) == 0
    assert len(painted) == 5 and results(out) == first


def test_other_settings_are_not_replaced_unless_asked(tmp_path, painted, capsys):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a red circle", "id": "cat", "seed": 1}\n{"prompt": "b", "id": "dog"}')
    assert run(path, out) == 0
    before = results(out)
    path.write_text('{"prompt": "a red circle", "id": "cat", "seed": 2}\n{"prompt": "b", "id": "dog"}')
    capsys.readouterr()
    assert run(path, out) == 2
    assert "cat.json already there, made with other settings; add --overwrite" in capsys.readouterr().err
    assert results(out) == before
    assert run(path, out, "--overwrite") == 0
    assert painted == [[1], [1], [2]]  # the seed of row 2 is 1, and it is left alone
    (out / "cat.json").unlink()  # a picture of nobody knows whom
    assert run(path, out) == 2
    (out / "cat.json").write_text("[1, 2")
    assert run(path, out) == 2


def test_a_result_never_looks_done_before_it_is(tmp_path, painted):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    out.mkdir()
    path.write_text('{"prompt": "a red circle", "id": "cat", "frames": 1}')
    (item,) = items.plan(rows.read(str(path)), str(path), task="generate", given={})
    old = dataclasses.replace(item, hash="another")
    runner.store(old, _painted(item.settings), out)
    assert manifest.is_done(old, out) and manifest.in_the_way(item, out) and not manifest.in_the_way(old, out)

    def killed(paths):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.store(item, tasks.Made({}, killed), out)
    assert not manifest.is_done(item, out) and not manifest.is_done(old, out)
    assert not manifest.in_the_way(item, out)  # the next run may go on


def test_what_killed_processes_left_is_removed(jobs, tmp_path, painted):
    out = tmp_path / "out"
    assert run(jobs, out) == 0
    name = next(name for name in results(out) if name.endswith(".png"))
    (out / name).unlink()
    (out / f".{name[:-4]}.12345.png").write_bytes(b"half")
    (out / f".{name[:-4]}.12345.json").write_bytes(b"half")
    (out / ".failures.12345.jsonl").write_bytes(b"half")
    (out / ".somebody.12345.png").write_bytes(b"else")
    assert run(jobs, out) == 0
    assert [name for name in results(out) if name.startswith(".")] == [".somebody.12345.png"]


def test_failures_are_listed_tried_again_on_request_and_can_be_given_back(jobs, tmp_path, painted, capsys):
    out = tmp_path / "out"
    painted.bad = {1: RuntimeError("the model produced NaN")}
    assert run(jobs, out) == 1
    assert "row 2 (a-blue-square-moves-up-1-" in capsys.readouterr().err
    (row,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert row["error"] == "the model produced NaN" and row["seed"] == 1 and row["prompt"] == WORDS[1]
    assert run(jobs, out) == 1 and len(painted) == 3  # not tried again by itself
    assert run(jobs, out, "--shard", "1/2") == 1 and len(painted) == 3  # nor by another shard
    assert run(jobs, out, "--retry-failed") == 1 and len(painted) == 4
    painted.bad = {}
    assert main(["batch", str(out / "failures.jsonl"), "-o", str(out)]) == 0  # the settings are in the row
    assert painted[-1] == [1] and not (out / "failures.jsonl").exists()
    assert run(jobs, out) == 0 and len(results(out)) == 6


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("three\nlines\nof it"), "three"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError: no message"),
        (MemoryError(), "out of memory"),
        (OSError(22, "odd"), "odd"),
    ],
)
def test_no_error_of_a_row_stops_the_job(error, said, jobs, tmp_path, painted):
    painted.bad = {0: error}
    assert run(jobs, tmp_path / "out") == 1
    assert said in events(tmp_path / "out", "failed")[0]["error"]
    assert len(events(tmp_path / "out", "done")) == 2


def test_a_writer_that_fails_costs_its_row_and_a_full_disk_ends_the_job(jobs, tmp_path, painted, monkeypatch, capsys):
    write = media.write_picture

    def failing(error):
        def writes(path, image, settings):
            if settings["seed"] == 1:
                raise error
            write(path, image, settings)

        monkeypatch.setattr(media, "write_picture", writes)

    failing(ValueError("odd size"))
    assert run(jobs, tmp_path / "one") == 1
    assert len(events(tmp_path / "one", "done")) == 2
    failing(OSError(28, "No space left on device"))
    capsys.readouterr()
    assert run(jobs, tmp_path / "two") == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "1 of 3 rows are done" in err and "vision-attn batch" in err
    assert len(events(tmp_path / "two", "done")) == 1 and not events(tmp_path / "two", "end")
    monkeypatch.setattr(media, "write_picture", write)
    assert run(jobs, tmp_path / "two") == 0  # nobody has to say --retry-failed


def test_out_of_memory_halves_the_batch_and_it_stays_small(tmp_path, painted):
    path = tmp_path / "jobs.txt"
    path.write_text("\n".join(["a red circle"] * 12))
    painted.room = 2
    assert run(path, tmp_path / "out", "--batch-size", "8") == 0
    assert list(map(len, painted)) == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    assert sorted(seed for call in painted if len(call) <= 2 for seed in call) == list(range(12))


def test_a_bad_row_in_a_batch_is_found(tmp_path, painted):
    path = tmp_path / "jobs.txt"
    path.write_text("\n".join(["a red circle"] * 8))
    painted.bad = {5: RuntimeError("NaN")}
    assert run(path, tmp_path / "out", "--batch-size", "4") == 1
    assert [event["row"] for event in events(tmp_path / "out", "failed")] == [6]
    assert len(events(tmp_path / "out", "done")) == 7
    assert len(painted[0]) == len(painted[1]) == 4


def test_each_model_is_opened_once(tmp_path, painted, monkeypatch):
    built_in = tasks._info(None)
    monkeypatch.setattr(tasks, "_info", lambda model: built_in)
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a", "model": model}) for model in ("x/a", "x/b", "x/a", "x/b")))
    assert run(path, tmp_path / "out", "--batch-size", "3") == 0
    assert painted == [[0, 2], [1, 3]] and painted.opened == 2


def test_a_model_that_does_not_open_fails_its_rows(tmp_path, monkeypatch):
    def opens(settings, device, dtype):
        raise ValueError("weights are missing")

    task = dataclasses.replace(tasks.TASKS["generate"], open=opens)
    monkeypatch.setitem(tasks.TASKS, "generate", task)
    path = tmp_path / "jobs.txt"
    path.write_text("a red circle\n")
    assert run(path, tmp_path / "out") == 1
    assert events(tmp_path / "out", "failed")[0]["error"] == "weights are missing"


# Control


def test_dry_run_writes_nothing(jobs, tmp_path, painted, capsys):
    assert run(jobs, tmp_path / "out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "row 2: generate" in out and "3 to make, 0 there" in out and not (tmp_path / "out").exists()
    assert run(jobs, tmp_path / "out", "--dry-run", "--json") == 0
    todo = json.loads(capsys.readouterr().out)["todo"]
    assert [row["seed"] for row in todo] == [0, 1, 2] and painted == []


@pytest.mark.parametrize("stop", ["ctrl-c", "sigterm"])
def test_stopped_jobs_say_how_to_go_on(stop, jobs, tmp_path, painted, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    make = tasks.TASKS["generate"].make

    def stopping(model, group):
        if group[0]["seed"] == 1:
            if stop == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return make(model, group)

    stopped = dataclasses.replace(tasks.TASKS["generate"], make=stopping)
    monkeypatch.setitem(tasks.TASKS, "generate", stopped)
    out = tmp_path / "out"
    assert run(jobs, out, "--no-progress", "--batch-size", "1", "--retry-failed") == 130
    message = capsys.readouterr().err
    assert "1 of 3 rows are done, and nothing is half-written" in message
    monkeypatch.setitem(tasks.TASKS, "generate", dataclasses.replace(stopped, make=make))
    words = shlex.split(message.splitlines()[-1])
    assert words[:2] == ["vision-attn", "batch"] and "--no-progress" in words
    assert main(words[1:]) == 0
    assert "2 made, 1 were there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_processes_do_not_share_a_folder_but_two_shards_do(jobs, tmp_path, painted, capsys):
    out = tmp_path / "out"
    with manifest.alone(out, (0, 1)):
        assert run(jobs, out) == 1
        err = capsys.readouterr().err
        assert f"process {os.getpid()} on " in err and "--shard 0/2" in err and painted == []
        assert run(jobs, out, "--shard", "0/2") == 0
    assert run(jobs, out) == 0


def test_the_progress_bar_has_a_rate_and_the_time_left(jobs, tmp_path, painted, capsys):
    assert run(jobs, tmp_path / "out", "--progress") == 0
    err = capsys.readouterr().err
    assert "3/3 [" in err and "row" in err and "<" in err
    assert run(jobs, tmp_path / "more") == 0
    assert capsys.readouterr().err == ""


def test_summary_as_json(jobs, tmp_path, painted, capsys):
    painted.bad = {2: ValueError("no")}
    assert run(jobs, tmp_path / "out", "--json") == 1
    counts = json.loads(capsys.readouterr().out)
    assert (counts["items"], counts["done"], counts["failed"], counts["skipped"]) == (3, 2, 1, 0)


def test_a_line_cut_off_in_the_manifest_harms_nobody(jobs, tmp_path, painted):
    out = tmp_path / "out"
    painted.bad = {1: ValueError("no")}
    assert run(jobs, out) == 1
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"event": "failed", "ha')
    assert run(jobs, out) == 1 and len(painted) == 3
    lines = (out / "manifest.jsonl").read_text().splitlines()
    good = []
    for line in lines:
        try:
            good.append(json.loads(line)["event"])
        except ValueError:
            pass
    assert len(good) == len(lines) - 1 and good.count("start") == 2 and good[-1] == "end"


def test_shards_from_the_option_and_from_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert batch.shard_of(None, "cpu") == ((0, 1), "cpu")
    assert batch.shard_of("1/3", "auto") == ((1, 3), "auto")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert batch.shard_of(None, "auto") == ((3, 8), "cuda:1")
    assert batch.shard_of(None, "cpu") == ((3, 8), "cpu")
    assert batch.shard_of("0/2", "auto") == ((0, 2), "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert batch.shard_of(None, "auto") == ((3, 8), "auto")
    for wrong in ("2/2", "1", "a/b", "-1/2", "1/0", "1/2/3", ""):
        with pytest.raises(Exception, match="two shards are 0/2 and 1/2"):
            batch.shard_of(wrong, "auto")
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(Exception, match="RANK='8' and WORLD_SIZE='8'"):
        batch.shard_of(None, "auto")


@pytest.mark.parametrize(
    "more, part",
    [
        (["--set", "steps"], "write COLUMN=VALUE"),
        (["--set", "stepps=3"], "did you mean steps?"),
        (["--set", "steps=many"], "--set steps: got many; give a whole number"),
        (["--set", "=3"], "unknown column"),
        (["--shard", "2/2"], "two shards are"),
        (["--batch-size", "0"], "--batch-size"),
        (["--task", "draw"], "'draw'"),
        (["--device", "gpu"], "--device: got 'gpu'"),
        (["--dtype", "int8"], "--dtype: got 'int8'"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_wrong_options(more, part, jobs, tmp_path, capsys):
    assert main(["batch", str(jobs), "-o", str(tmp_path / "out"), *more]) == 2
    err = capsys.readouterr().err
    assert part in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_as_a_module_and_with_rows_from_stdin(tmp_path):
    command = [sys.executable, "-m", "vision_attn.apps.batch", "-", "-o", str(tmp_path / "out"), *STILL, "--dry-run"]
    done = subprocess.run(command, input="a red circle\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 to make" in done.stdout
