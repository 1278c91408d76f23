"""Why a pod is limited or not, asked from the control plane: the API server says one half, the pod's node the other."""

from __future__ import annotations

import json
import subprocess
from typing import Any, NamedTuple

import pytest

from bench.fleet import CONTROL_ADDRESS, NODE_PORT, Daemon, wait_for
from bench.kubeapi import Api
from bench.lab import BPFRL, in_namespace
from tests.e2e.conftest import EGRESS, INGRESS, MBIT, ONE_API, SECONDS, Cluster, Pod, await_acting

pytestmark = [ONE_API, pytest.mark.usefixtures("master")]


class Told(NamedTuple):
    """What the command has said, and its exit status."""

    code: int
    document: dict[str, Any]

    @property
    def verdict(self) -> str:
        text: str = self.document["verdict"]["text"]
        return text


def command(cluster: Cluster, *arguments: str, certificates: str = "operator") -> subprocess.CompletedProcess[str]:
    """Run the command where the masters are: none of the nodes is that machine."""
    options = ["--kubeconfig", str(cluster.api.kubeconfig), "--certs", str(cluster.fleet.certificates / certificates)]
    line = in_namespace(cluster.fleet.tag, BPFRL, *arguments, *options)
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def explain(cluster: Cluster, *arguments: str, **options: str) -> Told:
    done = command(cluster, "explain", *arguments, "-o", "json", **options)
    assert done.stderr == ""
    return Told(done.returncode, json.loads(done.stdout))


def of(cluster: Cluster, pod: Pod) -> Told:
    """Asked by name, and by UID, which comes to the same."""
    by_name = explain(cluster, pod.name)
    by_uid = explain(cluster, "--pod-uid", pod.uid)
    assert (by_name.code, by_name.verdict) == (by_uid.code, by_uid.verdict)
    return by_name


def test_a_limited_pod_is_as_it_asks(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M", INGRESS: "20M"})
    cluster.converge({pod: (10 * MBIT, 20 * MBIT)})
    told = of(cluster, pod)
    assert (told.code, told.verdict) == (0, "limited as asked: egress 10mbit, ingress 20mbit")
    found = told.document
    assert found["pod"]["node"] == pod.node.name
    assert found["node"]["address"] == f"{pod.node.address}:{NODE_PORT}"
    assert found["cgroup"]["path"] == str(pod.node.pods[pod.cgroup_uid])
    kinds = pod.node.programs()[pod.cgroup_uid]
    own = [(each["hook"], each["id"]) for each in found["programs"] if not each["above"]]
    assert sorted(own) == kinds
    assert [each["name"] for each in found["programs"] if each["above"]] == ["bpfrl_cooperate"]
    assert found["cooperates"] is True
    assert [(each["key"], each["text"], each["meaning"]) for each in found["asked"]["values"]] == [
        (EGRESS, "10M", "10mbit"),
        (INGRESS, "20M", "20mbit"),
    ]
    wait_for(lambda: bool(of(cluster, pod).document["events"]), SECONDS)
    assert [each["reason"] for each in of(cluster, pod).document["events"]] == ["BandwidthLimited"]


def test_a_pod_that_asks_for_nothing_is_as_it_asks(cluster: Cluster) -> None:
    pod = cluster.create(1, host_network=True)
    told = of(cluster, pod)
    assert (told.code, told.verdict[:41]) == (0, "not limited: the pod asks for nothing (no")
    assert told.document["pod"]["host_network"] is True


def test_a_pod_without_its_cgroup_is_not_limited_yet(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"}, cgroup=False)
    told = of(cluster, pod)
    assert told.code == 1
    assert told.verdict.startswith(f"NOT limited although it asks for egress 10mbit: no cgroup for pod {pod.uid}")
    pod.start()
    cluster.converge({pod: (10 * MBIT, 0)})
    assert of(cluster, pod).code == 0


def test_a_value_that_cannot_be_meant_is_named(cluster: Cluster) -> None:
    pod = cluster.create(2, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.annotate(pod, EGRESS, "fast")
    wait_for(lambda: ("Warning", "BandwidthLimitInvalid") in cluster.events(pod), SECONDS)
    told = of(cluster, pod)
    assert told.code == 1
    assert told.verdict.startswith("limited as it was before (egress 10mbit): what it asks for cannot be meant:")
    assert told.document["marks"]["asked"] == "missing"
    assert told.document["events"][-1]["reason"] == "BandwidthLimitInvalid"


def test_a_node_that_is_down_is_named(cluster: Cluster) -> None:
    pod = cluster.create(1, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    pod.node.daemon.kill()
    told = of(cluster, pod)
    assert told.code == 1
    start = f"NOT known to be limited although it asks for egress 10mbit: node {pod.node.address}:{NODE_PORT} does not"
    assert told.verdict.startswith(start)
    assert told.document["programs"] is None


def test_without_a_master_nobody_tells_the_node(cluster: Cluster, master: Daemon) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    master.kill()
    try:
        cluster.annotate(pod, EGRESS, "20M")
        late = cluster.create(0, {EGRESS: "5M"})
        assert of(cluster, pod).verdict.startswith(
            "limited to something else: egress 10mbit, although it asks for egress 20mbit: "
        )
        told = of(cluster, late)
        assert (told.code, "does bpfrl serve-master run?" in told.verdict) == (1, True)
    finally:
        master.start()
        await_acting(master)


def test_who_has_the_wrong_certificate_is_told(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    told = explain(cluster, pod.name, certificates="node")
    assert told.code == 1
    assert "is for node.bpfrl" in told.verdict


def test_on_its_own_node_a_pod_is_explained_without_the_daemon(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    pod.node.daemon.kill()
    line = ["explain", pod.name, "--kubeconfig", str(cluster.api.kubeconfig)]
    done = subprocess.run(
        in_namespace(pod.node.namespace, BPFRL, *line),
        env=pod.node.daemon.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "verdict: limited as asked: egress 10mbit"


def test_a_pod_that_nobody_knows_is_an_error(cluster: Cluster) -> None:
    done = command(cluster, "explain", "-n", "default", "nobody-knows")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bpfrl: the cluster has no pod default/nobody-knows\n"


def test_without_an_api_server_the_node_still_knows(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.api.kill()
    try:
        node = ("--node", pod.node.address)
        told = explain(cluster, "-n", "default", pod.name, *node)
        assert (told.code, told.verdict) == (0, "limited: egress 10mbit")
        assert told.document["pod"]["uid"] == pod.uid
        assert told.document["asked"]["known"] is False
    finally:
        cluster.api.start()


def test_the_doctor_asks_nodes_and_the_api_server(cluster: Cluster, api: Api) -> None:
    nodes = [argument for node in cluster.nodes for argument in ("--node", node.address)]
    # It is the machine's own tree that is looked at here.
    done = command(cluster, "doctor", "-o", "json", *nodes)
    rows = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert [rows[f"node {node.address}:{NODE_PORT}"]["mark"] for node in cluster.nodes] == ["ok"] * 3
    assert rows["certificates"]["mark"] == "ok"
    assert rows["API server"]["mark"] == "ok"
    # The stand-in has no rights to ask for.
    assert rows["RBAC"]["mark"] == ("ok" if type(api).__name__ == "RealApi" else "warning")
    cluster.nodes[0].daemon.kill()
    done = command(cluster, "doctor", "-o", "json", *nodes, "--node", f"{CONTROL_ADDRESS}:{NODE_PORT}")
    assert done.returncode == 1
    rows = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert rows[f"node {cluster.nodes[0].address}:{NODE_PORT}"]["mark"] == "missing"
    assert rows[f"node {CONTROL_ADDRESS}:{NODE_PORT}"]["mark"] == "missing"
    assert rows[f"node {cluster.nodes[1].address}:{NODE_PORT}"]["mark"] == "ok"
