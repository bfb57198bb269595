"""The tab Generate without a browser: what is drawn, what is refused, and that Cancel ends the run itself."""

import json
import shutil
import threading
import time

import numpy as np
import pytest

gr = pytest.importorskip("gradio")
pytest.importorskip("diffusers")
av = pytest.importorskip("av")
import click  # noqa: E402
from PIL import Image  # noqa: E402

from vision_attn.apps.web import drawing, generate  # noqa: E402
from vision_attn.apps.web.page import Settings  # noqa: E402
from vision_attn.diffusion import loading  # noqa: E402

SMALL = dict(steps=1, frames=5)
PATIENCE = 120  # seconds for a machine that is busy with other things


def draw(folder, tell=lambda *news: None, **asked):
    return drawing.draw(drawing.Asked("a red circle", **{**SMALL, **asked}), None, "cpu", "auto", folder, tell)


def frames_of(path):
    with av.open(str(path)) as container:
        return container.metadata, np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_sparse_and_dense_from_the_same_noise(tmp_path):
    told = []
    sparse = dict(attention="neighborhood", options={"window": (1, 3, 3)})
    record = draw(tmp_path / "a", lambda *news: told.append(news), **sparse, compare=True, steps=2, seed=3)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {f"a-red-circle-3{end}" for end in (".mp4", ".dense.mp4", ".sheet.png", ".json")}
    steps = [done for what, done, total in told if what == "Drawing"]
    assert steps == sorted(steps) and set(steps) == set(range(5)) and {total for *_, total in told[2:]} == {4}
    assert [what for what, *_ in told][0] == "Loading the model" and ("Warming up", 0, 4) in told
    metadata, pictures = frames_of(record["files"]["video"])
    settings = json.loads(metadata["comment"])
    assert (settings["prompt"], settings["seed"], settings["frames"]) == ("a red circle", 3, 5)
    assert settings["attention"]["window"] == [1, 3, 3] and pictures.shape == (5, 192, 192, 3)
    plain = draw(tmp_path / "b", steps=2, seed=3)
    assert (frames_of(plain["files"]["video"])[1] == frames_of(record["files"]["dense video"])[1]).all()
    assert (frames_of(plain["files"]["video"])[1] != pictures).any()
    kept = record["report"]["denoisers"][0]["kept"]
    assert 0 < kept < 1 and drawing.share(record) == f"{kept:.1%}" and drawing.share(plain) == "100%"
    text = drawing.describe(record)
    assert f"| neighborhood | {record['seconds']:.2f} s | {kept:.1%} |" in text and "as fast as dense" in text
    assert "dense" in drawing.describe(plain) and "fast" not in drawing.describe(plain)


def test_a_picture_a_longer_and_a_larger_video(tmp_path):
    picture = draw(tmp_path / "a", frames=1, attention="circle", options={"radius": 2})
    with Image.open(picture["files"]["picture"]) as image:
        assert json.loads(image.text["vision-attn"])["attention"]["radius"] == 2 and image.size == (48, 48)
    longer = draw(tmp_path / "b", frames=33, extend="riflex", attention="radial", compare=True)
    assert longer["frames"] == 33 and longer["name"] == "radial + riflex" and "dense video" in longer["files"]
    told = []
    larger = draw(tmp_path / "c", lambda *news: told.append(news), steps=2, enlarge=2)
    metadata, pictures = frames_of(larger["enlarged"]["files"]["video"])
    assert pictures.shape[1:3] == (192, 192) and json.loads(metadata["comment"])["height"] == 96
    assert ("Enlarging 2x", 1, 1) in told and "FreeSwim to 96 x 96" in drawing.describe(larger)
    written = {str(path) for path in (tmp_path / "c").iterdir()}
    assert written == {*larger["files"].values(), *larger["enlarged"]["files"].values()}


def test_no_file_says_where_this_machine_keeps_things(tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(loading.BUILT_IN, model := tmp_path / "my-model")
    try:
        asked = drawing.Asked("a red circle", steps=2, frames=5, enlarge=2, attention="radial", compare=True)
        made = drawing.draw(asked, str(model), "cpu", "auto", folder, lambda *news: None)
    finally:
        drawing.load_pipeline.cache_clear()
    assert made["model"] == made["enlarged"]["model"] == "my-model"
    assert len(list(folder.iterdir())) == 7
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    for name in ("a-red-circle-0.json", "a-red-circle-0.large.json"):
        assert all((folder / each).exists() for each in json.loads((folder / name).read_text())["files"].values())


def test_unknown_words_are_named(tmp_path):
    asked = drawing.Asked("a red dog", steps=1, frames=1)
    record = drawing.draw(asked, None, "cpu", "auto", tmp_path / "a", lambda *news: None)
    assert "does not know dog" in drawing.describe(record)


@pytest.mark.parametrize(
    "asked, said",
    [
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt="red " * 200), "800 characters long"),
        (dict(negative="red " * 200), "negative prompt is 800"),
        (dict(frames=6), "frames: got 6, but Wan needs 4n+1; nearest: 5 and 9"),
        (dict(height=50), "height: got 50"),
        (dict(height=480, width=480), "draws up to 16 times"),
        (dict(frames=17, enlarge=5), "25 times the model's own 17 x 48 x 48"),
        (dict(frames=17, enlarge=2), "FreeSwim repeats"),
        (dict(frames=1, enlarge=2), "FreeSwim enlarges videos"),
        (dict(frames=17, extend="riflex"), "nothing to extend"),
        (dict(frames=33, extend="ultravico", attention="radial"), "Choose another extension, or dense"),
        (dict(attention="neighborhood", options={"window": 99}), "window"),
        (dict(attention="circle"), "needs --radius"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_a_model_is_loaded(asked, said, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    folder = tmp_path / "run"
    folder.mkdir()
    asked = drawing.Asked(**{"prompt": "a red circle", **SMALL, **asked})
    with pytest.raises((ValueError, click.UsageError)) as caught:
        drawing.draw(asked, None, "cpu", "auto", folder, lambda *news: None)
    text = caught.value.message if isinstance(caught.value, click.UsageError) else str(caught.value)
    assert said in text and len(text.splitlines()) <= 3 and not folder.exists()


@pytest.mark.parametrize("after", [2, 6, 9])  # while it warms up, draws sparse, draws dense
def test_a_run_that_is_stopped_leaves_nothing_behind(after, tmp_path):
    calls = []

    def tell(*news):
        calls.append(news)
        if len(calls) > after:
            raise drawing.Stopped

    sparse = dict(attention="radial", compare=True, steps=2)
    with pytest.raises(drawing.Stopped):
        draw(tmp_path / "stopped", tell, **sparse)
    assert len(calls) == after + 1 and not (tmp_path / "stopped").exists() and not drawing._one.locked()
    pipe = drawing.load_pipeline(None, "cpu", "auto").pipe
    assert not pipe.transformer._forward_pre_hooks
    registries = [getattr(module, "_diffusers_hook", None) for module in pipe.transformer.modules()]
    assert not any(registry.hooks for registry in registries if registry is not None)
    again, fresh = draw(tmp_path / "again", **sparse), draw(tmp_path / "fresh", **sparse)
    assert again["comparison"]["psnr"] == fresh["comparison"]["psnr"]


def test_work_in_the_background_tells_ends_and_raises():
    def work(tell):
        for number in range(3):
            tell("counting", number, 3)
            time.sleep(0.01)
        return "done"

    *told, last = drawing.background(work)
    assert last == ("result", "done") and all(kind == "told" for kind, _ in told)
    with pytest.raises(ZeroDivisionError):
        list(drawing.background(lambda tell: 1 / 0))


def test_work_whose_listener_leaves_is_stopped():
    ended = threading.Event()

    def work(tell):
        try:
            while True:
                tell("for ever", 0, 0)
                time.sleep(0.01)
        except drawing.Stopped:
            ended.set()
            raise

    listener = drawing.background(work)
    assert next(listener) == ("told", ("for ever", 0, 0))
    assert not ended.wait(0.1)
    listener.close()
    assert ended.wait(PATIENCE)


def test_the_page_gets_progress_then_files(tmp_path, monkeypatch):
    settings = Settings(device="cpu", folder=tmp_path)
    values = ["a red circle", "", 0, 5, 48, 48, 1, 3.0, "radial", "", "none", True, 1]
    *before, last = generate.answer(settings, [], *values)
    assert before and all("<progress" in each[0] for each in before) and {len(each) for each in before} == {14}
    assert len(last) == 14 and "Done" in last[0] and last[1].startswith("**radial**")
    shown = last[-3]
    assert shown[0][1] == "a red circle (radial, seed 0)"
    *_, last = generate.answer(settings, [*shown, ("/gone.mp4", "deleted")], *values[:3], 1, *values[4:])
    assert [path for path, _ in last[-3]][1:] == [shown[0][0]] and last[-3][0][0].endswith("a-red-circle-0.png")
    for place, wrong in ((2, -1), (2, 2**32), (2, None), (3, 5.5), (4, 0)):
        with pytest.raises(ValueError, match="Allowed: whole numbers"):
            next(generate.answer(settings, [], *values[:place], wrong, *values[place + 1 :]))
    monkeypatch.setattr(generate, "KEPT", 1)
    *_, last = generate.answer(settings, shown, *values)
    assert len(last[-3]) == 1


def test_one_heavy_slot_one_public_name_and_examples_that_can_be_drawn(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr(gr, "Examples", lambda rows, inputs, **_: made.update(rows=rows, inputs=inputs))
    with gr.Blocks() as page:
        generate.build(Settings())
    events = {fn.api_name: fn for fn in page.fns.values() if fn.api_visibility == "public"}
    assert list(events) == ["generate"]
    assert (events["generate"].concurrency_id, events["generate"].concurrency_limit) == ("heavy", 1)
    assert events["generate"].inputs[1:] == made["inputs"] and len(made["rows"]) == 5
    planned = []
    monkeypatch.setattr(generate.drawing, "draw", lambda asked, *_: planned.append(asked))
    for row in made["rows"]:
        assert len(row) == len(made["inputs"])
        with pytest.raises(TypeError):  # there is no record to show
            list(generate.answer(Settings(folder=tmp_path), [], *row))
        drawing.plan(planned[-1], None, tmp_path)


def test_cancel_ends_the_run_itself(tmp_path):
    """Over the network: the thread ends, nothing is kept, and the one slot is free for the next."""
    client = pytest.importorskip("gradio_client")
    settings = Settings(device="cpu", folder=tmp_path)
    with gr.Blocks() as page:
        generate.build(settings)
    _, address, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    try:
        caller = client.Client(address, verbose=False)
        values = ["a red circle", "", 0, 17, 48, 48, 100, 3.0, "radial", "", "none", False, 1]
        job = caller.submit(*values, api_name="/generate")
        until = time.monotonic() + PATIENCE
        while not any("step 1 of" in each[0] for each in job.outputs()) and time.monotonic() < until:
            time.sleep(0.05)
        assert drawing._one.locked() and len(list(tmp_path.iterdir())) == 1
        job.cancel()
        while any(each.name == "vision-attn-draw" for each in threading.enumerate()) and time.monotonic() < until:
            time.sleep(0.05)
        assert not drawing._one.locked() and not list(tmp_path.iterdir())
        said = "".join(each[0] for each in job.outputs())
        assert "step 100 of" not in said and "Done" not in said
        done = caller.predict(*values[:3], 1, *values[4:6], 1, *values[7:], api_name="/generate")
        assert "Done" in done[0] and len(list(tmp_path.iterdir())) == 1
        with Image.open(next(path for path in done[-1]["value"] if path.endswith("-0.png"))) as image:
            assert json.loads(image.text["vision-attn"])["prompt"] == "a red circle"
    finally:
        page.close(verbose=False)
