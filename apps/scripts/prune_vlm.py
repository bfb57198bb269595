"""Drop visual tokens in several ways and count right answers to yes-no questions about pictures with known contents.

python -m vision_attn.apps.scripts.prune_vlm --keep 0.5 0.2 --pictures 20
python -m vision_attn.apps.scripts.prune_vlm --model llava-hf/llava-1.5-7b-hf
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np

from vision_attn import attach
from vision_attn.mllm import load
from vision_attn.mllm.metrics import says_yes
from vision_attn.mllm.registry import make
from vision_attn.shapes.crowd import CELLS, KINDS, draw_crowd, sample_crowd


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-llava", help="a built-in one, a folder or a Hub id")
    parser.add_argument("--methods", nargs="+", default=["fastv", "divprune", "visionzip"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2], help="shares of the visual tokens")
    parser.add_argument("--pictures", type=int, default=5)
    chosen = parser.parse_args(argv)

    vlm = load(chosen.model)
    cell = vlm.model.config.vision_config.image_size // CELLS
    asked = []
    for seed in range(chosen.pictures):
        crowd = sample_crowd(np.random.default_rng(seed))
        there, others = set(crowd.kinds), [kind for kind in range(len(KINDS)) if kind not in crowd.kinds]
        for kind in [*list(there)[:2], *others[:2]]:  # as many of what is there as of what is not
            picture = draw_crowd(crowd, np.random.default_rng(seed), cell)
            asked.append((picture, f"is there a {KINDS[kind]} in the image?", kind in there))
    vlm.answer(*asked[0][:2], tokens=8)  # the first call is slower
    print("method      keep  right answers  ms per answer")
    for name, keep in [("untouched", 1.0), *((name, keep) for name in chosen.methods for keep in chosen.keep)]:
        right, start = 0, time.perf_counter()
        with nullcontext() if name == "untouched" else attach(vlm.model, make(name, keep=keep)):
            for picture, question, truth in asked:
                right += says_yes(vlm.answer(picture, question, tokens=8)) == truth
        seconds = (time.perf_counter() - start) / len(asked)
        print(f"{name:10s}  {keep:4.0%}  {right:6d} of {len(asked):<4d}  {seconds * 1e3:13.0f}")


if __name__ == "__main__":
    main()
