"""Open a vision-language model of a supported family: a built-in one, a local folder, or a Hub id.

What can be wrong with a model is found in its small JSON files, before any weights are read or downloaded.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_attn.devices import resolve_device, resolve_dtype
from vision_attn.mllm.families import FAMILIES

WEIGHTS = Path(__file__).parent / "weights"
BUILT_IN = ("shapes-llava", "shapes-llava-long")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ACCEPTED = (
    f"Give {' or '.join(BUILT_IN)}, a folder written by save_pretrained(...), or a Hub id such as "
    "llava-hf/llava-1.5-7b-hf."
)


class LoadError(ValueError):
    """A model that cannot be opened: missing, of another family, with code of its own, or without safetensors."""


@dataclass(frozen=True)
class Loaded:
    """A model ready for `generate`, and the processor that makes its inputs.

    Args:
        model: in evaluation mode, on its device.
        processor: of pictures and text.
        source: folder or Hub id.
    """

    model: Any
    processor: Any
    source: str

    @property
    def built_in(self) -> bool:
        return Path(self.source).parent == WEIGHTS

    def inputs(self, picture: Any, question: str) -> dict[str, Any]:
        """Arguments of `generate` for one question about a picture, uint8 `[height, width, 3]` or a PIL image.

        The question goes into the model's chat template; a model without one reads it as it is.
        """
        if hasattr(picture, "convert"):
            picture = np.asarray(picture.convert("RGB"))
        if getattr(picture, "dtype", None) != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            form = f"{picture.dtype} {list(picture.shape)}" if hasattr(picture, "shape") else type(picture).__name__
            raise TypeError(f"a picture is an array, uint8 [height, width, 3], or a PIL image; got {form}")
        processor = self.processor
        if getattr(processor, "chat_template", None):
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            text = processor.apply_chat_template([message], add_generation_prompt=True)
        else:
            text = question
        from PIL import Image

        starts = getattr(processor.tokenizer, "bos_token", None)
        twice = bool(starts) and text.startswith(starts)  # the template wrote it already
        more = {"add_special_tokens": False} if twice else {}
        given = processor(images=Image.fromarray(picture), text=text, return_tensors="pt", **more)
        return dict(given.to(self.model.device, dtype=self.model.dtype))

    def answer(self, picture: Any, question: str, *, tokens: int = 64, **options: Any) -> str:
        """What the model says, at most `tokens` long; greedy unless `options` of `generate` say otherwise.

        >>> import vision_attn.shapes.crowd as world
        >>> crowd = world.sample_crowd(np.random.default_rng(0))
        >>> load().answer(world.draw_crowd(crowd, np.random.default_rng(1)), "Is there a red triangle in the image?")
        'yes'
        """
        return self.text(self.generate(self.inputs(picture, question), tokens, **options).sequences)

    def generate(self, inputs: dict[str, Any], tokens: int, **options: Any) -> Any:
        """What `model.generate` returns, with the ids of the answer alone in `sequences`, long `[rows, n]`."""
        given = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, **options}
        with torch.no_grad():
            output = self.model.generate(**inputs, **given)
        ids, before = output.sequences, inputs["input_ids"]
        if ids.shape[1] >= before.shape[1] and torch.equal(ids[:, : before.shape[1]], before):
            output.sequences = ids[:, before.shape[1] :]
        return output

    def text(self, ids: torch.Tensor) -> str:
        """The first row of answers, as words."""
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def load(model: str | Path = BUILT_IN[0], *, device: str = "auto", dtype: str | torch.dtype | None = None) -> Loaded:
    """Load a model from safetensors weights; code that comes with a model is never run.

    Args:
        model: a name of `BUILT_IN`, a folder of `save_pretrained`, or a Hub id `org/name`, the only case that reaches
            the network.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: "float32", "bfloat16", "float16" or the torch dtype. None: float32 on CPU and for the built-in models,
            bfloat16 on GPU.

    Raises:
        LoadError: missing, of an unsupported family, with code of its own, without safetensors, or incomplete.
        ValueError: an unknown or absent device, an unknown dtype.

    >>> loaded = load("shapes-llava")
    >>> type(loaded.model).__name__, sum(p.numel() for p in loaded.model.parameters())
    ('LlavaForConditionalGeneration', 759072)
    """
    place = resolve_device(device)
    source, folder, name = inspect_model(model)
    if folder is not None:
        _refuse_pickles(folder)
    number = resolve_dtype(dtype, place, built_in=folder is not None and folder.parent == WEIGHTS)
    import transformers

    options = {"trust_remote_code": False, "local_files_only": folder is not None}
    with _one_line(source):
        loaded, info = getattr(transformers, name).from_pretrained(
            source, dtype=number, use_safetensors=True, output_loading_info=True, **options
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"{len(missing)} weights of its config are not there, such as {missing[0]}")
        processor = transformers.AutoProcessor.from_pretrained(source, **options)
    if not hasattr(processor, "tokenizer"):
        raise LoadError(f"{source} has no processor of pictures and text, only {type(processor).__name__}. {_ACCEPTED}")
    return Loaded(loaded.eval().to(place), processor, source)


def inspect_model(model: str | Path = BUILT_IN[0]) -> tuple[str, Path | None, str]:
    """The name to load, the folder if it is a local one, and the class of the model, without reading its weights.

    Raises:
        LoadError: see `load`.
    """
    source, folder = _locate(model)
    return source, folder, check_config(source, _read_config(source, folder))


def check_config(source: str, config: dict[str, Any]) -> str:
    """The class of the model that a `config.json` describes.

    Raises:
        LoadError: it brings its own code, or is of no supported family.
    """
    names = config.get("architectures") or [str(config.get("model_type", "nothing"))]
    if config.get("auto_map"):
        raise LoadError(f"{source} brings its own code ({names[0]}), which is never run. {_ACCEPTED}")
    found = next((name for name in names if name in FAMILIES), None)
    if found is None:
        raise LoadError(f"{source}: {names[0]} is not supported. Supported: {', '.join(FAMILIES)}.")
    return found


def _locate(model: str | Path) -> tuple[str, Path | None]:
    """The name to load and to show, and the folder if it is a local one."""
    if str(model) in BUILT_IN:
        folder = WEIGHTS / str(model)
        if not (folder / "config.json").exists():
            raise LoadError(
                f"the built-in model {model} is missing. Reinstall vision-attn, or train one: "
                "python -m vision_attn.mllm.train --help"
            )
        return str(folder), folder
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path), path
    if path.exists():
        raise LoadError(f"{path} is a single file, not the folder of a model. {_ACCEPTED}")
    if _HUB_ID.fullmatch(str(model)):
        return str(model), None
    raise LoadError(f"there is no folder {model}. {_ACCEPTED}")


def _read_config(source: str, folder: Path | None) -> dict[str, Any]:
    if folder is None:
        from huggingface_hub import hf_hub_download

        with _one_line(source):
            path = Path(hf_hub_download(source, "config.json"))
    else:
        path = folder / "config.json"
        if not path.exists():
            raise LoadError(f"{folder} is not the folder of a model: it has no config.json. {_ACCEPTED}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path} holds a {type(config).__name__}, not the JSON object of a model")
    return config


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise LoadError(
            f"{folder} has weights only as pickles ({', '.join(pickles)}), which can run code when opened. Load the "
            "model where you trust it and write it again with model.save_pretrained(folder)."
        )
    raise LoadError(f"{folder} has no weights: no file that ends in .safetensors. {_ACCEPTED}")


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever the hub or transformers raise for a model that cannot be opened, as one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except LoadError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoadError(f"cannot load {source}: {first}") from error
