"""explain, show and doctor, and the pictures of patterns."""

import json

import pytest
import torch

from vision_attn import BlockList, Dense, Neighborhood, Radial, SlidingTile, Window
from vision_attn.apps import doctor as doctor_module
from vision_attn.apps.cli import main
from vision_attn.apps.generate import need
from vision_attn.diffusion import loading
from vision_attn.kernels import draw
from vision_attn.kernels.patterns import Circle, Halo, LengthDecay, PerHead, PowerStep, Streaming

SMALL = [
    (Dense(), (7,)),
    (Neighborhood(3, stride=2, causal=True), (11,)),
    (Neighborhood((3, 5), dilation=(2, 1)), (7, 6)),
    (Window((2, 3), shift=1), (5, 7)),
    (SlidingTile((1, 2, 2), 3), (3, 5, 6)),
    (Radial(decay=0.5, block=2, thin=8), (5, 3, 4)),
    (Radial(decay=0.5, block=4, thin=0, rule="block", sink=False), (5, 4, 4)),
    (Halo(3, 1), (7, 8)),
    (Circle(3, pooled=2), (6, 8)),
    (LengthDecay(1, period=2, gamma=0.5, first_frame=True), (5, 4, 3)),
    (PowerStep(3, 2, 1, causal=False), (31,)),
    (Streaming(3, 2), (4, 5)),
]


@pytest.mark.parametrize("pattern, grid", SMALL, ids=str)
def test_what_is_drawn_is_the_mask(pattern, grid):
    mask = pattern.mask(grid)
    counts, steps = draw.keys_per_query(pattern, grid)
    assert torch.equal(counts.flatten(), mask.sum(1)) and set(steps) == {1}
    for token in (0, len(mask) // 2, len(mask) - 1):
        query = tuple(int(i) for i in torch.unravel_index(torch.tensor(token), grid))
        assert torch.equal(draw.keys_seen(pattern, grid, query).flatten(), mask[token])


@pytest.mark.parametrize(
    "pattern, grid", [*SMALL, (Radial(decay=0.2), (21, 45, 80)), (Neighborhood(63), (5000,))], ids=str
)
def test_pictures(pattern, grid, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "PAIRS", 1 << 23)
    figure = draw.draw(pattern, grid, path=tmp_path / "x.png")
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles[0].startswith("what query") and titles[1].startswith("keys per query")
    assert len(titles) == 2 + (torch.Size(grid).numel() <= draw.MASK_TOKENS)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_query_is_always_among_the_frames():
    pattern = Neighborhood((3, 1, 1))
    for frame in (0, 5, 29, 30):
        figure = draw.draw(pattern, (31, 4, 4), (frame, 1, 2))
        assert f"t = {frame}" in [axes.get_title() for axes in figure.subfigs[0].axes]


def test_large_grids_are_counted_at_some_queries_and_never_as_a_mask(monkeypatch):
    grid = (21, 45, 80)
    monkeypatch.setattr(Radial, "mask", None)
    monkeypatch.setattr(draw, "PAIRS", 1 << 25)
    counts, steps = draw.keys_per_query(Radial(decay=0.2), grid)
    assert counts.numel() * 21 * 45 * 80 <= draw.PAIRS and steps[0] == 1
    one = draw.keys_seen(Radial(decay=0.2), grid, (10, steps[1], steps[2] * 2)).sum()
    assert counts[10, 1, 2] == one


def test_drawing_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="not on the grid"):
        draw.draw(Dense(), (4, 4), (4, 0))
    with pytest.raises(ValueError, match="larger than the grid"):
        draw.draw(Neighborhood(5), (4, 4))
    with pytest.raises(TypeError, match="per head"):
        draw.draw(BlockList.from_mask(torch.eye(4, dtype=torch.bool), 4), (16,))
    with pytest.raises(TypeError, match="one picture per part"):
        draw.draw(PerHead(((1, Dense()),)), (4, 4))


def test_length_decay_shows_the_factors_on_scores():
    """One token per frame: near ones 1, others alpha, frames about a period away beta, and what is cut off grey."""
    pattern = LengthDecay(2, 0.9, 0.6, period=4, gamma=1, first_frame=True)
    figure = draw.draw(pattern, (8, 1), query=(1, 0))
    shown, mask = (figure.subfigs[i].axes[0].images[0].get_array() for i in (0, 2))
    assert shown.filled(-1).flatten().tolist() == pytest.approx([1, 1, 1, -1, -1, -1, -1, -1])
    assert mask[7].filled(-1).tolist() == pytest.approx([0.6, 0.9, 0.6, 0.6, 0.6, 0.9, 1, 1])
    assert shown.shape == (8, 1) and "are multiplied by" in figure.subfigs[0].get_suptitle()


def test_show(tmp_path, capsys):
    path = tmp_path / "new" / "x.svg"
    argv = ["show", "neighborhood", "--window", "3", "--grid", "8,8", "--query", "3,5", "-o", str(path)]
    assert main([*argv, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["density"] == pytest.approx(9 / 64) and shown["picture"] == str(path)
    assert shown["pattern"] == Neighborhood(3).to_dict()
    assert [entry.name for entry in path.parent.iterdir()] == ["x.svg"]
    before = path.read_bytes()
    assert main([*argv[:-3], "0,0", "-o", str(path), "--overwrite"]) == 0
    assert "density 14.1%" in capsys.readouterr().out and path.read_bytes() != before


def test_explain(capsys, monkeypatch):
    monkeypatch.setenv("VISION_ATTN_NATIVE", "0")
    argv = ["explain", "radial", "--decay", "0.2", "--grid", "18,48,80", "--heads", "12", "--head-dim", "128"]
    argv += ["--dtype", "bfloat16", "--device", "cpu"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "density 26.9%" in out and "12 heads of 128, bfloat16, cpu" in out and "tiled      used" in out
    assert main([*argv, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["density"] == pytest.approx(0.269, abs=5e-4)
    assert {entry["backend"] for entry in table["backends"]} >= {"reference", "tiled", "flex", "natten"}


def test_explain_every_pattern(capsys):
    options = {
        "dense": [],
        "neighborhood": ["--window", "3,3,3", "--stride", "1,2,2", "--dilation", "1", "--causal", "true,false,false"],
        "window": ["--size", "2,4,4", "--shift", "0,2,2"],
        "sliding-tile": ["--tile", "1,2,2", "--window", "3"],
        "halo": ["--block", "1,2,2", "--halo", "1"],
        "circle": ["--radius", "3", "--pooled", "2"],
        "length-decay": ["--train-frames", "3", "--alpha", "0.95,0.85", "--shape", "linear", "--beta", "0.7",
                         "--period", "2", "--gamma", "0.5", "--first-frame", "--no-center-keys"],
        "power-step": ["--block", "16", "--window", "8", "--sink", "4", "--causal", "false"],
        "streaming": ["--window", "64", "--sink", "4"],
        "radial": ["--decay", "0.5", "--block", "4", "--no-sink", "--rule", "block", "--thin", "0"],
    }  # fmt: skip
    from vision_attn.apps.pattern_options import PATTERNS

    assert set(options) == set(PATTERNS)
    for name, argv in options.items():
        assert main(["explain", name, "--grid", "6,8,8", "--device", "cpu", "--json", *argv]) == 0
        pattern = json.loads(capsys.readouterr().out)["problem"]["pattern"]
        assert pattern["pattern"] == name
    assert pattern == Radial(decay=0.5, block=4, sink=False, rule="block", thin=0).to_dict()


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] and found["problems"] == []
    assert found["devices"][0]["device"] == "cpu"
    assert "used" in {entry["status"] for entry in found["backends"]["cpu, float32"]}
    assert found["built_in_model"]["pipeline"] == "WanPipeline"
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out and "tiled" in out


def test_doctor_says_what_is_missing(capsys, monkeypatch, tmp_path):
    installed = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name == "av" else installed(name))
    monkeypatch.setattr(loading, "BUILT_IN", tmp_path)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM av is not installed: pip install" in out and "PROBLEM the built-in model is missing" in out
    assert main(["generate", "a red circle", "-o", str(tmp_path / "out")]) == 1
    assert "the built-in model is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_packages_are_named_before_the_work():
    with pytest.raises(ImportError, match="no_such_package not installed; run: pip install 'vision-attn.apps"):
        need("json", "no_such_package")
