"""Elections, against the part of an API server that keeps a Lease, with a clock that runs fifty times as fast."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import ApiClient
from kubernetes.aio.leaderelection import leaderelection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from bpfrl.master.leader import LEASE, Leadership
from tests.unit.fakes import a_while, api_server, client_of, run, running, until

# What the election goes by when nobody makes it run faster.
_CLOCK = leaderelection.time  # type: ignore[attr-defined]
_SPEED = 50
_DURATION = 15
_PATH = "/apis/coordination.k8s.io/v1/namespaces/bpfrl/leases"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The election's clock; and its log as it was."""
    begin = time.time()
    level = logging.getLogger(LeaseLock.__module__).level

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / _SPEED)

    clock = SimpleNamespace(time=lambda: begin + (time.time() - begin) * _SPEED)
    monkeypatch.setattr(leaderelection, "time", clock)
    monkeypatch.setattr(leaderelection, "asyncio", SimpleNamespace(sleep=sleep, create_task=asyncio.create_task))
    # What it says of a server that does not answer is said by the lock too.
    monkeypatch.setattr(leaderelection.logger, "disabled", True)
    yield
    logging.getLogger(LeaseLock.__module__).setLevel(level)


class Leases:
    """The part of the API server that keeps Leases, with the conflicts of a real one.

    Attributes:
        lease: the one that there is.
        down: for whom it does not answer properly: names of masters, as their clients call themselves.
        how: what it does then: a status, or 0: nothing at all.
    """

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.down: set[str] = set()
        self.how = 503
        self._version = 0

    @property
    def holder(self) -> str | None:
        return self.lease["spec"].get("holderIdentity") if self.lease else None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:  # noqa: PLR0911 - each says what it is
        if request.headers["User-Agent"] in self.down:
            if not self.how:
                await asyncio.sleep(60)
            return _status(self.how)
        if request.method == "POST":
            assert request.path == _PATH
            if self.lease:
                return _status(409)
            return self._keep(json.loads(await request.text()))
        assert request.path == f"{_PATH}/{LEASE}"
        if self.lease is None:
            return _status(404)
        if request.method == "PUT":
            lease = json.loads(await request.text())
            if lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
                return _status(409)
            return self._keep(lease)
        return web.json_response(self.lease)

    def _keep(self, lease: dict[str, Any]) -> web.Response:
        self._version += 1
        assert lease["metadata"]["name"] == LEASE
        lease["metadata"] |= {"namespace": "bpfrl", "resourceVersion": str(self._version)}
        self.lease = lease
        return web.json_response(lease)


def _status(code: int) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": "played"}, status=code)


class Master:
    """One of several.

    Attributes:
        acts: how often it has begun to act.
        acting: whether it does.
    """

    def __init__(self, name: str, client: ApiClient, others: list[Master]) -> None:
        client.user_agent = name
        self.name = name
        self.leadership = Leadership(client, "bpfrl", name, _DURATION)
        self.acts = 0
        self.acting = False
        self._others = others

    async def act(self) -> None:
        assert not any(other.acting for other in self._others), "two act at once"
        self.acts += 1
        self.acting = True
        try:
            await asyncio.sleep(60)
        finally:
            self.acting = False

    async def run(self) -> None:
        await self.leadership.run(self.act)


@asynccontextmanager
async def masters(number: int) -> AsyncIterator[tuple[Leases, list[Master]]]:
    """So many masters, none of which runs yet, and the leases that they are to hold."""
    leases = Leases()
    async with api_server(leases.answer) as first:
        url = first.configuration.host
        found: list[Master] = []
        clients = [client_of(url) for _ in range(number)]
        try:
            for count, each in enumerate(clients):
                found.append(Master(f"master-{count}", await each.__aenter__(), found))
            yield leases, found
        finally:
            for each in clients:
                await each.__aexit__(None, None, None)


def acting(found: list[Master]) -> Callable[[], list[str]]:
    return lambda: [master.name for master in found if master.acting]


def test_an_election_does_not_go_by_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before, steady = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: before - 86_400)
    monkeypatch.setattr(time, "monotonic", lambda: steady)
    assert before - 60 < _CLOCK.time() < before + 60


def test_only_one_acts() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]), running(one.run()), running(other.run()):
            await until(acting([one, other]))
            leader = one if one.acting else other
            # For longer than a lease holds that is not renewed.
            await asyncio.sleep(1.5 * _DURATION / _SPEED)
            assert acting([one, other])() == [leader.name] == [leases.holder]
            assert one.acts + other.acts == 1

    run(work())


def test_the_lease_says_who_leads_and_for_how_long() -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]), running(master.run()):
            await until(lambda: master.acting)
            assert leases.lease
            spec = leases.lease["spec"]
            assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("master-0", 15)
            first = spec["renewTime"]
            await until(lambda: leases.lease and leases.lease["spec"]["renewTime"] != first)
            assert leases.lease["spec"]["acquireTime"] == spec["acquireTime"]

    run(work())


def test_who_cannot_renew_stops_acting_and_the_other_begins_later() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]), running(one.run()):
            await until(lambda: one.acting)
            async with running(other.run()):
                leases.down.add("master-0")
                await until(lambda: other.acting)
                # act() itself sees to it that the two never act at once.
                assert not one.acting
                assert leases.holder == "master-1"
                leases.down.clear()
                await asyncio.sleep(1.5 * _DURATION / _SPEED)
                assert (one.acts, other.acts) == (1, 1)

    run(work())


@pytest.mark.parametrize("how", [503, 404, 409])
def test_who_has_lost_the_lease_may_lead_again(how: int) -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]), running(master.run()):
            for acts in (1, 2):
                await until(lambda: master.acting)
                assert master.acts == acts
                leases.how = how
                leases.down.add("master-0")
                await until(lambda: not master.acting)
                leases.down.clear()

    run(work())


def test_a_server_that_says_nothing_at_all_costs_the_lease_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]):
            # This clock is not the election's.
            monkeypatch.setattr(master.leadership._lock, "_timeout", 4 / _SPEED)
            async with running(master.run()):
                await until(lambda: master.acting)
                leases.how = 0
                leases.down.add("master-0")
                await until(lambda: not master.acting)
                leases.down.clear()
                await until(lambda: master.acting)

    run(work())


def test_a_moment_without_a_server_changes_nothing() -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]), running(master.run()):
            await until(lambda: master.acting)
            leases.down.add("master-0")
            await asyncio.sleep(3 / _SPEED)
            leases.down.clear()
            await asyncio.sleep(1.5 * _DURATION / _SPEED)
            assert (master.acting, master.acts) == (True, 1)

    run(work())


def test_no_server_at_first_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]):
            leases.down.add("master-0")
            async with running(master.run()):
                await asyncio.sleep(6 / _SPEED)
                assert master.acts == 0
                leases.down.clear()
                await until(lambda: master.acting)

    run(work())
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_what_acting_raises_is_raised_by_who_runs_it() -> None:
    async def work() -> None:
        async with masters(1) as (_, [master]):

            async def act() -> None:
                await asyncio.sleep(0.001)
                raise ZeroDivisionError("played")

            with pytest.raises(ZeroDivisionError, match="played"):
                await master.leadership.run(act)
            await a_while()
            assert _left() == []

    run(work())


def test_what_is_raised_while_the_lead_is_lost_is_raised_too() -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]):
            began = asyncio.Event()

            async def act() -> None:
                began.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    raise ZeroDivisionError("played")

            task = asyncio.create_task(master.leadership.run(act))
            await began.wait()
            leases.down.add("master-0")
            with pytest.raises(ZeroDivisionError, match="played"):
                await task

    run(work())


def test_who_has_nothing_to_do_any_more_still_holds_the_lease() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]):

            async def act() -> None:
                one.acts += 1

            async with running(one.leadership.run(act)):
                await until(lambda: one.acts)
                async with running(other.run()):
                    await asyncio.sleep(1.5 * _DURATION / _SPEED)
                    assert leases.holder == "master-0"
                    assert (one.acts, other.acts) == (1, 0)

    run(work())


def test_who_is_cancelled_stops_acting() -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]):
            cleaned = False

            async def act() -> None:
                nonlocal cleaned
                try:
                    await master.act()
                finally:
                    # What act() has to do at its end is done before run() returns.
                    await asyncio.sleep(0.01)
                    cleaned = True

            task = asyncio.create_task(master.leadership.run(act))
            await until(lambda: master.acting)
            assert _left()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert cleaned
            assert not master.acting
            before = leases.lease
            await asyncio.sleep(6 / _SPEED)
            assert leases.lease == before, "it renews no more"
            assert _left() == []

    run(work())


def test_who_waits_can_be_cancelled() -> None:
    async def work() -> None:
        async with masters(2) as (_, [one, other]), running(one.run()):
            await until(lambda: one.acting)
            task = asyncio.create_task(other.run())
            await a_while()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert one.acting
            assert other.acts == 0

    run(work())


def test_who_lets_go_is_followed_at_once() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]):
            async with running(one.run()):
                await until(lambda: one.acting)
            async with running(other.run()):
                await a_while()
                assert (leases.holder, other.acts) == ("master-0", 0)
                await one.leadership.release()
                assert leases.holder is None
                begin = time.monotonic()
                await until(lambda: other.acting)
                # A try takes place every two seconds; the lease would have held for fifteen.
                assert (time.monotonic() - begin) * _SPEED < 10
            assert leases.holder == "master-1"

    run(work())


def test_who_does_not_lead_has_nothing_to_let_go() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]):
            await other.leadership.release()
            assert leases.lease is None
            async with running(one.run()):
                await until(lambda: one.acting)
                before = leases.lease
                await other.leadership.release()
                assert leases.holder == "master-0"
                assert before

    run(work())


def test_letting_go_of_what_another_has_taken_meanwhile_takes_nothing_away() -> None:
    async def work() -> None:
        async with masters(2) as (leases, [one, other]):
            async with running(one.run()):
                await until(lambda: one.acting)
            found = one.leadership._lock.get

            async def get(name: str, namespace: str) -> Any:
                answer = await found(name, namespace)
                # Between the look and the change.
                assert leases.lease
                leases.lease["spec"]["holderIdentity"] = other.name
                leases.lease["metadata"]["resourceVersion"] = "99"
                return answer

            one.leadership._lock.get = get  # type: ignore[method-assign]
            await one.leadership.release()
            assert leases.holder == "master-1"

    run(work())


def test_letting_go_without_a_server_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with masters(1) as (leases, [master]):
            async with running(master.run()):
                await until(lambda: master.acting)
            leases.down.add("master-0")
            await master.leadership.release()
            assert leases.holder == "master-0"

    run(work())
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    ("duration", "retry", "renew"), [(15, 2.0, 10.0), (30, 4.0, 20.0), (5, 1.0, 10 / 3), (3, 1.0, 2.0), (2, 1.0, 4 / 3)]
)
def test_the_lease_is_renewed_often_enough_at_any_duration(duration: int, retry: float, renew: float) -> None:
    async def work() -> None:
        async with client_of("http://127.0.0.1:1") as client:
            leadership = Leadership(client, "bpfrl", "master-0", duration)
            task = asyncio.create_task(leadership.run(_never))
            # A configuration that the election refuses would be raised here.
            await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert leadership._retry == retry
            assert 1.2 * retry < renew < duration

    run(work())


async def _never() -> None:
    raise AssertionError("it cannot lead")


def _left() -> list[str]:
    """What an election has left behind at work."""
    tasks = [repr(task) for task in asyncio.all_tasks()]
    return [task for task in tasks if "/leader.py" in task or "/leaderelection.py" in task]
