from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web

from bpfrl.limits import PodRef
from bpfrl.master import events as module
from bpfrl.master.api import Api
from bpfrl.master.events import Reason, Recorder, Report
from bpfrl.master.pods import Pod
from tests.unit.fakes import UID, a_while, api_server, make_pod, run, running, until

POD = make_pod(1)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    played = Clock()
    monkeypatch.setattr(module, "time", played)
    return played


class Events:
    """The part of the API server that keeps Events.

    Attributes:
        kept: by path.
        asked: each request: method, path, body and kind of body.
        answers: what comes first, instead of what is right.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any, str]] = []
        self.answers: list[int] = []

    def counts(self) -> list[int]:
        """How often each thing was told."""
        return [event["count"] for event in self.kept.values()]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.text())
        self.asked.append((request.method, request.path, body, request.headers["Content-Type"]))
        if self.answers and (status := self.answers.pop(0)):
            return web.json_response({"message": "played"}, status=status)
        if request.method == "POST":
            path = f"{request.path}/{body['metadata']['name']}"
            if path in self.kept:
                return web.json_response({"message": "already exists"}, status=409)
            self.kept[path] = body
            return web.json_response(body, status=201)
        if request.path not in self.kept:
            return web.json_response({"message": "not found"}, status=404)
        self.kept[request.path] |= body
        return web.json_response(self.kept[request.path])


@asynccontextmanager
async def recording(events: Events) -> AsyncIterator[Recorder]:
    async with api_server(events.answer) as client:
        recorder = Recorder(Api(client), "master-0")
        async with running(recorder.run()):
            yield recorder


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# The log.


@pytest.mark.parametrize(
    ("reason", "line", "level"),
    [
        (Reason.LIMITED, "shop/cart-1: BandwidthLimited: told", logging.INFO),
        (Reason.UNLIMITED, "shop/cart-1: BandwidthUnlimited: told", logging.INFO),
        (Reason.INVALID, "shop/cart-1: BandwidthLimitInvalid: told", logging.WARNING),
        (Reason.FAILED, "shop/cart-1: BandwidthLimitFailed: told", logging.WARNING),
    ],
)
def test_what_is_told_is_in_the_log(reason: Reason, line: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Recorder(None, "master-0").tell(POD, reason, "told")
    assert [(record.getMessage(), record.levelno) for record in caplog.records] == [(line, level)]


def test_without_an_api_server_the_log_is_all_there_is() -> None:
    async def work() -> None:
        recorder = Recorder(None, "master-0")
        for number in range(3):
            recorder.tell(POD, Reason.FAILED, str(number))
        assert recorder._queue.empty()
        # There is nothing to send, now or later.
        await recorder.run()

    run(work())


def test_the_same_thing_is_told_once_in_ten_minutes(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(None, "master-0")
    times = []
    for clock.now in (0.0, 1.0, 599.9, 600.0, 601.0, 1199.9, 1200.0, 10_000.0):
        caplog.clear()
        recorder.tell(POD, Reason.FAILED, "told")
        if caplog.records:
            times.append(clock.now)
    assert times == [0.0, 600.0, 1200.0, 10_000.0]


@pytest.mark.usefixtures("clock")
def test_another_thing_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(None, "master-0")
    different = [
        (POD, Reason.FAILED, "told"),
        (make_pod(2), Reason.FAILED, "told"),
        (POD, Reason.INVALID, "told"),
        (POD, Reason.FAILED, "told otherwise"),
    ]
    for each in different:
        recorder.tell(*each)
        recorder.tell(*each)
    assert len(caplog.records) == len(different)


def test_a_state_that_comes_back_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = Recorder(None, "master-0")
    for message in ("1mbit", "2mbit", "1mbit", "1mbit"):
        recorder.tell(POD, Reason.LIMITED, message)
    recorder.tell(POD, Reason.FAILED, "no")
    recorder.tell(POD, Reason.LIMITED, "1mbit")
    assert [message.rpartition(" ")[2] for message in messages(caplog)] == ["1mbit", "2mbit", "1mbit", "no", "1mbit"]


def test_what_was_told_last_is_remembered_longest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    recorder = Recorder(None, "master-0")
    for clock.now, number in ((0.0, 1), (1.0, 2), (600.0, 1), (600.1, 3), (600.2, 1), (600.3, 2)):
        recorder.tell(make_pod(number), Reason.FAILED, "told")
    # 1 was told again, so it was 2 that was forgotten for 3.
    assert [re.findall(r"cart-(\d)", message)[0] for message in messages(caplog)] == ["1", "2", "1", "3", "2"]


@pytest.mark.usefixtures("clock")
def test_only_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    recorder = Recorder(None, "master-0")
    for number in (1, 2, 3, 1, 4, 5, 3, 1):
        recorder.tell(make_pod(number), Reason.FAILED, "told")
    # 1 was forgotten when 4 came, for it was told before 2 and 3.
    told = [re.findall(r"cart-(\d)", message)[0] for message in messages(caplog)]
    assert told == ["1", "2", "3", "4", "5", "1"]
    assert len(recorder._last) == 3


# Events.


def test_an_event_says_what_kubectl_describe_shows() -> None:
    async def work() -> None:
        events = Events()
        async with recording(events) as recorder:
            recorder.tell(POD, Reason.FAILED, "egress 1mbit: no")
            await until(lambda: events.kept)
        [(path, event)] = events.kept.items()
        assert re.fullmatch(r"/api/v1/namespaces/shop/events/cart-1\.[0-9a-f]{16}", path)
        told = datetime.strptime(event.pop("firstTimestamp"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        assert abs(datetime.now(UTC) - told) < timedelta(seconds=10)
        assert event.pop("lastTimestamp")
        assert event == {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": path.rpartition("/")[2], "namespace": "shop"},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": "shop",
                "name": "cart-1",
                "uid": POD.uid,
            },
            "type": "Warning",
            "reason": "BandwidthLimitFailed",
            "message": "egress 1mbit: no",
            "source": {"component": "bpfrl"},
            "reportingComponent": "bpfrl",
            "reportingInstance": "master-0",
            "count": 1,
        }

    run(work())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.LIMITED, "Normal"),
        (Reason.UNLIMITED, "Normal"),
        (Reason.INVALID, "Warning"),
        (Reason.FAILED, "Warning"),
    ],
)
def test_only_what_somebody_must_act_on_is_a_warning(reason: Reason, kind: str) -> None:
    assert Recorder(None, "master-0")._event(Report(POD, reason, "told"))["type"] == kind


def test_a_static_pods_event_is_about_the_apis_image_of_it() -> None:
    pod = make_pod(1, cgroup_uid="0123456789abcdef0123456789abcdef")
    involved: Any = Recorder(None, "master-0")._event(Report(pod, Reason.LIMITED, "told"))["involvedObject"]
    assert involved["uid"] == pod.uid != pod.ref.uid


def test_a_long_message_is_cut() -> None:
    event = Recorder(None, "master-0")._event(Report(POD, Reason.FAILED, "x" * 5000))
    assert event["message"] == "x" * 1000


def test_what_is_there_already_is_counted_up(clock: Clock) -> None:
    async def work() -> None:
        events = Events()
        async with recording(events) as recorder:
            for count in (1, 2, 3):
                clock.now += 600.0
                recorder.tell(POD, Reason.FAILED, "told")
                await until(lambda: events.counts() == [count])  # noqa: B023 - it is over before the next
            [event] = events.kept.values()
            assert event["reason"] == "BandwidthLimitFailed"
            methods = [method for method, *_ in events.asked]
            assert methods == ["POST", "POST", "PATCH", "POST", "PATCH"]
            _, path, body, content_type = events.asked[-1]
            assert path in events.kept
            assert body.keys() == {"lastTimestamp", "count"}
            assert content_type == "application/merge-patch+json"

    run(work())


def test_an_api_server_that_says_no_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        events = Events()
        # The first is refused, the second is there already and then is not, the third goes well.
        events.answers = [500, 409, 404]
        async with recording(events) as recorder:
            for number in (1, 2, 3):
                recorder.tell(make_pod(number), Reason.LIMITED, "told")
            await until(lambda: events.kept)
        assert [event["involvedObject"]["name"] for event in events.kept.values()] == ["cart-3"]
        assert [method for method, *_ in events.asked] == ["POST", "POST", "PATCH", "POST"]

    run(work())
    warnings = [each for each in messages(caplog) if each.startswith("no Event about")]
    assert warnings == [
        "no Event about shop/cart-1: the API server answers 500 Internal Server Error: played",
        "no Event about shop/cart-2: the API server answers 404 Not Found: played",
    ]


def test_nothing_waits_for_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE", 5)

    async def work() -> None:
        events = Events()
        async with api_server(events.answer) as client:
            recorder = Recorder(Api(client), "master-0")
            for number in range(20):
                recorder.tell(make_pod(number), Reason.FAILED, "told")
            assert recorder._queue.qsize() == 5
            async with running(recorder.run()):
                await until(lambda: len(events.kept) == 5)
                await a_while()
            assert len(events.asked) == 5

    run(work())


def test_the_queue_is_as_long_as_it_says() -> None:
    assert Recorder(None, "master-0")._queue.maxsize == 2000


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("web", "web"),
        ("a" * 253, "a" * 236),
        # What is cut off must not leave a name that ends in a mark.
        ("a" * 235 + "." + "b" * 17, "a" * 235),
        ("a" * 230 + "-----b", "a" * 230 + "-----b"),
        ("a" * 230 + "------b", "a" * 230),
    ],
)
def test_an_events_name_is_one_that_the_api_server_takes(name: str, kept: str) -> None:
    pod = Pod(UID, PodRef(UID, "shop", name), "node-1", "192.0.2.1")
    found = module._name(Report(pod, Reason.LIMITED, "told"))
    assert found.rpartition(".")[0] == kept
    assert len(found) <= 253
    assert PodRef(UID, "shop", found).name == found, "it has the form of a DNS name"


def test_the_same_thing_has_the_same_name_and_another_has_another() -> None:
    reports = [
        Report(make_pod(number), reason, message)
        for number in (1, 2)
        for reason in Reason
        for message in ("told", "told otherwise")
    ]
    names = [module._name(each) for each in reports]
    assert len(set(names)) == len(reports)
    assert names == [module._name(Report(*each)) for each in reports]


def test_a_recorder_can_be_stopped_while_it_waits() -> None:
    async def work() -> None:
        async with api_server(Events().answer) as client:
            task = asyncio.create_task(Recorder(Api(client), "master-0").run())
            await a_while()
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(work())
