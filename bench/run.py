"""The benchmarks: ``make bench``, or ``python -m bench.run --help``.

One command measures bpfrl beside no limit and beside the CNI bandwidth plugin on this machine, keeps the figures as
JSON, and makes the page and the plot from them. All traffic stays in network namespaces of the benchmarks' own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import click

from bench import machine, plot, report, tables
from bench.cost import COST_SECONDS, measure_cost
from bench.peers import cni_plugin
from bench.plan import QUICK, Plan
from bench.record import Case, Headroom, Results, Row
from bench.traffic import FIRST_SECONDS, OMITTED_SECONDS, measure, measure_first_second
from bpfrl.errors import InvalidValueError
from bpfrl.units import Rate

_REPOSITORY: Final = Path(__file__).parent.parent
_FAR_SECONDS: Final = 3
# To build a lab, to attach, to let queues run empty and to detach: what a run takes besides its traffic.
_OVERHEAD_SECONDS: Final = 0.8
_FAILURES: Final = (RuntimeError, OSError, ArithmeticError, LookupError, ValueError, subprocess.SubprocessError)

Result = TypeVar("Result")


class Places(NamedTuple):
    """Where the results go."""

    figures: Path
    page: Path
    plot: Path

    @classmethod
    def under(cls, folder: Path | None) -> Places:
        """All in one folder, or where the repository keeps them."""
        if folder:
            return cls(folder / "latest.json", folder / "benchmarks.md", folder / "benchmarks.svg")
        docs = _REPOSITORY / "docs"
        return cls(_REPOSITORY / "bench" / "results" / "latest.json", docs / "benchmarks.md", docs / "benchmarks.svg")


class Runner:
    """Runs a plan's cases one after the other, and says on stderr how far it is.

    A case that fails does not end the run: it is a result too.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._cases = plan.cases()
        self._far = plan.far_cases()
        self._first = plan.first_second_cases()
        self._costs = plan.cost_cases()
        self._total = sum(map(len, (self._cases, self._far, self._first, self._costs)))
        self._begun = 0

    def estimate(self) -> float:
        """How long everything takes, minutes."""
        traffic = (
            len(self._cases) * (self.plan.seconds + OMITTED_SECONDS)
            + len(self._far) * (_FAR_SECONDS + OMITTED_SECONDS)
            + len(self._first) * FIRST_SECONDS
            + len(self._costs) * COST_SECONDS
        )
        return (traffic + self._total * _OVERHEAD_SECONDS) / 60

    def results(self, command: str) -> Results:
        """Measure everything."""
        facts, start = machine.describe(), time.monotonic()
        _say(f"{self._total} runs, about {self.estimate():.0f} minutes")
        rows = [self._row(case) for case in self._cases]
        headroom = self._headroom()
        first_second = [first for case in self._first if (first := self._attempt(case, measure_first_second)[0])]
        costs = [cost for case in self._costs for cost in self._attempt(case, measure_cost)[0] or ()]
        minutes = (time.monotonic() - start) / 60
        return Results(facts, command, self.plan.seconds, minutes, rows, headroom, first_second, costs)

    def _row(self, case: Case) -> Row:
        row = Row(case, *self._attempt(case, partial(measure, seconds=self.plan.seconds)))
        _say(f"      {tables.brief(row)}")
        return row

    def _headroom(self) -> list[Headroom]:
        goodputs: dict[Case, list[float]] = {}
        for case in self._far:
            figures, _ = self._attempt(case, partial(measure, seconds=_FAR_SECONDS))
            if figures:
                goodputs.setdefault(case, []).append(figures.goodput)
        return [Headroom(case.limiter, case.flows, found) for case, found in goodputs.items()]

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


def _reason(error: Exception) -> str:
    """One line; of a command that failed, what it said."""
    said = (error.stderr or error.stdout or "") if isinstance(error, subprocess.CalledProcessError) else ""
    return " ".join(f"{type(error).__name__}: {said or error}".split())


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
        cni_plugin()
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--seconds", type=click.IntRange(min=1), help="Length of each run, without its first second.")
@click.option("--rates", callback=_parse_rates, help="The limits, as 1mbit,1gbit.")
@click.option("--flows", callback=_parse_numbers, help="Numbers of TCP flows, as 1,16.")
@click.option("--quick", is_flag=True, help="A subset of about three minutes; give the other options to change it.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Put the JSON, the page and the plot in this folder. [default: bench/results and docs]",
)
@click.option("--report-only", is_flag=True, help="Measure nothing: make page and plot again from the JSON.")
def main(
    seconds: int | None,
    rates: tuple[int, ...] | None,
    flows: tuple[int, ...] | None,
    quick: bool,
    output: Path | None,
    report_only: bool,
) -> None:
    """Measure bpfrl, the CNI bandwidth plugin and no limit side by side."""
    places = Places.under(output)
    if report_only and not places.figures.exists():
        raise click.ClickException(f"there is no {places.figures} to report on: leave out --report-only")
    if not report_only:
        _check_machine()
        # Ended from outside, everything is taken down as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        usual = QUICK if quick else Plan()
        plan = replace(usual, seconds=seconds or usual.seconds, rates=rates or usual.rates, flows=flows or usual.flows)
        command = _command(quick, seconds, rates, flows)
        Runner(plan).results(command).save(places.figures)
    results = Results.load(places.figures)
    plot.write(results, places.plot)
    report.write(results, places.page, places.plot)
    for place in places:
        click.echo(place)


def _command(quick: bool, seconds: int | None, rates: tuple[int, ...] | None, flows: tuple[int, ...] | None) -> str:
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
    return " ".join(words)


if __name__ == "__main__":
    main()
