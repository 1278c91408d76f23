"""The list and the watch, against an API server on loopback that does what it is told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from bpfrl.errors import ApiError
from bpfrl.master import apiserver as module
from bpfrl.master.annotations import EGRESS
from bpfrl.master.api import Api
from bpfrl.master.apiserver import PodWatch
from bpfrl.master.pods import Pod
from tests.unit.fakes import Sink, api_server, make_pod, run, running, uid_of, until
from tests.unit.test_pods import ANY_POD

Step = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def a_pod(number: int, version: str = "", **metadata: Any) -> dict[str, Any]:
    """The pod with this number, as the API server sends it."""
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"cart-{number}",
            "namespace": "shop",
            "uid": uid_of(number),
            "resourceVersion": version or str(number),
        }
        | metadata,
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Running", "hostIP": "192.0.2.1"},
    }


def event(kind: str, thing: dict[str, Any]) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def bookmark(version: str) -> bytes:
    """A line that says nothing but how far the watch has come."""
    metadata = {"resourceVersion": version, "creationTimestamp": None}
    return event("BOOKMARK", {"kind": "Pod", "metadata": metadata, "spec": {"containers": None}, "status": {}})


def failure(code: int, message: str = "") -> bytes:
    """A line that ends the watch."""
    return event("ERROR", {"kind": "Status", "code": code, "message": message})


# What the server does, one step a request.


def listing(version: str, *pods: dict[str, Any], more: str = "") -> Step:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        metadata = {"resourceVersion": version} | ({"continue": more} if more else {})
        return web.json_response({"kind": "PodList", "metadata": metadata, "items": pods})

    return answer


def lines(*chunks: bytes, pause: float = 0.0, cut: bool = False) -> Step:
    """A watch: what is sent at once, piece by piece; cut: and then the connection breaks."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(pause)
        if cut and request.transport:
            request.transport.close()
            await asyncio.sleep(1)
        return response

    return answer


def refusal(status: int, message: str = "", **headers: str) -> Step:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({"kind": "Status", "message": message}, status=status, headers=named)

    return answer


def garbage(text: bytes) -> Step:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=text)

    return answer


def page(step: Step) -> Step:
    """What answers the next request for a further page of a list, whatever else is asked for meanwhile."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await step(request)

    _FURTHER.add(answer)
    return answer


_FURTHER: set[Step] = set()


class Played:
    """A watch and the server that it asks.

    Attributes:
        asked: the query of each request.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self._steps = list(steps)
        self.asked: list[dict[str, str]] = []
        self.sink = Sink()
        self.watch: PodWatch

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.path == "/api/v1/pods"
        self.asked.append(dict(request.query))
        if not self._steps:
            await asyncio.sleep(60)
        further = "continue" in request.query
        step = next(step for step in self._steps if (step in _FURTHER) is further)
        self._steps.remove(step)
        return await step(request)

    @property
    def kinds(self) -> list[str]:
        """What each request was: a list, or a watch from a version."""
        return [f"watch {each['resourceVersion']}" if "watch" in each else "list" for each in self.asked]

    async def turns(self, number: int) -> list[float]:
        """So many turns, and the pause after each."""
        return [await self.watch._turn() for _ in range(number)]


@asynccontextmanager
async def played(*steps: Step) -> AsyncIterator[Played]:
    play = Played(steps)
    async with api_server(play.answer) as client:
        play.watch = PodWatch(Api(client), play.sink)
        yield play


def turns(number: int, *steps: Step) -> tuple[list[float], Played]:
    """So many turns of a watch at a server that does these steps; returns the pauses."""

    async def work() -> tuple[list[float], Played]:
        async with played(*steps) as play:
            return await play.turns(number), play

    return run(work())


# The list.


def test_the_list_asks_for_scheduled_pods_in_pages() -> None:
    _, play = turns(
        1,
        listing("7", a_pod(1), a_pod(2), more="page-2"),
        page(listing("7", a_pod(3), more="page-3")),
        page(listing("7", a_pod(4))),
        lines(bookmark("8"), pause=0.1),
    )
    first = {"fieldSelector": "spec.nodeName!=", "limit": "500"}
    listed = [each for each in play.asked if "watch" not in each]
    assert listed == [first, first | {"continue": "page-2"}, first | {"continue": "page-3"}]
    # What is no more is known when all pages are there.
    assert play.sink.told == [("keep", [uid_of(number) for number in (1, 2, 3, 4)], True)]
    assert sorted(play.kinds) == ["list", "list", "list", "watch 7"]


def test_changes_are_told_while_a_long_list_goes_on_and_no_page_undoes_them() -> None:
    async def work() -> None:
        gate = asyncio.Event()

        async def late(request: web.BaseRequest) -> web.StreamResponse:
            await gate.wait()
            return await listing("7", a_pod(2), a_pod(3), a_pod(4))(request)

        changes = (event("MODIFIED", a_pod(2, "8")), event("DELETED", a_pod(3, "9")), event("ADDED", a_pod(5, "10")))
        first = listing("7", a_pod(1), more="page-2")
        async with played(first, page(late), lines(*changes, bookmark("11"), pause=0.05), lines()) as play:
            play.sink.put(make_pod(3))
            play.sink.put(make_pod(9))
            turn = asyncio.create_task(play.turns(1))
            await until(lambda: ("put", uid_of(5)) in play.sink.told)
            assert ("remove", uid_of(3)) in play.sink.told
            before = play.sink.pods[uid_of(2)]
            gate.set()
            await until(lambda: play.sink.told[-1][0] == "keep")
            await turn
            assert play.sink.pods.keys() == {uid_of(number) for number in (1, 2, 4, 5)}
            assert play.sink.pods[uid_of(2)] is before
            assert play.watch._version == "11"

    run(work())


def test_a_list_that_breaks_off_takes_nobody_away_and_is_begun_again() -> None:
    pauses, play = turns(
        2,
        listing("7", a_pod(1), more="page-2"),
        page(refusal(500)),
        lines(pause=1),
        listing("9", a_pod(2)),
        lines(bookmark("10")),
    )
    assert pauses[0] > 0
    assert "continue" not in play.asked[3]
    assert play.sink.told == [("put", uid_of(1)), ("keep", [uid_of(2)], True)]
    assert play.kinds[-1] == "watch 9"


def test_a_page_that_has_expired_begins_the_list_again() -> None:
    pauses, play = turns(
        2,
        listing("7", a_pod(1), more="page-2"),
        page(refusal(410)),
        lines(pause=1),
        listing("9", a_pod(2)),
        lines(bookmark("10")),
    )
    assert pauses == [0.0, 0.0]
    assert sorted(play.kinds[:3]) == ["list", "list", "watch 7"]
    assert play.kinds[3:] == ["list", "watch 9"]
    assert play.sink.told[-1] == ("keep", [uid_of(2)], True)


def test_pauses_grow_while_lists_break_off_although_watches_tell_something() -> None:
    def broken() -> tuple[Step, ...]:
        watched = lines(event("MODIFIED", a_pod(5, "8")), pause=1)
        return listing("7", a_pod(1), more="page-2"), page(late(refusal(500))), watched

    def late(step: Step) -> Step:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            await asyncio.sleep(0.1)
            return await step(request)

        return answer

    pauses, play = turns(4, *broken(), *broken(), *broken(), *broken())
    assert ("put", uid_of(5)) in play.sink.told
    assert pauses[3] > 2 * pauses[0]


def test_an_empty_cluster_is_told_of_too() -> None:
    _, play = turns(1, listing("7"), lines(bookmark("8")))
    assert play.sink.told == [("keep", [], True)]


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"[]", b'{"items": []}', b'{"kind": "Status", "metadata": {}}', b"\xff"]
)
def test_a_list_that_cannot_be_read_is_asked_for_again(text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    pauses, play = turns(2, garbage(text), listing("7"), lines(bookmark("8")))
    assert pauses[0] > 0
    assert play.kinds == ["list", "list", "watch 7"]
    assert "the API server's answer cannot be read" in caplog.text


# Pods of any shape. Objects that are no pods are none of the API server's, but what is in between may be anything's.

BAD: dict[str, Any] = {
    "a number": 1,
    "nothing": None,
    "a list": [{}],
    "no metadata": {"spec": {"nodeName": "node-1"}},
    "metadata that is a list": {"metadata": []},
    "a UID that is a number": a_pod(1) | {"metadata": {"name": "cart-1", "uid": 7, "resourceVersion": "8"}},
    "annotations that are a list": a_pod(1) | {"metadata": a_pod(1)["metadata"] | {"annotations": ["10M"]}},
    "an annotation that is a number": a_pod(1) | {"metadata": a_pod(1)["metadata"] | {"annotations": {EGRESS: 10}}},
    "a node that is an object": a_pod(1) | {"spec": {"nodeName": {}}},
    "an address that is a number": a_pod(1) | {"status": {"hostIP": 1}},
}
bad = pytest.mark.parametrize("document", BAD.values(), ids=BAD)


@bad
def test_one_bad_pod_spoils_no_other_in_a_list(document: Any, caplog: pytest.LogCaptureFixture) -> None:
    pauses, play = turns(1, listing("7", a_pod(2), document, a_pod(3)), lines(bookmark("8")))
    assert pauses == [0.0]
    [(_, uids, complete)] = play.sink.told
    # Not complete: a limiter that nobody explains may be the bad one's.
    assert {uid_of(2), uid_of(3)} <= {*uids} <= {"", uid_of(1), uid_of(2), uid_of(3)}  # type: ignore[misc]
    assert not complete
    assert "is left out: " in caplog.text


@pytest.mark.parametrize("document", [each for each in BAD.values() if uid_of(1) in str(each)])
def test_a_pod_that_can_be_read_no_more_stays_as_it_was(document: Any) -> None:
    async def work() -> None:
        async with played(listing("7", document, a_pod(2)), lines(bookmark("8"))) as play:
            play.sink.put(make_pod(1))
            play.sink.put(make_pod(3))
            await play.turns(1)
            assert play.sink.pods.keys() == {uid_of(1), uid_of(2)}

    run(work())


@pytest.mark.parametrize("document", [each for each in BAD.values() if uid_of(1) in str(each)])
@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED", "DELETED"])
def test_one_bad_pod_spoils_no_other_in_a_watch(kind: str, document: Any, caplog: pytest.LogCaptureFixture) -> None:
    pauses, play = turns(
        2,
        listing("7", a_pod(1)),
        lines(event(kind, document), event("ADDED", a_pod(2, "9"))),
        lines(bookmark("10")),
    )
    assert pauses == [0.0, 0.0]
    assert play.kinds == ["list", "watch 7", "watch 9"]
    # What cannot be read stays as it was, but for one that is gone.
    assert play.sink.pods.keys() == ({uid_of(2)} if kind == "DELETED" else {uid_of(1), uid_of(2)})
    assert "is left out: " in caplog.text


@settings(max_examples=200)
@given(st.lists(ANY_POD, max_size=4))
def test_pods_of_any_shape_leave_the_others_as_they_are(documents: list[Any]) -> None:
    items = [part for document in documents for part in (document, a_pod(9))] + [a_pod(9)]
    found = module._page(json.dumps({"metadata": {}, "items": items}).encode())
    assert found.more == ""
    assert [pod.uid for pod in found.pods].count(uid_of(9)) >= len(documents) + 1
    assert len(found.pods) < len(items) or not found.unread


# The watch.


def test_the_watch_goes_on_from_the_list_and_ends_on_the_servers_side() -> None:
    _, play = turns(1, listing("7"), lines(bookmark("8")))
    seconds = int(play.asked[1].pop("timeoutSeconds"))
    assert 300 <= seconds <= 600
    assert play.asked[1] == {
        "watch": "true",
        "fieldSelector": "spec.nodeName!=",
        "resourceVersion": "7",
        "allowWatchBookmarks": "true",
    }


def test_watches_do_not_end_all_at_once() -> None:
    watches = [lines(bookmark("8")) for _ in range(8)]
    _, play = turns(8, listing("7"), *watches)
    assert len({each["timeoutSeconds"] for each in play.asked[1:]}) > 1


def test_the_sink_is_told_of_each_change() -> None:
    changed = a_pod(2, "10", annotations={EGRESS: "10M"})
    _, play = turns(
        1,
        listing("7", a_pod(1), a_pod(2)),
        lines(
            event("ADDED", a_pod(3, "8")), event("DELETED", a_pod(1, "9")), event("MODIFIED", changed), bookmark("11")
        ),
    )
    assert play.sink.told[1:] == [("put", uid_of(3)), ("remove", uid_of(1)), ("put", uid_of(2))]
    assert play.sink.pods.keys() == {uid_of(2), uid_of(3)}
    assert play.sink.pods[uid_of(2)].limits


@pytest.mark.parametrize(
    "last",
    [event("ADDED", a_pod(2, "9")), event("MODIFIED", a_pod(1, "9")), event("DELETED", a_pod(1, "9")), bookmark("9")],
    ids=["added", "modified", "deleted", "bookmark"],
)
def test_a_watch_that_ends_goes_on_from_the_last_version_at_once(last: bytes) -> None:
    pauses, play = turns(2, listing("7", a_pod(1)), lines(event("ADDED", a_pod(5, "8")), last), lines(bookmark("10")))
    assert pauses == [0.0, 0.0]
    assert play.kinds == ["list", "watch 7", "watch 9"]


def test_a_watch_that_ends_at_once_with_nothing_said_is_not_begun_without_a_pause() -> None:
    pauses, play = turns(3, listing("7"), lines(), lines(), lines())
    assert 0.1 <= pauses[0] <= 0.2 <= pauses[1] <= 0.4 <= pauses[2] <= 0.8
    assert play.kinds == ["list", *["watch 7"] * 3]


def test_a_watch_that_was_silent_until_its_end_is_begun_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHORT_SECONDS", 0.01)
    pauses, _ = turns(1, listing("7"), lines(b"\n", pause=0.02))
    assert pauses == [0.0]


def test_a_pod_that_cannot_be_is_left_out_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    _, play = turns(
        2,
        listing("7", a_pod(1), a_pod(2, uid="../../etc"), a_pod(3)),
        lines(event("ADDED", a_pod(4, "8", name="No Name")), event("ADDED", a_pod(5, "9")), bookmark("10")),
        lines(bookmark("11")),
    )
    assert play.sink.told == [("keep", [uid_of(1), uid_of(3)], True), ("put", uid_of(5))]
    assert play.kinds[-1] == "watch 10"
    assert [record.message.split(" is left out")[0] for record in caplog.records if "left out" in record.message] == [
        "pod shop/cart-2",
        "pod shop/No Name",
    ]


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED", "DELETED"], ids=["added", "modified", "deleted"])
def test_the_version_moves_only_when_the_sink_has_taken_the_event(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with played(listing("7"), lines(event(kind, a_pod(1, "8"))), lines(bookmark("9"))) as play:
            refused = 0

            def refuse(_: Pod | str) -> None:
                nonlocal refused
                refused += 1
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(play.sink, "put", refuse)
                patch.setattr(play.sink, "remove", refuse)
                with pytest.raises(ZeroDivisionError):
                    await play.turns(1)
            assert refused == 1
            await play.turns(1)
            assert play.kinds == ["list", "watch 7", "watch 7"]

    run(work())


# What goes wrong.


@pytest.mark.parametrize(
    "gone", [lines(failure(410, "too old resource version")), refusal(410, "Expired")], ids=["event", "status"]
)
def test_a_version_that_is_too_old_is_listed_anew_at_once_and_then_after_growing_pauses(gone: Step) -> None:
    pauses, play = turns(
        5,
        *(listing("7", a_pod(1)), gone),
        *(listing("8", a_pod(2)), gone),
        *(listing("9", a_pod(3)), gone),
        *(listing("10", a_pod(4)), lines(bookmark("11"))),
        gone,
    )
    assert pauses[0] == 0.0
    assert 0.2 <= pauses[1] <= 0.4 <= pauses[2] <= 0.8
    # A watch that has said something makes the next time the first.
    assert pauses[3:] == [0.0, 0.0]
    assert play.kinds == [*("list", "watch 7", "list", "watch 8", "list", "watch 9", "list", "watch 10", "watch 11")]
    assert play.sink.told[-1] == ("keep", [uid_of(4)], True)


@pytest.mark.parametrize("place", ["list", "watch"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_says_when_is_asked_then(place: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    busy = refusal(status, "too many requests", Retry_After="17")
    steps = (busy,) if place == "list" else (listing("7"), busy)
    pauses, _ = turns(1, *steps)
    assert pauses == [17.0]
    assert f"answers {status}" in caplog.text
    assert "again in 17.0 s" in caplog.text


@pytest.mark.parametrize(("seconds", "pause"), [("0", 0.0), ("1", 1.0)])
def test_a_pause_is_never_shorter_than_the_watchs_own(seconds: str, pause: float) -> None:
    busy = refusal(429, Retry_After=seconds)
    pauses, _ = turns(5, *[busy] * 5)
    own = [0.2, 0.4, 0.8, 1.6, 3.2]
    assert all(
        max(pause, longest / 2) <= each <= max(pause, longest) for each, longest in zip(pauses, own, strict=True)
    )


@pytest.mark.parametrize(
    "broken",
    [
        refusal(500),
        refusal(401),
        lines(failure(500, "etcdserver: no leader")),
        lines(b"no JSON\n"),
        lines(b'{"type": "ADDED"}\n'),
        lines(b'{"type": "ADDED", "object": {"spec": {}}}\n'),
        lines(b'{"type": "ADDED", "object": 7}\n'),
        lines(b'{"type": "ERROR", "object": []}\n'),
        lines(b"\xff\xfe\n"),
        lines(event("ADDED", a_pod(2, "9"))[:40], cut=True),
        lines(cut=True),
    ],
    ids=[
        *("500", "401", "error", "no JSON", "no object", "no pod", "a number", "no status", "no UTF-8"),
        *("cut in a line", "cut at once"),
    ],
)
def test_what_fails_is_watched_again_from_the_last_version_after_growing_pauses(broken: Step) -> None:
    pauses, play = turns(
        5, listing("7"), lines(event("ADDED", a_pod(1, "8"))), broken, broken, broken, lines(bookmark("9"))
    )
    assert pauses[0] == pauses[4] == 0.0
    assert 0.1 <= pauses[1] <= 0.2 <= pauses[2] <= 0.4 <= pauses[3] <= 0.8
    assert play.kinds == ["list", "watch 7", *["watch 8"] * 4]
    assert play.sink.told == [("keep", [], True), ("put", uid_of(1))]


def test_what_came_before_a_failure_counts(caplog: pytest.LogCaptureFixture) -> None:
    pauses, play = turns(
        2,
        listing("7"),
        lines(event("ADDED", a_pod(1, "8")), event("ADDED", a_pod(2, "9"))[:40], cut=True),
        lines(event("ADDED", a_pod(2, "9"))),
    )
    # It was at work until then, so this is a first failure.
    assert 0.1 <= pauses[0] <= 0.2
    assert play.kinds == ["list", "watch 7", "watch 8"]
    assert play.sink.told[1:] == [("put", uid_of(1)), ("put", uid_of(2))]
    assert "no connection to the API server" in caplog.text


def test_the_longest_pause_is_half_a_minute() -> None:
    pauses, _ = turns(12, *[refusal(500)] * 12)
    assert 15 <= pauses[-1] <= 30


def test_a_server_that_is_silent_for_too_long_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.2)
    pauses, play = turns(2, listing("7"), lines(bookmark("8"), pause=5), lines(bookmark("9")))
    assert pauses[0] > 0
    assert play.kinds == ["list", "watch 7", "watch 8"]
    assert "the API server does not answer" in caplog.text


def test_the_kernel_looks_after_a_watch_that_is_silent() -> None:
    kept: list[int] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(bookmark("3"))
        await asyncio.sleep(0.2)
        # The client's end of the connection is in this process.
        assert request.transport
        peer = request.transport.get_extra_info("peername")
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
                if end.family == socket.AF_INET and end.getsockname() == peer:
                    kept.append(end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        return response

    turns(1, listing("2"), answer)
    assert kept == [1]


def test_a_watch_may_take_longer_than_any_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.4)
    said = [bookmark(str(number)) for number in range(8, 14)]
    pauses, play = turns(2, listing("7"), lines(*said, pause=0.1), lines(bookmark("14")))
    assert pauses == [0.0, 0.0]
    assert play.kinds == ["list", "watch 7", "watch 13"]


# Lines.


def test_a_line_may_have_megabytes() -> None:
    big = a_pod(1, "8", annotations={EGRESS: "10M", "last-applied": "x" * 3 * 2**20})
    pauses, play = turns(2, listing("7"), lines(event("ADDED", big), bookmark("9")), lines(bookmark("10")))
    assert pauses == [0.0, 0.0]
    assert play.sink.pods[uid_of(1)].limits
    assert play.kinds[-1] == "watch 9"


def test_an_event_may_come_in_pieces_and_pieces_in_one() -> None:
    first, second, third = (event("ADDED", a_pod(number, str(number + 7))) for number in (1, 2, 3))
    _, play = turns(
        2,
        listing("7"),
        lines(first[:1], first[1:50], first[50:] + second + third[:70], third[70:-1], third[-1:], pause=0.005),
        lines(bookmark("11")),
    )
    assert play.sink.told[1:] == [("put", uid_of(number)) for number in (1, 2, 3)]
    assert play.kinds[-1] == "watch 10"


class Content:
    """A stream that comes in these pieces."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    async def iter_any(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


@pytest.mark.parametrize(
    ("chunks", "found"),
    [
        ([], []),
        ([b""], []),
        ([b"\n", b"\r\n", b"  \n"], []),
        ([b"one\n"], [b"one"]),
        ([b"one\ntwo\n"], [b"one", b"two"]),
        ([b"on", b"e", b"\ntw", b"o\nthree\n"], [b"one", b"two", b"three"]),
        ([b"one", b"\n", b"\n", b"two", b"\n"], [b"one", b"two"]),
        # Without its end, a line may be half of one.
        ([b"one\ntw"], [b"one"]),
        ([b"one"], []),
        ([b"\xc3", b"\xa4\n"], [b"\xc3\xa4"]),
        ([b"a" * 65_536] * 64 + [b"\nb\n"], [b"a" * 65_536 * 64, b"b"]),
    ],
)
def test_lines_end_where_the_stream_says_so(chunks: list[bytes], found: list[bytes]) -> None:
    async def work() -> list[bytes]:
        content: Any = Content(*chunks)
        return [line async for line in module._lines(content)]

    assert run(work()) == found


def test_lines_come_as_soon_as_they_are_whole() -> None:
    sent: list[bytes] = []

    class Slow:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for chunk in (b"one\ntw", b"o\nthr", b"ee\n"):
                sent.append(chunk)
                yield chunk

    async def work() -> None:
        content: Any = Slow()
        found = module._lines(content)
        assert [await anext(found), len(sent)] == [b"one", 1]
        assert [await anext(found), len(sent)] == [b"two", 2]
        assert [await anext(found), len(sent)] == [b"three", 3]

    run(work())


# The loop.


def test_the_loop_lists_once_and_watches_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_SECONDS", 0.01)

    async def work() -> None:
        steps = (
            *(refusal(500), listing("7", a_pod(1)), lines(event("ADDED", a_pod(2, "8")))),
            *(refusal(500), lines(event("ADDED", a_pod(3, "9")))),
        )
        async with played(*steps) as play, running(play.watch.run()):
            await until(lambda: len(play.asked) == 6)
            assert play.kinds == ["list", "list", "watch 7", "watch 8", "watch 8", "watch 9"]
            assert play.sink.pods.keys() == {uid_of(1), uid_of(2), uid_of(3)}

    with caplog.at_level(logging.WARNING):
        run(work())
    assert len(caplog.records) == 2


def test_a_pause_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_SECONDS", 60.0)

    async def work() -> None:
        async with played(refusal(500)) as play, running(play.watch.run()):
            await until(lambda: play.asked)
            await asyncio.sleep(0.03)
            assert play.kinds == ["list"]

    run(work())


def test_an_answer_that_cannot_be_decoded_is_an_error_of_the_api() -> None:
    with pytest.raises(ApiError, match=r"^the API server's answer cannot be read: ") as caught:
        module._decode(module._lists, b"{")
    assert caught.value.status == 0
