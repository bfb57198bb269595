"""Methods that shorten the cache head by head or token by token, against stock models whose full cache is edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, ROWS, VLMS, generate, single  # noqa: E402

from vision_attn import mllm  # noqa: E402
from vision_attn.mllm import caches  # noqa: E402
from vision_attn.mllm.caches import pack, unpack  # noqa: E402
from vision_attn.mllm.interface import listen, name_for, switch  # noqa: E402
from vision_attn.mllm.method import CachePrune  # noqa: E402
from vision_attn.mllm.methods.streamingheads import head_scores  # noqa: E402

CLOSE = dict(atol=1e-4, rtol=1e-4)
FAMILIES = pytest.mark.parametrize("family", ["Llava", "Qwen3VL", "Gemma3", "PaliGemma"])
Edit = Callable[[int, Any], "torch.Tensor | None"]


pytestmark = pytest.mark.usefixtures("inference")


def gates(model: torch.nn.Module) -> list[list[float]]:
    config = model.config.get_text_config()
    shape = config.num_hidden_layers, config.num_key_value_heads
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).tolist()


def edited(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    edit: Edit,
    tokens: int = 4,
    run: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits of a model with eager attention, and whoever listens to it, and a full cache.

    After the prompt, `edit(layer, cached)` may change the keys and values, and returns the tokens that each KV head no
    longer sees, bool `[kv_heads, n]`.
    """
    text, hidden = model.get_decoder(), {}
    before = text.config._attn_implementation

    def after(module, args, kwargs, output):
        if not hidden:
            for number, layer in enumerate(kwargs["past_key_values"].layers):
                hidden[number] = None if layer.is_sliding else edit(number, layer)

    def hide(module, args, kwargs):
        lost = hidden.get(module.layer_idx)
        if lost is not None:
            mask, heads = kwargs["attention_mask"], text.config.num_attention_heads
            lost = lost.repeat_interleave(heads // len(lost), 0)[None, :, None]
            full = torch.zeros(1, heads, 1, mask.shape[-1], dtype=mask.dtype)  # for every row that follows
            full[..., : lost.shape[-1]].masked_fill_(lost, torch.finfo(mask.dtype).min)
            kwargs["attention_mask"] = mask + full
        return args, kwargs

    handles = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in text.layers]
    handles.append(text.register_forward_hook(after, with_kwargs=True))
    text.config._attn_implementation = name_for("eager")
    try:
        return generate(model, inputs, tokens)[1] if run is None else run()
    finally:
        text.config._attn_implementation = before
        for handle in handles:
            handle.remove()


def middle(inputs: dict[str, Any], sink: int, recent: int) -> torch.Tensor:
    """Bool `[n]`: the visual tokens of a single row that a streaming head loses."""
    ids = inputs["input_ids"][0]
    place = torch.arange(len(ids))
    return (ids == IMAGE) & (place >= sink) & (place < len(ids) - recent)


@FAMILIES
@pytest.mark.parametrize("compensate", [False, True])
def test_streaming_heads_lose_the_middle(family: str, compensate: bool):
    vlm = VLMS[family]
    model, inputs = vlm.build(), single(vlm, ROWS, 1)
    table, lost = gates(model), middle(inputs, 7, 9)
    limit = sorted(x for row in table for x in row)[sum(map(len, table)) // 2]
    streams = torch.tensor(table) < limit

    def edit(number: int, layer: Any) -> torch.Tensor | None:
        hidden = streams[number][:, None] & lost
        if not compensate:
            return hidden
        for head in streams[number].nonzero()[:, 0].tolist():  # as many means as tokens that were lost
            for t in (layer.keys, layer.values):
                t[0, head, lost] = t[0, head, lost].mean(0)
        return None

    method = mllm.StreamingHeads(table=table, streaming=0.5, sink=7, recent=9, compensate=compensate)
    with mllm.attach(model, method) as run:
        _, found = generate(model, inputs, 4)
        if not compensate:
            cached = run.engine.current.cached
            for number, tokens in enumerate(cached):
                if getattr(model.get_decoder().layers[number].self_attn, "sliding_window", None) is None:
                    assert tokens.visual[0].sum(-1).tolist() == [
                        int((inputs["input_ids"] == IMAGE).sum()) - int(lost.sum()) * int(s) for s in streams[number]
                    ]
    assert lost.sum() > 3 and streams.any() and not streams.all()
    torch.testing.assert_close(found, edited(model, inputs, edit), **CLOSE)
    _, stock = generate(model, inputs, 4)
    assert torch.equal(found[0], stock[0]) and (found[1:] - stock[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["Llava", "Qwen3VL", "Gemma3"])
def test_task_kv_keeps_the_heads_that_differ(family: str):
    vlm = VLMS[family]
    model, inputs = vlm.build(), single(vlm, ROWS, 1)
    config, outputs = model.config.get_text_config(), []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0, -1]))
        for layer in model.get_decoder().layers
    ]
    config._attn_implementation = "eager"
    maps = model(**inputs, output_attentions=True).attentions
    config._attn_implementation = "sdpa"
    for handle in handles:
        handle.remove()
    candidates, seen = middle(inputs, 7, 9), []

    def edit(number: int, layer: Any) -> torch.Tensor:
        heads = outputs[number].view(config.num_attention_heads, -1)
        mean = heads.mean(0)
        distance = [1 - float(x @ mean / x.norm() / mean.norm()) for x in heads]
        group = len(distance) // config.num_key_value_heads
        far = [max(distance[i : i + group]) for i in range(0, len(distance), group)]
        seen.append(far.index(max(far)))
        lost = torch.zeros(config.num_key_value_heads, len(candidates), dtype=torch.bool)
        for head in range(len(lost)):
            if head != seen[-1]:
                given = maps[number][0, head * group : (head + 1) * group, -1].mean(0)
                between = candidates.nonzero()[:, 0].tolist()
                lost[head, sorted(between, key=lambda j, g=given: -float(g[j]))[3:]] = True
        return lost

    with mllm.attach(model, mllm.TaskKV(heads=0.3, sink=7, recent=9, middle=3)):
        _, found = generate(model, inputs, 4)
    torch.testing.assert_close(found, edited(model, inputs, edit), **CLOSE)
    assert set(seen) != {0}


@dataclasses.dataclass(frozen=True)
class Ladder(CachePrune):
    """Head h of layer l keeps the first visual tokens of a row, l + 2 h of them: a length of its own for each."""

    def select(self, layer: Any) -> torch.Tensor:
        rank, heads = layer.tokens.visual.cumsum(1), layer.cached[0].shape[1]
        return torch.stack([(rank <= layer.number + 2 * head) for head in range(heads)], 1)


def ladder(inputs: dict[str, Any], heads: int) -> Edit:
    visual = inputs["input_ids"][0] == IMAGE
    return lambda number, layer: torch.stack([visual & (visual.cumsum(0) > number + 2 * head) for head in range(heads)])


@FAMILIES
def test_heads_of_any_length(family: str):
    """However generation goes on: greedy, batched, beams, looked up in the prompt, another turn, eager."""
    vlm = VLMS[family]
    model, alone = vlm.build(), single(vlm, ROWS, 0)
    heads = model.config.get_text_config().num_key_value_heads
    wanted = edited(model, alone, ladder(alone, heads), 6)
    beams = dict(num_beams=3, length_penalty=0.0)
    with mllm.attach(model, Ladder()):
        ids, found = generate(model, alone, 6)
        torch.testing.assert_close(found, wanted, **CLOSE)
        looked, _ = generate(model, alone, 6, prompt_lookup_num_tokens=3)
        assert torch.equal(looked, ids)
        _, batch = generate(model, vlm.inputs(ROWS), 6)
        torch.testing.assert_close(batch[:, :1], wanted, **CLOSE)
        batch = model.generate(**vlm.inputs(ROWS), max_new_tokens=5, do_sample=False, **beams)
        single_beams = model.generate(**alone, max_new_tokens=5, do_sample=False, **beams)
        assert batch[0, -5:].tolist() == single_beams[0, -5:].tolist()
    model.config.get_text_config()._attn_implementation = "eager"
    with mllm.attach(model, Ladder()):
        torch.testing.assert_close(generate(model, alone, 6)[1], wanted, **CLOSE)


@pytest.mark.parametrize("family", ["Llava", "Qwen3VL", "Gemma3"])
def test_another_turn_with_heads_of_any_length(family: str):
    vlm = VLMS[family]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    answer, more = torch.tensor([[8, 9, 10]]), torch.tensor([[11, 12, 13, 14]])
    heads = model.config.get_text_config().num_key_value_heads

    def second(cache: Any) -> torch.Tensor:
        """The logits of another turn; the first answer is forced, so that all have the same."""
        ids = torch.cat([inputs["input_ids"], answer, more], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                given[name] = torch.nn.functional.pad(inputs[name], (0, 7))
        return generate(model, given, tokens=4, past_key_values=cache)[1]

    def turns() -> torch.Tensor:
        def force(batch: int, ids: torch.Tensor) -> list[int]:
            return [int(answer[0, ids.shape[-1] - inputs["input_ids"].shape[1]])]

        options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        return second(model.generate(**inputs, **options, prefix_allowed_tokens_fn=force).past_key_values)

    with mllm.attach(model, Ladder()):
        found = turns()
    torch.testing.assert_close(found, edited(model, inputs, ladder(inputs, heads), run=turns), **CLOSE)


@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL", "Gemma3", "PaliGemma"])
def test_every_stage_at_once(family: str):
    """Tokens dropped before the text model, in it, and then from its cache: padded rows are still single runs."""
    vlm = VLMS[family]
    model, heads = vlm.build(), gates(vlm.build())
    before = [mllm.UniformPrune(keep=0.8), mllm.FastV(keep=0.7, layer=2)]
    rows, single_rows = vlm.inputs(ROWS), [single(vlm, ROWS, i) for i in range(len(ROWS))]
    seen = []
    for method in (
        mllm.StreamingHeads(table=heads, sink=2, recent=5, compensate=True),
        mllm.ZipVL(tau=0.5, recent=2, probes=4),
        mllm.ZipVL(tau=0.5, recent=2, probes=4, mode="quantize"),
    ):
        with mllm.attach(model, *before, method) as run:
            _, batch = generate(model, rows, 4)
            seen.append(batch)
            for i, alone in enumerate(single_rows):
                torch.testing.assert_close(batch[:, i : i + 1], generate(model, alone, 4)[1], **CLOSE)
            assert run.report.prompts[0].cache < run.report.prompts[0].stock_cache
    assert (seen[0][1:] - seen[1][1:]).abs().max() > 1e-3 and (seen[1][1:] - seen[2][1:]).abs().max() > 1e-3


def test_a_long_text_beside_an_image():
    """A row that loses nothing makes the batch wide; the others lose what they lose alone."""
    vlm, rows = VLMS["Llava"], [[3, "image", 4], [70]]
    model = vlm.build()
    for method in (
        mllm.StreamingHeads(table=gates(model), sink=2, recent=5),
        mllm.TaskKV(sink=2, recent=5, middle=2),
        mllm.ZipVL(tau=0.5, recent=2, probes=4),
        mllm.ZipVL(tau=0.5, recent=2, probes=4, mode="quantize"),
    ):
        with mllm.attach(model, method):
            _, batch = generate(model, vlm.inputs(rows), 4)
            for i in range(2):
                torch.testing.assert_close(batch[:, i : i + 1], generate(model, single(vlm, rows, i), 4)[1], **CLOSE)


def test_beams_follow_a_ragged_cache():
    """Three beams with the pruned cache against three beams with an edited full one."""
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    visual = inputs["input_ids"][0] == IMAGE

    def after(module, args, kwargs, output):
        if kwargs["inputs_embeds"].shape[1] > 1:  # beams are rows already
            for number, layer in enumerate(kwargs["past_key_values"].layers):
                for head in range(3):
                    lost = visual & (visual.cumsum(0) > number + 2 * head)
                    for t in (layer.keys, layer.values):
                        t[:, head, lost] = t[:, head, lost].mean(1, keepdim=True)

    options = dict(max_new_tokens=6, do_sample=False, num_beams=3, output_scores=True, return_dict_in_generate=True)
    handle = model.get_decoder().register_forward_hook(after, with_kwargs=True)
    wanted = model.generate(**inputs, **options)
    handle.remove()

    @dataclasses.dataclass(frozen=True)
    class Means(Ladder):
        def store(self, layer: Any, keep: torch.Tensor) -> Any:
            from vision_attn.mllm.caches import RaggedLayer

            return RaggedLayer.of(*layer.cached, keep, layer.tokens, means=True)

    with mllm.attach(model, Means()):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, **CLOSE)


def test_others_who_listen_see_every_head():
    """Around a ragged cache a listener gets keys, values and a mask of all heads, and changes nothing by computing."""
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    text, seen = model.get_decoder(), []

    def by_hand(module, q, k, v, mask, scale, compute):
        seen.append((q.shape, k.shape, None if mask is None else mask.shape))
        if q.shape[2] > 1:
            return compute(q, k, v, mask)
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2)

    with mllm.attach(model, Ladder()):
        _, wanted = generate(model, inputs, 4)
        undo = [switch(text.config), *(listen(layer.self_attn, by_hand) for layer in text.layers)]
        _, found = generate(model, inputs, 4)
        for step in undo[::-1]:
            step()
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert seen[-1][1][2] == seen[-1][2][-1] and seen[-1][2][1] == 6


@pytest.mark.parametrize("family", ["Llava", "Gemma3"])
@pytest.mark.parametrize(
    "steering",
    [
        mllm.GIFT(alpha=2.0),
        mllm.VAR(dims=(3, 4, 5, 6), tau=1.5, layers=(2, 3)),
        mllm.ZeroTuning(gamma=3.0),
        mllm.ACT(((0, 1), (1, 0), (2, 3)), threshold=0.06),
    ],
    ids=lambda method: method.name,
)
def test_steering_a_ragged_cache_is_steering_an_edited_one(family: str, steering: Any):
    model, inputs = VLMS[family].build(), single(VLMS[family], ROWS, 1)
    with mllm.attach(model, steering):
        wanted = edited(model, inputs, ladder(inputs, model.config.get_text_config().num_key_value_heads))
        _, plain = generate(model, inputs, 4)
    with mllm.attach(model, steering, Ladder()):
        _, found = generate(model, inputs, 4)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found[1:] - plain[1:]).abs().max() > 1e-3


def test_a_ragged_cache_is_smaller_and_says_when_it_cannot_be_read():
    vlm = VLMS["Llava"]
    model, inputs = vlm.build(), single(vlm, ROWS, 0)
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    with mllm.attach(model, Ladder()) as run:
        cache = model.generate(**inputs, **options).past_key_values
    text = int((inputs["input_ids"] != IMAGE).sum())
    kept = sum(text + number + 2 * head for number in range(4) for head in range(3))
    order, bias = 4 * 3 * 8, kept * 4
    assert run.report.prompts[0].cache == 2 * kept * 8 * 4 + order + bias
    ids = torch.cat([inputs["input_ids"], torch.full((1, 5), 7)], 1)
    with pytest.raises(ValueError, match="only while the method that made it is attached"):
        model(input_ids=ids[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot take 3 tokens off a cache with 2 after the prompt"):
        cache.crop(-3)


@FAMILIES
def test_heads_that_find_repetitions(family: str):
    """Scores from full maps, and the choice from scores."""
    model = VLMS[family].build()
    config = model.config.get_text_config()
    length, repeats = 7, 3
    ids = torch.randint(
        model.get_input_embeddings().weight.shape[0], (length,), generator=torch.Generator().manual_seed(5)
    )
    implementation = config._attn_implementation
    found = head_scores(model, length, repeats, seed=5)
    assert config._attn_implementation == implementation
    config._attn_implementation = "eager"
    ids = ids.repeat(repeats)[None]
    prefix = {"attention_mask": torch.zeros(1, 1, ids.shape[1], ids.shape[1])} if family == "PaliGemma" else {}
    maps = model.get_decoder()(input_ids=ids, output_attentions=True, **prefix).attentions
    config._attn_implementation = implementation
    for number, weights in enumerate(maps):
        for head, w in enumerate(weights[0].tril()):
            w = w / w.sum(
                -1, keepdim=True
            )  # PaliGemma's prompts see what follows; the scores are about what was before
            rows = range(length, length * repeats)
            echo = sum(float(w[i, j]) for i in rows for j in range(i % length, i, length)) / len(rows)
            follows = sum(float(w[i, j + 1]) for i in rows for j in range(i % length, i, length)) / len(rows)
            assert found[0][number, head] == pytest.approx(echo, abs=1e-5)
            assert found[1][number, head] == pytest.approx(follows, abs=1e-5)
    echo, follows = head_scores(model)
    method = mllm.StreamingHeads.identify(model, echo=0.05, induction=0.1, sink=2, recent=6)
    best = set()
    for scores, share in ((echo, 0.05), (follows, 0.1)):
        flat = sorted(((-float(s), i) for i, s in enumerate(scores.flatten())))
        best |= {i for _, i in flat[: round(share * len(flat))]}
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    kept = {(i // heads, i % heads // groups) for i in best}
    assert {tuple(pair) for pair in (~method.streams()).nonzero().tolist()} == kept
    assert method.compensate and method.sink == 2 and method.recent_share == 0.2


def important_tokens(weights: torch.Tensor, visual: torch.Tensor, tau: float, recent: int, probes: list[int]) -> set:
    """ZipVL's choice, written out: full weights `[heads, n, n]` to token numbers."""
    mean, n = weights.mean(0), len(visual)
    rows = [*probes, *range(n - recent, n)]
    received = [sum(float(mean[i, j]) for i in rows) for j in range(n)]
    per_row = [received[j] / max(sum(float(weights[0, i, j]) > 0 for i in rows), 1) for j in range(n)]
    total, count = 0.0, 0
    for value in sorted(received, reverse=True):
        count, total = count + 1, total + value
        if total >= tau * len(rows):
            break
    best = sorted(range(n), key=lambda j: -per_row[j])[:count]
    return set(best) | set(range(n - recent, n)) | {j for j in range(n) if not visual[j]}


def levels(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x` `[m]` on the levels of an asymmetric quantizer with scale and zero in float16."""
    low, high = float(x.float().min()), float(x.float().max())
    scale, zero = (float(torch.tensor(t).half()) for t in ((high - low) / (2**bits - 1), low))
    codes = [min(max(round((float(value) - zero) / scale), 0), 2**bits - 1) if scale else 0 for value in x.float()]
    return torch.tensor([code * scale + zero for code in codes]).to(x.dtype)


@FAMILIES
@pytest.mark.parametrize("mode, probes", [("drop", 1000), ("drop", 0), ("quantize", 1000)])
def test_zipvl_attends_among_the_important(family: str, mode: str, probes: int, monkeypatch):
    """Against full maps in every layer, and for the answer against a full cache with hidden or rounded entries."""
    tau, recent, group_size = 0.6, 3, 8
    monkeypatch.setattr(caches, "GROUP", group_size)
    model, inputs = VLMS[family].build(), single(VLMS[family], ROWS, 1)
    if mode == "quantize":  # in float32 the last bit of two ways to compute may fall on two sides of a level
        model, inputs["pixel_values"] = model.double(), inputs["pixel_values"].double()
    text, visual = model.get_decoder(), inputs["input_ids"][0] == IMAGE
    n, chosen = len(visual), {}

    def by_hand(module, q, k, v, mask, scale, compute):
        if q.shape[2] == 1 or getattr(module, "sliding_window", None) is not None:
            return compute(q, k, v, mask)
        group = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(group, 1).mT * scale).masked_fill(mask[0, 0] != 0, -torch.inf)
        early = list(range(n - recent)) if probes else []
        keep = chosen[module.layer_idx] = important_tokens(scores.softmax(-1)[0], visual, tau, recent, early)
        lost = torch.tensor([j not in keep for j in range(n)])
        out = scores.masked_fill(lost, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
        return out.masked_fill(lost[:, None], 0).transpose(1, 2)

    def edit(number: int, layer: Any) -> torch.Tensor | None:
        lost = torch.tensor([j not in chosen[number] for j in range(n)])
        if mode == "drop":
            return lost.expand(layer.keys.shape[1], -1)
        early = torch.arange(n) < n - recent
        for those, bits in ((~lost & early, 4), (lost & early, 2)):
            at = those.nonzero()[:, 0]
            for head in range(layer.keys.shape[1]):
                for some in at.flip(0).split(group_size):  # groups are counted from the end
                    for channel in range(layer.keys.shape[3]):
                        layer.keys[0, head, some, channel] = levels(layer.keys[0, head, some, channel], bits)
                for token in at:
                    layer.values[0, head, token] = levels(layer.values[0, head, token], bits)
        return None

    undo = [listen(layer.self_attn, by_hand) for layer in text.layers]
    wanted = edited(model, inputs, edit)
    for step in undo:
        step()
    with mllm.attach(model, mllm.ZipVL(tau=tau, mode=mode, recent=recent, probes=probes)):
        _, found = generate(model, inputs, 4)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert all(3 < n - len(keep) for keep in chosen.values()) and len({len(keep) for keep in chosen.values()}) > 1


def test_zipvl_draws_its_probes_row_by_row():
    method, valid = mllm.ZipVL(recent=3, probes=4), torch.tensor([[0] * 4 + [1] * 12, [1] * 16]).bool()
    rows, real = method._rows(valid, 2)
    alone, _ = method._rows(valid[:1, 4:], 2)
    assert (rows[0] - 4).tolist() == alone[0].tolist() and real.all()
    assert rows[0, 4:].tolist() == [13, 14, 15] and len(set(rows[0].tolist())) == 7 and rows[0].min() >= 4
    assert rows[1].tolist() != method._rows(valid, 3)[0][1].tolist()


def test_a_quantized_cache_is_smaller_and_goes_on_in_every_way():
    vlm = VLMS["Llava"]
    model, alone = vlm.build(), single(vlm, ROWS, 0)
    beams = dict(max_new_tokens=5, do_sample=False, num_beams=3, length_penalty=0.0)
    with mllm.attach(model, mllm.ZipVL(tau=0.6, mode="quantize", recent=2, probes=8)) as run:
        ids, wanted = generate(model, alone, 6)
        read, n = run.report.prompts[0], alone["input_ids"].shape[1]
        assert read.stock_cache == 4 * 8 * 2 * n * 4 * 3 and read.cache < read.stock_cache / 1.5
        _, batch = generate(model, vlm.inputs(ROWS), 6)
        torch.testing.assert_close(batch[:, :1], wanted, **CLOSE)
        assert torch.equal(generate(model, alone, 6, prompt_lookup_num_tokens=3)[0], ids)
        batch = model.generate(**vlm.inputs(ROWS), **beams)
        for i in range(len(ROWS)):
            assert batch[i, -5:].tolist() == model.generate(**single(vlm, ROWS, i), **beams)[0, -5:].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    """A mean with the weight of many, and codes, in the dtype of the model."""
    vlm = VLMS["Qwen2_5_VL"]
    model, inputs = vlm.build(), vlm.inputs(ROWS)
    table = gates(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for method in (
        mllm.StreamingHeads(table=table, sink=2, recent=5, compensate=True),
        mllm.TaskKV(sink=2, recent=5, middle=2),
        mllm.ZipVL(tau=0.5, recent=2, probes=4, mode="quantize"),
    ):
        with mllm.attach(model.to(dtype), method):
            assert not generate(model, inputs, 4)[1].isnan().any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing(bits: int):
    codes = torch.randint(2**bits, (3, 5, 13), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, -(-13 * bits // 8)) and torch.equal(unpack(packed, bits, 13), codes.int())


def test_what_cannot_be_done_is_said():
    model = VLMS["Llava"].build()
    with pytest.raises(ValueError, match="a number for every KV head"):
        mllm.StreamingHeads()
    with pytest.raises(ValueError, match="a number for every KV head"):
        mllm.StreamingHeads(table=((1, 0), (1,)))
    with pytest.raises(ValueError, match="finite"):
        mllm.StreamingHeads(table=((1, float("nan")),))
    with pytest.raises(ValueError, match=r"has 1 layers of 2 KV heads, and Llava.* has 4 of 3"):
        mllm.attach(model, mllm.StreamingHeads(table=((1, 0),)))
    for bad in (dict(streaming=1.5), dict(recent_share=-1), dict(sink=-1), dict(recent=True)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            mllm.StreamingHeads(table=((1, 0),), **bad)
    for bad in (dict(heads=0), dict(middle=-1), dict(sink=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            mllm.TaskKV(**bad)
    for bad in (dict(tau=0), dict(mode="round"), dict(bits=(4, 3)), dict(recent=0), dict(probes=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            mllm.ZipVL(**bad)
    for method in (mllm.ZipVL(), mllm.StreamingHeads(table=gates(model))):
        with mllm.attach(model, method):
            with pytest.raises(ValueError, match="cannot shorten a StaticLayer"):
                generate(model, single(VLMS["Llava"], ROWS, 0), cache_implementation="static")
            with pytest.raises(ValueError, match="this call uses none"):
                model(**single(VLMS["Llava"], ROWS, 0), use_cache=False)
    with pytest.raises(ValueError, match="one per layer, which would keep everything"):
        mllm.attach(VLMS["PaliGemma"].build(), mllm.TaskKV())
    with pytest.raises(ValueError, match="share of the heads"):
        mllm.StreamingHeads.identify(model, echo=2.0)
    with pytest.raises(ValueError, match="at least twice"):
        head_scores(model, repeats=1)
