"""Sequences of many lengths into batches of few tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

R = TypeVar("R")


def cut(
    items: Sequence[R], room: int, price: int, fed: Callable[[R], int], before: Callable[[R], int] = lambda _: 0
) -> list[list[R]]:
    """Batches of ``items``, in order, that feed the fewest tokens, padding and ``price`` for each batch included.

    A batch of more than one item has at most ``room`` columns in all its rows, padding included. By dynamic programming
    over the places of the cuts.

    Args:
        items: those with the most tokens first.
        fed: tokens of an item that go through the model.
        before: tokens that it has before them in a cache.
    """
    fed_N, before_N = np.array([fed(each) for each in items]), np.array([before(each) for each in items])
    # of the first so many items: the least cost, and where its last batch begins
    costs, begins = np.zeros(len(items) + 1), [0] * (len(items) + 1)
    for end in range(1, len(items) + 1):
        first = max(0, end - max(1, room // max(1, fed_N[end - 1] + before_N[end - 1])))  # no larger batch fits
        rows_M, fed_M = np.arange(end - first, 0, -1), fed_N[first:end]  # a batch from each of them on
        width_M = fed_M + np.maximum.accumulate(before_N[first:end][::-1])[::-1]
        cost_M = costs[first:end] + price + fed_M * rows_M
        cost_M[(rows_M > 1) & (width_M * rows_M > room)] = np.inf
        best = int(cost_M.argmin())
        costs[end], begins[end] = cost_M[best], first + best
    batches: list[list[R]] = []
    end = len(items)
    while end:
        batches.append(list(items[begins[end] : end]))
        end = begins[end]
    return batches[::-1]
