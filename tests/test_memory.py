"""Measured against predicted: resident memory of real steps, each in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks import memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", ["gru", "checkpointing", "lora", "fsdp, 2 workers", "evaluation"])
def test_the_plan_is_within_a_tenth_of_what_was_measured(name: str) -> None:
    """One case of each kind; `benchmarks/memory.py` measures all of them."""
    (found,) = memory.compare([name], "cpu")
    assert abs(found["error"]) < 0.1, found


def test_the_prediction_tells_cases_apart() -> None:
    """A tenth is less than what the cases differ by: the test above can fail."""
    totals = {name: memory.predict(case).total for name, case in memory.CASES.items()}
    for less, more in (
        ("gru, 4 micro-batches", "gru"), ("none", "gru"), ("gru", "kl"), ("checkpointing", "gru"),
        ("lora", "gru"), ("pure_bfloat16", "bfloat16"), ("fsdp, 2 workers", "ddp, 2 workers"),
        ("gru, 4 micro-batches", "evaluation"),
    ):  # fmt: skip
        assert 1.1 * totals[less] < totals[more], (less, more)
