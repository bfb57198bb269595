"""Train the built-in vision-language model from scratch on crowded pictures of the shapes world.

    python -m vision_attn.mllm.train --out runs/shapes-llava --seed 0
    python -m vision_attn.mllm.train --out runs/shapes-llava-long --cell 24 --start runs/shapes-llava/model --batch 8

First the vision tower learns to see, on pictures without contexts; then the text model learns captions without
pictures; then both learn to describe and to answer, with the tower frozen: trained along, it would learn to see what is
usually there. Each stage goes on from its last checkpoint when it is called again.

The second command trains for pictures of 576 tokens. It starts from the model of the first, whose text model has the
words and the questions already, so its stages are shorter.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.fit import fit
from vision_attn.mllm import tiny
from vision_attn.shapes.crowd import CELL, CELLS, KINDS, Crowd, describe, draw_crowd, sample_crowd

STEPS = {"tower": 700, "words": 150, "together": 1700}
STARTED = {"tower": 1200, "words": 0, "together": 450}  # after --start
HARD = 0.25  # share of the negative questions that ask for an absent partner


def pictures(crowds: list[Crowd], rng: np.random.Generator, cell: int) -> Tensor:
    return tiny.pixels([draw_crowd(crowd, rng, cell) for crowd in crowds])


def tower_loss(model, heads: nn.ModuleDict, rng: np.random.Generator, cell: int, batch: int) -> Tensor:
    """All kinds from the class token, and the kind of its cell, or none, from every patch."""
    crowds = [sample_crowd(rng, None) for _ in range(batch)]
    hidden = model.model.vision_tower(pictures(crowds, rng, cell)).last_hidden_state
    there = torch.zeros(batch, len(KINDS))
    cells = torch.full((batch, CELLS, CELLS), len(KINDS))
    for i, crowd in enumerate(crowds):
        for place, kind in crowd.places.items():
            there[i, kind] = 1
            cells[i, place // CELLS, place % CELLS] = kind
    each = cell // tiny.PATCH
    truth = cells.repeat_interleave(each, 1).repeat_interleave(each, 2).flatten()
    weight = torch.ones(len(KINDS) + 1)
    weight[-1] = 0.1
    whole = F.binary_cross_entropy_with_logits(heads["whole"](hidden[:, 0]), there)
    return whole + F.cross_entropy(heads["patch"](hidden[:, 1:]).flatten(0, 1), truth, weight)


def negative(crowd: Crowd, rng: np.random.Generator) -> int:
    absent = [kind for kind in range(len(KINDS)) if kind not in crowd.places.values()]
    if crowd.absent_partners and rng.random() < HARD:
        return int(rng.choice(crowd.absent_partners))
    return int(rng.choice(absent))


def conversation(crowd: Crowd, rng: np.random.Generator, caption: bool) -> tuple[str, str]:
    """A question and its answer."""
    if caption:
        return tiny.DESCRIBE, describe(crowd)
    yes = rng.random() < 0.5
    kind = int(rng.choice(list(crowd.places.values()))) if yes else negative(crowd, rng)
    return tiny.ask(kind), "yes" if yes else "no"


def text_loss(model, words, rng: np.random.Generator, cell: int, batch: int, image: bool) -> Tensor:
    """Cross entropy of the answers, averaged in each sample first: captions would drown answers of one word."""
    crowds = [sample_crowd(rng) for _ in range(batch)]
    tokens = (CELLS * cell // tiny.PATCH) ** 2 if image else 0
    ids, labels = [], []
    for i, crowd in enumerate(crowds):
        question, answer = conversation(crowd, rng, caption=not image or i % 2 == 0)
        before = words(tiny.prompt(question, image).replace("<image>", "<image> " * tokens)).input_ids
        after = words(answer, add_special_tokens=False).input_ids + [words.eos_token_id]
        ids.append(torch.tensor(before + after))
        labels.append(torch.tensor([-100] * len(before) + after))
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=words.pad_token_id)
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    given = {"pixel_values": pictures(crowds, rng, cell)} if image else {}
    logits = model(input_ids=ids, **given).logits  # no mask: padding is on the right, where nothing looks back at it
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    counted = (labels[:, 1:] != -100).float()
    return (loss.view(batch, -1).sum(1) / counted.sum(1)).mean()


def start_from(model, folder: Path) -> None:
    """Take the weights of a model trained on smaller pictures; its places are stretched over the larger grid."""
    given = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    name = next(name for name in given if name.endswith("position_embedding.weight"))
    first, places = given[name][:1], given[name][1:]
    own = len(model.state_dict()[name]) - 1
    square = places.T.unflatten(1, (int(len(places) ** 0.5), -1))[None]
    stretched = F.interpolate(square, size=(int(own**0.5),) * 2, mode="bilinear")[0].flatten(1).T
    model.load_state_dict(given | {name: torch.cat([first, stretched])})


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model, words = tiny.model(args.seed, args.cell).train(), tiny.tokenizer()
    if args.start is not None:
        start_from(model, args.start)
    tower, text = model.model.vision_tower, nn.ModuleList([model.model.language_model, model.lm_head])
    heads = nn.ModuleDict({"whole": nn.Linear(96, len(KINDS)), "patch": nn.Linear(96, len(KINDS) + 1)})
    together = nn.ModuleList([text, model.model.multi_modal_projector])
    stages = {
        "tower": (nn.ModuleList([tower, heads]), lambda rng, _: tower_loss(model, heads, rng, args.cell, args.batch)),
        "words": (text, lambda rng, _: text_loss(model, words, rng, args.cell, args.batch, image=False)),
        "together": (together, lambda rng, _: text_loss(model, words, rng, args.cell, args.batch, image=True)),
    }
    done = {}
    for number, (name, (module, loss_of)) in enumerate(stages.items()):
        model.requires_grad_(False)
        heads.requires_grad_(False)
        module.requires_grad_(True)
        steps = (args.steps or list((STEPS if args.start is None else STARTED).values()))[number]
        if not steps:
            continue
        seed = 10 * args.seed + number
        done[name] = fit(name, module, loss_of, out=args.out, steps=steps, lr=1e-3, seed=seed, decay=0.99)
    model.eval().half().save_pretrained(args.out / "model")
    tiny.processor(args.cell).save_pretrained(args.out / "model")
    record = {"command": args.command, "seed": args.seed, "stages": done}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    (args.out / "model" / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m vision_attn.mllm.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, and `model` at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", type=int, default=CELL, help="pixels a cell; 24 gives 576 tokens a picture")
    parser.add_argument("--start", type=Path, help="folder of a trained model to begin from")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs=3, help="of the stages: 700 150 1700, or 1200 0 450 after --start")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.command = shlex.join(argv)
    train(args)


if __name__ == "__main__":
    main()
