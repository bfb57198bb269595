"""Regions of a map, and the points that tell a segmenter what a map shows."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Points:
    """What a segmenter is prompted with.

    Args:
        positive: (x, y) on the object, as shares of width and height.
        negative: (x, y) off the object.
        area: bool `[rows, columns]` of the map, the object.
    """

    positive: tuple[float, float]
    negative: tuple[float, float]
    area: np.ndarray


def regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the 4-connected regions of a bool `[height, width]` from 1: the numbers, 0 outside, and how many.

    >>> regions(np.array([[True, False, True], [True, False, False], [False, True, False]]))[1]
    3
    """
    import cv2

    count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return numbers, count - 1


def points(values: np.ndarray, threshold: float = 0.5) -> Points:
    """VL-SAM's points of a map `[rows, columns]`: its greatest value in the largest region above a threshold, and its
    least value outside of that region.

    Args:
        threshold: from the least value of the map, 0, to the greatest, 1; the paper does not say which (0.5 is ours).

    Raises:
        ValueError: a map that is constant or not finite, or a threshold that is not from 0 to below 1.

    >>> points(np.array([[0.0, 0, 0, 0], [0, 2, 3, 0], [0, 0, 0, 9]])).negative
    (0.125, 0.16666666666666666)

    Paper: Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all() or low == high:
        raise ValueError(
            f"a map from {low} to {high} has no points; give one that is finite and not the same everywhere"
        )
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold!r}: from 0 to below 1")
    numbers, _ = regions(values > low + threshold * (high - low))
    area = numbers == 1 + np.bincount(numbers.ravel())[1:].argmax()
    inside, outside = np.where(area, values, -np.inf), np.where(area, np.inf, values)
    return Points(_place(inside.argmax(), area.shape), _place(outside.argmin(), area.shape), area)


def _place(index: int, shape: tuple[int, int]) -> tuple[float, float]:
    """The middle of a cell, as shares of width and height."""
    row, column = divmod(int(index), shape[1])
    return (column + 0.5) / shape[1], (row + 0.5) / shape[0]
