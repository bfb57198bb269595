"""Videos larger than a Wan model was trained on, as a custom pipeline of diffusers; needs `vision-attn[diffusion]`."""

from typing import Any

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from vision_attn.diffusion import upscale_video


class FreeSwimUpscalePipeline(WanPipeline):
    """`WanPipeline` whose call draws the video at the size it was trained on, and then again at the size asked for.

    Paper: FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video
    Generation.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float = 0.7,
        cache_steps: int | None = 2,
        video: Any = None,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        **more: Any,
    ) -> WanPipelineOutput | tuple:
        """
        Args:
            prompt, negative_prompt, num_frames, num_inference_steps, guidance_scale, generator: as of `WanPipeline`;
                None is what suits the model.
            height, width: pixels of the large video.
            strength: share of the steps that run again at the large size, above 0, up to 1.
            cache_steps: every how many steps the global copy of FreeSwim is computed; None: always.
            video: enlarge this one, `[frames, height, width, 3]` or a batch of them; `prompt` then describes it.
            output_type: "np" or "pil".
            more: of `vision_attn.diffusion.upscale_video`, which also says what raises.
        """
        if output_type not in ("np", "pil"):
            raise ValueError(f"output_type={output_type!r}; allowed: 'np', 'pil'")
        if height is None or width is None:
            raise ValueError(f"height and width of the large video are needed; got {height} and {width}")
        plain = WanPipeline.__new__(
            WanPipeline
        )  # this very pipeline, hooks and offloading included, called the old way
        plain.__dict__ = self.__dict__
        asked = {"frames": num_frames, "steps": num_inference_steps, "guidance": guidance_scale, "generator": generator}
        if video is not None:
            asked["prompt"] = prompt
        made = upscale_video(
            plain,
            prompt if video is None else video,
            height,
            width,
            strength,
            cache_steps,
            negative_prompt=negative_prompt,
            **asked,
            **more,
        )
        frames = made.frames if output_type == "np" else [self.numpy_to_pil(clip) for clip in made.frames]
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)
