"""What every attachment has in common: changes put into modules, how they come out, and who holds which part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName

# Parts of a denoiser that one attachment at a time may take over.
SELF_ATTENTION, CROSS_ATTENTION, ROTARY = "self-attention", "cross-attention", "rotary embedding"

_HELD = "_vision_attn_held"  # attribute of a denoiser while something is attached: part -> Installed


class Installed:
    """Something put into denoisers: a context manager that takes it out at the end, also after an exception.

    A subclass calls, inside `with self.installing():`, `claim` once per denoiser and then `hook`, `native_backend` and
    `later` for each change. `label` names it in messages.
    """

    label = ""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._denoisers: list[torch.nn.Module] = []

    @contextlib.contextmanager
    def installing(self) -> Iterator[None]:
        """Take everything out again when the block fails."""
        try:
            yield
        except BaseException:
            self.detach()
            raise
        for denoiser in self._denoisers:
            _forget_children(denoiser)

    def claim(self, denoiser: torch.nn.Module, *parts: str, replace: bool = False) -> None:
        """Take over parts of a denoiser, such as `SELF_ATTENTION`.

        Raises:
            ValueError: another attachment holds one of the parts; with `replace` it is detached instead.
        """
        refuse_or_replace(denoiser, *parts, label=self.label, replace=replace)
        held = vars(denoiser).setdefault(_HELD, {})
        held.update(dict.fromkeys(parts, self))
        self._denoisers.append(denoiser)

        def release() -> None:
            for part in parts:
                held.pop(part, None)
            if not held:
                vars(denoiser).pop(_HELD, None)

        self.later(release)

    def later(self, undo: Callable[[], None]) -> None:
        """Call `undo` at detach; what was put in last comes out first."""
        self._undo.append(undo)

    def hook(self, module: torch.nn.Module, hook: Any, name: str) -> None:
        """Register a diffusers `ModelHook` on a module, beneath those of accelerate."""
        had_registry, had_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
        self.later(lambda: _unhook(module, name, had_registry, had_forward))
        registry = HookRegistry.check_if_exists_or_initialize(module)
        with _Beneath(module):
            registry.register_hook(hook, name)

    def native_backend(self, processor: Any | None) -> str | None:
        """Make a processor call `scaled_dot_product_attention`, as other backends do not; returns what was replaced."""
        if not hasattr(processor, "_attention_backend"):
            return None
        own, before = "_attention_backend" in vars(processor), processor._attention_backend

        def restore() -> None:
            if processor._attention_backend is not AttentionBackendName.NATIVE:
                return  # somebody chose another one since
            if own:
                processor._attention_backend = before
            else:
                vars(processor).pop("_attention_backend", None)

        self.later(restore)
        processor._attention_backend = AttentionBackendName.NATIVE
        name = getattr(before, "value", before)
        return None if name in (None, "native") else str(name)

    def detach(self) -> None:
        """Take everything out again. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        for denoiser in self._denoisers:
            _forget_children(denoiser)

    def __enter__(self):
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self._undo else "detached from"
        return f"<{self.label} {state} {', '.join(type(denoiser).__name__ for denoiser in self._denoisers)}>"


def holders(denoiser: torch.nn.Module) -> dict[str, Installed]:
    """Who holds which part of a denoiser now."""
    return dict(vars(denoiser).get(_HELD, {}))


def refuse_or_replace(denoiser: torch.nn.Module, *parts: str, label: str, replace: bool = False) -> None:
    """Detach whoever holds one of the parts, or raise ValueError when `replace` is False."""
    for part in parts:
        holder = holders(denoiser).get(part)
        if holder is None:
            continue
        if not replace:
            raise ValueError(
                f"{type(denoiser).__name__} already has {holder.label} attached, and its {part} cannot also follow "
                f"{label}; detach() that run first, or pass replace=True"
            )
        holder.detach()


class _Beneath:
    """Puts our hook beneath those of accelerate (CPU offload).

    They keep the forward they wrap in `_old_forward`, and drop anything on top of them when they are renewed, which is
    after every pipeline call. Inside this block `forward` is the wrapped one.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.outer = module, None

    def __enter__(self) -> None:
        if hasattr(self.module, "_hf_hook") and "_old_forward" in vars(self.module):
            self.outer, self.module.forward = self.module.forward, self.module._old_forward

    def __exit__(self, *exception: Any) -> None:
        if self.outer is not None:
            self.module._old_forward, self.module.forward = self.module.forward, self.outer


def _unhook(module: torch.nn.Module, name: str, had_registry: bool, had_forward: bool) -> None:
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    if name in registry.hooks:
        with _Beneath(module):
            registry.remove_hook(name, recurse=False)
    if registry.hooks or had_registry:
        return
    del module._diffusers_hook
    # remove_hook leaves the class's own forward behind as an attribute of the instance.
    forward = vars(module).get("forward")
    if not had_forward and getattr(forward, "__func__", None) is type(module).forward:
        del module.forward


def _forget_children(module: torch.nn.Module) -> None:
    """diffusers keeps a list of hooked descendants; newer versions have to be told that it changed."""
    registry = getattr(module, "_diffusers_hook", None)
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()
