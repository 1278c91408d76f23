"""Connections that were there before their limiter, those that it leaves behind, and whose word counts on each."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.lab import PEER_ADDRESS, POD_ADDRESS, Lab
from bench.traffic import jain
from bpfrl.bpf import sockets
from bpfrl.errors import KernelError
from bpfrl.limits import Change
from bpfrl.node.agent import Agent
from tests.kernel.conftest import (
    MEASURES,
    UNPACED,
    Counted,
    End,
    Side,
    attached,
    connect,
    cooperation,
    detach,
    entries,
    flowing,
    limit,
    only,
    peer_end,
    pod_end,
    rates,
    storages,
    until,
)
from tests.objects import of_another_build as another_build

pytestmark = MEASURES

MBIT = 10**6


def held(bed: Lab, direction: str, receiver: Side, megabits: float, seconds: float = 1.5) -> tuple[Counted, float]:
    """The flows are held to the limit for some seconds; what has passed and been dropped, and Jain's index."""
    before, start = Counted.now(bed, direction), time.monotonic()
    found = rates(receiver, seconds)
    counted, elapsed = Counted.now(bed, direction).since(before), time.monotonic() - start
    assert 0.75 < counted.passed_bytes * 8 / elapsed / (megabits * MBIT) < 1.25
    return counted, jain(found)


def test_running_uploads_are_paced_to_a_limit_that_comes(bed: Lab) -> None:
    sender, receiver = flowing(pod_end(bed), peer_end(bed), PEER_ADDRESS, 4)
    until(lambda: min(receiver.each("received")) > MBIT)
    limit(bed, "--egress", "20mbit")
    rates(receiver, 1)
    counted, evenness = held(bed, "egress", receiver, 20)
    assert counted.dropped_packets <= counted.passed_packets / 100
    assert evenness > 0.9
    assert only(bed)["paced"] == "all"
    header, row = bed.bpfrl("list", "-o", "wide").stdout.splitlines()
    assert row[header.index("PACED") :].split()[0] == "all"
    detach(bed)
    assert sender.each("pacing") == [UNPACED] * 4
    rates(receiver, 0.5)
    until(lambda: sum(rates(receiver, 0.5)) > 100e6, 10)


def test_no_running_upload_starves_when_a_low_limit_comes(bed: Lab) -> None:
    """Whatever was under way when the limit came, a flow's next segment does not wait for longer than that takes."""
    _, receiver = flowing(pod_end(bed), peer_end(bed), PEER_ADDRESS, 4)
    until(lambda: min(receiver.each("received")) > MBIT)
    limit(bed, "--egress", "1mbit")
    # What the sockets have sent before the limit still arrives.
    rates(receiver, 0.5)
    before = receiver.each("received")
    until(
        lambda: min(now - then for now, then in zip(receiver.each("received"), before, strict=True)) > 20_000,
        6,
        lambda: [now - then for now, then in zip(receiver.each("received"), before, strict=True)],
    )


def test_running_downloads_are_held_to_a_limit_that_comes(bed: Lab) -> None:
    """A window that was advertised cannot be taken back: until its sender has used it up, only drops hold that."""
    _, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 4)
    until(lambda: min(receiver.each("received")) > MBIT)
    limit(bed, "--ingress", "100mbit")
    rates(receiver, 1)

    def few_drops() -> bool:
        counted, _ = held(bed, "ingress", receiver, 100, 1)
        return counted.dropped_packets <= counted.passed_packets / 8

    until(few_drops, 10)
    detach(bed)
    until(lambda: sum(rates(receiver, 0.5)) > 200e6, 10)


def test_running_downloads_of_those_who_cooperate_are_paced_to_a_limit_that_comes(bed: Lab) -> None:
    bed.bpfrl("attach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    sender, receiver = flowing(peer_end(bed), pod_end(bed), POD_ADDRESS, 4)
    until(lambda: min(receiver.each("received")) > MBIT)
    limit(bed, "--ingress", "20mbit")
    rates(receiver, 1)
    counted, evenness = held(bed, "ingress", receiver, 20)
    assert counted.dropped_packets <= counted.passed_packets / 100
    assert evenness > 0.9
    assert max(sender.each("pacing")) < 1.25 * 20e6 / 8


def test_a_pod_in_two_network_namespaces(bed: Lab) -> None:
    """As one whose container has made another; the sockets of both are found."""
    container = bed.pod_cgroup / "container"
    here, there = End(bed, bed.pod_namespace, container), End(bed, bed.peer_namespace, container)
    worlds = [End(bed, namespace, bed.world_cgroup) for namespace in (bed.peer_namespace, bed.pod_namespace)]
    senders, receivers = zip(
        flowing(here, worlds[0], PEER_ADDRESS), flowing(there, worlds[1], POD_ADDRESS), strict=True
    )
    until(lambda: all(receiver.each("received")[0] > 10**6 for receiver in receivers))
    limit(bed, "--egress", "10mbit")
    until(lambda: all(sender.each("pacing")[0] <= 1.25 * 10e6 / 8 for sender in senders))
    before = Counted.now(bed, "egress")
    rates(receivers[0], 1)
    counted = Counted.now(bed, "egress").since(before)
    assert counted.dropped_packets <= counted.passed_packets / 100
    detach(bed)
    assert [sender.each("pacing") for sender in senders] == [[UNPACED]] * 2


def test_other_cgroups_sockets_in_the_namespace_are_left_alone(bed: Lab) -> None:
    """A host-network pod shares its namespace with everything else on the node."""
    neighbour, peer = End(bed, bed.pod_namespace, bed.world_cgroup), peer_end(bed)
    sender, receiver = flowing(neighbour, peer, PEER_ADDRESS, own=50_000_000)
    own_sender, _ = flowing(pod_end(bed), peer, PEER_ADDRESS, port=7001)
    limit(bed, "--rate", "1mbit")
    until(lambda: own_sender.each("pacing")[0] < 1.25 * MBIT / 8)
    assert rates(receiver, 0.5)[0] > 50 * MBIT
    assert sender.each("pacing") == [50_000_000]
    detach(bed)
    assert sender.each("pacing") == [50_000_000]


def test_an_idle_connection_is_paced_from_its_next_segment_on_and_let_go(bed: Lab) -> None:
    pod, peer = pod_end(bed), peer_end(bed)
    peer.listen(7000)
    asking, answering = connect(pod, peer, PEER_ADDRESS)
    answering.end.answer(answering.numbers, 30_000)
    pod.ask(asking.numbers[0], 30_000, 0, 1)
    limit(bed, "--egress", "1mbit")
    assert asking.each("pacing") == [UNPACED]
    # More than the burst, which is not paced.
    pod.ask(asking.numbers[0], 30_000, 0, 1)
    assert asking.each("pacing")[0] < 1.25 * MBIT / 8
    # Idle again, and nobody sends anything that could tell it.
    detach(bed)
    assert asking.each("pacing") == [UNPACED]


@pytest.mark.parametrize("when", ["before the connection", "before attach", "after attach"])
def test_an_applications_own_pacing_wins_where_it_is_lower(bed: Lab, when: str) -> None:
    own, pod, peer = 500_000, pod_end(bed), peer_end(bed)
    peer.listen(7000)
    sender, receiver = connect(pod, peer, PEER_ADDRESS, own=own if when == "before the connection" else 0)
    others, sink = connect(pod, peer, PEER_ADDRESS, 2)
    if when == "before attach":
        pod.pace(sender.numbers[0], own)
    limit(bed, "--egress", "20mbit")
    for sending, receiving in ((sender, receiver), (others, sink)):
        receiving.receive()
        sending.send()
    if when == "after attach":
        until(lambda: sender.each("pacing")[0] < 1.25 * 20e6 / 8)
        pod.pace(sender.numbers[0], own)
    rates(receiver, 0.7)
    assert rates(receiver, 1)[0] == pytest.approx(own * 8, rel=0.15)
    assert sender.each("pacing")[0] <= own
    limit(bed, "--egress", "1mbit")
    until(lambda: sender.each("pacing")[0] < 1.25 * MBIT / 8)
    detach(bed)
    assert sender.each("pacing") == [own]
    assert others.each("pacing") == [UNPACED] * 2


def test_where_sockets_cannot_be_visited_those_that_send_are_let_go_and_idle_ones_are_not(
    bed: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels before 6.1: what has to be given back, sockops gives back while it is still there."""

    def refuse(*_: object) -> None:
        raise KernelError("no iterator")

    limit(bed, "--egress", "10mbit")
    pod, peer = pod_end(bed), peer_end(bed)
    busy, _ = flowing(pod, peer, PEER_ADDRESS, 4)
    peer.listen(7001)
    idle, _ = connect(pod, peer, PEER_ADDRESS, port=7001)
    until(lambda: max(busy.each("pacing")) < 2 * 10 * MBIT / 8)
    monkeypatch.setattr(sockets, "release", refuse)
    monkeypatch.setattr(sockets, "reachable", lambda: False)
    assert Agent(bed.bpffs).detach(bed.pod_uid) is Change.DETACHED
    assert (attached(bed), entries(bed)) == ([], [])
    assert busy.each("pacing") == [UNPACED] * 4
    assert idle.each("pacing") != [UNPACED]


def test_an_applications_own_pacing_that_is_higher_is_back_after_detach(bed: Lab) -> None:
    pod, peer = pod_end(bed), peer_end(bed)
    sender, receiver = flowing(pod, peer, PEER_ADDRESS, 2)
    limit(bed, "--egress", "10mbit")
    until(lambda: max(sender.each("pacing")) < 1.25 * 10e6 / 8)
    pod.pace(sender.numbers[0], 77_000_000)
    until(lambda: max(sender.each("pacing")) < 1.25 * 10e6 / 8)
    assert sum(rates(receiver, 1)) < 11e6
    detach(bed)
    assert sender.each("pacing") == [77_000_000, UNPACED]


def test_who_listens_may_advertise_wide_windows_again_after_detach(bed: Lab) -> None:
    pod = pod_end(bed)
    limit(bed, "--ingress", "10mbit")
    pod.listen(7000)
    assert 0 < pod.widest(7000) < 2**24
    detach(bed)
    assert pod.widest(7000) > 2**24


def test_paced_flows_follow_each_change_without_a_loss(bed: Lab) -> None:
    limit(bed, "--egress", "1mbit")
    _, receiver = flowing(pod_end(bed), peer_end(bed), PEER_ADDRESS, 2)
    rates(receiver, 0.5)
    before = Counted.now(bed, "egress")
    for megabits in (1, 100, 1):
        limit(bed, "--egress", f"{megabits}mbit")
        rates(receiver, 1)
        assert 0.7 < sum(rates(receiver, 1)) / (megabits * MBIT) < 1.3
    assert Counted.now(bed, "egress").since(before).dropped_packets == 0


def of_another_build(bed: Lab, folder: Path, *options: str) -> Path:
    """A limiter's object as another version would have made it."""
    file = folder / "other.o"
    bed.bpfrl("generate", *options, "-o", str(file))
    file.write_bytes(another_build(file.read_bytes()))
    return file


def test_all_limiters_and_the_cooperation_have_one_map_of_sockets(bed: Lab, tmp_path: Path) -> None:
    other = bed.cgroup_root / "kubepods.slice" / "other"
    other.mkdir()
    limit(bed, "--rate", "10mbit")
    [storage] = storages(bed)
    bed.bpfrl("attach", "--cgroup", str(other), "--rate", "10mbit")
    bed.bpfrl("attach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    assert len(entries(bed)) == 3
    assert storages(bed) == {storage}

    programs = attached(bed)
    limit(bed, "--object", str(of_another_build(bed, tmp_path, "--rate", "5mbit")))
    assert {number for _, number in attached(bed)}.isdisjoint({number for _, number in programs})
    assert storages(bed) == {storage}
    detach(bed)
    limit(bed, "--rate", "10mbit")
    assert storages(bed) == {storage}
    bed.bpfrl("detach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    bed.bpfrl("detach", "--all")
    assert entries(bed) == []


def test_flows_survive_an_upgrade_with_all_that_is_known_of_them(bed: Lab, tmp_path: Path) -> None:
    bed.bpfrl("attach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    image = of_another_build(bed, tmp_path, "--rate", "10mbit")
    limit(bed, "--object", str(image))
    pod, peer = pod_end(bed), peer_end(bed)
    sender, receiver = flowing(pod, peer, PEER_ADDRESS, own=60_000_000)
    until(lambda: sender.each("pacing")[0] < 1.25 * 10e6 / 8)
    limit(bed, "--rate", "10mbit")
    assert 0.75 < rates(receiver, 1)[0] / 10e6 < 1.05
    assert only(bed)["paced"] == "all"
    detach(bed)
    assert sender.each("pacing") == [60_000_000]
    assert cooperation(bed.cgroup_root) in entries(bed)
