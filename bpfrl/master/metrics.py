"""What ``/metrics`` and ``/readyz`` tell of a master.

What happens is counted as it happens; what is the case is asked of the controller at each scrape. Only a master that
acts tells of nodes: the others do not talk to them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter as CounterMetric
from prometheus_client import Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import RefusedError, UnreachableError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.master.observer import Census, Observer
from bpfrl.monitoring import Monitored
from bpfrl.rpc.client import Connections, NodeClient
from bpfrl.rpc.tls import Certificates

# A call takes milliseconds, and waits half a minute for a cgroup.
_CALL_BUCKETS: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# A change is in force within milliseconds, or when its node is back.
_RECONCILE_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_UNREACHABLE: Final = "UNREACHABLE"


@dataclass
class _Record:
    """What is known of one node.

    Attributes:
        reachable: whether its last call was answered.
        contact: when one was answered last, seconds since the epoch; 0: never.
        errors: calls that were not answered, or refused, by reason.
    """

    reachable: bool = True
    contact: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class _State:
    """The collector of what is the case."""

    def __init__(self, most_nodes: int) -> None:
        self.census: Census | None = None
        self.records: dict[str, _Record] = {}
        self._most_nodes = most_nodes
        self._nodes: list[tuple[str, _Record]] = []

    def take(self, census: Census | None) -> None:
        """This is the case; None: the master is only starting."""
        self.census = census
        if census is None:
            return
        known = [(name or address, self.records.get(address)) for address, name in census.nodes.items()]
        found = [(name, record) for name, record in known if record and census.acting]
        self._nodes = sorted(found, key=lambda each: (each[1].reachable, each[0]))

    def collect(self) -> Iterable[Metric]:
        """What Prometheus is told."""
        if (census := self.census) is None:
            return
        backlog = census.backlog
        for name, text, value in (
            ("leader", "1 if this master acts, 0 if it waits for its turn.", census.acting),
            ("synced", "1 once all pods have been told.", census.synced),
            ("pods", "Scheduled pods that are known.", census.pods),
            ("pods_limited", "Pods that ask for limits.", census.limited),
            ("pods_invalid", "Pods that ask for limits that cannot be meant.", census.invalid),
            ("queue_length", "Pods that are to be compared with what their node has, or made so.", backlog.queued),
            ("pods_awaited", "Pods whose cgroup is not there yet: their nodes wait for it.", backlog.awaited),
            ("pods_retrying", "Pods that could not be limited, or let go, and will be tried again.", backlog.retrying),
            ("nodes", "Nodes that are known.", len(census.nodes)),
        ):
            yield GaugeMetricFamily(f"bpfrl_{name}", text, value=value)
        if census.acting:
            yield from self._of_nodes()

    def _of_nodes(self) -> Iterator[Metric]:
        unreachable = sum(not record.reachable for _, record in self._nodes)
        yield GaugeMetricFamily("bpfrl_nodes_unreachable", "Nodes whose last call was not answered.", value=unreachable)
        told = self._nodes[: self._most_nodes]
        left_out = len(self._nodes) - len(told)
        text = "Nodes that are not told one by one, for there are too many; those that do not answer come first."
        yield GaugeMetricFamily("bpfrl_nodes_left_out", text, value=left_out)
        labels = ("node",)
        reachable = GaugeMetricFamily("bpfrl_node_reachable", "1 if the node's last call was answered.", labels=labels)
        contact = GaugeMetricFamily(
            "bpfrl_node_last_contact_timestamp_seconds",
            "When a call was answered last, seconds since the epoch.",
            labels=labels,
        )
        errors = CounterMetricFamily(
            "bpfrl_node_errors", "Calls that the node has refused or not answered.", labels=("node", "reason")
        )
        for name, record in told:
            reachable.add_metric((name,), record.reachable)
            if record.contact:
                contact.add_metric((name,), record.contact)
            for reason, count in sorted(record.errors.items()):
                errors.add_metric((name, reason), count)
        yield from (reachable, contact, errors)


class MasterMetrics(Monitored, Observer):
    """A master's metrics.

    Args:
        certificates: what it shows the nodes, None: no TLS.
        most_nodes: how many nodes are told one by one at most.
    """

    def __init__(self, certificates: Certificates | None, most_nodes: int) -> None:
        super().__init__("master", certificates)
        self._census: Callable[[], Census] | None = None
        self._synced = False
        self._state = _State(most_nodes)
        self.registry.register(self._state)
        self._calls = Histogram(
            "bpfrl_call_duration_seconds",
            "How long calls to nodes took, by verb and gRPC status; attach_wait may wait for the pod's cgroup.",
            ("verb", "result"),
            registry=self.registry,
            buckets=_CALL_BUCKETS,
        )
        self._reconciled = Histogram(
            "bpfrl_reconcile_duration_seconds",
            "From when a change became known to when it was in force; without those that waited for the pod's cgroup.",
            registry=self.registry,
            buckets=_RECONCILE_BUCKETS,
        )
        self._lists = CounterMetric("bpfrl_api_lists", "How often all pods were listed.", registry=self.registry)
        self._watches = CounterMetric("bpfrl_api_watches", "How often a watch of pods began.", registry=self.registry)
        self._api_errors = CounterMetric(
            "bpfrl_api_errors",
            "Lists and watches that the API server refused (by HTTP status) or did not answer (unreachable).",
            ("reason",),
            registry=self.registry,
        )
        self._heard = Gauge(
            "bpfrl_api_last_contact_timestamp_seconds",
            "When the API server last told pods, changes or a bookmark, seconds since the epoch; 0: never.",
            registry=self.registry,
        )
        self._events = CounterMetric(
            "bpfrl_events", "Kubernetes Events, by what became of them.", ("result",), registry=self.registry
        )
        for result in ("sent", "failed", "dropped"):
            self._events.labels(result)

    async def refresh(self) -> None:
        """Ask for the state of everything."""
        self._state.take(self._census() if self._census else None)

    async def unready(self) -> str:
        """Why this master could not act if it was its turn."""
        if self._census is None:
            return "starting"
        # Once told they stay told, and a census is much to ask for that.
        self._synced = self._synced or self._census().synced
        return "" if self._synced else "the pods have not been told yet"

    def attend(self, census: Callable[[], Census]) -> None:
        """This is how to learn the state of everything."""
        self._census = census

    def client(
        self, address: str, port: int, certificates: Certificates | None, connections: Connections
    ) -> NodeClient:
        """The client for a node."""
        return _ObservedClient(address, port, certificates, connections, self)

    def let_go(self, address: str) -> None:
        """Nothing is told of this node any more."""
        self._state.records.pop(address, None)

    def called(self, address: str, verb: str, result: str, seconds: float) -> None:
        """A call to a node has ended.

        Args:
            address: the node's.
            verb: what was asked.
            result: OK, the gRPC status code's name, UNREACHABLE, or CANCELLED by this master.
            seconds: how long it took, s.
        """
        self._calls.labels(verb, result).observe(seconds)
        if result == "CANCELLED":
            return
        record = self._state.records.setdefault(address, _Record())
        record.reachable = result != _UNREACHABLE
        if record.reachable:
            record.contact = time.time()
        if result != "OK":
            record.errors[result] += 1

    def settled(self, seconds: float) -> None:
        """A change is in force."""
        self._reconciled.observe(seconds)

    def listed(self) -> None:
        """The API server has told all pods."""
        self._lists.inc()
        self.heard()

    def watching(self) -> None:
        """The API server begins to tell changes."""
        self._watches.inc()
        self.heard()

    def heard(self) -> None:
        """The API server has said something."""
        self._heard.set_to_current_time()

    def api_failed(self, status: int) -> None:
        """The API server has refused, or not answered."""
        self._api_errors.labels(str(status) if status else "unreachable").inc()

    def told(self, result: str) -> None:
        """An Event was sent, has failed, or was dropped."""
        self._events.labels(result).inc()


class _ObservedClient(NodeClient):
    """Calls to one node, with how each has ended."""

    def __init__(
        self,
        address: str,
        port: int,
        certificates: Certificates | None,
        connections: Connections,
        metrics: MasterMetrics,
    ) -> None:
        super().__init__(address, port, certificates, connections)
        self._address = address
        self._metrics = metrics

    async def attach(self, pod: PodRef, limits: Limits, image: bytes, build: bytes, wait: float = 0) -> Change:
        """Give a pod a limiter."""
        async with self._observed("attach_wait" if wait else "attach"):
            return await super().attach(pod, limits, image, build, wait)

    async def update(self, uid: str, limits: Limits) -> Change:
        """Change the limits of a pod that has a limiter."""
        async with self._observed("update"):
            return await super().update(uid, limits)

    async def detach(self, uid: str) -> Change:
        """Take a pod's limiter off."""
        async with self._observed("detach"):
            return await super().detach(uid)

    async def list(self) -> list[Status | Broken]:
        """Every limiter of the node."""
        async with self._observed("list"):
            return await super().list()

    @asynccontextmanager
    async def _observed(self, verb: str) -> AsyncIterator[None]:
        began, result = time.monotonic(), "OK"
        try:
            yield
        except UnreachableError:
            result = _UNREACHABLE
            raise
        except RefusedError as error:
            result = error.code
            raise
        except asyncio.CancelledError:
            result = "CANCELLED"
            raise
        finally:
            self._metrics.called(self._address, verb, result, time.monotonic() - began)
