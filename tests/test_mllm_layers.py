"""Dropping visual tokens inside the text model: each rule against its formula on full maps of the stock model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_models import IMAGE, VLMS, generate, single  # noqa: E402

from vision_attn.mllm import (  # noqa: E402
    DART,
    ExitRouters,
    FastV,
    PyramidDrop,
    SparseVLM,
    TokenSchedule,
    UniformPrune,
    VisualExit,
    attach,
    fit_exit,
    prefill_flops,
    search_schedule,
)
from vision_attn.mllm.exits import _states  # noqa: E402
from vision_attn.mllm.ranking import rows_where  # noqa: E402
from vision_attn.mllm.schedules import fit_sigmoid  # noqa: E402

LLAVA = VLMS["Llava"]
ROW = [[3, "image", 7]]
CLOSE = dict(atol=1e-4, rtol=1e-4)


pytestmark = pytest.mark.usefixtures("inference")


def maps(model: Any, inputs: dict[str, Any], hidden: dict[int, list[int]]) -> tuple[Any, Any]:
    """Attention `[heads, n, n]` and input `[n, width]` of every layer, in a dense run of one row in which `hidden[l]`
    are no keys from layer `l` on."""
    length, handles = inputs["input_ids"].shape[1], []

    def hide(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen = torch.ones(length, length).tril().bool()
        for start, columns in hidden.items():
            if layer >= start:
                seen[:, columns] = False
        seen |= torch.eye(length).bool()  # what is dropped has to see something
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, length, length).masked_fill(~seen, -1e30)}

    for number, layer in enumerate(model.get_decoder().layers):
        handles.append(layer.self_attn.register_forward_pre_hook(functools.partial(hide, number), with_kwargs=True))
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return [a[0] for a in out.attentions], [h[0] for h in out.hidden_states]


def kept_by(model: Any, inputs: dict[str, Any], method: Any) -> dict[int, list[int]]:
    """Columns of the visual tokens that each layer works on."""
    with attach(model, method) as run:
        model(**inputs)
        tokens = run.engine.current.tokens
    return {n: t.column[0][t.visual[0]].tolist() for n, t in enumerate(tokens)}


def staged(model: Any, inputs: dict[str, Any], stages: dict[int, int], score: Callable) -> dict[int, list[int]]:
    """What the layers work on when each stage keeps the `count` best of what is there, by `score(maps, states, layer)`
    over all columns."""
    present = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    hidden, expected = {}, {}
    for layer in range(len(model.get_decoder().layers)):
        if layer in stages:
            scores = score(*maps(model, inputs, hidden), layer)
            best = sorted(present, key=lambda column: -scores[column])[: stages[layer]]
            hidden[layer] = [column for column in present if column not in best]
            present = sorted(best)
        expected[layer] = present
    return expected


def test_pyramid_drop_is_its_formula():
    model, inputs = LLAVA.build(), LLAVA.inputs(ROW)
    expected = staged(model, inputs, {1: 18, 2: 9, 3: 4}, lambda a, states, layer: a[layer][:, -1].mean(0))
    assert kept_by(model, inputs, PyramidDrop()) == expected  # 36 tokens: a half, a quarter, an eighth (4.5 to even)
    assert PyramidDrop(keep=[0.5, 0.2]).keep == (0.5, 0.2) and SparseVLM(keep=[9, 3], layers=(1, 2)).keep == (9, 3)
    counted = staged(model, inputs, {2: 11, 3: 5}, lambda a, states, layer: a[layer][:, -1].mean(0))
    assert kept_by(model, inputs, PyramidDrop(keep=(11, 5), layers=(2, 3))) == counted


def test_sparsevlm_is_its_formula():
    model, inputs = LLAVA.build(), LLAVA.inputs(ROW)
    ids = inputs["input_ids"][0]
    visual, words = (ids == IMAGE).nonzero()[:, 0].tolist(), list(range(ids.tolist().index(IMAGE) + 36, len(ids)))
    raters: list[int] = []

    def score(a: Any, states: Any, layer: int) -> torch.Tensor:
        if not raters:
            x = states[0].double()
            weight = {t: 0.0 for t in words}
            for v in visual:
                total = sum(math.exp(x[v] @ x[t]) for t in words)
                for t in words:
                    weight[t] += math.exp(x[v] @ x[t]) / total / len(visual)
            raters.extend(t for t in words if weight[t] > sum(weight.values()) / len(words))
        given = torch.stack([a[layer][:, t] for t in raters]).mean(0)  # [heads, n]
        heads = sorted(range(len(given)), key=lambda h: -given[h][visual_now(given)].sum())[:2]
        return given[heads].mean(0)

    def visual_now(given: torch.Tensor) -> list[int]:
        return [v for v in visual if given[:, v].sum() > 0]

    expected = staged(model, inputs, {2: 22, 3: 11}, score)
    assert 1 <= len(raters) < len(words)
    assert kept_by(model, inputs, SparseVLM(keep=(0.6, 0.3), layers=(2, 3), heads=2)) == expected


def test_counts_of_sparsevlm_average_to_their_budget():
    """In a model of 32 layers, with all 576 tokens before the first stage, within 12 % of what the table says."""
    for table in ("1.0", "2.0"):
        for budget in (192, 128, 96, 64):
            method = SparseVLM(keep=budget, table=table)
            first, second, third = method.cuts(32)
            a, b, c = (counts[0] for counts in method.counts([576]))
            mean = (576 * first + a * (second - first) + b * (third - second) + c * (32 - third)) / 32
            assert mean == pytest.approx(budget, rel=0.12), (table, budget, mean)


def test_dart_is_its_formula():
    model, inputs = LLAVA.build(), LLAVA.inputs(ROW)
    ids = inputs["input_ids"][0]
    x = maps(model, inputs, {})[1][2]
    layer = model.get_decoder().layers[2]
    keys = layer.self_attn.k_proj(layer.input_layernorm(x))  # turning them does not change how long they are
    visual, words = (ids == IMAGE).nonzero()[:, 0].tolist(), (ids != IMAGE).nonzero()[:, 0].tolist()
    longest = functools.partial(sorted, key=lambda i: -keys[i].norm())
    first = longest(visual)[:2]
    kept, rest = list(first), 17 - 2
    for i, pivot in enumerate([*first, *longest(words)[:2]]):
        others = sorted(
            (v for v in visual if v not in kept), key=lambda v: torch.cosine_similarity(x[v], x[pivot], dim=0)
        )
        kept += others[: rest * (i + 1) // 4 - rest * i // 4]
    assert len(kept) == 17
    assert kept_by(model, inputs, DART(keep=17, pivots=2))[2] == sorted(kept)
    assert kept_by(model, inputs, DART(keep=1, pivots=2))[2] == first[:1]


def test_a_schedule_is_its_formula():
    model, inputs = LLAVA.build(), LLAVA.inputs([[3, "image", 2]])  # fewer words after the picture than rows
    words = (inputs["input_ids"][0] != IMAGE).nonzero()[:, 0].tolist()[-6:]

    def score(a: Any, states: Any, layer: int) -> torch.Tensor:
        return torch.stack([a[layer - 1][:, t] for t in words]).mean((0, 1))

    expected = staged(model, inputs, {1: 27, 2: 18, 3: 9}, score)
    assert kept_by(model, inputs, TokenSchedule([1, 0.75, 0.5, 0.25], rows=6)) == expected


@pytest.mark.parametrize("method", [FastV(keep=9), VisualExit(layer=2)], ids=lambda method: method.name)
def test_a_row_of_text_may_be_the_longest(method: Any):
    """Where no column goes away, what was dropped from a shorter row is hidden."""
    rows = [[3, "image", 4], [60]]
    model = LLAVA.build()
    with attach(model, method):
        _, batch = generate(model, LLAVA.inputs(rows), tokens=3)
        _, alone = generate(model, single(LLAVA, rows, 0), tokens=3)
    torch.testing.assert_close(batch[:, :1], alone, **CLOSE)


def test_sigmoids_and_grouping():
    shares = TokenSchedule.sigmoid(12, 0.4, layers=10, cuts=9).keep
    expected = [(1 + math.exp(-12 * 0.4)) / (1 + math.exp(12 * (n / 10 - 0.4))) for n in range(10)]
    assert shares == pytest.approx(expected)
    assert len(set(TokenSchedule.sigmoid(3, 0.3, layers=40).keep)) == 9
    assert min(TokenSchedule.sigmoid(40, 0.1, layers=10, least=0.2).keep) == 0.2
    assert TokenSchedule.sigmoid(2, -1.0, layers=8, first=3).keep[:3] == (1, 1, 1)
    a, b = fit_sigmoid(TokenSchedule([1, 0.9, 0.5, 0.1, 0.02, 0]))
    assert 5 < a < 20 and b == pytest.approx(1 / 3, abs=0.03)
    schedule = TokenSchedule([1, 0.9, 0.8, 0.5, 0.45, 0.1, 0.05, 0])
    for cuts in range(1, 8):  # against every choice of the layers of the cuts
        ways = []
        for where in itertools.combinations(range(1, 8), min(cuts, 7)):
            begins = [0, *where]
            ways.append(sum(schedule.keep[max(b for b in begins if b <= n)] for n in range(8)))
        grouped = schedule.grouped(cuts)
        assert sum(grouped.keep) == pytest.approx(min(ways)) and len(grouped.cuts(8)) <= cuts
        assert all(a >= b for a, b in zip(grouped.keep, schedule.keep, strict=True))


def kept_shares(model: Any) -> list[float]:
    """The shares of the picture that each layer works on."""
    inputs, seen = LLAVA.inputs(ROW), []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        for layer in model.get_decoder().layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [int(n - (inputs["input_ids"] != IMAGE).sum()) / 36 for n in seen]


def test_the_greedy_search_finds_what_each_layer_needs():
    """A score that is full exactly where layers have the tokens that they need; a budget is kept and used."""
    model, needs = LLAVA.build(), [1.0, 11 / 16, 5 / 16, 3 / 16]

    def score(model: Any) -> float:
        return 1.0 if all(a >= round(36 * b) / 36 for a, b in zip(kept_shares(model), needs, strict=True)) else 0.9

    found = search_schedule(model, score, steps=16, tokens=(36, 14))
    assert found.schedule.keep == tuple(needs) and found.score == found.full == 1.0
    assert len(found.tried) == len({keep for keep, _ in found.tried})
    config = model.config.get_text_config()
    cost = prefill_flops(config, [50, 39, 25, 21]) / prefill_flops(config, [50] * 4)
    assert found.flops == pytest.approx(cost)
    loose = search_schedule(model, score, steps=4, tolerance=0.2, tokens=(36, 14))
    assert loose.schedule.keep == (1.0, 0.0, 0.0, 0.0) and loose.score == 0.9
    one = search_schedule(model, score, steps=4, cuts=1)
    assert one.schedule.keep == (1.0, 1.0, 0.5, 0.5)

    def early(model: Any) -> float:  # the later the tokens go the better: the steepest sigmoid
        return kept_shares(model)[1]

    within = search_schedule(model, early, budget=0.6, tokens=(36, 14), start=found.schedule)
    assert 0.57 < within.flops <= 0.6 and len(within.tried) <= 16
    assert within.score == max(score for keep, score in within.tried[1:])
    with pytest.raises(ValueError, match="no sigmoid meets a budget of 0.01"):
        search_schedule(model, early, budget=0.01)
    with pytest.raises(ValueError, match="budget is a share"):
        search_schedule(model, early, budget=1.5)


def test_the_exit_by_attention_is_its_rule():
    """Rows leave where what they give to the picture stayed low, each for itself."""
    model = LLAVA.build(num_hidden_layers=8)
    rows = [[3, "image", 7], [6, "image", 2], [4, "image", 5], [9]]
    given = []
    for i in range(3):
        inputs = single(LLAVA, rows, i)
        a, _ = maps(model, inputs, {})
        given.append([float(layer[:, -1, inputs["input_ids"][0] == IMAGE].sum(1).mean()) for layer in a])
    tau = sorted(x for row in given for x in row[2:7])[8]  # half of what counts is below
    together = []
    for patience in (1, 2, 3):
        leaves = []
        for row in given:
            low = [x < tau for x in row]
            ends = [n for n in range(2, 7) if n - patience + 1 >= 0 and all(low[n - patience + 1 : n + 1])]
            leaves.append(ends[0] + 1 if ends else None)
        together += leaves
        method = VisualExit(rule="attention", tau=tau, patience=patience)
        with attach(model, method) as run:
            _, batch = generate(model, LLAVA.inputs(rows), tokens=3)
            tokens = run.engine.current.tokens
            for i in range(4):
                _, alone = generate(model, single(LLAVA, rows, i), tokens=3)
                torch.testing.assert_close(batch[:, i : i + 1], alone, **CLOSE)
        for row, first in enumerate(leaves):
            counts = [int(t.visual[row].sum()) for t in tokens]
            assert counts == [36 if first is None or n < first else 0 for n in range(8)]
    assert len(set(together)) > 3, together


def test_routers_learn_where_the_picture_may_go(tmp_path):
    model, samples = LLAVA.build(), []
    for seed in range(6):
        inputs = LLAVA.inputs([[3, "image", 7]], seed=seed)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = model(**inputs).logits[:, -3:-1, :90].argmax(-1)
        samples.append((inputs, labels))
    fitted = fit_exit(model, samples, agree=0.4, worse=1.05, steps=60, rank=8, hidden=16)
    assert set(fitted.leave) == {1, 2, 3}
    goes, agreed = {layer: [] for layer in (1, 2, 3)}, 0
    for inputs, labels in samples:  # the label by itself: hidden keys instead of dropped tokens
        columns = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()

        def says(states: Any, labels: Any = labels) -> tuple[list[int], float]:
            logits = model.lm_head(states)[-3:-1]  # the last of the hidden states is after the norm
            return logits.argmax(-1).tolist(), float(torch.nn.functional.cross_entropy(logits, labels[0, -2:]))

        stock, loss = says(maps(model, inputs, {})[1][-1])
        for layer in goes:
            blind, more = says(maps(model, inputs, {layer: columns})[1][-1])
            same = sum(a == b for a, b in zip(stock, blind, strict=True)) / 2
            goes[layer].append(same > 0.4 and more < 1.05 * loss)
            agreed += same > 0.4
    assert fitted.leave == {layer: pytest.approx(sum(g) / 6) for layer, g in goes.items()}
    assert 0 < sum(map(sum, goes.values())) < agreed < 18 and min(fitted.right.values()) >= 0.8

    routers = fitted.method.routers
    routers.save(tmp_path / "routers.safetensors")
    again = VisualExit(rule="router", routers=ExitRouters.load(tmp_path / "routers.safetensors"))
    inputs = samples[0][0]
    short = {k: v[:, :-2] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()}
    states = maps(model, short, {})[1]
    first = 4
    for number in (3, 2, 1):
        x = torch.cat([states[number][40:-1].mean(0), states[number][-1]])
        torch.testing.assert_close(_states(model, inputs, samples[0][1], (number,))[0], x, **CLOSE)
        router = routers.routers[number - 1]
        logits = router[3].weight @ torch.nn.functional.gelu(router[1].weight @ (router[0].weight @ x))
        first = number if logits[1] > logits[0] else first
    for method in (fitted.method, again):
        assert [len(kept) for kept in kept_by(model, short, method).values()] == [36] * first + [0] * (4 - first)
    with pytest.raises(ValueError, match="these routers are for a text model of width 48"):
        attach(LLAVA.build(num_hidden_layers=3), again)


def test_rows_where_repeats_do_not_count():
    rows, counts = rows_where(torch.tensor([[True, True, False, True], [False, True, False, False]]), 2)
    assert rows[0].tolist() == [1, 3] and rows[1, 1] == 1 and counts.tolist() == [[True, True], [False, True]]


def test_what_cannot_be_done_is_said():
    for make, words in (
        (lambda: PyramidDrop(keep=(0.2, 0.5)), "none above the one before"),
        (lambda: PyramidDrop(keep=(0.5, 3)), "shares or counts"),
        (lambda: PyramidDrop(layers=(3, 2, 1)), "ascending and at least 1"),
        (lambda: PyramidDrop(keep=(0.5, 0.0)), "a share of the visual tokens above 0"),
        (lambda: attach(LLAVA.build(), PyramidDrop(keep=(0.5, 0.4, 0.3, 0.2))), "give layers= yourself"),
        (lambda: SparseVLM(keep=100), "published budgets are 192, 128, 96, 64"),
        (lambda: SparseVLM(table="3.0"), "allowed are '1.0', '2.0'"),
        (lambda: attach(LLAVA.build(), SparseVLM(keep=(0.5, 0.4))), "say layers="),
        (lambda: DART(keep=0), "keep is a share"),
        (lambda: DART(pivots=0), "at least 1"),
        (lambda: TokenSchedule([0.5, 0.2]), "1 for the first"),
        (lambda: TokenSchedule([1, float("nan")]), "1 for the first"),
        (lambda: attach(LLAVA.build(), TokenSchedule([1, 0.5])), "shares for 2 layers, and the text model has 4"),
        (lambda: attach(LLAVA.build(), TokenSchedule([1, 1, 1, 1])), "drops nothing"),
        (lambda: VisualExit(rule="never"), "allowed are 'fixed', 'attention', 'router'"),
        (lambda: VisualExit(rule="router"), "needs routers="),
        (lambda: VisualExit(layer=2, rule="attention"), "for the rule 'fixed'"),
        (lambda: fit_exit(LLAVA.build(), []), "at least one sample"),
        (lambda: fit_exit(LLAVA.build(), [(LLAVA.inputs(ROW), torch.full((1, 3), -100))]), "sample 0 has ids"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_a_loop_of_calls_is_generate():
    """Without `generate` the text model makes the cache, and what was dropped is known by it in the next call."""
    model, inputs = LLAVA.build(), LLAVA.inputs(ROW)
    with attach(model, UniformPrune(keep=18), FastV(keep=9), positions="original"):
        ids, logits = generate(model, inputs, tokens=3)
        out = model(**inputs)
        for i in range(2):
            torch.testing.assert_close(out.logits[:, -1], logits[i], **CLOSE)
            n = inputs["input_ids"].shape[1] + i
            mask = torch.ones(1, n + 1, dtype=torch.long)
            out = model(input_ids=ids[:, n : n + 1], attention_mask=mask, past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits[:, -1], logits[2], **CLOSE)
