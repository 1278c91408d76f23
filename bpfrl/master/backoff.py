"""Waiting longer after each failure, and never in step with others."""

from __future__ import annotations

import random


class Backoff:
    """Delays that double up to a longest one, each drawn between half of it and all of it.

    Args:
        first: the first delay, s.
        longest: none is longer, s.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first
        self.failures = 0

    def delay(self) -> float:
        """How long to wait after one more failure, s."""
        self.failures += 1
        delay, self._next = self._next, min(self._next * 2, self._longest)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - nobody must be kept from guessing it

    def reset(self) -> None:
        """It has worked."""
        self._next = self._first
        self.failures = 0
