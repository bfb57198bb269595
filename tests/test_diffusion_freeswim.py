"""FreeSwim: windows against the published inequalities, and both paths against a plain run of one after the other."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel, WanVideoToVideoPipeline  # noqa: E402
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from diffusion_models import MODELS, Model, noise  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.diffusion import FreeSwim  # noqa: E402
from vision_attn.diffusion.methods.dual_path import temperature, window  # noqa: E402
from vision_attn.diffusion.native import native  # noqa: E402
from vision_attn.diffusion.tiny import pipeline  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402

WAN = MODELS["WanTransformer3DModel"]
SERVED = ("WanTransformer3DModel", "LTXVideoTransformer3DModel", "CosmosTransformer3DModel", "PixArtTransformer2DModel")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


pytestmark = pytest.mark.usefixtures("inference")


# Windows


def published(grid: tuple[int, ...], base: tuple[int, int], inward: bool) -> torch.Tensor:
    """The paper's inequalities, pair by pair; all frames are seen."""
    (height, width), (a, b) = grid[-2:], (base[0] // 2, base[1] // 2)
    mask = torch.zeros(height, width, height, width, dtype=torch.bool)
    for h in range(height):
        for w in range(width):
            more = [max(a - h, 0), max(a + h - height + 1, 0), max(b - w, 0), max(b + w - width + 1, 0)]
            down, up, right, left = more if inward else (0, 0, 0, 0)
            for y in range(height):
                for x in range(width):
                    mask[h, w, y, x] = h - a - up <= y <= h + a + down and w - b - left <= x <= w + b + right
    frames = math.prod(grid[:-2])
    return mask.reshape(height * width, -1).repeat(frames, frames)


@pytest.mark.parametrize("inward", [True, False], ids=["inward", "clipped"])
@pytest.mark.parametrize("grid", [(1, 7, 5), (3, 4, 6), (2, 5, 11), (8, 9)], ids=str)
@pytest.mark.parametrize("base", [(1, 1), (2, 3), (4, 2), (5, 7), (6, 6), (20, 3)], ids=str)
def test_the_window_is_the_published_one(grid, base, inward):
    assert torch.equal(window(grid, base, inward).mask(grid), published(grid, base, inward))


def test_published_numbers():
    assert window((21, 68, 120), (30, 52)).window == (21, 31, 53)
    assert round(window((21, 68, 120), (30, 52)).density((21, 68, 120)), 3) == 0.201
    assert window((21, 136, 240), (45, 80)).window == (21, 45, 81)
    assert round(temperature((30, 52)), 4) == 1.0461


# Two paths, one after the other


class Plain(TorchFunctionMode):
    """Attention by its formula in float64: self-attention under a mask, and text answers noted down or given back."""

    def __init__(self, mask, factor: float, image_calls: bool, answers: list | None = None) -> None:
        super().__init__()
        self.mask, self.factor, self.image_calls, self.given = mask, factor, image_calls, answers
        self.answers, self.cross = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attention(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        alone = query.shape[-2] == key.shape[-2]
        scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if alone:
            scores = scores * self.factor
            scores = scores if self.mask is None else scores.masked_fill(~self.mask, -math.inf)
        elif attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        out = (scores.softmax(-1) @ value.double()).to(query.dtype)
        if alone:
            return out
        self.cross += 1
        if self.image_calls and self.cross % 2:
            return out
        self.answers.append(out)
        return out if self.given is None else self.given[len(self.answers) - 1]


def passes(denoiser, call, grid, base, *, answers=None, override=True, inward=True, factor=None, model=WAN):
    """What FreeSwim is to give, and the global copy's answers from the text, by up to two calls of the plain model."""
    factor = math.sqrt(math.log(2 * math.prod(base)) / math.log(math.prod(base))) if factor is None else factor
    image_calls = "encoder_hidden_states_image" in call
    if answers is None and override:
        with Plain(None, factor, image_calls) as everything:
            denoiser(**call)
        answers = everything.answers
    with Plain(published(grid, base, inward), factor, image_calls, answers):
        return model.output(denoiser(**call)), answers


def base_of(model: Model) -> tuple[int, int]:
    return tuple(n // 2 for n in model.grid[-2:])


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cls", SERVED)
def test_both_paths(cls, batch, padded):
    model = MODELS[cls]
    denoiser, call = model.build(), model.inputs(batch, pad=padded)
    expected, _ = passes(denoiser, call, model.grid, base_of(model), model=model)
    for period in (None, 1, 3):
        with attach(denoiser, FreeSwim(base=base_of(model), cache_steps=period)) as attached:
            torch.testing.assert_close(model.output(denoiser(**call)), expected, **CLOSE)
        assert attached.report.denoisers[0]["calls"] == {"dual": 1, "cached": 0, "local": 0}
    plain = model.output(denoiser(**call))
    assert (expected - plain).abs().max() > 1e-3


def image_to_video() -> torch.nn.Module:
    """Wan's cross-attention asks the image before 512 text tokens."""
    return WAN.build(image_dim=8, added_kv_proj_dim=24)


@pytest.mark.parametrize("period", [None, 2])
def test_image_to_video(period):
    denoiser = image_to_video()
    call = {**WAN.inputs(2), "encoder_hidden_states": noise(2, 512, 16, seed=1)}
    call["encoder_hidden_states_image"] = noise(2, 3, 8, seed=3)
    later = {**call, "hidden_states": noise(2, 4, 3, 8, 10, seed=5), "timestep": torch.full((2,), 400)}
    first, answers = passes(denoiser, call, WAN.grid, (2, 2))
    second, _ = passes(denoiser, later, WAN.grid, (2, 2), answers=answers if period else None)
    with attach(denoiser, FreeSwim(base=(2, 2), cache_steps=period)):
        torch.testing.assert_close(denoiser(**call).sample, first, **CLOSE)
        torch.testing.assert_close(denoiser(**later).sample, second, **CLOSE)


@pytest.mark.parametrize("options", [{"inward": False}, {"temperature": 1.5}, {"temperature": 1.0}], ids=str)
def test_options(options):
    denoiser, call = WAN.build(), WAN.inputs(1)
    names = {"temperature": "factor"}
    expected, _ = passes(denoiser, call, WAN.grid, (2, 3), **{names.get(k, k): v for k, v in options.items()})
    with attach(denoiser, FreeSwim(base=(2, 3), **options)):
        torch.testing.assert_close(denoiser(**call).sample, expected, **CLOSE)


def test_the_window_alone():
    denoiser, call = WAN.build(), WAN.inputs(1)
    expected, _ = passes(denoiser, call, WAN.grid, (2, 3), override=False)
    with attach(denoiser, FreeSwim(base=(2, 3), override=False)) as attached:
        alone = denoiser(**call).sample
    torch.testing.assert_close(alone, expected, **CLOSE)
    assert attached.report.denoisers[0]["calls"] == {"dual": 0, "cached": 0, "local": 1}
    with attach(denoiser, Neighborhood(window=(3, 3, 3)), temperature=temperature((2, 3))):
        assert torch.equal(denoiser(**call).sample, alone)


# Cache


def test_the_answers_wait_on_the_device_that_was_chosen():
    denoiser = WAN.build()
    call = {"hidden_states": noise(1, 4, 3, 8, 10), "timestep": torch.tensor([900])}
    with attach(denoiser, FreeSwim(base=(2, 3), cache_device="meta")) as attached, denoiser.cache_context("cond"):
        denoiser(**call, encoder_hidden_states=noise(1, 5, 16, seed=9))
        assert {hook.stored.device.type for path in attached._paths for hook in path.cross} == {"meta"}


@pytest.mark.parametrize("period", [None, 1, 2, 3])
def test_refreshes(period):
    denoiser, base = WAN.build(), (2, 3)
    calls = []
    with attach(denoiser, FreeSwim(base=base, cache_steps=period, cache_device="cpu")) as attached:
        for step in range(5):
            for name, sign in (("cond", 1), ("uncond", -1)):
                call = {
                    "hidden_states": noise(1, 4, 3, 8, 10, seed=step),
                    "timestep": torch.tensor([900 - 100 * step]),
                    "encoder_hidden_states": sign * noise(1, 5, 16, seed=9),
                }
                with denoiser.cache_context(name):
                    calls.append((step, name, call, denoiser(**call).sample))
        counts = attached.report.denoisers[0]["calls"]
    answers = None
    for step, name, call, found in calls:
        if period is None:
            expected, _ = passes(denoiser, call, WAN.grid, base)
        elif name == "uncond":
            expected, _ = passes(denoiser, call, WAN.grid, base, override=False)
        else:
            expected, answers = passes(denoiser, call, WAN.grid, base, answers=answers if step % period else None)
        torch.testing.assert_close(found, expected, **CLOSE, msg=f"{name} call of step {step}")
    fresh = {None: 10, 1: 5, 2: 3, 3: 2}[period]
    rest = {"cached": 0, "local": 0} if period is None else {"cached": 5 - fresh, "local": 5}
    assert counts == {"dual": fresh, **rest}


def test_guidance_as_one_batch():
    """`[uncond, cond]`: only the second half has a global copy."""
    model = MODELS["LTXVideoTransformer3DModel"]
    denoiser, base = model.build(), base_of(model)
    both = model.inputs(2, pad=True)
    later = {**both, "hidden_states": noise(2, 60, 4, seed=7), "timestep": torch.full((2,), 400)}
    with attach(denoiser, FreeSwim(base=base)) as attached, denoiser.cache_context("cond_uncond"):
        first, second = (denoiser(**call).sample for call in (both, later))
    assert attached.report.denoisers[0]["calls"] == {"dual": 1, "cached": 1, "local": 0}

    def half(call, rows):
        return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in call.items()}

    answers = None
    for call, found in ((both, first), (later, second)):
        uncond, _ = passes(denoiser, half(call, slice(0, 1)), model.grid, base, override=False)
        cond, answers = passes(denoiser, half(call, slice(1, 2)), model.grid, base, answers=answers)
        torch.testing.assert_close(found, torch.cat([uncond, cond]), **CLOSE)


class Pipe:
    """As much of a pipeline as says where a run is."""

    def __init__(self, denoiser, guided: bool) -> None:
        self.transformer, self.do_classifier_free_guidance = denoiser, guided
        self.components, self.scheduler = {}, SimpleNamespace(step_index=None)


def test_a_batch_without_guidance_is_conditional():
    """LTX announces "cond_uncond" whether or not the batch is doubled."""
    model = MODELS["LTXVideoTransformer3DModel"]
    denoiser, call = model.build(), model.inputs(2)
    expected, _ = passes(denoiser, call, model.grid, base_of(model))
    with FreeSwim(base=base_of(model)).attach(Pipe(denoiser, False)), denoiser.cache_context("cond_uncond"):
        torch.testing.assert_close(denoiser(**call).sample, expected, **CLOSE)
    one = model.inputs(3)
    expected, _ = passes(denoiser, one, model.grid, base_of(model))
    with attach(denoiser, FreeSwim(base=base_of(model))), denoiser.cache_context("cond_uncond"):
        torch.testing.assert_close(denoiser(**one).sample, expected, **CLOSE)


def test_a_run_that_starts_in_the_middle_of_the_schedule():
    pipe = Pipe(WAN.build(), True)
    with FreeSwim(base=(2, 3)).attach(pipe) as attached:
        kinds = []
        for step in (5, 6, 7, 8, 0, 1):  # and another run, after the first was cut off
            pipe.scheduler.step_index, before = step, attached.report.denoisers[0]["calls"]
            with pipe.transformer.cache_context("cond"):
                pipe.transformer(**WAN.inputs(1))
            kinds += [kind for kind, n in attached.report.denoisers[0]["calls"].items() if n > before[kind]]
    assert kinds == ["dual", "cached"] * 3


def test_a_pipeline_run_starts_fresh_and_leaves_nothing_stored():
    pipe = pipeline()

    pipe.set_progress_bar_config(disable=True)

    def run(**options):
        return pipe("a red circle", height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16,
                    **options).frames  # fmt: skip

    with attach(pipe, FreeSwim(base=(2, 2))) as attached:
        first = run()
        report = attached.report.denoisers[0]
        assert report["calls"] == {"dual": 2, "cached": 1, "local": 3} and report["stored_bytes"] == 0

        def stop(pipe, step, timestep, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(callback_on_step_end=stop)
        assert attached.report.denoisers[0]["stored_bytes"] > 0
        assert torch.equal(run(), first)
    assert attached.report.denoisers[0]["stored_bytes"] == 0


def test_without_guidance_every_call_is_conditional():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, FreeSwim(base=(2, 2), cache_steps=1)) as attached:
        pipe("a red circle", height=32, width=32, num_frames=1, num_inference_steps=2, guidance_scale=1.0,
             output_type="latent", max_sequence_length=16)  # fmt: skip
    assert attached.report.denoisers[0]["calls"] == {"dual": 2, "cached": 0, "local": 0}


def test_a_pipeline_that_does_not_say_which_call_is_which():
    parts = {k: v for k, v in pipeline().components.items() if k not in ("transformer_2",) and v is not None}
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor_spatial = 8  # this pipeline does not read it from the VAE
    call = dict(video=torch.zeros(1, 5, 3, 32, 32), prompt="a red circle", height=32, width=32, num_inference_steps=3,
                guidance_scale=3.0, output_type="latent", max_sequence_length=16)  # fmt: skip
    with attach(pipe, FreeSwim(base=(2, 2))), pytest.raises(AttachError, match="use cache_steps=None"):
        pipe(**call)
    with attach(pipe, FreeSwim(base=(2, 2), cache_steps=None)) as attached:
        pipe(**call)
    assert attached.report.denoisers[0]["calls"]["dual"] == 4  # 0.8 of 3 steps, both guidance calls


# Hosts


def test_compiled_blocks():
    denoiser, call = WAN.build(), WAN.inputs(1)
    uncond = {**call, "encoder_hidden_states": -call["encoder_hidden_states"]}

    def outputs():
        results = []
        for step in range(3):
            for name, one in (("cond", call), ("uncond", uncond)):
                with denoiser.cache_context(name):
                    results.append(denoiser(**{**one, "timestep": torch.tensor([900 - step])}).sample)
        return torch.stack(results)

    with attach(denoiser, FreeSwim(base=(2, 3))):
        eager = outputs()
        denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(outputs(), eager, **CLOSE)
    torch._dynamo.reset()


def test_a_model_compiled_as_a_whole_is_refused():
    denoiser = WAN.build()
    with attach(denoiser, FreeSwim(base=(2, 3))), pytest.raises(Exception, match="compile_repeated_blocks"):
        torch.compile(denoiser, fullgraph=True, backend="eager")(**WAN.inputs(1))
    torch._dynamo.reset()


def test_bfloat16():
    denoiser = WAN.build().to(torch.bfloat16)
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in WAN.inputs(2).items()}
    with attach(denoiser, FreeSwim(base=(2, 3))):
        out = denoiser(**call).sample
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_another_backend_is_put_aside_and_comes_back():
    denoiser, call = WAN.build(), WAN.inputs(1)
    with attach(denoiser, FreeSwim(base=(2, 3))):
        expected = denoiser(**call).sample
    with attention_backend("native"):  # what follows sets that of the whole process
        denoiser.set_attention_backend("flex")
        with attach(denoiser, FreeSwim(base=(2, 3))):
            assert torch.equal(denoiser(**call).sample, expected)
            denoiser.set_attention_backend("flex")
            with pytest.raises(AttachError, match="without calling scaled_dot_product_attention"):
                denoiser(**call)
        assert denoiser.blocks[0].attn2.processor._attention_backend.value == "flex"


# Refusals and the training size


@pytest.mark.parametrize("cls", ["FluxTransformer2DModel", "CogVideoXTransformer3DModel"])
def test_joint_sequences_are_refused(cls):
    with pytest.raises(ValueError, match=f"cannot go into {cls}: it has its text inside the sequence"):
        attach(MODELS[cls].build(), FreeSwim(base=(2, 2)))


def test_unets_are_refused():
    with pytest.raises(ValueError, match="convolutions and several levels"):
        attach(MODELS["UNet2DConditionModel"].build(), FreeSwim(base=(2, 2)))


def test_an_unknown_training_size():
    with pytest.raises(ValueError, match=r"trained on is not known; give it in tokens, FreeSwim\(base="):
        attach(WAN.build(), FreeSwim())


def test_known_training_sizes(tmp_path):
    small = dict(attention_head_dim=2, ffn_dim=2, freq_dim=2, text_dim=2, in_channels=2, out_channels=2)
    for heads, layers, grid in ((12, 30, (30, 52)), (40, 40, (45, 80)), (12, 29, None)):
        known = native(WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, **small))
        assert (known and known.grid) == grid
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    said = {"height": 96, "width": 64, "frames": 5, "steps": 2, "guidance": 2.0}
    (tmp_path / "model" / "defaults.json").write_text(json.dumps(said))
    loaded = type(pipe).from_pretrained(tmp_path / "model")
    with attach(loaded, FreeSwim()) as attached:
        token = pipe.vae_scale_factor_spatial * loaded.transformer.config.patch_size[1]
        assert attached.report.denoisers[0]["base"] == [96 // token, 64 // token]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base": 30}, "base must be the training grid"),
        ({"base": (30, 0)}, "base must be the training grid"),
        ({"base": (1, 1)}, "single token"),
        ({"cache_steps": 0}, "cache_steps must be an int of at least 1"),
        ({"cache_steps": 1.5}, "cache_steps must be an int of at least 1"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": math.nan}, "temperature must be a number above 0"),
        ({"inward": 1}, "inward must be True or False"),
        ({"cache_device": "fridge"}, "cache_device must name a device"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        FreeSwim(**options)


def test_the_scheduler_is_not_needed_to_count_steps():
    """A bare denoiser counts the timesteps it is called with, on the run of a scheduler that starts in the middle."""
    denoiser, call = WAN.build(), WAN.inputs(1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    with attach(denoiser, FreeSwim(base=(2, 3), cache_steps=3)) as attached:
        for timestep in scheduler.timesteps[3:]:
            denoiser(**{**call, "timestep": timestep.expand(1)})
    assert attached.report.denoisers[0]["calls"] == {"dual": 3, "cached": 4, "local": 0}
