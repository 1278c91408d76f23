"""Cases and figures in words, and as tables of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from bench.peers import CNI_BURST
from bench.record import Case, Limiter, Measured, Row
from bpfrl.units import Rate

NAMES: Final[dict[Limiter, str]] = {"none": "no limit", "bpfrl": "bpfrl", "cni": "CNI bandwidth"}

NOTHING: Final = "-"
_SHORT_FIGURES: Final = ((100, 0), (10, 1), (1, 2), (0, 3))


def situation(case: Case) -> str:
    """A case without its limiter: what those compared have in common."""
    flows = f"{case.flows} {case.congestion} flow{'s' * (case.flows != 1)}"
    traffic = {"tcp": flows, "udp": "UDP", "mixed": f"UDP and {flows}"}[case.traffic]
    limited = f"{limit(case)}, " * (case.rate is not None)
    return f"{limited}{traffic}{' to the pod' * (case.direction == 'ingress')}"


def name(case: Case) -> str:
    """A case in a few words."""
    return f"{situation(case)}, {limiter(case)}"


def limit(case: Case) -> str:
    """The case's rate."""
    return str(Rate(case.rate)) if case.rate else "no limit"


def limiter(case: Case) -> str:
    """The case's limiter, with its burst where that is not the usual one."""
    usual = case.burst in (None, CNI_BURST)
    return NAMES[case.limiter] if usual else f"{NAMES[case.limiter]}, burst {burst(case.burst)}"


def burst(bits: int | None) -> str:
    """A burst in KiB where that is exact."""
    if bits is None:
        return "default"
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


LIMIT: Final = Word("limit", limit)
FLOWS: Final = Word("flows", lambda case: str(case.flows))
TCP: Final = Word("TCP", lambda case: case.congestion)
LIMITER: Final = Word("limiter", limiter)

GIGABITS: Final = Figure("payload, Gbit/s", lambda it: f"{it.figures.goodput / 1e9:.2f}")
PAYLOAD_SHARE: Final = Figure("payload", lambda it: percent(it.of_limit(it.figures.goodput)))
LAYER3_SHARE: Final = Figure("layer 3", lambda it: percent(it.of_limit(it.figures.layer3)))
PEAK_SHARE: Final = Figure("peak", lambda it: percent(it.of_limit(it.figures.peak)))
UDP_SHARE: Final = Figure("of it UDP", lambda it: percent(it.of_limit(it.figures.udp_layer3)))
TCP_SHARE: Final = Figure("of it TCP", lambda it: percent(it.of_limit(it.figures.layer3 - it.figures.udp_layer3)))
UDP_LOST: Final = Figure("UDP lost", lambda it: percent(it.figures.udp_lost or 0))
JAIN: Final = Figure("Jain", lambda it: f"{it.figures.jain:.3f}")
TCP_RTT: Final = Figure("TCP RTT", lambda it: milliseconds(it.figures.tcp_rtt))
PING_MEAN: Final = Figure("ping, mean", lambda it: milliseconds(it.figures.ping_mean))
PING_LONGEST: Final = Figure("ping, longest", lambda it: milliseconds(it.figures.ping_max))
DROPS: Final = Figure("drops", lambda it: str(it.figures.drops))
SENT_AGAIN: Final = Figure("sent again", lambda it: str(it.figures.retransmits))

TCP_FIGURES: Final = (
    PAYLOAD_SHARE,
    LAYER3_SHARE,
    PEAK_SHARE,
    JAIN,
    TCP_RTT,
    PING_MEAN,
    PING_LONGEST,
    DROPS,
    SENT_AGAIN,
)
UDP_FIGURES: Final = (PAYLOAD_SHARE, LAYER3_SHARE, PEAK_SHARE, UDP_LOST, PING_MEAN, PING_LONGEST, DROPS)
MIXED_FIGURES: Final = (
    LAYER3_SHARE, PEAK_SHARE, UDP_SHARE, TCP_SHARE, UDP_LOST, JAIN, TCP_RTT, PING_MEAN, PING_LONGEST, DROPS, SENT_AGAIN,
)  # fmt: skip
UNLIMITED_FIGURES: Final = (GIGABITS, JAIN, TCP_RTT, PING_MEAN, PING_LONGEST, SENT_AGAIN)
BRIEF_FIGURES: Final = (PAYLOAD_SHARE, LAYER3_SHARE, JAIN, PING_MEAN)
BRIEF_UNLIMITED_FIGURES: Final = (GIGABITS, JAIN, PING_MEAN)


def brief(row: Row) -> str:
    """A row's figures in one line."""
    measured = row.measured()
    if measured is None:
        return row.error
    shown = BRIEF_FIGURES if row.case.rate else BRIEF_UNLIMITED_FIGURES
    return ", ".join(f"{figure.title} {figure.cell(measured)}" for figure in shown)


def case_table(rows: Iterable[Row], words: Sequence[Word], figures: Sequence[Figure]) -> str:
    """A table with a line for each row, those that have failed included."""
    lines = []
    for row in rows:
        measured = row.measured()
        cells = [figure.cell(measured) if measured else NOTHING for figure in figures]
        lines.append([*(word.cell(row.case) for word in words), *cells])
    titles = [*(word.title for word in words), *(figure.title for figure in figures)]
    return table(titles, lines, len(words))
