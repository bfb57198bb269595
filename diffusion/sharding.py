"""A denoiser whose image tokens are cut along one axis of their grid over the ranks of a process group.

Every rank calls the denoiser with the same arguments and gets the same, whole result. In between each has the tokens of
its own rows, and all of the text; only attention needs tokens of others, and exchanges what its pattern reaches.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.hooks import ModelHook

from vision_attn.diffusion.families import Family, Grid
from vision_attn.hosts import AttachError
from vision_attn.kernels.exchange import SumOfParts
from vision_attn.kernels.parallel import Shards, rank_in
from vision_attn.kernels.routes import spans


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where the image tokens of a denoiser pass, as module name -> what -> its dimension of tokens.

    Args:
        arguments: of modules ("" is the denoiser), by name; one that has another number of tokens there is left alone.
        results: of modules, by number.
        end: the last module that works token by token; its result is put together again.
    """

    arguments: dict[str, dict[str, int]]
    results: dict[str, dict[int, int]] = dataclasses.field(default_factory=dict)
    end: str = "proj_out"


SEQUENCES = {
    "WanTransformer3DModel": Sequence({"": {"timestep": 1}, "blocks.0": {"hidden_states": 1}}, {"rope": {0: 1, 1: 1}}),
    "FluxTransformer2DModel": Sequence({"": {"hidden_states": 1, "img_ids": -2}}),
    "QwenImageTransformer2DModel": Sequence({"": {"hidden_states": 1}}, {"pos_embed": {0: 0}}),
    "LTXVideoTransformer3DModel": Sequence({"": {"hidden_states": 1, "timestep": 1}}, {"rope": {0: 1, 1: 1}}),
}
# Arguments with values for every image token, in forms that are not cut.
_UNCUT = ("controlnet_block_samples", "controlnet_single_block_samples")


def check_shards(module: torch.nn.Module, family: Family, shards: Shards) -> None:
    """Raise TypeError or ValueError when a denoiser cannot be cut in this way."""
    name = type(module).__name__
    rank_in(shards)
    if family.name not in SEQUENCES:
        raise ValueError(
            f"parallel= is not known for {name}; these can be cut: {', '.join(SEQUENCES)}. A pipeline of another class "
            "can share out its prompts instead: one process per GPU, each with some of them"
        )
    if not 0 <= shards.axis < len(family.axes):
        raise ValueError(
            f"Shards(axis={shards.axis}): the grid of {name} is ({', '.join(family.axes)}), axes 0 to "
            f"{len(family.axes) - 1}"
        )
    if getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise ValueError(
            "parallel= and the context parallelism of diffusers both cut the sequence; use one: attach without "
            "parallel= to follow diffusers, or do not call enable_parallelism()"
        )


class Cut:
    """The rows of this rank, for the grid of the current call."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.rank = shards, rank_in(shards)
        self.ranks = dist.get_world_size(shards.group)
        self.grid: Grid = ()
        self.rows: tuple[tuple[int, int], ...] = ()

    def measure(self, grid: Grid) -> None:
        """Share the rows of a grid out, as evenly as they go."""
        rows, self.grid = grid[self.shards.axis], grid
        if rows < self.ranks:
            raise AttachError(
                f"the grid {grid} has {rows} rows along axis {self.shards.axis}, fewer than the {self.ranks} ranks; "
                "cut another axis, or take fewer ranks"
            )
        self.rows = spans(tuple(rows // self.ranks + (rank < rows % self.ranks) for rank in range(self.ranks)))

    @property
    def own(self) -> Grid:
        """Sizes of what this rank has."""
        first, stop = self.rows[self.rank]
        axis = self.shards.axis
        return (*self.grid[:axis], stop - first, *self.grid[axis + 1 :])

    def split(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tokens of this rank, along dimension `dim`."""
        dim, (first, stop) = dim % tensor.ndim, self.rows[self.rank]
        part = tensor.unflatten(dim, self.grid).narrow(dim + self.shards.axis, first, stop - first)
        return part.flatten(dim, dim + len(self.grid) - 1)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """All tokens, from those of every rank, along dimension 1. Gradients stay with their rank."""
        dim, (first, stop) = 1 + self.shards.axis, self.rows[self.rank]
        part = part.unflatten(1, self.own)
        with torch.no_grad():
            whole = SumOfParts.apply(part, dim, self.rows, self.rank, self.shards.group)
        if part.requires_grad:
            after = whole.narrow(dim, stop, whole.shape[dim] - stop)
            whole = torch.cat([whole.narrow(dim, 0, first), part, after], dim)
        return whole.flatten(1, len(self.grid))


class CutHook(ModelHook):
    """On a module: leaves it the image tokens of this rank, or puts its result together again."""

    def __init__(self, cut: Cut, arguments: dict[str, int], results: dict[int, int], end: bool) -> None:
        super().__init__()
        self.cut, self.arguments, self.results, self.end = cut, arguments, results, end
        self.names: list[str] = []

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any):
        tokens, args = math.prod(self.cut.grid), list(args)
        for name, dim in self.arguments.items():
            place = self.names.index(name)
            held, key = (args, place) if place < len(args) else (kwargs, name)
            value = held[key] if held is args else kwargs.get(name)
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                continue
            if value.shape[dim] == tokens:
                held[key] = self.cut.split(value, dim)
            elif name == "hidden_states":
                raise AttachError(
                    f"{value.shape[dim]} image tokens on a grid of {tokens}: appended images have no place on it, so "
                    "they cannot be cut; leave parallel= out"
                )
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        uncut = [name for name in _UNCUT if given.get(name) is not None]
        if uncut:
            raise AttachError(f"{', '.join(uncut)} cannot be cut over ranks; leave parallel= out")
        return tuple(args), kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if self.end:
            return self.cut.join(output)
        if not self.results:
            return output
        return tuple(
            self.cut.split(part, self.results[i]) if i in self.results else part for i, part in enumerate(output)
        )


def cut_hooks(module: torch.nn.Module, family: Family, cut: Cut) -> dict[str, CutHook]:
    """The hooks that cut a denoiser, by module name."""
    sequence = SEQUENCES[family.name]
    names = dict.fromkeys((*sequence.arguments, *sequence.results, sequence.end))
    return {
        name: CutHook(cut, sequence.arguments.get(name, {}), sequence.results.get(name, {}), name == sequence.end)
        for name in names
    }
