"""What :mod:`bench.scale` has measured: how it is kept, and the section and the picture that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plots
from bench.converge import Spread
from bench.record import Machine
from bench.tables import NOTHING, table

FIGURES: Final = Path(__file__).parent / "results" / "scale.json"
PICTURE: Final = "benchmarks-scale.svg"
MEGA: Final = 10**6
GOAL_MEMORY: Final = 300
GOAL_DELAY: Final = 250


@dataclass(frozen=True, slots=True)
class Churned:
    """A time in which pods changed.

    Attributes:
        changes: how many changes nodes were to be told of.
        delays: how long that took, ms.
        cpu: the master's CPU time, % of a CPU.
        memory: the master's memory at the end, MB.
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
        peak: the most memory that the master had until then, MB.
        steady: its memory some seconds later, MB.
        resting_cpu: its CPU time while nothing changes, % of a CPU.
        churned: while pods changed.
        relisted: while pods changed, and all had to be listed again.
        refusing: how many nodes refused connections later.
        silent: how many did not answer then.
        cut: while pods changed and those nodes could not be reached; of changes on the others.
        mended: how long it took until they had what they should have when they could be reached again, s.
        highest: the most memory that the master had in all that, MB.
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

    @classmethod
    def load(cls, path: Path) -> Results | None:
        """Read what :meth:`save` wrote; None where there is no such file."""
        return msgspec.json.decode(path.read_bytes(), type=cls) if path.exists() else None


def write(folder: Path, figures: Path = FIGURES) -> str:
    """The section of the page, with the picture in a folder; nothing where nothing was measured."""
    results = Results.load(figures)
    if results is None:
        return ""
    plots.save(partial(_draw, results), folder / PICTURE)
    where = results.machine
    text = _TEXT.format(
        picture=f"![{_TITLE}]({PICTURE})",
        rate=f"{results.rate:g}",
        table=table(
            ("", *(f"{each.pods:,} pods" for each in results.measured), "goal"),
            [[name, *map(show, results.measured), goal] for name, show, goal in _ROWS],
            1,
        ),
        where=f"{where.date}, {where.cpus} x {where.cpu}, kernel {where.kernel}",
        loads=", ".join(f"{each.load:.2f}" for each in results.measured),
        command=results.command,
    )
    return text.strip()


def _delays(churned: Churned) -> str:
    return _bold(f"{churned.delays.median:.1f}, {churned.delays.p99:.0f}", missed=churned.delays.p99 >= GOAL_DELAY)


def _memory(megabytes: float) -> str:
    return _bold(f"{megabytes:.0f} MB", missed=megabytes >= GOAL_MEMORY)


def _bold(text: str, *, missed: bool) -> str:
    return f"**{text}**" if missed else text


_ROWS: Final[tuple[tuple[str, Callable[[Measured], str], str], ...]] = (
    ("nodes, limited pods", lambda it: f"{it.nodes:,}, {it.limited:,}", NOTHING),
    ("from the master's start until all limits are told", lambda it: f"{it.converged:.1f} s", NOTHING),
    ("its CPU time until then", lambda it: f"{it.converging_cpu:.1f} s", NOTHING),
    ("its most memory until then", lambda it: f"{it.peak:.0f} MB", NOTHING),
    ("its memory some seconds later", lambda it: _memory(it.steady), f"below {GOAL_MEMORY} MB"),
    ("its most memory in all that follows", lambda it: _memory(it.highest), f"below {GOAL_MEMORY} MB"),
    ("CPU at rest", lambda it: f"{it.resting_cpu:.1f} %", NOTHING),
    ("changes: p50, p99 until told, ms", lambda it: _delays(it.churned), f"p99 below {GOAL_DELAY}"),
    ("CPU meanwhile", lambda it: f"{it.churned.cpu:.0f} %", NOTHING),
    ("during a relist: p50, p99, ms", lambda it: _delays(it.relisted), f"p99 below {GOAL_DELAY}"),
    ("to list all pods again takes", lambda it: f"{it.relisted.relisting:.1f} s", NOTHING),
    ("without a tenth of the nodes: p50, p99 of the others, ms", lambda it: _delays(it.cut), f"p99 below {GOAL_DELAY}"),
    ("CPU meanwhile", lambda it: f"{it.cut.cpu:.0f} %", NOTHING),
    ("until those have all limits when they are back", lambda it: f"{it.mended:.1f} s", NOTHING),
)
_TITLE: Final = "What a master takes by the size of its cluster"
_TEXT: Final = """\
## Large clusters

{picture}

One master, as it runs in production: with TLS, watching an API server that holds so many pods, 30 to a node, of which 6
are limited. The nodes are light: they speak the protocol and have no kernel behind it, all of them in one process. Pods
change {rate} times a second: seven in ten changes are another rate, one a new pod, one a pod less, and one is nothing
that matters here. A change is told when its node has received the call, and the time counts from when the API server
has committed it. At rest nothing changes, and no node is due for its resync, which is a call to each every five
minutes. A relist is what comes after the API server has forgotten its history, while pods go on changing: what has
changed before the list begins is told when its page has come, and what changes later at once. Then half of a tenth of
the nodes refuse connections and the other half do not answer, and pods go on changing. Master, API server and nodes
share one machine's CPUs. What misses its goal is bold.

{table}

{where}; load before the start: {loads}.

Repeat it:

    {command}
"""


def _draw(results: Results) -> Figure:
    """A panel for each thing that may grow, by pods."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    time, memory, delay, cpu = figure.subplots(1, 4)
    pods = [each.pods for each in results.measured]

    def draw(axes: Axes, title: str, lines: Mapping[str, Callable[[Measured], float]], goal: float | None) -> None:
        for colour, (name, value) in zip(plots.SERIES, lines.items(), strict=False):
            axes.plot(pods, [value(each) for each in results.measured], marker="o", color=colour, label=name)
        if goal:
            axes.axhline(goal, **plots.LINE)
        axes.set_title(title)
        axes.set_xscale("log")
        axes.set_xticks(pods, [f"{each:,}" for each in pods])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        plots.grid(axes)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)

    draw(time, "First convergence, ms a limit", {"": lambda it: 1000 * it.converged / it.limited}, None)
    draw(memory, "Memory, MB", {"steady": lambda it: it.steady, "most": lambda it: it.highest}, GOAL_MEMORY)
    delays: dict[str, Callable[[Measured], float]] = {
        "changes": lambda it: it.churned.delays.p99,
        "relist": lambda it: it.relisted.delays.p99,
        "nodes gone": lambda it: it.cut.delays.p99,
    }
    draw(delay, "p99 until told, ms", delays, GOAL_DELAY)
    shares: dict[str, Callable[[Measured], float]] = {
        "changes": lambda it: it.churned.cpu,
        "at rest": lambda it: it.resting_cpu,
        "nodes gone": lambda it: it.cut.cpu,
    }
    draw(cpu, "CPU, %", shares, None)
    for axes in (time, memory, delay, cpu):
        axes.set_xlabel("pods")
    return figure
