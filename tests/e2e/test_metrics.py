"""What the daemons tell of themselves over HTTP while they do their work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from bench.fleet import CONTROL_ADDRESS, Daemon, Fleet, Node, wait_for
from bench.kubeapi import StandIn
from bench.lab import in_namespace
from tests.e2e.conftest import EGRESS, INGRESS, MBIT, SECONDS, Cluster, await_acting
from tools import metrics_page

NODE_HTTP: Final = 10003
MASTER_HTTP: Final = 10004
# The addresses are in a network namespace of their own.
_FETCH: Final = """
import sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    page = opener.open(sys.argv[1], timeout=10)
except urllib.error.HTTPError as error:
    page = error
print(page.status, page.read().decode(), end="")
"""


@pytest.fixture(scope="module", autouse=True)
def monitored(bed: Fleet) -> None:
    """The nodes tell of themselves, too, and log as JSON."""
    for node in bed.nodes:
        assert node.daemon.stop() == 0
        node.daemon.command += ["--http", f"{node.address}:{NODE_HTTP}", "--log-format", "json"]
        node.daemon.start()
        wait_for(node.serves, SECONDS, node.daemon.news)


def get(bed: Fleet, address: str, port: int, path: str) -> tuple[int, str]:
    """A page, as a machine of the cluster's network sees it."""
    command = in_namespace(bed.tag, sys.executable, "-c", _FETCH, f"http://{address}:{port}{path}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    status, _, text = result.stdout.partition(" ")
    return int(status), text


def families(bed: Fleet, address: str, port: int) -> dict[str, Metric]:
    status, text = get(bed, address, port, "/metrics")
    assert status == 200
    return {family.name: family for family in text_string_to_metric_families(text)}


class Told:
    """One scrape."""

    def __init__(self, bed: Fleet, address: str, port: int) -> None:
        self._samples = [sample for family in families(bed, address, port).values() for sample in family.samples]

    def get(self, name: str, **labels: str) -> float | None:
        """The sum of the samples with these labels, whatever others they have; None: there are none."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == f"bpfrl_{name}" and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None


def of_master(cluster: Cluster, port: int = MASTER_HTTP) -> Told:
    return Told(cluster.fleet, CONTROL_ADDRESS, port)


def of_node(cluster: Cluster, node: Node) -> Told:
    return Told(cluster.fleet, node.address, NODE_HTTP)


def master(cluster: Cluster, *options: str, port: int = MASTER_HTTP, acting: bool = True) -> Daemon:
    daemon = cluster.master("--http", f"{CONTROL_ADDRESS}:{port}", *options, acting=acting)
    wait_for(lambda: "metrics on" in daemon.news(), SECONDS, daemon.news)
    return daemon


def tells(what: Callable[[], Told], name: str, expected: float, **labels: str) -> None:
    """Wait until a daemon tells a value."""
    seen: list[float | None] = []

    def found() -> bool:
        seen.append(what().get(name, **labels))
        return seen[-1] == expected

    wait_for(found, SECONDS, lambda: (name, labels, seen[-1]))


def test_a_limit_is_told_by_master_and_node(cluster: Cluster) -> None:
    daemon = master(cluster, "--no-leader-elect", "--log-format", "json")
    pod = cluster.create(0, {EGRESS: "10M", INGRESS: "80M"})
    other, invalid = cluster.create(1), cluster.create(1, {EGRESS: "fast"})
    cluster.converge({pod: (10 * MBIT, 80 * MBIT)})
    node = of_node(cluster, pod.node)
    labels = {"uid": pod.uid, "namespace": "default", "pod": pod.name}
    assert node.get("pod_limit_bytes_per_second", direction="egress", **labels) == 1_250_000
    assert node.get("pod_limit_bytes_per_second", direction="ingress", **labels) == 10_000_000
    assert node.get("limiters", state="ok") == 1
    assert (node.get("operation_duration_seconds_count", operation="attach", result="attached") or 0) >= 1
    assert of_node(cluster, other.node).get("limiters", state="ok") == 0

    def told() -> Told:
        return of_master(cluster)

    tells(told, "events_total", 2, result="sent")
    now = told()
    assert (now.get("leader"), now.get("synced")) == (1, 1)
    assert (now.get("pods"), now.get("pods_limited"), now.get("pods_invalid")) == (3, 1, 1)
    assert (now.get("nodes"), now.get("nodes_unreachable"), now.get("queue_length")) == (2, 0, 0)
    assert now.get("node_reachable", node=pod.node.name) == 1
    assert abs(time.time() - (now.get("node_last_contact_timestamp_seconds", node=pod.node.name) or 0)) < SECONDS
    assert now.get("call_duration_seconds_count", verb="attach", result="OK") == 1
    assert now.get("reconcile_duration_seconds_count") == 1
    assert 0 < (now.get("reconcile_duration_seconds_sum") or 0) < SECONDS
    assert (now.get("api_lists_total"), now.get("api_watches_total")) == (1, 1)
    assert abs(time.time() - (now.get("api_last_contact_timestamp_seconds") or 0)) < SECONDS
    days = ((now.get("certificate_expiry_timestamp_seconds") or 0) - time.time()) / 86_400
    assert days > 1
    cluster.annotate(pod, EGRESS, "20M")
    tells(told, "reconcile_duration_seconds_count", 2)
    cluster.delete(pod)
    tells(told, "reconcile_duration_seconds_count", 3)
    assert told().get("call_duration_seconds_count", verb="detach", result="OK") == 1
    assert invalid.uid not in invalid.node.pinned()
    for lines in (daemon.news(), pod.node.daemon.news()):
        records = [json.loads(line) for line in lines.splitlines()]
        assert {"time", "level", "logger", "message"} <= set.intersection(*(set(record) for record in records))


def test_health_is_told(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    master(cluster)
    for address, port in ((node.address, NODE_HTTP), (CONTROL_ADDRESS, MASTER_HTTP)):
        assert get(cluster.fleet, address, port, "/livez") == (200, "ok\n")
        assert get(cluster.fleet, address, port, "/readyz") == (200, "ok\n")


def test_a_master_that_does_not_know_the_pods_is_not_ready(cluster: Cluster) -> None:
    cluster.api.stop()
    daemon = master(cluster, "--no-leader-elect", acting=False)
    wait_for(
        lambda: (
            get(cluster.fleet, CONTROL_ADDRESS, MASTER_HTTP, "/readyz") == (503, "the pods have not been told yet\n")
        ),
        SECONDS,
    )
    assert get(cluster.fleet, CONTROL_ADDRESS, MASTER_HTTP, "/livez") == (200, "ok\n")
    tells(lambda: of_master(cluster), "synced", 0)
    wait_for(lambda: (of_master(cluster).get("api_errors_total", reason="unreachable") or 0) > 0, SECONDS)
    cluster.api.start()
    await_acting(daemon)
    assert get(cluster.fleet, CONTROL_ADDRESS, MASTER_HTTP, "/readyz") == (200, "ok\n")


def test_of_two_masters_one_leads(cluster: Cluster) -> None:
    ports = (MASTER_HTTP, MASTER_HTTP + 1)
    leader = master(cluster, "--lease-duration", "3", port=ports[0])
    master(cluster, "--lease-duration", "3", port=ports[1], acting=False)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    tells(lambda: of_master(cluster, ports[1]), "pods_limited", 1)
    # Both know the pods, and are ready; one acts.
    assert [of_master(cluster, port).get("leader") for port in ports] == [1, 0]
    for port in ports:
        assert get(cluster.fleet, CONTROL_ADDRESS, port, "/readyz") == (200, "ok\n")
    assert of_master(cluster, ports[0]).get("node_reachable", node=pod.node.name) == 1
    assert of_master(cluster, ports[1]).get("node_reachable") is None
    leader.kill()
    tells(lambda: of_master(cluster, ports[1]), "leader", 1)
    tells(lambda: of_master(cluster, ports[1]), "node_reachable", 1, node=pod.node.name)
    # It was in force already.
    assert of_master(cluster, ports[1]).get("reconcile_duration_seconds_count") == 0


def test_a_node_that_does_not_answer_is_told(cluster: Cluster) -> None:
    master(cluster, "--no-leader-elect")
    pods = {cluster.create(number, {EGRESS: "10M"}): (10 * MBIT, 0) for number in range(3)}
    cluster.converge(pods)
    down = cluster.nodes[0]
    down.daemon.kill()

    def told() -> Told:
        return of_master(cluster)

    tells(told, "nodes_unreachable", 1)
    now = told()
    assert [now.get("node_reachable", node=node.name) for node in cluster.nodes] == [0, 1, 1]
    assert (now.get("node_errors_total", node=down.name, reason="UNREACHABLE") or 0) >= 1
    assert now.get("node_errors_total", node=cluster.nodes[1].name) is None
    late = cluster.create(0, {EGRESS: "20M"})
    tells(told, "queue_length", 1)
    down.daemon.start()
    tells(told, "nodes_unreachable", 0)
    cluster.converge(pods | {late: (20 * MBIT, 0)})
    tells(told, "queue_length", 0)


@pytest.mark.parametrize("api", [StandIn], indirect=True)
def test_the_page_of_metrics_has_what_the_daemons_tell(cluster: Cluster) -> None:
    master(cluster, "--no-leader-elect")
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    tells(lambda: of_master(cluster), "node_reachable", 1, node=pod.node.name)
    for address, port, registry in (
        (pod.node.address, NODE_HTTP, metrics_page.node_registry()),
        (CONTROL_ADDRESS, MASTER_HTTP, metrics_page.master_registry()),
    ):
        told = families(cluster.fleet, address, port)
        # The parser names a counter without its suffix, and what has no sample yet has its help all the same.
        known = {metric.name: metric for metric in metrics_page.metrics_of(registry)}
        names = {name + "_total" if family.type == "counter" else name for name, family in told.items()}
        assert names == known.keys()
        for name, family in told.items():
            metric = known[name + "_total" if family.type == "counter" else name]
            labels: set[Any] = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels <= set(metric.labels)
            assert family.documentation == metric.text
