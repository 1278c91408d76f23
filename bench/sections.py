"""The page's tables: one for each group of cases, and one for the situations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, get_args

from bench.plan import FEW_FLOWS
from bench.record import Case, Group, Limiter, Measured, Results, Row, Traffic
from bench.tables import (
    FLOWS,
    IDLE_FIGURES,
    LIMIT,
    LIMITER,
    MIXED_FIGURES,
    NAMES,
    NOTHING,
    RTT,
    SHARING_FIGURES,
    TCP,
    TCP_FIGURES,
    UDP_FIGURES,
    UNLIMITED_FIGURES,
    Word,
    burst,
    case_table,
    count,
    limit,
    milliseconds,
    percent,
    settled,
    situation,
    table,
)
from bpfrl.units import Rate

_LIMITERS: Final[tuple[Limiter, ...]] = get_args(Limiter)
_TO: Final = Word("direction", lambda case: {"egress": "sent", "ingress": "received", "both": "both"}[case.direction])
_GIGABIT: Final = 10**9

_SITUATIONS_NOTE: Final = """\
Of bulk: the share of the limit at layer 3 (the rate itself where there is none), and the p99 of requests beside it. Of
new connections that fetch 100 KB each: the same share, p50, p99 and failures. Of QUIC: the share that is payload. A
live change is from low to high and back: the time until each has settled, and drops meanwhile. A late limit comes over
a load and goes again: the time until it has settled, drops after its first second, and the throughput when it is gone.
The CNI plugin is called only when a pod starts and when it ends, and has neither. A slow reader reads 1 Mbit/s: how
much of that it gets. A dash stands for what was not run.
"""


def section(title: str, *paragraphs: str) -> str:
    """A section of the page."""
    return "\n\n".join((f"## {title}", *(paragraph.strip() for paragraph in paragraphs)))


def situations(results: Results) -> str:
    """A row for each situation, a column for each limiter."""
    found: dict[Case, dict[Limiter, Row]] = {}
    for row in results.rows:
        if row.group == "situations":
            found.setdefault(_without_limiter(row.case), {})[row.case.limiter] = row
    # Without a limit, the case has no rate: it stands beside those that have one.
    unlimited = {replace(case, rate=None): case for case in found if case.rate}
    for case in [case for case in found if case.rate is None and case in unlimited]:
        found[unlimited[case]].update(found.pop(case))
    lines = [
        [situation(case), *(_headline(by_limiter.get(limiter)) for limiter in _LIMITERS)]
        for case, by_limiter in found.items()
    ]
    header = ("situation", *NAMES.values())
    return section("Situations", _SITUATIONS_NOTE, table(header, lines, len(header)))


def _without_limiter(case: Case) -> Case:
    return replace(case, limiter="none")


def _headline(row: Row | None) -> str:
    if row is None:
        return NOTHING
    measured = row.measured()
    return _HEADLINES[row.case.traffic](measured) if measured else "failed: see above"


def _rate(measured: Measured, rate: float) -> str:
    """A share of the limit, or the rate itself without one."""
    return percent(measured.of_limit(rate)) if measured.case.rate else _speed(rate)


def _speed(rate: float | None) -> str:
    if rate is None:
        return NOTHING
    return f"{rate / 1e9:.1f} Gbit/s" if rate >= _GIGABIT else f"{rate / 1e6:.1f} Mbit/s"


def _bulk(measured: Measured) -> str:
    figures = measured.figures
    if measured.case.direction == "both":
        sent, received = (percent(measured.of_limit(part)) for part in figures.parts)
        return f"{sent} sent, {received} received; p99 {milliseconds(figures.p99)}"
    return f"{_rate(measured, figures.layer3)}; p99 {milliseconds(figures.p99)}"


def _fetches(measured: Measured) -> str:
    extra = measured.figures.extra
    times = f"{milliseconds(extra['fetch_p50'])}, {milliseconds(extra['fetch_p99'])}"
    return f"{_rate(measured, measured.figures.layer3)}; {times}; {count(extra['failures'])} failed"


def _datagrams(measured: Measured) -> str:
    figures = measured.figures
    return f"{_rate(measured, figures.layer3)}; Jain {figures.jain or 0:.3f}; p99 {milliseconds(figures.p99)}"


def _quic(measured: Measured) -> str:
    lost = measured.figures.extra["lost"]
    return f"{_rate(measured, measured.figures.goodput)}{'' if lost is None else f'; {percent(lost)} lost'}"


def _change(measured: Measured) -> str:
    extra = measured.figures.extra
    return f"{settled(extra['raised'])}, {settled(extra['lowered'])}; {count(measured.figures.drops)} drops"


def _late(measured: Measured) -> str:
    extra = measured.figures.extra
    return (
        f"{settled(extra['settled'])}; {count(extra['dropped_later'])} drops; {_speed(extra['after'])} after"
        f" (before {_speed(extra['before'])})"
    )


def _reader(measured: Measured) -> str:
    slow = measured.figures.extra["slow"] or 0
    return f"{_bulk(measured)}; slow reader {percent(slow)}"


_HEADLINES: Final[dict[Traffic, Callable[[Measured], str]]] = {
    "tcp": _bulk,
    "fetches": _fetches,
    "datagrams": _datagrams,
    "quic": _quic,
    "change": _change,
    "late": _late,
    "reader": _reader,
}


def details(results: Results) -> list[str]:
    """A table for every group of cases, folded away where it is long."""
    egress, ingress = _rows(results, "egress"), _rows(results, "ingress")
    free = [row for row in (*egress, *ingress) if row.case.rate is None]
    udp = "What is lost is a share of what the sender's socket has taken; a queue may hold the sender up instead."
    mixed = f"One UDP flow at twice the limit and {FEW_FLOWS} of TCP."
    return [
        section("TCP that the pod sends", *_by_rate(egress, (FLOWS, TCP, LIMITER))),
        section("UDP at twice the limit", udp, case_table(_rows(results, "udp"), (LIMIT, LIMITER), UDP_FIGURES)),
        section("UDP beside TCP", mixed, case_table(_rows(results, "mixed"), (LIMIT, LIMITER), MIXED_FIGURES)),
        section("TCP that the pod receives", *_by_rate(ingress, (RTT, FLOWS, TCP, LIMITER))),
        _sharing(results),
        section(
            "Without a limit",
            "What this machine and its wire can carry, and what requests take when nothing else is on the way.",
            case_table(free, (_TO, RTT, FLOWS, TCP), UNLIMITED_FIGURES),
            case_table(_rows(results, "idle"), (RTT,), IDLE_FIGURES),
        ),
    ]


def _rows(results: Results, group: Group) -> list[Row]:
    """The rows of a group, by rate."""
    return sorted((row for row in results.rows if row.group == group), key=lambda row: row.case.rate or 0)


def _by_rate(rows: Sequence[Row], words: Sequence[Word]) -> list[str]:
    """A folded table for each rate."""
    folded = []
    for rate in dict.fromkeys(row.case.rate for row in rows if row.case.rate):
        here = [row for row in rows if row.case.rate == rate]
        shown = case_table(here, words, TCP_FIGURES)
        folded.append(f"<details><summary>{limit(here[0].case)}</summary>\n\n{shown}\n\n</details>")
    return folded


def _sharing(results: Results) -> str:
    note = "As many flows at an RTT of 20 ms as at one of 80 ms; the requests are at 20 ms."
    rows = sorted(_rows(results, "sharing"), key=lambda row: row.case.direction)
    return section("20 ms and 80 ms at once", note, case_table(rows, (_TO, LIMIT, FLOWS, LIMITER), SHARING_FIGURES))


def first_second(results: Results) -> str:
    """What each limiter's burst lets through."""
    lines = [
        [
            str(Rate(each.rate)),
            NAMES[each.limiter],
            "default" if each.burst is None else burst(each.burst),
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
    return section("The first second", note, table(header, lines, 3))
