"""How fast pipelines are with patterns and methods attached: whole clips, attention alone, one call of the denoiser.

On a CPU times are of the wall clock; with one thread they are CPU time, which others on the machine disturb least.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vision_attn.diffusion.attachment import attach
from vision_attn.diffusion.families import Grid
from vision_attn.diffusion.timings import Row, cut, size_text, timed
from vision_attn.kernels.attend import attend
from vision_attn.kernels.bench.timing import clock, interleave
from vision_attn.kernels.patterns import Neighborhood, Pattern, Radial, SlidingTile

RADIAL = Radial(decay=0.5, block=4, thin=8)  # what the built-in model suggests
# The thinning and narrowest band of the published constants, for frames of 576 tokens.
THINNED = Radial(decay=0.2, block=32, thin=128)
WINDOW = Neighborhood(window=(5, 7, 7))

# Name -> frames and side in pixels of a clip of the built-in model.
TRAINED = (17, 48)
CLIPS = {
    "1x": TRAINED, "2x-long": (37, 48), "4x-long": (77, 48), "8x-long": (157, 48),
    "4x-long-4x-large": (77, 192),
}  # fmt: skip
GROWTH = tuple((times * 5, side, side) for side in (6, 24) for times in (1, 2, 4, 8))
# A transformer with the sizes of Wan2.1 1.3B, and the grids of its 480p and of 720p clips of 81 frames.
WAN = dict(num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256)
WAN_GRIDS = ((21, 30, 52), (21, 45, 80))
WAN_PATTERNS = {
    "dense": None,
    "radial": Radial(decay=0.2),
    "radial, block rule": Radial(decay=0.2, rule="block"),
    "neighborhood": Neighborhood(window=(11, 15, 27)),
    "sliding tile": SlidingTile(tile=(3, 6, 8), window=(3, 3, 3)),
}
RESULTS = Path(__file__).parent / "results" / "timings.csv"
Tell = Callable[[str], None]


def clips(
    pipe: Any, sizes: Iterable[str] = CLIPS, steps: int = 20, count: int = 1, tell: Tell = print
) -> Iterator[list[Row]]:
    """Whole clips of the built-in model, from the prompt to pixels, dense and with patterns; judged.

    All ways draw the same prompts from the same noise and take turns; speed-ups are medians of the ratios to dense
    prompt by prompt.
    """
    from vision_attn.diffusion.card import fresh_prompts
    from vision_attn.diffusion.measures import measure

    ways = {"dense": None, "radial": RADIAL, "neighborhood": WINDOW}
    for size in sizes:
        frames, side = CLIPS[size]
        grid = ((frames - 1) // 4 + 1, side // 8, side // 8)
        times: dict[str, list[float]] = {way: [] for way in ways}
        scores: dict[str, list[dict[str, float]]] = {way: [] for way in ways}

        def draw(way: str, prompt: str, seed: int, frames=frames, side=side, grid=grid):
            with _attached(pipe, ways[way], grid):
                return _clip(pipe, prompt, seed, frames, side, steps)

        tell(f"{size}: warming up")
        _clip(pipe, "a red circle", 0, *TRAINED, 1)
        with torch.no_grad():
            for pattern in ways.values():  # what is made once per pattern and grid, and first allocations
                with _attached(pipe, pattern, grid):
                    _call(pipe.transformer, grid, torch.float32, "cpu")()
        for at, prompt in enumerate(fresh_prompts(0, count)):
            names = list(ways)
            for way in names[at % len(names) :] + names[: at % len(names)]:
                tell(f"{size}, clip {at + 1} of {count}: {way}")
                made = []
                times[way].append(_seconds(lambda: made.append(draw(way, prompt, at))))  # noqa: B023
                scores[way].append(measure((made[0] * 255).round().clip(0, 255).astype("uint8"), prompt, TRAINED[0]))
        rows = []
        for way, pattern in ways.items():
            row = timed("clip", size, grid, way, pattern, times[way], times["dense"])
            for name in ("agreement", "count_error"):
                row[name] = round(statistics.mean(score[name] for score in scores[way]), 3)
            rows.append(row | {"steps": steps, "clips": count})
        yield rows


def growth(
    grids: Iterable[Grid] = GROWTH, rounds: int = 5, heads: int = 4, head_dim: int = 32, tell: Tell = print
) -> Iterator[list[Row]]:
    """Attention alone on grids of growing length: one call of `attend` with random queries, keys and values. Dense
    attention is torch's."""
    ways = {"dense": None, "radial": RADIAL, "radial, thinned": THINNED, "neighborhood": WINDOW}
    for grid in grids:
        tell(f"attention on {size_text(grid)}")
        q, k, v = torch.randn(3, 1, *grid, heads, head_dim, generator=torch.Generator().manual_seed(0))
        flat = [x.flatten(1, 3).transpose(1, 2) for x in (q, k, v)]
        calls = {"dense": partial(F.scaled_dot_product_attention, *flat)}
        for way, pattern in ways.items():
            if pattern is not None:
                calls[way] = partial(attend, q, k, v, cut(pattern, grid))
        times: dict[str, list[float]] = {way: [] for way in calls}
        with torch.no_grad():
            for one in interleave(calls, "cpu", rounds):
                for way, both in one.items():
                    times[way].append(both[torch.get_num_threads() == 1])
        size = f"{grid[0] / 5:g}x-long" + ("" if grid[1] == 6 else f"-{grid[1] / 6:g}x-large")
        yield [
            timed("attention", size, grid, way, pattern, times[way], times["dense"]) for way, pattern in ways.items()
        ]


def overhead(
    denoiser: torch.nn.Module, grids: Iterable[Grid] = ((5, 6, 6), (5, 24, 24)), rounds: int = 15, tell: Tell = print
) -> Iterator[list[Row]]:
    """One call of the denoiser untouched, with a full window attached, and with a window one frame shorter, which is
    computed by the kernels: what attaching costs where nothing is saved."""
    for grid in grids:
        tell(f"overhead on {size_text(grid)}")
        call = _call(denoiser, grid, torch.float32, "cpu")
        almost = Neighborhood(window=tuple(n - (axis == 0) for axis, n in enumerate(grid)))
        ways = {"untouched": None, "full window": Neighborhood(window=grid), "window one frame shorter": almost}
        times: dict[str, list[float]] = {way: [] for way in ways}
        with torch.no_grad():
            often = max(1, round(0.3 / _seconds(call)))
            for index in range(rounds):
                names = list(ways)
                for way in names[index % 3 :] + names[: index % 3]:
                    if ways[way] is None:
                        times[way].append(_seconds(call, often))
                        continue
                    with attach(denoiser, ways[way]):
                        call()
                        times[way].append(_seconds(call, often))
        yield [
            timed("overhead", "", grid, way, pattern, times[way], times["untouched"]) for way, pattern in ways.items()
        ]


def freeswim(
    pipe: Any, side: int = 192, steps: int = 20, count: int = 1, every: Iterable[int] = (2, 5), tell: Tell = print
) -> Iterator[list[Row]]:
    """`upscale_video` of a clip of the trained size to `side` pixels, with and without the cache; judged.

    The small clips are drawn before and are not timed; encoding and decoding are.
    """
    from vision_attn.diffusion.card import fresh_prompts
    from vision_attn.diffusion.measures import measure
    from vision_attn.diffusion.upscale import upscale_video

    ways = {"FreeSwim": None, **{f"FreeSwim, cache_steps={n}": n for n in every}}
    times: dict[str, list[float]] = {way: [] for way in ways}
    scores: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for at, prompt in enumerate(fresh_prompts(0, count)):
        small = _clip(pipe, prompt, at, *TRAINED, 20)

        def upscale(cache_steps: int | None, small=small, prompt=prompt, seed=at, steps=steps):
            noise = torch.Generator("cpu").manual_seed(seed)
            options = dict(prompt=prompt, steps=steps, generator=noise, max_sequence_length=16)
            return upscale_video(pipe, small, side, side, cache_steps=cache_steps, **options).frames[0]

        if not at:
            tell("FreeSwim: warming up")
            upscale(None, steps=2)
        names = list(ways)
        for way in names[at % len(names) :] + names[: at % len(names)]:
            tell(f"{way}, clip {at + 1} of {count}")
            made = []
            times[way].append(_seconds(lambda: made.append(upscale(ways[way]))))  # noqa: B023
            scores[way].append(measure((made[0] * 255).round().clip(0, 255).astype("uint8"), prompt, TRAINED[0]))
    rows = []
    for way in ways:
        row = timed(
            "freeswim", f"{side / 48:g}x-large", (5, side // 8, side // 8), way, None, times[way], times["FreeSwim"]
        )
        for name in ("agreement", "count_error"):
            row[name] = round(statistics.mean(score[name] for score in scores[way]), 3)
        rows.append(row | {"steps": steps, "clips": count})
    yield rows


def wan(
    grids: Iterable[Grid] = WAN_GRIDS, rounds: int = 5, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    config: dict[str, int] | None = None, tell: Tell = print,
) -> Iterator[list[Row]]:  # fmt: skip
    """One call of a transformer of Wan2.1 1.3B's sizes with random weights, dense and with patterns, and peak memory.

    Random weights take as long as trained ones; the video would be noise.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**(WAN if config is None else config)).eval()
    for name, parameter in model.named_parameters():  # as from_pretrained(..., torch_dtype=...) does
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    for grid in grids:
        call = _call(model, grid, dtype, device)
        rows, dense = [], []
        with torch.no_grad():
            for way, pattern in WAN_PATTERNS.items():
                tell(f"Wan 1.3B on {size_text(grid)}: {way}")
                try:
                    with _attached(model, pattern, grid):
                        call()
                        if device == "cuda":
                            torch.cuda.reset_peak_memory_stats()
                        times = [clock(call, device)[0] for _ in range(rounds)]
                except (ValueError, RuntimeError) as error:
                    text = str(error).splitlines()[0][:120]
                    rows.append(timed("denoiser", "Wan2.1 1.3B", grid, way, pattern, [], []) | {"note": text})
                    continue
                dense = times if way == "dense" else dense
                row = timed("denoiser", "Wan2.1 1.3B", grid, way, pattern, times, dense, device)
                if device == "cuda":
                    row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
                rows.append(row | {"note": f"random weights, {str(dtype).removeprefix('torch.')}"})
        yield rows


def _seconds(call: Callable[[], Any], often: int = 1) -> float:
    """Seconds per call on the wall; with one thread of CPU time, which others on the machine disturb least."""
    return clock(call, "cpu", often)[torch.get_num_threads() == 1]


def _clip(pipe: Any, prompt: str, seed: int, frames: int, side: int, steps: int):
    """A clip of the built-in model, `[frames, height, width, 3]` from 0 to 1."""
    call = dict(height=side, width=side, num_frames=frames, num_inference_steps=steps, guidance_scale=3.0)
    noise = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt, generator=noise, max_sequence_length=16, output_type="np", **call).frames[0]


def _call(denoiser: torch.nn.Module, grid: Grid, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """One call of a Wan denoiser on noise of a token grid."""
    config, draw = denoiser.config, torch.Generator("cpu").manual_seed(0)
    shape = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    latents = torch.randn(1, config.in_channels, *shape, generator=draw).to(device, dtype)
    text = torch.randn(1, 512 if config.text_dim > 1000 else 16, config.text_dim, generator=draw).to(device, dtype)
    step = torch.tensor([500.0], device=device)
    return lambda: denoiser(hidden_states=latents, timestep=step, encoder_hidden_states=text, return_dict=False)


def _attached(target: Any, pattern: Pattern | None, grid: Grid) -> Any:
    return contextlib.nullcontext() if pattern is None else attach(target, cut(pattern, grid))
