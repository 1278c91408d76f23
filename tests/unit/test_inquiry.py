"""What the API server says of one pod, asked once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bpfrl.errors import ApiError, ClusterError
from bpfrl.explanation import Event, Request, Wish
from bpfrl.limits import Limits, PodRef
from bpfrl.master import inquiry
from bpfrl.master.annotations import BURST, EGRESS, INGRESS, RATE_LABEL
from bpfrl.master.api import Api
from bpfrl.master.pods import MIRROR, STATIC_HASH
from bpfrl.units import Rate
from tests.unit.fakes import HASH, UID, api_server, run, uid_of

EVENTS = "/api/v1/namespaces/shop/events"
Ask = Callable[[Api], Awaitable[Request | None]]


def pod(uid: str = UID, **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "cart", "namespace": "shop", "uid": uid, "annotations": annotations},
        "spec": {"nodeName": "node-1", "hostNetwork": True},
        "status": {"phase": "Running", "hostIP": "192.0.2.1"},
    }


def event(reason: str, at: str | None, component: str = "bpfrl", version: str = "") -> dict[str, Any]:
    return {
        "metadata": {"resourceVersion": version},
        "reason": reason,
        "type": "Warning",
        "message": "why",
        "lastTimestamp": at,
        "source": {"component": component},
    }


class Server:
    """An API server with some pods and Events; what is put in ``status`` is refused with that."""

    def __init__(self, *pods: dict[str, Any], page: int = 500) -> None:
        self.pods = pods
        self.page = page
        self.events: list[dict[str, Any]] = []
        self.status: dict[str, int] = {}
        self.asked: list[str] = []

    def ask(self, question: Ask) -> Request | None:
        async def work() -> Request | None:
            async with api_server(self._answer) as client:
                return await question(Api(client))

        return run(work())

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(0)
        self.asked.append(str(request.rel_url))
        if code := self.status.get(request.path):
            return web.json_response({"message": "played"}, status=code)
        if request.path == EVENTS:
            return web.json_response({"items": self.events})
        if request.path == "/api/v1/pods":
            start = int(request.query.get("continue", 0))
            more = str(start + self.page) if start + self.page < len(self.pods) else ""
            return web.json_response({"metadata": {"continue": more}, "items": self.pods[start : start + self.page]})
        for each in self.pods:
            if request.path == f"/api/v1/namespaces/shop/pods/{each['metadata']['name']}":
                return web.json_response(each)
        return web.json_response({"message": "not found"}, status=404)


def by_name(name: str = "cart") -> Ask:
    return lambda api: inquiry.by_name(api, "shop", name)


def by_uid(uid: str = UID) -> Ask:
    return lambda api: inquiry.by_uid(api, uid)


def test_a_pod_is_known_by_its_name_with_all_that_it_says() -> None:
    server = Server(pod(**{EGRESS: "10M", BURST: "64Ki"}))
    server.events = [event("BandwidthLimited", "2026-01-01T00:00:00Z")]
    assert server.ask(by_name()) == Request(
        pod=PodRef(UID, "shop", "cart"),
        uid=UID,
        node="node-1",
        address="192.0.2.1",
        phase="Running",
        host_network=True,
        wishes=(
            Wish("annotation", EGRESS, "10M", "10mbit"),
            Wish("annotation", BURST, "64Ki", "64Ki"),
        ),
        limits=Limits(Rate(10**7), None, 65_536),
        events=(Event("2026-01-01T00:00:00Z", "Warning", "BandwidthLimited", "why"),),
    )
    assert server.asked[1].endswith(f"{EVENTS}?fieldSelector=involvedObject.uid%3D{UID}") or (
        server.asked[1] == f"{EVENTS}?fieldSelector=involvedObject.uid={UID}"
    )


def test_values_are_read_one_by_one_so_that_the_good_ones_are_told_too() -> None:
    broken = pod(**{EGRESS: "10M", INGRESS: "10mbps"})
    broken["metadata"]["labels"] = {RATE_LABEL: "x"}
    found = Server(broken).ask(by_name())
    assert found
    assert found.limits is None
    assert found.problem
    assert [(wish.key, wish.meaning, bool(wish.problem)) for wish in found.wishes] == [
        (EGRESS, "10mbit", False),
        (INGRESS, "", True),
        (RATE_LABEL, "", True),
    ]


def test_a_name_is_no_way_to_anything_else() -> None:
    server = Server(pod())
    assert server.ask(by_name("x/../cart")) is None
    assert server.asked == ["/api/v1/namespaces/shop/pods/x%2F..%2Fcart"]


def test_a_pod_that_is_not_there_is_none() -> None:
    assert Server(pod()).ask(by_name("other")) is None
    assert Server().ask(by_uid()) is None


def test_a_pod_is_known_by_its_uid_on_whatever_page_it_stands() -> None:
    server = Server(*(pod(uid_of(number)) for number in range(5)), page=2)
    found = server.ask(by_uid(uid_of(4)))
    assert found
    assert found.uid == uid_of(4)
    assert len([path for path in server.asked if path.startswith("/api/v1/pods?")]) == 3


def test_the_search_ends_with_the_page_that_has_the_pod() -> None:
    server = Server(*(pod(uid_of(number)) for number in range(5)), page=2)
    server.ask(by_uid(uid_of(0)))
    assert len([path for path in server.asked if path.startswith("/api/v1/pods?")]) == 1


def test_a_static_pod_is_known_by_either_uid() -> None:
    static = pod(**{MIRROR: HASH, STATIC_HASH: HASH})
    for uid in (UID, HASH):
        found = Server(static).ask(by_uid(uid))
        assert found
        assert (found.uid, found.pod.uid, found.static) == (UID, HASH, True)


def test_a_uid_in_any_other_annotation_is_no_pods() -> None:
    assert Server(pod(uid_of(1), **{"example.org/friend": UID})).ask(by_uid()) is None


def test_only_what_bpfrl_has_told_counts_and_the_latest_is_last() -> None:
    server = Server(pod())
    server.events = [
        event("Third", "2026-01-02T00:00:00Z", version="100"),
        event("Second", "2026-01-02T00:00:00Z", version="99"),
        event("Scheduled", "2026-01-03T00:00:00Z", "scheduler"),
        event("First", "2026-01-01T00:00:00Z"),
        event("Undated", None),
    ]
    found = server.ask(by_name())
    assert found
    assert [each.reason for each in found.events] == ["Undated", "First", "Second", "Third"]


def test_events_that_may_not_be_read_keep_nothing_else_from_being_told() -> None:
    server = Server(pod(**{EGRESS: "10M"}))
    server.status[EVENTS] = 403
    found = server.ask(by_name())
    assert found
    assert found.limits == Limits(Rate(10**7))
    assert "403" in found.no_events


@pytest.mark.parametrize("question", [by_name(), by_uid()])
def test_a_refusal_is_an_error(question: Ask) -> None:
    server = Server(pod())
    server.status = {"/api/v1/namespaces/shop/pods/cart": 403, "/api/v1/pods": 403}
    with pytest.raises(ApiError, match="403"):
        server.ask(question)


@pytest.mark.parametrize("answer", [{"metadata": 7}, {"metadata": {"uid": "x"}}], ids=["no pod", "no uid"])
def test_an_answer_that_is_no_pod_is_an_error(answer: dict[str, Any]) -> None:
    async def serve(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(answer)

    async def work() -> None:
        async with api_server(serve) as client:
            await inquiry.by_name(Api(client), "shop", "cart")

    with pytest.raises(ApiError, match=r"^the API server's answer cannot be (read|understood): "):
        run(work())


# A folder of manifests.

MANIFEST = """
kind: Pod
metadata: {name: cart, namespace: shop, uid: UID, annotations: {kubernetes.io/egress-bandwidth: 10M}}
"""


def named(name: str) -> Callable[[Request], bool]:
    return lambda request: request.pod.name == name


def test_a_folder_of_manifests_says_the_same_of_a_pod(tmp_path: Path) -> None:
    (tmp_path / "cart.yaml").write_text(MANIFEST.replace("UID", UID))
    (tmp_path / "other.yaml").write_text(MANIFEST.replace("UID", uid_of(1)).replace("cart", "other"))
    assert inquiry.in_manifests(tmp_path, named("cart")) == Request(
        pod=PodRef(UID, "shop", "cart"),
        uid=UID,
        address="127.0.0.1",
        wishes=(Wish("annotation", EGRESS, "10M", "10mbit"),),
        limits=Limits(Rate(10**7)),
    )
    assert inquiry.in_manifests(tmp_path, named("nobody")) is None


def test_a_manifest_that_cannot_be_read_may_be_the_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: [")
    (tmp_path / "cart.yaml").write_text(MANIFEST.replace("UID", UID))
    assert inquiry.in_manifests(tmp_path, named("cart"))
    with pytest.raises(ClusterError, match=r"a\.yaml: no YAML: "):
        inquiry.in_manifests(tmp_path, named("nobody"))
    with pytest.raises(ClusterError, match="No such file or directory"):
        inquiry.in_manifests(tmp_path / "gone", named("nobody"))
