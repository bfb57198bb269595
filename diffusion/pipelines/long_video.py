"""Videos longer than a Wan model was trained on, as a custom pipeline of diffusers; needs `vision-attn[diffusion]`."""

from typing import Any

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from vision_attn.diffusion import extend_video


class LongVideoPipeline(WanPipeline):
    """`WanPipeline` whose call takes `times`, how much longer than trained, in place of `num_frames`.

    Papers: UltraViCo; RIFLEx; YaRN and others, see `vision_attn.diffusion.extend_video`.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        times: float = 2,
        method: Any = "ultravico",
        output_type: str = "np",
        return_dict: bool = True,
        **more: Any,
    ) -> WanPipelineOutput | tuple:
        """
        Args:
            times: length over the trained one, at least 1.
            method: "ultravico", "riflex", "pi", "ntk", "yarn", "tasr" or "none", or what `attach` takes.
            output_type: "np" or "pil".
            more: other arguments of `WanPipeline`, and `train_frames` of `vision_attn.diffusion.extend_video`, which
                also says what raises.
        """
        if output_type not in ("np", "pil"):
            raise ValueError(f"output_type={output_type!r}; allowed: 'np', 'pil'")
        if "num_frames" in more:
            raise ValueError(
                f"num_frames={more['num_frames']}: times={times:g} says how long the video is; leave it out"
            )
        plain = WanPipeline.__new__(
            WanPipeline
        )  # this very pipeline, hooks and offloading included, called the old way
        plain.__dict__ = self.__dict__
        made = extend_video(plain, prompt, times, method, **more)
        frames = made.frames if output_type == "np" else [self.numpy_to_pil(clip) for clip in made.frames]
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)
