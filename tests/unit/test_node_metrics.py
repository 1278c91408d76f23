"""What a node tells, at an agent that is only played; tests/kernel has a real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.libbpf import Cost
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import KernelError, PermissionDeniedError
from bpfrl.limits import Limits, PodRef
from bpfrl.node import metrics as module
from bpfrl.node.agent import Agent
from bpfrl.node.metrics import GrowingSums, NodeMetrics
from bpfrl.units import Rate
from tests.unit.fakes import FAST, SLOW, run, uid_of, until

LONG_AGO, LATER = 1.0, 1e12
PER_POD = ("passed_packets", "passed_bytes", "dropped_packets", "dropped_bytes")


class Played:
    """An agent with the limiters that it is given."""

    def __init__(self) -> None:
        self.bpffs = Path("/sys/fs/bpf")
        self.has: dict[str, Status | Broken] = {}
        self.programs: list[tuple[str, Cost]] = []
        self.mounted = True
        self.error: Exception | None = None
        self.may_read = threading.Event()
        self.may_read.set()
        self.reads = 0

    def limiters(self) -> list[Status | Broken]:
        self.reads += 1
        assert self.may_read.wait(10)
        if self.error:
            raise self.error
        return [self.has[uid] for uid in sorted(self.has)]

    def costs(self) -> list[tuple[str, Cost]]:
        return self.programs

    def is_mounted(self) -> bool:
        if self.error:
            raise self.error
        return self.mounted

    def give(
        self,
        number: int,
        egress: int = 0,
        ingress: int = 0,
        *,
        at: float = LATER,
        limits: Limits = FAST,
        cgroup: int = 7,
    ) -> None:
        """Let it have a limiter that has passed so many packets of 100 byte, and dropped a tenth as many."""
        pod = PodRef(uid_of(number), "shop", f"cart-{number}")
        counted = [Counters(many, many * 100, many // 10, many * 10) for many in (egress, ingress)]
        self.has[pod.uid] = Status(pod, limits, counted[0], counted[1], cgroup, at)

    def take(self, number: int) -> None:
        del self.has[uid_of(number)]

    def breaks(self, number: int) -> None:
        self.has[uid_of(number)] = Broken(uid_of(number), "half of it")


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def metrics(played: Played) -> Iterator[NodeMetrics]:
    made = make(played)
    yield made
    made.close()


def make(played: Played, *, pod_labels: bool = True, most_pods: int = 500) -> NodeMetrics:
    return NodeMetrics(cast(Agent, played), None, pod_labels=pod_labels, most_pods=most_pods)


def scrape(metrics: NodeMetrics) -> dict[str, list[Sample]]:
    """Everything that is told now, by name."""
    run(metrics.refresh())
    return told(metrics.registry)


def told(registry: CollectorRegistry) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def values(samples: list[Sample], *labels: str) -> dict[Any, float]:
    """What samples say, by these labels."""
    found = {tuple(sample.labels[label] for label in labels): sample.value for sample in samples}
    assert len(found) == len(samples)
    return {key[0] if len(key) == 1 else key: value for key, value in found.items()}


def value(found: dict[str, list[Sample]], name: str, **labels: str) -> float:
    [sample] = [sample for sample in found[name] if sample.labels == labels]
    return sample.value


# Pods.


def test_each_pod_tells_what_its_limiter_has_counted(played: Played, metrics: NodeMetrics) -> None:
    played.give(1, 30, 50)
    played.give(2, 7, limits=SLOW)
    found = scrape(metrics)
    expected = {
        "passed_packets": (30, 50, 7, 0),
        "passed_bytes": (3000, 5000, 700, 0),
        "dropped_packets": (3, 5, 0, 0),
        "dropped_bytes": (300, 500, 70, 0),
    }
    places = [(uid_of(number), direction) for number in (1, 2) for direction in ("egress", "ingress")]
    for name, numbers in expected.items():
        assert values(found[f"bpfrl_pod_{name}_total"], "uid", "direction") == dict(zip(places, numbers, strict=True))
    assert values(found["bpfrl_pod_limit_bytes_per_second"], "uid", "direction") == {
        (uid_of(1), "egress"): 125e6,
        (uid_of(1), "ingress"): 125e6,
        (uid_of(2), "egress"): 125_000,
    }


def test_a_limit_that_is_no_whole_byte_is_told_exactly(played: Played, metrics: NodeMetrics) -> None:
    played.give(1, limits=Limits(Rate(1001)))
    assert value_of_only(scrape(metrics)["bpfrl_pod_limit_bytes_per_second"]) == 125.125


def value_of_only(samples: list[Sample]) -> float:
    [sample] = samples
    return sample.value


@pytest.mark.parametrize(
    ("pod_labels", "labels"), [(True, {"uid", "direction", "namespace", "pod"}), (False, {"uid", "direction"})]
)
def test_names_of_pods_are_told_unless_nobody_wants_them(played: Played, pod_labels: bool, labels: set[str]) -> None:
    metrics = make(played, pod_labels=pod_labels)
    played.give(1, 1)
    found = scrape(metrics)
    metrics.close()
    pods = [sample for name, samples in found.items() if name.startswith("bpfrl_pod_") for sample in samples]
    assert len(pods) == 10
    assert {frozenset(sample.labels) for sample in pods} == {frozenset(labels)}
    if pod_labels:
        assert {(sample.labels["namespace"], sample.labels["pod"]) for sample in pods} == {("shop", "cart-1")}


@pytest.mark.parametrize(("most", "told_of", "left_out"), [(0, 0, 5), (1, 1, 4), (4, 4, 1), (5, 5, 0), (100, 5, 0)])
def test_only_so_many_pods_are_told_and_the_others_counted(
    played: Played, most: int, told_of: int, left_out: int
) -> None:
    metrics = make(played, most_pods=most)
    for number in (4, 2, 5, 1, 3):
        played.give(number, 10, at=LATER)
    found = scrape(metrics)
    metrics.close()
    told_uids = {sample.labels["uid"] for sample in found.get("bpfrl_pod_passed_bytes_total", [])}
    # Always the same ones.
    assert told_uids == {uid_of(number) for number in range(1, told_of + 1)}
    assert value(found, "bpfrl_pods_left_out") == left_out
    # The node's own sums leave nobody out.
    assert value(found, "bpfrl_passed_packets_total", direction="egress") == 50
    assert value(found, "bpfrl_limiters", state="ok") == 5


def test_limiters_are_counted_by_what_they_are(played: Played, metrics: NodeMetrics) -> None:
    assert values(scrape(metrics)["bpfrl_limiters"], "state") == {"ok": 0, "broken": 0, "gone": 0}
    played.give(1)
    played.give(2, cgroup=0)
    played.breaks(3)
    found = scrape(metrics)
    assert values(found["bpfrl_limiters"], "state") == {"ok": 1, "broken": 1, "gone": 1}
    # What is broken has no counters; what is gone has had some.
    assert {sample.labels["uid"] for sample in found["bpfrl_pod_passed_bytes_total"]} == {uid_of(1), uid_of(2)}


# The node's own sums.


def total(metrics: NodeMetrics, direction: str = "egress") -> float:
    return value(scrape(metrics), "bpfrl_passed_packets_total", direction=direction)


def test_sums_begin_with_the_process_and_only_grow(played: Played, metrics: NodeMetrics) -> None:
    played.give(1, 1_000_000, at=LONG_AGO)
    # What was counted before this process began would look like traffic of this moment.
    assert total(metrics) == 0
    played.give(1, 1_000_010, at=LONG_AGO)
    assert total(metrics) == 10
    played.give(2, 5)
    assert total(metrics) == 15
    played.take(1)
    assert total(metrics) == 15
    played.give(2, 8)
    assert total(metrics) == 18
    played.take(2)
    assert total(metrics) == 18


def test_a_pod_that_is_limited_anew_counts_anew(played: Played, metrics: NodeMetrics) -> None:
    played.give(1, 100, at=LATER)
    assert total(metrics) == 100
    played.give(1, 30, at=LATER + 1)
    assert total(metrics) == 130
    # Even where it has come as far as the former meanwhile.
    played.give(1, 200, at=LATER + 2)
    assert total(metrics) == 330


def test_a_limiter_that_cannot_be_read_for_a_while_is_not_counted_twice(played: Played, metrics: NodeMetrics) -> None:
    played.give(1, 100)
    assert total(metrics) == 100
    played.breaks(1)
    assert total(metrics) == 100
    played.give(1, 120)
    assert total(metrics) == 120


def test_directions_have_sums_before_there_is_any_pod(metrics: NodeMetrics) -> None:
    found = scrape(metrics)
    for name in PER_POD:
        assert values(found[f"bpfrl_{name}_total"], "direction") == {"egress": 0, "ingress": 0}


@given(st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 100)), max_size=20))
def test_sums_never_shrink(looks: list[dict[int, int]]) -> None:
    sums, before = GrowingSums(), 0
    for look in looks:
        for key, count in look.items():
            sums.add("all", key, (count,), new=True)
        sums.forget(len(look))
        now = sums.sums.get("all", (0,))[0]
        assert now >= before
        before = now


def test_what_is_gone_is_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 10)
    sums = GrowingSums()
    for number in range(1000):
        sums.add("all", number, (1,), new=True)
        sums.add("all", "lives", (number,), new=True)
        sums.forget(1)
        assert len(sums._before) <= 12
    assert sums.sums["all"] == (1000 + 999,)


# Programs.


def test_programs_tell_what_they_cost(played: Played, metrics: NodeMetrics) -> None:
    late = 10**18
    played.programs = [
        ("egress", Cost(1, late, 3_000, 10)),
        ("egress", Cost(2, late, 1_000, 5)),
        ("sockops", Cost(3, 1, 70, 7)),
    ]
    found = scrape(metrics)
    assert values(found["bpfrl_program_run_seconds_total"], "program") == {"egress": 4e-6, "sockops": 0}
    assert values(found["bpfrl_program_runs_total"], "program") == {"egress": 15, "sockops": 0}
    # One has gone, and one that was there before has run.
    played.programs = [("egress", Cost(2, late, 1_500, 6)), ("sockops", Cost(3, 1, 90, 9))]
    found = scrape(metrics)
    assert values(found["bpfrl_program_runs_total"], "program") == {"egress": 16, "sockops": 2}
    assert values(found["bpfrl_program_run_seconds_total"], "program") == pytest.approx(
        {"egress": 4.5e-6, "sockops": 2e-8}
    )


# Calls.


def test_calls_are_counted_and_timed_by_what_came_of_them(metrics: NodeMetrics) -> None:
    metrics.answered("attach", "attached", 0.02)
    metrics.answered("attach", "attached", 3.0)
    metrics.answered("attach", "NOT_FOUND", 0.001)
    found = scrape(metrics)
    counts = values(found["bpfrl_operation_duration_seconds_count"], "operation", "result")
    assert counts == {("attach", "attached"): 2, ("attach", "NOT_FOUND"): 1}
    assert value(found, "bpfrl_operation_duration_seconds_sum", operation="attach", result="attached") == 3.02
    assert (
        value(found, "bpfrl_operation_duration_seconds_bucket", operation="attach", result="attached", le="0.025") == 1
    )


def test_sweeps_are_counted(metrics: NodeMetrics) -> None:
    assert values(scrape(metrics)["bpfrl_sweeps_total"], "result") == {"ok": 0, "failed": 0}
    metrics.swept(3)
    metrics.swept(0)
    metrics.failed_to_tend()
    found = scrape(metrics)
    assert values(found["bpfrl_sweeps_total"], "result") == {"ok": 2, "failed": 1}
    assert value(found, "bpfrl_swept_limiters_total") == 3


# What cannot be read.


@pytest.mark.parametrize("error", [KernelError("held"), PermissionDeniedError("no"), OSError(5, "broken")])
def test_where_nothing_can_be_read_the_rest_is_told(played: Played, metrics: NodeMetrics, error: Exception) -> None:
    played.give(1, 10)
    assert value(scrape(metrics), "bpfrl_limiters_read_success") == 1
    played.error = error
    found = scrape(metrics)
    assert value(found, "bpfrl_limiters_read_success") == 0
    assert value(found, "bpfrl_passed_packets_total", direction="egress") == 10
    assert not [name for name in found if name.startswith(("bpfrl_pod_", "bpfrl_limiters_read_duration"))]
    assert "bpfrl_limiters" not in found
    played.error = None
    assert value(scrape(metrics), "bpfrl_limiters_read_success") == 1


def test_a_reading_that_hangs_stops_nobody_and_no_second_one_begins(
    played: Played, metrics: NodeMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_READ_SECONDS", 0.05)

    async def calls() -> None:
        played.may_read.clear()
        for _ in range(3):
            await metrics.refresh()
            assert value(told(metrics.registry), "bpfrl_limiters_read_success") == 0
        assert played.reads == 1
        played.give(1, 10)
        played.may_read.set()
        await until(lambda: metrics._reading is not None and metrics._reading.done())
        # What it has found is old by now.
        await metrics.refresh()
        assert played.reads == 2
        assert value(told(metrics.registry), "bpfrl_limiters_read_success") == 1

    run(calls())


def test_the_loop_turns_while_limiters_are_read(played: Played, metrics: NodeMetrics) -> None:
    async def calls() -> None:
        played.may_read.clear()
        reading = asyncio.create_task(metrics.refresh())
        await until(lambda: played.reads)
        turns = 0
        for _ in range(100):
            await asyncio.sleep(0)
            turns += 1
        assert not reading.done()
        played.may_read.set()
        await reading
        assert turns == 100

    run(calls())


# Readiness.


def test_a_node_is_ready_while_it_serves_and_has_its_bpffs(
    played: Played, metrics: NodeMetrics, tmp_path: Path
) -> None:
    async def calls() -> None:
        played.bpffs = tmp_path
        assert await metrics.unready() == "masters are not answered: starting or stopping"
        metrics.serves(serving=True)
        assert await metrics.unready() == ""
        played.mounted = False
        assert await metrics.unready() == f"no BPF file system on {tmp_path}"
        played.mounted = True
        played.error = PermissionDeniedError("cannot look into it: this needs root")
        assert await metrics.unready() == "cannot look into it: this needs root"
        played.error = None
        played.bpffs = tmp_path / "none"
        assert "No such file" in await metrics.unready()
        played.bpffs = tmp_path
        assert await metrics.unready() == ""
        metrics.serves(serving=False)
        assert await metrics.unready() == "masters are not answered: starting or stopping"

    run(calls())
