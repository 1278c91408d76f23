"""Why a pod is limited, or not: what is known of it, and what follows from that.

Facts come from two places, and either may be silent. The API server says what the pod asks for (:class:`Request`), the
node what it has (:class:`Report`). :func:`verdict` puts the two together, and is all the judgement there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import HOOKS, Broken, Status
from bpfrl.bpf.sockets import Counted
from bpfrl.findings import Mark
from bpfrl.limits import Limits, PodRef
from bpfrl.units import format_size

# TCP that is paced, or follows its losses, loses less than this of its packets; what does not follow loses more.
_MANY_DROPS: Final = 0.05
# Of fewer packets a share says nothing.
_FEW_PACKETS: Final = 100
NO_WISHES: Final = "no annotation kubernetes.io/egress-bandwidth or kubernetes.io/ingress-bandwidth, and no label rate"
FAILED: Final = "BandwidthLimitFailed"
_NO_MASTER: Final = "no master has told the node: does bpfrl serve-master run?"
_DROPPED: Final = {
    "sends": "it sends UDP or whatever else is not paced, or its connections are older than the limit",
    "receives": "its senders do not cooperate and do not slow down, or send UDP",
}


class Wish(NamedTuple):
    """An annotation or label of a pod that is about its bandwidth.

    Attributes:
        kind: "annotation" or "label".
        key: its name.
        text: what stands there.
        meaning: what that means; "" if it cannot be meant.
        problem: why it cannot be meant; "" if it can.
    """

    kind: str
    key: str
    text: str
    meaning: str
    problem: str = ""


class Event(NamedTuple):
    """A Kubernetes Event about the pod; ``at`` as the API server writes times."""

    at: str
    type: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """What the API server says of a pod.

    Attributes:
        pod: its names, and the UID that its cgroup carries.
        uid: the API's UID; another one only for static pods.
        node: the name of its node, "" while it has none.
        address: the node's, "" while the kubelet has not told it.
        phase: as the API server calls it.
        host_network: whether it shares the node's network.
        wishes: what it says of its bandwidth, whether that can be meant or not.
        limits: what follows; None: nothing.
        problem: why that cannot be meant, "" if it can.
        ended: it has run to its end.
        events: what bpfrl has told about it, the latest last.
        no_events: why that is not known, "" if it is.
    """

    pod: PodRef
    uid: str
    node: str = ""
    address: str = ""
    phase: str = ""
    host_network: bool = False
    wishes: tuple[Wish, ...] = ()
    limits: Limits | None = None
    problem: str = ""
    ended: bool = False
    events: tuple[Event, ...] = ()
    no_events: str = ""

    @property
    def placed(self) -> bool:
        """It is on a node, by whatever name."""
        return bool(self.node or self.address)

    @property
    def static(self) -> bool:
        """A static pod, which the API server only shows."""
        return self.pod.uid != self.uid


class Attached(NamedTuple):
    """A program that runs for the pod's packets or sockets.

    Attributes:
        hook: where it runs, in the kernel's words.
        id: its number in the kernel.
        name: at most 15 characters.
        tag: the kernel's digest of its instructions.
        kind: its type, in the kernel's words.
        cgroup: on which cgroup it is, the pod's or one above it; "" if that cannot be told.
        mode: how it goes with others: "multi", "override" or "exclusive"; "" if that cannot be told.
    """

    hook: str
    id: int
    name: str
    tag: bytes
    kind: str
    cgroup: str = ""
    mode: str = ""

    @property
    def is_ours(self) -> bool:
        """It has the name of one of bpfrl's."""
        return self.name.startswith("bpfrl_")


class Refusal(NamedTuple):
    """What a node's daemon has last refused to do about a pod, seconds since the epoch."""

    at: float
    call: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a node knows of a pod.

    Attributes:
        version: the node's bpfrl.
        cgroup: the pod's, "" if it was not found.
        no_cgroup: why not.
        limiter: the pod's; None: it has none.
        programs: everything that runs for it, hook by hook in the order in which it runs.
        cooperates: whether its cgroup is one below which senders keep to what receivers ask for.
        sockets: the limiter's; None where they were not counted.
        no_sockets: why not, "" where there is no limiter.
        refusal: what the node's daemon has last refused, and not done since.
    """

    version: str
    cgroup: str = ""
    no_cgroup: str = ""
    limiter: Status | Broken | None = None
    programs: tuple[Attached, ...] = ()
    cooperates: bool = False
    sockets: Counted | None = None
    no_sockets: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that was found out about one pod, or one cgroup.

    Attributes:
        pod: whom it is about.
        node: who was asked, or would have been: an address, or "this machine".
        request: what the API server says; None: see the next two.
        no_request: why it was not asked, or did not answer.
        unheard_of: it has answered that there is no such pod, which ``no_request`` says.
        report: what the node says.
        no_report: why it was not asked, or did not answer.
    """

    pod: PodRef
    node: str
    request: Request | None = None
    no_request: str = ""
    unheard_of: bool = False
    report: Report | None = None
    no_report: str = ""


class Verdict(NamedTuple):
    """What it comes to. A pod that is not as it asks to be, or may not be, is :attr:`Mark.MISSING`."""

    mark: Mark
    text: str


def verdict(explanation: Explanation) -> Verdict:
    """What it comes to, in a line."""
    request, report = explanation.request, explanation.report
    if request is None:
        return _without_request(explanation)
    if request.problem:
        return _asking_nonsense(request, report)
    if request.ended:
        return _asking_for_nothing(explanation, f"the pod has run to its end ({request.phase})")
    if request.limits is None:
        return _asking_for_nothing(explanation, f"the pod asks for nothing ({NO_WISHES})")
    if report is None:
        word = "known to be limited" if request.placed else "limited yet"
        asked = said(request.limits)
        return Verdict(Mark.MISSING, f"NOT {word} although it asks for {asked}: {explanation.no_report}")
    return _asking(request, request.limits, report)


def said(limits: Limits) -> str:
    """The limits that there are, for people."""
    rates = (("egress", limits.egress), ("ingress", limits.ingress))
    parts = [f"{direction} {rate}" for direction, rate in rates if rate]
    if limits.burst:
        parts.append(f"burst {format_size(limits.burst)}")
    return ", ".join(parts)


def shortfall(report: Report) -> str:
    """Why a limiter that is there does not limit the pod, "" if it does or there is none."""
    limiter = report.limiter
    if isinstance(limiter, Broken):
        return f"its limiter is broken: {limiter.reason}"
    if limiter is None:
        stray = any(program.is_ours and program.cgroup == report.cgroup for program in report.programs)
        return "a limiter is on its cgroup that is not pinned where this node's are (--bpffs)" if stray else ""
    if not limiter.cgroup_id:
        return "its limiter was on a cgroup that is gone"
    if not report.cgroup:
        return f"its limiter is on another cgroup: {report.no_cgroup}"
    absent = sorted(HOOKS.items() - {(program.hook, program.name) for program in report.programs})
    return f"{' and '.join(name for _, name in absent)} of its limiter does not run on its cgroup" if absent else ""


def drop_share(counters: Counters) -> float:
    """How much of the packets of a direction was dropped, 0 to 1; 0 where there were too few to say."""
    packets = counters.passed_packets + counters.dropped_packets
    return counters.dropped_packets / packets if packets >= _FEW_PACKETS else 0.0


def drops_many(counters: Counters) -> bool:
    """True where something does not follow its limit."""
    return drop_share(counters) >= _MANY_DROPS


def _asking(request: Request, limits: Limits, report: Report) -> Verdict:
    """The pod asks for limits, and the node has answered."""
    asked, limiter, fault = said(limits), report.limiter, shortfall(report)
    if limiter is None or fault:
        why = fault or report.no_cgroup or _told(request, report) or _NO_MASTER
        return Verdict(Mark.MISSING, f"NOT limited although it asks for {asked}: {why}")
    if isinstance(limiter, Status) and limiter.limits != limits:
        why = _told(request, report) or "the node was not told yet: does bpfrl serve-master run?"
        present = said(limiter.limits) or "nothing"
        return Verdict(Mark.MISSING, f"limited to something else: {present}, although it asks for {asked}: {why}")
    return _in_force(report, f"limited as asked: {asked}")


def _asking_nonsense(request: Request, report: Report | None) -> Verdict:
    """The pod asks for what cannot be meant: whatever it had before stays."""
    why = f"what it asks for cannot be meant: {request.problem}"
    if report is None:
        return Verdict(Mark.MISSING, why)
    if isinstance(report.limiter, Status) and not shortfall(report):
        return Verdict(Mark.MISSING, f"limited as it was before ({said(report.limiter.limits)}): {why}")
    return Verdict(Mark.MISSING, f"NOT limited: {why}")


def _asking_for_nothing(explanation: Explanation, why: str) -> Verdict:
    report = explanation.report
    if report is None and not (explanation.request and explanation.request.placed):
        return Verdict(Mark.OK, f"not limited: {why}")
    if report is None:
        return Verdict(
            Mark.MISSING, f"{why}, and whether it is limited all the same is not known: {explanation.no_report}"
        )
    if report.limiter or shortfall(report):
        return Verdict(
            Mark.MISSING, f"limited{_held(report)} although {why}: by hand, or no master has told the node yet"
        )
    return Verdict(Mark.OK, f"not limited: {why}")


def _without_request(explanation: Explanation) -> Verdict:
    """What the pod asks for is not known, or it cannot ask: it is no pod, or not in the cluster."""
    report = explanation.report
    if report is None:
        return Verdict(Mark.MISSING, f"nothing is known of it: {explanation.no_request}; {explanation.no_report}")
    fault = shortfall(report)
    if explanation.unheard_of:
        limited = f"limited{_held(report)} although" if report.limiter or fault else "not limited:"
        return Verdict(Mark.MISSING, f"{limited} {explanation.no_request}")
    if fault:
        return Verdict(Mark.MISSING, f"NOT limited: {fault}")
    if report.limiter:
        return _in_force(report, f"limited:{_held(report).removeprefix(' to')}")
    if not explanation.pod.is_pod:
        return Verdict(Mark.OK, "not limited: nobody has attached a limiter to this cgroup")
    refused = f" (the node refused to {report.refusal.call}: {report.refusal.reason})" if report.refusal else ""
    why = report.no_cgroup or f"what it asks for is not known: {explanation.no_request}"
    return Verdict(Mark.MISSING, f"not limited{refused}: {why}")


def _in_force(report: Report, text: str) -> Verdict:
    """A limiter that does what it should; whether that is what somebody wants is another question."""
    for verb, counters in _directions(report):
        if drops_many(counters):
            share = f"{drop_share(counters):.0%}".replace("%", " %")
            return Verdict(Mark.WARNING, f"{text}, and {share} of what it {verb} is dropped: {_DROPPED[verb]}")
    return Verdict(Mark.OK, text)


def _directions(report: Report) -> Iterator[tuple[str, Counters]]:
    if isinstance(report.limiter, Status):
        yield "sends", report.limiter.egress
        yield "receives", report.limiter.ingress


def _held(report: Report) -> str:
    return f" to {said(report.limiter.limits) or 'nothing'}" if isinstance(report.limiter, Status) else ""


def _told(request: Request, report: Report) -> str:
    """What bpfrl itself has said of why it could not be done."""
    if report.refusal:
        return f"the node refused to {report.refusal.call}: {report.refusal.reason}"
    failed = [event.message for event in request.events[-1:] if event.reason == FAILED]
    return failed[0] if failed else ""
