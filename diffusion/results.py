"""The table of methods: means and their errors, what is better or worse than the alternatives, and pictures."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.diffusion.clips import Cache, caption
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, Row, Size, rows
from vision_attn.diffusion.measures import SAME

# measure -> heading, and the sense in which it is better: 1 more, -1 less, 0 nearer to the truth.
MEASURES = {
    "agreement": ("agreement", 1),
    "count_error": ("count error", -1),
    "no_repeat": ("no repeat", 1),
    "motion": ("motion", 0),
    "sharpness": ("sharpness", 0),
}
ENOUGH = 5  # clips below which nothing is said of a difference


def summarize(cache: Cache, prompts: int, seeds: int) -> list[dict[str, Any]]:
    """One dict per row that has clips: means with their standard errors, and differences over the clips in common."""
    found = []
    for size in SIZES.values():
        records = {
            row.name: {clip[2:]: cache.record(*clip) for clip in _known(cache, size, row, prompts, seeds)}
            for row in rows(size)
        }
        truth = {
            name: float(np.mean(values)) for name in MEASURES if (values := _values(name, records[TRUTH].values()))
        }
        for row in rows(size):
            clips = records[row.name]
            if not clips:
                continue
            names = sorted({name for clip in clips.values() for name in clip["measures"]})
            means = {name: _mean(_values(name, clips.values())) for name in names}
            one = {"size": size.name, "row": row.name, "clips": len(clips), "control": row.control, **means}
            for name, middle in (("density", np.mean), ("seconds", np.median)):
                values = [clip[name] for clip in clips.values() if clip[name] is not None]
                one[name] = round(float(middle(values)), 3) if values else None
            others = {"against plain": PLAIN, "against control": row.control}
            for key, other in others.items():
                if row.name not in (TRUTH, PLAIN) and records.get(other):
                    one[key] = differences(clips, records[other], truth)
            found.append(one)
    return found


def _known(cache: Cache, size: Size, row: Row, prompts: int, seeds: int) -> list[tuple[Size, Row, int, int]]:
    clips = [(size, row, prompt, seed) for seed in range(seeds) for prompt in range(prompts)]
    return [clip for clip in clips if cache.has(*clip)]


def _values(name: str, clips: Iterable[dict]) -> list[float]:
    return [clip["measures"][name] for clip in clips if name in clip["measures"]]


def _mean(values: list[float]) -> list[float | None]:
    """The mean and its standard error, None for a single value."""
    error = round(float(np.std(values, ddof=1) / np.sqrt(len(values))), 4) if len(values) > 1 else None
    return [round(float(np.mean(values)), 4), error]


def differences(clips: dict, others: dict, truth: dict[str, float]) -> dict[str, list[str]] | None:
    """Which measures are better and which worse by more than two standard errors of the paired difference.

    None where the two have too few clips of one prompt and seed in common.

    >>> few = {(i, 0): {"measures": {"agreement": 1.0 - i % 2 / 9}} for i in range(8)}
    >>> none = {clip: {"measures": {"agreement": 0.0}} for clip in few}
    >>> differences(few, none, {"agreement": 1.0})
    {'better': ['agreement'], 'worse': []}
    """
    common = sorted(set(clips) & set(others))
    if len(common) < ENOUGH:
        return None
    verdict: dict[str, list[str]] = {"better": [], "worse": []}
    for name, (heading, sense) in MEASURES.items():
        both = [clip for clip in common if all(name in side[clip]["measures"] for side in (clips, others))]
        if name not in truth or len(both) < ENOUGH:
            continue
        mine, theirs = (np.array([side[clip]["measures"][name] for clip in both]) for side in (clips, others))
        if sense == 0:
            gain = np.abs(theirs - truth[name]) - np.abs(mine - truth[name])
        else:
            gain = sense * (mine - theirs)
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        if abs(gain.mean()) > max(2 * error, 1e-9):
            verdict["better" if gain.mean() > 0 else "worse"].append(heading)
    return verdict


def write(out: Path, cache: Cache, prompts: int, seeds: int, command: str) -> str:
    """Write RESULTS.md and results/clips.csv, evaluation.json and evaluation.png; says what was written."""
    known = [clip for size in SIZES.values() for row in rows(size) for clip in _known(cache, size, row, prompts, seeds)]
    found = {"command": command, "steps": cache.steps, "rows": summarize(cache, prompts, seeds)}
    (out / "results").mkdir(parents=True, exist_ok=True)
    _replace(out / "results" / "clips.csv", cache.scores_table(known).encode())
    _replace(out / "results" / "evaluation.json", (json.dumps(found, indent=1) + "\n").encode())
    _replace(out / "RESULTS.md", page(found).encode())
    sheet(out / "results" / "evaluation.png", cache)
    return f"{len(found['rows'])} rows in {out / 'RESULTS.md'}"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


_INTRODUCTION = """# Every method on the built-in video model

```
python -m vision_attn.diffusion.evaluate {command}
```

Written by that command. The model is [shapes-video](weights/shapes-video/README.md), a small Wan pipeline trained on
clips of 17 frames of 48 x 48 pixels (5 x 6 x 6 tokens); captions name the colour, shape and direction of one thing. The
same captions and noise in every row of a size; {steps} denoising steps; no dense steps or layers. **A toy shows
mechanics and directions. It says nothing about the quality of these methods on large models.**

- **agreement**: share of what the caption names (colour, shape, direction) that the judge sees.
- **count error**: things too many or too few, mean over the frames. Twice the size drawn without a remedy shows several
  things where one was asked for.
- **no repeat**: the NoRepeat score of UltraViCo, 0 for a clip that shows its beginning again, 100 for one that never
  does, over the clips that do not stand still; frames count as the same up to a distance of {same:g} of 255. A thing at
  rest looks repeated, so true clips do not reach 100 either.
- **motion**: way of the thing per frame, in % of the frame's side. True things slow down and come to rest, so longer
  clips have less.
- **sharpness**: height of edges over their width, 1 for a step from black to white within a pixel.
- **PSNR**: to the clip of the untouched model from the same noise, in dB, at the trained size, where that is the truth;
  of edits, to the edit of the picture that nothing was done to. An edit that a protection spoils is a success of it.
- **density**: share of the pairs of tokens that attention computes (of FreeSwim, in its local copy; attention to the
  text is not counted). **seconds**: of one processor core for one clip, from prompt to pixels, median; with
  the small clip, where one is enlarged. Small sequences gain nothing from sparsity.
- **against plain**, **against control**: the untouched model at that size, and the row named, which says what the idea
  adds to what any method of its kind would do. Listed is what differs by more than two standard errors of the paired
  difference; motion and sharpness are better when nearer to the truth. "-" is no difference. One such finding in
  twenty is chance. For every pattern the control is as many pairs, in blocks of 6 tokens drawn blindly, other ones in
  every layer.

The radial LoRA, and the image models and what was distilled from them, are trained by this command before their first
clip, for minutes (the commands are in [trained.py](trained.py)). MoH-DiT and LaMamba blocks have no row: they are parts
for denoisers that are trained from nothing, and none was trained here.

The number after +- is the standard error of the mean. One clip of each row: [evaluation.png](results/evaluation.png).
"""


def page(found: dict[str, Any]) -> str:
    """RESULTS.md from what `summarize` found."""
    parts = [_INTRODUCTION.format(**found, same=SAME)]
    for size in SIZES.values():
        mine = [one for one in found["rows"] if one["size"] == size.name]
        if not mine:
            continue
        shown = [name for name in (*MEASURES, "psnr") if any(name in one for one in mine)]
        heads = ["", "clips", *(MEASURES[name][0] if name in MEASURES else "PSNR" for name in shown)]
        heads += ["density", "seconds", "against plain", "against control"]
        lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
        for one in mine:
            cells = [one["row"], str(one["clips"]), *(_cell(name, one.get(name)) for name in shown)]
            cells += ["" if one[name] is None else f"{one[name]:.2f}" for name in ("density", "seconds")]
            control = _words(one, "against control")
            if control and not one["control"].startswith("random"):
                control = f"{one['control']}: {control}"
            lines.append("| " + " | ".join([*cells, _words(one, "against plain"), control]) + " |")
        tokens = f"{(size.frames - 1) // 4 + 1} x {size.side // 8} x {size.side // 8} tokens"
        tokens = "12 x 12 and 6 x 6 tokens" if size.name == "unet" else tokens
        sizes = f"{size.frames} frame{'s' * (size.frames > 1)} of {size.side} x {size.side} pixels, {tokens}."
        parts.append(f"## {size.title}\n\n{sizes}\n\n" + "\n".join(lines) + "\n" + _no_help(mine))
    return "\n".join(parts)


def _cell(name: str, value: list[float | None] | None) -> str:
    if value is None:
        return ""
    factor, digits = {"motion": (100, 2), "psnr": (1, 1), "no_repeat": (1, 0)}.get(name, (1, 2))
    return " +- ".join(f"{factor * number:.{digits}f}" for number in value if number is not None)


def _words(one: dict[str, Any], key: str) -> str:
    if key not in one:
        return ""
    if one[key] is None:
        return "too few clips"
    return "; ".join(f"{sense} {', '.join(names)}" for sense, names in one[key].items() if names) or "-"


def _no_help(mine: list[dict[str, Any]]) -> str:
    """A sentence on the methods that are better than the untouched model in nothing that is measured."""
    named = [one for one in mine if one.get("against plain") and not one["row"].startswith("random")]
    if not named:
        return ""
    useless = [one["row"] for one in named if not one["against plain"]["better"]]
    blind = [
        one["row"] for one in named
        if one["control"].startswith("random") and one.get("against control") and not one["against control"]["better"]
    ]  # fmt: skip
    lines = [f"Better than the untouched model in nothing measured here: {'; '.join(useless) or 'none'}."]
    if blind:
        lines.append(f"Better than blindly drawn blocks in nothing: {'; '.join(blind)}.")
    return "\n" + "\n\n".join(lines) + "\n"


def sheet(path: Path, cache: Cache) -> None:
    """The first clip of every row, one column per size, evenly spaced frames side by side."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, line, frames = 56, 2, 15, 6
    columns = {size: [row for row in rows(size) if cache.drawn(size, row, 0, 0)] for size in SIZES.values()}
    columns = {size: shown for size, shown in columns.items() if shown}
    if not columns:
        return
    width, top, cell = frames * (side + gap) + 4 * gap, 2 * line + 3 * gap, side + line
    picture = Image.new("RGB", (len(columns) * width, top + max(map(len, columns.values())) * cell + gap), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for column, (size, shown) in enumerate(columns.items()):
        x = column * width + gap
        title = f"{size.title} ({size.frames} x {size.side} x {size.side})\n{caption(size, 0)}"
        draw.multiline_text((x, gap), title, fill="black", font=font)
        for number, row in enumerate(shown):
            video, y = cache.video(size, row, 0, 0), top + number * cell
            label = textwrap.shorten(row.name, 60, placeholder="...")
            draw.text((x, y), label, fill="#404040", font=font)
            for place, index in enumerate(np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)):
                small = Image.fromarray(video[index]).resize((side, side), Image.Resampling.LANCZOS)
                picture.paste(small, (x + place * (side + gap), y + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG", optimize=True)
    partial.replace(path)
