"""Completion as shells do it: bash and fish are started, a line is typed, and Tab pressed; zsh reads its script."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from vision_attn.apps.cli import cli, main
from vision_attn.apps.completion import PROGRAM, SHELLS, VARIABLE

# What is typed, and what it becomes; the folder holds prompts.txt.
TYPED = {
    "vision-attn gen": "generate",
    "vision-attn bench ker": "kernels",
    "vision-attn generate --atten": "--attention",
    "vision-attn generate x --attention rad": "radial",
    "vision-attn completion z": "zsh",
    'vision-attn generate "a b" --device cp': "cpu",
    "vision-attn generate --prompts promp": "prompts.txt",
    "vision-attn batch promp": "prompts.txt",
    "vision-attn show dense -o promp": "prompts.txt",
}


def offered(*words):
    found = BashComplete(cli, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else item.type for item in found]


def test_names_options_and_values_are_offered():
    assert offered("ge") == ["generate"]
    assert offered("bench", "k") == ["kernels"]
    assert "--attention" in offered("generate", "--att")
    assert offered("generate", "--attention", "ra") == offered("explain", "ra") == ["radial"]
    assert offered("explain", "radial", "--rule", "b") == ["block"]
    assert offered("generate", "--dtype", "b") == ["bfloat16"]
    assert offered("ask", "ex") == ["file", "example:0"]
    assert offered("classify", "--model", "clip") == ["file", "clip_shapes"]
    assert offered("generate", "-o", "x") == offered("batch", "x") == offered("attention", "x") == ["file"]


@pytest.mark.parametrize("shell", SHELLS)
def test_it_is_a_script_of_the_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{VARIABLE}={shell}_complete" in script and PROGRAM in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.fixture
def place(tmp_path):
    """A folder with a file to complete, and the environment that finds this vision-attn."""
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / PROGRAM
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vision_attn.apps "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    return tmp_path, {**os.environ, "PATH": path, "TERM": "dumb", "HOME": str(tmp_path), "PS1": "$ "}


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, argv: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.shown = b""
        self.number, self.screen = pty.fork()
        if not self.number:
            os.chdir(folder)
            os.execvpe(argv[0], argv, environment)

    def type(self, text: str, until: str, seconds: float = 60) -> str:
        """What was shown since, once it matches; whatever there is when it does not in time."""
        self.shown = b""
        os.write(self.screen, text.encode())
        end = time.monotonic() + seconds
        while time.monotonic() < end and not re.search(until, self.text()):
            if select.select([self.screen], [], [], 0.2)[0]:
                self.shown += os.read(self.screen, 65536)
        return self.text()

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.shown.decode(errors="replace"))

    def close(self) -> None:
        os.kill(self.number, 9)
        os.waitpid(self.number, 0)
        os.close(self.screen)


@pytest.mark.slow  # Python starts at every Tab
def test_tab_in_bash(place):
    terminal = Terminal(["bash", "--norc", "-i"], *place)
    try:
        loaded = terminal.type(f'eval "$({PROGRAM} completion bash)"; echo "load"ed\n', r"\nloaded\s")
        assert "not found" not in loaded and "error" not in loaded
        for typed, wanted in TYPED.items():
            shown = terminal.type(typed + "\t", rf"{re.escape(wanted)} ")
            assert re.search(rf"{re.escape(wanted)} ", shown), (typed, shown)
            terminal.type("\x15" + "echo 'cle'ar\n", r"\nclear\s")
    finally:
        terminal.close()


@pytest.mark.slow
def test_tab_in_fish(place):
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    folder, environment = place
    lines = "\n".join(f"echo '?'; complete -C '{typed}'" for typed in TYPED)
    script = f"{PROGRAM} completion fish | source\n{lines}\n"
    done = subprocess.run(
        ["fish", "--no-config"], input=script, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    answers = [part.split("\n")[1:-1] for part in done.stdout.split("?")[1:]]
    for (typed, wanted), found in zip(TYPED.items(), answers, strict=True):
        assert [line.split("\t")[0] for line in found] == [wanted], typed
