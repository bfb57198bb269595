"""Pairs of sentences for training by preference: the first hallucinated one, and a clean one in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

Oracle = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a model should write after `context`, and what it wrote.

    Args:
        context: the sentences before, joined by blanks.
        chosen: a sentence that names only what is there.
        rejected: the first sentence that names what is not.
        absent: the objects in it that are not there.
    """

    context: str
    chosen: str
    rejected: str
    absent: tuple[str, ...]


def sentence_verdict(objects: Iterable[str], first: Oracle, second: Oracle) -> bool | None:
    """True for a factual sentence, False for a hallucinated one, None where it cannot be told.

    Hallucinated: both oracles say of one of its objects that it is absent. Factual: it names objects, and both say of
    all of them that they are present.

    >>> sees = {"dog": True, "cat": False}.get
    >>> sentence_verdict(["dog", "cat"], sees, sees), sentence_verdict(["cat"], sees, lambda name: True)
    (False, None)
    """
    seen = [(bool(first(name)), bool(second(name))) for name in objects]
    if any(both == (False, False) for both in seen):
        return False
    return True if seen and all(both == (True, True) for both in seen) else None


def preference_pair(
    sentences: Sequence[str],
    objects: Callable[[str], Sequence[str]],
    first: Oracle,
    second: Oracle,
    alternatives: Callable[[str], Iterable[str]],
) -> Pair | None:
    """The first hallucinated sentence of a response with a factual one for the same context, or None without either.

    Args:
        sentences: of one response, in order.
        objects: from a sentence to the objects it names.
        first, second: whether an object is in the image: two detectors that err in different ways.
        alternatives: from a context to other sentences that the model writes after it; the first factual one is taken.

    >>> sees = {"dog": True, "cat": False}.get
    >>> named = lambda sentence: [word for word in ("dog", "cat") if word in sentence]
    >>> preference_pair(["a dog.", "a cat."], named, sees, sees, lambda context: ["a cat!", "the dog sits."])
    Pair(context='a dog.', chosen='the dog sits.', rejected='a cat.', absent=('cat',))

    Paper: Mitigating Object Hallucinations via Sentence-Level Early Intervention.
    """
    for number, sentence in enumerate(sentences):
        named = objects(sentence)
        if sentence_verdict(named, first, second) is not False:
            continue
        context = " ".join(sentences[:number])
        absent = tuple(name for name in named if not first(name) and not second(name))
        for other in alternatives(context):
            if sentence_verdict(objects(other), first, second):
                return Pair(context, other, sentence, absent)
        return None
    return None
