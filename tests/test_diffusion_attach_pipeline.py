"""attach() in a real pipeline, and everything about it that does not depend on the model family."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    AutoPipelineForImage2Image,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    WanPipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, ModelHook  # noqa: E402
from diffusers.hooks.hooks import HookRegistry  # noqa: E402
from diffusion_models import MODELS, noise, sana  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel  # noqa: E402

from vision_attn import BlockList, Dense, Neighborhood, Radial, SlidingTile, Window, attach  # noqa: E402
from vision_attn.diffusion import tiny_image  # noqa: E402
from vision_attn.diffusion.ulysses import gathered_order  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402
from vision_attn.joint import fit, joint_attention  # noqa: E402

LOCAL = Neighborhood(window=(2, 3, 3))
WAN = MODELS["WanTransformer3DModel"]


pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def wan() -> torch.nn.Module:
    return WAN.build()


def run(denoiser: torch.nn.Module, **changes) -> torch.Tensor:
    return denoiser(**{**WAN.inputs(1), **changes}).sample


def pipeline(denoisers: int = 1) -> WanPipeline:
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate("<pad> </s> <unk> a red blue circle square moves left right".split())}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    second = {"transformer_2": WAN.build(), "boundary_ratio": 0.5} if denoisers == 2 else {}
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text).eval(), vae=vae.eval(), transformer=WAN.build(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **second,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, steps: int = 4, **options) -> torch.Tensor:
    options = {"guidance_scale": 4.0, **options}
    return pipe(
        "a red circle moves right", negative_prompt="blue", height=64, width=80, num_frames=9,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent",
        max_sequence_length=8, **options,
    ).frames  # fmt: skip


# Schedules


def test_dense_steps_of_a_pipeline():
    pipe = pipeline()
    dense = generate(pipe)
    with attach(pipe, LOCAL, strict=True) as attached:
        sparse = generate(pipe)
    report = attached.report.denoisers[0]
    assert report.steps == {"sparse": 4, "dense": 0} and report.forwards == {"sparse": 8, "dense": 0}
    assert report.calls == {"sparse": 16, "dense": 0} and report.grids == [[3, 4, 5]]
    assert not torch.allclose(sparse, dense, atol=1e-4)

    with attach(pipe, LOCAL, dense_steps=1, dense_last_steps=1, strict=True) as attached:
        part = generate(pipe)
        assert torch.equal(generate(pipe), part)
    report = attached.report.denoisers[0]
    assert report.steps == {"sparse": 4, "dense": 4} and report.forwards == {"sparse": 8, "dense": 8}  # of both runs
    assert not torch.equal(part, sparse) and not torch.equal(part, dense)

    for everything in (
        {"dense_steps": 4},
        {"dense_steps": 99},
        {"dense_last_steps": 4},
        {"dense_layers": 2},
        {"dense_layers": (0, 1)},
    ):
        with attach(pipe, LOCAL, **everything):
            assert torch.equal(generate(pipe), dense)
    assert torch.equal(generate(pipe), dense)


def test_every_pipeline_call_is_a_run_of_its_own():
    pipe = pipeline()
    with attach(pipe, LOCAL) as attached:
        for _ in range(3):
            generate(pipe, steps=1)
    assert attached.report.denoisers[0].steps == {"sparse": 3, "dense": 0}


def test_first_steps_are_the_dense_ones():
    pipe = pipeline()
    kept = []
    with attach(pipe, LOCAL, dense_steps=2) as attached:
        generate(pipe, callback_on_step_end=lambda *a: kept.append(attached.report.denoisers[0].calls["sparse"]) or {})
    assert kept == [0, 0, 4, 8]


@pytest.mark.parametrize("scheduler", ["names its step", "does not name its step"])
def test_step_without_announcement(wan, scheduler, monkeypatch):
    """Sources of the step other than cache_context: the scheduler, then changes of the timestep."""
    pipe = pipeline()
    pipe.transformer, target = wan, pipe
    if scheduler == "does not name its step":
        pipe.scheduler, target = DDIMScheduler(), wan
        assert not hasattr(pipe.scheduler, "step_index")
    pipe.scheduler.set_timesteps(4)
    with attach(target, LOCAL, dense_steps=2) as attached:
        for _ in range(2):
            pipe.scheduler.set_timesteps(4)
            for t in pipe.scheduler.timesteps:
                for _ in ("cond", "uncond"):
                    run(wan, timestep=t.expand(1))
                if scheduler == "names its step":
                    pipe.scheduler.step(noise(1, 3), t, noise(1, 3))
    report = attached.report.denoisers[0]
    assert report.steps == {"sparse": 4, "dense": 4} and report.forwards == {"sparse": 8, "dense": 8}


@pytest.mark.parametrize(
    ("cls", "calls", "start"),
    [
        (EulerDiscreteScheduler, 4, 0),
        (EulerDiscreteScheduler, 4, 2),
        (DDIMScheduler, 4, 0),
        (DDIMScheduler, 4, 2),
        (PNDMScheduler, 5, 0),  # its second step is drawn twice
    ],
)
def test_steps_are_counted_on_the_whole_schedule(cls, calls, start):
    """Also those of schedulers that do not name their step, and from an image, where the first half is left out."""
    pipe, more = tiny_image.stable_diffusion(), {"height": 48, "width": 48}
    if start:
        pipe, more = AutoPipelineForImage2Image.from_pipe(pipe), {"image": torch.zeros(1, 3, 48, 48), "strength": 0.5}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **({"skip_prk_steps": True} if calls == 5 else {}))
    pipe.set_progress_bar_config(disable=True)
    for argument, dense in (({"dense_steps": 2}, {0, 1}), ({"dense_last_steps": 1}, {calls - 1})):
        with attach(pipe, Neighborhood(window=3), **argument) as run:
            pipe("a red circle", num_inference_steps=4, output_type="latent", **more)
        full = len(dense & {*range(start, calls)})
        assert run.report.denoisers[0].steps == {"sparse": calls - start - full, "dense": full}, argument


def test_last_steps_need_the_number_of_steps(wan):
    with attach(wan, LOCAL, dense_last_steps=1), pytest.raises(AttachError, match="attach to the pipeline"):
        run(wan)


@pytest.mark.parametrize("calls", ["cond", "uncond"])
def test_only_one_guidance_call(calls):
    pipe = pipeline()
    with attach(pipe, LOCAL, calls=calls, strict=True) as attached:
        generate(pipe)
    assert attached.report.denoisers[0].forwards == {"sparse": 4, "dense": 4}


@pytest.mark.parametrize("calls", ["cond", "uncond"])
@pytest.mark.parametrize("name", ["CogVideoX", "Mochi", "SD3", "QwenImage"])
def test_one_guidance_call_of_a_doubled_batch(name, calls):
    model = next(m for m in MODELS.values() if m.cls.startswith(name))
    denoiser = model.build()
    given = model.inputs(2, pad=model.padded)
    dense = denoiser(**given).sample
    with attach(denoiser, Neighborhood(window=model.window)):
        sparse = denoiser(**given).sample
    with attach(denoiser, Neighborhood(window=model.window), calls=calls, strict=True):
        if hasattr(denoiser, "cache_context"):
            with denoiser.cache_context("cond_uncond"):
                out = denoiser(**given).sample
        else:
            out = denoiser(**given).sample
    first, second = (sparse, dense) if calls == "uncond" else (dense, sparse)
    torch.testing.assert_close(out, torch.stack([first[0], second[1]]), atol=1e-5, rtol=1e-5)


def test_unannounced_guidance_call_is_refused(wan):
    with attach(wan, LOCAL, calls="cond"), pytest.raises(AttachError, match="use calls='both'"):
        run(wan)


def test_compiled_pipeline_follows_the_schedule():
    pipe = pipeline()
    pipe.transformer = WAN.build(num_layers=1)  # tracing takes seconds
    torch._dynamo.reset()
    with attach(pipe, LOCAL, dense_steps=2, strict=True):
        eager = generate(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    with attach(pipe, LOCAL, dense_steps=2, strict=True) as attached:
        torch.testing.assert_close(generate(pipe), eager, atol=1e-5, rtol=1e-5)
    report = attached.report.denoisers[0]
    assert report.steps == {"sparse": 2, "dense": 2} and report.calls["sparse"] == 4
    assert pipe.transformer._orig_mod.__dict__.get("forward") is None


def test_compiled_blocks_and_gradients(wan):
    torch._dynamo.reset()
    with torch.enable_grad(), attach(wan, LOCAL, strict=True) as attached:
        given = WAN.inputs(1)["hidden_states"]
        grads = []
        for _ in range(2):
            video = given.clone().requires_grad_()
            run(wan, hidden_states=video).square().sum().backward()
            grads.append(video.grad)
            wan.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert attached.report.denoisers[0].calls["sparse"] == 4


def test_compiled_whole_model_needs_announced_steps(wan):
    torch._dynamo.reset()
    with attach(wan, LOCAL, dense_steps=1), pytest.raises(Exception, match="compile_repeated_blocks"):
        run(torch.compile(wan, fullgraph=True, backend="eager"))


# Attaching and detaching


def test_two_denoisers_have_separate_contexts():
    pipe = pipeline(denoisers=2)
    with attach(pipe, LOCAL, dense_steps=1) as attached:
        generate(pipe)
    first, second = attached.report.denoisers
    assert (first.name, second.name) == ("transformer", "transformer_2")
    assert first.steps["dense"] == 1 and second.steps["dense"] == 0
    assert first.steps["sparse"] + second.steps["sparse"] == 3 and second.steps["sparse"] > 0


def test_exceptions_leave_no_trace(wan, monkeypatch):
    dense = run(wan)
    with pytest.raises(RuntimeError, match="in the middle"), attach(wan, LOCAL):
        run(wan)
        raise RuntimeError("in the middle")
    assert torch.equal(run(wan), dense)

    def fails(*args, **kwargs):
        raise RuntimeError("in attention")

    with pytest.raises(RuntimeError, match="in attention"), attach(wan, LOCAL), monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", fails)
        run(wan)
    assert torch.equal(run(wan), dense)

    class Fuse(ModelHook):
        pass

    HookRegistry.check_if_exists_or_initialize(wan.blocks[1].attn1).register_hook(Fuse(), "vision_attn_attention")
    before = [set(vars(m)) for m in wan.modules()]
    with pytest.raises(ValueError, match="already exists"):
        attach(wan, LOCAL)
    assert [set(vars(m)) for m in wan.modules()] == before
    wan.blocks[1].attn1._diffusers_hook.remove_hook("vision_attn_attention")
    assert torch.equal(run(wan), dense)


def test_second_attach(wan):
    first = attach(wan, LOCAL)
    sparse = run(wan)
    with pytest.raises(ValueError, match="already has Neighborhood.* attached"):
        attach(wan, Dense())
    assert torch.equal(run(wan), sparse)
    with pytest.raises(ValueError, match="dense_layers"):  # a mistake does not cost the run that is there
        attach(wan, Dense(), dense_layers=(7,), replace=True)
    assert torch.equal(run(wan), sparse)
    second = attach(wan, Dense(), replace=True)
    assert not torch.equal(run(wan), sparse)
    first.detach()
    assert second.report.denoisers[0].calls["sparse"] == 2
    second.detach()


def test_detach_frees_the_run(wan):
    attached = attach(wan, LOCAL)
    run(wan)
    attached.detach()
    watch = weakref.ref(attached)
    del attached
    gc.collect()
    assert watch() is None


def test_other_hooks_may_come_and_go(wan):
    dense = run(wan)
    with attach(wan, LOCAL) as attached:
        sparse = run(wan)
        wan.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with wan.cache_context("cond"):
            assert torch.equal(run(wan), sparse)
        attached.detach()
        with wan.cache_context("cond"):
            torch.testing.assert_close(run(wan), dense)
    wan.disable_cache()
    assert torch.equal(run(wan), dense)


@pytest.mark.parametrize("first", ["attach", "offload"])
def test_accelerate_hooks(wan, first):
    """CPU offload renews its hooks after every pipeline call."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    def offload():
        for module in (wan, wan.blocks[0].attn1):
            remove_hook_from_module(module)
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

    dense = run(wan)
    with attach(wan, LOCAL):
        sparse = run(wan)
    if first == "offload":
        offload()
    with attach(wan, LOCAL, strict=True) as attached:
        for _ in range(2):
            offload()
            assert torch.equal(run(wan), sparse)
        assert attached.report.denoisers[0].forwards["sparse"] == 2
    assert torch.equal(run(wan), dense)
    assert hasattr(wan, "_hf_hook")


def test_saved_model_is_plain(wan, tmp_path):
    dense, weights = run(wan), wan.state_dict()
    with attach(wan, LOCAL):
        wan.save_pretrained(tmp_path)
    loaded = type(wan).from_pretrained(tmp_path)
    found = loaded.state_dict()
    assert weights.keys() == found.keys() and all(torch.equal(weights[name], found[name]) for name in weights)
    torch.testing.assert_close(run(loaded), dense)  # products of weights that lie elsewhere may round differently


# What is refused or left dense


def test_sana_is_refused():
    with pytest.raises(ValueError, match="Sana.*self-attention is linear"):
        attach(sana(), LOCAL)


def test_unknown_class_names_the_ways_out():
    from diffusers import AutoencoderKL

    with pytest.raises(ValueError, match="(?s)AutoencoderKL.*Wan.*pass grid="):
        attach(AutoencoderKL(), LOCAL)
    with pytest.raises(ValueError, match="no module name matches"):
        attach(AutoencoderKL(), LOCAL, grid=(4, 4))


def test_unknown_class_with_a_grid(wan):
    other = type("SomebodysTransformer", (torch.nn.Module,), {"forward": lambda self, **given: wan(**given)})
    other.__module__ = "diffusers.somebody"
    other = other()
    other.blocks = wan.blocks
    with attach(wan, LOCAL):
        sparse = run(wan)
    with attach(other, LOCAL, grid=(3, 4, 5), strict=True):
        assert torch.equal(run(other), sparse)


def test_targets_of_the_wrong_kind(wan):
    with pytest.raises(TypeError, match="cannot attach to dict; allowed: pipelines of diffusers"):
        attach({"transformer": wan}, LOCAL)
    with pytest.raises(ValueError, match="nothing to attach to in Linear"):
        attach(torch.nn.Linear(1, 1), LOCAL)
    with pytest.raises(TypeError, match="must be a pattern"):
        attach(wan, "neighborhood")
    with pytest.raises(ValueError, match="looked for its attributes transformer"):
        pipe = pipeline()
        pipe.transformer = None
        attach(pipe, LOCAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_steps": -1}, "dense_steps must be"),
        ({"dense_steps": 1.5}, "dense_steps must be"),
        ({"dense_layers": 3}, "the model has 2 layers"),
        ({"dense_layers": (0, 2)}, "the model has 2 layers"),
        ({"dense_layers": "all"}, "dense_layers must be"),
        ({"calls": "first"}, "calls must be one of"),
        ({"temperature": 0}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"temperature": "proportional"}, "go together"),
        ({"train_tokens": 4608}, "go together"),
        ({"temperature": "proportional", "train_tokens": 1}, "at least 2"),
        ({"grid": (0, 4)}, "grid must be"),
        ({"grid": (12, 5)}, r"is \(t, h, w\)"),
        ({"backend": "abacus"}, "unknown backend"),
    ],
)
def test_options_out_of_range(wan, options, message):
    with pytest.raises(ValueError, match=message):
        attach(wan, LOCAL, **options)
    assert not hasattr(wan, "_diffusers_hook")


def test_appended_tokens_are_left_dense_with_a_warning(wan, monkeypatch):
    """LTX conditions and the like put tokens into the sequence that have no place on the grid."""
    model = MODELS["LTXVideoTransformer3DModel"]
    denoiser = model.build()
    given = model.inputs(1)
    given |= {"hidden_states": noise(1, 65, 4), "video_coords": noise(1, 3, 65)}
    dense = denoiser(**given).sample
    with attach(denoiser, LOCAL) as attached, pytest.warns(UserWarning, match="65 tokens is left dense") as seen:
        assert torch.equal(denoiser(**given).sample, dense)
        denoiser(**given)
    assert len([w for w in seen if "left dense" in str(w.message)]) == 1
    assert list(attached.report.warnings.values()) == [4]
    assert attached.report.denoisers[0].calls == {"sparse": 0, "dense": 4}
    with attach(denoiser, LOCAL, strict=True), pytest.raises(AttachError, match="left dense"):
        denoiser(**given)


def test_backend_set_after_attaching_is_noticed(wan):
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        with attach(wan, LOCAL) as attached:
            wan.set_attention_backend("flex")
            with pytest.warns(UserWarning, match="without calling scaled_dot_product_attention"):
                run(wan)
        assert sum(attached.report.warnings.values()) == 2
        wan.set_attention_backend("native")
        with attach(wan, LOCAL, strict=True), pytest.raises(AttachError, match="without calling"):
            wan.set_attention_backend("flex")
            run(wan)


def test_mask_over_image_tokens_is_left_dense():
    model = MODELS["UNet2DConditionModel"]
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    denoiser = model.build(**blocks, block_out_channels=(4,), attention_head_dim=2)
    given = model.inputs(1) | {"attention_mask": (torch.arange(140) < 100).float()[None]}
    dense = denoiser(**given).sample
    with attach(denoiser, Neighborhood(window=3)), pytest.warns(UserWarning, match="mask .* is left dense"):
        assert torch.equal(denoiser(**given).sample, dense)


def test_a_bool_mask_that_hides_image_tokens_is_left_dense(monkeypatch):
    model = MODELS["QwenImageTransformer2DModel"]
    denoiser = model.build()
    plain = torch.ones
    given = model.inputs(1, pad=True)
    with attach(denoiser, Neighborhood(window=3)) as attached, monkeypatch.context() as patch:
        # the processor makes its own mask of ones
        patch.setattr(torch, "ones", lambda *size, **kw: plain(*size, **kw) & (torch.arange(48) > 3))
        with pytest.warns(UserWarning, match="hides image tokens"):
            denoiser(**given)
    assert attached.report.denoisers[0].calls == {"sparse": 0, "dense": 2}


def test_block_list_and_backend_by_name(wan):
    every = BlockList.from_mask(torch.eye(4, dtype=torch.bool), block=15)
    with attach(wan, every, backend="reference", strict=True) as attached:
        run(wan)
    json.dumps(attached.report.to_dict())
    assert attached.report.denoisers[0].kept == 0.25


# Temperature


def test_temperature_scales_the_scores(wan, monkeypatch):
    with attach(wan, LOCAL, temperature=1.5):
        warm = run(wan)
    with attach(wan, LOCAL, temperature="proportional", train_tokens=20):
        proportional = run(wan)
    factor = {"now": 1.5}
    plain = F.scaled_dot_product_attention

    def scaled(query, key, value, **given):
        if query.shape[-2] == key.shape[-2] == 60:
            query = query * factor["now"]
        return plain(query, key, value, **given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    torch.testing.assert_close(warm, reference(wan), atol=1e-5, rtol=1e-5)
    factor["now"] = float(torch.tensor(60.0).log().div(torch.tensor(20.0).log()).sqrt())
    torch.testing.assert_close(proportional, reference(wan), atol=1e-5, rtol=1e-5)


def reference(wan) -> torch.Tensor:
    """The model with a dense mask, through whatever `scaled_dot_product_attention` is now."""
    now, mask = F.scaled_dot_product_attention, LOCAL.mask((3, 4, 5))

    def masked(query, key, value, **given):
        if query.shape[-2] == key.shape[-2]:
            given["attn_mask"] = mask
        return now(query, key, value, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        return run(wan)


# Text, appended images, orders


def test_flux_context_image_is_seen_by_all(monkeypatch):
    """Kontext appends a second image: its tokens see everything and are seen by everything."""
    model = MODELS["FluxTransformer2DModel"]
    denoiser = model.build()
    given = model.inputs(1)
    more = given["img_ids"][:20].clone()
    more[:, 0] = 1
    given |= {"hidden_states": noise(1, 68, 16), "img_ids": torch.cat([given["img_ids"], more])}
    with attach(denoiser, Neighborhood(window=model.window), strict=True) as attached:
        sparse = denoiser(**given).sample
    assert attached.report.denoisers[0].grids == [[6, 8]]
    mask = torch.ones(74, 74, dtype=torch.bool)
    mask[6:54, 6:54] = Neighborhood(window=model.window).mask((6, 8))
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda **given: plain(**{**given, "attn_mask": mask}))
    torch.testing.assert_close(sparse, denoiser(**given).sample, atol=1e-5, rtol=1e-5)


def test_position_ids_that_are_no_raster_are_refused():
    model = MODELS["FluxTransformer2DModel"]
    denoiser = model.build()
    given = model.inputs(1)
    given["img_ids"] = given["img_ids"].flip(0)
    with attach(denoiser, Neighborhood(window=3)), pytest.raises(AttachError, match="grid of this .* is not known"):
        denoiser(**given)


def test_compiled_flux_needs_a_grid_it_knows():
    model = MODELS["FluxTransformer2DModel"]
    denoiser = model.build()
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    with attach(denoiser, Neighborhood(window=3)), pytest.raises(Exception, match="one call before compiling"):
        compiled(**model.inputs(1))
    torch._dynamo.reset()
    with attach(denoiser, Neighborhood(window=3), grid=model.grid):
        torch.testing.assert_close(
            compiled(**model.inputs(1)).sample, denoiser(**model.inputs(1)).sample, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("start", [0, 2, 5])
def test_joint_attention(start):
    """Text before, around or after the image, with padding, grouped heads and a scale."""
    torch.manual_seed(0)
    grid, tokens = (3, 4), 17
    q, k, v = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 6)
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    others = [i for i in range(tokens) if not start <= i < start + 12]
    mask[1, ..., others[-2:]] = False
    pattern = Neighborhood(window=(3, 2))
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    allowed[start : start + 12, start : start + 12] = pattern.mask(grid)
    out = joint_attention(q, k, v, mask, pattern, grid, start, alone=False, scale=0.3, enable_gqa=True)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed & mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_gathered_order_undoes_the_exchange():
    text, image = list(range(6)), list(range(100, 108))
    gathered = [x for r in range(2) for x in text[3 * r : 3 * r + 3] + image[4 * r : 4 * r + 4]]
    assert [gathered[i] for i in gathered_order(2, 6, 8)] == text + image


@pytest.mark.parametrize(
    ("pattern", "grid", "want"),
    [
        (Neighborhood(window=9, stride=4), (1, 30, 6), Neighborhood(window=(1, 9, 6), stride=(1, 4, 4))),
        (Neighborhood(window=5, dilation=2), (8, 30), Neighborhood(window=(4, 5), dilation=2)),
        (Neighborhood(window=5), (8, 30), Neighborhood(window=5)),
        (Neighborhood(window=(5, 9)), (8, 6), Neighborhood(window=(5, 9))),
        (Window(size=4, shift=2), (2, 9), Window(size=(2, 4), shift=(1, 2))),
        (SlidingTile(tile=4, window=3), (1, 9), SlidingTile(tile=(1, 4), window=3)),
        (Radial(thin=0), (4, 6, 6), Radial(thin=0)),
    ],
)
def test_one_int_means_at_most_the_whole_axis(pattern, grid, want):
    assert fit(pattern, grid) == want


# Report


def test_report(wan):
    attached = attach(wan, LOCAL, dense_layers=1)
    assert "not called yet" in str(attached.report) and "layer 1" in str(attached.report)
    run(wan)
    attached.detach()
    report = attached.report
    data = report.to_dict()
    assert data == json.loads(json.dumps(data))
    assert data["pattern"] == LOCAL.to_dict() and data["options"] == {"dense_layers": 1} and data["warnings"] == {}
    one = data["denoisers"][0]
    share = LOCAL.density((3, 4, 5))
    assert one["layers"] == [1.0, share] and one["kept"] == pytest.approx((1 + share) / 2)
    assert one["modules"] == ["blocks.0.attn1", "blocks.1.attn1"] and one["family"] == "WanTransformer3DModel"
    assert "grid 3x4x5" in str(report) and f"{share:.1%}" in str(report)


def test_importing_is_light():
    code = "import sys, vision_attn, vision_attn.diffusion, vision_attn.hosts; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
