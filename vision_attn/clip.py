"""The built-in CLIP and the CLIP score: how well pictures and captions fit, with this or any other open_clip model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

WEIGHTS = Path(__file__).parent / "weights" / "clip_shapes"
CONFIGS = Path(__file__).parent / "open_clip"


class Clip(NamedTuple):
    """An open_clip model with what it needs for pictures and texts."""

    model: Any
    transform: Callable
    tokenizer: Callable


def add_towers() -> None:
    """Make the configurations in `vision_attn/open_clip/` known to `open_clip.create_model`, without weights.

    >>> add_towers()
    >>> import open_clip
    >>> "nat_mini" in open_clip.list_models()
    True
    """
    import open_clip

    import vision_attn.backbones  # noqa: F401  the towers

    if not {path.stem for path in CONFIGS.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(CONFIGS)


def load_clip(folder: str | Path = WEIGHTS, device: str = "cpu") -> Clip:
    """Open a CLIP from a folder with `open_clip_config.json` and safetensors weights, by default the one that ships.

    Raises:
        ValueError: the folder is not of this form, or its weights do not fit.

    >>> clip = load_clip()
    >>> clip.model.logit_scale.shape
    torch.Size([])
    """
    import open_clip
    from safetensors import SafetensorError

    import vision_attn.backbones  # noqa: F401  its tower

    folder = Path(folder)
    if not (folder / "open_clip_config.json").exists() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is no open_clip model: it needs open_clip_config.json and a .safetensors file")
    name = f"local-dir:{folder}"
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, device=device)
        return Clip(model.eval(), transform, open_clip.get_tokenizer(name))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"cannot open {folder}: {str(error).splitlines()[0]}") from error


def similarity(
    images: Sequence[Image.Image] | np.ndarray, texts: Sequence[str], clip: Clip | None = None
) -> torch.Tensor:
    """Cosine of every picture with every text, `[images, texts]` in -1..1.

    Args:
        images: PIL images, or pixels `[images, height, width, 3]`, uint8 or float in 0..1.
        texts: captions.
        clip: the model, from `load_clip`; the built-in one if None, which knows still pictures of the shapes world.

    >>> from vision_attn.shapes import render, sample_scene
    >>> scene = sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue"}], frames=1)
    >>> similarity(render(scene), ["a red circle", "a blue cross"]).argmax().item()
    1
    """
    clip = clip or load_clip()
    weight = clip.model.logit_scale
    batch = torch.stack([clip.transform(picture) for picture in _pictures(images)]).to(weight.device)
    with torch.no_grad():
        seen = clip.model.encode_image(batch, normalize=True)
        said = clip.model.encode_text(clip.tokenizer(list(texts)).to(weight.device), normalize=True)
    return (seen @ said.T).float().cpu()


def clip_score(
    images: Sequence[Image.Image] | np.ndarray, texts: str | Sequence[str], clip: Clip | None = None
) -> torch.Tensor:
    """How well each picture fits its own text: `100 * max(cosine, 0)`, `[images]`.

    Args:
        images: as in `similarity`; the frames of a video are such an array.
        texts: one for each picture, or one for all. With the built-in model what a caption says of movement is left
            out, because no single picture shows it.
        clip: as in `similarity`.

    Raises:
        ValueError: the numbers of pictures and texts differ.

    >>> from vision_attn.shapes import render, sample_scene
    >>> video = render(sample_scene(np.random.default_rng(0), [{"shape": "cross", "color": "blue"}]))
    >>> good, bad = (clip_score(video, f"a {thing} moves up").mean() for thing in ("blue cross", "red circle"))
    >>> bool(good > bad)
    True

    Paper: CLIPScore: A Reference-free Evaluation Metric for Image Captioning.
    """
    texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(texts)} texts; give one text, or one for each picture")
    if clip is None:
        texts = [" and ".join(part.split(" moves ")[0] for part in text.split(" and ")) for text in texts]
    said = list(dict.fromkeys(texts))
    cosines = similarity(images, said, clip)
    return 100 * cosines[torch.arange(len(texts)), [said.index(text) for text in texts]].clamp(min=0)


def _pictures(images: Sequence[Image.Image] | np.ndarray) -> list[Image.Image]:
    from PIL import Image

    if len(images) == 0:
        raise ValueError("no pictures; give at least one")
    if not isinstance(images, np.ndarray):
        return list(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"pictures are [n, height, width, 3], got shape {images.shape}")
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in images]
