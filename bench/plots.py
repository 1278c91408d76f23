"""The figures as pictures: for whom a table is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bench.findings import GROUPS, TRAFFIC, usual, waited
from bench.record import Direction, Limiter, Measured, Results
from bench.tables import NAMES
from bpfrl.units import Rate

_INK: Final = "#24292f"
_FAINT: Final = "#8c959f"
_LOOK: Final[dict[Any, Any]] = {
    # Text stays text: small, searchable, and in the reader's own font.
    "svg.fonttype": "none",
    # The same figures make the same file.
    "svg.hashsalt": "bpfrl",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
}
_COLOURS: Final[dict[Limiter, str]] = {
    "bpfrl": "#0969da",
    "cooperating": "#1a7f37",
    "cni": "#d4691c",
    "bucket": "#8250df",
}
SERIES: Final = tuple(_COLOURS.values())
LINE: Final[dict[str, Any]] = {"color": _FAINT, "linestyle": (0, (4, 3)), "linewidth": 0.9, "zorder": 0}
# What a request takes on an idle machine differs by less than this: shorter waits are drawn here.
_LEAST_WAIT: Final = 0.05
# A limiter's points stand in columns that fill so much of the room between two places.
_FILLED: Final = 0.84
_COLUMN: Final = 0.85
_NEAR_LIMIT: Final = 0.8
_DARK: Final = 0.55

Value = Callable[[Measured], float | None]


class Picture(NamedTuple):
    """One of the page's pictures: its file, what it shows, and how it is read."""

    file: str
    title: str
    caption: str
    draw: Callable[[Results], Figure]


def write(results: Results, folder: Path) -> dict[Picture, Path]:
    """Draw what there are figures for, and tell where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for picture in _PICTURES:
        places[picture] = folder / picture.file
        save(partial(picture.draw, results), places[picture])
    return places


def save(draw: Callable[[], Figure], place: Path) -> None:
    """Draw a figure as all of them look."""
    with rc_context(_LOOK):
        draw().savefig(place, metadata={"Date": None}, facecolor="white")


def _egress(results: Results) -> Figure:
    """The share of the limit and the wait of requests, by rate."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    members = {limiter: usual(results.rows, "egress", limiter) for limiter in _COLOURS}
    _columns_by_rate(left, members, _share)
    _columns_by_rate(right, members, _wait)
    left.set_title("TCP sent: layer 3 / limit")
    _as_shares(left)
    right.set_title("TCP sent: p99 of requests meanwhile")
    _as_waits(right)
    _legend(figure, [limiter for limiter, found in members.items() if found])
    return figure


def _columns_by_rate(axes: Axes, members: dict[Limiter, list[Measured]], value: Value) -> None:
    shown = {limiter: found for limiter, found in members.items() if found}
    rates = sorted({each.case.rate or 0 for found in shown.values() for each in found})
    for place, rate in enumerate(rates):
        here = {limiter: [each for each in found if each.case.rate == rate] for limiter, found in shown.items()}
        _columns(axes, place, here, value)
    axes.set_xticks(range(len(rates)), [str(Rate(rate)) for rate in rates])


def _columns(axes: Axes, place: float, members: dict[Limiter, list[Measured]], value: Value) -> None:
    """A point for every case, a bar at their median, the limiters side by side."""
    width = _FILLED / max(1, len(members))
    for number, (limiter, cases) in enumerate(members.items()):
        values = [found for case in cases if (found := value(case)) is not None]
        if not values:
            continue
        middle = place + width * (number - (len(members) - 1) / 2)
        left, right = middle - width * _COLUMN / 2, middle + width * _COLUMN / 2
        step = (right - left) / len(values)
        positions = [left + step * (index + 0.5) for index in range(len(values))]
        axes.scatter(positions, values, s=16, color=_COLOURS[limiter], alpha=0.55, linewidths=0)
        axes.hlines(median(values), left, right, color=_COLOURS[limiter], linewidth=2.2)


def _latency(results: Results) -> Figure:
    """The wait of requests in each group."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots()
    shown: set[Limiter] = set()
    for place, group in enumerate(TRAFFIC):
        members = {limiter: found for limiter in _COLOURS if (found := usual(results.rows, group, limiter))}
        _columns(axes, place, members, _wait)
        shown |= members.keys()
    axes.set_xticks(range(len(TRAFFIC)), [GROUPS[group] for group in TRAFFIC])
    axes.set_title("p99 of small requests beside a load, above the round trip itself")
    _as_waits(axes)
    _legend(figure, [limiter for limiter in _COLOURS if limiter in shown])
    return figure


def _ingress(results: Results) -> Figure:
    """Heat maps of bpfrl by itself: RTT by flows, for each rate and congestion control."""
    members = usual(results.rows, "ingress", "bpfrl")
    kinds = sorted(
        {(each.case.congestion, each.case.rate or 0) for each in members}, key=lambda it: (it[0] != "cubic", it)
    )
    figure = Figure(figsize=(2.1 * max(1, len(kinds)) + 0.8, 4.9), layout="constrained")
    if not kinds:
        return figure
    maps = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        here = [each for each in members if (each.case.congestion, each.case.rate) == kind]
        _heat(maps[0][column], here, _share, "{:.0%}", labelled=column == 0)
        _heat(maps[1][column], here, lambda it: it.figures.jain, "{:.2f}", labelled=column == 0)
        maps[0][column].set_title(f"{kind[0]}, {Rate(kind[1])}")
    maps[0][0].set_ylabel("share of the limit\n\nRTT")
    maps[1][0].set_ylabel("Jain's index\n\nRTT")
    for axes in maps[1]:
        axes.set_xlabel("flows")
    return figure


def _heat(axes: Axes, members: Sequence[Measured], value: Value, show: str, *, labelled: bool) -> None:
    """A cell for each case: the paler, the nearer to 1."""
    flows = sorted({each.case.flows for each in members})
    rtts = sorted({each.case.rtts for each in members})
    cells = {(each.case.rtts, each.case.flows): value(each) for each in members}
    grid = [[cells.get((rtt, count)) for count in flows] for rtt in rtts]
    distances = [
        [min(1.0, abs(1 - cell) / (1 - _NEAR_LIMIT)) if cell is not None else 0.0 for cell in row] for row in grid
    ]
    axes.imshow(distances, cmap="Blues", vmin=0, vmax=1 / _DARK, aspect="auto")
    for row, found in enumerate(grid):
        for column, cell in enumerate(found):
            text = "-" if cell is None else show.format(cell)
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5)
    axes.set_xticks(range(len(flows)), [str(count) for count in flows])
    names = [f"{rtt[0]:g} ms" if rtt else "0.05 ms" for rtt in rtts]
    axes.set_yticks(range(len(rtts)), names if labelled else [""] * len(rtts))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _sharing(results: Results) -> Figure:
    """Bars of what the flows at each RTT get."""
    found = {limiter: usual(results.rows, "sharing", limiter) for limiter in _COLOURS}
    kinds = sorted({_sharing_kind(each) for members in found.values() for each in members}, key=str)
    figure = Figure(figsize=(12, 1.7 * max(1, (len(kinds) + 3) // 4) + 0.7), layout="constrained")
    if not kinds:
        return figure
    panels = figure.subplots((len(kinds) + 3) // 4, min(4, len(kinds)), squeeze=False).flat
    for axes, kind in zip(panels, kinds, strict=False):
        here = {limiter: each for limiter, all_of in found.items() for each in all_of if _sharing_kind(each) == kind}
        for place, (limiter, each) in enumerate(here.items()):
            near, far = (each.of_limit(part) for part in each.figures.parts)
            axes.barh(-place, near, color=_COLOURS[limiter], height=0.7)
            axes.barh(-place, far, left=near, color=_COLOURS[limiter], alpha=0.45, height=0.7)
        axes.set_yticks([-place for place in range(len(here))], [_SHORT[limiter] for limiter in here])
        direction, rate, flows = kind
        axes.set_title(f"{_SENT[direction]} {Rate(rate)}, {flows} + {flows}", fontsize=10)
        axes.set_xlim(0, 1.1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks([0, 0.5, 1])
        for share in (0.5, 1):
            axes.axvline(share, **LINE)
        axes.tick_params(axis="y", length=0)
    patches = [Patch(color=_INK, label="at 20 ms"), Patch(color=_INK, alpha=0.45, label="at 80 ms")]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _sharing_kind(measured: Measured) -> tuple[Direction, int, int]:
    return measured.case.direction, measured.case.rate or 0, measured.case.flows


_SHORT: Final[dict[Limiter, str]] = {"bpfrl": "bpfrl", "cooperating": "cooperating", "cni": "CNI", "bucket": "bucket"}
_SENT: Final[dict[Direction, str]] = {"egress": "sent,", "ingress": "received,", "both": "both,"}


def _share(measured: Measured) -> float:
    return measured.of_limit(measured.figures.layer3)


def _wait(measured: Measured) -> float | None:
    found = waited(measured, measured.figures.p99)
    return None if found is None else max(_LEAST_WAIT, found)


def _as_shares(axes: Axes) -> None:
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.axhline(1, **LINE)
    grid(axes)


def _as_waits(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
    axes.minorticks_off()
    grid(axes)


def grid(axes: Axes) -> None:
    """Faint lines behind what is drawn."""
    axes.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, limiters: Sequence[Limiter]) -> None:
    dots = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS[limiter], label=NAMES[limiter]) for limiter in limiters
    ]
    figure.legend(handles=dots, loc="outside lower center", ncols=max(1, len(dots)), frameon=False)


_PICTURES: Final = (
    Picture(
        "benchmarks.svg",
        "Share of the limit and p99 of requests by rate, for each limiter",
        "A dot is a case: a number of flows, with one congestion control. A bar is the median of a limiter's cases at a"
        " rate.",
        _egress,
    ),
    Picture(
        "benchmarks-ingress.svg",
        "Share of the limit and Jain's index of what is received, by RTT and flows",
        "TCP that the pod receives under bpfrl, without cooperation: the paler, the nearer to 100 % and to 1.",
        _ingress,
    ),
    Picture(
        "benchmarks-latency.svg",
        "p99 of requests beside each kind of load, for each limiter",
        "A dot is a case, a bar the median of a limiter's; each limiter has its own set of cases. What is below"
        f" {_LEAST_WAIT:g} ms is drawn there.",
        _latency,
    ),
    Picture(
        "benchmarks-sharing.svg",
        "What flows at 20 ms and flows at 80 ms get of one limit",
        "Flows at an RTT of 20 ms and as many at one of 80 ms share a limit: half of the bar each would be fair.",
        _sharing,
    ),
)
