"""The frame of the page, and the tab of patterns, without a browser."""

import os
import time

import numpy as np
import pytest

gr = pytest.importorskip("gradio")
import click  # noqa: E402

from vision_attn import Neighborhood  # noqa: E402
from vision_attn.apps.web import TABS, page, patterns  # noqa: E402
from vision_attn.apps.web.grid_picture import sheet, token_at  # noqa: E402


def test_a_page_has_the_tabs_that_were_asked_for():
    names = {each.api_name for each in page.build(["patterns", "results"]).fns.values() if each.api_name}
    assert names >= {"pattern", "results"} and "generate" not in names
    with pytest.raises(ValueError, match=f"unknown tab 'maps'; allowed: {', '.join(TABS)}"):
        page.build(["maps"])


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("Seed: got -1.\nAllowed: 0 and more."), "Seed: got -1"),
        (click.UsageError("--window: got x"), "--window: got x"),
        (ValueError("<script>alert(1)</script> & more"), "&lt;script>alert(1)&lt;/script> &amp; more"),
        (MemoryError(), "Out of memory"),
        (KeyError("/secret/path"), "Something broke (KeyError)"),
    ],
)
def test_errors_become_words(error, words):
    def fails(*_):
        raise error

    def fails_later(*_):
        yield 1
        raise error

    with pytest.raises(gr.Error) as found:
        page.kind(fails)(1)
    assert words in found.value.message and "secret" not in found.value.message
    steps = page.kind(fails_later)(1)
    assert next(steps) == 1
    with pytest.raises(gr.Error):
        next(steps)


def test_folders_of_runs_are_their_own_and_old_ones_go(tmp_path):
    settings = page.Settings(folder=tmp_path)
    old, other = settings.new_folder(), settings.new_folder()
    assert old != other
    long_ago = time.time() - page.KEEP - 10
    os.utime(old, (long_ago, long_ago))
    settings.new_folder()
    assert not old.exists() and other.exists()


def test_pictures_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="There is no picture"):
        page.read_picture(None)
    file = tmp_path / "upload.png"
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError) as found:
        page.read_picture(str(file))
    assert "upload.png" in str(found.value) and str(tmp_path) not in str(found.value)


def test_what_a_query_sees_is_what_the_mask_says():
    pattern, grid, query = patterns.read("neighborhood", "6,8", "0,7", {"window": "3"})
    assert pattern == Neighborhood(3) and (grid, query) == ((6, 8), (0, 7))
    picture, words = patterns.seen_picture(pattern, grid, query)
    assert "0,7" in words and "**9 of 48**" in words and picture.dtype == np.uint8
    seen, cell, blue = pattern.mask(grid).reshape(6, 8, 6, 8)[0, 7], sheet(grid, 0).cell, tuple(patterns.COLORS[1])
    for row in range(6):
        for column in range(8):
            y, x = int((row + 0.5) * cell), int((column + 0.5) * cell)
            assert token_at(grid, 0, x, y) == (row, column)
            if (row, column) != query:
                assert (tuple(picture[y, x]) == blue) == bool(seen[row, column])


@pytest.mark.parametrize(
    "typed, words",
    [
        (("neighborhood", "8,8", "9,0", {"window": "3"}), "9"),
        (("neighborhood", "4,8", "", {"window": "7"}), "larger than the grid"),
        (("neighborhood", "a,b", "", {"window": "3"}), "a,b"),
        (("neighborhod", "8,8", "", {}), "neighborhod"),
        (("neighborhood", "100000,100000", "", {"window": "3"}), "100"),
    ],
)
def test_patterns_that_cannot_be(typed, words):
    with pytest.raises((ValueError, click.ClickException)) as found:
        patterns.read(*typed)
    error = found.value
    assert words in (error.message if isinstance(error, click.ClickException) else str(error))


def test_the_report_names_density_and_backends():
    text = patterns.report(Neighborhood(5), (16, 16), 2, 32, "float32", "cpu")
    assert "**Density 9.8%**" in text and "| tiled |" in text and "Speed-up bound by tile shape" in text
