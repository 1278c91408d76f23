"""``bpfrl doctor``: whether this machine can limit pods."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from bpfrl import render
from bpfrl.commands.options import (
    DEFAULT_PORT,
    FAILURE,
    FOLDER,
    NODE,
    LocalNode,
    patience,
    reader_certificates,
    show,
)
from bpfrl.errors import CertificateError
from bpfrl.findings import Finding, Mark
from bpfrl.node import doctor as machine


@click.command()
@click.option("--certs", type=FOLDER, envvar="BPFRL_CERTS", metavar="DIR", help="Look at these certificates too.")
@click.option("--insecure", is_flag=True, help="Ask nodes without TLS, which is for loopback only.")
@click.option("--node", "nodes", type=NODE, multiple=True, metavar="ADDRESS[:PORT]", help="Ask this node. Repeatable.")
@click.option(
    "--node-port",
    type=click.IntRange(1, 2**16 - 1),
    default=DEFAULT_PORT,
    show_default=True,
    help="Where the nodes' daemons listen.",
)
@click.option("--kubeconfig", type=FOLDER, metavar="FILE", help="Ask this cluster's API server.")
@click.option("--context", help="Which of the kubeconfig's contexts. [default: its current one]")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="The form of the output.",
)
@click.pass_obj
def doctor(
    node: LocalNode,
    certs: Path | None,
    insecure: bool,
    nodes: tuple[tuple[str, int | None], ...],
    node_port: int,
    kubeconfig: Path | None,
    context: str | None,
    output: str,
) -> None:
    """Check whether this machine can limit pods, and say what to do where it cannot.

    A row for each thing that was looked at: ok, a warning where something works less well, or missing where it is
    needed. What the kernel can do is tried with tiny programs, which are let go again at once; nothing stays, but for
    bpfrl's own programs in the compile cache.

    \b
    EXIT STATUS
      0  nothing that is needed is missing
      1  something is
      2  the options cannot be meant
    """
    if insecure and certs:
        raise click.UsageError("use one of --certs DIR and, on loopback only, --insecure")
    if nodes and not (certs or insecure):
        raise click.UsageError("--node needs --certs DIR or, on loopback only, --insecure")
    if insecure and not nodes:
        raise click.UsageError("--insecure goes with --node")
    with patience("looking...") as waiting:
        found = []
        for name, check in machine.checks(node.agent(), node.tree):
            waiting(f"looking at {name}...")
            found.append(check())
        if certs or nodes:
            waiting("asking nodes...")
            found += _over_the_network(certs, [(host, port or node_port) for host, port in nodes])
        if kubeconfig or context:
            waiting("asking the API server...")
            found += _cluster(kubeconfig, context)
    sound = all(finding.mark is not Mark.MISSING for finding in found)
    if output == "table":
        show(found)
    else:
        click.echo(render.dump({"ok": sound, "checks": [_document(finding) for finding in found]}, output))
    sys.exit(0 if sound else FAILURE)


def _over_the_network(certs: Path | None, targets: list[tuple[str, int]]) -> list[Finding]:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it comes as an error
    from bpfrl.rpc import checks  # noqa: PLC0415 - half a second that the machine's own checks do not need

    found = [checks.certificate(certs)] if certs else []
    if not targets:
        return found
    try:
        certificates = reader_certificates(certs) if certs else None
    except CertificateError as error:
        return [*found, Finding("nodes", Mark.MISSING, (f"not asked: {error}",), "use the master's certificates")]
    return [*found, *asyncio.run(checks.nodes(targets, certificates))]


def _cluster(kubeconfig: Path | None, context: str | None) -> list[Finding]:
    from bpfrl.master import checks  # noqa: PLC0415 - likewise

    return asyncio.run(checks.cluster(kubeconfig, context))


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "mark": finding.mark.value,
        "found": list(finding.found),
        "advice": finding.advice or None,
    }
