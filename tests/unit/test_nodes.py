"""One node's worker, at a node in memory that can be told to fail, to wait and to forget."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from bpfrl.bpf import generator
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import CompilerError, RefusedError, UnreachableError
from bpfrl.limits import Limits, PodRef
from bpfrl.master import nodes as module
from bpfrl.master.backoff import Backoff
from bpfrl.master.events import Reason
from bpfrl.master.nodes import Has, NodeWorker, Turns, Verb, Want, decide
from bpfrl.units import Rate
from tests.unit.fakes import (
    BUILD,
    FAST,
    OLD_BUILD,
    SLOW,
    Node,
    Told,
    a_while,
    image_of,
    make_pod,
    refusing,
    run,
    running,
    silent,
    uid_of,
    until,
)

POD = make_pod(1)
UID = POD.ref.uid


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, and pauses that nobody notices."""
    monkeypatch.setattr(generator, "build", lambda: BUILD)
    monkeypatch.setattr(generator, "generate", image_of)
    for name in ("_FIRST_POD_PAUSE", "_LONGEST_POD_PAUSE", "_FIRST_NODE_PAUSE", "_LONGEST_NODE_PAUSE"):
        monkeypatch.setattr(module, name, 0.004)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that no test waits for."""
    for name in ("_FIRST_POD_PAUSE", "_LONGEST_POD_PAUSE"):
        monkeypatch.setattr(module, name, 600.0)


# What is to be done.

_OF = make_pod(1).ref
_GOOD = Has(_OF, SLOW, BUILD)


@pytest.mark.parametrize(
    ("want", "has", "verb"),
    [
        (None, None, None),
        (None, _GOOD, Verb.DETACH),
        (None, Has(), Verb.DETACH),
        (None, Has(_OF, SLOW, OLD_BUILD), Verb.DETACH),
        # What cannot be meant changes nothing.
        (Want(POD, None), None, None),
        (Want(POD, None), _GOOD, None),
        (Want(POD, None), Has(), None),
        (Want(POD, None), Has(_OF, SLOW, OLD_BUILD), None),
        (Want(POD, SLOW), None, Verb.ATTACH),
        (Want(POD, SLOW), Has(), Verb.ATTACH),
        (Want(POD, SLOW), Has(_OF, None, BUILD), Verb.ATTACH),
        (Want(POD, SLOW), _GOOD, None),
        (Want(POD, FAST), _GOOD, Verb.UPDATE),
        (Want(POD, Limits(SLOW.egress, None, 65_536)), _GOOD, Verb.UPDATE),
        # Other programs, or another name in them: an update does not change those.
        (Want(POD, SLOW), Has(_OF, SLOW, OLD_BUILD), Verb.ATTACH),
        (Want(POD, SLOW), Has(_OF, SLOW, b""), Verb.ATTACH),
        (Want(POD, FAST), Has(_OF, SLOW, OLD_BUILD), Verb.ATTACH),
        (Want(POD, SLOW), Has(PodRef(UID), SLOW, BUILD), Verb.ATTACH),
        (Want(POD, FAST), Has(PodRef(UID, "shop", "other"), SLOW, BUILD), Verb.ATTACH),
    ],
)
def test_what_is_to_be_done_follows_from_what_is_wanted_and_what_there_is(
    want: Want | None, has: Has | None, verb: Verb | None
) -> None:
    assert decide(want, has, BUILD) is verb


@pytest.mark.parametrize(
    ("found", "has"),
    [
        (Status(_OF, SLOW, Counters(), Counters(), 7, 1.0, BUILD), _GOOD),
        # Its cgroup has gone.
        (Status(_OF, SLOW, Counters(), Counters(), 0, 1.0, BUILD), Has()),
        (Broken(UID, "half of it"), Has()),
    ],
)
def test_only_a_whole_limiter_on_a_cgroup_limits_anything(found: Status | Broken, has: Has) -> None:
    assert Has.of(found) == has


# The worker.


class Played:
    """A worker and its node."""

    def __init__(
        self, is_orphan: Callable[[str], bool] = lambda _: True, resync: float = 3600.0, turns: Turns | None = None
    ) -> None:
        self.node = Node()
        self.told = Told()
        self.worker = NodeWorker(self.node, self.told, resync, is_orphan, turns or Turns())

    def want(self, number: int, limits: Limits | None, *, lives: bool = True) -> str:
        """Want these limits for the pod with this number; returns its UID."""
        pod = make_pod(number, limits)
        self.worker.want(pod.ref.uid, Want(pod, limits) if limits else None, lives=lives)
        return pod.ref.uid

    def keep(self, number: int) -> str:
        """Want whatever the pod has, for what it asks for cannot be meant."""
        pod = make_pod(number, problem="annotation x: no")
        self.worker.want(pod.ref.uid, Want(pod, None))
        return pod.ref.uid

    async def settled(self) -> None:
        """Wait until there is nothing left to do."""
        worker = self.worker
        for _ in range(3):
            await until(
                lambda: (
                    worker._found is not None
                    and not (worker._tasks or worker._changed or worker._timers or worker._wake.is_set())
                )
            )
            await asyncio.sleep(0)

    async def resync(self) -> None:
        """Let the time come at which the node is asked again."""
        lists = self.node.calls.count(("list",))
        self.worker._resync_at = 0.0
        self.worker._wake.set()
        await until(lambda: self.node.calls.count(("list",)) > lists)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with running(self.worker.run()):
            await self.settled()
            yield
        assert not self.node.overlaps, "two calls for one pod at a time"
        assert self.node.most <= 8


class Gate:
    """Holds calls back until it is opened.

    Attributes:
        held: the calls that it has held.
    """

    def __init__(self, *verbs: str) -> None:
        self._verbs = verbs
        self._open = asyncio.Event()
        self.held: list[tuple[str, str]] = []

    def open(self) -> None:
        self._open.set()

    async def __call__(self, verb: str, uid: str) -> None:
        if verb in self._verbs:
            self.held.append((verb, uid))
            await self._open.wait()


def test_a_worker_asks_first_and_then_does_what_is_missing() -> None:
    async def work() -> None:
        play = Played()
        good, wrong, old, unwanted = (play.node.give(number) for number in (1, 2, 3, 4))
        play.node.give(3, build=OLD_BUILD)
        play.want(1, SLOW)
        play.want(2, FAST)
        play.want(3, SLOW)
        missing = play.want(5, FAST)
        assert play.node.calls == []
        async with play.at_work():
            await until(lambda: play.node.limits() == {good: SLOW, wrong: FAST, old: SLOW, missing: FAST})
            await play.settled()
        first, *others = play.node.calls
        assert first == ("list",)
        assert sorted(others, key=str) == [
            ("attach", old, SLOW),
            ("attach", missing, FAST),
            ("detach", unwanted),
            ("update", wrong, FAST),
        ]

    run(work())


def test_a_pod_that_comes_changes_and_goes_is_followed() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            for limits in (SLOW, FAST, SLOW, None, FAST, None):
                uid = play.want(1, limits)
                await play.settled()
                assert play.node.limits() == ({uid: limits} if limits else {})
            assert play.node.verbs() == ["attach", "update", "update", "detach", "attach", "detach"]
            # Nothing was asked for twice.
            assert play.node.calls.count(("list",)) == 1

    run(work())


def test_what_is_wanted_already_is_not_done_again() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            for _ in range(3):
                play.want(1, SLOW)
                await play.settled()
            play.want(2, None)
            await play.settled()
            assert play.node.verbs() == ["attach"]

    run(work())


def test_a_pod_is_made_anew_where_its_limiter_names_it_otherwise() -> None:
    async def work() -> None:
        play = Played()
        uid = play.node.give(1)
        play.node.has[uid] = Status(PodRef(uid), SLOW, Counters(), Counters(), 7, 1.0, BUILD)
        play.want(1, SLOW)
        async with play.at_work():
            assert play.node.verbs() == ["attach"]
            [status] = play.node.has.values()
            assert isinstance(status, Status)
            assert status.pod == make_pod(1).ref

    run(work())


def test_a_pod_whose_annotations_cannot_be_meant_keeps_what_it_has() -> None:
    async def work() -> None:
        play = Played(is_orphan=lambda _: True)
        uid = play.node.give(1, FAST)
        play.keep(1)
        play.keep(2)
        async with play.at_work():
            await play.resync()
            await play.settled()
            assert play.node.verbs() == []
            assert play.node.limits() == {uid: FAST}

    run(work())


# What is not there yet, and what is there no more.


def test_an_update_of_what_has_gone_attaches() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            uid = play.want(1, SLOW)
            await play.settled()
            del play.node.has[uid]
            play.want(1, FAST)
            await play.settled()
            assert play.node.limits() == {uid: FAST}
            assert play.node.verbs() == ["attach", "update", "wait"]

    run(work())


def test_a_pod_without_a_cgroup_is_waited_for() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.node.waiting == {uid})
            assert not play.told.told
            play.node.absent.clear()
            await play.settled()
            assert play.node.limits() == {uid: SLOW}
            assert play.node.verbs() == ["attach", "wait"]
            assert play.told.of(Reason.LIMITED) == [str(SLOW)]

    run(work())


def test_waiting_for_a_cgroup_is_half_a_minute_at_the_node() -> None:
    assert module._CGROUP_SECONDS == 30.0


def test_a_pod_that_never_gets_a_cgroup_is_told_of_after_two_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CGROUP_SECONDS", 0.003)

    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            play.want(1, SLOW)
            await until(lambda: play.told.told)
            assert play.node.verbs() == ["attach", "wait", "attach", "wait"]
            [message] = play.told.of(Reason.FAILED)
            assert message.startswith(f"{SLOW}: node 192.0.2.1:1: no cgroup for shop/cart-1")
            # And goes on all the same.
            play.node.absent.clear()
            await until(play.node.limits)

    run(work())


def test_a_pod_that_is_waited_for_and_not_wanted_any_more_is_let_go_of() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.node.waiting)
            play.want(1, None, lives=False)
            await until(lambda: not play.node.waiting)
            await play.settled()
            # Nobody knows whether the node has just attached it.
            assert play.node.verbs(uid) == ["attach", "wait", "detach"]
            assert not play.told.told

    run(work())


def test_a_pod_that_is_waited_for_and_wanted_otherwise_is_waited_for_anew() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.node.waiting)
            play.want(1, FAST)
            await until(lambda: ("wait", uid, FAST) in play.node.calls)
            play.node.absent.clear()
            await play.settled()
            assert play.node.limits() == {uid: FAST}
            assert play.told.of(Reason.LIMITED) == [str(FAST)]

    run(work())


def test_a_node_asked_again_while_a_pod_is_waited_for_does_not_hide_what_a_cut_call_may_have_done() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.node.waiting)
            await play.resync()
            await until(lambda: play.worker._found is not None)
            play.want(1, None, lives=False)
            await until(lambda: not play.node.waiting)
            await a_while()
            assert play.node.verbs(uid)[-1] == "detach"

    run(work())


@pytest.mark.parametrize("limits", [None, FAST], ids=["not wanted", "wanted otherwise"])
def test_what_has_changed_during_the_first_call_is_not_waited_for(limits: Limits | None) -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        gate = Gate("attach")
        play.node.meanwhile = gate
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: gate.held)
            play.want(1, limits, lives=False)
            gate.open()
            await until(lambda: len(play.node.verbs()) > 1)
            await a_while()
            assert ("wait", uid, SLOW) not in play.node.calls

    run(work())


# Failures.


@pytest.mark.parametrize("code", ["ALREADY_EXISTS", "FAILED_PRECONDITION", "INTERNAL", "PERMISSION_DENIED"])
@pytest.mark.parametrize("verb", ["attach", "update"])
def test_what_is_refused_is_told_and_tried_again(verb: str, code: str) -> None:
    async def work() -> None:
        play = Played()
        if verb == "update":
            play.node.give(1, FAST)
        play.node.meanwhile = refusing(verb, code, times=2)
        uid = play.want(1, SLOW)
        async with play.at_work():
            await until(lambda: play.node.limits() == {uid: SLOW})
            await play.settled()
            # Nobody knows what a failed update has left.
            assert play.node.verbs() == ([verb, "attach"] if verb == "update" else [verb] * 3)
            message = f"{SLOW}: node 192.0.2.1:1: no {verb} of {uid}"
            assert play.told.of(Reason.FAILED) == [message] * (1 if verb == "update" else 2)
            assert play.told.told[-1].reason is Reason.LIMITED

    run(work())


@pytest.mark.usefixtures("long_pauses")
def test_what_is_refused_is_not_tried_again_without_a_pause() -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = refusing("attach", "INTERNAL", times=100)
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.told.told)
            play.want(1, SLOW)
            other = play.want(2, None)
            await play.resync()
            await a_while()
            assert play.node.verbs(uid) == ["attach"]
            assert not play.node.verbs(other)

    run(work())


@pytest.mark.usefixtures("long_pauses")
def test_new_limits_are_tried_at_once() -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = refusing("attach", "INTERNAL")
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.told.of(Reason.FAILED))
            play.want(1, FAST)
            await until(lambda: play.node.limits() == {uid: FAST})

    run(work())


@pytest.mark.usefixtures("long_pauses")
def test_a_pod_that_was_refused_and_is_not_wanted_any_more_is_cleared_away_at_once() -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = refusing("attach", "INTERNAL")
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.told.of(Reason.FAILED))
            play.want(1, None, lives=False)
            await play.settled()
            assert play.node.verbs() == ["attach", "detach"]
            assert uid not in play.worker._pauses

    run(work())


def test_pauses_of_a_pod_grow_and_begin_anew_when_it_has_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[tuple[float, float]] = []

    class Counted(Backoff):
        def delay(self) -> float:
            delays.append((self._next, self._longest))
            super().delay()
            return 0.001

    monkeypatch.setattr(module, "Backoff", Counted)
    monkeypatch.setattr(module, "_FIRST_POD_PAUSE", 0.5)
    monkeypatch.setattr(module, "_LONGEST_POD_PAUSE", 60.0)

    async def work() -> None:
        play = Played()
        async with play.at_work():
            play.node.meanwhile = refusing("attach", "INTERNAL", times=3)
            play.want(1, SLOW)
            await until(play.node.limits)
            await play.settled()
            assert delays == [(0.5, 60.0), (1.0, 60.0), (2.0, 60.0)]
            # It has worked, so the next failure is a first one.
            play.node.meanwhile = refusing("attach", "INTERNAL", times=2)
            play.node.has.clear()
            await play.resync()
            await until(play.node.limits)
            assert delays[3:] == [(0.5, 60.0), (1.0, 60.0)]

    run(work())


def test_pauses_of_a_pod_begin_anew_with_other_limits() -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = refusing("attach", "INTERNAL", times=1000)
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.worker._pauses and play.worker._pauses[uid].failures > 3)
            play.want(1, FAST)
            assert uid not in play.worker._pauses

    run(work())


def test_a_limiter_that_cannot_be_taken_off_is_told_of_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        play = Played()
        uid = play.node.give(1)
        play.node.meanwhile = refusing("detach", "INTERNAL", times=3)
        async with play.at_work():
            await until(lambda: not play.node.limits())
            assert play.node.verbs() == ["detach"] * 4
        assert caplog.messages == [f"{uid} stays limited on 192.0.2.1:1: no detach of {uid}"]
        assert not play.told.told

    run(work())


def test_a_mistake_of_ours_costs_one_pod_a_pause_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 2

    def generate(pod: PodRef | None, limits: Limits) -> bytes:
        nonlocal failures
        if pod == make_pod(1).ref and failures:
            failures -= 1
            raise CompilerError("no clang")
        return image_of(pod, limits)

    monkeypatch.setattr(generator, "generate", generate)

    async def work() -> None:
        play = Played()
        async with play.at_work():
            uid, other = play.want(1, SLOW), play.want(2, SLOW)
            await until(lambda: play.node.limits() == {uid: SLOW, other: SLOW})
        assert [record.levelno for record in caplog.records] == [logging.CRITICAL] * 2

    run(work())


def test_a_node_whose_connection_is_gone_is_asked_what_it_has() -> None:
    """As after a reboot, which leaves it without any limiter."""

    async def work() -> None:
        play = Played()
        play.want(1, SLOW)
        async with play.at_work():
            await until(lambda: uid_of(1) in play.node.has)
            play.node.has.clear()
            play.node.cut = True
            await until(lambda: uid_of(1) in play.node.has)
            play.node.cut = False

    run(work())


@pytest.mark.parametrize("ends", [True, False])
def test_a_node_with_another_connection_is_asked_when_what_is_on_the_way_has_ended_or_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, *, ends: bool
) -> None:
    """What was on the way when it was asked would be told again, over yet another connection perhaps."""
    if not ends:
        monkeypatch.setattr(module, "_SETTLING_SECONDS", 0.05)

    async def work() -> None:
        play = Played()
        play.node.meanwhile = gate = Gate("attach")
        for number in range(4):
            play.want(number, SLOW)
        async with running(play.worker.run()):
            await until(lambda: len(gate.held) == 4)
            play.node.cut = True
            await asyncio.sleep(0.03)
            play.node.cut = False
            await asyncio.sleep(0.1)
            assert play.node.calls.count(("list",)) == (1 if ends else 2)
            gate.open()
            await until(lambda: play.node.calls.count(("list",)) == 2)
            await play.settled()
            assert play.node.verbs() == ["attach"] * 4

    run(work())


def test_what_waits_for_its_turn_when_a_node_is_asked_is_told_once() -> None:
    async def work() -> None:
        play = Played(turns=(turns := Turns()))
        uid = play.want(1, FAST)
        async with play.at_work():
            async with AsyncExitStack() as taken:
                for _ in range(module._CHANGING):
                    await taken.enter_async_context(turns.change)
                play.want(1, SLOW)
                await until(lambda: uid in play.worker._tasks)
                await play.resync()
            await until(lambda: play.node.limits() == {uid: SLOW})
            await play.settled()
        assert play.node.verbs() == ["attach", "update"]

    run(work())


def test_a_call_that_was_cut_off_before_the_node_was_asked_may_still_be_carried_out_after_it() -> None:
    async def work() -> None:
        play = Played(turns=(turns := Turns()))
        play.node.absent.add(uid_of(1))
        uid = play.want(1, SLOW)
        async with running(play.worker.run()):
            await until(lambda: uid in play.node.waiting)
            async with AsyncExitStack() as taken:
                for _ in range(module._ASKING):
                    await taken.enter_async_context(turns._ask)
                play.worker._resync_at = 0.0
                play.worker._wake.set()
                await until(lambda: play.worker._found is None)
                play.want(1, None)
                await until(lambda: uid not in play.worker._tasks)
            await until(lambda: play.node.calls.count(("list",)) == 2)
            await until(lambda: play.node.verbs(uid) == ["attach", "wait", "detach"])

    run(work())


def test_a_node_that_does_not_answer_is_asked_anew_and_other_pods_go_on() -> None:
    async def work() -> None:
        play = Played()
        gate = Gate("attach")
        failed = False

        async def meanwhile(verb: str, uid: str) -> None:
            nonlocal failed
            if verb == "attach" and uid == uid_of(1) and not failed:
                failed = True
                raise UnreachableError("no answer")
            if uid == uid_of(2):
                await gate(verb, uid)

        play.node.meanwhile = meanwhile
        async with play.at_work():
            other = play.want(2, SLOW)
            await until(lambda: gate.held)
            uid = play.want(1, SLOW)
            await until(lambda: play.node.limits() == {uid: SLOW})
            assert play.node.calls.count(("list",)) >= 2
            assert play.node.flying == [other]
            gate.open()
            await until(lambda: play.node.limits() == {uid: SLOW, other: SLOW})
            await play.settled()
            assert play.node.verbs(other) == ["attach"]
            assert play.told.of(Reason.FAILED) == []

    run(work())


def test_after_silence_everything_is_compared_anew() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            first, second = play.want(1, SLOW), play.want(2, SLOW)
            await play.settled()
            # The node has restarted with other things than it had.
            play.node.give(1, FAST)
            del play.node.has[second]
            stranger = play.node.give(9)
            play.node.meanwhile = silent("attach")
            third = play.want(3, SLOW)
            await until(lambda: play.node.limits() == dict.fromkeys((first, second, third), SLOW))
            assert ("detach", stranger) in play.node.calls

    run(work())


@pytest.mark.parametrize(
    "error", [UnreachableError("no answer"), RefusedError("no", "PERMISSION_DENIED")], ids=["silent", "refusing"]
)
def test_a_node_that_cannot_be_asked_is_asked_until_it_answers(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        play = Played()
        left = 9

        async def meanwhile(verb: str, _: str) -> None:
            nonlocal left
            if verb == "list" and left:
                left -= 1
                raise error

        play.node.meanwhile = meanwhile
        uid = play.want(1, SLOW)
        play.keep(2)
        async with play.at_work():
            assert play.node.limits() == {uid: SLOW}
        assert [call[0] for call in play.node.calls] == ["list"] * 10 + ["attach"]
        # People are told once, when it can be no restart any more; of pods that miss something.
        assert play.told.of(Reason.FAILED) == [f"{SLOW}: {error}"]
        assert play.told.told[0].pod == make_pod(1, SLOW)
        levels = [record.levelno for record in caplog.records if record.name == module.__name__]
        assert levels == [logging.WARNING, logging.INFO]

    run(work())


@pytest.mark.parametrize(("failures", "told"), [(5, 0), (6, 1), (12, 1)])
def test_a_short_restart_is_nobodys_business(failures: int, told: int) -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = silent("list", times=failures)
        play.want(1, SLOW)
        async with play.at_work():
            assert len(play.told.of(Reason.FAILED)) == told

    run(work())


# At once, and how much at once.


def test_only_so_many_calls_are_on_the_way_and_none_for_a_pod_twice() -> None:
    async def work() -> None:
        play = Played()
        gate = Gate("attach")
        play.node.meanwhile = gate
        async with play.at_work():
            uids = [play.want(number, SLOW) for number in range(30)]
            await until(lambda: len(gate.held) == 8)
            for number in range(30):
                play.want(number, FAST)
            await a_while()
            assert len(gate.held) == module._SLOTS == 8
            gate.open()
            await until(lambda: play.node.limits() == dict.fromkeys(uids, FAST))
            assert play.node.most == 8

    run(work())


def test_waiting_for_cgroups_holds_nobody_up() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.update(uid_of(number) for number in range(20))
        async with play.at_work():
            for number in range(20):
                play.want(number, SLOW)
            await until(lambda: len(play.node.waiting) == 20)
            other = play.want(20, SLOW)
            await until(lambda: play.node.limits() == {other: SLOW})
            assert len(play.node.waiting) == 20

    run(work())


@pytest.mark.parametrize(
    ("first", "held", "then", "left", "verbs"),
    [
        (None, SLOW, FAST, FAST, ["attach", "update"]),
        (None, SLOW, None, None, ["attach", "detach"]),
        (SLOW, FAST, SLOW, SLOW, ["update", "update"]),
        (SLOW, FAST, None, None, ["update", "detach"]),
        (SLOW, None, SLOW, SLOW, ["detach", "attach"]),
        (SLOW, None, FAST, FAST, ["detach", "attach"]),
        # Back to what is on its way: nothing more to do.
        (None, SLOW, SLOW, SLOW, ["attach"]),
    ],
)
def test_a_change_during_a_call_is_made_after_it(
    first: Limits | None, held: Limits | None, then: Limits | None, left: Limits | None, verbs: list[str]
) -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            uid = play.want(1, first)
            await play.settled()
            play.node.calls.clear()
            gate = Gate("attach", "update", "detach")
            play.node.meanwhile = gate
            play.want(1, held)
            await until(lambda: gate.held)
            play.want(1, Limits(Rate(10**5)))
            play.want(1, then)
            await a_while()
            assert len(play.node.calls) == 1
            gate.open()
            await play.settled()
            assert play.node.limits() == ({uid: left} if left else {})
            assert play.node.verbs() == verbs

    run(work())


def test_a_list_from_before_a_change_is_not_believed_about_it() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            uid = play.want(1, SLOW)
            await play.settled()
            update, listing = Gate("update"), Gate("list")

            async def meanwhile(verb: str, about: str) -> None:
                await update(verb, about)
                await listing(verb, about)

            play.node.meanwhile = meanwhile
            play.want(1, FAST)
            await until(lambda: update.held)
            await play.resync()
            await until(lambda: listing.held)
            # The node has said SLOW, and then the change is made, and then it is wanted back.
            update.open()
            await until(lambda: play.node.limits() == {uid: FAST})
            await a_while()
            play.want(1, SLOW)
            listing.open()
            await until(lambda: play.node.limits() == {uid: SLOW})

    run(work())


# Now and then.


def test_a_resync_finds_what_somebody_else_has_changed() -> None:
    async def work() -> None:
        play = Played(resync=0.02)
        async with running(play.worker.run()):
            uid, gone = play.want(1, SLOW), play.want(2, SLOW)
            await until(lambda: len(play.node.limits()) == 2)
            await a_while()
            play.node.give(1, FAST)
            del play.node.has[gone]
            stranger = play.node.give(3)
            await until(lambda: play.node.limits() == {uid: SLOW, gone: SLOW})
            assert stranger not in play.node.has

    run(work())


def test_resyncs_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.random, "uniform", lambda low, high: (low, high) == (0.8, 1.2) and 0.8)  # type: ignore[attr-defined]

    async def work() -> None:
        play = Played(resync=100.0)
        async with play.at_work():
            left = play.worker._resync_at - asyncio.get_running_loop().time()
            assert 70 < left <= 80

    run(work())


@pytest.mark.parametrize("is_orphan", [True, False])
def test_a_limiter_that_nobody_wants_is_taken_off_only_if_it_may_be(*, is_orphan: bool) -> None:
    async def work() -> None:
        asked: list[str] = []

        def judge(uid: str) -> bool:
            asked.append(uid)
            return is_orphan

        play = Played(judge)
        uid = play.node.give(1)
        wanted = play.node.give(2)
        play.want(2, SLOW)
        async with play.at_work():
            assert play.node.limits() == ({wanted: SLOW} if is_orphan else {uid: SLOW, wanted: SLOW})
        assert set(asked) == {uid}

    run(work())


def test_an_orphan_is_judged_again_when_it_is_looked_at() -> None:
    async def work() -> None:
        orphans: set[str] = set()
        play = Played(orphans.__contains__)
        uid = play.node.give(1)
        async with play.at_work():
            assert play.node.limits()
            orphans.add(uid)
            await a_while()
            assert play.node.limits()
            play.worker.look_at_all()
            await play.settled()
            assert not play.node.limits()

    run(work())


def test_limiters_of_cgroups_that_are_no_pods_are_left_alone() -> None:
    async def work() -> None:
        play = Played()
        for ref in (PodRef("cgroup-7"), PodRef("cgroup-8")):
            play.node.has[ref.uid] = Status(ref, SLOW, Counters(), Counters(), 7, 1.0, BUILD)
        play.node.has["cgroup-8"] = Broken("cgroup-8", "half of it")
        async with play.at_work():
            play.worker.look_at_all()
            await play.settled()
            assert play.node.verbs() == []

    run(work())


@pytest.mark.parametrize(
    ("limits", "verbs", "left"), [(SLOW, ["attach"], SLOW), (None, ["detach"], None)], ids=["wanted", "not wanted"]
)
@pytest.mark.parametrize("state", ["broken", "without its cgroup"])
def test_what_is_no_whole_limiter_is_made_anew_or_cleared_away(
    state: str, limits: Limits | None, verbs: list[str], left: Limits | None
) -> None:
    async def work() -> None:
        play = Played()
        uid = play.node.give(1, SLOW, cgroup_id=0)
        if state == "broken":
            play.node.has[uid] = Broken(uid, "half of it")
        play.want(1, limits)
        async with play.at_work():
            assert play.node.verbs() == verbs
            assert play.node.limits() == ({uid: left} if left else {})

    run(work())


# What people are told.


def test_people_are_told_what_has_become_of_a_living_pod() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            for limits in (SLOW, FAST, None):
                play.want(1, limits)
                await play.settled()
        assert [(report.reason, report.message) for report in play.told.told] == [
            (Reason.LIMITED, "egress 1mbit, ingress unlimited"),
            (Reason.LIMITED, "egress 1gbit, ingress 1gbit"),
            (Reason.UNLIMITED, "the pod asks for no limit any more"),
        ]
        assert {report.pod.uid for report in play.told.told} == {UID}

    run(work())


def test_nobody_is_told_that_a_pod_which_is_no_more_has_no_limit() -> None:
    async def work() -> None:
        play = Played()
        play.node.give(2)
        async with play.at_work():
            play.want(1, SLOW)
            await play.settled()
            play.want(1, None, lives=False)
            await play.settled()
            assert not play.node.limits()
        assert play.told.of(Reason.UNLIMITED) == []

    run(work())


def test_a_pod_that_lost_its_limit_for_a_moment_and_then_died_is_one_that_is_no_more() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            play.want(1, SLOW)
            await play.settled()
            play.want(1, None)
            play.want(1, SLOW)
            await play.settled()
            play.want(1, None, lives=False)
            await play.settled()
            assert not play.node.limits()
        assert play.told.of(Reason.UNLIMITED) == []

    run(work())


def test_what_changes_nothing_is_not_told() -> None:
    async def work() -> None:
        play = Played()
        gate = Gate("attach")
        async with play.at_work():
            play.node.meanwhile = gate
            uid = play.want(1, SLOW)
            await until(lambda: gate.held)
            # Another master was there first.
            play.node.has[uid] = Status(make_pod(1).ref, SLOW, Counters(), Counters(), 7, 1.0, BUILD)
            gate.open()
            await play.settled()
        assert play.told.told == []

    run(work())


# The end.


def test_draining_finishes_what_is_on_the_way_and_takes_nothing_more_up() -> None:
    async def work() -> None:
        play = Played()
        gate = Gate("attach")
        play.node.meanwhile = gate
        async with play.at_work():
            for number in range(20):
                play.want(number, SLOW)
            await until(lambda: len(gate.held) == 8)
            draining = asyncio.create_task(play.worker.drain())
            await a_while()
            assert not draining.done()
            play.want(20, SLOW)
            gate.open()
            await draining
            await a_while()
            assert not play.worker._tasks
            assert {uid for _, uid in gate.held} == play.node.limits().keys()
            assert len(play.node.limits()) == 8

    run(work())


def test_draining_lets_go_of_what_only_waits() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        async with play.at_work():
            play.want(1, SLOW)
            await until(lambda: play.node.waiting)
            async with asyncio.timeout(1):
                await play.worker.drain()
            await a_while()
            assert not play.node.waiting
            assert play.node.verbs() == ["attach", "wait"]

    run(work())


def test_draining_does_not_begin_to_wait() -> None:
    async def work() -> None:
        play = Played()
        play.node.absent.add(uid_of(1))
        gate = Gate("attach")
        play.node.meanwhile = gate
        async with play.at_work():
            play.want(1, SLOW)
            await until(lambda: gate.held)
            draining = asyncio.create_task(play.worker.drain())
            await a_while()
            gate.open()
            async with asyncio.timeout(1):
                await draining
            assert play.node.verbs() == ["attach"]

    run(work())


def test_draining_with_nothing_to_do_is_over_at_once() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            await play.worker.drain()
        # Nor does it matter whether it was ever at work.
        await Played().worker.drain()

    run(work())


def test_a_worker_that_is_cancelled_cuts_its_calls_off_and_can_work_again() -> None:
    async def work() -> None:
        play = Played()
        gate = Gate("attach")
        play.node.meanwhile = gate
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: gate.held)
        assert not play.node.flying
        assert not play.worker._tasks
        play.want(1, FAST)
        await a_while()
        assert play.node.verbs() == ["attach"]
        play.node.meanwhile = None
        async with play.at_work():
            assert play.node.limits() == {uid: FAST}
        assert play.node.calls.count(("list",)) == 2

    run(work())


def test_a_worker_that_was_drained_works_when_it_is_run_again() -> None:
    async def work() -> None:
        play = Played()
        async with play.at_work():
            await play.worker.drain()
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.node.limits() == {uid: SLOW})

    run(work())


@pytest.mark.usefixtures("long_pauses")
def test_a_pause_does_not_outlive_a_run() -> None:
    async def work() -> None:
        play = Played()
        play.node.meanwhile = refusing("attach", "INTERNAL")
        async with play.at_work():
            uid = play.want(1, SLOW)
            await until(lambda: play.told.told)
        async with play.at_work():
            assert play.node.limits() == {uid: SLOW}

    run(work())


def test_a_worker_is_idle_when_there_is_nothing_to_be_done_for_it() -> None:
    async def work() -> None:
        orphans: set[str] = set()
        play = Played(orphans.__contains__)
        assert not play.worker.idle, "nobody has asked yet"
        stranger = play.node.give(9)
        async with play.at_work():
            assert play.worker.idle, "what is there is not ours"
            orphans.add(stranger)
            assert not play.worker.idle, "it is to be taken off"
            play.worker.look_at_all()
            await play.settled()
            assert play.worker.idle
            orphans.add(play.want(1, SLOW))
            assert not play.worker.idle
            await play.settled()
            assert not play.worker.idle
            gate = Gate("detach")
            play.node.meanwhile = gate
            play.want(1, None)
            await until(lambda: gate.held)
            assert not play.worker.idle, "it is on the way"
            gate.open()
            await play.settled()
            assert play.worker.idle
            play.node.meanwhile = silent("list", times=1000)
            await play.resync()
            await until(lambda: play.worker._backoff.failures)
            assert play.worker.idle, "it cannot be asked, and nothing is wanted"

    run(work())


def test_closing_closes_the_connection() -> None:
    async def work() -> None:
        play = Played()
        await play.worker.close()
        assert play.node.closed

    run(work())


# Many nodes.


def test_of_many_nodes_only_so_many_are_asked_and_attached_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASKING", 3)
    monkeypatch.setattr(module, "_ATTACHING", 4)

    async def work() -> None:
        turns = Turns()
        plays = [Played(turns=turns) for _ in range(12)]
        busy: Counter[str] = Counter()
        most: Counter[str] = Counter()

        async def count(verb: str, _: str) -> None:
            busy[verb] += 1
            most[verb] = max(most[verb], busy[verb])
            most["both"] = max(most["both"], busy["list"] + busy["attach"])
            await asyncio.sleep(0.002)
            busy[verb] -= 1

        async with AsyncExitStack() as stack:
            for play in plays:
                play.node.meanwhile = count
                for number in range(3):
                    play.want(number, SLOW)
            for play in plays:
                await stack.enter_async_context(running(play.worker.run()))
            await until(lambda: all(len(play.node.has) == 3 for play in plays))
        assert most == {"list": 3, "attach": 4, "both": 4}

    run(work())


def test_nodes_that_do_not_answer_take_no_turns_of_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASKING", 2)
    monkeypatch.setattr(module, "_ATTACHING", 2)

    async def work() -> None:
        turns = Turns()
        failed = 0

        async def fail_then_hang(_: str, __: str) -> None:
            nonlocal failed
            if failed < len(gone):
                failed += 1
                raise UnreachableError("node 192.0.2.1: no answer")
            await asyncio.Event().wait()

        gone = [Played(turns=turns) for _ in range(4)]
        good = Played(turns=turns)
        async with AsyncExitStack() as stack:
            for play in gone:
                play.node.meanwhile = fail_then_hang
                await stack.enter_async_context(running(play.worker.run()))
            await until(lambda: sum(play.node.calls.count(("list",)) for play in gone) >= 6)
            uid = good.want(1, SLOW)
            await stack.enter_async_context(running(good.worker.run()))
            await until(lambda: good.node.limits() == {uid: SLOW})

    run(work())
