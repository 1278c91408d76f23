"""The test bed's delay line: the round-trip times are those that were asked for, and it loses nothing."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from collections.abc import Iterator

import pytest

from bench import wire
from bench.lab import Lab, far_address, lab
from tests.kernel.conftest import MEASURES, Flows

pytestmark = MEASURES

RTTS = (1, 20, 80)
LAN, COUNTRY, OCEAN = range(3)
# A path through two more namespaces, and wakeups of the wire; a busy machine has both later.
SLACK_MS = 3


@pytest.fixture(scope="module", autouse=True)
def bed() -> Iterator[Lab]:
    if os.geteuid():
        pytest.skip("needs root")
    with lab(rtts=RTTS) as built:
        yield built


def namespaces() -> set[str]:
    """Those of the labs of this process."""
    return {name for name in os.listdir("/run/netns") if name.startswith(f"bpfrl-{os.getpid()}-")}


@pytest.mark.parametrize("index", range(len(RTTS)))
@pytest.mark.parametrize("ipv6", [False, True])
def test_each_far_address_is_its_round_trip_time_away(bed: Lab, index: int, ipv6: bool) -> None:
    times = bed.ping(20, 0.01, far_address(index, ipv6))
    assert len(times) == 20
    assert RTTS[index] * 0.9 < statistics.median(times) < RTTS[index] + SLACK_MS


@pytest.mark.parametrize("to_pod", [False, True])
@pytest.mark.parametrize("ipv6", [False, True])
def test_a_tcp_flow_fills_a_gigabit_at_20_ms(bed: Lab, to_pod: bool, ipv6: bool) -> None:
    flows = Flows.of(bed.iperf3("-t", "1", "-O", "1", far=far_address(COUNTRY, ipv6), to_pod=to_pod))
    assert flows.goodput > 1e9
    assert 20 * 0.9 < flows.rtt_ms < 3 * 20


def test_segments_cross_whole(bed: Lab) -> None:
    def packets() -> int:
        command = bed.in_far("ip", "-s", "-j", "link", "show", "wire")
        [device] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return int(device["stats64"]["rx"]["packets"])

    before = packets()
    report = bed.iperf3("-n", "20M", far=far_address(LAN))
    assert report["end"]["sum_received"]["bytes"] / (packets() - before) > 5 * 1500


@pytest.mark.parametrize("to_pod", [False, True])
def test_two_round_trip_times_at_once(bed: Lab, to_pod: bool) -> None:
    options = ("-t", "2", "-b", "50M")
    transfers = [
        bed.transfer(*options, port=5201 + index, far=far_address(index), to_pod=to_pod) for index in (COUNTRY, OCEAN)
    ]
    for transfer in transfers:
        transfer.begin()
    near, far = (Flows.of(transfer.finish().client) for transfer in transfers)
    assert 20 * 0.9 < near.rtt_ms < 40 < 80 * 0.9 < far.rtt_ms < 160
    assert near.goodput > 40e6
    assert far.goodput > 40e6


def test_udp_arrives_in_order(bed: Lab) -> None:
    end = bed.iperf3("-u", "-b", "20M", "-l", "200", "-t", "1", far=far_address(COUNTRY))["end"]
    [stream] = end["streams"]
    assert stream["udp"]["packets"] > 10_000
    assert stream["udp"]["out_of_order"] == 0
    # What iperf3 is too slow to read: the wire's own losses are counted below.
    assert stream["udp"]["lost_packets"] < 500


def test_nothing_is_left_of_a_lab_and_its_wire_lost_nothing() -> None:
    before = namespaces()
    with lab(rtts=(1,)) as built:
        built.ping(2, address=far_address(0))
        assert len(namespaces() - before) == 3
        [process] = built._processes
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=5)
        assert said.count("dropped 0 at a full queue, 0 at the device") == 2
    assert process.returncode == 0
    assert namespaces() == before


def test_a_lab_whose_wire_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = namespaces()
    monkeypatch.setattr(wire, "binary", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match="wire"), lab(rtts=(1,)):
        pass
    assert namespaces() == before
