"""What the figures say: who is better at what, and what falls short.

Everything here is computed, also what speaks against bpfrl. A difference counts only beyond a margin, since two runs
of one case are never the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from bench.peers import CNI_BURST
from bench.record import Direction, Limiter, Measured, Row, Traffic
from bench.tables import JAIN, LAYER3_SHARE, PEAK_SHARE, PING_LONGEST, PING_MEAN, SENT_AGAIN, TCP_RTT, UDP_LOST, Figure

GROUPS: Final[dict[tuple[Traffic, Direction], str]] = {
    ("tcp", "egress"): "TCP sent",
    ("udp", "egress"): "UDP sent",
    ("mixed", "egress"): "UDP and TCP sent",
    ("tcp", "ingress"): "TCP received",
}


class Pair(NamedTuple):
    """The same case under both limiters."""

    bpfrl: Measured
    cni: Measured


@dataclass(frozen=True, slots=True)
class Measure:
    """One way of comparing.

    Attributes:
        title: what is compared.
        figure: how it is shown.
        loss: how bad a figure is, 0 at best; None where a case has no such figure.
        margin: losses no further apart than this are alike.
        ratio: and so are those of which neither is this many times the other.
        aim: bpfrl is meant to lose no more than this.
        missed: a miss of that aim in words.
    """

    title: str
    figure: Figure
    loss: Callable[[Measured], float | None]
    margin: float
    ratio: float
    aim: float
    missed: str

    def better(self, one: Measured, other: Measured) -> bool:
        """True when one is better than the other by more than the margin."""
        low, high = self.loss(one), self.loss(other)
        return low is not None and high is not None and high - low > self.margin and high > low * self.ratio


def _distance(measured: Measured) -> float:
    return abs(1 - measured.of_limit(measured.figures.layer3))


MEASURES: Final = (
    Measure(
        "distance from the limit at layer 3", LAYER3_SHARE, _distance,
        margin=0.01, ratio=1, aim=0.02, missed="more than 2 % away from it",
    ),
    Measure(
        "most in any second, the first included", PEAK_SHARE, lambda it: max(0.0, it.of_limit(it.figures.peak) - 1),
        margin=0.05, ratio=1, aim=0.25, missed="above 125 % of the limit",
    ),
    Measure(
        "fairness between flows (Jain's index)", JAIN, lambda it: 1 - it.figures.jain,
        margin=0.02, ratio=1, aim=0.05, missed="below 0.95",
    ),
    Measure(
        "UDP lost", UDP_LOST, lambda it: it.figures.udp_lost,
        margin=0.02, ratio=1, aim=0.02, missed="more than 2 %",
    ),
    Measure(
        "mean round trip of pings", PING_MEAN, lambda it: it.figures.ping_mean,
        margin=0.1, ratio=1.25, aim=1, missed="above 1 ms",
    ),
    Measure(
        "longest round trip of pings", PING_LONGEST, lambda it: it.figures.ping_max,
        margin=1, ratio=1.5, aim=10, missed="above 10 ms",
    ),
    Measure(
        "pings lost", Figure("pings lost", lambda it: str(it.figures.pings_lost)), lambda it: it.figures.pings_lost,
        margin=0.5, ratio=1, aim=0.5, missed="one or more",
    ),
    Measure(
        "mean round trip seen by TCP", TCP_RTT, lambda it: it.figures.tcp_rtt,
        margin=0.1, ratio=1.25, aim=1, missed="above 1 ms",
    ),
    Measure(
        "TCP segments sent again", SENT_AGAIN, lambda it: it.figures.retransmits,
        margin=5, ratio=1.25, aim=5, missed="more than 5",
    ),
)  # fmt: skip


class Score(NamedTuple):
    """How often each limiter is better by one measure in one group, and where the CNI plugin's lead is largest."""

    group: str
    measure: Measure
    cases: int
    bpfrl: int
    cni: int
    furthest: Pair | None


class Shortfall(NamedTuple):
    """Cases of one group in which bpfrl misses an aim, the worst first."""

    group: str
    measure: Measure
    cases: int
    missing: Sequence[Measured]


def usual(rows: Iterable[Row], group: tuple[Traffic, Direction], limiter: Limiter) -> list[Measured]:
    """What a limiter has reached in one group, with the burst that it is compared with."""
    found = [measured for row in rows if (measured := row.measured())]
    return [
        each
        for each in found
        if (each.case.traffic, each.case.direction, each.case.limiter) == (*group, limiter)
        and each.case.burst in (None, CNI_BURST)
    ]


def pairs(rows: Sequence[Row], group: tuple[Traffic, Direction]) -> list[Pair]:
    """The cases of a group that both limiters have finished."""
    theirs = {each.case: each for each in usual(rows, group, "cni")}
    ours = [(each, replace(each.case, limiter="cni", burst=CNI_BURST)) for each in usual(rows, group, "bpfrl")]
    return [Pair(each, theirs[twin]) for each, twin in ours if twin in theirs]


def scores(rows: Sequence[Row]) -> list[Score]:
    """Every measure in every group that has it."""
    found = []
    for group, title in GROUPS.items():
        members = pairs(rows, group)
        for measure in MEASURES:
            having = [pair for pair in members if None not in map(measure.loss, pair)]
            if having:
                found.append(_score(title, measure, having))
    return found


def _score(group: str, measure: Measure, members: Sequence[Pair]) -> Score:
    def lead(pair: Pair) -> float:
        return (measure.loss(pair.bpfrl) or 0) - (measure.loss(pair.cni) or 0)

    ahead = [pair for pair in members if measure.better(pair.bpfrl, pair.cni)]
    behind = [pair for pair in members if measure.better(pair.cni, pair.bpfrl)]
    return Score(group, measure, len(members), len(ahead), len(behind), max(behind, key=lead, default=None))


def shortfalls(rows: Sequence[Row]) -> list[Shortfall]:
    """Every aim that bpfrl misses."""
    found = []
    for group, title in GROUPS.items():
        members = usual(rows, group, "bpfrl")
        for measure in MEASURES:
            losses = [(loss, each) for each in members if (loss := measure.loss(each)) is not None]
            missing = sorted((pair for pair in losses if pair[0] > measure.aim), key=lambda pair: -pair[0])
            if missing:
                found.append(Shortfall(title, measure, len(losses), [each for _, each in missing]))
    return found
