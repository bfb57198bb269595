"""Scores of answers and captions in files, and questions for pictures of your own.

    python -m vision_attn.mllm.score questions OBJECTS.json --split adversarial > pope.jsonl
    python -m vision_attn.mllm.score pope pope.jsonl ANSWERS.jsonl
    python -m vision_attn.mllm.score chair CAPTIONS.json --synonyms synonyms.txt --objects instances.json
    python -m vision_attn.mllm.score mme FOLDER
    python -m vision_attn.mllm.score amber RESPONSES.json --annotations annotations.json --relation relation.json

Scores go to the standard output as JSON, from 0 to 1 but for MME. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from vision_attn.mllm.mentions import Amber, Chair, amber_answers
from vision_attn.mllm.metrics import SPLITS, mme_scores, pope_questions, read_mme, read_pope, says_yes, yes_no_scores


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _by_image(path: Path, what: str) -> dict[str, Any]:
    """`{image: value}` as it is, or a COCO list of `{"image_id": image, what: value}`."""
    found = _json(path)
    if isinstance(found, list):
        try:
            return {str(one["image_id"]): one[what] for one in found}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: each entry needs image_id and {what}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: give an object from images to {what}s, or a list with image_id and {what}")
    return found


def _coco(path: Path) -> dict[str, list[str]]:
    """Image -> objects, or captions, of an annotation file of COCO; or such an object as it is."""
    found = _json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: give an object from images to lists, or an annotation file of COCO")
    if "annotations" not in found:
        return found
    names = {category["id"]: category["name"] for category in found.get("categories", ())}
    images = defaultdict(list)
    for one in found["annotations"]:
        images[str(one["image_id"])].append(one["caption"] if "caption" in one else names[one["category_id"]])
    return dict(images)


def questions(args: argparse.Namespace) -> None:
    drawn = pope_questions(_coco(args.objects), args.split, images=args.images, seed=args.seed)
    for number, one in enumerate(drawn, 1):
        label = "yes" if one.label else "no"
        print(json.dumps({"question_id": number, "image": one.image, "text": one.text, "label": label}))


def pope(args: argparse.Namespace) -> dict[str, float]:
    asked, answers = read_pope(args.questions), []
    for number, line in enumerate(args.answers.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                answers.append(str(json.loads(line)["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{args.answers}, line {number}: not a JSON object with answer") from error
    return yes_no_scores(map(says_yes, answers), [question.label for question in asked])


def chair(args: argparse.Namespace) -> dict[str, float]:
    rule, captions = Chair.read(args.synonyms), _by_image(args.captions, "caption")
    objects, human = _coco(args.objects), {} if args.human is None else _coco(args.human)
    known = {image for image in captions if image in objects or image in human}
    return rule.score(captions, {image: rule.truth(objects.get(image, ()), human.get(image, ())) for image in known})


def amber(args: argparse.Namespace) -> dict[str, Any]:
    responses = {str(one["id"]): str(one["response"]) for one in _json(args.responses)}
    known = {str(one["id"]): one for one in _json(args.annotations)}
    if missing := [one for one in responses if one not in known]:
        raise ValueError(f"{args.annotations} has no entry for response {missing[0]}, nor for {len(missing) - 1} more")
    scores: dict[tuple[str, str], float] = {}
    for line in () if args.similar is None else args.similar.read_text(encoding="utf-8").splitlines():
        one, other, score = line.split("\t")
        scores[one, other] = scores[other, one] = float(score)
    found: dict[str, Any] = {}
    written = [one for one in responses if known[one]["type"] == "generative"]
    if written:
        neutral = () if args.safe is None else args.safe.read_text(encoding="utf-8").split("\n")
        similarity = None if args.similar is None else lambda a, b: 1.0 if a == b else scores.get((a, b), 0.0)
        rule = Amber(_json(args.relation), similarity, neutral=neutral)
        truth, typical = ({one: known[one][name] for one in written} for name in ("truth", "hallu"))
        found["generative"] = rule.score({one: responses[one] for one in written}, truth, typical)
    asked = [one for one in responses if known[one]["type"] != "generative"]
    kinds = Counter(known[one]["type"] for one in asked)
    for kind in ("discriminative", *(sorted(kinds) if len(kinds) > 1 else ())):
        mine = [one for one in asked if kind in ("discriminative", known[one]["type"])]
        if mine:
            found[kind] = amber_answers(
                [responses[one] for one in mine], [known[one]["truth"] == "yes" for one in mine]
            )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "vision_attn.mllm.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("questions", help="POPE's questions for pictures whose objects are known")
    one.add_argument("objects", type=Path, help="JSON: image to objects in order, or instances of COCO")
    one.add_argument("--split", choices=SPLITS, default="adversarial")
    one.add_argument("--images", type=int, default=500)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=questions)
    one = kinds.add_parser("pope", help="accuracy, precision, recall, F1 and yes-ratio")
    one.add_argument("questions", type=Path, help="a JSON object per line with image, text and label")
    one.add_argument("answers", type=Path, help="a JSON object per line with answer, in the same order")
    one.set_defaults(run=pope)
    one = kinds.add_parser("chair", help="CHAIR_s, CHAIR_i, recall and length of captions")
    one.add_argument("captions", type=Path, help="JSON: image to caption, or a list with image_id and caption")
    one.add_argument("--synonyms", type=Path, required=True, help="a row of names per line, between commas")
    one.add_argument("--objects", type=Path, required=True, help="JSON: image to objects, or instances of COCO")
    one.add_argument("--human", type=Path, help="JSON: image to captions by people, or captions of COCO")
    one.set_defaults(run=chair)
    one = kinds.add_parser("mme", help="scores of the tasks, 0 to 200 each, and their sums")
    one.add_argument("folder", type=Path, help="a file TASK.txt per task: image, question, truth, answer between tabs")
    one.set_defaults(run=lambda args: mme_scores(read_mme(args.folder)))
    one = kinds.add_parser("amber", help="CHAIR, Cover, Hal and Cog of captions; scores of answers")
    one.add_argument("responses", type=Path, help="JSON: a list with id and response")
    one.add_argument("--annotations", type=Path, required=True, help="the list of the benchmark")
    one.add_argument("--relation", type=Path, required=True, help="its lists of words that go together")
    one.add_argument("--safe", type=Path, help="its words that are never wrong, one per line")
    one.add_argument(
        "--similar", type=Path, help="word, word and similarity between tabs; else only listed words count"
    )
    one.set_defaults(run=amber)
    args = parser.parse_args(argv)
    try:
        found = args.run(args)
    except (OSError, ValueError, KeyError) as error:
        missing = f"an entry has no {error}" if isinstance(error, KeyError) else error
        print(f"error: {missing}", file=sys.stderr)
        return 2
    if found is not None:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
