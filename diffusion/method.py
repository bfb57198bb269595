"""What `attach` takes besides patterns: methods, and presets, which are patterns with all that goes along."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vision_attn.kernels.patterns import Pattern

if TYPE_CHECKING:
    from vision_attn.diffusion.installed import Installed


@dataclasses.dataclass(frozen=True)
class Method:
    """Something other than a pattern that `attach(pipe, method)` puts into a pipeline or denoiser.

    A subclass is a frozen dataclass whose fields are its options, and defines `attach`.
    """

    name: ClassVar[str] = ""

    def attach(self, target: Any, **options: Any) -> Installed:
        """Put it into `target`. The keyword arguments are the options of `vision_attn.attach` it understands."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The method as plain JSON values, as reports show it."""
        return {"method": self.name, **dataclasses.asdict(self)}

    def refuse_unknown(self, options: dict[str, Any]) -> None:
        """Raise TypeError for options of `attach` that this method does not understand."""
        known = [name for name in inspect.signature(self.attach).parameters if name != "target"]
        unknown = [name for name in options if name not in known]
        if unknown:
            allowed = ", ".join(known) or "none"
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}; options it knows: {allowed}")


@dataclasses.dataclass(frozen=True)
class Preset(Method):
    """Attention settings for one model, to attach, to save and to share.

    Args:
        pattern: for every layer, or a tuple with one pattern per layer.
        options: of `attach`, such as `{"dense_steps": 12, "dense_layers": 1}`. Options that `attach` is given win,
            unless they are its defaults: for `dense_steps=0` use `dataclasses.replace(preset, options={...})`.
        model: denoiser class it was made for; empty for any.
        note: where the settings come from.

    Raises:
        TypeError, ValueError: a field of another form; attached to a denoiser of another class.

    >>> from vision_attn import Neighborhood
    >>> saved = Preset(Neighborhood(window=(3, 5, 5)), {"dense_steps": 2}).to_dict()
    >>> Preset.from_dict(saved).pattern
    Neighborhood(window=(3, 5, 5), stride=1, dilation=1, causal=False)
    """

    pattern: Pattern | tuple[Pattern, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    note: str = ""
    name: ClassVar[str] = "preset"

    def __post_init__(self) -> None:
        if isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        patterns = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
        if not patterns or not all(isinstance(pattern, Pattern) for pattern in patterns):
            raise TypeError(f"pattern must be a pattern, or a tuple of one pattern per layer; got {self.pattern!r}")

    def attach(self, target: Any, **options: Any) -> Installed:
        from vision_attn.diffusion.attachment import attach, denoisers

        for module in denoisers(target)[1].values():
            if self.model and self.model not in [cls.__name__ for cls in type(module).__mro__]:
                raise ValueError(f"this preset is for {self.model}, and the denoiser is {type(module).__name__}")
        return attach(target, self.pattern, **{**self.options, **options})

    def refuse_unknown(self, options: dict[str, Any]) -> None:
        """Everything is passed on to `attach`, which refuses what it does not know."""

    def to_dict(self) -> dict[str, Any]:
        one = isinstance(self.pattern, Pattern)
        pattern = self.pattern.to_dict() if one else [pattern.to_dict() for pattern in self.pattern]
        return {
            "method": self.name, "model": self.model, "note": self.note, "pattern": pattern, "options": self.options,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Preset:
        """Rebuild a preset from `to_dict`.

        Raises:
            ValueError: not the dict of a preset, or one with fields unknown here.
        """
        known = {"method", "model", "note", "pattern", "options"}
        if not isinstance(data, dict) or data.get("method") != Preset.name or not known >= set(data):
            raise ValueError(f"not a preset: expected an object with the fields {', '.join(sorted(known))}")
        pattern = data.get("pattern")
        pattern = tuple(map(Pattern.from_dict, pattern)) if isinstance(pattern, list) else Pattern.from_dict(pattern)
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in data.get("options", {}).items()}
        return Preset(pattern, options, data.get("model", ""), data.get("note", ""))

    def save(self, path: str | Path) -> None:
        """Write the preset as JSON; the file appears whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> Preset:
        """Read a preset that `save` wrote.

        Raises:
            ValueError: the file is missing or holds no preset.
        """
        try:
            return Preset.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as a preset: {error}") from error
