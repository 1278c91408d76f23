"""Cases and figures in words, and as tables of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from bench.ends import fetches
from bench.record import Case, Limiter, Measured, Row
from bench.situations import HIGH_RATE, LOW_RATE, SOCKETS
from bpfrl.units import Rate

NAMES: Final[dict[Limiter, str]] = {
    "none": "no limit",
    "bpfrl": "bpfrl",
    "cooperating": "bpfrl, cooperating",
    "cni": "CNI bandwidth",
    "bucket": "token bucket",
}

NOTHING: Final = "-"
_ETHERNET_MTU: Final = 1500
_SHORT_FIGURES: Final = ((100, 0), (10, 1), (1, 2), (0, 3))


def situation(case: Case) -> str:
    """A case without its limiter: what those compared have in common."""
    limited = f"{limit(case)}, " * (case.rate is not None and case.traffic != "change")
    way = {"egress": "", "ingress": " to the pod", "both": " each way"}[case.direction]
    more = [f" over {rtt(case)}" * bool(case.rtts), ", IPv6" * case.ipv6]
    large = f", MTU {case.mtu}" * (case.mtu != _ETHERNET_MTU)
    return f"{limited}{_traffic(case)}{way}{''.join(more)}{large}"


def _traffic(case: Case) -> str:
    flows = f"{case.flows} {case.congestion} flow{'s' * (case.flows != 1)}" + " each" * (len(case.rtts) > 1)
    return {
        "tcp": flows,
        "udp": "UDP",
        "mixed": f"UDP and {flows}",
        "idle": "requests alone",
        "fetches": f"{fetches.WORKERS} workers on new connections",
        "datagrams": f"{SOCKETS} UDP sockets",
        "quic": "QUIC",
        "change": f"from {Rate(LOW_RATE)} to {Rate(HIGH_RATE)} and back, {flows}",
        "late": f"{case.flows} connections that were there before",
        "reader": f"a slow reader and {flows}",
    }[case.traffic]


def name(case: Case) -> str:
    """A case in a few words."""
    return f"{situation(case)}, {limiter(case)}"


def limit(case: Case) -> str:
    """The case's rate."""
    return str(Rate(case.rate)) if case.rate else "no limit"


def rtt(case: Case) -> str:
    """The round-trip times of the wire, or a dash where there is none."""
    return " and ".join(f"{each:g} ms" for each in case.rtts) or NOTHING


def limiter(case: Case) -> str:
    """The case's limiter, with its burst where that is not the usual one."""
    return NAMES[case.limiter] if case.burst is None else f"{NAMES[case.limiter]}, burst {burst(case.burst)}"


def burst(bits: int) -> str:
    """A burst in KiB where that is exact."""
    kibibytes, rest = divmod(bits, 8 * 1024)
    return f"{bits} bit" if rest else f"{kibibytes} KiB"


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{value * 100:.1f} %"


def milliseconds(value: float | None) -> str:
    """A time, or a dash."""
    return NOTHING if value is None else f"{significant(value)} ms"


def significant(value: float) -> str:
    """Three significant digits, but never less than a thousandth."""
    digits = next(digits for least, digits in _SHORT_FIGURES if value >= least)
    return f"{value:.{digits}f}"


def settled(time: float | None) -> str:
    """How long a limit took until it held; not at all where that has no end."""
    return "never" if time is None or math.isinf(time) else f"{time:.0f} ms"


def count(value: float | None) -> str:
    """A whole number, or a dash."""
    return NOTHING if value is None else f"{value:.0f}"


def table(titles: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> str:
    """A Markdown table; after the first columns, which are words, figures stand to the right."""
    rule = ["---"] * words + ["---:"] * (len(titles) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines))


class Word(NamedTuple):
    """A column that says which case it is."""

    title: str
    cell: Callable[[Case], str]


class Figure(NamedTuple):
    """A column with one of a case's figures."""

    title: str
    cell: Callable[[Measured], str]


def _jain(measured: Measured) -> str:
    return NOTHING if measured.figures.jain is None else f"{measured.figures.jain:.3f}"


def _p99(measured: Measured) -> str:
    """With what had no response at all."""
    lost = f" ({measured.figures.unanswered} unanswered)" * bool(measured.figures.unanswered)
    return milliseconds(measured.figures.p99) + lost


def _part(index: int) -> Callable[[Measured], str]:
    return lambda it: percent(it.of_limit(it.figures.parts[index]))


LIMIT: Final = Word("limit", limit)
RTT: Final = Word("RTT", rtt)
FLOWS: Final = Word("flows", lambda case: str(case.flows))
TCP: Final = Word("TCP", lambda case: case.congestion)
LIMITER: Final = Word("limiter", limiter)

GIGABITS: Final = Figure("payload, Gbit/s", lambda it: f"{it.figures.goodput / 1e9:.2f}")
PAYLOAD_SHARE: Final = Figure("payload", lambda it: percent(it.of_limit(it.figures.goodput)))
LAYER3_SHARE: Final = Figure("layer 3", lambda it: percent(it.of_limit(it.figures.layer3)))
PEAK_SHARE: Final = Figure("peak", lambda it: percent(it.of_limit(it.figures.peak)))
TCP_SHARE: Final = Figure("of it TCP", _part(0))
UDP_SHARE: Final = Figure("of it UDP", _part(1))
NEAR_SHARE: Final = Figure("at 20 ms", _part(0))
FAR_SHARE: Final = Figure("at 80 ms", _part(1))
UDP_LOST: Final = Figure("UDP lost", lambda it: percent(it.figures.udp_lost or 0))
JAIN: Final = Figure("Jain", _jain)
TCP_RTT: Final = Figure("TCP RTT", lambda it: milliseconds(it.figures.tcp_rtt))
P50: Final = Figure("p50", lambda it: milliseconds(it.figures.p50))
P99: Final = Figure("p99", _p99)
REQUESTS: Final = Figure("requests", lambda it: str(it.figures.requests))
DROPS: Final = Figure("drops", lambda it: count(it.figures.drops))
SENT_AGAIN: Final = Figure("sent again", lambda it: count(it.figures.retransmits))

TCP_FIGURES: Final = (PAYLOAD_SHARE, LAYER3_SHARE, PEAK_SHARE, JAIN, TCP_RTT, P50, P99, DROPS, SENT_AGAIN)
UDP_FIGURES: Final = (PAYLOAD_SHARE, LAYER3_SHARE, PEAK_SHARE, UDP_LOST, P50, P99, DROPS)
MIXED_FIGURES: Final = (
    LAYER3_SHARE, PEAK_SHARE, TCP_SHARE, UDP_SHARE, UDP_LOST, JAIN, TCP_RTT, P50, P99, DROPS, SENT_AGAIN,
)  # fmt: skip
SHARING_FIGURES: Final = (LAYER3_SHARE, NEAR_SHARE, FAR_SHARE, JAIN, P50, P99, DROPS, SENT_AGAIN)
UNLIMITED_FIGURES: Final = (GIGABITS, JAIN, TCP_RTT, P50, P99, SENT_AGAIN)
IDLE_FIGURES: Final = (REQUESTS, P50, P99)


def brief(row: Row) -> str:
    """The main figures of a row that has some, in one line."""
    measured = row.measured()
    if measured is None:
        return row.error
    shown = [PAYLOAD_SHARE, LAYER3_SHARE] if row.case.rate else [GIGABITS]
    cells = ", ".join(f"{figure.title} {figure.cell(measured)}" for figure in (*shown, JAIN, P99))
    extra = "".join(f", {key} {value}" for key, value in measured.figures.extra.items())
    return f"{cells}{extra}"


def case_table(rows: Iterable[Row], words: Sequence[Word], figures: Sequence[Figure]) -> str:
    """A table with a line for each row, those that have failed included."""
    lines = []
    for row in rows:
        measured = row.measured()
        cells = [figure.cell(measured) if measured else NOTHING for figure in figures]
        lines.append([*(word.cell(row.case) for word in words), *cells])
    titles = [*(word.title for word in words), *(figure.title for figure in figures)]
    return table(titles, lines, len(words))
