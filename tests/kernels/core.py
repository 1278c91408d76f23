"""What has to hold on every kernel: :mod:`tests.kernels.run` runs it in each, and pytest on this one, by its path.

Time is the scarcest thing in an emulated machine: a command takes ten seconds there. So each test does several
things with one limiter, looks at counters itself instead of by the command, and gives everything time. What may never
pass is exact; how near to the limit a run comes, an emulated machine's timers decide.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from bench.lab import PEER_ADDRESS, Lab, lab
from bpfrl.bpf import law, limiter
from bpfrl.bpf.layout import Counters
from bpfrl.node.agent import Agent
from tests.kernel.conftest import UNPACED, bpftool, connect, entries, peer_end, pod_end, until

Record = Callable[[str, object], None]

MEGABITS = 10
RATE = MEGABITS * 10**6
SECONDS = 6
# Longer than any test looks.
FOR_EVER = "600"
COMMAND_SECONDS = 120.0
# Payload of 1500 byte at layer 3, and one percent for the rounding of reports.
CEILING = 1448 / 1500 * 1.01
# The least that is expected of senders that keep to the limit by themselves, and of those that only drops reach.
KEEPING, POLICED = 0.6, 0.25


class Sent(NamedTuple):
    """What passed a limiter in some seconds, bit/s at layer 3, and which part of the packets was dropped."""

    rate: float
    dropped: float


@pytest.fixture
def bed() -> Iterator[Lab]:
    with lab() as built:
        yield built


@pytest.fixture(scope="session")
def found() -> dict[str, str]:
    """What bpfrl doctor finds on this kernel: "ok", "warning" or "missing", by what it looked at."""
    with lab() as built:
        said = built.bpfrl("doctor", "-o", "json", timeout=COMMAND_SECONDS, check=False).stdout
    return {check["name"]: check["mark"] for check in json.loads(said)["checks"]}


def bpfrl(bed: Lab, *arguments: str) -> str:
    return bed.bpfrl(*arguments, timeout=COMMAND_SECONDS).stdout


def attach(bed: Lab, *options: str) -> None:
    bpfrl(bed, "attach", "--pod-uid", bed.pod_uid, *options)


def status(bed: Lab) -> limiter.Status:
    looked = Agent(bed.bpffs).limiter(bed.pod_uid)
    assert isinstance(looked, limiter.Status), looked
    return looked


def counters(bed: Lab, direction: str) -> Counters:
    found: Counters = getattr(status(bed), direction)
    return found


def sent(bed: Lab, direction: str, seconds: float) -> Sent:
    before, start = counters(bed, direction), time.monotonic()
    time.sleep(seconds)
    after, elapsed = counters(bed, direction), time.monotonic() - start
    passed, dropped = (
        after.passed_packets - before.passed_packets,
        after.dropped_packets - before.dropped_packets,
    )
    return Sent((after.passed_bytes - before.passed_bytes) * 8 / elapsed, dropped / max(passed + dropped, 1))


def tell(record: Record, name: str, value: float) -> None:
    record(name, f"{value:.4g}")


def test_doctor_finds_nothing_missing(found: dict[str, str], record_property: Record) -> None:
    record_property("found", json.dumps(found))
    assert "missing" not in found.values()


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_tcp_holds_the_limit(bed: Lab, found: dict[str, str], direction: str, record_property: Record) -> None:
    attach(bed, f"--{direction}", f"{MEGABITS}mbit")
    transfer = bed.transfer("-P", "4", "-t", str(SECONDS + 3), "-O", "2", to_pod=direction == "ingress")
    transfer.begin()
    time.sleep(3)
    run = sent(bed, direction, SECONDS - 1)
    report = transfer.finish().client["end"]
    goodput = report["sum_received"]["bits_per_second"]
    tell(record_property, "goodput", goodput)
    tell(record_property, "dropped", run.dropped)
    depth = law.INGRESS_DROP_NS / 1e9 if direction == "ingress" else 0
    assert goodput < RATE * CEILING * (1 + depth / SECONDS)
    assert run.rate < RATE * 1.03
    # What is paced fills its limit. What can only be dropped fills it badly.
    by_itself = direction == "egress" or found["window clamp"] == "ok"
    assert goodput > RATE * (KEEPING if by_itself else POLICED)
    if direction == "egress":
        assert run.dropped < 0.02


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_udp_holds_the_limit(bed: Lab, direction: str, record_property: Record) -> None:
    attach(bed, f"--{direction}", f"{MEGABITS}mbit")
    options = ("-u", "-b", f"{2 * MEGABITS}M", "-l", "1400", "-t", str(SECONDS + 3))
    transfer = bed.transfer(*options, to_pod=direction == "ingress")
    transfer.begin()
    time.sleep(3)
    run = sent(bed, direction, SECONDS - 1)
    report = transfer.finish().client["end"]["sum"]
    goodput = report["bits_per_second"] * (1 - report["lost_percent"] / 100)
    tell(record_property, "goodput", goodput)
    tell(record_property, "dropped", run.dropped)
    assert 0.8 * RATE < run.rate < 1.03 * RATE
    assert run.dropped > 0.2
    assert goodput < RATE * (1 + (law.INGRESS_DROP_NS / 1e9 + 0.1) / SECONDS)


def test_a_limit_changes_while_it_is_used_and_goes_without_a_trace(
    bed: Lab, found: dict[str, str], record_property: Record
) -> None:
    attach(bed, "--egress", f"{MEGABITS}mbit")
    programs = loaded()
    assert len(programs) == 3
    peer = peer_end(bed)
    peer.listen(7000)
    idle, _ = connect(pod_end(bed), peer, PEER_ADDRESS)
    bed.transfer("-P", "2", "-t", FOR_EVER).begin()
    for megabits in (2 * MEGABITS, MEGABITS // 2):
        attach(bed, "--egress", f"{megabits}mbit")
        time.sleep(1)
        run = sent(bed, "egress", 4)
        tell(record_property, f"at {megabits} Mbit/s", run.rate)
        assert KEEPING * megabits * 1e6 < run.rate < 1.03 * megabits * 1e6
    assert loaded() == programs, "a change of limits must be no other program"

    [item] = json.loads(bpfrl(bed, "list", "-o", "json"))["items"]
    assert (item["uid"], item["egress"]["limit_bits_per_second"]) == (bed.pod_uid, MEGABITS // 2 * 10**6)
    assert item["egress"]["passed_bytes"] > 1e6

    bpfrl(bed, "detach", "--pod-uid", bed.pod_uid)
    assert entries(bed) == []
    until(lambda: not loaded(), what=loaded)
    before, start = sent_by_device(bed), time.monotonic()
    time.sleep(3)
    after = (sent_by_device(bed) - before) * 8 / (time.monotonic() - start)
    tell(record_property, "after", after)
    assert after > 2 * MEGABITS * 1e6, "the connections that were busy keep their pace"
    kept = idle.each("pacing") != [UNPACED]
    record_property("idle connections", "keep their pace" if kept else "let go")
    assert kept == (found["iter/tcp"] != "ok")


def loaded() -> list[int]:
    """The ids of a limiter's programs, as bpftool sees them; it cannot show the cgroups of a kernel older than it."""
    return sorted(program["id"] for program in bpftool("prog", "show") if program.get("name", "").startswith("bpfrl_"))


def sent_by_device(bed: Lab) -> int:
    """Bytes that have left the pod's device."""
    command = ["ip", "-n", bed.pod_namespace, "-s", "-j", "link", "show", "eth0"]
    [link] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return int(link["stats64"]["tx"]["bytes"])


def test_connections_from_before_are_held_to_the_limit(
    bed: Lab, found: dict[str, str], record_property: Record
) -> None:
    bed.transfer("-P", "2", "-t", FOR_EVER).begin()
    time.sleep(1)
    attach(bed, "--egress", f"{MEGABITS}mbit")
    time.sleep(2)
    run = sent(bed, "egress", 5)
    adopted = status(bed).adopted
    tell(record_property, "rate", run.rate)
    tell(record_property, "dropped", run.dropped)
    assert adopted == (found["callback flags"] == "ok")
    assert RATE * (KEEPING if adopted else POLICED) < run.rate < RATE * 1.03


def test_senders_that_cooperate_lose_nothing(bed: Lab, record_property: Record) -> None:
    bpfrl(bed, "attach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    attach(bed, "--ingress", f"{MEGABITS}mbit")
    bed.transfer("-P", "4", "-t", FOR_EVER, to_pod=True).begin()
    time.sleep(4)
    run = sent(bed, "ingress", 5)
    tell(record_property, "rate", run.rate)
    tell(record_property, "dropped", run.dropped)
    assert KEEPING * RATE < run.rate < 1.03 * RATE
    assert run.dropped < 0.01
    bpfrl(bed, "detach", "--cooperate", "--cgroup", str(bed.cgroup_root))
