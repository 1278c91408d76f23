from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.master.backoff import Backoff


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The longest of what may be drawn is, and between what it was."""
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    return bounds


@pytest.mark.parametrize(
    ("first", "longest", "delays"),
    [
        (0.2, 1.0, [0.2, 0.4, 0.8, 1.0, 1.0, 1.0]),
        (1, 64, [1, 2, 4, 8, 16, 32, 64, 64]),
        (0.5, 0.5, [0.5, 0.5, 0.5]),
    ],
)
def test_delays_double_up_to_the_longest(
    drawn: list[tuple[float, float]], first: float, longest: float, delays: list[float]
) -> None:
    backoff = Backoff(first, longest)
    assert [backoff.delay() for _ in delays] == delays
    assert set(drawn) == {(0.5, 1.0)}


def test_delays_are_not_in_step() -> None:
    assert len({Backoff(1, 2).delay() for _ in range(20)}) > 1


@given(st.integers(1, 200))
def test_a_delay_is_never_below_half_of_the_first_nor_above_the_longest(failures: int) -> None:
    backoff = Backoff(0.2, 30)
    delays = [backoff.delay() for _ in range(failures)]
    assert min(delays) >= 0.1
    assert max(delays) <= 30
    assert backoff.failures == failures


@pytest.mark.usefixtures("drawn")
def test_after_a_success_it_starts_over() -> None:
    backoff = Backoff(1, 8)
    assert [backoff.delay() for _ in range(3)] == [1, 2, 4]
    assert backoff.failures == 3
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.delay() == 1
    assert backoff.failures == 1
