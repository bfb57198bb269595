"""The programs of apps/scripts, on the built-in models."""

from importlib import import_module
from pathlib import Path

import pytest

from vision_attn.apps import scripts

FILES = sorted(path for path in Path(scripts.__file__).parent.glob("*.py") if path.stem != "__init__")


def run(name: str, *argv: object) -> None:
    import_module(f"vision_attn.apps.scripts.{name}").main([str(each) for each in argv])


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square moves up\n")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_are_short_enough_to_copy(path):
    assert len(path.read_text().splitlines()) < 60


def test_every_one_of_them_is_run_here():
    assert {path.stem for path in FILES} == {"batch_images", "batch_video", "retrofit_vit", "prune_vlm"}


def test_batch_images_goes_on_where_it_stopped(prompts, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "out"
    run("batch_images", prompts, out, "--size", 64, "--steps", 2)
    first, second = out / "a-red-circle-0.png", out / "a-blue-square-moves-up-1.png"
    assert sorted(out.iterdir()) == sorted([first, second])
    assert Image.open(first).size == (64, 64) and "2 sparse, 2 dense" in capsys.readouterr().out
    before = second.read_bytes()
    first.unlink()
    second.write_bytes(b"kept")
    run("batch_images", prompts, out, "--size", 64, "--steps", 2)
    assert second.read_bytes() == b"kept" and f"{second} is there" in capsys.readouterr().out
    first.rename(second)
    assert first != second and second.read_bytes() != before


def test_batch_video_compares_with_dense(prompts, tmp_path, capsys):
    import av

    run("batch_video", prompts, tmp_path / "out", "--frames", 5, "--steps", 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a red circle", "a blue square moves up"]
    assert all(0 < float(line.split()[-1]) <= 1 for line in lines)
    with av.open(str(tmp_path / "out" / "a-red-circle-0.mp4")) as clip:
        assert sum(1 for _ in clip.decode(video=0)) == 5 and '"seed": 0' in clip.metadata["comment"]


def test_retrofit_says_what_each_window_costs(capsys):
    run("retrofit_vit", "--size", 112, "--windows", 3, 7, "--repeats", 1, "--batch", 1)
    small, whole = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert small[:2] == ["3", "18.4%"] and float(small[3]) < float(small[2])
    assert whole[1] == "100.0%" and whole[-1] == "1.000"  # a window of the whole grid changes nothing
    assert float(small[-1]) < 1


def test_prune_counts_right_answers(capsys):
    run("prune_vlm", "--pictures", 3, "--methods", "fastv", "--keep", 0.5)
    untouched, fastv = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert untouched[:2] == ["untouched", "100%"] and fastv[:2] == ["fastv", "50%"]
    assert all(row[3:5] == ["of", "12"] for row in (untouched, fastv))
    assert int(untouched[2]) > 6, "worse than guessing: the questions or the answers are read wrongly"
