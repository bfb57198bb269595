"""Methods that `attach` puts into pipelines: one frozen dataclass and one file each, loaded on first use."""

from importlib import import_module

# Name in reports and on the command line -> file and class.
_FILES: dict[str, tuple[str, str]] = {
    "freeswim": ("freeswim", "FreeSwim"),
    "ir-diffusion": ("isolation", "IRDiffusion"),
    "clear": ("clear", "CLEAR"),
    "ultravico": ("ultravico", "UltraViCo"),
    "riflex": ("rope", "RIFLEx"),
    "pi": ("rope", "PI"),
    "ntk": ("rope", "NTK"),
    "yarn": ("rope", "YaRN"),
    "tasr": ("rope", "TASR"),
    "linfusion": ("linfusion", "LinFusion"),
}


def method_class(name: str) -> type:
    """The class of a method by name.

    Raises:
        ValueError: there is no such method.
    """
    if name not in _FILES:
        raise ValueError(f"there is no method {name!r}; allowed: {', '.join(_FILES)}")
    file, cls = _FILES[name]
    return getattr(import_module(f"{__name__}.{file}"), cls)
