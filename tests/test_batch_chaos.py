"""Batch jobs that are killed, started twice or left without room end with the files of an undisturbed run."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from batch_jobs import WAIT, finish, hidden, made_by, pictures, processes, write_jobs  # noqa: E402

ITEMS = 24  # of the short tests


@pytest.fixture(scope="module")
def start():
    with processes() as start:
        yield start


def undisturbed(start, folder: Path, count: int) -> tuple[Path, dict[str, bytes]]:
    """A job file, and the pictures of a run without accidents."""
    jobs, log = write_jobs(folder / "jobs.jsonl", count), folder / "log"
    assert finish(start(jobs, "-o", folder / "out", log=log), log) == 0, log.read_text()
    made = pictures(folder / "out")
    assert len(made) == len(set(made.values())) == count
    return jobs, made


@pytest.fixture(scope="module")
def calm(start, tmp_path_factory):
    return undisturbed(start, tmp_path_factory.mktemp("calm"), ITEMS)


def finished(folder: Path) -> int:
    return len(list(folder.glob("[!.]*.png")))


def kill_once(process, folder: Path, new: int, delay: float) -> bool:
    """SIGKILL some seconds after so many more pictures; False if the job ended before."""
    wanted, until = finished(folder) + new, time.monotonic() + WAIT
    while process.is_alive() and finished(folder) < wanted and time.monotonic() < until:
        time.sleep(0.01)
    process.join(delay)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


@pytest.mark.parametrize(
    "count, kills", [(ITEMS, 6), pytest.param(200, 50, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_kills(start, calm, tmp_path, count, kills):
    jobs, expected = calm if count == ITEMS else undisturbed(start, tmp_path, count)
    out, log, dice = tmp_path / "killed", tmp_path / "killed.log", random.Random(count)
    grown = []
    for left in range(kills, 0, -1):
        before = finished(out)
        to_do = count - before  # some are kept for the lives that follow
        new = dice.randint(0, max(0, min(8, to_do // left, to_do - 3)))
        if not kill_once(start(jobs, "-o", out, log=log), out, new, dice.uniform(0, 0.3)):
            break  # a fast machine made the last pictures before the shot
        pictures(out)  # whatever has its name is whole
        grown.append(finished(out) - before)
    assert finish(start(jobs, "-o", out, log=log), log) == 0, log.read_text()[-3000:]
    print(f"{len(grown)} kills survived; pictures made in each life: {grown}")
    assert any(grown) and len(grown) > kills / 2
    assert pictures(out) == expected
    assert hidden(out) == []
    assert max(Counter(made_by(out)).values()) == 1
    assert finish(start(jobs, "-o", out, log=log), log) == 0
    assert log.read_text().splitlines()[-1].startswith(f"0 made, {count} were there")


def test_one_job_started_twice(start, calm, tmp_path):
    jobs, expected = calm
    out, logs = tmp_path / "out", [tmp_path / "log0", tmp_path / "log1"]
    both = [start(jobs, "-o", out, log=log) for log in logs]
    assert sorted(finish(*each) for each in zip(both, logs, strict=True)) == [0, 1]
    refused = next(log.read_text() for log in logs if "Error" in log.read_text())
    assert "is working on it already" in refused and "--shard 0/2" in refused
    assert pictures(out) == expected
    assert Counter(made_by(out)) == Counter({name: 1 for name in made_by(out)})


def test_two_shards_at_once(start, calm, tmp_path):
    jobs, expected = calm
    out, logs = tmp_path / "out", [tmp_path / "log0", tmp_path / "log1"]
    both = [start(jobs, "-o", out, "--shard", f"{at}/2", log=logs[at]) for at in range(2)]
    assert [finish(*each) for each in zip(both, logs, strict=True)] == [0, 0], [log.read_text() for log in logs]
    assert pictures(out) == expected
    made = [json.loads((out / f"manifest.{at}-of-2.jsonl").read_text().splitlines()[-1])["done"] for at in range(2)]
    assert made == [ITEMS // 2, ITEMS // 2]


@contextmanager
def disk(folder: Path, options: str):
    """A disk of its own, in memory; skips where mounting is not allowed."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full(start, calm, tmp_path):
    jobs, expected = calm
    log = tmp_path / "log"
    with disk(tmp_path / "disk", "size=80k") as small:
        assert finish(start(jobs, "-o", small / "out", log=log), log) == 1
        said = log.read_text()
        assert "No space left" in said and f"of {ITEMS} rows are done" in said and "vision-attn batch" in said
        assert "Traceback" not in said
        there = pictures(small / "out")
        assert 0 < len(there) < ITEMS and there.items() <= expected.items()
        assert hidden(small / "out") == []
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert finish(start(jobs, "-o", small / "out", log=log), log) == 0, log.read_text()
        assert pictures(small / "out") == expected and hidden(small / "out") == []


def _end_of_the_disk(reason: int) -> None:
    """The sixth file cannot be finished."""
    real, calls = os.fsync, iter(range(1000))

    def fsync(number):
        if next(calls) == 5:
            raise OSError(reason, os.strerror(reason))
        real(number)

    os.fsync = fsync


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_disk_ends_in_the_middle_of_an_item(start, calm, tmp_path, reason):
    """Files come in pairs, so the sixth is a picture whose settings are written already."""
    jobs, expected = calm
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(jobs, "-o", out, log=log, setup=functools.partial(_end_of_the_disk, reason))
    assert finish(process, log) == 1
    assert os.strerror(reason) in log.read_text() and len(pictures(out)) == 2 and hidden(out) == []
    assert finish(start(jobs, "-o", out, log=log), log) == 0, log.read_text()
    assert pictures(out) == expected


def test_read_only_folder(start, calm, tmp_path):
    jobs, log = calm[0], tmp_path / "log"
    with disk(tmp_path / "disk", "size=1m,ro") as folder:
        assert finish(start(jobs, "-o", folder, log=log), log) in (1, 2)
    assert "Read-only file system" in log.read_text() and "choose another -o" in log.read_text()


def _no_memory_for_large_pictures() -> None:
    """The third call finds no memory, and neither does any call of more than two rows."""
    import torch

    from vision_attn.apps import sampling

    real, calls = sampling.sample_batch, iter(range(1000))

    def sample_batch(loaded, prompts, *rest):
        if next(calls) == 2 or len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, prompts, *rest)

    sampling.sample_batch = sample_batch


def test_out_of_memory(start, calm, tmp_path):
    """One by one, the row that found no memory fails alone, and --retry-failed makes it."""
    jobs, expected = calm
    out, log = tmp_path / "out", tmp_path / "log"
    assert finish(start(jobs, "-o", out, log=log, setup=_no_memory_for_large_pictures), log) == 1
    assert "1 of 24 rows failed" in log.read_text()
    (failed,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert "out of memory" in failed["error"]
    there = pictures(out)
    assert len(there) == ITEMS - 1 and there.items() <= expected.items()
    assert finish(start(jobs, "-o", out, log=log), log) == 1 and pictures(out) == there
    assert finish(start(jobs, "-o", out, "--retry-failed", log=log), log) == 0, log.read_text()
    assert pictures(out) == expected and not (out / "failures.jsonl").exists()


def test_out_of_memory_halves_the_batch(start, calm, tmp_path):
    jobs, expected = calm
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(jobs, "-o", out, "--batch-size", "8", log=log, setup=_no_memory_for_large_pictures)
    assert finish(process, log) == 0, log.read_text()
    assert pictures(out).keys() == expected.keys()
