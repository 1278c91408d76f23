"""Desired state against the nodes.

Pods come in from a source (:mod:`.apiserver`, :mod:`.manifests`) and are sorted by node; a worker for each
node (:mod:`.nodes`) does the rest. Nothing here depends on seeing every event: a source tells what is, not what has
happened, and workers compare that with what their node has. While another master leads, desired state is kept up to
date and nothing is done about it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Set
from typing import Final

import msgspec

from bpfrl.limits import PodRef
from bpfrl.master.events import Reason, Recorder
from bpfrl.master.nodes import NodeWorker, Turns, Want
from bpfrl.master.observer import UNOBSERVED, Backlog, Census, Observer
from bpfrl.master.pods import Pod
from bpfrl.rpc.client import NodeClient

log = logging.getLogger(__name__)

_DRAIN_SECONDS: Final = 20.0
# A node that has lost its last pod is let go of when its limiters are gone too.
_PRUNE_SECONDS: Final = 60.0


class Controller:
    """All pods and all nodes.

    Args:
        connect: makes the client for a node's address.
        recorder: who tells people.
        resync: how often each node is asked what it has, s.
        observer: who wants to know how long things take.
    """

    def __init__(
        self,
        connect: Callable[[str], NodeClient],
        recorder: Recorder,
        resync: float,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self._connect = connect
        self._recorder = recorder
        self._resync = resync
        self._observer = observer
        self._pods: dict[str, Pod] = {}
        self._wanted: dict[str, Want] = {}  # by the API's UID, wherever the pod is
        self._claims: dict[str, set[str]] = {}  # the API's UIDs by the cgroup's, where they differ: static pods
        self._addresses: dict[str, str] = {}  # of nodes, by name
        self._placed: dict[str, str] = {}  # the node's address, by the API's UID
        self._members: Counter[str] = Counter()  # pods by address
        self._waiting: dict[str, set[str]] = {}  # pods that wait for their node's address, by its name
        self._complete = False
        self._synced = asyncio.Event()
        self._workers: dict[str, NodeWorker] = {}
        self._turns = Turns()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._leading = asyncio.Lock()
        self._acting = False
        self._draining = False

    # What a source tells.

    def put(self, pod: Pod) -> None:
        """This pod is new, or has changed."""
        if pod.limits is None and not pod.problem:
            # Nobody is told of these, and most pods of a large cluster are among them.
            pod = msgspec.structs.replace(pod, ref=PodRef(pod.ref.uid))
        before = self._pods.get(pod.uid)
        if before == pod:
            return
        if before:
            self._unclaim(before)
        self._pods[pod.uid] = pod
        if pod.ref.uid != pod.uid:
            self._claims.setdefault(pod.ref.uid, set()).add(pod.uid)
        if before and before.ref.uid != pod.ref.uid:
            self._settle(before.ref.uid, self._placed.get(pod.uid, ""), lives=False)
        if pod.address:
            self._learn(pod.node, pod.address)
        address = pod.address or self._addresses.get(pod.node, "")
        self._place(pod, address)
        self._want(pod, address)

    def keep(self, uids: Set[str], *, complete: bool = True) -> None:
        """All pods have been put, and have these UIDs; complete: and there are no others that could not be read."""
        for uid in self._pods.keys() - uids:
            self.remove(uid)
        became_complete = complete and not self._complete
        self._complete = complete
        self._synced.set()
        if became_complete:
            for worker in self._workers.values():
                worker.look_at_all()

    def remove(self, uid: str) -> None:
        """The pod with this UID (the API's) is no more."""
        pod = self._pods.pop(uid, None)
        if pod is None:
            return
        address = self._placed.pop(uid, "")
        self._members[address] -= 1
        self._waiting.get(pod.node, set()).discard(uid)
        self._unclaim(pod)
        self._wanted.pop(uid, None)
        self._settle(pod.ref.uid, address, lives=False)

    # What a leader does.

    async def run(self) -> None:
        """Act on all that until cancelled."""
        async with self._leading:
            await self._synced.wait()
            log.info("acting: %d pods, %d of them limited", len(self._pods), len(self._wanted))
            for pod in self._pods.values():
                self._complain(pod)
            self._acting = True
            try:
                while not self._draining:
                    for address in self._workers:
                        self._run(address)
                    await asyncio.sleep(_PRUNE_SECONDS)
                    await self._prune()
            finally:
                self._acting = False
                await self._stop()

    async def drain(self) -> None:
        """Finish what is on the way, and take nothing more up."""
        self._draining = True
        workers = [self._workers[address].drain() for address in self._running]
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                await asyncio.gather(*workers)
        except TimeoutError:
            log.warning("not everything was finished within %.0f s", _DRAIN_SECONDS)

    def census(self) -> Census:
        """The state of everything at this moment."""
        backlog = Backlog()
        for worker in self._workers.values() if self._acting else ():
            backlog = backlog.plus(worker.backlog)
        names = {address: name for name, address in self._addresses.items()}
        return Census(
            synced=self._synced.is_set(),
            acting=self._acting,
            pods=len(self._pods),
            limited=sum(want.limits is not None for want in self._wanted.values()),
            invalid=sum(bool(want.pod.problem) for want in self._wanted.values()),
            backlog=backlog,
            nodes={address: names.get(address, "") for address in self._workers},
        )

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))

    def _want(self, pod: Pod, address: str) -> None:
        before = self._wanted.get(pod.uid)
        limits = pod.limits
        if pod.problem:
            # The last good limits, if there were any; after a restart only the node knows them.
            limits = before.limits if before else None
            self._complain(pod)
        if limits is None and not pod.problem:
            self._wanted.pop(pod.uid, None)
        else:
            self._wanted[pod.uid] = Want(pod, limits)
        self._settle(pod.ref.uid, address, lives=not pod.ended)

    def _settle(self, cgroup: str, address: str, *, lives: bool) -> None:
        """Tell a node's worker what counts for a cgroup.

        Of several pods that claim to be the same static pod, it is the oldest that counts, with limits or
        without: the mark and the hash are annotations, which others may write too.
        """
        if not address:
            return
        claimants = self._claimants(cgroup)
        there = [uid for uid in claimants if self._placed.get(uid) == address and not self._pods[uid].ended]
        oldest = min(there, key=lambda uid: (self._pods[uid].created, uid), default="")
        self._worker(address).want(cgroup, self._wanted.get(oldest), lives=lives)

    def _claimants(self, cgroup: str) -> Collection[str]:
        """The pods, by the API's UID, whose cgroup this is."""
        return self._claims.get(cgroup) or ((cgroup,) if cgroup in self._pods else ())

    def _unclaim(self, pod: Pod) -> None:
        claims = self._claims.get(pod.ref.uid, set())
        claims.discard(pod.uid)
        if not claims:
            self._claims.pop(pod.ref.uid, None)

    def _complain(self, pod: Pod) -> None:
        if pod.problem and self._leading.locked():
            self._recorder.tell(pod, Reason.INVALID, f"{pod.problem}; the limits stay as they are")

    def _place(self, pod: Pod, address: str) -> None:
        """Keep count of which pods are where; one that has no address yet gets it with another pod of its node."""
        before = self._placed.get(pod.uid)
        if before == address:
            return
        if before is not None:
            self._members[before] -= 1
        self._placed[pod.uid] = address
        self._members[address] += 1
        self._settle(pod.ref.uid, before or "", lives=False)
        if address:
            self._waiting.get(pod.node, set()).discard(pod.uid)
        else:
            self._waiting.setdefault(pod.node, set()).add(pod.uid)

    def _learn(self, node: str, address: str) -> None:
        """Remember a node's address: its pods are scheduled some time before the kubelet tells it for each."""
        if not node or self._addresses.get(node) == address:
            return
        self._addresses[node] = address
        for uid in self._waiting.pop(node, set()):
            pod = self._pods[uid]
            self._place(pod, address)
            self._want(pod, address)

    def _worker(self, address: str) -> NodeWorker:
        worker = self._workers.get(address)
        if worker is None:
            worker = NodeWorker(
                self._connect(address), self._recorder, self._resync, self._is_orphan, self._turns, self._observer
            )
            self._workers[address] = worker
            if self._acting:
                self._run(address)
        return worker

    def _is_orphan(self, uid: str) -> bool:
        """Whether a limiter for this UID may be taken off a node where it is not wanted."""
        claimants = self._claimants(uid)
        if wanted := [each for each in claimants if each in self._wanted]:
            # Wanted elsewhere, unless it is not known yet where that is.
            return all(self._placed.get(each) for each in wanted)
        return self._complete or bool(claimants)

    def _run(self, address: str) -> None:
        if address not in self._running and not self._draining:
            task = asyncio.create_task(self._workers[address].run(), name=address)
            self._running[address] = task
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._running.get(task.get_name()) is task:
            del self._running[task.get_name()]
        if not task.cancelled() and (error := task.exception()):
            log.critical("a mistake in bpfrl: node %s: %r", task.get_name(), error, exc_info=error)

    async def _prune(self) -> None:
        for address, worker in list(self._workers.items()):
            if not self._members[address] and worker.idle:
                del self._workers[address]
                del self._members[address]
                if task := self._running.pop(address, None):
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                await worker.close()
                self._observer.let_go(address)

    async def _stop(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
