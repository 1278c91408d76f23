"""A plain token bucket on the pod's cgroup as a limiter: see bucket.bpf.c."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench import bpf
from bench.lab import Lab
from bench.limiter import Attached, Counted, rate_of
from bench.record import Case, Direction
from bpfrl.units import Rate

# As much as the CNI plugin is given.
BURST: Final = 128 * 1024 * 8

_DIRECTIONS: Final[tuple[Direction, ...]] = ("egress", "ingress")
_LIMIT: Final = struct.Struct("=QQ")


@contextmanager
def bucket(bed: Lab, case: Case) -> Iterator[Attached]:
    """Load it, give it the case's rate, and attach it for as long as the context lasts."""
    pins = bed.bpffs / "bucket"

    def change(rate: Rate) -> None:
        for index, _ in enumerate(_DIRECTIONS):
            bpf.update(pins / "limits", index, _LIMIT.pack(rate.bits // 8, (case.burst or BURST) // 8))

    def counted(direction: Direction) -> Counted:
        found = bpf.values(pins / "buckets")[_DIRECTIONS.index(direction)]
        return Counted(found["dropped"], found["passed"])

    bpf.load("bucket.bpf.c", pins)
    change(rate_of(case))
    for direction in _DIRECTIONS:
        bpf.attach(bed.pod_cgroup, direction, pins / f"bucket_{direction}")
    try:
        yield Attached(counted, change)
    finally:
        for direction in _DIRECTIONS:
            bpf.detach(bed.pod_cgroup, direction, pins / f"bucket_{direction}")
