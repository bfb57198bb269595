"""What trainings of the built-in video model share: clips of the shapes world, latents, prompts, the loss."""

import argparse
import json

import numpy as np
import torch
from torch import Tensor, nn

from vision_attn.shapes import caption, render, sample_scene


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


def embed(text_encoder, tokens, texts: list[str], length: int) -> Tensor:
    """What `WanPipeline.encode_prompt` computes, with gradients: padding embeddings are zeros."""
    batch = tokens(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    hidden = text_encoder(batch.input_ids, batch.attention_mask).last_hidden_state * batch.attention_mask[..., None]
    return nn.functional.pad(hidden, (0, 0, 0, length - 16))


def latents_of(vae, video: Tensor, bf16: bool) -> Tensor:
    """Normalised latents `[batch, 16, t, h, w]` of clips `[batch, 3, frames, height, width]`."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return (vae.encode(video).latent_dist.mode().float() - mean) / std


def flow_loss(net, clean: Tensor, prompt: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean squared error of the velocity from latents to noise, at levels of noise drawn with `rng`."""
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    level = torch.from_numpy(1 / (1 + np.exp(-0.3 - 1.2 * rng.standard_normal(len(clean))))).float()
    at = level.view(-1, 1, 1, 1, 1)
    flow = net((1 - at) * clean + at * noise, 1000 * level, prompt, return_dict=False)[0]
    return (flow - (noise - clean)).square().mean()
