"""What the tab Ask does behind its widgets, on the model that ships."""

import threading
from pathlib import Path

import click
import gradio as gr
import numpy as np
import pytest

from vision_attn.apps.answering import options_of
from vision_attn.apps.web import ask, asking, pope
from vision_attn.apps.web.page import Settings, read_picture
from vision_attn.mllm.registry import methods

NONE, DESCRIBE = asking.NONE, "describe the image"
DROPS, STEERS = asking.choices(True)
HERE = Settings(device="cpu")


def silent(what, done, total):
    pass


@pytest.fixture(scope="module")
def loaded():
    return asking.load_model(None, "cpu", "auto")


@pytest.fixture(scope="module")
def picture():
    return read_picture(str(ask.EXAMPLES / "crowd-9.png"))


def chosen(name):
    names = (name, NONE) if name in DROPS else (NONE, name)
    return asking.methods_of(names[0], 0.25, names[1], asking.suggested(*names))


@pytest.mark.parametrize("name", [*DROPS, *STEERS])
def test_every_method_answers_with_its_suggested_options(name, loaded, picture):
    plain, found = asking.ask(loaded, picture, DESCRIBE, chosen(name), 40, silent)
    assert plain["answer"] == loaded.answer(picture, DESCRIBE)
    assert found["name"] == name and found["report"]["methods"][0]["method"] == methods()[name].__name__
    assert len(found["report"]["methods"]) == 1  # what watches is not reported
    assert found["drops"] == (name in DROPS)
    assert [word.split(" · ")[0] for _, word in found["words"]] == found["answer"].split()
    for shown in (found["picture"], *(each for each, _ in found["words"])):
        assert shown.shape == (256, 256, 3) and shown.dtype == np.uint8


def test_nothing_but_what_cannot_be_typed_is_left_out():
    assert {*DROPS, *STEERS, "agla", "var", "visual-blocks"} == set(methods())
    assert set(methods()) - {*sum(asking.choices(False), [])} == {"agla"}
    assert set(asking.SUGGESTED) <= {*DROPS, *STEERS}


def test_the_words_are_looked_up_where_they_are_chosen(loaded, picture):
    """The map of a word is the model's own attention in the pass that chose it."""
    import torch

    from vision_attn.mllm import Capture, attach

    look = Capture()
    (found,) = asking.ask(loaded, picture, DESCRIBE, (), 6, silent)
    with attach(loaded.model, look):
        loaded.generate(loaded.inputs(picture, DESCRIBE), 6)
    image = loaded.inputs(picture, DESCRIBE)["input_ids"][0] == loaded.model.config.image_token_id
    for (_, caption), step in zip(found["words"], look.steps, strict=True):
        share = torch.stack(list(step.values())).mean((0, 2, 3))[0, : len(image)][image].sum()
        assert caption.endswith(f"· {share:.0%}")


def test_words_of_several_tokens(loaded):
    class Pieces:
        def decode(self, ids, skip_special_tokens):
            return "".join({1: "a", 2: " tri", 3: "angle", 4: "", 5: "."}[each] for each in ids)

    model = type("Model", (), {"processor": type("Processor", (), {"tokenizer": Pieces()})})
    assert asking.words_of(model, [1, 2, 3, 5, 4]) == [("a", [0]), ("triangle.", [1, 2, 3])]


def test_dropped_tokens_are_dark(loaded, picture):
    plain, found = asking.ask(loaded, picture, DESCRIBE, asking.methods_of("uniform", 0.25, NONE, ""), 4, silent)
    grey = (np.ptp(found["picture"], axis=-1) == 0).reshape(8, 32, 8, 32).all((1, 3))
    assert grey.sum() == 48 and found["what"].startswith("Kept to the last layer: 25%")


def test_options_are_read():
    assert [str(each) for each in asking.methods_of("fastv", 0.5, "vcd", "layer=3\n\n vcd.alpha=0.5 ")] == [
        "FastV(keep=0.5, layer=3)", "VCD(alpha=0.5, steps=500, beta=0.1, seed=0)"
    ]  # fmt: skip
    assert asking.methods_of("fastv", 0.5, NONE, "keep=7")[0].keep == 7
    assert asking.methods_of(NONE, None, NONE, None) == ()
    assert asking.methods_of("task-kv", None, NONE, "")[0].name == "task-kv"


REFUSED = {
    "option of nothing": ((NONE, 0.2, NONE, "alpha=1"), ["'alpha=1'", "no method"]),
    "no such option": (("fastv", 0.2, NONE, "alpha=1"), ["'alpha=1'", "alpha", "fastv: layer=2"]),
    "no value": (("fastv", 0.2, NONE, "layer"), ["OPTION=VALUE", "fastv: layer=2"]),
    "wrong value": (("fastv", 0.2, NONE, "keep=2.5"), ["keep=2.5"]),
    "wrong kind": ((NONE, 0.2, "vhr", "alpha=much"), ["alpha takes float", "'much'"]),
    "heads in a row": ((NONE, 0.2, "visual-heads", "heads=(1, 2)"), ["heads takes tuple[tuple[int", "(1, 2)"]),
    "deep": (("fastv", 0.2, NONE, "layer=" + "-" * 300 + "1"), ["layer takes int"]),
    "too long": (("fastv", 0.2, NONE, "layer=" + "1" * 500), ["506 characters", "400"]),
    "share": (("fastv", 0, NONE, ""), ["share that stays is 0", "up to 1"]),
    "no share": (("fastv", None, NONE, ""), ["share that stays is None"]),
    "unknown": (("fastw", 0.2, NONE, ""), ["'fastw'", "fastv"]),
    "wrong place": ((NONE, 0.2, "fastv", ""), ["fastv belongs to"]),
    "an object": ((NONE, 0.2, "agla", ""), ["agla", "matcher", "Python"]),
    "table": (("streaming-heads", 0.2, NONE, ""), ["table", "identify"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_attached_is_refused_in_words(case):
    given, parts = REFUSED[case]
    with pytest.raises(click.UsageError) as error:
        asking.methods_of(*given)
    text = error.value.format_message()
    assert all(part in text for part in parts), text
    assert "--" not in text.replace("-" * 300, "") and len(text.splitlines()) <= 3


WRONG = {
    "no picture": ((None, DESCRIBE), "There is no picture"),
    "no question": (("crowd", "  "), "The question is empty"),
    "long question": (("crowd", "red " * 200), "799 characters"),
    "unknown word": (("crowd", "is there a dog?"), "'dog?'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_is_refused_in_words(case):
    (image, question), part = WRONG[case]
    image = image and str(ask.EXAMPLES / "crowd-5.png")
    with pytest.raises((ValueError, click.UsageError), match=part.replace("?", r"\?")):
        list(ask.answer(HERE, image, question, NONE, 0.25, NONE, "", 8))


def test_the_page_is_told_how_far_it_is():
    image = str(ask.EXAMPLES / "crowd-5.png")
    *told, last = ask.answer(HERE, image, DESCRIBE, "fastv", 0.25, "vhr", "", 40)
    assert told and all(len(each) == len(last) == 8 for each in told)
    assert "<progress" in told[-1][0] or "s</p>" in told[-1][0]
    assert "Done" in last[0]
    assert "blue square" in last[1].value  # it is not there
    assert "FastV(keep=0.25" in last[7] and "VHR(" in last[7]


def test_without_a_method_there_is_one_answer():
    *_, last = ask.answer(HERE, str(ask.EXAMPLES / "crowd-5.png"), DESCRIBE, NONE, 0.25, NONE, "", 8)
    assert last[1].value.startswith("there is") and last[4].value == "" and last[5] is None
    assert last[7].startswith("Choose a method")


def test_a_run_that_nobody_waits_for_ends_after_a_token(loaded, picture):
    class Left(Exception):
        pass

    seen = []

    def tell(what, done, total):
        seen.append(done)
        if done == 3:
            raise Left

    with pytest.raises(Left):
        asking.ask(loaded, picture, DESCRIBE, chosen("fastv"), 40, tell)
    assert seen == [1, 2, 3]
    assert loaded.answer(picture, "is there a red triangle in the image?") == "yes"  # nothing stayed attached


def test_a_run_waits_for_the_one_before():
    lock, said = threading.Lock(), []

    def tell(what, done, total):
        said.append(what)
        if what.startswith("Waiting") and lock.locked():
            lock.release()

    lock.acquire()
    with asking.held(lock, tell):
        assert lock.locked()
    assert said[0].startswith("Waiting") and not lock.locked()


def test_pope_is_that_of_the_exam(loaded):
    """Question by question, the answers of the batches that the table of methods is made from."""
    from vision_attn.mllm.exam import Student, exam
    from vision_attn.mllm.metrics import yes_no_scores

    found = pope.ask_all(loaded, (), 5, silent)
    drawn = exam(5)
    said = dict(zip(drawn.questions, Student(loaded.model).answer(drawn)[0], strict=True))
    for split, asked in drawn.splits.items():
        truth = [each.label for each in asked]
        assert found["as it is"][split] == yes_no_scores([said[each] for each in asked], truth)


def test_pope_with_methods_draws_and_tells():
    *told, last = ask.pope(HERE, "random", 0.05, NONE, "", 5)
    assert told and last[1].shape[2] == 3 and last[1].std() > 0
    rows = last[2].splitlines()
    assert len(rows) == 8 and rows[2].startswith("| as it is | random |") and rows[5].startswith("| random | random |")
    assert rows[2].split("|")[3:] != rows[5].split("|")[3:]


HOSTILE = ("-1", "0", "7.5", "1000000000", "x y", "()", "None", "nan", "(1,2)", "((9,9),)", "True", "{}", "1e400")


@pytest.mark.parametrize("name", [*DROPS, *STEERS])
def test_no_option_breaks_a_method(name, loaded):
    """Whatever is typed for an option is attached, or refused with a reason."""
    from vision_attn.mllm import attach

    refused, where = 0, (name, 0.5, NONE) if name in DROPS else (NONE, 0.5, name)
    for option in (each.partition("=")[0] for each in options_of(methods()[name])):
        others = [
            line for line in asking.suggested(name, NONE).splitlines() if not line.startswith(f"{name}.{option}=")
        ]
        for value in HOSTILE:
            typed = "\n".join([*others, f"{name}.{option}={value}"])
            try:
                with attach(loaded.model, *asking.methods_of(*where, typed)):
                    pass
            except (click.UsageError, ValueError) as error:
                assert str(error)
                refused += 1
    assert refused or name == "random"


@pytest.mark.parametrize("images", [4, 51, 7.5, None])
def test_pope_refuses_numbers(images):
    with pytest.raises(ValueError, match="5 to 50"):
        next(ask.pope(HERE, NONE, 0.25, NONE, "", images))


def test_the_page_is_built_without_loading_and_examples_fill_it(monkeypatch):
    monkeypatch.setattr(asking, "load_model", None)
    with gr.Blocks() as page:
        ask.build(HERE)
    public = [each.api_name for each in page.fns.values() if each.api_visibility == "public"]
    assert public == ["ask", "pope"]
    heavy = [each for each in page.fns.values() if each.concurrency_id == "heavy"]
    assert {each.api_name for each in heavy} == {"ask", "pope"} and {each.concurrency_limit for each in heavy} == {1}
    (examples,) = [each for each in page.blocks.values() if isinstance(each, gr.Dataset)]
    for row in examples.samples:
        assert len(row) == 7 and all(value not in (None, "") for value in (row[0], row[1], row[2], row[4]))
        assert asking.methods_of(*row[2:6])
        assert Path(row[0]["path"] if isinstance(row[0], dict) else row[0]).is_file()
