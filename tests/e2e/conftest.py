"""End to end: an API server, masters and nodes, each a process of its own, on a real kernel.

A module's tests share a fleet and, one after the other, both API servers. Each test has pods of its own, says what the
kernels of all nodes must come to (:func:`converge`), and leaves none of it behind.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import pytest

from bench.fleet import CONTROL_ADDRESS, COOPERATION_KINDS, LIMITER_KINDS, Daemon, Fleet, Node, fleet, wait_for
from bench.kubeapi import Api, ApiError, RealApi, StandIn, real_assets

EGRESS: Final = "kubernetes.io/egress-bandwidth"
INGRESS: Final = "kubernetes.io/ingress-bandwidth"
BURST: Final = "bpfrl.io/burst"
RATE: Final = "rate"
MBIT: Final = 10**6
# What takes a tenth of a second takes this long on a machine that has something else to do.
SECONDS: Final = 30.0

_NODES: Final = 3
_POLL_SECONDS: Final = 0.02
_NOT_FOUND: Final = 404
_LOG_LINES: Final = 50
_BEGUN: Final = pytest.StashKey[float]()
_fleets: list[Fleet] = []


class Pod(NamedTuple):
    """A pod on a node; the UID that its cgroup carries is the API's own but for static pods."""

    name: str
    uid: str
    node: Node
    cgroup_uid: str

    def start(self) -> None:
        """Make its cgroup, as the kubelet does."""
        self.node.start_pod(self.cgroup_uid)

    def end(self) -> None:
        """Remove its cgroup."""
        self.node.end_pod(self.cgroup_uid)


# For tests of what people look at, which asks little of an API server: the real one, where there is one.
ONE_API: Final = pytest.mark.parametrize(
    "api", [StandIn if real_assets() is None else RealApi], indirect=True, scope="module"
)

Expected = Mapping[Pod, tuple[int, int]]


def converge(bed: Fleet, expected: Expected, seconds: float = SECONDS) -> None:
    """Have the kernel of every node come to these limits (egress and ingress, bit/s), and to nothing besides."""
    wanted = {node: _wanted(node, expected) for node in bed.nodes}
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor() as workers:
        while not all(workers.map(_has, wanted.keys(), wanted.values())):
            if time.monotonic() > deadline:
                assert {node.name: _state(node) for node in wanted} == {node.name: wanted[node] for node in wanted}
                return
            time.sleep(_POLL_SECONDS)


class State(NamedTuple):
    """What a node's kernel has: what bpfrl lists, what bpftool sees on the cgroups, and what is in the bpffs.

    All pods' own cgroup has the program by which they cooperate, whether any is limited or not.
    """

    limits: dict[str, tuple[int, int]]
    attached: dict[str, list[str]]
    cooperating: list[str]
    pinned: list[str]


def _wanted(node: Node, expected: Expected) -> State:
    limits = {pod.cgroup_uid: rates for pod, rates in expected.items() if pod.node is node}
    return State(limits, dict.fromkeys(limits, LIMITER_KINDS), COOPERATION_KINDS, sorted([*limits, node.cooperation]))


def _state(node: Node) -> State:
    return State(node.limits(), node.attached(), node.cooperating(), node.pinned())


def _has(node: Node, wanted: State) -> bool:
    """The same as comparing with :func:`_state`, with what costs most last."""
    return (
        node.pinned() == wanted.pinned
        and node.attached() == wanted.attached
        and node.cooperating() == wanted.cooperating
        and (not wanted.limits or node.limits() == wanted.limits)
    )


class Cluster:
    """A fleet with an API server: what a user, the scheduler and the kubelets do to it."""

    def __init__(self, bed: Fleet, api: Api) -> None:
        self.fleet = bed
        self.nodes = bed.nodes
        self.api = api
        self._masters: list[Daemon] = []
        self._names: set[str] = set()
        self._before = {node.daemon.log: len(node.daemon.output()) for node in bed.nodes}

    def master(self, *options: str, acting: bool = True) -> Daemon:
        """Start a master of this test's own, and wait until it acts."""
        daemon = self.fleet.master("--kubeconfig", str(self.api.kubeconfig), *options)
        self._masters.append(daemon)
        if acting:
            await_acting(daemon)
        return daemon

    def create(
        self,
        node: int = 0,
        annotations: Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        cgroup: bool = True,
        cgroup_uid: str | None = None,
        host_ip: str | None = "",
        **fields: Any,
    ) -> Pod:
        """Create a pod that runs on a node, with its cgroup unless that is to come later."""
        place = self.nodes[node]
        name = name or f"pod-{uuid.uuid4().hex[:8]}"
        self._names.add(name)
        address = place.address if host_ip == "" else host_ip
        made = self.api.create_pod(name, node=place.name, host_ip=address, annotations=annotations, **fields)
        uid = made["metadata"]["uid"]
        pod = Pod(name, uid, place, cgroup_uid or uid)
        if cgroup:
            pod.start()
        return pod

    def annotate(self, pod: Pod, key: str, value: str | None) -> None:
        """Set an annotation of a pod, or remove it."""
        self.api.annotate(pod.name, {key: value})

    def delete(self, pod: Pod) -> None:
        """Delete a pod; its cgroup stays, as a kubelet's does for a while."""
        self.api.delete_pod(pod.name)
        self._names.discard(pod.name)

    def converge(self, expected: Expected, seconds: float = SECONDS) -> None:
        """:func:`converge`."""
        converge(self.fleet, expected, seconds)

    def events(self, pod: Pod) -> dict[tuple[str, str], int]:
        """How many Events there are about a pod, by type and reason; one that counts to two is two."""
        found: Counter[tuple[str, str]] = Counter()
        for event in self.api.events(pod.uid):
            found[event["type"], event["reason"]] += event["count"]
        return dict(found)

    def await_events(self, pod: Pod, *expected: tuple[str, str]) -> None:
        """Have exactly these Events be told about a pod, by type and reason, each of them once."""
        wanted = dict.fromkeys(expected, 1)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self.events(pod) == wanted, SECONDS)
        assert self.events(pod) == wanted

    def lines(self, daemon: Daemon) -> list[str]:
        """What a daemon has logged in this test."""
        return daemon.output()[self._before.get(daemon.log, 0) :].splitlines()

    def logged(self, daemon: Daemon, text: str) -> list[str]:
        """Wait until a daemon has logged something in this test, and return the lines."""
        wait_for(
            lambda: any(text in line for line in self.lines(daemon)),
            SECONDS,
            lambda: f"no {text!r} in {self.lines(daemon)}",
        )
        return [line for line in self.lines(daemon) if text in line]

    def clear(self) -> None:
        """Undo whatever a test has done, even one that has failed half-way."""
        for master in self._masters:
            master.kill()
        self._mend()
        for name in self._names:
            try:
                self.api.delete_pod(name)
            except ApiError as error:
                if error.code != _NOT_FOUND:
                    raise
        try:
            # A module's own master shows that it can do this, too.
            if any(master.process for master in self.fleet.masters):
                self.converge({})
        finally:
            for node in self.nodes:
                if node.limiters():
                    node.bpfrl("detach", "--all")
                for uid in [*node.pods]:
                    node.end_pod(uid)

    def _mend(self) -> None:
        self.api.start()
        if isinstance(self.api, StandIn):
            self.api.faults(stall=False, status=None)
        for node in self.nodes:
            node.connect()
            node.daemon.start()
        for node in self.nodes:
            wait_for(node.serves, SECONDS, node.daemon.news)


def await_acting(master: Daemon) -> None:
    """Wait until a master acts."""
    wait_for(lambda: "acting:" in master.news(), SECONDS, master.news)


@pytest.fixture(scope="module")
def bed() -> Iterator[Fleet]:
    """A fleet whose nodes serve, and whose pods cooperate."""
    if os.geteuid():
        pytest.skip("needs root")
    with fleet(_NODES) as built:
        _fleets.append(built)
        try:
            yield built
        finally:
            _fleets.remove(built)


@pytest.fixture(scope="module", params=[StandIn, RealApi])
def api(request: pytest.FixtureRequest, bed: Fleet) -> Iterator[Api]:
    """An API server beside the fleet's masters: the stand-in, and then the real one."""
    if request.param is RealApi and real_assets() is None:
        pytest.skip("needs etcd, kube-apiserver and kubectl; their folder is $KUBEBUILDER_ASSETS")
    with request.param(CONTROL_ADDRESS, bed.tag) as server:
        yield server


@pytest.fixture(scope="module")
def master(bed: Fleet, api: Api) -> Iterator[Daemon]:
    """A master that acts, for all tests of a module."""
    daemon = bed.master("--kubeconfig", str(api.kubeconfig))
    await_acting(daemon)
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture
def cluster(bed: Fleet, api: Api) -> Iterator[Cluster]:
    """The fleet with the API server, for one test."""
    built = Cluster(bed, api)
    yield built
    built.clear()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when a test begins."""
    item.stash[_BEGUN] = time.time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure how the logs end of those daemons that have logged something during the test."""
    report = yield
    if report.failed:
        for bed in _fleets:
            for daemon in (*bed.masters, *(node.daemon for node in bed.nodes)):
                if daemon.log.exists() and daemon.log.stat().st_mtime >= item.stash[_BEGUN]:
                    report.sections.append((daemon.log.name, "\n".join(daemon.output().splitlines()[-_LOG_LINES:])))
    return report
