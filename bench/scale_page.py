"""What :mod:`bench.scale` has measured: how it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench.converge import Spread
from bench.record import Machine

FIGURES: Final = Path(__file__).parent / "results" / "scale.json"
MEBI: Final = 2**20


@dataclass(frozen=True, slots=True)
class Churned:
    """A time in which pods changed.

    Attributes:
        changes: how many changes nodes were to be told of.
        delays: how long that took, ms.
        cpu: the master's CPU time, % of a CPU.
        memory: the master's memory at the end, MiB.
        relisting: how long it took to list all pods meanwhile, s; 0 where that was not needed.
    """

    changes: int
    delays: Spread
    cpu: float
    memory: float
    relisting: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One cluster.

    Attributes:
        nodes: how many.
        pods: how many.
        limited: how many of them are limited.
        load: the machine's before the start.
        converged: from the master's start until every node had what it should have, s.
        converging_cpu: the master's CPU time until then, s.
        peak: the most memory that the master had until then, MiB.
        steady: its memory some seconds later, MiB.
        resting_cpu: its CPU time while nothing changes, % of a CPU.
        churned: while pods changed.
        relisted: while pods changed, and all had to be listed again.
        refusing: how many nodes refused connections later.
        silent: how many did not answer then.
        cut: while pods changed and those nodes could not be reached; of changes on the others.
        mended: how long it took until they had what they should have when they could be reached again, s.
        highest: the most memory that the master had in all that, MiB.
        wrong: calls that a node would have refused.
    """

    nodes: int
    pods: int
    limited: int
    load: float
    converged: float
    converging_cpu: float
    peak: float
    steady: float
    resting_cpu: float
    churned: Churned
    relisted: Churned
    refusing: int
    silent: int
    cut: Churned
    mended: float
    highest: float
    wrong: int


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured.

    Attributes:
        machine: where.
        command: what measures it again.
        rate: changes of pods in a second.
        measured: the clusters, the smallest first.
    """

    machine: Machine
    command: str
    rate: float
    measured: Sequence[Measured]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def refresh():
    return []
