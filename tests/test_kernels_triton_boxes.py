"""Triton over boxes without a GPU: box arithmetic, descriptors, compiling ahead of time, and the interpreter in a
process of its own."""

import csv
import itertools
import math
import random

import pytest
import torch

from vision_attn.kernels import tiles
from vision_attn.kernels.backends import BACKENDS
from vision_attn.kernels.explain import explain
from vision_attn.kernels.gpu import tables
from vision_attn.kernels.patterns import Circle, Dense, Neighborhood, Separable
from vision_attn.kernels.patterns.base import Axis
from vision_attn.kernels.problem import Problem
from vision_attn.kernels.testing import random_pattern

triton = pytest.importorskip("triton", reason="the box kernels need triton")
backend = BACKENDS["triton"]
if backend.missing("cpu"):
    pytest.skip(backend.missing("cpu")[0], allow_module_level=True)

from triton_interpreter import run_interpreted  # noqa: E402

from vision_attn.kernels.gpu import compile as aot  # noqa: E402
from vision_attn.kernels.gpu import launch  # noqa: E402


def separable(count: int, most: int = 200):
    """Random separable patterns on grids of at most `most` tokens."""
    pick, found = random.Random(0), 0
    while found < count:
        pattern, grid = random_pattern(pick)
        if isinstance(pattern, Separable) and math.prod(grid) <= most:
            found += 1
            yield pattern, grid, pick


def power(pick: random.Random) -> int:
    return 2 ** pick.randint(0, 4)


def in_order(mask: torch.Tensor, pattern: Separable, grid: tuple[int, ...]) -> torch.Tensor:
    """A mask with rows and columns in the order of positions."""
    token = torch.zeros((), dtype=torch.long)
    for axis, extent in zip(pattern.axes(grid), grid, strict=True):
        token = (token[..., None] * extent + torch.tensor(axis.order)).flatten()
    return mask[token][:, token]


@pytest.mark.parametrize("keys_own", (False, True))
def test_visited_boxes_cover_the_mask_once_and_full_ones_need_no_test(keys_own):
    found, pick = 0, random.Random(0)
    discs = ((Circle(radius), (9, 11), pick) for radius in (2, 3, 3, 4, 4, 5, 5, 6))
    for pattern, grid, pick in itertools.chain(separable(100), discs):
        mask = in_order(pattern.mask(grid), pattern, grid)
        mask = (mask.T if keys_own else mask).reshape(grid * 2)
        visited, full = torch.zeros(grid * 2, dtype=torch.int), torch.zeros(grid * 2, dtype=torch.int)
        own, seen = ((1,) * (3 - len(grid)) + tuple(power(pick) for _ in grid) for _ in range(2))
        every_axis = zip(tables.axes(pattern, grid, keys_own), own, seen, strict=True)
        for tile in itertools.product(*(tables.rows(*axis, *sides) for axis, *sides in every_axis)):
            tile, sides = tile[-len(grid) :], seen[-len(grid) :]
            rows = tuple(slice(r.first, r.stop) for r in tile)
            for numbers in itertools.product(*(range(r.count) for r in tile)):
                boxes = [
                    slice(r.start + n * side, r.start + n * side + side)
                    for r, n, side in zip(tile, numbers, sides, strict=True)
                ]
                visited[rows + tuple(boxes)] += 1
                if all(r.full_first <= n < r.full_stop for r, n in zip(tile, numbers, strict=True)):
                    assert all(b.stop <= r.end for r, b in zip(tile, boxes, strict=True))
                    full[rows + tuple(boxes)] += 1
        assert ((visited == 1) | ~mask).all() and visited.max() <= 1
        assert mask[full > 0].all(), (pattern, grid)
        found += full.any().item()
    assert found > 20


def test_coordinates_of_rows():
    for pattern, grid, pick in separable(100):
        for axis in pattern.axes(grid):
            step = tables.step(axis)
            for row in tables.rows(axis, axis, power(pick), power(pick)):
                for position in range(row.first, row.stop):
                    assert axis.order[position] == row.shift + step * position


def test_no_step_where_tokens_are_not_evenly_spaced():
    assert tables.step(Axis((0, 1, 3, 2), (0,) * 4, (4,) * 4, (0, 4))) is None
    assert tables.step(Axis((0, 2, 1, 3), (0, 0, 2, 2), (2, 2, 4, 4), (0, 2, 4))) == 2


def test_visits_are_those_of_the_bound():
    """The cost of boxes is what `tiles.bound` counts, and no other boxes of these sizes make fewer visits."""
    for pattern, grid, pick in separable(60, most=3000):
        own, seen = power(pick), power(pick)
        best = tables.best_boxes(pattern, grid, own, seen)
        sides = best.own[-len(grid) :], best.seen[-len(grid) :]
        bound, share = tiles.bound(pattern, grid, *sides)
        assert math.prod(best.own) == own and math.prod(best.seen) == seen
        assert bound == pytest.approx(math.prod(grid) ** 2 / (best.visits * own * seen))
        if not isinstance(pattern, Circle):  # whose full boxes `bound` does not know
            assert share == pytest.approx(best.full / best.visits)
        assert bound == pytest.approx(tiles.best_bound(pattern, grid, own, seen)[0])


def test_ties_go_to_full_boxes():
    for pattern, grid in ((Neighborhood(7), (56, 56)), (Neighborhood((18, 24, 24)), (30, 48, 80))):
        best = tables.best_boxes(pattern, grid, 64, 64)
        axes, shapes = tables.axes(pattern, grid), tables.shapes(64, 3 - len(grid))
        for own, seen in itertools.product(shapes, repeat=2):
            counts = [tables.rows(*a, q, k) for a, q, k in zip(axes, own, seen, strict=True)]
            visits = math.prod(sum(r.count for r in rows) for rows in counts)
            full = math.prod(sum(r.full_stop - r.full_first for r in rows) for rows in counts)
            assert visits > best.visits or (visits == best.visits and full <= best.full)


def test_transposed_axis_is_the_columns_of_the_mask():
    for pattern, grid, _ in separable(200, most=3000):
        for axis in pattern.axes(grid):
            other, position = tables.transposed(axis), torch.arange(axis.extent)
            by_query, by_key = (
                (torch.tensor(a.lo)[:, None] <= position) & (position < torch.tensor(a.hi)[:, None])
                for a in (axis, other)
            )
            assert torch.equal(by_query, by_key.T) and other.order == axis.order
            assert sorted(other.lo) == list(other.lo) and sorted(other.hi) == list(other.hi)


def test_longest_tiles_of_a_causal_axis_come_first():
    axes = tables.axes(Neighborhood(32, causal=True), (64,)), tables.axes(Neighborhood(32, causal=True), (64,), True)
    for axis, sure in (axes[0][-1], axes[1][-1]):
        counts = [row.count for row in tables.rows(axis, sure, 8, 8)]
        assert counts[0] == max(counts) > counts[-1]


VIEWS = {
    "contiguous": lambda b, grid, h, d: torch.empty(b, *grid, h, d),
    "packed": lambda b, grid, h, d: torch.empty(b, *grid, 3, h, d).select(-3, 1),
    "heads first": lambda b, grid, h, d: torch.empty(b, h, *grid, d).movedim(1, -2),
    "one head": lambda b, grid, h, d: torch.empty(b, *grid, 2 * h, d)[..., 1:2, :],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("grid", ((7,), (1, 5), (3, 1, 4)))
@pytest.mark.parametrize("batch", (1, 2))
def test_descriptors_address_the_elements_of_the_tensor(view, grid, batch):
    tensor = VIEWS[view](batch, grid, 2, 16)
    descriptor, made = launch.described(tensor, (1, 2, 8), 16)
    grid = (1,) * (3 - len(grid)) + grid
    for b, head, dim in itertools.product(range(batch), range(tensor.shape[-2]), (0, 15)):
        for at in itertools.product(*map(range, grid)):
            place = (b * made.by_batch + head * made.by_head, *at, head * made.inner + dim)
            assert all(p < n for p, n in zip(place, descriptor.shape, strict=True))
            offset = sum(p * s for p, s in zip(place, descriptor.strides, strict=True))
            index = (b, *at[3 - len(tensor.shape[1:-2]) :], head, dim)
            assert offset == sum(i * s for i, s in zip(index, tensor.stride(), strict=True))


def test_what_descriptors_cannot_address():
    sides, ok = (1, 4, 4), torch.empty(2, 4, 4, 2, 16)
    assert launch.described(ok, sides, 16)
    for why, tensor in {
        "a head dim that is padded": torch.empty(2, 4, 4, 2, 12),
        "a base that is not aligned": torch.empty(ok.numel() + 1)[1:].view(ok.shape),
        "channels that lie apart": torch.empty(2, 4, 4, 2, 32)[..., ::2],
        "strides that are not aligned": torch.empty(2, 4, 4, 2, 17)[..., :16],
        "strides that do not divide the next one": torch.empty(1152).as_strided(
            (2, 4, 4, 2, 16), (576, 144, 32, 16, 1)
        ),
        "no stride at all": ok[:1].expand(2, -1, -1, -1, -1),
        "batch and heads that do not form one axis": torch.empty(2, 3, 4, 4, 16)[:, :2].movedim(1, -2),
    }.items():
        assert launch.described(tensor, sides, 16) is None, why


def test_limits():
    problem = dict(pattern=Neighborhood(3), grid=(8, 8), device="cuda")
    assert backend.limits(Problem(**problem)) == []
    assert backend.limits(Problem(**problem | {"pattern": Circle(2)})) == []
    for change, words in (
        ({"device": "cpu"}, "only cuda devices"),
        ({"dtype": torch.float64}, "no float64"),
        ({"head_dim": 257}, "head dims up to 256"),
        ({"bias": True}, "no bias"),
        ({"pattern": _Slanted()}, "does not know the shape of _Slanted"),
        ({"pattern": _Uneven()}, "evenly spaced"),
    ):
        reasons = backend.limits(Problem(**problem | change))
        assert len(reasons) == 1 and words in reasons[0]
    assert backend.by_name_only(Problem(**problem)) is None
    assert "ordinary attention" in backend.by_name_only(Problem(**problem | {"pattern": Dense()}))


class _Slanted(Neighborhood):
    def __init__(self):
        super().__init__(3)

    def inside(self, grid, device="cpu"):
        return lambda query, key: query >= key


class _Uneven(Separable):
    def axis(self, extent, index):
        order = (1, 0, *range(2, extent)) if extent > 2 else tuple(range(extent))
        return Axis((*order[:-1], order[-1]), (0,) * extent, (extent,) * extent, (0, extent))


def test_explain_says_why_not_here():
    verdict = next(v for v in explain(Neighborhood(3), (8, 8)).backends if v.backend == "triton")
    assert verdict.status == "cannot" and "only cuda devices" in verdict.reasons


def rows_of_the_table() -> dict[aot.Shipped, dict[str, str]]:
    with aot.TABLE.open() as file:
        return {aot.Shipped(*(type(x)(row[n]) for n, x in _TYPES)): row for row in csv.DictReader(file)}


_TYPES = list(next(iter(aot.shipped()))._asdict().items())
SHIPPED = list(aot.shipped())


def test_table_of_resources_lists_the_shipped_configurations():
    assert set(rows_of_the_table()) == set(SHIPPED)
    dims = {(c.kernel, c.bits, c.head_dim) for c in SHIPPED}
    kernels = ("forward", "grad_query", "grad_key", "grad_extra")
    assert dims == set(itertools.product(kernels, ("16", "32"), ("16", "32", "64", "128", "256")))


def compiles(config: aot.Shipped) -> None:
    kernel = aot.compiled(aot.example(config))
    assert "sm_90" in kernel.asm["ptx"]
    assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == (config.loads == "descriptor")
    found = aot.resources(kernel)
    assert found["shared"] <= aot.SHARED
    row = rows_of_the_table()[config]
    if row["triton"] == triton.__version__:
        assert found == {name: int(row[name]) for name in found}, "run python -m vision_attn.kernels.gpu.compile"


def once_each() -> list[aot.Shipped]:
    """Every configuration once, with descriptors where there is a choice: they compile faster."""
    return [config for config in SHIPPED if config.loads == "descriptor" or config.kernel == "grad_extra"]


@pytest.mark.parametrize("config", once_each(), ids=lambda c: "-".join(map(str, c)))
def test_compiles_for_hopper(config):
    compiles(config)


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(set(SHIPPED) - set(once_each())), ids=lambda c: "-".join(map(str, c)))
def test_compiles_for_hopper_the_other_way(config):
    compiles(config)


OTHERS = {
    "one axis, one head": Problem(Neighborhood(5, causal=True), (64,), head_dim=16, value_dim=16, device="cuda"),
    "a disc, dims that are padded": Problem(
        Circle(4), (16, 12), heads=3, head_dim=12, value_dim=20, dtype=torch.float16, extra=1, device="cuda"
    ),
    "dilation": Problem(
        Neighborhood(3, 2, (1, 2)), (8, 9), batch=2, heads=2, head_dim=24, value_dim=8, extra=9, device="cuda"
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_problems_compile_too(name):
    """What the configurations are not compiled with: no lse wanted, no mask, one of everything, other loads."""
    for call in aot.calls(OTHERS[name], boxed=True).values():
        assert aot.resources(aot.compiled(call()))["shared"] <= aot.SHARED


@pytest.mark.parametrize("which", ("test_random_problems", "not test_random_problems"))
def test_in_the_interpreter(which):
    run_interpreted("interpreted_triton_boxes.py", "not slow", which)


@pytest.mark.slow
def test_more_in_the_interpreter():
    run_interpreted("interpreted_triton_boxes.py", "slow")
