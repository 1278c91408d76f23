"""``bpfrl list``: what is limited, on this node, on others, and in a cluster."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bpfrl import cgroup, render
from bpfrl.bpf.limiter import Status
from bpfrl.commands import completing
from bpfrl.commands.options import (
    FAILURE,
    NODE,
    UNCUT_WIDTH,
    LocalNode,
    NodeAddress,
    Remote,
    nothing_limited,
    output_option,
    remote_options,
)
from bpfrl.commands.progress import progress
from bpfrl.errors import ApiError, ClusterError
from bpfrl.history import History
from bpfrl.node.agent import Agent
from bpfrl.plain import plain
from bpfrl.render import Row, View

if TYPE_CHECKING:
    from bpfrl.master import inventory

_REDRAW_SECONDS: Final = 1.0
_SHORTEST_PAUSE_SECONDS: Final = 0.1
# An answer takes milliseconds, or a second where a node is busy.
_ANSWER_SECONDS: Final = 5.0
_WATCHED_ANSWER_SECONDS: Final = 2.0
_BAD_REQUEST: Final = 400


class _Look(NamedTuple):
    """What one look has found.

    Attributes:
        rows: the limiters, and the pods that should have one.
        silent: the nodes that did not answer, and why.
        stale: what else there is to say.
    """

    rows: list[Row]
    silent: Mapping[str, str]
    stale: str = ""

    @property
    def complaints(self) -> list[str]:
        """A line for whatever could not be seen."""
        return [*(f"node {name}: {reason}" for name, reason in self.silent.items()), *filter(None, [self.stale])]


class _Place(NamedTuple):
    """Where to look.

    Attributes:
        view: whose limiters are there.
        nothing: what to say where there are none.
        look: looks.
    """

    view: View
    nothing: Callable[[], str]
    look: Callable[[], _Look]


@click.command("list")
@output_option("table", "wide", "json", "yaml", "name")
@click.option("-w", "--watch", is_flag=True, help="Draw the table again each second, with the current rates.")
@click.option(
    "--sort-by",
    type=click.Choice(render.SORT_KEYS),
    help="Names in their order, numbers highest first; sending, receiving and dropping go with -w.",
)
@click.option(
    "--node",
    "nodes",
    type=NODE,
    multiple=True,
    shell_complete=completing.nodes,
    metavar="ADDRESS[:PORT]",
    help="The limiters of this node, from its daemon. Repeatable.",
)
@click.option("-A", "--all-namespaces", is_flag=True, help="The pods of a cluster.")
@click.option(
    "-n",
    "--namespace",
    metavar="NAMESPACE",
    shell_complete=completing.namespaces,
    help="The cluster's pods of this namespace.",
)
@click.option(
    "-l", "--selector", metavar="SELECTOR", help="Those with these labels, as with kubectl: app=web,tier!=db."
)
@remote_options
@click.pass_obj
def list_(
    node: LocalNode,
    output: str,
    watch: bool,
    sort_by: str | None,
    nodes: Sequence[NodeAddress],
    all_namespaces: bool,
    namespace: str | None,
    selector: str | None,
    remote: Remote,
) -> None:
    """Show the limited pods of this node, of other nodes, or of a cluster.

    TX is what a pod has sent and RX what it has received since it was limited, in bytes at layer 3 and in packets; DROP
    is what did not pass.

    Without --node, -A, -n and -l, everything comes from this node's kernel: no daemon has to run, but it needs root.
    With --node it comes from the nodes' daemons, to which an operator's certificate is shown (--certs). With -A, -n and
    -l, pods come from the API server, and what is in force from the daemons of their nodes. Shown are the pods that are
    limited and those that ask to be, with a STATE:

    \b
      ok        what the pod asks for is in force
      pending   it is not, or not yet
      invalid   what the pod asks for cannot be meant; limits stay as they are
      orphan    a limit that no pod asks for
      broken    a limiter that is not whole
      unknown   the node does not answer

    A node that does not answer is a line on stderr and makes the exit status 1; all others are shown. With -l and
    without -n, the namespace is the kubeconfig's, as with kubectl.

    At a terminal, -w draws what passes as parts of the limit (TX-LOAD, RX-LOAD: full height is the limit), for the
    last 30 looks, and DROPS is which part of all bytes was dropped since the last look.

    \b
    EXAMPLES
      bpfrl list -w -o wide
      bpfrl list --node 10.0.0.7 --certs certs/operator
      bpfrl list -A -w --sort-by sending --certs certs/operator
      bpfrl list -n shop -l app=cart -o json
    """
    if watch and output not in ("table", "wide"):
        raise click.UsageError(f"--watch draws tables: it does not go with -o {output}")
    if sort_by in render.CURRENT_KEYS and not watch:
        raise click.UsageError(f"--sort-by {sort_by} is about what passes now: it goes with -w")
    in_cluster = all_namespaces or namespace is not None or selector is not None
    _check(nodes, remote, in_cluster=in_cluster, all_namespaces=all_namespaces, namespace=namespace)
    seconds = _WATCHED_ANSWER_SECONDS if watch else _ANSWER_SECONDS
    looking: AbstractContextManager[_Place]
    if nodes:
        looking = _at_nodes(nodes, remote, seconds, watch=watch)
    elif in_cluster:
        scope = "" if all_namespaces else namespace or None
        looking = _at_cluster(remote, scope, selector or "", seconds, watch=watch)
    else:
        looking = nullcontext(_here(node.agent(), paths=output not in ("table", "name")))
    with looking as place:
        if watch:
            _watch(place, sort_by, wide=output == "wide")
        else:
            _show(place, sort_by, output)


def _check(
    nodes: Sequence[NodeAddress], remote: Remote, *, in_cluster: bool, all_namespaces: bool, namespace: str | None
) -> None:
    """Refuse options that do not go together."""
    if nodes and in_cluster:
        raise click.UsageError("--node asks nodes alone, and -A, -n and -l a cluster: use one of them")
    if all_namespaces and namespace is not None:
        raise click.UsageError("-A is all namespaces: leave out -n")
    if remote.typed and not (nodes or in_cluster):
        raise click.UsageError(f"{remote.typed[0]} goes with --node, -A, -n or -l: this node is asked without it")
    of_cluster = [option for option in remote.typed if option in ("--kubeconfig", "--context")]
    if of_cluster and nodes:
        raise click.UsageError(f"{of_cluster[0]} goes with -A, -n or -l: --node asks nodes alone")


def _show(place: _Place, sort_by: str | None, output: str) -> None:
    found = place.look()
    rows = render.sort(found.rows, sort_by) if sort_by else found.rows
    if output not in ("table", "wide"):
        form = {"json": render.to_json, "yaml": render.to_yaml, "name": render.to_names}[output]
        if text := form(rows):
            click.echo(text)
    elif rows:
        _console().print(render.table(rows, view=place.view, wide=output == "wide"))
    elif not found.complaints:
        click.echo(place.nothing(), err=True)
    for line in found.complaints:
        click.echo(f"bpfrl: {plain(line)}", err=True)
    if found.complaints:
        sys.exit(FAILURE)


def _watch(place: _Place, sort_by: str | None, *, wide: bool) -> None:
    console = _console(cut=True)
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else None
    history = History()
    with live or nullcontext():
        while True:
            began = time.monotonic()
            found = place.look()
            rows = history.follow(found.rows, found.silent)
            rows = render.sort(rows, sort_by) if sort_by else rows
            below = [Text(plain(line), style="red", no_wrap=True) for line in found.complaints]
            if not (rows or below):
                below = [Text(place.nothing())]
            if live:
                rows, left_out = _fitting(rows, console.height - len(below))
                below = [Text(f"and {left_out} more"), *below] if left_out else below
            table = render.table(rows, view=place.view, wide=wide, rates=True, drawn=live is not None)
            drawn = Group(table, *below)
            if live:
                live.update(drawn, refresh=True)
            else:
                console.print(drawn)
            took = time.monotonic() - began
            time.sleep(max(_REDRAW_SECONDS - took, _SHORTEST_PAUSE_SECONDS))


def _fitting(rows: list[Row], height: int) -> tuple[list[Row], int]:
    """The first rows, as many as fit on a terminal below their header, and how many do not."""
    room = max(height - 2, 1)  # the header, and where the cursor stands
    if len(rows) <= room:
        return rows, 0
    shown = max(room - 1, 1)
    return rows[:shown], len(rows) - shown


def _console(*, cut: bool = False) -> Console:
    """Where tables go. Only one that is drawn again and again is cut to the terminal: a list is to be read whole."""
    return Console(width=None if cut and sys.stdout.isatty() else UNCUT_WIDTH, highlight=False)


# Where to look.


def _here(agent: Agent, *, paths: bool) -> _Place:
    """This node, without a daemon."""

    def look() -> _Look:
        found, now = agent.limiters(), time.time()
        rows = [
            Row(each, now, cgroup.path_of(each.cgroup_id))
            if paths and isinstance(each, Status) and each.cgroup_id
            else Row(each, now)
            for each in found
        ]
        return _Look(rows, {})

    return _Place(View.HERE, lambda: nothing_limited(agent), look)


@contextmanager
def _at_nodes(named: Sequence[NodeAddress], remote: Remote, seconds: float, *, watch: bool) -> Iterator[_Place]:
    """Other nodes, by address."""
    nodes = _nodes(remote, {each.text: each for each in named})
    asked = dict.fromkeys(each.text for each in named)

    async def look() -> _Look:
        with _counting(watch=watch)(len(asked)) as answered:
            answers = await nodes.ask(asked, seconds, answered)
        rows = [Row(found, answers[name].at, node=name) for name in asked for found in answers[name].found or ()]
        silent = {name: answers[name].reason for name in asked if answers[name].found is None}
        return _Look(rows, silent)

    with asyncio.Runner() as runner:
        try:
            yield _Place(View.NODES, lambda: "no pods are limited there", lambda: runner.run(look()))
        finally:
            runner.run(nodes.close())


@contextmanager
def _at_cluster(
    remote: Remote, namespace: str | None, selector: str, seconds: float, *, watch: bool
) -> Iterator[_Place]:
    """The nodes of a cluster's pods; without a namespace, in that of the kubeconfig."""
    nodes = _nodes(remote, {})
    from bpfrl.master import api, inventory  # noqa: PLC0415 - a second that other commands do not need

    advice = "--kubeconfig names one, which -A, -n and -l need; without them, this node is shown"
    with asyncio.Runner() as runner, ExitStack() as undo:
        try:
            client = runner.run(api.connect(remote.kubeconfig, remote.context, advice))
            undo.callback(lambda: runner.run(client.close()))  # type: ignore[no-untyped-call]
            scope = api.namespace_of(remote.kubeconfig, remote.context) if namespace is None else namespace
        except ClusterError as error:
            raise click.UsageError(str(error)) from error
        undo.callback(lambda: runner.run(nodes.close()))
        cluster = inventory.Cluster(api.Api(client), nodes, scope, selector, seconds, _counting(watch=watch))
        nothing = f"no pods are limited, or ask to be{f', in namespace {scope}' if scope else ''}"
        view = View.NAMESPACE if scope else View.CLUSTER
        yield _Place(view, lambda: nothing, lambda: _pods(runner, cluster.look()))


def _pods(runner: asyncio.Runner, look: Coroutine[Any, Any, inventory.Look]) -> _Look:
    try:
        found = runner.run(look)
    except ApiError as error:
        if error.status == _BAD_REQUEST:
            raise click.UsageError(f"--selector cannot be meant: {error}") from error
        raise
    now = time.time()
    rows = [
        Row(
            entry.found,
            entry.at or now,
            node=entry.node,
            pod=entry.pod,
            state=entry.state.value,
            reason=entry.reason,
            wanted=entry.wanted,
        )
        for entry in found.entries
    ]
    return _Look(rows, found.silent, found.stale)


def _nodes(remote: Remote, named: Mapping[str, NodeAddress]) -> inventory.Nodes:
    """Connections to nodes, by what they are named, or else by address."""
    # What gRPC's core has to say on stderr, the error says too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from bpfrl.master import inventory  # noqa: PLC0415
    from bpfrl.rpc import client, tls  # noqa: PLC0415

    shown = remote.certificates()
    for each in named.values():
        if not shown and not tls.is_loopback(each.host):
            raise click.UsageError(f"--insecure is for loopback only: {each.text} needs --certs DIR")

    def connect(name: str) -> client.NodeClient:
        where = named.get(name) or NodeAddress(name, name, None)
        return client.NodeClient(where.host, where.port or remote.node_port, shown)

    return inventory.Nodes(connect)


def _counting(*, watch: bool) -> inventory.Counting:
    """A bar for many nodes, but not below a table that is drawn again and again."""
    if watch:
        return lambda _: nullcontext(lambda: None)
    return lambda total: progress("asking nodes", total)
