"""The tab of results: every table and plot is there, in the words of its command."""

import re
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")
from PIL import Image  # noqa: E402

from vision_attn.apps.web import page, results  # noqa: E402


@pytest.mark.parametrize("name", results.RESULTS)
def test_every_result(name, tmp_path):
    text, picture, files = results.show(name, tmp_path)
    assert text.startswith("# ") and "\n|" in text and text.endswith(f"Made by `{results.RESULTS[name].command}`.")
    assert not re.search(r"\]\((?!http)", text), "a link that a browser cannot follow"
    assert files and all(Path(file).parent == tmp_path and Path(file).stat().st_size > 100 for file in files)
    if picture:
        assert Path(picture).parent == tmp_path and min(Image.open(picture).size) > 300
    assert (picture is None) == (results.RESULTS[name].picture is None)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="(?s)got '../secret'.*Allowed: Kernels on a CPU"):
        results.show("../secret", tmp_path)


def test_it_is_a_tab():
    built = page.build(["results"])
    events = [(each.api_name, each.api_visibility, {name for _, name in each.targets}) for each in built.fns.values()]
    assert ("results", "public", {"change"}) in events
    assert [names for _, seen, names in events if seen == "private"] == [{"load"}]  # past the queue: see results.py
