"""One node: what it should have, what it has, and the way from one to the other.

A worker asks its node what is there, and then makes each pod so as it is wanted: one task a pod, a few at a
time, and never two for the same pod. A change of what is wanted makes it look at that pod again; so does a failure,
after a pause of the pod's own. When the node does not answer, everything known about it is forgotten, and
asked for anew after a pause of the node's own: no worker waits for another.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final, NamedTuple

from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import RefusedError, UnreachableError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.master.backoff import Backoff
from bpfrl.master.events import Reason, Recorder
from bpfrl.master.observer import UNOBSERVED, Backlog, Observer
from bpfrl.master.pods import Pod
from bpfrl.rpc.client import NodeClient

log = logging.getLogger(__name__)

# The node does one thing at a time; some more on the way keep it busy.
_SLOTS: Final = 8
# So many nodes are asked at once, and so many pods attached to, whose programs are in memory meanwhile: enough to keep
# nodes busy that take tens of milliseconds, and so few that all of a cluster's nodes are not half-way at once.
_ASKING: Final = 128
_ATTACHING: Final = 256
_CHANGING: Final = 1024
# A kubelet makes a pod's cgroup within seconds. Until then the node watches for it, which costs a call but no slot.
_CGROUP_SECONDS: Final = 30.0
# After as many waits, a minute, somebody may wonder.
_PATIENCE: Final = 2
_FIRST_POD_PAUSE: Final = 0.5
_LONGEST_POD_PAUSE: Final = 60.0
_FIRST_NODE_PAUSE: Final = 0.2
_LONGEST_NODE_PAUSE: Final = 15.0
# A node that may have been started anew is asked when what is on its way there has ended, or after this.
_SETTLING_SECONDS: Final = 5.0
# A daemon that is being replaced is back by then.
_NODE_FAILURES_TOLD: Final = 6
# Resyncs are spread by this share, so that all nodes are not asked at once.
_JITTER: Final = 0.2
_NOT_FOUND: Final = "NOT_FOUND"


class Want(NamedTuple):
    """What a pod of this node should have.

    Attributes:
        pod: the pod.
        limits: its limits; None: whatever it has, because what it asks for now cannot be meant.
    """

    pod: Pod
    limits: Limits | None


class Has(NamedTuple):
    """What a pod of this node has.

    Attributes:
        ref: the pod, as its limiter names it.
        limits: what is in force; None: something that is no whole limiter, or nobody knows, for a call was cut off.
        build: the digest of its programs.
    """

    ref: PodRef | None = None
    limits: Limits | None = None
    build: bytes = b""

    @classmethod
    def of(cls, found: Status | Broken) -> Has:
        """What the node says of it. A limiter whose cgroup has gone limits nothing."""
        if isinstance(found, Broken) or not found.cgroup_id:
            return cls()
        return cls(found.pod, found.limits, found.build)


class Verb(Enum):
    """What is to be done about one pod."""

    ATTACH = "attach"
    UPDATE = "update"
    DETACH = "detach"


def decide(want: Want | None, has: Has | None, build: bytes) -> Verb | None:
    """What makes a pod have what it should have.

    Args:
        want: what it should have; None: no limiter.
        has: what it has; None: no limiter.
        build: the digest of the programs that this master generates.
    """
    if want is None:
        return None if has is None else Verb.DETACH
    if want.limits is None:
        return None
    if has is None or has.limits is None or has.build != build or has.ref != want.pod.ref:
        return Verb.ATTACH
    return None if has.limits == want.limits else Verb.UPDATE


class Turns:
    """How much is on the way at once, to all nodes together.

    Who is asked gives way to who is attached to, so that nodes are finished one after the other rather than begun.
    Nodes that have not answered before wait among themselves: a connection that nobody answers takes seconds.

    Attributes:
        attach: to send a program.
        change: to change or detach.
    """

    def __init__(self) -> None:
        self.attach = asyncio.Semaphore(_ATTACHING)
        self.change = asyncio.Semaphore(_CHANGING)
        self._ask = asyncio.Semaphore(_ASKING)
        self._ask_again = asyncio.Semaphore(_ASKING)

    @asynccontextmanager
    async def ask(self, *, again: bool) -> AsyncIterator[None]:
        """To ask what a node has; again: it has not answered the last time."""
        if again:
            async with self._ask_again:
                yield
        else:
            async with self._ask, self.attach:
                yield


class NodeWorker:
    """Makes one node have what it should have.

    Args:
        client: calls to the node.
        recorder: who tells people.
        resync: how often the node is asked what it has, s.
        is_orphan: whether a limiter for a UID that nobody here wants may be taken away.
        turns: those of all nodes.
        observer: who wants to know how long things take.
    """

    def __init__(
        self,
        client: NodeClient,
        recorder: Recorder,
        resync: float,
        is_orphan: Callable[[str], bool],
        turns: Turns,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self.wants: dict[str, Want] = {}
        self._client = client
        self._recorder = recorder
        self._resync = resync
        self._is_orphan = is_orphan
        self._turns = turns
        self._observer = observer
        self._build = generator.build()
        self._found: dict[str, Has] | None = None
        self._leaving: dict[str, Pod] = {}
        self._wake = asyncio.Event()
        self._changed: set[str] = set()
        self._due: dict[str, float] | None = None  # since when what is wanted is not in force, s; None: nobody works
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sent: set[str] = set()  # what the node has been told and has not answered, or may never
        self._uncertain: set[str] = set()  # what was on the way while the node was asked
        self._patient: set[str] = set()
        self._pauses: dict[str, Backoff] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._backoff = Backoff(_FIRST_NODE_PAUSE, _LONGEST_NODE_PAUSE)
        self._resync_at = 0.0
        self._connected: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(_SLOTS)
        self._stopping = False

    def want(self, uid: str, want: Want | None, *, lives: bool = True) -> None:
        """This is what a pod should have from now on; None: no limiter, although, or because, it does not live."""
        before = self.wants.pop(uid, None)
        self._leaving.pop(uid, None)
        if want:
            self.wants[uid] = want
        elif before and lives:
            self._leaving[uid] = before.pod
        if before == want:
            return
        self._pauses.pop(uid, None)
        if self._due is not None:
            self._due.setdefault(uid, asyncio.get_running_loop().time())
        self.look_at(uid)

    def look_at(self, uid: str) -> None:
        """Compare what a pod has with what it should have, soon."""
        if timer := self._timers.pop(uid, None):
            timer.cancel()
        if uid in self._patient:
            # It waits for the cgroup of a pod that is wanted otherwise now.
            self._tasks[uid].cancel()
        self._changed.add(uid)
        self._wake.set()

    def look_at_all(self) -> None:
        """Compare everything that the node has with what it should have, soon."""
        for uid in (self._found or {}).keys() | self.wants.keys():
            self.look_at(uid)

    async def run(self) -> None:
        """Work until cancelled."""
        self._stopping = False
        self._due = dict.fromkeys(self._changed, asyncio.get_running_loop().time())
        try:
            while True:
                await self._turn()
        finally:
            await self._cancel()

    async def drain(self) -> None:
        """Take nothing more up, and finish what is on the way; what only waits for a cgroup is let go of."""
        self._stopping = True
        for uid in tuple(self._patient):
            self._tasks[uid].cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    @property
    def backlog(self) -> Backlog:
        """What there is to do."""
        queued = (self._changed | self._tasks.keys()) - self._patient - self._timers.keys()
        return Backlog(len(queued), len(self._patient), len(self._timers))

    @property
    def idle(self) -> bool:
        """True when nothing is wanted here, and the node has nothing or cannot be asked."""
        kept = self._found or {}
        return not (self.wants or self._tasks or any(self._decide(uid) for uid in kept)) and (
            self._found is not None or self._backoff.failures > 0
        )

    async def _turn(self) -> None:
        """Ask the node if need be, start what is to be done, and wait until there is something new."""
        if self._found is None and not await self._ask():
            return
        self._start_all()
        try:
            async with asyncio.timeout_at(self._resync_at):
                await self._wake.wait()
            self._wake.clear()
        except TimeoutError:
            self._found = None

    async def _ask(self) -> bool:
        """Learn what the node has; False, after a pause, if it does not say."""
        try:
            async with self._turns.ask(again=self._backoff.failures > 0):
                self._uncertain = {*self._sent}
                listed = await self._client.list()
        except (UnreachableError, RefusedError) as error:
            pause = self._backoff.delay()
            first = self._backoff.failures == 1
            log.log(logging.WARNING if first else logging.DEBUG, "%s; again in %.1f s", error, pause)
            if self._backoff.failures == _NODE_FAILURES_TOLD:
                self._tell_all(str(error))
            await asyncio.sleep(pause)
            return False
        if self._backoff.failures:
            log.info("node %s answers", self._client.target)
        self._backoff.reset()
        self._watch_connection()
        refs = [PodRef(each.uid) if isinstance(each, Broken) else each.pod for each in listed]
        self._found = {ref.uid: Has.of(each) for ref, each in zip(refs, listed, strict=True) if ref.is_pod}
        # The node may have answered before, or after, what was on the way meanwhile.
        self._found |= dict.fromkeys(self._uncertain, Has())
        self._sent &= self._tasks.keys()
        self._changed |= self._found.keys() | self.wants.keys()
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret
        self._resync_at = asyncio.get_running_loop().time() + self._resync * spread
        return True

    def _watch_connection(self) -> None:
        """A node whose connection goes may have been started anew, with nothing of what it had: ask again."""
        if self._connected:
            self._connected.cancel()
        self._connected = asyncio.create_task(self._ask_when_lost())

    async def _ask_when_lost(self) -> None:
        await self._client.lost()
        # Something in between may cut off every connection.
        await asyncio.sleep(_FIRST_NODE_PAUSE)
        # What is on the way when the node is asked has to be told again. That may take another connection, after which
        # it is asked again: with more nodes at work than connections there was no end. Calls to one that is gone fail.
        if calls := [task for uid, task in self._tasks.items() if uid not in self._patient]:
            await asyncio.wait(calls, timeout=_SETTLING_SECONDS)
        self._found = None
        self._wake.set()

    def _tell_all(self, reason: str) -> None:
        for want in self.wants.values():
            if want.limits:
                self._recorder.tell(want.pod, Reason.FAILED, f"{want.limits}: {reason}")

    def _decide(self, uid: str) -> Verb | None:
        want = self.wants.get(uid)
        if want is None and not self._is_orphan(uid):
            return None
        return decide(want, (self._found or {}).get(uid), self._build)

    def _start_all(self) -> None:
        changed, self._changed = self._changed, set()
        for uid in changed:
            self._start(uid)

    def _start(self, uid: str) -> None:
        # What is on its way looks again when it ends, and what has failed when its pause is over.
        if self._stopping or uid in self._tasks or uid in self._timers:
            return
        verb = self._decide(uid)
        if verb is None:
            self._pauses.pop(uid, None)
            self._forget_due(uid)
            return
        task = asyncio.create_task(self._carry_out(uid, verb, self.wants.get(uid)))
        self._tasks[uid] = task
        task.add_done_callback(lambda _: self._ended(uid))

    def _ended(self, uid: str) -> None:
        task = self._tasks.pop(uid)
        self._patient.discard(uid)
        if not task.cancelled() and (error := task.exception()):
            log.critical("a mistake in bpfrl: %s: %r", uid, error, exc_info=error)
            self._pause(uid)
        if uid not in self._timers:
            self._changed.add(uid)
        self._wake.set()

    async def _carry_out(self, uid: str, verb: Verb, want: Want | None) -> None:
        try:
            if want is None or want.limits is None:
                async with self._slot(self._turns.change), self._sending(uid):
                    change = await self._client.detach(uid)
                self._set(uid, None)
                self._settled(uid, want)
                if (pod := self._leaving.pop(uid, None)) and change is Change.DETACHED:
                    self._recorder.tell(pod, Reason.UNLIMITED, "the pod asks for no limit any more")
            else:
                change = await self._give(uid, verb, want, want.limits)
                self._set(uid, Has(want.pod.ref, want.limits, self._build))
                self._settled(uid, want)
                if change is not Change.UNCHANGED:
                    self._recorder.tell(want.pod, Reason.LIMITED, str(want.limits))
        except UnreachableError as error:
            log.log(logging.DEBUG if self._found is None else logging.WARNING, "%s", error)
            self._found = None
            # It may answer all questions but this one.
            self._pause(uid)
        except RefusedError as error:
            self._refused(uid, want, error)

    async def _give(self, uid: str, verb: Verb, want: Want, limits: Limits) -> Change:
        """Attach or update, and wait for the pod's cgroup if it is not there yet."""
        image, pod = b"", want.pod
        try:
            turns = self._turns.change if verb is Verb.UPDATE else self._turns.attach
            async with self._slot(turns), self._sending(uid):
                if verb is Verb.UPDATE:
                    return await self._client.update(uid, limits)
                image = generator.generate(pod.ref, limits)
                return await self._client.attach(pod.ref, limits, image, self._build)
        except RefusedError as error:
            if error.code != _NOT_FOUND:
                raise
        if self._stopping or self.wants.get(uid) != want:
            raise asyncio.CancelledError  # what is wanted now decides what to do
        self._forget_due(uid)
        self._patient.add(uid)
        image = image or generator.generate(pod.ref, limits)
        try:
            async with self._sending(uid):
                return await self._client.attach(pod.ref, limits, image, self._build, _CGROUP_SECONDS)
        finally:
            self._patient.discard(uid)

    @asynccontextmanager
    async def _slot(self, turns: asyncio.Semaphore) -> AsyncIterator[None]:
        async with self._slots, turns:
            if self._stopping:
                raise asyncio.CancelledError
            yield

    @asynccontextmanager
    async def _sending(self, uid: str) -> AsyncIterator[None]:
        """From here on nobody knows what the pod has, until the node says how it went: not if the call is cut off."""
        self._set(uid, Has())
        self._sent.add(uid)
        try:
            yield
        except RefusedError:
            self._sent.discard(uid)
            raise
        self._sent.discard(uid)

    def _refused(self, uid: str, want: Want | None, error: RefusedError) -> None:
        failures = self._pause(uid)
        if error.code == _NOT_FOUND and failures < _PATIENCE:
            log.info("%s waits for its cgroup on %s", want.pod.ref if want else uid, self._client.target)
        elif want:
            self._recorder.tell(want.pod, Reason.FAILED, f"{want.limits}: node {self._client.target}: {error}")
        elif failures == 1:
            log.warning("%s stays limited on %s: %s", uid, self._client.target, error)

    def _pause(self, uid: str) -> int:
        """Look at a pod again after a pause that grows; returns how often in a row that has happened."""
        backoff = self._pauses.setdefault(uid, Backoff(_FIRST_POD_PAUSE, _LONGEST_POD_PAUSE))
        loop = asyncio.get_running_loop()
        self._timers[uid] = loop.call_later(backoff.delay(), self.look_at, uid)
        return backoff.failures

    def _settled(self, uid: str, want: Want | None) -> None:
        """What was wanted is in force; what is wanted since then is another matter."""
        if self.wants.get(uid) == want and (since := self._forget_due(uid)):
            self._observer.settled(asyncio.get_running_loop().time() - since)

    def _forget_due(self, uid: str) -> float | None:
        """Nobody waits for this worker: there is nothing to do, or it is the kubelet's turn."""
        return self._due.pop(uid, None) if self._due else None

    def _set(self, uid: str, has: Has | None) -> None:
        # The node may have stopped answering meanwhile, and then all of it is asked for again.
        if self._found is None:
            self._uncertain.add(uid)
        elif has is None:
            self._found.pop(uid, None)
        else:
            self._found[uid] = has

    async def _cancel(self) -> None:
        if self._connected:
            self._connected.cancel()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._found = None
        self._due = None
