"""Cutting sequences into batches, against trying every way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from gru_core.metrics.batches import cut


class Item(NamedTuple):
    fed: int
    before: int


def cost(batches: list[list[Item]], price: int) -> int:
    return sum(price + len(batch) * max(item.fed for item in batch) for batch in batches)


def fits(batch: list[Item], room: int) -> bool:
    """Padded, as wide as the most tokens before and the most tokens fed."""
    width = max(item.before for item in batch) + max(item.fed for item in batch)
    return len(batch) == 1 or len(batch) * width <= room


def every_way(items: list[Item]) -> Iterator[list[list[Item]]]:
    if not items:
        yield []
    for n in range(1, len(items) + 1):
        for rest in every_way(items[n:]):
            yield [items[:n], *rest]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_feed_fewer_tokens(seed: int) -> None:
    draw = random.Random(seed)
    fed = sorted((draw.randint(0, 12) for _ in range(draw.randint(1, 9))), reverse=True)
    items = [Item(n, draw.randint(0, 10)) for n in fed]
    room, price = draw.randint(1, 60), draw.choice([0, 3, 20])
    found = cut(items, room, price, lambda item: item.fed, lambda item: item.before)
    assert [item for batch in found for item in batch] == items
    assert all(fits(batch, room) for batch in found)
    allowed = [way for way in every_way(items) if all(fits(batch, room) for batch in way)]
    assert cost(found, price) == min(cost(way, price) for way in allowed)


def test_a_batch_ends_where_the_room_or_the_padding_says_so() -> None:
    assert cut([5, 5, 2, 2], 10, 100, lambda n: n) == [[5, 5], [2, 2]]
    assert cut([5, 5, 2, 2], 20, 100, lambda n: n) == [[5, 5, 2, 2]]
    assert cut([5, 5, 2, 2], 20, 0, lambda n: n) == [[5, 5], [2, 2]]


def test_an_item_larger_than_the_room_goes_alone_and_nothing_makes_no_batch() -> None:
    assert cut([9, 3, 3], 6, 0, lambda n: n) == [[9], [3, 3]]
    assert cut([], 6, 0, len) == []
