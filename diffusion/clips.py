"""Clips that were drawn, kept in a folder, and what was measured on them, kept in a table too."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.diffusion import measures
from vision_attn.diffusion.card import fresh_prompts
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, Row, Size, rows
from vision_attn.shapes import COLORS, SHAPES

_MEASURED_BY = hashlib.sha256(inspect.getsource(measures).encode()).hexdigest()[:12]
_NUMBERS = ("seconds", "density", "agreement", "count_error", "objects", "sharpness", "motion", "no_repeat", "psnr")
_COLUMNS = ("size", "row", "prompt", "seed", "settings", "measured_by", *_NUMBERS)


def caption(size: Size, number: int) -> str:
    """A caption of one thing that moves; of one that does not for pictures, and of two for those of two things.

    >>> [caption(SIZES[name], 0) for name in ("1x", "still", "edit")]
    ['a big yellow triangle moves down', 'a red triangle and a white circle', 'a red triangle']
    """
    if size.frames > 1:
        return fresh_prompts(seed=8, count=number + 1)[number]
    draw = np.random.default_rng((8, 4, number))
    colors, shapes = draw.permutation(list(COLORS))[:2], draw.permutation(SHAPES)[:2]
    things = [f"a {color} {shape}" for color, shape in zip(colors, shapes, strict=True)]
    return " and ".join(things) if size.name == "still" else things[0]


class Cache:
    """Clips and what was measured on them, one file each per size, row, prompt and seed.

    A row whose settings or model changed is drawn again; a clip is measured again when `measures.py` changed.

    Args:
        folder: of the clips.
        model: folder of the pipeline; other weights are other clips.
        steps: denoising steps.
        scores: a table of `scores_table`. What it says of a clip counts where the clip itself is not in the folder, so
            that a run can go on without the folder of the last one.
    """

    def __init__(self, folder: Path, model: Path, steps: int, scores: Path | None = None) -> None:
        self.folder, self.steps = folder, steps
        weights = sorted(model.rglob("*.safetensors"))
        self._model = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
        self._scores: dict[tuple[str, str, int, int], dict[str, Any]] = {}
        if scores is not None and scores.exists():
            self._scores = dict(_read(scores))

    def settings(self, size: Size, row: Row) -> str:
        """Sixteen hexadecimal digits that change with whatever the clips of a row depend on."""
        what = json.dumps([row.to_dict(), size.frames, size.side, self.steps, self._model], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def path(self, size: Size, row: Row, prompt: int, seed: int) -> Path:
        """Where the record is; the clip lies beside it."""
        return self.folder / size.name / self.settings(size, row) / f"{prompt:02d}-{seed}.json"

    def drawn(self, *clip: Any) -> bool:
        """Whether the clip itself is in the folder."""
        return self.path(*clip).exists()

    def has(self, size: Size, row: Row, prompt: int, seed: int) -> bool:
        """Whether the scores of a clip are known."""
        return (size.name, self.settings(size, row), prompt, seed) in self._scores or self.drawn(
            size, row, prompt, seed
        )

    def store(self, clip: tuple, video: np.ndarray, record: dict[str, Any]) -> None:
        """The record comes last: where it is, the clip is whole."""
        path = self.path(*clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, video=video)
            partial.replace(path.with_suffix(".npz"))
            partial.write_text(json.dumps(record) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def video(self, *clip: Any) -> np.ndarray:
        """Uint8 `[frames, height, width, 3]`."""
        with np.load(self.path(*clip).with_suffix(".npz")) as file:
            return file["video"]

    def record(self, size: Size, row: Row, prompt: int, seed: int) -> dict[str, Any]:
        """Seconds, density and all measures of a clip."""
        clip = (size, row, prompt, seed)
        if not self.drawn(*clip):
            return self._scores[size.name, self.settings(size, row), prompt, seed]
        record = json.loads(self.path(*clip).read_text())
        if record.get("measured_by") != _MEASURED_BY:
            video = self.video(*clip)
            record["measures"] = measures.measure(video, caption(size, prompt), SIZES["1x"].frames)
            plain = (size, rows(size)[1], prompt, seed)
            if size.name in ("1x", "edit") and row.name not in (TRUTH, PLAIN) and self.drawn(*plain):
                record["measures"]["psnr"] = measures.psnr(video, self.video(*plain))
            self.store(clip, video, record | {"measured_by": _MEASURED_BY})
        return record

    def scores_table(self, clips: Iterable[tuple[Size, Row, int, int]]) -> str:
        """The scores of clips, and those that were read and are of other clips, as CSV with one line a clip."""
        known = dict(self._scores)
        for size, row, prompt, seed in clips:
            known[size.name, self.settings(size, row), prompt, seed] = self.record(size, row, prompt, seed) | {
                "row": row.name
            }
        lines = io.StringIO()
        table = csv.DictWriter(lines, _COLUMNS, lineterminator="\n", restval="")
        table.writeheader()
        for (size, settings, prompt, seed), record in known.items():
            numbers = record["measures"] | {name: record[name] for name in ("seconds", "density")}
            named = {"size": size, "row": record["row"], "prompt": prompt, "seed": seed, "settings": settings}
            exact = {name: f"{value:.6g}" for name, value in numbers.items() if value is not None}
            table.writerow(named | {"measured_by": _MEASURED_BY} | exact)
        return lines.getvalue()


def _read(path: Path) -> Iterator[tuple[tuple[str, str, int, int], dict[str, Any]]]:
    """The records of a table, without those that another `measures.py` measured."""
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            if line["measured_by"] == _MEASURED_BY:
                numbers = {name: float(line[name]) for name in _NUMBERS if line[name]}
                record = {name: numbers.pop(name, None) for name in ("seconds", "density")}
                key = (line["size"], line["settings"], int(line["prompt"]), int(line["seed"]))
                yield key, record | {"row": line["row"], "measures": numbers}
