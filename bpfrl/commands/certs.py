"""``bpfrl certs``: the certificates that master, nodes and operators show each other."""

from __future__ import annotations

from pathlib import Path

import click

from bpfrl.commands.options import FOLDER


@click.group()
def certs() -> None:
    """Make the certificates that master, nodes and operators show each other."""


@certs.command("init")
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--days", type=click.IntRange(1, 36_500), default=365, show_default=True, help="How long they are good.")
@click.option("--renew", is_flag=True, help="Make all certificates anew, whatever time they have left.")
def certs_init(folder: Path, days: int, renew: bool) -> None:
    """Make an authority, and certificates for the nodes, the master and operators.

    DIR/node is for bpfrl serve-node --certs and DIR/master for bpfrl serve-master --certs. DIR/operator is for people's
    bpfrl list --certs and explain --certs: with it, one can look at nodes and change nothing. Keep DIR/ca.key to
    yourself: who has it can limit any pod. What is there and good for a while is kept, so that the same command
    renews what is about to expire; the daemons read changed files by themselves.
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    for path, made in authority.init(folder, days, renew=renew):
        click.echo(f"{path} {'made' if made else 'kept'}")


@certs.command("secrets")
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("-n", "--namespace", default="bpfrl", show_default=True, help="The Secrets' namespace.")
def certs_secrets(folder: Path, namespace: str) -> None:
    """Print the certificates of DIR as Kubernetes Secrets, for kubectl apply -f -.

    bpfrl-node is for the nodes' daemons and bpfrl-master for the master. The authority's key is in neither, and the
    operators' certificate stays in its folder.
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    click.echo(authority.secrets(folder, namespace), nl=False)
