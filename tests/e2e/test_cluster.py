"""What pods' annotations say is what the nodes' kernels do: every way in which a pod comes, changes and goes."""

from __future__ import annotations

import subprocess
import time
import uuid
from typing import Any

import pytest

from bench.fleet import wait_for
from bench.lab import in_namespace
from tests.e2e.conftest import BURST, EGRESS, INGRESS, MBIT, RATE, SECONDS, Cluster, Pod

pytestmark = pytest.mark.usefixtures("master")

MIRROR = "kubernetes.io/config.mirror"
HASH = "kubernetes.io/config.hash"
LIMITED = ("Normal", "BandwidthLimited")
UNLIMITED = ("Normal", "BandwidthUnlimited")
INVALID = ("Warning", "BandwidthLimitInvalid")


def item(pod: Pod) -> dict[str, Any]:
    """What bpfrl list tells of a pod."""
    return pod.node.items()[pod.cgroup_uid]


def ping(pod: Pod) -> None:
    """Have three packets be counted: a process of the pod has the node's network answer."""
    command = pod.node.in_pod(pod.cgroup_uid, "ping", "-q", "-c", "3", "-i", "0.1", "127.0.0.1")
    subprocess.run(in_namespace(pod.node.namespace, *command), check=True, capture_output=True)


def sent(pod: Pod) -> int:
    """Packets that a pod has sent since it was limited."""
    packets: int = item(pod)["egress"]["passed_packets"]
    return packets


@pytest.mark.parametrize(
    ("annotations", "labels", "limits"),
    [
        ({EGRESS: "10M"}, {}, (10 * MBIT, 0)),
        ({INGRESS: "1500k"}, {}, (0, 1_500_000)),
        ({EGRESS: "10M", INGRESS: "1Gi"}, {}, (10 * MBIT, 2**30)),
        ({}, {RATE: "1M"}, (MBIT, MBIT)),
        ({INGRESS: "5M"}, {RATE: "1M"}, (MBIT, 5 * MBIT)),
        ({EGRESS: "5M", INGRESS: "6M"}, {RATE: "1M"}, (5 * MBIT, 6 * MBIT)),
    ],
)
def test_a_pod_is_limited_as_it_asks(
    cluster: Cluster, annotations: dict[str, str], labels: dict[str, str], limits: tuple[int, int]
) -> None:
    pod = cluster.create(0, annotations, labels=labels)
    cluster.create(0, {"example.org/colour": "green"}, labels={"app": "web"})
    cluster.converge({pod: limits})
    assert (item(pod)["namespace"], item(pod)["name"], item(pod)["burst_bytes"]) == ("default", pod.name, None)
    cluster.await_events(pod, LIMITED)


def test_every_node_has_its_own_pods(cluster: Cluster) -> None:
    pods = [cluster.create(number % 3, {EGRESS: f"{number + 1}M"}) for number in range(9)]
    cluster.converge({pod: ((number + 1) * MBIT, 0) for number, pod in enumerate(pods)})


def test_a_burst_goes_with_the_limits(cluster: Cluster) -> None:
    pod = cluster.create(1, {EGRESS: "10M", INGRESS: "20M", BURST: "64Ki"})
    cluster.converge({pod: (10 * MBIT, 20 * MBIT)})
    assert item(pod)["burst_bytes"] == 65536
    cluster.annotate(pod, BURST, "128Ki")
    wait_for(lambda: item(pod)["burst_bytes"] == 131072, SECONDS)
    cluster.converge({pod: (10 * MBIT, 20 * MBIT)})


def test_a_running_pod_is_limited_when_it_is_annotated(cluster: Cluster) -> None:
    other = cluster.create(0)
    pod = cluster.create(0)
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({marker: (MBIT, 0)})
    cluster.annotate(pod, INGRESS, "10M")
    cluster.converge({marker: (MBIT, 0), pod: (0, 10 * MBIT)})
    cluster.await_events(pod, LIMITED)
    cluster.await_events(other)


def test_a_limit_changes_in_place(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    ping(pod)
    programs, packets = pod.node.programs(), sent(pod)
    assert packets == 3
    cluster.annotate(pod, EGRESS, "20M")
    cluster.converge({pod: (20 * MBIT, 0)})
    cluster.annotate(pod, INGRESS, "30M")
    cluster.converge({pod: (20 * MBIT, 30 * MBIT)})
    assert pod.node.programs() == programs
    assert sent(pod) == packets


def test_a_value_that_cannot_be_meant_leaves_the_last_good_limit(cluster: Cluster) -> None:
    pod = cluster.create(2, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.annotate(pod, EGRESS, "10mbps")
    cluster.await_events(pod, LIMITED, INVALID)
    cluster.converge({pod: (10 * MBIT, 0)})
    [told] = [event for event in cluster.api.events(pod.uid) if event["reason"] == "BandwidthLimitInvalid"]
    assert told["message"].startswith(f"annotation {EGRESS}: rate '10mbps'")
    assert told["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "default",
        "name": pod.name,
        "uid": pod.uid,
    }
    cluster.annotate(pod, EGRESS, "12M")
    cluster.converge({pod: (12 * MBIT, 0)})


def test_a_pod_with_an_invalid_value_from_the_start_is_not_limited(cluster: Cluster) -> None:
    pod = cluster.create(2, {EGRESS: "fast", INGRESS: "10M"})
    cluster.await_events(pod, INVALID)
    marker = cluster.create(2, {EGRESS: "1M"})
    cluster.converge({marker: (MBIT, 0)})
    cluster.annotate(pod, EGRESS, "5M")
    cluster.converge({marker: (MBIT, 0), pod: (5 * MBIT, 10 * MBIT)})


def test_a_pod_that_asks_for_nothing_any_more_is_let_go(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M", INGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 10 * MBIT)})
    cluster.annotate(pod, EGRESS, None)
    cluster.converge({pod: (0, 10 * MBIT)})
    cluster.annotate(pod, INGRESS, None)
    cluster.converge({})
    # It was limited twice, to different limits.
    wait_for(lambda: cluster.events(pod) == {LIMITED: 2, UNLIMITED: 1}, SECONDS, lambda: cluster.events(pod))


@pytest.mark.parametrize("gone", [False, True], ids=["cgroup-stays", "cgroup-gone"])
def test_a_pod_that_is_deleted_is_let_go(cluster: Cluster, gone: bool) -> None:
    pod, other = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge({pod: (10 * MBIT, 0), other: (10 * MBIT, 0)})
    if gone:
        pod.end()
    cluster.delete(pod)
    cluster.converge({other: (10 * MBIT, 0)})
    assert UNLIMITED not in cluster.events(pod)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_run_to_its_end_is_let_go(cluster: Cluster, phase: str) -> None:
    pod, other = (cluster.create(1, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge({pod: (10 * MBIT, 0), other: (10 * MBIT, 0)})
    cluster.api.set_phase(pod.name, phase)
    cluster.converge({other: (10 * MBIT, 0)})
    pod.end()
    cluster.converge({other: (10 * MBIT, 0)})


@pytest.mark.parametrize("gone", [False, True], ids=["cgroup-stays", "cgroup-gone"])
def test_a_pod_of_the_same_name_is_another_pod(cluster: Cluster, gone: bool) -> None:
    before = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({before: (10 * MBIT, 0)})
    if gone:
        before.end()
    cluster.delete(before)
    after = cluster.create(0, {EGRESS: "20M"}, name=before.name)
    assert after.uid != before.uid
    cluster.converge({after: (20 * MBIT, 0)})
    cluster.await_events(after, LIMITED)


def test_a_pod_may_come_before_its_cgroup(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"}, cgroup=False)
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({marker: (MBIT, 0)})
    # The time that a kubelet may take to pull an image; longer than the master's first pauses.
    time.sleep(2)
    cluster.converge({marker: (MBIT, 0)})
    pod.start()
    # The node looks ten times a second; the master would not ask again for half a minute.
    wait_for(lambda: pod.uid in pod.node.pinned(), 10)
    cluster.converge({marker: (MBIT, 0), pod: (10 * MBIT, 0)})
    cluster.await_events(pod, LIMITED)


def test_pods_that_never_get_a_cgroup_delay_no_other(cluster: Cluster) -> None:
    for _ in range(20):
        cluster.create(0, {EGRESS: "10M"}, cgroup=False)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)}, seconds=15)


def test_a_pod_that_waits_for_its_cgroup_may_change_its_mind(cluster: Cluster) -> None:
    changed, freed, deleted = (cluster.create(0, {EGRESS: "10M"}, cgroup=False) for _ in range(3))
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({marker: (MBIT, 0)})
    cluster.annotate(changed, EGRESS, "20M")
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    for pod in (changed, freed, deleted):
        pod.start()
    cluster.converge({marker: (MBIT, 0), changed: (20 * MBIT, 0)})


def test_a_change_while_the_cgroup_is_awaited_is_nobodys_mistake(cluster: Cluster) -> None:
    pods = [cluster.create(0, {EGRESS: "10M"}, cgroup=False) for _ in range(20)]
    for number in range(5):
        for pod in pods:
            cluster.annotate(pod, EGRESS, f"{number + 11}M")
    for pod in pods:
        pod.start()
    cluster.converge(dict.fromkeys(pods, (15 * MBIT, 0)))
    assert not [line for line in cluster.lines(cluster.nodes[0].daemon) if " WARNING " in line]


def test_a_pod_whose_node_is_known_from_another(cluster: Cluster) -> None:
    known = cluster.create(1)
    pod = cluster.create(1, {EGRESS: "10M"}, host_ip=None, phase="Pending")
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.await_events(known)


def test_a_static_pod_is_known_by_its_hash(cluster: Cluster) -> None:
    static = uuid.uuid4().hex
    pod = cluster.create(0, {MIRROR: static, HASH: static, EGRESS: "10M"}, cgroup_uid=static)
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.await_events(pod, LIMITED)
    cluster.annotate(pod, EGRESS, "20M")
    cluster.converge({pod: (20 * MBIT, 0)})
    cluster.delete(pod)
    cluster.converge({})


def test_nobody_is_limited_in_the_name_of_another(cluster: Cluster) -> None:
    static = uuid.uuid4().hex
    victim = cluster.create(0, {EGRESS: "10M"})
    free = cluster.create(0)
    system = cluster.create(0, {MIRROR: static, HASH: static, EGRESS: "10M"}, cgroup_uid=static)
    expected = {victim: (10 * MBIT, 0), system: (10 * MBIT, 0)}
    cluster.converge(expected)
    claims = [
        {HASH: victim.uid},
        {HASH: free.uid},
        {HASH: static},
        {MIRROR: "mirror", HASH: victim.uid},
        {MIRROR: "mirror", HASH: free.uid},
    ]
    expected |= {cluster.create(0, {**claim, EGRESS: "1M"}): (MBIT, 0) for claim in claims}
    cluster.converge(expected)


def test_a_pod_on_the_hosts_network_is_limited_alone(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M", INGRESS: "10M"}, host_network=True)
    other = cluster.create(0, {EGRESS: "10M"}, host_network=True)
    cluster.converge({pod: (10 * MBIT, 10 * MBIT), other: (10 * MBIT, 0)})
    ping(pod)
    assert sent(pod) == 3
    assert sent(other) == 0
    cluster.converge({pod: (10 * MBIT, 10 * MBIT), other: (10 * MBIT, 0)})


def test_what_has_not_changed_is_not_told_again(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.await_events(pod, LIMITED)
    programs = pod.node.programs()
    cluster.annotate(pod, EGRESS, "10000k")
    cluster.annotate(pod, "example.org/colour", "green")
    cluster.api.label(pod.name, {"app": "web"})
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({pod: (10 * MBIT, 0), marker: (MBIT, 0)})
    cluster.await_events(marker, LIMITED)
    cluster.await_events(pod, LIMITED)
    assert {uid: found for uid, found in pod.node.programs().items() if uid == pod.uid} == programs
