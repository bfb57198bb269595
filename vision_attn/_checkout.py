"""Find the sibling folders when the package runs straight from a checkout.

`kernels/`, `diffusion/`, `mllm/` and `apps/` lie beside `vision_attn/` in the repository and install inside it. When
Python picks up the repository's own `vision_attn/` (the current folder), they are missing there; this mends that.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent
_SIBLINGS = ("kernels", "diffusion", "mllm", "apps")


class _Siblings:
    @staticmethod
    def find_spec(fullname: str, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package != "vision_attn" or name not in _SIBLINGS:
            return None
        folder = _ROOT / name
        if (init := folder / "__init__.py").exists():
            return importlib.util.spec_from_file_location(fullname, init, submodule_search_locations=[str(folder)])
        spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)  # kernels/ has no __init__.py
        spec.submodule_search_locations = [str(folder)]
        return spec


if (_ROOT / "pyproject.toml").exists() and not (_PACKAGE / "kernels").exists() and (_ROOT / "kernels").is_dir():
    sys.meta_path.append(_Siblings)
