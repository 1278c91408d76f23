from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.bpf.sockets import Counted
from bpfrl.errors import InvalidValueError
from bpfrl.explanation import Attached, Refusal, Report
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc import messages, node_pb2
from bpfrl.units import Rate

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
STATIC_UID = "0123456789abcdef0123456789abcdef"
UNSIGNED = 2**64 - 1

rates = st.none() | st.builds(Rate, st.integers(Rate.MIN_BITS, Rate.MAX_BITS))
bursts = st.none() | st.integers(Limits.MIN_BURST, Limits.MAX_BURST)
limits = st.builds(Limits, rates, rates, bursts)
uids = st.uuids().map(str) | st.uuids().map(lambda uid: uid.hex)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
pods = st.builds(PodRef, uids) | st.builds(PodRef, uids, names, names)
cgroups = st.builds(PodRef.of_cgroup, st.integers(1, UNSIGNED))
numbers = st.integers(0, UNSIGNED)
counters = st.builds(Counters, numbers, numbers, numbers, numbers)
times = st.floats(allow_nan=False, allow_infinity=False)
statuses = st.builds(
    Status, pods | cgroups, limits, counters, counters, numbers, times, st.binary(max_size=32), st.booleans()
)
broken = st.builds(Broken, uids, st.text(st.characters(exclude_categories=["Cs"]), min_size=1))


def one_line(error: InvalidValueError) -> None:
    assert str(error).isprintable(), error


# There and back again, through the bytes that travel.


@given(limits)
def test_limits_arrive_as_they_were_sent(limits: Limits) -> None:
    wire = messages.from_limits(limits).SerializeToString()
    assert messages.to_limits(node_pb2.Limits.FromString(wire)) == limits


@given(pods | cgroups)
def test_a_pod_arrives_as_it_was_sent(pod: PodRef) -> None:
    wire = messages.from_pod(pod).SerializeToString()
    assert messages.to_pod(node_pb2.Pod.FromString(wire)) == pod


@given(statuses | broken)
def test_a_limiter_arrives_as_it_was_sent_whole_or_broken(found: Status | Broken) -> None:
    wire = messages.from_limiter(found).SerializeToString()
    assert messages.to_limiter(node_pb2.Limiter.FromString(wire)) == found


@pytest.mark.parametrize("adopted", [True, False])
def test_whether_earlier_connections_are_paced_arrives_as_it_was_sent(*, adopted: bool) -> None:
    found = Status(PodRef(UID), Limits(), Counters(), Counters(), 7, 1.0, adopted=adopted)
    message = node_pb2.Limiter.FromString(messages.from_limiter(found).SerializeToString())
    assert message.adopted is adopted
    assert messages.to_limiter(message) == found


def test_a_node_of_an_earlier_version_paces_new_connections_only() -> None:
    found = messages.to_limiter(node_pb2.Limiter(pod=node_pb2.Pod(uid=UID)))
    assert isinstance(found, Status)
    assert not found.adopted


@pytest.mark.parametrize("change", Change)
def test_a_change_arrives_as_it_was_sent(change: Change) -> None:
    assert messages.to_change(messages.from_change(change)) is change


def test_every_number_that_can_be_sent_stands_for_a_change_of_its_own() -> None:
    known = set(node_pb2.Change.values()) - {node_pb2.CHANGE_UNSPECIFIED}
    assert {messages.from_change(change) for change in Change} == known


# What no value object can be made of.


@pytest.mark.parametrize("number", [node_pb2.CHANGE_UNSPECIFIED, 6, -1, 2**31 - 1])
def test_a_change_of_a_later_version_is_refused(number: int) -> None:
    # Enums of proto3 are open: any number may come.
    reply = node_pb2.Done.FromString(node_pb2.Done(change=number).SerializeToString())  # type: ignore[arg-type]
    with pytest.raises(
        InvalidValueError, match=rf"^the answer names change {number}, which this version does not know$"
    ):
        messages.to_change(reply.change)


NO_PODS = (
    node_pb2.Pod(),
    node_pb2.Pod(namespace="shop", name="cart-0"),
    node_pb2.Pod(uid="../../etc"),
    node_pb2.Pod(uid=UID + "\n"),
    node_pb2.Pod(uid=UID + "~new"),
    node_pb2.Pod(uid=UID, namespace="Shop", name="cart-0"),
    node_pb2.Pod(uid=UID, namespace="shop", name="cart/0"),
    node_pb2.Pod(uid=UID, namespace="shop", name="a" * 254),
)


@pytest.mark.parametrize("message", NO_PODS, ids=range(len(NO_PODS)))
def test_a_message_that_names_no_pod_never_becomes_one(message: node_pb2.Pod) -> None:
    for read in (
        lambda: messages.to_pod(message),
        lambda: messages.to_limiter(node_pb2.Limiter(pod=message)),
        lambda: messages.to_limiter(node_pb2.Limiter(pod=message, broken="odd")),
    ):
        with pytest.raises(InvalidValueError, match=r"is no (pod UID|namespace|pod name): "):
            read()


@pytest.mark.parametrize("uid", [UID, STATIC_UID])
def test_the_uid_of_a_pod_is_taken_from_a_request(uid: str) -> None:
    assert messages.to_uid(uid) == uid


@pytest.mark.parametrize("uid", ["cgroup-1", "cgroup-123", "cgroup-18446744073709551615"])
def test_a_cgroup_that_is_no_pod_is_not_the_masters_business(uid: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{uid} is a cgroup and no pod: use bpfrl on the node itself$"):
        messages.to_uid(uid)


@given(st.text(max_size=60) | st.from_regex(r"(.?[0-9a-f]{32}.?|cgroup-[0-9]+\s?)"))
def test_nothing_but_the_uid_of_a_pod_passes(text: str) -> None:
    try:
        uid = messages.to_uid(text)
    except InvalidValueError as error:
        one_line(error)
    else:
        assert uid == text
        assert PodRef(uid).is_pod


NO_LIMITS = {
    "egress too slow": (node_pb2.Limits(egress_bits_per_second=999), "rate 999 bit/s is out of range"),
    "ingress too slow": (node_pb2.Limits(ingress_bits_per_second=1), "rate 1 bit/s is out of range"),
    "egress too fast": (node_pb2.Limits(egress_bits_per_second=10**15 + 1), "is out of range"),
    "ingress too fast": (node_pb2.Limits(ingress_bits_per_second=UNSIGNED), f"rate {UNSIGNED} bit/s is out of range"),
    "burst too small": (node_pb2.Limits(egress_bits_per_second=1000, burst_bytes=1499), "burst 1499 byte is out of"),
    "burst too large": (node_pb2.Limits(burst_bytes=16 * 2**30 + 1), "it must be 1500 (one packet) to 16Gi"),
}


@pytest.mark.parametrize(("message", "reason"), NO_LIMITS.values(), ids=NO_LIMITS)
def test_impossible_limits_are_refused(message: node_pb2.Limits, reason: str) -> None:
    for read in (
        lambda: messages.to_limits(message),
        lambda: messages.to_limiter(node_pb2.Limiter(pod=node_pb2.Pod(uid=UID), limits=message)),
    ):
        with pytest.raises(InvalidValueError) as caught:
            read()
        assert reason in str(caught.value)


def test_no_limits_are_no_limits() -> None:
    assert messages.to_limits(node_pb2.Limits()) == Limits()
    assert not messages.from_limits(Limits()).ByteSize()


@given(numbers, numbers, numbers)
def test_whatever_numbers_come_are_limits_or_refused(egress: int, ingress: int, burst: int) -> None:
    message = node_pb2.Limits(egress_bits_per_second=egress, ingress_bits_per_second=ingress, burst_bytes=burst)
    try:
        limits = messages.to_limits(message)
    except InvalidValueError as error:
        one_line(error)
    else:
        assert messages.from_limits(limits) == message


any_limits = st.builds(node_pb2.Limits, egress_bits_per_second=numbers, burst_bytes=numbers)
any_pod = st.builds(node_pb2.Pod, uid=uids | st.text(max_size=40), name=names | st.text(max_size=40))


@given(st.builds(node_pb2.Limiter, pod=any_pod, limits=any_limits, broken=st.text(max_size=9), attached_at=st.floats()))
def test_whatever_limiter_comes_is_one_or_refused(message: node_pb2.Limiter) -> None:
    try:
        found = messages.to_limiter(message)
    except InvalidValueError as error:
        one_line(error)
    else:
        assert isinstance(found, Broken if message.broken else Status)


# What a node tells of a pod.

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
small = st.integers(0, 2**32 - 1)
programs = st.builds(Attached, words, small, words, st.binary(max_size=8), words, words, words)
reports = st.builds(
    Report,
    version=words,
    cgroup=words,
    no_cgroup=words,
    limiter=st.none() | statuses | broken,
    programs=st.lists(programs, max_size=3).map(tuple),
    cooperates=st.booleans(),
    sockets=st.none() | st.builds(Counted, numbers, numbers),
    no_sockets=words,
    refusal=st.none() | st.builds(Refusal, times, words, words),
)


@given(reports)
def test_what_a_node_knows_arrives_as_it_was_sent(report: Report) -> None:
    wire = messages.from_report(report).SerializeToString()
    assert messages.to_report(node_pb2.ExplainReply.FromString(wire)) == report


def test_a_path_that_is_no_text_can_be_sent_all_the_same() -> None:
    odd = "/sys/fs/cgroup/\udcff"
    report = Report("1", cgroup=odd, programs=(Attached("hook", 1, "name", b"", "kind", odd, "multi"),))
    found = messages.to_report(messages.from_report(report))
    assert (found.cgroup, found.programs[0].cgroup) == ("/sys/fs/cgroup/\ufffd",) * 2


def test_a_report_about_an_impossible_limiter_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="is no pod UID"):
        messages.to_report(node_pb2.ExplainReply(limiter=node_pb2.Limiter(pod=node_pb2.Pod(uid="x"))))
