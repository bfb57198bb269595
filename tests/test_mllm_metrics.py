"""Scores of answers and captions, against the rules written out by hand."""

import json
from collections import Counter

import numpy as np
import pytest

from vision_attn.mllm.mentions import Amber, Chair, amber_answers
from vision_attn.mllm.metrics import (
    SPLITS,
    Question,
    best_threshold,
    margin_area,
    mme_answer,
    mme_scores,
    pope_questions,
    read_mme,
    read_pope,
    says_yes,
    yes_no_scores,
)
from vision_attn.mllm.sentinel import preference_pair, sentence_verdict

NAMES = [f"{letter}{number}" for letter in "tuvw" for number in range(5)]


def annotated(seed: int = 0, images: int = 60) -> dict[int, list[str]]:
    """Objects that come in groups, some of them named twice."""
    rng = np.random.default_rng(seed)
    found = {}
    for image in range(images):
        group = rng.integers(4)
        likely = [name for i, name in enumerate(NAMES) if rng.random() < (0.6 if i // 5 == group else 0.05)]
        found[image] = [*likely, *likely[:1]]
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_pope_asks_what_its_rule_says(split):
    shown = annotated()
    questions = pope_questions(shown, split, images=20, seed=3)
    frequent = Counter(name for names in shown.values() for name in set(names))
    images = list(dict.fromkeys(q.image for q in questions))
    assert len(images) == 20 and all(len(set(shown[image])) >= 3 for image in images)
    by_chance = 0
    for image in images:
        mine = [q for q in questions if q.image == image]
        assert [q.label for q in mine] == [True, False] * 3
        assert [q.object for q in mine[::2]] == list(dict.fromkeys(shown[image]))[:3]
        taken = set(shown[image])
        for positive, negative in zip(mine[::2], mine[1::2], strict=True):
            assert negative.object not in taken
            together = Counter(n for names in shown.values() if positive.object in names for n in set(names))
            score = {"random": Counter(), "popular": frequent, "adversarial": together}[split]
            best = max((score[name] for name in NAMES if name not in taken), default=0)
            assert score[negative.object] == best
            by_chance += best == 0
            taken.add(negative.object)
    assert (by_chance == 60) == (split == "random")
    assert questions == pope_questions(shown, split, images=20, seed=3)
    assert images == list(dict.fromkeys(q.image for q in pope_questions(shown, "random", images=20, seed=3)))


def test_pope_draws_at_random_when_the_ranked_list_runs_out():
    shown = {0: ["a", "b"], 1: ["c"], 2: ["d"], 3: ["e"]}  # nothing ever comes with a or b but these
    drawn = {pope_questions(shown, "adversarial", least=2, each=2, seed=seed)[1].object for seed in range(30)}
    assert drawn == {"c", "d", "e"}


def test_random_negatives_are_uniform_over_all_absent_objects():
    shown = {0: ["a", "b", "c"], **{i: ["d", "e", "f"] for i in range(1, 40)}, 40: ["g"]}
    drawn = Counter(pope_questions(shown, "random", each=1, seed=seed)[1].object for seed in range(400))
    assert drawn.keys() == {"d", "e", "f", "g"} and min(drawn.values()) > 60


def test_pope_refuses_what_it_cannot_ask():
    with pytest.raises(ValueError, match="'random', 'popular', 'adversarial'; got 'hard'"):
        pope_questions({0: ["a", "b", "c"]}, "hard")
    with pytest.raises(ValueError, match="none of 1 images shows at least 3"):
        pope_questions({0: ["a", "b"]})
    with pytest.raises(ValueError, match="shows all but 1 of the 4 known objects"):
        pope_questions({0: ["a", "b", "c"], 1: ["d"]})


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True), ("No", False), ("no", False), ("NO", True), ("There is not one. Yes", False),
        ("Yes. No", True), ("No, it is", False), ("maybe", True), ("", True), ("None", True), ("Nothing, no", False),
        ("yes and\nno", False),
    ],
)  # fmt: skip
def test_pope_reads_an_answer(answer, yes):
    assert says_yes(answer) is yes


def test_articles_and_nothing_else_change_in_a_question():
    assert Question(0, "umbrella", True).text == "Is there an umbrella in the image?"
    assert Question(0, "banana", True).text == "Is there a banana in the image?"


def test_scores_by_hand():
    said = [True, True, True, False, False, True]
    truth = [True, True, False, False, True, False]
    scores = yes_no_scores(said, truth)
    assert scores == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 2 / 3, "f1": 4 / 7, "yes_ratio": 4 / 6,
         "false_positive_rate": 2 / 3}
    )  # fmt: skip
    about_no = yes_no_scores(said, truth, positive=False)
    assert (about_no["precision"], about_no["recall"]) == (0.5, pytest.approx(1 / 3))
    silent = yes_no_scores([False, False], [True, False])
    assert (silent["precision"], silent["f1"], silent["accuracy"]) == (0, 0, 0.5)
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        yes_no_scores([True], [True, False])


def test_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    margins, truth = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    margins[:3] = np.inf, -np.inf, np.inf
    pairs = [(a > b) + 0.5 * (a == b) for a in margins[truth] for b in margins[~truth]]
    assert margin_area(margins, truth) == pytest.approx(np.mean(pairs))
    assert margin_area(np.exp(margins[3:]) - 7, truth[3:]) == margin_area(margins[3:], truth[3:])
    with pytest.raises(ValueError, match="questions whose answer is no"):
        margin_area([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="not a number"):
        margin_area([1.0, float("nan")], [True, False])


def test_threshold_is_the_best_of_all():
    rng = np.random.default_rng(2)
    truth = rng.random(80) < 0.5
    margins = rng.normal(size=80) + truth + 3
    at = best_threshold(margins, truth)
    assert ((margins > at) == truth).mean() == max(((margins > cut) == truth).mean() for cut in margins - 1e-9)
    assert best_threshold([-1.0, 1.0], [False, True]) == 0


def test_mme():
    assert [mme_answer(text) for text in ("Yes, it is", "NO", "Not sure", " yes", "It is no", "I no")] == [
        *("yes", "no", "no", "yes", "other", "no"),
    ]
    right, half = [("a", "yes", "yes"), ("a", "no", "no")], [("a", "yes", "hm"), ("a", "no", "no")]
    tasks = {task: right for task in ("existence", "count", "position", "color")}
    scores = mme_scores(tasks | {"color": half, "extra": half})
    assert (scores["color"], scores["count"]) == (50.0, 200.0)
    assert scores["hallucination"] == 650.0 and "perception" not in scores
    for bad in ([("a", "yes", "yes")], [("a", "yes", "yes"), ("a", "yes", "no")], [], [("a", "maybe", "yes")]):
        with pytest.raises(ValueError, match="count: .*one question whose answer is yes"):
            mme_scores({"count": bad})


CHAIR = [
    *(["dog", "puppy"], ["person", "girl", "woman", "baby"], ["hot dog"], ["chair", "seat"], ["toilet"], ["bird"]),
    *(["tie", "bow tie"], ["train"], ["person", "passenger"], ["glass oven set", "oven"], ["wine glass"]),
]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("", []),
        ("Dogs; a dog, two puppies!", ["dog", "dog", "dog"]),
        ("A hot dog and a dog", ["hot dog", "dog"]),
        ("hot dogs dogs", ["hot dog", "dog"]),
        ("a baby bird", ["bird"]),
        ("a baby and an adult dog", ["person", "dog"]),
        ("a passenger train", ["train"]),
        ("a passenger", ["person"]),
        ("a toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("women with bow ties and wine glasses", ["person", "tie", "wine glass"]),
        ("an oven", ["glass oven set"]),
        ("seating in a doghouse", []),
    ],
)
def test_chair_names_what_a_caption_mentions(caption, named):
    assert Chair(CHAIR).mentions(caption) == named


def test_chair_by_hand():
    chair = Chair(CHAIR)
    captions = {1: "a dog and a dog and a bird", 2: "", 3: "a train and a toilet"}
    truth = {1: chair.truth(["puppy"], ["a girl"]), 2: {"train"}, 3: {"train"}, 4: {"dog"}}
    assert truth[1] == {"dog", "person"}
    assert chair.score(captions, truth) == pytest.approx(
        {"chair_s": 2 / 3, "chair_i": 2 / 5, "recall": 2 / 4, "objects": 5 / 3, "length": 13 / 3}
    )
    twice = {1: "a bird and a bird and a dog", 2: "", 3: ""}
    assert chair.score(twice, truth)["chair_i"] == pytest.approx(2 / 3)  # repeats count
    assert chair.score({2: "", 3: "sky"}, truth) == {
        "chair_s": 0,
        "chair_i": 0,
        "recall": 0,
        "objects": 0,
        "length": 0.5,
    }
    with pytest.raises(ValueError, match="no truth for image 9, nor for 0 more"):
        chair.score({9: ""}, truth)
    with pytest.raises(ValueError, match="object 'lion' is in no row"):
        chair.truth(["lion"])


def test_chair_joins_given_names_and_reads_a_table(tmp_path):
    home = Chair([["plate"]], ["home plate"])
    assert home.mentions("a plate on home plate") == ["plate"]
    assert Chair([["tie"]], {"bow tie": "tie"}).mentions("bow ties") == ["tie"]
    with pytest.raises(ValueError, match="names of two words"):
        Chair([["oven"]], ["stove top oven"])
    (tmp_path / "table.txt").write_text("dog, puppy\nstove, stove top oven\n\nhot dog\n")
    assert Chair.read(tmp_path / "table.txt").mentions("puppies on a stove with a hot dog") == [
        "dog",
        "stove",
        "hot dog",
    ]


def test_amber_by_hand():
    vectors = {"doggo": "dog", "kitten": "cat", "boat": "cat"}
    near = lambda a, b: 0.9 if vectors.get(a, a) == vectors.get(b, b) else 0.8  # noqa: E731
    words = {"dog": ["puppy"], "cat": ["tom"], "sofa": ["couch"], "car": ["doggo", "kitten", "boat"], "sky": []}
    amber = Amber(words, near, neutral=["sky"])
    responses = {1: "A doggo, a puppy, a dog under the sky and a boat.", 2: "Couches on grass.", 3: ""}
    truth, typical = {1: ["dog", "sofa"], 2: ["sofa"], 3: ["dog"]}, {1: ["cat", "car"], 2: ["cat"], 3: []}
    # 1: doggo is similar to dog; boat is listed under car, a target; of 6 known words 1 is wrong
    assert amber.score(responses, truth, typical) == pytest.approx(
        {"chair": 1 / 6, "cover": 2 / 4, "hal": 1 / 3, "cog": 1 / 3}
    )
    plain = Amber(words).score(responses, truth, typical)  # neither is doggo a dog, nor sky neutral
    assert plain["chair"] == 3 / 6
    both = Amber({"dog": [], "wolf": []}, lambda a, b: 0.9)  # a true object is no target, however similar
    assert both.score({1: "a dog"}, {1: ["dog"]}, {1: ["wolf"]})["cog"] == 0
    assert both.score({1: "a wolf"}, {1: ["dog"]}, {1: ["wolf"]}) == {"chair": 0, "cover": 1, "hal": 0, "cog": 1}
    with pytest.raises(ValueError, match="no responses"):
        amber.score({}, {}, {})


def test_amber_answers_count_only_plain_words():
    scores = amber_answers(["No", "yes.", "No, never", "no", "Yes"], [False, True, False, True, False])
    assert scores["accuracy"] == 2 / 5 and scores["yes_ratio"] == 2 / 5
    assert (scores["precision"], scores["recall"]) == (1 / 2, pytest.approx(1 / 3))
    assert amber_answers(["hm"], [True])["accuracy"] == 0


def test_published_files(tmp_path):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there an umbrella in the image?", "label": "no"}]
    path = tmp_path / "pope.json"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_pope(path) == [Question("a.jpg", "umbrella", False)]
    path.write_text('{"image": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a JSON object with image, text and label"):
        read_pope(path)
    (tmp_path / "count.txt").write_text("a\tq\tYes\tyes\na\tq\tNo\tno\n")
    assert mme_scores(read_mme(tmp_path)) == {"count": 200.0}
    (tmp_path / "count.txt").write_text("a yes\n")
    with pytest.raises(ValueError, match="1 fields between tabs instead of 4"):
        read_mme(tmp_path)


SEES = {"dog": (True, True), "cat": (False, False), "bird": (True, False), "cow": (False, True)}


def test_sentinel_keeps_only_what_both_oracles_agree_on():
    first, second = (lambda name: SEES[name][0]), (lambda name: SEES[name][1])
    expected = {"dog": True, "cat": False, "bird": None, "cow": None, "dog cat": False, "dog bird": None, "": None}
    expected["bird cat"] = False
    assert {text: sentence_verdict(text.split(), first, second) for text in expected} == expected
    asked = []

    def others(context):
        asked.append(context)
        return iter(["cat", "", "bird dog", "dog dog", "dog"])

    pair = preference_pair(["dog", "bird", "cow cat", "cat"], str.split, first, second, others)
    assert (pair.context, pair.rejected, pair.chosen, pair.absent) == ("dog bird", "cow cat", "dog dog", ("cat",))
    assert asked == ["dog bird"]
    assert preference_pair(["dog", "bird"], str.split, first, second, others) is None
    assert preference_pair(["cat"], str.split, first, second, lambda context: ["bird"]) is None
