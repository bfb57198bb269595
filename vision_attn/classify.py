"""Name what is in pictures with a timm classifier, or choose among captions with CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vision_attn.images import model_input

if TYPE_CHECKING:
    from torch import nn

    from vision_attn.clip import Clip


class Guess(NamedTuple):
    """A label and its probability, 0 to 1."""

    label: str
    probability: float


def load_classifier(model: str | Path = "nat_shapes", device: str | torch.device = "cpu") -> nn.Module:
    """A trained timm classifier in eval mode.

    Args:
        model: `nat_shapes` or `biformer_shapes`, which ship; a folder with `config.json` and safetensors weights; or
            any other name of timm, whose weights are then downloaded.

    Raises:
        ValueError: no such model, or no weights for it, or they do not fit or cannot be fetched.

    >>> load_classifier("nat_shapes").num_classes
    20
    """
    import timm
    from safetensors import SafetensorError

    import vision_attn.backbones  # noqa: F401

    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no timm model: it has no config.json")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no .safetensors file; other formats can run code when they are opened")
    name = f"local-dir:{folder}" if folder.is_dir() else str(model)
    if not folder.is_dir() and ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"no model {name!r}; timm has {', '.join(near) or 'others: see timm.list_models()'}")
    try:
        return timm.create_model(name, pretrained=True).eval().to(device)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load {model}: {str(error).strip().splitlines()[0]}") from error


def labels_of(model: nn.Module) -> list[str]:
    """Names of the classes of a timm model: its own, those of ImageNet, or `class 0`, `class 1`, ...

    >>> labels_of(load_classifier())[:2]
    ['red circle', 'red square']
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if names := model.pretrained_cfg.get("label_names"):
        return list(names)
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f"class {i}" for i in range(model.num_classes)]


def classify(images: Sequence[np.ndarray], model: nn.Module, top: int = 3) -> list[list[Guess]]:
    """The likeliest labels of each picture, best first.

    Args:
        images: uint8 `[height, width, 3]` of any size, from `vision_attn.images.read_image`.
        model: from `load_classifier`, or any timm classifier.
        top: how many labels.

    >>> from vision_attn.shapes import render, sample_scene
    >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue"}], frames=1)
    >>> picture = (render(scene)[0] * 255).astype(np.uint8)
    >>> classify([picture], load_classifier(), top=1)[0][0].label
    'blue cross'
    """
    names = labels_of(model)
    with torch.no_grad():
        return [_best(model(model_input(image, model)[0])[0], names, top) for image in images]


def choose_caption(
    images: Sequence[np.ndarray], captions: Sequence[str], clip: Clip, top: int = 3
) -> list[list[Guess]]:
    """The captions that fit each picture best, and their probabilities among those given.

    >>> from vision_attn.clip import load_clip
    >>> from vision_attn.shapes import render, sample_scene
    >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue"}], frames=1)
    >>> picture = (render(scene)[0] * 255).astype(np.uint8)
    >>> choose_caption([picture], ["a red circle", "a blue cross"], load_clip())[0][0].label
    'a blue cross'
    """
    from PIL import Image

    from vision_attn.clip import similarity

    cosines = similarity([Image.fromarray(image) for image in images], captions, clip)
    scale = clip.model.logit_scale.detach().exp().float().cpu()
    return [_best(row, list(captions), top) for row in scale * cosines]


def _best(logits: torch.Tensor, names: list[str], top: int) -> list[Guess]:
    values, indices = logits.float().softmax(-1).topk(min(top, len(names)))
    return [Guess(names[i], value) for value, i in zip(values.tolist(), indices.tolist(), strict=True)]
