"""``bpfrl serve-node`` and ``bpfrl serve-master``: the daemons."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from bpfrl import logs
from bpfrl.commands import completing
from bpfrl.commands.options import (
    DEFAULT_PORT,
    ENDPOINT,
    FAILURE,
    FOLDER,
    Function,
    LocalNode,
    certificates,
    daemon_options,
    node_port_option,
)
from bpfrl.errors import BpfrlError

log = logging.getLogger(__name__)


def _monitoring_options(function: Function) -> Function:
    """Give a daemon the options that say how it is watched."""
    for option in (
        click.option(
            "--log-format",
            type=click.Choice(logs.FORMATS),
            default=logs.TEXT,
            show_default=True,
            help="Log lines for people, or JSON: one object a line.",
        ),
        click.option(
            "--http",
            type=ENDPOINT,
            metavar="HOST:PORT",
            help="Serve /metrics, /livez and /readyz there. [default: nowhere]",
        ),
    ):
        function = option(function)
    return function


def _serve(daemon: Coroutine[Any, Any, None], log_format: str, context: click.Context) -> None:
    """Run a daemon until it is told to stop. It says what it does without being asked."""
    verbose = context.find_root().params["verbose"]
    logs.set_up(log_format, logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        logging.getLogger("bpfrl.bpf").setLevel(logging.WARNING)  # each step of each limiter
    try:
        asyncio.run(daemon)
    except (BpfrlError, OSError) as error:
        if log_format == logs.TEXT:
            raise
        log.critical("%s", error)
        context.exit(FAILURE)


@click.command("serve-node")
@click.option(
    "--listen",
    type=ENDPOINT,
    default=f":{DEFAULT_PORT}",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; without a host, on every address.",
)
@click.option(
    "--cooperate/--no-cooperate",
    default=True,
    show_default=True,
    help="Have pods that send keep to what limited receivers ask for, on this node and others.",
)
@click.option(
    "--require-known-program",
    is_flag=True,
    help="Take no programs but those that this version compiles or ships, whatever certificate they come with.",
)
@daemon_options
@_monitoring_options
@click.option(
    "--pod-labels/--no-pod-labels",
    default=True,
    show_default=True,
    help="In metrics, tell a pod's namespace and name beside its UID.",
)
@click.option(
    "--max-pods-in-metrics",
    type=click.IntRange(0),
    default=500,
    show_default=True,
    metavar="N",
    help="In metrics, tell at most so many pods one by one.",
)
@click.pass_context
def serve_node(
    context: click.Context,
    /,
    listen: str,
    cooperate: bool,
    require_known_program: bool,
    certs: Path | None,
    insecure: bool,
    http: str | None,
    log_format: str,
    pod_labels: bool,
    max_pods_in_metrics: int,
) -> None:
    """Let a master limit this node's pods.

    Runs on every node, as root, until SIGTERM. Limits are pinned in the kernel: they stay in force when this process
    ends, however it ends, and the next one finds them.

    \b
    EXAMPLES
      bpfrl serve-node --certs certs/node
      bpfrl serve-node --certs certs/node --require-known-program
      bpfrl serve-node --insecure --listen 127.0.0.1:10002
    """
    from bpfrl.rpc import corelog  # noqa: PLC0415 - before grpc is imported

    corelog.redirect(as_log=log_format == logs.JSON)
    from bpfrl.node import daemon  # noqa: PLC0415
    from bpfrl.rpc import tls  # noqa: PLC0415

    node: LocalNode = context.obj
    shown = certificates(certs, tls.NODE, insecure=insecure)
    if insecure and not tls.is_loopback(listen.rpartition(":")[0].strip("[]")):
        raise click.UsageError("--insecure is for loopback only: use --listen 127.0.0.1:PORT, or --certs DIR")
    monitoring = daemon.Monitoring(http, pod_labels, max_pods_in_metrics) if http else None
    serving = daemon.serve(
        node.agent(),
        node.tree(),
        listen,
        shown,
        cooperate=cooperate,
        known_only=require_known_program,
        monitoring=monitoring,
    )
    _serve(serving, log_format, context)


@click.command("serve-master")
@click.option("--manifests", type=FOLDER, metavar="DIR", help="Take the pods from this folder of manifests.")
@click.option("--kubeconfig", type=FOLDER, metavar="FILE", help="Take them from this cluster's API server.")
@click.option(
    "--context",
    shell_complete=completing.contexts,
    help="Which of the kubeconfig's contexts. [default: its current one]",
)
@node_port_option
@click.option(
    "--resync",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How often each node is asked what it has, and that repaired.",
)
@click.option(
    "--leader-elect/--no-leader-elect",
    default=True,
    show_default=True,
    help="Of several masters in a cluster, only the holder of the Lease bpfrl-master acts.",
)
@click.option(
    "--lease-namespace",
    metavar="NAMESPACE",
    shell_complete=completing.namespaces,
    help="The Lease's namespace. [default: the pod's own, or kube-system]",
)
@click.option(
    "--lease-duration",
    type=click.IntRange(3),
    default=15,
    show_default=True,
    metavar="SECONDS",
    help="How long others wait for a leader that says nothing.",
)
@daemon_options
@_monitoring_options
@click.option(
    "--max-nodes-in-metrics",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    metavar="N",
    help="In metrics, tell at most so many nodes one by one, first those that do not answer.",
)
@click.pass_context
def serve_master(
    context_: click.Context,
    /,
    certs: Path | None,
    insecure: bool,
    context: str | None,
    log_format: str,
    **settings: Any,
) -> None:
    """Keep all pods of a cluster limited as their annotations say.

    \b
    READS OF EACH POD
      annotation kubernetes.io/egress-bandwidth    10M, bits per second
      annotation kubernetes.io/ingress-bandwidth
      annotation bpfrl.io/burst                    64Ki, bytes
      label rate                                   each direction that has no annotation

    The cluster is the one of --kubeconfig, of KUBECONFIG, of the pod around this process, or of ~/.kube/config, in
    this order. With --manifests no API server is needed: pods come from the folder's files, and are on this machine
    unless status.hostIP names another; a file has at most 1 MiB, and no YAML aliases. Limits stay in force while no
    master runs.

    \b
    EXAMPLES
      bpfrl serve-master --certs certs/master
      bpfrl serve-master --certs certs/master --kubeconfig ~/.kube/config --context staging
      bpfrl serve-master --insecure --manifests /etc/bpfrl/pods
    """
    from bpfrl.rpc import corelog  # noqa: PLC0415 - before grpc is imported

    corelog.redirect(as_log=log_format == logs.JSON)
    from bpfrl.master import daemon  # noqa: PLC0415
    from bpfrl.rpc import tls  # noqa: PLC0415

    if settings["manifests"] and (settings["kubeconfig"] or context):
        raise click.UsageError("--manifests takes the place of an API server: leave out --kubeconfig and --context")
    shown = certificates(certs, tls.MASTER, insecure=insecure)
    _serve(daemon.serve(daemon.Settings(certificates=shown, context=context, **settings)), log_format, context_)
