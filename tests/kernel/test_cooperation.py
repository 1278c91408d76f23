"""Limited receivers tell their senders how fast to send, in a TCP option on ACKs, and these keep to it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest

from bench.lab import PEER_ADDRESS, POD_ADDRESS, POD_ADDRESS_6, Lab
from bench.traffic import jain
from bpfrl.bpf import law
from tests.kernel.conftest import (
    MEASURES,
    SYN,
    UNPACED,
    Capture,
    Counted,
    End,
    Side,
    arrived,
    attached,
    attached_to,
    connect,
    cooperation,
    detach,
    entries,
    flowing,
    limit,
    peer_end,
    pod_end,
    program_on,
    rates,
    until,
)

pytestmark = MEASURES

MBIT = 10**6
MEGABYTE = 2**20
# The other experimental option, of option.bpf.c.
THEIRS = (254, bytes.fromhex("123401020304"))


def cooperate(bed: Lab, path: Path | None = None) -> str:
    return bed.bpfrl("attach", "--cooperate", "--cgroup", str(path or bed.cgroup_root)).stdout


def stop_cooperating(bed: Lab) -> str:
    return bed.bpfrl("detach", "--cooperate", "--cgroup", str(bed.cgroup_root)).stdout


def pacing(megabits: float) -> float:
    """The SO_MAX_PACING_RATE, byte/s, of a socket that may use so much: it counts payload, the limit counts packets."""
    return megabits * MBIT / 8 * 247 / 256


def paced(sender: Side, megabits: float) -> None:
    """Wait until each connection may send no faster than this."""
    until(lambda: max(sender.each("pacing")) <= pacing(megabits), what=lambda: sender.each("pacing"))


@pytest.mark.parametrize("address", [POD_ADDRESS, POD_ADDRESS_6], ids=["ipv4", "ipv6"])
def test_eight_flows_share_a_limit_without_a_loss(bed: Lab, address: str) -> None:
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    sender, receiver = flowing(peer_end(bed), pod_end(bed), address, 8)
    paced(sender, 10)
    rates(receiver, 0.5)
    before, resent = Counted.now(bed, "ingress"), sum(sender.each("retransmits"))
    found = rates(receiver, 2)
    assert Counted.now(bed, "ingress").since(before).dropped_packets == 0
    assert sum(sender.each("retransmits")) == resent
    assert 0.85 < sum(found) / 10e6 < 1
    assert jain(found) > 0.95
    # Each its eighth, and not a pause of the one while the other sends.
    assert max(sender.each("pacing")) < pacing(10 / 4)


def test_senders_are_let_go_when_their_receivers_limit_or_the_cooperation_ends(bed: Lab) -> None:
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    sender, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 2)
    paced(sender, 10)
    stop_cooperating(bed)
    assert sender.each("pacing") == [UNPACED] * 2

    cooperate(bed)
    paced(sender, 10)
    detach(bed)
    until(lambda: sender.each("pacing") == [UNPACED] * 2, what=lambda: sender.each("pacing"))
    until(lambda: sum(rates(receiver, 0.5)) > 100e6, 10)


def test_nothing_is_left_of_it(bed: Lab) -> None:
    folder = cooperation(bed.cgroup_root)
    assert cooperate(bed) == f"{bed.cgroup_root} cooperates\n"
    before = attached_to(bed.cgroup_root)
    assert [kind for kind, _ in before] == ["cgroup_sock_ops"]
    assert cooperate(bed) == f"{bed.cgroup_root} unchanged\n"
    assert attached_to(bed.cgroup_root) == before
    limit(bed, "--rate", "10mbit")
    assert entries(bed) == sorted([bed.pod_uid, folder])
    assert stop_cooperating(bed) == f"{bed.cgroup_root} cooperates no more\n"
    assert (attached_to(bed.cgroup_root), entries(bed)) == ([], [bed.pod_uid])
    assert stop_cooperating(bed) == f"{bed.cgroup_root} does not cooperate\n"

    cooperate(bed)
    detach(bed)
    assert (attached(bed), entries(bed)) == ([], [folder])
    stop_cooperating(bed)
    assert (attached_to(bed.cgroup_root), entries(bed)) == ([], [])


def test_who_does_not_cooperate_skips_the_option(bed: Lab) -> None:
    cooperate(bed, bed.cgroup_root / "kubepods.slice")
    limit(bed, "--ingress", "10mbit")
    with Capture(bed.peer_namespace) as capture:
        sender, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 4)
        rates(receiver, 1)
        [*found] = rates(receiver, 1.5)
    assert any(segment.offer for segment in capture.sent_from(7000))
    assert sender.each("pacing") == [UNPACED] * 4
    assert 0.7 < sum(found) / 10e6 < 1.2


def test_a_transfer_is_what_was_sent(bed: Lab) -> None:
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    pod, peer = pod_end(bed), peer_end(bed)
    pod.listen(7000)
    sender, receiver = connect(peer, pod, POD_ADDRESS, 4)
    receiver.receive()
    sender.send(MEGABYTE // 4)
    arrived(sender, receiver, 10)


def test_only_acks_without_data_carry_the_option(bed: Lab) -> None:
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    pod, peer = pod_end(bed), peer_end(bed)
    pod.listen(7000)
    peer.listen(7001)
    with Capture(bed.peer_namespace) as capture:
        sender, receiver = connect(peer, pod, POD_ADDRESS, 2)
        # A connection of the pod's own, and one on which it sends as well.
        own_receiver, own_sender = connect(pod, peer, PEER_ADDRESS, port=7001)
        for sending, receiving in ((sender, receiver), (own_sender, own_receiver)):
            receiving.receive()
            sending.send(MEGABYTE // 4)
        Side(pod, receiver.numbers[:1]).send(MEGABYTE // 4)
        Side(peer, sender.numbers[:1]).receive()
        for sending, receiving in ((sender, receiver), (own_sender, own_receiver)):
            arrived(sending, receiving, 10)
        arrived(Side(pod, receiver.numbers[:1]), Side(peer, sender.numbers[:1]), 10)
    segments = capture.segments
    of_pod = [segment for segment in segments if segment.ports[0] == 7000 or segment.ports[1] == 7001]
    syns = [segment for segment in segments if segment.flags & SYN]
    assert len(syns) == 6
    assert any(segment.payload for segment in of_pod)
    assert [segment for segment in segments if segment.offer and not segment.is_pure_ack] == []
    assert [segment for segment in segments if segment.offer and segment not in of_pod] == []
    for port, place in ((7000, 0), (7001, 1)):
        offers = [segment.offer for segment in of_pod if segment.ports[place] == port and segment.is_pure_ack]
        assert sum(map(bool, offers)) > len(offers) / 2
        # The rate is the fair one: above nothing, and never above the cap.
        assert max(offer for offer in offers if offer) <= 10e6 * law.FAIR_CAP_PERCENT / 100


@pytest.mark.parametrize("places", ["pod", "above", "both"])
def test_another_program_that_writes_an_option(bed: Lab, places: str) -> None:
    """Both arrive, in the same packet, and the limit holds."""
    paths = {"pod": [bed.pod_cgroup], "above": [bed.cgroup_root], "both": [bed.cgroup_root, bed.pod_cgroup]}[places]
    with program_on(bed, "option.bpf.c", "sock_ops", *paths):
        cooperate(bed)
        limit(bed, "--ingress", "10mbit")
        with Capture(bed.peer_namespace) as capture:
            sender, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 4)
            paced(sender, 10)
            rates(receiver, 0.5)
            before = Counted.now(bed, "ingress")
            found = rates(receiver, 1.5)
            counted = Counted.now(bed, "ingress").since(before)
    acks = [segment for segment in capture.sent_from(7000) if segment.is_pure_ack]
    assert sum(1 for segment in acks if THEIRS in segment.options) > 0.9 * len(acks)
    assert sum(1 for segment in acks if THEIRS in segment.options and segment.offer) > len(acks) / 2
    assert 0.8 < sum(found) / 10e6 < 1
    assert counted.dropped_packets == 0


def test_a_sender_with_a_limit_of_its_own_keeps_to_the_lower_of_both(bed: Lab) -> None:
    uid = str(uuid.uuid4())
    path = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{uid.replace('-', '_')}.slice"
    path.mkdir()
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    bed.bpfrl("attach", "--pod-uid", uid, "--egress", "4mbit")
    sender, receiver = flowing(End(bed, bed.peer_namespace, path), pod_end(bed), POD_ADDRESS)

    def settles(least: float, most: float) -> None:
        until(lambda: least < rates(receiver, 0.5)[0] / MBIT < most, 5, lambda: rates(receiver, 0.5))

    settles(3, 4)
    assert max(sender.each("pacing")) <= pacing(4 * 1.25)
    limit(bed, "--ingress", "2mbit")
    settles(1.5, 2.1)
    assert max(sender.each("pacing")) <= pacing(2 * 1.25)
    bed.bpfrl("detach", "--pod-uid", uid)
    rates(receiver, 0.3)
    assert max(sender.each("pacing")) <= pacing(2 * 1.25)
    # The one goes and the other stays, both ways round.
    bed.bpfrl("attach", "--pod-uid", uid, "--egress", "4mbit")
    limit(bed, "--ingress", "10mbit")
    settles(3, 4)
    detach(bed)
    settles(3, 4)
    assert max(sender.each("pacing")) <= pacing(4 * 1.25)


def test_connections_from_before_cooperate(bed: Lab) -> None:
    limit(bed, "--ingress", "10mbit")
    sender, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 4)
    rates(receiver, 0.5)
    assert sender.each("pacing") == [UNPACED] * 4
    cooperate(bed)
    paced(sender, 10)
    rates(receiver, 0.5)
    before = Counted.now(bed, "ingress")
    rates(receiver, 1)
    assert Counted.now(bed, "ingress").since(before).dropped_packets == 0


def test_where_packets_with_the_option_are_thrown_away_receivers_stop_offering(bed: Lab) -> None:
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    with program_on(bed, "middlebox.bpf.c", "ingress", bed.world_cgroup), Capture(bed.peer_namespace) as capture:
        pod, peer = pod_end(bed), peer_end(bed)
        pod.listen(7000)
        sender, receiver = connect(peer, pod, POD_ADDRESS)
        receiver.receive()
        sender.send(MEGABYTE)
        arrived(sender, receiver, 6)
    acks = [segment for segment in capture.sent_from(7000) if segment.is_pure_ack]
    offered = [segment for segment in acks if segment.offer]
    assert sender.each("pacing") == [UNPACED]
    assert 0 < len(offered) < 32
    assert offered[-1].at < acks[0].at + 3


def test_probes_of_an_idle_connection_do_not_end_the_offers(bed: Lab) -> None:
    """Their ACKs acknowledge nothing new, and nothing was lost."""
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    pod, peer = pod_end(bed), peer_end(bed)
    pod.listen(7000)
    with Capture(bed.peer_namespace) as capture:
        sender, receiver = connect(peer, pod, POD_ADDRESS)
        peer.keepalive(sender.numbers[0])
        until(lambda: len(capture.sent_from(7000)) > 3)
        idle = time.monotonic()
        receiver.receive()
        sender.send(MEGABYTE // 4)
        arrived(sender, receiver, 5)
    assert is_offering(capture, idle)


def test_a_reader_that_has_stalled_goes_on_offering(bed: Lab) -> None:
    """A window that opens again is told by ACKs that acknowledge nothing new."""
    cooperate(bed)
    limit(bed, "--ingress", "10mbit")
    pod, peer = pod_end(bed), peer_end(bed)
    pod.listen(7000)
    with Capture(bed.peer_namespace) as capture:
        sender, receiver = connect(peer, pod, POD_ADDRESS)
        sender.send(MEGABYTE // 4)
        until(lambda: [ack for ack in capture.sent_from(7000) if not ack.window])
        stalled = time.monotonic()
        receiver.receive(2 * MBIT)
        arrived(sender, receiver, 5)
    assert is_offering(capture, stalled)


def is_offering(capture: Capture, since: float) -> bool:
    """More than now and then."""
    acks = [segment for segment in capture.sent_from(7000) if segment.is_pure_ack and segment.at > since]
    return len(acks) > 10 and sum(1 for segment in acks if segment.offer) > len(acks) / 3
