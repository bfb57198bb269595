"""Tile lists cover what they must, counts follow the formula, bounds equal published ones; and what explain says."""

import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch

from vision_attn import BlockList, Dense, Neighborhood, Radial, SlidingTile, Window, attend, explain
from vision_attn.kernels.backends import BACKENDS, tiled
from vision_attn.kernels.explain import support_table
from vision_attn.kernels.problem import Problem
from vision_attn.kernels.testing import random_neighborhood, random_pattern
from vision_attn.kernels.tiles import best_bound, bound, tile_maps, visits


def problem(pattern, grid, **options):
    return Problem(pattern, grid, value_dim=64, **options)


@pytest.mark.parametrize("seed", range(120))
def test_chunks_cover_the_mask_exactly_once(seed, monkeypatch):
    """Every allowed pair is computed once, no other pair is, every query is in one chunk; also with tiny chunks."""
    pattern, grid = random_pattern(random.Random(seed))
    monkeypatch.setattr(tiled, "CHUNK_BYTES", 2 ** random.Random(seed).choice((10, 18, 23)))
    tokens = math.prod(grid)
    seen, queries = torch.zeros(tokens, tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
    source = tiled._plan(problem(pattern, grid), torch.device("cpu"), 1.0)[0]
    for chunk in source():
        rows, length, width = len(chunk.query), chunk.query.shape[1], chunk.key.shape[1]
        allowed = torch.ones(1, length, width, dtype=torch.bool) if chunk.allowed is None else chunk.allowed
        allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        allowed = allowed.expand(rows, length, width).long()
        pairs = chunk.query[:, :, None] * tokens + chunk.key[:, None]
        seen.view(-1).index_add_(0, pairs.flatten(), allowed.flatten())
        queries.index_add_(0, chunk.query.flatten(), torch.ones(chunk.query.numel(), dtype=torch.long))
    mask = pattern.mask(grid)
    assert torch.equal(seen, mask.long())
    assert (queries <= 1).all() and queries[mask.any(1)].all()


@pytest.mark.parametrize("seed", range(60))
def test_visits_and_full_tiles_of_one_axis(seed):
    pick = random.Random(seed)
    extent, side_q, side_k = pick.randint(1, 40), pick.randint(1, 9), pick.randint(1, 9)
    pattern = random_neighborhood(pick, (extent,))
    axis = pattern.axes((extent,))[0]
    order = torch.tensor(axis.order)
    mask = pattern.mask((extent,))[order][:, order]
    total = full = 0
    for first in range(0, extent, side_q):
        rows = mask[first : first + side_q]
        columns = rows.any(0).nonzero().flatten()
        low, high = columns[0].item(), columns[-1].item() + 1
        boxes = math.ceil((high - low) / side_k)
        total += boxes
        for r in range(boxes):
            start = low + r * side_k
            full += start + side_k <= extent and rows[:, start : start + side_k].all().item()
    assert visits(axis, side_q, side_k) == (total, full)
    seen, whole = tile_maps(axis, side_q)
    for i, j in itertools.product(range(len(seen)), repeat=2):
        block = mask[i * side_q : (i + 1) * side_q, j * side_q : (j + 1) * side_q]
        assert seen[i, j] or not block.any()
        assert not whole[i, j] or (block.all() and block.shape[1] == side_q)
    aligned = visits(axis, side_q, side_q, aligned=True)
    assert aligned == (seen.sum().item(), whole.sum().item())


# pattern, grid, bound by density, best 64 x 64 tiles
BOUNDS = [
    (Neighborhood(80), (256, 256), 10.24, 8.96),
    (Neighborhood(80, stride=16), (256, 256), 10.24, 10.24),
    (Neighborhood((18, 24, 24)), (30, 48, 80), 11.11, 7.79),
    (Neighborhood((18, 24, 24), stride=(16, 8, 8)), (30, 48, 80), 11.11, 11.11),
    (Neighborhood((17, 23, 25)), (30, 48, 80), 11.79, 8.24),
    (Neighborhood((11, 23, 41)), (21, 45, 80), 7.29, 5.02),
    (Neighborhood((12, 24, 40)), (21, 45, 80), 6.56, 4.79),
    (Neighborhood((12, 24, 40), stride=(4, 8, 8)), (21, 45, 80), 6.56, 6.15),
    (Neighborhood(7), (56, 56), 64.0, 13.2),
    (Neighborhood(13), (56, 56), 18.6, 7.15),
    (Neighborhood(13), (64, 64), 24.2, 9.85),
    (Neighborhood(2048), (32768,), 16.0, 15.54),
    (Neighborhood(2048, stride=256), (32768,), 16.0, 16.0),
]


@pytest.mark.parametrize("pattern, grid, by_density, by_tiles", BOUNDS)
def test_bounds_of_published_problems(pattern, grid, by_density, by_tiles):
    assert 1 / pattern.density(grid) == pytest.approx(by_density, abs=0.05)
    assert best_bound(pattern, grid)[0] == pytest.approx(by_tiles, abs=0.051 if by_tiles > 13 else 0.006)


@pytest.mark.parametrize("pattern, grid, tile, aligned, unaligned", [
    (Neighborhood(80), (256, 256), (16, 8), 7.51, 8.33),
    (Neighborhood((18, 24, 24)), (30, 48, 80), (2, 8, 8), 5.44, 6.87),
])  # fmt: skip
def test_aligned_and_unaligned_tiles(pattern, grid, tile, aligned, unaligned):
    assert bound(pattern, grid, tile, tile, aligned=True)[0] == pytest.approx(aligned, abs=0.006)
    assert bound(pattern, grid, tile, tile)[0] == pytest.approx(unaligned, abs=0.006)


def test_strided_windows_have_full_tiles_only():
    pattern = Neighborhood(80, stride=16)
    assert bound(pattern, (256, 256), (8, 8), (8, 8)) == (pytest.approx(10.24), 1.0)
    assert 0 < bound(Neighborhood(80), (256, 256), (8, 8), (8, 8))[1] < 1


def test_dilation_is_counted_per_group():
    wide, group = Neighborhood(5, dilation=2), Neighborhood(5)
    assert bound(wide, (64,), (8,), (8,))[0] == pytest.approx(2 * bound(group, (32,), (8,), (8,))[0])


@pytest.mark.parametrize(
    "pattern", [Neighborhood(13), Window(8), SlidingTile(8, 3), Dense(), Radial(0.2, 64)], ids=lambda p: p.name
)
def test_explain(pattern, monkeypatch):
    monkeypatch.setenv("VISION_ATTN_NATIVE", "0")
    answer = explain(pattern, (64, 64), heads=4)
    assert answer.used == "tiled"
    assert answer.density == pattern.density((64, 64)) and answer.bound == pytest.approx(1 / answer.density)
    assert 1 <= answer.tile_bound <= answer.bound * 1.0001
    text = str(answer)
    assert all(name in text for name in ("tiled", "flex", "natten", "reference", "density"))
    again = json.loads(json.dumps(answer.to_dict()))
    assert again["used"] == "tiled" and [b["backend"] for b in again["backends"]] == list(BACKENDS)
    assert all(v.reasons for v in answer.backends if v.status != "used")


def test_explain_says_what_attend_says():
    with pytest.raises(ValueError, match="backend 'flex' cannot do this: no float64"):
        explain(Neighborhood(3), (8, 8), dtype=torch.float64, backend="flex")
    with pytest.raises(ValueError, match="larger than the grid"):
        explain(Neighborhood(9), (8, 8))
    with pytest.raises(TypeError, match="pattern must be"):
        explain("radial", (8, 8))
    with pytest.raises(TypeError, match="int32"):
        explain(Dense(), (8, 8), dtype=torch.int32)
    reasons = {v.backend: v.reasons for v in explain(Window(4), (8, 8), needs_grad=True, device="cuda").backends}
    assert any("only Neighborhood" in r for r in reasons["natten"])


def test_explain_of_an_empty_list():
    answer = explain(BlockList.from_mask(torch.zeros(2, 2) > 0, 8), (16,))
    assert answer.density == 0 and answer.bound == math.inf and answer.to_dict()["bound"] is None


def test_support_table_is_what_the_backends_do():
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in support_table().splitlines()]
    assert rows[0] == ["backend", "dtype", "cpu", "cuda"]
    table = {(r[0], r[1]): r[2] for r in rows[2:]}
    assert len(table) == 4 * len(BACKENDS)
    assert table["tiled", "float64"] == table["reference", "float16"] == "forward, backward"
    assert table["natten", "float64"] == table["flex", "float64"] == "no"
    assert table["natten", "float32"] == table["flex", "bfloat16"] == "forward"
    assert table["cpu", "bfloat16"] == "forward, backward" and table["triton", "float32"] == "no"
    q = torch.randn(1, 8, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    assert torch.autograd.grad(attend(q, q, q, Neighborhood(3)).sum(), q)[0].dtype == torch.bfloat16


def test_natten_is_not_imported_until_it_runs():
    code = "import sys, vision_attn as v; v.attend; v.explain(v.Neighborhood(3), (8, 8)); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"natten", "diffusers", "transformers", "timm"} & set(modules)
