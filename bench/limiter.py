"""What every limiter that is compared offers, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench.record import Case, Direction
from bpfrl.units import Rate


@dataclass(frozen=True, slots=True)
class Counted:
    """What a limiter has counted in one direction; passed, byte at layer 3, is None where it does not count that."""

    drops: int | None = None
    passed: int | None = None


def _fixed(rate: Rate) -> None:
    raise RuntimeError(f"this limiter cannot be changed to {rate} while it is in place")


class Attached(NamedTuple):
    """A limiter in place.

    Attributes:
        counted: what it has counted in one direction.
        change: gives it another rate in both directions.
    """

    counted: Callable[[Direction], Counted]
    change: Callable[[Rate], None] = _fixed


def rate_of(case: Case) -> Rate:
    """The rate for a case's limiter.

    Raises:
        ValueError: it has none.
    """
    if case.rate is None:
        raise ValueError(f"no rate for a limiter: {case}")
    return Rate(case.rate)
