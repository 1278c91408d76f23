"""Messages to value objects, and back.

What comes in is validated here and nowhere else: a message with a malformed UID or an impossible limit never becomes a
value object.
"""

from __future__ import annotations

import os
from typing import Final

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.bpf.sockets import Counted
from bpfrl.errors import InvalidValueError
from bpfrl.explanation import Attached, Refusal, Report
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc import node_pb2
from bpfrl.units import Rate

_CHANGES: Final = {
    Change.ATTACHED: node_pb2.CHANGE_ATTACHED,
    Change.UPDATED: node_pb2.CHANGE_UPDATED,
    Change.UNCHANGED: node_pb2.CHANGE_UNCHANGED,
    Change.DETACHED: node_pb2.CHANGE_DETACHED,
    Change.ABSENT: node_pb2.CHANGE_ABSENT,
}
_CHANGED: Final = {number: change for change, number in _CHANGES.items()}


def from_change(change: Change) -> node_pb2.Change.ValueType:
    """The number that stands for a change."""
    return _CHANGES[change]


def to_change(number: node_pb2.Change.ValueType) -> Change:
    """The change that a number stands for.

    Raises:
        InvalidValueError: it stands for none that this version knows.
    """
    try:
        return _CHANGED[number]
    except KeyError:
        raise InvalidValueError(f"the answer names change {number}, which this version does not know") from None


def from_pod(pod: PodRef) -> node_pb2.Pod:
    """A pod as a message."""
    return node_pb2.Pod(uid=pod.uid, namespace=pod.namespace, name=pod.name)


def to_pod(message: node_pb2.Pod) -> PodRef:
    """The pod that a message names.

    Raises:
        InvalidValueError: it names none.
    """
    return PodRef(message.uid, message.namespace, message.name)


def to_uid(text: str) -> str:
    """The UID of a pod that a request is about; other cgroups are not the master's business.

    Raises:
        InvalidValueError: it is no pod's.
    """
    pod = PodRef(text)
    if not pod.is_pod:
        raise InvalidValueError(f"{text} is a cgroup and no pod: use bpfrl on the node itself")
    return pod.uid


def from_limits(limits: Limits) -> node_pb2.Limits:
    """Limits as a message."""
    return node_pb2.Limits(
        egress_bits_per_second=limits.egress.bits if limits.egress else 0,
        ingress_bits_per_second=limits.ingress.bits if limits.ingress else 0,
        burst_bytes=limits.burst or 0,
    )


def to_limits(message: node_pb2.Limits) -> Limits:
    """The limits in a message.

    Raises:
        InvalidValueError: a rate or the burst is out of range.
    """
    egress, ingress = message.egress_bits_per_second, message.ingress_bits_per_second
    return Limits(
        Rate(egress) if egress else None,
        Rate(ingress) if ingress else None,
        message.burst_bytes or None,
    )


def from_limiter(found: Status | Broken) -> node_pb2.Limiter:
    """What a node has found in a pod's folder, as a message."""
    if isinstance(found, Broken):
        return node_pb2.Limiter(pod=node_pb2.Pod(uid=found.uid), broken=found.reason)
    return node_pb2.Limiter(
        pod=from_pod(found.pod),
        limits=from_limits(found.limits),
        egress=_from_counters(found.egress),
        ingress=_from_counters(found.ingress),
        cgroup_id=found.cgroup_id,
        attached_at=found.attached_at,
        build=found.build,
        adopted=found.adopted,
    )


def to_limiter(message: node_pb2.Limiter) -> Status | Broken:
    """What a node has found in a pod's folder.

    Raises:
        InvalidValueError: the message says what cannot be.
    """
    pod = to_pod(message.pod)
    if message.broken:
        return Broken(pod.uid, message.broken)
    return Status(
        pod=pod,
        limits=to_limits(message.limits),
        egress=_to_counters(message.egress),
        ingress=_to_counters(message.ingress),
        cgroup_id=message.cgroup_id,
        attached_at=message.attached_at,
        build=message.build,
        adopted=message.adopted,
    )


def from_report(report: Report) -> node_pb2.ExplainReply:
    """What a node knows of a pod, as a message."""
    sockets, refusal = report.sockets, report.refusal
    return node_pb2.ExplainReply(
        version=report.version,
        cgroup=_text(report.cgroup),
        no_cgroup=_text(report.no_cgroup),
        limiter=from_limiter(report.limiter) if report.limiter else None,
        programs=[
            node_pb2.Program(**program._replace(cgroup=_text(program.cgroup))._asdict()) for program in report.programs
        ],
        cooperates=report.cooperates,
        sockets=node_pb2.Sockets(**sockets._asdict()) if sockets else None,
        no_sockets=_text(report.no_sockets),
        refusal=node_pb2.Refusal(**refusal._replace(reason=_text(refusal.reason))._asdict()) if refusal else None,
    )


def to_report(message: node_pb2.ExplainReply) -> Report:
    """What a node knows of a pod.

    Raises:
        InvalidValueError: the message says what cannot be.
    """
    sockets, refusal = message.sockets, message.refusal
    return Report(
        version=message.version,
        cgroup=message.cgroup,
        no_cgroup=message.no_cgroup,
        limiter=to_limiter(message.limiter) if message.HasField("limiter") else None,
        programs=tuple(
            Attached(each.hook, each.id, each.name, each.tag, each.kind, each.cgroup, each.mode)
            for each in message.programs
        ),
        cooperates=message.cooperates,
        sockets=Counted(sockets.known, sockets.paced) if message.HasField("sockets") else None,
        no_sockets=message.no_sockets,
        refusal=Refusal(refusal.at, refusal.call, refusal.reason) if message.HasField("refusal") else None,
    )


def _text(text: str) -> str:
    """A path may have bytes in it that are no text, and messages may not."""
    return os.fsencode(text).decode(errors="replace")


def _from_counters(counters: Counters) -> node_pb2.Traffic:
    return node_pb2.Traffic(
        passed_packets=counters.passed_packets,
        passed_bytes=counters.passed_bytes,
        dropped_packets=counters.dropped_packets,
        dropped_bytes=counters.dropped_bytes,
    )


def _to_counters(message: node_pb2.Traffic) -> Counters:
    return Counters(message.passed_packets, message.passed_bytes, message.dropped_packets, message.dropped_bytes)
