"""Clips that were drawn, kept in a folder, and what was measured on them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.diffusion import measures
from vision_attn.diffusion.card import fresh_prompts
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, Row, Size, rows
from vision_attn.shapes import COLORS, SHAPES

_MEASURED_BY = hashlib.sha256(inspect.getsource(measures).encode()).hexdigest()[:12]


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
    """

    def __init__(self, folder: Path, model: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        weights = sorted(model.rglob("*.safetensors"))
        self._model = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()

    def path(self, size: Size, row: Row, prompt: int, seed: int) -> Path:
        """Where the record is; the clip lies beside it."""
        what = json.dumps([row.to_dict(), size.frames, size.side, self.steps, self._model], sort_keys=True)
        key = hashlib.sha256(what.encode()).hexdigest()[:16]
        return self.folder / size.name / key / f"{prompt:02d}-{seed}.json"

    def has(self, *clip: Any) -> bool:
        return self.path(*clip).exists()

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
        record = json.loads(self.path(*clip).read_text())
        if record.get("measured_by") != _MEASURED_BY:
            video = self.video(*clip)
            record["measures"] = measures.measure(video, caption(size, prompt), SIZES["1x"].frames)
            plain = (size, rows(size)[1], prompt, seed)
            if size.name in ("1x", "edit") and row.name not in (TRUTH, PLAIN) and self.has(*plain):
                record["measures"]["psnr"] = measures.psnr(video, self.video(*plain))
            self.store(clip, video, record | {"measured_by": _MEASURED_BY})
        return record
