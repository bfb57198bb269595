"""Score the built-in video model with the judge of the shapes world, dense and under patterns, and write its card."""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vision_attn import PATTERNS, attach
from vision_attn.shapes import COLORS, DIRECTIONS, SHAPES, score

SCORES = ("color", "shape", "both", "count", "direction")


def fresh_prompts(seed: int, count: int) -> list[str]:
    """Captions of one thing, a third of them without a size, drawn without repetition."""
    things = [f"{size}{color} {shape}" for size in ("", "small ", "big ") for color in COLORS for shape in SHAPES]
    prompts = [f"a {thing} moves {direction}" for thing in things for direction in DIRECTIONS]
    return [prompts[i] for i in np.random.default_rng((seed, 3)).permutation(len(prompts))[:count]]


def draw_and_score(pipe, prompts: list[str], defaults: dict, seed: int) -> dict[str, float]:
    """Means of the judge's scores over one clip per prompt, and the seconds that a clip took."""
    rows, start = [], time.perf_counter()
    for i, prompt in enumerate(tqdm(prompts, desc="evaluate")):
        video = pipe(
            prompt,
            height=defaults["height"],
            width=defaults["width"],
            num_frames=defaults["frames"],
            num_inference_steps=defaults["steps"],
            guidance_scale=defaults["guidance"],
            max_sequence_length=defaults["max_sequence_length"],
            generator=torch.Generator().manual_seed(seed + i),
        ).frames[0]
        rows.append(score(video, prompt))
    means = {key: round(float(np.mean([row[key] for row in rows])), 3) for key in SCORES}
    return means | {"seconds": round((time.perf_counter() - start) / len(rows), 2)}


def evaluate(args: argparse.Namespace) -> None:
    """Dense, then each pattern that `defaults.json` suggests, on the same prompts and noise."""
    from diffusers import WanPipeline

    defaults = json.loads((args.out / "defaults.json").read_text())
    pipe = WanPipeline.from_pretrained(args.out)
    pipe.set_progress_bar_config(disable=True)
    prompts = fresh_prompts(args.seed, args.prompts)
    rows = [{"attention": "Dense()", "density": 1.0} | draw_and_score(pipe, prompts, defaults, 10_000)]
    for name, options in defaults["attention"].items():
        pattern = PATTERNS[name](**options)
        with attach(pipe, pattern) as run:
            means = draw_and_score(pipe, prompts, defaults, 10_000)
        rows.append({"attention": str(pattern), "density": round(run.report.denoisers[0].kept, 3)} | means)
    record = {"prompts": len(prompts), "threads": args.threads, "command": args.command, "rows": rows}
    record["tokens"] = math.prod(run.report.denoisers[0].grids[0])
    (args.out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "README.md").write_text(card(args.out))
    print(json.dumps(rows[0]))


def card(folder: Path) -> str:
    """The model card, from the records that the stages left in the folder."""
    scores, defaults = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "defaults"))
    stages = {name: folder / f"{name}.json" for name in ("vae", "denoiser", "decoder")}
    records = {name: json.loads(path.read_text()) for name, path in stages.items() if path.exists()}
    columns = ["attention", "density", *SCORES, "seconds"]
    table = [columns, ["---"] * len(columns)]
    table += [[f"`{row[c]}`" if c == "attention" else str(row[c]) for c in columns] for row in scores["rows"]]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    done = [*records.values(), scores]
    commands = "\n".join(f"python -m vision_attn.diffusion.train {record['command']}" for record in done)
    trained = "\n".join(
        f"| {name} | {r['parameters']:,} | {r['steps']} | {r['seconds']} | "
        + (f"{r['psnr']} dB on fresh clips |" if "psnr" in r else f"{r['clips']} clips |")
        for name, r in records.items()
    )
    notes = "\n".join(record["note"] for record in records.values() if "note" in record)
    return f"""# shapes-video

A diffusers `WanPipeline` that draws short clips, or single images, of coloured shapes: {defaults["height"]} x
{defaults["width"]} pixels, {defaults["frames"]} frames. Trained from scratch on the procedural shapes world of this
package; no outside data or weights.

It knows the captions `a [small|big] COLOR SHAPE [moves DIRECTION]` with circle, square, triangle, cross; red, green,
blue, yellow, white; left, right, up, down. Two things joined by `and` were a fifth of its training, and it often gets
one of them wrong. At other sizes and lengths it runs without having learned them.

```
{commands}
```

| stage | parameters | steps | seconds | |
| --- | --- | --- | --- | --- |
{trained}

Seconds are wall time of one thread on a CPU that other work shared.
{notes}

## What the judge says

{scores["prompts"]} fresh captions of one thing, {defaults["steps"]} steps, guidance {defaults["guidance"]}; the same
captions and noise in every row; no dense steps or layers. Shares of clips with the right colour, shape, both, and
direction; `count` is the share of frames with exactly one thing. `density` is the share of query-key pairs kept,
`seconds` the wall time of a clip on {scores["threads"]} thread: at {scores["tokens"]} tokens a clip is too small for
sparsity to save time.

{lines}
"""
