"""``python -m tests.kernels.run``: each of Debian's kernels boots and runs :mod:`tests.kernels.core`.

What came of it goes to ``results.json`` beside this file, and from there to ``docs/kernels.md``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import click

from bpfrl.bpf import generator
from tests.kernels import debian, machine, page
from tests.kernels.page import Run

_REPOSITORY: Final = Path(__file__).parents[2]
_FOLDER: Final = _REPOSITORY / "build/kernels"
_CORE: Final = "tests/kernels/core.py"
# Ten minutes a kernel is what this may take.
_SECONDS: Final = 600.0
_SCRIPT: Final = """\
cd {repository}
export PYTHONPATH={repository} PYTHONDONTWRITEBYTECODE=1 NO_COLOR=1
uname -r
{python} -m pytest -q -p no:cacheprovider -o junit_family=xunit1 --junitxml=/run/tests.xml {core} {options}
cat /run/tests.xml
"""
_REPORT: Final = re.compile(r"<\?xml .*</testsuites>", re.DOTALL)


@click.command()
@click.option("--suite", "suites", multiple=True, type=click.Choice(debian.SUITES), help="Only this one of Debian's.")
@click.option("-k", "only", default="", help="Only these tests, as pytest has it; then nothing is kept.")
def main(suites: tuple[str, ...], only: str) -> None:
    """Boot each kernel, run the tests in it, and write docs/kernels.md."""
    for source in resources.files("bpfrl.bpf").iterdir():
        if source.name.endswith(".bpf.c"):
            generator.compile_object(source.name)  # here, where it takes no minute: the cache is there too
    runs = {each.suite: each for each in page.load()}
    failed = []
    for suite in suites or debian.SUITES:
        try:
            kernel = debian.fetch(suite, _FOLDER / suite)
        except debian.NoKernelError as error:
            click.echo(f"{suite}: left out: {error}")
            continue
        found = _tried(kernel, only)
        if found is None or set(found.tests.values()) != {"passed"}:
            failed.append(suite)
        if found is not None:
            click.echo(f"{suite}: {found.release}: {found.summary}, {found.seconds:.0f} s")
            runs[suite] = found
    if not only:
        page.save([runs[suite] for suite in debian.SUITES if suite in runs])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _tried(kernel: debian.Kernel, only: str) -> Run | None:
    """What the tests say in a kernel; None where they have not said it in time."""
    log = _FOLDER / f"{kernel.suite}.log"
    script = _SCRIPT.format(
        repository=_REPOSITORY, python=sys.executable, core=_CORE, options=f"-k '{only}'" if only else ""
    )
    try:
        ended = machine.run(kernel, script, _SECONDS)
    except subprocess.TimeoutExpired:
        click.echo(f"{kernel.suite}: not done after {_SECONDS:.0f} s")
        return None
    log.write_text(ended.console + ended.output)
    report = _REPORT.search(ended.output)
    if report is None:
        click.echo(f"{kernel.suite}: it ended without a report, see {log}")
        return None
    run = Run(kernel.suite, kernel.package, ended.output.split(maxsplit=1)[0], round(ended.seconds))
    for case in ET.fromstring(report[0]).iter("testcase"):  # noqa: S314 - our own pytest has written it
        name = str(case.get("name"))
        wrong = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "")
        run.tests[name] = {"": "passed", "skipped": "skipped"}.get(wrong, "failed")
        run.figures[name] = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
    return run


if __name__ == "__main__":
    main()
