"""Scores of captions by the objects they name: CHAIR and AMBER. Words and annotations are the caller's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from vision_attn.mllm.metrics import share, yes_no_scores

ANIMALS = ("animal", "bear", "bird", "cat", "cow", "cub", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
VEHICLES = ("jet", "train")
_IRREGULAR = {
    "buses": "bus", "children": "child", "feet": "foot", "geese": "goose", "knives": "knife", "leaves": "leaf",
    "loaves": "loaf", "men": "man", "mice": "mouse", "people": "person", "scarves": "scarf", "shelves": "shelf",
    "teeth": "tooth", "wives": "wife", "wolves": "wolf", "women": "woman",
}  # fmt: skip


def singular(word: str) -> str:
    """A plain guess at the singular of an English noun in lower case; give CHAIR your own where it matters.

    >>> [singular(word) for word in ("dogs", "benches", "women", "bus", "glass", "ponies", "knives", "policemen")]
    ['dog', 'bench', 'woman', 'bus', 'glass', 'pony', 'knife', 'policeman']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men"):
        return word[:-3] + "man"
    if not word.endswith("s") or word.endswith(("ss", "us", "is")) or len(word) < 4:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes", "zzes", "atoes")):
        return word[:-2]
    return word[:-1]


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())


class Chair:
    """CHAIR: which objects captions name that are not there.

    Words are put into lower case and into the singular; names of two words are joined, the leftmost first; "baby" and
    "adult" before an animal and "passenger" before a jet or train are dropped; a "seat" beside a "toilet" is no chair;
    what is left and in the table becomes the first name of its row.

    Args:
        synonyms: rows of the table, each a name and its synonyms; names of more than two words are never found,
            and of a name in two rows the later one counts, as in the published code.
        compounds: names of two words to join, or a mapping to what they are; None for those of the table. One that is
            in no row keeps its words from being counted, as in "home plate".
        singular: of a word in lower case.

    >>> chair = Chair([["dog", "puppy"], ["hot dog"], ["person", "girl"]])
    >>> chair.mentions("Two puppies and a girl with hot dogs.")
    ['dog', 'person', 'hot dog']
    >>> chair.score({1: "A dog and a girl."}, {1: {"dog"}})["chair_i"]
    0.5

    Paper: Object Hallucination in Image Captioning.
    """

    def __init__(
        self,
        synonyms: Iterable[Sequence[str]],
        compounds: Iterable[str] | Mapping[str, str] | None = None,
        singular: Callable[[str], str] = singular,
    ) -> None:
        self.singular = singular
        self.names: dict[str, str] = {}
        for row in synonyms:
            if isinstance(row, str) or not row:
                raise ValueError(f"a row of synonyms is a list of names, the first for all; got {row!r}")
            for name in row:
                self.names[self._key(name)] = row[0]
        if compounds is None:
            compounds = [name for name in self.names if name.count(" ") == 1]
        if not isinstance(compounds, Mapping):
            compounds = {name: name for name in compounds}
        self.compounds = {f"{kind} {name}": name for kind in ("baby", "adult") for name in ANIMALS}
        self.compounds |= {f"passenger {name}": name for name in VEHICLES}
        self.compounds |= {self._key(name): self._key(what) for name, what in compounds.items()}
        if long := [name for name in self.compounds if name.count(" ") != 1]:
            raise ValueError(f"only names of two words can be joined; got {', '.join(map(repr, long))}")

    def _key(self, name: str) -> str:
        return " ".join(self.singular(word) for word in name.lower().split())

    @classmethod
    def read(cls, path: str | Path, **options) -> Chair:
        """From a file with a row per line, names between commas, as published for COCO."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
        return cls([row for row in rows if row], **options)

    def mentions(self, caption: str) -> list[str]:
        """First names of the objects that a caption names, in order, repeats included."""
        words = [self.singular(word) for word in words_of(caption)]
        joined = []
        while words:
            pair = self.compounds.get(" ".join(words[:2]))
            joined.append(words[0] if pair is None else pair)
            words = words[1 if pair is None else 2 :]
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [self.names[word] for word in joined if word in self.names]

    def truth(self, objects: Iterable[str], captions: Iterable[str] = ()) -> set[str]:
        """The objects of an image: those annotated, and those that people's captions of it name.

        Raises:
            ValueError: an annotated object is in no row of the table.
        """
        found = {name for caption in captions for name in self.mentions(caption)}
        for name in objects:
            if self._key(name) not in self.names:
                raise ValueError(f"object {name!r} is in no row of the synonyms")
            found.add(self.names[self._key(name)])
        return found

    def score(self, captions: Mapping[Hashable, str], truth: Mapping[Hashable, Collection[str]]) -> dict[str, float]:
        """Scores of a set of captions, one per image.

        Returns:
            `chair_s`, share of captions with an object that is not there; `chair_i`, share of such mentions, repeats
            counted; `recall`, share of the true objects that are named; `objects` and `length`, mentions and words per
            caption. A share of nothing is 0.
        """
        if not captions:
            raise ValueError("no captions to score")
        if missing := [image for image in captions if image not in truth]:
            raise ValueError(f"no truth for image {missing[0]!r}, nor for {len(missing) - 1} more")
        named = {image: self.mentions(caption) for image, caption in captions.items()}
        wrong = {image: [name for name in named[image] if name not in truth[image]] for image in named}
        mentions = sum(map(len, named.values()))
        covered = sum(len(set(named[image]) & set(truth[image])) for image in named)
        return {
            "chair_s": sum(map(bool, wrong.values())) / len(named),
            "chair_i": share(sum(map(len, wrong.values())), mentions),
            "recall": share(covered, sum(len(set(truth[image])) for image in named)),
            "objects": mentions / len(named),
            "length": sum(len(words_of(caption)) for caption in captions.values()) / len(named),
        }


class Amber:
    """The generative part of AMBER: objects named that are not there, and those that people would expect there.

    Args:
        association: object -> words that stand for it; other words of a response are ignored.
        similarity: of two words, such as the cosine of their vectors; above `threshold` they mean the same. None: only
            listed words do.
        threshold: 0.8 in the paper.
        neutral: words that are never wrong.
        nouns: from a response to its nouns in the singular; by default all its words, without a tagger.

    >>> amber = Amber({"dog": ["puppy"], "cat": [], "sofa": ["couch"]})
    >>> scores = amber.score({1: "A puppy and a cat on grass."}, {1: ["dog", "sofa"]}, {1: ["cat"]})
    >>> scores
    {'chair': 0.5, 'cover': 0.5, 'hal': 1.0, 'cog': 1.0}

    Paper: AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation.
    """

    def __init__(
        self,
        association: Mapping[str, Sequence[str]],
        similarity: Callable[[str, str], float] | None = None,
        threshold: float = 0.8,
        neutral: Collection[str] = (),
        nouns: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.association, self.similarity, self.threshold = association, similarity, threshold
        self.neutral, self.nouns = set(neutral), nouns or (lambda text: [singular(word) for word in words_of(text)])
        self.known = {*association, *(word for words in association.values() for word in words)}

    def _means(self, word: str, targets: Iterable[str]) -> str | None:
        """The object among `targets` that a word stands for: listed words first, then similar ones."""
        for target in targets:
            if word in self._words(target):
                return target
        for target in targets if self.similarity is not None else ():
            if any(self.similarity(word, one) > self.threshold for one in self._words(target)):
                return target
        return None

    def _words(self, target: str) -> tuple[str, ...]:
        return target, *self.association.get(target, ())

    def score(
        self,
        responses: Mapping[Hashable, str],
        truth: Mapping[Hashable, Sequence[str]],
        typical: Mapping[Hashable, Sequence[str]],
    ) -> dict[str, float]:
        """Scores of a set of responses, as shares from 0 to 1 of the whole set.

        Args:
            responses: image -> text.
            truth: image -> objects that are there.
            typical: image -> objects that are not there and that people would expect: the targets of hallucination.

        Returns:
            `chair`, wrong mentions; `cover`, true objects that are named; `hal`, responses with a wrong mention; `cog`,
            targets that are named.
        """
        if not responses:
            raise ValueError("no responses to score")
        mentions = wrong = spoiled = covered = hit = 0
        for image, text in responses.items():
            named = [word for word in self.nouns(text) if word in self.known]
            judged = {word: self._means(word, truth[image]) for word in named if word not in self.neutral}
            listed = {word for target in truth[image] for word in self._words(target)}
            expected = {self._means(word, typical[image]) for word in judged if word not in listed}
            bad = [word for word in named if word in judged and judged[word] is None]
            mentions, wrong, spoiled = mentions + len(named), wrong + len(bad), spoiled + bool(bad)
            covered, hit = covered + len({*judged.values()} - {None}), hit + len(expected - {None})
        return {
            "chair": share(wrong, mentions),
            "cover": share(covered, sum(len(truth[image]) for image in responses)),
            "hal": spoiled / len(responses),
            "cog": share(hit, sum(len(typical[image]) for image in responses)),
        }


def amber_answers(answers: Iterable[str], truth: Iterable[bool]) -> dict[str, float]:
    """The discriminative part of AMBER: scores of yes-no answers, with no as the positive one.

    An answer is what it says when it is just "yes" or "no", in any case and with or without a full stop; any other is
    wrong, and counts as the opposite of the truth for accuracy and as no "no".

    >>> round(amber_answers(["No.", "Yes", "no", "hm"], [False, False, True, False])["precision"], 2)
    0.5
    """
    truth = list(truth)
    plain = [answer.strip().lower().removesuffix(".") for answer in answers]
    said = [answer == "yes" if answer in ("yes", "no") else None for answer in plain]
    scores = yes_no_scores([answer is not False for answer in said], truth, positive=False)
    scores["accuracy"] = sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
    scores["yes_ratio"] = said.count(True) / len(said)
    return scores
