"""Score trained models of the shapes world on fresh pictures, beside the blind rule, and write the card of the first.

python -m vision_attn.mllm.card runs/shapes-llava*/model --out mllm/weights/shapes-llava
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vision_attn.mllm.exam import CHAIR, Exam, Student, blind, exam
from vision_attn.mllm.metrics import margin_area, yes_no_scores
from vision_attn.shapes.crowd import CONTEXTS, KINDS

SHARES = (0.8, 0.5, 0.2)  # probability of each partner; models learned from the first
SCORES = {
    "random_accuracy": "POPE random accuracy",
    "adversarial_accuracy": "POPE adversarial accuracy",
    "adversarial_area": "adversarial area of the yes-no margin",
    "adversarial_false_positives": "adversarial false-positive rate",
    "random_false_positives": "random false-positive rate",
    "chair_s": "CHAIR_s",
    "chair_i": "CHAIR_i",
    "recall": "caption recall",
    "partners": "partners among hallucinated mentions",
}


def scores(drawn: Exam, said: Sequence[bool], margins: Sequence[float], captions: Sequence[str]) -> dict[str, float]:
    """The scores of one model on one exam; 0 for a share of nothing."""
    asked = {question: i for i, question in enumerate(drawn.questions)}
    found = {}
    for split in ("random", "adversarial"):
        questions = drawn.splits[split]
        places, truth = [asked[question] for question in questions], [question.label for question in questions]
        rates = yes_no_scores([said[i] for i in places], truth)
        found |= {
            f"{split}_accuracy": rates["accuracy"],
            f"{split}_false_positives": rates["false_positive_rate"],
            f"{split}_area": margin_area([margins[i] for i in places], truth),
        }
    truth = dict(enumerate(drawn.truth))
    chair = CHAIR.score(dict(enumerate(captions)), truth)
    wrong = [(i, name) for i, text in enumerate(captions) for name in CHAIR.mentions(text) if name not in truth[i]]
    partners = [{KINDS[kind] for kind in CONTEXTS[crowd.context, 1:]} for crowd in drawn.crowds]
    expected = sum(name in partners[i] for i, name in wrong)
    found |= {name: chair[name] for name in ("chair_s", "chair_i", "recall")}
    found["partners"] = expected / max(len(wrong), 1)
    return {name: round(found[name], 3) for name in SCORES}


def examine(folder: Path, images: int, seed: int) -> dict[str, Any]:
    """All exams of the model in a folder."""
    from vision_attn.mllm.loading import load

    loaded = load(folder, device="cpu", dtype="float32")
    student = Student(loaded.model)
    record = json.loads((folder / "training.json").read_text())
    start, rows = time.perf_counter(), []
    for partners in SHARES:
        drawn = exam(images, partners, seed, student.cell)
        rows.append({"probability": partners, **scores(drawn, *student.answer(drawn), student.caption(drawn))})
    return {"training": record, "rows": rows, "seconds": round(time.perf_counter() - start)}


def blindly(images: int, seed: int) -> list[dict[str, Any]]:
    """What the rule that sees nothing scores on the same exams."""
    rows = []
    for partners in SHARES:
        drawn = exam(images, partners, seed)
        rows.append({"probability": partners, **scores(drawn, *blind(drawn).values())})
    return rows


def card(folder: Path) -> str:
    """The model card, from the records in its folder."""
    config, record = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "evaluation"))
    side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    models = record["models"]
    training = models[0]["training"]
    titles = [f"seed {model['training']['seed']}" for model in models] + ["blind rule"]
    columns = [model["rows"] for model in models] + [record["blind"]]
    table = ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for name, title in SCORES.items():
        cells = [" / ".join(_short(row[name]) for row in rows) for rows in columns]
        table.append(f"| {title} | " + " | ".join(cells) + " |")
    stages = "\n".join(
        f"| {model['training']['seed']} | {name} | {stage['steps']} | {stage['seconds']} |"
        for model in models
        for name, stage in model["training"]["stages"].items()
    )
    commands = "\n".join(
        [f"python -m vision_attn.mllm.train {model['training']['command']}" for model in models]
        + [f"python -m vision_attn.mllm.card {record['command']}"]
    )
    notes = "".join(f"\n{model['training']['note']}" for model in models if "note" in model["training"])
    tokens = (side // patch) ** 2
    return f"""# {folder.name}

A transformers `LlavaForConditionalGeneration` that answers and captions crowded pictures of coloured shapes: {side} x
{side} pixels, {tokens} tokens a picture, {training["parameters"]:,} parameters, stored as float16. Trained from scratch
on `vision_attn.shapes.crowd`; no outside data or weights. It proves that methods do what they should and how they
differ at this size; it says nothing about real models.

```python
from vision_attn.mllm import load

load("{folder.name}").answer(picture, "Is there a red circle in the image?")  # uint8 [height, width, 3]
```

24 kinds of things, a colour and a shape each, form six contexts of an anchor and three partners. Pictures it learned
from show each partner with probability 0.8, so it has learned to expect them: it names partners that are not there. The
words it knows are those of its questions, `is there a COLOR SHAPE in the image ?` and `describe the image`, and of its
answers. Red, green, blue, yellow; circle, square, triangle, cross, ring, bar.

```
{commands}
```

| seed | stage | steps | seconds |
| --- | --- | --- | --- |
{stages}

Seconds are wall time of one thread on a machine that other work shared and at times stopped. Weights of seed
{training["seed"]} are those in this folder.{notes}

## Fresh pictures

{record["images"]} pictures each, in which a partner of the anchor is there with probability
{" / ".join(map(str, SHARES))}; questions of POPE, three things and three negatives per picture, anchors last. The blind
rule sees nothing: it knows the context, says yes to the anchor and its partners, and names all four. It, not one half,
is what chance means here. Adversarial negatives are things that often come with the one just asked.

{chr(10).join(table)}
"""


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m vision_attn.mllm.card", description=__doc__.split("\n")[0])
    parser.add_argument(
        "models", type=Path, nargs="+", help="folders that training wrote; the first is the one in --out"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the card")
    parser.add_argument("--images", type=int, default=300, help="of each of the three kinds")
    parser.add_argument("--seed", type=int, default=2000, help="of the pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = {
        "command": shlex.join(argv),
        "images": args.images,
        "models": [examine(folder, args.images, args.seed) for folder in args.models],
        "blind": blindly(args.images, args.seed),
    }
    (args.out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "README.md").write_text(card(args.out))
    print(json.dumps(record["models"][0]["rows"]))


if __name__ == "__main__":
    main()
