"""Searching for the token schedule of a model: greedy layer by layer, or a sigmoid that fits a budget."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from vision_attn.mllm.attachment import attach
from vision_attn.mllm.method import Method
from vision_attn.mllm.methods.schedule import CUTS, TokenSchedule, sigmoid_shares
from vision_attn.mllm.report import prefill_flops

STEEPEST, FLATTEST, TRIES = 40.0, 2.0, 15


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        schedule: to attach.
        score: of the model with it.
        full: of the model as it is.
        flops: share of the prefill that it costs, of the text model by formula.
        tried: every schedule that was measured, and its score.
    """

    schedule: TokenSchedule
    score: float
    full: float
    flops: float
    tried: list[tuple[tuple[float, ...], float]]


def search_schedule(
    model: Any,
    evaluate: Callable[[Any], float],
    *methods: Method,
    budget: float | None = None,
    tolerance: float = 0.005,
    steps: int = 32,
    tokens: tuple[int, int] = (576, 64),
    start: TokenSchedule | None = None,
    cuts: int = CUTS,
) -> Search:
    """Find how many visual tokens each layer of a model needs.

    Without a budget, G-Search: from the second layer on, the smallest share such that keeping it in all layers from
    there loses no more than the tolerance, by bisection; about `log2(steps)` measurements per layer. With a budget,
    P-Sigmoid: 15 steepnesses between 2 and 40, each shifted until the prefill costs the budget, and the best of them by
    measurement; the paper draws them by Bayesian optimisation.

    Args:
        evaluate: `(model) -> score`, higher is better; called with a schedule attached.
        methods: others to attach beside it.
        budget: share of the FLOPs of the text model that the prefill may cost, above 0 and below 1; None searches layer
            by layer.
        tolerance: share of the score that may be lost, without a budget.
        steps: a share is a multiple of `1 / steps`, without a budget.
        tokens: visual and other tokens of a typical prompt, for the FLOPs.
        start: a schedule whose best fit by a sigmoid is tried too, such as one found without a budget.
        cuts: the most layers at which tokens are dropped. Fewer cuts keep more tokens, within the budget.

    Raises:
        ValueError: arguments out of range, or a budget that no sigmoid meets.

    >>> from vision_attn.mllm import tiny
    >>> def score(model):  # stands for an exam
    ...     return 1.0
    >>> found = search_schedule(tiny.model().eval(), score, tokens=(64, 20))
    >>> found.schedule.keep, round(found.flops, 2)
    ((1.0, 0.0, 0.0, 0.0), 0.41)

    Paper: Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction.
    """
    if budget is not None and not 0 < budget < 1:
        raise ValueError(f"budget is a share of the FLOPs above 0 and below 1; got {budget}")
    if not 0 <= tolerance < 1 or steps < 1 or cuts < 1:
        raise ValueError(f"tolerance from 0 to below 1, steps and cuts at least 1; got {tolerance}, {steps} and {cuts}")
    layers = len(model.get_decoder().layers)
    deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    first = max(1, deep)
    tried: dict[tuple[float, ...], float] = {}
    whole = TokenSchedule([1.0] * layers)

    def measure(schedule: TokenSchedule) -> float:
        if schedule.keep not in tried:
            dropping = () if schedule == whole else (schedule,)
            with attach(model, *dropping, *methods) if dropping or methods else contextlib.nullcontext():
                tried[schedule.keep] = float(evaluate(model))
        return tried[schedule.keep]

    def cost(schedule: TokenSchedule) -> float:
        return flops_share(model, schedule, tokens)

    full = measure(whole)
    if budget is None:
        found = _greedily(measure, layers, first, full - tolerance * abs(full), steps).grouped(cuts)
    else:
        slopes = [FLATTEST * (STEEPEST / FLATTEST) ** (i / (TRIES - 1)) for i in range(TRIES)]
        if start is not None:
            slopes[-1:] = [fit_sigmoid(start)[0]]
        shifted = [_within(cost, a, layers, first, budget, cuts) for a in slopes]
        sigmoids = [schedule for schedule in shifted if schedule is not None]
        if not sigmoids:
            least = cost(TokenSchedule([1.0] * first + [0.0] * (layers - first)))
            raise ValueError(f"no sigmoid meets a budget of {budget}; without any picture it is {least:.3f}")
        found = max(sigmoids, key=measure)
    return Search(found, measure(found), full, cost(found), list(tried.items()))


def flops_share(model: Any, schedule: TokenSchedule, tokens: tuple[int, int]) -> float:
    """What reading a prompt of `tokens` (visual, other) costs with a schedule, as a share of what it costs without."""
    config, (visual, words) = model.config.get_text_config(), tokens
    used = prefill_flops(config, [words + n for n in schedule.counts(visual)])
    return used / prefill_flops(config, [words + visual] * len(schedule.keep))


def _greedily(measure: Callable, layers: int, first: int, enough: float, steps: int) -> TokenSchedule:
    keep = [1.0] * layers
    for layer in range(first, layers):
        low, high = 0, round(keep[layer - 1] * steps)  # high is known to be enough
        while low < high:
            middle = (low + high) // 2
            if measure(TokenSchedule([*keep[:layer], *[middle / steps] * (layers - layer)])) >= enough:
                high = middle
            else:
                low = middle + 1
        keep[layer:] = [high / steps] * (layers - layer)
    return TokenSchedule(keep)


def _within(cost: Callable, a: float, layers: int, first: int, budget: float, cuts: int) -> TokenSchedule | None:
    """The latest sigmoid of a steepness that costs no more than the budget."""
    low, high = -2.0, 2.0
    for _ in range(25):
        middle = (low + high) / 2
        if cost(TokenSchedule.sigmoid(a, middle, layers, cuts=cuts, first=first)) <= budget:
            low = middle
        else:
            high = middle
    found = TokenSchedule.sigmoid(a, low, layers, cuts=cuts, first=first)
    return found if cost(found) <= budget else None


def fit_sigmoid(schedule: TokenSchedule) -> tuple[float, float]:
    """The steepness and the shift of the sigmoid nearest to a schedule, in least squares over a grid.

    >>> fit_sigmoid(TokenSchedule.sigmoid(8, 0.5, layers=16, cuts=16))
    (8.0, 0.5)
    """

    def error(a: float, b: float) -> float:
        made = sigmoid_shares(a, b, len(schedule.keep))
        return sum((x - y) ** 2 for x, y in zip(made, schedule.keep, strict=True))

    grid = [(a / 2, b / 50) for a in range(int(2 * FLATTEST), int(2 * STEEPEST) + 1) for b in range(-25, 76)]
    return min(grid, key=lambda pair: error(*pair))
