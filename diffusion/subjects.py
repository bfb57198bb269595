"""Where subjects are on a token grid: masks at any size, who owns a token, and which token moves where."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from vision_attn.diffusion.families import Grid


def as_masks(name: str, value: Any, leading: int) -> torch.Tensor:
    """`value` as a bool tensor with `leading` dimensions before `[height, width]` or `[frames, height, width]`."""
    try:
        masks = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array or tensor of masks; got {type(value).__name__}") from error
    before = ("targets", "subjects")[-leading:]
    if masks.ndim not in (leading + 2, leading + 3) or not masks.numel():
        allowed = f"[{', '.join(before)}, height, width] or [{', '.join(before)}, frames, height, width]"
        raise ValueError(f"{name} must be {allowed}, none of them 0; got {list(masks.shape)}")
    return masks.detach() > 0.5 if masks.is_floating_point() else masks.detach() != 0


def at_grid(masks: torch.Tensor, grid: Grid, leading: int) -> torch.Tensor:
    """Masks `[..., height, width]` or `[..., frames, height, width]` taken at the middle of each token: `[..., *grid]`.

    Masks without frames hold for every frame.
    """
    sizes = masks.shape[leading:]
    if len(sizes) == 2 and len(grid) == 3:
        masks = masks.unsqueeze(leading).expand(*masks.shape[:leading], grid[0], *sizes)
    elif len(sizes) == 3 and len(grid) == 2:
        masks = masks.squeeze(leading)
    small = F.interpolate(masks.reshape(1, -1, *masks.shape[-2:]).float(), grid[-2:], mode="nearest-exact")
    return small.bool().view(*masks.shape[:leading], *grid)


def size_trouble(masks: torch.Tensor, grid: Grid, leading: int) -> str | None:
    """Why masks cannot belong to pictures of this grid, or None."""
    *frames, height, width = masks.shape[leading:]
    allowed = grid[0] if len(grid) == 3 else 1
    if frames and frames[0] != allowed:
        return f"masks of {frames[0]} frames, where the picture has {allowed} in tokens; give {allowed}, or none"
    if height * grid[-1] != width * grid[-2]:
        return (
            f"masks of {height} x {width}, which is another shape than the {grid[-2]} x {grid[-1]} tokens of the "
            "picture; give them at the size of the picture in pixels, or in tokens"
        )
    return None


def owners(masks: torch.Tensor) -> torch.Tensor:
    """The subject, from 1, that a token of `[subjects, *grid]` belongs to alone; 0 for none and for several."""
    flat = masks.flatten(1)
    return torch.where(flat.sum(0) == 1, flat.int().argmax(0) + 1, 0)


def relocation(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the box around a subject in one picture onto its box in another, frame by frame: from tokens, to tokens.

    Both masks are `[*grid]`; the result is two lists of flat positions: a target token and the reference token that
    lands on it, for those whose reference token is inside the reference mask.

    >>> reference, target = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    >>> reference[0, 1] = target[1, 2:4] = True
    >>> relocation(reference, target)
    (tensor([1, 1]), tensor([6, 7]))
    """
    height, width = reference.shape[-2:]
    sources, places = [], []
    frames = zip(reference.reshape(-1, height, width), target.reshape(-1, height, width), strict=True)
    for number, (old, new) in enumerate(frames):
        if not old.any() or not new.any():
            continue
        rows, row_sources = _stretch(old.any(1), new.any(1))
        columns, column_sources = _stretch(old.any(0), new.any(0))
        offset = number * height * width
        source = (row_sources[:, None] * width + column_sources).flatten()
        place = (rows[:, None] * width + columns).flatten()
        inside = old.flatten()[source]
        sources.append(source[inside] + offset)
        places.append(place[inside] + offset)
    if not sources:
        return (torch.zeros(0, dtype=torch.long),) * 2
    return torch.cat(sources), torch.cat(places)


def _stretch(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the new extent along an axis, and for each the nearest one of the old extent."""
    (first, last), (start, stop) = ((int(i) for i in x.nonzero()[[0, -1], 0]) for x in (old, new))
    places = torch.arange(start, stop + 1)
    steps = (2 * (places - start) + 1) * (last - first + 1) // (2 * len(places))
    return places, first + steps


@dataclasses.dataclass(frozen=True)
class Group:
    """Tokens of a target that see the same keys.

    Args:
        rows: these tokens.
        keys: tokens of the target that they see; None for all.
        subjects: whose moved reference tokens they see too, from 0.
    """

    rows: torch.Tensor
    keys: torch.Tensor | None
    subjects: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who is where at one grid.

    Args:
        inside: bool `[targets, subjects, tokens]`.
        owner: `[targets, tokens]`, see `owners`.
        moves: `(target, subject)` -> tokens of the reference, and the tokens of the target that they are moved to.
    """

    inside: torch.Tensor
    owner: torch.Tensor
    moves: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def at(target_masks: torch.Tensor, reference_masks: torch.Tensor | None, grid: Grid, device: Any) -> Cast:
        """Bring masks `[targets, subjects, ...]` and `[subjects, ...]` to a grid."""
        targets = at_grid(target_masks.cpu(), grid, 2)
        moves = {}
        for s, reference in enumerate([] if reference_masks is None else at_grid(reference_masks.cpu(), grid, 1)):
            for p, masks in enumerate(targets):
                source, place = relocation(reference, masks[s])
                if len(source):
                    moves[p, s] = source.to(device), place.to(device)
        owner = torch.stack([owners(masks) for masks in targets])
        return Cast(targets.flatten(2).to(device), owner.to(device), moves)

    def groups(self, target: int, isolate: bool, inside: torch.Tensor | None) -> list[Group]:
        """The tokens of a target by what they see.

        A token that one subject owns does not see the tokens that another one owns (`isolate`), and sees the moved
        reference tokens of the subjects in whose mask `inside`, `[subjects, tokens]`, it is.
        """
        owner = self.owner[target] if isolate else torch.zeros_like(self.owner[target])
        code = owner.clone()
        moved = [s for p, s in self.moves if p == target] if inside is not None else []
        for bit, s in enumerate(moved):
            code += inside[s] * (len(self.inside[target]) + 1) * 2**bit
        found = []
        for value in code.unique().tolist():
            rows = (code == value).nonzero()[:, 0]
            own, bits = value % (len(self.inside[target]) + 1), value // (len(self.inside[target]) + 1)
            seen = (owner == 0) | (owner == own)
            keys = None if own == 0 or seen.all() else seen.nonzero()[:, 0]
            found.append(Group(rows, keys, tuple(s for bit, s in enumerate(moved) if bits >> bit & 1)))
        return found
