"""The stand-in API server beside the real one: what a controller may rely on holds with both."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from typing import Any

import kubernetes
import pytest

from bench.kubeapi import MERGE_PATCH, Api, ApiError, RealApi, StandIn, real_assets

Json = dict[str, Any]


@pytest.fixture(scope="module", params=[StandIn, RealApi])
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    if request.param is RealApi and real_assets() is None:
        pytest.skip("needs etcd, kube-apiserver and kubectl; their folder is $KUBEBUILDER_ASSETS")
    with request.param() as server:
        yield server


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with StandIn(bookmark_interval=0.2) as server:
        yield server


@pytest.fixture
def namespace() -> str:
    """A namespace in which there is nothing."""
    return f"ns-{uuid.uuid4().hex[:8]}"


def pods(namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/pods{name and '/' + name}"


def leases(namespace: str, name: str = "") -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases{name and '/' + name}"


def names(answer: Json) -> list[str]:
    return [item["metadata"]["name"] for item in answer["items"]]


def version(answer: Json) -> str:
    found: str = answer["metadata"]["resourceVersion"]
    return found


def bind(api: Api, namespace: str, name: str, node: str) -> None:
    binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": node}}
    api.request("POST", pods(namespace, f"{name}/binding"), binding)


def seen(event: Json) -> tuple[str, str]:
    return event["type"], event["object"]["metadata"]["name"]


def settle(api: Api, written: Json) -> None:
    """Have the server's memory, from which it answers some requests, come to the version of an object."""
    api.request("GET", "/api/v1/pods", resourceVersion=version(written))


def lasting(events: Iterator[Json]) -> Iterator[Json]:
    """The events without those of pods that are about to go: the real server marks them before it deletes them."""
    return (
        event
        for event in events
        if event["type"] == "DELETED" or "deletionTimestamp" not in event["object"]["metadata"]
    )


def test_a_pod_comes_and_goes(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace, host_ip="192.0.2.7", labels={"app": "web"})
    assert made["kind"] == "Pod"
    assert made["metadata"]["uid"]
    assert made["metadata"]["creationTimestamp"].endswith("Z")
    assert made["spec"]["nodeName"] == "node-1"
    assert made["status"]["phase"] == "Running"
    assert made["status"]["hostIP"] == "192.0.2.7"
    assert made["status"]["podIP"].startswith("198.18.")
    assert api.request("GET", pods(namespace, "web")) == made

    listed = api.request("GET", pods(namespace))
    assert listed["kind"] == "PodList"
    [item] = listed["items"]
    assert item == {key: value for key, value in made.items() if key not in {"kind", "apiVersion"}}

    assert api.delete_pod("web", namespace)["metadata"]["uid"] == made["metadata"]["uid"]
    with pytest.raises(ApiError) as refused:
        api.request("GET", pods(namespace, "web"))
    assert (refused.value.code, refused.value.reason) == (404, "NotFound")
    assert "web" in refused.value.message


def test_a_new_pod_is_pending_whatever_its_status_says(api: Api, namespace: str) -> None:
    pod = {
        "metadata": {"generateName": "web-"},
        "spec": {"containers": [{"name": "main", "image": "example.org/main:1"}]},
        "status": {"phase": "Failed"},
    }
    made = api.request("POST", pods(namespace), pod)
    assert made["metadata"]["name"].startswith("web-")
    assert len(made["metadata"]["name"]) == len("web-") + 5
    assert made["status"]["phase"] == "Pending"


def test_a_name_is_taken_once(api: Api, namespace: str) -> None:
    api.create_pod("web", namespace=namespace)
    with pytest.raises(ApiError) as refused:
        api.create_pod("web", namespace=namespace)
    assert (refused.value.code, refused.value.reason) == (409, "AlreadyExists")


def test_only_the_token_opens(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "token", "another")
    with pytest.raises(ApiError) as refused:
        api.request("GET", pods("default"))
    assert (refused.value.code, refused.value.reason) == (401, "Unauthorized")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"fieldSelector": "spec.nodeName!="}, ["one", "two"]),
        ({"fieldSelector": "spec.nodeName="}, ["none"]),
        ({"fieldSelector": "spec.nodeName=node-2"}, ["two"]),
        ({"fieldSelector": "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"}, ["one"]),
        ({"fieldSelector": "metadata.name==one"}, ["one"]),
        ({"labelSelector": "app=web"}, ["one", "two"]),
        ({"labelSelector": "app!=web"}, ["none"]),
        ({"labelSelector": "app=web", "fieldSelector": "spec.nodeName=node-1"}, ["one"]),
    ],
)
def test_selectors(api: Api, namespace: str, query: Json, found: list[str]) -> None:
    api.create_pod("none", namespace=namespace, node="", phase="Pending")
    api.create_pod("one", namespace=namespace, labels={"app": "web"})
    api.create_pod("two", namespace=namespace, labels={"app": "web"}, node="node-2", phase="Failed")
    assert names(api.request("GET", pods(namespace), **query)) == found


def test_a_field_that_cannot_be_selected_is_refused(api: Api) -> None:
    for watch in (False, True):
        with pytest.raises(ApiError, match=r"spec\.colour") as refused:
            api.request("GET", "/api/v1/pods", fieldSelector="spec.colour=green", watch=watch)
        assert refused.value.code == 400


def test_pages_are_parts_of_one_moment(api: Api, namespace: str) -> None:
    for name in "abcde":
        api.create_pod(name, namespace=namespace)
    whole = api.request("GET", pods(namespace))
    first = api.request("GET", pods(namespace), limit=2)
    assert names(first) == ["a", "b"]
    assert first["metadata"]["remainingItemCount"] == 3

    api.delete_pod("c", namespace)
    api.create_pod("bb", namespace=namespace)
    api.annotate("d", {"colour": "green"}, namespace)

    second = api.request("GET", pods(namespace), limit=2, **{"continue": first["metadata"]["continue"]})
    assert names(second) == ["c", "d"]
    assert second["metadata"]["remainingItemCount"] == 1
    third = api.request("GET", pods(namespace), limit=2, **{"continue": second["metadata"]["continue"]})
    assert first["items"] + second["items"] + third["items"] == whole["items"]
    assert version(first) == version(second) == version(third)
    assert "continue" not in third["metadata"]
    assert names(api.request("GET", pods(namespace))) == ["a", "b", "bb", "d", "e"]


def test_pages_of_a_selection_do_not_know_what_remains(api: Api, namespace: str) -> None:
    for name in "abc":
        api.create_pod(name, namespace=namespace)
    page = api.request("GET", pods(namespace), limit=2, fieldSelector="spec.nodeName=node-1")
    assert names(page) == ["a", "b"]
    assert page["metadata"]["continue"]
    assert "remainingItemCount" not in page["metadata"]


def test_a_list_from_memory_comes_whole(api: Api, namespace: str) -> None:
    for name in "abc":
        made = api.create_pod(name, namespace=namespace)
    settle(api, made)
    listed = api.request("GET", pods(namespace), limit=2, resourceVersion=0)
    assert sorted(names(listed)) == ["a", "b", "c"]
    assert "continue" not in listed["metadata"]


def test_a_list_of_the_future_is_refused(api: Api) -> None:
    future = int(version(api.request("GET", "/api/v1/pods"))) + 1_000_000
    with pytest.raises(ApiError) as refused:
        api.request("GET", "/api/v1/pods", resourceVersion=future)
    assert (refused.value.code, refused.value.reason) == (504, "Timeout")


def test_a_merge_patch_sets_and_removes(api: Api, namespace: str) -> None:
    api.create_pod("web", namespace=namespace, annotations={"colour": "green", "size": "small"})
    patched = api.annotate("web", {"colour": "red", "size": None, "shape": "round"}, namespace)
    assert patched["metadata"]["annotations"] == {"colour": "red", "shape": "round"}
    assert api.label("web", {"app": "web"}, namespace)["metadata"]["labels"] == {"app": "web"}
    assert api.request("GET", pods(namespace, "web"))["metadata"]["annotations"] == patched["metadata"]["annotations"]


def test_a_patch_that_changes_nothing_is_no_change(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace, annotations={"colour": "green"})
    assert version(api.annotate("web", {"colour": "green", "size": None}, namespace)) == version(made)
    assert version(api.request("PUT", pods(namespace, "web"), made)) == version(made)
    assert version(api.annotate("web", {"colour": "red"}, namespace)) != version(made)


def test_a_patch_may_say_what_it_changes(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace)
    api.annotate("web", {"colour": "green"}, namespace)
    stale = {"metadata": {"resourceVersion": version(made), "annotations": {"colour": "red"}}}
    with pytest.raises(ApiError) as refused:
        api.request("PATCH", pods(namespace, "web"), stale, MERGE_PATCH)
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")


def test_a_patch_is_of_a_known_kind_and_of_what_is_there(api: Api, namespace: str) -> None:
    api.create_pod("web", namespace=namespace)
    for name, content_type, code in (("web", "text/plain", 415), ("none", MERGE_PATCH, 404)):
        with pytest.raises(ApiError) as refused:
            api.request("PATCH", pods(namespace, name), {}, content_type)
        assert refused.value.code == code


def test_spec_and_status_have_their_own_ways(api: Api, namespace: str) -> None:
    api.create_pod("web", namespace=namespace)
    by_main = api.request("PATCH", pods(namespace, "web"), {"status": {"phase": "Failed"}}, MERGE_PATCH)
    assert by_main["status"]["phase"] == "Running"
    by_status = {"spec": {"hostname": "other"}, "status": {"phase": "Failed"}}
    by_status = api.request("PATCH", pods(namespace, "web/status"), by_status, MERGE_PATCH)
    assert by_status["status"]["phase"] == "Failed"
    assert "hostname" not in by_status["spec"]
    assert api.set_phase("web", "Succeeded", namespace)["status"]["phase"] == "Succeeded"
    with pytest.raises(ApiError) as refused:
        api.request("PATCH", pods(namespace, "web"), {"spec": {"nodeName": "node-2"}}, MERGE_PATCH)
    assert refused.value.code == 422


def test_a_replacement_must_be_of_the_current_version(api: Api, namespace: str) -> None:
    lease = {"metadata": {"name": "leader"}, "spec": {"holderIdentity": "one"}}
    api.request("POST", leases(namespace), lease)
    held = api.lease(namespace, "leader")
    held["spec"]["holderIdentity"] = "two"
    assert api.request("PUT", leases(namespace, "leader"), held)["spec"]["holderIdentity"] == "two"

    held["spec"]["holderIdentity"] = "three"
    with pytest.raises(ApiError) as refused:
        api.request("PUT", leases(namespace, "leader"), held)
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    with pytest.raises(ApiError) as refused:
        api.request("PUT", leases(namespace, "leader"), lease)
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")
    assert api.lease(namespace, "leader")["spec"]["holderIdentity"] == "two"


def test_a_replacement_must_be_of_the_same_object(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace)
    del made["metadata"]["resourceVersion"]
    with pytest.raises(ApiError) as refused:
        api.request("PUT", pods(namespace, "web"), made | {"metadata": made["metadata"] | {"uid": str(uuid.uuid4())}})
    assert refused.value.code == 409
    with pytest.raises(ApiError) as refused:
        api.request("PUT", pods(namespace, "other"), made)
    assert refused.value.code == 400


def test_a_deletion_may_say_which_object(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace)
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
    with pytest.raises(ApiError) as refused:
        api.request("DELETE", pods(namespace, "web"), options | {"preconditions": {"uid": str(uuid.uuid4())}})
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    api.request("DELETE", pods(namespace, "web"), options | {"preconditions": {"uid": made["metadata"]["uid"]}})
    assert names(api.request("GET", pods(namespace))) == []


def test_events_are_found_by_the_object_that_they_are_about(api: Api, namespace: str) -> None:
    uid = str(uuid.uuid4())
    for about, reason in ((uid, "Limited"), (str(uuid.uuid4()), "Ignored")):
        involved = {"kind": "Pod", "namespace": namespace, "name": "web", "uid": about}
        event = {"metadata": {"generateName": "web."}, "involvedObject": involved, "reason": reason}
        api.request("POST", f"/api/v1/namespaces/{namespace}/events", event)
    assert [event["reason"] for event in api.events(uid)] == ["Limited"]


def test_a_watch_goes_on_where_a_list_ended(api: Api, namespace: str) -> None:
    api.create_pod("before", namespace=namespace)
    start = version(api.request("GET", pods(namespace)))
    api.create_pod("web", namespace=namespace)
    with api.watch(pods(namespace), resourceVersion=start) as stream:
        events = lasting(stream)
        assert [seen(event) for event in itertools.islice(events, 2)] == [("ADDED", "web"), ("MODIFIED", "web")]
        changed = api.annotate("web", {"colour": "green"}, namespace)
        event = next(events)
        assert event == {"type": "MODIFIED", "object": changed}
        api.delete_pod("web", namespace)
        event = next(events)
        assert seen(event) == ("DELETED", "web")
        assert int(version(event["object"])) > int(version(changed))
        assert event["object"]["metadata"]["uid"] == changed["metadata"]["uid"]


def test_watches_of_one_namespace_and_of_all(api: Api, namespace: str) -> None:
    start = version(api.request("GET", "/api/v1/pods"))
    api.create_pod("other", namespace=f"{namespace}-2")
    api.create_pod("web", namespace=namespace)
    with (
        api.watch(pods(namespace), resourceVersion=start) as one,
        api.watch("/api/v1/pods", resourceVersion=start) as every,
    ):
        assert seen(next(one)) == ("ADDED", "web")
        assert [seen(event)[1] for event in itertools.islice(every, 4)] == ["other", "other", "web", "web"]


@pytest.mark.parametrize("start", [{}, {"resourceVersion": "0"}])
def test_a_watch_from_nowhere_begins_with_what_is_there(api: Api, namespace: str, start: Json) -> None:
    made = [api.create_pod(name, namespace=namespace) for name in "ab"]
    settle(api, made[-1])
    with api.watch(pods(namespace), **start) as events:
        first = sorted(itertools.islice(events, 2), key=seen)
        assert first == [{"type": "ADDED", "object": pod} for pod in made]
        api.annotate("a", {"colour": "green"}, namespace)
        assert seen(next(events)) == ("MODIFIED", "a")


def test_a_watch_ends_when_its_time_is_over(api: Api, namespace: str) -> None:
    begun = time.monotonic()
    with api.watch(pods(namespace), timeoutSeconds=1) as events:
        assert list(events) == []
    assert 0.5 < time.monotonic() - begun < 5


def test_a_pod_that_is_bound_comes_to_one_selection_and_leaves_the_other(api: Api, namespace: str) -> None:
    start = version(api.request("GET", pods(namespace)))
    free = api.create_pod("web", namespace=namespace, node="", phase="Pending")
    bind(api, namespace, "web", "node-9")
    api.delete_pod("web", namespace)

    with api.watch(pods(namespace), resourceVersion=start, fieldSelector="spec.nodeName=") as events:
        added, left = itertools.islice(events, 2)
    assert [seen(event) for event in (added, left)] == [("ADDED", "web"), ("DELETED", "web")]
    # It is the object as it was, at the version at which it left.
    assert "nodeName" not in left["object"]["spec"]
    assert int(version(left["object"])) > int(version(free))

    with api.watch(pods(namespace), resourceVersion=start, fieldSelector="spec.nodeName!=") as stream:
        came, gone = itertools.islice(lasting(stream), 2)
    assert [seen(event) for event in (came, gone)] == [("ADDED", "web"), ("DELETED", "web")]
    assert came["object"]["spec"]["nodeName"] == "node-9"
    assert version(came["object"]) == version(left["object"])


def test_a_pod_that_ends_leaves_the_selection_of_those_that_run(api: Api, namespace: str) -> None:
    start = version(api.create_pod("web", namespace=namespace))
    api.set_phase("web", "Succeeded", namespace)
    selector = "status.phase!=Succeeded,status.phase!=Failed"
    with api.watch(pods(namespace), resourceVersion=start, fieldSelector=selector) as events:
        event = next(events)
    assert seen(event) == ("DELETED", "web")
    assert event["object"]["status"]["phase"] == "Running"


def test_what_was_compacted_is_expired(api: Api, namespace: str) -> None:
    for name in "abc":
        api.create_pod(name, namespace=namespace)
    page = api.request("GET", pods(namespace), limit=1)
    api.annotate("a", {"colour": "green"}, namespace)
    if isinstance(api, RealApi):
        api.compact()
        api.restart()
    elif isinstance(api, StandIn):
        api.faults(compact=True)

    with pytest.raises(ApiError) as refused:
        api.request("GET", pods(namespace), limit=1, **{"continue": page["metadata"]["continue"]})
    assert (refused.value.code, refused.value.reason) == (410, "Expired")
    with api.watch(pods(namespace), resourceVersion=version(page)) as events:
        [event] = events
    assert event["type"] == "ERROR"
    assert event["object"]["kind"] == "Status"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")

    now = version(api.request("GET", pods(namespace)))
    api.delete_pod("b", namespace)
    with api.watch(pods(namespace), resourceVersion=now) as stream:
        assert seen(next(lasting(stream))) == ("DELETED", "b")


def test_a_crash_loses_nothing(api: Api, namespace: str) -> None:
    for name in "abc":
        api.create_pod(name, namespace=namespace)
    api.annotate("a", {"colour": "green"}, namespace)
    api.delete_pod("b", namespace)
    before = api.request("GET", pods(namespace))
    api.kill()
    with pytest.raises(OSError, match="refused"):
        api.request("GET", pods(namespace))
    api.start()
    after = api.request("GET", pods(namespace))
    assert after["items"] == before["items"]
    assert int(version(after)) >= int(version(before))
    assert int(version(api.create_pod("d", namespace=namespace))) > int(version(before))


def test_clients_take_the_kubeconfig(api: Api, namespace: str) -> None:
    made = api.create_pod("web", namespace=namespace)
    with kubernetes.config.new_client_from_config(str(api.kubeconfig)) as client:  # type: ignore[no-untyped-call]
        [pod] = kubernetes.client.CoreV1Api(client).list_namespaced_pod(namespace).items
    assert pod.metadata is not None
    assert pod.metadata.uid == made["metadata"]["uid"]
    if isinstance(api, RealApi):
        assert json.loads(api.kubectl("get", "pod", "web", "-n", namespace, "-o", "json")) == made


def test_the_stand_in_keeps_a_uid_that_it_is_given(stand_in: StandIn, namespace: str) -> None:
    uid = str(uuid.uuid4())
    assert stand_in.create_pod("web", uid=uid, namespace=namespace)["metadata"]["uid"] == uid


def test_bookmarks_come_between_events_and_at_the_end(stand_in: StandIn, namespace: str) -> None:
    now = version(stand_in.create_pod("web", namespace=namespace))
    with stand_in.watch(pods(namespace), resourceVersion=now, timeoutSeconds=1, allowWatchBookmarks=True) as stream:
        events = list(stream)
    assert len(events) > 3
    metadata = {"resourceVersion": now, "creationTimestamp": None}
    bookmark = {"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1", "metadata": metadata}}
    assert all(event == bookmark for event in events)


def test_a_short_history_expires_what_is_before_it(namespace: str) -> None:
    with StandIn(history=3) as api:
        versions = [version(api.create_pod("web", namespace=namespace))]
        versions += [version(api.annotate("web", {"count": str(count)}, namespace)) for count in range(8)]
        with api.watch(pods(namespace), resourceVersion=versions[-4]) as events:
            assert [version(event["object"]) for event in itertools.islice(events, 3)] == versions[-3:]
        with api.watch(pods(namespace), resourceVersion=versions[-5]) as events:
            assert [event["type"] for event in events] == ["ERROR"]


def test_a_watch_goes_on_after_a_crash_of_the_stand_in_without_a_new_list(namespace: str) -> None:
    with StandIn() as api:
        start = version(api.create_pod("web", namespace=namespace))
        changed = api.annotate("web", {"colour": "green"}, namespace)
        api.kill()
        api.start()
        with api.watch(pods(namespace), resourceVersion=start) as events:
            assert next(events)["object"] == changed
        # A change that was being written when the server was killed has not been acknowledged.
        api.kill()
        with (api.folder / "journal").open("ab") as journal:
            journal.write(b'{"version": 99, "resource": "pods", "key": "def')
        api.start()
        assert api.request("GET", pods(namespace, "web")) == changed
        api.faults(compact=True)
        api.restart()
        with api.watch(pods(namespace), resourceVersion=start) as events:
            assert [event["type"] for event in events] == ["ERROR"]


def test_requests_are_counted_and_refused(stand_in: StandIn, namespace: str) -> None:
    stand_in.request("GET", "/api/v1/pods")
    before = stand_in.counters()["pods"]
    stand_in.faults(status={"code": 429, "retryAfter": 1, "count": 2, "path": "/api/v1/pods"})
    for _ in range(2):
        with pytest.raises(ApiError) as refused:
            stand_in.request("GET", "/api/v1/pods")
        assert (refused.value.code, refused.value.reason) == (429, "TooManyRequests")
        stand_in.request("GET", leases(namespace))
    stand_in.request("GET", "/api/v1/pods")
    after = stand_in.counters()["pods"]
    assert after["list"] - before["list"] == 1
    assert after["refused"] - before.get("refused", 0) == 2


def test_a_fault_may_be_of_one_verb_and_be_taken_back(stand_in: StandIn) -> None:
    stand_in.faults(status={"code": 503, "count": 9, "verb": "watch"})
    stand_in.request("GET", "/api/v1/pods")
    with pytest.raises(ApiError, match="503"), stand_in.watch("/api/v1/pods"):
        pass
    stand_in.faults(status=None)
    with stand_in.watch("/api/v1/pods", timeoutSeconds=1):
        assert stand_in.counters()["pods"]["watching"] >= 1


def test_a_stalled_watch_is_silent_and_goes_on(stand_in: StandIn, namespace: str) -> None:
    start = version(stand_in.request("GET", pods(namespace)))
    query: Json = {"resourceVersion": start, "timeoutSeconds": 1, "allowWatchBookmarks": True}
    stand_in.faults(stall=True)
    try:
        with stand_in.watch(pods(namespace), 1.5, **query) as events:
            stand_in.create_pod("web", namespace=namespace)
            with pytest.raises(TimeoutError):
                next(events)
        with stand_in.watch(pods(namespace), 5, **query) as events:
            stand_in.faults(stall=False)
            assert [event["type"] for event in events][:2] == ["ADDED", "MODIFIED"]
    finally:
        stand_in.faults(stall=False)


def test_a_truncated_list_breaks_off(stand_in: StandIn, namespace: str) -> None:
    stand_in.create_pod("web", namespace=namespace)
    stand_in.faults(truncate=True)
    try:
        with pytest.raises(http.client.IncompleteRead):
            stand_in.request("GET", "/api/v1/pods")
        assert names(stand_in.request("GET", pods(namespace))) == ["web"]  # it is lists of all pods that break off
    finally:
        stand_in.faults(truncate=False)
    assert "web" in names(stand_in.request("GET", "/api/v1/pods"))


def test_a_trickle_takes_its_time_and_comes_whole(stand_in: StandIn, namespace: str) -> None:
    whole = stand_in.request("GET", "/api/v1/pods", fieldSelector=f"metadata.namespace={namespace}")
    stand_in.faults(trickle=256)
    start = time.monotonic()
    try:
        slow = stand_in.request("GET", "/api/v1/pods", fieldSelector=f"metadata.namespace={namespace}")
    finally:
        stand_in.faults(trickle=0)
    assert time.monotonic() - start >= 0.4
    assert names(slow) == names(whole)


def test_a_dropped_watch_does_not_end_but_break(stand_in: StandIn, namespace: str) -> None:
    with stand_in.watch(pods(namespace)) as events:
        stand_in.faults(drop=True)
        with pytest.raises((OSError, http.client.HTTPException)):
            next(events)
    assert stand_in.counters()["pods"]["watching"] == 0


def test_garbage_is_no_json(stand_in: StandIn, namespace: str) -> None:
    with stand_in.watch(pods(namespace)) as events:
        stand_in.faults(garbage=True)
        with pytest.raises(ValueError, match="Expecting value"):
            next(events)


def test_a_compaction_ends_open_watches(stand_in: StandIn, namespace: str) -> None:
    with stand_in.watch(pods(namespace)) as events:
        stand_in.faults(compact=True)
        [event] = events
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


def test_sigterm_ends_the_stand_in_and_its_watches(namespace: str) -> None:
    with StandIn() as api, api.watch(pods(namespace)) as events:
        api.faults(stall=True)
        process = api._server
        assert process is not None
        api.stop()
        assert list(events) == []
        assert process._child.returncode == 0


def test_a_failed_start_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "_command", lambda _: ["sh", "-c", "echo no such luck; exit 1"])
    with pytest.raises(RuntimeError, match="no such luck"), StandIn():
        pass


def test_the_stand_in_runs_in_a_network_namespace() -> None:
    if os.geteuid():
        pytest.skip("needs root, to make a network namespace")
    network = f"kubeapi-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    subprocess.run(["ip", "netns", "add", network], check=True)
    try:
        subprocess.run(["ip", "-n", network, "link", "set", "lo", "up"], check=True)
        with StandIn(namespace=network) as api:
            api.create_pod("web")
            with api.watch("/api/v1/pods") as events:
                assert seen(next(events)) == ("ADDED", "web")
            api.restart()
            assert names(api.request("GET", "/api/v1/pods")) == ["web"]
            with pytest.raises(OSError, match="refused"):
                api._new_connection().request("GET", "/readyz")
    finally:
        subprocess.run(["ip", "netns", "del", network], check=True)
