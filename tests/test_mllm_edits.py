"""PAINT, ACT and ZeroTuning against full maps, edited by the formula of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import PRUNED, VLM, generate  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm.interface import listen, switch  # noqa: E402
from vision_attn.mllm.methods.zerotuning import ZeroTuning  # noqa: E402

ROWS = [[3, "image", 4], [5, "image", 2, "image", 3], [6]]
CLOSE = dict(atol=2e-4, rtol=2e-4)
EVERY = pytest.mark.parametrize("vlm", PRUNED, ids=lambda vlm: vlm.name)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def with_maps(model: Any, inputs: dict, edit: Callable[..., torch.Tensor], tokens: int = 4, **options: Any):
    """Logits of a generation in which `edit(layer, weights, scores, first, seen)` changes full maps.

    `weights` and `scores` are `[batch, heads, queries, keys]`, masked; `first` the key of the first real token of each
    row, negative where a sliding window has left it; `seen` counts queries up to and with this call.
    """
    pads = (inputs["attention_mask"] == 0).sum(1)
    counts: dict[int, int] = {}

    def around(layer: int, module, q, k, v, mask, scale, compute):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        queries, keys = q.shape[2], k.shape[2]
        counts[layer] = counts.get(layer, 0) + queries
        scores = q.double() @ k.mT * scale
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = mask if mask.dtype == torch.bool else mask > -1e30
        scores = scores.masked_fill(~mask, -torch.inf)
        first = pads - max(counts[layer] - keys, 0)
        weights = edit(layer, scores.softmax(-1).nan_to_num(), scores, first, counts[layer])
        return (weights @ v).transpose(1, 2).to(q.dtype)

    undo = [switch(model.config.get_text_config())]
    for layer, module in enumerate(model.get_decoder().layers):
        at = layer
        undo.append(listen(module.self_attn, lambda *a, at=at: around(at, *a)))
    try:
        return generate(model, inputs, tokens, **options)[1]
    finally:
        for each in undo:
            each()


def scaled_first(gamma: float, layers: tuple[int, ...], heads: list[int]) -> Callable[..., torch.Tensor]:
    def edit(layer, weights, scores, first, seen):
        if layer not in layers:
            return weights
        weights = weights.clone()
        for row, key in enumerate(first.tolist()):
            if key >= 0:
                weights[row, heads, :, key] *= gamma
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    return edit


@EVERY
def test_zerotuning_scales_the_first_column(vlm: VLM):
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    with mllm.attach(model, ZeroTuning(gamma=3.0, layers=(0, 1, 3), heads=(0, 4))):
        _, found = generate(model, inputs, tokens=4)
    wanted = with_maps(model, inputs, scaled_first(3.0, (0, 1, 3), [0, 4]))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(found, generate(model, inputs, tokens=4)[1], atol=1e-3)
