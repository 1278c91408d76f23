"""Desired state from the API server: a list, then a watch, for ever.

    list, in pages ──> watch from there ──> watch on from the last version seen ...
          ^                    │
          └─── 410: the version is too old to watch from

A watch ends often: the server ends it after some minutes, restarts, or is silent for so long that it must be gone.
Then it goes on from the last version that an event or a bookmark has named, without listing. Whatever else fails is
tried again after a jittered and growing pause, or after the one that the server asks for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import urllib.parse
from collections.abc import AsyncIterator
from typing import Final, NamedTuple, Protocol, TypeVar

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
_CONNECT_SECONDS: Final = 10.0
_LIST_SECONDS: Final = 120.0
_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 30.0
# The API server asks for a second; what is in between may ask for anything.
_LONGEST_REQUESTED_SECONDS: Final = 120.0
# A watch that ends sooner than this, with nothing said, is no way to go on without a pause.
_SHORT_SECONDS: Final = 1.0
_GONE: Final = 410
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Sink(Protocol):
    """Whoever wants to know the pods."""

    def replace(self, pods: list[Pod], *, complete: bool = True) -> None:
        """These are all pods; complete: and there are no others that could not be read."""

    def put(self, pod: Pod) -> None:
        """This pod is new, or has changed."""

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


class Listing(NamedTuple):
    """All scheduled pods at once.

    Attributes:
        pods: those that can be read.
        version: of this state.
        complete: there are no others.
    """

    pods: list[Pod]
    version: str
    complete: bool


_lists: Final = msgspec.json.Decoder(_PodList)
_any_lists: Final = msgspec.json.Decoder(_AnyList)
_events: Final = msgspec.json.Decoder(_Event)
_pods: Final = msgspec.json.Decoder(RawPod)
_failures: Final = msgspec.json.Decoder(_Failure)


async def list_pods(api: Api, namespace: str = "", labels: str = "") -> Listing:
    """All scheduled pods, in pages.

    Args:
        api: the API server.
        namespace: only those of this one.
        labels: only those that have these labels, as a selector of the API server's.

    Raises:
        ApiError: no answer, or a refusal: of a malformed selector with the status 400.
    """
    path = f"/api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/pods" if namespace else _PODS
    query = {"fieldSelector": _SCHEDULED, "limit": str(_PAGE)} | ({"labelSelector": labels} if labels else {})
    pods: list[Pod] = []
    complete = True
    while True:
        timeout = aiohttp.ClientTimeout(total=_LIST_SECONDS, sock_connect=_CONNECT_SECONDS)
        async with api.request("GET", path, query, timeout=timeout) as response:
            metadata, items, whole = _page(await response.read())
        pods.extend(pod for raw in items if (pod := _read(raw)))
        complete = complete and whole
        if not metadata.more:
            return Listing(pods, metadata.resource_version, complete)
        query["continue"] = metadata.more


class PodWatch:
    """Keeps a sink told of every scheduled pod."""

    def __init__(self, api: Api, sink: Sink, observer: Observer = UNOBSERVED) -> None:
        self._api = api
        self._sink = sink
        self._observer = observer
        self._version = ""
        self._backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)

    async def run(self) -> None:
        """List and watch until cancelled."""
        while True:
            pause = await self._turn()
            if pause:
                await asyncio.sleep(pause)

    async def _turn(self) -> float:
        """One list or one watch; returns how long to wait before the next, s."""
        try:
            if not self._version:
                found = await list_pods(self._api)
                self._version = found.version
                self._sink.replace(found.pods, complete=found.complete)
                self._observer.listed()
                log.info("watching pods from version %s", self._version)
            started = asyncio.get_running_loop().time()
            said_something = await self._watch()
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
            self._observer.watching()
            async for line in _lines(response.content):
                self._apply(_decode(_events, line))
                self._observer.heard()
                said_something = True
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
        if event.type in ("ADDED", "MODIFIED"):
            if pod := _read(raw):
                self._sink.put(pod)
        elif event.type == "DELETED":
            self._sink.remove(raw.metadata.uid)
        # Only now: what raises above is asked for again.
        self._version = raw.metadata.resource_version or self._version


def _page(text: bytes) -> tuple[_ListMetadata, list[RawPod], bool]:
    """A page of pods, and whether all of them are such: the others are left out, and take none with them."""
    try:
        page = _lists.decode(text)
    except _UNREADABLE:
        anything = _decode(_any_lists, text)
    else:
        return page.metadata, page.items or [], True
    found, items = [], anything.items or []
    for each in items:
        try:
            found.append(_pods.decode(each))
        except _UNREADABLE as error:
            _rest_of(each, error)
    return anything.metadata, found, len(found) == len(items)


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


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a stream, however long: a pod may have a megabyte."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
