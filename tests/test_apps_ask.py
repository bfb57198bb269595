"""`vision-attn ask` and `caption`: what they print and draw, and what they refuse."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_apps_usage import assert_one_message

pytest.importorskip("transformers")
from vlm_models import PRUNED  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.apps import answering, kept  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.mllm.loading import Loaded, load  # noqa: E402
from vision_attn.mllm.tokens import Tokens  # noqa: E402

RED = "Is there a red circle in the image?"


@pytest.fixture(scope="module")
def loaded():
    return load()


def run(argv, capsys, code=0):
    assert main(argv) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_question_and_a_caption(capsys):
    assert run(["ask", "example:3", RED], capsys) == "no\nwhat is there: blue ring, yellow bar\n"
    said = run(["caption", "example:3"], capsys).splitlines()[0]
    assert said.startswith("there is a blue ring") and said.endswith(".")


def test_the_answers_are_those_of_attach(loaded, tmp_path, capsys):
    """Side by side, with the report, from a file."""
    capsys.readouterr()
    picture, _ = answering.draw_example(5, loaded)
    Image.fromarray(picture).save(tmp_path / "in.png")
    argv = ["caption", str(tmp_path / "in.png"), "--prune", "fastv", "--keep", "0.1", "--set", "layer=1", "--compare"]
    printed = json.loads(run([*argv, "--json"], capsys))
    untouched, pruned = printed["answers"]
    assert untouched["answer"] == loaded.answer(picture, "describe the image") and untouched["report"] is None
    with mllm.attach(loaded.model, mllm.FastV(keep=0.1, layer=1)) as attached:
        assert pruned["answer"] == loaded.answer(picture, "describe the image")
        prompt = attached.report.prompts[0]
    assert pruned["report"]["prompts"][0]["tokens"] == prompt.tokens and prompt.kept == [6]
    assert pruned["methods"] == [{"method": "FastV", "keep": 0.1, "layer": 1}] and printed["there"] is None
    text = run(argv, capsys).splitlines()
    assert text[0] == f"untouched  {untouched['answer']}" and text[1] == f"fastv      {pruned['answer']}"
    assert any("6 of 64 tokens" in line for line in text)


def test_several_methods_and_their_options():
    made = answering.build(("random", "fastv"), (), "16", ("seed=3", "fastv.layer=1", "fastv.keep=0.5"))
    assert made == [mllm.RandomPrune(keep=16, seed=3), mllm.FastV(keep=0.5, layer=1)]
    assert answering.build((), ("vcd",), None, ()) == [mllm.VCD()]
    assert answering.build(("fastv",), (), "1.0", ())[0].keep == 1.0


def test_every_method_is_listed_where_it_belongs(capsys):
    lines = run(["ask", "--list"], capsys).splitlines()
    named = {line.split()[1]: line.split()[0] for line in lines if line.startswith("--")}
    assert named.keys() == answering.methods().keys()
    assert named["fastv"] == named["holov"] == named["kvprune"] == "--prune" and named["vcd"] == "--method"


def test_what_stays_is_bright(loaded, tmp_path, capsys):
    """The panel of a pruned answer, token by token, against what the run says it kept."""
    capsys.readouterr()
    out = tmp_path / "kept.png"
    argv = ["ask", "example:3", RED, "--prune", "uniform", "--keep", "0.25", "--compare", "-o", str(out)]
    assert run(argv, capsys).splitlines()[-1] == str(out)
    drawn = cv2.imread(str(out))[..., ::-1]
    picture, _ = answering.draw_example(3, loaded)
    inputs = loaded.inputs(picture, RED)
    first = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
    with mllm.attach(loaded.model, mllm.UniformPrune(keep=0.25)) as attached:
        output = loaded.generate(inputs, 1)
        read = attached.engine.prompts[output.past_key_values].read
    stays = torch.zeros(64, dtype=torch.bool)
    stays[read.column[0][read.visual[0]] - first] = True
    assert stays.sum() == 16
    colour = (
        drawn[-232:-8].astype(int).ptp(-1) if hasattr(np.ndarray, "ptp") else np.ptp(drawn[-232:-8].astype(int), -1)
    )
    left, panel = 8 + 2 * 232, 224
    vivid = colour[:, left : left + panel].reshape(8, 28, 8, 28).max((1, 3)).flatten() > 0  # grey where it is gone
    assert vivid.tolist() == stays.tolist()


def test_columns_that_layers_and_heads_hold():
    column = torch.tensor([[0, 1, 2, 4]])  # the first is none: rows are right-aligned
    valid = torch.tensor([[False, True, True, True]])
    both = Tokens(column, valid, valid)
    heads = Tokens(torch.tensor([[[0, 4, -1], [2, 4, -1]]]), torch.ones(1, 2, 3, dtype=torch.bool), None)
    prompt = type("Prompt", (), {"cached": [both, heads]})
    assert kept.kept(prompt, 5).tolist() == [[[0, 1, 1, 0, 1]], [[0.5, 0, 0.5, 0, 1]]]


def test_the_row_that_is_drawn_is_the_models():
    loaded = load()  # its own: the attention function is changed
    picture, _ = answering.draw_example(0, loaded)
    inputs = loaded.inputs(picture, RED)
    row = kept.last_row(loaded, inputs)
    assert "vision_attn" not in loaded.model.config.get_text_config()._attn_implementation
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = loaded.model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(row, torch.stack(maps)[:, :, :, -1].mean((0, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
def test_a_picture_for_every_family(vlm, monkeypatch):
    """Tiles, patches and videos' grids: the view of the whole picture, from the prompt as the processor makes it."""
    asked = Loaded(vlm.build(), SimpleNamespace(batch_decode=lambda ids, **_: ["words"]), "random")
    inputs, shown = vlm.inputs([[3, "image", 4]]), []
    monkeypatch.setattr(kept, "dimmed", lambda seen, share: shown.append(share) or seen)
    answers = [answering.reply(asked, inputs, methods, 2) for methods in ((), (mllm.UniformPrune(keep=4),))]
    drawn = cv2.imdecode(
        np.frombuffer(kept.draw(asked, np.zeros((24, 48, 3), np.uint8), inputs, "words", answers), "u1"), 1
    )
    assert drawn.shape[1] >= 3 * 24
    assert 0 < shown[0].sum() <= 4 and set(shown[0].flatten()) == {0.0, 1.0}


def test_the_picture_as_the_model_sees_it(loaded):
    picture, _ = answering.draw_example(0, loaded)
    assert np.array_equal(kept.as_seen(loaded, picture, loaded.inputs(picture, RED)), picture)


ASK = ["ask", "example:0", RED]
REFUSED = {
    "unknown method": ([*ASK, "--prune", "fastw"], ["--prune", "'fastw'", "did you mean 'fastv'", "--list"]),
    "steering that prunes": ([*ASK, "--method", "fastv"], ["fastv belongs to --prune"]),
    "pruning that steers": ([*ASK, "--prune", "vcd"], ["vcd belongs to --method"]),
    "twice": ([*ASK, "--prune", "fastv", "--prune", "fastv"], ["fastv is given twice"]),
    "keep of nothing": ([*ASK, "--keep", "0.2"], ["--keep needs a method"]),
    "keep of a steering method": ([*ASK, "--method", "vcd", "--keep", "0.2"], ["--keep needs a method"]),
    "keep zero": ([*ASK, "--prune", "fastv", "--keep", "0"], ["keep=0", "above 0 and up to 1.0"]),
    "keep in words": ([*ASK, "--prune", "fastv", "--keep", "few"], ["fastv: keep takes float | int; got 'few'"]),
    "no such option": ([*ASK, "--prune", "fastv", "--set", "alpha=1"], ["none of the methods", "'alpha'"]),
    "no such option by name": ([*ASK, "--prune", "fastv", "--set", "fastv.alpha=1"], ["no option 'alpha'", "layer"]),
    "option of another": ([*ASK, "--prune", "fastv", "--set", "vcd.alpha=1"], ["NAME.OPTION=VALUE"]),
    "option without value": ([*ASK, "--prune", "fastv", "--set", "layer"], ["OPTION=VALUE"]),
    "a table to give": (
        [*ASK, "--prune", "streaming-heads"],
        ["streaming-heads: StreamingHeads(table=...) needs a number"],
    ),
    "compare with nothing": ([*ASK, "--compare"], ["--compare needs a method"]),
    "empty question": (["ask", "example:0", "  "], ["the question is empty"]),
    "empty prompt": (["caption", "example:0", "--prompt", ""], ["--prompt: it is empty"]),
    "unknown word": (["ask", "example:0", "is there a dog?"], ["'dog?'", "Its words: user", "red circle"]),
    "example": (["ask", "example:x", RED], ["example:0, example:1"]),
    "kind of picture": ([*ASK, "-o", "{tmp}/x.jpg"], ["'x.jpg'", ".png"]),
    "dtype": ([*ASK, "--dtype", "int8"], ["--dtype: got 'int8'"]),
    "device": ([*ASK, "--device", "tpu"], ["--device: got 'tpu'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_usage(case, tmp_path, capsys):
    argv, parts = REFUSED[case]
    assert_one_message(main([part.format(tmp=tmp_path) for part in argv]), capsys, 2, parts)
    assert list(tmp_path.iterdir()) == []


FAILS = {
    "no file": (["ask", "{tmp}/none.png", RED], ["none.png", "No such file"]),
    "no picture": (["ask", "{tmp}/text.png", RED], ["text.png is not a picture"]),
    "no model": ([*ASK, "--model", "{tmp}/nowhere"], ["there is no folder"]),
    "too many kept": ([*ASK, "--prune", "random", "--keep", "65"], ["keep=65", "64 tokens"]),
    "layer that is not there": ([*ASK, "--prune", "fastv", "--set", "layer=9"], ["layer", "9"]),
    "a picture that is there": ([*ASK, "-o", "{tmp}/there.png"], ["there.png already there", "--overwrite"]),
}


@pytest.mark.parametrize("case", FAILS)
def test_failures(case, tmp_path, capsys):
    (tmp_path / "text.png").write_text("words")
    (tmp_path / "there.png").write_text("old")
    argv, parts = FAILS[case]
    assert_one_message(main([part.format(tmp=tmp_path) for part in argv]), capsys, 1, parts)
    assert {path.name for path in tmp_path.iterdir()} == {"text.png", "there.png"}
    assert (tmp_path / "there.png").read_text() == "old"
