"""Sequences of many lengths into batches of few tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TypeVar

R = TypeVar("R")


def cut(
    items: Sequence[R], room: int, price: int, fed: Callable[[R], int], held: Callable[[R], int] | None = None
) -> list[list[R]]:
    """Batches of ``items``, in order, that feed the fewest tokens, padding and ``price`` for each batch included.

    A batch of more than one item holds at most ``room`` tokens when padded. By dynamic programming over the places of
    the cuts.

    Args:
        items: those with the most tokens first.
        fed: tokens of an item that go through the model.
        held: tokens of an item in memory; those that are fed unless given.
    """
    tokens, sizes = [fed(item) for item in items], [(held or fed)(item) for item in items]
    costs, begins = [0.0], [0]  # of the first so many items: the least cost, and where its last batch begins
    for end in range(1, len(items) + 1):
        least, begin, longest = inf, end - 1, 0
        for start in range(end - 1, -1, -1):
            longest = max(longest, sizes[start])
            rows = end - start
            if rows > 1 and longest * rows > room:
                break
            cost = costs[start] + price + tokens[start] * rows
            if cost < least:
                least, begin = cost, start
        costs.append(least)
        begins.append(begin)
    batches: list[list[R]] = []
    end = len(items)
    while end:
        batches.append(list(items[begins[end] : end]))
        end = begins[end]
    return batches[::-1]
