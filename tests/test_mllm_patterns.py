"""Other patterns for visual tokens while the prompt is read, against full maps of the stock model."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import END, IMAGE, PRUNED, ROWS, START, VIDEO, VLM, VLMS, generate, single  # noqa: E402

from vision_attn.mllm import (  # noqa: E402
    PAI,
    HoloV,
    NeighborVisualAttention,
    VisualBlockPattern,
    VisualExit,
    VisualHeadMask,
    ZipVL,
    attach,
)
from vision_attn.mllm.grids import grids  # noqa: E402

EVERY = pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)
CLOSE = dict(atol=1e-4, rtol=1e-4)


pytestmark = pytest.mark.usefixtures("inference")


def with_pairs(model: Any, inputs: dict[str, Any], change: Any) -> Any:
    """The stock model on one row, with `change(bool [n, n], layer)` of what each token sees in each layer."""
    length, handles = inputs["input_ids"].shape[1], []

    def enter(number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(length, length).tril().bool()
        elif mask.dtype != torch.bool:
            mask = mask == 0
        allowed = change(mask.reshape(length, length).clone(), number)
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, length, length).masked_fill(~allowed, -1e30)}

    for number, layer in enumerate(model.get_decoder().layers):
        hook = functools.partial(enter, number)
        handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    out = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return out


def near(views: list[Any], reach: int, layers: tuple[int, ...], allowed: torch.Tensor, layer: int) -> torch.Tensor:
    """Among visual tokens on a grid: those of the same view within `reach` rows and columns, and no others."""
    if layer not in layers:
        return allowed
    where = {}
    for number, view in enumerate(views):
        for r, row in enumerate(view.columns.tolist()):
            for c, column in enumerate(row):
                where[column] = number, r, c
    for i, (a, r, c) in where.items():
        for j, (b, s, d) in where.items():
            allowed[i, j] = a == b and abs(r - s) <= reach and abs(c - d) <= reach
    return allowed


@EVERY
def test_neighbours_are_a_mask(vlm: VLM):
    model, layers = vlm.build(), (0, 1, 3)
    inputs = single(vlm, ROWS, 1)
    expected = with_pairs(model, inputs, functools.partial(near, grids(model, inputs), 1, layers))
    with attach(model, NeighborVisualAttention(window=3, layers=layers)):
        found = model(**inputs).logits
    if vlm.name == "Llava":
        model.set_attn_implementation("eager")
        with attach(model, NeighborVisualAttention(window=3, layers=layers)):
            torch.testing.assert_close(model(**inputs).logits, found, **CLOSE)
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, model(**inputs).logits, atol=1e-2)


def test_frames_of_a_video():
    """Frames of 3 x 3 tokens: neighbours within each, and blocks of the frame before."""
    model = VLMS["Qwen2VL"].build()
    ids = torch.tensor([[5, START, *[VIDEO] * 36, END, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": torch.randn(4 * 36, 96, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[4, 6, 6]]),
    }
    views = grids(model, inputs)
    assert [view.columns.shape for view in views] == [(3, 3)] * 4
    expected = with_pairs(model, inputs, functools.partial(near, views, 1, (0, 1, 2, 3)))
    with attach(model, NeighborVisualAttention(window=3)):
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        read = generate(model, inputs, tokens=1)[1][0]
        torch.testing.assert_close(read, expected[:, -1], **CLOSE)

    def change(mask: torch.Tensor, layer: int) -> torch.Tensor:
        frame = torch.tensor([-1, -1, *[n // 9 for n in range(36)], -1, -1, -1])
        seen = (frame[:, None] < 0) | (frame < 0) | (frame[:, None] - frame <= 1)
        return mask & seen

    with attach(model, VisualBlockPattern(frame_window=1, sinks=0, block=1)):  # nothing to round
        found = model(**inputs).logits
    torch.testing.assert_close(found, with_pairs(model, inputs, change), **CLOSE)


def test_neighbours_before_an_exit_and_with_beams():
    """Layers without a picture have nothing to change; beams repeat the rows, and not the pictures."""
    vlm = VLMS["Qwen2_5_VL"]
    model, rows = vlm.build(), [[3, "image", 4], [5, "image", 2]]
    alone = single(vlm, rows, 0)
    with attach(model, NeighborVisualAttention(window=3, layers=(0, 1)), VisualExit(layer=2)):
        expected = generate(model, alone, tokens=3)[1]
    with attach(model, NeighborVisualAttention(window=3), VisualExit(layer=2)):
        torch.testing.assert_close(generate(model, alone, tokens=3)[1], expected, **CLOSE)
    with attach(model, NeighborVisualAttention(window=3)):
        options = dict(max_new_tokens=4, do_sample=False, num_beams=3, length_penalty=0.0)
        batch = model.generate(**vlm.inputs(rows), **options)
        for i in range(2):
            assert batch[i, -4:].tolist() == model.generate(**single(vlm, rows, i), **options)[0, -4:].tolist()
        static = generate(model, alone, tokens=3, cache_implementation="static")[1]
        torch.testing.assert_close(static, generate(model, alone, tokens=3)[1], **CLOSE)


def test_no_map_of_all_pairs_of_visual_tokens():
    """The largest tensor of the attention grows with words times tokens, not with tokens times tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vlm = VLMS["Llava"]
    model, sizes = vlm.build(max_position_embeddings=4096), []
    images = 20
    inputs = vlm.inputs([[2, *["image"] * images, 2]])

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    with attach(model, NeighborVisualAttention(window=3)), Largest():
        model.get_decoder()
        model(**inputs)
    length = inputs["input_ids"].shape[1]
    assert length > 36 * images and max(sizes) < length**2 / 2


@EVERY
def test_head_masks_zero_weights_after_the_softmax(vlm: VLM, monkeypatch):
    """The stock model in eager mode, whose attention function is replaced by one that zeroes weights of its map."""
    model = vlm.build()
    heads = ((), (0,), tuple(range(6)), (1, 4, 5))
    inputs = single(vlm, ROWS, 1)
    visual = inputs["input_ids"][0] == IMAGE

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        weights = (query @ key.mT * scaling + attention_mask).softmax(-1)
        seen = torch.cat([visual, torch.zeros(weights.shape[-1] - len(visual), dtype=torch.bool)])
        for head in heads[module.layer_idx]:
            weights[:, head, :, seen] = 0
            weights[:, head, seen[: weights.shape[2]]] = 0
        return (weights @ value).transpose(1, 2), weights

    with attach(model, VisualHeadMask(heads)):
        answer, found = generate(model, inputs, tokens=3)  # read, and then word by word
    n = inputs["input_ids"].shape[1]
    longer = {**inputs, "input_ids": answer[:, :-1], "attention_mask": torch.ones_like(answer[:, :-1])}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, 2))
    modeling = sys.modules[type(model.get_decoder().layers[0].self_attn).__module__]
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "eager_attention_forward", attention)
        model.config.get_text_config()._attn_implementation = "eager"
        for given in (inputs, longer):
            if given is longer and vlm.name in ("Gemma3", "PaliGemma"):
                break  # read as one, words see those after them, or a window of other tokens
            logits = model(**given).logits[0, n - 1 :]
            torch.testing.assert_close(found[: len(logits), 0], logits, **CLOSE)
    assert not torch.allclose(found, generate(vlm.build(), inputs, tokens=3)[1], atol=1e-2)


def test_heads_are_calibrated_on_full_maps():
    vlm = VLMS["Llava"]
    model = vlm.build()
    samples = [vlm.inputs([[3, "image", 5]], seed=seed) for seed in range(3)] + [vlm.inputs([[4, "image", 3], [5]])]
    ratios = []
    model.set_attn_implementation("eager")
    for inputs in samples:
        ids, real = inputs["input_ids"][0], inputs["attention_mask"][0].bool()
        last = int((ids == IMAGE).nonzero()[-1])
        rows = [i for i in range(last + 1, len(ids)) if real[i]]
        maps = torch.stack([a[0] for a in model(**inputs, output_attentions=True).attentions])[:, :, rows]
        given = maps[..., ids == IMAGE].sum((-1, -2))
        ratios.append(given / maps[..., (ids != IMAGE) & real].sum((-1, -2)))
    model.set_attn_implementation("sdpa")
    ratios = torch.stack(ratios)
    threshold = float(ratios[:, 2:].flatten().sort().values[20:22].mean())
    looks = (ratios > threshold).sum(0) > 0.5 * 4
    found = VisualHeadMask.calibrate(model, samples, threshold=threshold, share=0.5)
    expected = [[h for h in range(6) if not looks[layer, h]] if layer >= 2 else [] for layer in range(4)]
    assert [list(layer) for layer in found.heads] == expected and 0 < sum(map(len, expected)) < 12
    with attach(model, found):
        assert generate(model, samples[0], tokens=2)[1].isfinite().any()


def test_block_patterns_are_a_mask():
    for name, options in (
        ("Llava", dict(block=4, frame_window=1)),
        ("Qwen2VL", dict(block=5, frame_window=0, sinks=8)),
    ):
        vlm = VLMS[name]
        model, rows = vlm.build(), [["image", 1, "image", 2, "image", 6], [3, "image", 4]]
        inputs = single(vlm, rows, 0)
        method = VisualBlockPattern(layers=(0, 2), **options)
        views = grids(model, inputs)
        frame = {int(c): n for n, view in enumerate(views) for c in view.columns.flatten()}

        def allowed(i: int, j: int, frame: dict[int, int] = frame, method: Any = method) -> bool:
            if i not in frame or j not in frame or j < method.sinks:
                return True
            return 0 <= frame[i] - frame[j] <= method.frame_window

        def change(
            mask: torch.Tensor, layer: int, allowed: Any = allowed, size: int = options["block"]
        ) -> torch.Tensor:
            if layer not in (0, 2):
                return mask
            n = len(mask)
            pairs = torch.tensor([[i >= j and allowed(i, j) for j in range(n)] for i in range(n)])
            for a in range(0, n, size):
                for b in range(0, n, size):
                    block = pairs[a : a + size, b : b + size]
                    block[:] = block.any()
            assert (pairs & mask).sum() < mask.sum()
            return pairs & mask

        expected = with_pairs(model, inputs, change)
        with attach(model, method):
            found = model(**inputs).logits
            torch.testing.assert_close(found, expected, **CLOSE)
            batch = generate(model, vlm.inputs(rows), tokens=2)[1]
            torch.testing.assert_close(batch[:, 1:], generate(model, single(vlm, rows, 1), tokens=2)[1], **CLOSE)
        assert not torch.allclose(found, model(**inputs).logits, atol=1e-2)


def test_what_cannot_be_done_is_said():
    model, inputs = VLMS["Llava"].build(), VLMS["Llava"].inputs([[3, "image", 4]])
    for make, words in (
        (lambda: NeighborVisualAttention(window=4), "an odd number"),
        (lambda: attach(model, NeighborVisualAttention(layers=(9,))), "layers 0 to 3"),
        (lambda: attach(model, VisualHeadMask()), "VisualHeadMask.calibrate finds"),
        (lambda: attach(model, VisualHeadMask(((), (), (9,), ()))), r"heads \[9\]"),
        (lambda: VisualHeadMask.calibrate(model, []), "at least one sample"),
        (lambda: VisualHeadMask.calibrate(model, [inputs], threshold=0), "threshold above 0"),
        (lambda: VisualBlockPattern(block=0), "block at least 1"),
        (lambda: attach(VLMS["Gemma3"].build(), VisualBlockPattern()), "layers with a window"),
        (lambda: attach(VLMS["PaliGemma"].build(), VisualBlockPattern()), "pictures that see ahead"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    for method in (PAI(), ZipVL(), VisualBlockPattern()):
        with pytest.raises(ValueError, match="computes rows of attention anew"):
            attach(model, NeighborVisualAttention(), method)
    with (
        attach(model, HoloV(keep=0.5), NeighborVisualAttention()),
        pytest.raises(ValueError, match="needs whole pictures"),
    ):
        model(**inputs)
