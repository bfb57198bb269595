"""`vision-attn app`: the web page, served on this machine."""

import contextlib
import os
import signal
import tempfile
import threading
from pathlib import Path

import click

from vision_attn.apps.option_types import Choice, Whole, nearest
from vision_attn.apps.run_options import checked_device, device_option, dtype_option
from vision_attn.apps.web import TABS, WITHOUT_MODEL


@click.command()
@click.argument("tab", required=False, metavar="[TAB]", type=Choice(list(TABS)))
@click.option("--model", "models", multiple=True, metavar="[TAB=]MODEL", help="A folder or name instead of the "
              "built-in model; TAB= says whose, when the page has several. Repeatable.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 lets others in.")
@click.option("--port", type=Whole(1, 65535), help="7860, or the next free one, unless said.")
@click.option("--open", "browser", is_flag=True, help="Open the page in a browser.")
@device_option
@dtype_option
def app(
    tab: str | None, models: tuple[str, ...], host: str, port: int | None, browser: bool, device: str, dtype: str
) -> None:
    """Open the web page, with every tab or with one, until Ctrl-C.

    Nothing leaves this machine: no public link, no analytics, uploads and results are deleted after an hour and when
    the app ends.

    \b
    Examples:
      vision-attn app --open
      vision-attn app patterns --port 8000
      vision-attn app generate --model ./wan-1.3b --device cuda
      vision-attn app --model generate=./wan-1.3b --model ask=llava-hf/llava-1.5-7b-hf
    """
    chosen = _models(models, tab)
    checked_device(device, dtype)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="vision-attn-app-", ignore_cleanup_errors=True) as folder:
        uploads, results = Path(folder, "uploads"), Path(folder, "results")
        results.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read when gradio is imported
        from vision_attn.apps.web.page import Settings, build, launch

        page = build([tab] if tab else None, Settings(chosen, device, dtype, results))
        before = Path.cwd()
        os.chdir(results)  # Gradio may hand out files of the current folder, so it must hold none of the user's
        try:
            _, address, _ = launch(page, host, port, prevent_thread_lock=True, inbrowser=browser, quiet=True)
            click.echo(f"{address}  (Ctrl-C ends it)")
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            with contextlib.suppress(KeyboardInterrupt):
                stop.wait()
        except OSError as error:
            where = f"{host}, port {port or '7860 to 7959'}"
            raise click.ClickException(
                f"cannot listen on {where}: {error}. Choose another --port or --host."
            ) from error
        finally:
            page.close(verbose=False)
            os.chdir(before)
    click.echo("Closed.", err=True)


def _models(given: tuple[str, ...], tab: str | None) -> dict[str, str]:
    """Tab -> model from what was typed; folders become absolute, as the app changes the current folder."""
    users = [name for name in TABS if name not in WITHOUT_MODEL]
    chosen: dict[str, str] = {}
    for each in given:
        owner, equals, model = each.partition("=")
        if not equals or owner not in TABS and Path(each).exists():
            owner, model = tab or "", each
        if not owner:
            raise click.UsageError(f"--model: got {each!r}; say whose model it is, such as {users[0]}={each}.")
        if owner not in users or not model:
            raise click.UsageError(
                f"--model: got {each!r}{nearest(owner, users)} Tabs with a model: {', '.join(users)}."
            )
        if tab and owner != tab:
            raise click.UsageError(f"--model: got {each!r}, but this page is only {tab}.")
        if owner in chosen:
            raise click.UsageError(f"--model: {owner} was given twice, {chosen[owner]!r} and {model!r}.")
        chosen[owner] = str(Path(model).resolve()) if Path(model).exists() else model
    return chosen
