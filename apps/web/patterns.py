"""The tab *Patterns*: who a token looks at, how much that saves, and what this machine would compute it with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import click
import gradio as gr
import numpy as np
from gradio.context import Context

from vision_attn.apps.pattern_options import GRID, NAMES, PATTERNS, build_pattern, pattern_options
from vision_attn.apps.web.grid_picture import paint, token_at
from vision_attn.apps.web.page import Settings, kind

TOKENS, AXIS = 100_000, 16_384  # of a grid: what is counted in about a second
FLAGS = ("sink", "first_frame", "center_keys")  # yes or no, on the command line --sink or --no-sink
PAIRS = 1 << 23  # looked at for the map of keys per query
COLORS = np.array([[241, 241, 238], [42, 120, 184], [224, 83, 47]], np.uint8)  # not seen, seen, the query
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("this machine", "cpu", "cuda")

# Pattern -> a grid and options to begin with; what is not named keeps the default of the pattern.
STARTS: dict[str, tuple[str, dict[str, str]]] = {
    "dense": ("16,16", {}),
    "neighborhood": ("16,16", {"window": "7"}),
    "window": ("16,16", {"size": "4"}),
    "sliding-tile": ("24,24", {"tile": "4", "window": "3"}),
    "halo": ("16,16", {"block": "4", "halo": "2"}),
    "circle": ("16,16", {"radius": "5"}),
    "radial": ("9,12,16", {"decay": "0.5", "block": "4", "thin": "8"}),
    "length-decay": ("12,8,8", {"train_frames": "5"}),
    "power-step": ("1024", {"block": "16", "window": "64", "sink": "16"}),
    "streaming": ("1024", {"window": "128", "sink": "16"}),
}
EXAMPLES = {
    "Picture, 7 x 7 around each token": ("neighborhood", "16,16", "8,8", {"window": "7"}),
    "The same at a border": ("neighborhood", "16,16", "0,15", {"window": "7"}),
    "Far but few: dilation 3": ("neighborhood", "32,32", "16,16", {"window": "7", "dilation": "3"}),
    "Shifted windows, as in Swin": ("window", "16,16", "8,8", {"size": "4", "shift": "2"}),
    "A circle, and the rest as means": ("circle", "16,16", "8,8", {"radius": "5", "pooled": "4"}),
    "Video: radial attention": ("radial", "9,12,16", "4,6,8", {"decay": "0.5", "block": "4", "thin": "8"}),
    "Video: causal in time": (
        "neighborhood", "9,12,16", "4,6,8", {"window": "5,7,7", "causal": "true,false,false"}
    ),
    "Video longer than trained on": ("length-decay", "15,8,8", "10,4,4", {"train_frames": "5"}),
    "720p video, sliding tiles": ("sliding-tile", "20,48,80", "10,24,40", {"tile": "4,8,8", "window": "3"}),
    "Text: a window and the first tokens": ("streaming", "1024", "700", {"window": "128", "sink": "16"}),
}  # fmt: skip

HELP = {
    "window": "Keys, tiles or tokens.",
    "stride": "Queries that share a window.",
    "dilation": "Step between keys.",
    "causal": "true, false, or one per axis.",
    "size": "Tokens per window.",
    "shift": "Where the first cut lies.",
    "tile": "Tokens per tile.",
    "block": "Tokens per block.",
    "halo": "Tokens around a block.",
    "radius": "Tokens.",
    "pooled": "Cells seen as means; may be empty.",
    "decay": "Less is sparser.",
    "sink": "radial: yes or no; else tokens.",
    "rule": "Exact, or as published.",
    "thin": "Skip far frames below this.",
    "train_frames": "Frames it was trained on.",
    "alpha": "Factor of distant scores.",
    "beta": "Factor at repetitions.",
    "period": "Of repetitions; may be empty.",
    "gamma": "Frames around a repetition.",
    "first_frame": "It sees no further than trained.",
    "center_keys": "Subtract the mean key.",
    "shape": "Of the decay.",
}


@click.command()
@pattern_options
def _typed(options: dict[str, Any]) -> dict[str, Any]:
    return options


def read(pattern: str, grid: str, query: str, options: dict[str, str]) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """The pattern, the grid and the query that were typed; read by the options of the command line.

    Args:
        pattern: a key of `PATTERNS`.
        grid: sizes in tokens, such as "21,45,80".
        query: coordinates from 0, or nothing for the middle.
        options: option -> what was typed; empty ones and those of other patterns are left out.

    Raises:
        ValueError: what was typed is no grid, is too large to draw, or does not fit the pattern.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"Unknown pattern {pattern!r}.\nAllowed: {', '.join(PATTERNS)}.")
    line = []
    for name in PATTERNS[pattern]:
        text, flag = str(options.get(name) or "").strip(), f"--{name.replace('_', '-')}"
        if text in ("yes", "no") and name in FLAGS:
            line.append(flag if text == "yes" else flag.replace("--", "--no-", 1))
        elif text:
            line.append(f"{flag}={text}")
    try:
        sizes = GRID.convert(str(grid), None, None)
        _check_size(sizes)
        built = build_pattern(pattern, _typed.main(line, "pattern", standalone_mode=False), sizes)
        built.predicate(sizes)
        at = GRID.convert(query, None, None) if (query or "").strip() else tuple(size // 2 for size in sizes)
    except click.ClickException as error:
        raise ValueError(error.format_message().replace("--", "")) from error
    if len(at) != len(sizes) or not all(0 <= q < size for q, size in zip(at, sizes, strict=True)):
        last = ", ".join(str(size - 1) for size in sizes)
        raise ValueError(f"The query {query} is not on the grid {grid}.\nGive one number per axis, from 0 to {last}.")
    return built, sizes, at


def _check_size(grid: tuple[int, ...]) -> None:
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"The grid is {grid}.\nAllowed: one to three sizes of at least 1, such as 16,16 or 21,45,80.")
    if math.prod(grid) > TOKENS or max(grid) > AXIS:
        raise ValueError(
            f"The grid has {math.prod(grid):,} tokens, {max(grid):,} along an axis.\n"
            f"This page draws up to {TOKENS:,}, and {AXIS:,} along an axis.\n"
            "`vision-attn simulate` takes any size."
        )


def _shades(values: np.ndarray, low: float, high: float) -> np.ndarray:
    from matplotlib import colormaps

    return (colormaps["viridis"]((values - low) / max(high - low, 1e-9))[..., :3] * 255).astype(np.uint8)


def seen_picture(pattern: Any, grid: tuple[int, ...], query: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """What the query sees as uint8 RGB, and in words."""
    import torch

    from vision_attn.kernels.draw import keys_seen

    seen = keys_seen(pattern, grid, query)
    count, tokens = int(seen.sum()), seen.numel()
    words = f"Query **{_coordinates(query)}** sees **{count:,} of {tokens:,}** keys ({count / tokens:.1%})."
    colors = COLORS[seen.int().numpy()]
    rule = pattern.score_rule(grid)
    if rule is not None:
        token = torch.arange(tokens)
        factors = rule(torch.ones(tokens), token.reshape(grid)[query][None], token).reshape(grid)
        low, high = float(factors[seen].min()), float(factors[seen].max())
        colors = np.where(seen.numpy()[..., None], _shades(factors.numpy(), min(low, 0.9), 1.0), COLORS[0])
        words += f" Their scores are multiplied by {low:.2g} (dark) to {high:.2g} (yellow)."
    if getattr(pattern, "pooled", None):
        words += f" It also sees the mean of each cell of {pattern.pooled} x {pattern.pooled}."
    colors[query] = COLORS[2]
    frame = query[0] if len(grid) == 3 else 0
    return paint(colors, grid, frame, query), words


@functools.lru_cache(maxsize=32)
def counts_picture(pattern: Any, grid: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """How many keys each query sees as uint8 RGB, and in words."""
    from vision_attn.kernels.draw import keys_per_query

    counts, steps = keys_per_query(pattern, grid, PAIRS)
    low, high = int(counts.min()), int(counts.max())
    words = f"Every query sees {low:,} keys." if low == high else f"Queries see {low:,} (dark) to {high:,} keys."
    if max(steps) > 1:
        words += f" Counted at every {_coordinates(steps)}-th token."
    for axis, step in enumerate(steps):  # every counted query stands for its neighbours
        counts = counts.repeat_interleave(step, axis).narrow(axis, 0, grid[axis])
    return paint(_shades(counts.numpy(), 0, high), grid, 0), words


@functools.lru_cache(maxsize=64)
def report(pattern: Any, grid: tuple[int, ...], heads: int, head_dim: int, dtype: str, device: str) -> str:
    """Density, speed-up bounds by tile shape, and what each backend says, as Markdown."""
    import torch

    from vision_attn import explain
    from vision_attn.kernels.rates import HERE, here
    from vision_attn.kernels.simulate import simulate

    number = getattr(torch, dtype)
    answer = explain(pattern, grid, heads=heads, head_dim=head_dim, dtype=number, device=device)
    profile = "h100" if device == "cuda" else HERE if here().exists() else None
    costs = simulate(pattern, grid, heads=heads, head_dim=head_dim, dtype=number, device=profile or "h100")
    times = profile is not None and any(tiles.seconds is not None for tiles in costs.tiles)
    lines = [
        f"`{pattern}` on {' x '.join(map(str, grid))} tokens, {heads} heads of {head_dim}, {dtype}, {device}",
        "",
        f"**Density {answer.density:.1%}**: at most **{answer.bound:.3g} times** faster than dense attention; "
        f"{answer.tile_bound:.3g} times with {answer.tiles}.",
        "",
        "#### Speed-up bound by tile shape",
        "",
        "| queries x keys | key tiles | bound | full tiles | shapes |" + (" predicted |" if times else ""),
        "|---|---|---|---|---|" + ("---|" if times else ""),
    ]
    for tiles in costs.tiles:
        shapes = " / ".join("x".join(map(str, shape)) for shape in (tiles.query_tile, tiles.key_tile))
        where = "aligned" if tiles.aligned else "anywhere"
        row = f"| {tiles.queries} x {tiles.keys} | {where} | {tiles.bound:.3g} | {tiles.full:.0%} | {shapes} |"
        lines.append(row + (f" {tiles.seconds * 1e3:.3g} ms |" if times else ""))
    if times:
        lines += ["", f"Predicted, not measured, for {costs.profile.device} ({costs.profile.origin})."]
    machine = "this machine" if device == _kind_of("auto") else device
    lines += ["", f"#### Backends on {machine}", "", "| backend | | why |", "|---|---|---|"]
    lines += [f"| {v.backend} | {v.status} | {'; '.join(v.reasons)} |" for v in answer.backends]
    return "\n".join(lines)


def explore(
    pattern: str,
    grid: str,
    query: str,
    heads: float | None,
    head_dim: float | None,
    dtype: str,
    device: str,
    default: str = "auto",
    **options: str,
) -> tuple[np.ndarray, str, np.ndarray, str, str]:
    """Everything that the tab shows: the query's picture and words, the counts' picture and words, the report.

    Args:
        pattern, grid, query, options: as for `read`.
        heads, head_dim, dtype, device: of the attention that the report is about.
        default: the device that "this machine" means.

    Raises:
        ValueError: as `read`, and numbers that are missing or out of range.
    """
    for name, value, most in (("heads", heads, 1024), ("channels per head", head_dim, 1024)):
        if value is None or not 1 <= value <= most:
            raise ValueError(f"The {name} are {value}.\nAllowed: a whole number from 1 to {most}.")
    built, sizes, at = read(pattern, grid, query, options)
    where = _kind_of(default) if device == DEVICES[0] else device
    return (
        *seen_picture(built, sizes, at),
        *counts_picture(built, sizes),
        report(built, sizes, int(heads), int(head_dim), dtype, where),
    )


def _kind_of(device: str) -> str:
    from vision_attn.diffusion.loading import resolve_device

    return resolve_device(device).type


def start(pattern: str, grid: str) -> tuple[str, dict[str, str]]:
    """A grid, and option texts that fill every field of a pattern; the grid is kept where the pattern fits it."""
    from vision_attn.kernels import patterns

    home, given = STARTS[pattern]
    texts = {
        f.name: _text(f.name, f.default)
        for f in dataclasses.fields(patterns.PATTERNS[pattern])
        if f.default not in (dataclasses.MISSING, None)
    } | given
    try:
        read(pattern, grid, "", texts)
    except ValueError:
        return home, texts
    return grid, texts


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return ("yes" if value else "no") if name in FLAGS else str(value).lower()
    return str(value)


def _coordinates(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def build(settings: Settings) -> None:
    """The widgets of the tab."""
    pattern, grid, query, given = next(iter(EXAMPLES.values()))
    texts = start(pattern, grid)[1] | given
    gr.Markdown("Choose who may look at whom on a grid of tokens, then click a token: what it sees is blue.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            names = gr.Dropdown(list(PATTERNS), value=pattern, label="Pattern", info="Who sees whom.")
            with gr.Row():
                grids = gr.Textbox(grid, label="Grid", info="Tokens: L, H,W or T,H,W.", min_width=130)
                queries = gr.Textbox(query, label="Query", info="From 0; or click.", min_width=130)
            with gr.Row():
                options = {name: _field(name, texts.get(name, ""), name in PATTERNS[pattern]) for name in NAMES}
            with gr.Accordion("For the report: heads, dtype, device", open=False):
                with gr.Row():
                    heads = gr.Number(8, precision=0, minimum=1, maximum=1024, label="Heads", min_width=110)
                    width = gr.Number(
                        64, precision=0, minimum=1, maximum=1024, label="Channels per head", min_width=110
                    )
                with gr.Row():
                    dtype = gr.Dropdown(DTYPES, value="float32", label="Dtype", min_width=110)
                    device = gr.Dropdown(DEVICES, value=DEVICES[0], label="Device", min_width=110)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3, min_width=300):
            words = gr.Markdown()
            seen = gr.Image(
                label="What the query sees: click another token", format="png", interactive=False, buttons=["download"],
                alt_text="The grid of tokens; blue is seen by the query, which is orange",
            )  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            spread = gr.Markdown()
            counts = gr.Image(
                label="How many keys each query sees", format="png", interactive=False, buttons=["download"],
                alt_text="The grid of tokens; the brighter, the more keys a query sees",
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            table = gr.Markdown()

    inputs = {"pattern": names, "grid": grids, "query": queries, "heads": heads, "head_dim": width, "dtype": dtype,
              "device": device, **options}  # fmt: skip
    widgets = list(inputs.values())
    outputs = [seen, words, counts, spread, table]
    run = _by_place(functools.partial(explore, default=settings.device), list(inputs))

    def live(*typed: Any) -> tuple:
        """A half-typed number is no reason for an alarm: the message takes the place of the words."""
        try:
            return run(*typed)
        except ValueError as error:
            return gr.skip(), f"**Not yet.** {error}", gr.skip(), gr.skip(), gr.skip()

    def look(event: gr.SelectData, *typed: Any) -> tuple:
        given = dict(zip(inputs, typed, strict=True))
        built, sizes, at = read(given["pattern"], given["grid"], given["query"], given)
        token = token_at(sizes, at[0] if len(sizes) == 3 else 0, *event.index)
        if token is None:
            return gr.skip(), gr.skip(), gr.skip()
        return _coordinates(token), *seen_picture(built, sizes, token)

    def fill(name: str, grid: str) -> list:
        grid, texts = start(name, grid)
        return [grid, "", *(texts.get(option, "") for option in NAMES)]

    def show(name: str) -> list:
        return [gr.update(visible=option in PATTERNS[name]) for option in NAMES]

    # Not through the queue: of two events at once, Gradio's stream may lose the answer to the second.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    button.click(kind(run), widgets, outputs, api_name="pattern")
    changes = [widget.change for widget in widgets if widget is not queries]
    gr.on([*changes, queries.input], live, widgets, outputs, trigger_mode="always_last", **quiet)
    Context.root_block.load(live, widgets, outputs, **quiet)
    seen.select(kind(look), widgets, [queries, seen, words], **quiet)
    names.input(kind(fill), [names, grids], [grids, queries, *options.values()], **quiet)
    names.change(kind(show), names, list(options.values()), **quiet)
    rows = []
    for name, grid, query, given in EXAMPLES.values():
        texts = start(name, grid)[1] | given
        rows.append([name, grid, query, 8, 64, "float32", DEVICES[0], *(texts.get(each, "") for each in NAMES)])
    gr.Examples(rows, widgets, example_labels=list(EXAMPLES), api_visibility="private")


def _field(name: str, value: str, visible: bool) -> gr.Textbox | gr.Dropdown:
    choices = {"rule": ["token", "block"], "shape": ["constant", "linear", "parabolic"]}.get(name)
    if name in ("first_frame", "center_keys"):
        choices = ["yes", "no"]
    common = {"label": name.replace("_", " "), "info": HELP[name], "visible": visible, "min_width": 130}
    if choices is None:
        return gr.Textbox(value, **common)
    return gr.Dropdown(["", *choices], value=value, **common)


def _by_place(function: Callable, names: list[str]) -> Callable:
    """A function of positional arguments with these names, as Gradio calls it and shows it to programs."""

    def called(*values: Any) -> Any:
        return function(**dict(zip(names, values, strict=True)))

    called.__doc__ = explore.__doc__
    called.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return called
