"""The block-list kernels in Triton's interpreter against the float64 reference.

Collected only by `test_kernels_triton_lists.py`, in a process of its own with TRITON_INTERPRET=1.
"""

import dataclasses
import functools
import math

import pytest
import torch
from interpreted_triton_boxes import case, poisoned_memory  # noqa: F401

from vision_attn.kernels.attend import attend
from vision_attn.kernels.gpu import lists
from vision_attn.kernels.patterns import (
    Blocked,
    BlockList,
    LengthDecay,
    Neighborhood,
    PowerStep,
    Radial,
    Streaming,
    length_decay,
    power_step,
    radial,
    streaming,
)
from vision_attn.kernels.testing import Case, error

MOST = 12  # tiles of 16 x 16 that a random case visits: the interpreter takes a tenth of a second for the four kernels
CASES = 6
triton = functools.partial(attend, backend="triton")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short blocks and small tiles in place of the shipped ones, so that small grids have several, full ones among
    them."""
    for module, name, value in (
        (radial, "SHORT", (16, 16)),
        (streaming, "TILE", (16, 16)),
        (power_step, "TILE", (16, 16)),
        (length_decay, "BLOCK", 16),
    ):
        monkeypatch.setattr(module, name, value)
    config = {bits: {str(2**i): [[16, 16, 4, 1]] for i in range(4, 9)} for bits in ("16", "32")}
    monkeypatch.setattr(lists, "CONFIGS", dict.fromkeys(lists.CONFIGS, config))


def fits(seed: int) -> bool:
    parts = Case(seed).parts
    if not isinstance(parts["pattern"], Blocked) or parts["dtype"] == torch.float64:
        return False
    q, view = parts["leaves"][0]
    grid = tuple(q.shape[2:-1] if view == "heads-first" else q.shape[1:-2])
    found = parts["pattern"].lists(grid)
    per_head = found.count.double().sum(-1).mean() * math.prod(-(-side // 16) for side in found.block)
    return bool(0 < per_head * parts["batch"] * q.shape[1 if view == "heads-first" else -2] <= MOST)


def seeds(first: int, count: int) -> list[int]:
    found = (seed for seed in range(first, first + 100 * count) if fits(seed))
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("seed", seeds(0, CASES))
def test_random_problems(seed):
    assert not Case(seed).refusals("triton", grad=True)
    assert Case(seed).compare("triton") >= 4


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100_000, 130_000, 1000))
def test_many_random_problems(first):
    for seed in seeds(first, 10):
        test_random_problems(seed)


def random_map(*shape: int, share: float = 0.6) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < share


def biased(made: Case) -> Case:
    q, _ = made.parts["leaves"][0]
    shape = made.parts["pattern"].bias_shape(tuple(q.shape[1:-2]), q.shape[-2])
    made.parts["leaves"].append((torch.randn(shape).to(q.dtype), "plain"))
    made.parts["biased"] = True
    return made


def half_full(mask: torch.Tensor, block: tuple[int, int], within) -> BlockList:
    """The first half of every row needs no test."""
    made = BlockList.from_mask(mask, block, within)
    return dataclasses.replace(made, full_count=made.count // 2)


def empty_rows(*shape: int) -> torch.Tensor:
    mask = random_map(*shape)
    mask[..., 1, :] = False
    return mask


half, brain = torch.float16, torch.bfloat16
FIXED = {
    "radial, tiles in one frame": lambda: case(Radial(decay=0.2, block=3, thin=0), (3, 16), brain),
    "radial, tiles in several frames": lambda: case(Radial(decay=0.3, block=2, thin=1), (5, 7), extra=3),
    "radial by blocks": lambda: case(Radial(rule="block", block=16, thin=0), (3, 17), half),
    "streaming": lambda: case(Streaming(window=20, sink=3), (53,)),
    "power steps": lambda: case(PowerStep(block=16, window=4, sink=2, causal=False), (53,)),
    "length decay": lambda: case(
        LengthDecay(4, alpha=0.7, period=3, gamma=0.4, first_frame=True), (6, 8), extra=5, hidden=(1,)
    ),
    "length decay that is parabolic": lambda: case(LengthDecay(1, alpha=(0.9, 0.4), shape="parabolic"), (3, 11)),
    "lists per batch and head": lambda: case(
        BlockList.from_mask(random_map(2, 2, 3, 4), (16, 12)), (41,), batch=2, heads=2
    ),
    "lists per head, of shared KV heads, with a bias": lambda: biased(
        case(BlockList.from_mask(random_map(1, 2, 2, 3), (15, 12)), (3, 9), batch=2, heads=2, kv_heads=1, extra=2)
    ),
    "lists per batch, with a bias": lambda: biased(
        case(BlockList.from_mask(random_map(2, 1, 2, 2), 16), (3, 7), half, batch=2, heads=2)
    ),
    "lists within a neighborhood, some blocks full": lambda: case(
        half_full(random_map(3, 3, share=0.9), (16, 16), Neighborhood((3, 4), dilation=(1, 2))), (5, 9)
    ),
    "lists within radial": lambda: case(
        BlockList.from_mask(random_map(3, 3, share=0.9), 15, Radial(block=2, decay=0.2, thin=1)), (5, 9)
    ),
    "blocks of several tiles": lambda: biased(case(BlockList.from_mask(random_map(2, 2), (20, 30)), (37,), dim=20)),
    "blocks of one token": lambda: case(BlockList.from_mask(random_map(3, 3), 1), (3,)),
    "queries that see nothing": lambda: biased(case(BlockList.from_mask(empty_rows(3, 3), 16), (41,))),
    "queries that see hidden extra tokens only": lambda: case(
        BlockList.from_mask(empty_rows(3, 3), 16, Neighborhood(5)), (41,), extra=2, hidden=(0, 1)
    ),
    "heads first": lambda: case(
        BlockList.from_mask(random_map(2, 2), 16), (3, 7), half, batch=2, heads=2, kv_heads=2, view="heads-first"
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_problems(name):
    assert FIXED[name]().compare("triton") >= 5


@pytest.mark.parametrize("name", ("radial by blocks", "blocks of one token"))
def test_the_same_bits_by_descriptor_and_by_pointer(name, monkeypatch):
    made, results = FIXED[name](), []
    for boxed in (True, False):
        monkeypatch.setattr(lists, "has_descriptors", lambda device, boxed=boxed: boxed)
        results.append(made.run(triton))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradients_come_out_the_same_every_time():
    made = FIXED["blocks of several tiles"]()
    again = [made.run(triton) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))


@pytest.mark.parametrize(
    "pattern", (Radial(block=1, decay=0.3, thin=0), BlockList.from_mask(random_map(3, 4), (16, 12)))
)
def test_nan_key_reaches_only_queries_that_see_it(pattern):
    grid, token = (4, 11), 27
    q, k, v = torch.randn(3, 1, *grid, 1, 16)
    k.view(-1, 16)[token] = float("nan")
    out, lse = attend(q, k, v, pattern, return_lse=True, backend="triton")
    seen = pattern.mask(grid)[:, token].view(grid)
    assert seen.any() and not seen.all()
    assert torch.equal(out.isnan().any(-1)[0, ..., 0], seen)
    assert torch.equal(lse.isnan()[0, ..., 0], seen)


def test_a_bias_of_minus_infinity_hides_a_block():
    q, k, v = torch.randn(3, 1, 32, 1, 16)
    pattern, bias = BlockList.from_mask(torch.ones(2, 2, dtype=torch.bool), 16), torch.zeros(2, 2)
    bias[:, 0] = float("-inf")  # of the first key block, which comes first
    bias.requires_grad_()
    got = attend(q, k, v, pattern, bias=bias, backend="triton")
    want = attend(q, k, v, BlockList.from_mask(torch.tensor([[False, True]] * 2), 16), backend="reference")
    assert error(got, want.double()) < 1e-5
    assert torch.autograd.grad(got.sum(), bias)[0].isfinite().all()


def test_offsets_are_wider_than_32_bits():
    """Strides whose products pass 2 ** 31 elements; memory that is not touched costs nothing."""
    tokens, stride = 5, 2**30 // 2 + 64
    want = torch.randn(3, 1, tokens, 1, 16, generator=torch.Generator().manual_seed(0)).half()
    torch.use_deterministic_algorithms(False)  # do not fill it
    room = torch.empty(4 * stride + 3 * 16, dtype=torch.float16)
    q, k, v = (room[i * 16 :].as_strided((1, tokens, 1, 16), (0, stride, 0, 1)) for i in range(3))
    for tensor, value in zip((q, k, v), want, strict=True):
        tensor.copy_(value)
    got = attend(q, k, v, Streaming(window=3), backend="triton")
    assert (got - attend(*want, Streaming(window=3), backend="reference")).abs().max() < 2e-3


def test_trains_inside_a_compiled_graph():
    mask, results = random_map(2, 2), []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 20, 1, 16, generator=generator).requires_grad_() for _ in range(3))
        bias = torch.randn(2, 2, generator=generator).requires_grad_()
        out = function(q, k, v, BlockList.from_mask(mask, (16, 12)), bias=bias, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    assert max(error(a, b.double()) for a, b in zip(*results, strict=True)) < 1e-5


def test_no_batch_and_no_extra_tokens():
    pattern, q = BlockList.from_mask(random_map(2, 2), 16), torch.randn(0, 20, 2, 16, requires_grad=True)
    out = attend(q, q, q, pattern, backend="triton")
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    q, none = torch.randn(1, 20, 2, 16), torch.randn(1, 0, 2, 16)
    with_none = attend(q, q, q, pattern, extra_kv=(none, none), backend="triton")
    assert torch.equal(with_none, attend(q, q, q, pattern, backend="triton"))
