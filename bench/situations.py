"""What iperf3 cannot show: short connections, many datagram sockets, QUIC, limits that change, slow readers.

Each function here runs one kind of traffic; its figures are those of :class:`Figures` that it has, and some extra.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from bench.ends import Running, launch, streams
from bench.lab import POD_ADDRESS, Lab, lab
from bench.limiter import rate_of
from bench.peers import limiting
from bench.record import Case, Figures, Traffic
from bench.traffic import (
    PAYLOAD,
    UDP_PACKET,
    answering,
    ask,
    asked,
    connecting_seconds,
    jain,
    measure,
    omitted,
    other_end,
    percentile,
    spare_seconds,
)
from bpfrl.units import Rate

# What a limit is changed between while it is in force, bit/s.
LOW_RATE: Final = 10**6
HIGH_RATE: Final = 10**8
# At which a slow reader reads.
SLOW_RATE: Final = 10**6
SOCKETS: Final = 200
# How near to the limit throughput has settled, and in how many overlapping spans in a row.
NEAR: Final = 0.1
SPANS: Final = 10
# A span is so many windows, or the time of so many packets where that is more: few packets do not make a rate.
SPAN_WINDOWS: Final = 2
SPAN_PACKETS: Final = 80

_PORT: Final = 5401
_SLOW_PORT: Final = 5402
_UDP_FACTOR: Final = 2
_MTU: Final = 1500
# Until a load is what it will be, and how long a limit is watched for.
_STARTING_SECONDS: Final = 1.5
_WATCHED_SECONDS: Final = 3.5
# Of these, when what was under way before a limit has been dealt with.
_DEALT_SECONDS: Final = 1.0


class End(NamedTuple):
    """One end of the test bed: how to run something there, and its address."""

    run: Callable[..., list[str]]
    address: str


class Arrivals(NamedTuple):
    """What came when: from a beginning on the machine's own clock, byte in each window."""

    begin: float
    windows: Sequence[int]

    def settled(self, since: float, until: float, rate: int) -> float | None:
        """Milliseconds from a moment until the throughput is near a limit and stays there; None: it never is."""
        width = max(SPAN_WINDOWS, math.ceil(SPAN_PACKETS * _MTU * 8 / rate / streams.WINDOW_SECONDS))
        expected = rate * PAYLOAD / _MTU / 8 * width * streams.WINDOW_SECONDS
        row = 0
        for window in range(self._window(since), self._window(until) - width):
            near = abs(sum(self.windows[window : window + width]) - expected) <= expected * NEAR
            row = row + 1 if near else 0
            if row == SPANS:
                start = self.begin + (window - SPANS + 1) * streams.WINDOW_SECONDS
                return max(0.0, start - since) * 1000
        return None

    def rate(self, since: float, until: float) -> float:
        """Payload between two moments, bit/s."""
        here = self.windows[self._window(since) : self._window(until)]
        return sum(here) * 8 / (len(here) * streams.WINDOW_SECONDS) if here else 0.0

    def _window(self, moment: float) -> int:
        """The first window that begins after a moment."""
        return int((moment - self.begin) / streams.WINDOW_SECONDS) + 1


class Load:
    """TCP in bulk, from the time that this is made."""

    def __init__(self, bed: Lab, sender: End, receiver: End, connections: int) -> None:
        count = ("--connections", connections)
        self._receiving = launch(bed, receiver.run, "streams", "receive", receiver.address, _PORT, *count)
        self._sending = _send(bed, sender, receiver, _PORT, *count)

    def stop(self) -> Arrivals:
        """End it, the receiver first: what it leaves unread ends the senders."""
        arrivals = Arrivals(**self._receiving.stop())
        self._sending.end()
        return arrivals


def measure_case(case: Case, seconds: int) -> Figures:
    """Run any case for some seconds, besides the omitted ones.

    Raises:
        RuntimeError: what sends, what receives or the limiter has failed.
    """
    return _KINDS.get(case.traffic, measure)(case, seconds)


def run_seconds(case: Case, seconds: int) -> float:
    """How long a case's traffic takes, all in all."""
    special: dict[Traffic, float] = {
        "change": _STARTING_SECONDS + 2 * _WATCHED_SECONDS,
        "late": 2 * _STARTING_SECONDS + _WATCHED_SECONDS,
    }
    usual = connecting_seconds(case) + omitted(case) + seconds + spare_seconds(case)
    return special.get(case.traffic, usual)


def _measure_fetches(case: Case, seconds: int) -> Figures:
    """Workers fetch objects, each over a connection of its own."""
    with lab(case.mtu, case.rtts) as bed, limiting(bed, case) as limiter:
        server, client = _ends(bed, case)
        serving = launch(bed, server.run, "fetches", "serve", server.address, _PORT)
        target = (server.address, _PORT)
        found = launch(bed, client.run, "fetches", "fetch", *target, *_timing(case, seconds)).answer()
        serving.end()
        times, goodput = found["milliseconds"], found["bytes"] * 8 / seconds
        return Figures(
            goodput=goodput,
            layer3=goodput * _MTU / PAYLOAD,
            drops=limiter.counted(case.direction).drops,
            extra={
                "fetches": len(times),
                "fetch_p50": percentile(times, 50),
                "fetch_p99": percentile(times, 99),
                "failures": found["failures"],
            },
        )


def _measure_datagrams(case: Case, seconds: int) -> Figures:
    """Many sockets, each of which offers twice its share."""
    with lab(case.mtu, case.rtts) as bed, limiting(bed, case) as limiter, answering(bed, case):
        sender, receiver = _ends(bed, case)
        timing = _timing(case, seconds)
        receiving = launch(bed, receiver.run, "datagrams", "receive", receiver.address, _PORT, *timing)
        count = ("--sockets", SOCKETS, "--rate", rate_of(case).bits * _UDP_FACTOR)
        sending = launch(bed, sender.run, "datagrams", "send", receiver.address, _PORT, *count, *timing)
        requested = asked(ask(bed, case, seconds))
        refused = sending.answer()["refused"]
        received = receiving.answer()["datagrams"]
        goodput = sum(received) * PAYLOAD * 8 / seconds
        return Figures(
            goodput=goodput,
            layer3=goodput * UDP_PACKET / PAYLOAD,
            jain=jain([*received, *[0] * (SOCKETS - len(received))]),
            p50=requested.p50,
            p99=requested.p99,
            requests=len(requested.milliseconds),
            unanswered=requested.unanswered,
            drops=limiter.counted(case.direction).drops,
            extra={"refused": refused},
        )


def _measure_quic(case: Case, seconds: int) -> Figures:
    """One connection in bulk."""
    with lab(case.mtu, case.rtts) as bed, limiting(bed, case) as limiter:
        sender, receiver = _ends(bed, case)
        timing = _timing(case, seconds)
        receiving = launch(bed, receiver.run, "quic", "receive", receiver.address, _PORT, *timing)
        launch(bed, sender.run, "quic", "send", receiver.address, _PORT, *timing).answer()
        received = receiving.answer()
        drops = limiter.counted(case.direction).drops
        goodput = received["bytes"] * 8 / seconds
        return Figures(
            goodput=goodput,
            drops=drops,
            extra={"lost": drops / (drops + received["datagrams"]) if drops is not None else None},
        )


def _measure_change(case: Case, _seconds: int) -> Figures:
    """A low limit is raised, and lowered again, under a load."""
    with lab(case.mtu, case.rtts) as bed, limiting(bed, replace(case, rate=LOW_RATE)) as limiter:
        load = Load(bed, *_ends(bed, case), case.flows)
        time.sleep(_STARTING_SECONDS)
        dropped = limiter.counted(case.direction).drops or 0
        limiter.change(Rate(HIGH_RATE))
        raised = time.monotonic()
        time.sleep(_WATCHED_SECONDS)
        before = time.monotonic()
        limiter.change(Rate(LOW_RATE))
        lowered = time.monotonic()
        time.sleep(_WATCHED_SECONDS)
        end = time.monotonic()
        arrivals = load.stop()
        return Figures(
            drops=(limiter.counted(case.direction).drops or 0) - dropped,
            extra={
                "raised": arrivals.settled(raised, before, HIGH_RATE),
                "lowered": arrivals.settled(lowered, end, LOW_RATE),
            },
        )


def _measure_late(case: Case, _seconds: int) -> Figures:
    """A limiter is put in place where connections are busy, and taken away again."""
    with lab(case.mtu, case.rtts) as bed:
        load = Load(bed, *_ends(bed, case), case.flows)
        time.sleep(_STARTING_SECONDS)
        before = time.monotonic()
        with limiting(bed, case) as limiter:
            attached = time.monotonic()
            time.sleep(_DEALT_SECONDS)
            early = limiter.counted(case.direction).drops
            time.sleep(_WATCHED_SECONDS - _DEALT_SECONDS)
            later = limiter.counted(case.direction).drops
            limited = time.monotonic()
        detached = time.monotonic()
        time.sleep(_STARTING_SECONDS)
        end = time.monotonic()
        arrivals = load.stop()
        return Figures(
            goodput=arrivals.rate(attached + _DEALT_SECONDS, limited),
            drops=later,
            extra={
                "before": arrivals.rate(before - _STARTING_SECONDS / 2, before),
                "settled": arrivals.settled(attached, limited, rate_of(case).bits),
                "dropped_later": later - early if later is not None and early is not None else None,
                "after": arrivals.rate(detached, end),
            },
        )


def _measure_reader(case: Case, seconds: int) -> Figures:
    """Bulk to the pod, and beside it a connection that is read slowly and one of requests."""
    with lab(case.mtu, case.rtts) as bed, limiting(bed, case) as limiter, answering(bed, case):
        sender, receiver = _ends(bed, case)
        timing = ("--rate", SLOW_RATE, "--seconds", seconds + omitted(case))
        reading = launch(bed, receiver.run, "streams", "sip", receiver.address, _SLOW_PORT, *timing)
        writing = _send(bed, sender, receiver, _SLOW_PORT)
        load = Load(bed, sender, receiver, case.flows)
        begin = time.monotonic()
        requested = asked(ask(bed, case, seconds))
        arrivals = load.stop()
        slow = reading.answer()["rate"]
        writing.end()
        goodput = arrivals.rate(begin + omitted(case), begin + omitted(case) + seconds)
        return Figures(
            goodput=goodput,
            layer3=(goodput + slow) * _MTU / PAYLOAD,
            p50=requested.p50,
            p99=requested.p99,
            requests=len(requested.milliseconds),
            unanswered=requested.unanswered,
            drops=limiter.counted(case.direction).drops,
            extra={"slow": slow / SLOW_RATE},
        )


_KINDS: Final[dict[Traffic, Callable[[Case, int], Figures]]] = {
    "fetches": _measure_fetches,
    "datagrams": _measure_datagrams,
    "quic": _measure_quic,
    "change": _measure_change,
    "late": _measure_late,
    "reader": _measure_reader,
}


def _ends(bed: Lab, case: Case) -> tuple[End, End]:
    """Where a case's bulk comes from, and where it goes."""
    pod = End(bed.in_pod, POD_ADDRESS)
    world = End(bed.in_far if case.rtts else bed.in_peer, other_end(case))
    return (world, pod) if case.direction == "ingress" else (pod, world)


def _send(bed: Lab, sender: End, receiver: End, port: int, *options: object) -> Running:
    """Have one end send to the other as fast as it goes."""
    target = (receiver.address, port, "--bind", sender.address)
    return launch(bed, sender.run, "streams", "send", *target, *options)


def _timing(case: Case, seconds: int) -> tuple[object, ...]:
    return ("--skip", omitted(case), "--seconds", seconds)
