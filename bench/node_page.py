"""What :mod:`bench.node` has measured: how it is kept, and what a page says of it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench.converge import Spread
from bench.record import Machine

FIGURES: Final = Path(__file__).parent / "results" / "node.json"
_MEGA: Final = 10**6


@dataclass(frozen=True, slots=True)
class Wave:
    """One kind of call, for all pods.

    Attributes:
        name: what is done to a pod.
        at_once: how many at a time.
        rate: calls in a second.
        call: how long each took.
        node_cpu: the node's CPU time for each, ms.
        client_cpu: the client's.
    """

    name: str
    at_once: int
    rate: float
    call: Spread
    node_cpu: float
    client_cpu: float


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds.

    Attributes:
        resident: memory (RSS), MB of 10^6 byte: the daemon's own, and libraries that others may have mapped too.
        proportional: the same with what is shared in equal parts (PSS), MB.
        descriptors: open files.
        threads: how many.
    """

    resident: float
    proportional: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, number: int) -> Size:
        """A process's, now."""
        process = Path(f"/proc/{number}")
        kibi = {
            name: int(value.split()[0])
            for name, _, value in (line.partition(":") for line in (process / "smaps_rollup").read_text().splitlines())
            if name in ("Rss", "Pss")
        }
        resident, proportional = (round(kibi[name] * 1024 / _MEGA, 1) for name in ("Rss", "Pss"))
        return cls(resident, proportional, len(os.listdir(process / "fd")), len(os.listdir(process / "task")))


@dataclass(frozen=True, slots=True)
class Round:
    """All pods attached, changed and detached, one after the other and then many at once.

    Attributes:
        waves: what was done, in this order.
        full: the node, with all pods limited.
        empty: the same when none is any more.
        listed: how long ``List`` took, with all pods.
        scraped: how long a scrape of ``/metrics`` took, with all pods.
    """

    waves: Sequence[Wave]
    full: Size
    empty: Size
    listed: Spread
    scraped: Spread


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured.

    Attributes:
        machine: where.
        command: how.
        pods: how many.
        begun: the node before its first pod.
        rounds: what followed.
    """

    machine: Machine
    command: str
    pods: int
    begun: Size
    rounds: Sequence[Round]


def section(results: Results) -> str:
    """What was measured, as a section of a Markdown page."""
    return "\n".join(("## One node", "", *_lines(results)))


def load(path: Path) -> Results | None:
    """Read what :func:`save` wrote; None where there is no such file."""
    return msgspec.json.decode(path.read_bytes(), type=Results) if path.exists() else None


def save(results: Results, path: Path) -> None:
    """Write as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def _lines(results: Results) -> Iterator[str]:
    where, rounds, pods = results.machine, results.rounds, results.pods
    yield (
        f"{pods} pods on one node, limited both ways, each with a process in a network namespace of its own. A real"
        " `bpfrl serve-node` with TLS and `--http` is called by a master's client over one connection, on one machine."
        f" Medians of {len(rounds)} rounds; {where.date}, {where.cpus} x {where.cpu}, kernel {where.kernel}, load"
        f" {where.load:.2f} before the start."
    )
    yield ""
    yield "| call | at a time | calls/s | median, ms | p99, ms | node's CPU, ms | client's CPU, ms |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for waves in zip(*(each.waves for each in rounds), strict=True):
        figures = (
            f"{statistics.median(figure):.1f}"
            for figure in zip(
                *((w.rate, w.call.median, w.call.p99, w.node_cpu, w.client_cpu) for w in waves), strict=True
            )
        )
        yield f"| {waves[0].name} | {waves[0].at_once} | {' | '.join(figures)} |"
    yield ""
    listed, scraped = (
        [statistics.median(column) for column in zip(*((each.median, each.p99) for each in spreads), strict=True)]
        for spreads in ([each.listed for each in rounds], [each.scraped for each in rounds])
    )
    yield (
        f"With {pods} pods limited, `List` takes {listed[0]:.0f} ms (p99 {listed[1]:.0f}) and a scrape of `/metrics`"
        f" {scraped[0]:.0f} ms (p99 {scraped[1]:.0f})."
    )
    yield ""
    yield "| the daemon | resident, MB | proportional, MB | descriptors | threads |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, size in (
        ("before its first pod", results.begun),
        (f"with {pods} pods, first round", rounds[0].full),
        (f"with {pods} pods, round {len(rounds)}", rounds[-1].full),
        ("without pods again, first round", rounds[0].empty),
        (f"without pods again, round {len(rounds)}", rounds[-1].empty),
    ):
        memory = f"{size.resident:.1f} | {size.proportional:.1f}"
        yield f"| {name} | {memory} | {size.descriptors} | {size.threads} |"
    yield ""
    yield "MB are 10^6 byte. Resident memory holds libraries that other processes may have mapped too."
    yield from ("", f"Repeat it: `{results.command}`")
