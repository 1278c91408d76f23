"""``docs/metrics.md``: the metrics from the daemons' own registries, the alerts from their rules.

The registries are filled as the daemons fill them, with everything told once, so that all names and labels are there.
"""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from prometheus_client import CollectorRegistry

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.libbpf import Cost
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import RefusedError, UnreachableError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.master.metrics import MasterMetrics
from bpfrl.master.observer import Backlog, Census
from bpfrl.node.agent import Agent
from bpfrl.node.metrics import NodeMetrics
from bpfrl.rpc.client import Connections
from bpfrl.rpc.tls import Certificates
from bpfrl.units import Rate

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = Path("docs/metrics.md")
RULES: Final = ROOT / "deploy" / "prometheus" / "rules.yaml"
OURS: Final = "bpfrl_"
_BLOCK: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What a histogram's samples have besides the labels of the metric.
_BUCKET: Final = "le"
_WIDTH: Final = 120


class Metric(NamedTuple):
    """A metric as it is told.

    Attributes:
        name: as it is written in a query, but for a histogram's suffixes.
        kind: counter, gauge, histogram or info.
        labels: with the values that were seen.
        text: its help.
    """

    name: str
    kind: str
    labels: dict[str, set[str]]
    text: str

    @property
    def series(self) -> dict[str, set[str]]:
        """The names in a query, each with its labels."""
        labels = set(self.labels)
        if self.kind != "histogram":
            return {self.name: labels}
        return {f"{self.name}_bucket": labels | {_BUCKET}, f"{self.name}_sum": labels, f"{self.name}_count": labels}


class _ExampleNode(Agent):
    """A node that has one limiter of each kind."""

    def limiters(self) -> list[Status | Broken]:
        pod = PodRef("8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10", "shop", "cart-0")
        limits = Limits(Rate(10**7), Rate(10**7))
        return [Status(pod, limits, Counters(), Counters(), 7, 1.0), Broken("0" * 32, "half of it")]

    def costs(self) -> list[tuple[str, Cost]]:
        return [(program, Cost(1, 1, 1, 1)) for program in ("egress", "ingress", "sockops", "cooperate")]


class _ExampleCertificates(Certificates):
    """A certificate that needs no files."""

    def __init__(self) -> None:
        pass

    def expires(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC)


def node_registry() -> CollectorRegistry:
    """A node's, in which everything has been told once."""
    metrics = NodeMetrics(_ExampleNode(), _ExampleCertificates(), pod_labels=True, most_pods=10)
    for operation, result in (
        ("attach", Change.ATTACHED.name.lower()),
        ("update", Change.UPDATED.name.lower()),
        ("detach", Change.DETACHED.name.lower()),
        ("list", "OK"),
    ):
        metrics.answered(operation, result, 0.001)
    asyncio.run(metrics.refresh())
    metrics.close()
    return metrics.registry


def master_registry() -> CollectorRegistry:
    """An acting master's, in which everything has been told once."""
    metrics = MasterMetrics(_ExampleCertificates(), 10)
    census = Census(True, True, 2, 1, 1, Backlog(), {"192.0.2.1": "node-1"})
    metrics.attend(lambda: census)

    async def calls() -> None:
        client: Any = metrics.client("192.0.2.1", 1, None, Connections(1))
        for verb in ("attach", "attach_wait", "update", "detach", "list"):
            for error in (None, RefusedError("no", "NOT_FOUND"), UnreachableError("no answer")):
                with suppress(RefusedError, UnreachableError):
                    async with client._observed(verb):  # noqa: SLF001 - what each of its calls goes through
                        if error:
                            raise error
        await metrics.refresh()

    metrics.settled(0.001)
    metrics.api_failed(410)
    metrics.api_failed(0)
    asyncio.run(calls())
    return metrics.registry


def metrics_of(registry: CollectorRegistry) -> list[Metric]:
    """What a registry tells, by name."""
    found = []
    for family in registry.collect():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels: dict[str, set[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
        if family.type == "histogram":
            labels.pop(_BUCKET, None)
        found.append(Metric(name, "gauge" if family.type == "info" else family.type, labels, family.documentation))
    return sorted(found)


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def page(text: str) -> str:
    """A page with its generated blocks as they should be."""
    blocks = {
        "node": "".join(_table(metrics_of(node_registry()))),
        "master": "".join(_table(metrics_of(master_registry()))),
        "alerts": "".join(map(_alert, alerts())),
    }
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]]}\n{match[3]}", text)


def _table(metrics: Iterable[Metric]) -> Iterable[str]:
    yield "| metric | type | labels | |\n| --- | --- | --- | --- |\n"
    for metric in metrics:
        if metric.name.startswith(OURS):
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |\n"


def _alert(rule: dict[str, Any]) -> str:
    expression = " ".join(rule["expr"].split())
    when = f"{rule['labels']['severity'].capitalize()}, after {rule['for']} of `{expression}`"
    text = textwrap.fill(rule["annotations"]["description"], _WIDTH, break_on_hyphens=False)
    return f"### {rule['alert']}\n\n{when}\n\n{text}\n\n"
