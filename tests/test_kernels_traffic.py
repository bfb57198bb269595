"""Bytes moved over ranks: the formula against counting from masks, and against bytes that processes sent."""

import json
import math

import pytest
import torch
from test_kernels_parallel import CASES, tokens_moved

from vision_attn import Circle, Dense, LengthDecay, Neighborhood, PerHead
from vision_attn.apps.cli import main
from vision_attn.kernels.traffic import VIDEOS, even, received, stops_paying, volumes


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not isinstance(case[0], PerHead)])
def test_tokens_received_are_what_masks_say(name):
    pattern, grid, axis, sizes = CASES[name]
    found = [tokens for tokens, _ in received(pattern, grid, axis, sizes)]
    assert found == [tokens_moved(pattern, grid, axis, sizes, rank)[0] for rank in range(len(sizes))]


def test_every_way_by_hand():
    grid, pattern = (64, 256), Neighborhood(window=13)
    two, eight, three = volumes(pattern, grid, [2, 8, 3], heads=4, head_dim=64, dtype=torch.float32)
    token = 4 * 64 * 4  # bytes of a key
    assert (two.axis, two.halo, two.peers) == (1, 2 * token * 6 * 64, 1)
    assert (eight.axis, eight.halo, eight.peers) == (1, 2 * token * 12 * 64, 2)
    assert two.all_gather == 2 * token * 64 * 128
    # q, k, v and the result: half of the heads of the other half of the tokens
    assert two.ulysses == 4 * (token // 2) * 64 * 128
    assert eight.ulysses is None and three.ulysses is None
    assert three.all_gather == 2 * token * 64 * (256 - 85)


def test_heads_with_patterns_of_their_own():
    grid, near = (16, 8), Neighborhood(window=3)
    both = PerHead(((1, near), (3, Dense())))
    for heads in (4, 8):
        found, one, all_of_it = (volumes(p, grid, [2, 3], axis=0, heads=heads) for p in (both, near, Dense()))
        for mixed, part, rest in zip(found, one, all_of_it, strict=True):
            assert mixed.halo == part.halo // 4 + rest.halo * 3 // 4
            assert mixed.all_gather == rest.all_gather and mixed.ulysses == rest.ulysses
    with pytest.raises(ValueError, match="do not fit a pattern of 4 heads"):
        volumes(both, grid, [2], heads=6)
    with pytest.raises(ValueError, match="do not fit a pattern of 4 heads"):
        volumes(both, grid, [2], heads=8, kv_heads=2)
    with pytest.raises(ValueError, match="LengthDecay cannot be cut"):
        volumes(PerHead(((1, near), (1, LengthDecay(train_frames=2)))), grid, [2], heads=2)


def test_a_halo_is_never_more_than_everything_and_does_not_grow():
    for grid in VIDEOS.values():
        found = volumes(Neighborhood(window=(9, 15, 24)), grid, heads=40)
        assert [v.ranks for v in found] == [2**n for n in range(1, 11)]
        cut = [v for v in found if v.halo is not None]
        assert all(v.halo < v.all_gather and v.ranks <= max(grid) for v in cut)
        assert all(v.least == "all-gather" for v in found if v.halo is None)


def test_the_point_where_ulysses_moves_less():
    pattern = Neighborhood(window=(18, 24, 24))
    stop = stops_paying(pattern, VIDEOS["720p"], heads=40)
    below, at = volumes(pattern, VIDEOS["720p"], [stop - 1, stop], heads=40)
    assert at.ulysses < at.halo and 40 % stop == 0
    for ranks in (n for n in range(2, stop) if 40 % n == 0):
        assert volumes(pattern, VIDEOS["720p"], [ranks], heads=40)[0].least == "halo"
    assert stops_paying(Neighborhood(window=3), (8, 1000), heads=2) is None


def test_rows_are_dealt_evenly():
    assert even(7, 3) == (3, 2, 2) and sum(even(1000, 64)) == 1000


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match="cannot be cut"):
        volumes(LengthDecay(train_frames=2), (4, 4), [2])
    with pytest.raises(ValueError, match="whole numbers from 2"):
        volumes(Neighborhood(window=3), (4, 4), [1])
    with pytest.raises(ValueError, match="has 2 axes"):
        volumes(Neighborhood(window=3), (4, 4), [2], axis=2)
    assert volumes(Circle(radius=1), (8, 4, 4), [8])[0].halo is None  # sees every frame, and has 4 rows


def test_simulate_over_ranks(capsys):
    command = ["simulate", "--grid", "21,45,80", "--window", "9,15,24", "--heads", "40", "--ranks", "2,1024"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "bytes that the busiest rank receives" in text and "all-gather" in text
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["over_ranks"]["rows"]
    assert [row["ranks"] for row in rows] == [2, 1024]
    assert rows[0]["halo"] == 2 * 40 * 128 * 2 * math.prod((21, 45)) * 12 and rows[1]["halo"] is None
    assert main([*command[:-1], "1,2"]) == 2
    assert "from 2 to 1024" in capsys.readouterr().err
