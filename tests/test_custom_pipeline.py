"""Our custom pipelines, loaded by diffusers as it loads any."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import DiffusionPipeline, WanPipeline  # noqa: E402

from vision_attn.diffusion import extend_video, upscale_video  # noqa: E402
from vision_attn.diffusion.loading import BUILT_IN  # noqa: E402
from vision_attn.diffusion.pipelines import LONG_VIDEO, UPSCALE  # noqa: E402

SMALL = {"num_inference_steps": 2, "max_sequence_length": 16}


def opened(file: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(BUILT_IN, custom_pipeline=file, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def plain():
    pipe = WanPipeline.from_pretrained(BUILT_IN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_large_videos_are_those_of_the_function(plain, tmp_path):
    pipe = opened(str(shutil.copy(UPSCALE, tmp_path)))  # works from anywhere
    assert isinstance(pipe, WanPipeline) and type(pipe).__name__ == "FreeSwimUpscalePipeline"
    asked = {"height": 96, "width": 96, "generator": noise()}
    found = pipe("a red circle moves right", num_frames=5, **asked, **SMALL).frames
    asked["generator"] = noise()
    wanted = upscale_video(plain, "a red circle moves right", frames=5, steps=2, max_sequence_length=16, **asked).frames
    assert np.array_equal(found, wanted) and found.shape == (1, 5, 96, 96, 3)
    video = np.zeros((5, 48, 48, 3), np.uint8)
    (pictures,) = pipe("a red circle", video=video, output_type="pil", return_dict=False, **asked, **SMALL)[0]
    assert [picture.size for picture in pictures] == [(96, 96)] * 5


def test_long_videos_are_those_of_the_function(plain):
    pipe = opened(LONG_VIDEO)
    found = pipe("a red circle moves right", times=2, method="riflex", generator=noise(), **SMALL).frames
    wanted = extend_video(plain, "a red circle moves right", 2, "riflex", generator=noise(), **SMALL).frames
    assert np.array_equal(found, wanted) and len(found[0]) == 37


def test_wrong_arguments():
    pipe = opened(UPSCALE)
    with pytest.raises(ValueError, match="height and width of the large video"):
        pipe("a red circle")
    with pytest.raises(ValueError, match="output_type='latent'; allowed: 'np', 'pil'"):
        pipe("a red circle", height=96, width=96, output_type="latent")
    with pytest.raises(ValueError, match="num_frames=37: times=2 says how long"):
        opened(LONG_VIDEO)("a red circle", num_frames=37)
