"""What one sees before the first command: the six things, completion, and a quick start without torch."""

import re
import subprocess
import sys

import click
import pytest

from vision_attn.apps.cli import COMMANDS, START, Commands, cli, main


def test_without_arguments_it_shows_six_things_that_exist(capsys):
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == START and shown.err == ""
    lines = re.findall(r"^  vision-attn (\w+)(.*?)  ", START, re.M)
    assert len(lines) == 6 and {name for name, _ in lines} <= set(COMMANDS)
    for name, rest in lines:
        own = {
            option for param in cli.get_command(None, name).params for option in (*param.opts, *param.secondary_opts)
        }
        assert set(re.findall(r"(?<!\S)--?[a-z]+", rest)) <= own


def test_commands_start_without_heavy_imports():
    heavy = ("torch", "gradio", "numpy", "diffusers", "transformers")
    code = f"""
import sys
from vision_attn.apps.cli import main
for argv in ([], ["--help"], ["completion", "zsh"]):
    assert main(argv) == 0
assert not [name for name in {heavy} if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_such_shell(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "SHELL: got 'tcsh'. Allowed: bash, zsh, fish." in capsys.readouterr().err


def every_command():
    for name in COMMANDS:
        command = Commands().get_command(None, name)
        for one in (*getattr(command, "commands", {}).values(),) or (command,):
            yield pytest.param(one, id=f"{name} {one.name}" if one is not command else name)


@pytest.mark.parametrize("command", list(every_command()))
def test_options_mean_the_same_everywhere(command):
    options = {option: param for param in command.params for option in param.opts}
    assert "--debug" in options
    if "-o" in options:
        assert "--output" in options and options["-o"] is options["--output"]
        assert "--overwrite" in options
    if "--json" in options:
        assert options["--json"].name == "as_json" and options["--json"].is_flag
    if "--seed" in options:
        assert isinstance(options["--seed"].type, click.IntRange) and options["--seed"].type.min == 0
    if "--overwrite" in options:
        assert options["--overwrite"].is_flag
