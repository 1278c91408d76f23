"""What a reader sees first: who reaches what, who is better at what, and what is not good. All of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from bench import overheads
from bench.findings import (
    GROUPS,
    OURS,
    PEERS,
    TRAFFIC,
    Pair,
    Score,
    Shortfall,
    in_common,
    scores,
    shortfalls,
    usual,
    waited,
)
from bench.record import Group, Limiter, Measured, Results
from bench.sections import section
from bench.tables import NAMES, NOTHING, name, percent, significant, situation, table

_WORST_SHOWN: Final = 3
_LEADS_SHOWN: Final = 8


def in_short(results: Results) -> str:
    """A sentence for each group, for what the machine can do at most, and for what it costs."""
    lines = []
    for group in TRAFFIC:
        found = in_common(results.rows, group)
        reached = [f"{NAMES[limiter]} {_reached(members)}" for limiter, members in found.items()]
        if reached:
            lines.append(f"- **{GROUPS[group]}**: {'; '.join(reached)}.")
    lines += overheads.sentences(results)
    note = (
        "Of the limit at layer 3 that was reached, and of what requests beside the load took longer than the way"
        " itself: medians of the cases that all limiters of a line were measured in."
    )
    return section("In short", note, "\n".join(lines))


def _reached(members: Sequence[Measured]) -> str:
    share = median(each.of_limit(each.figures.layer3) for each in members)
    waits = [wait for each in members if (wait := waited(each, each.figures.p99)) is not None]
    p99 = f", p99 {significant(median(waits))} ms" * bool(waits)
    return f"{percent(share)}{p99}"


def others_better(results: Results) -> str:
    """Where each of the others is better than bpfrl, the clearest first."""
    lines = []
    for peer in PEERS:
        leads: dict[tuple[Group, str], list[Score]] = {}
        for score in scores(results.rows):
            if score.peer == peer and score.behind:
                leads.setdefault((score.group, score.measure.title), []).append(score)
        ordered = sorted(leads.values(), key=lambda lead: -max(score.behind / score.cases for score in lead))
        lines += [_lead(lead) for lead in ordered[:_LEADS_SHOWN]]
        if len(ordered) > _LEADS_SHOWN:
            lines.append(f"- {NAMES[peer]}: {len(ordered) - _LEADS_SHOWN} more, in the table below.")
    return section("Where the others are better", "\n".join(lines or ["Nowhere in these figures."]))


def _lead(lead: Sequence[Score]) -> str:
    """In how many cases a peer is better at one thing, than bpfrl alone and than bpfrl cooperating."""
    first = lead[0]
    counts = " and ".join(f"{NAMES[score.ours]} in {score.behind} of {score.cases} cases" for score in lead)
    what = f"{NAMES[first.peer]}, {GROUPS[first.group]}, {first.measure.title}"
    return f"- {what}: better than {counts}, most {_furthest(first)}."


def _furthest(score: Score) -> str:
    pair: Pair | None = score.furthest
    if pair is None:
        return NOTHING
    ours, theirs = (score.measure.figure.cell(measured) for measured in pair)
    return f"{theirs} against {ours} ({situation(pair.ours.case)})"


def at_a_glance(results: Results) -> str:
    """The section with :func:`spreads`."""
    note = (
        "The median of the cases, and in brackets the lowest and the highest. Layer 3 is a share of the limit; p50 and"
        " p99 are what requests take longer than the way itself. Not all limiters were measured in all cases."
    )
    return section("At a glance", note, spreads(results))


def spreads(results: Results) -> str:
    """A table with a line for each limiter in each group."""
    lines = [
        [GROUPS[group], NAMES[limiter], *_spreads(members)]
        for group in TRAFFIC
        for limiter in (*OURS, *PEERS)
        if (members := usual(results.rows, group, limiter))
    ]
    header = ("traffic", "limiter", "cases", "layer 3", "Jain", "p50", "p99", "drops", "sent again")
    return table(header, lines, 2)


def _spreads(members: Sequence[Measured]) -> list[str]:
    def spread(value: Callable[[Measured], float | None], show: Callable[[float], str], unit: str = "") -> str:
        values = [found for measured in members if (found := value(measured)) is not None]
        if not values:
            return NOTHING
        return f"{show(median(values))}{unit} ({show(min(values))} to {show(max(values))})"

    return [
        str(len(members)),
        spread(lambda it: 100 * it.of_limit(it.figures.layer3), lambda value: f"{value:.1f}", " %"),
        spread(lambda it: it.figures.jain, lambda value: f"{value:.3f}"),
        spread(lambda it: waited(it, it.figures.p50), significant, " ms"),
        spread(lambda it: waited(it, it.figures.p99), significant, " ms"),
        spread(lambda it: it.figures.drops, lambda value: f"{value:.0f}"),
        spread(lambda it: it.figures.retransmits, lambda value: f"{value:.0f}"),
    ]


def comparison(results: Results) -> str:
    """For each measure in how many cases bpfrl is better, alike and worse."""
    versus = [(ours, peer) for ours in OURS for peer in PEERS]
    found: dict[tuple[str, str], dict[tuple[Limiter, Limiter], Score]] = {}
    for score in scores(results.rows):
        found.setdefault((GROUPS[score.group], score.measure.title), {})[score.ours, score.peer] = score
    lines = [
        [*words, *(_counts(by_peer.get(pair)) for pair in versus)]
        for words, by_peer in found.items()
        if any(score.alike < score.cases for score in by_peer.values())
    ]
    header = ("traffic", "measure", *(f"{NAMES[ours]} : {NAMES[peer]}" for ours, peer in versus))
    note = (
        "In how many cases bpfrl is better / neither is / the other is better. Differences within a margin"
        " (`bench/findings.py`) are none; measures by which all cases are alike are left out."
    )
    return section("Who is better at what", note, table(header, lines, 2))


def _counts(score: Score | None) -> str:
    return f"{score.ahead} / {score.alike} / {score.behind}" if score else NOTHING


def failings(results: Results) -> str:
    """Aims that are missed, what is lost where the machine is the limit, and what could not be measured."""
    misses = [_miss(found) for found in shortfalls(results.rows)]
    failures = [f"- {name(row.case)}: no figures, {row.error}." for row in results.rows if row.error]
    lines = [*misses, *failures] or ["Nothing in these figures."]
    note = "Where bpfrl misses what it aims at, and what could not be measured."
    return section("What is not good", note, "\n".join(lines))


def _miss(found: Shortfall) -> str:
    worst = [
        f"{found.measure.figure.cell(measured)} ({situation(measured.case)})"
        for measured in found.missing[:_WORST_SHOWN]
    ]
    return (
        f"- {GROUPS[found.group]}, {NAMES[found.ours]}, {found.measure.title}: {found.measure.missed} in"
        f" {len(found.missing)} of {found.cases} cases, worst {'; '.join(worst)}."
    )
