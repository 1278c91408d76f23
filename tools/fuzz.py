"""``python -m tools.fuzz``: made-up input for everything that reads some, for as long as it is told.

Runs the tests that are marked ``fuzz``, and those of hypothesis, round by round. Each round makes other input, which
its number says; what has failed is run again with ``--round N``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click

_ROOT = Path(__file__).parents[1]


@click.command()
@click.option("--seconds", type=click.IntRange(1), default=600, show_default=True, help="No round begins after that.")
@click.option("--round", "first", type=click.IntRange(1), default=1, show_default=True, help="The first round.")
@click.argument("arguments", nargs=-1)
def main(seconds: int, first: int, arguments: tuple[str, ...]) -> None:
    """Run rounds of the tests with made-up input; ARGUMENTS are pytest's."""
    begun, number = time.monotonic(), first
    while time.monotonic() - begun < seconds:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "fuzz or hypothesis", *arguments]
        command += [f"--hypothesis-seed={number}", "--timeout=1800", "--maxfail=5"]
        done = subprocess.run(command, cwd=_ROOT, env=os.environ | {"BPFRL_FUZZ": str(number)}, check=False)
        if done.returncode:
            sys.exit(f"round {number} failed: python -m tools.fuzz --round {number} --seconds 1 repeats it")
        number += 1
    click.echo(f"rounds {first} to {number - 1}: nothing found")


if __name__ == "__main__":
    main()
