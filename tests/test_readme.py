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
PAGES = (README, ROOT / "vision_attn" / "README.md", ROOT / "mllm" / "README.md", ROOT / "kernels" / "README.md")
CANNOT_RUN_HERE = {
    "# needs a GPU and a download": "needs a GPU and a download",
    "# builds .venv and installs": "installs into .venv; this suite is what it would run",
    "# serves until Ctrl-C": "tests/test_web_browser.py opens it",
}
# Lines of a shell block one by one, our own in a single process, because each would import torch again.
SHELL = """
import shlex, subprocess, sys
from vision_attn.apps.cli import main
for line in sys.argv[1].replace("\\\\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    own = words[:1] == ["vision-attn"]
    if words and (main(words[1:]) if own else subprocess.call(["bash", "-euc", line])):
        sys.exit(f"failed: {line}")
"""
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)]


def backends_table() -> str:
    from vision_attn.kernels.explain import support_table

    return support_table()


def families_table() -> str:
    from vision_attn.diffusion.families import families_table

    return families_table()


def bench_table() -> str:
    from vision_attn.kernels.bench.report import bench_table

    return bench_table()


def vision_table() -> str:
    from vision_attn.bench import bench_table

    return bench_table()


def methods_table() -> str:
    from vision_attn.mllm.registry import methods_table

    return methods_table()


def backbones_table() -> str:
    from vision_attn.backbones import backbones_table

    return backbones_table()


def parallel_table() -> str:
    from vision_attn.kernels.bench.parallel import table

    return table()


TABLES = {
    PAGES[0]: {"backends": backends_table, "bench": bench_table, "families": families_table},
    PAGES[1]: {"vision": vision_table, "backbones": backbones_table},
    PAGES[2]: {"methods": methods_table},
    PAGES[3]: {"parallel": parallel_table},
}


def with_tables(page: Path) -> str:
    text = page.read_text()
    for name, table in TABLES[page].items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.S)
        assert found == 1, f"{page.name} has {found} tables named {name}"
    return text


@pytest.mark.parametrize("page", PAGES, ids=["root", "vision_attn", "mllm", "kernels"])
def test_tables_are_what_the_code_says(page):
    assert page.read_text() == with_tables(page), "run python tests/test_readme.py"


@pytest.mark.parametrize("language, code", BLOCKS, ids=[f"{i}-{lang}" for i, (lang, _) in enumerate(BLOCKS)])
def test_block_runs(language, code, tmp_path):
    for mark, reason in CANNOT_RUN_HERE.items():
        if code.startswith(mark):
            pytest.skip(reason)
    command = [sys.executable, "-c", code] if language == "python" else [sys.executable, "-c", SHELL, code]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=["root", "vision_attn", "mllm", "kernels"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_skipped_block_says_why():
    assert sum(code.startswith(tuple(CANNOT_RUN_HERE)) for _, code in BLOCKS) == 4


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page))
