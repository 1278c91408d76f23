"""What the benchmarks measure, and how it is kept as JSON.

Rates are bit/s, times ms, and a figure that a case does not have is None. The report is made from these records
alone, so whoever has the JSON can make it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

Limiter = Literal["none", "bpfrl", "cni"]
Traffic = Literal["tcp", "udp", "mixed"]
Direction = Literal["egress", "ingress"]

# Enough for every figure here, and little enough to be read and committed.
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        limiter: what holds the pod to the rate.
        traffic: TCP, UDP at twice the limit, or both at once.
        direction: where the traffic goes, seen from the pod.
        rate: the limit, or None without one.
        flows: TCP flows.
        congestion: the TCP senders' congestion control; empty for UDP.
        burst: what the limiter is told to let through at once, bit; None: its own default.
    """

    limiter: Limiter
    traffic: Traffic
    direction: Direction
    rate: int | None
    flows: int
    congestion: str
    burst: int | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, after the first second and by the receiver where nothing else is said.

    Attributes:
        goodput: payload of all flows.
        layer3: the same with the headers of layer 3 and 4.
        udp_layer3: UDP's part of it.
        peak: the most in any one second at layer 3, the first one included.
        jain: Jain's index of the flows' goodputs: 1 when all are alike, 1/n when one has everything.
        udp_lost: the share of what the UDP sender's socket took that was not received.
        retransmits: segments that the TCP senders sent again.
        tcp_rtt: mean of the senders' own mean round-trip times.
        ping_mean: mean round-trip time of pings from the pod at the same time.
        ping_max: the longest of these.
        pings_lost: how many had no answer.
        drops: what the limiter dropped, first second included. bpfrl counts packets on the wire; tbf counts
            what it queues, where a GSO packet of many segments is one.
        counted: layer-3 bytes by bpfrl's own counters, as a share of those that follow from the received
            payload, first second included: the two should agree, but for pings, handshakes and retransmits.
    """

    goodput: float
    layer3: float
    udp_layer3: float
    peak: float
    jain: float
    udp_lost: float | None
    retransmits: int | None
    tcp_rtt: float | None
    ping_mean: float | None
    ping_max: float | None
    pings_lost: int
    drops: int | None
    counted: float | None


class Measured(NamedTuple):
    """A case with its figures."""

    case: Case
    figures: Figures

    def of_limit(self, rate: float) -> float:
        """A rate as a share of the case's limit.

        Raises:
            ValueError: it has none.
        """
        if self.case.rate is None:
            raise ValueError(f"no limit to compare with: {self.case}")
        return rate / self.case.rate


@dataclass(frozen=True, slots=True)
class Row:
    """A case with its figures, or why it has none."""

    case: Case
    figures: Figures | None
    error: str = ""

    def measured(self) -> Measured | None:
        """The same, if it has figures."""
        return Measured(self.case, self.figures) if self.figures else None


@dataclass(frozen=True, slots=True)
class Headroom:
    """The goodputs of repeated TCP runs with a limit that the machine cannot reach, or with none."""

    limiter: Limiter
    flows: int
    goodputs: Sequence[float]


@dataclass(frozen=True, slots=True)
class FirstSecond:
    """The payload, byte, that one TCP flow got through in the first second of a limit; burst as in a case."""

    limiter: Limiter
    rate: int
    burst: int | None
    payload: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The kernel's own account of one program while bpfrl held one kind of traffic to a rate.

    Attributes:
        traffic: of what, always egress.
        rate: the limit.
        program: the program: egress, ingress or sockops.
        runs: how often it ran.
        run_ns: mean duration of a run.
        empty_ns: the same of a program that only returns, attached behind it: what the instrument itself adds.
        packets: wire packets in the program's direction, dropped ones included.
        packet_ns: time in the program per wire packet that the pod sent.
    """

    traffic: Traffic
    rate: int
    program: str
    runs: int
    run_ns: float
    empty_ns: float
    packets: int
    packet_ns: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the figures come from."""

    date: str
    kernel: str
    cpu: str
    cpus: int
    load: float
    tools: dict[str, str]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything of one run of the benchmarks."""

    machine: Machine
    command: str
    seconds: int
    minutes: float
    rows: Sequence[Row]
    headroom: Sequence[Headroom]
    first_second: Sequence[FirstSecond]
    costs: Sequence[Cost]

    def save(self, path: Path) -> None:
        """Write as JSON, one record a line, so that two runs can be compared line by line."""
        document = _rounded(asdict(self))
        lines = []
        for key, value in document.items():
            if isinstance(value, list):
                records = ",\n".join(f"  {json.dumps(record)}" for record in value)
                lines.append(f'"{key}": [\n{records}\n ]')
            else:
                lines.append(f'"{key}": {json.dumps(value)}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote."""
        document = json.loads(path.read_text())
        return cls(
            machine=Machine(**document["machine"]),
            command=document["command"],
            seconds=document["seconds"],
            minutes=document["minutes"],
            rows=[_row(record) for record in document["rows"]],
            headroom=[Headroom(**record) for record in document["headroom"]],
            first_second=[FirstSecond(**record) for record in document["first_second"]],
            costs=[Cost(**record) for record in document["costs"]],
        )


def _row(record: dict[str, Any]) -> Row:
    figures = record["figures"]
    return Row(Case(**record["case"]), Figures(**figures) if figures else None, record["error"])


def _rounded(value: Any) -> Any:
    """The same with floats of few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
