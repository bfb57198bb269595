"""Numbers about attention: entropy and its bound, distances, rings, sinks, and the alarm of a collapse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

from vision_attn.analysis.layer import SAMPLE, Attention


@dataclasses.dataclass(frozen=True)
class Profile:
    """Statistics of one layer per head, averaged over images and queries on the grid; from `profile`.

    Attributes:
        entropy: in nats; bound: what it cannot be below, given how far the scores spread; share: of `log(visible)`,
            from 0 (one key) to 1 (all alike).
        effective_keys: `sum(weights) ** 2 / sum(weights ** 2)`, from 1 to the keys that are seen.
        distance: mean distance in tokens of what is looked at, Euclidean; None without a grid, as the next.
        rings: mean weight of a key by Chebyshev distance 0, 1, 2, ... from the query, `[heads, rings]`.
        off_grid: share of the weight on tokens off the grid, such as the class token.
        sink: share of the weight on the key that gets most, and sink_key its number.
    """

    name: str
    layer: int
    visible: float
    entropy: torch.Tensor
    bound: torch.Tensor
    share: torch.Tensor
    effective_keys: torch.Tensor
    off_grid: torch.Tensor
    sink: torch.Tensor
    sink_key: torch.Tensor
    distance: torch.Tensor | None = None
    rings: torch.Tensor | None = None

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in fields.items()}


def entropy_bound(norm: torch.Tensor | float, keys: torch.Tensor | int) -> torch.Tensor:
    """Least entropy, in nats, of a softmax over `keys` scores whose vector has a norm of at most `norm`.

    `log(1 + (T - 1) b) + norm sqrt(T (T - 1)) b / (1 + (T - 1) b)` with `b = exp(-norm sqrt(T / (T - 1)))`; reached by
    one large score and T - 1 equal ones. Scores may be shifted by a constant first, so centred ones bound best.

    >>> entropy_bound(0.0, 8).exp()
    tensor(8.)

    Paper: Stabilizing Transformer Training by Preventing Attention Entropy Collapse.
    """
    norm = torch.as_tensor(norm, dtype=None if isinstance(norm, torch.Tensor) else torch.get_default_dtype())
    keys = torch.as_tensor(keys, device=norm.device).to(norm.dtype)
    many = keys.clamp(min=2)
    b = torch.exp(-norm * (many / (many - 1)).sqrt())
    rest = 1 + (many - 1) * b
    return torch.where(keys > 1, rest.log() + norm * (many * (many - 1)).sqrt() * b / rest, 0.0)


def profile(attention: Attention, most: int = SAMPLE) -> Profile:
    """Statistics of one recorded layer, per head.

    Args:
        attention: from `record`.
        most: queries that are looked at; of more, this many drawn at random, always the same.

    >>> import timm
    >>> from vision_attn.analysis import record
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    >>> with torch.no_grad(), record(model, layers=[0]) as recording:
    ...     out = model(torch.randn(1, 3, 96, 96))
    >>> profile(recording.layers[0]).rings.shape
    torch.Size([3, 6])
    """
    queries, heads = attention.sample(most), attention.heads
    same = attention.key_place.grid is not None and attention.query_place.grid is not None
    bound, effective, beyond, distance = (torch.zeros(heads, dtype=torch.float64) for _ in range(4))
    column = torch.zeros(heads, attention.keys, dtype=torch.float64)
    rings = counts = None
    for at, weights in attention.chunks(queries):
        weights = weights.double().cpu()
        bound += _bound(weights).sum((0, 2))
        effective += (weights.sum(-1).square() / weights.square().sum(-1).clamp(min=1e-300)).sum((0, 2))
        column += weights.sum((0, 2))
        beyond += weights[..., : attention.key_place.prefix].sum((0, 2, 3))
        if same:
            apart = _apart(attention, at)
            on_grid = weights[..., attention.key_place.prefix :]
            mass = on_grid.sum(-1).clamp(min=1e-300)
            distance += ((on_grid * apart.square().sum(-1).sqrt()).sum(-1) / mass).sum((0, 2))
            ring = apart.abs().amax(-1).round().long().flatten()
            if rings is None:
                most_rings = max(attention.grid)
                rings, counts = torch.zeros(heads, most_rings).double(), torch.zeros(most_rings).double()
            rings.index_add_(1, ring, on_grid.sum(0).flatten(1))
            counts.index_add_(0, ring, torch.ones(len(ring)).double())
    total = attention.batch * len(queries)
    entropy = attention.entropy()[:, :, queries].double().mean((0, 2)).cpu()
    sink, sink_key = (column / total).max(1)
    return Profile(
        attention.name,
        attention.layer,
        attention.visible,
        entropy,
        bound / total,
        entropy / max(math.log(attention.visible), 1e-9),
        effective / total,
        beyond / total,
        sink,
        sink_key,
        distance / total if same else None,
        rings / (counts.clamp(min=1) * attention.batch) if same else None,
    )


class CollapseAlarm:
    """Watches entropy while a model trains, and names the heads whose entropy falls sharply towards 0.

    Call it with a recording every so often. A head is named when its entropy is below `below` of the largest possible,
    and has lost at least `fall` of the highest it had.

    >>> alarm = CollapseAlarm()
    >>> alarm({"blocks.0.attn": torch.tensor([0.9, 0.8])}), alarm({"blocks.0.attn": torch.tensor([0.85, 0.04])})
    ([], ['blocks.0.attn head 1: entropy fell from 80% to 4% of the largest possible'])

    Paper: Stabilizing Transformer Training by Preventing Attention Entropy Collapse.
    """

    def __init__(self, below: float = 0.1, fall: float = 0.5) -> None:
        for name, value in (("below", below), ("fall", fall)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: got {value!r}; allowed: between 0 and 1, for example 0.1")
        self.below, self.fall = below, fall
        self.highest: dict[str, torch.Tensor] = {}

    def __call__(self, layers: Iterable[Attention] | dict[str, torch.Tensor]) -> list[str]:
        """Messages about the heads of these layers; a dict gives shares `[heads]` from 0 to 1 by name of the layer."""
        if not isinstance(layers, dict):
            layers = {each.name: _share(each) for each in layers}
        messages = []
        for name, share in layers.items():
            before = self.highest.get(name, share)
            for head in ((share < self.below) & (share <= (1 - self.fall) * before)).nonzero().flatten().tolist():
                fell = f"entropy fell from {before[head]:.0%} to {share[head]:.0%} of the largest possible"
                messages.append(f"{name} head {head}: {fell}")
            self.highest[name] = torch.maximum(before, share)
        return messages


def _share(attention: Attention) -> torch.Tensor:
    return attention.entropy().mean((0, 2)).cpu() / max(math.log(attention.visible), 1e-9)


def _bound(weights: torch.Tensor) -> torch.Tensor:
    """The bound of every row, from its own scores, which are the logs of the weights up to a constant."""
    seen = weights > 0
    keys = seen.sum(-1)
    scores = weights.log().masked_fill(~seen, 0)
    centred = (scores - scores.sum(-1, keepdim=True) / keys.clamp(min=1)[..., None]).masked_fill(~seen, 0)
    return entropy_bound(centred.norm(dim=-1), keys)


def _apart(attention: Attention, queries: torch.Tensor) -> torch.Tensor:
    """From query to key, `[queries, keys on the grid, 2]` in rows and columns of the keys' grid."""
    number = queries - attention.query_place.prefix
    rows, columns = attention.query_place.grid
    scale = torch.tensor(attention.grid, dtype=torch.float64) / torch.tensor([rows, columns])
    query = (torch.stack([number // columns, number % columns], 1) + 0.5) * scale - 0.5
    key = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in attention.grid))
    return key.view(-1, 2) - query[:, None]
