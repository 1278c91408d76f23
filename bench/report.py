"""The page about the figures, made from nothing but the figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from bench.findings import GROUPS, scores, shortfalls, usual
from bench.peers import CNI_BURST
from bench.plan import FAR_RATE, FEW_FLOWS
from bench.record import Cost, Direction, Measured, Results, Row, Traffic
from bench.tables import (
    FLOWS,
    LIMIT,
    LIMITER,
    MIXED_FIGURES,
    NAMES,
    NOTHING,
    TCP,
    TCP_FIGURES,
    UDP_FIGURES,
    UNLIMITED_FIGURES,
    Figure,
    burst,
    case_table,
    name,
    percent,
    significant,
    situation,
    table,
)
from bench.traffic import MTU, PAYLOAD, PING_SECONDS, UDP_PACKET
from bpfrl.units import Rate

_ETHERNET: Final = 14
_WORST_SHOWN: Final = 3

_HEAD: Final = """\
<!-- Made by bench/report.py from bench/results/latest.json: run `make bench`, do not edit. -->
# Benchmarks

bpfrl beside the CNI bandwidth plugin (tbf queues on the host's end of the veth and on an ifb device), and beside no
limit, measured by one command on one machine. The figures on this page, and what is said of them, are computed from
that run.
"""

_CAPTION: Final = """\
A dot is a case: a number of flows, with one congestion control. A bar is the median of a limiter's cases at a rate.
"""

_METHOD: Final = """\
## What is measured, and how

- A pod-like cgroup in a network namespace sends over a veth to a peer in another. Nothing else is on that path: without
  load, a round trip takes some tens of microseconds. Every run has fresh namespaces.
- bpfrl is attached by `bpfrl attach --rate`. The CNI plugin is called as a container runtime calls it, with the same
  rate in both directions and a burst of {burst} unless a row says otherwise: it has to be given one, and its queue
  has room for the burst and 25 ms of the rate.
- What is compared runs one after the other, so that a noisy minute of the machine falls on both.
- **payload** is what the receiving iperf3 counts, after the first second; **layer 3** is the same with headers
  ({mtu} byte for {payload} of TCP, {udp} for {payload} of UDP). bpfrl's limit is one at layer 3, of which TCP's payload
  is at most {ceiling}. A tbf counts the Ethernet header as well: where it is exact, {tbf} of the limit are left
  at layer 3.
- **peak** is the most that passed at layer 3 in any second, the first included, in which credits are spent.
- **Jain** is Jain's index of the flows' payloads: 1 when all are alike.
- **TCP RTT** is the mean of the senders' own mean round-trip times. **ping** is sent from the pod at the same time,
  every {ping} s.
- **drops** are the limiter's own count, first second included: wire packets for bpfrl; for tbf what it queues, where
  many segments may be one packet. **sent again** are TCP's retransmits.
- bpfrl's own counters are checked on the way:
  {check}
"""

_COST_NOTE: Final = """\
The kernel's account (`kernel.bpf_stats_enabled`), which is off in all other runs. Reading the clock twice is part of
each run: **empty** is what a program that only returns is charged in the same place, right after it. **ns a packet** is
all of a program's time, divided by the wire packets that the pod sent: a program runs once for a GSO packet of many
segments, and sockops runs at TCP's own events.
"""

_REPEAT: Final = """\
## Repeat it

As root on a quiet machine with iperf3, bpftool, clang and the CNI plugins
(Debian: `apt install iperf3 bpftool clang containernetworking-plugins`):

    make bench                                       # everything: some 20 minutes
    python -m bench.run --quick --output somewhere   # a subset: some 3 minutes
    python -m bench.run --report-only                # this page again, from the JSON
"""


def write(results: Results, path: Path, plot: Path) -> None:
    """Write the page, with the plot shown in it."""
    picture = Path(os.path.relpath(plot, path.parent)).as_posix()
    sections = [
        _HEAD,
        _machine(results),
        f"![Payload and round trips by rate, bpfrl beside the CNI plugin]({picture})\n\n{_CAPTION}",
        _overview(results),
        _comparison(results),
        _failings(results),
        _method(results),
        *_tcp_sent(results),
        _udp(results),
        _mixed(results),
        _ingress(results),
        _unlimited(results),
        _headroom(results),
        _first_second(results),
        _costs(results),
        _REPEAT,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(section.strip() for section in sections) + "\n")


def _section(title: str, *paragraphs: str) -> str:
    return "\n\n".join((f"## {title}", *(paragraph.strip() for paragraph in paragraphs)))


def _machine(results: Results) -> str:
    facts = results.machine
    lines = [
        f"- {facts.date}, {facts.cpus} x {facts.cpu}, kernel {facts.kernel}, load {facts.load:.2f} before the start",
        f"- runs of {results.seconds} s, {results.minutes:.0f} minutes in all: `{results.command}`",
        f"- {'; '.join(f'{tool}: {version}' for tool, version in facts.tools.items())}",
    ]
    return "\n".join(lines)


def _overview(results: Results) -> str:
    """One line for each limiter in each group."""
    lines = []
    for group, title in GROUPS.items():
        for limiter in ("bpfrl", "cni"):
            members = usual(results.rows, group, limiter)
            if members:
                lines.append([title, NAMES[limiter], *_summary(members)])
    header = ("traffic", "limiter", "cases", "layer 3", "Jain", "ping, mean", "ping, longest", "sent again")
    note = "The median of the cases, and in brackets the lowest and the highest. Layer 3 is a share of the limit."
    return _section("At a glance", note, table(header, lines, 2))


def _summary(members: Sequence[Measured]) -> list[str]:
    def spread(value: Callable[[Measured], float | None], show: Callable[[float], str], unit: str = "") -> str:
        values = [found for measured in members if (found := value(measured)) is not None]
        if not values:
            return NOTHING
        return f"{show(median(values))}{unit} ({show(min(values))} to {show(max(values))})"

    return [
        str(len(members)),
        spread(lambda it: 100 * it.of_limit(it.figures.layer3), lambda value: f"{value:.1f}", " %"),
        spread(lambda it: it.figures.jain, lambda value: f"{value:.3f}"),
        spread(lambda it: it.figures.ping_mean, significant, " ms"),
        spread(lambda it: it.figures.ping_max, significant, " ms"),
        spread(lambda it: it.figures.retransmits, lambda value: f"{value:.0f}"),
    ]


def _comparison(results: Results) -> str:
    lines = []
    for score in scores(results.rows):
        alike = score.cases - score.bpfrl - score.cni
        if alike == score.cases:
            continue
        lead = NOTHING
        if score.furthest:
            ours, theirs = (score.measure.figure.cell(measured) for measured in score.furthest)
            lead = f"{theirs} against {ours} ({situation(score.furthest.bpfrl.case)})"
        counts = (score.cases, score.bpfrl, alike, score.cni)
        lines.append([score.group, score.measure.title, *map(str, counts), lead])
    header = ("traffic", "measure", "cases", "bpfrl better", "alike", "CNI better", "where the CNI plugin leads most")
    note = (
        "In how many cases each is better. Differences within a margin (`bench/findings.py`) count as alike; measures"
        " by which all cases are alike are left out."
    )
    return _section("Where each is better", note, table(header, lines, 2))


def _failings(results: Results) -> str:
    misses = [
        f"- {found.group}, {found.measure.title}: {found.measure.missed} in {len(found.missing)} of {found.cases}"
        f" cases, worst {'; '.join(_worst(found.measure.figure, found.missing))}."
        for found in shortfalls(results.rows)
    ]
    failures = [f"- {name(row.case)}: no figures, {row.error}." for row in results.rows if row.error]
    lines = [*misses, *_headroom_losses(results), *failures] or ["Nothing in these figures."]
    note = "Where bpfrl misses what it aims at, what it costs, and what could not be measured."
    return _section("What is not good", note, "\n".join(lines))


def _worst(figure: Figure, missing: Sequence[Measured]) -> list[str]:
    return [f"{figure.cell(measured)} ({situation(measured.case)})" for measured in missing[:_WORST_SHOWN]]


def _headroom_losses(results: Results) -> list[str]:
    """Where the median with an unreachable limit is below the one without."""
    runs = {(each.flows, each.limiter): each.goodputs for each in results.headroom}
    lines = []
    for flows in sorted({flows for flows, limiter in runs if {(flows, "none"), (flows, "bpfrl")} <= runs.keys()}):
        free, ours = runs[flows, "none"], runs[flows, "bpfrl"]
        loss = 1 - median(ours) / median(free)
        if loss > 0:
            lines.append(
                f"- Attached with a limit out of reach, bpfrl takes {percent(loss)} of the throughput of"
                f" {_flows(flows)} (medians; {median(free) / 1e9:.1f} Gbit/s without it, where the runs themselves are"
                f" {percent((max(free) - min(free)) / median(free))} apart)."
            )
    return lines


def _flows(number: int) -> str:
    return f"{number} TCP flow{'s' * (number != 1)}"


def _method(results: Results) -> str:
    checks = [row.figures.counted for row in results.rows if row.figures and row.figures.counted]
    check = (
        f"they have {percent(median(checks))} of the bytes that follow from the payload received (median;"
        f" {percent(min(checks))} to {percent(max(checks))}). Pings, handshakes, what is sent again and what is still"
        "\n  under way at the end come on top, and weigh most where the limit is low."
        if checks
        else "not in this run."
    )
    return _METHOD.format(
        burst=burst(CNI_BURST),
        mtu=MTU,
        payload=PAYLOAD,
        udp=UDP_PACKET,
        ceiling=percent(PAYLOAD / MTU),
        tbf=percent(MTU / (MTU + _ETHERNET)),
        ping=PING_SECONDS,
        check=check,
    )


def _limited(results: Results, traffic: Traffic, direction: Direction) -> list[Row]:
    """The rows of a group, by rate."""
    group = (traffic, direction)
    found = [row for row in results.rows if (row.case.traffic, row.case.direction) == group and row.case.rate]
    return sorted(found, key=lambda row: row.case.rate or 0)


def _tcp_sent(results: Results) -> list[str]:
    """A table for each rate."""
    members = _limited(results, "tcp", "egress")
    sections = []
    for rate in dict.fromkeys(row.case.rate for row in members):
        here = [row for row in members if row.case.rate == rate]
        title = f"TCP that the pod sends at {LIMIT.cell(here[0].case)}"
        sections.append(_section(title, case_table(here, (FLOWS, TCP, LIMITER), TCP_FIGURES)))
    return sections


def _udp(results: Results) -> str:
    note = "What is lost is a share of what the sender's socket has taken; a queue may hold the sender up instead."
    members = _limited(results, "udp", "egress")
    return _section("UDP at twice the limit", note, case_table(members, (LIMIT, LIMITER), UDP_FIGURES))


def _mixed(results: Results) -> str:
    note = f"One UDP flow and {FEW_FLOWS} of TCP at once."
    members = _limited(results, "mixed", "egress")
    return _section("UDP at twice the limit beside TCP", note, case_table(members, (LIMIT, LIMITER), MIXED_FIGURES))


def _ingress(results: Results) -> str:
    members = _limited(results, "tcp", "ingress")
    return _section("TCP that the pod receives", case_table(members, (LIMIT, FLOWS, TCP, LIMITER), TCP_FIGURES))


def _unlimited(results: Results) -> str:
    members = [row for row in results.rows if row.case.limiter == "none"]
    return _section(
        "Without a limit", "What this machine can do.", case_table(members, (FLOWS, TCP), UNLIMITED_FIGURES)
    )


def _headroom(results: Results) -> str:
    lines = []
    for each in sorted(results.headroom, key=lambda each: each.flows):
        values = (median(each.goodputs), min(each.goodputs), max(each.goodputs))
        figures = [f"{value / 1e9:.2f}" for value in values]
        lines.append([str(each.flows), NAMES[each.limiter], str(len(each.goodputs)), *figures])
    note = (
        f"bpfrl at {Rate(FAR_RATE)} against no limit, in turn: what the programs cost where the machine is the limit."
        " Payload in Gbit/s."
    )
    header = ("flows", "limiter", "runs", "median", "lowest", "highest")
    return _section("A limit out of reach", note, table(header, lines, 2))


def _first_second(results: Results) -> str:
    lines = [
        [
            str(Rate(each.rate)),
            NAMES[each.limiter],
            burst(each.burst),
            f"{each.payload / 1e6:.2f} MB",
            f"{each.payload * 8 / each.rate:.2f}",
        ]
        for each in results.first_second
    ]
    note = (
        "The payload that one TCP flow gets through in the first second, and how many seconds of the limit that is."
        " The largest burst is what container runtimes pass to the plugin when nobody has chosen one."
    )
    header = ("limit", "limiter", "burst", "payload", "seconds of the limit")
    return _section("The first second", note, table(header, lines, 3))


def _costs(results: Results) -> str:
    header = ("traffic", "limit", "program", "runs", "ns a run", "empty", "wire packets", "ns a packet")
    programs = table(header, [_cost_cells(cost) for cost in results.costs], 3)
    totals: dict[tuple[str, int], float] = {}
    for cost in results.costs:
        totals[cost.traffic, cost.rate] = totals.get((cost.traffic, cost.rate), 0) + cost.packet_ns
    sums = [[traffic.upper(), str(Rate(rate)), f"{total:.0f}"] for (traffic, rate), total in totals.items()]
    together = table(("traffic", "limit", "ns a packet, all programs"), sums, 2)
    return _section("What the programs cost", _COST_NOTE, programs, together)


def _cost_cells(cost: Cost) -> list[str]:
    figures = (f"{cost.run_ns:.0f}", f"{cost.empty_ns:.0f}", str(cost.packets), f"{cost.packet_ns:.1f}")
    return [cost.traffic.upper(), str(Rate(cost.rate)), cost.program, str(cost.runs), *figures]
