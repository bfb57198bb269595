"""attach() on every supported denoiser class, against an oracle that knows nothing of it."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from diffusion_models import MODELS, Model, noise  # noqa: E402

from vision_attn import Dense, LengthDecay, Neighborhood, PerHead, Radial, SlidingTile, Window, attach  # noqa: E402
from vision_attn.diffusion import FAMILIES  # noqa: E402

EVERY = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
PADDED = pytest.mark.parametrize("model", [m for m in MODELS.values() if m.padded], ids=lambda m: m.cls)
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def quiet_inference():
    with torch.no_grad(), warnings.catch_warnings(), attention_backend("native"):
        warnings.filterwarnings("ignore", message=".*CPU autocast.*")
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        yield


def run(model: Model, denoiser: torch.nn.Module, batch: int = 1, **changes) -> torch.Tensor:
    torch.manual_seed(0)
    return denoiser(**{**model.inputs(batch), **changes}).sample


def window_mask(grid: tuple[int, ...], window: tuple[int, ...]) -> torch.Tensor:
    """Who sees whom, token by token: the `window` places around a token on each axis, pushed inward at the borders."""
    places = list(itertools.product(*map(range, grid)))
    starts = [[min(max(x - w // 2, 0), n - w) for x, w, n in zip(p, window, grid, strict=True)] for p in places]
    rows = [[all(s <= y < s + w for s, y, w in zip(start, p, window, strict=True)) for p in places] for start in starts]
    return torch.tensor(rows)


class Oracle:
    """Replaces `scaled_dot_product_attention` for everybody by one that adds the dense mask to self-attention over
    image tokens."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.plain, self.calls = model, F.scaled_dot_product_attention, 0
        levels = [model.grid, tuple(-(-n // 2) for n in model.grid)] if model.cls.startswith("UNet") else [model.grid]
        self.masks = {math.prod(grid): window_mask(grid, model.window) for grid in levels}
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        tokens, text = query.shape[-2], abs(self.model.text)
        image = next((n for n in self.masks if n <= tokens <= n + text), None)
        if image is not None and key.shape[-2] == tokens:
            self.calls += 1
            allowed = torch.ones(tokens, tokens, dtype=torch.bool)
            start = tokens - image if self.model.text < 0 else 0
            allowed[start : start + image, start : start + image] = self.masks[image]
            attn_mask = allowed if attn_mask is None else allowed & attn_mask
        return self.plain(query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa)


def test_what_keeps_every_pair_can_still_change_the_model():
    """LengthDecay leaves nothing out, but is not plain attention; per head it changes its own heads alone."""
    model = MODELS["WanTransformer3DModel"]
    denoiser, decay = model.build(), LengthDecay(train_frames=1, alpha=0.1)
    heads, dense = denoiser.config.num_attention_heads, run(model, denoiser)
    assert decay.density(model.grid) == 1.0 and not decay.is_dense(model.grid)
    outputs = []
    for pattern in (decay, PerHead(((1, Dense()), (heads - 1, decay)))):
        with attach(denoiser, pattern):
            outputs.append(run(model, denoiser))
        assert torch.equal(run(model, denoiser), dense)
    assert all((out - dense).abs().max() > 1e-4 for out in outputs) and not torch.equal(*outputs)


@EVERY
def test_full_window_is_the_dense_model_bit_for_bit(model: Model):
    denoiser = model.build()
    dense = run(model, denoiser, batch=2)
    full = [Dense(), SlidingTile(tile=2, window=9)]
    full += [] if model.cls.startswith("UNet") else [Neighborhood(window=model.grid)]
    for pattern in full:
        with attach(denoiser, pattern, strict=True) as attached:
            assert torch.equal(run(model, denoiser, batch=2), dense)
        assert attached.report.denoisers[0].calls["sparse"] >= model.calls


@EVERY
@pytest.mark.parametrize("pad", [False, True])
def test_window_equals_the_masked_model(model: Model, pad: bool, monkeypatch):
    if pad and not model.padded:
        pytest.skip("this class does not mask text in its self-attention")
    denoiser = model.build()
    changes = model.inputs(2, pad=pad)
    dense = run(model, denoiser, batch=2, **changes)
    with attach(denoiser, Neighborhood(window=model.window), strict=True) as attached:
        sparse = run(model, denoiser, batch=2, **changes)
    report = attached.report.denoisers[0]
    samples = 2 if model.cls.startswith("Mochi") else 1
    assert report.calls == {"sparse": model.calls * samples, "dense": 0} and not attached.report.warnings
    assert report.grids[0] == list(model.grid)
    oracle = Oracle(model, monkeypatch)
    torch.testing.assert_close(sparse, run(model, denoiser, batch=2, **changes), **TOLERANCE)
    assert oracle.calls == model.calls * samples
    assert (sparse - dense).abs().max() > 1e-3


@EVERY
def test_detach_leaves_no_trace(model: Model):
    denoiser = model.build()
    dense = run(model, denoiser)

    def trace():
        modules = {name: (type(m), set(vars(m)), dict(m._forward_hooks)) for name, m in denoiser.named_modules()}
        found = {name: m.processor for name, m in denoiser.named_modules() if hasattr(m, "processor")}
        processors = {name: (type(p), dict(vars(p))) for name, p in found.items()}
        return modules, processors, list(denoiser.state_dict())

    before = trace()
    attached = attach(denoiser, Neighborhood(window=model.window))
    assert list(denoiser.state_dict()) == before[2]
    run(model, denoiser)
    attached.detach()
    attached.detach()
    assert trace() == before
    assert torch.equal(run(model, denoiser), dense)


@EVERY
def test_lora_added_after_attaching(model: Model, monkeypatch):
    peft = pytest.importorskip("peft")
    denoiser = model.build()
    with attach(denoiser, Neighborhood(window=model.window), strict=True):
        plain = run(model, denoiser)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        if not hasattr(denoiser, "add_adapter"):  # PixArt
            peft.inject_adapter_in_model(config, denoiser)
        else:
            denoiser.add_adapter(config)
            denoiser.disable_adapters()
            assert torch.equal(run(model, denoiser), plain)
            denoiser.enable_adapters()
        sparse = run(model, denoiser)
    Oracle(model, monkeypatch)
    torch.testing.assert_close(sparse, run(model, denoiser), **TOLERANCE)
    assert (sparse - plain).abs().max() > 1e-3


@EVERY
def test_fused_projections(model: Model, monkeypatch):
    # diffusers cannot run the fused image-only attention of SD3, attached or not
    denoiser = model.build(dual_attention_layers=()) if model.cls.startswith("SD3") else model.build()
    if not hasattr(denoiser, "fuse_qkv_projections"):
        pytest.skip("this class has no fuse_qkv_projections")
    with attach(denoiser, Neighborhood(window=model.window), strict=True) as attached:
        denoiser.fuse_qkv_projections()
        sparse = run(model, denoiser)
    oracle = Oracle(model, monkeypatch)
    torch.testing.assert_close(sparse, run(model, denoiser), **TOLERANCE)
    assert attached.report.denoisers[0].calls["sparse"] == oracle.calls > 0


@EVERY
@pytest.mark.parametrize("offload", ["leaf_level", "block_level"])
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_group_offload(model: Model, offload: str, first: str):
    denoiser = model.build()
    dense = run(model, denoiser)
    with attach(denoiser, Neighborhood(window=model.window)):
        sparse = run(model, denoiser)
    options = dict(onload_device=torch.device("cpu"), offload_type=offload)
    options |= {"num_blocks_per_group": 1} if offload == "block_level" else {}
    if first == "offload":
        denoiser.enable_group_offload(**options)
    with attach(denoiser, Neighborhood(window=model.window), strict=True):
        if first == "attach":
            denoiser.enable_group_offload(**options)
        assert torch.equal(run(model, denoiser), sparse)
    assert torch.equal(run(model, denoiser), dense)


@EVERY
def test_gradient_checkpointing(model: Model):
    denoiser = model.build().requires_grad_(True).train()
    for module in denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        denoiser.zero_grad()
        with torch.enable_grad():
            run(model, denoiser).square().mean().backward()
        return {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}

    dense = gradients()
    with attach(denoiser, Neighborhood(window=model.window), strict=True):
        plain = gradients()
        denoiser.enable_gradient_checkpointing()
        again = gradients()
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], msg=name)
    name = next(n for n in plain if n.endswith(("to_q.weight", "qkv.weight")))
    assert not torch.allclose(plain[name], dense[name])


@EVERY
def test_compiled_as_one_graph(model: Model):
    denoiser = model.build(**{name: 1 for name in model.config if name == "num_layers"})  # tracing takes seconds
    dense = run(model, denoiser)
    torch._dynamo.reset()
    attached = attach(denoiser, Neighborhood(window=model.window), strict=True)
    sparse = run(model, denoiser)
    assert not torch.allclose(sparse, dense, **TOLERANCE)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, compiled), sparse, **TOLERANCE)
    attached.detach()
    if model.cls in ("WanTransformer3DModel", "FluxTransformer2DModel"):  # without and with text in the sequence
        torch.testing.assert_close(run(model, compiled), dense, **TOLERANCE)


@PADDED
def test_padding_text_stays_hidden(model: Model):
    denoiser = model.build()
    given = model.inputs(2, pad=True)
    mask = next(value for name, value in given.items() if name.startswith("encoder_") and name.endswith("mask")).bool()
    text = given["encoder_hidden_states"]
    text = torch.where(mask[..., None], text, noise(2, *text.shape[1:], seed=9))
    assert not torch.equal(text, given["encoder_hidden_states"])
    with attach(denoiser, Neighborhood(window=model.window), strict=True):
        sparse = run(model, denoiser, batch=2, **given)
        given["encoder_hidden_states"] = text
        torch.testing.assert_close(run(model, denoiser, batch=2, **given), sparse, **TOLERANCE)
        shown = run(model, denoiser, batch=2)
    assert (shown - sparse).abs().max() > 1e-4


@EVERY
def test_wrong_grid_raises(model: Model):
    denoiser = model.build()
    dense = run(model, denoiser)
    wrong = (*model.grid[:-1], model.grid[-1] + 1)
    with pytest.raises(ValueError, match="tokens, but this .* call has"), attach(denoiser, Dense(), grid=wrong):
        run(model, denoiser)
    assert torch.equal(run(model, denoiser), dense)
    with attach(denoiser, Neighborhood(window=model.window), grid=model.grid, strict=True):
        run(model, denoiser)


@EVERY
def test_window_larger_than_the_grid(model: Model):
    denoiser = model.build()
    large = (*model.grid[:-1], model.grid[-1] + 1)
    with pytest.raises(ValueError, match="is larger than the grid"), attach(denoiser, Neighborhood(window=large)):
        run(model, denoiser)
    with attach(denoiser, Neighborhood(window=100), strict=True) as attached:  # one int means at most the whole axis
        run(model, denoiser)
    assert attached.report.denoisers[0].kept == 1.0


@EVERY
def test_other_attention_backend_is_set_aside_and_restored(model: Model):
    denoiser = model.build()
    with attach(denoiser, Neighborhood(window=model.window)):
        sparse = run(model, denoiser)
    denoiser.set_attention_backend("flex")  # for the modules, and for the whole process

    def backends():
        return [getattr(m.processor, "_attention_backend", None) for m in denoiser.modules() if hasattr(m, "processor")]

    before = backends()
    with attach(denoiser, Neighborhood(window=model.window), strict=True) as attached:
        torch.testing.assert_close(run(model, denoiser), sparse, **TOLERANCE)
    assert backends() == before
    assert attached.report.denoisers[0].backends == (["flex"] if any(before) else [])


def sample(given, i: int):
    """One of the two samples of the arguments of a call."""
    if isinstance(given, dict):
        return {name: sample(value, i) for name, value in given.items()}
    batched = isinstance(given, list) or (isinstance(given, torch.Tensor) and given.shape[:1] == (2,))
    return given[i : i + 1] if batched else given


@EVERY
def test_batch_of_two_equals_two_calls(model: Model):
    denoiser = model.build()
    given = model.inputs(2, pad=model.padded)
    with attach(denoiser, Neighborhood(window=model.window), strict=True):
        both = run(model, denoiser, batch=2, **given)
        for i in range(2):
            one = sample(given, i)
            torch.testing.assert_close(run(model, denoiser, batch=1, **one)[0], both[i], **TOLERANCE)


@EVERY
def test_other_patterns_run(model: Model):
    denoiser = model.build()
    dense = run(model, denoiser)
    for pattern in (Window(size=2), SlidingTile(tile=2, window=1)):
        with attach(denoiser, pattern, strict=True) as attached:
            assert not torch.allclose(run(model, denoiser), dense, atol=1e-4)
        assert attached.report.denoisers[0].kept < 1
    radial = Radial(block=2, thin=0, sink=False)
    if len(model.grid) == 2:
        with pytest.raises(ValueError, match="Radial follows the distance between frames"):
            attach(denoiser, radial)
    else:
        with attach(denoiser, radial, strict=True):
            assert not torch.allclose(run(model, denoiser), dense, atol=1e-4)


def test_every_family_has_a_model_here():
    assert {name for name, family in FAMILIES.items() if not family.refuse} == set(MODELS)


def test_a_deep_copy_of_an_attached_model_still_runs_the_original():
    """A property of diffusers hooks, written down in the folder's README: detach before copying."""
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    with attach(denoiser, Neighborhood(window=model.window)):
        twin = copy.deepcopy(denoiser)
        sparse = run(model, denoiser)
        for parameter in twin.blocks[0].attn1.parameters():
            parameter.zero_()
        assert torch.equal(run(model, twin), sparse)
