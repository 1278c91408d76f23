from __future__ import annotations

import json
import string
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.errors import ApiError, InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.master import apiserver
from bpfrl.master.annotations import BURST, EGRESS
from bpfrl.master.pods import MIRROR, STATIC_HASH, Pod, RawPod, read
from bpfrl.units import Rate
from tests.unit.fakes import HASH, UID

TEN = Limits(egress=Rate(10**7))


def raw(
    metadata: dict[str, Any] | None = None, status: dict[str, Any] | None = None, spec: dict[str, Any] | None = None
) -> RawPod:
    """A pod as it comes from the API server, with some of it replaced."""
    whole = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "cart-0", "namespace": "shop", "uid": UID, "resourceVersion": "7"} | (metadata or {}),
        "spec": {"nodeName": "node-1", "containers": [{"name": "main"}]} | (spec or {}),
        "status": {"phase": "Running", "hostIP": "192.0.2.1", "podIP": "10.0.0.1"} | (status or {}),
    }
    return msgspec.json.decode(json.dumps(whole), type=RawPod)


def test_a_pod_is_read_with_all_that_is_wanted_of_it() -> None:
    assert read(raw({"annotations": {EGRESS: "10M", "team": "shop"}, "labels": {"app": "cart"}})) == Pod(
        UID, PodRef(UID, "shop", "cart-0"), "node-1", "192.0.2.1", TEN
    )


@pytest.mark.parametrize("annotations", [None, {}, {"team": "shop"}])
def test_a_pod_that_asks_for_nothing_has_no_limits(annotations: dict[str, str] | None) -> None:
    assert read(raw({"annotations": annotations, "labels": None})).limits is None


@pytest.mark.parametrize(
    ("phase", "ended"),
    [("Pending", False), ("Running", False), ("Unknown", False), ("", False), ("Succeeded", True), ("Failed", True)],
)
def test_a_pod_that_has_run_to_its_end_asks_for_nothing(phase: str, *, ended: bool) -> None:
    pod = read(raw({"annotations": {EGRESS: "10M"}}, {"phase": phase}))
    assert pod.ended is ended
    assert pod.limits == (None if ended else TEN)
    assert pod.problem == ""


def test_nobody_is_told_of_a_mistake_in_a_pod_that_has_ended() -> None:
    assert read(raw({"annotations": {EGRESS: "fast"}}, {"phase": "Failed"})).problem == ""


@pytest.mark.parametrize("status", [{"hostIP": None}, {"hostIP": ""}])
def test_the_address_of_a_node_may_not_be_known_yet(status: dict[str, Any]) -> None:
    assert read(raw(status=status)).address == ""


def test_a_pod_may_have_no_status_and_no_spec_at_all() -> None:
    pod = read(msgspec.json.decode(json.dumps({"metadata": {"uid": UID}}), type=RawPod))
    assert pod == Pod(UID, PodRef(UID), "", "")


def test_what_cannot_be_meant_is_the_pods_problem_and_no_error() -> None:
    pod = read(raw({"annotations": {EGRESS: "10mbit", BURST: "64Ki"}}))
    assert pod.limits is None
    assert pod.problem.startswith(f"annotation {EGRESS}: rate '10mbit'")


# Static pods: the API's image of one has a UID of its own, and the cgroup is named by the kubelet's hash.


@pytest.mark.parametrize(
    ("annotations", "uid"),
    [
        ({MIRROR: HASH, STATIC_HASH: HASH}, HASH),
        # The mark is what counts, whatever it says.
        ({MIRROR: "", STATIC_HASH: HASH}, HASH),
        ({STATIC_HASH: HASH}, UID),
        ({MIRROR: HASH}, UID),
        ({MIRROR: HASH, STATIC_HASH: ""}, UID),
        ({MIRROR: HASH, STATIC_HASH: HASH.upper()}, UID),
        ({MIRROR: HASH, STATIC_HASH: HASH[1:]}, UID),
        ({MIRROR: HASH, STATIC_HASH: HASH + "0"}, UID),
        ({MIRROR: HASH, STATIC_HASH: HASH + "\n"}, UID),
        ({MIRROR: HASH, STATIC_HASH: "../../../etc"}, UID),
        # Another pod's UID, or a cgroup that is none.
        ({MIRROR: HASH, STATIC_HASH: "00000000-0000-4000-8000-000000000000"}, UID),
        ({MIRROR: HASH, STATIC_HASH: "cgroup-4711"}, UID),
    ],
)
def test_only_a_static_pods_hash_names_its_cgroup(annotations: dict[str, str], uid: str) -> None:
    pod = read(raw({"annotations": annotations}))
    assert pod.uid == UID
    assert pod.ref == PodRef(uid, "shop", "cart-0")


@pytest.mark.parametrize(
    "metadata",
    [
        {"uid": ""},
        {"uid": "../../etc"},
        {"uid": UID.upper()},
        {"uid": UID + "\n"},
        {"name": "Web"},
        {"name": "a/b"},
        {"name": "a" * 254},
        {"namespace": "a.b"},
        {"namespace": "a" * 64},
    ],
)
def test_an_object_without_a_proper_uid_and_names_is_no_pod(metadata: dict[str, str]) -> None:
    with pytest.raises(InvalidValueError, match=r"is no (pod UID|pod name|namespace)"):
        read(raw(metadata))


# Decoding: most of a pod is skipped, and nothing that a server may send is more than an error.


def test_all_else_of_a_pod_is_skipped_however_much_it_is() -> None:
    big = [{"name": f"variable-{number}", "value": "x" * 1000, "deep": [[[{}]]]} for number in range(1000)]
    pod = raw({"managedFields": big, "ownerReferences": None}, {"conditions": big}, {"containers": big})
    assert read(pod) == read(raw())
    assert set(msgspec.to_builtins(pod)["metadata"]) == {
        *("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "annotations", "labels")
    }


def test_the_decoders_take_a_whole_list_and_each_event() -> None:
    item = {"metadata": {"uid": UID, "resourceVersion": "7"}}
    page = apiserver._lists.decode(
        json.dumps({"kind": "PodList", "metadata": {"resourceVersion": "9", "continue": "more"}, "items": [item]})
    )
    assert (page.metadata.resource_version, page.metadata.more) == ("9", "more")
    assert [each.metadata.uid for each in page.items or ()] == [UID]
    event = apiserver._events.decode(json.dumps({"type": "ADDED", "object": item}))
    assert apiserver._pods.decode(event.object).metadata.resource_version == "7"


_TEXT = st.sampled_from([UID, HASH, "", "shop", "Running", "Failed", "10M", "x" * 300, "192.0.2.1"]) | st.text()
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_MARKS = st.dictionaries(st.sampled_from([EGRESS, BURST, MIRROR, STATIC_HASH, "rate", "x"]), _TEXT, max_size=4)


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of these fields, now and then with anything in one, or no object at all."""
    return st.fixed_dictionaries({}, optional={name: each | _JSON for name, each in fields.items()}) | _JSON


ANY_POD = _some(
    metadata=_some(
        name=st.just("cart-0") | _TEXT,
        namespace=_TEXT,
        uid=st.just(UID) | _TEXT,
        resourceVersion=_TEXT,
        annotations=st.none() | _MARKS,
        labels=_MARKS,
    ),
    spec=_some(nodeName=_TEXT),
    status=_some(phase=_TEXT, hostIP=st.none() | _TEXT),
)


@given(ANY_POD)
def test_an_object_of_any_shape_is_a_pod_or_is_refused(document: Any) -> None:
    try:
        pod = read(apiserver._decode(apiserver._pods, json.dumps(document).encode()))
    except (ApiError, InvalidValueError):
        return
    assert pod.uid
    assert pod.ref.uid in {pod.uid, HASH}
    assert not (pod.problem and pod.limits)


@given(
    st.sampled_from([apiserver._lists, apiserver._events, apiserver._pods, apiserver._failures]),
    st.binary() | _JSON.map(lambda each: json.dumps(each).encode()) | st.text(string.punctuation).map(str.encode),
)
def test_an_answer_of_any_bytes_is_decoded_or_refused(decoder: msgspec.json.Decoder[object], text: bytes) -> None:
    with suppress(ApiError):
        apiserver._decode(decoder, text)


def test_an_answer_that_is_nested_too_deep_is_refused() -> None:
    text = b'{"metadata": {}, "spec": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    with pytest.raises(ApiError, match="cannot be read"):
        apiserver._decode(apiserver._pods, text)
