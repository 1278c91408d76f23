"""The limiters that are compared, each put in place as its users would do it.

A limiter is a context manager: within it the lab's pod is under the case's limit, in both directions, and what it
yields tells what the limiter itself has counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from bench.bucket import bucket
from bench.cni import cni
from bench.lab import Json, Lab
from bench.limiter import Attached, Counted, rate_of
from bench.record import Case, Direction, Limiter
from bpfrl.limits import PodRef
from bpfrl.units import Rate


@contextmanager
def _no_limit(_bed: Lab, _case: Case) -> Iterator[Attached]:
    yield Attached(lambda _: Counted())


@contextmanager
def _bpfrl(bed: Lab, case: Case) -> Iterator[Attached]:
    """Through the installed command, as ``bpfrl attach --rate``."""

    def change(rate: Rate) -> None:
        bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", str(rate))

    def counted(direction: Direction) -> Counted:
        counters = bpfrl_counters(bed)[direction]
        return Counted(counters["dropped_packets"], counters["passed_bytes"])

    change(rate_of(case))
    try:
        yield Attached(counted, change)
    finally:
        bed.bpfrl("detach", "--pod-uid", bed.pod_uid)


@contextmanager
def _cooperating(bed: Lab, case: Case) -> Iterator[Attached]:
    """The same on a node whose pods cooperate: all processes of the lab are in cgroups below the one it is for."""
    where = ("--cooperate", "--cgroup", str(bed.cgroup_root))
    bed.bpfrl("attach", *where)
    try:
        with _bpfrl(bed, case) as attached:
            yield attached
    finally:
        bed.bpfrl("detach", *where)


def bpfrl_counters(bed: Lab) -> Json:
    """What ``bpfrl list`` says of the lab's pod."""
    items = json.loads(bed.bpfrl("list", "-o", "json").stdout)["items"]
    return next(item for item in items if item["uid"] == PodRef(bed.pod_uid).uid)


_LIMITERS: Final[dict[Limiter, Callable[[Lab, Case], AbstractContextManager[Attached]]]] = {
    "none": _no_limit,
    "bpfrl": _bpfrl,
    "cooperating": _cooperating,
    "cni": cni,
    "bucket": bucket,
}


def limiting(bed: Lab, case: Case) -> AbstractContextManager[Attached]:
    """Put the case's limiter in place for as long as the context lasts."""
    return _LIMITERS[case.limiter](bed, case)
