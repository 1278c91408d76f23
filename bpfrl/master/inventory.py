"""What the cluster's pods ask for beside what their nodes have, for people to look at.

    API server ──pods──> join <──limiters── every node that has some of them

A pod's names and its node come from the API server, what is in force from the node. They meet by the UID that the pod's
cgroup carries; a static pod's is the hash of its manifest. Nothing is changed by looking, and one node that does not
answer keeps none of the others from being shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Final, NamedTuple

from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import ApiError, RefusedError, UnreachableError
from bpfrl.limits import Limits, PodRef
from bpfrl.master.api import Api
from bpfrl.master.apiserver import list_pods
from bpfrl.master.pods import STATIC_HASH, Pod
from bpfrl.rpc.client import NodeClient
from bpfrl.units import format_size

# Each is a handshake, which takes a few milliseconds of this machine's time, and some of the other's.
_AT_ONCE: Final = 64
# A process may mostly have 1024 files open. Of so many nodes, each connection is closed when it has answered.
_MOST_KEPT: Final = 500
# Pods of a cluster that is watched are read as often as this, or as takes this share of the time.
_READ_SECONDS: Final = 10.0
_READ_SHARE: Final = 0.05
_PATIENCE_SECONDS: Final = 3.0
# What is said of an orphan whose pod is not only without annotations.
_NO_POD: Final = "no such pod"

# Of a number of things, what to call for each that is done, while a context lasts.
Counting = Callable[[int], AbstractContextManager[Callable[[], object]]]


class Answer(NamedTuple):
    """What a node has said when it was asked for its limiters.

    Attributes:
        found: its limiters, and the folders that should be some; None: it has not answered.
        at: when that was, seconds since the epoch.
        reason: why it has not answered.
    """

    found: Sequence[Status | Broken] | None
    at: float
    reason: str = ""


class State(Enum):
    """How what is in force compares with what a pod asks for."""

    OK = "ok"
    PENDING = "pending"  # not yet what it asks for
    INVALID = "invalid"  # what it asks for cannot be meant
    ORPHAN = "orphan"  # limited, and no pod asks for it
    BROKEN = "broken"  # no whole limiter
    UNKNOWN = "unknown"  # the node does not say


class Entry(NamedTuple):
    """One pod that is limited, or asks to be.

    Attributes:
        pod: its names, and the UID that its cgroup carries.
        node: the name of its node.
        state: how what is in force compares with what it asks for.
        reason: what there is to say about that, "" if nothing.
        wanted: what it asks for; None: nothing, or what cannot be meant.
        found: what its node has for it; None: nothing, or nobody knows.
        at: when its node said so, seconds since the epoch; 0: it has not.
    """

    pod: PodRef
    node: str
    state: State
    reason: str
    wanted: Limits | None
    found: Status | Broken | None
    at: float


class Look(NamedTuple):
    """What one look at a cluster has found.

    Attributes:
        entries: its pods, by name.
        silent: the nodes that did not answer, by name, and why.
        stale: why the pods are those of an earlier look, "" if they are not.
    """

    entries: list[Entry]
    silent: dict[str, str]
    stale: str


class Nodes:
    """Connections to nodes, kept from one look to the next.

    Args:
        connect: makes the client for a node's address.
    """

    def __init__(self, connect: Callable[[str], NodeClient]) -> None:
        self._connect = connect
        self._clients: dict[str, NodeClient] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def ask(
        self, addresses: Iterable[str], seconds: float, answered: Callable[[], object] = lambda: None
    ) -> dict[str, Answer]:
        """Ask nodes for their limiters, many at once.

        Args:
            addresses: which nodes; connections to others are closed.
            seconds: how long each may take.
            answered: called for each that has answered, or will not.
        """
        wanted = sorted(set(addresses))
        for address in self._clients.keys() - wanted:
            await self._clients.pop(address).close()

        async def one(address: str) -> Answer:
            async with self._slots:
                answer = await self._ask(address, seconds)
                if len(wanted) > _MOST_KEPT:
                    await self._clients.pop(address).close()
            answered()
            return answer

        return dict(zip(wanted, await asyncio.gather(*map(one, wanted)), strict=True))

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        self._clients.clear()

    async def _ask(self, address: str, seconds: float) -> Answer:
        if address not in self._clients:
            self._clients[address] = self._connect(address)
        client = self._clients[address]
        try:
            async with asyncio.timeout(seconds):
                found = await client.list()
        except TimeoutError:
            return Answer(None, time.time(), f"no answer within {seconds:g} s")
        except (UnreachableError, RefusedError) as error:
            return Answer(None, time.time(), str(error).removeprefix(f"node {client.target}: "))
        return Answer(found, time.time())


class Cluster:
    """A cluster's pods and nodes, to be looked at once or again and again.

    Pods are not read at each look: there may be very many. A limiter that none of them explains has them read again.

    Args:
        api: the API server.
        nodes: connections to its nodes.
        namespace: only the pods of this one; "": all.
        labels: only the pods that have these, as a selector of the API server's.
        seconds: how long a node may take to answer.
        counting: what counts the nodes that have answered, of so many.
    """

    def __init__(self, api: Api, nodes: Nodes, namespace: str, labels: str, seconds: float, counting: Counting) -> None:
        self._api = api
        self._nodes = nodes
        self._namespace = namespace
        self._labels = labels
        self._seconds = seconds
        self._counting = counting
        self._pods: list[Pod] | None = None
        self._stale = ""
        self._read_seconds = 0.0
        self._read_again_at = 0.0
        self._strangers: set[str] = set()

    async def look(self) -> Look:
        """What there is now.

        Raises:
            ApiError: the pods cannot be read, and never could.
        """
        pods = self._pods
        if pods is None or asyncio.get_running_loop().time() >= self._read_again_at:
            pods = await self._read()
        places = addresses(pods)
        with self._counting(len(set(places.values()))) as answered:
            answers = await self._nodes.ask(places.values(), self._seconds, answered)
        entries = self._join(pods, answers)
        if _strangers(entries) - self._strangers:
            # Pods have come since, or somebody has attached by hand.
            entries = self._join(await self._read(), answers)
        self._strangers = _strangers(entries)
        silent = {
            name: answers[address].reason for name, address in sorted(places.items()) if answers[address].found is None
        }
        return Look(entries, silent, self._stale)

    def _join(self, pods: Sequence[Pod], answers: Mapping[str, Answer]) -> list[Entry]:
        return join(pods, answers, everything=not (self._namespace or self._labels))

    async def _read(self) -> list[Pod]:
        """The pods as they are now, or were when they could last be read."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            # Who watches is not to wait for long; the first time, who knows how many there are.
            async with asyncio.timeout(None if self._pods is None else max(_PATIENCE_SECONDS, 4 * self._read_seconds)):
                pods = (await list_pods(self._api, self._namespace, self._labels)).pods
        except (ApiError, TimeoutError) as error:
            if self._pods is None:
                raise
            pods = self._pods
            self._stale = str(error) or "the API server does not answer"
        else:
            self._stale = ""
            self._read_seconds = loop.time() - began
        self._pods = pods
        self._read_again_at = loop.time() + max(_READ_SECONDS, self._read_seconds / _READ_SHARE)
        return pods


def addresses(pods: Iterable[Pod]) -> dict[str, str]:
    """The nodes' addresses by name: a node's is known as soon as the kubelet has told it for one of its pods."""
    return {pod.node: pod.address for pod in pods if pod.address}


def join(pods: Sequence[Pod], answers: Mapping[str, Answer], *, everything: bool) -> list[Entry]:
    """What pods ask for beside what their nodes have, by name; pods that neither ask nor have are left out.

    Args:
        pods: the pods.
        answers: what their nodes have said, by address.
        everything: these are all pods there are, so that a limiter of no pod is an orphan.
    """
    places = addresses(pods)
    limiters = {
        (address, ref.uid): found
        for address, answer in answers.items()
        for found in answer.found or ()
        if (ref := _ref(found)).is_pod  # other cgroups are the node's own business
    }
    owners = _owners(pods, places)
    entries = []
    for pod in pods:
        address = places.get(pod.node, "")
        place = (address, pod.ref.uid)
        owns = owners[place] == pod.uid
        found = limiters.get(place) if owns else None
        answer = answers.get(address)
        silent = bool(address) and (answer is None or answer.found is None)
        if judged := (State.UNKNOWN, _asking(pod)) if silent and pod.limits else _judge(pod, found, owns=owns):
            entries.append(Entry(pod.ref, pod.node, *judged, pod.limits, found, answer.at if answer else 0.0))
    if everything:
        names = {address: name for name, address in places.items()}
        for (address, uid), found in limiters.items():
            if (address, uid) not in owners:
                at = answers[address].at
                node = names.get(address, address)
                entries.append(Entry(_ref(found), node, State.ORPHAN, _NO_POD, None, found, at))
    return sorted(entries, key=lambda entry: (entry.pod.namespace, entry.pod.name, entry.pod.uid, entry.node))


def _owners(pods: Iterable[Pod], places: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Whose a cgroup is, by its node's address and its UID: of several that claim it the oldest one's that runs."""
    owners: dict[tuple[str, str], Pod] = {}
    for pod in pods:
        place = (places.get(pod.node, ""), pod.ref.uid)
        owners[place] = min(owners.get(place, pod), pod, key=lambda each: (each.ended, each.created, each.uid))
    return {place: pod.uid for place, pod in owners.items()}


def _strangers(entries: Iterable[Entry]) -> set[str]:
    return {entry.pod.uid for entry in entries if entry.reason == _NO_POD}


def _judge(pod: Pod, found: Status | Broken | None, *, owns: bool) -> tuple[State, str] | None:
    """How a pod is, and what to say about it; None: it neither asks for a limit nor has one."""
    if pod.problem:
        return State.INVALID, pod.problem
    if pod.limits is None:
        reason = "the pod has ended" if pod.ended else "the pod asks for no limit"
        return (State.ORPHAN, reason) if found else None
    if isinstance(found, Broken):
        return State.BROKEN, found.reason
    if found and found.cgroup_id and found.limits == pod.limits:
        return State.OK, ""
    why = ""
    if found and not found.cgroup_id:
        why = "; its limiter's cgroup is no more"
    elif not owns:
        why = f"; another pod of its node has the same {STATIC_HASH}"
    elif not pod.address and not found:
        why = "; its node has not taken it up"
    return State.PENDING, _asking(pod) + why


def _asking(pod: Pod) -> str:
    burst = f", burst {format_size(pod.limits.burst)}" if pod.limits and pod.limits.burst else ""
    return f"asks for {pod.limits}{burst}"


def _ref(found: Status | Broken) -> PodRef:
    return PodRef(found.uid) if isinstance(found, Broken) else found.pod
