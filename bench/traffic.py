"""Traffic through the lab, and what comes out of it.

Every case has a lab of its own: namespaces, sockets, and the kernel's memory of earlier connections (tcp_metrics) are
fresh, and nothing of one limiter is left for the next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Final, NamedTuple

from bench.lab import Json, Reports, lab
from bench.peers import Counted, limiting
from bench.record import Case, Figures, FirstSecond

# Connections start up, and credits are spent, in the first second: it is left out.
OMITTED_SECONDS: Final = 1
# To see the whole of a first second, a run has to be a little longer.
FIRST_SECONDS: Final = 2

_PORT: Final = 5201
MTU: Final = 1500
# Payload of a full TCP/IPv4 segment with timestamps, and a UDP packet of the same payload.
PAYLOAD: Final = 1448
UDP_PACKET: Final = PAYLOAD + 28
# Often enough to meet the worst moments, and still only a third of a percent of 1 Mbit/s.
PING_SECONDS: Final = 0.2
_UDP_FACTOR: Final = 2
# What iperf3's clock makes of a second; only the last interval of a report is really shorter.
_WHOLE_SECOND: Final = 0.9


class Transferred(NamedTuple):
    """What one iperf3 transfer has carried, by its receiver; rates are bit/s of payload.

    Attributes:
        flows: each flow's rate in the seconds that count.
        seconds: the rate of all flows in each whole second, the omitted one included.
        payload: byte of all flows from beginning to end.
        wire: bytes at layer 3 for one of payload.
        udp_lost: the share of what was sent that was not received; None for TCP.
        senders: iperf3's summary of each sending TCP socket.
    """

    flows: list[float]
    seconds: list[float]
    payload: int
    wire: float
    udp_lost: float | None
    senders: list[Json]


def measure(case: Case, seconds: int) -> Figures:
    """Run a case for some seconds, besides the omitted one.

    Raises:
        RuntimeError: iperf3 or the limiter has failed.
    """
    with lab() as bed, limiting(bed, case) as meter:
        transfers = [
            bed.transfer(*options, port=_PORT + number, to_pod=case.direction == "ingress")
            for number, options in enumerate(_options(case, seconds))
        ]
        for transfer in transfers:
            transfer.begin()
        time.sleep(OMITTED_SECONDS)
        count = int(seconds / PING_SECONDS)
        pings = bed.ping(count, PING_SECONDS)
        done = [_transferred(transfer.finish(), seconds) for transfer in transfers]
        return _figures(done, pings, count, meter())


def measure_first_second(case: Case) -> FirstSecond:
    """What one flow gets through in the first second under a case's limit."""
    with lab() as bed, limiting(bed, case):
        transfer = bed.transfer("-t", str(FIRST_SECONDS), "-C", case.congestion)
        transfer.begin()
        first = transfer.finish().server["intervals"][0]["sum"]
    return FirstSecond(case.limiter, case.rate or 0, case.burst, first["bytes"])


def _options(case: Case, seconds: int) -> list[list[str]]:
    """The iperf3 transfers of a case."""
    duration = ["-t", str(seconds), "-O", str(OMITTED_SECONDS)]
    tcp = [*duration, "-P", str(case.flows), "-C", case.congestion]
    return {
        "tcp": [tcp],
        "udp": [[*duration, *udp_options(case.rate)]],
        "mixed": [tcp, [*duration, *udp_options(case.rate)]],
    }[case.traffic]


def udp_options(rate: int | None) -> list[str]:
    """The iperf3 options of UDP at twice a rate."""
    return ["-u", "-l", str(PAYLOAD), "-b", str((rate or 0) * _UDP_FACTOR)]


def _figures(transfers: Sequence[Transferred], pings: Sequence[float], pings_sent: int, counted: Counted) -> Figures:
    flows = [flow for each in transfers for flow in each.flows]
    senders = [sender for each in transfers for sender in each.senders]
    by_second = zip(*([second * each.wire for second in each.seconds] for each in transfers), strict=False)
    passed = sum(each.payload * each.wire for each in transfers)
    return Figures(
        goodput=sum(flows),
        layer3=sum(sum(each.flows) * each.wire for each in transfers),
        udp_layer3=sum(sum(each.flows) * each.wire for each in transfers if each.udp_lost is not None),
        peak=max(map(sum, by_second), default=0.0),
        jain=jain(flows),
        udp_lost=next((each.udp_lost for each in transfers if each.udp_lost is not None), None),
        retransmits=sum(sender["retransmits"] for sender in senders) if senders else None,
        tcp_rtt=fmean(sender["mean_rtt"] for sender in senders) / 1000 if senders else None,
        ping_mean=fmean(pings) if pings else None,
        ping_max=max(pings, default=None),
        pings_lost=pings_sent - len(pings),
        drops=counted.drops,
        counted=counted.passed / passed if counted.passed and passed else None,
    )


def _transferred(reports: Reports, seconds: int) -> Transferred:
    """Read the reports of a transfer second by second.

    iperf3's own sums go on to the moment at which the client's last message arrives, which a long queue delays.
    """
    intervals = [interval["sum"] for interval in reports.server["intervals"]]
    flows = _flows(reports.server, seconds)
    tcp = reports.client["start"]["test_start"]["protocol"] == "TCP"
    return Transferred(
        flows=flows,
        seconds=[each["bits_per_second"] for each in intervals if each["seconds"] > _WHOLE_SECOND],
        payload=sum(each["bytes"] for each in intervals),
        wire=(MTU if tcp else UDP_PACKET) / PAYLOAD,
        udp_lost=None if tcp else max(0.0, 1 - sum(flows) / sum(_flows(reports.client, seconds))),
        senders=[stream["sender"] for stream in reports.client["end"]["streams"]] if tcp else [],
    )


def _flows(report: Json, seconds: int) -> list[float]:
    """What one end says of each flow in the seconds that count, bit/s."""
    counting = [interval for interval in report["intervals"] if not interval["sum"]["omitted"]][:seconds]
    duration = sum(interval["sum"]["seconds"] for interval in counting)
    by_flow = zip(*(interval["streams"] for interval in counting), strict=True)
    return [sum(stream["bytes"] for stream in parts) * 8 / duration for parts in by_flow]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: (sum x)^2 / (n sum x^2).

    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0])
    (1.0, 0.25)
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0
