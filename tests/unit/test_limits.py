from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.bpf.layout import IdentityData
from bpfrl.errors import BpfrlError, InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.units import Rate

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
STATIC_UID = "0123456789abcdef0123456789abcdef"
LONG_NAME = "a" * 253
DOTTED_NAME = ".".join(["a" * 60] * 4)

UIDS = (UID, STATIC_UID, "cgroup-1", "cgroup-18446744073709551615", "f" * 32, "0" * 8 + "-0000" * 3 + "-" + "0" * 12)
NO_UIDS = (
    *("", " ", "x", "default/web", ".", "..", "/", "../../etc", f"../{UID}", f"{UID}/..", f"/{UID}"),
    *(UID.upper(), UID.replace("-", "_"), UID[:-1], UID + "0", UID + "\n", " " + UID, UID + " ", UID + "\x00"),
    *(UID + "~new", UID + "~old", "g" + UID[1:], STATIC_UID[:-1], STATIC_UID + "0", STATIC_UID.upper()),
    *("cgroup-", "cgroup-0", "cgroup-01", "cgroup--1", "cgroup-1x", "cgroup-" + "9" * 21, "cgroup-\u0661"),
    *("pod" + UID, "\u0660" + UID[1:], "\uff10" + UID[1:], "a" * 100_000),
)
NAMES = ("a", "0", "web", "web-0", "web.0", "a-b.c-d", LONG_NAME, DOTTED_NAME, "a" * 64, "x" * 100 + "-7d9f8c6b5-abcde")
NO_NAMES = ("a" * 254, "Web", "web_0", "-web", "web-", ".web", "web.", "a..b", "a.-b", "we b", "a/b", "a\n", "\u00e9")
NAMESPACES = ("a", "kube-system", "0", "a" * 63)
NO_NAMESPACES = ("a" * 64, "Kube", "kube.system", "-a", "a-", "a_b", "a/b", "a\n", "a b", "\u0661")


def short(text: str) -> str:
    return ascii(text[:30])


def one_line(error: BpfrlError) -> str:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 1200, text
    return text


@pytest.mark.parametrize("uid", UIDS)
def test_the_uids_of_pods_static_pods_and_cgroups_are_taken(uid: str) -> None:
    assert PodRef(uid).uid == uid


@pytest.mark.parametrize("uid", NO_UIDS, ids=short)
def test_nothing_else_can_become_the_name_of_a_folder(uid: str) -> None:
    with pytest.raises(InvalidValueError, match="is no pod UID: it has the form 8c4a6c1e") as caught:
        PodRef(uid)
    one_line(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"(.?[0-9a-f]{32}.?|cgroup-[0-9]+\s?)"))
def test_whatever_passes_for_a_uid_is_one_harmless_path_component(text: str) -> None:
    try:
        uid = PodRef(text).uid
    except InvalidValueError as error:
        one_line(error)
    else:
        assert set(uid) <= set("0123456789abcdefghijklmnopqrstuvwxyz-")


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_every_name_that_kubernetes_gives_a_pod_is_taken(name: str) -> None:
    assert str(PodRef(UID, "shop", name)) == f"shop/{name}"


@pytest.mark.parametrize("name", NO_NAMES, ids=short)
def test_a_pod_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match="is no pod name") as caught:
        PodRef(UID, "shop", name)
    one_line(caught.value)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=short)
def test_every_namespace_that_kubernetes_has_is_taken(namespace: str) -> None:
    assert PodRef(UID, namespace, "web").namespace == namespace


@pytest.mark.parametrize("namespace", NO_NAMESPACES, ids=short)
def test_a_namespace_that_cannot_be_is_refused(namespace: str) -> None:
    with pytest.raises(InvalidValueError, match="is no namespace") as caught:
        PodRef(UID, namespace, "web")
    one_line(caught.value)


def test_the_longest_names_fit_what_the_programs_carry_with_an_end_mark() -> None:
    longest = {"uid": max(UIDS, key=len), "namespace": "a" * 63, "name": LONG_NAME}
    for field, text in longest.items():
        assert getattr(IdentityData, field).size > len(text), field


def test_a_pod_without_a_name_shows_its_uid() -> None:
    assert str(PodRef(UID)) == UID
    assert str(PodRef(UID, "shop")) == UID


@pytest.mark.parametrize(
    ("uid", "label"), [(UID, f"pod/{UID}"), (STATIC_UID, f"pod/{STATIC_UID}"), ("cgroup-4711", "cgroup-4711")]
)
def test_lines_of_output_call_pods_as_kubectl_does(uid: str, label: str) -> None:
    assert PodRef(uid, "shop", "cart-0").label == label


def test_a_cgroup_that_is_no_pod_goes_by_its_id() -> None:
    assert PodRef.of_cgroup(4711) == PodRef("cgroup-4711")
    with pytest.raises(InvalidValueError):
        PodRef.of_cgroup(0)


def test_a_reference_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PodRef(UID).uid = "../x"  # type: ignore[misc]


@pytest.mark.parametrize("burst", [1_500, 1_501, 65_536, 16 * 2**30])
def test_a_burst_is_one_packet_to_16_gibibyte(burst: int) -> None:
    assert Limits(Rate(10**6), burst=burst).burst == burst


@pytest.mark.parametrize("burst", [-1, 0, 1, 1_499, 16 * 2**30 + 1, 2**63 - 1])
def test_any_other_burst_is_refused(burst: int) -> None:
    with pytest.raises(InvalidValueError, match=rf"burst {burst} byte is out of range") as caught:
        Limits(Rate(10**6), burst=burst)
    assert "1500" in one_line(caught.value)
    assert "16Gi" in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "unlimited"),
    [
        (Limits(), True),
        (Limits(burst=65_536), True),
        (Limits(egress=Rate(10**6)), False),
        (Limits(ingress=Rate(10**6)), False),
        (Limits(Rate(10**6), Rate(10**6)), False),
    ],
)
def test_limits_without_a_rate_limit_nothing(limits: Limits, *, unlimited: bool) -> None:
    assert limits.unlimited is unlimited
