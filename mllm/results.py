"""The table of methods: scores from the answers, what is better or worse than the alternatives, and a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.mllm.comparison import BLIND, GREEDY, KEEP, LEFT_OUT, THRESHOLD, Row, rows
from vision_attn.mllm.evaluate import Cache, fingerprint, load
from vision_attn.mllm.exam import CHAIR, Exam, blind
from vision_attn.mllm.mentions import words_of
from vision_attn.mllm.metrics import SPLITS, best_threshold

# score -> heading, and the sense in which it is better: 1 more, -1 less, 0 neither.
SCORES = {
    "random accuracy": ("random acc.", 1),
    "popular accuracy": ("popular acc.", 1),
    "adversarial accuracy": ("adv. acc.", 1),
    "adversarial area": ("adv. area", 1),
    "adversarial yes": ("adv. yes", 0),
    "random false": ("random FPR", -1),
    "adversarial false": ("adv. FPR", -1),
    "chair_s": ("CHAIR_s", -1),
    "chair_i": ("CHAIR_i", -1),
    "recall": ("recall", 1),
    "words": ("words", 0),
}
COSTS = {"kept": "tokens", "flops": "FLOPs", "first": "TTFT", "cache": "KV bytes"}
JUDGED = ("random accuracy", "adversarial accuracy", "adversarial area", "chair_s", "chair_i", "recall")
DRAWS = 400  # resamples of the pictures
Sums = dict[str, tuple[np.ndarray, np.ndarray]]


def sums(drawn: Exam, answers: dict[str, Any]) -> Sums:
    """Score -> numerator and denominator of each picture, or of each pair of pictures for an area.

    Any score of any resampled set of pictures is a quotient of weighted sums of these.
    """
    asked, count = drawn.questions, len(drawn.pictures)
    said, margins = (dict(zip(asked, answers[name], strict=True)) for name in ("said", "margins"))
    found: Sums = {}
    for split in SPLITS:
        questions = drawn.splits[split]
        of = np.array([question.image for question in questions])
        label, yes = (np.array(x, dtype=bool) for x in ([q.label for q in questions], [said[q] for q in questions]))
        add = lambda values, of=of: np.bincount(of, values, count)  # noqa: E731
        found[f"{split} accuracy"] = add(yes == label), add(np.ones(len(of)))
        found[f"{split} yes"] = add(yes), add(np.ones(len(of)))
        found[f"{split} false"] = add(yes & ~label), add(~label)
        margin = np.array([margins[q] for q in questions])
        above = margin[label][:, None] - margin[~label] if np.isfinite(margin).all() else None
        if above is None:  # differences of infinities
            above = (margin[label][:, None] > margin[~label]).astype(float) - (margin[label][:, None] < margin[~label])
        wins, pairs = np.zeros((count, count)), np.zeros((count, count))
        where = of[label][:, None], of[~label][None]
        np.add.at(wins, where, (np.sign(above) + 1) / 2)
        np.add.at(pairs, where, 1)
        found[f"{split} area"] = wins, pairs
    named = [CHAIR.mentions(caption) for caption in answers["captions"]]
    wrong = [sum(name not in truth for name in mine) for mine, truth in zip(named, drawn.truth, strict=True)]
    covered = [len(truth & set(mine)) for mine, truth in zip(named, drawn.truth, strict=True)]
    one = np.ones(count)
    found["chair_s"] = np.array(wrong, dtype=bool).astype(float), one
    found["chair_i"] = np.array(wrong, dtype=float), np.array([len(mine) for mine in named], dtype=float)
    found["recall"] = np.array(covered, dtype=float), np.array([len(truth) for truth in drawn.truth], dtype=float)
    found["words"] = np.array([len(words_of(caption)) for caption in answers["captions"]], dtype=float), one
    return found


def quotient(parts: tuple[np.ndarray, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """A score for each row of `weights`, `[sets, pictures]`: how often each picture is in the set."""
    if parts[0].ndim == 1:
        top, bottom = (weights @ part for part in parts)
    else:
        top, bottom = (np.einsum("si,ij,sj->s", weights, part, weights, optimize=True) for part in parts)
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)


def differences(mine: list[Sums], others: list[Sums]) -> dict[str, list[str]]:
    """Which scores are better and which worse: in the same direction with every model, and by more than two standard
    errors of the mean difference over resampled sets of pictures."""
    pictures = len(mine[0]["chair_s"][0])
    weights = np.random.default_rng(0).multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS).astype(float)
    weights = np.concatenate([np.ones((1, pictures)), weights])
    verdict: dict[str, list[str]] = {"better": [], "worse": []}
    for name in JUDGED:
        heading, sense = SCORES[name]
        gains = np.stack(
            [quotient(a[name], weights) - quotient(b[name], weights) for a, b in zip(mine, others, strict=True)]
        )
        gain, error = sense * gains.mean(0)[0], gains.mean(0)[1:].std(ddof=1)
        if abs(gain) > max(2 * error, 1e-9) and (sense * gains[:, 0] * np.sign(gain) > 0).all():
            verdict["better" if gain > 0 else "worse"].append(heading)
    return verdict


def answers_of(row: Row, record: dict[str, Any] | None, drawn: Exam, other: Exam) -> dict[str, Any] | None:
    """The answers of a row; those without a record of their own follow from that of greedy decoding, or none."""
    if row.name == BLIND:
        return blind(drawn)
    if row.name == THRESHOLD and record is not None:
        margin_of = dict(zip(other.questions, record["calibration"], strict=True))
        tuned = [question for split in SPLITS for question in other.splits[split]]
        at = best_threshold([margin_of[question] for question in tuned], [question.label for question in tuned])
        margins = [margin - at for margin in record["margins"]]
        return record | {"margins": margins, "said": [margin > 0 for margin in margins]}
    return record


def summarize(cache: Cache, models: list[Path]) -> list[dict[str, Any]]:
    """One dict per size of pictures and row that has answers: scores and costs per model, and verdicts."""
    sizes: dict[int, list[str]] = {}
    cells: dict[int, int] = {}
    for folder in models:
        student = load(folder)
        cells[student.tokens] = student.cell
        sizes.setdefault(student.tokens, []).append(fingerprint(folder))
    found = []
    for tokens, names in sizes.items():
        drawn, other = (cache.questions.draw(cells[tokens], calibration) for calibration in (False, True))
        table: dict[str, dict[str, Sums]] = {}
        for row in rows():
            source = next(r for r in rows() if r.name == GREEDY) if row.name == THRESHOLD else row
            records = {model: cache.read(source, model) for model in names if row.name != BLIND}
            records = {model: record for model, record in records.items() if record is not None}
            told = {model: answers_of(row, record, drawn, other) for model, record in records.items()}
            if row.name == BLIND:
                told = dict.fromkeys(names, answers_of(row, None, drawn, other))
            if not told:
                continue
            parts = table[row.name] = {model: sums(drawn, answers) for model, answers in told.items()}
            every = np.ones((1, len(drawn.pictures)))
            scores = {name: [float(quotient(p[name], every)[0]) for p in parts.values()] for name in SCORES}
            one = {"tokens": tokens, "row": row.name, "kind": row.kind, "control": row.control, "models": list(told)}
            one |= {"scores": scores, "costs": _costs(records) if row.name != BLIND else {}}
            found.append(one)
        for one in found:
            if one["tokens"] != tokens:
                continue
            for key, control in (("against greedy", GREEDY), ("against control", one["control"])):
                common = [model for model in one["models"] if model in table.get(control, {})]
                if one["row"] not in (GREEDY, BLIND, control) and common:
                    one[key] = differences(*([table[name][m] for m in common] for name in (one["row"], control)))
    return found


def _costs(records: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Of each model: tokens, FLOPs and bytes as they are, time to the first token over the untouched model's."""
    costs = {name: [record[name] for record in records.values()] for name in ("kept", "flops", "cache")}
    return costs | {"first": [record["first"] / record["plain_first"] for record in records.values()]}


def write(out: Path, cache: Cache, models: list[Path]) -> str:
    """Write RESULTS.md, results/evaluation.csv and results/evaluation.png; says what was written."""
    found = summarize(cache, models)
    (out / "results").mkdir(parents=True, exist_ok=True)
    _replace(out / "results" / "evaluation.csv", table(found).encode())
    _replace(out / "RESULTS.md", page(found, cache).encode())
    picture(out / "results" / "evaluation.png", found)
    return f"{len(found)} rows in {out / 'RESULTS.md'}"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def table(found: list[dict[str, Any]]) -> str:
    """CSV with one line per row and model."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["tokens", "row", "model", *SCORES, *COSTS])
    for one in found:
        for number, model in enumerate(one["models"]):
            scores = [f"{one['scores'][name][number]:.4f}" for name in SCORES]
            costs = [f"{one['costs'][name][number]:.4g}" if one["costs"] else "" for name in COSTS]
            lines.writerow([one["tokens"], one["row"], model, *scores, *costs])
    return text.getvalue()


_INTRODUCTION = """# Every method on the built-in vision-language model

```
python -m vision_attn.mllm.evaluate --models MODEL... --cache CACHE
```

Written by that command. The models are small LLaVAs of 0.8 million parameters, trained with different seeds by
`python -m vision_attn.mllm.train` on crowded pictures in which things come with their usual companions, each with
probability 0.8. Here each comes with probability {partners:g}, in {images} pictures, so that answers from habit are
often wrong. **A toy shows mechanics and directions. It says nothing about what these methods do for large models**: it
has four layers of six heads, and little of the attention sinks that some methods are about.

- **random, popular, adv. acc.**: accuracy on the three splits of POPE; **adv. yes**, **FPR**: share of yes, and share
  of the absent things that are confirmed. **adv. area**: area under the curve of the margin between yes and no, before
  any token is ruled out. A method that only moves the threshold changes accuracy, not the area.
- **CHAIR_s**, **CHAIR_i**: captions with something that is not there, and share of such mentions; **recall**: share of
  the things that are named; **words** per caption. Short captions have low CHAIR.
- **tokens**: visual tokens that reach the last layer. **FLOPs** of reading a prompt, by formula, all passes of the text
  model counted and the tower left out; attention that skips pairs is counted as if it did not. **KV bytes** after the
  prompt, all caches. **TTFT**: time to the first token, measured, batch 1, as a multiple of the untouched model's in
  turn with it; processor time of one thread. At this size it is mostly the cost of Python.
- **{threshold}**: greedy answers with the threshold on the margin that is best on other pictures, over all splits:
  what moving the threshold can do, for free. **{blind}**: knows which things usually come together, and sees nothing.
  It is the chance level here.
- **against greedy**, **against control**: what differs from the untouched model, or from the row named, in the same
  direction for every training seed and by more than two standard errors over resampled pictures; "-" is nothing. One
  such finding in twenty is chance with one seed, fewer with more. Judged are {judged}.

Scores are means over the models. Per model: [evaluation.csv](results/evaluation.csv). As a picture:
[evaluation.png](results/evaluation.png).
"""
_KINDS = {
    "baseline": "Baselines",
    "prune": f"Pruning and other savings, {KEEP:.0%} of the tokens kept where nothing else is said",
    "steer": "Steering",
    "both": "Both together",
}


def page(found: list[dict[str, Any]], cache: Cache) -> str:
    """RESULTS.md from what `summarize` found."""
    asked = cache.questions
    judged = ",\n  ".join(", ".join(SCORES[name][0] for name in part) for part in (JUDGED[:2], JUDGED[2:]))
    parts = [_INTRODUCTION.format(**vars(asked), threshold=THRESHOLD, blind=BLIND, judged=judged)]
    for tokens in dict.fromkeys(one["tokens"] for one in found):
        mine = [one for one in found if one["tokens"] == tokens]
        most = max(len(one["models"]) for one in mine)
        parts.append(f"## {tokens} tokens a picture, {most} model{'s' * (most > 1)}\n")
        for kind, title in _KINDS.items():
            shown = [one for one in mine if one["kind"] == kind]
            if shown:
                parts.append(f"### {title}\n\n{_rows(shown, mine, most)}\n")
        parts.append(_no_help(mine))
    left = "\n".join(f"- {name}: {why}." for name, why in LEFT_OUT.items())
    parts.append(f"## Not in the table\n\n{left}\n")
    parts.append(f"## Settings\n\n{_settings({one['row'] for one in found})}\n")
    return "\n".join(parts)


def _settings(shown: set[str]) -> str:
    """Options that are not the defaults of a method."""
    lines = []
    for row in rows():
        calls = [f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" for name, given in row.methods.items()]
        if row.name in shown and (row.how or any(row.methods.values())):
            lines.append(f"- {row.name}: {row.how or ' + '.join(calls)}")
    return "\n".join(lines)


def _rows(shown: list[dict[str, Any]], mine: list[dict[str, Any]], most: int) -> str:
    greedy = next((one for one in mine if one["row"] == GREEDY), None)
    heads = ["", *(heading for heading, _ in SCORES.values()), *COSTS.values(), "against greedy", "against control"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for one in shown:
        few = f" ({len(one['models'])} of {most})" * (len(one["models"]) < most)
        cells = [one["row"] + few]
        for name in SCORES:
            cells.append(f"{np.mean(one['scores'][name]):.{1 if name == 'words' else 3}f}")
        for name in COSTS:
            cells.append(_cost(name, one, greedy))
        cells += [_words(one, "against greedy")]
        control = _words(one, "against control")
        cells += [f"{one['control']}: {control}" if control else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost(name: str, one: dict[str, Any], greedy: dict[str, Any] | None) -> str:
    if not one["costs"] or greedy is None:
        return ""
    value = float(np.mean(one["costs"][name]))
    if name == "kept":
        return f"{value:g}"
    return f"{value:.2f}x" if name == "first" else f"{value / np.mean(greedy['costs'][name]):.0%}"


def _words(one: dict[str, Any], key: str) -> str:
    if key not in one:
        return ""
    return "; ".join(f"{sense} {', '.join(names)}" for sense, names in one[key].items() if names) or "-"


def _no_help(mine: list[dict[str, Any]]) -> str:
    """Sentences on the methods that help in nothing that is measured."""
    steered = [one for one in mine if one["kind"] in ("steer", "both") and "against greedy" in one]
    lines = []
    if steered:
        useless = [one["row"] for one in steered if not one["against greedy"]["better"]]
        lines.append(f"Better than greedy decoding in nothing that is judged: {'; '.join(useless) or 'none'}.")
    pruned = [one for one in mine if one["kind"] == "prune" and "against control" in one]
    if pruned:
        useless = [one["row"] for one in pruned if not one["against control"]["better"]]
        lines.append(
            f"Better than its control, tokens at random, in nothing that is judged: {'; '.join(useless) or 'none'}."
        )
    return "\n\n".join(lines) + "\n"


def picture(path: Path, found: list[dict[str, Any]]) -> None:
    """Four scores of every row, a dot per model a bar at the mean; lines mark greedy decoding and the blind rule."""
    from matplotlib.figure import Figure

    shown = ("adversarial accuracy", "adversarial area", "chair_i", "recall")
    sizes = list(dict.fromkeys(one["tokens"] for one in found))
    most = max((sum(one["tokens"] == tokens for one in found) for tokens in sizes), default=1)
    figure = Figure(figsize=(14, (1.2 + 0.2 * most) * max(len(sizes), 1)), layout="constrained")
    grid = figure.subplots(max(len(sizes), 1), len(shown), squeeze=False, sharey="row")
    colors = {"baseline": "black", "prune": "tab:blue", "steer": "tab:orange", "both": "tab:green"}
    for axes, tokens in zip(grid, sizes, strict=False):
        mine = [one for one in found if one["tokens"] == tokens]
        for axis, name in zip(axes, shown, strict=True):
            for place, one in enumerate(mine):
                values = one["scores"][name]
                axis.plot(values, [place] * len(values), ".", color=colors[one["kind"]], alpha=0.5)
                axis.plot(np.mean(values), place, "|", color=colors[one["kind"]], markersize=10)
                if one["row"] in (GREEDY, BLIND):
                    axis.axvline(np.mean(values), color="grey", lw=0.8, ls="-" if one["row"] == GREEDY else ":")
            axis.set_title(f"{SCORES[name][0]}, {tokens} tokens", fontsize=10)
            axis.set_yticks(range(len(mine)), [one["row"] for one in mine], fontsize=8)
            axis.grid(axis="x", alpha=0.3)
        axes[0].invert_yaxis()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=90)
    partial.replace(path)
