"""Which cases the benchmarks run, and in which order.

What is compared runs one after the other (bpfrl, then the others, then the next case), so that a noisy
minute of the machine falls on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

from bench import cni
from bench.record import Case, Direction, Group, Limiter, Traffic
from bench.situations import HIGH_RATE

GROUPS: Final[tuple[Group, ...]] = get_args(Group)
# Far above what any machine sends over a veth: what is then missing is what the programs cost.
FAR_RATE: Final = 400 * 10**9
# And near what this one can do.
NEAR_RATE: Final = 10**10
FEW_FLOWS: Final = 4
BULK_FLOWS: Final = 8
SHARED_RTTS: Final = (20.0, 80.0)
CUBIC: Final = "cubic"
BBR: Final = "bbr"

# As fast as QUIC in Python still is when it has the machine for itself.
_QUIC_RATE: Final = 2 * 10**7
_FAR_RTT: Final = 20.0
_FIRST_SECOND_RATE: Final = 10**7
_LARGE_MTU: Final = 9000
_MEGABIT: Final = 10**6
_SENDING: Final[tuple[Limiter, ...]] = ("bpfrl", "cni", "bucket")
_RECEIVING: Final[tuple[Limiter, ...]] = ("bpfrl", "cooperating", "cni", "bucket")
_WAYS: Final[dict[Direction, tuple[Limiter, ...]]] = {"egress": _SENDING, "ingress": _RECEIVING}
_LIVE: Final[tuple[tuple[Traffic, int], ...]] = (("change", FEW_FLOWS), ("late", BULK_FLOWS))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run.

    Attributes:
        seconds: length of each run, without the omitted seconds.
        rates: the limits, bit/s.
        flows: numbers of TCP flows.
        few: those of them that stand for all where not every case is run.
        congestions: the TCP senders' congestion controls.
        rtts: round-trip times, ms, of what is received; 0 is a plain veth.
        shared_flows: flows at each of two RTTs.
        far_rounds: how often the runs with a limit out of reach are repeated.
        alone: situations are run with bpfrl only.
    """

    seconds: int = 4
    rates: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
    flows: tuple[int, ...] = (1, 4, 16, 64)
    few: tuple[int, ...] = (1, 16)
    congestions: tuple[str, ...] = (CUBIC, BBR)
    rtts: tuple[float, ...] = (0, 1, 20, 80)
    shared_flows: tuple[int, ...] = (1, 4)
    far_rounds: int = 3
    alone: bool = False

    def cases(self, group: Group) -> list[Case]:
        """Everything of a group, in order."""
        makers: dict[Group, Callable[[], Iterator[Case]]] = {
            "idle": self._idle,
            "egress": self._egress,
            "udp": lambda: self._other("udp", 1, ""),
            "mixed": lambda: self._other("mixed", FEW_FLOWS, CUBIC),
            "ingress": self._ingress,
            "sharing": self._sharing,
            "situations": self._situations,
            "far": self._far,
            "first": _first,
            "cost": self._cost,
        }
        return list(makers[group]())

    def _idle(self) -> Iterator[Case]:
        for rtt in self.rtts:
            yield Case("none", "idle", "egress", None, 0, "", rtts=_rtts(rtt))

    def _egress(self) -> Iterator[Case]:
        for flows in self.flows:
            yield Case("none", "tcp", "egress", None, flows, CUBIC)
            for congestion in self.congestions:
                # With as many flows as make the most of it, the second one is compared too.
                if congestion != CUBIC and flows != self.few[-1]:
                    continue
                # There is no time for the bucket in all.
                limiters = _SENDING if flows in self.few and congestion == CUBIC else _SENDING[:2]
                for rate in self.rates:
                    case = Case("none", "tcp", "egress", rate, flows, congestion)
                    yield from _compared(case, limiters)
                    if flows == FEW_FLOWS:
                        yield replace(case, limiter="cni", burst=cni.SMALL_BURST)

    def _other(self, traffic: Traffic, flows: int, congestion: str) -> Iterator[Case]:
        for rate in self.rates:
            yield from _compared(Case("none", traffic, "egress", rate, flows, congestion), _SENDING)

    def _ingress(self) -> Iterator[Case]:
        for rtt in self.rtts:
            # What the wire itself can carry: with many flows, of packets that come one by one.
            yield Case("none", "tcp", "ingress", None, self.flows[-1], CUBIC, rtts=_rtts(rtt))
            for rate in self._faster():
                for flows in self.flows:
                    for congestion in self.congestions:
                        case = Case("none", "tcp", "ingress", rate, flows, congestion, rtts=_rtts(rtt))
                        yield from _compared(case, self._receiving(case))

    def _receiving(self, case: Case) -> Sequence[Limiter]:
        """What a case of the matrix is run with: bpfrl by itself in all, the others in few."""
        if case.flows not in self.few or case.congestion != CUBIC:
            return _RECEIVING[:1]
        return _RECEIVING[:2] if case.rtts == (1,) else _RECEIVING

    def _sharing(self) -> Iterator[Case]:
        for direction, limiters in _WAYS.items():
            for rate in self._faster()[:2]:
                for flows in self.shared_flows:
                    case = Case("none", "tcp", direction, rate, flows, CUBIC, rtts=SHARED_RTTS)
                    yield from _compared(case, limiters)

    def _faster(self) -> tuple[int, ...]:
        """The limits of what is received."""
        return tuple(rate for rate in self.rates if rate > _MEGABIT)

    def _situations(self) -> Iterator[Case]:
        bulk = Case("none", "tcp", "egress", HIGH_RATE, FEW_FLOWS, CUBIC)
        for changed in (replace(bulk, ipv6=True), replace(bulk, mtu=_LARGE_MTU)):
            yield from self._special(changed, _SENDING)
            yield from self._special(replace(changed, direction="ingress"), _RECEIVING[:2])
        yield from self._special(replace(bulk, direction="both"), _RECEIVING)
        alone = replace(bulk, flows=0, congestion="")
        for direction, limiters in _WAYS.items():
            yield from self._special(replace(alone, traffic="fetches", direction=direction), ("none", *limiters))
        yield from self._special(replace(alone, traffic="datagrams"), _SENDING)
        quic = replace(alone, traffic="quic", rate=_QUIC_RATE, rtts=(_FAR_RTT,))
        yield from self._special(quic, ("none", *_SENDING))
        yield from self._special(replace(bulk, traffic="reader", direction="ingress"), ("none", *_RECEIVING))
        # The plugin is only called when a pod starts and when it ends: its limit cannot be changed, nor come late.
        for traffic, flows in _LIVE:
            live = replace(bulk, traffic=traffic, flows=flows)
            yield from self._special(live, ("bpfrl", "bucket"))
            yield from self._special(replace(live, direction="ingress"), _RECEIVING[:2])
            if not self.alone:
                far = replace(live, direction="ingress", rtts=(_FAR_RTT,))
                yield from _compared(far, ("bpfrl", "cooperating", "bucket"))

    def _special(self, case: Case, limiters: Sequence[Limiter]) -> Iterator[Case]:
        return _compared(case, ("bpfrl",) if self.alone else limiters)

    def _far(self) -> Iterator[Case]:
        """A limit near, one out of reach, and none, in turn, and each as often first."""
        ways: list[tuple[Limiter, int | None]] = [("bpfrl", NEAR_RATE), ("bpfrl", FAR_RATE), ("none", None)]
        for number in range(self.far_rounds):
            for flows in self.flows[:3]:
                for limiter, rate in ways[number % 3 :] + ways[: number % 3]:
                    yield Case(limiter, "tcp", "egress", rate, flows, CUBIC)

    def _cost(self) -> Iterator[Case]:
        ways: tuple[tuple[Traffic, Direction], ...] = (("tcp", "egress"), ("tcp", "ingress"), ("udp", "egress"))
        for traffic, direction in ways:
            for rate in self.rates:
                flows, congestion = (FEW_FLOWS, CUBIC) if traffic == "tcp" else (0, "")
                yield Case("bpfrl", traffic, direction, rate, flows, congestion)


QUICK: Final = Plan(
    seconds=2,
    rates=(10**8,),
    flows=(16,),
    few=(16,),
    congestions=(CUBIC,),
    rtts=(0, 20),
    shared_flows=(1,),
    far_rounds=1,
    alone=True,
)


def _first() -> Iterator[Case]:
    """Three bursts: bpfrl's own, the plugin's of the other cases, and what it gets when nobody has chosen one."""
    ways: tuple[tuple[Limiter, int | None], ...] = (("bpfrl", None), ("cni", None), ("cni", cni.RUNTIME_BURST))
    for limiter, burst in ways:
        yield Case(limiter, "tcp", "egress", _FIRST_SECOND_RATE, 1, CUBIC, burst)


def _compared(case: Case, limiters: Sequence[Limiter]) -> Iterator[Case]:
    for limiter in limiters:
        yield replace(case, limiter=limiter, rate=None if limiter == "none" else case.rate)


def _rtts(rtt: float) -> tuple[float, ...]:
    return (rtt,) if rtt else ()
