"""Subjects kept apart and alike: each part of IRDiffusion against its formula with masks and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from diffusion_models import MODELS  # noqa: E402

from vision_attn.diffusion import attach  # noqa: E402
from vision_attn.diffusion.methods.isolation import IRDiffusion  # noqa: E402
from vision_attn.diffusion.subjects import at_grid, owners, relocation  # noqa: E402
from vision_attn.hosts import AttachError  # noqa: E402

CLASSES = ("UNet2DConditionModel", "PixArtTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel",
           "CosmosTransformer3DModel")  # fmt: skip
EVERY = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


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
    at = (
        lambda rotary_or_none, i: (
            rotary_or_none
            if rotary_or_none is None
            else tuple(  # noqa: E731
                x[i : i + 1] if x.ndim == 3 and len(x) == len(hidden) else x for x in rotary_or_none
            )
        )
    )
    outputs = []
    for i, tokens in enumerate(hidden):
        q, k, v = project(attn, tokens[None], at(rotary, i), cls)
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
                _, k2, v2 = project(attn, new.view(1, n, -1), at(rotary, i), cls)
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
    inputs = model.inputs(batch, True) if model.padded else model.inputs(batch)
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

            def answer(j, i=i):
                own = {} if mask is None else {"attention_mask": mask[j : j + 1]}
                return attn(hidden[i : i + 1], text[j : j + 1], **own, **more)[0]

            expected = own = answer(i)
            half, place = divmod(i, 4)
            if place >= 2:
                expected = own.clone()
                for n in range(hidden.shape[1]):
                    inside = [s for s in range(2) if masks[place - 2, s, n]]
                    if inside:
                        mean = sum(answer(4 * half + s)[n] for s in inside) / len(inside)
                        expected[n] = 0.75 * mean + 0.25 * own[n]
                assert not torch.allclose(expected, own, atol=1e-4)
            torch.testing.assert_close(out[i], expected, atol=1e-5, rtol=1e-4)
