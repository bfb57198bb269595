"""The same subjects in several pictures: a first generation finds them, a second keeps them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vision_attn.diffusion.methods.isolation import IRDiffusion
from vision_attn.diffusion.word_maps import WordMaps, thresholded, word_places

OURS = ("prompt", "generator", "num_images_per_prompt", "num_videos_per_prompt", "latents", "prompt_embeds")


@dataclasses.dataclass
class ConsistentImages:
    """What `consistent_images` made.

    Args:
        images: the pictures of the prompts, `[prompts, height, width, 3]` in 0..1, or what `output_type` asks for.
        references: the reference of each subject likewise.
        first: both as the pipeline alone draws them, references first; None with masks given.
        method: what was attached; its masks are those that were given or found.
        report: what it did.
    """

    images: Any
    references: Any
    first: Any
    method: IRDiffusion
    report: Any


def consistent_images(
    pipe: Any,
    subjects: Sequence[str] | Mapping[str, str],
    prompts: Sequence[str],
    masks: tuple[Any, Any] | None = None,
    *,
    seed: int = 0,
    threshold: float | None = None,
    isolation: bool = True,
    reposition: bool = True,
    cross: float = 0.9,
    first_layer: int | None = None,
    dropout: float = 0.0,
    **call: Any,
) -> ConsistentImages:
    """Draw pictures in which the same subjects appear, each as in one reference picture of it.

    Without masks the pipeline runs twice: the first pictures only serve to find the subjects, where attention to their
    words is high. All pictures are one batch: a reference per subject, then the prompts.

    Args:
        pipe: a text-to-image or text-to-video pipeline whose attention to the text is a layer of its own: Stable
            Diffusion and SDXL, PixArt, Wan, LTX-Video, Cosmos.
        subjects: words that name each subject as they stand in the prompts, such as "red fox"; they are the prompt of
            its reference, or with a dict, words -> that prompt.
        prompts: what to draw. A subject whose words a prompt lacks is left out of that picture.
        masks: where the subjects are, instead of looking: the pair reference_masks, target_masks of `IRDiffusion`.
        seed: picture `i` of the batch starts from the noise of `seed + i`.
        threshold: 0 to 1, where a map of words counts as its subject; None finds one for each map (Otsu's).
        isolation, reposition, cross, first_layer, dropout: as in `IRDiffusion`.
        **call: further arguments of the pipeline, such as height, width, num_inference_steps, guidance_scale.

    Raises:
        TypeError, ValueError: an argument of another form; a subject in no prompt; a pipeline without its text encoder
            or of an unsupported family; masks that do not fit.

    >>> from vision_attn.diffusion.loading import load
    >>> pipe = load().pipe
    >>> pipe.set_progress_bar_config(disable=True)
    >>> small = dict(height=48, width=48, num_frames=1, num_inference_steps=2, max_sequence_length=16)
    >>> made = consistent_images(pipe, ["red circle", "blue square"], ["a red circle and a blue square"], **small)
    >>> made.images.shape, made.references.shape
    ((1, 1, 48, 48, 3), (2, 1, 48, 48, 3))

    Paper: Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention.
    """
    words, batch = _prompts(subjects, prompts)
    taken = [name for name in OURS if name in call]
    if taken:
        raise TypeError(f"{', '.join(taken)} cannot be passed on: prompts and seed make the batch")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, or None; got {threshold!r}")
    options = dict(
        isolation=isolation, reposition=reposition, cross=cross, first_layer=first_layer, dropout=dropout, seed=seed
    )
    _check_text(pipe)
    if masks is not None and (not isinstance(masks, (tuple, list)) or len(masks) != 2):
        raise TypeError(f"masks must be the pair (reference_masks, target_masks); got {type(masks).__name__}")

    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(batch)

    def draw() -> Any:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(batch))]
        result = pipe(prompt=batch, generator=generators, **{"output_type": "np", **call})
        return result.images if hasattr(result, "images") else result.frames

    first = None
    if masks is None:
        places = _places(pipe.tokenizer, words, batch)
        with WordMaps(pipe, places) as seen:
            first = draw()
        masks = _found(seen.maps, len(words), threshold)
    method = IRDiffusion(target_masks=masks[1], reference_masks=masks[0], **options)
    if method.pictures != len(batch):
        raise ValueError(
            f"masks for {method.references} subjects in {len(method.target_masks)} pictures; there are {len(words)} "
            f"subjects and {len(batch) - len(words)} prompts"
        )
    with method.attach(pipe) as attached:
        pictures = draw()
    return ConsistentImages(pictures[len(words) :], pictures[: len(words)], first, method, attached.report)


def _prompts(subjects: Any, prompts: Any) -> tuple[list[str], list[str]]:
    """The words of each subject, and the prompts of the whole batch."""
    for name, value in (("subjects", subjects), ("prompts", prompts)):
        if isinstance(value, str) or not isinstance(value, (Sequence, Mapping)) or not value:
            raise TypeError(f"{name} must be a list of at least one string; got {value!r}")
    words = list(subjects)
    batch = [*(subjects.values() if isinstance(subjects, Mapping) else words), *prompts]
    wrong = [text for text in [*words, *batch] if not isinstance(text, str) or not text.strip()]
    if wrong:
        raise TypeError(f"subjects and prompts must be strings with words; got {wrong[0]!r}")
    return words, batch


def _check_text(pipe: Any) -> None:
    for part in ("text_encoder", "tokenizer"):
        if getattr(pipe, part, None) is None:
            raise ValueError(
                f"{type(pipe).__name__} has no {part}, and the subjects are found by their words; load it with its "
                f"{part}"
            )


def _places(tokenizer: Any, words: list[str], batch: list[str]) -> list[list[list[int]]]:
    """Per picture, per subject, where its words are: a reference holds its own subject only."""
    count = len(words)
    places = [[word_places(tokenizer, prompt, each) for each in words] for prompt in batch]
    for s, each in enumerate(words):
        if not places[s][s]:
            raise ValueError(f"the reference prompt {batch[s]!r} does not contain the words {each!r}")
        if not any(rows[s] for rows in places[count:]):
            raise ValueError(f"no prompt contains the words {each!r}; give them as they stand in the prompts")
        places[s] = [found if i == s else [] for i, found in enumerate(places[s])]
    return places


def _found(maps: torch.Tensor, count: int, threshold: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference masks `[subjects, *grid]` and target masks `[targets, subjects, *grid]` from maps of words."""
    found = torch.stack([thresholded(picture, threshold) for picture in maps])
    return torch.stack([found[s, s] for s in range(count)]), found[count:]
