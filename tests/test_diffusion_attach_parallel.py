"""Sequence parallelism over two processes gives what one process gives."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402

RANKS = 2
CASES = {  # name -> class, attach before enabling parallelism, kind of parallelism
    "Wan": ("WanTransformer3DModel", False, "ulysses_degree"),
    "Flux": ("FluxTransformer2DModel", False, "ulysses_degree"),
    "QwenImage": ("QwenImageTransformer2DModel", False, "ulysses_degree"),
    "ring": ("WanTransformer3DModel", False, "ring_degree"),
    "attached first": ("FluxTransformer2DModel", True, "ulysses_degree"),
}


def _compare(name: str, attach_first: bool, degree: str) -> tuple[float, float]:
    """Largest difference of sparse in parallel to sparse alone, and of sparse to dense."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    model = MODELS[name]
    given = {**model.inputs(1), "return_dict": False}
    text = given["encoder_hidden_states"]
    if text.shape[1] % RANKS:
        given["encoder_hidden_states"] = torch.cat([text, text[:, :1]], 1)
    pattern = Neighborhood(window=model.window)
    with torch.no_grad():
        dense = model.build()(**given)[0]
        alone, shared = model.build(), model.build()
        with attach(alone, pattern, strict=True):
            sparse = alone(**given)[0]
        run = attach(shared, pattern, strict=True) if attach_first else None
        shape = (RANKS, 1) if degree == "ring_degree" else (1, RANKS)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
        shared.enable_parallelism(config=ContextParallelConfig(**{degree: RANKS}, mesh=mesh))
        run = run or attach(shared, pattern, strict=True)
        out = shared(**given)[0]
    assert run.report.denoisers[0].calls == {"sparse": model.calls, "dense": 0}
    return float((out - sparse).abs().max()), float((sparse - dense).abs().max())


def _worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: RANKS  # diffusers expects accelerators; these are CPU processes
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    for case, arguments in CASES.items():
        try:
            results.put((case, _compare(*arguments)))
        except Exception as error:
            results.put((case, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ulysses_equals_one_process_and_the_rest_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    try:
        results = [queue.get(timeout=300) for _ in range(RANKS * len(CASES))]
    finally:
        for worker in workers:
            worker.join(timeout=20)
            if worker.is_alive():
                worker.kill()
    for case, result in results:
        if case == "ring":
            assert "use ulysses_degree instead" in result
        elif case == "attached first":
            assert "attach after it" in result
        else:
            assert not isinstance(result, str), f"{case}: {result}"
            difference, effect = result
            assert difference < 1e-5 < 1e-3 < effect, case
