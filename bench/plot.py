"""The figures as one picture: for whom a table is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bench.findings import Pair, pairs
from bench.record import Direction, Measured, Results
from bench.tables import percent
from bench.traffic import MTU, PAYLOAD
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
_COLOURS: Final = {"bpfrl": "#0969da", "CNI bandwidth plugin": "#d4691c"}
_CEILING: Final[dict[str, Any]] = {"color": _FAINT, "linestyle": (0, (4, 3)), "linewidth": 0.9}
_DIRECTIONS: Final[tuple[Direction, ...]] = ("egress", "ingress")
# A limiter's points stand in a column of this width beside the middle of its rate.
_COLUMN: Final = 0.3
_GAP: Final = 0.04


def write(results: Results, path: Path) -> None:
    """Draw goodput and round trips by rate, bpfrl beside the CNI plugin."""
    sent, received = (pairs(results.rows, ("tcp", direction)) for direction in _DIRECTIONS)
    with rc_context(_LOOK):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _panel(left, "TCP sent: payload / limit", sent, _goodput)
        _panel(middle, "TCP sent: ping meanwhile", sent, lambda measured: measured.figures.ping_mean)
        _panel(right, "TCP received: payload / limit", received, _goodput)
        for axes in (left, right):
            _as_shares(axes)
        middle.set_yscale("log")
        middle.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
        middle.minorticks_off()
        dots = [Line2D([], [], marker="o", linestyle="", color=colour, label=who) for who, colour in _COLOURS.items()]
        ceiling = Line2D([], [], label=f"what headers leave: {percent(PAYLOAD / MTU)}", **_CEILING)
        figure.legend(handles=[*dots, ceiling], loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _goodput(measured: Measured) -> float:
    return measured.of_limit(measured.figures.goodput)


def _panel(axes: Axes, title: str, members: Sequence[Pair], value: Callable[[Measured], float | None]) -> None:
    """A point for every case, a bar at their median, side by side at each rate."""
    axes.set_title(title)
    rates = sorted({pair.bpfrl.case.rate or 0 for pair in members})
    for place, rate in enumerate(rates):
        here = [pair for pair in members if pair.bpfrl.case.rate == rate]
        sides = ((-1, [pair.bpfrl for pair in here]), (1, [pair.cni for pair in here]))
        for side, cases in sides:
            values = [found for case in cases if (found := value(case)) is not None]
            _column(axes, place, side, values)
    axes.set_xticks(range(len(rates)), [str(Rate(rate)) for rate in rates])
    axes.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _column(axes: Axes, place: float, side: int, values: Sequence[float]) -> None:
    """The points of one limiter at one rate, on the left (-1) or the right (1) of the rate's place."""
    if not values:
        return
    colour = list(_COLOURS.values())[side > 0]
    middle = place + side * (_GAP + _COLUMN / 2)
    left, right = middle - _COLUMN / 2, middle + _COLUMN / 2
    step = _COLUMN / len(values)
    positions = [left + step * (number + 0.5) for number in range(len(values))]
    axes.scatter(positions, values, s=16, color=colour, alpha=0.55, linewidths=0)
    axes.hlines(median(values), left, right, color=colour, linewidth=2.2)


def _as_shares(axes: Axes) -> None:
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.axhline(PAYLOAD / MTU, zorder=0, **_CEILING)
