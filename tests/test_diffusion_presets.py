"""Published presets: the sparsity their papers state, and what they become at another size."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Circle, Neighborhood, Radial, SlidingTile, attach  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.diffusion import Preset, fit_preset, preset, presets  # noqa: E402
from vision_attn.kernels.tiles import bound  # noqa: E402

EVERY = pytest.mark.parametrize("name", presets())


@EVERY
def test_a_preset_is_as_published(name: str):
    published = preset(name)
    published.pattern.check(published.grid)
    sparsity = 1 - published.pattern.density(published.grid)
    if published.sparsity is None:
        assert 0.6 < sparsity < 0.8
    else:  # windows are exact; of the radial rows the papers do not say what else they counted
        assert sparsity == pytest.approx(published.sparsity, abs=0.015 if name.startswith("radial") else 1.1e-3)
    assert set(published.options) <= {"dense_steps", "dense_layers"} and published.model in MODELS and published.note
    assert not published.steps or published.options.get("dense_steps", 0) < published.steps


def test_sparsity_of_windows_is_plain_arithmetic():
    """A window of w of n tokens per axis leaves out 1 - prod(w / n), whatever its stride."""
    for name in presets():
        published = preset(name)
        if isinstance(published.pattern, Radial):
            continue
        window = published.pattern.window
        if isinstance(published.pattern, SlidingTile):
            window = [t * w for t, w in zip(published.pattern.tile, window, strict=True)]
        kept = math.prod(w / n for w, n in zip(window, published.grid, strict=True))
        assert published.pattern.density(published.grid) == pytest.approx(kept)


def test_numbers_of_the_tables():
    rows = {name: preset(name) for name in presets()}
    wan = rows["radial/wan2.1-14b"]
    assert wan.pattern == Radial(decay=0.2, block=64, rule="block") and wan.grid == (18, 48, 80)
    assert wan.options == {"dense_steps": 12, "dense_layers": 1} and wan.steps == 50
    assert rows["radial/wan2.2-a14b"].options == {"dense_steps": 11, "dense_layers": 1}
    assert rows["radial/hunyuanvideo"].pattern == Radial(decay=0.95, sink=False, rule="block")
    assert rows["gna/flux-4k"].pattern == Neighborhood((80, 80), (16, 16))
    assert rows["gna/cosmos-7b"].pattern == Neighborhood((16, 32, 48), (1, 8, 16))
    assert rows["gna/hunyuanvideo-sparser"].pattern == Neighborhood((18, 24, 24), (16, 8, 8))
    assert rows["sta/hunyuanvideo-sparser"].pattern == SlidingTile((6, 8, 8), (3, 3, 3))


@EVERY
def test_at_its_own_size_nothing_changes(name: str):
    published = preset(name)
    fitted = fit_preset(published, published.grid)
    assert (fitted.pattern, fitted.options, fitted.note) == (published.pattern, published.options, published.note)


@EVERY
def test_fitted_presets_attach_and_act(name: str):
    """On the tiny grid of the tests too, where every published number is far too large."""
    model = MODELS[preset(name).model]
    denoiser = model.build()
    fitted = fit_preset(preset(name), model.grid)
    kept = fitted.pattern.density(model.grid)
    if kept == 1:
        assert fitted.pattern.is_dense(model.grid)  # on this tiny grid the fitted window is everything
        return
    options = {"dense_steps": 0, "dense_layers": 0}  # two layers, one call
    with torch.no_grad(), Preset(fitted.pattern, options, fitted.model).attach(denoiser, strict=True) as run:
        denoiser(**model.inputs(1))
    assert run.report.denoisers[0].kept < 1


@pytest.mark.parametrize("grid", [(21, 45, 80), (18, 48, 80), (41, 30, 52), (13, 47, 83)], ids=str)
@pytest.mark.parametrize("name", ["sta/hunyuanvideo", "sta/hunyuanvideo-sparser"])
def test_windows_of_tiles_keep_their_share(name: str, grid: tuple[int, ...]):
    """As near as a whole number of tiles comes: within half a tile of the published share of every axis."""
    published = preset(name)
    fitted = fit_preset(published, grid).pattern
    fitted.check(grid)
    for axis, n in enumerate(grid):
        share = published.pattern.tile[axis] * published.pattern.window[axis] / published.grid[axis]
        side, kept = fitted.tile[axis], fitted.window[axis]
        assert abs(kept * side - share * n) <= side / 2 + 0.5


def test_fitted_windows_keep_their_share_and_fill_their_tiles():
    fitted = fit_preset(preset("gna/flux-4k"), (128, 96)).pattern
    assert fitted.window == (40, 32)  # 80 of 256 are 40 of 128 and 30 of 96
    plain, tile = Neighborhood((40, 30)), ((16, 8), (4, 32))
    assert bound(fitted, (128, 96), *tile, False)[1] == 1 > bound(plain, (128, 96), *tile, False)[1]


def test_fitted_tiles_divide_the_axes_where_they_can():
    fitted = fit_preset(preset("sta/hunyuanvideo"), (21, 45, 80)).pattern
    assert fitted.tile == (7, 9, 8)
    assert fit_preset(preset("sta/hunyuanvideo"), (13, 47, 80)).pattern.tile[1:] == (
        8,
        8,
    )  # primes: a shorter last tile


def test_radial_keeps_its_block_scales_it_or_takes_the_exact_rule():
    wan = preset("radial/wan2.1-14b")
    assert fit_preset(wan, (21, 45, 80)).pattern == wan.pattern
    small = fit_preset(preset("radial/hunyuanvideo"), (9, 12, 12)).pattern  # 2**8 and 2**12 around the frames
    assert (small.block, small.thin, small.rule, small.decay) == (8, 8, "token", 0.95)
    # Here the block rule drops blocks of the diagonal.
    unsound = preset("radial/hunyuanvideo-4x")
    grid = next(g for n in range(23, 60) if not unsound.pattern.block_map(g := (9, 23, n)).diagonal().all())
    with pytest.raises(ValueError, match="diagonal blocks"):
        unsound.pattern.check(grid)
    assert fit_preset(unsound, grid).pattern.rule == "token"


def test_dense_steps_keep_their_share():
    assert fit_preset(preset("radial/wan2.1-14b"), (18, 48, 80), steps=20).options == {
        "dense_steps": 5,
        "dense_layers": 1,
    }
    assert fit_preset(preset("sta/hunyuanvideo"), (30, 48, 80), steps=20).options == {}


def test_presets_per_layer_and_of_unknown_size():
    both = Preset((Radial(decay=0.5, block=4, thin=8), SlidingTile((2, 2, 2), 3)), {"dense_layers": 1})
    assert fit_preset(both, (5, 12, 14)).pattern == (both.pattern[0], SlidingTile((2, 2, 2), (2, 3, 3)))  # 6 of 5 is 5


def test_what_cannot_be_fitted():
    flux = preset("gna/flux-4k")
    with pytest.raises(ValueError, match="has 3 axes, and the preset is for 2"):
        fit_preset(flux, (5, 12, 12))
    with pytest.raises(TypeError, match="knows Neighborhood, SlidingTile and Radial; got Circle"):
        fit_preset(Preset(Circle(4)), (12, 12))
    with pytest.raises(TypeError, match="without dilation"):
        fit_preset(Preset(Neighborhood(5, dilation=2)), (12, 12))
    with pytest.raises(ValueError, match="does not say of how many steps"):
        fit_preset(preset("radial/mochi"), (28, 30, 53), steps=20)
    with pytest.raises(ValueError, match="steps must be an int of at least 1; got 0"):
        fit_preset(flux, (256, 256), steps=0)
    with pytest.raises(ValueError, match="no preset 'radial/wan'; did you mean 'radial/wan2"):
        preset("radial/wan")
    with pytest.raises(ValueError, match="for HunyuanVideoTransformer3DModel, and the denoiser is Wan"):
        attach(MODELS["WanTransformer3DModel"].build(), preset("sta/hunyuanvideo"))


# On the command line


def test_presets_command(tmp_path, capsys):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == presets() and rows[0]["grid"] == [18, 48, 80]
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.count("\n\n") == len(rows) - 1

    file = tmp_path / "x.json"
    command = ["presets", "sta/hunyuanvideo", "--grid", "18,48,80", "--steps", "20", "-o", str(file)]
    assert main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["density"] == pytest.approx(0.4167, abs=1e-4) and row["steps"] == 20
    assert Preset.load(file).pattern == SlidingTile((6, 8, 8), (3, 5, 5))
    assert main(command) == 1 and "already there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]

    assert main(["presets", "sta/flux"]) == 1 and "there is no preset 'sta/flux'" in capsys.readouterr().err
    assert main(["presets", "--grid", "3,4,5"]) == 2 and "name of a preset" in capsys.readouterr().err
