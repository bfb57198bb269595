"""Batch jobs over several processes, by Ray, torchrun and accelerate, leave the bytes that one process leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from batch_jobs import WAIT, hidden, made_by, pictures, write_jobs  # noqa: E402

from vision_attn.apps.batching import ray_engine  # noqa: E402
from vision_attn.apps.batching.items import Item  # noqa: E402
from vision_attn.apps.batching.manifest import OutputError  # noqa: E402
from vision_attn.apps.batching.runner import Place, Worker  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402

ITEMS = 8


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return write_jobs(tmp_path_factory.mktemp("jobs") / "jobs.jsonl", ITEMS)


@pytest.fixture(scope="module")
def expected(jobs):
    """The pictures of one process."""
    assert main(["batch", str(jobs), "-o", str(jobs.parent / "out")]) == 0
    return pictures(jobs.parent / "out")


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds what this one finds, with the threads that Ray gives an actor."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def launch(folder: Path, *command: object) -> tuple[int, str]:
    """Exit code and what was said of a program in a folder."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=WAIT)
    return done.returncode, done.stdout + done.stderr


def actors(folder: Path) -> list[int]:
    """Processes of Ray actors that a driver in this folder started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"MapBatches(Actor)" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


def test_ray_gives_the_same_bytes_also_when_a_process_is_killed(jobs, expected, tmp_path):
    pytest.importorskip("ray")
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "vision_attn.apps.batch", str(jobs), "-o", "out", "--engine", "ray"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=file, stderr=file)
        killed, until = 0, time.monotonic() + WAIT
        while process.poll() is None and time.monotonic() < until:
            if not killed and list(out.glob("[!.]*.png")):
                for number in actors(tmp_path)[:1]:
                    os.kill(number, signal.SIGKILL)
                    killed += 1
            time.sleep(0.02)
        process.kill()
    assert process.wait() == 0, log.read_text()[-3000:]
    assert killed == 1
    assert pictures(out) == expected
    assert sorted(made_by(out)) == sorted(name.removesuffix(".png") for name in expected)
    assert f"{ITEMS} made, 0 were there, 0 failed" in log.read_text()


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        pytest.param(
            ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_give_the_same_bytes(jobs, expected, tmp_path, launcher):
    if launcher[0].startswith("accelerate"):
        pytest.importorskip("accelerate")
        launcher = [*launcher, "--num_machines", "1", "--dynamo_backend", "no"]
    code, said = launch(tmp_path, sys.executable, "-m", *launcher, "-m", "vision_attn.apps.batch", jobs, "-o", "out")
    assert code == 0, said[-3000:]
    assert pictures(tmp_path / "out") == expected and hidden(tmp_path / "out") == []
    for part in range(2):
        *_, end = map(json.loads, (tmp_path / "out" / f"manifest.{part}-of-2.jsonl").read_text().splitlines())
        assert (end["items"], end["done"]) == (ITEMS // 2, ITEMS // 2)


def item(name: str, row: int = 1) -> Item:
    return Item(row, "generate", name, {"prompt": "a red circle", "seed": 0}, name * 4, (".json", ".png"))


def done(one: Item) -> dict:
    return {"event": "done", "id": one.name, "row": one.row, "hash": one.hash}


def test_an_actor_says_that_the_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "manifest.jsonl").touch()
    first, second = item("a"), item("b", 2)

    def work(self, items):
        yield done(next(iter(items)))
        raise OutputError(errno.ENOSPC, "No space left on device", "x.png")

    monkeypatch.setattr(Worker, "work", work)
    actor = ray_engine.Actor(Place(tmp_path), "manifest.jsonl")
    sent = actor({"items": [json.dumps([first.to_dict(), second.to_dict()])]})
    read = list(map(json.loads, sent["event"]))
    assert read == [done(first), {"event": "stop", "because": [errno.ENOSPC, "No space left on device", "x.png"]}]


def test_an_actor_refuses_a_folder_that_is_not_shared(tmp_path):
    with pytest.raises(FileNotFoundError, match="is another folder on"):
        ray_engine.Actor(Place(tmp_path), "manifest.jsonl")


@pytest.fixture
def sent(monkeypatch):
    """What comes back from actors, without Ray; say it by filling the list."""
    batches: list[dict] = []

    class Data:
        def iter_batches(self, **options):
            return iter(batches)

    monkeypatch.setattr(ray_engine, "cluster", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(ray_engine, "_data", lambda *arguments: Data())
    return batches


def test_items_that_no_actor_survives_fail(sent, tmp_path):
    items = [item("a"), item("b", 2), item("c", 3)]
    sent.append({"event": [json.dumps(done(items[1]))]})
    events = list(ray_engine.engine(None, "manifest.jsonl")(items, Place(tmp_path)))
    assert [(event["event"], event["id"]) for event in events] == [("done", "b"), ("failed", "a"), ("failed", "c")]
    assert "died 3 times" in events[1]["error"] and events[1]["hash"] == items[0].hash


def test_a_full_disk_ends_the_job(sent, tmp_path):
    sent.append({"event": [json.dumps({"event": "stop", "because": [errno.ENOSPC, "No space left on device", "x"]})]})
    with pytest.raises(OutputError, match="No space left"):
        list(ray_engine.engine(None, "manifest.jsonl")([item("a")], Place(tmp_path)))


@pytest.mark.parametrize(
    "typed, parts",
    [
        (["--address", "auto"], ["--address", "add --engine ray"]),
        (["--engine", "ray", "--device", "cpu:0"], ["--device cpu:0", "a GPU of its own"]),
        (["--engine", "rey"], ["'rey'", "local", "ray"]),
    ],
    ids=["address alone", "one device", "unknown engine"],
)
def test_options_that_do_not_go_together(jobs, tmp_path, capsys, typed, parts):
    assert main(["batch", str(jobs), "-o", str(tmp_path / "out"), *typed]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert not (tmp_path / "out").exists()


def test_ray_is_not_installed(jobs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(jobs), "-o", str(tmp_path / "out"), "--engine", "ray"]) == 1
    assert "pip install 'vision-attn[ray]'" in capsys.readouterr().err


def test_no_cluster_at_the_address(monkeypatch):
    ray = pytest.importorskip("ray")

    def init(**options):
        raise ConnectionError("Could not find a running Ray instance.\nMore lines")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        ValueError, match=r"--address host:1: no Ray cluster there that lets us in \(Could not find .*instance.\)"
    ):
        with ray_engine.cluster("host:1"):
            pass
