"""The attention of one layer in one call: its rows, and what is computed from them in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vision_attn.analysis.calls import DenseCall, PatternCall, WeightsCall
from vision_attn.analysis.geometry import Place, Windows

CHUNK = 2**22  # weights formed at a time
SAMPLE = 1024  # queries that statistics look at; of more, this many drawn at random, always the same


class Attention:
    """Who looked where in one layer, from `record`.

    Tokens are numbered in the order of the sequence: first those off the grid (class token, registers, and with some
    patterns further keys), then those of the grid, row-major.

    Attributes:
        name: of the module. layer: its number in order of execution, from 0.
        batch, heads, queries, keys: sizes.
        query_place, key_place: how many tokens are off the grid, and the grid, None where it cannot be told.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        call: DenseCall | PatternCall | WeightsCall,
        query_place: Place,
        key_place: Place,
        windows: Windows | None = None,
    ) -> None:
        self.name, self.layer = name, layer
        self.query_place, self.key_place = query_place, key_place
        self._calls, self._prefix, self._windows = [call], None, windows
        self.batch, _, self.queries, self.keys = call.shape
        if windows is not None:
            self.batch //= len(windows.token)
            self.queries = self.keys = math.prod(windows.grid)

    @property
    def heads(self) -> int:
        return sum(call.shape[1] for call in self._calls)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the keys; ValueError where they cannot be told."""
        if self.key_place.grid is None:
            raise ValueError(
                f"{self.name}: {self.keys} keys have no known place on the image; "
                "if they are one map, give record(..., grid=(rows, columns))"
            )
        return self.key_place.grid

    @property
    def visible(self) -> float:
        """How many keys a query sees, on average."""
        counts = []
        for call in self._calls:
            keys = call.shape[3]
            if isinstance(call, PatternCall):
                grid = math.prod(call.grid)
                keys = keys - grid + call.pattern.density(call.grid) * grid
            elif isinstance(call, DenseCall) and call.mask is not None and call.mask.dtype == torch.bool:
                keys = float(call.mask.expand(*call.mask.shape[:-1], keys).float().mean()) * keys
            counts += [keys] * call.shape[1]
        return sum(counts) / len(counts)

    def token(self, row: int, column: int) -> int:
        """Number of the query at a place of the grid."""
        grid = self.query_place.grid
        if grid is None or not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ValueError(f"{self.name}: no query at {(row, column)}; its grid is {grid}, counted from 0")
        return self.query_place.prefix + row * grid[1] + column

    def rows(self, queries: Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
        """Weights of some queries over all keys, `[batch, heads, len(queries), keys]`, in float32 at least.

        Rows sum to 1, or less where a window holds padding.

        Args:
            queries: numbers of tokens; all when None, which is a lot of memory on a large grid.
        """
        queries = torch.arange(self.queries) if queries is None else torch.as_tensor(queries, dtype=torch.long).cpu()
        if queries.ndim != 1 or (len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < self.queries):
            raise ValueError(f"{self.name}: queries are numbers from 0 to {self.queries - 1}; got {queries.tolist()}")
        if self._windows is not None:
            return self._rows_of_windows(queries)
        before = 0 if self._prefix is None else self._prefix.shape[2]
        rows = torch.cat([call.rows((queries[queries >= before] - before).to(call.device)) for call in self._calls], 1)
        if not before:
            return rows
        first = self._prefix.rows(queries[queries < before].to(rows.device))
        more = rows.shape[3] - first.shape[3]  # pooled keys, which tokens off the grid do not see
        first = torch.cat([first[..., :before], first.new_zeros(*first.shape[:3], more), first[..., before:]], 3)
        both = torch.cat([first, rows], 2)
        return both[:, :, (queries >= before).long().argsort(stable=True).argsort()]

    def _rows_of_windows(self, queries: torch.Tensor) -> torch.Tensor:
        (call,), windows = self._calls, self._windows
        token = windows.token.where(windows.token >= 0, self.keys).to(call.device)
        window, number = windows.slot[queries].to(call.device).unbind(1)
        if len(token) == 1:
            local = call.rows(number)
        else:
            local = call.rows(torch.arange(token.shape[1], device=call.device)).unflatten(0, (self.batch, -1))
            local = local[:, window, :, number].permute(1, 2, 0, 3)  # two indices apart: their axis comes first
        rows = local.new_zeros(*local.shape[:3], self.keys + 1)
        return rows.scatter_(3, token[window].expand(local.shape), local)[..., : self.keys]

    def map(self, query: str | int | tuple[int, int] = "mean") -> torch.Tensor:
        """Weights on the grid, `[batch, heads, rows, columns]`.

        Args:
            query: "mean" of all queries on the grid, "class" (the first token off the grid), (row, column) of a query,
                or its number.
        """
        grid = self.grid
        if query == "mean":
            first = self.query_place.prefix if self.query_place.grid else 0
            total = sum(weights.sum(2) for at, weights in self.chunks(range(first, self.queries)))
            row = total / (self.queries - first)
        else:
            if query == "class":
                if not self.query_place.prefix:
                    raise ValueError(f"{self.name} has no class token; allowed: 'mean', or (row, column) of a query")
                query = 0
            elif isinstance(query, str):
                raise ValueError(
                    f"query: got {query!r}; allowed: 'mean', 'class', (row, column) or the number of a token"
                )
            row = self.rows([query if isinstance(query, int) else self.token(*query)])[:, :, 0]
        return row[..., self.key_place.prefix :].unflatten(2, grid)

    def entropy(self) -> torch.Tensor:
        """Entropy of every query in nats, `[batch, heads, queries]`; 0 where a query looks at one key only.

        Without forming weights where scores are plain products of queries and keys, see `attention_entropy`.
        """
        parts = torch.cat([_entropy(call) for call in self._calls], 1)
        if self._windows is not None:
            window, number = self._windows.slot.to(parts.device).unbind(1)
            return parts.unflatten(0, (self.batch, -1))[:, window, :, number].permute(1, 2, 0)
        return parts if self._prefix is None else torch.cat([_entropy(self._prefix), parts], 2)

    def chunks(self, queries: range | torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Numbers of queries and their rows, a few at a time, so that memory stays small."""
        queries = torch.arange(self.queries) if queries is None else torch.as_tensor(list(queries))
        step = max(1, CHUNK // (self.batch * self.heads * self.keys))
        for part in queries.split(step):
            yield part, self.rows(part)

    def sample(self, most: int = SAMPLE) -> torch.Tensor:
        """Numbers of the queries on the grid, or `most` of them, drawn at random and always the same."""
        first = self.query_place.prefix if self.query_place.grid else 0
        drawn = torch.randperm(self.queries - first, generator=torch.Generator().manual_seed(0))
        return first + drawn[:most].sort().values

    def takes(self, call: Any, first_head: int) -> bool:
        """Whether another call of the same module is a part of this attention; if so it is added."""
        last = self._calls[-1]
        if not isinstance(last, PatternCall) or self._windows is not None:
            return False
        if isinstance(call, PatternCall) and first_head == self.heads:
            self._calls.append(call)  # further heads, which follow another pattern
            return True
        tokens = math.prod(last.grid)
        extra = last.shape[3] - tokens
        if isinstance(call, DenseCall) and 0 < call.shape[2] <= extra and call.shape[3] == call.shape[2] + tokens:
            self._prefix = call  # the tokens off the grid, which look at everything
            self.queries += call.shape[2]
            self.query_place = Place(call.shape[2], self.query_place.grid)
            return True
        return False

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.key_place.grid or ("?",)))
        return f"Attention({self.name}: {self.heads} heads, {self.queries} queries, {self.keys} keys, grid {grid})"


def _entropy(call: DenseCall | PatternCall | WeightsCall) -> torch.Tensor:
    """`[batch, heads, queries]` of one call."""
    found = call.entropy()
    if found is not None:
        return found
    batch, heads, queries, keys = call.shape
    parts = []
    for index in torch.arange(queries, device=call.device).split(max(1, CHUNK // (batch * heads * keys))):
        weights = call.rows(index)
        parts.append(-torch.special.xlogy(weights, weights).sum(-1))
    return torch.cat(parts, 2)
