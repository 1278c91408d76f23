"""``bpfrl doctor``: whether this machine can limit pods."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from bpfrl import render
from bpfrl.commands import completing
from bpfrl.commands.options import (
    FAILURE,
    NODE,
    LocalNode,
    NodeAddress,
    Remote,
    output_option,
    reading_options_fit,
    remote_options,
    show,
)
from bpfrl.commands.progress import patience
from bpfrl.errors import CertificateError
from bpfrl.findings import Finding, Mark
from bpfrl.node import doctor as machine


@click.command()
@click.option(
    "--node",
    "nodes",
    type=NODE,
    multiple=True,
    metavar="ADDRESS[:PORT]",
    shell_complete=completing.nodes,
    help="Ask this node. Repeatable.",
)
@output_option("table", "json", "yaml")
@remote_options
@click.pass_obj
def doctor(node: LocalNode, nodes: Sequence[NodeAddress], output: str, remote: Remote) -> None:
    """Check whether this machine can limit pods, and say what to do where it cannot.

    A row for each thing that was looked at: ok, a warning where something works less well, or missing where it is
    needed. What the kernel can do is tried with tiny programs, which are let go again at once; nothing stays, but for
    bpfrl's own programs in the compile cache.

    \b
    EXAMPLES
      bpfrl doctor
      bpfrl doctor --node 10.0.0.7 --certs certs/operator

    \b
    EXIT STATUS
      0  nothing that is needed is missing
      1  something is
      2  the options cannot be meant
    """
    reading_options_fit(remote, nodes)
    if remote.insecure and not nodes:
        raise click.UsageError("--insecure goes with --node")
    with patience("looking...") as waiting:
        found = []
        for name, check in machine.checks(node.agent(), node.tree):
            waiting(f"looking at {name}...")
            found.append(check())
        if remote.certs or nodes:
            waiting("asking nodes...")
            found += _over_the_network(remote, nodes)
        if remote.kubeconfig or remote.context:
            waiting("asking the API server...")
            found += _cluster(remote)
    sound = all(finding.mark is not Mark.MISSING for finding in found)
    if output == "table":
        show(found)
    else:
        click.echo(render.dump({"ok": sound, "checks": [_document(finding) for finding in found]}, output))
    sys.exit(0 if sound else FAILURE)


def _over_the_network(remote: Remote, nodes: Sequence[NodeAddress]) -> list[Finding]:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it comes as an error
    from bpfrl.rpc import checks  # noqa: PLC0415 - half a second that the machine's own checks do not need

    found = [checks.certificate(remote.certs)] if remote.certs else []
    if not nodes:
        return found
    try:
        shown = remote.certificates()
    except CertificateError as error:
        return [*found, Finding("nodes", Mark.MISSING, (f"not asked: {error}",), "use an operator's certificate")]
    targets = [(each.host, each.port or remote.node_port) for each in nodes]
    return [*found, *asyncio.run(checks.nodes(targets, shown))]


def _cluster(remote: Remote) -> list[Finding]:
    from bpfrl.master import checks  # noqa: PLC0415 - likewise

    return asyncio.run(checks.cluster(remote.kubeconfig, remote.context))


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "mark": finding.mark.value,
        "found": list(finding.found),
        "advice": finding.advice or None,
    }
