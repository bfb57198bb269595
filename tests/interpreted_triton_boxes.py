"""The box kernels in Triton's interpreter against the float64 reference.

Collected only by `test_kernels_triton_boxes.py`, in a process of its own with TRITON_INTERPRET=1: a process either
interprets kernels or compiles them.
"""

import dataclasses
import functools
import random

import pytest
import torch
from triton.runtime import interpreter

from vision_attn.kernels.attend import attend
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.gpu import launch
from vision_attn.kernels.patterns import Circle, Dense, Neighborhood, Separable
from vision_attn.kernels.patterns.base import plain_axis
from vision_attn.kernels.problem import Problem
from vision_attn.kernels.testing import Case, error

MOST = 300  # query-head pairs of a random case: the interpreter takes a hundredth of a second per box
CASES = 24


def fits(seed: int) -> bool:
    parts = Case(seed).parts
    q = parts["leaves"][0][0]
    separable = isinstance(parts["pattern"], Separable) and not parts["biased"]
    return separable and parts["dtype"] != torch.float64 and q.numel() // q.shape[-1] <= MOST


def seeds(first: int, count: int) -> list[int]:
    found = (seed for seed in range(first, first + 100 * count) if fits(seed))
    return [next(found) for _ in range(count)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that is allocated and not written reads as NaN, so that an output left out cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fast_interpreter(monkeypatch):
    """Without its checks for integer overflow, and patching triton's language once per module and launch instead of for
    every function that a kernel calls, the interpreter takes a third of the time."""
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        scope = patch(function)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.fixture
def tiles(monkeypatch):
    """Small boxes in place of the shipped ones, so that small grids have several, full ones among them."""

    def use(own: int, seen: int) -> None:
        config = {bits: {str(2**i): [[own, seen, 4, 1]] for i in range(4, 9)} for bits in ("16", "32")}
        monkeypatch.setattr(launch, "CONFIGS", dict.fromkeys(launch.CONFIGS, config))

    use(16, 16)
    return use


def compare_random(seed, tiles):
    pick = random.Random(seed)
    tiles(pick.choice((16, 32)), pick.choice((16, 32)))
    case = Case(seed)
    assert not case.refusals("triton", grad=True)
    assert case.compare("triton") >= 4


@pytest.mark.parametrize("seed", seeds(0, CASES))
def test_random_problems(seed, tiles):
    compare_random(seed, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100_000, 130_000, 1000))
def test_many_random_problems(first, tiles):
    for seed in seeds(first, 10):
        compare_random(seed, tiles)


def case(pattern, grid, dtype=torch.float32, batch=1, heads=1, kv_heads=1, dim=16, extra=0, view="plain", hidden=()):
    """A problem that is not random, with the budgets of those that are; `hidden` lists extra tokens masked out."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def leaf(heads, *middle):
        return random_tensor(
            *((batch, heads, *middle) if view == "heads-first" else (batch, *middle, heads)), dim
        ), view

    leaves = [leaf(heads, *grid), leaf(kv_heads, *grid), leaf(kv_heads, *grid)]
    leaves += [leaf(kv_heads, extra), leaf(kv_heads, extra)] if extra else []
    weights = [random_tensor(batch, *grid, heads, dim), random_tensor(batch, *grid, heads)]
    visible = torch.ones(batch, extra, dtype=torch.bool) if hidden else None
    for token in hidden:
        visible[:, token] = False
    options = {"scale": None, "extra_mask": visible, "return_lse": True}
    made = Case(-1)
    made.__dict__["parts"] = dict(
        pattern=pattern, batch=batch, leaves=leaves, weights=weights, options=options, dtype=dtype, biased=False
    )
    return made


triton = functools.partial(attend, backend="triton")


class Gaps(Separable):
    """On every axis the first query sees nothing, nobody sees the last key, and the others see two keys."""

    def axis(self, extent, index):
        return plain_axis([(0, 0)] + [(min(x - 1, extent - 2), min(x + 1, extent - 1)) for x in range(1, extent)])


FIXED = {
    "one token": case(Dense(), (1,)),
    "one-wide": case(Neighborhood((1, 3, 1)), (1, 17, 1), heads=4, kv_heads=2),
    "full boxes in 2-D": case(Neighborhood(8), (9, 11), dim=32),
    "full boxes in 3-D": case(Neighborhood((2, 4, 5), (1, 2, 3)), (2, 5, 7), torch.bfloat16),
    "dilated, strided and causal": case(
        Neighborhood((2, 3, 2), (2, 1, 2), (1, 2, 3), (True, False, True)), (3, 7, 7), torch.float16, heads=2
    ),
    "disc": case(Circle(5), (9, 11), dim=24),
    "disc through frames": case(Circle(3), (2, 6, 7), extra=3),
    "extra tokens": case(Neighborhood(4), (5, 7), batch=2, heads=2, kv_heads=1, extra=21),
    "extra tokens whose queries are shared out": case(Neighborhood(2, 2), (131,), extra=2),
    "hidden extra tokens": case(Neighborhood(4), (6, 7), torch.bfloat16, extra=17, hidden=(0, 5, 16)),
    "heads first": case(Neighborhood(3, 3), (7, 8), torch.float16, batch=2, heads=2, kv_heads=2, view="heads-first"),
    "queries that see nothing": case(Gaps(), (4, 5)),
    "queries that see only hidden extra tokens": case(Gaps(), (4, 5), extra=2, hidden=(0, 1)),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_problems(name, tiles, monkeypatch):
    """With boxes loaded by descriptor where that is possible, then by pointer: the same bits."""
    monkeypatch.setattr(launch, "has_descriptors", lambda device: True)
    by_descriptor = FIXED[name].run(triton)
    for got, want, allowed in zip(by_descriptor, FIXED[name].truth, FIXED[name].budgets, strict=True):
        assert error(got, want) <= allowed
    monkeypatch.setattr(launch, "has_descriptors", lambda device: False)
    assert all(torch.equal(*pair) for pair in zip(FIXED[name].run(triton), by_descriptor, strict=True))


SHIPPED = [
    (dtype, dim, choice)
    for dtype, bits in ((torch.bfloat16, "16"), (torch.float32, "32"))
    for dim in (16, 32, 64, 128, 256)
    for choice in range(max(len(by_bits[bits][str(dim)]) for by_bits in launch.CONFIGS.values()))
]


@pytest.mark.parametrize("dtype, dim, choice", SHIPPED)
def test_shipped_configurations(dtype, dim, choice, monkeypatch):
    """Boxes of the shipped sizes; of kernels with fewer choices than others, the last."""
    bits = "32" if dtype == torch.float32 else "16"
    choices = {kernel: by_bits[bits][str(dim)] for kernel, by_bits in launch.CONFIGS.items()}
    only = {kernel: {bits: {str(dim): [c[min(choice, len(c) - 1)]]}} for kernel, c in choices.items()}
    monkeypatch.setattr(launch, "CONFIGS", only)
    assert case(Neighborhood(5), (6, 13), dtype, dim=dim, extra=3).compare("triton") == 7


def test_gradients_come_out_the_same_every_time(tiles):
    again = [FIXED["queries that see only hidden extra tokens"].run(triton) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))


def test_nan_key_reaches_only_queries_that_see_it(tiles):
    grid, pattern = (7, 9), Neighborhood((3, 4))
    q, k, v = torch.randn(3, 1, *grid, 1, 16)
    k[0, 2, 3] = float("nan")
    out, lse = attend(q, k, v, pattern, return_lse=True, backend="triton")
    seen = pattern.mask(grid)[:, 2 * 9 + 3].view(grid)
    assert torch.equal(out.isnan().any(-1)[0, ..., 0], seen)
    assert torch.equal(lse.isnan()[0, ..., 0], seen)


def test_nan_in_a_hidden_extra_token_reaches_nobody(tiles):
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 5, 4, 1, 16))
    extra_k, extra_v = torch.randn(2, 1, 3, 1, 16)
    extra_k[0, 1] = float("nan")
    visible = torch.tensor([[True, False, True]])
    out = attend(q, k, v, Neighborhood(3), extra_kv=(extra_k, extra_v), extra_mask=visible, backend="triton")
    assert out.isfinite().all()


def test_offsets_are_wider_than_32_bits(tiles):
    """Strides whose products pass 2 ** 31 elements; memory that is not touched costs nothing."""
    grid, stride = (3, 5), 2**30 // 2 + 64
    want = torch.randn(3, 1, *grid, 1, 16, generator=torch.Generator().manual_seed(0)).half()
    torch.use_deterministic_algorithms(False)  # do not fill it
    room = torch.empty(4 * stride + 3 * 5 * 16, dtype=torch.float16)
    q, k, v = (room[i * 80 :].as_strided((1, 3, 5, 1, 16), (0, 16, stride, 0, 1)) for i in range(3))
    for tensor, value in zip((q, k, v), want, strict=True):
        tensor.copy_(value)
    got = attend(q, k, v, Neighborhood(3), backend="triton")
    assert (got - attend(*want, Neighborhood(3), backend="reference")).abs().max() < 2e-3


def test_trains_inside_a_compiled_graph(tiles):
    pattern, generator = Neighborhood(3), torch.Generator().manual_seed(0)
    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        generator.manual_seed(0)
        q, k, v, extra_k, extra_v = (
            torch.randn(1, *middle, 1, 16, generator=generator).requires_grad_()
            for middle in ((5, 6), (5, 6), (5, 6), (2,), (2,))
        )
        out = function(q, k, v, pattern, extra_kv=(extra_k, extra_v), backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, extra_k, extra_v))])
    assert max(error(a, b.double()) for a, b in zip(*results, strict=True)) < 1e-5


def test_no_batch_and_no_extra_tokens(tiles):
    q = torch.randn(0, 4, 5, 2, 16, requires_grad=True)
    out = attend(q, q, q, Neighborhood(3), backend="triton")
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    q, none = torch.randn(1, 4, 5, 2, 16), torch.randn(1, 0, 2, 16)
    with_none = attend(q, q, q, Neighborhood(3), extra_kv=(none, none), backend="triton")
    assert torch.equal(with_none, attend(q, q, q, Neighborhood(3), backend="triton"))


def test_only_asked_for_by_name_in_the_interpreter():
    assert BACKENDS["triton"].missing("cpu") == []
    assert "interpreter" in BACKENDS["triton"].by_name_only(Problem(Neighborhood(3), (4, 4)))
