"""``bpfrl list``: what is limited."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Final

import click
from rich.console import Console
from rich.live import Live

from bpfrl import cgroup, render
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.commands.options import LocalNode, nothing_limited
from bpfrl.node.agent import Agent

_REDRAW_SECONDS: Final = 1.0
# Wider than any row: a UID that is cut off is of no use.
_UNCUT_WIDTH: Final = 4096


@click.command("list")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml", "name"]),
    default="table",
    show_default=True,
    help="The form of the output.",
)
@click.option("-w", "--watch", is_flag=True, help="Draw the table again each second, with the current rates.")
@click.pass_obj
def list_(node: LocalNode, output: str, watch: bool) -> None:
    """Show the limited pods of this node.

    Everything comes from the kernel; no daemon has to run. TX is what the pod has sent and RX what it has received
    since it was limited, in bytes at layer 3 and in packets; DROP is what did not pass.

    \b
    EXAMPLES
      bpfrl list
      bpfrl list -w -o wide
      bpfrl list -o json
    """
    if watch and output not in ("table", "wide"):
        raise click.UsageError(f"--watch draws tables: it does not go with -o {output}")
    agent = node.agent()
    if watch:
        _watch(agent, wide=output == "wide")
        return
    rows, broken = _look(agent, paths=output not in ("table", "name"))
    if output in ("table", "wide"):
        if rows or broken:
            _console().print(render.table(rows, broken, wide=output == "wide"))
        else:
            click.echo(nothing_limited(agent), err=True)
        return
    form = {"json": render.to_json, "yaml": render.to_yaml, "name": render.to_names}[output]
    text = form(rows, broken)
    if text:
        click.echo(text)


def _look(agent: Agent, *, paths: bool) -> tuple[list[render.Row], list[Broken]]:
    found, now = agent.limiters(), time.time()
    rows = [
        render.Row(status, now, cgroup.path_of(status.cgroup_id) if paths and status.cgroup_id else None)
        for status in found
        if isinstance(status, Status)
    ]
    return rows, [folder for folder in found if isinstance(folder, Broken)]


def _watch(agent: Agent, *, wide: bool) -> None:
    console = _console(cut=True)
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else None
    before: dict[str, tuple[Status, float]] = {}
    with live or nullcontext():
        while True:
            rows, broken = _look(agent, paths=wide)
            rows = [row._replace(before=before.get(row.status.pod.uid)) for row in rows]
            drawn = render.table(rows, broken, wide=wide, rates=True)
            if live:
                live.update(drawn, refresh=True)
            else:
                console.print(drawn)
            before = {row.status.pod.uid: (row.status, row.now) for row in rows}
            time.sleep(_REDRAW_SECONDS)


def _console(*, cut: bool = False) -> Console:
    """Where tables go. Only one that is drawn again and again is cut to the terminal: a list is to be read whole."""
    return Console(width=None if cut and sys.stdout.isatty() else _UNCUT_WIDTH, highlight=False)
