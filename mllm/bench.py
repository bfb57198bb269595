"""How fast a vision-language model is with methods attached: what is measured, next to what FLOPs predict.

Reading a prompt: a clock around the vision tower and one around the text model (with what chooses tokens) in a
`generate` call; all ways take turns in every round. New tokens: copies of the model, one for each way and all of the
same weights, generate side by side, each one token and then the next, so that what else the machine does falls on all
alike. On a CPU with one thread times are CPU time, which others on the machine disturb least.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import io
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from vision_attn.kernels.bench.timing import machine, peak_bytes, spread
from vision_attn.mllm.attachment import attach
from vision_attn.mllm.families import family_of
from vision_attn.mllm.method import Method

COLUMNS = (
    "date", "what", "options", "batch", "prompt", "visual", "kept", "vision_ms", "prefill_ms", "first_ms", "token_ms",
    "prefill_speedup", "prefill_speedup_min", "prefill_speedup_max", "flops_speedup", "first_speedup", "token_ratio",
    "token_ratio_min", "token_ratio_max", "select_ms", "cache_mb", "peak_mb", "new_tokens", "rounds", "threads",
    "device_name", "torch", "commit",
)  # fmt: skip
Row = dict[str, Any]
Ways = dict[str, tuple[Method, ...]]
# Options with which methods have something to do in a model of random weights, and time is theirs alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "pai": {"alpha": 0.5, "gamma": 1.0},
    "paint": {"gamma": 1.0},
    "var": {"dims": (3, 4, 5, 6), "tau": 1.5},
}


def scaled_llava(layers: int = 12, width: int = 512, seed: int = 0) -> Any:
    """A LLaVA-1.5 with random weights and fewer channels: 576 visual tokens per picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=width // 2, intermediate_size=2 * width, num_hidden_layers=max(2, layers // 2), image_size=336,
        num_attention_heads=max(1, width // 128), patch_size=14, projection_dim=width // 2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=int(width * 11008 / 4096), num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=8192,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=999)
    return LlavaForConditionalGeneration(config).eval()


def prompt(model: Any, batch: int = 1, words: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels and words for a LLaVA: one picture in each row."""
    generator = torch.Generator().manual_seed(seed)
    tower = model.config.vision_config
    side, patches = tower.image_size, (tower.image_size // tower.patch_size) ** 2
    ids = torch.randint(5, 900, (batch, words), generator=generator)
    image = torch.full((batch, patches), model.config.image_token_id)
    ids = torch.cat([ids[:, : words // 2], image, ids[:, words // 2 :]], 1)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in given.items()}


class Clock:
    """Times of one `generate` call: the tower, the text model reading the prompt, and the first token."""

    def __init__(self, model: Any) -> None:
        self.model, family = model, family_of(model)
        base = model.base_model
        self.parts = {"vision": getattr(base, family.tower), "prefill": getattr(base, family.text)}

    def __call__(self, new_tokens: int, **inputs: Any) -> dict[str, float]:
        seconds, started, stamps = dict.fromkeys(self.parts, 0.0), {}, []
        now = functools.partial(_now, self.model)

        def enter(part: str, *_: Any) -> None:
            started[part] = now()

        def leave(part: str, *_: Any) -> None:
            if not stamps:
                seconds[part] += now() - started[part]

        def token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            stamps.append(now())
            return _go_on(ids)

        with contextlib.ExitStack() as stack:
            for name, module in self.parts.items():
                # First in and last out, so that what a method does is inside.
                before = module.register_forward_pre_hook(functools.partial(enter, name), prepend=True)
                after = module.register_forward_hook(functools.partial(leave, name))
                stack.callback(before.remove)
                stack.callback(after.remove)
            start = now()
            _generate(self.model, inputs, new_tokens, token)
        return {**seconds, "first": stamps[0] - start}


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _go_on(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _generate(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int, after_token: Callable[..., torch.Tensor]
) -> None:
    given = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    model.generate(**inputs, **given, stopping_criteria=[after_token])


def side_by_side(model: Any, inputs: dict[str, torch.Tensor], ways: Ways, tokens: int) -> dict[str, list[float]]:
    """Seconds of each of `tokens` tokens after the first, for every way.

    Each way has a copy of the model with the same weights, and a thread, of which one at a time runs, up to its next
    token; who begins changes from token to token.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = {name: threading.Semaphore(0) for name in ways}
    made, failed, threads = threading.Semaphore(0), [], torch.get_num_threads()

    def run(name: str, own: Any) -> None:
        start = 0.0

        def token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            nonlocal start
            seconds[name].append(_now(own) - start)
            made.release()
            turns[name].acquire()
            if failed:
                raise failed[0]
            start = _now(own)
            return _go_on(ids)

        turns[name].acquire()
        try:
            if not failed:
                torch.set_num_threads(threads)
                with torch.no_grad(), attach(own, *ways[name]) if ways[name] else contextlib.nullcontext():
                    _generate(own, inputs, tokens + 1, token)
        except BaseException as error:
            failed.append(error)
        made.release()

    weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    running = [threading.Thread(target=run, args=(name, copy.deepcopy(model, dict(weights)))) for name in ways]
    for thread in running:
        thread.start()
    names = list(ways)
    for step in range(tokens + 1):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            if not failed:
                turns[name].release()
                made.acquire()
    for name, thread in zip(names, running, strict=True):
        turns[name].release()
        thread.join()
    if failed:
        raise failed[0]
    return {name: found[1:] for name, found in seconds.items()}


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    ways: Ways,
    *,
    new_tokens: int = 17,
    rounds: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of times of the stock model and of `ways`: name -> methods that are attached together.

    Speed-ups are medians of the ratios to the stock model, round by round; of new tokens, each round has
    `new_tokens - 1` besides the first, and the ratio is the median of theirs. Output lengths are the same for all.
    """
    clock, device = Clock(model), model.device.type
    ways = {"stock": (), **ways}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    reports: dict[str, Any] = {}
    peaks = {}
    with torch.no_grad():
        for index in range(-1, rounds):  # the first round warms up and looks at memory
            names = list(ways)
            at = max(index, 0) % len(names)
            for name in names[at:] + names[:at]:
                tell(f"round {index + 1} of {rounds}: {name}")
                with attach(model, *ways[name]) if ways[name] else contextlib.nullcontext() as run:
                    if index < 0:
                        clock(2, **inputs)
                        peaks[name] = peak_bytes(lambda: clock(2, **inputs) and None, device)
                        reports[name] = run and run.report.prompts[-1]
                    else:
                        times[name].append(clock(1, **inputs))
        tell("new tokens, all ways side by side")
        tokens = side_by_side(model, inputs, ways, rounds * (new_tokens - 1))
    about = {key: value for key, value in machine(device).items() if key in COLUMNS}
    about |= {"batch": len(inputs["input_ids"]), "prompt": inputs["input_ids"].shape[1]}
    about |= {"new_tokens": new_tokens, "rounds": rounds}
    rows = []
    for name, methods in ways.items():
        row = dict.fromkeys(COLUMNS, "") | about | {"what": name, "options": "; ".join(map(str, methods))}
        for part in times[name][0] if times[name] else ():
            row[f"{part}_ms"] = _digits(1e3 * statistics.median(t[part] for t in times[name]))
        pairs = list(zip(times["stock"], times[name], strict=True))
        ratios = {
            "prefill_speedup": [stock["prefill"] / own["prefill"] for stock, own in pairs],
            "first_speedup": [stock["first"] / own["first"] for stock, own in pairs],
        }
        each = [own / stock for stock, own in zip(tokens["stock"], tokens[name], strict=True)]
        cuts = range(0, len(each), new_tokens - 1)
        ratios["token_ratio"] = [statistics.median(each[start : start + new_tokens - 1]) for start in cuts]
        row["token_ms"] = _digits(1e3 * statistics.median(tokens[name]))
        for key, values in ratios.items():
            for suffix, value in zip(("", "_min", "_max"), spread(values), strict=True):
                if key + suffix in COLUMNS:
                    row[key + suffix] = _digits(value)
        read = reports[name]
        if read is not None:
            row |= {"visual": sum(read.visual), "kept": sum(read.kept)}
            row |= {"flops_speedup": _digits(read.stock_flops / read.flops)}
            row |= {"select_ms": _digits(1e3 * read.select_seconds), "cache_mb": _digits(read.cache / 2**20)}
        if peaks[name] is not None:
            row["peak_mb"] = _digits(peaks[name] / 2**20)
        rows.append(row)
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def as_csv(rows: list[Row], header: bool = True) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_text(rows: list[Row]) -> str:
    """A table for people."""
    first = rows[0]
    lines = [
        f"batch {first['batch']}, {first['prompt']} tokens, {first['new_tokens']} new ones, {first['rounds']} rounds, "
        f"{first['threads']} threads, {first['device_name']}",
        f"{'what':34} {'kept':>6} {'prefill ms':>11} {'speed-up':>20} {'by FLOPs':>9} {'first ms':>9} {'token ms':>9} "
        f"{'over stock':>20} {'cache MB':>9} {'peak MB':>8}",
    ]
    for row in rows:
        up = f"{row['prefill_speedup']}x ({row['prefill_speedup_min']} to {row['prefill_speedup_max']})"
        over = f"{row['token_ratio']}x ({row['token_ratio_min']} to {row['token_ratio_max']})"
        lines.append(
            f"{row['what']:34} {row['kept']:>6} {row['prefill_ms']:>11} {up:>20} {row['flops_speedup']:>9} "
            f"{row['first_ms']:>9} {row['token_ms']:>9} {over:>20} {row['cache_mb']:>9} {row['peak_mb']:>8}"
        )
    return "\n".join(lines)
