"""Train the built-in video model from scratch on the shapes world: first the VAE, then the denoiser in its latents.

    python -m vision_attn.diffusion.train vae --out runs/shapes-video
    python -m vision_attn.diffusion.train denoiser --out runs/shapes-video
    python -m vision_attn.diffusion.train decoder --out runs/shapes-video
    python -m vision_attn.diffusion.train evaluate --out runs/shapes-video

or a LoRA for longer clips on top of the one that ships:

    python -m vision_attn.diffusion.train --lora --attention radial --times 2

Each stage goes on from its last checkpoint when it is called again, and writes the finished part into the diffusers
folder `OUT`, which `WanPipeline.from_pretrained(OUT)` and `vision-attn generate --model OUT` read.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from vision_attn.diffusion import tiny
from vision_attn.diffusion.card import evaluate
from vision_attn.diffusion.flow import batch_of_clips, embed, flow_loss, latents_of, leave_record
from vision_attn.diffusion.train_lora import check_lora_options, lora_options, train_lora
from vision_attn.fit import fit
from vision_attn.shapes.scene import BACKGROUND


def decode_unclamped(vae, latents: Tensor) -> Tensor:
    """`vae.decode` without its final clamp, whose zero gradient would freeze every pixel that overshoots."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frame = hidden[:, :, i : i + 1]
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size)


def reconstruction_loss(vae, video: Tensor, bf16: bool) -> Tensor:
    """Weighted L1, L2 and edges of a clip drawn from its own latents, plus a little of the divergence from N(0, 1)."""
    empty = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        posterior = vae.encode(video).latent_dist
        drawn = decode_unclamped(vae, posterior.sample()).float()
    weight = 1 + 8 * ((video - empty).abs().amax(1, keepdim=True) > 0.1)
    first = [2.0] + [1.0] * (video.shape[2] - 1)  # frame 0 has a latent of its own
    weight = weight * torch.tensor(first).view(1, 1, -1, 1, 1)
    error = (drawn - video) * weight / weight.mean()
    edges = sum((drawn - video).diff(dim=axis).abs().mean() for axis in (3, 4))
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    return error.abs().mean() + (error * (drawn - video)).mean() + 2 * edges + 1e-4 * divergence


def draw_long_clips(rng: np.random.Generator) -> Tensor:
    """Clips of 17 frames or more: a decoder that never saw five latent frames lets colours drift from the fourth on."""
    frames, size = ((17, 4), (33, 2), (65, 1))[int(rng.choice(3, p=[0.77, 0.18, 0.05]))]
    return batch_of_clips(rng, size, frames)[0]


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = tiny.vae()

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        # Still images first: on clips from the start, colour is learned last or never.
        if progress < 0.475:
            frames, size = (1, 32) if progress < 0.13 else (9, 6)
            return reconstruction_loss(vae, batch_of_clips(rng, size, frames)[0], args.bf16)
        return reconstruction_loss(vae, draw_long_clips(rng), args.bf16)

    steps, lr = args.steps or 2600, args.lr or 2e-3
    done = fit("vae", vae, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed, decay=0.995)
    video, _ = batch_of_clips(np.random.default_rng((args.seed, 10**9)), 64, 17)
    with torch.no_grad():
        latents = torch.cat([vae.eval().encode(part).latent_dist.mode() for part in video.split(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    finish_vae(args, "vae", vae, vae, done)


def train_decoder(args: argparse.Namespace) -> None:
    """Sharpen the decoder alone. The latents keep their meaning, so it may run while the denoiser trains."""
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae")
    vae.requires_grad_(False)
    parts = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        return reconstruction_loss(vae, draw_long_clips(rng), args.bf16)

    steps, lr = args.steps or 1000, args.lr or 1e-3
    done = fit("decoder", parts, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed + 1, decay=0.995)
    finish_vae(args, "decoder", vae, parts, done)


def finish_vae(args: argparse.Namespace, name: str, vae: AutoencoderKLWan, trained: nn.Module, done: dict) -> None:
    video, _ = batch_of_clips(np.random.default_rng((args.seed, 10**9)), 64, 17)
    with torch.no_grad():
        error = torch.cat([vae.eval()(part).sample - part for part in video.split(8)])
    done["psnr"] = round(float(-10 * torch.log10((error / 2).square().mean())), 2)
    vae.register_to_config(_name_or_path="")  # otherwise the path it was loaded from stays in the file
    vae.half().save_pretrained(args.out / "vae")
    leave_record(args, name, trained, done)


def encode_clips(args: argparse.Namespace, vae, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Normalised latents of `count` clips `[count, 16, 5, 6, 6]` and as many stills; kept in a file for resuming."""
    path = args.out / "latents.safetensors"
    if not path.exists():
        clips, stills, texts = [], [], []
        for i in tqdm(range(0, count, 16), desc="latents"):
            video, text = batch_of_clips(np.random.default_rng((args.seed, 1, i)), 16, 17, (0.8, 0.2))
            middle = video[:, :, int(np.random.default_rng((args.seed, 2, i)).integers(17))].unsqueeze(2)
            clips.append(latents_of(vae, video, args.bf16))
            stills.append(latents_of(vae, middle, args.bf16))
            texts += text
        partial = path.with_suffix(".partial")
        save_file({"clips": torch.cat(clips), "stills": torch.cat(stills)}, partial, {"texts": json.dumps(texts)})
        partial.replace(path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("clips"), file.get_tensor("stills"), json.loads(file.metadata()["texts"])


def train_denoiser(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pipe = tiny.pipeline(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").eval()
    clips, stills, texts = encode_clips(args, vae, args.clips or 4000)
    model = nn.ModuleDict({"text_encoder": pipe.text_encoder, "transformer": pipe.transformer}).train()
    compiled = torch.compile(pipe.transformer) if args.compile else pipe.transformer

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        # WanPipeline pads prompts to 512 by default; short padding most of the time, long padding sometimes, so that
        # both work. Only the usual shape is compiled.
        still, length = rng.random() < 0.1, 512 if rng.random() < 0.07 else 16
        chosen = rng.integers(0, len(texts), 64 if still else 16)
        words = []
        for i in chosen:
            text = texts[i]
            if still or rng.random() < 0.05:
                text = " and ".join(part.split(" moves ")[0] for part in text.split(" and "))
            words.append("" if rng.random() < 0.1 else text)
        clean = (stills if still else clips)[torch.from_numpy(chosen)]
        net = pipe.transformer if still or length > 16 else compiled
        return flow_loss(net, clean, embed(pipe.text_encoder, pipe.tokenizer, words, length), rng)

    steps, lr = args.steps or 3800, args.lr or 1.5e-3
    done = fit("denoiser", model, loss_of, out=args.out, steps=steps, lr=lr, seed=args.seed, decay=0.999)
    pipe.vae = AutoencoderKLWan.from_pretrained(args.out / "vae")  # the decoder may have become sharper meanwhile
    pipe.vae.register_to_config(_name_or_path="")
    pipe.to(torch.float16)
    pipe.save_pretrained(args.out)
    (args.out / "defaults.json").write_text(json.dumps(tiny.DEFAULTS, indent=2) + "\n")
    leave_record(args, "denoiser", model, done | {"clips": len(texts)})


STAGES = {"vae": train_vae, "denoiser": train_denoiser, "decoder": train_decoder, "evaluate": evaluate}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "vision_attn.diffusion.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=list(STAGES))
    lora_options(parser)
    parser.add_argument("--out", type=Path, help="folder of checkpoints and of what comes out; --lora has a default")
    parser.add_argument("--steps", type=int, help="training steps (the stage's own default if not given)")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one is slower on a busy machine")
    parser.add_argument("--clips", type=int, help="clips encoded once before training: 4000, for --lora 256")
    parser.add_argument("--compile", action="store_true", help="denoiser: torch.compile, two minutes for a faster step")
    parser.add_argument("--prompts", type=int, help="captions that the judge scores: 100, for --lora 24")
    parser.add_argument("--bf16", action="store_true", help="autocast; pays on CPUs with AMX")
    args = parser.parse_args(argv)
    if args.lora == bool(args.stage):
        parser.error(f"give --lora, or one stage: {', '.join(STAGES)}")
    if args.lora:
        check_lora_options(parser, args)
    elif args.out is None:
        parser.error("--out is needed: the folder of checkpoints and of the finished pipeline")
    args.prompts = 100 if args.prompts is None else args.prompts
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join("OUT" if word == str(args.out) else word for word in words)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (train_lora if args.lora else STAGES[args.stage])(args)


if __name__ == "__main__":
    main()
