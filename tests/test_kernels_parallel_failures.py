"""A rank that ends or never answers leaves the others with an error in words, not waiting for ever."""

from __future__ import annotations

import datetime
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vision_attn import Neighborhood, attend
from vision_attn.kernels import exchange
from vision_attn.kernels.parallel import Shards

WAYS = ("ends before the rows are exchanged", "ends before the gradients are exchanged", "never answers")
PATIENCE = datetime.timedelta(seconds=3)  # of the group whose rank never answers


def work(rank: int, port: int, queue) -> None:
    """Rank 0 works with each of the others in turn, and each of those fails in its own way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=1 + len(WAYS))
    groups = [dist.new_group([0, other], timeout=PATIENCE) for other in range(1, 1 + len(WAYS))]
    q, k, v = (torch.randn(1, 6, 4, 2, 8).requires_grad_() for _ in range(3))
    for way, group in zip(WAYS, groups, strict=True):
        if dist.get_rank(group) < 0:
            continue
        if rank and way == WAYS[0]:
            exchange.Exchange.__init__ = lambda *_: os._exit(0)
        if rank and way == WAYS[2]:
            time.sleep(600)  # it is killed when the test is over
        try:
            out = attend(q, k, v, Neighborhood(window=3), parallel=Shards(group=group))
            if rank:
                os._exit(0)
            out.sum().backward()
            queue.put((way, "nothing"))
        except RuntimeError as error:
            queue.put((way, str(error)))


def test_the_others_end_with_a_clear_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("forkserver")  # with what test_kernels_parallel.py preloads
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, port, queue)) for rank in range(1 + len(WAYS))]
    for worker in workers:
        worker.start()
    try:
        said = dict(queue.get(timeout=150) for _ in WAYS)
    finally:
        for worker in workers:
            worker.kill()
    for other, way in enumerate(WAYS, 1):
        # numbers are those in the group, where the other is rank 1
        assert said[way].startswith("rank 0 could not exchange rows with ranks [") and "1]" in said[way], (other, said)
        assert "ended, or did not make the same call in time" in said[way]
