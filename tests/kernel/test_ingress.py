"""What a pod receives: its windows and pauses tell senders elsewhere what a lost packet would, without the loss.

The senders here know nothing of the limit, and nobody helps them; test_cooperation.py has those that do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from bench.lab import PEER_ADDRESS, POD_ADDRESS, POD_ADDRESS_6, Lab, far_address, lab
from bench.traffic import jain
from tests.kernel.conftest import (
    MEASURES,
    SYN,
    Capture,
    Counted,
    End,
    Side,
    arrived,
    connect,
    detach,
    far_end,
    flowing,
    limit,
    peer_end,
    pod_end,
    rates,
    until,
)

pytestmark = MEASURES

MBIT = 10**6
COUNTRY, OCEAN = range(2)
# 1448 of 1500 byte are payload; the round-trip time of 20 ms and the run's ends make the rest.
FULL = 0.85
# A machine that pauses for longer than a round trip has a sender probe with a packet that was not lost (RFC 8985).
FEW = 3
MEGABYTE = 2**20
# Its kind among TCP's options (RFC 7323).
WINDOW_SCALE = 3


@pytest.fixture
def far() -> Iterator[Lab]:
    if os.geteuid():
        pytest.skip("needs root")
    with lab(rtts=(20, 80)) as built:
        yield built


def sender_at(bed: Lab, rtt: str) -> tuple[End, dict[str, Any]]:
    """One elsewhere, and what it connects with to be as far away."""
    return (peer_end(bed), {}) if rtt == "near" else (far_end(bed), {"source": far_address(COUNTRY)})


@pytest.mark.parametrize(
    ("address", "ipv6", "congestion"),
    [(POD_ADDRESS, False, "cubic"), (POD_ADDRESS_6, True, "bbr")],
    ids=["ipv4-cubic", "ipv6-bbr"],
)
def test_at_20_ms_a_flow_fills_the_limit_and_loses_nothing(far: Lab, address: str, ipv6: bool, congestion: str) -> None:
    limit(far, "--ingress", "20mbit")
    source = far_address(COUNTRY, ipv6)
    sender, receiver = flowing(far_end(far), pod_end(far), address, source=source, congestion=congestion)
    rates(receiver, 0.5)
    [rate] = rates(receiver, 2)
    assert FULL < rate / 20e6 < 1
    assert sender.each("retransmits")[0] <= FEW
    assert Counted.now(far, "ingress").dropped_packets == 0


def test_a_flow_from_far_away_has_the_share_of_one_from_nearby(far: Lab) -> None:
    limit(far, "--ingress", "20mbit")
    pod, world = pod_end(far), far_end(far)
    near = flowing(world, pod, POD_ADDRESS, port=7000, source=far_address(COUNTRY))
    distant = flowing(world, pod, POD_ADDRESS, port=7001, source=far_address(OCEAN))
    receivers = Side(pod, near[1].numbers + distant[1].numbers)
    rates(receivers, 2)
    found = rates(receivers, 3)
    assert max(found) < 1.5 * min(found)
    assert FULL < sum(found) / 20e6 < 1
    assert near[0].each("retransmits")[0] <= FEW
    assert distant[0].each("retransmits")[0] <= FEW
    assert Counted.now(far, "ingress").dropped_packets == 0


@pytest.mark.parametrize(
    ("address", "congestion"), [(POD_ADDRESS, "cubic"), (POD_ADDRESS_6, "bbr")], ids=["ipv4-cubic", "ipv6-bbr"]
)
def test_where_round_trips_are_short_pauses_share_the_limit(bed: Lab, address: str, congestion: str) -> None:
    limit(bed, "--ingress", "10mbit")
    with Capture(bed.peer_namespace) as capture:
        _, receiver = flowing(peer_end(bed), pod_end(bed), address, 4, congestion=congestion)
        rates(receiver, 1)
        before = Counted.now(bed, "ingress")
        found = rates(receiver, 2.5)
        counted = Counted.now(bed, "ingress").since(before)
    assert 0.8 < sum(found) / 10e6 < 1.15
    assert jain(found) > 0.9
    # A policer of this bucket loses one packet of four here.
    assert counted.dropped_packets <= counted.passed_packets / 20
    acks = capture.sent_from(7000)
    [scale] = {content[0] for ack in acks if ack.flags & SYN for kind, content in ack.options if kind == WINDOW_SCALE}
    assert any(ack.window << scale < 1448 for ack in acks if ack.is_pure_ack)


@pytest.mark.parametrize("way", ["detach", "update"])
def test_a_download_is_let_go(far: Lab, way: str) -> None:
    limit(far, "--ingress", "20mbit")
    _, receiver = flowing(far_end(far), pod_end(far), POD_ADDRESS, source=far_address(COUNTRY))
    rates(receiver, 0.5)
    assert rates(receiver, 1)[0] < 25e6
    if way == "detach":
        detach(far)
    else:
        limit(far, "--egress", "20mbit")
    rates(receiver, 1.5)
    assert rates(receiver, 0.5)[0] > 100e6


@pytest.mark.parametrize("rtt", ["near", "far"])
def test_a_slow_reader_beside_bulk_gets_what_it_reads(far: Lab, rtt: str) -> None:
    limit(far, "--ingress", "10mbit")
    pod, (world, source) = pod_end(far), sender_at(far, rtt)
    _, bulk = flowing(world, pod, POD_ADDRESS, 2, **source)
    pod.listen(7001)
    sender, receiver = connect(world, pod, POD_ADDRESS, port=7001, **source)
    receiver.receive(200_000)
    sender.send(75_000)
    rates(bulk, 0.5)
    slow, *others = rates(Side(pod, receiver.numbers + bulk.numbers), 1.5)
    assert slow == pytest.approx(200_000, rel=0.2)
    assert sum(others) > 0.75 * 10e6
    arrived(sender, receiver, 5)


@pytest.mark.parametrize(("rtt", "client"), [("near", "world"), ("far", "pod")])
def test_requests_beside_bulk_do_not_wait_for_it(far: Lab, rtt: str, client: str) -> None:
    limit(far, "--ingress", "10mbit")
    pod, (world, source) = pod_end(far), sender_at(far, rtt)
    _, bulk = flowing(world, pod, POD_ADDRESS, 4, **source)
    if client == "pod":
        world.listen(7001)
        target = far_address(COUNTRY) if rtt == "far" else PEER_ADDRESS
        asking, answering = connect(pod, world, target, port=7001)
    else:
        pod.listen(7001)
        asking, answering = connect(world, pod, POD_ADDRESS, port=7001, **source)
    answering.end.answer(answering.numbers, 500)
    until(lambda: min(bulk.each("received")) > 200_000)
    times = sorted(asking.end.ask(asking.numbers[0], 500, 0.03, 30))
    # Were they paused or lost as bulk is, they would take 200 ms.
    assert times[15] < 0.060
    assert times[27] < 0.150


@pytest.mark.parametrize(
    ("rtt", "before"),
    [("near", "nothing"), ("near", "listener"), ("near", "connection"), ("far", "nothing"), ("far", "connection")],
)
def test_what_arrives_through_pauses_is_what_was_sent(far: Lab, rtt: str, before: str) -> None:
    """Of several flows, so that they are paused; whether the limiter was there before, or one or both of these."""
    pod, (world, source) = pod_end(far), sender_at(far, rtt)
    if before == "nothing":
        limit(far, "--ingress", "10mbit")
    pod.listen(7000)
    if before == "listener":
        limit(far, "--ingress", "10mbit")
    sender, receiver = connect(world, pod, POD_ADDRESS, 3, **source)
    if before == "connection":
        limit(far, "--ingress", "10mbit")
    receiver.receive()
    sender.send(MEGABYTE // 2)
    arrived(sender, receiver, 10)


def test_what_a_client_fetches_over_a_connection_from_before_is_what_was_sent(bed: Lab) -> None:
    """The pod has connected, with a window scale at which little cannot be said exactly."""
    pod, peer = pod_end(bed), peer_end(bed)
    peer.listen(7000)
    receiver, sender = connect(pod, peer, PEER_ADDRESS, 3)
    limit(bed, "--ingress", "10mbit")
    receiver.receive()
    sender.send(MEGABYTE // 2)
    arrived(sender, receiver, 10)
