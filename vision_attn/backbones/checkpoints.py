"""Reading weights that were published under other names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

__all__ = ["by_rules", "renamed", "unwrapped"]


def unwrapped(state_dict: Mapping) -> Mapping:
    """The weights themselves, of a file that may hold them under "model" or "state_dict"."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    return state_dict


def by_rules(key: str, rules: Iterable[tuple[str, str | Callable]]) -> str:
    """A name after all substitutions `(regular expression, replacement)`, in their order.

    >>> by_rules("layers.0.norm", [(r"^layers", "stages"), (r"norm$", "norm1")])
    'stages.0.norm1'
    """
    for old, new in rules:
        key = re.sub(old, new, key)
    return key


def renamed(
    state_dict: Mapping, model: nn.Module, rename: Callable[[str], str | None], family: str
) -> dict[str, torch.Tensor]:
    """The weights of a published checkpoint under the names of `model`.

    Args:
        state_dict: the weights, or a dict that holds them under "model" or "state_dict". Where most names are ours
            already, they stay as they are.
        rename: published name to ours, None for an entry to leave out.
        family: what was expected, for the error text.

    Raises:
        ValueError: parameters are missing or unknown. The classifier may be missing, and where `model` has none, that
            of the file is left out.
    """
    state_dict = unwrapped(state_dict)
    wanted = model.state_dict().keys()
    if 2 * sum(key in wanted for key in state_dict) < len(state_dict):
        state_dict = {rename(key): value for key, value in state_dict.items()}
        state_dict.pop(None, None)
    state_dict = {key: value for key, value in state_dict.items() if key in wanted or not key.startswith("head.fc.")}
    missing = [key for key in wanted if key not in state_dict and not key.startswith("head.fc.")]
    unknown = [key for key in state_dict if key not in wanted]
    if missing or unknown:
        problems = [
            f"{len(keys)} {what}, such as {', '.join(keys[:3])}"
            for keys, what in ((missing, "are missing"), (unknown, "are unknown"))
            if keys
        ]
        raise ValueError(
            f"these are not {family} weights for this {type(model).__name__}: of {len(wanted)} entries "
            f"{'; '.join(problems)}. Use the variant that the file was made for, and a complete file"
        )
    return state_dict
