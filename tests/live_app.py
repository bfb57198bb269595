"""The web app as a person starts it: `vision-attn app` in a process of its own. For files that say
`pytest_plugins = "live_app"`."""

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE = 300  # seconds; a machine that is busy with other things is not an error


@dataclass
class Live:
    """A running app: its address, where it keeps its files, and what it wrote so far."""

    url: str
    folder: Path
    written: Path
    process: subprocess.Popen

    @property
    def log(self) -> str:
        return self.written.read_text(errors="replace")

    @property
    def failures(self) -> list[str]:
        """What runs of the app died of that was nobody's wrong input."""
        return re.findall(r"a run of the app failed\n.*?^(\w+(?:\.\w+)*: .*?)$", self.log, re.M | re.S)


def start(folder: Path, *options: str) -> Live:
    """Start an app that keeps its files below a folder, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vision_attn.apps", "app", *options, "--port", str(port)]
    offline = {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), "no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    written = folder / "log.txt"
    with written.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **offline})
    live = Live(f"http://127.0.0.1:{port}", folder, written, process)
    until = time.monotonic() + PATIENCE
    while live.url not in live.log:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise RuntimeError(f"the app did not start:\n{live.log[-3000:]}")
        time.sleep(0.2)
    return live


def stop(live: Live) -> int:
    """End it as `kill` does, and return its exit code."""
    live.process.terminate()
    try:
        return live.process.wait(60)
    except subprocess.TimeoutExpired:
        live.process.kill()
        raise


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """The app with all tabs, one for all tests of this process."""
    app = start(tmp_path_factory.mktemp("app"))
    yield app
    assert stop(app) == 0
    assert not paths(app), "uploads or results stayed on the disk"


def paths(live: Live) -> set[Path]:
    """All files of the app now, apart from its log."""
    return {path for path in live.folder.rglob("*") if path.is_file() and path != live.written}
