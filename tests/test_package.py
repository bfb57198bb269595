"""The package: what is in it, what it imports, and that it works from wherever it is used."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]  # package -> folder
# What each folder may import from the others: arrows point down only.
ALLOWED = {
    "kernels": {"kernels"},
    "vision_attn": {"vision_attn", "kernels"},
    "diffusion": {"diffusion", "vision_attn", "kernels"},
    "mllm": {"mllm", "vision_attn", "kernels"},
    "apps": {"apps", "mllm", "diffusion", "vision_attn", "kernels"},
}


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).exists()]


def run(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_list_equals_the_folders():
    found = set()
    for package, folder in FOLDERS.items():
        for path in sources(folder):
            inside = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inside]))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_has_a_readme_and_the_version_is_one():
    import vision_attn

    assert all((ROOT / folder / "README.md").exists() for folder in FOLDERS.values())
    assert PROJECT["project"]["version"] == vision_attn.__version__


def test_imports_point_down_only():
    for folder, allowed in ALLOWED.items():
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in names:
                    parts = name.split(".")
                    assert parts[0] != "kernels", f"{path.name} imports the bare name 'kernels' (another project's)"
                    if parts[0] == "vision_attn":
                        owner = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "vision_attn"
                        assert owner in allowed, f"{path.relative_to(ROOT)} imports {name}, which lies above it"


def test_import_needs_torch_only():
    heavy = "diffusers transformers timm natten cv2 matplotlib typer gradio peft PIL av triton.language"
    code = (
        "import sys, vision_attn; vision_attn.attend, vision_attn.explain, vision_attn.Radial, vision_attn.attach;"
        f"print([m for m in {heavy.split()!r} if m in sys.modules and m not in before])"
    )
    # torch itself may import some of these; only what comes on top counts
    assert run("import sys, torch; before = set(sys.modules);" + code, ROOT) == "[]"


def test_works_inside_and_outside_the_checkout(tmp_path):
    code = (
        "import torch, vision_attn as va, vision_attn.diffusion, vision_attn.apps, vision_attn.mllm;"
        "q = torch.randn(1, 8, 8, 2, 16); print(tuple(va.attend(q, q, q, va.Neighborhood(3)).shape))"
    )
    assert run(code, ROOT) == run(code, tmp_path) == "(1, 8, 8, 2, 16)"
    # not installed at all: only the path to the checkout
    forget = "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
    bare = f"import sys; {forget}; sys.path.insert(0, {str(ROOT)!r});"
    assert run(bare + code, tmp_path) == "(1, 8, 8, 2, 16)"


def test_the_folder_kernels_never_hides_the_package_of_that_name():
    found = run("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)", ROOT)
    assert not found.startswith(str(ROOT)), "kernels/ must have no __init__.py"


def test_public_names_resolve_and_unknown_ones_say_what_exists():
    import vision_attn

    assert all(getattr(vision_attn, name) is not None for name in vision_attn.__all__)
    with pytest.raises(AttributeError, match="attend"):
        vision_attn.nothing  # noqa: B018


def test_wheel_holds_the_sources_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy, because building leaves files behind
    for path in tracked():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {".py", ".typed", ".json", ".csv", ".cpp", ".h", ".safetensors"}
    expected = set()
    for path in tracked():
        top = path.relative_to(ROOT).parts[0]
        shown = path.name == "RESULTS.md" or {"weights", "results", "examples"} & set(path.parts)  # by the app too
        if top in FOLDERS.values() and (path.suffix in data or shown):
            inside = path.relative_to(ROOT / top).as_posix()
            expected.add(f"vision_attn/{inside}" if top == "vision_attn" else f"vision_attn/{top}/{inside}")
    assert held == expected


def test_nothing_committed_is_too_large_or_names_a_machine():
    weights = [path for path in tracked() if path.suffix == ".safetensors"]
    assert all(path.stat().st_size <= 8_000_000 for path in weights)
    assert sum(path.stat().st_size for path in weights) <= 20_000_000
    path_of_a_machine = re.compile(r"(?<![\w./])/(work|root|home|tmp|opt)/\w")
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".json", ".yml", ""} and path.name != "LICENSE":
            assert not path_of_a_machine.search(path.read_text()), path
    assert importlib.util.find_spec("vision_attn") is not None


def test_lint():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
