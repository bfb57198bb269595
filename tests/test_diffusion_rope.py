"""Edited rotary embeddings against tables, ids and rates made by hand; UltraViCo against its formula."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel  # noqa: E402
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from diffusion_models import MODELS, noise, sana  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from vision_attn import Neighborhood, attach  # noqa: E402
from vision_attn.diffusion import NTK, PI, TASR, RIFLEx, UltraViCo, YaRN  # noqa: E402
from vision_attn.diffusion.lengths import LENGTHS  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402

WAN = MODELS["WanTransformer3DModel"]
EDITS = {
    "pi": PI(train_frames=2),
    "ntk": NTK(train_frames=2),
    "yarn": YaRN(train_frames=2, low=0.05, high=0.2),
    "tasr": TASR(train_frames=2),
    "riflex": RIFLEx(train_frames=2, index=1),
    "riflex-period": RIFLEx(train_frames=2, period=600, share=1),
}


@pytest.fixture(autouse=True)
def quiet_inference():
    with torch.no_grad(), attention_backend("native"):
        yield


def wan(**config) -> torch.nn.Module:
    return WAN.build(attention_head_dim=24, **config)


def long(batch: int = 1, frames: int = 7, timestep: int = 300) -> dict:
    text = noise(batch, 5, 16, seed=1)
    latents = noise(batch, 4, frames, 8, 10)
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.full((batch,), timestep)}


def by_hand(name: str, dim: int, base: float, trained: int, size: int, noise: float = 0.3) -> list[float]:
    """The frequencies of an axis, one by one, from the formulas."""
    s, out = size / trained, []
    bases = {"ntk": base * s ** (dim / (dim - 2)), "riflex": base}
    plain = [base ** (-2 * j / dim) for j in range(dim // 2)]
    for j, theta in enumerate(plain):
        ntk = bases["ntk"] ** (-2 * j / dim)
        if name == "yarn":
            ramp = min(max((trained * theta / (2 * math.pi) - 0.05) / (0.2 - 0.05), 0), 1)
            theta = (1 - ramp) * theta / s + ramp * theta
        elif name == "riflex" and j == 1:
            theta = 0.9 * 2 * math.pi / size
        elif name == "riflex-period" and j == min(range(dim // 2), key=lambda i: abs(2 * math.pi / plain[i] - 600)):
            theta = 2 * math.pi / size
        elif name in ("pi", "ntk", "tasr"):
            theta = {"pi": theta / s, "ntk": ntk, "tasr": noise * theta / s + (1 - noise) * ntk}[name]
        out.append(theta)
    return out


def table(frequencies: list[float], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    angles = angles.repeat_interleave(2, 1)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("name", EDITS)
def test_wan_computes_with_tables_made_by_hand(name: str):
    model, call = wan(), long()
    with attach(model, EDITS[name]) as run:
        got = model(**call).sample
    assert run.report.denoisers[0]["times"] == {"t": 3.5} and run.report.denoisers[0]["changed"] == 1
    plain = model(**call).sample
    dim = model.rope.t_dim
    cos, sin = table(by_hand(name, dim, 10000.0, 2, 7), torch.arange(len(model.rope.freqs_cos)))
    model.rope.freqs_cos[:, :dim], model.rope.freqs_sin[:, :dim] = cos, sin
    want = model(**call).sample
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert (want - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", EDITS)
def test_hunyuanvideo_and_cogvideox_tables(name: str):
    """The tables that attention gets, entry by entry."""
    hunyuan = MODELS["HunyuanVideoTransformer3DModel"].build(attention_head_dim=16, rope_axes_dim=(8, 4, 4))
    cog = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    seen = {}
    hunyuan.transformer_blocks[0].register_forward_pre_hook(lambda m, args: seen.update(hunyuan=args[4]))
    cog.transformer_blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(cog=kwargs["image_rotary_emb"]), with_kwargs=True
    )
    calls = {
        "hunyuan": {**MODELS["HunyuanVideoTransformer3DModel"].inputs(1), "hidden_states": noise(1, 4, 7, 4, 4)},
        "cog": {
            "hidden_states": noise(1, 7, 4, 4, 4), "encoder_hidden_states": noise(1, 5, 8),
            "timestep": torch.tensor([500]), "image_rotary_emb": (torch.ones(28, 32), torch.zeros(28, 32)),
        },
    }  # fmt: skip
    t = torch.arange(7).repeat_interleave(4)
    calls["cog"]["image_rotary_emb"] = tuple(
        torch.cat([own, given[:, 8:]], 1)
        for own, given in zip(table(by_hand("", 8, 1e4, 2, 7), t), calls["cog"]["image_rotary_emb"], strict=True)
    )
    given = [part.clone() for part in calls["cog"]["image_rotary_emb"]]
    for key, model, base in (("hunyuan", hunyuan, 256.0), ("cog", cog, 1e4)):
        model(**calls[key])
        plain = seen[key]
        with attach(model, EDITS[name]):
            model(**calls[key])
        want = table(by_hand(name, 8, base, 2, 7, noise=0.5), t)
        for got, before, wanted in zip(seen[key], plain, want, strict=True):
            torch.testing.assert_close(got[:, :8], wanted, atol=1e-6, rtol=1e-5)
            assert torch.equal(got[:, 8:], before[:, 8:]) and not torch.equal(got, before)
    assert all(map(torch.equal, given, calls["cog"]["image_rotary_emb"]))  # the pipeline uses them again


def test_interpolation_is_another_rate_or_other_ids():
    """PI is what Cosmos does at more frames per second, LTX at fewer per latent, and Flux between its tokens."""
    changes = {
        "CosmosTransformer3DModel": ({"fps": 16}, {"fps": 48}, PI(train_frames=1)),
        "LTXVideoTransformer3DModel": (
            {"rope_interpolation_scale": (8 / 25, 32, 32)}, {"rope_interpolation_scale": (8 / 75, 32, 32)},
            PI(train_frames=1),
        ),
        "FluxTransformer2DModel": (
            {}, {"img_ids": MODELS["FluxTransformer2DModel"].inputs(1)["img_ids"] / torch.tensor([1, 3, 4])},
            PI(train_size=(2, 2)),
        ),
    }  # fmt: skip
    for cls, (now, other, edit) in changes.items():
        model = MODELS[cls].build()
        call = {**MODELS[cls].inputs(1), **now}
        with attach(model, edit):
            got = model(**call).sample
        torch.testing.assert_close(got, model(**{**call, **other}).sample, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(got, model(**call).sample, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EDITS)
def test_height_and_width(name: str):
    """The same formulas on the other axes; RIFLEx takes the frequency that turns once in the trained size."""
    model, call = wan(), long(frames=1)
    edit = EDITS[name]
    edit = type(edit)(**{**vars(edit), "train_size": (2, 5)})
    with attach(model, edit):
        got = model(**call).sample
    start, dim = model.rope.t_dim, model.rope.h_dim
    frequencies = by_hand(name, dim, 10000.0, 2, 4)
    if name.startswith("riflex"):
        plain = by_hand("", dim, 10000.0, 2, 4)
        nearest = min(range(dim // 2), key=lambda j: abs(2 * math.pi / plain[j] - 2))
        frequencies = [edit.share * 2 * math.pi / 4 if j == nearest else theta for j, theta in enumerate(plain)]
    cos, sin = table(frequencies, torch.arange(len(model.rope.freqs_cos)))
    model.rope.freqs_cos[:, start : start + dim], model.rope.freqs_sin[:, start : start + dim] = cos, sin
    torch.testing.assert_close(got, model(**call).sample, atol=1e-6, rtol=1e-5)


def test_what_repeats_in_height_is_the_trained_picture():
    theta = 10000.0 ** -(torch.arange(0, 8, 2) / 8)  # turns of 6.3, 63, 628 and 6283 tokens
    changed = RIFLEx(train_size=(20, 20)).edited(theta, "h", 40, 20, None, None)
    assert (changed != theta).tolist() == [True, False, False, False]  # 63 is nearer to 40, 6.3 to 20


def test_what_is_not_longer_stays_to_the_bit():
    model = wan()
    for frames in (3, 7):
        plain = model(**long(frames=frames)).sample
        with attach(model, YaRN(train_frames=7)) as run:
            assert torch.equal(model(**long(frames=frames)).sample, plain)
    assert run.report.denoisers[0]["changed"] == 0 and "0 of 1 calls were longer" in str(run.report)


def inputs(args, kwargs) -> list[torch.Tensor]:
    """Query, key and value of a call, however they are passed."""
    return list(args[:3]) or [kwargs[name] for name in ("query", "key", "value")]


def test_sharper_yarn():
    model, call = wan(), long()
    with attach(model, YaRN(train_frames=2, sharpen=True)):
        got = model(**call).sample
    gain = (0.1 * math.log(3.5) + 1) ** 2  # on the scores

    class Scaled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                query, key, _ = inputs(args, kwargs)
                if query.shape == key.shape:
                    kwargs = {**kwargs, "scale": gain * query.shape[-1] ** -0.5}
            return func(*args, **kwargs)

    with attach(model, YaRN(train_frames=2)), Scaled():
        torch.testing.assert_close(got, model(**call).sample, atol=1e-6, rtol=1e-5)


def test_edits_go_with_patterns_and_with_each_other_not():
    model, call = wan(), long()
    with attach(model, Neighborhood(window=(3, 3, 3))) as local, attach(model, PI(train_frames=2)) as edit:
        both = model(**call).sample
        assert local.report.denoisers[0].calls["sparse"] == 2 and edit.report.denoisers[0]["changed"] == 1
        with pytest.raises(ValueError, match="already has PI.*rotary embedding cannot also follow NTK"):
            attach(model, NTK(train_frames=2))
        with attach(model, NTK(train_frames=2), replace=True):
            assert not torch.equal(model(**call).sample, both)
    with attach(model, PI(train_frames=2)), attach(model, Neighborhood(window=(3, 3, 3))):
        assert torch.equal(model(**call).sample, both)


def test_bfloat16_and_compiled():
    model, call = wan(num_layers=1), long()
    with attach(model, TASR(train_frames=2)):
        want = model(**call).sample
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**call).sample, want)
        torch.testing.assert_close(compiled(**long(timestep=900)).sample, model(**long(timestep=900)).sample)
    for edit in (RIFLEx(train_frames=2), UltraViCo(train_frames=2)):
        half = wan().bfloat16()
        with attach(half, edit):
            out = half(**{key: value.bfloat16() if value.is_floating_point() else value for key, value in call.items()})
        assert out.sample.dtype == torch.bfloat16 and out.sample.isfinite().all()


class Formula(TorchFunctionMode):
    """UltraViCo on the whole score matrix, for `image` tokens beside text."""

    def __init__(self, image: slice, positions: int, pattern) -> None:
        super().__init__()
        self.image, self.positions, self.pattern = image, positions, pattern

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (x.double() for x in inputs(args, kwargs))
        if q.shape != k.shape or q.shape[-2] < self.image.stop:  # over text
            return func(*args, **kwargs)
        mask, p, rule = kwargs.get("attn_mask"), self.positions, self.pattern
        visible = torch.ones(q.shape[-2], dtype=torch.bool) if mask is None else mask[0, 0, 0]
        image = torch.zeros_like(visible)
        image[self.image] = True
        centered = k - k[:, :, visible].mean(2, keepdim=True) if rule.center_keys else k
        plain = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = q @ centered.transpose(-1, -2) / q.shape[-1] ** 0.5
        number = image.cumsum(0) - 1
        distance = (number[:, None] - number[None]).abs()
        factor = torch.full(distance.shape, float(rule.alpha))
        for m in range(1, 5) if rule.period else ():
            lowest, highest = (m * rule.period - rule.gamma) * p, (m * rule.period + rule.gamma) * p
            factor[(distance >= lowest) & (distance <= highest)] = rule.beta
        factor[distance <= rule.train_frames * p / 2] = 1
        factor[~(image[:, None] & image[None])] = 1
        scores = torch.where(scores < 0, scores, scores * factor)
        if rule.first_frame:
            scores[..., (number <= p)[:, None] & (number > rule.train_frames * p)[None]] = -math.inf
        scores[:, :, ~image] = plain[:, :, ~image]
        scores[..., ~visible] = -math.inf
        return (scores.softmax(-1) @ v).float()


@pytest.mark.parametrize("center", (True, False))
@pytest.mark.parametrize("cls", ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel"))
def test_ultravico_is_its_formula(cls: str, center: bool):
    model = MODELS[cls].build()
    call = {**MODELS[cls].inputs(1), "hidden_states": 3 * noise(1, 4, 7, 6, 4)}
    if cls.startswith("Hunyuan"):
        call["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])
    method = UltraViCo(train_frames=2, alpha=0.3, beta=0.1, center_keys=center)
    if cls.startswith("Hunyuan"):
        method = UltraViCo(train_frames=2, alpha=0.3, beta=0.1, period=4, gamma=0.5, center_keys=center)
    with attach(model, method):
        got = model(**call)[0]
    pattern = method.pattern(model)
    assert pattern.first_frame == cls.startswith("Wan")
    with Formula(slice(0, 7 * 6), 6, pattern):
        want = model(**call)[0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (model(**call)[0] - want).abs().max() > 1e-3


def test_published_settings():
    models = {cls: MODELS[cls].build() for cls in MODELS if cls.split("Transformer")[0] in ("Wan", "HunyuanVideo")}
    wan, hunyuan = models["WanTransformer3DModel"], models["HunyuanVideoTransformer3DModel"]
    cog = CogVideoXTransformer3DModel(num_attention_heads=1, num_layers=1, attention_head_dim=16, text_embed_dim=8)
    values = {}
    for key, model in (("wan", wan), ("hunyuan", hunyuan), ("cog", cog)):
        patterns = [UltraViCo(times=times).pattern(model) for times in (2, 3, 4, 5)]
        first = patterns[0]
        assert all(
            (p.period, p.gamma, p.first_frame) == (first.period, first.gamma, first.first_frame) for p in patterns
        )
        numbers = [(p.alpha, p.beta) if p.period else p.alpha for p in patterns]
        values[key] = (first.train_frames, first.period, first.gamma, first.first_frame, numbers)
    assert values["wan"] == (21, None, 4.0, True, [0.9] * 4)
    assert values["hunyuan"] == (33, 50.0, 4.0, False, [(0.95, 0.6), (0.9, 0.6), (0.9, 0.8), (0.9, 0.8)])
    assert values["cog"] == (13, 20.0, 1.0, False, [(0.9, 0.6), (0.9, 0.6), (0.85, 0.6), (0.85, 0.6)])
    assert UltraViCo(alpha=0.5, period=0).pattern(hunyuan).period is None
    assert UltraViCo(period=9.5, first_frame=False, times=2).pattern(wan).period == 9.5
    # One turn of the frequency that RIFLEx changes, in latent frames.
    theta = {"HunyuanVideoTransformer3DModel": (256.0, 16), "CogVideoXTransformer3DModel": (10000.0, 16)}
    for (cls, (base, dim)), turn in zip(theta.items(), (50.27, 19.87), strict=True):
        assert round(2 * math.pi / base ** (-2 * LENGTHS[cls].riflex / dim), 2) == turn


def test_the_folder_of_a_model_says_its_length(tmp_path):
    wan().save_pretrained(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"scale_factor_temporal": 4}')
    (tmp_path / "defaults.json").write_text(json.dumps({"frames": 9}))
    model = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert UltraViCo().pattern(model).train_frames == 3
    with attach(model, PI()) as run:
        assert run.report.denoisers[0]["trained"] == {"t": 3}


def test_both_denoisers_of_a_pipeline():
    pipe = SimpleNamespace(components={}, transformer=wan(), transformer_2=wan())
    plain = pipe.transformer_2(**long()).sample
    with PI(train_frames=2).attach(pipe) as run:
        assert not torch.equal(pipe.transformer_2(**long()).sample, plain)
        assert [(d["name"], d["calls"]) for d in run.report.denoisers] == [("transformer", 0), ("transformer_2", 1)]
    assert torch.equal(pipe.transformer_2(**long()).sample, plain)


def test_refusals():
    ltx, flux, mochi, sd3 = (
        MODELS[cls].build()
        for cls in (
            "LTXVideoTransformer3DModel", "FluxTransformer2DModel", "MochiTransformer3DModel", "SD3Transformer2DModel",
        )
    )  # fmt: skip
    cosmos, cog = (MODELS[f"{cls}Transformer3DModel"].build() for cls in ("Cosmos", "CogVideoX"))
    wrong = [
        (ltx, UltraViCo(), "not known how long .* pass train_frames="),
        (ltx, PI(), "not known how long .* pass train_frames="),
        (ltx, RIFLEx(train_frames=2), "after how long .* repeats itself is not known; pass period= or index="),
        (flux, UltraViCo(train_frames=2), "UltraViCo is for videos, and FluxTransformer2DModel makes images"),
        (flux, PI(), "makes images; pass train_size="),
        (mochi, PI(train_frames=2), "it learns its frequencies for every head; allowed: Wan"),
        (sd3, PI(train_size=(2, 2)), "it has no rotary embedding"),
        (cosmos, TASR(train_frames=1), "TASR follows the share of noise"),
        (cog, PI(train_frames=1, train_size=(2, 2)), "fit height and width"),
        (sana(), PI(train_frames=1), "its self-attention is linear"),
    ]
    for model, method, message in wrong:
        with pytest.raises(ValueError, match=message):
            attach(model, method)
    with pytest.raises(TypeError, match="PI takes no dense_steps; options it knows: replace"):
        attach(wan(), PI(), dense_steps=2)
    with attach(cog, PI(train_frames=1)), pytest.raises(AttachError, match="without image_rotary_emb"):
        cog(**MODELS["CogVideoXTransformer3DModel"].inputs(1))
    with attach(wan(), RIFLEx(train_frames=2, index=7)) as run, pytest.raises(ValueError, match="temporal frequencies"):
        run._denoisers[0](**long())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: UltraViCo(times=0.5), ValueError, "times must be at least 1"),
        (lambda: UltraViCo(times="4"), TypeError, "times must be a number"),
        (lambda: UltraViCo(alpha=1.5), ValueError, "alpha must be from 0 to 1"),
        (lambda: UltraViCo(beta=True), TypeError, "beta must be a number"),
        (lambda: UltraViCo(train_frames=0), ValueError, "train_frames must be at least 1"),
        (lambda: UltraViCo(period=-2), ValueError, "period must be"),
        (lambda: PI(train_frames=0), ValueError, "train_frames must be at least 1"),
        (lambda: NTK(train_frames=2.5), TypeError, "train_frames must be an int"),
        (lambda: PI(train_size=8), TypeError, r"train_size must be \(height, width\)"),
        (lambda: PI(train_size=(8, 0)), ValueError, "train_size must be at least 1"),
        (lambda: YaRN(low=4, high=2), ValueError, "low must be below high"),
        (lambda: YaRN(low="1"), TypeError, "low must be a number"),
        (lambda: YaRN(sharpen=1), TypeError, "sharpen must be True or False"),
        (lambda: RIFLEx(index=1, period=20), ValueError, "period or index, not both"),
        (lambda: RIFLEx(index=-1), ValueError, "index must be at least 0"),
        (lambda: RIFLEx(period=0), ValueError, "period must be above 0"),
        (lambda: RIFLEx(share=math.inf), ValueError, "share must be above 0"),
    ],
)
def test_options_out_of_range(make, error, message):
    with pytest.raises(error, match=message):
        make()
