"""An explanation as rows for people, and as a document for programs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bpfrl import __version__, render, sections
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken
from bpfrl.bpf.sockets import Counted
from bpfrl.explanation import Attached, Event, Explanation, Refusal, Report, Request, Wish
from bpfrl.findings import Finding, Mark
from bpfrl.limits import PodRef
from tests.unit.fakes import BUILD, HASH, OLD_BUILD, UID
from tests.unit.test_explanation import (
    ABSENT,
    ASKING,
    BARE,
    CGROUP,
    ENDED,
    HELD,
    NONSENSE,
    NOTHING,
    OTHERWISE,
    OURS,
    POD,
    UNPLACED,
    WHOLE,
    explain,
)

OK, WARNING, MISSING = Mark.OK, Mark.WARNING, Mark.MISSING
FOREIGN = Attached("cgroup_sock_ops", 99, "meddler", b"\xab" * 8, "sock_ops", "/sys/fs/cgroup", "override")
HERE = replace(HELD, version=__version__, limiter=replace(WHOLE, build=BUILD), sockets=Counted(12, 11), cooperates=True)


def row(explanation: Explanation, name: str, build: bytes = BUILD) -> Finding:
    [found] = [each for each in sections.sections(explanation, build) if each.name == name]
    return found


def text(explanation: Explanation, name: str, build: bytes = BUILD) -> str:
    return "\n".join(row(explanation, name, build).found)


def test_the_rows_are_in_the_order_in_which_a_limit_comes_about() -> None:
    names = [each.name for each in sections.sections(explain(ASKING, HERE), BUILD)]
    assert names == ["pod", "asked", "node", "cgroup", "programs", "limit", "counters", "sockets", "errors"]
    assert {each.mark for each in sections.sections(explain(ASKING, HERE), BUILD)} == {OK}
    without = [each.name for each in sections.sections(explain(ASKING, None), BUILD)]
    assert without == ["pod", "asked", "node", "errors"]
    unlimited = [each.name for each in sections.sections(explain(NOTHING, BARE), BUILD)]
    assert unlimited == ["pod", "asked", "node", "cgroup", "programs", "limit", "errors"]


def test_a_pod_is_named_with_what_matters_of_it() -> None:
    found = row(explain(replace(ASKING, host_network=True), HERE), "pod")
    expected = f"shop/cart, uid {UID}, node node-1 (192.0.2.1), Running, on the host's network"
    assert (found.mark, found.found) == (OK, (expected,))
    static = replace(ASKING, pod=PodRef(HASH, "shop", "cart"))
    told = text(replace(explain(static, HERE), pod=static.pod), "pod")
    assert f"uid {UID}, " in told
    assert f"static, with {HASH} in its cgroup's name" in told
    nowhere = row(explain(UNPLACED, None), "pod")
    assert (nowhere.mark, "on no node yet, Pending" in nowhere.found[0]) == (WARNING, True)


def test_a_pod_that_nobody_names_is_what_its_limiter_says() -> None:
    found = row(explain(None, HERE), "pod")
    assert found == Finding("pod", WARNING, (f"shop/cart, by its limiter's word, uid {UID}", "no API server"))
    nameless = replace(explain(None, BARE), pod=PodRef(UID))
    assert text(nameless, "pod").startswith("its name is not known")
    assert row(replace(explain(None, BARE), unheard_of=True), "pod").mark is MISSING
    assert row(replace(explain(None, BARE), pod=PodRef("cgroup-7")), "pod").mark is OK


GOOD = Wish("annotation", "kubernetes.io/egress-bandwidth", "10M", "10mbit")
BAD = Wish("label", "rate", "fast", "", "rate 'fast' is no number")
ASKED: dict[str, tuple[Request, Mark, str]] = {
    "sense": (replace(ASKING, wishes=(GOOD,)), OK, "annotation kubernetes.io/egress-bandwidth: '10M' = 10mbit"),
    "nonsense": (
        replace(NONSENSE, wishes=(GOOD, BAD)),
        MISSING,
        "label rate: 'fast' cannot be meant: rate 'fast' is no number",
    ),
    "nonsense as a whole": (replace(NONSENSE, wishes=(GOOD,)), MISSING, "annotation egress: rate 'x' is no rate"),
    "nothing": (NOTHING, OK, "nothing: no annotation kubernetes.io/egress-bandwidth or"),
    "a burst of nothing": (replace(NOTHING, wishes=(GOOD,)), WARNING, "nothing: no annotation"),
    "ended": (ENDED, OK, "nothing any more: it has run to its end (Succeeded)"),
}


@pytest.mark.parametrize(("request_", "mark", "said"), ASKED.values(), ids=ASKED)
def test_what_a_pod_asks_for_is_told_word_by_word(request_: Request, mark: Mark, said: str) -> None:
    found = row(explain(request_, HERE), "asked")
    assert found.mark is mark
    assert any(line.startswith(said) for line in found.found), found.found


def test_who_cannot_be_asked_is_not_known_to_ask() -> None:
    assert row(explain(None, HERE), "asked") == Finding("asked", WARNING, ("not known",))
    assert row(replace(explain(None, HERE), pod=PodRef("cgroup-7")), "asked").mark is OK


def test_the_node_is_told_with_its_version() -> None:
    assert row(explain(ASKING, HERE), "node") == Finding("node", OK, (f"192.0.2.1, with bpfrl {__version__}",))
    other = row(explain(ASKING, replace(HERE, version="9")), "node")
    assert (other.mark, "bpfrl 9: this one is" in other.found[0]) == (WARNING, True)
    assert row(explain(ASKING, None), "node").found == ("node 192.0.2.1 does not answer: refused",)


@pytest.mark.parametrize(("request_", "mark"), [(ASKING, MISSING), (NOTHING, OK), (None, MISSING)])
def test_a_cgroup_is_missed_by_who_needs_it(request_: Request | None, mark: Mark) -> None:
    assert row(explain(request_, ABSENT), "cgroup") == Finding("cgroup", mark, ("no cgroup for the pod",))


def test_every_program_is_shown_in_the_order_in_which_it_runs() -> None:
    above = FOREIGN._replace(hook="cgroup_inet_egress", name="sd_fw_egress", mode="multi")
    found = row(explain(ASKING, replace(HERE, programs=(*OURS, above))), "programs")
    first = found.found.index("cgroup_inet_egress, in this order:")
    assert found.found[first + 1] == (
        "  bpfrl_egress  id 7, tag 0101010101010101, cgroup_skb, multi, bpfrl's, on its cgroup"
    )
    assert found.found[first + 2] == (
        "  sd_fw_egress  id 99, tag abababababababab, sock_ops, multi, another's, on cgroup above it"
    )
    # What others do to packets is seen, and nothing that is wrong.
    assert found.mark is OK
    assert found.found[-1] == "cooperation: on"


def test_what_may_undo_the_pacing_is_pointed_at() -> None:
    found = row(explain(ASKING, replace(HERE, programs=(*OURS, FOREIGN))), "programs")
    assert found.mark is WARNING
    assert found.found[-1] == "not bpfrl's, and may undo what is set on sockets: meddler (id 99)"


def test_a_program_of_a_limiter_that_does_not_run_is_missing() -> None:
    assert row(explain(ASKING, replace(HERE, programs=OURS[1:])), "programs").mark is MISSING
    bare = row(explain(NOTHING, BARE), "programs")
    assert (bare.mark, bare.found[0], bare.found[-1][:16]) == (OK, "none", "cooperation: off")
    unplaced = FOREIGN._replace(name="", cgroup="", mode="")
    line = text(explain(NOTHING, replace(BARE, programs=(unplaced,))), "programs").splitlines()[1]
    assert line == "  (nameless)  id 99, tag abababababababab, sock_ops, another's"


def test_a_limit_is_compared_with_what_is_asked_and_its_build_with_this_one() -> None:
    found = row(explain(ASKING, HERE), "limit")
    assert (found.mark, found.found[1:]) == (OK, ("as it asks",))
    assert found.found[0].startswith("egress 10mbit, ingress unlimited, burst by rate, attached ")
    other = row(explain(OTHERWISE, HERE), "limit")
    assert (other.mark, other.found[1]) == (MISSING, "not as it asks: egress 5mbit, ingress 1mbit, burst 64Ki")
    old = row(explain(ASKING, HERE), "limit", OLD_BUILD)
    assert (old.mark, old.found[2].startswith("its programs are another version's")) == (WARNING, True)
    assert row(explain(OTHERWISE, HERE), "limit", OLD_BUILD).mark is MISSING
    # Without a compiler nobody knows which build this is.
    assert row(explain(ASKING, HERE), "limit", b"").mark is OK
    assert len(row(explain(None, HERE), "limit").found) == 1


def test_a_limit_that_is_not_there_is_missed_by_who_asks_for_it() -> None:
    assert row(explain(ASKING, BARE), "limit") == Finding("limit", MISSING, ("none",))
    assert row(explain(NOTHING, BARE), "limit") == Finding("limit", OK, ("none",))
    broken = row(explain(ASKING, replace(HERE, limiter=Broken(UID, "odd"))), "limit")
    assert broken == Finding("limit", MISSING, ("its limiter is broken: odd",), "attach it again")


def test_counters_are_told_with_their_share_of_drops() -> None:
    counted = replace(WHOLE, egress=Counters(90_000, 135_000_000, 10_000, 15_000_000))
    found = row(explain(ASKING, replace(HERE, limiter=counted)), "counters")
    assert found.mark is WARNING
    assert found.found == (
        "egress: 90.0k packets (135M byte) passed, 10.0k dropped (10.0 %)",
        "ingress: 0 packets (0 byte) passed, 0 dropped (0.0 %)",
    )


def test_sockets_are_counted_or_it_is_said_why_not() -> None:
    assert row(explain(ASKING, HERE), "sockets").found == (
        "12 TCP sockets are known to the limiter, 11 of them are paced",
    )
    uncounted = row(explain(ASKING, replace(HERE, sockets=None, no_sockets="too old")), "sockets")
    assert uncounted == Finding("sockets", WARNING, ("not counted: too old",))
    early = row(explain(ASKING, replace(HERE, limiter=replace(WHOLE, adopted=False))), "sockets")
    assert (early.mark, "6.12" in early.found[1]) == (WARNING, True)


def test_errors_are_the_warnings_among_the_events_and_the_nodes_own() -> None:
    events: tuple[Event, ...] = (Event("2026-01-01T00:00:00Z", "Normal", "BandwidthLimited", "egress 10mbit"),)
    assert row(explain(replace(ASKING, events=events), HERE), "errors") == Finding("errors", OK, ("none",))
    events = (*events, Event("2026-01-02T00:00:00Z", "Warning", "BandwidthLimitFailed", "no room"))
    report = replace(HERE, refusal=Refusal(0.0, "attach", "cross"))
    assert row(explain(replace(ASKING, events=events), report), "errors") == Finding(
        "errors",
        WARNING,
        (
            "2026-01-02T00:00:00Z BandwidthLimitFailed: no room",
            "1970-01-01T00:00:00Z the node refused to attach: cross",
        ),
    )
    forbidden = row(explain(replace(ASKING, no_events="403"), HERE), "errors")
    assert (forbidden.mark, forbidden.found) == (WARNING, ("its Events cannot be read: 403",))


def test_only_the_last_events_are_told() -> None:
    events = tuple(Event(str(number), "Warning", "BandwidthLimitFailed", "x") for number in range(9))
    found = row(explain(replace(ASKING, events=events), HERE), "errors").found
    assert [line[0] for line in found] == ["4", "5", "6", "7", "8"]


# For programs.


def test_the_document_has_everything_with_its_unit_in_the_key() -> None:
    request = replace(ASKING, wishes=(GOOD,), events=(Event("1", "Normal", "BandwidthLimited", "x"),))
    report = replace(HERE, programs=(*OURS, FOREIGN), refusal=Refusal(1.5, "update", "cross"))
    found = json.loads(render.dump(sections.document(explain(request, report), BUILD), "json"))
    assert found["pod"] == {
        "uid": UID,
        "namespace": "shop",
        "name": "cart",
        "api_uid": UID,
        "node": "node-1",
        "host_ip": "192.0.2.1",
        "phase": "Running",
        "host_network": False,
        "static": False,
    }
    limits = {"egress_bits_per_second": 10**7, "ingress_bits_per_second": None, "burst_bytes": None}
    assert found["asked"]["limits"] == limits
    assert found["asked"]["values"] == [GOOD._asdict()]
    assert found["node"] == {"address": "192.0.2.1", "version": __version__, "problem": None}
    assert found["cgroup"] == {"path": CGROUP, "problem": None}
    assert found["programs"][-1] == {
        "hook": "cgroup_sock_ops",
        "id": 99,
        "name": "meddler",
        "tag": "abababababababab",
        "kind": "sock_ops",
        "cgroup": "/sys/fs/cgroup",
        "mode": "override",
        "bpfrl": False,
        "above": True,
    }
    assert found["cooperates"] is True
    assert found["limit"]["in_force"] is True
    assert found["limit"]["limits"] == limits
    assert found["limit"]["this_build"] is True
    assert found["limit"]["egress"]["drop_share"] == 0
    assert found["sockets"] == {"known": 12, "paced": 11}
    assert found["events"][0]["reason"] == "BandwidthLimited"
    assert found["refusal"] == {"at": 1.5, "call": "update", "reason": "cross"}
    assert found["marks"]["programs"] == "warning"
    assert found["verdict"] == {"as_asked": True, "mark": "ok", "text": "limited as asked: egress 10mbit"}


def test_what_is_not_known_is_null_in_the_document() -> None:
    found = sections.document(explain(None, None), b"")
    for key in ("cgroup", "programs", "cooperates", "limit", "sockets", "events", "refusal"):
        assert found[key] is None, key
    assert (found["asked"]["known"], found["asked"]["why_not"]) == (False, "no API server")
    assert found["node"]["problem"] == "node 192.0.2.1 does not answer: refused"
    assert found["verdict"]["as_asked"] is False
    unlimited = sections.document(explain(NOTHING, Report("1", cgroup=CGROUP)), b"")
    assert unlimited["limit"] == {"in_force": False, "problem": None}
    assert unlimited["asked"]["limits"] is None
    assert sections.document(explain(ASKING, HERE), b"")["limit"]["this_build"] is None


def test_the_document_is_yaml_too() -> None:
    assert render.dump(sections.document(explain(ASKING, HERE), BUILD), "yaml").startswith(f"pod:\n  uid: {UID}\n")


def test_the_pod_of_a_document_is_the_one_that_was_asked_for() -> None:
    assert sections.document(replace(explain(None, BARE), pod=POD), b"")["pod"]["name"] == "cart"
