"""Every method on the built-in video model at the trained size, 2 and 4 times the length, and 2 and 4 times the size.

    python -m vision_attn.diffusion.evaluate --cache CACHE

A folder keeps every clip that was drawn, so that a run goes on where the last one stopped, and two may run side by
side. What was measured on them goes into results/clips.csv beside this file, so that another machine can go on without
the folder. RESULTS.md, results/evaluation.json and results/evaluation.png are written from both, and say how many clips
stand behind each row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from vision_attn.diffusion.clips import Cache
from vision_attn.diffusion.comparison import SIZES, Row, Size, rows
from vision_attn.diffusion.drawing import Artist
from vision_attn.diffusion.loading import BUILT_IN
from vision_attn.diffusion.results import write


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
    parser.add_argument("--prompts", type=int, default=30)
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
    cache = Cache(args.cache, args.model, args.steps, args.out / "results" / "clips.csv")

    def missing(size: Size, row: Row, prompt: int, seed: int) -> bool:
        shown = (prompt, seed) == (0, 0)  # in the picture, which needs the clip itself
        return not (cache.drawn if shown else cache.has)(size, row, prompt, seed)

    if not args.table:
        wanted = [clip for clip in clips(args.sizes, args.rows, args.prompts, args.seeds) if missing(*clip)]
        artist = Artist(cache, args.model) if wanted else None
        for clip in tqdm(wanted, desc="clips", disable=None):
            if missing(*clip):  # another run may have drawn it meanwhile
                artist.draw(*clip)
    changed = [name for name in ("prompts", "seeds", "steps") if getattr(args, name) != parser.get_default(name)]
    command = " ".join(["--cache CACHE", *(f"--{name} {getattr(args, name)}" for name in changed)])
    print(write(args.out, cache, args.prompts, args.seeds, command))


if __name__ == "__main__":
    main()
