"""Sorting pods by node, with workers that only remember what they are asked for; and, at the end, with real ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.bpf import generator
from bpfrl.limits import Limits
from bpfrl.master import controller as module
from bpfrl.master.controller import Controller
from bpfrl.master.events import Reason
from bpfrl.master.nodes import Turns, Want
from bpfrl.master.observer import Observer
from bpfrl.master.pods import Pod
from tests.unit.fakes import (
    BUILD,
    FAST,
    HASH,
    SLOW,
    Node,
    Told,
    a_while,
    image_of,
    make_pod,
    run,
    running,
    tell_all,
    uid_of,
    until,
)

HERE, THERE = "192.0.2.1", "192.0.2.2"


class Worker:
    """Remembers what it is asked for, and does nothing.

    Attributes:
        wants: what its node's pods should have.
        lives: of each UID that is not wanted any more, whether its pod lives.
        looked: how often it was told to look at everything.
        runs: how often it was started.
        slow: how long it takes to stop, s.
    """

    def __init__(
        self,
        client: Node,
        recorder: Told,
        resync: float,
        is_orphan: Callable[[str], bool],
        turns: Turns,
        observer: Observer,
    ) -> None:
        self.client, self.recorder, self.resync, self.is_orphan = client, recorder, resync, is_orphan
        self.turns = turns
        self.observer = observer
        self.wants: dict[str, Want] = {}
        self.lives: dict[str, bool] = {}
        self.looked = 0
        self.runs = 0
        self.running = False
        self.drained = False
        self.closed = False
        self.is_idle = False
        self.slow = 0.0

    def want(self, uid: str, want: Want | None, *, lives: bool = True) -> None:
        if want:
            self.wants[uid] = want
        elif self.wants.pop(uid, None):
            self.lives[uid] = lives

    def look_at_all(self) -> None:
        self.looked += 1

    async def run(self) -> None:
        assert not self.running
        self.runs += 1
        self.running = True
        try:
            await asyncio.sleep(60)
        finally:
            if self.slow:
                await asyncio.sleep(self.slow)
            self.running = False

    async def drain(self) -> None:
        self.drained = True

    async def close(self) -> None:
        self.closed = True

    @property
    def idle(self) -> bool:
        return self.is_idle


class Played:
    """A controller and its workers."""

    def __init__(self) -> None:
        self.told = Told()
        self.asked: list[str] = []
        self.controller = Controller(self._connect, self.told, 60.0)

    def _connect(self, address: str) -> Node:
        self.asked.append(address)
        return Node()

    @property
    def workers(self) -> dict[str, Worker]:
        workers: Any = self.controller._workers
        return dict(workers)

    def worker(self, address: str = HERE) -> Worker:
        return self.workers[address]

    def put(self, *pods: Pod) -> None:
        for pod in pods:
            self.controller.put(pod)

    def wanted(self) -> dict[str, dict[str, Limits | None]]:
        """What is wanted where, by the cgroup's UID."""
        return {
            address: {uid: want.limits for uid, want in worker.wants.items()}
            for address, worker in self.workers.items()
            if worker.wants
        }

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        async with running(self.controller.run()):
            await asyncio.sleep(0.005)
            yield


@pytest.fixture
def played_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NodeWorker", Worker)


@pytest.fixture
def play(played_workers: None) -> Played:  # noqa: ARG001 - it goes first
    return Played()


# Where a pod is.


def test_pods_are_sorted_by_their_nodes_address(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(2, FAST), make_pod(3, SLOW, node="node-2", address=THERE), make_pod(4))
    assert play.wanted() == {HERE: {uid_of(1): SLOW, uid_of(2): FAST}, THERE: {uid_of(3): SLOW}}
    # One connection for a node.
    assert play.asked == [HERE, THERE]
    assert play.worker().wants[uid_of(1)].pod == make_pod(1, SLOW)


def test_a_worker_gets_what_it_needs(play: Played) -> None:
    play.put(make_pod(1, SLOW))
    worker = play.worker()
    assert (worker.recorder, worker.resync) == (play.told, 60.0)
    assert isinstance(worker.client, Node)


def test_a_node_whose_pods_ask_for_nothing_is_asked_what_it_has_too(play: Played) -> None:
    play.put(make_pod(1))
    assert list(play.workers) == [HERE]


def test_a_pod_waits_until_its_nodes_address_is_known(play: Played) -> None:
    play.put(make_pod(1, SLOW, address=""), make_pod(2, SLOW, node="node-2", address=""))
    assert play.workers == {}
    play.put(make_pod(3, node="node-1"))
    assert play.wanted() == {HERE: {uid_of(1): SLOW}}
    play.put(make_pod(2, SLOW, node="node-2", address=THERE))
    assert play.wanted() == {HERE: {uid_of(1): SLOW}, THERE: {uid_of(2): SLOW}}


def test_a_pod_whose_nodes_address_is_known_waits_for_nothing(play: Played) -> None:
    play.put(make_pod(1), make_pod(2, SLOW, address=""))
    assert play.wanted() == {HERE: {uid_of(2): SLOW}}
    # And is not moved when its kubelet says the same.
    play.put(make_pod(2, SLOW))
    assert play.wanted() == {HERE: {uid_of(2): SLOW}}
    assert play.worker().lives == {}


def test_what_a_pod_asks_for_while_it_waits_is_what_it_gets(play: Played) -> None:
    play.put(make_pod(1, SLOW, address=""), make_pod(1, FAST, address=""), make_pod(2, SLOW, address=""))
    play.put(make_pod(2, address=""), make_pod(4, SLOW, address=""))
    play.controller.remove(uid_of(4))
    play.put(make_pod(3))
    assert play.wanted() == {HERE: {uid_of(1): FAST}}


def test_a_pod_moves_with_its_nodes_address(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(1, SLOW, address=THERE))
    assert play.wanted() == {THERE: {uid_of(1): SLOW}}
    # It is the same pod, and it has its limit: nobody is told that it has none.
    assert play.worker(HERE).lives == {uid_of(1): False}
    # The old address may have its limiter still, and may take it off.
    assert play.worker(HERE).is_orphan(uid_of(1))


def test_pods_that_come_later_go_to_the_new_address(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(2, SLOW, address=THERE), make_pod(3, SLOW, address=""))
    assert play.wanted() == {HERE: {uid_of(1): SLOW}, THERE: {uid_of(2): SLOW, uid_of(3): SLOW}}


def test_pods_of_no_node_wait_for_no_other(play: Played) -> None:
    play.put(make_pod(1, SLOW, node="", address=""), make_pod(2, SLOW, node="", address=HERE))
    assert play.wanted() == {HERE: {uid_of(2): SLOW}}
    play.controller.remove(uid_of(1))


# What a pod should have.


def test_a_pod_that_asks_for_something_else_gets_that(play: Played) -> None:
    for limits in (SLOW, FAST, SLOW):
        play.put(make_pod(1, limits))
        assert play.wanted() == {HERE: {uid_of(1): limits}}


def test_a_pod_that_asks_for_nothing_any_more_lives(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(1))
    assert play.wanted() == {}
    assert play.worker().lives == {uid_of(1): True}


@pytest.mark.parametrize("before", [SLOW, None])
def test_a_pod_that_has_ended_does_not_live(play: Played, before: Limits | None) -> None:
    play.put(make_pod(1, before), make_pod(1, ended=True))
    assert play.wanted() == {}
    assert play.worker().lives == ({uid_of(1): False} if before else {})


def test_a_pod_that_is_removed_does_not_live(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(2, SLOW))
    play.controller.remove(uid_of(1))
    play.controller.remove(uid_of(1))
    play.controller.remove(uid_of(9))
    assert play.wanted() == {HERE: {uid_of(2): SLOW}}
    assert play.worker().lives == {uid_of(1): False}


def test_a_mistake_in_an_annotation_keeps_the_last_good_limits(play: Played) -> None:
    play.put(make_pod(1, SLOW), make_pod(1, problem="x"), make_pod(1, problem="y"))
    assert play.wanted() == {HERE: {uid_of(1): SLOW}}
    play.put(make_pod(1, FAST))
    assert play.wanted() == {HERE: {uid_of(1): FAST}}
    play.put(make_pod(1, problem="x"), make_pod(1))
    assert play.wanted() == {}
    # Taken back, the limits are not the last good ones any more.
    play.put(make_pod(1, problem="x"))
    assert play.wanted() == {HERE: {uid_of(1): None}}


def test_a_mistake_from_the_start_keeps_what_the_node_has(play: Played) -> None:
    play.put(make_pod(1, problem="x"))
    assert play.wanted() == {HERE: {uid_of(1): None}}
    assert play.worker().wants[uid_of(1)].pod == make_pod(1, problem="x")


def test_a_mistake_is_told_by_who_leads(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW), make_pod(2, problem="annotation x: no")])
        play.put(make_pod(1, problem="annotation y: no"))
        assert play.told.told == []
        async with play.leading():
            assert sorted(play.told.of(Reason.INVALID)) == [
                "annotation x: no; the limits stay as they are",
                "annotation y: no; the limits stay as they are",
            ]
            play.put(make_pod(1, problem="annotation z: no"))
            assert play.told.of(Reason.INVALID)[2:] == ["annotation z: no; the limits stay as they are"]
            assert play.told.told[-1].pod.uid == uid_of(1)
            # A list says it all again.
            play.put(make_pod(1, problem="annotation z: no"))
        play.put(make_pod(1, problem="annotation a: no"))
        assert len(play.told.told) == 3

    run(work())


def test_a_list_takes_away_what_is_not_in_it(play: Played) -> None:
    tell_all(play.controller, [make_pod(1, SLOW), make_pod(2, SLOW), make_pod(3, SLOW, node="node-2", address=THERE)])
    tell_all(play.controller, [make_pod(2, FAST), make_pod(4, SLOW)])
    assert play.wanted() == {HERE: {uid_of(2): FAST, uid_of(4): SLOW}}
    assert play.worker().lives == {uid_of(1): False}
    assert play.worker(THERE).lives == {uid_of(3): False}
    tell_all(play.controller, [])
    assert play.wanted() == {}


def test_a_pod_that_was_made_again_under_its_name_is_another_pod(play: Played) -> None:
    tell_all(play.controller, [make_pod(1, SLOW, cgroup_uid=HASH)])
    tell_all(play.controller, [make_pod(2, SLOW, cgroup_uid=HASH)])
    assert play.wanted() == {HERE: {HASH: SLOW}}
    assert play.worker().wants[HASH].pod.uid == uid_of(2)


# A cgroup that two pods claim: only a static pod's can be, and somebody who claims to be one.


def test_a_pod_whose_cgroup_is_another_leaves_the_first(play: Played) -> None:
    other = HASH[::-1]
    play.put(make_pod(1, SLOW, cgroup_uid=HASH), make_pod(1, SLOW, cgroup_uid=other))
    assert play.wanted() == {HERE: {other: SLOW}}
    assert play.worker().lives == {HASH: False}


def test_of_two_claims_to_a_cgroup_one_is_wanted_and_the_others_end_changes_nothing(play: Played) -> None:
    play.put(make_pod(1, SLOW, cgroup_uid=HASH), make_pod(2, FAST, cgroup_uid=HASH))
    [(uid, limits)] = play.wanted()[HERE].items()
    assert uid == HASH
    loser = 1 if limits == FAST else 2
    play.controller.remove(uid_of(loser))
    assert play.wanted() == {HERE: {HASH: limits}}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("end", ["removed", "asks for nothing", "ended"])
def test_when_one_claim_to_a_cgroup_ends_the_other_counts(play: Played, first: int, end: str) -> None:
    play.put(make_pod(1, SLOW, cgroup_uid=HASH), make_pod(2, FAST, cgroup_uid=HASH))
    if end == "removed":
        play.controller.remove(uid_of(first))
    else:
        play.put(make_pod(first, cgroup_uid=HASH, ended=end == "ended"))
    # The older one counts, with limits or without; a pod that has ended has no cgroup to claim.
    left = {} if (first, end) == (1, "asks for nothing") else {HASH: FAST if first == 1 else SLOW}
    assert play.wanted().get(HERE, {}) == left


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_claims_on_two_nodes_end_one_by_one(play: Played, order: tuple[int, int]) -> None:
    play.put(make_pod(1, SLOW, cgroup_uid=HASH), make_pod(2, FAST, cgroup_uid=HASH, node="node-2", address=THERE))
    left: dict[str, dict[str, Limits | None]] = {HERE: {HASH: SLOW}, THERE: {HASH: FAST}}
    assert play.wanted() == left
    for number in order:
        play.controller.remove(uid_of(number))
        del left[HERE if number == 1 else THERE]
        assert play.wanted() == left


# Limiters that nobody wants.


def test_nothing_is_an_orphan_before_the_first_list(play: Played) -> None:
    play.put(make_pod(1, SLOW))
    assert not play.worker().is_orphan(uid_of(9))


@pytest.mark.parametrize("complete", [True, False])
def test_what_no_list_names_is_an_orphan_if_the_list_is_complete(play: Played, *, complete: bool) -> None:
    tell_all(play.controller, [make_pod(1, SLOW), make_pod(2), make_pod(3, ended=True)], complete=complete)
    is_orphan = play.worker().is_orphan
    assert is_orphan(uid_of(9)) is complete
    # Of these it is known that they ask for nothing.
    assert is_orphan(uid_of(2))
    assert is_orphan(uid_of(3))


def test_what_is_wanted_elsewhere_is_an_orphan_here(play: Played) -> None:
    tell_all(play.controller, [make_pod(1, SLOW), make_pod(2, SLOW, node="node-2", address=THERE)])
    assert play.worker(HERE).is_orphan(uid_of(2))


def test_what_is_wanted_but_nobody_knows_where_is_no_orphan(play: Played) -> None:
    tell_all(play.controller, [make_pod(1), make_pod(2, SLOW, node="node-2", address="")])
    assert not play.worker(HERE).is_orphan(uid_of(2))
    play.put(make_pod(3, node="node-2", address=THERE))
    assert play.worker(HERE).is_orphan(uid_of(2))


def test_what_cannot_be_meant_is_no_orphan_where_it_is_wanted_as_it_is(play: Played) -> None:
    tell_all(play.controller, [make_pod(1, problem="x", address="")])
    play.put(make_pod(2, node="node-2", address=THERE))
    assert not play.worker(THERE).is_orphan(uid_of(1))


def test_workers_look_again_when_all_pods_are_known(play: Played) -> None:
    pods = [make_pod(1, SLOW), make_pod(2, SLOW, node="node-2", address=THERE)]
    looked = []
    for complete in (False, False, True, True, False, True):
        tell_all(play.controller, pods, complete=complete)
        looked.append([worker.looked for worker in play.workers.values()])
    assert looked == [[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [2, 2]]


# Leading and following.


def test_who_follows_keeps_desired_state_and_does_nothing(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        play.put(make_pod(2, FAST, node="node-2", address=THERE))
        await a_while()
        assert len(play.wanted()) == 2
        assert [worker.runs for worker in play.workers.values()] == [0, 0]

    run(work())


def test_who_leads_acts_on_all_nodes_and_on_new_ones_at_once(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            assert play.worker(HERE).running
            play.put(make_pod(2, FAST, node="node-2", address=THERE))
            await asyncio.sleep(0)
            assert play.worker(THERE).running
        assert [worker.running for worker in play.workers.values()] == [False, False]

    run(work())


def test_who_leads_before_the_first_list_waits_for_it(play: Played) -> None:
    async def work() -> None:
        async with play.leading():
            play.put(make_pod(1, SLOW))
            await a_while()
            assert not play.worker().running
            tell_all(play.controller, [make_pod(1, SLOW)])
            await until(lambda: play.worker().running)

    run(work())


def test_who_led_follows_and_may_lead_again(play: Played, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW), make_pod(2)])
        for runs in (1, 2, 3):
            async with play.leading():
                assert play.worker().running
            assert not play.worker().running
            play.put(make_pod(9 + runs, FAST, node="node-2", address=THERE))
            await asyncio.sleep(0)
            assert play.worker().runs == runs
            assert play.worker(THERE).runs == runs - 1

    run(work())
    assert caplog.messages[0] == "acting: 2 pods, 1 of them limited"


def test_two_at_once_lead_one_after_the_other(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            async with play.leading():
                assert play.worker().runs == 1
            assert play.worker().running

    run(work())


def test_a_node_that_comes_while_the_lead_is_given_up_is_not_acted_on(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        task = asyncio.create_task(play.controller.run())
        await until(lambda: play.workers and play.worker().running)
        play.worker().slow = 0.02
        task.cancel()
        await asyncio.sleep(0.005)
        play.put(make_pod(2, FAST, node="node-2", address=THERE))
        with pytest.raises(asyncio.CancelledError):
            await task
        await a_while()
        assert [address for address, worker in play.workers.items() if worker.running] == []

    run(work())


def test_a_mistake_of_ours_in_one_worker_is_logged_and_mended(
    play: Played, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PRUNE_SECONDS", 0.01)
    failures = 1
    runs = Worker.run

    async def fail(worker: Worker) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ZeroDivisionError
        await runs(worker)

    monkeypatch.setattr(Worker, "run", fail)

    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            await until(lambda: play.worker().running)

    run(work())
    [record] = caplog.records
    assert record.levelno == logging.CRITICAL
    assert HERE in record.getMessage()


# Nodes that have gone.


@pytest.fixture
def prune_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRUNE_SECONDS", 0.01)


@pytest.mark.usefixtures("prune_often")
def test_a_node_that_has_lost_its_last_pod_is_let_go_of_when_its_limiters_are_gone(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW), make_pod(2, node="node-2", address=THERE)])
        async with play.leading():
            first, second = play.worker(HERE), play.worker(THERE)
            first.is_idle = second.is_idle = True
            await a_while()
            assert set(play.workers) == {HERE, THERE}, "they have pods"
            first.is_idle = False
            play.controller.remove(uid_of(1))
            await a_while()
            assert set(play.workers) == {HERE, THERE}, "it has limiters"
            first.is_idle = True
            await until(lambda: set(play.workers) == {THERE})
            await until(lambda: first.closed and not first.running)
            assert not second.closed
            assert HERE not in play.controller._members
            # And comes back with its next pod.
            play.put(make_pod(3, SLOW))
            assert play.worker(HERE) is not first
            await until(lambda: play.worker(HERE).running)

    run(work())


@pytest.mark.usefixtures("prune_often")
def test_a_node_that_comes_back_while_it_is_let_go_of_is_worked_on_at_once(
    play: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            first = play.worker()
            first.slow, first.is_idle = 0.02, True
            # The next look at all nodes is a minute away.
            play.controller.remove(uid_of(1))
            await until(lambda: not play.workers)
            monkeypatch.setattr(module, "_PRUNE_SECONDS", 60.0)
            play.put(make_pod(2, SLOW))
            await until(lambda: play.worker().running)

    run(work())


def test_a_pod_that_only_waits_is_no_reason_to_keep_a_node(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW), make_pod(2, SLOW, node="node-2", address="")])
        play.controller.remove(uid_of(1))
        play.worker().is_idle = True
        await play.controller._prune()
        assert play.workers == {}

    run(work())


# The end.


def test_draining_drains_the_workers_that_run_and_starts_no_other(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            await play.controller.drain()
            assert play.worker(HERE).drained
            play.put(make_pod(2, SLOW, node="node-2", address=THERE))
            await a_while()
            assert play.worker(THERE).runs == 0

    run(work())


def test_draining_who_follows_does_nothing(play: Played) -> None:
    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        await play.controller.drain()
        assert not play.worker().drained

    run(work())


def test_draining_ends_in_time(play: Played, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_DRAIN_SECONDS", 0.02)

    async def hang(_: Worker) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(Worker, "drain", hang)

    async def work() -> None:
        tell_all(play.controller, [make_pod(1, SLOW)])
        async with play.leading():
            await play.controller.drain()

    run(work())
    assert caplog.messages == ["not everything was finished within 0 s"]


def test_closing_closes_all_connections(play: Played) -> None:
    play.put(make_pod(1), make_pod(2, node="node-2", address=THERE))
    run(play.controller.close())
    assert all(worker.closed for worker in play.workers.values())


# Any order of events.

_PODS = st.builds(
    lambda number, address, asks: make_pod(
        number,
        asks if isinstance(asks, Limits) else None,
        node=f"node-{number % 2}",
        address=address,
        problem="x" if asks == "problem" else "",
        ended=asks == "ended",
    ),
    st.integers(1, 4),
    st.sampled_from(["", HERE, THERE]),
    st.sampled_from([SLOW, FAST, None, "problem", "ended"]),
)
_EVENTS = st.lists(
    st.tuples(st.just("put"), _PODS)
    | st.tuples(st.just("remove"), st.integers(1, 4))
    | st.tuples(st.just("keep"), st.lists(_PODS, max_size=4, unique_by=lambda pod: pod.uid)),
    max_size=30,
)


@given(_EVENTS)
def test_after_any_events_each_pod_is_wanted_where_it_is_and_nowhere_else(events: list[tuple[str, Any]]) -> None:
    pods: dict[str, Pod] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NodeWorker", Worker)
        play = Played()
        for kind, what in events:
            if kind == "put":
                pods[what.uid] = what
                play.controller.put(what)
            elif kind == "remove":
                pods.pop(uid_of(what), None)
                play.controller.remove(uid_of(what))
            else:
                pods = {pod.uid: pod for pod in what}
                tell_all(play.controller, what)
    places = [(uid, address) for address, worker in play.workers.items() for uid in worker.wants]
    assert len(places) == len({uid for uid, _ in places}), "a pod is at one address"
    placed = play.controller._placed
    assert placed.keys() == pods.keys()
    for uid, pod in pods.items():
        assert not pod.address or placed[uid] == pod.address
        wanted = play.workers[placed[uid]].wants.get(uid) if placed[uid] else None
        if pod.problem:
            assert not placed[uid] or wanted
        elif placed[uid]:
            assert wanted == (Want(pod, pod.limits) if pod.limits else None)
        if wanted:
            assert wanted.pod == pod
    assert {uid for uid, _ in places} <= pods.keys()
    counted = {address: count for address, count in play.controller._members.items() if count}
    assert counted == {address: [*placed.values()].count(address) for address in placed.values()}
    waiting = {uid for uids in play.controller._waiting.values() for uid in uids}
    assert waiting == {uid for uid, address in placed.items() if not address}


# With real workers.


def test_from_pods_to_limits_in_force_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "build", lambda: BUILD)
    monkeypatch.setattr(generator, "generate", image_of)

    async def work() -> None:
        nodes = {HERE: Node(), THERE: Node()}
        stranger = nodes[HERE].give(9)
        kept = nodes[HERE].give(5, FAST)
        told = Told()
        controller = Controller(nodes.__getitem__, told, 3600.0)
        tell_all(
            controller, [make_pod(1, SLOW), make_pod(2, FAST, node="node-2", address=THERE), make_pod(5, problem="x")]
        )
        await a_while()
        assert nodes[HERE].calls == nodes[THERE].calls == [], "it does not lead"
        async with running(controller.run()):
            await until(lambda: nodes[HERE].limits() == {uid_of(1): SLOW, kept: FAST})
            await until(lambda: nodes[THERE].limits() == {uid_of(2): FAST})
            assert ("detach", stranger) in nodes[HERE].calls
            controller.put(make_pod(1, FAST))
            controller.put(make_pod(2, SLOW, node="node-2", address=HERE))
            await until(lambda: nodes[HERE].limits() == {uid_of(1): FAST, uid_of(2): SLOW, kept: FAST})
            await until(lambda: nodes[THERE].limits() == {})
            controller.remove(uid_of(1))
            controller.put(make_pod(5))
            await until(lambda: nodes[HERE].limits() == {uid_of(2): SLOW})
        # What is in force stays so.
        assert nodes[HERE].limits() == {uid_of(2): SLOW}
        await controller.close()
        assert nodes[HERE].closed
        assert nodes[THERE].closed
        assert told.of(Reason.FAILED) == []

    run(work())
