"""An explanation for people and for programs: a row for each thing that was looked at, or a document."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bpfrl import __version__, render
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import HOOKS, Broken, Status
from bpfrl.explanation import (
    NO_WISHES,
    Attached,
    Explanation,
    Report,
    drop_share,
    drops_many,
    said,
    shortfall,
    verdict,
)
from bpfrl.findings import Finding, Mark
from bpfrl.units import format_size

_SOCKOPS: Final = "cgroup_sock_ops"
_LAST_EVENTS: Final = 5


def sections(explanation: Explanation, build: bytes) -> list[Finding]:
    """A row for each thing that was looked at, in the order in which a limit comes about.

    Args:
        explanation: what was found out.
        build: the digest of the programs that this version generates; b"" where that is not known.
    """
    report = explanation.report
    rows = [_pod(explanation), _asked(explanation), _node(explanation)]
    if report:
        rows += [_cgroup(explanation, report), _programs(report), _limit(explanation, report, build)]
        if isinstance(report.limiter, Status):
            rows.append(_counters(report.limiter))
            rows.append(_sockets(report, report.limiter))
    rows.append(_errors(explanation))
    return rows


def document(explanation: Explanation, build: bytes) -> dict[str, Any]:
    """The same for programs: exact numbers, with their unit in the key, and null for what is not known."""
    request, report = explanation.request, explanation.report
    mark, text = verdict(explanation)
    marks = {row.name: row.mark.value for row in sections(explanation, build)}
    return {
        "pod": {
            "uid": explanation.pod.uid,
            "namespace": explanation.pod.namespace,
            "name": explanation.pod.name,
            "api_uid": request.uid if request else None,
            "node": request.node if request else None,
            "host_ip": request.address if request else None,
            "phase": request.phase if request else None,
            "host_network": request.host_network if request else None,
            "static": request.static if request else None,
        },
        "asked": _asked_document(explanation),
        "node": {
            "address": explanation.node,
            "version": report.version if report else None,
            "problem": explanation.no_report or None,
        },
        "cgroup": {"path": report.cgroup or None, "problem": report.no_cgroup or None} if report else None,
        "programs": [_program_document(program, report) for program in report.programs] if report else None,
        "cooperates": report.cooperates if report else None,
        "limit": _limit_document(report, build) if report else None,
        "sockets": report.sockets._asdict() if report and report.sockets else None,
        "events": [event._asdict() for event in request.events] if request else None,
        "refusal": report.refusal._asdict() if report and report.refusal else None,
        "marks": marks,
        "verdict": {"as_asked": mark is not Mark.MISSING, "mark": mark.value, "text": text},
    }


def _pod(explanation: Explanation) -> Finding:
    pod, request = explanation.pod, explanation.request
    if not pod.is_pod:
        return Finding("pod", Mark.OK, (f"none: {pod.uid}",))
    if request is None:
        mark = Mark.MISSING if explanation.unheard_of else Mark.WARNING
        name = f"{pod.namespace}/{pod.name}, by its limiter's word" if pod.name else "its name is not known"
        return Finding("pod", mark, (f"{name}, uid {pod.uid}", explanation.no_request))
    kind = [f"static, with {pod.uid} in its cgroup's name"] if request.static else []
    kind += ["on the host's network"] if request.host_network else []
    address = f" ({request.address})" if request.node and request.address else ""
    place = f"node {request.node or request.address}{address}" if request.placed else "on no node yet"
    found = ", ".join((str(pod), f"uid {request.uid}", place, request.phase or "of no phase yet", *kind))
    return Finding("pod", Mark.OK if request.placed else Mark.WARNING, (found,))


def _asked(explanation: Explanation) -> Finding:
    request = explanation.request
    if not explanation.pod.is_pod:
        return Finding("asked", Mark.OK, ("nothing: only pods can ask",))
    if request is None:
        return Finding("asked", Mark.WARNING, ("not known",))
    lines = tuple(
        f"{wish.kind} {wish.key}: {wish.text!r} "
        + (f"cannot be meant: {wish.problem}" if wish.problem else f"= {wish.meaning}")
        for wish in request.wishes
    )
    if request.problem:
        # A burst that is out of range stands in no wish of its own.
        told = any(wish.problem for wish in request.wishes)
        return Finding("asked", Mark.MISSING, lines if told else (*lines, request.problem))
    if request.ended:
        return Finding("asked", Mark.OK, (*lines, f"nothing any more: it has run to its end ({request.phase})"))
    if request.limits is None:
        return Finding("asked", Mark.WARNING if lines else Mark.OK, (*lines, f"nothing: {NO_WISHES}"))
    return Finding("asked", Mark.OK, lines)


def _node(explanation: Explanation) -> Finding:
    report = explanation.report
    if report is None:
        return Finding("node", Mark.MISSING, (explanation.no_report,))
    if report.version != __version__:
        found = f"{explanation.node}, with bpfrl {report.version}: this one is {__version__}"
        return Finding("node", Mark.WARNING, (found,))
    return Finding("node", Mark.OK, (f"{explanation.node}, with bpfrl {report.version}",))


def _cgroup(explanation: Explanation, report: Report) -> Finding:
    if report.cgroup:
        return Finding("cgroup", Mark.OK, (report.cgroup,))
    request = explanation.request
    needed = request is None or request.limits is not None
    return Finding("cgroup", Mark.MISSING if needed else Mark.OK, (report.no_cgroup,))


def _programs(report: Report) -> Finding:
    lines = []
    for hook in dict.fromkeys(program.hook for program in report.programs):
        lines.append(f"{hook}, in this order:")
        lines += [f"  {_described(program, report)}" for program in report.programs if program.hook == hook]
    lines.append(
        "cooperation: " + ("on" if report.cooperates else "off: senders are not told what limited receivers can take")
    )
    foreign = [program for program in report.programs if program.hook == _SOCKOPS and not program.is_ours]
    running = {(program.hook, program.name) for program in report.programs}
    if isinstance(report.limiter, Status) and HOOKS.items() - running:
        return Finding("programs", Mark.MISSING, tuple(lines))
    if foreign:
        names = ", ".join(f"{program.name or 'nameless'} (id {program.id})" for program in foreign)
        return Finding("programs", Mark.WARNING, (*lines, f"not bpfrl's, and may undo what is set on sockets: {names}"))
    return Finding("programs", Mark.OK, tuple(lines) if report.programs else ("none", *lines))


def _described(program: Attached, report: Report) -> str:
    above = f", on {Path(program.cgroup).name} above it"
    place = {"": "", report.cgroup: ", on its cgroup"}.get(program.cgroup, above)
    owner = "bpfrl's" if program.is_ours else "another's"
    mode = f", {program.mode}" if program.mode else ""
    tag = program.tag.hex()
    return f"{program.name or '(nameless)'}  id {program.id}, tag {tag}, {program.kind}{mode}, {owner}{place}"


def _limit(explanation: Explanation, report: Report, build: bytes) -> Finding:
    limiter, fault = report.limiter, shortfall(report)
    asked = explanation.request.limits if explanation.request else None
    if fault:
        advice = "attach it again" if isinstance(limiter, Broken) else ""
        return Finding("limit", Mark.MISSING, (fault,), advice)
    if not isinstance(limiter, Status):
        return Finding("limit", Mark.MISSING if asked else Mark.OK, ("none",))
    burst = format_size(limiter.limits.burst) if limiter.limits.burst else "by rate"
    age = render.age(time.time() - limiter.attached_at)
    lines = [f"{limiter.limits}, burst {burst}, attached {age} ago"]
    mark = Mark.OK
    if asked is not None:
        same = limiter.limits == asked
        lines.append("as it asks" if same else f"not as it asks: {said(asked)}")
        mark = Mark.OK if same else Mark.MISSING
    if build and limiter.build != build:
        lines.append("its programs are another version's: they stay until it is attached again")
        mark = Mark.WARNING if mark is Mark.OK else mark
    return Finding("limit", mark, tuple(lines))


def _counters(limiter: Status) -> Finding:
    both = (("egress", limiter.egress), ("ingress", limiter.ingress))
    mark = Mark.WARNING if any(drops_many(counters) for _, counters in both) else Mark.OK
    return Finding("counters", mark, tuple(f"{direction}: {_counted(counters)}" for direction, counters in both))


def _counted(counters: Counters) -> str:
    passed, dropped = render.short(counters.passed_packets), render.short(counters.dropped_packets)
    share = f"{100 * drop_share(counters):.1f} %"
    return f"{passed} packets ({render.short(counters.passed_bytes)} byte) passed, {dropped} dropped ({share})"


def _sockets(report: Report, limiter: Status) -> Finding:
    if report.sockets is None:
        return Finding("sockets", Mark.WARNING, (f"not counted: {report.no_sockets}",))
    known, paced = report.sockets
    lines = [f"{known} TCP sockets are known to the limiter, {paced} of them are paced"]
    if not limiter.adopted:
        lines.append("connections from before the limit are not paced (that takes Linux 6.12)")
    return Finding("sockets", Mark.OK if limiter.adopted else Mark.WARNING, tuple(lines))


def _errors(explanation: Explanation) -> Finding:
    lines = list(_error_lines(explanation))
    if lines:
        return Finding("errors", Mark.WARNING, tuple(lines))
    request = explanation.request
    if request and request.no_events:
        return Finding("errors", Mark.WARNING, (f"its Events cannot be read: {request.no_events}",))
    return Finding("errors", Mark.OK, ("none",))


def _error_lines(explanation: Explanation) -> Iterator[str]:
    request, report = explanation.request, explanation.report
    for event in request.events[-_LAST_EVENTS:] if request else ():
        if event.type != "Normal":
            yield f"{event.at} {event.reason}: {event.message}"
    if report and report.refusal:
        at = datetime.fromtimestamp(report.refusal.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        yield f"{at} the node refused to {report.refusal.call}: {report.refusal.reason}"


def _asked_document(explanation: Explanation) -> dict[str, Any]:
    request = explanation.request
    if request is None:
        return {"known": False, "why_not": explanation.no_request or None, "limits": None, "values": []}
    return {
        "known": True,
        "limits": render.limits_document(request.limits),
        "problem": request.problem or None,
        "ended": request.ended,
        "values": [wish._asdict() for wish in request.wishes],
    }


def _program_document(program: Attached, report: Report) -> dict[str, Any]:
    return program._asdict() | {
        "tag": program.tag.hex(),
        "bpfrl": program.is_ours,
        "above": bool(program.cgroup) and program.cgroup != report.cgroup,
    }


def _limit_document(report: Report, build: bytes) -> dict[str, Any]:
    limiter = report.limiter
    found: dict[str, Any] = {"in_force": isinstance(limiter, Status) and not shortfall(report)}
    found["problem"] = shortfall(report) or None
    if isinstance(limiter, Status):
        found |= {
            "limits": render.limits_document(limiter.limits),
            "attached_at": round(limiter.attached_at, 3),
            "this_build": limiter.build == build if build else None,
            "adopted": limiter.adopted,
            **{
                name: asdict(counters) | {"drop_share": round(drop_share(counters), 6)}
                for name, counters in (("egress", limiter.egress), ("ingress", limiter.ingress))
            },
        }
    return found
