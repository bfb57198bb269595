"""Train the built-in vision-language model from scratch on crowded pictures of the shapes world.

    python -m vision_attn.mllm.train --out runs/shapes-llava --seed 0

First the vision tower learns to see, on pictures without contexts; then the text model learns captions without
pictures; then both learn to describe and to answer, with the tower frozen: trained along, it would learn to see what is
usually there. Each stage goes on from its last checkpoint when it is called again.
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
BATCH = 32
HARD = 0.25  # share of the negative questions that ask for an absent partner


def pictures(crowds: list[Crowd], rng: np.random.Generator, cell: int) -> Tensor:
    return tiny.pixels([draw_crowd(crowd, rng, cell) for crowd in crowds])


def tower_loss(model, heads: nn.ModuleDict, rng: np.random.Generator, cell: int) -> Tensor:
    """All kinds from the class token, and the kind of its cell, or none, from every patch."""
    crowds = [sample_crowd(rng, None) for _ in range(BATCH)]
    hidden = model.model.vision_tower(pictures(crowds, rng, cell)).last_hidden_state
    there = torch.zeros(BATCH, len(KINDS))
    cells = torch.full((BATCH, CELLS, CELLS), len(KINDS))
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


def text_loss(model, words, rng: np.random.Generator, cell: int, image: bool) -> Tensor:
    """Cross entropy of the answers, averaged in each sample first: captions would drown answers of one word."""
    crowds = [sample_crowd(rng) for _ in range(BATCH)]
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
    logits = model(input_ids=ids, attention_mask=(ids != words.pad_token_id).long(), **given).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    counted = (labels[:, 1:] != -100).float()
    return (loss.view(BATCH, -1).sum(1) / counted.sum(1)).mean()


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model, words = tiny.model(args.seed, args.cell).train(), tiny.tokenizer()
    tower, text = model.model.vision_tower, nn.ModuleList([model.model.language_model, model.lm_head])
    heads = nn.ModuleDict({"whole": nn.Linear(96, len(KINDS)), "patch": nn.Linear(96, len(KINDS) + 1)})
    together = nn.ModuleList([text, model.model.multi_modal_projector])
    stages = {
        "tower": (nn.ModuleList([tower, heads]), lambda rng, _: tower_loss(model, heads, rng, args.cell)),
        "words": (text, lambda rng, _: text_loss(model, words, rng, args.cell, image=False)),
        "together": (together, lambda rng, _: text_loss(model, words, rng, args.cell, image=True)),
    }
    done = {}
    for number, (name, (module, loss_of)) in enumerate(stages.items()):
        model.requires_grad_(False)
        heads.requires_grad_(False)
        module.requires_grad_(True)
        steps = args.steps or STEPS[name]
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
    parser.add_argument("--steps", type=int, help="of every stage, instead of 700, 150 and 1700")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.command = shlex.join(argv)
    train(args)


if __name__ == "__main__":
    main()
