"""What an attachment to a vision model changed and did, to print or to store as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass
class TowerReport:
    """One image tower.

    Args:
        name: where it is in the model; "" for the model itself.
        cls: its class.
        modules: names of the layers that were changed.
        dense: names of those that `dense_layers` left alone.
        grids: token grids of the last call, all that were met from layer to layer.
        prefix: class and register tokens before the grid.
        density: per changed layer the share of the pairs of patch tokens that may see each other; 1.0 where the last
            call was left dense, None before the first one and under `TokenMerge`.
        tokens: under `TokenMerge`, per changed layer the tokens before it, inside its attention, and after it.
        calls: attention calls by how they were computed: "sparse"; "masked", dense because the model passed a mask and
            then hidden; "dense", left as it was with a warning. Calls inside of compiled code are not counted.
        flops: at the last call, "before" and "after"; None before the first. Under a pattern those of the products of
            queries, keys and values in the changed layers, for pairs that the pattern allows; a kernel visits somewhat
            more. Under `TokenMerge` also those of the linear layers and of finding what is alike.
    """

    name: str
    cls: str
    modules: list[str]
    dense: list[str]
    grids: list[list[int]]
    prefix: int
    density: list[float | None]
    tokens: list[list[int] | None]
    calls: dict[str, int]
    flops: dict[str, int] | None


@dataclasses.dataclass
class Report:
    """The whole attachment; `print(run.report)` shows it, `to_dict()` is plain JSON.

    Args:
        flops: of the whole model, "before" and "after"; None until `run.measure`.
        seconds: medians of the whole model, "before" and "after"; None until `run.measure`.
    """

    pattern: dict[str, Any]
    options: dict[str, Any]
    towers: list[TowerReport]
    flops: dict[str, int] | None
    seconds: dict[str, float] | None
    warnings: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dict, list, str, int, float, bool, None."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        pattern = ", ".join(f"{k}={v!r}" for k, v in self.pattern.items() if k != "pattern")
        lines = [f"{self.pattern['pattern']}({pattern})" + (f"  [{options}]" if options else "")]
        for tower in self.towers:
            grids = ", ".join("x".join(map(str, g)) for g in tower.grids) or "not called yet"
            where = f"{tower.name} ({tower.cls})" if tower.name else tower.cls
            lines.append(f"{where}: {len(tower.modules)} layers, grid {grids}, {tower.prefix} tokens before it")
            if tower.dense:
                lines.append(f"  left alone {', '.join(tower.dense)}")
            counts = ", ".join(f"{count} {kind}" for kind, count in tower.calls.items() if count)
            lines.append(f"  calls      {counts or 'none'}")
            groups: dict[str, list[str]] = {}
            for name, density, tokens in zip(tower.modules, tower.density, tower.tokens, strict=True):
                if density is not None:
                    groups.setdefault(f"density    {density:.1%}", []).append(name)
                if tokens is not None:
                    groups.setdefault(f"tokens     {' -> '.join(map(str, tokens))}", []).append(name)
            for what, names in groups.items():
                span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
                lines.append(f"  {what} in {span}")
            if tower.flops is not None:
                lines.append(f"  layers     {_change(tower.flops, _flops)}")
        if self.flops is not None:
            lines.append(f"model        {_change(self.flops, _flops)}")
        if self.seconds is not None:
            lines.append(f"time         {_change(self.seconds, _milliseconds)}")
        lines += [f"warning ({count}x): {text}" for text, count in self.warnings.items()]
        return "\n".join(lines)


def _change(pair: dict[str, Any], show: Any) -> str:
    share = f" ({pair['after'] / pair['before']:.1%})" if pair["before"] else ""
    return f"{show(pair['before'])} -> {show(pair['after'])}{share}"


def _flops(count: int) -> str:
    return f"{count / 1e9:.3g} GFLOPs"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
