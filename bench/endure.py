"""Everything goes wrong that may, and all comes right again: ``python -m bench.endure --help``.

Each fault of :mod:`bench.faults` happens to a cluster while pods are created, annotated, completed and deleted. After
its end every node's kernel must come to what the pods ask for within the time that is stated, and nothing may
be left over: no pin, program, link or map, no process, descriptor or mount. The stated times, and those that were
measured last, are in docs/faults.md, which this writes. What is done follows from the seed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import msgspec

from bench import chaos, machine
from bench.chaos import ChaosError
from bench.faults import FAULTS, Fault
from bench.kubeapi import RealApi, StandIn
from bench.record import Machine

FIGURES: Final = Path(__file__).parent / "results" / "faults.json"
PAGE: Final = Path(__file__).parent.parent / "docs" / "faults.md"
_SERVERS: Final = {StandIn.__name__: "stand-in", RealApi.__name__: "kube-apiserver"}
_HEAD: Final = """\
<!-- Made by bench/endure.py: run `make faults`, do not edit. -->
# Faults

What may go wrong, and how soon after its end everything is right again: each pod's limits are in force in its node's
kernel, as bpftool and bpfrl see it, and nothing is left over: no pin, program, link or map, no process, no descriptor
and no mount. `make faults` has each of them happen to three nodes, two masters and an API server, all real processes,
while pods are created, annotated, completed and deleted, and fails where one takes longer than stated. While a fault
lasts, limits that are in force stay in force, but where it says otherwise.

The masters ask every 5 s what nodes have (`--resync`; 300 s unless one says otherwise) and hold the Lease for 3 s
(`--lease-duration`; 15 s): what depends on these takes as much longer. The last columns are what was measured, the
longest where a fault happens several times.
"""
_TAIL: Final = """\
## One system call after the other

`tests/kernel/test_steps.py` kills what `bpfrl attach`, an update, an upgrade and `bpfrl detach` do before each single
system call that changes the kernel's state, and has each call of bpf() fail with ENOMEM, EPERM, ENOSPC and EBUSY.
After a kill nothing limits the pod that `bpfrl list` does not show, a pod that had a limit still has one, and the
same command again, or the node's daemon within a minute, ends what was begun. A call that fails leaves everything as
it was, or is not needed for a whole limiter; a detach that was refused half-way shows as broken, and the next one
ends it. Continuous integration takes a sample of the steps, `make faults` all.

## What is on disk

Nothing of what pods ask for and have is on a disk. A node and a master keep compiled programs in
`$XDG_CACHE_HOME/bpfrl` or `~/.cache/bpfrl`, each written whole or not at all; a full disk costs time, for every
process then compiles for itself.

## At random

`make soak SECONDS=3600 SEED=7` has all of this happen in any order, for as long as one likes, and watches
descriptors, threads and memory of all daemons.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a fault went: how long after its end all was as it should be at the latest, s, and of how many times."""

    seconds: float
    times: int


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How all of them went against an API server, by the faults' names."""

    machine: Machine
    seed: int
    outcomes: dict[str, Outcome]


def run_all(
    faults: Sequence[Fault], seed: int, server: type[StandIn | RealApi], tell: Callable[[str], None]
) -> tuple[dict[str, Outcome], list[str]]:
    """Have faults happen, one after the other, to a cluster.

    A cluster that has not come right again is taken down, and the next fault happens to a new one.

    Returns:
        How they went, by name, and what did not go well.
    """
    outcomes: dict[str, Outcome] = {}
    failures: list[str] = []
    left = [each for fault in faults if server is StandIn or not fault.stand_in for each in fault.all_steps()]
    number = 0
    while left:
        course: list[chaos.Round] = []
        try:
            with chaos.cluster(server, seed) as built:
                while left:
                    number, disturbance = number + 1, left.pop(0)
                    name = disturbance.name
                    course.append(played := built.endure(number, disturbance))
                    seconds = played.seconds
                    before = outcomes.get(name, Outcome(0, 0))
                    outcomes[name] = Outcome(max(seconds, before.seconds), before.times + 1)
                    tell(f"{number:4} {name}: {seconds:.1f} s of {disturbance.within:.0f} s")
                built.finish(number)
        except (ChaosError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{name}: {error}")
            tell(failures[-1])
        if (held := chaos.growth(course)) > chaos.GROWTH:
            failures.append(f"a daemon holds {held} descriptors or threads more than at first")
    return outcomes, failures


def load(path: Path = FIGURES) -> dict[str, Outcomes]:
    """What was measured last, by API server."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Outcomes])


def page(measured: Mapping[str, Outcomes]) -> str:
    """The page that tells all of it."""
    lines = [_HEAD]
    columns = {server: measured[server].outcomes for server in _SERVERS if server in measured}
    for group in dict.fromkeys(fault.group for fault in FAULTS.values()):
        titles = "".join(f" {_SERVERS[server]}, s |" for server in columns)
        lines += [f"## {group}", "", f"| fault | what happens | right again within, s |{titles}"]
        lines.append("| --- | --- | ---: |" + " ---: |" * len(columns))
        for name, fault in FAULTS.items():
            if fault.group == group:
                found = (outcomes.get(name) for outcomes in columns.values())
                cells = "".join(f" {outcome.seconds:.1f} |" if outcome else " - |" for outcome in found)
                lines.append(f"| {name} | {fault.what} | {fault.disturbance.within:.0f} |{cells}")
        lines.append("")
    for server, outcomes in measured.items():
        facts = outcomes.machine
        place = f"{facts.date}, {facts.cpus} x {facts.cpu}, kernel {facts.kernel}"
        lines.append(f"{_SERVERS[server]}: {place}; seed {outcomes.seed}.")
    return "\n".join([*lines, "", _TAIL])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--only", multiple=True, metavar="NAME", help="Only this fault; may be given several times.")
@click.option("--seed", type=int, default=1, show_default=True, help="What is done follows from this number.")
@click.option("--real", is_flag=True, help="Use etcd and kube-apiserver, not the stand-in.")
def main(only: tuple[str, ...], seed: int, real: bool) -> None:
    """Have everything go wrong that may, and see that all comes right again within the stated times.

    Writes docs/faults.md, and keeps there what was measured before of faults that are left out now. Exits with 1 where
    something does not come right.
    """
    if os.geteuid() != 0:
        raise click.ClickException("this loads BPF programs and makes namespaces: run it as root")
    if unknown := set(only) - FAULTS.keys():
        raise click.UsageError(f"no such fault: {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = RealApi if real else StandIn
    chosen = [fault for name, fault in FAULTS.items() if not only or name in only]
    facts = machine.describe()
    outcomes, failures = run_all(chosen, seed, server, lambda line: click.echo(line, err=True))
    if failures:
        raise click.ClickException(f"{len(failures)} faults were not survived")
    measured = load() if FIGURES.exists() else {}
    if only and server.__name__ in measured:
        outcomes = measured[server.__name__].outcomes | outcomes
    measured[server.__name__] = Outcomes(facts, seed, outcomes)
    texts = {key: asdict(each) for key, each in measured.items()}
    FIGURES.write_text(json.dumps(texts, indent=1) + "\n")
    PAGE.write_text(page(measured))


if __name__ == "__main__":
    main()
