"""Token order under Ulysses sequence parallelism."""


def gathered_order(ranks: int, first: int, second: int) -> list[int]:
    """Positions of `[first part, second part]` in the sequence that Ulysses parallelism gathers.

    Each rank concatenates its slice of both parts before the exchange, so the parts arrive interleaved.

    >>> gathered_order(2, 2, 4)  # gathered as: text 0, image 0 1, text 1, image 2 3
    [0, 3, 1, 2, 4, 5]
    """
    a, b = first // ranks, second // ranks
    parts = [range(r * (a + b), r * (a + b) + a) for r in range(ranks)]
    parts += [range(r * (a + b) + a, (r + 1) * (a + b)) for r in range(ranks)]
    return [position for part in parts for position in part]
