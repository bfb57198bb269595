"""Score the built-in classifiers and the built-in CLIP on fresh scenes, and write their cards."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vision_attn.batches import classified
from vision_attn.shapes import COLORS, SHAPES, Scene, caption, render, sample_scene
from vision_attn.shapes.stills import LABELS

FRESH = 10**9  # no training step has such a number, so none has seen these scenes
CAPTIONS = 50
_KINDS = {"drawn at 48 pixels": False, "drawn at 28 to 96 pixels, with noise": True}


def shares_right(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of pictures with the right shape, colour and both; `logits` `[n, 20]`, `labels` `[n]` as in `LABELS`."""
    best, many = logits.argmax(-1), len(SHAPES)
    shape, color = best % many == labels % many, best // many == labels // many
    return {
        name: round(right.double().mean().item(), 4)
        for name, right in (("shape", shape), ("color", color), ("both", shape & color))
    }


def score_classifier(model: nn.Module, seed: int, count: int, vary: bool) -> dict[str, float]:
    """`shares_right` of `count` fresh pictures; `vary` as in `classified`."""
    logits, labels = [], []
    for i in tqdm(range(0, count, 50), desc="evaluate"):
        images, label = classified(np.random.default_rng((seed, FRESH, i)), min(50, count - i), vary)
        with torch.no_grad():
            logits.append(model(images))
        labels.append(label)
    return shares_right(torch.cat(logits), torch.cat(labels))


def different_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Still scenes of one to three things, no two with the same colours and shapes: each caption fits one of them."""
    scenes: dict[frozenset, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, int(rng.integers(1, 4)), frames=1)
        scenes.setdefault(frozenset(Counter((t.color, t.shape) for t in scene.things).items()), scene)
    return list(scenes.values())


def two_different(rng: np.random.Generator) -> Scene:
    """A still scene of two things of different colours and shapes."""
    colors, shapes = rng.choice(list(COLORS), 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    wanted = [{"color": str(color), "shape": str(shape)} for color, shape in zip(colors, shapes, strict=True)]
    return sample_scene(rng, wanted, frames=1)


def exchanged(scene: Scene) -> Scene:
    """The scene with the colours of its two things exchanged."""
    one, other = scene.things
    return replace(scene, things=(replace(one, color=other.color), replace(other, color=one.color)))


def score_clip(clip, seed: int, rounds: int) -> dict[str, float]:
    """Retrieval among 50 captions, means over rounds with new scenes, and naming single things.

    Returns:
        `text`: recall@1 of the caption of a picture; `image`: of the picture of a caption; `label`: share of pictures
        of one thing whose best text among the 20 labels is right; `bound`: of pictures of two things that fit their
        caption better than the one with both colours exchanged, 0.5 by chance.
    """
    from vision_attn.clip import similarity

    rows = []
    for i in tqdm(range(rounds), desc="evaluate"):
        rng = np.random.default_rng((seed, FRESH, i))
        scenes = different_scenes(rng, CAPTIONS)
        cosines = similarity(np.concatenate([render(s) for s in scenes]), [caption(s) for s in scenes], clip)
        truth = torch.arange(CAPTIONS)
        single = [sample_scene(rng, 1, frames=1) for _ in range(CAPTIONS)]
        labels = torch.tensor([LABELS.index(f"{s.things[0].color} {s.things[0].shape}") for s in single])
        named = similarity(np.concatenate([render(s) for s in single]), [f"a {name}" for name in LABELS], clip)
        pairs = [two_different(rng) for _ in range(CAPTIONS)]
        texts = [caption(scene) for scene in pairs] + [caption(exchanged(scene)) for scene in pairs]
        right, wrong = similarity(np.concatenate([render(s) for s in pairs]), texts, clip).chunk(2, 1)
        guesses = ((cosines.argmax(1), truth), (cosines.argmax(0), truth), (named.argmax(1), labels))
        shares = [(guess == true).double().mean().item() for guess, true in guesses]
        rows.append([*shares, (right.diag() > wrong.diag()).double().mean().item()])
    names = ("text", "image", "label", "bound")
    return {name: round(float(value), 4) for name, value in zip(names, np.mean(rows, 0), strict=True)}


def evaluate(args: argparse.Namespace) -> None:
    """Score every model that is in OUT."""
    import timm

    import vision_attn.backbones  # noqa: F401
    from vision_attn.clip import load_clip

    for folder in sorted(path.parent for path in args.out.glob("*/training.json")):
        record: dict = {"command": args.command}
        if folder.name == "clip_shapes":
            record["rounds"] = max(args.scenes // (2 * CAPTIONS), 1)
            record |= score_clip(load_clip(folder), args.seed, record["rounds"])
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            record["scenes"] = args.scenes
            record["rows"] = {
                name: score_classifier(model, args.seed, args.scenes, vary) for name, vary in _KINDS.items()
            }
        (folder / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "README.md").write_text(card(folder))
        print(json.dumps(record))


_CLASSIFIER = """A timm classifier: the colour and shape of the largest thing in a picture of the shapes world, one to
three things in 48 x 48 pixels. {labels} classes: {colors}; {shapes}.

```python
import timm, vision_attn

model = timm.create_model("{name}", pretrained=True).eval()
```"""
_RIGHT = """Shares right on {scenes} scenes that it has not seen. The largest thing covers at least 1.2 times the area
of any other.

| pictures | shape | colour | both |
|---|---|---|---|
"""
_CLIP = """An open_clip model with the backbone `nat_shapes` and a text tower of two layers: still pictures of one to
three things, and captions `a [small|big] COLOR SHAPE`, joined by `and`. It knows no other words.

```python
from vision_attn.clip import clip_score, load_clip, similarity

model, transform, tokenizer = load_clip()
```"""
_RECALL = """Among {captions} captions of scenes it has not seen, no two with the same things, mean of {rounds} draws:
recall@1 of the caption for a picture {text:.3f}, of the picture for a caption {image:.3f}. Pictures of one thing and
the 20 texts `a red circle`, `a red square`, ...: {label:.3f} right.

It sees which words fit, and only partly which colour belongs to which shape: of pictures of two things, {bound:.3f}
fit their caption better than the one with both colours exchanged (0.5 by chance)."""


def card(folder: Path) -> str:
    """The model card, from the records that training and evaluation left in the folder."""
    done, scores = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "evaluation"))
    name = folder.name
    if name == "clip_shapes":
        says, result = _CLIP, _RECALL.format(captions=CAPTIONS, **scores)
    else:
        says = _CLASSIFIER.format(name=name, labels=len(LABELS), colors=", ".join(COLORS), shapes=", ".join(SHAPES))
        result = _RIGHT.format(**scores) + "\n".join(
            f"| {kind} | {row['shape']:.4f} | {row['color']:.4f} | {row['both']:.4f} |"
            for kind, row in scores["rows"].items()
        )
    note = f"\n{done['note']}" if "note" in done else ""
    return f"""# {name}

{says}

Trained on the procedural shapes world of this package; no outside data or weights. Stored as float16.

```
python -m vision_attn.train {done["command"]}
python -m vision_attn.train {scores["command"]}
```

| parameters | steps | pictures per step | seed | seconds |
|---|---|---|---|---|
| {done["parameters"]:,} | {done["steps"]} | {done["batch"]} | {done["seed"]} | {done["seconds"]} |

Seconds are wall time of one thread on a CPU that other work shared.{note}

## On fresh scenes

{result}
"""
