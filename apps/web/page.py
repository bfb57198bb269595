"""The frame of the web app: one page of tabs, how it is served, and what every tab shares.

A tab is a module here with `build(settings)`, which makes its widgets inside the open Blocks and wires them to plain
functions. No model is loaded until somebody presses a button.
"""

from __future__ import annotations

import functools
import inspect
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from vision_attn.apps.web import TABS

INTRO = "Spatial attention for vision, diffusion and vision-language models, on models small enough for this machine."
# For every event that runs a model: they share one slot, so that two visitors do not share the memory of one device.
HEAVY = {"concurrency_id": "heavy", "concurrency_limit": 1}
QUEUE = 64  # callers that may wait; the next one is told to come back
UPLOAD = "30mb"
KEEP = 3600  # seconds that uploads and results stay on the disk
LARGEST = 2048  # pixels of the longest side of a picture, once read

CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.drawn .grid-wrap { min-height: 0 !important; }
.drawn .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; }
.caption-label { font-size: 11px !important; padding: 2px 6px !important; max-width: 94% !important; }
.toast-text { white-space: pre-line; overflow-wrap: anywhere; }
.prose table { display: block; overflow-x: auto; max-width: 100%; border: none !important; }
.prose :is(td, th) { overflow-wrap: normal !important; word-break: normal !important; padding: 4px 10px !important; }
.prose :is(td, th):not(:last-child) { white-space: nowrap; }
.prose td:last-child { min-width: 140px; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""
log = logging.getLogger("vision_attn.app")


@dataclass(frozen=True)
class Settings:
    """What was said when the app was started.

    Args:
        models: tab -> model of that tab, a name or a folder; a tab that is not in it uses the built-in model.
        device: auto, cpu, cuda, cuda:1.
        dtype: auto, float32, bfloat16, float16.
        folder: where results are written; None is the system's folder for temporary files.
    """

    models: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    folder: Path | None = None

    def new_folder(self) -> Path:
        """An empty folder for the files of one run; those that were made more than an hour ago are deleted."""
        if self.folder is not None:
            for old in self.folder.glob("run-*"):
                if time.time() - old.stat().st_mtime > KEEP:
                    shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))


def build(tabs: Iterable[str] | None = None, settings: Settings | None = None) -> gr.Blocks:
    """The page with these tabs, or all of them; one tab alone is a page of its own.

    Args:
        tabs: keys of `TABS` (vision_attn.apps.web).
        settings: models, device and folder of this app.

    Raises:
        ValueError: a tab that does not exist.
    """
    chosen = list(TABS) if tabs is None else list(dict.fromkeys(tabs))
    for name in chosen:
        if name not in TABS:
            raise ValueError(f"unknown tab {name!r}; allowed: {', '.join(TABS)}")
    settings = settings or Settings()
    alone = len(chosen) == 1
    title = f"vision-attn: {TABS[chosen[0]]}" if alone else "vision-attn"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        gr.Markdown(f"# {title}" if alone else f"# {title}\n{INTRO}")
        if alone:
            _tab(chosen[0], settings)
        else:
            with gr.Tabs():
                for name in chosen:
                    with gr.Tab(TABS[name], id=name):
                        _tab(name, settings)
    return page.queue(max_size=QUEUE, api_open=False)  # open, callers could pass the queue by


def _tab(name: str, settings: Settings) -> None:
    import_module(f"vision_attn.apps.web.{name}").build(settings)


def launch(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, **more: Any) -> tuple[Any, str, str]:
    """Serve a page; `more` are options of `Blocks.launch`, such as `prevent_thread_lock=True`, `inbrowser=True`.

    Returns:
        What `Blocks.launch` returns: the FastAPI application, the local address, and an empty public one.
    """
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=theme(),
        css=CSS,
        max_file_size=UPLOAD,
        show_error=False,  # what `kind` did not put in words stays in the log
        footer_links=["api"],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        **more,
    )


def theme() -> gr.themes.Base:
    """Blue and orange as in the pictures of patterns; only fonts that are there, as there may be no network."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Soft(primary_hue="blue", secondary_hue="orange", neutral_hue="slate", font=fonts, font_mono=mono)


def kind(function: Callable) -> Callable:
    """Make errors of a function, or of a generator, something to read: `gr.Error` with the words and no traceback.

    Errors about what was asked for (ValueError, TypeError, click's) keep their text. Of any other the person is
    told that it is not their fault, and the traceback goes to the log.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise _readable(error) from None

    @functools.wraps(function)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        try:
            return (yield from function(*args, **kwargs))
        except Exception as error:
            raise _readable(error) from None

    return stepped if inspect.isgeneratorfunction(function) else called


def _readable(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, (ValueError, TypeError)):
        text = str(error).strip()
        log.info("a run of the app was refused", exc_info=error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = "Out of memory.\nThis is more than the device holds.\nAsk for something smaller."
    else:
        text = ""
    if not text:
        log.error("a run of the app failed", exc_info=error)
        text = f"Something broke ({type(error).__name__}); nothing was saved.\nThe log of the app says where."
    # The browser renders messages as HTML, and they may quote what somebody typed.
    return gr.Error(text.replace("&", "&amp;").replace("<", "&lt;"), duration=None, print_exception=False)


def picture_input(label: str = "Picture", **more: Any) -> gr.Image:
    """A widget for a picture from a file, the camera or the clipboard; its value is for `read_picture`.

    Args:
        label: what is written above it.
        more: options of `gr.Image`.
    """
    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"], label=label, **more)
    # Gradio opens the file here to find its format, and of a broken one says no more than "Error".
    image.preprocess = _uploaded
    return image


def _uploaded(picture: Any) -> str | None:
    """The path of a picture that was uploaded here.

    Gradio checks only values that call themselves files, so a program could name any picture of this machine.
    """
    if picture is None or not picture.path:
        return None
    if not Path(picture.path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("This picture was not uploaded here.\nSend it to the upload route first.", print_exception=False)
    return picture.path


def read_picture(path: str | None, largest: int = LARGEST) -> np.ndarray:
    """The uploaded picture, uint8 `[height, width, 3]`, RGB, upright, no side longer than `largest` pixels.

    Raises:
        ValueError: there is none, or the file is no picture or broken.
    """
    from vision_attn.images import read_image

    if not path:
        raise ValueError("There is no picture.\nUpload one, take one with the camera, or choose an example.")
    try:
        return read_image(path, largest)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error
