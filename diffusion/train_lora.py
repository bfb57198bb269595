"""Training of a LoRA that teaches the built-in video model longer clips under a sparse pattern."""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vision_attn.diffusion.attachment import attach
from vision_attn.diffusion.card import draw_and_score, fresh_prompts
from vision_attn.diffusion.flow import batch_of_clips, embed, flow_loss, latents_of, leave_record
from vision_attn.diffusion.loading import load
from vision_attn.diffusion.lora import add_lora, save_lora
from vision_attn.diffusion.method import Preset
from vision_attn.diffusion.tiny import DEFAULTS
from vision_attn.fit import fit
from vision_attn.kernels.patterns import PATTERNS, Dense

ATTENTION = ("dense", *DEFAULTS["attention"])
BATCH = 8


def lora_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--lora")
    group.add_argument("--lora", action="store_true", help="a LoRA for longer clips, on the built-in model")
    group.add_argument("--attention", choices=ATTENTION, default="radial", help="pattern it is trained under")
    group.add_argument("--times", type=int, default=2, help="length: 2 is 33 frames, 4 is 65, where the model has 17")
    group.add_argument("--dense-layers", type=int, default=0, help="first layers that stay dense")
    group.add_argument("--rank", type=int, default=16, help="rank of the LoRA")


def check_lora_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be trained, and fill in what depends on other options."""
    args.out = args.out or Path(f"runs/lora-{args.attention}-{args.times}x")
    args.clips, args.prompts = args.clips or 256, 24 if args.prompts is None else args.prompts
    for name, low, high in (("times", 1, 8), ("rank", 1, 128), ("dense_layers", 0, 5), ("clips", 16, 10**6)):
        if not low <= getattr(args, name) <= high:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be from {low} to {high}; got {getattr(args, name)}")


def train_lora(args: argparse.Namespace) -> None:
    """Flow matching on longer clips under the pattern; then the judge, without and with what was learned."""
    pipe = load(dtype=torch.float32).pipe
    pipe.set_progress_bar_config(disable=True)
    defaults = DEFAULTS | {"frames": (DEFAULTS["frames"] - 1) * args.times + 1}
    denoiser = pipe.transformer
    pattern = PATTERNS[args.attention](**DEFAULTS["attention"].get(args.attention, {}))
    note = f"Trained together with the LoRA beside it, on clips of {defaults['frames']} frames."
    preset = Preset(pattern, {"dense_layers": args.dense_layers}, type(denoiser).__name__, note)
    clean, prompts, nothing = _clips(args, pipe, defaults["frames"])
    held = len(clean) // 8  # clips on which the loss is compared before and after

    torch.manual_seed(args.seed)
    layers = add_lora(denoiser, args.rank)

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        chosen = torch.from_numpy(rng.integers(held, len(clean), BATCH))
        dropped = torch.from_numpy(rng.random(BATCH) < 0.1).view(-1, 1, 1)
        return flow_loss(denoiser, clean[chosen], torch.where(dropped, nothing, prompts[chosen]), rng)

    def held_out_loss() -> float:
        """On the same clips, noise and levels each time."""
        rng = np.random.default_rng((args.seed, 4))
        with torch.no_grad():
            parts = [flow_loss(denoiser, clean[i : i + 2], prompts[i : i + 2], rng) for i in range(0, held, 2)]
        return round(float(torch.stack(parts).mean()), 5)

    with attach(pipe, preset):
        before = held_out_loss()
        steps, lr = args.steps or 300, args.lr or 2e-3
        done = fit("lora", layers, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed, decay=0.99, every=50)
        after = held_out_loss()
    save_lora(pipe, args.out)
    preset.save(args.out / "preset.json")
    done |= {"clips": len(clean), "rank": args.rank, "frames": defaults["frames"], "attention": str(pattern)}
    done |= {"held_out_loss": {"before": before, "after": after}, "prompts": args.prompts, "rows": []}
    texts = fresh_prompts(args.seed, args.prompts)
    for trained, attention in ((False, Dense()), (False, pattern), (True, pattern)) if texts else ():
        (denoiser.enable_adapters if trained else denoiser.disable_adapters)()
        with attach(pipe, attention, dense_layers=args.dense_layers):
            scores = draw_and_score(pipe, texts, defaults, 10_000)
        done["rows"].append({"attention": str(attention), "lora": trained} | scores)
    leave_record(args, "lora", layers, done)


def _clips(args: argparse.Namespace, pipe, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[clips, 16, t, h, w]`, embedded captions `[clips, tokens, dim]` and the empty caption `[tokens, dim]`;
    latents are kept in a file for resuming."""
    path, latents, texts = args.out / "latents.safetensors", [], []
    stored = load_file(path)["clips"] if path.exists() else None
    for i in tqdm(range(0, args.clips, 2), desc="latents"):
        # Captions are drawn with the clips, which is quick; encoding is not.
        size = min(2, args.clips - i)
        video, text = batch_of_clips(np.random.default_rng((args.seed, 5, i)), size, frames, (0.8, 0.2))
        texts += text
        if stored is None:
            latents.append(latents_of(pipe.vae, video, args.bf16))
    if stored is None:
        stored = torch.cat(latents)
        partial = path.with_suffix(".partial")
        save_file({"clips": stored}, partial)
        partial.replace(path)
    if stored.shape[0] != args.clips or stored.shape[2] != (frames - 1) // 4 + 1:
        raise SystemExit(f"{path} holds other clips ({list(stored.shape)}); choose another --out, or delete it")
    with torch.no_grad():
        embedded = embed(pipe.text_encoder, pipe.tokenizer, [*texts, ""], DEFAULTS["max_sequence_length"])
    return stored, embedded[:-1], embedded[-1]
