"""The hooks of IRDiffusion: self-attention by groups of tokens, and answers to the prompt of a reference."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.hooks.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from vision_attn.diffusion.attachment import self_attention
from vision_attn.diffusion.context import Context
from vision_attn.diffusion.families import FAMILIES, Family, Grid, family_of
from vision_attn.diffusion.schedule import Schedule, Steps
from vision_attn.diffusion.subjects import Cast, Group, size_trouble
from vision_attn.hosts import AttachError
from vision_attn.kernels.patterns import Dense

if TYPE_CHECKING:
    from vision_attn.diffusion.methods.isolation import IRDiffusion

HOOK = "vision_attn_subjects"


def subject_layers(module: torch.nn.Module) -> tuple[Family, dict, dict[str, torch.nn.Module]]:
    """The family of a denoiser, its self-attention as `self_attention` gives it, and its attention to the text.

    Raises:
        ValueError: a class without attention to the text as a layer of its own, or one with image prompts in it.
    """
    family = family_of(module, None)
    if family.text != "none":
        apart = ", ".join(name for name, each in FAMILIES.items() if each.text == "none" and not each.refuse)
        raise ValueError(
            f"{family.name} has one attention for text and image, and subjects are kept apart, moved and found by "
            f"attention to the text alone, which {apart} have"
        )
    layers = self_attention(module, family)
    names = [name.removesuffix("attn1") + "attn2" for name in layers]
    crosses = {name: module.get_submodule(name) for name in names}
    if any(getattr(layer, "add_k_proj", None) is not None for layer in crosses.values()):
        raise ValueError(f"this {family.name} mixes an image prompt into its attention to the text; give one without")
    return family, layers, crosses


class State:
    """What the hooks of one denoiser share."""

    def __init__(self, method: IRDiffusion, pipe: Any, module: torch.nn.Module, family: Family) -> None:
        options = dict(pattern=Dense(), backend=None, strict=False, temperature="none", train_tokens=None, grid=None)
        self.context = Context(family, getattr(module, "config", None), Schedule(), Steps(pipe), options)
        self.method = method
        self.counts = {"isolation": 0, "reposition": 0, "cross": 0}
        self.casts: dict[tuple[Grid, torch.device], Cast] = {}
        self.groups: dict[tuple[int, bool], list[list[Group]]] = {}
        self.generator = torch.Generator().manual_seed(method.seed)

    def cast(self, hidden: torch.Tensor) -> Cast:
        """The masks at the grid of a layer's input `[batch, tokens, dim]`."""
        method, context = self.method, self.context
        name = context.family.name
        if torch.compiler.is_compiling():
            raise AttachError("IRDiffusion does not run in compiled code; attach it to a model that is not compiled")
        if context.ranks > 1:
            raise AttachError("IRDiffusion needs the whole picture on one device; turn context parallelism off")
        if hidden.shape[0] % method.pictures:
            raise AttachError(
                f"a batch of {hidden.shape[0]} in {name}, where the masks are for {method.references} references and "
                f"then {len(method.target_masks)} targets, or a multiple of these {method.pictures} pictures"
            )
        place = context.place(int(hidden.shape[1]))
        if place is None:
            grids = " or ".join(map(str, context.grids))
            raise AttachError(f"attention over {hidden.shape[1]} tokens in {name}, where the grid has {grids}")
        key = place[0], hidden.device
        if key not in self.casts:
            whole = max(context.grids.values(), key=math.prod)
            references = method.reference_masks
            for masks, leading in ((method.target_masks, 2), (references, 1)):
                trouble = None if masks is None else size_trouble(masks, whole, leading)
                if trouble is not None:
                    raise AttachError(f"{name}: {trouble}")
            self.casts[key] = Cast.at(method.target_masks, references, place[0], hidden.device)
        return self.casts[key]

    def grouped(self, cast: Cast, moved: bool) -> list[list[Group]]:
        """Per target, its tokens by what they see; dropout draws anew which see their reference."""
        method, key = self.method, (id(cast), moved)
        if key not in self.groups or (moved and method.dropout):
            inside = cast.inside
            if moved and method.dropout:
                chance = torch.rand(inside.shape, generator=self.generator)
                inside = inside & (chance >= method.dropout).to(inside.device)
            self.groups[key] = [
                cast.groups(p, method.isolation, masks if moved else None) for p, masks in enumerate(inside)
            ]
        return self.groups[key]


class SelfHook(ModelHook):
    """On a self-attention layer: isolation, and reposition from the first layer that has it."""

    def __init__(self, state: State, moved: bool) -> None:
        super().__init__()
        self.state, self.moved = state, moved

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        method, call = state.method, bound(module, args, kwargs)
        hidden = call["hidden_states"]
        cast = state.cast(hidden)
        moves = cast.moves if self.moved else {}
        batch, tokens, width = hidden.shape
        pictures = torch.arange(batch, device=hidden.device).view(-1, method.pictures)
        targets = pictures[:, method.references :]
        keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for s in dict.fromkeys(s for _, s in moves):
            moved = hidden.new_zeros(*targets.shape, tokens, width)
            for p in range(targets.shape[1]):
                if (p, s) in moves:
                    source, place = moves[p, s]
                    moved[:, p, place] = hidden[pictures[:, s]][:, source]
            rows = rows_of(call, targets.flatten(), batch)
            with Projected() as seen:
                self.fn_ref.original_forward(**{**rows, "hidden_states": moved.flatten(0, 1)})
            keys[s] = tuple(x.unflatten(0, targets.shape) for x in seen.kv)
        groups = state.grouped(cast, bool(moves))
        state.counts["isolation"] += method.isolation
        state.counts["reposition"] += bool(moves)
        with Grouped(targets, groups, keys, moves):
            return self.fn_ref.original_forward(*args, **kwargs)


class CrossHook(ModelHook):
    """On an attention layer to the text: inside a subject, blend in the answer to the prompt of its reference."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        method, call = state.method, bound(module, args, kwargs)
        hidden, text = call["hidden_states"], call["encoder_hidden_states"]
        if not isinstance(text, torch.Tensor):
            raise AttachError("mutual cross-attention does not go with image prompts (IP-Adapter); pass cross=0")
        own = self.fn_ref.original_forward(*args, **kwargs)
        inside, batch = state.cast(hidden).inside, int(hidden.shape[0])
        pictures = torch.arange(batch, device=hidden.device).view(-1, method.pictures)
        total, count = torch.zeros_like(own), own.new_zeros(batch, hidden.shape[1], 1)
        for s in range(method.references):
            present = inside[:, s].any(1).nonzero()[:, 0]
            if not len(present):
                continue
            targets = pictures[:, method.references + present]
            prompts = pictures[:, s, None].expand_as(targets).flatten()
            rows = rows_of({k: v for k, v in call.items() if k != "hidden_states"}, prompts, batch)
            answer = self.fn_ref.original_forward(hidden_states=hidden[targets.flatten()], **rows)
            share = inside[present, s].to(own.dtype).repeat(len(pictures), 1)[..., None]
            total.index_add_(0, targets.flatten(), answer * share)
            count.index_add_(0, targets.flatten(), share)
        state.counts["cross"] += 1
        mixed = method.cross * (total / count.clamp(min=1)) + (1 - method.cross) * own
        return torch.where(count > 0, mixed, own)


def bound(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def rows_of(call: dict[str, Any], rows: torch.Tensor, batch: int) -> dict[str, Any]:
    """The arguments with these samples of every tensor that has one entry per sample."""

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        each = isinstance(value, torch.Tensor) and value.ndim > 2 and len(value) == batch  # else it is for all samples
        return value[rows] if each else value

    return {name: pick(value) for name, value in call.items()}


class Projected(TorchFunctionMode):
    """Notes the keys and values of an attention call, and skips the attention."""

    kv: tuple[torch.Tensor, torch.Tensor]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        self.kv = call["key"], call["value"]
        return torch.zeros_like(call["query"])


class Grouped(TorchFunctionMode):
    """Attention in which the tokens of the targets see what their group sees; references see themselves."""

    def __init__(self, targets: torch.Tensor, groups: list, keys: dict, moves: dict) -> None:
        super().__init__()
        self.targets, self.groups, self.keys, self.moves = targets, groups, keys, moves

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attention(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if attn_mask is not None or is_causal or dropout_p or query.shape[-2] != key.shape[-2]:
            raise AttachError("IRDiffusion met self-attention with a mask, dropout or other keys, and left it undone")
        whole = all(len(groups) == 1 and groups[0].keys is None and not groups[0].subjects for groups in self.groups)
        if whole:
            return F.scaled_dot_product_attention(query, key, value, **options)
        out = torch.empty_like(query)
        references = torch.ones(len(query), dtype=torch.bool, device=query.device)
        references[self.targets.flatten()] = False
        if references.any():
            out[references] = F.scaled_dot_product_attention(
                query[references], key[references], value[references], **options
            )
        for p, groups in enumerate(self.groups):
            rows = self.targets[:, p]
            q, k, v = query[rows], key[rows], value[rows]
            result = torch.empty_like(q)
            for group in groups:
                own = [x if group.keys is None else x[:, :, group.keys] for x in (k, v)]
                moved = [tuple(x[:, p][:, :, self.moves[p, s][1]] for x in self.keys[s]) for s in group.subjects]
                parts = [torch.cat([x, *others], 2) for x, *others in zip(own, *moved, strict=True)]
                result[:, :, group.rows] = F.scaled_dot_product_attention(q[:, :, group.rows], *parts, **options)
            out[rows] = result
        return out
