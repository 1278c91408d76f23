"""What the API server, or a folder of manifests, says of one pod, for people who ask why it is limited or not.

Unlike :mod:`.apiserver` this asks once, for one pod, and takes the words of its annotations along as they stand there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from bpfrl.errors import ApiError, ClusterError, InvalidValueError
from bpfrl.explanation import Event, Request, Wish
from bpfrl.master.annotations import BURST, EGRESS, INGRESS, RATE_LABEL
from bpfrl.master.api import Api
from bpfrl.master.events import COMPONENT
from bpfrl.master.pods import Pod, RawPod, Spec, read
from bpfrl.units import Rate, format_size, parse_size

Decoded = TypeVar("Decoded")

_PAGE: Final = 500
# Somebody waits for the answer.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=30, sock_connect=5)
_NOT_FOUND: Final = 404
_READERS: Final[dict[tuple[str, str], Callable[[str], str]]] = {
    ("annotation", EGRESS): lambda text: str(Rate.parse_quantity(text)),
    ("annotation", INGRESS): lambda text: str(Rate.parse_quantity(text)),
    ("annotation", BURST): lambda text: format_size(parse_size(text)),
    ("label", RATE_LABEL): lambda text: str(Rate.parse_quantity(text)),
}


class _Spec(Spec, rename="camel"):
    host_network: bool = False


class _Pod(RawPod):
    spec: _Spec = msgspec.field(default_factory=_Spec)


class _ListMetadata(msgspec.Struct, rename={"more": "continue"}):
    more: str = ""


class _Pods(msgspec.Struct):
    metadata: _ListMetadata
    items: list[_Pod] = []


class _Source(msgspec.Struct):
    component: str = ""


class _EventMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Event(msgspec.Struct, rename="camel"):
    metadata: _EventMetadata = msgspec.field(default_factory=_EventMetadata)
    last_timestamp: str | None = None
    type: str = ""
    reason: str = ""
    message: str = ""
    source: _Source = msgspec.field(default_factory=_Source)


class _Events(msgspec.Struct):
    items: list[_Event] = []


async def by_name(api: Api, namespace: str, name: str) -> Request | None:
    """What the API server says of the pod with this name; None where there is none.

    Raises:
        ApiError: the API server did not answer, or refused.
    """
    try:
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(name, safe='')}"
        async with api.request("GET", path, timeout=_TIMEOUT) as response:
            return await _request(api, _decoded(await response.read(), _Pod))
    except ApiError as error:
        if error.status == _NOT_FOUND:
            return None
        raise


async def by_uid(api: Api, uid: str) -> Request | None:
    """The same of the pod whose cgroup carries this UID: the API's own, or a static pod's hash.

    The API server selects pods by no UID: all of them are asked for, in pages, until it comes.

    Raises:
        ApiError: the API server did not answer, or refused.
    """
    query = {"limit": str(_PAGE)}
    while True:
        async with api.request("GET", "/api/v1/pods", query, timeout=_TIMEOUT) as response:
            page = _decoded(await response.read(), _Pods)
        for raw in page.items:
            if uid == raw.metadata.uid or uid in (raw.metadata.annotations or {}).values():
                request = await _request(api, raw)
                if uid in (request.uid, request.pod.uid):
                    return request
        if not page.metadata.more:
            return None
        query["continue"] = page.metadata.more


def wishes(raw: RawPod) -> tuple[Wish, ...]:
    """What stands in a pod's annotations and labels about its bandwidth, each value by itself."""
    values = {"annotation": raw.metadata.annotations or {}, "label": raw.metadata.labels or {}}
    found = []
    for (kind, key), meaning in _READERS.items():
        text = values[kind].get(key)
        if text is None:
            continue
        try:
            found.append(Wish(kind, key, text, meaning(text)))
        except InvalidValueError as error:
            found.append(Wish(kind, key, text, "", str(error)))
    return tuple(found)


def in_manifests(folder: Path, is_it: Callable[[Request], bool]) -> Request | None:
    """What a folder of manifests says of a pod; None where none of them does.

    Raises:
        ClusterError: the folder, or a file that may be the one, cannot be read.
    """
    from bpfrl.master.manifests import manifests, read_file  # noqa: PLC0415 - with what watches files

    problems = []
    try:
        for path in manifests(folder):
            try:
                found = [_described(raw, read(raw)) for raw in read_file(path)]
            except InvalidValueError as error:
                problems.append(f"{path}: {error}")
                continue
            for request in filter(is_it, found):
                return request
    except OSError as error:
        raise ClusterError(f"{folder}: {error.strerror}") from error
    if problems:
        raise ClusterError(problems[0])
    return None


async def _request(api: Api, raw: _Pod) -> Request:
    try:
        pod = read(raw)
    except InvalidValueError as error:
        raise ApiError(f"the API server's answer cannot be understood: {error}") from error
    events, no_events = await _events(api, pod)
    request = _described(raw, pod)
    return replace(request, host_network=raw.spec.host_network, events=events, no_events=no_events)


def _described(raw: RawPod, pod: Pod) -> Request:
    return Request(
        pod=pod.ref,
        uid=pod.uid,
        node=pod.node,
        address=pod.address,
        phase=raw.status.phase,
        wishes=wishes(raw),
        limits=pod.limits,
        problem=pod.problem,
        ended=pod.ended,
    )


async def _events(api: Api, pod: Pod) -> tuple[tuple[Event, ...], str]:
    """What bpfrl has told about a pod, or why that cannot be read: it is worth less than all the rest."""
    path, query = f"/api/v1/namespaces/{pod.ref.namespace}/events", {"fieldSelector": f"involvedObject.uid={pod.uid}"}
    try:
        async with api.request("GET", path, query, timeout=_TIMEOUT) as response:
            found = _decoded(await response.read(), _Events).items
    except ApiError as error:
        return (), str(error)
    told = [event for event in found if event.source.component == COMPONENT]
    told.sort(key=_when)
    return tuple(Event(each.last_timestamp or "", each.type, each.reason, each.message) for each in told), ""


def _when(event: _Event) -> tuple[str, int]:
    """Times are whole seconds; within one, the API server's versions say what came later."""
    version = event.metadata.resource_version
    return event.last_timestamp or "", int(version) if version.isdecimal() else 0


def _decoded(text: bytes, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the API server's answer cannot be read: {error}") from error
