"""The hooks of FreeSwim: which samples of a call have a global copy, and what their attention does.

The batch of a call is `[local samples, global copies]`. The global copies are those of the last local samples, from
number `start` on: of all of them, of the conditional half of a `[uncond, cond]` batch, or of none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from diffusers.models.attention_dispatch import attention_backend
from torch.overrides import TorchFunctionMode

from vision_attn.diffusion.families import Family, Grid
from vision_attn.diffusion.schedule import Announcements, Steps
from vision_attn.hosts import AttachError
from vision_attn.joint import joint_attention
from vision_attn.kernels.patterns import Halo, Neighborhood

# Arguments of denoisers that hold one entry per sample; the others belong to the whole batch.
_PER_SAMPLE = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "encoder_attention_mask",
    "attention_mask", "condition_mask", "video_coords", "added_cond_kwargs",
)  # fmt: skip


class DualPath:
    """State of one denoiser, shared by its hooks."""

    def __init__(self, family: Family, config: Any, steps: Steps, options: Any, base: Grid, backend: str | None):
        self.family, self.config, self.steps, self.options, self.base = family, config, steps, options, base
        self.backend = backend
        self.factor = temperature(base) if options.temperature is None else float(options.temperature)
        self.memo: dict = {}
        self.grid: Grid | None = None
        self.cross: list[CrossHook] = []
        self.calls = {"dual": 0, "cached": 0, "local": 0}
        self.batch = self.start = 0
        self.fresh = False
        self.forget()

    def forget(self) -> None:
        """Start a new run: drop what was stored."""
        self._first = self._last = None
        self.steps.reset()
        self._drop()

    def plan(self, call: dict[str, Any]) -> None:
        """Decide which samples of the coming call have a global copy, and whether it is computed."""
        self.grid = self.family.grid(self.config, call, self.memo)
        if self.grid is None:
            raise AttachError(f"the token grid of this {self.family.name} call is not known; call it by its pipeline")
        self.batch = int(call["hidden_states"].shape[0])
        period = self.options.cache_steps
        if not self.options.override:
            self.start, self.fresh = self.batch, False
        elif period is None:
            self.start, self.fresh = 0, True
        else:
            self.start = self._start()
            self.fresh = self.start < self.batch and self._refresh(period, call.get("timestep"))
        self.calls["local" if self.start == self.batch else "dual" if self.fresh else "cached"] += 1

    def _start(self) -> int:
        """The first conditional sample."""
        name, pipe = self.steps.name, self.steps.pipe
        if name in ("cond", "uncond"):
            return 0 if name == "cond" else self.batch
        if getattr(pipe, "do_classifier_free_guidance", None) is False or (name is None and pipe is None):
            return 0
        if name == "cond_uncond" or (name is None and self.family.doubled_batch):
            return 0 if self.batch % 2 else self.batch // 2
        raise AttachError(
            f"FreeSwim(cache_steps={self.options.cache_steps}) needs to know which call is the conditional one, and "
            f"{type(pipe).__name__} does not announce it by cache_context (got {name!r}); use cache_steps=None"
        )

    def _refresh(self, period: int, timestep: Any) -> bool:
        step = self.steps.current(timestep, True)[0] or 0
        if self._last is None or step < self._last:
            self._drop()
            self._first = step
        self._last = step
        shape = (self.batch, self.start, self.grid)
        fresh = (step - self._first) % period == 0 or self._stored_for != shape
        self._stored_for = shape
        return fresh

    def _drop(self) -> None:
        self._stored_for: tuple | None = None
        for hook in self.cross:
            hook.stored = None

    @property
    def rows(self) -> int:
        """Samples in the call, copies included."""
        return self.batch + (self.batch - self.start if self.fresh else 0)

    def copy(self, value: Any) -> Any:
        """Append the global copies to whatever has one entry per sample."""
        if isinstance(value, torch.Tensor):
            alike = value.ndim and value.shape[0] == self.batch
            return torch.cat([value, value[self.start :]]) if alike else value
        if isinstance(value, dict):
            return {key: self.copy(entry) for key, entry in value.items()}
        return type(value)(map(self.copy, value)) if type(value) in (tuple, list) else value

    def scale(self, scale: float | None, head_dim: int) -> float:
        return (head_dim**-0.5 if scale is None else scale) * self.factor

    @property
    def pattern(self) -> Neighborhood | Halo:
        return window(self.grid, self.base, self.options.inward)


def temperature(base: Grid) -> float:
    """The published factor on the scores, `sqrt(ln(2 n) / ln(n))` for `n` tokens per frame of the training size.

    >>> round(temperature((30, 52)), 4)
    1.0461
    """
    tokens = math.prod(base)
    return math.sqrt(math.log(2 * tokens) / math.log(tokens))


def window(grid: Grid, base: Grid, inward: bool = True) -> Neighborhood | Halo:
    """The local path as a pattern: all frames, and in space a window about as large as the training grid.

    Args:
        grid: `(t, h, w)` or `(h, w)` in tokens.
        base: `(h, w)` of the training size.
        inward: at a border the window moves inward and keeps its size; otherwise it is cut off there.

    >>> window((21, 68, 120), (30, 52))
    Neighborhood(window=(21, 31, 53), stride=1, dilation=1, causal=False)
    """
    half = tuple(n // 2 for n in base)
    frames = grid[:-2]
    if inward:
        return Neighborhood(window=frames + tuple(min(2 * a + 1, n) for a, n in zip(half, grid[-2:], strict=True)))
    return Halo(block=(1,) * len(grid), halo=frames + half)


class RootHook(ModelHook):
    """On the denoiser: appends the global copies to the batch, and takes them off the result."""

    _is_stateful = True

    def __init__(self, path: DualPath, parameters: list[str]) -> None:
        super().__init__()
        self.path, self.parameters = path, parameters
        self.announcements = Announcements(self.announce)

    def announce(self, announced: Any | None) -> None:
        self.path.steps.announced = announced

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.path.forget()
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = self.path
        if torch.compiler.is_compiling():
            raise AttachError("FreeSwim decides outside of compiled code; use compile_repeated_blocks() instead")
        if getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) is not None:
            raise AttachError("FreeSwim does not run under context parallelism; disable it, or attach a pattern")
        call = dict(zip(self.parameters, args, strict=False)) | kwargs
        path.plan(call)
        if path.fresh:
            call = {name: path.copy(value) if name in _PER_SAMPLE else value for name, value in call.items()}
        output = self.fn_ref.original_forward(**call)
        if not path.fresh:
            return output
        if isinstance(output, tuple):
            return (output[0][: path.batch], *output[1:])
        return type(output)(sample=output.sample[: path.batch])


class SelfHook(ModelHook):
    """On self-attention: the local samples follow the window, the global copies see everything."""

    def __init__(self, path: DualPath) -> None:
        super().__init__()
        self.path = path

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self.fn_ref.original_forward, module, _SelfAttention(self.path), args, kwargs)


class CrossHook(ModelHook):
    """On cross-attention: what the global copy gets from the text also goes to the local sample."""

    def __init__(self, path: DualPath) -> None:
        super().__init__()
        self.path = path
        self.stored: torch.Tensor | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.path.start == self.path.batch:
            return self.fn_ref.original_forward(*args, **kwargs)
        # Wan's image-to-video models ask the image first, and its answer stays each copy's own.
        before_text = 1 if getattr(module, "add_k_proj", None) is not None else 0
        return _run(self.fn_ref.original_forward, module, _CrossAttention(self, before_text), args, kwargs)


def _run(forward: Any, module: torch.nn.Module, mode: _Mode, args: tuple, kwargs: dict) -> Any:
    if hasattr(getattr(module, "processor", None), "_attention_backend") or torch.compiler.is_compiling():
        with mode:
            output = forward(*args, **kwargs)
    else:  # a processor without a backend of its own follows the one that is active in the process
        with mode, attention_backend("native"):
            output = forward(*args, **kwargs)
    if not mode.done:
        raise AttachError(
            f"FreeSwim: {type(module).__name__} ran without calling scaled_dot_product_attention as expected; an "
            "attention backend other than native was set after attaching, or the processor was changed"
        )
    return output


class _Mode(TorchFunctionMode):
    """Takes over `scaled_dot_product_attention`; every other function runs as it is."""

    done = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))


class _SelfAttention(_Mode):
    def __init__(self, path: DualPath) -> None:
        super().__init__()
        self.path = path

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        q, k, v, path, tokens = query, key, value, self.path, math.prod(self.path.grid)
        expected = q.shape[0] == path.rows and q.shape[-2] == k.shape[-2] == tokens
        if not expected or attn_mask is not None or dropout_p or is_causal:
            raise AttachError(
                f"FreeSwim: expected self-attention of {path.rows} samples over the {tokens} tokens of the grid "
                f"{path.grid} without mask or dropout; got {list(q.shape)} and {list(k.shape)}"
            )
        self.done = True
        scale, own = path.scale(scale, q.shape[-1]), slice(None, path.batch)
        options = dict(scale=scale, enable_gqa=enable_gqa)
        local = joint_attention(
            q[own], k[own], v[own], None, path.pattern, path.grid, 0, True, backend=path.backend, **options
        )
        if not path.fresh:
            return local
        copies = slice(path.batch, None)
        return torch.cat([local, F.scaled_dot_product_attention(q[copies], k[copies], v[copies], **options)])


class _CrossAttention(_Mode):
    def __init__(self, hook: CrossHook, before_text: int) -> None:
        super().__init__()
        self.hook, self.path, self.before_text, self.seen = hook, hook.path, before_text, 0

    def attention(self, query, key, value, attn_mask=None, **options):
        self.seen += 1
        if self.seen != self.before_text + 1:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
        self.done, path = True, self.path

        def answer(rows: slice) -> torch.Tensor:
            mask = attn_mask if attn_mask is None or attn_mask.shape[0] == 1 else attn_mask[rows]
            return F.scaled_dot_product_attention(query[rows], key[rows], value[rows], attn_mask=mask, **options)

        own = [answer(slice(None, path.start))] if path.start else []
        if not path.fresh:
            return torch.cat([*own, self.hook.stored.to(query.device, non_blocking=True)])
        shared = answer(slice(path.batch, None))
        if path.options.cache_steps is not None:
            self.hook.stored = shared.to(path.options.cache_device or shared.device)
        return torch.cat([*own, shared, shared])
