"""Train the built-in classifiers and the built-in CLIP from scratch on still images of the shapes world.

    python -m vision_attn.train nat_shapes --out runs/vision
    python -m vision_attn.train biformer_shapes --out runs/vision
    python -m vision_attn.train clip_shapes --out runs/vision
    python -m vision_attn.train evaluate --out runs/vision
    python -m vision_attn.train compare --out runs/vision

Each stage goes on from its last checkpoint when it is called again, and writes the finished model into a folder of its
own in OUT: `timm.create_model("local-dir:OUT/nat_shapes", pretrained=True)` and
`open_clip.create_model("local-dir:OUT/clip_shapes")` read them. `evaluate` scores all of them on fresh scenes and
writes their cards. `compare` trains one small model with one kind of attention after the other.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_attn import builtin
from vision_attn.batches import classified, draw
from vision_attn.compare import compare
from vision_attn.evaluate import evaluate
from vision_attn.fit import fit
from vision_attn.shapes import caption, parse, sample_scene


def train_classifier(args: argparse.Namespace) -> None:
    import timm

    import vision_attn.backbones  # noqa: F401

    torch.manual_seed(args.seed)
    model = timm.create_model(args.stage)

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        images, labels = classified(rng, args.batch)
        return F.cross_entropy(model(images), labels, label_smoothing=0.05)

    steps, lr = args.steps or 2000, args.lr or 3e-3
    done = fit(args.stage, model, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed, decay=0.995)
    builtin.save_classifier(model.eval(), args.out / args.stage)
    leave_record(args, model, done)


def same_picture(one: list[dict], other: list[dict]) -> bool:
    """Whether two parsed captions may tell of one picture: the same things, and not one thing in two sizes."""

    def things(parsed: list[dict]) -> list[tuple[str, str]]:
        return sorted((thing["color"], thing["shape"]) for thing in parsed)

    sizes = {parsed[0].get("size") for parsed in (one, other)} - {None}
    # Of several things it stays open which ones are small or big.
    return things(one) == things(other) and (len(one) > 1 or len(sizes) < 2)


def contrastive_loss(logits: Tensor, texts: list[str]) -> Tensor:
    """Mean of the cross-entropies of rows and columns of `logits` `[images, texts]`.

    Where the caption of another picture also fits, the pair counts neither way.
    """
    parsed = [parse(text) for text in texts]
    fits = torch.tensor([[same_picture(a, b) for b in parsed] for a in parsed])
    logits = logits.masked_fill(fits & ~torch.eye(len(texts), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(texts))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(args: argparse.Namespace) -> None:
    import open_clip

    folder, tower = args.out / args.stage, args.out / "nat_shapes" / "model.safetensors"
    if not tower.exists():
        raise SystemExit(f"there is no {tower}, from which clip_shapes starts; train nat_shapes first")
    builtin.write_clip_config(folder)
    torch.manual_seed(args.seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    start = load_file(tower)  # from nothing it would learn the same shapes again
    model.visual.trunk.load_state_dict({name: value for name, value in start.items() if not name.startswith("head.")})

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        scenes = [sample_scene(rng, int(rng.integers(1, 4)), frames=1) for _ in range(args.batch)]
        texts = [caption(scene, rng) for scene in scenes]
        images = model.encode_image(draw(scenes, rng), normalize=True)
        words = model.encode_text(tokens(texts), normalize=True)
        return contrastive_loss(model.logit_scale.clamp(max=np.log(100)).exp() * images @ words.T, texts)

    steps, lr = args.steps or 1000, args.lr or 2e-3
    done = fit(args.stage, model, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed, decay=0.998)
    builtin.save_clip(model.eval(), folder)
    leave_record(args, model, done)


def leave_record(args: argparse.Namespace, model: nn.Module, done: dict) -> None:
    """What the model card says of the training."""
    done |= {"parameters": sum(p.numel() for p in model.parameters()), "batch": args.batch, "seed": args.seed}
    done["command"] = args.command
    (args.out / args.stage / "training.json").write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


STAGES = {
    "nat_shapes": train_classifier,
    "biformer_shapes": train_classifier,
    "clip_shapes": train_clip,
    "evaluate": evaluate,
    "compare": compare,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "vision_attn.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the finished models")
    parser.add_argument("--steps", type=int, help="training steps (the stage's own default if not given)")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one is slower on a busy machine")
    parser.add_argument("--scenes", type=int, default=2000, help="evaluate: how many fresh scenes")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join("OUT" if word == str(args.out) else word for word in words)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
