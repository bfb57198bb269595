"""Train the built-in video model from scratch on the shapes world: first the VAE, then the denoiser in its latents.

    python -m vision_attn.diffusion.train vae --out runs/shapes-video
    python -m vision_attn.diffusion.train denoiser --out runs/shapes-video
    python -m vision_attn.diffusion.train decoder --out runs/shapes-video
    python -m vision_attn.diffusion.train evaluate --out runs/shapes-video

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
from vision_attn.fit import fit
from vision_attn.shapes import caption, render, sample_scene
from vision_attn.shapes.scene import BACKGROUND


def leave_record(args: argparse.Namespace, name: str, module: nn.Module, done: dict) -> None:
    """What the model card says of this stage."""
    done |= {"parameters": sum(p.numel() for p in module.parameters()), "command": args.command}
    (args.out / f"{name}.json").write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


def batch_of_clips(
    rng: np.random.Generator, size: int, frames: int, things: tuple[float, ...] = (0.7, 0.25, 0.05)
) -> tuple[Tensor, list[str]]:
    """Random pieces of random scenes, `[size, 3, frames, 48, 48]` in -1..1, with captions.

    `things` are the shares of scenes with one, two and three shapes.
    """
    clips, texts = [], []
    for _ in range(size):
        scene = sample_scene(rng, 1 + int(rng.choice(len(things), p=things)), frames=max(frames, 17))
        start = int(rng.integers(0, scene.frames - frames + 1))
        clips.append(render(scene)[start : start + frames])
        texts.append(caption(scene, rng))
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return video * 2 - 1, texts


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
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        clips, stills, texts = [], [], []
        for i in tqdm(range(0, count, 16), desc="latents"):
            video, text = batch_of_clips(np.random.default_rng((args.seed, 1, i)), 16, 17, (0.8, 0.2))
            middle = video[:, :, int(np.random.default_rng((args.seed, 2, i)).integers(17))].unsqueeze(2)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                clips.append((vae.encode(video).latent_dist.mode().float() - mean) / std)
                stills.append((vae.encode(middle).latent_dist.mode().float() - mean) / std)
            texts += text
        partial = path.with_suffix(".partial")
        save_file({"clips": torch.cat(clips), "stills": torch.cat(stills)}, partial, {"texts": json.dumps(texts)})
        partial.replace(path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("clips"), file.get_tensor("stills"), json.loads(file.metadata()["texts"])


def embed(text_encoder, tokens, texts: list[str], length: int) -> Tensor:
    """What `WanPipeline.encode_prompt` computes, with gradients: padding embeddings are zeros."""
    batch = tokens(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    hidden = text_encoder(batch.input_ids, batch.attention_mask).last_hidden_state * batch.attention_mask[..., None]
    return nn.functional.pad(hidden, (0, 0, 0, length - 16))


def train_denoiser(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pipe = tiny.pipeline(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae").eval()
    clips, stills, texts = encode_clips(args, vae, args.clips)
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
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        level = torch.from_numpy(1 / (1 + np.exp(-0.3 - 1.2 * rng.standard_normal(len(chosen))))).float()
        at = level.view(-1, 1, 1, 1, 1)
        net = pipe.transformer if still or length > 16 else compiled
        prompt = embed(pipe.text_encoder, pipe.tokenizer, words, length)
        flow = net((1 - at) * clean + at * noise, 1000 * level, prompt, return_dict=False)[0]
        return (flow - (noise - clean)).square().mean()

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
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the finished pipeline")
    parser.add_argument("--steps", type=int, help="training steps (the stage's own default if not given)")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one is slower on a busy machine")
    parser.add_argument("--clips", type=int, default=4000, help="denoiser: clips encoded once before training")
    parser.add_argument("--compile", action="store_true", help="denoiser: torch.compile, two minutes for a faster step")
    parser.add_argument("--prompts", type=int, default=100, help="evaluate: how many captions")
    parser.add_argument("--bf16", action="store_true", help="autocast; pays on CPUs with AMX")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join("OUT" if word == str(args.out) else word for word in words)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
