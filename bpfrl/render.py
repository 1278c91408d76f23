"""Limiters and findings as tables, JSON and YAML.

Tables are for eyes: short numbers, no boxes, and nothing cut off where they are piped. JSON and YAML are for
programs: exact numbers, with their unit in the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import yaml
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.findings import Finding, Mark
from bpfrl.limits import Limits, PodRef
from bpfrl.plain import plain
from bpfrl.sparkline import Sparkline
from bpfrl.units import Rate, format_size

_NONE: Final = "-"
_STEPS: Final = ("", "k", "M", "G", "T", "P", "E")
# A few seconds, and the longest state's name.
_LEAST_LOAD: Final = 8
_LEAST_STATE: Final = 7
_MARK_STYLES: Final = {Mark.OK: "green", Mark.WARNING: "yellow", Mark.MISSING: "red"}
_AGES: Final = (("d", 86_400), ("h", 3_600), ("m", 60))


class View(Enum):
    """Whose limiters are shown, which decides by what they are known."""

    HERE = "this node's"
    NODES = "those of nodes that were named"
    NAMESPACE = "one namespace's"
    CLUSTER = "the whole cluster's"

    @property
    def of_pods(self) -> bool:
        """True where pods are shown, with a limiter or without one; else limiters are."""
        return self in (View.NAMESPACE, View.CLUSTER)


class Sample(NamedTuple):
    """What passed at one time, bit/s; None: nobody knows."""

    egress: float | None
    ingress: float | None


class Row(NamedTuple):
    """One limiter, or one pod that should have one, as it is to be shown.

    Attributes:
        found: what its pins say, or why they do not; None: there is no limiter, or its node does not say.
        now: the time of the look, seconds since the epoch.
        cgroup: where it is attached, where that was looked up.
        before: an earlier look and its time, from which the current rates follow.
        node: its node, where more than this one is looked at.
        pod: the pod as the cluster knows it; None: as its limiter does.
        state: how what is in force compares with what the pod asks for; "" where nobody has asked the cluster.
        reason: what there is to say about that.
        wanted: what the pod asks for.
        samples: what passed at the last looks, the latest last.
    """

    found: Status | Broken | None
    now: float
    cgroup: Path | None = None
    before: tuple[Status, float] | None = None
    node: str = ""
    pod: PodRef | None = None
    state: str = ""
    reason: str = ""
    wanted: Limits | None = None
    samples: Sequence[Sample] = ()

    @property
    def status(self) -> Status | None:
        """What its pins say, where they do."""
        return self.found if isinstance(self.found, Status) else None

    @property
    def ref(self) -> PodRef:
        """The pod, as well as it is known."""
        if self.pod:
            return self.pod
        if self.found is None:
            raise ValueError("a row is of a limiter, or of a pod")
        return PodRef(self.found.uid) if isinstance(self.found, Broken) else self.found.pod


class _Unpadded:
    """A table without the spaces at its lines' ends: one long reason would have each of them wrap at a terminal."""

    def __init__(self, grid: Table) -> None:
        self._grid = grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for line in console.render_lines(self._grid, options, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                yield from line[:-1]
                yield line[-1]._replace(text=line[-1].text.rstrip())
            yield Segment.line()


class _Column(NamedTuple):
    """A column; where there is no room for all, it may become as narrow as ``least``, or 0: stays as it is."""

    title: str
    cell: Callable[[Row], str | Sparkline]
    right: bool = True
    least: int = 0


def _read(title: str, read: Callable[[Status], str], *, right: bool = True) -> _Column:
    """A column of what a limiter's pins say."""
    return _Column(title, lambda row: read(row.status) if row.status else _NONE, right)


def _counters(prefix: str, direction: Callable[[Status], Counters]) -> tuple[_Column, ...]:
    """What has passed and what was dropped in one direction."""
    return (
        _read(f"{prefix}-BYTES", lambda status: short(direction(status).passed_bytes)),
        _read(f"{prefix}-PKTS", lambda status: short(direction(status).passed_packets)),
        _read(f"{prefix}-DROP-BYTES", lambda status: short(direction(status).dropped_bytes)),
        _read(f"{prefix}-DROP-PKTS", lambda status: short(direction(status).dropped_packets)),
    )


def _sent(status: Status) -> int:
    return status.egress.passed_bytes


def _received(status: Status) -> int:
    return status.ingress.passed_bytes


def _dropped(status: Status) -> int:
    return status.egress.dropped_bytes + status.ingress.dropped_bytes


def _gained(row: Row, counter: Callable[[Status], int]) -> int | None:
    if row.status is None or row.before is None or row.now <= row.before[1]:
        return None
    return max(0, counter(row.status) - counter(row.before[0]))


def _drop_share(row: Row) -> str:
    """Which part of the bytes that came since the earlier look was dropped."""
    dropped, passed = _gained(row, _dropped), _gained(row, lambda status: _sent(status) + _received(status))
    if dropped is None or passed is None or not dropped + passed:
        return _NONE
    return f"{dropped / (dropped + passed):.1%}"


def _cgroup(row: Row) -> str:
    """Its path, where this machine has it; another node's is known by its id alone."""
    if row.cgroup:
        return str(row.cgroup)
    if row.status is None:
        return _NONE
    return f"id={row.status.cgroup_id}" if row.status.cgroup_id else "gone"


_UID: Final = _Column("UID", lambda row: row.ref.uid, right=False)
_NAMESPACE: Final = _Column("NAMESPACE", lambda row: row.ref.namespace or _NONE, right=False)
_NAME: Final = _Column("POD", lambda row: row.ref.name or row.ref.uid, right=False)
_POD: Final = _Column("POD", lambda row: str(row.ref) if row.ref.name else _NONE, right=False)
_POD_OR_UID: Final = _Column("POD", lambda row: str(row.ref), right=False)
_NODE: Final = _Column("NODE", lambda row: row.node or _NONE, right=False)
_EGRESS: Final = _read("EGRESS", lambda status: _limit(status.limits.egress))
_INGRESS: Final = _read("INGRESS", lambda status: _limit(status.limits.ingress))
_SENDING: Final = _Column("SENDING", lambda row: _rate(row, _sent))
_RECEIVING: Final = _Column("RECEIVING", lambda row: _rate(row, _received))
_DROPPING: Final = _Column("DROPPING", lambda row: _rate(row, _dropped))
_TX_LOAD: Final = _Column("TX-LOAD", lambda row: _load(row, egress=True), right=False, least=_LEAST_LOAD)
_RX_LOAD: Final = _Column("RX-LOAD", lambda row: _load(row, egress=False), right=False, least=_LEAST_LOAD)
_DROPS: Final = _Column("DROPS", _drop_share)
_LISTED: Final = (
    _EGRESS,
    *_counters("TX", lambda status: status.egress),
    _INGRESS,
    *_counters("RX", lambda status: status.ingress),
    _Column("AGE", lambda row: age(row.now - row.status.attached_at) if row.status else _NONE),
)
_WATCHED: Final = (_EGRESS, _SENDING, _INGRESS, _RECEIVING, _DROPPING)
_DRAWN: Final = (_EGRESS, _SENDING, _TX_LOAD, _INGRESS, _RECEIVING, _RX_LOAD, _DROPPING, _DROPS)
_WIDE: Final = (
    _read("PACED", lambda status: "all" if status.adopted else "new", right=False),
    _read("BURST", lambda status: format_size(status.limits.burst) if status.limits.burst else "default"),
    _Column("CGROUP", _cgroup, right=False),
)
_STATE: Final = _Column(
    "STATE", lambda row: f"{row.state}: {row.reason}" if row.reason else row.state, right=False, least=_LEAST_STATE
)


def _names(view: View, *, wide: bool, drawn: bool) -> tuple[_Column, ...]:
    """The columns that say which pod it is."""
    if view.of_pods:
        namespace = (_NAMESPACE,) if view is View.CLUSTER else ()
        return (*namespace, _NAME, *((_UID,) if wide else ()), _NODE)
    pod = (_POD_OR_UID,) if drawn and not wide else (_UID, _POD)
    return (*pod, *((_NODE,) if wide and view is View.NODES else ()))


def table(
    rows: Sequence[Row], *, view: View = View.HERE, wide: bool = False, rates: bool = False, drawn: bool = False
) -> Group:
    """A row for each limiter; below, a line for each that wants attention.

    Args:
        rows: the limiters, in this order.
        view: whose they are.
        wide: with which connections are paced, burst and cgroup, and all names of a pod.
        rates: with what passes now in the place of what has passed so far.
        drawn: the same with pictures of the last samples, and names in one column.
    """
    measured = _DRAWN if drawn else _WATCHED if rates else _LISTED
    last = (_STATE,) if view.of_pods else ()
    columns = (*_names(view, wide=wide, drawn=drawn), *measured, *(_WIDE if wide else ()), *last)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    whole = [[column.cell(row) for column in columns] for row in rows if row.status or row.state]
    for number, column in enumerate(columns):
        cells = (cells[number] for cells in whole)
        # What still does not fit is cut off at the end of the line: half of each column is of no use.
        least = column.least or max(len(column.title), *(len(cell) for cell in cells if isinstance(cell, str)), 0)
        justify: Literal["left", "right"] = "right" if column.right else "left"
        grid.add_column(column.title, no_wrap=not column.least, justify=justify, min_width=least)
    for each in whole:
        grid.add_row(
            *(Text(plain(cell), no_wrap=True, overflow="ellipsis") if isinstance(cell, str) else cell for cell in each)
        )
    notes = (Text(plain(note), style="red", no_wrap=True) for note in _notes(rows))
    return Group(*([_Unpadded(grid)] if whole else []), *notes)


def _notes(rows: Sequence[Row]) -> Iterable[str]:
    """What wants attention; where there are states, they say so."""
    stateless = [row for row in rows if not row.state]
    for row in stateless:
        if isinstance(row.found, Broken):
            place = f"{row.node}: " if row.node else ""
            yield f"broken: {place}{row.found.uid}: {row.found.reason}"
    for row in stateless:
        if row.status and not row.status.cgroup_id:
            uid = row.status.pod.uid
            yield f"gone: {uid}: its cgroup is no more: detach it, or attach it to its pod's new cgroup"


def to_json(rows: Sequence[Row]) -> str:
    """A JSON document: an object with the limiters under "items"."""
    return dump(_document(rows), "json")


def to_yaml(rows: Sequence[Row]) -> str:
    """The document of :func:`to_json` as YAML."""
    return dump(_document(rows), "yaml")


def to_names(rows: Sequence[Row]) -> str:
    """A line each, as kubectl's ``-o name``: a pod's name where the cluster tells it, else the limiter's label."""
    return "\n".join(f"pod/{row.pod.name}" if row.pod and row.pod.name else row.ref.label for row in rows)


# What rows can be sorted by. Numbers come highest first, as with kubectl top; who has none comes last.
_NUMBERS: Final[Mapping[str, Callable[[Row], float | None]]] = {
    "age": lambda row: row.now - row.status.attached_at if row.status else None,
    "egress": lambda row: row.status.limits.egress.bits if row.status and row.status.limits.egress else None,
    "ingress": lambda row: row.status.limits.ingress.bits if row.status and row.status.limits.ingress else None,
    "sent": lambda row: _sent(row.status) if row.status else None,
    "received": lambda row: _received(row.status) if row.status else None,
    "dropped": lambda row: _dropped(row.status) if row.status else None,
    "sending": lambda row: rate(row, _sent),
    "receiving": lambda row: rate(row, _received),
    "dropping": lambda row: rate(row, _dropped),
}
_BY_NAME: Final = "name"
SORT_KEYS: Final = (_BY_NAME, *_NUMBERS)
# Those that only two looks can tell.
CURRENT_KEYS: Final = frozenset({"sending", "receiving", "dropping"})


def sort(rows: Iterable[Row], key: str) -> list[Row]:
    """The rows by one of :data:`SORT_KEYS`: names in their order, numbers highest first, and rows without one last."""
    named = sorted(rows, key=lambda row: (not row.ref.name, row.ref.namespace, row.ref.name, row.ref.uid))
    if key == _BY_NAME:
        return named
    numbers = [(_NUMBERS[key](row), row) for row in named]
    known = sorted(((number, row) for number, row in numbers if number is not None), key=lambda pair: -pair[0])
    return [*(row for _, row in known), *(row for number, row in numbers if number is None)]


def sample(row: Row) -> Sample:
    """What passes now."""
    return Sample(rate(row, _sent), rate(row, _received))


def rate(row: Row, counter: Callable[[Status], int]) -> float | None:
    """What a counter of byte has gained since the earlier look, in bit/s; None: there was none."""
    gained = _gained(row, counter)
    return None if gained is None or row.before is None else gained * 8 / (row.now - row.before[1])


def checklist(findings: Sequence[Finding]) -> RenderableType:
    """A row for each thing that was looked at; its advice stands below what was found."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in findings:
        lines = (*finding.found, *([f"-> {finding.advice}"] if finding.advice else []))
        mark = Text(finding.mark.value, style=_MARK_STYLES[finding.mark])
        grid.add_row(mark, Text(finding.name), Text("\n".join(map(plain, lines))))
    return _Unpadded(grid)


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


def _limit(limit: Rate | None) -> str:
    return _NONE if limit is None else str(limit)


def _rate(row: Row, counter: Callable[[Status], int]) -> str:
    found = rate(row, counter)
    return _NONE if found is None else f"{short(found)}bit"


def _load(row: Row, *, egress: bool) -> Sparkline | str:
    """The last samples against the limit."""
    limits = row.status.limits if row.status else row.wanted
    limit = (limits.egress if egress else limits.ingress) if limits else None
    if limit is None:
        return _NONE
    passed = (each.egress if egress else each.ingress for each in row.samples)
    return Sparkline([None if bits is None else bits / limit.bits for bits in passed])


def _document(rows: Sequence[Row]) -> dict[str, Any]:
    return {"items": [_item(row) for row in rows]}


def _item(row: Row) -> dict[str, Any]:
    if row.state:
        return (
            _names_of(row)
            | {"state": row.state, "reason": row.reason, "wanted": limits_document(row.wanted)}
            | _facts(row)
        )
    if isinstance(row.found, Broken):
        return {"uid": row.found.uid, "error": row.found.reason} | ({"node": row.node} if row.node else {})
    return _names_of(row) | _facts(row)


def _names_of(row: Row) -> dict[str, str]:
    names = {"uid": row.ref.uid, "namespace": row.ref.namespace, "name": row.ref.name}
    return names | {"node": row.node} if row.node else names


def limits_document(limits: Limits | None) -> dict[str, int | None] | None:
    """Limits for programs: exact numbers, with their unit in the key."""
    if limits is None:
        return None
    return {
        "egress_bits_per_second": limits.egress.bits if limits.egress else None,
        "ingress_bits_per_second": limits.ingress.bits if limits.ingress else None,
        "burst_bytes": limits.burst,
    }


def _facts(row: Row) -> dict[str, Any]:
    """What its pins say; each of it is null where there are none."""
    status = row.status
    return {
        "egress": _direction(status.limits.egress, status.egress) if status else None,
        "ingress": _direction(status.limits.ingress, status.ingress) if status else None,
        "burst_bytes": status.limits.burst if status else None,
        "paced": ("all" if status.adopted else "new") if status else None,
        "cgroup_id": (status.cgroup_id or None) if status else None,
        "cgroup": str(row.cgroup) if row.cgroup else None,
        "attached_at": round(status.attached_at, 3) if status else None,
        "age_seconds": max(0, round(row.now - status.attached_at)) if status else None,
    }


def _direction(limit: Rate | None, counters: Counters) -> dict[str, int | None]:
    return {
        "limit_bits_per_second": limit.bits if limit else None,
        "passed_bytes": counters.passed_bytes,
        "passed_packets": counters.passed_packets,
        "dropped_bytes": counters.dropped_bytes,
        "dropped_packets": counters.dropped_packets,
    }
