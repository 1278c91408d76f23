"""What ``/metrics`` and ``/readyz`` tell of a node.

The kernel counts, and not this process: at each scrape the limiters' counters are read, in a thread of their own and
for a few seconds at most. A scrape that finds an earlier reading still under way tells everything else.

What a pod's limiter has counted goes with the pod. The node's own sums must only grow, so they are of what was counted
since this process began: each scrape adds what each counter has grown by since the one before. What a pod has counted
between the last scrape and its end is not in them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Final, NamedTuple

from prometheus_client import Counter as CounterMetric
from prometheus_client import Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.libbpf import Cost
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import BpfrlError
from bpfrl.monitoring import Monitored
from bpfrl.node.agent import Agent
from bpfrl.node.observer import Observer
from bpfrl.rpc.tls import Certificates

log = logging.getLogger(__name__)

# Half of what Prometheus gives a scrape by default.
_READ_SECONDS: Final = 5.0
# How many counters that are gone are known, should they only have been unreadable for a while.
_REMEMBERED: Final = 4_000
# A call takes milliseconds, and a compiler run a tenth of a second.
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_NS: Final = 1e9
_BITS: Final = 8
# The fields of Counters, in their order.
_COUNTED: Final = (
    ("passed_packets", "Packets let through by the limiter{}, as they are on the wire."),
    ("passed_bytes", "Bytes at layer 3 let through by the limiter{}."),
    ("dropped_packets", "Packets dropped by the limiter{}."),
    ("dropped_bytes", "Bytes at layer 3 dropped by the limiter{}."),
)
# All of these at once; a node has thousands.
_values: Final = attrgetter(*(name for name, _ in _COUNTED))


class Reading(NamedTuple):
    """What the kernel had at one moment.

    Attributes:
        limiters: as :meth:`~bpfrl.node.agent.Agent.limiters`.
        costs: as :meth:`~bpfrl.node.agent.Agent.costs`.
        seconds: how long it took to read it, s.
    """

    limiters: list[Status | Broken]
    costs: list[tuple[str, Cost]]
    seconds: float


class GrowingSums:
    """Sums over counters that come and go; they never get smaller.

    A counter that is new and has not been made since these sums began counts from where it is found.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, ...]] = {}
        self._before: dict[object, tuple[int, ...]] = {}

    def add(self, group: str, key: object, values: tuple[int, ...], *, new: bool) -> None:
        """Add what some counters have grown by.

        Args:
            group: which sums they go into.
            key: what tells them from all others that there have ever been.
            values: what they have counted.
            new: they began at 0 after these sums did.
        """
        before = self._before.pop(key, (0,) * len(values) if new else values)
        self._before[key] = values
        grown = (max(now - then, 0) for now, then in zip(values, before, strict=True))
        self.sums[group] = tuple(map(sum, zip(self.sums.get(group, (0,) * len(values)), grown, strict=True)))

    def forget(self, living: int) -> None:
        """Keep as many of the counters that were added last, and some thousand more."""
        while len(self._before) > living + _REMEMBERED:
            del self._before[next(iter(self._before))]


class _Limiters:
    """The collector of what was read last."""

    def __init__(self, *, pod_labels: bool, most_pods: int) -> None:
        self.reading: Reading | None = None
        self._labels = ("uid", "direction", *(("namespace", "pod") if pod_labels else ()))
        self._pod_labels = pod_labels
        self._most_pods = most_pods
        self._traffic = GrowingSums()
        self._costs = GrowingSums()
        self._began, self._booted = time.time(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for direction in ("egress", "ingress"):
            self._traffic.sums[direction] = _values(Counters())

    def take(self, reading: Reading | None) -> None:
        """This is what was read; None: it could not be."""
        self.reading = reading
        if reading is None:
            return
        for status in _whole(reading):
            for direction, counters in _directions(status):
                key, new = (status.pod.uid, status.attached_at, direction), status.attached_at >= self._began
                self._traffic.add(direction, key, _values(counters), new=new)
        for program, cost in reading.costs:
            values, new = (cost.run_ns, cost.runs), cost.loaded_ns >= self._booted
            self._costs.add(program, (cost.program_id, cost.loaded_ns), values, new=new)
        self._traffic.forget(2 * len(reading.limiters))
        self._costs.forget(len(reading.costs))

    def collect(self) -> Iterable[Metric]:
        """What Prometheus is told."""
        yield _gauge(
            "bpfrl_limiters_read_success", "1 if the limiters could be read for this scrape.", bool(self.reading)
        )
        yield from self._totals()
        if reading := self.reading:
            yield _gauge("bpfrl_limiters_read_duration_seconds", "How long reading them took.", reading.seconds)
            states = GaugeMetricFamily(
                "bpfrl_limiters",
                "Limiters on this node: in force (ok), half made or foreign (broken), or of a cgroup that is gone.",
                labels=("state",),
            )
            for state, count in _states(reading).items():
                states.add_metric((state,), count)
            yield states
            yield from self._pods(reading)

    def _totals(self) -> Iterator[Metric]:
        for place, (name, text) in enumerate(_COUNTED):
            told = text.format("s") + " All of the node's, since this process began."
            family = CounterMetricFamily(f"bpfrl_{name}", told, labels=("direction",))
            for direction, values in self._traffic.sums.items():
                family.add_metric((direction,), values[place])
            yield family
        run = CounterMetricFamily(
            "bpfrl_program_run_seconds",
            "CPU time in BPF programs of this kind while the kernel counts it (kernel.bpf_stats_enabled).",
            labels=("program",),
        )
        runs = CounterMetricFamily(
            "bpfrl_program_runs", "How often BPF programs of this kind ran meanwhile.", labels=("program",)
        )
        for program, (spent, times) in self._costs.sums.items():
            run.add_metric((program,), spent / _NS)
            runs.add_metric((program,), times)
        yield from (run, runs)

    def _pods(self, reading: Reading) -> Iterator[Metric]:
        found = _whole(reading)
        # By UID, so that it is the same ones each time.
        told = [(self._label(status), status) for status in found[: self._most_pods]]
        yield _gauge(
            "bpfrl_pods_left_out",
            "Limited pods that are not told one by one, for there are too many.",
            len(found) - len(told),
        )
        limits = GaugeMetricFamily(
            "bpfrl_pod_limit_bytes_per_second", "The limit in force; nothing where there is none.", labels=self._labels
        )
        for (uid, *names), status in told:
            for direction, rate in (("egress", status.limits.egress), ("ingress", status.limits.ingress)):
                if rate:
                    limits.add_metric((uid, direction, *names), rate.bits / _BITS)
        yield limits
        counted = [
            ((uid, direction, *names), _values(counters))
            for (uid, *names), status in told
            for direction, counters in _directions(status)
        ]
        for place, (name, text) in enumerate(_COUNTED):
            family = CounterMetricFamily(
                f"bpfrl_pod_{name}", text.format("") + " Since the limiter was attached.", labels=self._labels
            )
            for labels, values in counted:
                family.add_metric(labels, values[place])
            yield family

    def _label(self, status: Status) -> tuple[str, ...]:
        pod = status.pod
        return (pod.uid, pod.namespace, pod.name) if self._pod_labels else (pod.uid,)


class NodeMetrics(Monitored, Observer):
    """A node's metrics.

    Args:
        agent: what reads the limiters.
        certificates: what the node shows, None: no TLS.
        pod_labels: tell each pod's namespace and name beside its UID.
        most_pods: how many pods are told one by one at most.
    """

    def __init__(self, agent: Agent, certificates: Certificates | None, *, pod_labels: bool, most_pods: int) -> None:
        super().__init__("node", certificates)
        self._agent = agent
        self._serving = False
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._reading: asyncio.Future[Reading] | None = None
        self._limiters = _Limiters(pod_labels=pod_labels, most_pods=most_pods)
        self.registry.register(self._limiters)
        self._operations = Histogram(
            "bpfrl_operation_duration_seconds",
            "How long masters' calls took, from when the pod's cgroup was there, by what came of them.",
            ("operation", "result"),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._sweeps = CounterMetric(
            "bpfrl_sweeps",
            "How often the node was tended: what has ended swept away.",
            ("result",),
            registry=self.registry,
        )
        self._swept = CounterMetric(
            "bpfrl_swept_limiters", "Limiters whose pod had ended, and that were removed.", registry=self.registry
        )
        for result in ("ok", "failed"):
            self._sweeps.labels(result)

    def serves(self, *, serving: bool) -> None:
        """Masters are answered from now on, or no longer."""
        self._serving = serving

    def answered(self, operation: str, result: str, seconds: float) -> None:
        """A call has ended."""
        self._operations.labels(operation, result).observe(seconds)

    def swept(self, limiters: int) -> None:
        """What no running pod needs any more was removed."""
        self._sweeps.labels("ok").inc()
        self._swept.inc(limiters)

    def failed_to_tend(self) -> None:
        """That could not be done."""
        self._sweeps.labels("failed").inc()

    async def unready(self) -> str:
        """Why no pod could be limited here now."""
        if not self._serving:
            return "masters are not answered: starting or stopping"
        try:
            return await asyncio.to_thread(self._why_no_bpffs)
        except (BpfrlError, OSError) as error:
            return str(error)

    async def refresh(self) -> None:
        """Read the limiters, if that can be done in time."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._reader, self._read)
        found = None
        try:
            async with asyncio.timeout(_READ_SECONDS):
                found = await asyncio.shield(self._reading)
        except TimeoutError:
            # It goes on, and no second one is begun.
            log.warning("the limiters could not be read within %.0f s: a scrape does without them", _READ_SECONDS)
        except (BpfrlError, OSError) as error:
            log.warning("the limiters cannot be read: %s", error)
        self._limiters.take(found)

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self) -> Reading:
        began = time.monotonic()
        limiters, costs = self._agent.limiters(), self._agent.costs()
        return Reading(limiters, costs, time.monotonic() - began)

    def _why_no_bpffs(self) -> str:
        if not self._agent.is_mounted():
            return f"no BPF file system on {self._agent.bpffs}"
        os.listdir(self._agent.bpffs)
        return ""


def _whole(reading: Reading) -> list[Status]:
    return [each for each in reading.limiters if isinstance(each, Status)]


def _directions(status: Status) -> tuple[tuple[str, Counters], tuple[str, Counters]]:
    return ("egress", status.egress), ("ingress", status.ingress)


def _states(reading: Reading) -> Mapping[str, int]:
    count = Counter(
        "broken" if isinstance(each, Broken) else "ok" if each.cgroup_id else "gone" for each in reading.limiters
    )
    return {state: count[state] for state in ("ok", "broken", "gone")}


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
