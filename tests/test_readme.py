"""The README: every code block runs, and its tables are what the code says.

`python tests/test_readme.py` rewrites the tables.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CANNOT_RUN_HERE = {
    "# needs a GPU and a download": "needs a GPU and a download",
    "# builds .venv and installs": "installs into .venv; this suite is what it would run",
}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.S)


def backends_table() -> str:
    from vision_attn.kernels.explain import support_table

    return support_table()


def families_table() -> str:
    from vision_attn.diffusion.families import families_table

    return families_table()


def bench_table() -> str:
    from vision_attn.kernels.bench.report import bench_table

    return bench_table()


TABLES = {"backends": backends_table, "bench": bench_table, "families": families_table}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.S)
        assert found == 1, f"README.md has {found} tables named {name}"
    return text


def test_tables_are_what_the_code_says():
    assert README.read_text() == with_tables(README.read_text()), "run python tests/test_readme.py"


@pytest.mark.parametrize("language, code", BLOCKS, ids=[f"{i}-{lang}" for i, (lang, _) in enumerate(BLOCKS)])
def test_block_runs(language, code, tmp_path):
    for mark, reason in CANNOT_RUN_HERE.items():
        if code.startswith(mark):
            pytest.skip(reason)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_every_skipped_block_says_why():
    assert sum(code.startswith(tuple(CANNOT_RUN_HERE)) for _, code in BLOCKS) == 3


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
