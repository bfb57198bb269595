"""The built-in video model does what its card says."""

import json

import numpy as np
import pytest
import torch

from vision_attn.diffusion.card import card, draw_and_score, fresh_prompts
from vision_attn.diffusion.loading import BUILT_IN, load
from vision_attn.shapes import score


@pytest.fixture(scope="module")
def loaded():
    loaded = load(device="cpu")
    loaded.pipe.set_progress_bar_config(disable=True)
    return loaded


def test_card_is_written_from_the_records():
    assert (BUILT_IN / "README.md").read_text() == card(BUILT_IN)
    dense = json.loads((BUILT_IN / "evaluation.json").read_text())["rows"][0]
    assert dense["attention"] == "Dense()" and dense["seconds"] < 60


def test_it_draws_what_the_prompts_say(loaded):
    means = draw_and_score(loaded.pipe, fresh_prompts(seed=1, count=8), loaded.defaults, seed=77)
    # Far above chance (1 in 5, 4, 4) and below the card, because these are eight clips only.
    assert means["color"] >= 0.85 and means["count"] >= 0.85 and means["direction"] >= 0.7 and means["both"] >= 0.6


def test_it_draws_with_the_pipelines_own_prompt_length(loaded):
    prompts = [f"a {color} circle moves right" for color in ("red", "green", "blue", "white")]
    sizes = dict(height=48, width=48, num_frames=17, num_inference_steps=10, guidance_scale=3.0)
    videos = loaded.pipe(prompts, **sizes, generator=torch.Generator().manual_seed(0)).frames
    scores = [score(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    assert np.mean([s["color"] for s in scores]) >= 0.75 and np.mean([s["direction"] for s in scores]) >= 0.75


def test_it_draws_single_images(loaded):
    images = loaded.pipe(
        ["a blue square", "a yellow circle"],
        height=48,
        width=48,
        num_frames=1,
        num_inference_steps=20,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert images.shape == (2, 1, 48, 48, 3)
    scores = [score(image, text) for image, text in zip(images, ["a blue square", "a yellow circle"], strict=True)]
    assert np.mean([s["color"] for s in scores]) == 1.0 and np.mean([s["count"] for s in scores]) == 1.0
