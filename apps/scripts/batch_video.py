"""Draw one clip per line of a text file with radial attention, and say what it saved against dense attention.

python -m vision_attn.apps.scripts.batch_video prompts.txt out
python -m vision_attn.apps.scripts.batch_video prompts.txt out --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --decay 0.2
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from vision_attn import Radial, attach
from vision_attn.apps.files import slug
from vision_attn.apps.media import write_video
from vision_attn.apps.sampling import compare
from vision_attn.diffusion.loading import LoadedPipeline, load


def draw(loaded: LoadedPipeline, prompt: str, seed: int, **options: int) -> tuple[np.ndarray, float]:
    """Frames uint8 `[frames, height, width, 3]`, and seconds."""
    start = time.perf_counter()
    noise = torch.Generator("cpu").manual_seed(seed)
    frames = loaded.pipe(prompt, generator=noise, output_type="np", **options).frames[0]
    return (frames.clip(0, 1) * 255).round().astype("uint8"), time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt per line")
    parser.add_argument("output", type=Path, help="folder of the clips")
    parser.add_argument("--model", help="a folder or a Hub id of a video model; without it the built-in one")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--decay", type=float, default=0.5, help="how fast windows narrow with distance in time")
    parser.add_argument("--seed", type=int, default=0, help="line n is drawn with seed + n")
    chosen = parser.parse_args(argv)

    loaded = load(chosen.model)
    size = {name: loaded.defaults[name] for name in ("height", "width")}
    options = {**size, "num_frames": chosen.frames, "num_inference_steps": chosen.steps}
    small = {} if chosen.model else {"block": 4, "thin": 8}  # the published constants suit thousands of tokens a frame
    prompts = [line.strip() for line in chosen.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, prompt in enumerate(prompts):
        seed = chosen.seed + number
        dense, before = draw(loaded, prompt, seed, **options)
        with attach(loaded.pipe, Radial(decay=chosen.decay, **small), dense_steps=min(2, chosen.steps - 1)) as run:
            sparse, after = draw(loaded, prompt, seed, **options)
        settings = {"prompt": prompt, "seed": seed, **options, "report": run.report.to_dict()}
        write_video(chosen.output / f"{slug(prompt)}-{seed}.mp4", sparse, loaded.defaults["fps"], settings)
        print(f"{prompt}: {before:.1f} s dense, {after:.1f} s sparse, SSIM {compare(dense, sparse)['ssim']:.3f}")


if __name__ == "__main__":
    main()
