"""Our names in timm's registry, after either order of imports, and no timm before somebody asks for it."""

import subprocess
import sys

import pytest


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "code",
    [
        "import vision_attn, timm",
        "import timm, vision_attn",
        "import vision_attn; from timm.models import create_model; import timm",
        "import vision_attn.backbones, timm",
        "import vision_attn, importlib; import timm; importlib.reload(vision_attn)",
    ],
)
def test_names_are_registered(code):
    done = _run(f"{code}\nassert timm.is_model('nat_mini'), 'nat_mini'\nassert timm.__loader__ is timm.__spec__.loader")
    assert done.returncode == 0, done.stderr
    assert "Overwriting" not in done.stderr


def test_timm_waits_for_its_first_import():
    done = _run("import sys, vision_attn\nassert not {'timm', 'vision_attn.backbones'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_failure_of_ours_leaves_timm_usable():
    code = """import sys, warnings, vision_attn
sys.modules['vision_attn.backbones'] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import timm
assert timm.is_model('resnet18')
assert any('not the backbones of vision_attn' in str(w.message) for w in caught), caught"""
    done = _run(code)
    assert done.returncode == 0, done.stderr
