"""The hooks of an attached denoiser.

The root hook runs before the denoiser and writes plain values into a `Context`: grid, text length, and per attention
module whether it is sparse now. The attention hook runs a module inside a function mode that takes over
`scaled_dot_product_attention`, and leaves projections, rotary embeddings, LoRA and everything else to the module. Code
that `torch.compile` may trace reads only bools and sizes from the context and only writes its tallies; counting and
step keeping happen outside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from diffusers.models.attention_dispatch import attention_backend
from torch.overrides import TorchFunctionMode

from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import Grid
from vision_attn.diffusion.schedule import Announcements
from vision_attn.diffusion.ulysses import gathered_order
from vision_attn.hosts import AttachError
from vision_attn.joint import joint_attention
from vision_attn.kernels.patterns import Dense, Pattern


class RootHook(ModelHook):
    """On the denoiser: finds grid, text length and step before each call."""

    _is_stateful = True

    def __init__(self, context: Context, parameters: list[str]) -> None:
        super().__init__()
        self.context, self.parameters = context, parameters
        self.announcements = Announcements(self.announce)

    def announce(self, announced: Any | None) -> None:
        context = self.context
        context.collect()
        context.steps.announced, context.announced = announced, announced is not None
        known = context.steps.current(None, False)[0] is not None
        # With the step known here, a model compiled as a whole follows the schedule too.
        if announced is not None and (known or not context.schedule.needs_step):
            context.decide(None)
        else:
            context.announced = False

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.context.collect()
        self.context.steps.reset()
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any):
        context = self.context
        call = dict(zip(self.parameters, args, strict=False)) | kwargs
        if not torch.compiler.is_compiling():
            context.collect()
            context.ranks = parallel_ranks(module, context)
            if not context.announced:
                context.decide(call.get("timestep"))
        elif not context.announced and (context.schedule.needs_step or context.schedule.calls != "both"):
            raise AttachError(
                "dense_steps, dense_last_steps and calls are decided outside of compiled code, and here the whole "
                "model is compiled and its pipeline does not announce the step; compile with "
                "compile_repeated_blocks() instead, or leave them at their defaults"
            )
        context.measure(call)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.context.collect()
        return output


def parallel_ranks(module: torch.nn.Module, context: Context) -> int:
    """Processes that share one sequence by Ulysses parallelism; refuses what a pattern cannot follow."""
    parallel = getattr(module, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return 1
    if config.ring_degree > 1:
        raise AttachError("ring attention splits the keys, whose positions patterns need; use ulysses_degree instead")
    order = module._diffusers_hook._hook_order
    ours = next(i for i, name in enumerate(order) if module._diffusers_hook.hooks[name].__class__ is RootHook)
    if any(name.startswith("cp_input") for name in order[ours + 1 :]):
        raise AttachError(
            "context parallelism was enabled after attaching, which hides the image size; attach after it"
        )
    if config.ulysses_anything and context.family.text != "none":
        raise AttachError("ulysses_anything splits text and image unevenly, so their order is lost; use ulysses_degree")
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

    def mode(self) -> Interception | None:
        """What takes over; None where that would change nothing, because it costs a little with every function."""
        context = self.context
        if context.cut is not None:  # what is dense needs the tokens of other ranks, too
            return Interception(context, self.layer, not self.sparse)
        if not torch.compiler.is_compiling() and len(context.grids) == 1 and context.temperature == "none":
            (grid,) = context.grids.values()
            if context.plan(grid, self.layer)[1]:
                self.grid = grid
                return None
        return Interception(context, self.layer)

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.sparse and self.context.cut is None:
            self.tally = (0, 1)
            return self.fn_ref.original_forward(*args, **kwargs)
        mode = self.mode()
        if mode is None:
            self.tally = (1, 0)
            return self.fn_ref.original_forward(*args, **kwargs)
        if hasattr(getattr(module, "processor", None), "_attention_backend") or torch.compiler.is_compiling():
            with mode:
                output = self.fn_ref.original_forward(*args, **kwargs)
        else:  # a processor without a backend of its own follows the one that is active in the process
            with mode, attention_backend("native"):
                output = self.fn_ref.original_forward(*args, **kwargs)
        self.tally, self.note = (mode.done, mode.left), mode.note
        if mode.done:
            self.grid = mode.grid
        return output


class Interception(TorchFunctionMode):
    """Replaces self-attention over the image tokens; every other function runs as it is."""

    def __init__(self, context: Context, layer: int, dense: bool = False) -> None:
        super().__init__()
        self.context, self.layer, self.dense = context, layer, dense
        self.done = self.left = self.samples = 0
        self.note: str | None = None
        self.grid: Grid | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attention(*args, **kwargs)

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        given = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        context, tokens = self.context, int(query.shape[-2])
        if query.ndim != 4 or key.shape[-2] != tokens:  # cross-attention, image prompts
            return F.scaled_dot_product_attention(query, key, value, **given)
        place = context.place(tokens)
        note = None
        if place is None:
            sizes = " or ".join(str(n) for n in context.grids)
            note = (
                f"{context.family.name}: attention over {tokens} tokens is left dense: the grid has {sizes}, and the "
                f"text {context.text}; the pipeline appends tokens that have no place on the grid"
            )
        elif dropout_p > 0 or is_causal:
            note = f"{context.family.name}: attention with dropout or a causal mask is left dense"
        elif attn_mask is not None:
            note = mask_trouble(attn_mask, tokens, place, context)
        if note is not None:
            if context.strict or context.cut is not None:
                raise AttachError(note)
            self.left, self.note = self.left + 1, note
            return F.scaled_dot_product_attention(query, key, value, **given)
        if self.dense:
            self.left += 1
            return self.plain(query, key, value, place, given)

        self.done, self.grid = self.done + 1, place[0]
        others = 0 if context.cut is None else math.prod(place[0]) - math.prod(context.cut.own)
        sparse_scale = context.scale(scale, int(query.shape[-1]), tokens + others)
        cut = 0
        if context.half is not None:  # samples below the cut are unconditional
            batch = int(query.shape[0])
            cut = min(max(context.batch // 2 - self.samples, 0), batch)
            self.samples += batch
        if not cut and context.half != "uncond":
            return self.compute(query, key, value, attn_mask, place, sparse_scale, enable_gqa)
        parts = []
        for rows, name in ((slice(None, cut), "uncond"), (slice(cut, None), "cond")):
            q, k, v = query[rows], key[rows], value[rows]
            mask = attn_mask if attn_mask is None or attn_mask.shape[0] == 1 else attn_mask[rows]
            if not q.shape[0]:
                continue
            if name == context.half:
                parts.append(self.compute(q, k, v, mask, place, sparse_scale, enable_gqa))
            else:
                parts.append(self.plain(q, k, v, place, {**given, "attn_mask": mask}))
        return torch.cat(parts)

    def plain(self, q, k, v, place: tuple[Grid, int, bool], given: dict[str, Any]):
        """Dense attention over all tokens, those of other ranks included."""
        if self.context.cut is None:
            return F.scaled_dot_product_attention(q, k, v, **given)
        return over_ranks(
            self.context, Dense(), q, k, v, given["attn_mask"], place, given["scale"], given["enable_gqa"]
        )

    def compute(self, q, k, v, mask, place: tuple[Grid, int, bool], scale: float | None, enable_gqa: bool):
        return sparse(self.context, self.layer, q, k, v, mask, place, scale, enable_gqa)


def sparse(
    context: Context, layer: int, q, k, v, mask, place: tuple[Grid, int, bool], scale: float | None, enable_gqa: bool
):
    """One intercepted call: the pattern, after putting tokens into the order that the family promises."""
    order, (grid, start, alone) = None, place
    pattern, full = context.plan(grid, layer)
    if context.cut is not None:
        return over_ranks(context, Dense() if full else pattern, q, k, v, mask, place, scale, enable_gqa)
    if full:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    if context.ranks > 1 and not alone:
        image = math.prod(grid) + context.appended
        sizes = (start, image) if context.family.text == "first" else (image, q.shape[2] - image)
        order = torch.tensor(gathered_order(context.ranks, *sizes), device=q.device)
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
        mask = None if mask is None else mask.index_select(3, order)
    out = joint_attention(q, k, v, mask, pattern, grid, start, alone, scale, enable_gqa, context.backend)
    return out if order is None else torch.empty_like(out).index_copy_(2, order, out)


def over_ranks(context: Context, pattern: Pattern, q, k, v, mask, place, scale: float | None, enable_gqa: bool):
    """One call on the tokens of this rank; the text is the same on all."""
    _, start, alone = place
    if torch.is_grad_enabled() and not alone:
        raise AttachError("parallel= has no gradients where text is part of the sequence; run under torch.no_grad()")
    cut = context.cut
    return joint_attention(
        q, k, v, mask, pattern, cut.own, start, alone, scale, enable_gqa, context.backend, cut.shards
    )  # fmt: skip


def mask_trouble(mask: torch.Tensor, tokens: int, place: tuple[Grid, int, bool], context: Context) -> str | None:
    """Why a mask cannot be combined with a pattern, or None when it only hides text.

    Whether it hides image tokens is read from the mask where that is free: on the CPU, outside compiled code. Elsewhere
    it would stall the device, and the families whose processors build a mask set it to True over the image by
    construction.
    """
    grid, start, _ = place
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, tokens) or context.family.text == "none":
        return (
            f"{context.family.name}: attention with a {str(mask.dtype).removeprefix('torch.')} mask "
            f"{list(mask.shape)} is left dense; only a bool mask [batch, 1, 1, tokens] over text keys goes with a "
            f"pattern"
        )
    if context.ranks == 1 and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if not mask[..., start : start + math.prod(grid)].all():
            return f"{context.family.name}: attention with a mask that hides image tokens is left dense"
    return None
