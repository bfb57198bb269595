"""Distil dense attention into CLEAR or LinFusion, on images that the dense model makes itself.

    python -m vision_attn.diffusion.distill teacher flux --out runs/flux
    python -m vision_attn.diffusion.distill clear runs/flux --radius 3 --pooled 4 --out runs/clear
    python -m vision_attn.diffusion.distill teacher unet --out runs/unet
    python -m vision_attn.diffusion.distill linfusion runs/unet --out runs/linfusion

`teacher` trains a tiny image model of the shapes world; `clear` takes any FLUX and `linfusion` any Stable Diffusion 1.5
or 2.1, as a diffusers folder or hub id. Each goes on from its last checkpoint and its last image when it is called
again, and leaves the new weights, and no others, in OUT:
`attach(pipe, CLEAR(radius=3, pooled=4, weights="runs/clear/clear.safetensors"))`.

The loss is that of both papers: the student's error on the training target, plus half its distance to the teacher's
output, plus half the mean distance of attention outputs to the teacher's.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from vision_attn.diffusion import tiny_image
from vision_attn.diffusion.attachment import attach
from vision_attn.diffusion.methods.clear import CLEAR
from vision_attn.diffusion.methods.linfusion import LinFusion
from vision_attn.fit import fit
from vision_attn.shapes import caption, render
from vision_attn.shapes.stills import sample_still

CHUNK = 8  # images made at a time and kept in one file
EVERY_NTH = 4  # CLEAR compares the attention of every fourth single block


def noisy(pipe: Any, clean: Tensor, texts: list[str], guidance: float) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a denoiser call on noised latents, and what the denoiser should say.

    FLUX: `x = (1 - s) clean + s noise`, s uniform, target `noise - clean`. U-Net: the scheduler's noise at a uniform
    step, target as the scheduler's prediction type says.
    """
    with torch.no_grad():
        noise = torch.randn(clean.shape).to(clean)
        if hasattr(pipe, "unet"):
            embeds = pipe.encode_prompt(texts, clean.device, 1, False)[0]
            steps = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(clean),)).to(clean.device)
            kind = pipe.scheduler.config.prediction_type
            target = noise if kind == "epsilon" else pipe.scheduler.get_velocity(clean, noise, steps)
            sample = pipe.scheduler.add_noise(clean, noise, steps)
            return dict(sample=sample, timestep=steps, encoder_hidden_states=embeds), target
        length = min(512, pipe.tokenizer_2.model_max_length)
        embeds, pooled, text_ids = pipe.encode_prompt(texts, None, max_sequence_length=length)
        level = torch.rand(len(clean)).to(clean)
        side = round(clean.shape[1] ** 0.5)
        ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2).to(clean)
        at = level.view(-1, 1, 1)
        call = dict(
            hidden_states=(1 - at) * clean + at * noise, timestep=level, encoder_hidden_states=embeds, img_ids=ids,
            pooled_projections=pooled, txt_ids=text_ids,
        )  # fmt: skip
        if pipe.transformer.config.guidance_embeds:
            call["guidance"] = torch.full_like(level, guidance)
        return call, noise - clean


class Outputs:
    """What modules returned in the last call, in the order given."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.values: dict[int, Tensor] = {}
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda m, args, out, i=i: self.values.__setitem__(i, out))


class Student:
    """A copy of a denoiser with other attention beside the original: what is trained, and what is compared.

    Args:
        teacher: the denoiser with dense attention.
        build: turns a copy of it into the student; returns its trainable parameters by name, a function that saves
            them, and the names of attention modules whose outputs are compared.
    """

    def __init__(self, teacher: nn.Module, build: Callable[[nn.Module], tuple]) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.module = copy.deepcopy(teacher)
        parameters, self.save, compared = build(self.module)
        self.trained = nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})
        self.trained.requires_grad_(True)
        self.outputs = [Outputs(map(model.get_submodule, compared)) for model in (self.teacher, self.module)]

    def losses(self, call: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
        """The three terms, not weighted."""
        with torch.no_grad():
            teacher = self.teacher(**call, return_dict=False)[0]
        student = self.module(**call, return_dict=False)[0]
        theirs, ours = (outputs.values for outputs in self.outputs)
        attention = [F.mse_loss(ours[i].float(), theirs[i].float()) for i in theirs]
        return {
            "target": F.mse_loss(student.float(), target.float()),
            "output": F.mse_loss(student.float(), teacher.float()),
            "attention": torch.stack(attention).mean(),
        }


def total(losses: dict[str, Any]) -> Any:
    """The loss of both papers."""
    return losses["target"] + 0.5 * losses["output"] + 0.5 * losses["attention"]


def clear_student(args: argparse.Namespace) -> Callable[[nn.Module], tuple]:
    def build(transformer: nn.Module) -> tuple:
        run = attach(transformer, CLEAR(args.radius, args.pooled))
        blocks = range(0, len(transformer.single_transformer_blocks), EVERY_NTH)
        return run.trainable, run.save, [f"single_transformer_blocks.{i}.attn" for i in blocks]

    return build


def linfusion_student(args: argparse.Namespace) -> Callable[[nn.Module], tuple]:
    def build(unet: nn.Module) -> tuple:
        layers = LinFusion.from_unet(unet, args.reduce)
        layers.mount()
        return dict(layers.named_parameters()), layers.save, [name.replace("/", ".") for name in layers]

    return build


def own_images(pipe: Any, args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Latents of `args.images` images that the pipeline draws, and their prompts; kept in files, made once."""
    folder = args.out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = args.prompts and [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if prompts == []:
        raise SystemExit(f"{args.prompts} has no prompts; write one per line")
    settings = {"size": str(args.size), "steps": str(args.sampling_steps), "guidance": str(args.guidance)}
    pipe.set_progress_bar_config(disable=True)
    latents, texts = [], []
    for first in tqdm(range(0, args.images, CHUNK), desc="images"):
        path = folder / f"{first:06d}.safetensors"
        if not path.exists():
            rng = np.random.default_rng((args.seed, first))
            words = (
                [prompts[i % len(prompts)] for i in range(first, first + CHUNK)] if prompts else stills(rng, CHUNK)[1]
            )
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + first)
            made = pipe(
                words, height=args.size, width=args.size, num_inference_steps=args.sampling_steps,
                guidance_scale=args.guidance, generator=generator, output_type="latent",
            ).images  # fmt: skip
            partial = path.with_suffix(".partial")
            save_file({"latents": made.cpu().contiguous()}, partial, {**settings, "texts": json.dumps(words)})
            partial.replace(path)
        with safe_open(path, "pt") as file:
            found = file.metadata()
            latents.append(file.get_tensor("latents"))
        if {name: found[name] for name in settings} != settings:
            raise SystemExit(f"{path} was made with other settings; use another --out, or the settings of before")
        texts += json.loads(found["texts"])
    return torch.cat(latents), texts


def distil(args: argparse.Namespace, pipe: Any, denoiser: nn.Module, build: Callable[[nn.Module], tuple]) -> dict:
    """Train a student, save its weights, and say what it does on images it was not trained on, before and after."""
    latents, texts = own_images(pipe, args)
    held = CHUNK * max(1, len(texts) // CHUNK // 10)
    if held >= len(texts):
        raise SystemExit(f"--images {args.images} leaves none to train on; use at least {2 * CHUNK}")
    student = Student(denoiser, build)
    device = next(denoiser.parameters()).device

    def batch(chosen: Iterable[int]) -> tuple[dict[str, Any], Tensor]:
        chosen = list(chosen)
        return noisy(pipe, latents[chosen].to(device), [texts[i] for i in chosen], args.guidance)

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        return total(student.losses(*batch(rng.integers(0, len(texts) - held, args.batch))))

    def on_held_out() -> dict[str, float]:
        sums: dict[str, float] = {}
        for first in range(len(texts) - held, len(texts), CHUNK):
            torch.manual_seed(first)
            with torch.no_grad():
                losses = student.losses(*batch(range(first, first + CHUNK)))
            for name, value in {**losses, "loss": total(losses)}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * CHUNK / held
        return {name: round(value, 6) for name, value in sums.items()}

    before = on_held_out()
    options = dict(steps=args.steps, lr=args.lr, seed=args.seed, decay=0.99, every=args.every)
    done = fit(args.stage, student.trained, loss_of, out=args.out, **options)
    student.save(args.out / f"{args.stage}.safetensors")
    after = on_held_out()
    teacher_terms = [losses["output"] + losses["attention"] for losses in (before, after)]
    done |= {"before": before, "after": after, "factor": round(teacher_terms[0] / teacher_terms[1], 2)}
    return done | {"parameters": sum(p.numel() for p in student.trained.parameters()), "images": len(texts)}


def stills(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Pictures of the shapes world `[count, 3, 48, 48]` in -1..1, and their captions."""
    scenes = [sample_still(rng) for _ in range(count)]
    pictures = np.stack([render(scene)[0] for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, [caption(scene, rng) for scene in scenes]


def train_teacher(args: argparse.Namespace) -> dict:
    """A tiny image model from nothing: an autoencoder on still images, then a denoiser on its latents."""
    pipe = tiny_image.flux(args.seed) if args.target == "flux" else tiny_image.stable_diffusion(args.seed)
    denoiser = pipe.transformer if args.target == "flux" else pipe.unet

    def vae_loss(rng: np.random.Generator, progress: float) -> Tensor:
        y, x = rng.integers(0, 25, 2)
        pictures = stills(rng, args.batch)[0][..., y : y + 24, x : x + 24]  # a piece is enough for convolutions
        # not by its forward, which rounds the latents and so has no gradient for the encoder
        error = pipe.vae.decode(pipe.vae.encode(pictures).latents).sample - pictures
        return error.abs().mean() + error.square().mean()

    options = dict(out=args.out, seed=args.seed, every=args.every)
    fit("vae", pipe.vae, vae_loss, steps=args.vae_steps, lr=3e-3, decay=0.98, **options)
    pipe.vae.requires_grad_(False)
    with torch.no_grad():
        scale = 1 / pipe.vae.encode(stills(np.random.default_rng(args.seed), 64)[0]).latents.std().item()
    pipe.vae.register_to_config(scaling_factor=scale)

    def denoiser_loss(rng: np.random.Generator, progress: float) -> Tensor:
        pictures, texts = stills(rng, args.batch)
        clean = pipe.vae.encode(pictures).latents * scale
        if args.target == "flux":
            clean = F.pixel_unshuffle(clean, 2).flatten(2).mT  # 2 x 2 latents are one token
        texts = ["" if rng.random() < 0.1 else text for text in texts]
        call, target = noisy(pipe, clean, texts, args.guidance)
        return F.mse_loss(denoiser(**call, return_dict=False)[0], target)

    done = fit("denoiser", denoiser, denoiser_loss, steps=args.steps, lr=args.lr, decay=0.998, **options)
    pipe.save_pretrained(args.out)
    return done | {"parameters": sum(p.numel() for p in denoiser.parameters())}


def load_teacher(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline

    wanted, part = {"clear": (FluxPipeline, "transformer"), "linfusion": (StableDiffusionPipeline, "unet")}[args.stage]
    try:
        pipe = DiffusionPipeline.from_pretrained(args.target)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{args.target} cannot be opened as a diffusers pipeline: {error}") from error
    if not isinstance(pipe, wanted):
        raise SystemExit(f"{args.stage} distils a {wanted.__name__}; {args.target} is a {type(pipe).__name__}")
    pipe.to(args.device)
    return pipe, getattr(pipe, part)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "vision_attn.diffusion.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["teacher", "clear", "linfusion"])
    parser.add_argument("target", help="teacher: flux or unet; otherwise the folder or hub id of the model to distil")
    parser.add_argument("--out", type=Path, required=True, help="folder of images, checkpoints and the result")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate; LinFusion's authors use 1e-4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--vae-steps", type=int, default=500, help="teacher: steps of the autoencoder")
    parser.add_argument("--radius", type=int, default=16, help="clear: radius of the windows in tokens")
    parser.add_argument("--pooled", type=int, help="clear: side of pooled cells; none if not given")
    parser.add_argument("--reduce", type=int, help="linfusion: see LinFusion(reduce=...)")
    parser.add_argument(
        "--images", type=int, default=512, help="images to draw and train on; CLEAR's authors use 10000"
    )
    parser.add_argument("--prompts", type=Path, help="text file, one prompt per line; default: captions of shapes")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels; 1024 for FLUX")
    parser.add_argument("--sampling-steps", type=int, default=20, help="steps to draw an image")
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than one is slower on a busy machine")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.stage == "teacher":
        if args.target not in ("flux", "unet"):
            parser.error(f"teacher is flux or unet; got {args.target}")
        args.out.mkdir(parents=True, exist_ok=True)
        done = train_teacher(args)
    else:
        pipe, denoiser = load_teacher(args)
        args.out.mkdir(parents=True, exist_ok=True)
        build = (clear_student if args.stage == "clear" else linfusion_student)(args)
        done = distil(args, pipe, denoiser, build)
    words = sys.argv[1:] if argv is None else argv
    done["command"] = shlex.join("OUT" if word == str(args.out) else word for word in words)
    (args.out / f"{args.stage}.json").write_text(json.dumps(done, indent=1) + "\n")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
