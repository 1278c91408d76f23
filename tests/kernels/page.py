"""``docs/kernels.md``, made from nothing but what the runs have left in ``results.json``.

``python -m tests.kernels.page`` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from bpfrl.bpf import probe

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = Path(__file__).parents[2] / "docs/kernels.md"

_DOCTOR: Final = "test_doctor_finds_nothing_missing"
_CHANGE: Final = "test_a_limit_changes_while_it_is_used_and_goes_without_a_trace"
_BEFORE: Final = "test_connections_from_before_are_held_to_the_limit"
_COOPERATING: Final = "test_senders_that_cooperate_lose_nothing"
_MARKS: Final = {"ok": "used", "warning": "falls back", "missing": "refused"}
# A row of the figures' table: what it says, and where it comes from.
_RATES: Final = (
    ("TCP out, goodput", "test_tcp_holds_the_limit[egress]", "goodput"),
    ("TCP in, goodput", "test_tcp_holds_the_limit[ingress]", "goodput"),
    ("UDP out, goodput", "test_udp_holds_the_limit[egress]", "goodput"),
    ("UDP in, goodput", "test_udp_holds_the_limit[ingress]", "goodput"),
    ("changed to 20 Mbit/s, layer 3", _CHANGE, "at 20 Mbit/s"),
    ("changed to 5 Mbit/s, layer 3", _CHANGE, "at 5 Mbit/s"),
    ("after detach", _CHANGE, "after"),
    ("TCP from before the limit, layer 3", _BEFORE, "rate"),
    ("TCP in, cooperating, layer 3", _COOPERATING, "rate"),
)
_DROPPED: Final = (
    ("TCP out", "test_tcp_holds_the_limit[egress]"),
    ("TCP in", "test_tcp_holds_the_limit[ingress]"),
    ("UDP out, sent at 20 Mbit/s", "test_udp_holds_the_limit[egress]"),
    ("UDP in, sent at 20 Mbit/s", "test_udp_holds_the_limit[ingress]"),
    ("TCP from before the limit", _BEFORE),
    ("TCP in, cooperating", _COOPERATING),
)
_HEAD: Final = """\
<!-- Made by tests/kernels/page.py from tests/kernels/results.json: run `make kernels`, do not edit. -->
# Kernels

What bpfrl does on Debian's kernels, as they are packaged for clouds. `make kernels` boots each in a machine that qemu
emulates, with cgroup v2 alone, and runs `tests/kernels/core.py` there: attach, TCP and UDP both ways at 10 Mbit/s, a
limit that changes while it is used, list, detach, connections that are older than the limit, and senders that
cooperate. It takes the packages from where apt has those of this machine, and installs none of them."""
_FEATURES: Final = f"""\
## What is used, and what falls back

`bpfrl doctor` tries each of these, and so says the same of any other kernel. One that lacks something which is needed
is refused, by `bpfrl doctor` and by `bpfrl attach`, with what it lacks: bpfrl needs Linux {probe.OLDEST} or newer."""
_ATOMICS: Final = """\
No kernel needs compare-and-swap in BPF, which came with 5.12: several CPUs move one clock by additions alone
(`bpfrl/bpf/clock.h`). So all run the same programs, and nothing has to be known of a node where they are compiled."""
_MEASURED: Final = """\
## What was measured

Each limit is 10 Mbit/s where nothing else is said. Goodput is payload as the receiver counts it, of which 1500 byte at
layer 3 have 1448 (TCP, 4 flows) or 1400 (UDP, sent at 20 Mbit/s). An emulated machine's timers are late now and then,
so what is paced stays further below its limit than on a real one ([benchmarks.md](benchmarks.md)); nothing may go above
it but for the burst at a beginning."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a kernel's run has come to.

    Attributes:
        suite: of Debian.
        package: its name and version there.
        release: what the kernel calls itself.
        seconds: from power on to off.
        tests: "passed", "failed" or "skipped", by name.
        figures: what each test has measured, by its name.
    """

    suite: str
    package: str
    release: str
    seconds: float
    tests: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """How many tests have passed."""
        return f"{list(self.tests.values()).count('passed')} of {len(self.tests)} passed"

    @property
    def linux(self) -> str:
        """Which Linux it is, in two numbers."""
        return ".".join(map(str, probe.version_of(self.release) or ()))

    @property
    def found(self) -> dict[str, str]:
        """The marks that doctor gave, by what it looked at."""
        marks: dict[str, str] = json.loads(self.figures.get(_DOCTOR, {}).get("found", "{}"))
        return marks

    def figure(self, test: str, name: str) -> float | None:
        """What a test has measured."""
        value = self.figures.get(test, {}).get(name)
        return None if value is None else float(value)


def load() -> list[Run]:
    """What is kept."""
    return [Run(**each) for each in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def save(runs: Sequence[Run]) -> None:
    """Keep runs, and write the page."""
    RESULTS.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    PAGE.write_text(text(runs))


def text(runs: Sequence[Run]) -> str:
    """The page."""
    kernels = _table(
        ("Debian", "kernel", "package", "tests", "seconds"),
        ((run.suite, run.release, run.package, run.summary, f"{run.seconds:.0f}") for run in runs),
    )
    linuxes = [f"Linux {run.linux}" for run in runs]
    features = _table(
        ("", *linuxes),
        (
            (feature.name, *(_MARKS.get(run.found.get(feature.name, ""), "-") for run in runs))
            for feature in probe.FEATURES
        ),
    )
    instead = (
        f"- **{feature.name}**, from Linux {feature.since}, is for {feature.purpose}. Without it, {feature.instead}."
        for feature in probe.FEATURES
        if not feature.needed
    )
    rates = _table(
        ("Mbit/s", *linuxes),
        ((says, *(_megabits(run.figure(test, name)) for run in runs)) for says, test, name in _RATES),
    )
    dropped = _table(
        ("packets dropped, %", *linuxes),
        ((says, *(_percent(run.figure(test, "dropped")) for run in runs)) for says, test in _DROPPED),
    )
    idle = ("idle connections at detach", *(run.figures.get(_CHANGE, {}).get("idle connections", "-") for run in runs))
    parts = (
        _HEAD,
        "\n".join(kernels),
        _FEATURES,
        "\n".join(features),
        "\n".join(instead),
        _ATOMICS,
        _MEASURED,
        "\n".join(rates),
        "\n".join(dropped),
        "\n".join(_table(("", *linuxes), [idle])),
    )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _megabits(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e6:.1f}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f}"


if __name__ == "__main__":
    PAGE.write_text(text(load()))
