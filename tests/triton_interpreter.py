"""Running tests in the interpreter of Triton, in a process of their own: one either interprets or compiles kernels."""

import os
import pathlib
import subprocess
import sys

import pytest
import triton


def run_interpreted(name: str, marked: str, which: str = "") -> None:
    """Run the tests of the file `name` that are marked so and whose names match `which`."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("older interpreters cannot loop over a count that was loaded; seen with triton 3.6")
    file = pathlib.Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, "-k", which, str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parent.parent)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
