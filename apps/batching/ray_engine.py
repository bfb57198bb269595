"""Items on the actors of a Ray cluster: one actor per GPU, or one per CPU where there are no GPUs."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vision_attn.apps.batching.items import Item
from vision_attn.apps.batching.manifest import OutputError
from vision_attn.apps.batching.runner import Place, Worker

STARTS = 3  # a busy machine may miss the half minute that Ray gives its own processes
RETRIES = 2  # of a batch whose process died


class Actor:
    """A worker in a process of its own. Items and events travel as JSON, because columns differ from row to row."""

    def __init__(self, place: Place, manifest: str):
        if not (place.output / manifest).is_file():
            raise FileNotFoundError(f"{place.output} is another folder on {os.uname().nodename}")
        self.worker = Worker(place)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        events = []
        for items in batch["items"]:
            try:
                events += self.worker.work(Item(**item) for item in json.loads(items))
            except OutputError as error:  # of every item alike, so it ends the job, and Ray must not take it for a loss
                events.append({"event": "stop", "because": [error.errno, error.strerror, error.filename]})
        return {"event": [json.dumps(event) for event in events]}


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray on this machine until the block ends, or the running cluster of an address such as "auto" or "host:6379".

    Raises:
        ImportError: Ray is not installed.
        ValueError: there is no cluster at the address, or Ray itself failed.
    """
    # Nothing is reported anywhere, and only processes that know a token may give the cluster work.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray: Ray is not installed; run: pip install 'vision-attn[ray]'") from error

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "address": address or "local"}
    if address is None:
        options["include_dashboard"] = False
    for left in reversed(range(1 if address else STARTS)):
        try:
            ray.init(**options)
            break
        except Exception as error:
            ray.shutdown()
            if address:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"--address {address}: no Ray cluster there that lets us in ({reason}).\nIf it was started with a "
                    "token, as Ray does where one is kept, put RAY_AUTH_MODE=token before the command; with auto Ray "
                    "finds that out. See: ray status"
                ) from error
            if not left:
                raise
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Ray gave up: {reason} The same command goes on; see: ray status") from error
    finally:
        ray.shutdown()


def engine(address: str | None, manifest: str) -> Callable[[list[Item], Place], Iterator[dict[str, Any]]]:
    """What `runner.run` takes as `events`: items go to actors, events come in the order in which batches end.

    Args:
        address: of a running cluster; None starts Ray on this machine and stops it at the end.
        manifest: a file of the output folder, by which an actor sees that it has the same folder.
    """

    def events(items: list[Item], place: Place) -> Iterator[dict[str, Any]]:
        if not items:
            return
        place = replace(place, output=place.output.absolute())  # actors start in other folders
        with cluster(address) as ray:
            left = {item.name: item for item in items}
            for batch in _data(ray, items, place, manifest).iter_batches(batch_size=None, prefetch_batches=0):
                for event in map(json.loads, batch["event"]):
                    if event["event"] == "stop":
                        raise OutputError(*event["because"])
                    del left[event["id"]]
                    yield event
            error = f"its process died {RETRIES + 1} times, as it does when memory runs out; ask for a smaller size"
            for item in left.values():
                yield {"event": "failed", "id": item.name, "row": item.row, "hash": item.hash, "error": error}

    return events


def _data(ray: Any, items: list[Item], place: Place, manifest: str) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    found = ray.cluster_resources()
    gpus = 0 if place.device == "cpu" else int(found.get("GPU", 0))
    parts = [items[at : at + place.batch] for at in range(0, len(items), place.batch)]
    rows = [{"items": json.dumps([item.to_dict() for item in part])} for part in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the last two arguments, which have no other names yet
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor,
            fn_constructor_args=(place, manifest),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(gpus or int(found.get("CPU", 1)), len(rows))),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
