"""The benchmarks: ``make bench``, or ``python -m bench.run --help``.

One command measures bpfrl beside no limit, the CNI bandwidth plugin and a plain token bucket on this machine, keeps
the figures as JSON, and makes the page and the plots from them. All traffic stays in network namespaces of the
benchmarks' own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import click

from bench import cni, machine, plots, report, scale_page, tables
from bench.cost import COST_SECONDS, measure_cost
from bench.plan import GROUPS, QUICK, Plan
from bench.record import Case, Cost, FirstSecond, Group, Headroom, Results, Row, Run, read_before
from bench.situations import measure_case, run_seconds
from bench.traffic import FIRST_SECONDS, OMITTED_SECONDS, measure_first_second, measure_goodput
from bpfrl.errors import InvalidValueError
from bpfrl.units import Rate

_REPOSITORY: Final = Path(__file__).parent.parent
_COMPARISON: Final = _REPOSITORY / "docs" / "comparison.md"
_BEFORE: Final = Path(__file__).with_name("results") / "before.json"
_FAR_SECONDS: Final = 3
# To build a lab, to attach, to let queues run empty and to detach: what a run takes besides its traffic; and a wire.
_OVERHEAD_SECONDS: Final = 1.0
_WIRE_SECONDS: Final = 0.9
_FAILURES: Final = (RuntimeError, OSError, ArithmeticError, LookupError, ValueError, subprocess.SubprocessError)
_REASON_LENGTH: Final = 200

Result = TypeVar("Result")


class Places(NamedTuple):
    """Where the results go: the JSON, the page, and the folder of the plots."""

    figures: Path
    page: Path
    pictures: Path

    @classmethod
    def under(cls, folder: Path | None) -> Places:
        """All in one folder, or where the repository keeps them."""
        docs = folder or _REPOSITORY / "docs"
        return cls((folder or _BEFORE.parent) / "latest.json", docs / "benchmarks.md", docs)


class Runner:
    """Runs a plan's groups one after the other, and says on stderr how far it is.

    A case that fails does not end the run: it is a result too.
    """

    def __init__(self, plan: Plan, groups: Sequence[Group], command: str) -> None:
        self.plan = plan
        self._cases = {group: plan.cases(group) for group in groups}
        self._command = command
        self._total = sum(map(len, self._cases.values()))
        self._begun = 0

    def estimate(self) -> float:
        """How long everything takes, minutes."""
        return sum(self._seconds(group, case) for group, cases in self._cases.items() for case in cases) / 60

    def results(self) -> Results:
        """Measure everything."""
        facts = machine.describe()
        _say(f"{self._total} runs, about {self.estimate():.0f} minutes")
        rows: list[Row] = []
        headroom: list[Headroom] = []
        first_second: list[FirstSecond] = []
        costs: list[Cost] = []
        runs = []
        for group, cases in self._cases.items():
            start = time.monotonic()
            if group == "far":
                headroom = _together(self._all(cases, partial(measure_goodput, seconds=_FAR_SECONDS)))
            elif group == "first":
                first_second = self._all(cases, measure_first_second)
            elif group == "cost":
                costs = [cost for found in self._all(cases, measure_cost) for cost in found]
            else:
                rows += [self._row(group, case) for case in cases]
            minutes = (time.monotonic() - start) / 60
            runs.append(Run(group, facts.date, self._command, self.plan.seconds, minutes))
        before = read_before(json.loads(_BEFORE.read_text()))
        return Results(facts, runs, before, rows, headroom, first_second, costs)

    def _seconds(self, group: Group, case: Case) -> float:
        """How long a case takes."""
        lengths = {"far": _FAR_SECONDS + OMITTED_SECONDS, "first": FIRST_SECONDS, "cost": COST_SECONDS}
        traffic = lengths.get(group) or run_seconds(case, self.plan.seconds)
        return traffic + _OVERHEAD_SECONDS + _WIRE_SECONDS * bool(case.rtts)

    def _all(self, cases: Sequence[Case], function: Callable[[Case], Result]) -> list[Result]:
        """The results of all cases that have one."""
        return [found for case in cases if (found := self._attempt(case, function)[0]) is not None]

    def _row(self, group: Group, case: Case) -> Row:
        row = Row(group, case, *self._attempt(case, partial(measure_case, seconds=self.plan.seconds)))
        if row.figures:
            _say(f"      {tables.brief(row)}")
        return row

    def _attempt(self, case: Case, function: Callable[[Case], Result]) -> tuple[Result | None, str]:
        """The function's result, or why there is none."""
        self._begun += 1
        _say(f"{self._begun:4}/{self._total} {tables.name(case)}")
        try:
            return function(case), ""
        except _FAILURES as error:
            reason = _reason(error)
            _say(f"      failed: {reason}")
            return None, reason


def _together(found: Sequence[Headroom]) -> list[Headroom]:
    """The goodputs of the repeated runs of a case in one record."""
    goodputs: dict[Headroom, list[float]] = {}
    for each in found:
        goodputs.setdefault(replace(each, goodputs=()), []).extend(each.goodputs)
    return [replace(each, goodputs=all_of_it) for each, all_of_it in goodputs.items()]


def _reason(error: Exception) -> str:
    """One line; of a command that failed, how what it said begins."""
    said = (error.stderr or error.stdout or "") if isinstance(error, subprocess.CalledProcessError) else ""
    return " ".join(f"{type(error).__name__}: {said or error}".split())[:_REASON_LENGTH]


def _say(line: str) -> None:
    click.echo(line, err=True)


def _parse_rates(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(Rate.parse(each).bits for each in text.split(",")) if text else None
    except InvalidValueError as error:
        raise click.BadParameter(str(error)) from error


def _parse_numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(each) for each in text.split(",")) if text else None
    except ValueError as error:
        raise click.BadParameter(f"'{text}' are no numbers: write them as 1,16") from error


def _check_machine() -> None:
    """Say what is missing before anything has been measured.

    Raises:
        click.ClickException: something is.
    """
    if os.geteuid() != 0:
        raise click.ClickException("the benchmarks load BPF programs and make namespaces: run them as root")
    if missing := machine.missing_tools():
        raise click.ClickException(f"these tools are missing: {', '.join(missing)}")
    try:
        cni.plugin()
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error


def _load(path: Path) -> Results:
    """What was measured before.

    Raises:
        click.ClickException: it is of other benchmarks than these.
    """
    try:
        return Results.load(path)
    except (LookupError, TypeError, ValueError) as error:
        raise click.ClickException(f"{path} is of another version: measure everything again") from error


def make_page(places: Places) -> list[Path]:
    """Make the page and its pictures from all that was measured; returns where everything is.

    Raises:
        click.ClickException: the figures are of other benchmarks than these.
    """
    results = _load(places.figures)
    pictures = plots.write(results, places.pictures)
    report.write(results, places.page, pictures, scale_page.write(places.pictures))
    return [places.figures, places.page, *pictures.values()]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--seconds", type=click.IntRange(min=1), help="Length of each run, without its beginning.")
@click.option("--rates", callback=_parse_rates, help="The limits, as 1mbit,1gbit.")
@click.option("--flows", callback=_parse_numbers, help="Numbers of TCP flows, as 1,16.")
@click.option("--quick", is_flag=True, help="A subset of some minutes; give the other options to change it.")
@click.option(
    "--only",
    type=click.Choice(GROUPS),
    multiple=True,
    help="Only this group; may be repeated. What there is of the others is kept.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Put the JSON, the page and the plots in this folder. [default: bench/results and docs]",
)
@click.option("--report-only", is_flag=True, help="Measure nothing: make page and plots again from the JSON.")
def main(
    seconds: int | None,
    rates: tuple[int, ...] | None,
    flows: tuple[int, ...] | None,
    quick: bool,
    only: tuple[Group, ...],
    output: Path | None,
    report_only: bool,
) -> None:
    """Measure bpfrl, the CNI bandwidth plugin, a token bucket and no limit side by side."""
    places = Places.under(output)
    if report_only and not places.figures.exists():
        raise click.ClickException(f"there is no {places.figures} to report on: leave out --report-only")
    if not report_only:
        _check_machine()
        # Ended from outside, everything is taken down as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        usual = QUICK if quick else Plan()
        plan = replace(usual, seconds=seconds or usual.seconds, rates=rates or usual.rates, flows=flows or usual.flows)
        command = _command(quick, seconds, rates, flows, only)
        kept = _load(places.figures) if only and places.figures.exists() else None
        measured = Runner(plan, only or GROUPS, command).results()
        (kept.merged(measured) if kept else measured).save(places.figures)
    for place in make_page(places):
        click.echo(place)
    if output is None:
        report.fill(_load(places.figures), _COMPARISON)


def _command(
    quick: bool,
    seconds: int | None,
    rates: tuple[int, ...] | None,
    flows: tuple[int, ...] | None,
    only: Sequence[Group],
) -> str:
    """What measures the same again."""
    words = ["python -m bench.run"]
    if quick:
        words.append("--quick")
    if seconds:
        words.append(f"--seconds {seconds}")
    if rates:
        words.append(f"--rates {','.join(str(Rate(rate)) for rate in rates)}")
    if flows:
        words.append(f"--flows {','.join(map(str, flows))}")
    words += [f"--only {group}" for group in only]
    return " ".join(words)


if __name__ == "__main__":
    main()
