"""Draws the clips of the table of methods."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_attn.diffusion.attachment import attach
from vision_attn.diffusion.calibration import calibrate
from vision_attn.diffusion.card import fresh_prompts
from vision_attn.diffusion.clips import Cache, caption
from vision_attn.diffusion.comparison import PLAIN, SIZES, TRUTH, Row, Size, rows
from vision_attn.diffusion.consistent import consistent_images
from vision_attn.diffusion.loading import load
from vision_attn.diffusion.lora import load_lora
from vision_attn.diffusion.method import Preset
from vision_attn.diffusion.protect import protect_image
from vision_attn.diffusion.trained import folder
from vision_attn.diffusion.upscale import upscale_video
from vision_attn.kernels.patterns import Dense
from vision_attn.shapes import COLORS, parse, render, sample_scene

LARGEST = 16 / 255  # change of a pixel by `protect_image`, and by the noise it is compared with


class Artist:
    """Draws clips with a pipeline and stores them in a cache."""

    def __init__(self, cache: Cache, model: Path) -> None:
        loaded = load(model, device="cpu")
        self.cache, self.model, self.pipe = cache, model, _quiet(loaded.pipe)
        said = loaded.defaults
        self.call = {
            "guidance_scale": said["guidance"],
            "max_sequence_length": said["max_sequence_length"],
            "num_inference_steps": cache.steps,
        }
        self._presets: dict[tuple[str, str], Preset] = {}
        self._pipes: dict[str, Any] = {}

    def draw(self, size: Size, row: Row, prompt: int, seed: int) -> None:
        """Draw one clip and store it.

        Seconds are those of the processor, to which other work on the machine adds little. They count the small clip
        that an enlarged one starts from, and not calibration and training, which are done once.
        """
        clip, ways = (size, row, prompt, seed), {"resize": self._resize, "upscale": self._upscale}
        ways |= {TRUTH: self._truth, "draw": self._draw, "calibrate": self._calibrate, "consistent": self._consistent}
        ways |= {"edit": self._edit, "lora": self._lora, "picture": self._picture}
        before = 0.0
        if size.name in ("1x", "edit") and row.name not in (TRUTH, PLAIN):
            self._plain(size, prompt, seed)  # for the PSNR
        if row.way in ("resize", "upscale"):
            self._plain(SIZES["1x"], prompt, seed)
            before = self.cache.record(SIZES["1x"], Row(PLAIN), prompt, seed)["seconds"]
        elif row.way == "calibrate":
            self._preset(size, row)
        elif row.way in ("lora", "picture"):
            self._trained(row)
        start = time.process_time()
        video, density = ways[row.way](*clip, caption(size, prompt))
        seconds = None if row.way == TRUTH else before + time.process_time() - start
        pixels = (np.asarray(video).clip(0, 1) * 255).round().astype(np.uint8)
        self.cache.store(clip, pixels, {"seconds": seconds, "density": density})

    def _truth(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, None]:
        draw, sizes = np.random.default_rng((seed, prompt, 5)), {"height": size.side, "width": size.side}
        return render(sample_scene(draw, parse(text), frames=size.frames, **sizes)), None

    def _draw(
        self, size: Size, row: Row, prompt: int, seed: int, text: str, pipe: Any = None
    ) -> tuple[np.ndarray, float]:
        pipe = pipe or self.pipe

        def video() -> np.ndarray:
            return pipe(text, generator=_noise(prompt, seed), **_sizes(size), **self.call).frames[0]

        if row.method is None:
            return video(), 1.0
        with attach(pipe, row.method) as run:
            return video(), _density(run.report)

    def _lora(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, float]:
        return self._draw(size, row, prompt, seed, text, self._trained(row)[0])

    def _picture(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, float | None]:
        pipe, method = self._trained(row)
        call = {"num_inference_steps": self.cache.steps, "height": size.side, "width": size.side, "output_type": "np"}
        torch.manual_seed(0)  # of layers that start from random numbers
        with attach(pipe, method) as run:
            made = pipe(text, generator=_noise(prompt, seed), guidance_scale=self.call["guidance_scale"], **call)
            return made.images, None if size.name == "unet" and row.method else _density(run.report)

    def _trained(self, row: Row) -> tuple[Any, Any]:
        """The pipeline of a row and what is attached to it, trained where they are not yet."""
        from diffusers import DiffusionPipeline

        found = {part: folder(self.cache.folder, stored.split("-")[0]) for part, stored in row.options.items()}
        name = row.options["layers" if row.way == "lora" else "model"]
        if name not in self._pipes:
            if row.way == "lora":
                self._pipes[name] = _quiet(load(self.model, device="cpu").pipe)
                load_lora(self._pipes[name], found["layers"])
            else:
                self._pipes[name] = _quiet(DiffusionPipeline.from_pretrained(found["model"]))
        method = row.method or Dense()
        if row.way == "picture" and "layers" in found:
            stored = row.options["layers"].split("-")[0]
            method = dataclasses.replace(method, weights=found["layers"] / f"{stored}.safetensors")
        return self._pipes[name], method

    def _calibrate(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, float]:
        return self._draw(size, Row(row.name, self._preset(size, row)), prompt, seed, text)

    def _preset(self, size: Size, row: Row) -> Preset:
        """Calibrated on captions of its own, once."""
        key = (size.name, row.name)
        if key not in self._presets:
            prompts = fresh_prompts(seed=9, count=2)
            self._presets[key] = calibrate(self.pipe, prompts, **row.options, **_sizes(size), **self.call).preset
        return self._presets[key]

    def _plain(self, size: Size, prompt: int, seed: int) -> np.ndarray:
        """The clip of the untouched model at a size."""
        clip = (size, rows(size)[1], prompt, seed)
        if not self.cache.drawn(*clip):
            self.draw(*clip)
        return self.cache.video(*clip)

    def _resize(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, None]:
        frames = torch.from_numpy(self._plain(SIZES["1x"], prompt, seed)).permute(0, 3, 1, 2).float() / 255
        large = torch.nn.functional.interpolate(frames, (size.side, size.side), mode="bilinear")
        return large.permute(0, 2, 3, 1).numpy(), None

    def _upscale(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, float]:
        return self._again(self._plain(SIZES["1x"], prompt, seed), size, row.method, prompt, seed, text, **row.options)

    def _again(
        self, video: np.ndarray, size: Size, method: Any, prompt: int, seed: int, text: str, strength: float
    ) -> tuple[np.ndarray, float]:
        """Noise a video and denoise it, at a larger size or at its own."""
        call = dict(self.call)
        call |= {"steps": call.pop("num_inference_steps"), "guidance": call.pop("guidance_scale")}
        done = upscale_video(
            self.pipe, video, size.side, size.side, strength, prompt=text, negative_prompt="", method=method,
            generator=_noise(prompt, seed), **call,
        )  # fmt: skip
        return done.frames[0], _density(done.report)

    def _edit(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, float]:
        draw, wanted, colors = np.random.default_rng((seed, prompt, 6)), parse(text)[0], list(COLORS)
        before = wanted | {"color": colors[colors.index(wanted["color"]) - 1]}
        picture = torch.from_numpy(render(sample_scene(draw, [before], frames=1))).permute(0, 3, 1, 2)
        first = row.options.get("first")
        if first == "protect":
            picture = protect_image(self.pipe, picture, eps=LARGEST)
        elif first == "noise":
            signs = torch.from_numpy(draw.choice([-1.0, 1.0], picture.shape)).float()
            picture = (picture + signs * LARGEST).clamp(0, 1)
        return self._again(picture.permute(0, 2, 3, 1).numpy(), size, Dense(), prompt, seed, text, strength=0.7)

    def _consistent(self, size: Size, row: Row, prompt: int, seed: int, text: str) -> tuple[np.ndarray, None]:
        subjects = [f"{thing['color']} {thing['shape']}" for thing in parse(text)]
        noise = _noise_seed(prompt, seed) - len(subjects)  # the picture comes after a reference of each subject
        done = consistent_images(self.pipe, subjects, [text], seed=noise, **row.options, **_sizes(size), **self.call)
        return done.images[0], None


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noise_seed(prompt: int, seed: int) -> int:
    return 1000 * (seed + 1) + prompt


def _noise(prompt: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_noise_seed(prompt, seed))


def _sizes(size: Size) -> dict[str, int]:
    return {"height": size.side, "width": size.side, "num_frames": size.frames}


def _density(report: Any) -> float:
    """Share of the pairs of tokens that was computed."""
    found = report.to_dict()["denoisers"][0] if hasattr(report, "denoisers") else {}
    density = found.get("kept", found.get("density"))
    return 1.0 if density is None else density  # a report without it is of dense attention
