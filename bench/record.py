"""What the benchmarks measure, and how it is kept as JSON.

Rates are bit/s, times ms, and a figure that a case does not have is None. The report is made from these records
alone, so whoever has the JSON can make it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

Limiter = Literal["none", "bpfrl", "cooperating", "cni", "bucket"]
# iperf3's, or of programs of the benchmarks' own: see bench/traffic.py and bench/situations.py.
Traffic = Literal["tcp", "udp", "mixed", "idle", "fetches", "datagrams", "quic", "change", "late", "reader"]
Direction = Literal["egress", "ingress", "both"]
# What is run and kept together: the names that --only takes. Of the last three each has records of its own.
Group = Literal["idle", "egress", "udp", "mixed", "ingress", "sharing", "situations", "far", "first", "cost"]

# Enough for every figure here, and little enough to be read and committed.
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        limiter: what holds the pod to the rate.
        traffic: TCP, UDP at twice the limit, both at once, nothing but requests, or one of the special ones.
        direction: where the traffic goes, seen from the pod.
        rate: the limit, or None without one.
        flows: TCP flows; at each of the RTTs, and in each direction.
        congestion: the TCP senders' congestion control; empty where there is no TCP.
        burst: what the limiter is told to let through at once, bit; None: its usual one.
        rtts: round-trip times, ms, of the wire, with flows at each; none: a plain veth.
        mtu: of all devices.
        ipv6: it is that, and not IPv4.
    """

    limiter: Limiter
    traffic: Traffic
    direction: Direction
    rate: int | None
    flows: int
    congestion: str
    burst: int | None = None
    rtts: tuple[float, ...] = ()
    mtu: int = 1500
    ipv6: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, after the omitted seconds and by the receiver where nothing else is said.

    Attributes:
        goodput: payload of all flows; of traffic in both directions, the mean of the two.
        layer3: the same with the headers of layer 3 and 4, and the requests.
        parts: what went into it, one by one: TCP and UDP, the flows of each RTT, or those of each direction.
        peak: the most in any one second at layer 3, the omitted ones included.
        jain: Jain's index of the flows' goodputs: 1 when all are alike, 1/n when one has everything.
        udp_lost: the share of what the UDP sender's socket took that was not received.
        retransmits: segments that the TCP senders sent again.
        tcp_rtt: mean of the senders' own mean round-trip times.
        p50: median time from a small request of the pod to its response.
        p99: the time that 1 of 100 requests exceeds.
        requests: how many there were.
        unanswered: how many of these had no response when the case ended; their time is the one until then.
        drops: what the limiter dropped, from beginning to end. bpfrl and the bucket count packets on the wire; tbf
            counts what it queues, where a GSO packet of many segments is one.
        counted: layer-3 bytes by bpfrl's own counters, as a share of those that follow from the received
            payload, from beginning to end: the two should agree, but for handshakes and retransmits.
        extra: what only this traffic has.
    """

    goodput: float = 0.0
    layer3: float = 0.0
    parts: Sequence[float] = ()
    peak: float = 0.0
    jain: float | None = None
    udp_lost: float | None = None
    retransmits: int | None = None
    tcp_rtt: float | None = None
    p50: float | None = None
    p99: float | None = None
    requests: int = 0
    unanswered: int = 0
    drops: int | None = None
    counted: float | None = None
    extra: Mapping[str, float | None] = field(default_factory=dict)


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

    group: Group
    case: Case
    figures: Figures | None
    error: str = ""

    def measured(self) -> Measured | None:
        """The same, if it has figures."""
        return Measured(self.case, self.figures) if self.figures else None


@dataclass(frozen=True, slots=True)
class Headroom:
    """The goodputs of repeated TCP runs at a limit near what the machine can do, at one far above it, or at none."""

    limiter: Limiter
    rate: int | None
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
        traffic: of what.
        direction: of the bulk.
        rate: the limit.
        program: the program: egress, ingress or sockops.
        runs: how often it ran.
        run_ns: mean duration of a run.
        empty_ns: the same of a program that only returns, attached behind it: what the instrument itself adds.
        packets: wire packets in the direction of the bulk, dropped ones included.
    """

    traffic: Traffic
    direction: Direction
    rate: int
    program: str
    runs: int
    run_ns: float
    empty_ns: float
    packets: int

    @property
    def net_ns(self) -> float:
        """The time in the program, without what the instrument adds."""
        return self.runs * (self.run_ns - self.empty_ns)


@dataclass(frozen=True, slots=True)
class Before:
    """What an earlier version was measured to cost."""

    date: str
    costs: Sequence[Cost]


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
class Run:
    """When a group was measured: by how long a run for each case, and in how many minutes altogether."""

    group: Group
    date: str
    command: str
    seconds: int
    minutes: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that has been measured."""

    machine: Machine
    runs: Sequence[Run]
    before: Before
    rows: Sequence[Row] = ()
    headroom: Sequence[Headroom] = ()
    first_second: Sequence[FirstSecond] = ()
    costs: Sequence[Cost] = ()

    def merged(self, later: Results) -> Results:
        """The same with the groups of a later measurement in the place of what was there of them."""
        again = {run.group for run in later.runs}
        return Results(
            later.machine,
            [*(run for run in self.runs if run.group not in again), *later.runs],
            later.before,
            [*(row for row in self.rows if row.group not in again), *later.rows],
            later.headroom if "far" in again else self.headroom,
            later.first_second if "first" in again else self.first_second,
            later.costs if "cost" in again else self.costs,
        )

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
            runs=[Run(**record) for record in document["runs"]],
            before=read_before(document["before"]),
            rows=[_row(record) for record in document["rows"]],
            headroom=[Headroom(**record) for record in document["headroom"]],
            first_second=[FirstSecond(**record) for record in document["first_second"]],
            costs=[Cost(**record) for record in document["costs"]],
        )


def read_before(document: dict[str, Any]) -> Before:
    """The figures of an earlier version, from JSON."""
    return Before(document["date"], [Cost(**record) for record in document["costs"]])


def _row(record: dict[str, Any]) -> Row:
    case, figures = record["case"], record["figures"]
    return Row(
        record["group"],
        Case(**case | {"rtts": tuple(case["rtts"])}),
        Figures(**figures) if figures else None,
        record["error"],
    )


def _rounded(value: Any) -> Any:
    """The same with floats of few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
