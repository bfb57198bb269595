"""The table of methods: the exam, the answers, their scores, and runs that stop and go on."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from vision_attn.mllm import (
    FastV,
    RandomPrune,
    attach,
    comparison,
    evaluate,
    exam,
    kv_bytes,
    prefill_flops,
    registry,
    results,
    tiny,
)
from vision_attn.mllm.comparison import BLIND, GREEDY, RANDOM, THRESHOLD, rows, taken
from vision_attn.mllm.evaluate import Cache, Questions, cost, fill, fingerprint
from vision_attn.mllm.exam import CHAIR, Student, blind
from vision_attn.mllm.methods.vcd import VCD
from vision_attn.mllm.metrics import SPLITS, margin_area, yes_no_scores
from vision_attn.shapes.crowd import CELL, CONTEXTS, KINDS, mentioned, sample_crowd

SMALL = Questions(images=12)


@pytest.fixture(scope="module")
def drawn():
    return SMALL.draw(CELL)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    made = Student(tiny.model().eval(), batch=7)
    with torch.no_grad():  # answers of a random model hardly depend on the picture
        for parameter in made.model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    return made


def invented(drawn, seed):
    rng = np.random.default_rng(seed)
    margins = [float(rng.integers(-3, 4)) + 0.5 * q.label for q in drawn.questions]
    captions = [exam.describe(sample_crowd(np.random.default_rng((seed, i)), 0.8)) for i in range(len(drawn.crowds))]
    captions[1] = ""
    return {"said": [margin > 0 for margin in margins], "margins": margins, "captions": captions}


def test_exam_asks_for_what_is_there_and_what_usually_is(drawn):
    assert [len(split) for split in drawn.splits.values()] == [len(drawn.splits["random"])] * 3
    for questions in drawn.splits.values():
        assert all(q.label == (q.object in drawn.truth[q.image]) for q in questions)
    usual = [{KINDS[kind] for kind in CONTEXTS[crowd.context]} for crowd in drawn.crowds]
    partners = {
        split: np.mean([question.object in usual[question.image] for question in questions if not question.label])
        for split, questions in drawn.splits.items()
    }
    assert partners["adversarial"] > 2 * partners["random"]
    first = {q.image: q.object for q in reversed(drawn.splits["random"]) if q.label}
    for image, name in first.items():
        anchor = KINDS[CONTEXTS[drawn.crowds[image].context][0]]
        assert name != anchor and (name in usual[image] or not (usual[image] - {anchor}) & drawn.truth[image])
    large = SMALL.draw(3 * CELL)
    assert large.crowds == drawn.crowds and large.splits == drawn.splits
    assert large.pictures[0].shape == (12 * CELL, 12 * CELL, 3)
    assert SMALL.draw(CELL, calibration=True).crowds != drawn.crowds


def test_blind_rule_names_the_context(drawn):
    answers = blind(drawn)
    for crowd, caption in zip(drawn.crowds, answers["captions"], strict=True):
        assert sorted(mentioned(caption)) == sorted(CONTEXTS[crowd.context])
    for question, said in zip(drawn.questions, answers["said"], strict=True):
        assert said == (KINDS.index(question.object) in CONTEXTS[drawn.crowds[question.image].context])


def test_answers_are_those_of_the_model_asked_one_by_one(student, drawn):
    said, margins = student.answer(drawn)
    captions = student.caption(drawn)
    read = tiny.processor()
    for number in (0, 9, len(said) - 1):
        question = drawn.questions[number]
        text = tiny.prompt(f"is there a {question.object} in the image ?")
        inputs = read(images=drawn.pictures[question.image], text=text, return_tensors="pt")
        with torch.no_grad():
            logits = student.model(**inputs).logits[0, -1]
        yes, no = read.tokenizer.convert_tokens_to_ids(["yes", "no"])
        assert margins[number] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
        assert said[number] == (read.tokenizer.decode(logits.argmax()) != "no")
    assert len({round(margin, 3) for margin in margins}) > 20
    inputs = read(images=drawn.pictures[3], text=tiny.prompt(tiny.DESCRIBE), return_tensors="pt")
    out = student.model.generate(**inputs, do_sample=False, max_new_tokens=exam.LONGEST)
    assert captions[3] == read.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_scores_are_those_of_the_metrics(drawn):
    answers = invented(drawn, 1)
    every = np.ones((1, len(drawn.crowds)))
    got = {name: float(results.quotient(part, every)[0]) for name, part in results.sums(drawn, answers).items()}
    place = {question: number for number, question in enumerate(drawn.questions)}
    for split in SPLITS:
        questions = drawn.splits[split]
        truth = [q.label for q in questions]
        scores = yes_no_scores([answers["said"][place[q]] for q in questions], truth)
        assert got[f"{split} accuracy"] == pytest.approx(scores["accuracy"])
        assert got[f"{split} yes"] == pytest.approx(scores["yes_ratio"])
        assert got[f"{split} false"] == pytest.approx(scores["false_positive_rate"])
        margins = [answers["margins"][place[q]] for q in questions]
        assert got[f"{split} area"] == pytest.approx(margin_area(margins, truth))
    chair = CHAIR.score(dict(enumerate(answers["captions"])), dict(enumerate(drawn.truth)))
    assert (got["chair_s"], got["chair_i"], got["recall"], got["words"]) == pytest.approx(
        (chair["chair_s"], chair["chair_i"], chair["recall"], chair["length"])
    )


def test_scores_of_resampled_pictures_are_those_of_repeated_ones(drawn):
    answers = invented(drawn, 2)
    answers["margins"][0] = float("inf")  # a token that was ruled out
    answers["margins"][1] = float("inf")
    weights = np.random.default_rng(0).integers(0, 4, len(drawn.crowds))
    place = {question: number for number, question in enumerate(drawn.questions)}
    questions = [q for q in drawn.splits["popular"] for _ in range(weights[q.image])]
    expected = margin_area([answers["margins"][place[q]] for q in questions], [q.label for q in questions])
    got = results.quotient(results.sums(drawn, answers)["popular area"], weights[None].astype(float))
    assert got == pytest.approx(expected)
    repeated = {(i, n): answers["captions"][i] for i in range(len(weights)) for n in range(weights[i])}
    expected = CHAIR.score(repeated, {key: drawn.truth[key[0]] for key in repeated})["chair_i"]
    got = results.quotient(results.sums(drawn, answers)["chair_i"], weights[None].astype(float))
    assert got == pytest.approx(expected)


def test_differences_need_every_model(drawn):
    right = [q.label for q in drawn.questions]
    captions = [exam.describe(crowd) for crowd in drawn.crowds]
    good = results.sums(drawn, {"said": right, "margins": list(map(float, right)), "captions": captions})
    poor = results.sums(drawn, invented(drawn, 3))
    everything = [results.SCORES[name][0] for name in results.JUDGED]
    assert results.differences([good, good], [poor, poor]) == {"better": everything, "worse": []}
    assert results.differences([poor], [good]) == {"better": [], "worse": everything}
    assert results.differences([good, poor], [poor, good]) == {"better": [], "worse": []}
    answers = invented(drawn, 3)
    wrong = next(
        i for i, q in enumerate(drawn.questions) if q in drawn.splits["adversarial"] and q.label == answers["said"][i]
    )
    answers["said"][wrong] = not answers["said"][wrong]
    little = results.differences([good, results.sums(drawn, answers)], [poor, poor])  # the second is a little worse
    assert "adv. acc." not in little["better"] and "adv. area" not in little["better"] and not little["worse"]
    assert results.differences([poor], [poor]) == {"better": [], "worse": []}


def test_threshold_is_tuned_on_other_pictures(drawn):
    other = SMALL.draw(CELL, calibration=True)
    row = next(row for row in rows() if row.name == THRESHOLD)
    record = invented(drawn, 4) | {"calibration": [1.0 + q.label for q in other.questions]}
    told = results.answers_of(row, record, drawn, other)
    assert told["said"] == [margin > 1.5 for margin in record["margins"]]
    assert told["captions"] == record["captions"]


def test_cost_is_counted_from_what_ran(student, drawn):
    config = student.model.config.text_config
    length = student.inputs(drawn.pictures[:1], [tiny.DESCRIBE])["input_ids"].shape[1]
    plain = cost(student, (), drawn)
    assert plain["kept"] == 64 and plain["flops"] == prefill_flops(config, [length] * 4)
    assert plain["cache"] == kv_bytes(config, length, torch.float32)
    assert plain["first"] > 0 and plain["plain_first"] > 0
    pruned = cost(student, (RandomPrune(keep=16), FastV(keep=4, layer=3)), drawn)
    assert pruned["kept"] == 4
    assert pruned["flops"] == prefill_flops(config, [length - 48] * 3 + [length - 60])
    assert pruned["cache"] == kv_bytes(config, length, torch.float32) * (3 * (length - 48) + length - 60) / (4 * length)
    half = cost(student, (), drawn, lambda picture, question: student.model.get_decoder().layers[2](
        torch.zeros(1, 5, 96), position_embeddings=(torch.ones(1, 5, 16), torch.zeros(1, 5, 16))) is None or picture
    )  # fmt: skip
    assert half["flops"] == plain["flops"] + prefill_flops(config, [0, 0, 5, 0])
    branch = cost(student, (VCD(),), drawn)
    assert branch["flops"] == 2 * plain["flops"] and branch["cache"] == 2 * plain["cache"]


def test_another_picture_may_be_looked_at(student, drawn):
    shown = []

    def look(picture, question):
        shown.append(question)
        return 255 - picture

    said, margins = student.answer(drawn, look)
    other = dataclasses.replace(drawn, pictures=[255 - picture for picture in drawn.pictures])
    assert (said, margins) == student.answer(other)
    assert shown == [f"is there a {question.object} in the image ?" for question in drawn.questions]
    assert student.caption(drawn, look)[:2] == student.caption(other)[:2]
    carve = next(row for row in rows() if row.look)
    picture = carve.look(student, drawn.pictures[0], shown[0])
    assert picture.shape == drawn.pictures[0].shape and (picture != drawn.pictures[0]).any()
    twice = cost(student, (), drawn, lambda picture, question: carve.look(student, picture, question))
    assert twice["flops"] > 3 * cost(student, (), drawn)["flops"]


def test_blind_controls_keep_as_many(student, drawn):
    length = student.inputs(drawn.pictures[:1], [tiny.DESCRIBE])["input_ids"].shape[1]
    for method, shorter in ((comparison.RandomLayer(), (0, 0, 48, 48)), (comparison.RandomCache(), (48,) * 4)):
        inputs = student.inputs(drawn.pictures[:2], [tiny.DESCRIBE] * 2)
        with attach(student.model, method) as run:
            cache = student.generate(inputs, 1, return_dict_in_generate=True).past_key_values
            prompt = run.engine.current
        assert [layer.get_seq_length() for layer in cache.layers] == [length - less for less in shorter]
        visual = prompt.cached[3].visual
        assert (visual.sum(-1) == 16).all()
        columns = prompt.cached[3].column.expand(visual.shape)[visual].view(-1, 16)
        assert len({tuple(row) for row in columns.tolist()}) == len(columns)  # rows and heads draw their own


def test_margins_are_taken_before_tokens_are_ruled_out(student, drawn):
    row = comparison.Row("VCD", prepare=lambda student: (VCD(beta=1.0, alpha=0.5),))
    record = evaluate.take(student, row, SMALL)
    assert np.isfinite(record["margins"]).all() and len(set(record["margins"])) > 20
    with attach(student.model, VCD(beta=1.0, alpha=0.5)):
        said, margins = student.answer(drawn)
    assert record["said"] == said and record["margins"] != margins
    with attach(student.model, VCD(beta=0.0, alpha=0.5)):
        assert record["margins"] == student.answer(drawn)[1]


def test_every_method_has_a_row_or_a_reason():
    used = {name for row in rows() for name in row.methods}
    assert used | set(comparison.LEFT_OUT) == set(registry.methods())
    assert set(comparison.OWN) | set(comparison.LEFT_OUT) <= set(registry.methods())
    assert len({row.name for row in rows()}) == len({row.key() for row in rows()}) == len(rows())
    assert {row.control for row in rows()} - {""} <= {row.name for row in rows()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"run{seed}") / "model"
        tiny.model(seed).eval().save_pretrained(folder)
        found.append(folder)
    return found


def run(*args):
    return evaluate.main([str(arg) for arg in args])


def test_a_run_goes_on_where_the_last_one_stopped(folders, tmp_path, monkeypatch, capsys):
    call = ["--models", folders[0].parent, folders[1], "--cache", tmp_path / "cache", "--out", tmp_path, "--images", 12]
    rows = ["--rows", "greedy", "randomprune"]
    asked, broken = [], [RANDOM]

    def take(student, row, questions):
        asked.append(row.name)
        if row.name in broken:
            raise RuntimeError(broken.pop())
        other = questions.draw(student.cell, calibration=True)
        calibration = [float(question.label) for question in other.questions]
        costs = {"kept": 16, "flops": 1e6, "cache": 1e5, "first": 0.02, "plain_first": 0.01}
        return invented(questions.draw(student.cell), len(asked)) | costs | {"calibration": calibration}

    monkeypatch.setattr(evaluate, "take", take)
    assert run(*call, *rows) == 1 and asked == [GREEDY, RANDOM] * 2
    assert "RandomPrune: RuntimeError: RandomPrune" in capsys.readouterr().err
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| RandomPrune (1 of 2) |" in text and "| greedy |" in text and f"| {BLIND} |" in text
    assert not list(tmp_path.rglob("*.claim"))
    asked.clear()
    assert run(*call, *rows) == 0 and asked == [RANDOM]
    assert "(1 of 2)" not in (tmp_path / "RESULTS.md").read_text()
    lines = list(csv.DictReader((tmp_path / "results" / "evaluation.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == [name for name in (GREEDY, THRESHOLD, BLIND, RANDOM) for _ in range(2)]
    assert {line["model"] for line in lines} == {fingerprint(folder) for folder in folders}
    assert (tmp_path / "results" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    asked.clear()
    before = (tmp_path / "RESULTS.md").read_text()
    assert run(*call, "--table") == 0 and not asked and (tmp_path / "RESULTS.md").read_text() == before
    assert run(*call, "--rows", "randomprune", "--again") == 0 and asked == [RANDOM] * 2


def test_cells_that_another_run_is_at_are_left_to_it(folders, tmp_path, monkeypatch):
    cache, row = Cache(tmp_path, SMALL), taken()[0]
    monkeypatch.setattr(evaluate, "take", lambda *args: {"done": 1})
    with cache.claim(row, fingerprint(folders[0])) as ours:
        assert ours and fill(cache, [folders[0]], [row]) == [] and cache.read(row, fingerprint(folders[0])) is None
        claim = next(tmp_path.rglob("*.claim"))
        os.utime(claim, (0, 0))  # from a run that died
        fill(cache, [folders[0]], [row])
    assert cache.read(row, fingerprint(folders[0])) == {"done": 1}


def test_answers_of_other_options_or_exams_are_others(tmp_path):
    row, other = taken()[1], dataclasses.replace(taken()[1], methods={"random": {"keep": 0.5}})
    paths = {Cache(tmp_path, questions).path(r, "m") for questions in (SMALL, Questions()) for r in (row, other)}
    assert len(paths) == 4


def test_bad_calls(folders, tmp_path, capsys):
    for args, words in (
        (["--models", tmp_path], "no model.safetensors in"),
        (["--models", folders[0], "--rows", "nothing"], "no row is called like nothing; there are: greedy"),
        (["--models", folders[0], "--images", "3"], "--images must be at least 10"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*args, "--cache", tmp_path / "c")
        assert error.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_records_are_plain_json(student, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ROUNDS", 1)
    cache = Cache(tmp_path, SMALL)
    record = evaluate.take(student, taken()[0], SMALL)
    with cache.claim(taken()[0], "m"):
        cache.store(taken()[0], "m", record)
    assert cache.read(taken()[0], "m") == json.loads(json.dumps(record)) == record
    assert len(record["calibration"]) == len(SMALL.draw(CELL, calibration=True).questions)
