"""Desired state from the API server: a list, then a watch, for ever.

    first page of a list ──> watch from there ──> watch on from the last version seen ...
       ^              └────> the other pages, meanwhile
       └─── 410: the version is too old to watch from

All pages are of the moment of the first one, whose version begins the watch: what changes while a large cluster is
listed is known at once, and a page does not bring back what the watch has told otherwise.

A watch ends often: the server ends it after some minutes, restarts, or is silent for so long that it must be gone.
Then it goes on from the last version that an event or a bookmark has named, without listing. Whatever else fails is
tried again after a jittered and growing pause, or after the one that the server asks for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import urllib.parse
from collections.abc import AsyncIterator, Set
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import aiohttp
import msgspec

from bpfrl.errors import ApiError, InvalidValueError
from bpfrl.master.api import Api
from bpfrl.master.backoff import Backoff
from bpfrl.master.observer import UNOBSERVED, Observer
from bpfrl.master.pods import Metadata, Pod, RawPod, read

log = logging.getLogger(__name__)

Decoded = TypeVar("Decoded")

_PODS: Final = "/api/v1/pods"
# Pods that no scheduler has placed yet have no cgroup anywhere.
_SCHEDULED: Final = "spec.nodeName!="
# client-go's page; the API server answers it in tens of milliseconds.
_PAGE: Final = 500
# As client-go: the server ends a watch after five to ten minutes, not all of them at once.
_WATCH_SECONDS: Final = 300
# A server that sends bookmarks does so once a minute: one that is silent for longer than two is gone.
_SILENCE_SECONDS: Final = 150.0
# Sooner than that the kernel knows of a connection that does not even acknowledge: after 30 s, as client-go.
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_CONNECT_SECONDS: Final = 10.0
_LIST_SECONDS: Final = 120.0
_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 30.0
# The API server asks for a second; what is in between may ask for anything.
_LONGEST_REQUESTED_SECONDS: Final = 120.0
# A watch that ends sooner than this, with nothing said, is no way to go on without a pause.
_SHORT_SECONDS: Final = 1.0
_GONE: Final = 410
_BOOKMARK: Final = "BOOKMARK"
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Sink(Protocol):
    """Whoever wants to know the pods."""

    def put(self, pod: Pod) -> None:
        """This pod is new, or has changed."""

    def keep(self, uids: Set[str], *, complete: bool = True) -> None:
        """All pods have been put, and have these UIDs; complete: and there are no others that could not be read."""

    def remove(self, uid: str) -> None:
        """The pod with this UID (the API's) is no more."""


class _ListMetadata(msgspec.Struct, rename={"resource_version": "resourceVersion", "more": "continue"}):
    resource_version: str = ""
    more: str = ""


# What has no items is no empty list, but some other answer: nobody's limit may go because of it.
class _PodList(msgspec.Struct):
    metadata: _ListMetadata
    items: list[RawPod] | None


class _AnyList(msgspec.Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Failure(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Page(NamedTuple):
    """Some of the pods that there were at one moment.

    Attributes:
        pods: those that can be read.
        unread: the UIDs of the others; an empty one for those whose UID cannot be read either.
        version: of this state.
        more: what to ask for the next page with; empty after the last.
    """

    pods: list[Pod]
    unread: Set[str]
    version: str
    more: str


_lists: Final = msgspec.json.Decoder(_PodList)
_any_lists: Final = msgspec.json.Decoder(_AnyList)
_events: Final = msgspec.json.Decoder(_Event)
_pods: Final = msgspec.json.Decoder(RawPod)
_failures: Final = msgspec.json.Decoder(_Failure)


async def list_pods(api: Api, namespace: str = "", labels: str = "") -> list[Pod]:
    """All scheduled pods.

    Args:
        api: the API server.
        namespace: only those of this one.
        labels: only those that have these labels, as a selector of the API server's.

    Raises:
        ApiError: no answer, or a refusal: of a malformed selector with the status 400.
    """
    return [pod async for page in _pages(api, namespace, labels) for pod in page.pods]


async def _pages(api: Api, namespace: str = "", labels: str = "") -> AsyncIterator[_Page]:
    """All scheduled pods as they were at one moment."""
    path = f"/api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/pods" if namespace else _PODS
    query = {"fieldSelector": _SCHEDULED, "limit": str(_PAGE)} | ({"labelSelector": labels} if labels else {})
    while True:
        timeout = aiohttp.ClientTimeout(total=_LIST_SECONDS, sock_connect=_CONNECT_SECONDS)
        async with api.request("GET", path, query, timeout=timeout) as response:
            page = _page(await response.read())
        yield page
        if not page.more:
            return
        query["continue"] = page.more


class PodWatch:
    """Keeps a sink told of every scheduled pod."""

    def __init__(self, api: Api, sink: Sink, observer: Observer = UNOBSERVED) -> None:
        self._api = api
        self._sink = sink
        self._observer = observer
        self._version = ""
        self._listing: asyncio.Task[None] | None = None
        self._told: set[str] = set()  # UIDs that the watch has told of while a list goes on
        self._backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)

    async def run(self) -> None:
        """List and watch until cancelled."""
        try:
            while True:
                pause = await self._turn()
                if pause:
                    await asyncio.sleep(pause)
        finally:
            await _end(self._listing)

    async def _turn(self) -> float:
        """One watch, after a list has begun if need be; returns how long to wait before the next, s."""
        try:
            if not self._version:
                await self._begin_list()
            started = asyncio.get_running_loop().time()
            said_something = await self._watch_and_list()
        except ApiError as error:
            self._observer.api_failed(error.status)
            if error.status == _GONE:
                log.info("listing all pods again: %s", error)
                self._version = ""
                # The first time at once; a server that expires everything is not to be asked without end.
                pause = self._backoff.delay()
                return pause if self._backoff.failures > 1 else 0.0
            pause = max(min(error.retry_after, _LONGEST_REQUESTED_SECONDS), self._backoff.delay())
            log.warning("%s; again in %.1f s", error, pause)
            return pause
        if not said_something and asyncio.get_running_loop().time() - started < _SHORT_SECONDS:
            return self._backoff.delay()
        return 0.0

    async def _begin_list(self) -> None:
        """Take the first page, and leave the others to a task."""
        await _end(self._listing)
        self._told = set()
        pages = _pages(self._api)
        first = await anext(pages)
        self._listing = asyncio.create_task(self._list(first, pages))
        self._version = first.version
        log.info("watching pods from version %s", first.version)

    async def _list(self, first: _Page, pages: AsyncIterator[_Page]) -> None:
        """Tell the sink of all pods, a page at a time so that others come in between."""
        uids, unread = self._put_all(first), set(first.unread)
        async for page in pages:
            uids |= self._put_all(page)
            unread |= page.unread
        # A pod that can be read no more stays as it was.
        self._sink.keep(uids | unread | self._told, complete=not unread)
        self._observer.listed()
        log.info("%d pods listed", len(uids))

    def _put_all(self, page: _Page) -> set[str]:
        for pod in page.pods:
            if pod.uid not in self._told:
                self._sink.put(pod)
        return {pod.uid for pod in page.pods}

    async def _watch_and_list(self) -> bool:
        """:meth:`_watch`, which ends when the list that goes on meanwhile fails."""
        watching = asyncio.create_task(self._watch())
        try:
            if self._listing:
                await asyncio.wait({watching, self._listing}, return_when=asyncio.FIRST_COMPLETED)
                if self._listing.done():
                    listing, self._listing = self._listing, None
                    if listing.exception():
                        self._version = ""
                    listing.result()
            return await watching
        finally:
            await _end(watching)

    async def _watch(self) -> bool:
        """Tell the sink of changes until the server ends the watch; False if there was nothing at all."""
        query = {
            "watch": "true",
            "fieldSelector": _SCHEDULED,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(_WATCH_SECONDS, 2 * _WATCH_SECONDS)),  # noqa: S311 - no secret
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        said_something = False
        async with self._api.request("GET", _PODS, query, timeout=timeout) as response:
            _keep_alive(response)
            self._observer.watching()
            async for line in _lines(response.content):
                self._apply(_decode(_events, line))
                self._observer.heard()
                said_something = True
                if not self._listing:
                    self._backoff.reset()
        return said_something

    def _apply(self, event: _Event) -> None:
        if event.type == "ERROR":
            failure = _decode(_failures, event.object)
            raise ApiError(f"the API server ends the watch: {failure.message or failure.code}", failure.code)
        try:
            raw = _pods.decode(event.object)
        except _UNREADABLE as error:
            raw = _rest_of(event.object, error)
            if not raw.metadata.uid:
                raise _unreadable(error) from error  # nobody's event: it is asked for again
            if event.type != "DELETED":  # it stays as it was
                self._version = raw.metadata.resource_version or self._version
                return
        if self._listing and event.type != _BOOKMARK:
            self._told.add(raw.metadata.uid)
        if event.type in ("ADDED", "MODIFIED"):
            if pod := _read(raw):
                self._sink.put(pod)
        elif event.type == "DELETED":
            self._sink.remove(raw.metadata.uid)
        # Only now: what raises above is asked for again.
        self._version = raw.metadata.resource_version or self._version


async def _end(task: asyncio.Task[Any] | None) -> None:
    if task:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _page(text: bytes) -> _Page:
    """A page of pods; those that cannot be read take none with them."""
    unread = set()
    try:
        page = _lists.decode(text)
        metadata, items = page.metadata, page.items or []
    except _UNREADABLE:
        anything = _decode(_any_lists, text)
        metadata, items = anything.metadata, []
        for each in anything.items or []:
            try:
                items.append(_pods.decode(each))
            except _UNREADABLE as error:
                unread.add(_rest_of(each, error).metadata.uid)
    return _Page([pod for raw in items if (pod := _read(raw))], unread, metadata.resource_version, metadata.more)


def _rest_of(text: msgspec.Raw, error: Exception) -> RawPod:
    """What can be read of a pod's metadata where the pod cannot, and that is told."""
    try:
        document = msgspec.json.decode(text)
    except _UNREADABLE:
        document = None
    metadata = document.get("metadata") if isinstance(document, dict) else None
    fields = metadata if isinstance(metadata, dict) else {}
    uid, namespace, name, version = (
        value if isinstance(value := fields.get(key), str) else ""
        for key in ("uid", "namespace", "name", "resourceVersion")
    )
    rest = Metadata(uid=uid, namespace=namespace, name=name, resource_version=version)
    log.warning("pod %s/%s is left out: %s", rest.namespace, rest.name, error)
    return RawPod(rest)


def _decode(decoder: msgspec.json.Decoder[Decoded], text: bytes | msgspec.Raw) -> Decoded:
    try:
        return decoder.decode(text)
    except _UNREADABLE as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ApiError:
    return ApiError(f"the API server's answer cannot be read: {error}")


def _read(raw: RawPod) -> Pod | None:
    """A pod, unless it is one that cannot be: it is left out, and the others are not."""
    try:
        return read(raw)
    except InvalidValueError as error:
        log.warning("pod %s/%s is left out: %s", raw.metadata.namespace, raw.metadata.name, error)
        return None


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel see that a silent connection is dead: a gateway in between may have forgotten it."""
    transport = response.connection.transport if response.connection else None
    if transport and (connected := transport.get_extra_info("socket")):
        for level, option, value in _KEEPALIVE:
            connected.setsockopt(level, option, value)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a stream, however long: a pod may have a megabyte."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
