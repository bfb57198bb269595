"""The hooks of an attached denoiser.

The root hook runs before the denoiser and writes plain values into a `Context`: grid, text length, and per attention module whether
it is sparse now. The attention hook runs a module inside a function mode that takes over `scaled_dot_product_attention`, and
leaves projections, rotary embeddings, LoRA and everything else to the module. Code that `torch.compile` may trace reads only
bools and sizes from the context and only writes its tallies; counting and step keeping happen outside.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from vision_attn.diffusion.compiled import register, traced_attention
from vision_attn.diffusion.families import Family, Grid
from vision_attn.diffusion.joint import gathered_order, joint_attention
from vision_attn.diffusion.report import AttachError
from vision_attn.diffusion.schedule import Announcements, Schedule, Steps


class Context:
    """State of one attached denoiser, shared by its hooks."""

    def __init__(self, family: Family, config: Any, schedule: Schedule, steps: Steps, options: dict[str, Any]) -> None:
        self.family, self.config, self.schedule, self.steps = family, config, schedule, steps
        self.pattern, self.backend, self.strict = options["pattern"], options["backend"], options["strict"]
        self.temperature, self.train_tokens = options["temperature"], options["train_tokens"]
        self.user_grid: Grid | None = options["grid"]
        self.hooks: list[AttentionHook] = []
        self.memo: dict = {}
        self.warnings: dict[str, int] = {}
        self.steps_count, self.forwards = {"sparse": 0, "dense": 0}, {"sparse": 0, "dense": 0}
        # Read inside compiled regions:
        self.key = register(self)
        self.announced = False
        self.active = True
        self.half: str | None = None  # the half of a `[uncond, cond]` batch that is sparse
        self.grids: dict[int, Grid] = {}  # image tokens -> grid
        self.text = self.appended = self.batch = 0
        self.ranks = 1

    def decide(self, timestep: Any | None) -> None:
        """Set which modules are sparse in the coming call. Never traced."""
        step, total = self.steps.current(timestep, self.schedule.needs_step)
        if self.schedule.needs_step and step is None:
            raise AttachError(
                "dense_steps and dense_last_steps need the current step, but this call passes no timestep; attach to the pipeline, "
                "call the denoiser with timestep=, or leave them at 0"
            )
        active = not self.schedule.dense_at(step, total)
        if self.steps.is_new(step):
            self.steps_count["sparse" if active else "dense"] += 1
        self.active, self.half = self._guidance(active)
        for hook in self.hooks:
            hook.sparse = self.active and not hook.always_dense

    def _guidance(self, active: bool) -> tuple[bool, str | None]:
        calls, name = self.schedule.calls, self.steps.name
        if not active or calls == "both":
            return active, None
        if name in ("cond", "uncond"):
            return name == calls, None
        if getattr(self.steps.pipe, "do_classifier_free_guidance", None) is False:
            return calls == "cond", None
        if name == "cond_uncond" or (name is None and self.family.doubled_batch):
            return True, calls
        raise AttachError(
            f"calls={calls!r} needs to know which denoiser call is which, and this one is not announced by cache_context "
            f"(got {name!r}); use calls='both'"
        )

    def measure(self, call: dict[str, Any]) -> None:
        """Read grid, text length and batch from the arguments of a denoiser call. May be traced."""
        found = self.family.grid(self.config, call, self.memo)
        grid = found if self.user_grid is None else self.user_grid
        if grid is None:
            raise AttachError(
                f"the token grid of this {self.family.name} call is not known; pass grid=(...) in tokens to attach. Inside a model "
                "compiled as a whole, one call before compiling, or compile_repeated_blocks(), also does"
            )
        if found is not None and math.prod(found) != math.prod(grid):
            raise AttachError(f"grid={grid} has {math.prod(grid)} tokens, but this {self.family.name} call has {found}")
        sample = call.get("sample") if self.family.stages else call.get("hidden_states")
        self.batch = 0 if sample is None else int(sample.shape[0])
        self.appended = 0
        if self.family.appends:
            self.appended = int(sample.shape[1]) - math.prod(grid)
            if self.appended < 0:
                raise AttachError(f"grid={grid} has {math.prod(grid)} tokens, but this call has {int(sample.shape[1])}")
        text = None if self.family.text == "none" else call.get("encoder_hidden_states")
        self.text = 0 if text is None else int(text.shape[1])
        if not self.family.stages:
            self.grids = {math.prod(grid): grid}
            return
        height, width = grid
        levels = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.config.block_out_channels))]
        self.grids = {h * w: (h, w) for h, w in levels}

    def place(self, tokens: int) -> tuple[Grid, int] | None:
        """The grid and where it starts in a sequence of `tokens`, or None when the sequence is something else."""
        for image, grid in self.grids.items():
            if self.family.stages:
                if tokens == image:
                    return grid, 0
                continue
            text = tokens - image - self.appended
            known = text in (0, self.text) or (self.family.drops_padding and 0 < text < self.text)
            if known:
                return grid, text if self.family.text == "first" else 0
        return None

    def scale(self, scale: float | None, head_dim: int, keys: int) -> float | None:
        """The factor on the scores, with the temperature."""
        if self.temperature == "none":
            return scale
        factor = self.temperature
        if factor == "proportional":
            factor = math.sqrt(math.log(keys) / math.log(self.train_tokens))
        return (head_dim**-0.5 if scale is None else scale) * factor

    def collect(self) -> None:
        """Add up what the attention hooks did since the last time. Never traced."""
        ran = [hook for hook in self.hooks if hook.tally is not None]
        if not ran:
            return
        sparse = False
        for hook in ran:
            (done, left), note = hook.tally, hook.note
            hook.tally = hook.note = None
            hook.calls["sparse"] += done
            hook.calls["dense"] += left
            sparse |= done > 0
            if hook.sparse and not done and note is None:
                note = (
                    f"{self.family.name}: attached modules ran without calling scaled_dot_product_attention on the image tokens, so "
                    "they stayed dense; an attention backend other than native was set after attaching, or the processor was changed"
                )
            if note is not None:
                self.warn(note)
        self.forwards["sparse" if sparse else "dense"] += 1

    def warn(self, note: str) -> None:
        if self.strict:
            raise AttachError(note)
        if note not in self.warnings:
            warnings.warn(note, stacklevel=2)
        self.warnings[note] = self.warnings.get(note, 0) + 1


class RootHook(ModelHook):
    """On the denoiser: finds grid, text length and step before each call."""

    _is_stateful = True

    def __init__(self, context: Context, parameters: list[str], run: Any) -> None:
        super().__init__()
        self.context, self.parameters, self.run = context, parameters, run
        self.announcements = Announcements(self.announce)

    def announce(self, announced: Any | None) -> None:
        context = self.context
        context.collect()
        context.steps.announced, context.announced = announced, announced is not None
        # With a step known here, also a model compiled as a whole follows the schedule.
        if announced is not None and (context.steps.current(None, False)[0] is not None or not context.schedule.needs_step):
            context.decide(None)
        else:
            context.announced = False

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.context.collect()
        self.context.steps.reset()
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any):
        context = self.context
        call = dict(zip(self.parameters, args)) | kwargs
        if not torch.compiler.is_compiling():
            context.collect()
            context.ranks = parallel_ranks(module, context)
            if not context.announced:
                context.decide(call.get("timestep"))
        elif not context.announced and (context.schedule.needs_step or context.schedule.calls != "both"):
            raise AttachError(
                "dense_steps, dense_last_steps and calls are decided outside of compiled code, and here the whole model is compiled "
                "and its pipeline does not announce the step; compile with compile_repeated_blocks() instead, or leave them at "
                "their defaults"
            )
        context.measure(call)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.context.collect()
        return output


def parallel_ranks(module: torch.nn.Module, context: Context) -> int:
    """Processes that share one sequence by Ulysses parallelism; refuses what a position-dependent pattern cannot follow."""
    parallel = getattr(module, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return 1
    if config.ring_degree > 1:
        raise AttachError("ring attention splits the keys, and patterns depend on their positions; use ulysses_degree instead")
    order = module._diffusers_hook._hook_order
    ours = next(i for i, name in enumerate(order) if module._diffusers_hook.hooks[name].__class__ is RootHook)
    if any(name.startswith("cp_input") for name in order[ours + 1 :]):
        raise AttachError("context parallelism was enabled after attaching, so the sizes of the image are hidden; attach after it")
    if config.ulysses_anything and context.family.text != "none":
        raise AttachError("ulysses_anything shares text and image unevenly, so their order is not known; use plain ulysses_degree")
    if torch.is_grad_enabled():
        raise AttachError("context parallelism computes gradients of dense attention; run under torch.no_grad()")
    return config.ulysses_degree


class AttentionHook(ModelHook):
    """On an attention module: runs it with `scaled_dot_product_attention` taken over."""

    def __init__(self, context: Context, layer: int, always_dense: bool) -> None:
        super().__init__()
        self.context, self.layer, self.always_dense = context, layer, always_dense
        self.calls = {"sparse": 0, "dense": 0}
        self.sparse = not always_dense
        # Written inside compiled regions, never read there:
        self.tally: tuple[int, int] | None = None
        self.note: str | None = None
        self.grid: Grid | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.sparse:
            self.tally = (0, 1)
            return self.fn_ref.original_forward(*args, **kwargs)
        mode = Interception(self.context)
        with mode:
            output = self.fn_ref.original_forward(*args, **kwargs)
        self.tally, self.note = (mode.done, mode.left), mode.note
        if mode.done:
            self.grid = mode.grid
        return output


class Interception(TorchFunctionMode):
    """Replaces self-attention over the image tokens; every other function runs as it is."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.done = self.left = self.samples = 0
        self.note: str | None = None
        self.grid: Grid | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attention(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        context, tokens = self.context, int(query.shape[-2])
        if query.ndim != 4 or key.shape[-2] != tokens:  # cross-attention, image prompts
            return F.scaled_dot_product_attention(query, key, value, **given)
        place = context.place(tokens)
        note = None
        if place is None:
            sizes = " or ".join(str(n) for n in context.grids)
            note = (
                f"{context.family.name}: attention over {tokens} tokens is left dense: the grid has {sizes}, and the text {context.text}; "
                "the pipeline appends tokens that have no place on the grid"
            )
        elif dropout_p > 0 or is_causal:
            note = f"{context.family.name}: attention with dropout or a causal mask is left dense"
        elif attn_mask is not None:
            note = mask_trouble(attn_mask, tokens, place, context)
        if note is not None:
            if context.strict:
                raise AttachError(note)
            self.left, self.note = self.left + 1, note
            return F.scaled_dot_product_attention(query, key, value, **given)

        self.done, (self.grid, start) = self.done + 1, place
        scale = context.scale(scale, int(query.shape[-1]), tokens)
        cut = 0
        if context.half is not None:  # samples below the cut are unconditional
            batch = int(query.shape[0])
            cut = min(max(context.batch // 2 - self.samples, 0), batch)
            self.samples += batch
        if not cut and context.half != "uncond":
            return sparse(context, query, key, value, attn_mask, self.grid, start, scale, enable_gqa)
        parts = []
        for rows, name in ((slice(None, cut), "uncond"), (slice(cut, None), "cond")):
            q, k, v = query[rows], key[rows], value[rows]
            mask = attn_mask if attn_mask is None or attn_mask.shape[0] == 1 else attn_mask[rows]
            if not q.shape[0]:
                continue
            if name == context.half:
                parts.append(sparse(context, q, k, v, mask, self.grid, start, scale, enable_gqa))
            else:
                parts.append(F.scaled_dot_product_attention(q, k, v, **{**given, "attn_mask": mask}))
        return torch.cat(parts)


def sparse(context: Context, q, k, v, mask, grid: Grid, start: int, scale: float | None, enable_gqa: bool) -> torch.Tensor:
    """One intercepted call, in the token order the family promises."""
    order = None
    if context.ranks > 1 and q.shape[2] > math.prod(grid):
        image = math.prod(grid) + context.appended
        sizes = (start, image) if context.family.text == "first" else (image, q.shape[2] - image)
        order = torch.tensor(gathered_order(context.ranks, *sizes), device=q.device)
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
        mask = None if mask is None else mask.index_select(3, order)
    if torch.compiler.is_compiling():
        out = traced_attention(q, k, v, mask, context.key, list(grid), start, scale, enable_gqa)
    else:
        out = joint_attention(q, k, v, mask, context.pattern, grid, start, scale, enable_gqa, context.backend)
    return out if order is None else torch.empty_like(out).index_copy_(2, order, out)


def mask_trouble(mask: torch.Tensor, tokens: int, place: tuple[Grid, int], context: Context) -> str | None:
    """Why a mask cannot be combined with a pattern, or None when it only hides text.

    Whether it hides image tokens is read from the mask where that is free (on the CPU, outside compiled code). Elsewhere it would stall the
    device, and the families whose processors build a mask set it to True over the image by construction.
    """
    grid, start = place
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, tokens) or context.family.text == "none":
        return (
            f"{context.family.name}: attention with a {str(mask.dtype).removeprefix('torch.')} mask {list(mask.shape)} is left dense; "
            "only a bool mask [batch, 1, 1, tokens] over text keys goes with a pattern"
        )
    if context.ranks == 1 and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if not mask[..., start : start + math.prod(grid)].all():
            return f"{context.family.name}: attention with a mask that hides image tokens is left dense"
    return None
