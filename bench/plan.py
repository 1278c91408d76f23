"""Which cases the benchmarks run, and in which order.

What is compared runs one after the other (bpfrl, then the CNI plugin, then the next case), so that a noisy
minute of the machine falls on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.peers import CNI_BURST, CNI_RUNTIME_BURST, CNI_SMALL_BURST
from bench.record import Case, Direction, Limiter, Traffic

# Far above what any machine sends over a veth: what is then missing is what the programs cost.
FAR_RATE: Final = 400 * 10**9
FEW_FLOWS: Final = 4

_FIRST_SECOND_RATE: Final = 10**7
_INGRESS_FLOWS: Final = (1, 16)
_FAR_FLOWS: Final = (1, 4)
_CONTENDERS: Final[tuple[tuple[Limiter, int | None], ...]] = (("bpfrl", None), ("cni", CNI_BURST))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run.

    Attributes:
        seconds: length of each run, without the omitted second.
        rates: the limits, bit/s.
        flows: numbers of TCP flows.
        congestions: the TCP senders' congestion controls.
        far_rounds: how often the runs with a limit out of reach are repeated.
    """

    seconds: int = 8
    rates: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
    flows: tuple[int, ...] = (1, 4, 16, 64)
    congestions: tuple[str, ...] = ("cubic", "bbr")
    far_rounds: int = 6

    def cases(self) -> list[Case]:
        """Everything that gives a row, in order."""
        return [*self._egress(), *self._other("udp", 1), *self._other("mixed", FEW_FLOWS), *self._ingress()]

    def far_cases(self) -> list[Case]:
        """No limit against one out of reach, in turn, and each as often first."""
        far: tuple[tuple[Limiter, int | None], ...] = (("none", None), ("bpfrl", FAR_RATE))
        return [
            Case(limiter, "tcp", "egress", rate, flows, self.congestions[0])
            for number in range(self.far_rounds)
            for flows in _FAR_FLOWS
            for limiter, rate in (far if number % 2 == 0 else reversed(far))
        ]

    def first_second_cases(self) -> list[Case]:
        """Three bursts: bpfrl's own, the plugin's of the other cases, and what it gets when nobody has chosen one."""
        contenders: tuple[tuple[Limiter, int | None], ...] = (*_CONTENDERS, ("cni", CNI_RUNTIME_BURST))
        return [
            Case(limiter, "tcp", "egress", _FIRST_SECOND_RATE, 1, self.congestions[0], burst)
            for limiter, burst in contenders
        ]

    def cost_cases(self) -> list[Case]:
        """The traffic under which the programs' run time is taken."""
        kinds: tuple[tuple[Traffic, str], ...] = (("tcp", self.congestions[0]), ("udp", ""))
        return [
            Case("bpfrl", traffic, "egress", rate, FEW_FLOWS if traffic == "tcp" else 0, congestion)
            for traffic, congestion in kinds
            for rate in self.rates
        ]

    def _egress(self) -> Iterator[Case]:
        for flows in self.flows:
            for congestion in self.congestions:
                yield Case("none", "tcp", "egress", None, flows, congestion)
                for rate in self.rates:
                    yield from _compared("tcp", "egress", rate, flows, congestion)
                    if flows == FEW_FLOWS and congestion == self.congestions[0]:
                        yield Case("cni", "tcp", "egress", rate, flows, congestion, CNI_SMALL_BURST)

    def _other(self, traffic: Traffic, flows: int) -> Iterator[Case]:
        congestion = self.congestions[0] if traffic == "mixed" else ""
        for rate in self.rates:
            yield from _compared(traffic, "egress", rate, flows, congestion)

    def _ingress(self) -> Iterator[Case]:
        for flows in _INGRESS_FLOWS:
            if flows not in self.flows:
                continue
            for congestion in self.congestions:
                for rate in self.rates:
                    yield from _compared("tcp", "ingress", rate, flows, congestion)


QUICK: Final = Plan(seconds=3, rates=(10**7, 10**9), flows=(1, 16), congestions=("cubic",), far_rounds=2)


def _compared(traffic: Traffic, direction: Direction, rate: int, flows: int, congestion: str) -> Iterator[Case]:
    for limiter, burst in _CONTENDERS:
        yield Case(limiter, traffic, direction, rate, flows, congestion, burst)
