"""The page, the dashboard and the alert rules say of the metrics what the daemons' registries do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import promql_parser
import pytest
import yaml
from prometheus_client.exposition import generate_latest

from tools import metrics_page
from tools.metrics_page import Metric

DASHBOARD: Final = metrics_page.ROOT / "deploy" / "grafana" / "bpfrl.json"
# What Prometheus itself gives to each target.
TARGET: Final = {"instance", "job"}
TARGETS_OWN: Final = {"up": set[str]()}
# What Grafana puts in: the variables' values as they are for "All", and the built-in ones.
BUILT_IN: Final = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}
FIRED_MINUTES: Final = 60


@pytest.fixture(scope="module")
def metrics() -> list[Metric]:
    registries = (metrics_page.node_registry(), metrics_page.master_registry())
    return [metric for registry in registries for metric in metrics_page.metrics_of(registry)]


@pytest.fixture(scope="module")
def series(metrics: list[Metric]) -> dict[str, set[str]]:
    """Every name that a query can have, with its labels."""
    found: dict[str, set[str]] = {}
    for metric in metrics:
        for name, labels in metric.series.items():
            found.setdefault(name, set()).update(labels)
    return found


@pytest.fixture(scope="module")
def values(metrics: list[Metric]) -> dict[str, set[str]]:
    """The values of each label that were seen in the registries."""
    found: dict[str, set[str]] = {}
    for metric in metrics:
        for label, seen in metric.labels.items():
            found.setdefault(label, set()).update(seen)
    return found


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Prometheus' own tool, which tools/install puts beside the interpreter."""
    beside = Path(sys.executable).with_name("promtool")
    found = str(beside) if beside.exists() else shutil.which("promtool")
    if not found:
        pytest.skip("needs promtool: tools/install")
    return subprocess.run([found, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)


# The page.


def test_the_page_is_up_to_date() -> None:
    text = (metrics_page.ROOT / metrics_page.PAGE).read_text()
    assert metrics_page.page(text) == text, "make generated"


def test_every_metric_of_ours_and_every_alert_is_on_the_page(metrics: list[Metric]) -> None:
    text = (metrics_page.ROOT / metrics_page.PAGE).read_text()
    ours = {metric.name for metric in metrics if metric.name.startswith(metrics_page.OURS)}
    assert set(re.findall(r"^\| `(bpfrl_\w+)` \|", text, re.MULTILINE)) == ours
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == [rule["alert"] for rule in metrics_page.alerts()]


def test_what_the_page_says_in_passing_exists_too(series: dict[str, set[str]]) -> None:
    for name in re.findall(r"`(bpfrl_\w*)`", metrics_page.PAGE.read_text()):
        assert [each for each in series if each.startswith(name)], name


# The names.


@pytest.mark.parametrize("registry", [metrics_page.node_registry, metrics_page.master_registry])
def test_names_are_as_prometheus_wants_them(registry: Any) -> None:
    result = promtool("check", "metrics", text=generate_latest(registry()).decode())
    # python_info and the like are not ours to name.
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("bpfrl_")]
    assert complaints == []


def test_units_are_base_units_and_counters_say_so(metrics: list[Metric]) -> None:
    for metric in metrics:
        if not metric.name.startswith(metrics_page.OURS):
            continue
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric
        assert not re.search(r"_(ms|us|ns|milliseconds|bits|kilobytes|percent|minutes)(_|$)", metric.name), metric
        assert metric.text.endswith("."), metric
        assert metric.kind in {"counter", "gauge", "histogram"}, metric


# Queries.


class Selector(NamedTuple):
    """A metric in a query, with what is asked of its labels."""

    name: str
    labels: dict[str, str]
    exact: dict[str, str]


class Query:
    """A query, taken apart by a parser of the language."""

    def __init__(self, text: str) -> None:
        for variable, value in BUILT_IN.items():
            text = text.replace(variable, value)
        assert "$" not in re.sub(r'=~"\$(node|namespace)"', "", text), text
        self.selectors: list[Selector] = []
        self.grouped: set[str] = set()
        self._visit(promql_parser.parse(text))

    def _visit(self, node: Any) -> None:
        kind = type(node).__name__
        if kind == "VectorSelector":
            found = {each.name: each for each in node.matchers.matchers}
            exact = {name: each.value for name, each in found.items() if str(each.op) == "MatchOp.Equal"}
            self.selectors.append(Selector(node.name, {name: each.value for name, each in found.items()}, exact))
        elif kind == "MatrixSelector":
            self._visit(node.vector_selector)
        elif kind == "Call":
            for each in node.args:
                self._visit(each)
        elif kind == "AggregateExpr":
            if node.modifier:
                self.grouped |= set(node.modifier.labels)
            self._visit(node.expr)
        elif kind == "BinaryExpr":
            self._visit(node.lhs)
            self._visit(node.rhs)
            if node.modifier and node.modifier.matching:
                self.grouped |= set(node.modifier.matching.labels)
        elif kind in {"ParenExpr", "UnaryExpr", "SubqueryExpr"}:
            self._visit(node.expr)
        else:
            assert kind in {"NumberLiteral", "StringLiteral"}, kind


def panels(board: Any) -> Iterator[Any]:
    for panel in board["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


def dashboard_queries() -> Iterator[tuple[str, str]]:
    for panel in panels(json.loads(DASHBOARD.read_text())):
        for target in panel.get("targets", ()):
            yield f"{panel['title']}: {target['refId']}", target["expr"]


QUERIES: Final = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in metrics_page.alerts())]


@pytest.mark.parametrize(("_", "text"), QUERIES, ids=[name for name, _ in QUERIES])
def test_every_query_asks_for_what_there_is(
    _: str, text: str, series: dict[str, set[str]], values: dict[str, set[str]]
) -> None:
    query = Query(text)
    assert query.selectors
    there: set[str] = set()
    for selector in query.selectors:
        known = (series | TARGETS_OWN)[selector.name] | TARGET
        assert selector.labels.keys() <= known, selector
        for label, value in selector.exact.items():
            assert value in values[label], selector
        there |= known
    assert query.grouped <= there


def test_a_query_of_what_does_not_exist_would_be_found(series: dict[str, set[str]]) -> None:
    query = Query(
        'sum by (colour) (rate(bpfrl_nothing_total{shape="round"}[$__rate_interval])) > on (size) bpfrl_leader'
    )
    assert query.selectors == [
        Selector("bpfrl_nothing_total", {"shape": "round"}, {"shape": "round"}),
        Selector("bpfrl_leader", {}, {}),
    ]
    assert query.grouped == {"colour", "size"}
    assert "bpfrl_nothing_total" not in series


# The dashboard.


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    found = list(panels(board))
    assert len({panel["id"] for panel in found}) == len(found)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "namespace", "node"}
    for panel in found:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one in found:
        for other in found:
            assert one is other or not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_legends_and_variables_name_labels_that_there_are(series: dict[str, set[str]]) -> None:
    board = json.loads(DASHBOARD.read_text())
    for panel in panels(board):
        for target in panel.get("targets", ()):
            query = Query(target["expr"])
            labels = query.grouped or set().union(*(series[each.name] for each in query.selectors)) | TARGET
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, target
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query)
            assert found
            assert found[2] in series[found[1]] | TARGET


# The alerts.


def test_the_rules_are_as_prometheus_wants_them() -> None:
    result = promtool("check", "rules", str(metrics_page.RULES))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(metrics_page.alerts())} rules found" in result.stdout


def test_every_alert_says_what_is_wrong_and_what_to_do(series: dict[str, set[str]]) -> None:
    for rule in metrics_page.alerts():
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "description"}
        query = Query(rule["expr"])
        labels = query.grouped | set().union(*(series.get(each.name, set()) for each in query.selectors)) | TARGET
        used = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        assert set(used) <= labels, rule


DAY: Final = 86_400
NODE: Final = 'job="bpfrl",instance="192.0.2.7:10003"'
MASTER: Final = 'job="bpfrl",instance="192.0.2.1:10004"'
OTHER: Final = 'job="bpfrl",instance="192.0.2.2:10004"'
POD: Final = f'{NODE},uid="u",namespace="shop",pod="cart-0",direction="egress"'
BUCKET: Final = "bpfrl_reconcile_duration_seconds_bucket"
Series = dict[str, str]
# What makes each alert fire, and what looks much like it and must not.
SITUATIONS: Final[dict[str, tuple[Series, Series]]] = {
    "BpfrlDaemonDown": ({f"up{{{NODE}}}": "0x60"}, {f"up{{{NODE}}}": "1x60", 'up{job="other"}': "0x60"}),
    "BpfrlNoLeader": (
        {f"bpfrl_leader{{{MASTER}}}": "0x60", f"bpfrl_leader{{{OTHER}}}": "0x60"},
        {f"bpfrl_leader{{{MASTER}}}": "0x60", f"bpfrl_leader{{{OTHER}}}": "1x60"},
    ),
    "BpfrlSeveralLeaders": (
        {f"bpfrl_leader{{{MASTER}}}": "1x60", f"bpfrl_leader{{{OTHER}}}": "1x60"},
        {f"bpfrl_leader{{{MASTER}}}": "1x60", 'bpfrl_leader{job="bpfrl-of-another-cluster"}': "1x60"},
    ),
    "BpfrlApiServerSilent": (
        {
            f"bpfrl_api_last_contact_timestamp_seconds{{{MASTER}}}": "60x60",
            f"bpfrl_api_watches_total{{{MASTER}}}": "1x60",
        },
        # One that hears a bookmark each minute, and one that takes its pods from a folder.
        {
            f"bpfrl_api_last_contact_timestamp_seconds{{{MASTER}}}": "0+60x60",
            f"bpfrl_api_watches_total{{{MASTER}}}": "1x60",
            f"bpfrl_api_last_contact_timestamp_seconds{{{OTHER}}}": "0x60",
            f"bpfrl_api_watches_total{{{OTHER}}}": "0x60",
        },
    ),
    "BpfrlNodeUnreachable": (
        {f'bpfrl_node_reachable{{{MASTER},node="node-1"}}': "0x60"},
        {f'bpfrl_node_reachable{{{MASTER},node="node-1"}}': "1x57 0x3"},
    ),
    "BpfrlNodeRefuses": (
        {f'bpfrl_node_errors_total{{{MASTER},node="node-1",reason="FAILED_PRECONDITION"}}': "0+1x60"},
        {
            f'bpfrl_node_errors_total{{{MASTER},node="node-1",reason="NOT_FOUND"}}': "0+1x60",
            f'bpfrl_node_errors_total{{{MASTER},node="node-2",reason="FAILED_PRECONDITION"}}': "7x60",
        },
    ),
    "BpfrlPodsFailing": (
        {f"bpfrl_pods_retrying{{{MASTER}}}": "2x60"},
        {f"bpfrl_pods_retrying{{{MASTER}}}": "2x50 0 2x9"},
    ),
    "BpfrlAnnotationsInvalid": (
        {f"bpfrl_pods_invalid{{{MASTER}}}": "1x60", f"bpfrl_leader{{{MASTER}}}": "1x60"},
        {
            f"bpfrl_pods_invalid{{{MASTER}}}": "1x60",
            f"bpfrl_leader{{{MASTER}}}": "0x60",
            f"bpfrl_leader{{{OTHER}}}": "1x60",
        },
    ),
    "BpfrlQueueStuck": ({f"bpfrl_queue_length{{{MASTER}}}": "3x60"}, {f"bpfrl_queue_length{{{MASTER}}}": "3x55 0 3x4"}),
    "BpfrlReconcileSlow": (
        {
            f'{BUCKET}{{{MASTER},le="10"}}': "0+90x60",
            f'{BUCKET}{{{MASTER},le="60"}}': "0+100x60",
            f'{BUCKET}{{{MASTER},le="+Inf"}}': "0+100x60",
        },
        {
            f'{BUCKET}{{{MASTER},le="10"}}': "0+100x60",
            f'{BUCKET}{{{MASTER},le="60"}}': "0+100x60",
            f'{BUCKET}{{{MASTER},le="+Inf"}}': "0+100x60",
        },
    ),
    "BpfrlEventsFailing": (
        {f'bpfrl_events_total{{{MASTER},result="failed"}}': "0+1x60"},
        {
            f'bpfrl_events_total{{{MASTER},result="sent"}}': "0+1x60",
            f'bpfrl_events_total{{{MASTER},result="failed"}}': "9x60",
        },
    ),
    "BpfrlLimitersBroken": (
        {f'bpfrl_limiters{{{NODE},state="broken"}}': "1x60"},
        {f'bpfrl_limiters{{{NODE},state="broken"}}': "0x60", f'bpfrl_limiters{{{NODE},state="gone"}}': "1x60"},
    ),
    "BpfrlLimitersUnreadable": (
        {f"bpfrl_limiters_read_success{{{NODE}}}": "0x60"},
        {f"bpfrl_limiters_read_success{{{NODE}}}": "1x57 0x3"},
    ),
    "BpfrlHighDropShare": (
        {
            f"bpfrl_pod_dropped_packets_total{{{POD}}}": "0+20x60",
            f"bpfrl_pod_passed_packets_total{{{POD}}}": "0+100x60",
        },
        {
            f"bpfrl_pod_dropped_packets_total{{{POD}}}": "0+10x60",
            f"bpfrl_pod_passed_packets_total{{{POD}}}": "0+100x60",
        },
    ),
    "BpfrlCertificateExpires": (
        {f"bpfrl_certificate_expiry_timestamp_seconds{{{NODE}}}": f"{6 * DAY}x60"},
        {f"bpfrl_certificate_expiry_timestamp_seconds{{{NODE}}}": f"{8 * DAY}x60"},
    ),
}
# What a cluster has in which all is well.
LEADER: Final[Series] = {f"bpfrl_leader{{{MASTER}}}": "1x60"}


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    assert SITUATIONS.keys() == {rule["alert"] for rule in metrics_page.alerts()}
    tests = []
    for alert, situations in SITUATIONS.items():
        for fires, given in zip((True, False), situations, strict=True):
            inputs = given if any(name.startswith("bpfrl_leader") for name in given) else given | LEADER
            samples = [{"labels": "{}", "value": 1}] if fires else []
            asked = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "exp_samples": samples}
            nothing_else = {
                "expr": f'count(ALERTS{{alertname!="{alert}",alertstate="firing"}})',
                "exp_samples": [],
                "eval_time": f"{FIRED_MINUTES}m",
            }
            tests.append(
                {
                    "name": f"{alert} {'fires' if fires else 'is quiet'}",
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in inputs.items()],
                    "promql_expr_test": [asked | {"eval_time": f"{FIRED_MINUTES}m"}, nothing_else],
                }
            )
    file = tmp_path / "alerts.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(metrics_page.RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    result = promtool("test", "rules", str(file))
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_master_at_all_is_no_leader(tmp_path: Path) -> None:
    asked = {
        "expr": 'count(ALERTS{alertname="BpfrlNoLeader",alertstate="firing"})',
        "eval_time": "10m",
        "exp_samples": [{"labels": "{}", "value": 1}],
    }
    test = {"interval": "1m", "input_series": [{"series": "up", "values": "1x60"}], "promql_expr_test": [asked]}
    file = tmp_path / "alerts.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(metrics_page.RULES)], "evaluation_interval": "1m", "tests": [test]})
    )
    result = promtool("test", "rules", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
