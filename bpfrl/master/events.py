"""Telling people what has become of their pods' limits: Kubernetes Events, or the log where there is no API server.

What was told last about a pod is not told again for ten minutes, and what cannot be told is dropped: nothing waits for
it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from typing import Final, NamedTuple, TypeVar

from bpfrl.errors import ApiError
from bpfrl.master.api import Api
from bpfrl.master.observer import UNOBSERVED, Observer
from bpfrl.master.pods import Pod

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_REPEAT_SECONDS: Final = 600.0
_REMEMBERED: Final = 10_000
_QUEUE: Final = 2_000
_FLUSH_SECONDS: Final = 3.0
COMPONENT: Final = "bpfrl"
# A name of 253 characters at most, of which the digest takes 17 (apimachinery, DNS-1123 subdomain).
_LONGEST_NAME: Final = 236
_LONGEST_MESSAGE: Final = 1_000
_CONFLICT: Final = 409
_MERGE_PATCH: Final = "application/merge-patch+json"


class Reason(Enum):
    """What has become of a limit, and whether somebody has to do something."""

    LIMITED = ("BandwidthLimited", "Normal")
    UNLIMITED = ("BandwidthUnlimited", "Normal")
    INVALID = ("BandwidthLimitInvalid", "Warning")
    FAILED = ("BandwidthLimitFailed", "Warning")


class Report(NamedTuple):
    """One thing to tell."""

    pod: Pod
    reason: Reason
    message: str


class Recorder:
    """Tells each thing once, in the log and, where there is an API server, as an Event.

    Args:
        api: where Events go; None: the log is all there is.
        instance: which of several masters tells it.
        observer: who wants to know what has become of Events.
    """

    def __init__(self, api: Api | None, instance: str, observer: Observer = UNOBSERVED) -> None:
        self._api = api
        self._observer = observer
        self._instance = instance
        self._queue: asyncio.Queue[Report] = asyncio.Queue(_QUEUE)
        self._last: OrderedDict[str, tuple[Reason, str, float]] = OrderedDict()  # by the pod's UID
        self._counts: OrderedDict[str, int] = OrderedDict()  # by the Event's name

    def tell(self, pod: Pod, reason: Reason, message: str) -> None:
        """Tell it, unless that has been done a moment ago."""
        now = time.monotonic()
        last = self._last.get(pod.uid)
        if last and last[:2] == (reason, message) and now - last[2] < _REPEAT_SECONDS:
            return
        _remember(self._last, pod.uid, (reason, message, now))
        name, kind = reason.value
        log.log(logging.WARNING if kind == "Warning" else logging.INFO, "%s: %s: %s", pod.ref, name, message)
        if not (self._api and pod.uid):
            return
        if self._queue.full():
            self._observer.told("dropped")
        else:
            self._queue.put_nowait(Report(pod, reason, message))

    async def run(self) -> None:
        """Send Events until cancelled."""
        while self._api:
            report = await self._queue.get()
            try:
                await self._send(self._api, report)
                self._observer.told("sent")
            except ApiError as error:
                self._observer.told("failed")
                log.warning("no Event about %s: %s", report.pod.ref, error)
            finally:
                self._queue.task_done()

    async def flush(self) -> None:
        """Return when everything has been told, or cannot be told soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await self._queue.join()

    async def _send(self, api: Api, report: Report) -> None:
        event = self._event(report)
        path = f"/api/v1/namespaces/{report.pod.ref.namespace}/events"
        try:
            async with api.request("POST", path, body=event):
                return
        except ApiError as error:
            if error.status != _CONFLICT:
                raise
        again = {"lastTimestamp": event["lastTimestamp"], "count": event["count"]}
        async with api.request("PATCH", f"{path}/{_name(report)}", body=again, content_type=_MERGE_PATCH):
            pass

    def _event(self, report: Report) -> dict[str, object]:
        pod, (reason, kind) = report.pod, report.reason.value
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        name = _name(report)
        _remember(self._counts, name, self._counts.get(name, 0) + 1)
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": pod.ref.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.ref.namespace,
                "name": pod.ref.name,
                "uid": pod.uid,
            },
            "type": kind,
            "reason": reason,
            "message": report.message[:_LONGEST_MESSAGE],
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._instance,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": self._counts[name],
        }


def _remember(store: OrderedDict[str, Value], key: str, value: Value) -> None:
    """Keep it, and forget what has not been touched for longest."""
    store[key] = value
    store.move_to_end(key)
    if len(store) > _REMEMBERED:
        store.popitem(last=False)


def _name(report: Report) -> str:
    """The same for the same thing, so that another master adds to the Event and makes no second one."""
    told = f"{report.pod.uid} {report.reason.name} {report.message}"
    return f"{report.pod.ref.name[:_LONGEST_NAME].rstrip('.-')}.{hashlib.sha256(told.encode()).hexdigest()[:16]}"
