"""Limiters and findings as tables, JSON and YAML.

Tables are for eyes: short numbers, no boxes, and nothing cut off where they are piped. JSON and YAML are for
programs: exact numbers, with their unit in the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.findings import Finding, Mark
from bpfrl.limits import PodRef
from bpfrl.units import Rate, format_size

_NONE: Final = "-"
_STEPS: Final = ("", "k", "M", "G", "T", "P", "E")
_MARK_STYLES: Final = {Mark.OK: "green", Mark.WARNING: "yellow", Mark.MISSING: "red"}
_AGES: Final = (("d", 86_400), ("h", 3_600), ("m", 60))


class Row(NamedTuple):
    """One limiter as it is to be shown.

    Attributes:
        status: what its pins say.
        now: the time of the look, seconds since the epoch.
        cgroup: where it is attached, where that was looked up.
        before: an earlier look and its time, from which the current rates follow.
    """

    status: Status
    now: float
    cgroup: Path | None = None
    before: tuple[Status, float] | None = None


class _Column(NamedTuple):
    title: str
    cell: Callable[[Row], str]
    right: bool = True


_POD: Final = (
    _Column("UID", lambda row: row.status.pod.uid, right=False),
    _Column("POD", lambda row: str(row.status.pod) if row.status.pod.name else _NONE, right=False),
)
_EGRESS: Final = _Column("EGRESS", lambda row: _limit(row.status.limits.egress))
_INGRESS: Final = _Column("INGRESS", lambda row: _limit(row.status.limits.ingress))


def _counters(prefix: str, direction: Callable[[Status], Counters]) -> tuple[_Column, ...]:
    """What has passed and what was dropped in one direction."""
    return (
        _Column(f"{prefix}-BYTES", lambda row: short(direction(row.status).passed_bytes)),
        _Column(f"{prefix}-PKTS", lambda row: short(direction(row.status).passed_packets)),
        _Column(f"{prefix}-DROP-BYTES", lambda row: short(direction(row.status).dropped_bytes)),
        _Column(f"{prefix}-DROP-PKTS", lambda row: short(direction(row.status).dropped_packets)),
    )


_SENDING: Final = _Column("SENDING", lambda row: _rate(row, lambda status: status.egress.passed_bytes))
_RECEIVING: Final = _Column("RECEIVING", lambda row: _rate(row, lambda status: status.ingress.passed_bytes))
_DROPPING: Final = _Column(
    "DROPPING", lambda row: _rate(row, lambda status: status.egress.dropped_bytes + status.ingress.dropped_bytes)
)
_LISTED: Final = (
    *_POD,
    _EGRESS,
    *_counters("TX", lambda status: status.egress),
    _INGRESS,
    *_counters("RX", lambda status: status.ingress),
    _Column("AGE", lambda row: age(row.now - row.status.attached_at)),
)
_WATCHED: Final = (*_POD, _EGRESS, _SENDING, _INGRESS, _RECEIVING, _DROPPING)
_WIDE: Final = (
    _Column("PACED", lambda row: "all" if row.status.adopted else "new", right=False),
    _Column("BURST", lambda row: format_size(row.status.limits.burst) if row.status.limits.burst else "default"),
    _Column("CGROUP", lambda row: str(row.cgroup or "gone"), right=False),
)


def table(rows: Sequence[Row], broken: Sequence[Broken], *, wide: bool = False, rates: bool = False) -> Group:
    """A row for each limiter; below, a line for each that wants attention.

    Args:
        rows: the limiters.
        broken: the folders that should be limiters.
        wide: with which connections are paced, burst and cgroup.
        rates: with what passes now in the place of what has passed so far.
    """
    columns = (*(_WATCHED if rates else _LISTED), *(_WIDE if wide else ()))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for column in columns:
        grid.add_column(column.title, no_wrap=True, justify="right" if column.right else "left")
    for row in rows:
        grid.add_row(*(Text(column.cell(row)) for column in columns))
    gone = [row.status.pod.uid for row in rows if not row.status.cgroup_id]
    notes = [
        *(f"broken: {folder.uid}: {folder.reason}" for folder in broken),
        *(f"gone: {uid}: its cgroup is no more: detach it, or attach it to its pod's new cgroup" for uid in gone),
    ]
    return Group(*([grid] if rows else []), *(Text(note, style="red", no_wrap=True) for note in notes))


def to_json(rows: Sequence[Row], broken: Sequence[Broken]) -> str:
    """A JSON document: an object with the limiters under "items"."""
    return dump(_document(rows, broken), "json")


def to_yaml(rows: Sequence[Row], broken: Sequence[Broken]) -> str:
    """The document of :func:`to_json` as YAML."""
    return dump(_document(rows, broken), "yaml")


def to_names(rows: Sequence[Row], broken: Sequence[Broken]) -> str:
    """The limiters' labels, a line each, as kubectl's ``-o name``."""
    pods = [*(row.status.pod for row in rows), *(PodRef(folder.uid) for folder in broken)]
    return "\n".join(pod.label for pod in pods)


def checklist(findings: Sequence[Finding]) -> Table:
    """A row for each thing that was looked at; its advice stands below what was found."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in findings:
        lines = (*finding.found, *([f"-> {finding.advice}"] if finding.advice else []))
        mark = Text(finding.mark.value, style=_MARK_STYLES[finding.mark])
        grid.add_row(mark, Text(finding.name), Text("\n".join(lines)))
    return grid


def dump(document: Mapping[str, Any], form: str) -> str:
    """A document for programs; the form is "json" or "yaml"."""
    if form == "json":
        return json.dumps(document, indent=2)
    return yaml.safe_dump(document, sort_keys=False).rstrip()


def short(number: float) -> str:
    """At most four significant characters and a decimal prefix: 0, 999, 1.23k, 45.6M.

    >>> short(1500), short(999_999)
    ('1.50k', '1.00M')
    """
    for step in _STEPS:
        if number < 999.5 or step == _STEPS[-1]:  # noqa: PLR2004 - what rounds to 1000 takes the next prefix
            break
        number /= 1000
    if not step:
        return f"{number:.0f}"
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0  # noqa: PLR2004
    return f"{number:.{digits}f}{step}"


def age(seconds: float) -> str:
    """The largest whole unit, as kubectl shows ages: 59s, 3m, 2h, 5d."""
    for unit, length in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def _limit(rate: Rate | None) -> str:
    return _NONE if rate is None else str(rate)


def _rate(row: Row, counter: Callable[[Status], int]) -> str:
    """What a counter of byte has gained since the earlier look, in bit/s."""
    if row.before is None or row.now <= row.before[1]:
        return _NONE
    status, then = row.before
    gained = max(0, counter(row.status) - counter(status))
    return f"{short(gained * 8 / (row.now - then))}bit"


def _document(rows: Sequence[Row], broken: Sequence[Broken]) -> dict[str, Any]:
    return {
        "items": [
            *(_item(row) for row in rows),
            *({"uid": folder.uid, "error": folder.reason} for folder in broken),
        ]
    }


def _item(row: Row) -> dict[str, Any]:
    status = row.status
    return {
        "uid": status.pod.uid,
        "namespace": status.pod.namespace,
        "name": status.pod.name,
        "egress": _direction(status.limits.egress, status.egress),
        "ingress": _direction(status.limits.ingress, status.ingress),
        "burst_bytes": status.limits.burst,
        "paced": "all" if status.adopted else "new",
        "cgroup_id": status.cgroup_id or None,
        "cgroup": str(row.cgroup) if row.cgroup else None,
        "attached_at": round(status.attached_at, 3),
        "age_seconds": max(0, round(row.now - status.attached_at)),
    }


def _direction(rate: Rate | None, counters: Counters) -> dict[str, int | None]:
    return {
        "limit_bits_per_second": rate.bits if rate else None,
        "passed_bytes": counters.passed_bytes,
        "passed_packets": counters.passed_packets,
        "dropped_bytes": counters.dropped_bytes,
        "dropped_packets": counters.dropped_packets,
    }
