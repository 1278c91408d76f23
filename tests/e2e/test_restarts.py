"""What breaks and comes back, in any order: afterwards the kernels of the nodes have what the pods ask for."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from bench.fleet import NODE_PORT, Daemon, Node, wait_for
from bench.kubeapi import RealApi, StandIn
from bench.lab import BPFRL, in_namespace
from bpfrl.rpc import authority, tls
from tests.e2e.conftest import EGRESS, INGRESS, MBIT, SECONDS, Cluster, Pod, await_acting, converge

LIMITED = ("Normal", "BandwidthLimited")
FAILED = ("Warning", "BandwidthLimitFailed")
NO_LEASE = "--no-leader-elect"
# Each node is asked this often: what somebody has done by hand is repaired within that.
RESYNC = ("--resync", "2")
ONLY_STAND_IN = pytest.mark.parametrize("api", [StandIn], indirect=True)
ONLY_REAL = pytest.mark.parametrize("api", [RealApi], indirect=True)


def serving(node: Node) -> None:
    """Start a node's daemon, and wait until it serves."""
    node.daemon.start()
    wait_for(node.serves, SECONDS, node.daemon.news)


# The nodes.


def test_a_node_that_crashes_changes_nothing(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    pods = {cluster.create(0, {EGRESS: f"{number}M"}): (number * MBIT, 0) for number in (1, 2, 3)}
    cluster.converge(pods)
    node = cluster.nodes[0]
    programs = node.programs()
    node.daemon.kill()
    cluster.converge(pods)
    serving(node)
    cluster.converge(pods)
    changed, *_ = pods
    cluster.annotate(changed, EGRESS, "10M")
    cluster.converge(pods | {changed: (10 * MBIT, 0)})
    assert node.programs() == programs


def test_a_node_learns_what_has_happened_while_it_was_away(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    kept, changed, freed, deleted, ended = (cluster.create(1, {EGRESS: "10M"}) for _ in range(5))
    cluster.converge(dict.fromkeys((kept, changed, freed, deleted, ended), (10 * MBIT, 0)))
    cluster.nodes[1].daemon.kill()
    cluster.annotate(changed, EGRESS, "20M")
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    cluster.delete(ended)
    ended.end()
    created = cluster.create(1, {INGRESS: "30M"})
    elsewhere = cluster.create(2, {EGRESS: "40M"})
    wait_for(lambda: elsewhere.uid in elsewhere.node.pinned(), SECONDS)
    cluster.nodes[1].daemon.start()
    cluster.converge(
        {kept: (10 * MBIT, 0), changed: (20 * MBIT, 0), created: (0, 30 * MBIT), elsewhere: (40 * MBIT, 0)}
    )


def test_a_node_that_does_not_answer_delays_no_other(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    there = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({there: (10 * MBIT, 0)})
    cluster.nodes[0].disconnect()
    # Calls to it, over the connection that there is, hang.
    cluster.annotate(there, EGRESS, "20M")
    away = [cluster.create(0, {EGRESS: "10M"}) for _ in range(10)]
    others = {cluster.create(node, {EGRESS: "10M"}): (10 * MBIT, 0) for node in (1, 2)}
    cluster.converge({there: (10 * MBIT, 0)} | others, seconds=10)
    cluster.nodes[0].connect()
    cluster.converge({there: (20 * MBIT, 0)} | dict.fromkeys(away, (10 * MBIT, 0)) | others, seconds=60)


def test_what_belongs_to_no_cgroup_is_swept_at_the_start(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    pod, other = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge({pod: (10 * MBIT, 0), other: (10 * MBIT, 0)})
    master.kill()
    node = cluster.nodes[0]
    node.daemon.kill()
    pod.end()
    assert pod.uid in node.pinned()
    node.daemon.start()
    cluster.converge({other: (10 * MBIT, 0)})
    cluster.logged(node.daemon, f"{pod.uid} swept")
    # The API still has the pod, which waits for its cgroup now.
    master.start()
    await_acting(master)
    cluster.converge({other: (10 * MBIT, 0)})
    pod.start()
    cluster.converge({pod: (10 * MBIT, 0), other: (10 * MBIT, 0)})


def test_what_somebody_does_by_hand_is_repaired(cluster: Cluster) -> None:
    cluster.master(NO_LEASE, *RESYNC)
    detached, changed = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    free = cluster.create(0)
    unknown = Pod("unknown", str(uuid.uuid4()), cluster.nodes[0], str(uuid.uuid4()))
    unknown.start()
    expected = {detached: (10 * MBIT, 0), changed: (10 * MBIT, 0)}
    cluster.converge(expected)
    node = cluster.nodes[0]
    node.bpfrl("detach", "--pod-uid", detached.uid)
    node.bpfrl("attach", "--pod-uid", changed.uid, "--rate", "77mbit")
    node.bpfrl("attach", "--pod-uid", free.uid, "--rate", "77mbit")
    node.bpfrl("attach", "--pod-uid", unknown.cgroup_uid, "--rate", "77mbit")
    cluster.converge(expected)


def test_a_node_that_reboots_limits_its_pods_again(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    pods = [cluster.create(0, {EGRESS: "10M"}) for _ in range(3)]
    cluster.converge(dict.fromkeys(pods, (10 * MBIT, 0)))
    node = cluster.nodes[0]
    node.daemon.kill()
    # Neither pins nor cgroups outlive a reboot; the kubelet makes the same pods' cgroups again.
    node.bpfrl("detach", "--all")
    for pod in pods:
        pod.end()
    serving(node)
    for pod in pods:
        pod.start()
    cluster.converge(dict.fromkeys(pods, (10 * MBIT, 0)))


def test_a_cgroup_that_was_made_anew_is_limited_again(cluster: Cluster) -> None:
    cluster.master(NO_LEASE, *RESYNC)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    # As it happens to a static pod, whose hash stays the same.
    pod.end()
    pod.start()
    cluster.converge({pod: (10 * MBIT, 0)})


def test_what_is_no_pods_is_left_alone(cluster: Cluster) -> None:
    cluster.master(NO_LEASE, *RESYNC)
    node = cluster.nodes[0]
    folder = node.cgroup_root / "system.slice" / "backup.service"
    folder.mkdir(parents=True)
    own = f"cgroup-{folder.stat().st_ino}"
    service = Pod("backup", "", node, own)
    node.pods[own] = folder
    node.bpfrl("attach", "--cgroup", str(folder), "--egress", "5mbit")
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({service: (5 * MBIT, 0), pod: (10 * MBIT, 0)})
    for _ in range(2):
        node.bpfrl("detach", "--pod-uid", pod.uid)
        cluster.converge({service: (5 * MBIT, 0), pod: (10 * MBIT, 0)})
    cluster.delete(pod)
    cluster.converge({service: (5 * MBIT, 0)})


# The master.


def burst(cluster: Cluster, halfway: Callable[[], None]) -> dict[Pod, tuple[int, int]]:
    """Sixty pods come to three nodes, a third of them change and a third go; something happens in the middle."""
    expected: dict[Pod, tuple[int, int]] = {}
    for number in range(60):
        pod = cluster.create(number % 3, {EGRESS: f"{number + 1}M"})
        expected[pod] = ((number + 1) * MBIT, 0)
        if number % 3 == 1:
            cluster.annotate(pod, INGRESS, "5M")
            expected[pod] = ((number + 1) * MBIT, 5 * MBIT)
        if number % 3 == 2:
            # Of those that came some time ago.
            victim = [*expected][number // 3]
            cluster.delete(victim)
            if number % 2:
                victim.end()
            del expected[victim]
        if number == 30:
            halfway()
    return expected


def test_a_master_that_crashes_in_a_burst(cluster: Cluster) -> None:
    master = cluster.master("--lease-duration", "3", "--lease-namespace", f"lease-{uuid.uuid4().hex[:8]}")
    expected = burst(cluster, master.restart)
    cluster.converge(expected)


def test_a_new_master_says_nothing_new(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    pods = [cluster.create(node, {EGRESS: "10M"}) for node in (0, 1, 2)]
    broken = cluster.create(0, {EGRESS: "fast"})
    cluster.converge(dict.fromkeys(pods, (10 * MBIT, 0)))
    for pod in pods:
        cluster.await_events(pod, LIMITED)
    programs = [node.programs() for node in cluster.nodes]
    cluster.logged(master, "BandwidthLimitInvalid")
    master.kill()
    cluster.delete(broken)
    master.start()
    await_acting(master)
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({marker: (MBIT, 0)} | dict.fromkeys(pods, (10 * MBIT, 0)))
    cluster.await_events(marker, LIMITED)
    for pod in pods:
        cluster.await_events(pod, LIMITED)
    del (found := [node.programs() for node in cluster.nodes])[0][marker.uid]
    assert found == programs


def test_a_new_master_keeps_the_last_good_limit(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    cluster.annotate(pod, EGRESS, "fast")
    cluster.logged(master, "BandwidthLimitInvalid")
    master.restart()
    await_acting(master)
    marker = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({pod: (10 * MBIT, 0), marker: (MBIT, 0)})
    cluster.annotate(pod, EGRESS, "20M")
    cluster.converge({pod: (20 * MBIT, 0), marker: (MBIT, 0)})


def test_a_master_learns_what_has_happened_while_it_was_away(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    kept, changed, freed, deleted = (cluster.create(1, {EGRESS: "10M"}) for _ in range(4))
    cluster.converge(dict.fromkeys((kept, changed, freed, deleted), (10 * MBIT, 0)))
    master.kill()
    cluster.annotate(changed, EGRESS, "20M")
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    created = cluster.create(1, {INGRESS: "30M"})
    cluster.converge(dict.fromkeys((kept, changed, freed, deleted), (10 * MBIT, 0)))
    master.start()
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0), created: (0, 30 * MBIT)})


def test_sigterm_ends_master_and_nodes_in_their_work(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    before = cluster.create(2, {EGRESS: "10M"})
    cluster.converge({before: (10 * MBIT, 0)})
    wanted = {cluster.create(number % 2, {EGRESS: "20M"}): (20 * MBIT, 0) for number in range(30)}
    assert master.stop() == 0
    for node in cluster.nodes:
        assert node.daemon.stop() == 0
    # Whatever was done is whole, and stays in force.
    done = {pod: rates for pod, rates in wanted.items() if pod.uid in pod.node.pinned()}
    converge(cluster.fleet, done | {before: (10 * MBIT, 0)}, seconds=0)
    for node in cluster.nodes:
        serving(node)
    master.start()
    cluster.converge(wanted | {before: (10 * MBIT, 0)})


@ONLY_STAND_IN
def test_sigterm_ends_a_master_that_nobody_answers(cluster: Cluster) -> None:
    master = cluster.master("--lease-namespace", f"lease-{uuid.uuid4().hex[:8]}")
    there = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({there: (10 * MBIT, 0)})
    cluster.nodes[0].disconnect()
    cluster.annotate(there, EGRESS, "20M")
    marker = cluster.create(1, {EGRESS: "1M"})
    cluster.converge({there: (10 * MBIT, 0), marker: (MBIT, 0)})
    cluster.api.kill()
    # A kubelet kills what has not ended after 30 s.
    begun = time.monotonic()
    assert master.stop() == 0
    assert time.monotonic() - begun < 25
    cluster.converge({there: (10 * MBIT, 0), marker: (MBIT, 0)})


def test_a_node_that_is_stopped_in_its_work(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    wanted = {cluster.create(0, {EGRESS: "20M"}): (20 * MBIT, 0) for _ in range(30)}
    assert cluster.nodes[0].daemon.stop() == 0
    cluster.nodes[0].daemon.start()
    cluster.converge(wanted)


# The API server.


def test_the_api_server_crashes_while_things_change(cluster: Cluster) -> None:
    cluster.master(NO_LEASE)
    kept, changed, freed, deleted = (cluster.create(1, {EGRESS: "10M"}) for _ in range(4))
    cluster.converge(dict.fromkeys((kept, changed, freed, deleted), (10 * MBIT, 0)))
    cluster.annotate(changed, EGRESS, "20M")
    early = cluster.create(0, {EGRESS: "30M"})
    cluster.api.kill()
    # Without it, limits stay, and a node may come and go.
    cluster.nodes[2].daemon.restart()
    cluster.api.start()
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    late = cluster.create(2, {EGRESS: "40M"})
    cluster.converge(
        {kept: (10 * MBIT, 0), changed: (20 * MBIT, 0), early: (30 * MBIT, 0), late: (40 * MBIT, 0)}, seconds=60
    )


def test_a_leader_that_cannot_renew_its_lease_leads_again_later(cluster: Cluster) -> None:
    namespace = f"lease-{uuid.uuid4().hex[:8]}"
    master = cluster.master("--lease-duration", "3", "--lease-namespace", namespace)
    kept, changed = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge(dict.fromkeys((kept, changed), (10 * MBIT, 0)))
    cluster.api.kill()
    cluster.logged(master, "not leading any more")
    cluster.nodes[0].daemon.restart()
    cluster.converge(dict.fromkeys((kept, changed), (10 * MBIT, 0)))
    cluster.api.start()
    cluster.annotate(changed, EGRESS, "20M")
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0)}, seconds=60)


def lists(api: StandIn) -> int:
    """How often the pods have been listed."""
    return api.counters()["pods"].get("list", 0)


def refusals(api: StandIn) -> int:
    """How many requests about pods were refused."""
    return api.counters()["pods"].get("refused", 0)


@ONLY_STAND_IN
def test_a_watch_that_breaks_goes_on_without_a_list(cluster: Cluster, api: StandIn) -> None:
    cluster.master(NO_LEASE)
    pods = [cluster.create(node, {EGRESS: "10M"}) for node in (0, 1)]
    cluster.converge(dict.fromkeys(pods, (10 * MBIT, 0)))
    before = lists(api)
    for number in range(3):
        api.faults(drop=True)
        cluster.annotate(pods[0], EGRESS, f"{number + 20}M")
        cluster.converge({pods[0]: ((number + 20) * MBIT, 0), pods[1]: (10 * MBIT, 0)})
    api.faults(stall=True)
    cluster.delete(pods[1])
    api.faults(drop=True)
    api.faults(stall=False)
    cluster.converge({pods[0]: (22 * MBIT, 0)})
    assert lists(api) == before


@ONLY_STAND_IN
def test_a_watch_that_is_silent_for_a_while_goes_on(cluster: Cluster, api: StandIn) -> None:
    cluster.master(NO_LEASE)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    counted = api.counters()["pods"]
    api.faults(stall=True)
    cluster.annotate(pod, EGRESS, "20M")
    time.sleep(1)
    cluster.converge({pod: (10 * MBIT, 0)})
    api.faults(stall=False)
    cluster.converge({pod: (20 * MBIT, 0)})
    after = api.counters()["pods"]
    assert (after["list"], after["watch"]) == (counted["list"], counted["watch"])


@ONLY_STAND_IN
def test_a_watch_that_has_expired_is_followed_by_a_list(cluster: Cluster, api: StandIn) -> None:
    cluster.master(NO_LEASE)
    changed, freed, deleted = (cluster.create(node, {EGRESS: "10M"}) for node in (0, 1, 2))
    cluster.converge(dict.fromkeys((changed, freed, deleted), (10 * MBIT, 0)))
    before = lists(api)
    api.faults(stall=True)
    cluster.annotate(changed, EGRESS, "20M")
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    created = cluster.create(0, {EGRESS: "30M"})
    api.faults(compact=True, stall=False)
    cluster.converge({changed: (20 * MBIT, 0), created: (30 * MBIT, 0)})
    assert lists(api) == before + 1


@ONLY_REAL
def test_a_compaction_is_followed_by_a_list(cluster: Cluster, api: RealApi) -> None:
    master = cluster.master(NO_LEASE)
    changed, freed, deleted = (cluster.create(node, {EGRESS: "10M"}) for node in (0, 1, 2))
    cluster.converge(dict.fromkeys((changed, freed, deleted), (10 * MBIT, 0)))
    for pod in (changed, freed, deleted):
        # Of a later version than the last pod that the master has seen.
        cluster.await_events(pod, LIMITED)
    api.compact()
    api.kill()
    api.start()
    cluster.annotate(changed, EGRESS, "20M")
    cluster.annotate(freed, EGRESS, None)
    cluster.delete(deleted)
    created = cluster.create(0, {EGRESS: "30M"})
    cluster.converge({changed: (20 * MBIT, 0), created: (30 * MBIT, 0)}, seconds=60)
    cluster.logged(master, "listing all pods again")


@ONLY_STAND_IN
def test_garbage_in_a_watch_is_survived(cluster: Cluster, api: StandIn) -> None:
    master = cluster.master(NO_LEASE)
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({pod: (10 * MBIT, 0)})
    before = lists(api)
    api.faults(garbage=True)
    cluster.annotate(pod, EGRESS, "20M")
    cluster.converge({pod: (20 * MBIT, 0)})
    cluster.logged(master, "cannot be read")
    assert lists(api) == before


@ONLY_STAND_IN
@pytest.mark.parametrize("fault", [{"code": 429, "retryAfter": 1, "count": 2}, {"code": 500, "count": 3}])
@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_refusal_is_followed_by_another_try(cluster: Cluster, api: StandIn, fault: dict[str, int], verb: str) -> None:
    cluster.master(NO_LEASE)
    kept, changed = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge(dict.fromkeys((kept, changed), (10 * MBIT, 0)))
    listed, refused = lists(api), refusals(api)
    api.faults(status={**fault, "verb": verb, "path": "/api/v1/pods"})
    start = time.monotonic()
    if verb == "list":
        api.faults(compact=True)
    else:
        api.faults(drop=True)
    cluster.annotate(changed, EGRESS, "20M")
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0)})
    assert refusals(api) == refused + fault["count"]
    assert lists(api) == listed + (verb == "list")
    # Not before the server has asked for it.
    assert time.monotonic() - start >= fault.get("retryAfter", 0) * fault["count"]


@ONLY_STAND_IN
def test_a_master_starts_against_a_server_that_refuses(cluster: Cluster, api: StandIn) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    refused = refusals(api)
    api.faults(status={"code": 503, "count": 3, "path": "/api/v1/pods"})
    cluster.master(NO_LEASE)
    cluster.converge({pod: (10 * MBIT, 0)})
    assert refusals(api) == refused + 3


def test_a_master_starts_before_the_api_server(cluster: Cluster) -> None:
    pod = cluster.create(0, {EGRESS: "10M"})
    cluster.api.kill()
    master = cluster.master("--lease-namespace", f"lease-{uuid.uuid4().hex[:8]}", "--lease-duration", "3", acting=False)
    cluster.logged(master, "no connection to the API server")
    cluster.api.start()
    cluster.converge({pod: (10 * MBIT, 0)}, seconds=60)


# Two masters.


def two_masters(cluster: Cluster, duration: int) -> tuple[Daemon, Daemon]:
    """Two masters with one lease, the one that leads first."""
    options = ("--lease-namespace", f"lease-{uuid.uuid4().hex[:8]}", "--lease-duration", str(duration))
    leader = cluster.master(*options)
    follower = cluster.master(*options, acting=False)
    cluster.logged(follower, "watching pods")
    return leader, follower


def identity(master: Daemon) -> str:
    """By which name a master leads."""
    [line] = [line for line in master.news().splitlines() if " leading as " in line]
    return line.rpartition(" ")[2]


def test_only_the_leader_acts(cluster: Cluster) -> None:
    leader, follower = two_masters(cluster, 15)
    pods = {cluster.create(node, {EGRESS: "10M"}): (10 * MBIT, 0) for node in (0, 1, 2)}
    invalid = cluster.create(0, {EGRESS: "fast"})
    cluster.converge(pods)
    for pod in pods:
        cluster.await_events(pod, LIMITED)
        [event] = cluster.api.events(pod.uid)
        assert event["reportingInstance"] == identity(leader)
    cluster.await_events(invalid, ("Warning", "BandwidthLimitInvalid"))
    assert "leading" not in follower.output()
    assert "Bandwidth" not in follower.output()


def test_a_leader_that_crashes_is_followed_within_the_leases_duration(cluster: Cluster) -> None:
    leader, follower = two_masters(cluster, 3)
    kept, changed, deleted = (cluster.create(0, {EGRESS: "10M"}) for _ in range(3))
    cluster.converge(dict.fromkeys((kept, changed, deleted), (10 * MBIT, 0)))
    leader.kill()
    cluster.annotate(changed, EGRESS, "20M")
    cluster.delete(deleted)
    # The duration, two tries, and what this machine has besides to do.
    wait_for(lambda: "acting:" in follower.news(), 3 + 2 + 15, follower.news)
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0)})
    leader.start()
    created = cluster.create(1, {EGRESS: "30M"})
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0), created: (30 * MBIT, 0)})


def test_a_leader_that_is_stopped_gives_the_lease_back(cluster: Cluster) -> None:
    leader, follower = two_masters(cluster, 30)
    kept, changed = (cluster.create(0, {EGRESS: "10M"}) for _ in range(2))
    cluster.converge(dict.fromkeys((kept, changed), (10 * MBIT, 0)))
    assert leader.stop() == 0
    cluster.annotate(changed, EGRESS, "20M")
    # The follower asks every 4 s; were the lease still held, that would take half a minute.
    wait_for(lambda: "acting:" in follower.news(), 20, follower.news)
    cluster.converge({kept: (10 * MBIT, 0), changed: (20 * MBIT, 0)})


# Certificates, which are between masters and nodes: one API server is enough.

# Calls List on a node, and prints the status. What is in the arguments: the address, and the authority's, the
# certificate's and the key's file, the last two perhaps missing.
_KNOCK = """
import sys
from pathlib import Path
import grpc
from bpfrl.rpc import node_pb2
from bpfrl.rpc.node_pb2_grpc import NodeStub
target, authority, *own = sys.argv[1:]
certificate, key = own or (None, None)
read = lambda name: Path(name).read_bytes() if name else None
credentials = grpc.ssl_channel_credentials(read(authority), read(key), read(certificate))
options = [("grpc.ssl_target_name_override", "node.bpfrl")]
try:
    with grpc.secure_channel(target, credentials, options) as channel:
        NodeStub(channel).List(node_pb2.ListRequest(), timeout=10)
    print("OK")
except grpc.RpcError as error:
    print(error.code().name, error.details())
"""


def copy(source: Path, target: Path) -> None:
    """Replace a folder's certificates, as somebody who is in no hurry does: file by file."""
    target.mkdir(exist_ok=True)
    for name in ("ca.crt", "tls.crt", "tls.key"):
        scratch = target / f".{name}"
        scratch.write_bytes((source / name).read_bytes())
        scratch.replace(target / name)


def foreign(cluster: Cluster, folder: Path) -> None:
    """A master's certificate by another authority, that trusts the nodes' own."""
    authority.init(folder.with_name("foreign"), 1)
    copy(folder.with_name("foreign") / "master", folder)
    (folder / "ca.crt").write_bytes((cluster.fleet.certificates / "ca.crt").read_bytes())


def expired(cluster: Cluster, folder: Path) -> None:
    """A master's certificate that was good until a minute ago."""
    sign(cluster, folder, tls.MASTER, -timedelta(minutes=1))


def sign(cluster: Cluster, folder: Path, role: str, validity: timedelta) -> None:
    """Make a client's certificate by the fleet's authority."""
    folder.mkdir()
    own, key = authority._load_authority(cluster.fleet.certificates)
    authority._make_certificate(folder, own, key, role, ExtendedKeyUsageOID.CLIENT_AUTH, validity)


@ONLY_STAND_IN
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (foreign, "its certificate is refused: unable to get local issuer certificate"),
        (expired, "its certificate is refused: certificate has expired"),
    ],
)
def test_a_master_whose_certificate_is_refused_until_it_gets_a_right_one(
    cluster: Cluster, tmp_path: Path, make: Callable[[Cluster, Path], None], reason: str
) -> None:
    folder = tmp_path / "master"
    make(cluster, folder)
    pod = cluster.create(0, {EGRESS: "10M"})
    master = cluster.master(NO_LEASE, "--certs", str(folder))
    cluster.logged(master, f"WARNING node {pod.node.address}:{NODE_PORT}: ")
    assert reason in cluster.logged(pod.node.daemon, "refused 10.78.0.1:")[0]
    if make is expired:
        cluster.logged(master, f"{folder}/tls.crt has expired")
        # A node that refuses for some time is told of where people look.
        cluster.await_events(pod, FAILED)
    cluster.converge({})
    copy(cluster.fleet.certificates / "master", folder)
    cluster.converge({pod: (10 * MBIT, 0)}, seconds=60)
    cluster.logged(master, "read the changed certificates")


@ONLY_STAND_IN
def test_nobody_but_a_master_gets_in(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.nodes[0]
    trusted = cluster.fleet.certificates / "ca.crt"

    def knock(folder: Path | None) -> str:
        files = (trusted, *((folder / "tls.crt", folder / "tls.key") if folder else ()))
        command = [sys.executable, "-c", _KNOCK, f"{node.address}:{NODE_PORT}", *map(str, files)]
        result = subprocess.run(
            in_namespace(cluster.fleet.tag, *command),
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS,
            cwd=Path(__file__).parents[2],
        )
        return result.stdout.strip()

    assert knock(cluster.fleet.certificates / "master") == "OK"
    assert knock(None).startswith("UNAVAILABLE")
    assert all("refused 10.78.0.1:" in line for line in cluster.logged(node.daemon, ": it has no certificate"))
    # A node's certificate is for servers.
    assert knock(cluster.fleet.certificates / "node").startswith("UNAVAILABLE")
    refusal = ": its certificate is refused: unsupported certificate purpose"
    assert all("refused 10.78.0.1:" in line for line in cluster.logged(node.daemon, refusal))
    # Were it for clients, too, it would still be no master's.
    sign(cluster, tmp_path / "node", tls.NODE, timedelta(days=1))
    refusal = "the certificate is for node.bpfrl: it must have the DNS name master.bpfrl or operator.bpfrl"
    assert knock(tmp_path / "node") == f"PERMISSION_DENIED {refusal}"
    [line] = cluster.logged(node.daemon, refusal)
    assert "refused list from ipv4:10.78.0.1:" in line


@ONLY_STAND_IN
def test_a_master_does_not_start_with_a_nodes_certificate(cluster: Cluster) -> None:
    folder = cluster.fleet.certificates / "node"
    master = cluster.master(NO_LEASE, "--certs", str(folder), acting=False)
    assert master.wait() == 1
    assert master.output().splitlines()[-1] == (
        f"bpfrl: {folder}/tls.crt is for node.bpfrl: it must have the DNS name master.bpfrl"
    )


@ONLY_STAND_IN
def test_a_master_trusts_no_stranger(cluster: Cluster, tmp_path: Path) -> None:
    authority.init(tmp_path / "foreign", 1)
    folder = tmp_path / "master"
    copy(cluster.fleet.certificates / "master", folder)
    (folder / "ca.crt").write_bytes((tmp_path / "foreign" / "ca.crt").read_bytes())
    pod = cluster.create(0, {EGRESS: "10M"})
    master = cluster.master(NO_LEASE, "--certs", str(folder))
    cluster.logged(master, "CERTIFICATE_VERIFY_FAILED")
    cluster.logged(pod.node.daemon, "hung up in the handshake")
    cluster.converge({})
    copy(cluster.fleet.certificates / "master", folder)
    cluster.converge({pod: (10 * MBIT, 0)}, seconds=60)


@ONLY_STAND_IN
def test_certificates_are_renewed_at_work(cluster: Cluster) -> None:
    master = cluster.master(NO_LEASE)
    pods = {cluster.create(node, {EGRESS: "10M"}): (10 * MBIT, 0) for node in (0, 1, 2)}
    cluster.converge(pods)
    subprocess.run(
        [BPFRL, "certs", "init", "--renew", str(cluster.fleet.certificates)], check=True, capture_output=True
    )
    pods |= {cluster.create(node, {EGRESS: "20M"}): (20 * MBIT, 0) for node in (0, 1, 2)}
    cluster.converge(pods)
    for daemon in (master, *(node.daemon for node in cluster.nodes)):
        cluster.logged(daemon, "read the changed certificates")
    cluster.nodes[0].daemon.restart()
    master.restart()
    pods |= {cluster.create(node, {EGRESS: "30M"}): (30 * MBIT, 0) for node in (0, 1, 2)}
    cluster.converge(pods)
