"""Subjects kept apart and alike: each part of IRDiffusion against its formula with masks and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn import Neighborhood  # noqa: E402
from vision_attn.diffusion import attach, tiny_image  # noqa: E402
from vision_attn.diffusion.consistent import consistent_images  # noqa: E402
from vision_attn.diffusion.loading import load  # noqa: E402
from vision_attn.diffusion.methods.isolation import IRDiffusion  # noqa: E402
from vision_attn.diffusion.subjects import at_grid  # noqa: E402
from vision_attn.diffusion.word_maps import WordMaps, thresholded, word_places  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402

CLASSES = ("UNet2DConditionModel", "PixArtTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel",
           "CosmosTransformer3DModel")  # fmt: skip
EVERY = pytest.mark.parametrize("cls", CLASSES)


pytestmark = pytest.mark.usefixtures("inference")


def boxes(grid, *corners):
    """One mask per (top, bottom, left, right), on every frame, with a notch so that it is not a rectangle."""
    masks = torch.zeros(len(corners), *grid, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(masks, corners, strict=True):
        mask[..., top:bottom, left:right] = True
        mask[..., top, left] = False
    return masks


def case(grid):
    """Two subjects, two targets; the first target's masks overlap, the second lacks a subject."""
    h, w = grid[-2:]
    references = boxes(grid, (0, h // 2 + 1, 0, w // 2), (0, h, w - 2, w))
    first = boxes(grid, (0, h, 0, w // 2 + 1), (1, h, w // 2, w))
    second = torch.stack([torch.zeros(grid, dtype=torch.bool), boxes(grid, (1, h, 0, 3))[0]])
    return torch.stack([first, second]), references


def layers_of(denoiser, name):
    return [module for key, module in denoiser.named_modules() if key.endswith(name)]


def record(denoiser, names):
    """Inputs and outputs of layers as they run: a dict by name, and the handles."""
    seen, handles = {}, []
    for key, module in denoiser.named_modules():
        if key.endswith(names):
            hook = lambda m, args, kwargs, out, key=key: seen.setdefault(key, []).append((args, kwargs, out))  # noqa: E731
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return seen, handles


def arguments(args, kwargs, *names):
    call = dict(zip(names, args, strict=False)) | kwargs
    return [call.get(name) for name in names]


def turned(x, rotary, cls):
    """Rotary embedding of `[batch, tokens, dim or heads, head_dim]` as each family writes it."""
    if rotary is None:
        return x
    cos, sin = rotary
    if cls == "CosmosTransformer3DModel":  # halves, [tokens, head_dim], on [batch, tokens, heads, head_dim]
        half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + pairs * sin


def project(attn, hidden, rotary, cls):
    """Queries, keys and values `[batch, heads, tokens, head_dim]`, from weights alone."""
    heads = attn.heads
    q, k, v = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
    split = lambda x: x.unflatten(2, (heads, -1))  # noqa: E731
    norm = [getattr(attn, name, None) or torch.nn.Identity() for name in ("norm_q", "norm_k")]
    if cls in ("WanTransformer3DModel", "LTXVideoTransformer3DModel"):
        q, k = norm[0](q), norm[1](k)
        if cls == "LTXVideoTransformer3DModel":
            q, k = split(turned(q, rotary, cls)), split(turned(k, rotary, cls))
        else:
            q, k = turned(split(q), rotary, cls), turned(split(k), rotary, cls)
    else:
        q, k = turned(norm[0](split(q)), rotary, cls), turned(norm[1](split(k)), rotary, cls)
    return q.transpose(1, 2), k.transpose(1, 2), split(v).transpose(1, 2)


def box(mask):
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def moved_map(hidden, reference, target):
    """The formula on maps `[frames, height, width, dim]`: crop times mask, nearest resize, paste; and where it is."""
    out, visible = torch.zeros_like(hidden), torch.zeros(hidden.shape[:-1], dtype=torch.bool)
    for t in range(len(hidden)):
        if not (reference[t].any() and target[t].any()):
            continue
        old, new = box(reference[t]), box(target[t])
        crop = torch.cat([hidden[t] * reference[t, ..., None], reference[t, ..., None].to(hidden)], -1)[old]
        size = [s.stop - s.start for s in new]
        big = F.interpolate(crop.permute(2, 0, 1)[None], [int(n) for n in size], mode="nearest-exact")[0]
        out[t][new], visible[t][new] = big.permute(1, 2, 0)[..., :-1], big[-1] > 0.5
    return out, visible


def expected_self(attn, hidden, rotary, cls, grid, targets, references, moves, isolation=True):
    """Self-attention of one guidance half `[references + targets, tokens, dim]`, one query after the other."""
    count, frames = len(references), grid if len(grid) == 3 else (1, *grid)

    def at(i):
        each = [len(x) == len(hidden) and x.ndim == 3 for x in rotary or ()]
        return rotary and tuple(x[i : i + 1] if one else x for one, x in zip(each, rotary, strict=True))

    outputs = []
    for i, tokens in enumerate(hidden):
        q, k, v = project(attn, tokens[None], at(i), cls)
        keys, values, n = [k], [v], tokens.shape[0]
        sees = torch.ones(n, n, dtype=torch.bool)
        visible = [sees]
        if i >= count:
            masks = targets[i - count].flatten(1)
            alone = masks & (masks.sum(0) == 1)
            for a in range(len(masks)):
                for b in range(len(masks)):
                    if a != b and isolation:
                        sees[alone[a][:, None] & alone[b][None]] = False
            for s in range(count) if moves else ():
                shape = lambda x: x.view(*frames, *x.shape[len(grid) :])  # noqa: E731
                source = hidden[s].view(*frames, -1)
                new, there = moved_map(source, shape(references[s]), shape(targets[i - count, s]))
                _, k2, v2 = project(attn, new.view(1, n, -1), at(i), cls)
                keys.append(k2), values.append(v2)
                visible.append(masks[s][:, None] & there.flatten()[None])
        k, v, sees = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(visible, 1)
        logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -math.inf)
        outputs.append((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)[0])
    out = torch.stack(outputs)
    return attn.to_out[0](out) / getattr(attn, "rescale_output_factor", 1.0)


def self_layers(cls, seen):
    """Recorded self-attention calls: module inputs, rotary embedding and output, by name in order."""
    for key, calls in seen.items():
        for args, kwargs, out in calls:
            names = {
                "WanTransformer3DModel": ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"),
            }.get(cls, ("hidden_states", "image_rotary_emb"))
            call = arguments(args, kwargs, *names)
            yield key, call[0], call[-1] if len(names) != 2 or "image_rotary_emb" in kwargs else None, out


def grid_of(cls, tokens):
    if cls != "UNet2DConditionModel":
        return MODELS[cls].grid
    return next(g for g in ((10, 14), (5, 7)) if math.prod(g) == tokens)


@EVERY
@pytest.mark.parametrize("halves", [1, 2])
def test_self_attention_is_that_of_the_formula(cls, halves):
    model = MODELS[cls]
    learned = {"extra_pos_embed_type": None} if cls == "CosmosTransformer3DModel" else {}  # it is float32 only
    denoiser = model.build(**learned).double()
    targets, references = case(model.grid)
    inputs = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in model.inputs(4 * halves).items()}  # fmt: skip
    seen, handles = record(denoiser, "attn1")
    first = 1
    with attach(denoiser, IRDiffusion(targets, references, first_layer=first, cross=0)) as attached:
        denoiser(**inputs)
    for handle in handles:
        handle.remove()
    order = [*(k for k in seen if k.startswith("down")), *(k for k in seen if k.startswith("mid")),
             *(k for k in seen if not k.startswith(("down", "mid")))]  # fmt: skip
    assert attached.report.calls["denoiser"] == {"isolation": len(seen), "reposition": len(seen) - 1, "cross": 0}
    changed = 0
    for key, hidden, rotary, out in self_layers(cls, seen):
        grid = grid_of(cls, hidden.shape[1])
        small = [at_grid(targets, grid, 2), at_grid(references, grid, 1)]
        moves = order.index(key) >= first
        attn = denoiser.get_submodule(key)
        for half in range(halves):
            rows = slice(4 * half, 4 * half + 4)
            part = rotary if rotary is None else tuple(x[rows] if len(x) == 4 * halves else x for x in rotary)
            expected = expected_self(attn, hidden[rows], part, cls, grid, *small, moves)
            torch.testing.assert_close(out[rows], expected, atol=1e-6, rtol=1e-5)
            plain = expected_self(attn, hidden[rows], part, cls, grid, *small, False, isolation=False)
            torch.testing.assert_close(out[rows][:2], plain[:2], atol=1e-6, rtol=1e-5)
            changed += not torch.allclose(expected[2:], plain[2:], atol=1e-4)
    assert changed == halves * len(seen)


@EVERY
def test_cross_attention_blends_the_answer_to_the_prompt_of_the_reference(cls):
    model = MODELS[cls]
    denoiser = model.build()
    targets, references = case(model.grid)
    batch = 8
    inputs = model.inputs(batch, True)  # some text is hidden where the model can hide it
    seen, handles = record(denoiser, "attn2")
    with attach(denoiser, IRDiffusion(targets, references, isolation=False, reposition=False, cross=0.75)) as attached:
        denoiser(**inputs)
    for handle in handles:
        handle.remove()
    assert attached.report.calls["denoiser"]["cross"] == len(seen) and len(seen) >= 2
    for key, ((args, kwargs, out),) in seen.items():
        attn = denoiser.get_submodule(key)
        names = ("hidden_states", "encoder_hidden_states", "attention_mask")
        hidden, text, mask = arguments(args, kwargs, *names)
        more = {k: v for k, v in kwargs.items() if k not in names}
        masks = at_grid(targets, grid_of(cls, hidden.shape[1]), 2).flatten(2)
        for i in range(batch):
            half, place = divmod(i, 4)
            answers = []  # to the prompt of each picture of this half
            for j in range(4 * half, 4 * half + 4):
                own = {} if mask is None else {"attention_mask": mask[j : j + 1]}
                answers.append(attn(hidden[i : i + 1], text[j : j + 1], **own, **more)[0])
            expected = answers[place].clone()
            for n in range(hidden.shape[1]) if place >= 2 else ():
                inside = [s for s in range(2) if masks[place - 2, s, n]]
                if inside:
                    expected[n] = 0.75 * sum(answers[s][n] for s in inside) / len(inside) + 0.25 * expected[n]
            assert place < 2 or not torch.allclose(expected, answers[place], atol=1e-4)
            torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-4)


def test_references_and_targets_without_subjects_stay_as_they_are():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    targets, references = case(model.grid)
    targets[1] = False
    plain = denoiser(**model.inputs(4)).sample
    with attach(denoiser, IRDiffusion(targets, references)):
        changed = denoiser(**model.inputs(4)).sample
    torch.testing.assert_close(changed[[0, 1, 3]], plain[[0, 1, 3]], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(changed[2], plain[2], atol=1e-3)


def test_parts_of_a_denoiser_that_are_not_changed_stay_free():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    targets, references = case(model.grid)
    local = Neighborhood(window=model.window)
    with attach(denoiser, IRDiffusion(targets, references, isolation=False, reposition=False)):
        with attach(denoiser, local) as both:
            denoiser(**model.inputs(4))
        assert both.report.denoisers[0].calls["sparse"] == model.calls
    with attach(denoiser, IRDiffusion(targets, references, cross=0)), WordMaps(denoiser, [[[0]]]):
        with pytest.raises(ValueError, match="already has IRDiffusion attached, and its self-attention"):
            attach(denoiser, local)


def test_dropout_takes_references_away_from_some_tokens_and_repeats_with_its_seed():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    targets, references = case(model.grid)
    outputs = []
    for dropout, seed in ((0.0, 0), (0.5, 1), (0.5, 1), (0.5, 2)):
        with attach(denoiser, IRDiffusion(targets, references, cross=0, dropout=dropout, seed=seed)):
            outputs.append(denoiser(**model.inputs(4)).sample)
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[3])
    with attach(denoiser, IRDiffusion(targets, references, cross=0, dropout=1 - 1e-9)):
        gone = denoiser(**model.inputs(4)).sample
    with attach(denoiser, IRDiffusion(targets, references, cross=0, reposition=False)):
        torch.testing.assert_close(gone, denoiser(**model.inputs(4)).sample, atol=1e-6, rtol=1e-5)


def test_reposition_begins_in_the_decoder():
    for cls, first in (("UNet2DConditionModel", 3), ("WanTransformer3DModel", 1)):
        model = MODELS[cls]
        denoiser = model.build()
        targets, references = case(model.grid)
        with attach(denoiser, IRDiffusion(targets, references)) as attached:
            denoiser(**model.inputs(4))
        counts = attached.report.calls["denoiser"]
        assert counts["isolation"] - counts["reposition"] == first
        assert f"reposition {counts['reposition']}" in str(attached.report) and attached.report.to_dict()


def test_half_precision_is_finite():
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build().bfloat16()
    targets, references = case(model.grid)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.inputs(4).items()}
    with attach(denoiser, IRDiffusion(targets, references)):
        assert denoiser(**inputs).sample.isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(target_masks=torch.ones(2, 3)), "target_masks must be .targets, subjects, height, width."),
        (dict(target_masks="left"), "target_masks must be an array"),
        (dict(reference_masks=torch.ones(3, 4, 5)), "2 subjects and reference_masks 3"),
        (dict(reference_masks=torch.ones(2, 0, 5)), "none of them 0"),
        (dict(cross=1.5), "cross must be a number from 0 to 1"),
        (dict(dropout=1.0), "dropout must be a number from 0 to below 1"),
        (dict(first_layer=-1), "first_layer must be the number of a layer"),
        (dict(isolation=False, reference_masks=None), "nothing else is on"),
        (dict(isolation=False, reposition=False, cross=0), "nothing else is on"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        IRDiffusion(**{"target_masks": torch.ones(1, 2, 4, 5), "reference_masks": torch.ones(2, 4, 5), **changes})


@pytest.mark.parametrize(
    "masks, batch, message",
    [
        ((1, 2, 4, 6), 3, "masks of 4 x 6, .* another shape than the 4 x 5 tokens"),
        ((1, 2, 17, 4, 5), 3, "masks of 17 frames, where the picture has 3"),
        ((1, 2, 8, 10), 4, "a batch of 4 .* 2 references and then 1 targets"),
    ],
)
def test_masks_and_batches_that_do_not_fit(masks, batch, message):
    model = MODELS["WanTransformer3DModel"]
    denoiser = model.build()
    plain = denoiser(**model.inputs(batch)).sample
    ones = torch.ones(masks)
    with attach(denoiser, IRDiffusion(ones, ones[0])), pytest.raises(AttachError, match=message):
        denoiser(**model.inputs(batch))
    assert torch.equal(denoiser(**model.inputs(batch)).sample, plain)


def test_models_that_it_cannot_serve():
    ones = torch.ones(1, 1, 3, 4)
    with pytest.raises(ValueError, match="FluxTransformer2DModel has one attention for text and image"):
        attach(MODELS["FluxTransformer2DModel"].build(), IRDiffusion(ones))
    image_prompts = MODELS["WanTransformer3DModel"].build(added_kv_proj_dim=24, image_dim=8)
    with pytest.raises(ValueError, match="mixes an image prompt"):
        attach(image_prompts, IRDiffusion(ones))
    with pytest.raises(ValueError, match="first_layer=9, but UNet2DConditionModel has 7 layers"):
        attach(MODELS["UNet2DConditionModel"].build(), IRDiffusion(ones, ones[0], first_layer=9))


def test_masks_may_come_in_pixels():
    masks = torch.rand(2, 3, 48, 40)
    small = at_grid(masks > 0.5, (6, 5), 2)
    assert torch.equal(small, (masks > 0.5)[..., 4::8, 4::8])
    assert torch.equal(at_grid(masks > 0.5, (2, 6, 5), 2), small[:, :, None].expand(2, 3, 2, 6, 5))


@pytest.mark.parametrize("cls", ["UNet2DConditionModel", "PixArtTransformer2DModel", "WanTransformer3DModel"])
def test_maps_of_words_are_the_mean_weights_of_their_tokens(cls):
    model = MODELS[cls]
    denoiser = model.build()
    positions = [[[1, 3], []], [[0], [2]]]
    doubled = cls != "WanTransformer3DModel"  # its pipeline calls twice and says which call is which
    seen, handles = record(denoiser, "attn2")
    inputs = model.inputs(4 if doubled else 2, True)
    plain = denoiser(**inputs)[0] if doubled else None
    seen.clear()
    with WordMaps(denoiser, positions) as maps:
        with pytest.raises(ValueError, match="no conditional call"):
            maps.maps  # noqa: B018
        if doubled:
            assert torch.equal(denoiser(**inputs)[0], plain)
        else:
            with denoiser.cache_context("cond"):
                denoiser(**inputs)
            with denoiser.cache_context("uncond"):
                denoiser(**{k: v * 3 if v.is_floating_point() else v for k, v in inputs.items()})
    for handle in handles:
        handle.remove()
    finest = model.grid
    layers = []
    for key, ((args, kwargs, _), *_) in seen.items():
        attn = denoiser.get_submodule(key)
        names = ("hidden_states", "encoder_hidden_states", "attention_mask")
        hidden, text, mask = (x if x is None else x[len(x) - 2 :] for x in arguments(args, kwargs, *names))
        norm_q, norm_k = (getattr(attn, name, None) or torch.nn.Identity() for name in ("norm_q", "norm_k"))
        q, k = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (norm_q(attn.to_q(hidden)), norm_k(attn.to_k(text)))
        )
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (logits if mask is None else logits + mask[:, None]).softmax(-1).mean(1)
        grid = grid_of(cls, hidden.shape[1])
        phrases = [
            [weights[i, :, at].mean(-1) if at else weights.new_zeros(hidden.shape[1]) for at in each]
            for i, each in enumerate(positions)
        ]
        layer = torch.stack([torch.stack(each) for each in phrases]).unflatten(2, grid)
        layers.append(layer if grid == finest else F.interpolate(layer, finest, mode="bilinear"))
    torch.testing.assert_close(maps.maps, sum(layers) / len(layers), atol=1e-6, rtol=1e-4)


def test_thresholds_part_what_is_high_and_share_nothing():
    values = torch.tensor([0.1, 0.12, 0.11, 0.13, 0.8, 0.9, 0.7, 0.1, 0.15]).view(1, 3, 3)
    assert thresholded(values).flatten().tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert thresholded(values, 0.9).sum() == 1
    two = torch.stack([values[0], values[0].flip(0) * 5])
    masks = thresholded(two)
    assert not (masks[0] & masks[1]).any() and masks[0].any() and masks[1].any()
    assert not thresholded(torch.zeros(1, 2, 2)).any()
    # the definition of Otsu's threshold: the cut with the least variance inside the two classes
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() ** 3
    scaled = (values - values.min()) / (values.max() - values.min())
    inside = {
        float(cut): sum(part.var(correction=0) * len(part) for part in (scaled[scaled <= cut], scaled[scaled > cut]))
        for cut in scaled.sort()[0][:-1]
    }
    assert torch.equal(thresholded(values.view(1, 5, 10)).flatten(), scaled > min(inside, key=inside.get))


@pytest.fixture(scope="module")
def pipe():
    pipe = load().pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = dict(height=48, width=48, num_frames=1, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=16)
SUBJECTS = {"red circle": "a red circle", "blue square": "a big blue square"}
PROMPTS = ["a red circle and a blue square", "a blue square and a white cross", "a green cross"]


def test_pictures_are_those_of_the_method_with_the_masks_found(pipe):
    made = consistent_images(pipe, SUBJECTS, PROMPTS, seed=5, **SMALL)
    assert made.images.shape == (3, 1, 48, 48, 3) and made.references.shape == (2, 1, 48, 48, 3)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(5)]
    plain = pipe(prompt=[*SUBJECTS.values(), *PROMPTS], generator=generators, output_type="np", **SMALL).frames
    assert np.array_equal(made.first, plain)  # looking changes nothing, and nothing is left behind
    assert np.allclose(made.references, plain[:2], atol=1e-4) and np.allclose(made.images[2], plain[4], atol=1e-4)
    assert not np.allclose(made.images[0], plain[2], atol=1e-2)
    masks = made.method.target_masks
    assert masks.shape == (3, 2, 1, 6, 6) and masks[0].any(-1).any() and not masks[1, 0].any() and not masks[2].any()
    again = consistent_images(pipe, SUBJECTS, PROMPTS, (made.method.reference_masks, masks), seed=5, **SMALL)
    assert np.array_equal(again.images, made.images) and again.first is None
    assert again.report.calls["transformer"]["reposition"] == 2 * 2 * 3  # steps, guidance calls, later layers


def test_one_negative_prompt_is_for_all(pipe):
    options = dict(height=48, width=48, num_inference_steps=1)
    sd = tiny_image.stable_diffusion()
    for each, more in ((sd, {}), (pipe, dict(num_frames=1, guidance_scale=3.0, max_sequence_length=16))):
        made = consistent_images(each, ["red circle"], ["a red circle left"], negative_prompt="blue", **options, **more)
        assert len(made.images) == 1


def test_words_are_found_where_they_stand(pipe):
    ids = pipe.tokenizer("a red circle and a red square").input_ids
    assert word_places(pipe.tokenizer, "a red circle and a red square", "red") == [1, 5]
    assert word_places(pipe.tokenizer, "a red circle and a red square", "red square") == [5, 6]
    assert word_places(pipe.tokenizer, "a red circle", "red square") == [] and len(ids) >= 7


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(subjects="red circle"), "subjects must be a list"),
        (dict(prompts=[]), "prompts must be a list of at least one"),
        (dict(prompts=[" "]), "strings with words"),
        (dict(subjects=["green circle"]), "no prompt contains the words 'green circle'"),
        (dict(subjects={"red circle": "a white cross"}), "reference prompt 'a white cross' does not contain"),
        (dict(latents=torch.zeros(1)), "latents cannot be passed on"),
        (dict(threshold=1.5), "threshold must be between 0 and 1"),
        (dict(max_sequence_length=2), "words at token 2 of a prompt, of which the model reads 2"),
        (dict(masks=torch.ones(3)), "masks must be the pair"),
        (dict(masks=(torch.ones(1, 6, 6), torch.ones(2, 1, 6, 6))), "masks for 1 subjects in 2 pictures"),
    ],
)
def test_bad_input(pipe, changes, message):
    call = {"subjects": ["red circle"], "prompts": ["a red circle and a blue square"], **SMALL, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        consistent_images(pipe, **call)
    hooks = getattr(pipe.transformer, "_diffusers_hook", None)
    assert hooks is None or not hooks.hooks


def test_a_pipeline_without_its_text_encoder(pipe):
    bare = type(pipe)(**{**pipe.components, "text_encoder": None})
    with pytest.raises(ValueError, match="WanPipeline has no text_encoder"):
        consistent_images(bare, ["red circle"], ["a red circle"], **SMALL)
