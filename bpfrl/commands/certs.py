"""``bpfrl certs``: the certificates that master, nodes and operators show each other."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from bpfrl.commands import completing
from bpfrl.commands.options import FOLDER, cluster_options
from bpfrl.commands.progress import patience

_namespace_option: Final = click.option(
    "-n",
    "--namespace",
    default="bpfrl",
    show_default=True,
    shell_complete=completing.namespaces,
    help="The Secrets' namespace.",
)


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

    \b
    EXAMPLES
      bpfrl certs init certs
      bpfrl certs init certs --days 30 --renew
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    for path, made in authority.init(folder, days, renew=renew):
        click.echo(f"{path} {'made' if made else 'kept'}")


@certs.command("secrets")
@click.argument("folder", type=FOLDER, metavar="DIR")
@_namespace_option
def certs_secrets(folder: Path, namespace: str) -> None:
    """Print the certificates of DIR as Kubernetes Secrets, for kubectl apply -f -.

    bpfrl-node is for the nodes' daemons and bpfrl-master for the master. The authority's key is in neither, and the
    operators' certificate stays in its folder.

    \b
    EXAMPLES
      bpfrl certs secrets certs | kubectl apply -f -
      bpfrl certs secrets certs -n kube-system > secrets.yaml
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    click.echo(authority.secrets(folder, namespace), nl=False)


@certs.command("apply")
@_namespace_option
@click.option("--days", type=click.IntRange(1, 36_500), default=365, show_default=True, help="How long they are good.")
@click.option("--renew", is_flag=True, help="Make all certificates anew, whatever time they have left.")
@cluster_options
def certs_apply(namespace: str, days: int, renew: bool, kubeconfig: Path | None, context: str | None) -> None:
    """Keep the certificates in a cluster's Secrets, authority included.

    Makes what is missing of bpfrl-ca, bpfrl-node, bpfrl-master and bpfrl-operator, and what is about to expire; what
    is good is left alone, so that this may be run as often as you like. The nodes and the master read changed Secrets
    by themselves. The cluster is found as bpfrl serve-master finds it.

    Who may read the Secret bpfrl-ca can limit any pod. bpfrl-operator is for people, who may look with it.

    \b
    EXAMPLES
      bpfrl certs apply -n bpfrl
      kubectl get secret bpfrl-operator -n bpfrl -o json | jq -r '.data["tls.crt"]' | base64 -d
    """
    import asyncio  # noqa: PLC0415

    from bpfrl.master import api, certificates  # noqa: PLC0415

    async def keep() -> list[tuple[str, bool]]:
        client = await api.connect(kubeconfig, context)
        try:
            return await certificates.keep(api.Api(client), namespace, days, renew=renew)
        finally:
            await client.close()  # type: ignore[no-untyped-call]

    with patience("looking at the cluster's certificates..."):
        kept = asyncio.run(keep())
    for name, made in kept:
        click.echo(f"secret/{name} {'made' if made else 'kept'}")
