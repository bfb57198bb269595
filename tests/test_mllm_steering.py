"""Row edits and head gains where every token is known: against full maps, edited by the formula of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, VLM, VLMS, generate  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm.interface import listen, switch  # noqa: E402

ROWS = [[3, "image", 4], [5, "image", 2, "image", 3], [6]]
ALONE = [[3, "image", 4], [5, "image", 2]]  # InstructBLIP wants an image in every row
CLOSE = dict(atol=2e-4, rtol=2e-4)
EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def prompt_of(vlm: VLM) -> dict[str, Any]:
    return vlm.inputs(ALONE if vlm.name == "InstructBlip" else ROWS)


class Maps:
    """Full maps of the text model, edited by a function, in float64.

    `edit(layer, s, w, image, question, reading)` gets masked scores and weights `[batch, heads, queries, keys]`, and
    bool `[batch, keys]` of visual keys and of the words after the last image; it returns weights.
    """

    def __init__(self, model: Any, ids: torch.Tensor, edit: Callable[..., torch.Tensor], repeats: int = 1) -> None:
        self.model, self.edit, self.length = model, edit, ids.shape[1]
        ids = ids.repeat_interleave(repeats, 0)
        self.image = ids == IMAGE
        after = self.image.flip(1).cumsum(1).flip(1) == 0
        self.question = after & self.image.any(1, keepdim=True)
        self.seen: dict[int, int] = {}

    def __call__(self, layer: int, module, q, k, v, mask, scale, compute):
        queries, keys = q.shape[2], k.shape[2]
        reading = layer not in self.seen or queries == self.length
        self.seen[layer] = queries + (0 if reading else self.seen[layer])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        s = q.double() @ k.mT * scale
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(0 if reading else keys - queries)
        mask = mask if mask.dtype == torch.bool else mask > -1e30
        s = s.masked_fill(~mask, -torch.inf)
        gone = max(self.seen[layer] - keys, 0)
        image, question = (
            torch.nn.functional.pad(x, (0, max(self.seen[layer], keys) - self.length))[:, gone : gone + keys]
            for x in (self.image, self.question)
        )
        w = self.edit(layer, s, s.softmax(-1).nan_to_num(), image, question, reading)
        return (w @ v).transpose(1, 2).to(q.dtype)

    def __enter__(self) -> Maps:
        self.undo = [switch(self.model.config.get_text_config())]
        for layer, module in enumerate(self.model.get_decoder().layers):
            self.undo.append(listen(module.self_attn, lambda *a, at=layer: self(at, *a)))
        return self

    def __exit__(self, *_: Any) -> None:
        for undo in self.undo:
            undo()


def pai(alpha: float, layers: range) -> Callable[..., torch.Tensor]:
    def edit(layer, s, w, image, question, reading):
        if layer not in layers:
            return w
        last = s[:, :, -1:]
        last = torch.where(image[:, None, None] & last.isfinite(), last + alpha * last.abs(), last)
        return torch.cat([w[:, :, :-1], last.softmax(-1)], 2)

    return edit


def compare(model: Any, method: Any, edit: Callable[..., torch.Tensor], inputs: dict, **options: Any) -> torch.Tensor:
    with mllm.attach(model, method):
        _, found = generate(model, inputs, tokens=4, **options)
    with Maps(model, inputs["input_ids"], edit, options.get("num_beams", 1)):
        _, wanted = generate(model, inputs, tokens=4, **options)
    torch.testing.assert_close(found, wanted, **CLOSE)
    return found


@EVERY
def test_pai_raises_the_scores_of_the_image(vlm: VLM):
    model, inputs = vlm.build(), prompt_of(vlm)
    found = compare(model, mllm.PAI(alpha=0.8, gamma=1), pai(0.8, range(2, 4)), inputs)
    assert not torch.allclose(found[:, :2], generate(model, inputs, tokens=4)[1][:, :2], atol=1e-3)
