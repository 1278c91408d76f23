"""What the figures say: who is better at what, and what falls short.

Everything here is computed, also what speaks against bpfrl. A difference counts only beyond a margin, since two runs
of one case are never the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final, NamedTuple

from bench.ends import fetches
from bench.record import Case, Group, Limiter, Measured, Row
from bench.situations import HIGH_RATE
from bench.tables import (
    JAIN,
    LAYER3_SHARE,
    P50,
    P99,
    PAYLOAD_SHARE,
    PEAK_SHARE,
    SENT_AGAIN,
    TCP_RTT,
    UDP_LOST,
    Figure,
    milliseconds,
    settled,
)

GROUPS: Final[dict[Group, str]] = {
    "egress": "TCP sent",
    "udp": "UDP sent",
    "mixed": "UDP and TCP sent",
    "ingress": "TCP received",
    "sharing": "20 and 80 ms at once",
    "situations": "situations",
}
# Those of which all cases are alike but for numbers.
TRAFFIC: Final[tuple[Group, ...]] = ("egress", "udp", "mixed", "ingress", "sharing")
OURS: Final[tuple[Limiter, ...]] = ("bpfrl", "cooperating")
PEERS: Final[tuple[Limiter, ...]] = ("cni", "bucket")


# What an object takes when all workers have the same share of the limit.
FAIR_FETCH_MS: Final = fetches.WORKERS * fetches.OBJECT_BYTES * 8 / HIGH_RATE * 1000


class Pair(NamedTuple):
    """The same case under two limiters."""

    ours: Measured
    theirs: Measured


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


def _distance(measured: Measured) -> float | None:
    return abs(1 - measured.of_limit(measured.figures.layer3)) if measured.figures.layer3 else None


def _unfairness(measured: Measured) -> float | None:
    return None if measured.figures.jain is None else 1 - measured.figures.jain


def waited(measured: Measured, time: float | None) -> float | None:
    """What a request waited for, besides the way: that goes to the nearest of the case's far ends."""
    return None if time is None else max(0.0, time - min(measured.case.rtts, default=0.0))


def _tcp_waited(measured: Measured) -> float | None:
    found = measured.figures.tcp_rtt
    return None if found is None else max(0.0, found - fmean(measured.case.rtts or (0.0,)))


def _quic_missing(measured: Measured) -> float | None:
    return 1 - measured.of_limit(measured.figures.goodput) if measured.case.traffic == "quic" else None


def _settling(measured: Measured) -> float | None:
    """The longest time until a limit had settled; what never does has no end."""
    times = [measured.figures.extra[key] for key in ("raised", "lowered", "settled") if key in measured.figures.extra]
    return max((math.inf if time is None else time for time in times), default=None)


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
        "fairness between flows (Jain's index)", JAIN, _unfairness,
        margin=0.02, ratio=1, aim=0.05, missed="below 0.95",
    ),
    Measure(
        "UDP lost", UDP_LOST, lambda it: it.figures.udp_lost,
        margin=0.02, ratio=1, aim=0.02, missed="more than 2 %",
    ),
    Measure(
        "requests, p50", P50, lambda it: waited(it, it.figures.p50),
        margin=0.3, ratio=1.25, aim=1, missed="more than 1 ms above the way's own",
    ),
    Measure(
        "requests, p99", P99, lambda it: waited(it, it.figures.p99),
        margin=1, ratio=1.5, aim=10, missed="more than 10 ms above the way's own",
    ),
    Measure(
        "requests unanswered", Figure("unanswered", lambda it: str(it.figures.unanswered)),
        lambda it: it.figures.unanswered,
        margin=0.5, ratio=1, aim=0.5, missed="one or more",
    ),
    Measure(
        "mean round trip seen by TCP", TCP_RTT, _tcp_waited,
        margin=0.3, ratio=1.25, aim=1, missed="more than 1 ms above the way's own",
    ),
    Measure(
        "TCP segments sent again", SENT_AGAIN, lambda it: it.figures.retransmits,
        margin=5, ratio=1.25, aim=5, missed="more than 5",
    ),
    Measure(
        "fetches over new connections, p99",
        Figure("p99 of a fetch", lambda it: milliseconds(it.figures.extra["fetch_p99"])),
        lambda it: it.figures.extra.get("fetch_p99"),
        margin=5, ratio=1.25, aim=2 * FAIR_FETCH_MS, missed="more than twice what an even share takes",
    ),
    Measure(
        "payload of QUIC", PAYLOAD_SHARE, _quic_missing,
        margin=0.01, ratio=1, aim=0.1, missed="less than 90 % of the limit",
    ),
    Measure(
        "time until a limit has settled", Figure("settled", lambda it: settled(_settling(it))), _settling,
        margin=100, ratio=1.25, aim=1000, missed="more than a second, or never",
    ),
)  # fmt: skip


class Score(NamedTuple):
    """How often each of two limiters is better by one measure in one group, and where the peer's lead is largest."""

    group: Group
    measure: Measure
    ours: Limiter
    peer: Limiter
    cases: int
    ahead: int
    behind: int
    furthest: Pair | None

    @property
    def alike(self) -> int:
        """In how many cases neither is."""
        return self.cases - self.ahead - self.behind


class Shortfall(NamedTuple):
    """Cases of one group in which bpfrl misses an aim, the worst first."""

    group: Group
    ours: Limiter
    measure: Measure
    cases: int
    missing: Sequence[Measured]


def usual(rows: Iterable[Row], group: Group, limiter: Limiter) -> list[Measured]:
    """What a limiter has reached in one group, with the burst that it is compared with."""
    found = [measured for row in rows if row.group == group and (measured := row.measured())]
    return [each for each in found if each.case.limiter == limiter and each.case.burst is None]


def in_common(rows: Sequence[Row], group: Group) -> dict[Limiter, list[Measured]]:
    """What the limiters of a group have reached in the cases that all of them have finished."""
    found = {limiter: members for limiter in (*OURS, *PEERS) if (members := usual(rows, group, limiter))}
    cases = [{_without_limiter(each.case) for each in members} for members in found.values()]
    common = set.intersection(*cases) if cases else set()
    return {
        limiter: [each for each in members if _without_limiter(each.case) in common]
        for limiter, members in found.items()
        if common
    }


def _without_limiter(case: Case) -> Case:
    return replace(case, limiter="none")


def pairs(rows: Sequence[Row], group: Group, ours: Limiter, peer: Limiter) -> list[Pair]:
    """The cases of a group that both of two limiters have finished."""
    theirs = {each.case: each for each in usual(rows, group, peer)}
    mine = [(each, replace(each.case, limiter=peer)) for each in usual(rows, group, ours)]
    return [Pair(each, theirs[twin]) for each, twin in mine if twin in theirs]


def scores(rows: Sequence[Row]) -> list[Score]:
    """Every measure in every group that has it, against every peer."""
    found = []
    for group in GROUPS:
        for measure in MEASURES:
            for ours in OURS:
                for peer in PEERS:
                    members = pairs(rows, group, ours, peer)
                    having = [pair for pair in members if None not in map(measure.loss, pair)]
                    if having:
                        found.append(_score(group, measure, ours, peer, having))
    return found


def _score(group: Group, measure: Measure, ours: Limiter, peer: Limiter, members: Sequence[Pair]) -> Score:
    def lead(pair: Pair) -> float:
        return (measure.loss(pair.ours) or 0) - (measure.loss(pair.theirs) or 0)

    ahead = sum(measure.better(pair.ours, pair.theirs) for pair in members)
    behind = [pair for pair in members if measure.better(pair.theirs, pair.ours)]
    furthest = max(behind, key=lead, default=None)
    return Score(group, measure, ours, peer, len(members), ahead, len(behind), furthest)


def shortfalls(rows: Sequence[Row]) -> list[Shortfall]:
    """Every aim that bpfrl misses."""
    found = []
    for group in GROUPS:
        for ours in OURS:
            members = usual(rows, group, ours)
            for measure in MEASURES:
                losses = [(loss, each) for each in members if (loss := measure.loss(each)) is not None]
                missing = sorted((pair for pair in losses if pair[0] > measure.aim), key=lambda pair: -pair[0])
                if missing:
                    found.append(Shortfall(group, ours, measure, len(losses), [each for _, each in missing]))
    return found
