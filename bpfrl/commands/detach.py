"""``bpfrl detach``: take limits off pods of this node."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from bpfrl import cgroup
from bpfrl.bpf.limiter import Broken
from bpfrl.commands import completing
from bpfrl.commands.options import FAILURE, FOLDER, UID, LocalNode, nothing_limited
from bpfrl.commands.progress import progress
from bpfrl.errors import BpfrlError
from bpfrl.limits import PodRef


@click.command()
@click.option(
    "--pod-uid",
    "uids",
    type=UID,
    multiple=True,
    shell_complete=completing.limited,
    help="This pod, as bpfrl list shows it. Repeatable.",
)
@click.option("--cgroup", "path", type=FOLDER, shell_complete=completing.cgroups, help="This cgroup.")
@click.option("--all", "everything", is_flag=True, help="Every limiter on this node.")
@click.option("--cooperate", is_flag=True, help="With --cgroup: what attach --cooperate did there.")
@click.pass_obj
def detach(node: LocalNode, uids: tuple[str, ...], path: Path | None, everything: bool, cooperate: bool) -> None:
    """Take the limit off a pod, and leave nothing of it behind.

    Connections go on at full speed. A pod that has no limit is no error.

    \b
    EXAMPLES
      bpfrl detach --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10
      bpfrl detach --cgroup /sys/fs/cgroup/system.slice/backup.service
      bpfrl detach --all
    """
    if cooperate:
        if path is None or uids or everything:
            raise click.UsageError("--cooperate goes with --cgroup, as at bpfrl attach, and nothing else")
        detached = node.agent().stop_cooperating(cgroup.id_of(cgroup.check(path)))
        click.echo(f"{path} {'cooperates no more' if detached else 'does not cooperate'}")
        return
    if sum((bool(uids), path is not None, everything)) != 1:
        raise click.UsageError("which pod? use one of --pod-uid UID, --cgroup PATH and --all")
    agent = node.agent()
    if path:
        uid, change = agent.detach_cgroup(cgroup.check(path))
        click.echo(f"{PodRef(uid).label} {change.value}")
        return
    targets: Sequence[str] = uids
    if everything:
        targets = [found.uid if isinstance(found, Broken) else found.pod.uid for found in agent.limiters()]
        if not targets:
            click.echo(nothing_limited(agent), err=True)
    failed = False
    with progress("detaching", len(targets)) as done:
        for uid in targets:
            try:
                change = agent.detach(uid)
            except BpfrlError as error:
                # With several to do, one that cannot be done is no reason to leave the others.
                click.echo(f"bpfrl: {error}", file=sys.stderr)
                failed = True
            else:
                click.echo(f"{PodRef(uid).label} {change.value}", file=sys.stdout)
            done()
    if failed:
        sys.exit(FAILURE)
