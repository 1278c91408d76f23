"""What is known of a pod comes to one verdict, whatever of it is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import HOOKS, Broken, Status
from bpfrl.explanation import (
    FAILED,
    Attached,
    Event,
    Explanation,
    Refusal,
    Report,
    Request,
    drop_share,
    said,
    shortfall,
    verdict,
)
from bpfrl.findings import Mark
from bpfrl.limits import Limits, PodRef
from bpfrl.units import Rate
from tests.unit.fakes import UID

POD = PodRef(UID, "shop", "cart")
CGROUP = "/sys/fs/cgroup/kubepods.slice/pod"
TEN, FIVE = Limits(Rate(10**7)), Limits(Rate(5 * 10**6), Rate(10**6), 65_536)
OURS = tuple(Attached(hook, 7, name, b"\1" * 8, "cgroup_skb", CGROUP, "multi") for hook, name in HOOKS.items())
WHOLE = Status(POD, TEN, Counters(), Counters(), 4_711, 1_700_000_000.0)

HELD = Report("1", cgroup=CGROUP, limiter=WHOLE, programs=OURS)
BARE = Report("1", cgroup=CGROUP)
ABSENT = Report("1", no_cgroup="no cgroup for the pod")
BROKEN = replace(HELD, limiter=Broken(UID, "egress is missing"))
LOST = replace(HELD, limiter=replace(WHOLE, cgroup_id=0))
MOVED = replace(ABSENT, limiter=WHOLE)
STRAY = replace(BARE, programs=OURS)
DISPLACED = replace(HELD, programs=OURS[1:])
REFUSING = replace(BARE, refusal=Refusal(1.0, "attach", "the verifier is cross"))

ASKING = Request(POD, UID, "node-1", "192.0.2.1", "Running", limits=TEN)
OTHERWISE = replace(ASKING, limits=FIVE)
NOTHING = replace(ASKING, limits=None)
NONSENSE = replace(NOTHING, problem="annotation egress: rate 'x' is no rate")
ENDED = replace(NOTHING, phase="Succeeded", ended=True)
UNPLACED = replace(ASKING, node="", address="", phase="Pending")
COMPLAINED = replace(ASKING, events=(Event("1", "Warning", FAILED, "node 192.0.2.1: no room"),))


def explain(request: Request | None, report: Report | None, **others: Any) -> Explanation:
    others.setdefault("no_request", "" if request else "no API server")
    others.setdefault("no_report", "" if report else "node 192.0.2.1 does not answer: refused")
    return Explanation(POD, "192.0.2.1", request=request, report=report, **others)


UNHEARD_OF: dict[str, Any] = {"unheard_of": True, "no_request": "the cluster has no such pod"}
OK, WARNING, MISSING = Mark.OK, Mark.WARNING, Mark.MISSING
VERDICTS: dict[str, tuple[Explanation, Mark, str]] = {
    "as asked": (explain(ASKING, HELD), OK, "limited as asked: egress 10mbit"),
    "both ways, with a burst": (
        explain(OTHERWISE, replace(HELD, limiter=replace(WHOLE, limits=FIVE))),
        OK,
        "limited as asked: egress 5mbit, ingress 1mbit, burst 64Ki",
    ),
    "to something else": (
        explain(OTHERWISE, HELD),
        MISSING,
        (
            "limited to something else: egress 10mbit, although it asks for egress 5mbit, ingress 1mbit, burst 64Ki:"
            " the node was not told yet: does bpfrl serve-master run?"
        ),
    ),
    "to something else, for it was refused": (
        explain(OTHERWISE, replace(HELD, refusal=REFUSING.refusal)),
        MISSING,
        (
            "limited to something else: egress 10mbit, although it asks for egress 5mbit, ingress 1mbit, burst 64Ki:"
            " the node refused to attach: the verifier is cross"
        ),
    ),
    "nobody has told the node": (
        explain(ASKING, BARE),
        MISSING,
        "NOT limited although it asks for egress 10mbit: no master has told the node: does bpfrl serve-master run?",
    ),
    "no cgroup": (
        explain(ASKING, ABSENT),
        MISSING,
        "NOT limited although it asks for egress 10mbit: no cgroup for the pod",
    ),
    "the node refused": (
        explain(COMPLAINED, REFUSING),
        MISSING,
        "NOT limited although it asks for egress 10mbit: the node refused to attach: the verifier is cross",
    ),
    "an Event says why": (
        explain(COMPLAINED, BARE),
        MISSING,
        "NOT limited although it asks for egress 10mbit: node 192.0.2.1: no room",
    ),
    "an older Event says nothing": (
        explain(replace(COMPLAINED, events=(*COMPLAINED.events, Event("2", "Normal", "Limited", "x"))), BARE),
        MISSING,
        "NOT limited although it asks for egress 10mbit: no master has told the node: does bpfrl serve-master run?",
    ),
    "a broken limiter": (
        explain(ASKING, BROKEN),
        MISSING,
        "NOT limited although it asks for egress 10mbit: its limiter is broken: egress is missing",
    ),
    "a lost limiter": (
        explain(ASKING, LOST),
        MISSING,
        "NOT limited although it asks for egress 10mbit: its limiter was on a cgroup that is gone",
    ),
    "a limiter elsewhere": (
        explain(ASKING, MOVED),
        MISSING,
        "NOT limited although it asks for egress 10mbit: its limiter is on another cgroup: no cgroup for the pod",
    ),
    "a limiter of another bpffs": (
        explain(ASKING, STRAY),
        MISSING,
        (
            "NOT limited although it asks for egress 10mbit:"
            " a limiter is on its cgroup that is not pinned where this node's are (--bpffs)"
        ),
    ),
    "a program that does not run": (
        explain(ASKING, DISPLACED),
        MISSING,
        f"NOT limited although it asks for egress 10mbit: {OURS[0].name} of its limiter does not run on its cgroup",
    ),
    "the node is down": (
        explain(ASKING, None),
        MISSING,
        "NOT known to be limited although it asks for egress 10mbit: node 192.0.2.1 does not answer: refused",
    ),
    "no node yet": (
        explain(UNPLACED, None, no_report="it is on no node yet"),
        MISSING,
        "NOT limited yet although it asks for egress 10mbit: it is on no node yet",
    ),
    "asks for nothing": (
        explain(NOTHING, BARE),
        OK,
        (
            "not limited: the pod asks for nothing (no annotation kubernetes.io/egress-bandwidth or"
            " kubernetes.io/ingress-bandwidth, and no label rate)"
        ),
    ),
    "asks for nothing, and is nowhere": (
        explain(replace(NOTHING, node="", address=""), None, no_report="it is on no node yet"),
        OK,
        "not limited: the pod asks for nothing",
    ),
    "asks for nothing, and is limited": (
        explain(NOTHING, HELD),
        MISSING,
        "limited to egress 10mbit although the pod asks for nothing",
    ),
    "asks for nothing, and something is left": (explain(NOTHING, BROKEN), MISSING, "limited although the pod asks"),
    "asks for nothing, and another bpffs limits it": (
        explain(NOTHING, STRAY),
        MISSING,
        "limited although the pod asks",
    ),
    "asks for nothing, and the node is down": (
        explain(NOTHING, None),
        MISSING,
        "the pod asks for nothing (no annotation",
    ),
    "has ended": (explain(ENDED, ABSENT), OK, "not limited: the pod has run to its end (Succeeded)"),
    "has ended, and is limited": (
        explain(ENDED, HELD),
        MISSING,
        "limited to egress 10mbit although the pod has run to its end (Succeeded)",
    ),
    "nonsense": (
        explain(NONSENSE, BARE),
        MISSING,
        "NOT limited: what it asks for cannot be meant: annotation egress: rate 'x' is no rate",
    ),
    "nonsense after sense": (
        explain(NONSENSE, HELD),
        MISSING,
        "limited as it was before (egress 10mbit): what it asks for cannot be meant: annotation egress",
    ),
    "nonsense, and a broken limiter": (explain(NONSENSE, BROKEN), MISSING, "NOT limited: what it asks for cannot be"),
    "nonsense, and the node is down": (explain(NONSENSE, None), MISSING, "what it asks for cannot be meant"),
    "limited, and nobody to ask": (explain(None, HELD), OK, "limited: egress 10mbit"),
    "not limited, and nobody to ask": (
        explain(None, BARE),
        MISSING,
        "not limited: what it asks for is not known: no API server",
    ),
    "refused, and nobody to ask": (
        explain(None, REFUSING),
        MISSING,
        "not limited (the node refused to attach: the verifier is cross): what it asks for is not known",
    ),
    "not here, and nobody to ask": (explain(None, ABSENT), MISSING, "not limited: no cgroup for the pod"),
    "broken, and nobody to ask": (explain(None, BROKEN), MISSING, "NOT limited: its limiter is broken"),
    "nothing is known": (
        explain(None, None),
        MISSING,
        "nothing is known of it: no API server; node 192.0.2.1 does not answer: refused",
    ),
    "unheard of": (explain(None, ABSENT, **UNHEARD_OF), MISSING, "not limited: the cluster has no such pod"),
    "unheard of, and limited": (
        explain(None, HELD, **UNHEARD_OF),
        MISSING,
        "limited to egress 10mbit although the cluster has no such pod",
    ),
    "a cgroup": (
        replace(explain(None, BARE), pod=PodRef("cgroup-7")),
        OK,
        "not limited: nobody has attached a limiter to this cgroup",
    ),
    "a limited cgroup": (replace(explain(None, HELD), pod=PodRef("cgroup-7")), OK, "limited: egress 10mbit"),
}


@pytest.mark.parametrize(("explanation", "mark", "text"), VERDICTS.values(), ids=VERDICTS)
def test_what_is_known_comes_to_a_verdict(explanation: Explanation, mark: Mark, text: str) -> None:
    found = verdict(explanation)
    assert found.mark is mark
    assert found.text.startswith(text)
    assert found.text.isprintable()


REQUESTS = (None, ASKING, OTHERWISE, NOTHING, NONSENSE, ENDED, UNPLACED, COMPLAINED)
REPORTS = (None, HELD, BARE, ABSENT, BROKEN, LOST, MOVED, STRAY, DISPLACED, REFUSING)


@pytest.mark.parametrize(("request_", "report"), [*itertools.product(REQUESTS, REPORTS)])
def test_nothing_is_as_it_should_be_but_what_is(request_: Request | None, report: Report | None) -> None:
    """Over all combinations: what counts as good follows from what is asked and what is in force alone."""
    limiter = report.limiter if report and not shortfall(report) else None
    in_force = limiter.limits if isinstance(limiter, Status) else None
    untouched = report is not None and report.limiter is None and not shortfall(report)
    if request_ is None:
        good = in_force is not None
    elif request_.limits:
        good = in_force == request_.limits
    else:
        good = not request_.problem and untouched
    assert (verdict(explain(request_, report)).mark is not Mark.MISSING) == good


@pytest.mark.parametrize(
    ("egress", "ingress", "text"),
    [
        (Counters(900, 1, 100, 1), Counters(), "10 % of what it sends is dropped: it sends UDP"),
        (Counters(), Counters(500, 1, 500, 1), "50 % of what it receives is dropped: its senders"),
        (Counters(951, 1, 49, 1), Counters(), ""),
        (Counters(5, 1, 94, 1), Counters(), ""),
    ],
    ids=["sends", "receives", "few are lost", "too few to say"],
)
def test_what_does_not_follow_its_limit_is_told_and_is_limited_all_the_same(
    egress: Counters, ingress: Counters, text: str
) -> None:
    report = replace(HELD, limiter=replace(WHOLE, egress=egress, ingress=ingress))
    found = verdict(explain(ASKING, report))
    assert found.mark is (Mark.WARNING if text else Mark.OK)
    assert text in found.text
    assert found.text.startswith("limited as asked: egress 10mbit")


def test_a_share_of_few_packets_says_nothing() -> None:
    assert drop_share(Counters(0, 0, 99, 99)) == 0
    assert drop_share(Counters(50, 0, 50, 99)) == 0.5


def test_only_the_limits_that_there_are_are_said() -> None:
    assert said(Limits()) == ""
    assert said(FIVE) == "egress 5mbit, ingress 1mbit, burst 64Ki"


def test_a_static_pod_is_one_whose_cgroup_has_another_name() -> None:
    assert replace(ASKING, uid="0").static
    assert not ASKING.static
