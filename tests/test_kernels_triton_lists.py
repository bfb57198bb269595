"""Triton over block lists without a GPU: plans, tables, ahead-of-time compiles, and the interpreter in a process of its
own."""

import csv
import itertools
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.patterns import (
    BlockList,
    Circle,
    LengthDecay,
    Neighborhood,
    PowerStep,
    Radial,
    Streaming,
)
from vision_attn.kernels.patterns.blocks import map_from_lists
from vision_attn.kernels.problem import Problem

triton = pytest.importorskip("triton", reason="the block-list kernels need triton")
backend = BACKENDS["triton"]
if backend.missing("cpu"):
    pytest.skip(backend.missing("cpu")[0], allow_module_level=True)

from triton_interpreter import run_interpreted  # noqa: E402

from vision_attn.kernels.gpu import compile as aot  # noqa: E402
from vision_attn.kernels.gpu import compile_lists, lists, rules  # noqa: E402

CPU = torch.device("cpu")


def block_list(*lead: int, rows: int = 5, columns: int = 7, share: float = 0.5, within=None) -> BlockList:
    mask = torch.rand(*lead, rows, columns, generator=torch.Generator().manual_seed(rows)) < share
    made = BlockList.from_mask(mask, (16, 11), within)
    full = None if within is None else made.count // 2
    return BlockList((16, 11), made.index, made.count, full, within)


PLANS = {
    "radial": (Radial(decay=0.3, block=16, thin=4), (7, 61)),
    "radial by blocks": (Radial(rule="block", block=16, thin=4), (4, 61)),
    "streaming": (Streaming(window=150, sink=3), (400,)),
    "power steps": (PowerStep(block=64, window=30, causal=False), (500,)),
    "length decay": (LengthDecay(2, period=2.5, gamma=0.4, first_frame=True), (6, 200)),
    "one list": (block_list(), (77,)),
    "lists per batch and head": (block_list(2, 3, within=Neighborhood(9)), (77,)),
    "lists per batch": (block_list(2, 1), (77,)),
    "empty lists": (block_list(share=0), (77,)),
}


def plan_of(name: str) -> lists.Plan:
    pattern, grid = PLANS[name]
    return lists.plan(Problem(pattern, grid, batch=2, heads=3, kv_heads=3), CPU)


@pytest.mark.parametrize("name", PLANS)
def test_transposed_lists_are_the_transposed_map(name):
    plan = plan_of(name)
    given, seen = plan.lists, plan.transposed
    full = map_from_lists(given.index, given.full_count, plan.columns)
    maps = full, map_from_lists(given.index, given.count, plan.columns) & ~full
    lead = given.index.shape[:-2]
    entries, ends = seen.entries.view(-1, seen.rows * seen.slots), seen.ends.view(-1, 2 * plan.columns + 1)
    index = given.index.reshape(len(entries), -1)
    for number, at in enumerate(itertools.product(*map(range, lead))):
        for column in range(plan.columns):
            for kind, wanted in enumerate(maps):
                first, stop = ends[number, 2 * column + kind : 2 * column + kind + 2].tolist()
                places = entries[number, first:stop].long()
                assert (index[number, places] == column).all()
                assert (places // seen.slots).tolist() == wanted[at][:, column].nonzero().flatten().tolist()
    lengths = (ends[:, 2::2] - ends[:, :-1:2]).sum(0)[seen.order.long()]
    assert sorted(seen.order.tolist()) == list(range(plan.columns)) and (lengths.diff() <= 0).all()


@pytest.mark.parametrize("name", [n for n in PLANS if not n.startswith(("one", "lists", "empty"))])
def test_full_blocks_of_kept_lists_need_nothing(name):
    """They are allowed as a whole, none is short, and one multiplier is right for all of their pairs."""
    pattern, grid = PLANS[name]
    plan, mask = plan_of(name), pattern.mask(grid)
    rows, columns = plan.lists.block
    tokens = torch.arange(plan.tokens)
    rule = pattern.score_rule(grid)
    factor = torch.ones(1, 1) if rule is None else rule(torch.ones(1, 1), tokens[:, None], tokens)
    factor = factor.expand(plan.tokens, plan.tokens)
    for row, (index, full, count) in enumerate(
        zip(*(getattr(plan.lists, n) for n in ("index", "full_count", "count")), strict=True)
    ):
        rest = mask[row * rows : (row + 1) * rows].clone()
        for slot in range(int(count)):
            first = int(index[slot]) * columns
            here = rest[:, first : first + columns]
            if slot < full:
                assert here.all() and here.shape[1] == columns
                assert factor[row * rows : (row + 1) * rows, first : first + columns].unique().numel() == 1
            here.zero_()
        assert not rest.any()
    lengths = plan.lists.count[plan.order.long()]
    assert sorted(plan.order.tolist()) == list(range(len(lengths))) and (lengths.diff() <= 0).all()
    assert plan.lists.full_count.any()


def test_plans_of_lists_that_come_with_the_data_never_wait_for_the_device():
    """No copy to the host and no shape that depends on data; the lists themselves are not copied."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    pattern = block_list(2, 3, within=Neighborhood(9))
    problem = Problem(pattern, (77,), batch=2, heads=3, kv_heads=3)
    lists.plan(problem, CPU)  # the tables of `within` are made once
    with Record():
        plan = lists.plan(problem, CPU)
        assert plan.listed and plan.transposed
    assert "sort" in seen
    waits = ("_local_scalar_dense", "item", "nonzero", "unique", "_to_copy", "masked_select", "equal", "is_nonzero")
    copies = [name for name in seen if name.startswith(waits)]
    assert set(copies) <= {"_to_copy"} and copies.count("_to_copy") <= 2  # to int32, on the device
    assert plan.listed.entries.data_ptr() == pattern.index.data_ptr()


def test_equal_blocks_share_a_mask():
    """Where only distance matters there are as many masks as distances of partial blocks."""
    plan = lists.plan(Problem(Streaming(window=300), (128 * 12,)), CPU)
    given, (queries, keys) = plan.lists, plan.lists.block
    slot = torch.arange(given.index.shape[1])
    partial = (slot >= given.full_count[:, None]) & (slot < given.count[:, None])
    apart = (torch.arange(12)[:, None] * queries - given.index * keys)[partial]
    assert plan.rule.kind == rules.MASKS.value and len(apart) > 30
    spare = rules.LARGEST_TILE * (keys + 1)
    assert plan.rule.test.table.numel() == len(apart.unique()) * queries * keys + spare
    assert len(plan.rule.test.numbers) == given.index.numel()


@pytest.mark.parametrize("shape", ("constant", "linear", "parabolic"))
def test_numbers_of_the_decay_are_those_of_the_pattern(shape):
    alpha = 0.8 if shape == "constant" else (0.9, 0.5)
    pattern, grid = LengthDecay(2, alpha=alpha, beta=0.3, period=2.5, gamma=0.3, shape=shape), (9, 11)
    decay, number, bands = rules.decay(pattern, grid)
    distance = torch.arange(99)
    x = distance / decay.length
    got = decay.near + decay.change * (0, x, x * x)[number] + 0 * x
    for first, last in zip(decay[5::2], decay[6::2], strict=True):
        got[(distance >= first) & (distance <= last)] = decay.beta
    got[distance <= decay.untouched] = 1
    assert bands and torch.allclose(got, pattern.multiplier(distance, grid, torch.float32))
    assert rules.decay(LengthDecay(2), grid)[2] is False and rules.decay(Streaming(3), grid)[1] == -1


def test_frames_that_a_tile_of_keys_touches():
    pick = random.Random(0)
    for _ in range(300):
        positions, block, keys = pick.randint(1, 70), pick.choice((16, 24, 64)), pick.choice((16, 32, 64))
        rule = rules.Rule(rules.RADIAL.value, rules.Test(None, None, positions, 9))
        starts = [b * block + t for b in range(40) for t in range(0, block, keys)]
        touched = max((s + keys - 1) // positions - s // positions + 1 for s in starts)
        assert min(touched, 9) <= rule.parts(keys, block) <= min(touched + 1, 9)
    assert rules.Rule(rules.RADIAL.value, rules.Test(None, None, 3840, 18)).parts(64, 128) == 1


class _Scored(Streaming):
    def __init__(self):
        super().__init__(3)

    def score_rule(self, grid, device="cpu"):
        return lambda scores, query, key: scores * 2


def test_limits():
    problem = dict(grid=(77,), device="cuda")
    for pattern in (block_list(), block_list(within=Neighborhood(3)), *(PLANS[n][0] for n in ("streaming",))):
        assert backend.limits(Problem(pattern, **problem)) == []
    for pattern, words in (
        (block_list(within=Streaming(3)), "no test within Streaming for lists that come with the data"),
        (_Scored(), "no score rule but that of LengthDecay"),
    ):
        assert backend.limits(Problem(pattern, **problem)) == [words]
    within = BlockList.from_mask(torch.ones(1, 1, dtype=torch.bool), 77, Circle(2))
    assert "within Circle" in backend.limits(Problem(within, (7, 11), device="cuda"))[0]
    within = BlockList.from_mask(torch.ones(1, 1, dtype=torch.bool), 77, Radial(rule="block", block=4, thin=0))
    assert "within Radial" in backend.limits(Problem(within, (7, 11), device="cuda"))[0]


@pytest.mark.parametrize("block", (1, 16, 49, 64, 128, 3600))
def test_tiles_fit_any_block(block):
    for kernel, dtype, dim in itertools.product(
        (lists.kernels.forward, lists.kernels.grad_query, lists.kernels.grad_key),
        (torch.float16, torch.float32),
        (8, 64, 100, 256),
    ):
        problem = Problem(Streaming(3), (9,), head_dim=dim, value_dim=16, dtype=dtype)
        m, n, _ = lists.tiles(kernel, problem, block, block)
        assert 16 <= m <= 128 and 16 <= n <= 128 and max(m, n) < 2 * max(block, 16)
        assert m & (m - 1) == n & (n - 1) == 0


_TYPES = list(next(iter(compile_lists.shipped()))._asdict().items())
SHIPPED = list(compile_lists.shipped())


def rows_of_the_table() -> dict[compile_lists.Shipped, dict[str, str]]:
    with compile_lists.TABLE.open() as file:
        return {compile_lists.Shipped(*(type(x)(row[n]) for n, x in _TYPES)): row for row in csv.DictReader(file)}


def test_table_of_resources_lists_the_shipped_configurations():
    rows = rows_of_the_table()
    assert set(rows) == set(SHIPPED)
    dims = {(c.kernel, c.bits, c.head_dim) for c in SHIPPED}
    kernels = ("forward", "grad_query", "grad_key")
    assert dims == set(itertools.product(kernels, ("16", "32"), ("64", "128", "256")))
    assert max(int(row["shared"]) for row in rows.values()) <= aot.SHARED


def compiles(config: compile_lists.Shipped) -> None:
    kernel = aot.compiled(compile_lists.example(config))
    assert "sm_90" in kernel.asm["ptx"]
    assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == (config.loads == "descriptor")
    found = aot.resources(kernel)
    assert found["shared"] <= aot.SHARED
    row = rows_of_the_table().get(config, {"triton": None})
    if row["triton"] == triton.__version__:
        assert found == {name: int(row[name]) for name in found}, "run python -m vision_attn.kernels.gpu.compile_lists"


def once_each() -> list[compile_lists.Shipped]:
    """Every configuration once, by turns with descriptors and with pointers; the first ones with every rule."""
    by_config = {}
    for config in SHIPPED:
        by_config.setdefault(config[:-2], []).append(config)
    return [ways[i % len(ways)] for i, ways in enumerate(by_config.values())]


@pytest.mark.parametrize("config", once_each(), ids=lambda c: "-".join(map(str, c)))
def test_compiles_for_hopper(config):
    compiles(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", sorted(set(compile_lists.shipped(every=True)) - set(once_each())), ids=lambda c: "-".join(map(str, c))
)
def test_compiles_for_hopper_with_every_rule(config):
    compiles(config)


@pytest.mark.parametrize("which", ("test_random_problems", "not test_random_problems"))
def test_in_the_interpreter(which):
    run_interpreted("interpreted_triton_lists.py", "not slow", which)


@pytest.mark.slow
def test_more_in_the_interpreter():
    run_interpreted("interpreted_triton_lists.py", "slow")
