"""Files that `custom_pipeline=` of `DiffusionPipeline.from_pretrained` takes; copied elsewhere they work too."""

from pathlib import Path

UPSCALE = str(Path(__file__).parent / "freeswim_upscale.py")
LONG_VIDEO = str(Path(__file__).parent / "long_video.py")
