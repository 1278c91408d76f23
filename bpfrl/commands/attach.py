"""``bpfrl attach``: limit a pod of this node."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

import click

from bpfrl import cgroup
from bpfrl.bpf import generator
from bpfrl.commands import completing
from bpfrl.commands.options import FOLDER, LocalNode, limit_options, limiting, pod_options
from bpfrl.commands.progress import patience
from bpfrl.errors import CgroupNotFoundError, InvalidValueError
from bpfrl.limits import Limits, PodRef

# A limiter has 24 KB; what is a thousand times as long is not one.
_LONGEST_OBJECT: Final = 16 * 2**20


@click.command()
@limit_options
@pod_options
@click.option(
    "--cgroup",
    "path",
    type=FOLDER,
    shell_complete=completing.cgroups,
    help="This cgroup v2 folder, of a pod or of anything else.",
)
@click.option("--object", "file", type=click.File("rb"), help="Attach what bpfrl generate wrote, with its limits.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait as long for a pod whose cgroup is not there yet.",
)
@click.option("--dry-run", is_flag=True, help="Find the cgroup and say what would be done, and change nothing.")
@click.option(
    "--cooperate",
    is_flag=True,
    help="With --cgroup, the one that holds all pods: no limit, but senders keep to what limited receivers ask for.",
)
@click.pass_obj
def attach(
    node: LocalNode,
    limits: Limits,
    pod: PodRef | None,
    path: Path | None,
    file: BinaryIO | None,
    wait: float,
    dry_run: bool,
    cooperate: bool,
) -> None:
    """Limit a pod, or change the limits of one that has some.

    Finds the pod's cgroup whatever the kubelet's cgroup driver and the pod's QoS class. New limits
    replace the present ones in place: there is no moment without a limit, connections go on, and the counters too.

    With --cooperate, limited pods below the cgroup tell their senders how fast to send, in a TCP option on ACKs, and
    pods that send keep to what they are told. bpfrl serve-node sees to this by itself.

    \b
    EXAMPLES
      bpfrl attach --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10 --rate 10mbit
      bpfrl attach --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10 --egress 10M --wait 30
      bpfrl attach --cgroup /sys/fs/cgroup/system.slice/backup.service --egress 100mbit
      bpfrl attach --cgroup /sys/fs/cgroup/kubepods.slice --cooperate
    """
    if cooperate:
        if path is None or pod or file or limits != Limits() or wait or dry_run:
            raise click.UsageError("--cooperate goes with --cgroup, the one that holds all pods, and nothing else")
        attached = node.agent().cooperate(cgroup.check(path))
        click.echo(f"{path} {'cooperates' if attached else 'unchanged'}")
        return
    image = None
    if file is None:
        limiting(limits)
    elif limits == Limits():
        image = file.read(_LONGEST_OBJECT)
        limits = generator.inspect(image).limits
    else:
        raise click.UsageError("--object brings its own limits: leave out --rate, --egress, --ingress and --burst")

    folder = _find(node, pod, path, wait)
    pod = pod or PodRef.of_cgroup(cgroup.id_of(folder))
    done = "would be limited (dry run)"
    if not dry_run:
        done = node.agent().attach(image or generator.generate(None, limits), pod, folder).value
    click.echo(f"{pod.label} {done}: {limits} at {folder}")


def _find(node: LocalNode, pod: PodRef | None, path: Path | None, wait: float) -> Path:
    if path:
        return _limitable(path)
    if pod:
        try:
            with patience(f"waiting for the cgroup of pod {pod.uid}..."):
                return node.tree().wait(pod.uid, wait)
        except CgroupNotFoundError as error:
            raise CgroupNotFoundError(f"{error} (--wait waits for it)") from error
    raise click.UsageError("which pod? use --pod-uid UID, or --cgroup PATH for a cgroup that is no pod")


def _limitable(path: Path) -> Path:
    if cgroup.check(path).samefile(cgroup.mount_point()):
        raise InvalidValueError(f"'{path}' is the root cgroup, which is the whole machine: take one below it")
    return path
