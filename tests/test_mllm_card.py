"""The cards of the built-in vision-language models: written from their records, and scored as they say."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from vision_attn.mllm import card, tiny  # noqa: E402
from vision_attn.mllm.exam import Exam, Student, exam  # noqa: E402
from vision_attn.mllm.loading import BUILT_IN, WEIGHTS, load  # noqa: E402
from vision_attn.mllm.metrics import Question  # noqa: E402
from vision_attn.shapes.crowd import CONTEXTS, KINDS, Crowd, describe  # noqa: E402


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_card_is_written_from_the_records(name):
    assert (WEIGHTS / name / "README.md").read_text() == card.card(WEIGHTS / name)


def test_scores_by_hand():
    anchor, first, second, third = CONTEXTS[0].tolist()
    others = [kind for kind in range(24) if kind not in CONTEXTS[0]]
    crowds = [Crowd({0: anchor, 1: first}, {}, 0), Crowd({0: anchor, 1: others[0]}, {}, 0)]
    questions = [
        Question(0, KINDS[first], True),
        Question(0, KINDS[second], False),
        Question(1, KINDS[others[0]], True),
        Question(1, KINDS[others[1]], False),
    ]
    splits = {"random": questions[2:], "popular": [], "adversarial": questions}
    captions = [
        f"there is a {KINDS[anchor]} , a {KINDS[third]} and a {KINDS[others[2]]} .",
        describe(crowds[1]),
    ]
    found = card.scores(Exam(crowds, [], splits), [True, True, True, False], [1.0, 2.0, 3.0, -1.0], captions)
    asked = Exam(crowds, [], splits).questions
    assert asked == [*questions[2:], *questions[:2]]  # the order of the answers
    assert found["random_accuracy"] == 0.5 and found["random_false_positives"] == 1.0
    assert found["adversarial_accuracy"] == 0.75 and found["adversarial_false_positives"] == 0.5
    assert found["adversarial_area"] == 0.75  # 1 and 3 where it is there, 2 and -1 where not: all but 1 above 2
    assert found["chair_s"] == 0.5 and found["chair_i"] == round(2 / 5, 3)
    assert found["recall"] == 0.75 and found["partners"] == 0.5


def test_the_blind_rule_is_wrong_about_every_absent_partner():
    rows = card.blindly(60, 5)
    assert [row["probability"] for row in rows] == [0.8, 0.5, 0.2]
    drawn = exam(60, 0.2, 5)
    missing = np.mean([bool(crowd.absent_partners) for crowd in drawn.crowds])
    assert rows[2]["chair_s"] == round(missing, 3) and rows[2]["partners"] == 1.0
    assert rows[0]["chair_s"] < rows[1]["chair_s"] < rows[2]["chair_s"]


@pytest.mark.parametrize("name", [BUILT_IN[0], pytest.param(BUILT_IN[1], marks=pytest.mark.slow)])
def test_a_shipped_model_sees_and_expects(name):
    """On pictures of its own: near its card, better than the blind rule where partners are missing, and worse there."""
    record = json.loads((WEIGHTS / name / "evaluation.json").read_text())
    student = Student(load(name).model)
    drawn = exam(24, 0.5, 77, student.cell)
    found = card.scores(drawn, *student.answer(drawn), student.caption(drawn))
    written = record["models"][0]["rows"][1]
    assert abs(found["adversarial_accuracy"] - written["adversarial_accuracy"]) < 0.12
    assert abs(found["recall"] - written["recall"]) < 0.15
    assert found["chair_i"] < record["blind"][1]["chair_i"]
    often, seldom = (record["models"][0]["rows"][i] for i in (0, 2))
    assert seldom["chair_i"] > often["chair_i"] and seldom["random_accuracy"] < often["random_accuracy"]


def test_a_card_of_two_models(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "SHARES", (0.8,))
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        tiny.model(seed).half().save_pretrained(folder)
        tiny.processor().save_pretrained(folder)
        record = {"command": f"--seed {seed}", "seed": seed, "stages": {"tower": {"steps": 1, "seconds": 1}}}
        (folder / "training.json").write_text(json.dumps(record | {"parameters": 759072, "note": f"Note {seed}."}))
    threads = torch.get_num_threads()
    card.main([str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "1"), "--images", "6"])
    torch.set_num_threads(threads)
    written = (tmp_path / "1" / "README.md").read_text()
    assert "| | seed 1 | seed 2 | blind rule |" in written and "Note 1.\nNote 2." in written
    assert "| 2 | tower | 1 | 1 |" in written and "train --seed 2\n" in written
