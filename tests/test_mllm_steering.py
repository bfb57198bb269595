"""Row edits and head gains where every token is known: against full maps, edited by the formula of the paper."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import ALONE, IMAGE, ROWS, TEXT, VLM, VLMS, generate, prompt_of, single  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm.interface import listen, switch  # noqa: E402

CLOSE = dict(atol=2e-4, rtol=2e-4)
EVERY = pytest.mark.parametrize("vlm", VLMS.values(), ids=lambda vlm: vlm.name)


pytestmark = pytest.mark.usefixtures("inference")


class Maps:
    """Full maps of the text model, edited by a function, in float64.

    `edit(layer, s, w, image, question, at_keys)` gets masked scores and weights `[batch, heads, queries, keys]`, bool
    `[batch, keys]` of visual keys and of the words after the last image, and what makes `[batch, keys]` of `[batch,
    length]` (with `.column`, where the keys stood in the prompt); it returns weights. `edit.reading` says whether it is
    the prompt.
    """

    def __init__(
        self, model: Any, ids: torch.Tensor, edit: Callable[..., torch.Tensor], repeats: int = 1, run: Any = None
    ) -> None:
        self.model, self.edit, self.length, self.run = model, edit, ids.shape[1], run
        ids = ids.repeat_interleave(repeats, 0)
        self.image = ids == IMAGE
        after = self.image.flip(1).cumsum(1).flip(1) == 0
        self.question = after & self.image.any(1, keepdim=True)
        self.seen: dict[int, int] = {}

    def __call__(self, layer: int, module, q, k, v, mask, scale, compute):
        queries, keys = q.shape[2], k.shape[2]
        reading = layer not in self.seen
        column = torch.arange(self.length).expand(len(q), -1)
        if self.run is not None:  # tokens are dropped: where are those that stay?
            prompt = self.run.engine.current
            tokens = (prompt.tokens if reading else prompt.cached)[layer]
            column = tokens.column.masked_fill(~tokens.valid, self.length)
        self.seen[layer] = column.shape[-1] if reading else self.seen[layer] + queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        s = q.double() @ k.mT * scale
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(0 if reading else keys - queries)
        mask = mask if mask.dtype == torch.bool else mask > -1e30
        s = s.masked_fill(~mask, -torch.inf)
        total = max(self.seen[layer], keys)

        def at_keys(x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.pad(x[:, : self.length], (0, 1)).gather(1, column)
            return torch.nn.functional.pad(x, (0, total - x.shape[1]))[:, max(self.seen[layer] - keys, 0) :][:, :keys]

        at_keys.column = column
        self.edit.reading = reading
        w = self.edit(layer, s, s.softmax(-1).nan_to_num(), at_keys(self.image), at_keys(self.question), at_keys)
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
    def edit(layer, s, w, image, question, at_keys):
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


def gift(alpha: float, saliency: int, layers: range, found: dict) -> Callable[..., torch.Tensor]:
    """Row by row and head by head, as the formula of the paper says it; the map of a prompt goes to `found`."""

    def edit(layer, s, w, image, question, at_keys):
        w = w.clone()
        for row in range(len(w)):
            seen, words = image[row].nonzero()[:, 0], question[row].nonzero()[:, 0]
            if not len(seen):
                continue
            if edit.reading and layer == saliency:
                rises = [
                    [(w[row, h, i] - w[row, h, i - 1])[seen].clamp(min=0) for i in words] for h in range(w.shape[1])
                ]
                rises = torch.stack([torch.stack(each) for each in rises])
                best = rises.sum((1, 2)).argsort(descending=True)[: w.shape[1] // 2]
                m = rises[best].mean((0, 1))
                m = m.clamp(m.mean() - 3 * m.std(), m.mean() + 3 * m.std())
                factors = found.setdefault("gain", torch.ones(len(w), 300, dtype=m.dtype))
                factors[row, at_keys.column[row, seen]] = (alpha * (m - m.min()) / (m.max() - m.min())).exp()
            if layer in layers:
                last, factors = w[row, :, -1], at_keys(found["gain"])[row, seen]
                a = last[:, seen].sum(-1).argsort(descending=True)[: len(last) // 2]
                before = last[a][:, seen].sum()
                b = last[:, words].sum(-1).argsort(descending=True)[: len(last) // 2]
                last[a[:, None], seen] *= factors
                last[b[:, None], words] *= last[a][:, seen].sum() / before
                w[row, :, -1] = last / last.sum(-1, keepdim=True)
        return w

    return edit


@EVERY
def test_gift_follows_the_gaze(vlm: VLM):
    model, inputs = vlm.build(), prompt_of(vlm)
    compare(model, mllm.GIFT(alpha=2.0), gift(2.0, 1, range(2, 4), {}), inputs)


@pytest.mark.parametrize("option", ["question", "content"])
def test_gift_reads_the_words_that_are_given(option: str):
    """One word has to rise above the one before; without any, nothing changes."""
    model, inputs = VLMS["Llava"].build(), VLMS["Llava"].inputs(ROWS)
    stock, seen = generate(model, inputs)[1], []
    for count in (0, 1):

        def last(ids: torch.Tensor, count: int = count) -> torch.Tensor:
            seen.append(ids)
            return torch.arange(ids.shape[1]).expand(ids.shape) >= ids.shape[1] - count

        with mllm.attach(model, mllm.GIFT(alpha=2.0, **{option: last})):
            _, found = generate(model, inputs)
        assert torch.allclose(found, stock, atol=1e-4) == (count == 0)
    assert all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


def test_gift_looks_ahead():
    """A saliency layer above others: the map comes from a pass in which nothing is edited."""
    vlm = VLMS["LlavaNext"]
    model, inputs, found = vlm.build(), vlm.inputs(ROWS), {}
    with Maps(model, inputs["input_ids"], gift(3.0, 2, range(0), found)):
        model(**inputs)
    edit = gift(3.0, -1, range(1, 4), found)
    compare(model, mllm.GIFT(alpha=3.0, saliency=(2,), layers=range(1, 4)), edit, inputs)
    assert found["gain"].max() > 5


def var(
    p: float, rho: float, floor: float, sinks: dict, images: torch.Tensor, selected: list
) -> Callable[..., torch.Tensor]:
    """`sinks`: layer -> bool `[batch, length]`, as `images`; which heads and rows were chosen goes to `selected`."""

    def edit(layer, s, w, image, question, at_keys):
        if layer not in sinks:
            return w
        w = w.clone()
        sink = at_keys(sinks[layer])
        for row in range(len(w)):
            if not (sinks[layer][row] & images[row]).any():
                continue
            chosen = question[row].nonzero()[:, 0] if edit.reading else range(w.shape[2])
            for head in range(w.shape[1]):
                for i in chosen:
                    each = w[row, head, i]
                    seen = each[image[row]].sum()
                    portion = each[image[row] & sink[row]].sum() / (each[image[row]] + 1e-6).sum()
                    if seen >= floor and portion <= 1 - rho:
                        free, budget = image[row] & ~sink[row], (1 - p) * each[sink[row]].sum()
                        new = each + budget * each * free / each[free].sum()
                        new[sink[row]] = p * each[sink[row]]
                        w[row, head, i] = new
                        selected.append((layer, row, head, int(i)))
        return w

    return edit


def entering(model: Any, layer: int, call: Callable[[], Any]) -> torch.Tensor:
    """The residual stream as it enters a layer, in the first call."""
    found: list[torch.Tensor] = []
    module = model.get_decoder().layers[layer]
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: found.append(args[0]), with_kwargs=True)
    call()
    handle.remove()
    return found[0].float()


@EVERY
def test_var_takes_from_sinks(vlm: VLM):
    model, inputs, selected = vlm.build(), prompt_of(vlm), []
    x = entering(model, 2, lambda: generate(model, inputs, tokens=1))
    phi = x[..., [3, 9]].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
    tau = 0.5 if vlm.name == "InstructBlip" else 1.2  # of its five visual tokens none is far out
    sinks = {2: (phi > tau) & inputs["attention_mask"].bool()}
    method = mllm.VAR(dims=(3, 9), tau=tau, rho=0.2, p=0.4, floor=0.05)
    compare(model, method, var(0.4, 0.2, 0.05, sinks, inputs["input_ids"] == IMAGE, selected), inputs)
    assert selected and (sinks[2] & (inputs["input_ids"] != IMAGE)).any()


def test_find_sinks():
    """Two dimensions that are huge at the first token of every prompt, from layer 1 on."""
    vlm = VLMS["Llava"]
    model = vlm.build(num_hidden_layers=6)
    prompts = [vlm.inputs([[3, "image", 4], [5, "image"]], seed=seed) for seed in range(4)]

    def massive(module, args, output):
        first = prompts[0]["attention_mask"].shape[1]
        output[:, -first:, [7, 20]] += 1000.0 * (torch.arange(output.shape[1]) == 9)[None, :, None]
        return output

    assert mllm.find_sinks(model, prompts) == ()
    handle = model.get_decoder().layers[0].register_forward_hook(massive)
    found = mllm.find_sinks(model, prompts, tau=3.0)
    handle.remove()
    assert found == (7, 20)


# --- head gains ---


@contextlib.contextmanager
def at_projections(model: Any, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`change(layer, heads)` of what enters the output projections, `[batch, n, heads, head_dim]`."""
    handles = []
    for layer, module in enumerate(model.get_decoder().layers):

        def hook(module, args, layer=layer):
            x = args[0].unflatten(-1, (-1, TEXT["head_dim"]))
            return (change(layer, x).flatten(-2),)

        handles.append(module.self_attn.o_proj.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def last_heads(model: Any, call: Callable[[], Any], gains: dict[int, torch.Tensor], layer: int) -> torch.Tensor:
    """Head outputs at the last token, `[heads, head_dim]`, where heads of earlier layers are multiplied by `gains`."""
    found = []

    def change(at: int, x: torch.Tensor) -> torch.Tensor:
        if at == layer and not found:
            found.append(x[0, -1].double())
        return x * gains[at][:, None] if at in gains else x

    with at_projections(model, change):
        call()
    return found[0]


def words_alone(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    words = inputs["input_ids"] != IMAGE
    ids = inputs["input_ids"][words][None]
    if "qformer_input_ids" in inputs:
        return lambda: model.language_model(input_ids=ids)
    types = {name: torch.zeros_like(ids) for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
    return lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), **types)


def aware(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    """Which heads are vision-aware, of head outputs `[heads, head_dim]` with the image and without."""
    heads = range(len(a))
    moved = [float(((a[h] - b[h]) ** 2).sum() ** 0.5) for h in heads]
    length = [float((b[h] ** 2).sum()) for h in heads]
    high = [statistics.mean(x) + statistics.pstdev(x) for x in (moved, length)]
    moved = [0.0 if moved[h] > high[0] and length[h] > high[1] else moved[h] for h in heads]
    return [moved[h] > statistics.median_low(moved) for h in heads]


def by_hand(model: Any, inputs: dict[str, Any], layers: list[int], alpha: float, reinforced: bool) -> dict:
    """VHR on one prompt: layer -> gains, with two passes of the model per layer."""
    gains: dict[int, torch.Tensor] = {}
    alone = words_alone(model, inputs)
    for layer in layers:
        a = last_heads(model, lambda: generate(model, inputs, tokens=1), gains, layer)
        b = last_heads(model, alone, gains if reinforced else {}, layer)
        gains[layer] = torch.tensor([alpha if each else 1.0 for each in aware(a, b)])
    return gains


@EVERY
@pytest.mark.parametrize("branch", ["reinforced", "plain"])
def test_vhr_makes_vision_aware_heads_louder(vlm: VLM, branch: str):
    model, rows = vlm.build(), ALONE if vlm.name == "InstructBlip" else ROWS
    layers = [2, 3] if vlm.name == "InstructBlip" else [1, 2, 3]
    with mllm.attach(model, mllm.VHR(alpha=2.0, text_branch=branch)):
        _, found = generate(model, vlm.inputs(rows), tokens=3)
    for row in range(2):
        inputs = single(vlm, rows, row)
        gains = by_hand(model, inputs, layers, 2.0, branch == "reinforced")
        assert all(1 <= (gain > 1).sum() <= len(gain) // 2 for gain in gains.values())
        with at_projections(model, lambda at, x, gains=gains: x * gains[at][:, None] if at in gains else x):
            _, wanted = generate(model, inputs, tokens=3)
        torch.testing.assert_close(found[:, row : row + 1], wanted, **CLOSE)


def test_vhr_heads():
    torch.manual_seed(0)
    a, b = torch.randn(2, 500, 7, 8) * torch.randn(2, 500, 7, 1).exp()
    wanted = torch.tensor([aware(x.double(), y.double()) for x, y in zip(a, b, strict=True)])
    assert torch.equal(mllm.VHR(alpha=3).gains(1, a[:, None], b[:, None]), 1 + 2.0 * wanted)


def test_vhr_layers():
    of = mllm.VHR().layers_of
    assert of(32, "LlavaForConditionalGeneration") == (1, *range(18, 32))
    assert of(40, "LlavaForConditionalGeneration") == (1, *range(22, 40))
    assert of(32, "InstructBlipForConditionalGeneration") == tuple(range(14, 32))
    assert mllm.VHR(shallow=False).layers_of(32, "LlavaForConditionalGeneration") == tuple(range(18, 32))


def test_vhd():
    """At the last token, and at each of the last ones, as if the prompt ended there."""
    vlm = VLMS["Llava"]
    model = vlm.build()
    inputs = vlm.inputs([[3, "image", 6], [5, "image", 2, "image", 4]])
    found = mllm.vhd(model, last=3, **inputs)
    assert found.shape == (2, 3, 4, 6)
    for row in range(2):
        alone = single(vlm, [[3, "image", 6], [5, "image", 2, "image", 4]], row)
        for back in range(3):
            ids = alone["input_ids"][:, : alone["input_ids"].shape[1] - 2 + back]
            cut = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for layer in range(4):
                a = last_heads(model, lambda cut=cut: model(**cut), {}, layer)
                b = last_heads(model, words_alone(model, cut), {}, layer)
                wanted = (a - b).norm(dim=-1).float()
                torch.testing.assert_close(found[row, back, layer], wanted, atol=1e-4, rtol=1e-4)
    assert mllm.t_vhd(found).shape == (2, 3)
    torch.testing.assert_close(mllm.t_vhd(found, k=2)[0, 0], found[0, 0].sort(-1).values[:, -2:].sum())
    with pytest.raises(ValueError, match="no image|without its image"):
        mllm.vhd(model, **vlm.inputs([[3, "image", 6], [4]]))
    with pytest.raises(ValueError, match="fewer words"):
        mllm.vhd(model, last=9, **vlm.inputs([[3, "image", 6]]))
