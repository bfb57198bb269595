"""What an attachment changed and did, to print or to store as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass
class DenoiserReport:
    """One denoiser of the pipeline.

    Args:
        name: attribute of the pipeline, or "denoiser".
        cls: its class.
        family: entry of the family table that matched.
        modules: names of the attention modules that were changed.
        grids: token grids met so far.
        text: where text tokens sit in the attention sequence.
        layers: density per layer: share of the image-to-image pairs that is computed at a sparse step, 1.0 for a dense
            layer, None before the first sparse call.
        steps: denoising steps counted as `{"dense": ..., "sparse": ...}`; both 0 when the step is not known.
        forwards: denoiser calls counted the same way.
        calls: attention calls that were intercepted and computed sparse, and those left dense, by schedule or with a
            warning. What gradient checkpointing computes again counts again.
        kept: share of the image-to-image pairs computed over all of these calls; None before the first, and for a U-Net
            with dense layers, whose grids are not known.
        backends: attention backends of diffusers that were replaced by "native" while attached.
    """

    name: str
    cls: str
    family: str
    modules: list[str]
    grids: list[list[int]]
    text: str
    layers: list[float | None]
    steps: dict[str, int]
    forwards: dict[str, int]
    calls: dict[str, int]
    kept: float | None
    backends: list[str]


@dataclasses.dataclass
class Report:
    """The whole attachment; `print(run.report)` shows it, `to_dict()` is plain JSON."""

    pattern: dict[str, Any]
    options: dict[str, Any]
    denoisers: list[DenoiserReport]
    warnings: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dict, list, str, int, float, bool, None."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        lines = [_pattern(self.pattern) + (f"  [{options}]" if options else "")]
        for d in self.denoisers:
            grids = ", ".join("x".join(map(str, g)) for g in d.grids) or "not called yet"
            lines.append(f"{d.name} ({d.cls}): {len(d.modules)} attention modules, grid {grids}, text {d.text}")
            for what in ("steps", "forwards", "calls"):
                count = getattr(d, what)
                lines.append(f"  {what:9} {count['sparse']} sparse, {count['dense']} dense")
            if d.kept is not None:
                lines.append(f"  kept      {d.kept:.1%} of the image-to-image pairs of all calls")
            lines += [f"  {_span(layers):9} density {density}" for density, layers in _by_density(d.layers)]
            if d.backends:
                lines.append(f"  backend   {', '.join(d.backends)} -> native while attached")
        lines += [f"warning ({count}x): {text}" for text, count in self.warnings.items()]
        return "\n".join(lines)


def _pattern(pattern: dict[str, Any]) -> str:
    if pattern["pattern"] == "per-layer":
        groups: dict[str, list[int]] = {}
        for layer, each in enumerate(pattern["layers"]):
            groups.setdefault(_pattern(each), []).append(layer)
        return "; ".join(f"{_span(layers)} {text}" for text, layers in groups.items())
    return f"{pattern['pattern']}({', '.join(f'{k}={v!r}' for k, v in pattern.items() if k != 'pattern')})"


def _by_density(layers: list[float | None]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for layer, density in enumerate(layers):
        groups.setdefault("not known yet" if density is None else f"{density:.1%}", []).append(layer)
    return list(groups.items())


def _span(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layer {layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else f"layer {','.join(map(str, layers))}"
