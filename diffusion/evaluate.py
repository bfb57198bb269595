"""Every method on the built-in video model at the trained size, 2 and 4 times the length, and 2 and 4 times the size.

    python -m vision_attn.diffusion.evaluate --cache CACHE

A folder keeps every clip that was drawn, so that a run goes on where the last one stopped, and two may run side by
side. The table is written from what the folder holds, and says how many clips stand behind each row: RESULTS.md,
results/evaluation.csv and results/evaluation.png beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vision_attn.diffusion import attach, measures
from vision_attn.diffusion.card import fresh_prompts
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, Row, Size, rows
from vision_attn.diffusion.loading import BUILT_IN, load
from vision_attn.diffusion.upscale import upscale_video
from vision_attn.shapes import parse, render, sample_scene

PROMPTS = 30
_MEASURED_BY = hashlib.sha256(inspect.getsource(measures).encode()).hexdigest()[:12]


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

    def record(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> dict[str, Any]:
        """Seconds, density and all measures of a clip."""
        clip = (size, row, prompt, seed)
        record = json.loads(self.path(*clip).read_text())
        if record.get("measured_by") != _MEASURED_BY:
            video = self.video(*clip)
            record["measures"] = measures.measure(video, text, SIZES["1x"].frames)
            if size is SIZES["1x"] and row.way == "draw" and row.name != PLAIN:
                plain = (size, Row(PLAIN), prompt, seed)
                record["measures"]["psnr"] = measures.psnr(video, self.video(*plain))
            self.store(clip, video, record | {"measured_by": _MEASURED_BY})
        return record


class Artist:
    """Draws the clips of a pipeline."""

    def __init__(self, cache: Cache, model: Path | None) -> None:
        loaded = load(model, device="cpu")
        self.cache, self.pipe = cache, loaded.pipe
        self.pipe.set_progress_bar_config(disable=True)
        said = loaded.defaults
        self.call = {
            "guidance_scale": said["guidance"],
            "max_sequence_length": said["max_sequence_length"],
            "num_inference_steps": cache.steps,
        }

    def draw(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> None:
        """Draw one clip and store it. Seconds are those of the processor, which other work on the machine adds to
        little; those of the clip that an enlarged one starts from are counted in."""
        if row.way == TRUTH:
            scene = sample_scene(
                np.random.default_rng((seed, prompt, 5)), parse(text), height=size.side, width=size.side,
                frames=size.frames,
            )  # fmt: skip
            self.cache.store((size, row, prompt, seed), _bytes(render(scene)), {"seconds": None, "density": None})
            return
        noise = torch.Generator().manual_seed(1000 * (seed + 1) + prompt)
        base, seconds = None, 0.0
        if row.way in ("resize", "upscale"):
            first = (SIZES["1x"], Row(PLAIN), prompt, seed)
            if not self.cache.has(*first):
                self.draw(*first, text)
            base, seconds = self.cache.video(*first), self.cache.record(*first, text)["seconds"]
        start, density = time.process_time(), None
        if row.way == "resize":
            frames = torch.from_numpy(base).permute(0, 3, 1, 2).float() / 255
            video = torch.nn.functional.interpolate(frames, (size.side, size.side), mode="bilinear")
            video = video.permute(0, 2, 3, 1).numpy()
        elif row.way == "upscale":
            steps = {"steps": self.call["num_inference_steps"], "guidance": self.call["guidance_scale"]}
            done = upscale_video(
                self.pipe, base, size.side, size.side, row.strength, prompt=text, negative_prompt="",
                method=row.method, generator=noise, max_sequence_length=self.call["max_sequence_length"], **steps,
            )  # fmt: skip
            video, density = done.frames[0], _density(done.report)
        else:
            sizes = {"height": size.side, "width": size.side, "num_frames": size.frames}
            if row.method is None:
                video, density = self.pipe(text, generator=noise, **sizes, **self.call).frames[0], 1.0
            else:
                with attach(self.pipe, row.method) as run:
                    video = self.pipe(text, generator=noise, **sizes, **self.call).frames[0]
                density = _density(run.report)
        seconds += time.process_time() - start
        self.cache.store((size, row, prompt, seed), _bytes(video), {"seconds": seconds, "density": density})


def _bytes(video: np.ndarray) -> np.ndarray:
    return (np.asarray(video).clip(0, 1) * 255).round().astype(np.uint8)


def _density(report: Any) -> float | None:
    """Share of the pairs of tokens that was computed."""
    found = report.to_dict()["denoisers"][0]
    return found.get("kept", found.get("density", 1.0))  # a report without it is of dense attention


def clips(sizes: list[str], names: list[str], prompts: int, seeds: int) -> Iterator[tuple[Size, Row, int, int]]:
    """All clips in the order in which they are drawn: one prompt in every row, then the next, then the next seed."""
    for seed in range(seeds):
        for prompt in range(prompts):
            for size in sizes:
                for row in rows(SIZES[size]):
                    if not names or any(name.lower() in row.name.lower() for name in names):
                        yield SIZES[size], row, prompt, seed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "vision_attn.diffusion.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes to draw now")
    parser.add_argument("--rows", nargs="+", default=[], help="draw only rows whose names contain one of these")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=10, help="denoising steps; 10 is half of what the model is used with"
    )
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="folder of the pipeline")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md and results/")
    parser.add_argument("--table", action="store_true", help="draw nothing; write the table from what is there")
    args = parser.parse_args(argv)
    for name in ("prompts", "seeds", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    if not any(True for _ in clips(args.sizes, args.rows, 1, 1)):
        known = sorted({row.name for size in args.sizes for row in rows(SIZES[size])})
        parser.error(f"no row is called like {' or '.join(args.rows)}; there are: {', '.join(known)}")
    torch.set_num_threads(args.threads)
    cache = Cache(args.cache, args.model, args.steps)
    texts = fresh_prompts(seed=8, count=args.prompts)
    if not args.table:
        missing = [clip for clip in clips(args.sizes, args.rows, args.prompts, args.seeds) if not cache.has(*clip)]
        artist = Artist(cache, args.model) if missing else None
        for clip in tqdm(missing, desc="clips", disable=None):
            if not cache.has(*clip):  # another run may have drawn it meanwhile
                artist.draw(*clip, texts[clip[2]])
    from vision_attn.diffusion.results import write

    words = sys.argv[1:] if argv is None else argv
    command = shlex.join("CACHE" if word == str(args.cache) else word for word in words if word != "--table")
    print(write(args.out, cache, texts, args.seeds, command))


if __name__ == "__main__":
    main()
