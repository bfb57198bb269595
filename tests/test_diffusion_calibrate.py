"""calibrate(): what it measures is the share of the whole attention map, and what it picks keeps the budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from diffusion_models import MODELS  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from vision_attn import Circle, Dense, LengthDecay, Neighborhood, PerHead, Radial, attach  # noqa: E402
from vision_attn.apps.cli import main  # noqa: E402
from vision_attn.diffusion import Calibration, Preset, calibrate, tiny_image  # noqa: E402
from vision_attn.diffusion.attachment import planned  # noqa: E402
from vision_attn.diffusion.calibration import gather  # noqa: E402
from vision_attn.diffusion.installed import holders  # noqa: E402
from vision_attn.diffusion.watch import Watch, default_candidates  # noqa: E402
from vision_attn.joint import fit  # noqa: E402

SIZE = dict(height=48, width=48, num_frames=17, max_sequence_length=16, num_inference_steps=1)


@pytest.fixture(autouse=True)
def quiet_inference():
    with torch.no_grad(), attention_backend("native"):
        yield


@pytest.fixture(scope="module")
def pipe():
    from vision_attn.diffusion.loading import load

    pipe = load().pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Recorder(TorchFunctionMode):
    """Keeps the queries, keys, mask and scale of every call of scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            given = kwargs or {}
            q, k = (args[i] if len(args) > i else given[name] for i, name in enumerate(("query", "key")))
            self.calls.append((q, k, given.get("attn_mask"), given.get("scale")))
        return func(*args, **(kwargs or {}))


def watching(denoiser, candidates, rows):
    watch = Watch(*planned(denoiser, Dense(), (0, 0, 0, "both"), "none", None, None, None, False), replace=False)
    for context in watch.contexts:
        context.candidates, context.rows = candidates, rows
        context.generator = torch.Generator().manual_seed(0)
    return watch


def whole_map(q, k, mask, scale, grid, text):
    """Attention of the image rows in float64, and which columns are the image."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    start = max(-text, 0)
    image = slice(start, start + math.prod(grid))
    return scores.softmax(-1)[:, :, image], image


@pytest.mark.parametrize(
    "cls, pad",
    [
        ("WanTransformer3DModel", False),
        ("HunyuanVideoTransformer3DModel", False),
        ("HunyuanVideoTransformer3DModel", True),
        ("FluxTransformer2DModel", False),
    ],
)
def test_recall_and_energy_are_those_of_the_whole_map(cls, pad):
    model = MODELS[cls]
    denoiser, inputs = model.build(), model.inputs(2, pad) if pad else model.inputs(2)
    small = tuple(min(3, n) for n in model.grid)
    candidates = (Neighborhood(small), Neighborhood(window=5), Neighborhood((1,) * len(model.grid)))
    with Recorder() as record, torch.no_grad():
        torch.manual_seed(0)
        denoiser(**inputs)
    with watching(denoiser, candidates, rows=10_000) as watch:
        torch.manual_seed(0)
        denoiser(**inputs)
    found = gather(watch.contexts, cls, 1, 0.5, True)
    calls = [c for c in record.calls if c[0].shape[2] == c[1].shape[2] >= model.tokens]
    assert len(calls) == model.calls == len(found.recalls)
    places = list(itertools.product(*map(range, model.grid)))
    flat = [((0,) * (3 - len(p)) + p) for p in places]
    for layer, (q, k, mask, scale) in enumerate(calls):
        weights, image = whole_map(q, k, mask, scale, model.grid, model.text)
        seen = torch.stack([fit(p, model.grid).mask(model.grid) for p in candidates])
        on_grid = weights[..., image]
        off_grid = weights.sum(-1) - on_grid.sum(-1)
        recall = torch.einsum("bhqk,cqk->hc", on_grid, seen.double()) + off_grid.sum((0, 2))[:, None]
        expected = recall / (weights.shape[0] * weights.shape[2])
        torch.testing.assert_close(found.recalls[layer], expected, atol=2e-6, rtol=0)
        # energy: the mean weight at every distance, pair by pair
        sums, counts = torch.zeros_like(found.energy[layer]), torch.zeros(found.energy[layer].shape[1:])
        summed = on_grid.sum(0)
        for (i, a), (j, b) in itertools.product(enumerate(flat), repeat=2):
            t, r = abs(a[0] - b[0]), round(math.dist(a[1:], b[1:]))
            sums[:, t, r] += summed[:, i, j]
            counts[t, r] += weights.shape[0]
        torch.testing.assert_close(
            found.energy[layer], sums / counts * model.tokens, atol=2e-4, rtol=1e-4, equal_nan=True
        )


def test_layers_of_a_unet_have_their_own_grids():
    model = MODELS["UNet2DConditionModel"]
    denoiser = model.build()
    with watching(denoiser, (Neighborhood(window=3),), rows=10_000) as watch:
        denoiser(**model.inputs(1))
    found = gather(watch.contexts, "UNet2DConditionModel", 1, 0.5, True)
    assert len(set(found.grids)) > 1
    for grid, energy in zip(found.grids, found.energy, strict=True):
        assert energy.shape[1:] == (1, round(math.hypot(grid[0] - 1, grid[1] - 1)) + 1)
    assert found.draw().axes and len({len(heads) for heads in found.recalls}) > 1
    with attach(denoiser, dataclasses.replace(found.preset, model="")) as run:
        denoiser(**model.inputs(1))
    shares = [sum(heads) / len(heads) for heads in found.head_densities()]
    assert run.report.denoisers[0].layers == pytest.approx(shares)


def test_few_rows_estimate_the_same_and_the_map_is_never_made():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    inputs = {**model.inputs(1), "hidden_states": torch.randn(1, 4, 3, 16, 20, generator=torch.Generator())}
    candidates = (Neighborhood((3, 3, 3)), Radial(decay=0.5, block=4, thin=8))

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple) else (out,):
                if isinstance(part, torch.Tensor):
                    self.size = max(self.size, part.numel())
            return out

    with watching(denoiser, candidates, rows=10_000) as watch:
        denoiser(**inputs)
    exact = gather(watch.contexts, "", 1, 0.5, True)
    with watching(denoiser, candidates, rows=4) as watch, Largest() as largest:
        for _ in range(40):
            denoiser(**inputs)
    few = gather(watch.contexts, "", 1, 0.5, True)
    assert few.rows == 160 and largest.size < 240**2
    assert (torch.stack(few.recalls) - torch.stack(exact.recalls)).abs().max() < 0.02
    with watching(denoiser, candidates, rows=10_000) as watch, Largest() as largest:
        denoiser(**inputs)
    assert largest.size >= 240**2  # the check above would see a map


def test_watching_changes_nothing():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    before = denoiser(**model.inputs(1)).sample
    with watching(denoiser, (Neighborhood((1, 3, 3)),), rows=8):
        assert torch.equal(denoiser(**model.inputs(1)).sample, before)
    assert not any(hasattr(m, "_diffusers_hook") for m in denoiser.modules())


def made(recalls, grid=(4, 6, 6), **changes):
    wide, narrow = Neighborhood((4, 5, 5)), Neighborhood((3, 3, 3))
    measured = tuple(torch.tensor(r, dtype=torch.float64) for r in recalls)
    fields = dict(
        model="X", grids=(grid,) * len(recalls), candidates=(wide, narrow), recalls=measured,
        energy=(torch.ones(len(recalls[0]), 4, 8),) * len(recalls), rows=1, prompts=1, recall=0.9, per_head=True,
    )  # fmt: skip
    return Calibration(**{**fields, **changes}), wide, narrow


def test_the_cheapest_pattern_that_keeps_the_budget():
    found, wide, narrow = made([[[0.99, 0.95], [0.95, 0.89], [0.9, 0.2]], [[0.99, 0.9], [0.9, 0.9], [0.91, 0.91]]])
    assert found.preset.pattern == (PerHead(((1, narrow), (2, wide))), narrow)
    assert found.choose(0.9, per_head=False).pattern == (wide, narrow)
    assert found.choose(0.96).pattern == (PerHead(((1, wide), (2, Dense()))),) * 2
    assert found.choose(0.97, per_head=False).pattern == (Dense(), Dense())
    assert found.kept() == [[0.95, 0.95, 0.9], [0.9, 0.9, 0.91]]
    assert found.head_densities()[0] == pytest.approx([narrow.density((4, 6, 6))] + [wide.density((4, 6, 6))] * 2)
    assert found.kept(found.choose(1.0)) == [[1.0] * 3] * 2
    assert "recall at least 0.9" in str(found) and json.dumps(found.to_dict())


def test_two_denoisers_keep_the_lower_recall():
    model = MODELS["WanTransformer3DModel"]
    contexts = []
    for seed in range(2):
        denoiser = model.build()
        torch.manual_seed(seed)
        for block in denoiser.blocks:
            block.attn1.to_q.weight.normal_()
        with watching(denoiser, (Neighborhood((1, 3, 3)),), rows=10_000) as watch:
            denoiser(**model.inputs(1))
        contexts += watch.contexts
    alone = [gather([context], "", 1, 0.9, True).recalls[0] for context in contexts]
    assert not torch.equal(*alone)
    torch.testing.assert_close(gather(contexts, "", 1, 0.9, True).recalls[0], torch.minimum(*alone))


def test_a_preset_of_the_built_in_model(pipe, tmp_path):
    found = calibrate(pipe, ["a red circle moves right", "a blue square moves up"], 0.8, rows=16, **SIZE)
    assert found.rows == 2 * 2 * 16 and len(found.preset.pattern) == 6  # prompts, guidance calls
    assert min(map(min, found.kept())) >= 0.8
    shares = [sum(heads) / len(heads) for heads in found.head_densities()]
    assert sum(shares) / 6 < 0.8
    found.preset.save(tmp_path / "a.json")
    with attach(pipe, Preset.load(tmp_path / "a.json")) as run:
        pipe("a red circle moves right", output_type="latent", **SIZE)
    assert run.report.denoisers[0].layers == pytest.approx(shares)
    again = calibrate(pipe, "a red circle moves right", 0.8, rows=16, **SIZE)
    same = calibrate(pipe, "a red circle moves right", 0.8, rows=16, **SIZE)
    assert all(map(torch.equal, again.recalls, same.recalls))
    # attention falls off over space and time
    energy = torch.stack(found.energy).mean((0, 1))
    assert energy[0, 0] > energy[0, 3] and energy[0, 0] > energy[3, 0]


def test_the_picture(tmp_path):
    found, _, _ = made([[[0.99, 0.95], [0.9, 0.2]]] * 3)
    figure = found.draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 4 and [len(axes.lines) for axes in panels] == [0, 3 + 1 + 2, 0, 3 + 1]
    assert panels[2].images[0].get_array().shape == (2, 3)


BAD = {
    "prompts must be": dict(prompts=[]),
    "not empty": dict(prompts=["  "]),
    "recall must be a share": dict(recall=1.5),
    "rows must be an int": dict(rows=0),
    "cannot be a candidate": dict(candidates=[LengthDecay(2)]),
    "follow from positions": dict(candidates=[Circle(2, pooled=2)]),
    "without PerHead": dict(candidates=[PerHead(((4, Dense()),))]),
    "must be patterns": dict(candidates=["radial"]),
    "has no pixels": dict(pixels=3),
    "has 2 entries but the grid has 3": dict(candidates=[Neighborhood((3, 3))]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(pipe, message):
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(pipe, **{"prompts": ["a red circle"], **SIZE, **BAD[message]})
    assert not holders(pipe.transformer)


def test_no_text_encoder_and_no_pipeline(pipe):
    with pytest.raises(TypeError, match="draws with a diffusers pipeline; got WanTransformer3DModel"):
        calibrate(pipe.transformer, "a red circle")
    encoder, pipe.text_encoder = pipe.text_encoder, None
    try:
        with pytest.raises(ValueError, match="no text encoder"):
            calibrate(pipe, "a red circle", **SIZE)
    finally:
        pipe.text_encoder = encoder
    with attach(pipe, Neighborhood(window=3)), pytest.raises(ValueError, match="already has"):
        calibrate(pipe, "a red circle", **SIZE)


def test_a_compiled_model_is_refused():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    with watching(denoiser, (Neighborhood((1, 3, 3)),), rows=8):
        with pytest.raises(Exception, match="not compiled"):
            torch.compile(denoiser, backend="eager", fullgraph=True)(**model.inputs(1))
    torch.compiler.reset()


@pytest.mark.parametrize("grid", [(5, 6, 6), (21, 30, 52), (1, 6, 6), (64, 64), (2, 1, 3), (7, 5)])
def test_default_candidates_fit_and_leave_something_out(grid):
    candidates = default_candidates(grid)
    assert len(set(candidates)) == len(candidates)
    for pattern in candidates:
        pattern.check(grid)
        assert pattern.density(grid) < 1
    assert any(isinstance(p, Radial) for p in candidates) == (len(grid) == 3 and grid[0] > 2)


def test_a_unet_has_several_grids():
    pipe = tiny_image.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    found = calibrate(pipe, "a red circle", recall=0.5, rows=4, height=96, width=48, num_inference_steps=1)
    assert len(set(found.grids)) > 1 and any(share < 1 for heads in found.head_densities() for share in heads)
    with attach(pipe, found.preset, strict=True):
        pipe("a red circle", height=96, width=48, num_inference_steps=1, output_type="latent")


def test_command(tmp_path, capsys, monkeypatch):
    preset, picture = tmp_path / "p.json", tmp_path / "p.png"
    command = ["calibrate", "a red circle", "-o", str(preset), "--picture", str(picture), "--recall", "0.8"]
    command += ["--steps", "1", "--rows", "8", "--per-layer"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Preset.load(preset).to_dict() == answer["preset"] and answer["files"] == [str(preset), str(picture)]
    assert all(p["pattern"] != "per-head" for p in answer["preset"]["pattern"]) and picture.exists()
    assert main(command) == 1 and "already there" in capsys.readouterr().err
    for wrong in (["-o", "a.txt"], ["--recall", "0"], ["--picture", "a.gif"], ["--frames", "16"]):
        assert main([*command, "--overwrite", *wrong]) == 2, wrong

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("vision_attn.diffusion.calibration.calibrate", stop)
    assert main(["calibrate", "a red circle", "-o", str(tmp_path / "q" / "x.json")]) == 130
    assert not list((tmp_path / "q").iterdir())
