from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bpfrl import render
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.findings import Finding, Mark
from bpfrl.limits import Limits, PodRef
from bpfrl.render import Row, Sample, View
from bpfrl.units import Rate

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
STATIC_UID = "0123456789abcdef0123456789abcdef"
NOW = 1_700_000_000.0

WEB = Status(
    PodRef(UID, "shop", "cart-5d9c7b8f4-x2x7p"),
    Limits(Rate(10_000_000), Rate(1_500_000_000), 65_536),
    Counters(1_234, 1_234_567_890_123, 7, 4_321),
    Counters(0, 18_446_744_073_709_551_615, 999, 1_000),
    4_711,
    NOW - 7_200,
    adopted=True,
)
NAMELESS = Status(
    PodRef(STATIC_UID),
    Limits(egress=Rate(1_001)),
    Counters(),
    Counters(5, 6, 7, 8),
    0,
    NOW - 0.25,
    adopted=False,
)
BROKEN = Broken("f" * 32, "attach or detach was cut off: repeat it")
ROWS = [Row(WEB, NOW, Path("/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice")), Row(NAMELESS, NOW)]


def drawn(
    console: Console,
    rows: list[Row],
    broken: list[Broken],
    *,
    wide: bool = False,
    rates: bool = False,
    view: View = View.HERE,
) -> str:
    all_of_them = [*rows, *(Row(each, NOW) for each in broken)]
    console.print(render.table(all_of_them, view=view, wide=wide, rates=rates))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def piped() -> Console:
    return Console(file=StringIO(), width=4_096, highlight=False)


def terminal() -> Console:
    return Console(file=StringIO(), width=4_096, highlight=False, force_terminal=True, color_system="standard")


KNOWN = PodRef(UID, "shop", "cart-5d9c7b8f4-x2x7p")
ASKS = Limits(Rate(20_000_000))
# What a cluster has: a pod as it should be, one that has nothing yet, and one whose limiter is broken.
PODS = [
    Row(WEB, NOW, node="node-1", pod=KNOWN, state="ok", wanted=WEB.limits),
    Row(None, NOW, node="node-2", pod=PodRef("e" * 32, "till", "web"), state="pending", reason="asks", wanted=ASKS),
    Row(BROKEN, NOW, node="node-1", pod=PodRef(BROKEN.uid), state="broken", reason=BROKEN.reason, wanted=ASKS),
]


def cells(line: str) -> list[str]:
    """A row's cells: they have at least two spaces between them, and none of two within."""
    return re.split(r" {2,}", line.strip())


def test_a_table_has_a_row_for_each_limiter_under_upper_case_titles() -> None:
    header, web, nameless, _ = drawn(piped(), ROWS, []).splitlines()
    assert cells(header) == [
        *("UID", "POD", "EGRESS", "TX-BYTES", "TX-PKTS", "TX-DROP-BYTES", "TX-DROP-PKTS"),
        *("INGRESS", "RX-BYTES", "RX-PKTS", "RX-DROP-BYTES", "RX-DROP-PKTS", "AGE"),
    ]
    assert cells(web) == [
        *(UID, "shop/cart-5d9c7b8f4-x2x7p", "10mbit", "1.23T", "1.23k", "4.32k", "7"),
        *("1500mbit", "18.4E", "0", "1.00k", "999", "2h"),
    ]
    assert cells(nameless) == [STATIC_UID, "-", "1001bit", "0", "0", "0", "0", "-", "6", "5", "8", "7", "0s"]


def test_a_wide_table_ends_with_what_is_paced_burst_and_cgroup() -> None:
    header, web, nameless, _ = drawn(piped(), ROWS, [], wide=True).splitlines()
    assert cells(header)[-4:] == ["AGE", "PACED", "BURST", "CGROUP"]
    assert cells(web)[-3:] == ["all", "64Ki", "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice"]
    assert cells(nameless)[-3:] == ["new", "default", "gone"]


def test_numbers_stand_right_under_their_titles_and_names_left() -> None:
    header, web, nameless, _ = drawn(piped(), ROWS, []).splitlines()
    for title in ("UID", "POD"):
        at = header.index(title)
        assert " " not in (web[at], nameless[at])
    wide, *rows = drawn(piped(), ROWS, [], wide=True).splitlines()[:3]
    assert [row[wide.index("PACED") :][:3] for row in rows] == ["all", "new"]
    for title in ("EGRESS", "TX-BYTES", "INGRESS", "RX-BYTES", "AGE"):
        end = header.index(title) + len(title)
        assert " " not in (web[end - 1], nameless[end - 1])
        assert web[end : end + 2].strip() == nameless[end : end + 2].strip() == ""


def test_what_wants_attention_is_a_line_below_the_table_each() -> None:
    *_, broken, gone = drawn(piped(), ROWS, [BROKEN], wide=True).splitlines()
    assert broken == f"broken: {BROKEN.uid}: {BROKEN.reason}"
    assert gone.startswith(f"gone: {STATIC_UID}: its cgroup is no more: detach it, or attach it")


def test_without_a_whole_limiter_there_is_no_table_over_what_is_broken() -> None:
    assert drawn(piped(), [], [BROKEN]) == f"broken: {BROKEN.uid}: {BROKEN.reason}\n"


@pytest.mark.parametrize("reason", ["[red]no markup[/red]", "a [link=x]b", "\\[x]", ":smile: 10.0.0.1 'text'"])
def test_what_others_wrote_is_shown_as_it_is(reason: str) -> None:
    assert f": {reason}" in drawn(piped(), [], [Broken(STATIC_UID, reason)])
    assert reason in drawn(piped(), [Row(WEB, NOW, Path(reason))], [], wide=True)


def test_what_a_node_says_tells_a_terminal_nothing() -> None:
    """Nor does what somebody has written into an annotation or an Event."""
    said = "\x1b[2J\x1b]0;title\x07\nall is well\x9b31m\u202e"
    told = "\\x1b[2J\\x1b]0;title\\x07\\nall is well\\x9b31m\\u202e"
    assert f": {told}\n" in drawn(piped(), [], [Broken(STATIC_UID, said)])
    console = piped()
    console.print(render.checklist([Finding("pod", Mark.OK, (said,), said)]))
    assert isinstance(console.file, StringIO)
    assert [line.strip() for line in console.file.getvalue().splitlines()] == [
        f"{Mark.OK.value}  pod  {told}",
        f"-> {told}",
    ]


def test_what_is_piped_is_plain_text_without_boxes_and_whole() -> None:
    path = Path("/sys/fs/cgroup", *["x" * 200] * 12)
    for rates in (False, True):
        broken = Broken(BROKEN.uid, "y" * 2_000)
        text = drawn(piped(), [Row(WEB, NOW, path)], [broken], wide=True, rates=rates)
        assert text.isascii()
        assert set(text) & set("|+\x1b") == set()
        assert str(path) in text
        assert broken.reason in text
        assert len(text.splitlines()) == 3


def test_at_a_terminal_only_what_wants_attention_is_coloured() -> None:
    header, web, broken = drawn(terminal(), ROWS[:1], [BROKEN]).splitlines()
    assert "\x1b" not in header + web
    assert re.fullmatch(r"\x1b\[31mbroken: .* repeat it\x1b\[0m", broken)
    assert drawn(piped(), ROWS[:1], [BROKEN]).splitlines()[:2] == [header, web]


def test_rates_follow_from_an_earlier_look() -> None:
    egress = Counters(0, 1_234_567_890_123 - 2_500_000, 0, 4_321 - 1_000)
    before = Status(WEB.pod, WEB.limits, egress, Counters(0, WEB.ingress.passed_bytes, 0, 750), 1, 0.0)
    rows = [
        Row(WEB, NOW, before=(before, NOW - 2)),
        Row(WEB, NOW, before=(before, NOW)),
        Row(before, NOW, before=(WEB, NOW - 1)),
        Row(WEB, NOW),
    ]
    header, *lines = drawn(piped(), rows, [], rates=True).splitlines()
    assert cells(header) == ["UID", "POD", "EGRESS", "SENDING", "INGRESS", "RECEIVING", "DROPPING"]
    # 2.5 MB in 2 s; no time between the looks; counted anew by a limiter made since; no earlier look.
    assert [cells(line)[3::2] for line in lines] == [
        ["10.0Mbit", "0bit"],
        ["-", "-"],
        ["0bit", "0bit"],
        ["-", "-"],
    ]
    assert [cells(line)[6] for line in lines] == ["5.00kbit", "-", "0bit", "-"]
    assert cells(lines[0])[2::2] == ["10mbit", "1500mbit", "5.00kbit"]


def test_json_and_yaml_say_the_same_with_exact_numbers() -> None:
    document = json.loads(render.to_json([*ROWS, Row(BROKEN, NOW)]))
    assert document == yaml.safe_load(render.to_yaml([*ROWS, Row(BROKEN, NOW)]))
    assert document == {
        "items": [
            {
                "uid": UID,
                "namespace": "shop",
                "name": "cart-5d9c7b8f4-x2x7p",
                "egress": {
                    "limit_bits_per_second": 10_000_000,
                    "passed_bytes": 1_234_567_890_123,
                    "passed_packets": 1_234,
                    "dropped_bytes": 4_321,
                    "dropped_packets": 7,
                },
                "ingress": {
                    "limit_bits_per_second": 1_500_000_000,
                    "passed_bytes": 18_446_744_073_709_551_615,
                    "passed_packets": 0,
                    "dropped_bytes": 1_000,
                    "dropped_packets": 999,
                },
                "burst_bytes": 65_536,
                "paced": "all",
                "cgroup_id": 4_711,
                "cgroup": "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice",
                "attached_at": NOW - 7_200,
                "age_seconds": 7_200,
            },
            {
                "uid": STATIC_UID,
                "namespace": "",
                "name": "",
                "egress": {
                    "limit_bits_per_second": 1_001,
                    "passed_bytes": 0,
                    "passed_packets": 0,
                    "dropped_bytes": 0,
                    "dropped_packets": 0,
                },
                "ingress": {
                    "limit_bits_per_second": None,
                    "passed_bytes": 6,
                    "passed_packets": 5,
                    "dropped_bytes": 8,
                    "dropped_packets": 7,
                },
                "burst_bytes": None,
                "paced": "new",
                "cgroup_id": None,
                "cgroup": None,
                "attached_at": NOW - 0.25,
                "age_seconds": 0,
            },
            {"uid": BROKEN.uid, "error": BROKEN.reason},
        ]
    }


def test_a_clock_that_was_set_back_makes_no_negative_age() -> None:
    row = Row(NAMELESS, NOW - 60)
    [item] = json.loads(render.to_json([row]))["items"]
    assert item["age_seconds"] == 0
    assert cells(drawn(piped(), [row], []).splitlines()[1])[-1] == "0s"


def test_uids_of_digits_alone_stay_text_in_yaml() -> None:
    [item] = yaml.safe_load(render.to_yaml([Row(Broken("1" * 32, "x: y # z"), NOW)]))["items"]
    assert item == {"uid": "1" * 32, "error": "x: y # z"}


def test_nothing_is_an_empty_list_for_programs() -> None:
    assert json.loads(render.to_json([])) == yaml.safe_load(render.to_yaml([])) == {"items": []}
    assert render.to_names([]) == ""


def test_names_are_a_line_each_as_kubectls() -> None:
    service = Row(Status(PodRef("cgroup-7"), WEB.limits, WEB.egress, WEB.ingress, 7, NOW), NOW)
    names = render.to_names([*ROWS, service, Row(BROKEN, NOW)])
    assert names.splitlines() == [f"pod/{UID}", f"pod/{STATIC_UID}", "cgroup-7", f"pod/{BROKEN.uid}"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.4, "0"),
        (1, "1"),
        (999, "999"),
        (999.4, "999"),
        (999.5, "1.00k"),
        (1_000, "1.00k"),
        (1_500, "1.50k"),
        (9_994, "9.99k"),
        (9_995, "10.0k"),
        (10_000, "10.0k"),
        (45_600_000, "45.6M"),
        (99_949, "99.9k"),
        (99_950, "100k"),
        (100_000, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (10**9, "1.00G"),
        (10**12, "1.00T"),
        (10**15, "1.00P"),
        (10**18, "1.00E"),
        (2**64 - 1, "18.4E"),
        (10**21, "1000E"),
    ],
)
def test_a_short_number_has_three_digits_and_a_prefix(number: float, text: str) -> None:
    assert render.short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (0.9, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3_599.9, "59m"),
        (3_600, "1h"),
        (86_399, "23h"),
        (86_400, "1d"),
        (400 * 86_400, "400d"),
    ],
)
def test_an_age_is_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert render.age(seconds) == text


# Other nodes, and clusters.


def test_another_nodes_limiters_are_named_with_it_in_wide_tables() -> None:
    rows = [Row(WEB, NOW, node="192.0.2.7"), Row(NAMELESS, NOW, node="node-2")]
    assert drawn(piped(), rows, [], view=View.NODES) == drawn(piped(), rows, [])
    header, web, nameless, _ = drawn(piped(), rows, [], view=View.NODES, wide=True).splitlines()
    assert cells(header)[:3] == ["UID", "POD", "NODE"]
    assert [cells(line)[2] for line in (web, nameless)] == ["192.0.2.7", "node-2"]
    # The path is known there alone.
    assert [cells(line)[-1] for line in (web, nameless)] == ["id=4711", "gone"]
    assert "broken: node-2: " in drawn(piped(), [Row(BROKEN, NOW, node="node-2")], [], view=View.NODES)
    [item] = json.loads(render.to_json(rows[:1]))["items"]
    assert (item["node"], item["cgroup_id"], item["cgroup"]) == ("192.0.2.7", 4_711, None)
    assert json.loads(render.to_json([Row(BROKEN, NOW, node="node-2")]))["items"] == [
        {"uid": BROKEN.uid, "error": BROKEN.reason, "node": "node-2"}
    ]


@pytest.mark.parametrize(("view", "first"), [(View.CLUSTER, ["NAMESPACE", "POD"]), (View.NAMESPACE, ["POD"])])
def test_a_clusters_pods_are_known_by_their_names_and_have_a_state(view: View, first: list[str]) -> None:
    header, web, pending, broken = drawn(piped(), PODS, [], view=view).splitlines()
    counters = ["TX-BYTES", "TX-PKTS", "TX-DROP-BYTES", "TX-DROP-PKTS"]
    received = [title.replace("TX", "RX") for title in counters]
    assert cells(header) == [*first, "NODE", "EGRESS", *counters, "INGRESS", *received, "AGE", "STATE"]
    namespaces = (["shop"], ["till"], ["-"]) if view is View.CLUSTER else ([], [], [])
    assert cells(web)[: len(first) + 2] == [*namespaces[0], KNOWN.name, "node-1", "10mbit"]
    assert cells(web)[-2:] == ["2h", "ok"]
    assert cells(pending) == [*namespaces[1], "web", "node-2", *["-"] * 11, "pending: asks"]
    assert cells(broken)[-1] == f"broken: {BROKEN.reason}"
    assert cells(broken)[len(first) - 1] == BROKEN.uid


def test_a_wide_table_of_pods_has_their_uids_too() -> None:
    header, web, pending, _ = drawn(piped(), PODS, [], view=View.CLUSTER, wide=True).splitlines()
    assert cells(header)[:4] == ["NAMESPACE", "POD", "UID", "NODE"]
    assert cells(header)[-4:] == ["PACED", "BURST", "CGROUP", "STATE"]
    assert (cells(web)[2], cells(web)[-4:]) == (UID, ["all", "64Ki", "id=4711", "ok"])
    assert cells(pending)[-4:] == ["-", "-", "-", "pending: asks"]


def test_no_line_ends_with_spaces() -> None:
    long = PODS[1]._replace(reason="x" * 500)
    for view, rows in ((View.CLUSTER, [*PODS, long]), (View.HERE, ROWS)):
        for wide in (True, False):
            lines = drawn(piped(), rows, [], view=view, wide=wide).splitlines()
            assert len(lines) > len(rows)
            assert [line for line in lines if line != line.rstrip()] == []
    assert lines[0].startswith("UID")


def test_programs_are_told_what_a_pod_asks_for_and_what_it_has() -> None:
    document = json.loads(render.to_json(PODS))
    assert document == yaml.safe_load(render.to_yaml(PODS))
    web, pending, broken = document["items"]
    [alone] = json.loads(render.to_json([Row(WEB, NOW)]))["items"]
    wanted = {"egress_bits_per_second": 10_000_000, "ingress_bits_per_second": 1_500_000_000, "burst_bytes": 65_536}
    assert web == alone | {"node": "node-1", "state": "ok", "reason": "", "wanted": wanted}
    asked: dict[str, int | None] = {"egress_bits_per_second": 20_000_000}
    asked |= dict.fromkeys(("ingress_bits_per_second", "burst_bytes"))
    assert pending == dict[str, object].fromkeys(web) | {
        "uid": "e" * 32,
        "namespace": "till",
        "name": "web",
        "node": "node-2",
        "state": "pending",
        "reason": "asks",
        "wanted": asked,
    }
    assert (broken["state"], broken["reason"], broken["egress"]) == ("broken", BROKEN.reason, None)
    orphan = Row(WEB, NOW, node="node-1", pod=KNOWN, state="orphan", reason="no such pod")
    assert json.loads(render.to_json([orphan]))["items"][0]["wanted"] is None


def test_pods_that_the_cluster_knows_are_named_as_kubectl_names_them() -> None:
    assert render.to_names(PODS).splitlines() == [f"pod/{KNOWN.name}", "pod/web", f"pod/{BROKEN.uid}"]


def test_a_row_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="of a limiter, or of a pod"):
        render.to_names([Row(None, NOW)])


# Sorting.


def status(name: str, *, egress: int = 0, ingress: int = 0, age: float = 0, counted: int = 0) -> Status:
    """A limiter of the pod a/NAME, or of one without a name."""
    pod = PodRef(f"{ord(name[-1]):032x}", "a", name) if len(name) == 1 else PodRef(f"{ord(name[-1]):032x}")
    limits = Limits(Rate(egress) if egress else None, Rate(ingress) if ingress else None)
    counters = Counters(counted, counted, counted, counted)
    return Status(pod, limits, counters, counters, 7, NOW - age)


SORTED: dict[str, tuple[str, list[Row], str]] = {
    "names, and then those without": (
        "name",
        [Row(status("-x"), NOW), Row(status("b"), NOW), Row(status("-w"), NOW), Row(status("a"), NOW)],
        "abwx",
    ),
    "the oldest first": ("age", [Row(status("a", age=1), NOW), Row(status("b", age=5), NOW)], "ba"),
    "the highest limit first, unlimited last": (
        "egress",
        [
            Row(status("a", ingress=9_000), NOW),
            Row(status("b", egress=1_000), NOW),
            Row(status("c", egress=2_000), NOW),
        ],
        "cba",
    ),
    "ingress likewise": (
        "ingress",
        [Row(status("a", egress=9_000), NOW), Row(status("b", ingress=1_000), NOW)],
        "ba",
    ),
    "equals by name": ("sent", [Row(status("c"), NOW), Row(status("a"), NOW), Row(status("b"), NOW)], "abc"),
    "most sent first": ("sent", [Row(status("a", counted=1), NOW), Row(status("b", counted=2), NOW)], "ba"),
    "most received first": ("received", [Row(status("a", counted=1), NOW), Row(status("b", counted=2), NOW)], "ba"),
    "most dropped first": ("dropped", [Row(status("a", counted=1), NOW), Row(status("b", counted=2), NOW)], "ba"),
    "who has no limiter last": (
        "dropped",
        [Row(None, NOW, pod=PodRef(UID, "a", "a")), Row(status("b"), NOW)],
        "ba",
    ),
    "what passes now": (
        "sending",
        [
            Row(status("a", counted=9), NOW),
            Row(status("b", counted=9), NOW, before=(status("b", counted=8), NOW - 1)),
            Row(status("c", counted=2), NOW, before=(status("c", counted=0), NOW - 1)),
        ],
        "cba",
    ),
}


@pytest.mark.parametrize(("key", "rows", "expected"), SORTED.values(), ids=SORTED)
def test_rows_are_sorted_by_name_upwards_and_by_numbers_downwards(key: str, rows: list[Row], expected: str) -> None:
    ordered = render.sort(rows, key)
    assert "".join(row.ref.name or chr(int(row.ref.uid, 16)) for row in ordered) == expected


@pytest.mark.parametrize("key", render.SORT_KEYS)
def test_every_key_takes_every_kind_of_row(key: str) -> None:
    rows = [*ROWS, *PODS, Row(BROKEN, NOW), Row(WEB, NOW, before=(WEB, NOW - 1))]
    assert sorted(map(id, render.sort(rows, key))) == sorted(map(id, rows))


# Drawn again and again.


def pictured(rows: list[Row], *, width: int = 200, wide: bool = False, view: View = View.HERE) -> list[str]:
    console = Console(file=StringIO(), width=width, highlight=False)
    console.print(render.table(rows, view=view, wide=wide, rates=True, drawn=True))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


SAMPLES = (Sample(None, None), Sample(0.0, 0.0), Sample(5_000_000.0, 1_500_000_000.0), Sample(99e6, 0.0))


def test_a_picture_shows_what_passes_against_the_limit() -> None:
    header, web, nameless, _ = pictured([Row(WEB, NOW, samples=SAMPLES), Row(NAMELESS, NOW, samples=SAMPLES)])
    titles = ["POD", "EGRESS", "SENDING", "TX-LOAD", "INGRESS", "RECEIVING", "RX-LOAD", "DROPPING", "DROPS"]
    assert cells(header) == titles
    at = [header.index("TX-LOAD"), header.index("RX-LOAD")]
    assert [web[place : place + 4] for place in at] == [" ▁▅█", " ▁█▁"]
    # A direction without a limit has none to compare with.
    assert nameless[at[1] : at[1] + 4].strip() == "-"
    assert cells(web)[0] == str(WEB.pod)
    assert cells(nameless)[0] == STATIC_UID


def test_where_there_is_little_room_pictures_show_less_time_and_numbers_stay_whole() -> None:
    long = tuple(Sample(10_000_000.0, 0.0) for _ in range(30))
    row = Row(WEB, NOW, before=(WEB, NOW - 1), samples=long)
    full = pictured([row])
    assert full[1].count("█") == 30
    header, narrow = pictured([row], width=len(full[1].rstrip()) - 30)
    assert 7 <= narrow.count("█") < 30
    assert cells(header)[0] == "POD"
    assert {str(WEB.pod), "10mbit", "1500mbit", "0bit"} <= set(cells(narrow))
    assert "…" not in narrow


def test_drops_are_a_share_of_all_bytes_since_the_look_before() -> None:
    def look(passed: int, dropped: int) -> Status:
        counters = Counters(0, passed, 0, dropped)
        return Status(WEB.pod, WEB.limits, counters, counters, 1, 0.0)

    rows = [
        Row(look(1_900, 1_100), NOW, before=(look(1_000, 1_000), NOW - 1)),
        Row(look(1_000, 0), NOW, before=(look(0, 0), NOW - 1)),
        Row(look(1_000, 500), NOW, before=(look(1_000, 500), NOW - 1)),
        Row(look(1_000, 500), NOW),
        Row(look(0, 1_000), NOW, before=(look(0, 0), NOW - 1)),
    ]
    assert [cells(line)[-1] for line in pictured(rows)[1:]] == ["10.0%", "0.0%", "-", "-", "100.0%"]


def test_pods_of_a_cluster_keep_their_picture_while_their_node_is_silent() -> None:
    row = PODS[1]._replace(samples=(Sample(20_000_000.0, None), Sample(None, None)), state="unknown")
    _, line = pictured([row], view=View.CLUSTER)
    assert "█" in line
    assert cells(line)[-1] == "unknown: asks"


def test_a_picture_may_be_wide_too() -> None:
    assert cells(pictured([Row(WEB, NOW)], wide=True)[0])[:2] == ["UID", "POD"]
