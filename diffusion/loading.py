"""Open a diffusers pipeline of a supported family: the built-in one, a local folder, or a Hub id.

What can be wrong with a model is found in its small JSON files, before any weights are read or downloaded.
"""

import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vision_attn.devices import resolve_device, resolve_dtype
from vision_attn.diffusion.convolution import quick_conv3d
from vision_attn.diffusion.sizes import FAMILIES, Family

BUILT_IN = Path(__file__).parent / "weights" / "shapes-video"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ACCEPTED = "Give a folder written by pipe.save_pretrained(...), or a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."


class LoadError(ValueError):
    """A model that cannot be opened: missing, not a pipeline, of another family, or without safetensors weights."""


class SizeError(ValueError):
    """A size the model cannot draw; `option` is "frames", "height" or "width"."""

    def __init__(self, option: str, message: str):
        super().__init__(f"{option}: {message}")
        self.option = option


@dataclass(frozen=True)
class ModelInfo:
    """What the JSON files of a pipeline say about it.

    `token` is (frames per latent frame, latent frames per token, height and width of a token in pixels). `defaults` may
    hold height, width, frames, steps, guidance, max_sequence_length, fps, and attention: pattern name -> options that
    suit the model, dense_steps and dense_layers among them. They come from a `defaults.json` in the folder, else from
    the pipeline's own `__call__` and the family.
    """

    source: str
    built_in: bool
    pipeline: str
    family: Family
    token: tuple[int, int, int, int]
    defaults: dict[str, Any]

    @property
    def video(self) -> bool:
        return self.family.fps > 0

    def grid(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, ...] | None:
        """Tokens per axis, `(t, h, w)` for video and `(h, w)` for images, of a picture of this size in pixels.

        None for a size means that the pipeline decides; the others are still checked, and the grid is None.

        Raises:
            SizeError: a size the model cannot draw.
        """
        latent, per_token, token_h, token_w = self.token
        name = self.family.name
        frames = frames if self.video else frames or 1
        if not self.video and frames != 1:
            raise SizeError("frames", f"got {frames}, but {name} draws single images; leave it out")
        if frames is not None and (frames < 1 or (frames - 1) % latent):
            below = max(0, frames - 1) // latent * latent + 1
            raise SizeError(
                "frames", f"got {frames}, but {name} needs {latent}n+1; nearest: {below} and {below + latent}"
            )
        for option, size, token in (("height", height, token_h), ("width", width, token_w)):
            step = math.lcm(token, self.family.multiple)
            if size is not None and (size < step or size % step):
                below = size // step * step
                nearest = f"{below} and {below + step}" if below > 0 else f"{step}"
                raise SizeError(option, f"got {size}, but {name} needs a multiple of {step} pixels; nearest: {nearest}")
        if None in (frames, height, width):
            return None
        space = (height // token_h, width // token_w)
        return (-(-((frames - 1) // latent + 1) // per_token), *space) if self.video else space


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline ready to call, with what was known about it before loading."""

    pipe: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype

    @property
    def defaults(self) -> dict[str, Any]:
        return self.info.defaults

    @property
    def family(self) -> Family:
        return self.info.family


def inspect_model(model: str | Path | None = None) -> ModelInfo:
    """Read what a pipeline is and what it needs, without reading its weights.

    Args:
        model: a folder of `save_pretrained`, a Hub id `org/name` (fetches a few small JSON files), or None for the
            built-in model.

    Raises:
        LoadError: missing, not a pipeline, custom code, an unsupported family, or weights only as pickles.
    """
    path, source = _locate(model)
    index = _read(path or source, "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise LoadError(f"{source} brings its own pipeline code ({name}), which is never run. {_ACCEPTED}")
    parts = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}
    built_in = path == BUILT_IN
    if not built_in:
        _refuse_custom_code(source, parts)
    net = next((key for key in ("transformer", "unet") if key in parts), None)
    denoiser = parts[net][1] if net else "no transformer or unet"
    if denoiser not in FAMILIES:
        supported = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
        reason = " Its attention is linear: there is no pattern to change." if denoiser.startswith("Sana") else ""
        raise LoadError(f"{source}: {name} around {denoiser} is not supported.{reason} Supported: {supported}.")
    if path:
        _refuse_pickles(path, parts)
    family = FAMILIES[denoiser]
    vae = _read(path or source, "vae/config.json") if "vae" in parts else {}
    try:
        token = family.token(vae, _read(path or source, f"{net}/config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{source}: the config of its vae or {net} does not fit {family.name}: {error!r}") from error
    # The built-in folder says everything itself; asking the pipeline class would cost seconds of imports.
    defaults = {} if built_in else _call_defaults(source, name)
    defaults["attention"] = family.attention
    if family.fps:
        defaults["fps"] = family.fps
    if path and (path / "defaults.json").exists():
        defaults.update(_read(path, "defaults.json"))
    return ModelInfo(source, built_in, name, family, token, defaults)


def load(
    model: str | Path | None = None, *, device: str = "auto", dtype: str | torch.dtype | None = None
) -> LoadedPipeline:
    """Load a pipeline from safetensors weights, in eval mode, on one device.

    Args:
        model: a folder of `save_pretrained`, a Hub id `org/name` (the only case that reaches the network), or None for
            the built-in model.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: "float32", "bfloat16", "float16" or the torch dtype. None: float32 on CPU and for the built-in model,
            bfloat16 on GPU.

    Raises:
        LoadError: see `inspect_model`; also when the weights do not fit their configs.
        ValueError: an unknown or absent device, an unknown dtype.

    Example:
        >>> from vision_attn.diffusion.loading import load
        >>> loaded = load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", device="cuda")  # doctest: +SKIP
        >>> loaded.pipe("a cat on a skateboard").frames[0]  # doctest: +SKIP
    """
    place = resolve_device(device)
    info = inspect_model(model)
    number = resolve_dtype(dtype, place, built_in=info.built_in)
    from diffusers import DiffusionPipeline
    from diffusers import __version__ as release
    from packaging.version import Version

    name = "dtype" if Version(release) >= Version("0.40") else "torch_dtype"
    # Wan's VAE loses colour in half precision; its pipeline casts the latents to whatever the VAE uses.
    dtypes = {"default": number, "vae": torch.float32} if info.family.name == "Wan" else number
    try:
        pipe = DiffusionPipeline.from_pretrained(info.source, use_safetensors=True, **{name: dtypes})
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise LoadError(f"cannot load {info.source}: {_first_line(error)}") from error
    if place.type == "cpu" and getattr(pipe, "vae", None) is not None:
        quick_conv3d(pipe.vae)
    return LoadedPipeline(pipe.to(place), info, place, number)


def _locate(model: str | Path | None) -> tuple[Path | None, str]:
    """The local folder (None for a Hub id) and the name to show and to load."""
    if model is None:
        if not (BUILT_IN / "model_index.json").exists():
            raise LoadError(
                f"the built-in model is missing from {BUILT_IN}. Reinstall vision-attn, or train one: "
                "python -m vision_attn.diffusion.train"
            )
        return BUILT_IN, str(BUILT_IN)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise LoadError(f"{path} is not a diffusers pipeline: it has no model_index.json. {_ACCEPTED}")
        return path, str(path)
    if path.exists():
        raise LoadError(f"{path} is a single file, not the folder of a diffusers pipeline. {_ACCEPTED}")
    if _HUB_ID.fullmatch(str(model)):
        return None, str(model)
    raise LoadError(f"there is no folder {model}. {_ACCEPTED}")


def _read(source: Path | str, name: str) -> dict[str, Any]:
    """A JSON object of the pipeline, from its folder or from the Hub."""
    path = source / name if isinstance(source, Path) else Path(_fetch(source, name))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a {type(value).__name__}, not the JSON object of a diffusers pipeline")
    return value


def _fetch(hub_id: str, name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return hf_hub_download(hub_id, name)
    except LocalEntryNotFoundError as error:
        raise LoadError(f"there is no folder {hub_id}, and the Hub cannot be reached to look for it") from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"there is no folder {hub_id}, and the Hub has no public model of that name") from error
    except EntryNotFoundError as error:
        raise LoadError(f"{hub_id} on the Hub is not a diffusers pipeline: it has no {name}. {_ACCEPTED}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot fetch {name} of {hub_id} from the Hub: {_first_line(error)}") from error


def _refuse_custom_code(source: str, parts: dict[str, list]) -> None:
    import diffusers.pipelines

    for key, (library, name) in parts.items():
        if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
            raise LoadError(f"{source}: component {key} wants {library}.{name}, outside diffusers and transformers")


def _refuse_pickles(path: Path, parts: dict[str, list]) -> None:
    for key in parts:
        folder = path / key
        if not folder.is_dir():
            raise LoadError(f"{path} is incomplete: model_index.json lists {key}, but there is no folder {key}")
        pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if pickles and not any(folder.glob("*.safetensors")):
            raise LoadError(
                f"{folder} has weights only as pickles ({', '.join(sorted(pickles))}), which can run code when opened. "
                "Load the pipeline where you trust it and write it again with pipe.save_pretrained(folder)."
            )


def _call_defaults(source: str, pipeline: str) -> dict[str, Any]:
    """What the pipeline's own `__call__` uses when nothing is given."""
    import diffusers

    cls = getattr(diffusers, pipeline, None)
    if cls is None:
        raise LoadError(f"{source}: diffusers {diffusers.__version__} has no {pipeline}; update diffusers")
    call = inspect.signature(cls.__call__).parameters
    needed = [
        key
        for key, value in call.items()
        if key not in ("self", "prompt") and value.default is value.empty and value.kind is value.POSITIONAL_OR_KEYWORD
    ]
    if needed or "prompt" not in call:
        more = ", ".join(needed) or "no prompt at all"
        raise LoadError(f"{source}: {pipeline} needs more than a prompt ({more}); use a pipeline that draws from text")
    names = {
        "height": "height",
        "width": "width",
        "frames": "num_frames",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
    }
    own = {ours: call[theirs].default for ours, theirs in names.items() if theirs in call}
    return {name: value for name, value in own.items() if value is not None}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
