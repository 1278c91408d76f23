"""The benchmarks' page is made of its figures alone, and says of them what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import plots, report, scale_page, summary
from bench.converge import Spread
from bench.ends import streams
from bench.plan import GROUPS, QUICK, Plan
from bench.record import (
    Before,
    Case,
    Cost,
    Figures,
    FirstSecond,
    Group,
    Headroom,
    Limiter,
    Machine,
    Results,
    Row,
    Run,
)
from bench.run import Runner
from bench.scale_page import Churned
from bench.scale_page import Measured as Cluster
from bench.scale_page import Results as ScaleResults
from bench.situations import Arrivals
from bench.traffic import Asked, percentile

QUEUES_MS: dict[Limiter, float] = {"none": 0.1, "bpfrl": 0.2, "cooperating": 0.1, "cni": 40, "bucket": 0.3}
EXTRA: dict[str, dict[str, float | None]] = {
    "fetches": {"fetch_p50": 4.0, "fetch_p99": 7.0, "failures": 0},
    "quic": {"lost": 0.1},
    "change": {"raised": 5.0, "lowered": None},
    "late": {"before": 1e10, "settled": 70.0, "dropped_later": 0, "after": 1e9},
    "reader": {"slow": 0.99},
}
MACHINE = Machine("2026-11-23", "6.18", "a CPU", 2, 0.1, {"iperf3": "3.12"})
COSTS = [
    Cost("tcp", "egress", 10**9, program, 1000, 150 + 10 * number, 50, 20_000)
    for number, program in enumerate(("egress", "ingress", "sockops"))
]


def figures(case: Case) -> Figures:
    rate, rtt = float(case.rate or 2e10), min(case.rtts, default=0.1)
    return Figures(
        goodput=rate * 0.96,
        layer3=rate,
        parts=(rate / 2, rate / 2),
        peak=rate * 1.1,
        jain=0.99,
        udp_lost=0.5 if case.traffic in {"udp", "mixed"} else None,
        retransmits=3,
        tcp_rtt=rtt,
        p50=rtt + QUEUES_MS[case.limiter],
        p99=rtt + 2 * QUEUES_MS[case.limiter],
        requests=400,
        drops=5,
        counted=1.01,
        extra=EXTRA.get(case.traffic, {}),
    )


def run(group: Group) -> Run:
    return Run(group, MACHINE.date, "python -m bench.run", 4, 1.0)


def results() -> Results:
    return Results(
        MACHINE,
        [run(group) for group in GROUPS],
        Before("2026-01-01", COSTS),
        [Row(group, case, figures(case)) for group in GROUPS[:7] for case in Plan().cases(group)],
        [Headroom("bpfrl", 10**10, 4, [9e9, 9.2e9]), Headroom("bpfrl", 400 * 10**9, 4, [2e10, 3e10])],
        [FirstSecond("cni", 10**7, None, 10**6)],
        COSTS,
    )


def page(found: Results, folder: Path) -> str:
    written = folder / "benchmarks.md"
    report.write(found, written, plots.write(found, folder))
    return written.read_text()


def test_the_same_figures_make_the_same_page_and_pictures(tmp_path: Path) -> None:
    found = results()
    found.save(tmp_path / "latest.json")
    page(found, tmp_path / "one")
    page(Results.load(tmp_path / "latest.json"), tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 5


def test_large_clusters_have_a_section_and_a_picture(tmp_path: Path) -> None:
    spread = Spread(2.0, 5.0, 71.0, 90.0)
    churned = Churned(900, spread, 30.0, 200.0, 1.5)
    measured = [
        Cluster(
            nodes=nodes,
            pods=30 * nodes,
            limited=6 * nodes,
            load=1.0,
            converged=2.0,
            converging_cpu=1.0,
            peak=150.0,
            steady=140.0,
            resting_cpu=0.5,
            churned=churned,
            relisted=churned,
            refusing=1,
            silent=1,
            cut=churned,
            mended=3.0,
            highest=160.0,
            wrong=0,
        )
        for nodes in (50, 5000)
    ]
    figures = tmp_path / "scale.json"
    assert scale_page.write(tmp_path, figures) == ""
    ScaleResults(MACHINE, "python -m bench.scale", 50.0, measured).save(figures)
    written = tmp_path / "benchmarks.md"
    report.write(results(), written, {}, scale_page.write(tmp_path, figures))
    assert "|  | 1,500 pods | 150,000 pods | goal |" in written.read_text()
    assert "| changes: p50, p99 until told, ms | 2.0, 71 | 2.0, 71 | p99 below 250 |" in written.read_text()
    assert "](benchmarks-scale.svg)" in written.read_text()
    first = (tmp_path / scale_page.PICTURE).read_bytes()
    scale_page.write(tmp_path, figures)
    assert (tmp_path / scale_page.PICTURE).read_bytes() == first


def test_the_comparison_has_the_figures_of_the_benchmarks(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    copy = tmp_path / "comparison.md"
    copy.write_text((docs / "comparison.md").read_text())
    report.fill(Results.load(docs.parent / "bench" / "results" / "latest.json"), copy)
    assert copy.read_text() == (docs / "comparison.md").read_text()
    assert "CNI bandwidth" in copy.read_text().split("## Measured here")[1].split("## Published")[0]


def test_a_page_is_made_of_whatever_there_is(tmp_path: Path) -> None:
    written = page(Results(MACHINE, [], Before("2026-01-01", [])), tmp_path)
    assert "Nowhere in these figures." in written


def test_a_case_that_failed_is_there_with_its_reason(tmp_path: Path) -> None:
    found = results()
    rows = [replace(row, figures=None, error=f"RuntimeError: {row.case.traffic} broke") for row in found.rows]
    written = page(replace(found, rows=rows), tmp_path)
    for traffic in ("tcp", "udp", "mixed", "fetches", "quic", "change", "late", "reader"):
        assert f"RuntimeError: {traffic} broke" in written


def test_who_is_better_is_said_also_where_it_is_not_bpfrl() -> None:
    found = results()
    rows = [
        replace(row, figures=replace(row.figures, jain=0.5))
        if row.figures and row.group == "egress" and row.case.limiter == "bpfrl"
        else row
        for row in found.rows
    ]
    said = summary.others_better(replace(found, rows=rows))
    assert "CNI bandwidth, TCP sent, fairness between flows (Jain's index): better than bpfrl in 20 of 20 cases" in said
    assert "0.990 against 0.500" in said
    assert "fairness" not in summary.others_better(found)


def test_one_group_again_leaves_the_others() -> None:
    found = results()
    case = Case("bpfrl", "udp", "egress", 10**8, 1, "")
    again = Results(
        MACHINE, [run("udp"), run("cost")], found.before, [Row("udp", case, None, "broken")], costs=COSTS[:1]
    )
    merged = found.merged(again)
    assert [row.case for row in merged.rows if row.group == "udp"] == [case]
    assert [row for row in merged.rows if row.group != "udp"] == [row for row in found.rows if row.group != "udp"]
    assert merged.costs == COSTS[:1]
    assert merged.headroom == found.headroom
    assert sorted(each.group for each in merged.runs) == sorted(GROUPS)


@pytest.mark.parametrize(("plan", "minutes"), [(Plan(), 45), (QUICK, 5)])
def test_the_benchmarks_end_in_time(plan: Plan, minutes: float) -> None:
    assert Runner(plan, GROUPS, "").estimate() < minutes


@pytest.mark.parametrize("plan", [Plan(), QUICK])
def test_no_case_is_measured_twice(plan: Plan) -> None:
    for group in GROUPS[:7]:
        cases = plan.cases(group)
        assert len(set(cases)) == len(cases)
        assert all((case.rate is None) == (case.limiter == "none") for case in cases)


def test_throughput_has_settled_where_it_stays_near_the_limit() -> None:
    full = 10**8 / 8 * 1448 / 1500 * streams.WINDOW_SECONDS
    windows = [0, 0, 3 * full, *[full] * 3, 5 * full, *[full * 1.05] * 60]
    arrivals = Arrivals(1000.0, [round(window) for window in windows])
    assert arrivals.settled(1000.0, 1003.0, 10**8) == pytest.approx(350, abs=1)
    assert arrivals.settled(1001.0, 1003.0, 10**8) == pytest.approx(0, abs=51)
    assert arrivals.settled(1000.0, 1003.0, 2 * 10**8) is None
    assert arrivals.rate(1001.0, 1003.0) == pytest.approx(full * 1.05 * 8 / streams.WINDOW_SECONDS)


def test_percentiles_are_of_all_requests() -> None:
    asked = Asked([float(number) for number in range(1, 101)], unanswered=1)
    assert asked.p50 == 50.5
    assert asked.p99 == pytest.approx(99, abs=0.1)
    assert percentile([1.0], 99) is None
