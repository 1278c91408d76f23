"""A pod with traffic: what its annotation says is what a flow gets, and a flow that runs follows a change."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest

from bench.fleet import Fleet, Node
from bench.kubeapi import Api, RealApi
from bench.lab import in_namespace, wait_for_listener
from tests.e2e.conftest import EGRESS, MBIT, SECONDS, Cluster, Pod, await_acting

POD_ADDRESS = "10.79.0.2"
NODE_ADDRESS = "10.79.0.1"
PORT = 5201
INTERVAL = 0.5


@pytest.fixture(scope="module", autouse=True)
def master(bed: Fleet, api: Api) -> Iterator[None]:
    daemon = bed.master("--kubeconfig", str(api.kubeconfig), "--no-leader-elect")
    await_acting(daemon)
    yield
    assert daemon.stop() == 0


@pytest.fixture
def pod_network(bed: Fleet) -> Iterator[str]:
    """A network namespace for a pod of the first node, joined to the node's as a CNI plugin does it."""
    node, name = bed.nodes[0], f"{bed.tag}-pod-{uuid.uuid4().hex[:6]}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "pod", "netns", node.namespace)
        for namespace, device, address in ((name, "eth0", POD_ADDRESS), (node.namespace, "pod", NODE_ADDRESS)):
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
        yield name
    finally:
        ip("netns", "del", name)


@pytest.fixture
def server(bed: Fleet) -> Iterator[None]:
    """An iperf3 server on the node, beyond the pod's limit."""
    namespace = bed.nodes[0].namespace
    process = subprocess.Popen(
        in_namespace(namespace, "iperf3", "-s", "-p", str(PORT)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_listener(namespace, PORT)
        yield
    finally:
        process.kill()
        process.wait()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def flow(node: Node, pod: Pod, network: str, seconds: int) -> subprocess.Popen[str]:
    """Start a TCP flow from the pod."""
    command = ["iperf3", "-J", "-c", NODE_ADDRESS, "-p", str(PORT), "-t", str(seconds), "-i", str(INTERVAL)]
    return subprocess.Popen(
        in_namespace(network, *node.in_pod(pod.cgroup_uid, *command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What iperf3 says in the end."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    found: dict[str, Any] = json.loads(output)
    assert "error" not in found
    return found


def annotate(cluster: Cluster, pod: Pod, value: str) -> None:
    """As people do it, where there is what they do it with."""
    if isinstance(cluster.api, RealApi):
        cluster.api.kubectl("annotate", "pod", pod.name, "--overwrite", f"{EGRESS}={value}")
    else:
        cluster.annotate(pod, EGRESS, value)


@pytest.mark.usefixtures("server")
def test_a_flow_has_the_rate_that_the_annotation_says(cluster: Cluster, pod_network: str) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    found = report(flow(pod.node, pod, pod_network, 4))
    goodput = found["end"]["sum_received"]["bits_per_second"]
    assert 0.85 * 10 * MBIT <= goodput <= 1.05 * 10 * MBIT
    # The limit counts headers, too, and all that was received was sent through it.
    sent = pod.node.items()[pod.uid]["egress"]["passed_bytes"]
    assert sent > found["end"]["sum_received"]["bytes"]


@pytest.mark.usefixtures("server")
def test_a_flow_follows_a_change(cluster: Cluster, pod_network: str) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    programs = pod.node.programs()
    process = flow(pod.node, pod, pod_network, 7)
    try:
        begun = time.monotonic()
        time.sleep(3)
        annotate(cluster, pod, "40M")
        changed = time.monotonic() - begun
    finally:
        found = report(process)
    cluster.converge({pod: (40 * MBIT, 0)})
    assert pod.node.programs() == programs
    intervals = [each["sum"] for each in found["intervals"]]
    before = [each["bits_per_second"] for each in intervals if each["start"] >= 1 and each["end"] <= 2.5]
    # The flow had begun a moment after it was started.
    after = [each["bits_per_second"] for each in intervals if each["start"] >= changed + 1]
    assert len(before) >= 2
    assert len(after) >= 3
    assert 0.8 * 10 * MBIT <= median(before) <= 1.1 * 10 * MBIT
    assert 0.8 * 40 * MBIT <= median(after) <= 1.1 * 40 * MBIT
