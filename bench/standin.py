"""A stand-in for kube-apiserver: ``python -m bench.standin --help``.

It serves pods, events and leases as kube-apiserver 1.20 and newer do, as far as a controller can tell: one version for
everything, paged lists of one moment, watches that go on where a list ended, refusals with a Status. The end-to-end
tests hold it and the real server to the same assertions. It does not check what objects say, fill in defaults, or track
who manages a field; namespaces exist when they are named; and a deleted object is gone at once, without a grace period.

The way of a change: a handler makes the new object and hands it to the :class:`Store`, which writes it to the journal,
puts it in its :class:`Table` and wakes the watches; only then is the request answered. The table remembers its last
changes with what was there before them. From that come the lists of an earlier moment, and what a :class:`Watch` has
still to send: it holds nothing but the version that it has come to, so a slow reader costs nothing.

The journal has a line for each change, ``{"version": 7, "resource": "pods", "key": "default/web", "body": {...}}``,
without a body where the object was deleted, and ``{"version": 7}`` for a compaction. Reading it again makes the same
state and the same history.

What it adds to the real server is ``/faults``. A GET counts the requests by resource and verb; those that a fault has
answered are `refused`, and `watching` is how many watches are open. A POST makes it fail:

    {"status": {"code": 429, "retryAfter": 1, "count": 5, "path": "/api/v1/pods", "verb": "list"}}
        answers that many of the requests under a path, and of a verb if one is given, with this code
    {"stall": true}     watches send nothing, nor do they end, until {"stall": false}
    {"drop": true}      closes the connections of all watches without a word
    {"garbage": true}   sends a line that is no JSON to all watches
    {"compact": true}   forgets all history, and tells all watches that they are too old
    {"truncate": true}  breaks off the answers to lists of all pods half-way, until {"truncate": false}
    {"trickle": 4096}   sends so many bytes a second of such lists, and of what watches send, until {"trickle": 0}
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime as dt
import secrets
import signal
import ssl
import string
import sys
import uuid
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec
from aiohttp import web

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PATCHES: Final = ("application/merge-patch+json", "application/strategic-merge-patch+json")
_TRUE: Final = ("1", "true")
# The longest that a watch lasts if the client does not say, as in kube-apiserver.
_WATCH_SECONDS: Final = 1800
# etcd takes no larger object; a pod is a few KiB.
_MAX_BODY: Final = 2**21
# So many events go into one write: enough to be fast, few enough to let others in between.
_BATCH: Final = 500
_SHUTDOWN_SECONDS: Final = 1.0
_SUFFIX_LENGTH: Final = 5
_NULL: Final = msgspec.Raw(b"null")
# What a trickle comes in.
_PIECE: Final = 256
_ALL_PODS: Final = "/api/v1/pods"
_GARBAGE: Final = b"this is not JSON\n"
_REASONS: Final = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class StatusError(Exception):
    """A request that is refused, with what its Status says."""

    def __init__(self, code: int, reason: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.status: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            **({} if retry_after is None else {"details": {"retryAfterSeconds": retry_after}}),
            "code": code,
        }

    def response(self) -> web.Response:
        """The answer that tells the client."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return _json(self.status, self.code, headers)


@dataclass(frozen=True)
class Kind:
    """A resource and what is peculiar to it.

    Attributes:
        resource: its name in paths.
        name: its name in objects.
        group_version: its API group and version.
        selectable: the fields that a selector may name besides the name and namespace.
        has_status: whether the status is a part of its own, written through its own path.
        replace_creates: whether a PUT makes an object that is not there.
        needs_version: whether a PUT must say which version it replaces.
    """

    resource: str
    name: str
    group_version: str
    selectable: tuple[str, ...] = ()
    has_status: bool = False
    replace_creates: bool = False
    needs_version: bool = False

    @property
    def prefix(self) -> str:
        """Where its paths begin."""
        return f"/{'apis' if '/' in self.group_version else 'api'}/{self.group_version}"

    @cached_property
    def head(self) -> bytes:
        """What every object begins with, up to its first field."""
        return f'{{"kind":"{self.name}","apiVersion":"{self.group_version}",'.encode()

    @cached_property
    def fields(self) -> dict[str, tuple[str, ...]]:
        """The ways to the selectable fields."""
        return {field: tuple(field.split(".")) for field in ("metadata.name", "metadata.namespace", *self.selectable)}


KINDS: Final = (
    Kind(
        "pods",
        "Pod",
        "v1",
        ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "status.phase", "status.podIP"),
        has_status=True,
    ),
    Kind(
        "events",
        "Event",
        "v1",
        (
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "reason",
            "type",
        ),
        replace_creates=True,
    ),
    Kind("leases", "Lease", "coordination.k8s.io/v1", replace_creates=True, needs_version=True),
)


class Stored(NamedTuple):
    """An object as it was written at a version.

    Attributes:
        body: its JSON without kind and apiVersion, which lists leave out of their items.
        fields: its selectable fields; what it does not have is empty.
        labels: its labels.
    """

    body: bytes
    fields: Mapping[str, str]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, kind: Kind, body: bytes) -> Stored:
        """Find in an object what selectors ask for."""
        content = msgspec.json.decode(body)
        fields = {field: _look_up(content, way) for field, way in kind.fields.items()}
        return cls(body, fields, content["metadata"].get("labels") or {})

    def content(self) -> Json:
        """The object, for changing it."""
        content: Json = msgspec.json.decode(self.body)
        return content

    def at(self, version: int) -> Stored:
        """The same object under another version."""
        content = self.content()
        content["metadata"]["resourceVersion"] = str(version)
        return self._replace(body=msgspec.json.encode(content))


class Selector:
    """A field and a label selector: which objects a list or a watch is about."""

    def __init__(self, kind: Kind, namespace: str | None, fields: str, labels: str) -> None:
        self._fields = list(_terms(fields))
        self._labels = list(_terms(labels))
        for field, _, _ in self._fields:
            if field not in kind.fields:
                raise StatusError(400, "BadRequest", f"{kind.resource} cannot be selected by the field {field}")
        self.everything = not self._fields and not self._labels
        self.namespace = namespace

    def selects(self, stored: Stored | None) -> bool:
        """Whether an object is there, and one of those."""
        return (
            stored is not None
            and (self.namespace is None or stored.fields["metadata.namespace"] == self.namespace)
            and all((stored.fields[name] == value) is wanted for name, wanted, value in self._fields)
            and all((stored.labels.get(name) == value) is wanted for name, wanted, value in self._labels)
        )


def _terms(text: str) -> Iterable[tuple[str, bool, str]]:
    """The terms of `a=b,c!=d`: name, whether it is to be equal, and value."""
    for term in filter(None, text.split(",")):
        name, equals, value = term.partition("=")
        if not equals:
            raise StatusError(400, "BadRequest", f"the selector '{term}' compares nothing")
        yield name.removesuffix("!"), not name.endswith("!"), value.removeprefix("=")


@dataclass(frozen=True)
class Change:
    """What one write has done: the object of a key before and after it, None where there is none."""

    kind: Kind
    key: str
    version: int
    old: Stored | None
    new: Stored | None

    def line(self, selector: Selector) -> bytes | None:
        """What a watch with this selector sends: an object that leaves the selection is deleted for it."""
        before, after = selector.selects(self.old), selector.selects(self.new)
        if after:
            return self._modified if before else self._added
        return self._deleted if before else None

    # One change goes to many watches: each of its lines is made once, if it is wanted.

    @cached_property
    def _added(self) -> bytes:
        return _line(self.kind, "ADDED", self.new)

    @cached_property
    def _modified(self) -> bytes:
        return _line(self.kind, "MODIFIED", self.new)

    @cached_property
    def _deleted(self) -> bytes:
        return _line(self.kind, "DELETED", self.old and self.old.at(self.version))


def _line(kind: Kind, event: str, stored: Stored | None) -> bytes:
    body = stored.body if stored else b"{}"
    return b'{"type":"%s","object":%s%s}\n' % (event.encode(), kind.head, body[1:])


class Page(NamedTuple):
    """A part of a list: its objects, the last key looked at if there are more, and how many more if that is known."""

    items: list[Stored]
    last: str | None
    remaining: int | None


class Table:
    """All objects of a kind, and the last changes to them.

    Attributes:
        kind: which kind.
        objects: the objects by namespace and name.
        floor: the oldest version after which all changes are known.
        watches: the open watches.
    """

    def __init__(self, kind: Kind, history: int) -> None:
        self.kind = kind
        self.objects: dict[str, Stored] = {}
        self.floor = 0
        self.watches: set[Watch] = set()
        self._keys: list[str] = []
        self._history = history
        self._changes: list[Change] = []

    def apply(self, key: str, version: int, new: Stored | None) -> None:
        """Put an object in place of the one of this key, or remove it."""
        old = self.objects.get(key)
        if new is None:
            del self.objects[key]
            del self._keys[bisect_left(self._keys, key)]
        else:
            self.objects[key] = new
            if old is None:
                # This moves memory, 8 byte an object: 20 us among 150,000.
                insort(self._keys, key)
        self._remember(Change(self.kind, key, version, old, new))

    def _remember(self, change: Change) -> None:
        self._changes.append(change)
        excess = len(self._changes) - self._history
        if excess > 0:
            self.floor = self._changes[excess - 1].version
        # Not one by one, which would move all of them every time.
        if excess > self._history:
            del self._changes[:excess]

    def forget(self, version: int) -> None:
        """Drop the history up to a version."""
        self.floor = version
        self._changes.clear()

    def since(self, version: int) -> Sequence[Change]:
        """The changes after a version that is not below the floor."""
        return self._changes[bisect_right(self._changes, version, key=attrgetter("version")) :]

    def page(self, selector: Selector, version: int, after: str, limit: int) -> Page:
        """A part of the list as it was at a version.

        Args:
            selector: which objects are wanted.
            version: the moment, not below the floor.
            after: the key behind which the part begins.
            limit: how many objects it has at most, 0 for all.
        """
        first, end = (f"{selector.namespace}/", f"{selector.namespace}0") if selector.namespace else ("", "\U0010ffff")
        # The first change after the version tells what was there at it, and is the last to be written here.
        past = {change.key: change.old for change in reversed(self.since(version))}
        start = bisect_right(self._keys, max(first, after))
        keys = self._keys[start : bisect_left(self._keys, end)]
        gone = [key for key in past if key not in self.objects and max(first, after) < key < end]
        if gone:
            keys = sorted(keys + gone)
        items: list[Stored] = []
        last = ""
        for number, key in enumerate(keys):
            stored = past[key] if key in past else self.objects[key]
            if stored is None or not selector.selects(stored):
                continue
            if limit and len(items) == limit:
                unborn = sum(old is None and last < key < end for key, old in past.items())
                return Page(items, last, len(keys) - number - unborn if selector.everything else None)
            items.append(stored)
            last = key
        return Page(items, None, None)


class _Record(msgspec.Struct, omit_defaults=True):
    """A line of the journal; without a resource it is a compaction."""

    version: int
    resource: str = ""
    key: str = ""
    body: msgspec.Raw = _NULL


class Store:
    """Every table, the version that they share, and the journal that they outlive the process in."""

    def __init__(self, journal: Path, history: int) -> None:
        self.version = 0
        self.tables = {kind.resource: Table(kind, history) for kind in KINDS}
        journal.touch()
        self._load(journal)
        self._journal = journal.open("ab", buffering=0)

    def _load(self, journal: Path) -> None:
        decoder = msgspec.json.Decoder(_Record)
        with journal.open("rb+") as lines:
            whole = 0
            for line in lines:
                # A process that was killed while it wrote has acknowledged nothing of that line.
                if not line.endswith(b"\n"):
                    lines.truncate(whole)
                    break
                whole += len(line)
                self._apply(decoder.decode(line))

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def put(self, table: Table, key: str, content: Json) -> Stored:
        """Write an object under the next version, which is written into it, and return it."""
        version = self.version + 1
        content["metadata"]["resourceVersion"] = str(version)
        body = {name: value for name, value in content.items() if name not in {"kind", "apiVersion"}}
        self._commit(_Record(version, table.kind.resource, key, msgspec.Raw(msgspec.json.encode(body))))
        return table.objects[key]

    def remove(self, table: Table, key: str) -> None:
        """Delete an object."""
        self._commit(_Record(self.version + 1, table.kind.resource, key))

    def compact(self) -> None:
        """Forget all history."""
        self._commit(_Record(self.version))

    def _commit(self, record: _Record) -> None:
        # The kernel has it when this returns, and keeps it whatever becomes of this process.
        self._journal.write(msgspec.json.encode(record) + b"\n")
        self._apply(record)

    def _apply(self, record: _Record) -> None:
        self.version = record.version
        if not record.resource:
            for table in self.tables.values():
                table.forget(record.version)
            return
        table = self.tables[record.resource]
        new = None if record.body == _NULL else Stored.of(table.kind, bytes(record.body))
        table.apply(record.key, record.version, new)
        for watch in table.watches:
            watch.wake.set()


class _Span(NamedTuple):
    """From when to when, in the event loop's seconds."""

    start: float
    end: float


class Watch:
    """An open watch: how far it has come, and what it has to send next.

    Attributes:
        wake: set when there may be something to send.
        stalled: whether it keeps silent.
        expired: whether it is to be told that it is too old.
        closing: whether it is to end now.
        ended: whether its last line is out.
        unsent: lines to be sent before the next event.
    """

    def __init__(
        self, store: Store, table: Table, selector: Selector, version: int, span: _Span, bookmarks: float | None
    ) -> None:
        self.wake = asyncio.Event()
        self.stalled = self.expired = self.closing = self.ended = False
        self.unsent: list[bytes] = []
        self._store = store
        self._table = table
        self._selector = selector
        self._version = version
        self._span = span
        self._interval = bookmarks
        self._bookmark_at = span.end if bookmarks is None else span.start + bookmarks

    def start_with_state(self) -> None:
        """Begin with the objects that are there now."""
        page = self._table.page(self._selector, self._store.version, "", 0)
        self.unsent = [_line(self._table.kind, "ADDED", stored) for stored in page.items]
        self._version = self._store.version

    def due(self, now: float) -> list[bytes]:
        """The lines that are to be sent at this moment."""
        if self.stalled and not self.closing:
            return []
        lines, self.unsent = self.unsent, []
        if self.expired or self._version < self._table.floor:
            self.ended = True
            return [*lines, self._too_old()]
        changes = self._table.since(self._version)
        if changes:
            self._version = changes[-1].version
            lines.extend(line for change in changes if (line := change.line(self._selector)))
        self.ended = self.closing or now >= self._span.end
        if self._interval is not None and (self.ended or now >= self._bookmark_at):
            lines.append(self._bookmark())
            self._bookmark_at = now + self._interval
        return lines

    def patience(self, now: float) -> float | None:
        """How long it may wait for events, s; None for as long as it takes."""
        if self.stalled:
            return None
        return max(0.0, min(self._span.end, self._bookmark_at) - now)

    def _bookmark(self) -> bytes:
        metadata = {"resourceVersion": str(self._store.version), "creationTimestamp": None}
        return b'{"type":"BOOKMARK","object":%s"metadata":%s}}\n' % (
            self._table.kind.head,
            msgspec.json.encode(metadata),
        )

    def _too_old(self) -> bytes:
        failure = _expired(self._version, self._table.floor)
        return b'{"type":"ERROR","object":%s}\n' % msgspec.json.encode(failure.status)


def _expired(version: int, floor: int) -> StatusError:
    return StatusError(410, "Expired", f"version {version} is too old: changes are known from {floor} on")


@dataclass
class Refusal:
    """A fault: so many more requests are answered with an error."""

    code: int
    retry_after: int | None
    count: int
    path: str
    verb: str | None

    def meets(self, request: web.Request, verb: str) -> bool:
        """Whether a request is one of those."""
        return self.count > 0 and request.path.startswith(self.path) and self.verb in {None, verb}


class Server:
    """The HTTP side: authentication, counting, and faults; :class:`Collection` has the rest."""

    def __init__(self, store: Store, token: str, bookmark_interval: float) -> None:
        self.store = store
        self.bookmark_interval = bookmark_interval
        self.stalled = False
        self.trickle = 0
        self._truncated = False
        self._authorization = f"Bearer {token}"
        self._refusal: Refusal | None = None
        self._counters: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._connections: dict[Watch, asyncio.BaseTransport] = {}

    def application(self) -> web.Application:
        """Everything that is served."""
        application = web.Application(middlewares=[self._answer_failures], client_max_size=_MAX_BODY)
        router = application.router
        router.add_get("/readyz", _ready)
        router.add_get("/version", _version)
        router.add_get("/faults", self._report)
        router.add_post("/faults", self._set_faults)
        for table in self.store.tables.values():
            for method, path, resource, verb, handler in Collection(self, table).routes():
                router.add_route(method, path, self._counted(resource, verb, handler))
        return application

    def close(self) -> None:
        """End all watches."""
        for watch in self._connections:
            watch.closing = True
            watch.wake.set()

    @web.middleware
    async def _answer_failures(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._authenticate(request)
            return await handler(request)
        except StatusError as failure:
            return failure.response()
        except web.HTTPException as error:
            return StatusError(
                error.status, error.reason.replace(" ", ""), f"{request.path}: {error.reason}"
            ).response()

    def _authenticate(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != self._authorization:
            raise StatusError(401, "Unauthorized", "this is not the token")

    def _counted(self, resource: str, verb: str, handler: Handler) -> Handler:
        async def serve(request: web.Request) -> web.StreamResponse:
            actual = "watch" if verb == "list" and _watches(request) else verb
            refusal = self._refusal
            if refusal and refusal.meets(request, actual):
                refusal.count -= 1
                self._counters[resource]["refused"] += 1
                reason = _REASONS.get(refusal.code, "Unknown")
                raise StatusError(refusal.code, reason, "a fault that was asked for", refusal.retry_after)
            self._counters[resource][actual] += 1
            answer = await handler(request)
            if actual == "list" and request.path == _ALL_PODS and isinstance(answer, web.Response):
                return await self._hindered(request, answer)
            return answer

        return serve

    async def _hindered(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        """Send an answer slowly, or only half of it, where a fault wants that."""
        body = answer.body
        if not (self.trickle or self._truncated) or not isinstance(body, bytes):
            return answer
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
        with suppress(ConnectionError):
            await response.prepare(request)
            await self.send(response, body[: len(body) // 2] if self._truncated else body)
            if self._truncated and request.transport:
                request.transport.close()
            else:
                await response.write_eof()
        return response

    async def send(self, response: web.StreamResponse, content: bytes) -> None:
        """Send a part of an answer, as fast as a fault lets it."""
        for start in range(0, len(content), _PIECE):
            if self.trickle:
                await asyncio.sleep(_PIECE / self.trickle)
                await response.write(content[start : start + _PIECE])
            else:
                await response.write(content[start:])
                return

    async def serve(self, request: web.Request, watch: Watch, table: Table) -> web.StreamResponse:
        """Send a watch's events until it has ended or the client is gone."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        watch.stalled = self.stalled
        table.watches.add(watch)
        if request.transport:
            self._connections[watch] = request.transport
        try:
            with suppress(ConnectionError):
                await response.prepare(request)
                await self._send_events(watch, response)
                await response.write_eof()
        finally:
            table.watches.discard(watch)
            self._connections.pop(watch, None)
        return response

    async def _send_events(self, watch: Watch, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        while True:
            lines = watch.due(loop.time())
            for start in range(0, len(lines), _BATCH):
                await self.send(response, b"".join(lines[start : start + _BATCH]))
            if watch.ended:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(watch.patience(loop.time())):
                    await watch.wake.wait()
            watch.wake.clear()

    async def _report(self, _request: web.Request) -> web.Response:
        watching = {table.kind.resource: len(table.watches) for table in self.store.tables.values()}
        names = {*watching, *self._counters}
        return _json({name: {**self._counters[name], "watching": watching.get(name, 0)} for name in names})

    async def _set_faults(self, request: web.Request) -> web.Response:
        faults = await _body(request)
        if "status" in faults:
            self._refusal = _refusal(faults["status"])
        if "stall" in faults:
            self.stalled = bool(faults["stall"])
        self._truncated = bool(faults.get("truncate", self._truncated))
        self.trickle = int(faults.get("trickle", self.trickle))
        if faults.get("compact"):
            self.store.compact()
        for watch, transport in self._connections.items():
            watch.stalled = self.stalled
            watch.expired |= bool(faults.get("compact"))
            if faults.get("garbage"):
                watch.unsent.append(_GARBAGE)
            if faults.get("drop") and isinstance(transport, asyncio.WriteTransport):
                transport.abort()
            watch.wake.set()
        return _json({})


class Collection:
    """The requests for one resource."""

    def __init__(self, server: Server, table: Table) -> None:
        self._server = server
        self._store = server.store
        self._table = table
        self._kind = table.kind

    def routes(self) -> Iterable[tuple[str, str, str, str, Handler]]:
        """Every request: method, path, resource and verb, and what answers it."""
        resource = self._kind.resource
        all_of_them = f"{self._kind.prefix}/{resource}"
        collection = f"{self._kind.prefix}/namespaces/{{namespace}}/{resource}"
        item = f"{collection}/{{name}}"
        yield "GET", all_of_them, resource, "list", self._list
        yield "GET", collection, resource, "list", self._list
        yield "POST", collection, resource, "create", self._create
        yield "GET", item, resource, "get", self._get
        yield "PUT", item, resource, "update", self._replace
        yield "PATCH", item, resource, "patch", self._patch
        yield "DELETE", item, resource, "delete", self._delete
        if self._kind.has_status:
            status, binding = f"{resource}/status", f"{resource}/binding"
            yield "GET", f"{item}/status", status, "get", self._get
            yield "PUT", f"{item}/status", status, "update", self._replace
            yield "PATCH", f"{item}/status", status, "patch", self._patch
            yield "POST", f"{item}/binding", binding, "create", self._bind

    async def _list(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        selector = Selector(
            self._kind,
            request.match_info.get("namespace"),
            query.get("fieldSelector", ""),
            query.get("labelSelector", ""),
        )
        if _watches(request):
            return await self._watch(request, selector)
        wanted = _number(request, "resourceVersion", 0)
        if wanted > self._store.version:
            text = f"Too large resource version: {wanted}, current: {self._store.version}"
            raise StatusError(504, "Timeout", text, retry_after=1)
        version, after = self._store.version, ""
        if token := query.get("continue"):
            version, after = _read_token(token)
            if version < self._table.floor:
                raise _expired(version, self._table.floor)
        # Answers from memory, which this asks for, are not paged by the real one either.
        limit = 0 if query.get("resourceVersion") == "0" else _number(request, "limit", 0)
        page = self._table.page(selector, version, after, limit)
        metadata: Json = {"resourceVersion": str(version)}
        if page.last is not None:
            metadata["continue"] = _token(version, page.last)
            if page.remaining is not None:
                metadata["remainingItemCount"] = page.remaining
        items = b",".join(stored.body for stored in page.items)
        head = self._kind.head.replace(self._kind.name.encode(), f"{self._kind.name}List".encode())
        return _encoded(b'%s"metadata":%s,"items":[%s]}\n' % (head, msgspec.json.encode(metadata), items))

    async def _watch(self, request: web.Request, selector: Selector) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        span = _Span(now, now + (_number(request, "timeoutSeconds", 0) or _WATCH_SECONDS))
        bookmarks = self._server.bookmark_interval if request.query.get("allowWatchBookmarks") in _TRUE else None
        version = _number(request, "resourceVersion", 0)
        watch = Watch(self._store, self._table, selector, version, span, bookmarks)
        if not version:
            watch.start_with_state()
        return await self._server.serve(request, watch, self._table)

    async def _get(self, request: web.Request) -> web.Response:
        return self._answer(self._existing(_key(request)))

    async def _create(self, request: web.Request) -> web.Response:
        return self._make(request.match_info["namespace"], await _body(request))

    def _make(self, namespace: str, content: Json) -> web.Response:
        metadata = _metadata(content)
        if metadata.get("resourceVersion"):
            raise StatusError(500, "", "resourceVersion should not be set on objects to be created")
        if metadata.setdefault("namespace", namespace) != namespace:
            raise StatusError(400, "BadRequest", f"the object's namespace is not the path's, {namespace}")
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise StatusError(422, "Invalid", "metadata.name: there is neither name nor generateName")
            suffix = "".join(secrets.choice(string.ascii_lowercase) for _ in range(_SUFFIX_LENGTH))
            metadata["name"] = metadata["generateName"] + suffix
        key = f"{namespace}/{metadata['name']}"
        if key in self._table.objects:
            raise StatusError(409, "AlreadyExists", f'{self._kind.resource} "{metadata["name"]}" already exists')
        metadata["uid"] = metadata.get("uid") or str(uuid.uuid4())
        metadata["creationTimestamp"] = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if self._kind.has_status:
            content["status"] = {"phase": "Pending"}
        return self._answer(self._store.put(self._table, key, content), 201)

    async def _replace(self, request: web.Request) -> web.Response:
        key, new = _key(request), await _body(request)
        metadata = _metadata(new)
        if metadata.get("name") != request.match_info["name"]:
            raise StatusError(400, "BadRequest", "the object's name is not the path's")
        if self._kind.replace_creates and key not in self._table.objects:
            metadata.pop("resourceVersion", None)
            return self._make(request.match_info["namespace"], new)
        if self._kind.needs_version and not metadata.get("resourceVersion"):
            raise StatusError(422, "Invalid", "metadata.resourceVersion: an update has to say what it replaces")
        return self._revise(request, self._existing(key), new)

    async def _patch(self, request: web.Request) -> web.Response:
        if request.content_type not in _PATCHES:
            raise StatusError(415, "UnsupportedMediaType", f"patches are {' or '.join(_PATCHES)}")
        patch = await _body(request)
        old = self._existing(_key(request))
        return self._revise(request, old, _merged(old.content(), patch))

    def _revise(self, request: web.Request, stored: Stored, new: Json) -> web.Response:
        """Put a new version in place of an object, as far as the request's path and the real server let it."""
        old, name = stored.content(), request.match_info["name"]
        fixed, metadata = old["metadata"], _metadata(new)
        for field in ("resourceVersion", "uid"):
            if (metadata.get(field) or fixed[field]) != fixed[field]:
                text = f'{self._kind.resource} "{name}" has another {field}: get it again and change that'
                raise StatusError(409, "Conflict", text)
        for field in ("name", "namespace", "uid", "creationTimestamp", "resourceVersion"):
            metadata[field] = fixed[field]
        if self._kind.has_status:
            kept = "spec" if request.path.endswith("/status") else "status"
            new[kept] = old.get(kept)
            if _look_up(new, ("spec", "nodeName")) != _look_up(old, ("spec", "nodeName")):
                raise StatusError(422, "Invalid", "spec.nodeName: only a binding sets it")
        new = {field: value for field, value in new.items() if field not in {"kind", "apiVersion"}}
        # What changes nothing is no change: it has no version, and watches do not see it.
        return self._answer(stored if new == old else self._store.put(self._table, _key(request), new))

    async def _bind(self, request: web.Request) -> web.Response:
        target = _look_up(await _body(request), ("target", "name"))
        content = self._existing(_key(request)).content()
        if node := _look_up(content, ("spec", "nodeName")):
            raise StatusError(409, "Conflict", f'pod "{request.match_info["name"]}" is already on node "{node}"')
        content.setdefault("spec", {})["nodeName"] = target
        self._store.put(self._table, _key(request), content)
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}, 201)

    async def _delete(self, request: web.Request) -> web.Response:
        options = await _body(request) if request.can_read_body else {}
        stored = self._existing(_key(request))
        metadata = stored.content()["metadata"]
        for field, value in (options.get("preconditions") or {}).items():
            if value is not None and metadata.get(field) != value:
                raise StatusError(409, "Conflict", f"the object's {field} is {metadata.get(field)}, not {value}")
        self._store.remove(self._table, _key(request))
        return self._answer(stored)

    def _existing(self, key: str) -> Stored:
        stored = self._table.objects.get(key)
        if stored is None:
            raise StatusError(404, "NotFound", f'{self._kind.resource} "{key.partition("/")[2]}" not found')
        return stored

    def _answer(self, stored: Stored, code: int = 200) -> web.Response:
        return _encoded(self._kind.head + stored.body[1:] + b"\n", code)


def _watches(request: web.Request) -> bool:
    return request.query.get("watch") in _TRUE


def _key(request: web.Request) -> str:
    return f"{request.match_info['namespace']}/{request.match_info['name']}"


def _number(request: web.Request, parameter: str, default: int) -> int:
    text = request.query.get(parameter)
    if not text:
        return default
    if not text.isdecimal():
        raise StatusError(400, "BadRequest", f"{parameter}: '{text}' is no number")
    return int(text)


async def _body(request: web.Request) -> Json:
    try:
        content = msgspec.json.decode(await request.read())
    except msgspec.DecodeError as error:
        raise StatusError(400, "BadRequest", f"the body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise StatusError(400, "BadRequest", "the body is no object")
    return content


def _metadata(content: Json) -> Json:
    metadata: Json = content.setdefault("metadata", {})
    return metadata


def _look_up(content: Json, way: Sequence[str]) -> str:
    """The text at the end of a way through an object, empty if it ends before."""
    found: Any = content
    for step in way:
        found = (found or {}).get(step)
    return found or ""


def _merged(target: Any, patch: Any) -> Any:
    """A value after a merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result


def _refusal(fault: Json | None) -> Refusal | None:
    if fault is None:
        return None
    path, verb = fault.get("path", "/"), fault.get("verb")
    return Refusal(fault["code"], fault.get("retryAfter"), fault.get("count", 1), path, verb)


def _token(version: int, last: str) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([version, last])).decode()


def _read_token(token: str) -> tuple[int, str]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(token), type=tuple[int, str])
    except (binascii.Error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StatusError(400, "BadRequest", "this continue token is none of ours") from error


def _json(content: object, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return _encoded(msgspec.json.encode(content) + b"\n", code, headers)


def _encoded(body: bytes, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=code, headers=headers, content_type="application/json")


async def _version(_: web.Request) -> web.Response:
    return web.json_response({"major": "1", "minor": "20", "gitVersion": "v1.20.0-standin"})


async def _ready(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def run(server: Server, address: str, port: int, tls: ssl.SSLContext) -> None:
    """Serve until SIGTERM or SIGINT."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    # A watch whose client has gone has nothing to write that would tell it.
    runner = web.AppRunner(
        server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    await runner.setup()
    await web.TCPSite(runner, address, port, ssl_context=tls).start()
    print(f"listening on {address}:{port}", file=sys.stderr, flush=True)
    await ending.wait()
    server.close()
    await runner.cleanup()


_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--address", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option("--port", type=int, required=True, help="Listen on this TCP port.")
@click.option("--tls-cert", type=_FILE, required=True, help="Server certificate, PEM.")
@click.option("--tls-key", type=_FILE, required=True, help="The certificate's key, PEM.")
@click.option("--token", required=True, help="Bearer token that clients must send.")
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File that keeps all changes; it is made if it is missing, and read at the start.",
)
@click.option(
    "--history",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="How many changes of each resource watches may go back.",
)
@click.option(
    "--bookmark-interval",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds between the bookmarks of a watch that takes them.",
)
def main(
    address: str,
    port: int,
    tls_cert: Path,
    tls_key: Path,
    token: str,
    journal: Path,
    history: int,
    bookmark_interval: float,
) -> None:
    """Serve a stand-in for the Kubernetes API until SIGTERM."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tls_cert, tls_key)
    store = Store(journal, history)
    try:
        asyncio.run(run(Server(store, token, bookmark_interval), address, port, tls))
    finally:
        store.close()


if __name__ == "__main__":
    main()
