"""Scores of yes-no answers: POPE, MME, and the area under the curve of a margin. Annotations are the caller's."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

SPLITS = ("random", "popular", "adversarial")
MME_GROUPS = {
    "perception": (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    "hallucination": ("existence", "count", "position", "color"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of POPE: whether an object is in an image, and whether it is.

    >>> Question("1.jpg", "apple", True).text
    'Is there an apple in the image?'
    """

    image: Hashable
    object: str
    label: bool

    @property
    def text(self) -> str:
        article = "an" if self.object[:1].lower() in tuple("aeiou") else "a"
        return f"Is there {article} {self.object} in the image?"


def pope_questions(
    objects: Mapping[Hashable, Sequence[str]],
    split: str = "adversarial",
    *,
    images: int = 500,
    least: int = 3,
    each: int = 3,
    seed: int = 0,
) -> list[Question]:
    """The questions of one split of POPE: the first objects of every image, a negative after each of them.

    Negatives are objects of all images that this one does not show, none twice in an image: "random" draws uniformly;
    "popular" takes the most frequent; "adversarial" the one that comes most often with the object just asked. Ties go
    by name; when a ranked list runs out, the rest is drawn at random.

    Args:
        objects: image -> the objects it shows, in the order of annotation; repeats are ignored.
        images: at most so many, drawn from those that have at least `least` objects; 500 in the paper.
        least: objects an image must have.
        each: objects asked per image.
        seed: of the images drawn and of random negatives; all splits of one seed have the same images.

    Raises:
        ValueError: an unknown split, no image with enough objects, or one that shows nearly all objects.

    >>> shown = {"a": ["cup", "fork", "table"], "b": ["cup", "table"], "c": ["car"]}
    >>> [(q.object, q.label) for q in pope_questions(shown, "popular", each=1)]
    [('cup', True), ('car', False)]

    Paper: Evaluating Object Hallucination in Large Vision-Language Models.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}; got {split!r}")
    shown = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    known = sorted({name for names in shown.values() for name in names})
    enough = [image for image, names in shown.items() if len(names) >= max(least, each)]
    if not enough:
        raise ValueError(
            f"none of {len(shown)} images shows at least {max(least, each)} objects; give more images, or a smaller "
            "least= and each="
        )
    if len(enough) > images:
        chosen = np.random.default_rng(seed).permutation(len(enough))[:images]
        enough = [enough[place] for place in sorted(chosen)]
    frequent = Counter(name for names in shown.values() for name in names)
    together: dict[str, Counter] = {name: Counter() for name in known}
    for names in shown.values():
        for name in names:
            together[name].update(other for other in names if other != name)

    rng = np.random.default_rng((seed, SPLITS.index(split)))
    found = []
    for image in enough:
        absent = [name for name in known if name not in shown[image]]
        if len(absent) < each:
            raise ValueError(
                f"image {image!r} shows all but {len(absent)} of the {len(known)} known objects, so there are not "
                f"{each} to ask about; give a smaller each="
            )
        for name in shown[image][:each]:
            counts = {"random": Counter(), "popular": frequent, "adversarial": together[name]}[split]
            ranked = [other for other in absent if counts[other] > 0]
            if ranked:
                negative = min(ranked, key=lambda other: (-counts[other], other))
            else:
                negative = absent[int(rng.integers(len(absent)))]
            absent.remove(negative)
            found += [Question(image, name, True), Question(image, negative, False)]
    return found


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word No, no or not, and yes if it has not.

    >>> [says_yes(answer) for answer in ("No, there is not.", "maybe", "There is. No doubt", "nobody")]
    [False, True, True, True]
    """
    words = answer.split(".")[0].replace(",", "").split()
    return not any(word in ("No", "not", "no") for word in words)


def yes_no_scores(said: Iterable[bool], truth: Iterable[bool], positive: bool = True) -> dict[str, float]:
    """Accuracy, precision, recall, F1, yes-ratio and false-positive rate, each from 0 to 1; 0 where there is nothing.

    Args:
        said: whether each answer is yes.
        truth: whether it should be.
        positive: the answer that precision and recall are about: yes in POPE, no in AMBER.

    >>> yes_no_scores([True, True, False, True], [True, False, False, True])["accuracy"]
    0.75
    """
    said, truth = np.array(list(said), dtype=bool), np.array(list(truth), dtype=bool)
    if len(said) != len(truth) or not len(said):
        raise ValueError(f"{len(said)} answers for {len(truth)} questions; give one answer per question, at least one")
    yes, mine, right = said, said == positive, truth == positive
    hits = int((mine & right).sum())
    precision, recall = share(hits, mine.sum()), share(hits, right.sum())
    return {
        "accuracy": float((said == truth).mean()),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * precision * recall, precision + recall),
        "yes_ratio": float(yes.mean()),
        "false_positive_rate": share((mine & ~right).sum(), (~right).sum()),
    }


def share(part: float, whole: float) -> float:
    """0 of nothing."""
    return float(part / whole) if whole else 0.0


def margin_area(margins: Sequence[float], truth: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a true question has a larger margin than a false one, ties counting half.

    A method that only makes a model say yes more often moves accuracy and not this.

    >>> margin_area([2.0, 0.5, 1.0, -1.0], [True, True, False, False])
    0.75
    """
    margins, truth = np.asarray(margins, dtype=float), np.asarray(truth, dtype=bool)
    if np.isnan(margins).any():
        raise ValueError("a margin is not a number")
    if truth.all() or not truth.any():
        raise ValueError("an area needs questions whose answer is yes and questions whose answer is no")
    ordered, place, counts = np.unique(margins, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[place]
    yes = int(truth.sum())
    return float((rank[truth].sum() - yes * (yes + 1) / 2) / (yes * (len(truth) - yes)))


def best_threshold(margins: Sequence[float], truth: Sequence[bool]) -> float:
    """The threshold with the best accuracy when margins above it mean yes; in a tie the one nearest to 0.

    >>> best_threshold([3.0, 2.0, 1.0], [True, False, False])
    2.5
    """
    margins, truth = np.asarray(margins, dtype=float), np.asarray(truth, dtype=bool)
    values = np.unique(margins)
    between = [0.0, values[0] - 1, *((values[1:] + values[:-1]) / 2), values[-1] + 1]
    return float(max(between, key=lambda at: (((margins > at) == truth).mean(), -abs(at))))


def read_pope(path: str | Path) -> list[Question]:
    """The questions of a published POPE file: a JSON object per line with `image`, `text` and `label`."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            image, text, label = one["image"], one["text"], one["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with image, text and label") from error
        name = text.removeprefix("Is there ").split(" in the ")[0].split(maxsplit=1)[-1]
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, line {number}: label must be 'yes' or 'no'; got {label!r}")
        found.append(Question(image, name, label == "yes"))
    return found


def mme_answer(answer: str) -> str:
    """MME's reading of an answer: "yes", "no", or "other", which is wrong.

    >>> [mme_answer(answer) for answer in ("Yes", "no, not at all", "I think yes")]
    ['yes', 'no', 'other']
    """
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_scores(tasks: Mapping[str, Iterable[tuple[Hashable, str, str]]]) -> dict[str, float]:
    """Score of each task of MME, 0 to 200, and the sums of the groups all of whose tasks are there.

    A task scores 100 times the share of right answers plus 100 times the share of images with both answers right.

    Args:
        tasks: task -> (image, "yes" or "no" as it should be, answer), one of each kind per image.

    >>> mme_scores({"count": [("a", "yes", "yes"), ("a", "no", "yes"), ("b", "yes", "yes"), ("b", "no", "no")]})
    {'count': 125.0}

    Paper: MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models.
    """
    found = {}
    for task, rows in tasks.items():
        images: dict[Hashable, dict[str, bool]] = {}
        for image, label, answer in rows:
            label = label.strip().lower()
            if label not in ("yes", "no") or label in images.setdefault(image, {}):
                raise ValueError(f"{task}: image {image!r} needs one question whose answer is yes and one that is no")
            images[image][label] = mme_answer(answer) == label
        if not images or any(len(both) != 2 for both in images.values()):
            raise ValueError(f"{task}: each image needs one question whose answer is yes and one that is no")
        single = np.mean([list(both.values()) for both in images.values()])
        found[task] = float(100 * single + 100 * np.mean([all(both.values()) for both in images.values()]))
    groups = {g: sum(found[t] for t in members) for g, members in MME_GROUPS.items() if found.keys() >= set(members)}
    return found | groups


def read_mme(folder: str | Path) -> dict[str, list[tuple[str, str, str]]]:
    """Answers as the benchmark stores them: a file `TASK.txt` with image, question, truth and answer between tabs."""
    found = {}
    for path in sorted(Path(folder).glob("*.txt")):
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            parts = line.split("\t")
            if len(parts) != 4:
                raise ValueError(f"{path}, line {number}: {len(parts)} fields between tabs instead of 4")
            rows.append((parts[0], parts[2], parts[3]))
        found[path.stem] = rows
    if not found:
        raise ValueError(f"{folder} has no file TASK.txt of a task")
    return found
