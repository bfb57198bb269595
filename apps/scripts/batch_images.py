"""Draw one image per line of a text file, with sparse attention; a run that was cut off goes on where it stopped.

python -m vision_attn.apps.scripts.batch_images prompts.txt out --size 96
python -m vision_attn.apps.scripts.batch_images prompts.txt out --model black-forest-labs/FLUX.1-dev --size 2048
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from vision_attn import Neighborhood, attach
from vision_attn.apps.files import atomic, slug
from vision_attn.diffusion.loading import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt per line")
    parser.add_argument("output", type=Path, help="folder of the pictures")
    parser.add_argument("--model", help="a folder or a Hub id; without it the built-in model")
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--window", type=int, default=3, help="tokens along each side that a token looks at")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="line n is drawn with seed + n")
    chosen = parser.parse_args(argv)

    loaded = load(chosen.model)
    grid = loaded.info.grid(1, chosen.size, chosen.size)  # (1, h, w) for a video model, (h, w) otherwise
    pattern = Neighborhood(tuple(min(chosen.window, side) for side in grid))
    options = {"height": chosen.size, "width": chosen.size, "num_inference_steps": chosen.steps}
    if loaded.info.video:
        options["num_frames"] = 1

    prompts = [line.strip() for line in chosen.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    with attach(loaded.pipe, pattern, dense_steps=min(2, chosen.steps - 1)) as run:
        for number, prompt in enumerate(prompts):
            seed = chosen.seed + number
            path = chosen.output / f"{slug(prompt)}-{seed}.png"
            if path.exists():
                print(f"{path} is there")
                continue
            noise = torch.Generator("cpu").manual_seed(seed)  # on the CPU: the same picture on every device
            drawn = loaded.pipe(prompt, generator=noise, output_type="np", **options)
            picture = drawn.frames[0][0] if loaded.info.video else drawn.images[0]
            with atomic(path) as partial:  # never half a file under its final name
                Image.fromarray((picture.clip(0, 1) * 255).round().astype("uint8")).save(partial)
            print(path)
        print(run.report)


if __name__ == "__main__":
    main()
