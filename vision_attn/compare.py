"""One small model with one kind of attention after the other: the same pictures, budget and seeds for all."""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.batches import classified
from vision_attn.bench import Dense
from vision_attn.evaluate import shares_right
from vision_attn.fit import fit
from vision_attn.shapes.stills import LABELS

SEEDS = (0, 1, 2)
LINEAR = ("elu", "relu", "mala", "rala", "inline", "flow")  # of twelve: every kind adds minutes
STEPS, BATCH, LR, PICTURES, FRESH = 800, 16, 3e-3, 4096, 1000
DIM, HEADS, DEPTH = 32, 2, 2
COLUMNS = ("attention", "seed", "parameters", "steps", "shape", "color", "both", "milliseconds")


def kinds() -> dict[str, Callable[[int, int], nn.Module]]:
    """Name -> what makes the layer from channels and heads; maps are 12 x 12 tokens."""
    from vision_attn.modules.linear import LinearAttention2d
    from vision_attn.modules.neighborhood import NeighborhoodAttention
    from vision_attn.modules.routing import BiLevelRoutingAttention
    from vision_attn.modules.varied_window import VariedWindowAttention

    layers = {
        "dense": Dense,
        "neighborhood 5x5": partial(NeighborhoodAttention, window=5, rel_pos_bias=False),
        "bi-level, 3 of 9 regions": partial(BiLevelRoutingAttention, regions=3, topk=3),
        "varied window 4x4": partial(VariedWindowAttention, window=4),
    }
    return layers | {f"linear {kind}": partial(LinearAttention2d, kind=kind) for kind in LINEAR}


class Classifier(nn.Module):
    """The stem and two blocks of a BiFormer with any attention in them, mean and linear; 12 x 12 tokens."""

    def __init__(self, layer: Callable[[int, int], nn.Module]):
        from vision_attn.backbones.biformer import Block

        super().__init__()
        half = DIM // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, DIM, 3, 2, 1),
            nn.BatchNorm2d(DIM),
        )
        blocks = [Block(DIM, layer(DIM, HEADS), mlp_ratio=2.0, drop_path=0.0, position=True) for _ in range(DEPTH)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(DIM)
        self.head = nn.Linear(DIM, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean((2, 3)))


def milliseconds(model: nn.Module, images: Tensor) -> float:
    """CPU time of a forward and backward pass, the least of several, which other work on the machine disturbs least."""
    times = []
    for _ in range(6):
        start = time.process_time()
        model(images).sum().backward()
        times.append(time.process_time() - start)
    return round(1000 * min(times), 1)


def compare(args: argparse.Namespace) -> None:
    """Every kind with every seed; runs that `OUT/compare/attention.csv` holds already are not repeated."""
    folder = args.out / "compare"
    folder.mkdir(exist_ok=True)
    path = folder / "attention.csv"
    rows = read(path)
    images, labels = classified_in_parts(0, PICTURES)
    fresh = classified_in_parts(10**9, FRESH)
    for name, layer in kinds().items():
        for seed in SEEDS:
            if any(row["attention"] == name and int(row["seed"]) == seed for row in rows):
                continue
            torch.manual_seed(seed)
            model = Classifier(layer)

            def loss_of(rng: np.random.Generator, progress: float, model: nn.Module = model) -> Tensor:
                chosen = torch.from_numpy(rng.integers(0, len(images), BATCH))
                return F.cross_entropy(model(images[chosen]), labels[chosen])

            run = f"compare-{name.replace(' ', '-')}-{seed}"
            steps = args.steps or STEPS
            fit(run, model, loss_of, out=args.out, steps=steps, lr=args.lr or LR, seed=seed, decay=0.98)
            model.eval()
            with torch.no_grad():
                logits = torch.cat([model(part) for part in fresh[0].split(100)])
            row = {"attention": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
            row |= {"steps": steps, **shares_right(logits, fresh[1])}
            row["milliseconds"] = milliseconds(model, images[:BATCH])
            rows.append(row)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            (args.out / f"{run}.checkpoint.safetensors").unlink()
    (folder / "README.md").write_text(report(path))


def classified_in_parts(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Like `classified`, drawn in parts so that several sizes occur."""
    parts = [classified(np.random.default_rng((seed, i)), min(32, count - i)) for i in range(0, count, 32)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> str:
    """Markdown: one line per kind of attention, mean and standard deviation over the seeds."""
    runs: dict[str, list[dict]] = {}
    for row in read(path):
        runs.setdefault(row["attention"], []).append(row)
    lines = ["| attention | parameters | shape % | colour % | both % | CPU ms per step |", "|---|---|---|---|---|---|"]
    for name, rows in runs.items():
        cells = [name, f"{int(rows[0]['parameters']):,}"]
        for column in ("shape", "color", "both"):
            values = [100 * float(row[column]) for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells.append(f"{min(float(row['milliseconds']) for row in rows):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(path: Path) -> str:
    """The page beside the CSV file."""
    rows = read(path)
    steps, seeds = rows[0]["steps"], len({row["seed"] for row in rows})
    return f"""# One small classifier, many kinds of attention

Written by `python -m vision_attn.train compare --out OUT`. Every row is the same model but for its attention layers:
{DEPTH} blocks of {DIM} channels and {HEADS} heads on maps of 12 x 12 tokens. Every run has the same {PICTURES} pictures
of the shapes world, {steps} steps of {BATCH} pictures in the same order, the same learning rate ({LR:g} at most), and
no tuning for any kind. Shares of {FRESH} fresh pictures with the right shape and colour of the largest thing, mean ±
standard deviation over {seeds} seeds, which set weights and order. Milliseconds: CPU time of one forward and backward
pass of {BATCH} pictures, the least of six per run, on a CPU that other work shared; at 144 tokens sparse attention has
little to save.

A toy shows that the layers learn and how quickly they start; it says nothing about their rank on real pictures.

{table(path)}
"""
