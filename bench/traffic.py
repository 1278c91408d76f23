"""Traffic of iperf3 through the lab, requests beside it, and what comes out of both.

Every case has a lab of its own: namespaces, sockets, and the kernel's memory of earlier connections (tcp_metrics) are
fresh, and nothing of one limiter is left for the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, median, quantiles
from typing import Final, NamedTuple

from bench.ends import Running, launch, requests
from bench.lab import PEER_ADDRESS, PEER_ADDRESS_6, POD_ADDRESS_6, Json, Lab, Reports, Transfer, far_address, lab
from bench.limiter import Attached
from bench.peers import limiting
from bench.record import Case, Direction, Figures, FirstSecond, Headroom

# Connections start up, and credits are spent, in the first seconds: they are left out.
OMITTED_SECONDS: Final = 1
OMITTED_FAR_SECONDS: Final = 2
# To see the whole of a first second, a run has to be a little longer.
FIRST_SECONDS: Final = 2

_PORT: Final = 5201
_ANSWER_PORT: Final = 5301
# Headers of a TCP segment with timestamps, and of a datagram; IPv6's are so much longer.
TCP_HEADERS: Final = 52
_UDP_HEADERS: Final = 28
_IPV6_MORE: Final = 20
# Datagrams carry as much as the segments of TCP over IPv4.
PAYLOAD: Final = 1500 - TCP_HEADERS
UDP_PACKET: Final = PAYLOAD + _UDP_HEADERS
_UDP_FACTOR: Final = 2
# Requests a second: hundreds in a run, and never more than so much of the limit.
REQUEST_RATE: Final = 100
REQUEST_SHARE: Final = 0.05
REQUEST_PACKET: Final = requests.SIZE + TCP_HEADERS
# What iperf3's clock makes of a second; only the last interval of a report is really shorter.
_WHOLE_SECOND: Final = 0.9
# What iperf3 takes to begin, besides one for each connection.
_IPERF_ROUND_TRIPS: Final = 5


class Transferred(NamedTuple):
    """What one iperf3 transfer has carried, by its receiver; rates are bit/s of payload.

    Attributes:
        flows: each flow's rate in the seconds that count.
        seconds: the rate of all flows in each whole second, the omitted ones included.
        payload: byte of all flows from beginning to end.
        wire: bytes at layer 3 for one of payload.
        udp_lost: the share of what was sent that was not received; None for TCP.
        senders: iperf3's summary of each sending TCP socket.
        retransmits: segments that TCP has sent again in the seconds that count.
    """

    flows: list[float]
    seconds: list[float]
    payload: int
    wire: float
    udp_lost: float | None
    senders: list[Json]
    retransmits: int


class Asked(NamedTuple):
    """Times, ms, from requests to responses, and how many of these never came."""

    milliseconds: list[float]
    unanswered: int

    @property
    def p50(self) -> float | None:
        """The median."""
        return median(self.milliseconds) if self.milliseconds else None

    @property
    def p99(self) -> float | None:
        """What 1 of 100 exceeds."""
        return percentile(self.milliseconds, 99)


def percentile(times: Sequence[float], percent: int) -> float | None:
    """What so many of 100 do not exceed; None where there are too few to say."""
    return quantiles(times, n=100, method="inclusive")[percent - 1] if len(times) > 1 else None


def omitted(case: Case) -> int:
    """How many seconds at the beginning of a case do not count."""
    return OMITTED_FAR_SECONDS if max(case.rtts, default=0) > 1 else OMITTED_SECONDS


def connecting_seconds(case: Case) -> float:
    """How long iperf3 takes before it sends anything: it makes one connection after the other."""
    return max(case.rtts, default=0) / 1000 * (_IPERF_ROUND_TRIPS + case.flows)


def spare_seconds(case: Case) -> int:
    """How long transfers go on after the time that counts: no other is to have the limit for itself meanwhile."""
    return 1 if len(case.rtts) > 1 else 0


def measure(case: Case, seconds: int) -> Figures:
    """Run a case for some seconds, besides the omitted ones.

    Raises:
        RuntimeError: iperf3 or the limiter has failed.
    """
    with lab(case.mtu, case.rtts) as bed, limiting(bed, case) as limiter, answering(bed, case):
        transfers = _transfers(bed, case, seconds)
        for transfer in transfers:
            transfer.begin()
        # Until iperf3 has come as far, there is no load.
        time.sleep(connecting_seconds(case))
        asking = ask(bed, case, seconds)
        done = [_transferred(transfer.finish(), case, seconds) for transfer in transfers]
        return _figures(case, done, asked(asking), seconds, limiter)


def measure_first_second(case: Case) -> FirstSecond:
    """What one flow gets through in the first second under a case's limit."""
    with lab() as bed, limiting(bed, case):
        transfer = bed.transfer("-t", str(FIRST_SECONDS), "-C", case.congestion)
        transfer.begin()
        first = transfer.finish().server["intervals"][0]["sum"]
    return FirstSecond(case.limiter, case.rate or 0, case.burst, first["bytes"])


def measure_goodput(case: Case, seconds: int) -> Headroom:
    """The goodput of a case alone: where the machine is the limit, requests beside it would take of it."""
    with lab() as bed, limiting(bed, case):
        [transfer] = _transfers(bed, case, seconds)
        transfer.begin()
        goodput = sum(_transferred(transfer.finish(), case, seconds).flows)
    return Headroom(case.limiter, case.rate, case.flows, [goodput])


@contextmanager
def answering(bed: Lab, case: Case) -> Iterator[None]:
    """Have the other end answer requests."""
    side = bed.in_far if case.rtts else bed.in_peer
    server = launch(bed, side, "requests", "answer", other_end(case), _ANSWER_PORT)
    yield
    server.end()


def ask(bed: Lab, case: Case, seconds: int) -> Running:
    """Begin to make requests from the pod beside a load that begins now."""
    rate = REQUEST_RATE
    if case.rate:
        rate = min(rate, int(case.rate * REQUEST_SHARE / (REQUEST_PACKET * 8)))
    timing = ("--rate", rate, "--skip", omitted(case), "--seconds", seconds)
    return launch(bed, bed.in_pod, "requests", "ask", other_end(case), _ANSWER_PORT, *timing)


def asked(asking: Running) -> Asked:
    """What came of :func:`ask`."""
    return Asked(**asking.answer())


def other_end(case: Case, index: int = 0) -> str:
    """The address outside the pod: at the RTT of that index, if the case has any."""
    if case.rtts:
        return far_address(index, case.ipv6)
    return PEER_ADDRESS_6 if case.ipv6 else PEER_ADDRESS


def udp_options(rate: int | None) -> list[str]:
    """The iperf3 options of UDP at twice a rate."""
    return ["-u", "-l", str(PAYLOAD), "-b", str((rate or 0) * _UDP_FACTOR)]


def directions(case: Case) -> tuple[Direction, ...]:
    """The direction of a case, or each of both."""
    return ("egress", "ingress") if case.direction == "both" else (case.direction,)


def _transfers(bed: Lab, case: Case, seconds: int) -> list[Transfer]:
    """The iperf3 transfers of a case, each with a port of its own."""
    # Not by -O: where iperf3's timers end at once, its first interval that counts is one second of bytes in two.
    duration = ["-t", str(omitted(case) + seconds + spare_seconds(case))]
    tcp = [*duration, "-P", str(case.flows), "-C", case.congestion]
    udp = [*duration, *udp_options(case.rate)]
    kinds = {"tcp": [tcp], "udp": [udp], "mixed": [tcp, udp], "idle": []}[case.traffic]
    made = [
        (options, direction, index) for options in kinds for direction in directions(case)
        for index in range(max(1, len(case.rtts)))
    ]  # fmt: skip
    return [
        bed.transfer(
            *options,
            port=_PORT + number,
            to_pod=direction == "ingress",
            far=other_end(case, index) if case.rtts else None,
            address=_address(case, direction),
        )
        for number, (options, direction, index) in enumerate(made)
    ]


def _address(case: Case, direction: Direction) -> str | None:
    """The address of the server where it is not the lab's usual one."""
    if case.rtts or not case.ipv6:
        return None
    return PEER_ADDRESS_6 if direction == "egress" else POD_ADDRESS_6


def _figures(
    case: Case, transfers: Sequence[Transferred], requested: Asked, seconds: int, limiter: Attached
) -> Figures:
    flows = [flow for each in transfers for flow in each.flows]
    senders = [sender for each in transfers for sender in each.senders]
    by_second = zip(*([second * each.wire for second in each.seconds] for each in transfers), strict=False)
    parts = [sum(each.flows) * each.wire for each in transfers]
    counted = [limiter.counted(direction) for direction in directions(case)]
    drops = [each.drops for each in counted if each.drops is not None]
    passed = sum(each.payload * each.wire for each in transfers)
    answered = len(requested.milliseconds) - requested.unanswered
    return Figures(
        goodput=sum(flows) / len(counted),
        layer3=sum(parts) / len(counted) + answered * REQUEST_PACKET * 8 / seconds,
        parts=parts,
        peak=max(map(sum, by_second), default=0.0) / len(counted),
        jain=jain(flows) if flows else None,
        udp_lost=next((each.udp_lost for each in transfers if each.udp_lost is not None), None),
        retransmits=sum(each.retransmits for each in transfers) if senders else None,
        tcp_rtt=fmean(sender["mean_rtt"] for sender in senders) / 1000 if senders else None,
        p50=requested.p50,
        p99=requested.p99,
        requests=len(requested.milliseconds),
        unanswered=requested.unanswered,
        drops=sum(drops) if drops else None,
        counted=_agreement(case, counted[0].passed, passed),
    )


def _agreement(case: Case, counted: int | None, passed: float) -> float | None:
    ours = case.limiter in {"bpfrl", "cooperating"} and case.direction != "both"
    return counted / passed if ours and counted and passed else None


def _transferred(reports: Reports, case: Case, seconds: int) -> Transferred:
    """Read the reports of a transfer second by second.

    iperf3's own sums go on to the moment at which the client's last message arrives, which a long queue delays.
    """
    intervals = [interval["sum"] for interval in reports.server["intervals"]]
    whole = intervals[: omitted(case) + seconds]
    flows = _flows(reports.server, case, seconds)
    sent = _counting(reports.client, case, seconds)
    tcp = reports.client["start"]["test_start"]["protocol"] == "TCP"
    headers = TCP_HEADERS + _IPV6_MORE * case.ipv6
    return Transferred(
        flows=flows,
        seconds=[each["bits_per_second"] for each in whole if each["seconds"] > _WHOLE_SECOND],
        payload=sum(each["bytes"] for each in intervals),
        wire=case.mtu / (case.mtu - headers) if tcp else UDP_PACKET / PAYLOAD,
        udp_lost=None if tcp else max(0.0, 1 - sum(flows) / sum(_flows(reports.client, case, seconds))),
        senders=[stream["sender"] for stream in reports.client["end"]["streams"]] if tcp else [],
        retransmits=sum(interval["sum"]["retransmits"] for interval in sent) if tcp else 0,
    )


def _counting(report: Json, case: Case, seconds: int) -> list[Json]:
    """What one end says of the seconds that count, one by one."""
    intervals: list[Json] = report["intervals"]
    return intervals[omitted(case) : omitted(case) + seconds]


def _flows(report: Json, case: Case, seconds: int) -> list[float]:
    """What one end says of each flow in the seconds that count, bit/s."""
    counting = _counting(report, case, seconds)
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
