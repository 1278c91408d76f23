"""What the limiter costs the machine: throughput where there is no other limit, and time in its programs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

from bench.plan import FAR_RATE, NEAR_RATE
from bench.record import Cost, Headroom, Limiter, Results
from bench.sections import section
from bench.tables import NAMES, NOTHING, percent, table
from bench.traffic import PAYLOAD
from bpfrl.units import Rate

# The payload of a limit on packets of 1500 byte.
_CEILING: Final = PAYLOAD / 1500 * NEAR_RATE
_GIGABIT: Final = 10**9

_PROGRAMS_NOTE: Final = """\
The kernel's account (`kernel.bpf_stats_enabled`), which is off in all other runs. Reading the clock twice is part of
each run: **empty** is what a program that only returns is charged in the same place, right after it, and **net** is
without that. A **packet** is one on the wire in the direction of the traffic; a program runs once for a **GSO packet**
of many, and sockops runs at TCP's own events.
"""


class Spent(NamedTuple):
    """The net time, ns, of programs while one kind of traffic was held to a rate.

    Attributes:
        packet: in all programs, for each wire packet.
        sockops: in sockops, for each GSO packet.
    """

    packet: float
    sockops: float


def sentences(results: Results) -> list[str]:
    """What throughput is left, and what a packet costs."""
    lines = []
    shares = [share for flows in _flows(results.headroom) if (share := _of_possible(results.headroom, flows))]
    if shares:
        lines.append(
            f"- **At {Rate(NEAR_RATE)}** bpfrl reaches {percent(min(shares))} to {percent(max(shares))} of what the"
            f" same machine does with the limit at {Rate(FAR_RATE)}, or of the limit where that is less."
        )
    now, before = spent(results.costs), spent(results.before.costs)
    fastest = ("tcp", "egress", _GIGABIT)
    if fastest in now:
        earlier = f"; on {results.before.date} it was {before[fastest].packet:.0f} ns" if fastest in before else ""
        lines.append(
            f"- **A packet** of TCP sent at {Rate(_GIGABIT)} takes {now[fastest].packet:.0f} ns in bpfrl's"
            f" programs{earlier}."
        )
    return lines


def throughput(results: Results) -> str:
    """What bpfrl reaches with a limit near what the machine can do, with one out of reach, and no limit."""
    lines = []
    for each in sorted(results.headroom, key=lambda each: (each.flows, each.rate or FAR_RATE + 1)):
        values = (median(each.goodputs), min(each.goodputs), max(each.goodputs))
        figures = [f"{value / 1e9:.2f}" for value in values]
        limiter = NAMES[each.limiter] + (f" at {Rate(each.rate)}" if each.rate else "")
        lines.append([str(each.flows), limiter, str(len(each.goodputs)), *figures, _compared(results.headroom, each)])
    note = (
        "The same flows in turn, without requests beside them; payload in Gbit/s. **Of what is possible** compares the"
        f" medians: {Rate(NEAR_RATE)} with {Rate(FAR_RATE)}, or with the payload of the limit where that is less, and"
        f" {Rate(FAR_RATE)} with no limit."
    )
    header = ("flows", "limiter", "runs", "median", "lowest", "highest", "of what is possible")
    return section("Where the machine is the limit", note, table(header, lines, 2))


def _compared(found: Sequence[Headroom], each: Headroom) -> str:
    if each.rate == NEAR_RATE:
        share = _of_possible(found, each.flows)
    elif each.rate == FAR_RATE:
        free = _median(found, each.flows, "none", None)
        share = median(each.goodputs) / free if free else None
    else:
        share = None
    return NOTHING if share is None else percent(share)


def _flows(found: Sequence[Headroom]) -> list[int]:
    return sorted({each.flows for each in found})


def _of_possible(found: Sequence[Headroom], flows: int) -> float | None:
    """What is reached with the limit near, as a share of what could be."""
    near, far = (_median(found, flows, "bpfrl", rate) for rate in (NEAR_RATE, FAR_RATE))
    return near / min(far, _CEILING) if near and far else None


def _median(found: Sequence[Headroom], flows: int, limiter: Limiter, rate: int | None) -> float | None:
    here = [each for each in found if (each.flows, each.limiter, each.rate) == (flows, limiter, rate)]
    return median(here[0].goodputs) if here else None


def programs(results: Results) -> str:
    """The time in each program, and in all of them beside what an earlier version took."""
    header = ("traffic", "limit", "program", "runs", "ns a run", "empty", "packets", "net ns a packet")
    each = table(header, [_cells(cost) for cost in results.costs], 3)
    now, before = spent(results.costs), spent(results.before.costs)
    lines = [
        [_kind(traffic, direction), str(Rate(rate)), *_spent_cells(found), *_spent_cells(before.get(key))]
        for key, found in now.items()
        for traffic, direction, rate in [key]
    ]
    columns = ("all, a packet", "sockops, a GSO packet")
    earlier = [f"{column}, {results.before.date}" for column in columns]
    together = table(("traffic", "limit", *columns, *earlier), lines, 2)
    return section("What the programs cost", _PROGRAMS_NOTE, f"Net ns:\n\n{together}", each)


def spent(costs: Sequence[Cost]) -> dict[tuple[str, str, int], Spent]:
    """What all programs took, by traffic, direction and rate."""
    by_kind: dict[tuple[str, str, int], dict[str, Cost]] = {}
    for cost in costs:
        by_kind.setdefault((cost.traffic, cost.direction, cost.rate), {})[cost.program] = cost
    return {
        kind: Spent(
            packet=sum(cost.net_ns for cost in by_program.values()) / by_program["egress"].packets,
            sockops=by_program["sockops"].net_ns / by_program[kind[1]].runs,
        )
        for kind, by_program in by_kind.items()
    }


def _spent_cells(found: Spent | None) -> list[str]:
    return [f"{found.packet:.0f}", f"{found.sockops:.0f}"] if found else [NOTHING, NOTHING]


def _kind(traffic: str, direction: str) -> str:
    return f"{traffic.upper()} {'sent' if direction == 'egress' else 'received'}"


def _cells(cost: Cost) -> list[str]:
    figures = (f"{cost.run_ns:.0f}", f"{cost.empty_ns:.0f}", str(cost.packets), f"{cost.net_ns / cost.packets:.1f}")
    kind = _kind(cost.traffic, cost.direction)
    return [kind, str(Rate(cost.rate)), cost.program, str(cost.runs), *figures]
