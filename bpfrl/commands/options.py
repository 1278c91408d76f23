"""What several commands are told in the same way."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

import click
from click.core import ParameterSource
from rich.console import Console

from bpfrl import cgroup, render
from bpfrl.cgroup import CgroupTree
from bpfrl.commands import completing
from bpfrl.errors import InvalidValueError
from bpfrl.findings import Finding
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate, parse_size

if TYPE_CHECKING:
    from bpfrl.rpc.tls import Certificates

Function = TypeVar("Function", bound=Callable[..., Any])

FAILURE: Final = 1
DEFAULT_PORT: Final = 10002
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]+", re.ASCII)


class Parsed(click.ParamType[Any]):
    """A parameter that one of the library's own parsers reads."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse what was typed; a default is a value already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidValueError as error:
            self.fail(str(error), param, ctx)


def _parse_uid(text: str) -> str:
    return PodRef(text.strip().lower()).uid


def _parse_pod_name(text: str) -> tuple[str, str]:
    namespace, separator, name = text.partition("/")
    if not (separator and namespace and name):
        raise InvalidValueError(f"'{text}' is no pod's name: write it as NAMESPACE/NAME")
    return namespace, name


def _check_name(host: str, refusal: str) -> None:
    """Refuse what can be nobody's name: asking for its address would end otherwise than for one that is not known."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise InvalidValueError(refusal) from error


def _parse_endpoint(text: str) -> str:
    """HOST:PORT, with an IPv6 address in brackets; without a host, every address."""
    host, separator, port = text.rpartition(":")
    refusal = f"'{text}' is no address to listen on: write it as HOST:PORT, [::1]:PORT or :PORT"
    bracketed = host.startswith("[") and host.endswith("]")
    if not (separator and _PORT.fullmatch(port) and int(port) < 2**16) or (":" in host and not bracketed):
        raise InvalidValueError(refusal)
    _check_name(host, refusal)
    return f"{host or '[::]'}:{port}"


class NodeAddress(NamedTuple):
    """A node as it was typed, and where that is.

    Attributes:
        text: what was typed.
        host: its address or host name.
        port: its daemon's port; None: where they usually listen.
    """

    text: str
    host: str
    port: int | None


def _parse_node(text: str) -> NodeAddress:
    """ADDRESS or ADDRESS:PORT; an IPv6 address has brackets where a port follows, and may have them where none does."""
    refusal = f"'{text}' is no node's address: write it as ADDRESS, ADDRESS:PORT or [IPV6]:PORT"
    host, separator, port = text.rpartition(":")
    if text.endswith("]") or (text.count(":") != 1 and not host.endswith("]")):
        host, separator, port = text, "", ""
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if bracketed or ":" in host:
        try:
            IPv6Address(host)
        except AddressValueError as error:
            raise InvalidValueError(refusal) from error
    _check_name(host, refusal)
    in_range = not separator or (_PORT.fullmatch(port) and 0 < int(port) < 2**16)
    if not _HOST.fullmatch(host) or not in_range:
        raise InvalidValueError(refusal)
    return NodeAddress(text, host, int(port) if separator else None)


RATE: Final = Parsed("rate", Rate.parse)
SIZE: Final = Parsed("size", parse_size)
UID: Final = Parsed("uid", _parse_uid)
POD_NAME: Final = Parsed("namespace/name", _parse_pod_name)
# Whether it can be read is for the command to find out that needs it.
FOLDER: Final = click.Path(path_type=Path, readable=False)
ENDPOINT: Final = Parsed("host:port", _parse_endpoint)
NODE: Final = Parsed("address", _parse_node)
# Wider than any line: what is cut off is of no use to who reads it later.
UNCUT_WIDTH: Final = 4096


@dataclass(frozen=True)
class LocalNode:
    """Where this node's limiters and cgroups are."""

    bpffs: Path
    cgroup_root: Path | None

    def agent(self) -> Agent:
        """This node's limiters."""
        return Agent(self.bpffs)

    def tree(self) -> CgroupTree:
        """This node's pods.

        Raises:
            InvalidValueError: --cgroup-root names no cgroup.
        """
        return CgroupTree(cgroup.check(self.cgroup_root) if self.cgroup_root else None)


def limit_options(function: Function) -> Function:
    """Give a command the limit options, as one argument."""

    @wraps(function)
    def with_limits(
        *args: Any, rate: Rate | None, egress: Rate | None, ingress: Rate | None, burst: int | None, **others: Any
    ) -> Any:
        return function(*args, limits=Limits(egress or rate, ingress or rate, burst), **others)

    for option in (
        click.option("--burst", type=SIZE, help="What an idle pod may send or receive at once. [default: by rate]"),
        click.option("--ingress", type=RATE, help="What the pod may receive; the other direction is left alone."),
        click.option("--egress", type=RATE, help="What the pod may send; the other direction is left alone."),
        click.option("--rate", type=RATE, help="The limit for each direction that is not given by itself."),
    ):
        with_limits = option(with_limits)
    return cast(Function, with_limits)


def pod_options(function: Function) -> Function:
    """Give a command the options that name a pod, as one argument."""

    @wraps(function)
    def with_pod(*args: Any, pod_uid: str | None, pod_name: tuple[str, str] | None, **others: Any) -> Any:
        if pod_name and not pod_uid:
            raise click.UsageError("--pod-name goes with --pod-uid")
        return function(*args, pod=PodRef(pod_uid, *(pod_name or ())) if pod_uid else None, **others)

    for option in (
        click.option(
            "--pod-name",
            type=POD_NAME,
            shell_complete=completing.pod_names,
            help="The pod's name, for bpfrl list to show.",
        ),
        click.option(
            "--pod-uid",
            type=UID,
            shell_complete=completing.pods_here,
            help="The pod's UID: kubectl get pod -o jsonpath={.metadata.uid}",
        ),
    ):
        with_pod = option(with_pod)
    return cast(Function, with_pod)


def limiting(limits: Limits) -> Limits:
    """The limits, if they limit anything."""
    if limits.unlimited:
        raise click.UsageError("no limit is given: use --rate, --egress or --ingress, for example --rate 10mbit")
    return limits


def daemon_options(function: Function) -> Function:
    """Give a daemon the options that say whom it trusts."""
    for option in (
        click.option("--insecure", is_flag=True, help="Without TLS, which is for loopback only."),
        click.option(
            "--certs",
            type=FOLDER,
            envvar="BPFRL_CERTS",
            metavar="DIR",
            help="The folder with ca.crt, tls.crt and tls.key. [env: BPFRL_CERTS]",
        ),
    ):
        function = option(function)
    return function


def node_port_option(function: Function) -> Function:
    """Give a command the option that says where nodes listen."""
    return click.option(
        "--node-port",
        type=click.IntRange(1, 2**16 - 1),
        default=DEFAULT_PORT,
        show_default=True,
        help="Where the nodes' daemons listen.",
    )(function)


@dataclass(frozen=True)
class Remote:
    """How a command that only looks reaches nodes and the API server.

    Attributes:
        certs: the folder of an operator's certificate.
        insecure: no TLS.
        node_port: where the nodes' daemons listen.
        kubeconfig: where the API server is told; None: see :func:`bpfrl.master.api.connect`.
        context: which of its contexts; None: its current one.
        typed: the options of these that stand on the command line.
    """

    certs: Path | None
    insecure: bool
    node_port: int
    kubeconfig: Path | None
    context: str | None
    typed: tuple[str, ...]

    def certificates(self) -> Certificates | None:
        """What to show nodes, and to ask of them; None: no TLS."""
        from bpfrl.rpc import tls  # noqa: PLC0415

        return certificates(self.certs, tls.OPERATOR, insecure=self.insecure)


def output_option(*forms: str) -> Callable[[Function], Function]:
    """The option that says in which of these forms the output is to be, by default in the first."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(forms),
        default=forms[0],
        show_default=True,
        help="The form of the output.",
    )


def cluster_options(function: Function) -> Function:
    """Give a command the options that name a cluster's API server."""
    for option in (
        click.option(
            "--context",
            shell_complete=completing.contexts,
            help="Which of the kubeconfig's contexts. [default: its current one]",
        ),
        click.option("--kubeconfig", type=FOLDER, metavar="FILE", help="The cluster. [default: as kubectl's]"),
    ):
        function = option(function)
    return function


def remote_options(function: Function) -> Function:
    """Give a command the options that say how to reach nodes and the API server, as one argument."""

    @wraps(function)
    def with_remote(*args: Any, **given: Any) -> Any:
        source = click.get_current_context().get_parameter_source
        values = {name: given.pop(name) for name in ("certs", "insecure", "node_port", "kubeconfig", "context")}
        typed = tuple(f"--{name.replace('_', '-')}" for name in values if source(name) is ParameterSource.COMMANDLINE)
        return function(*args, remote=Remote(**values, typed=typed), **given)

    for option in (cluster_options, node_port_option, daemon_options):
        with_remote = option(with_remote)
    return cast(Function, with_remote)


def reading_options_fit(remote: Remote, named: Sequence[NodeAddress]) -> None:
    """Refuse what no node can be asked with, before anything is asked."""
    if remote.certs and remote.insecure:
        raise click.UsageError("use one of --certs DIR and, on loopback only, --insecure")
    if not named:
        return
    if not (remote.certs or remote.insecure):
        raise click.UsageError("--node needs --certs DIR (bpfrl certs init makes one for operators)")
    from bpfrl.rpc import tls  # noqa: PLC0415 - half a second that other commands do not need

    for each in named:
        if remote.insecure and not tls.is_loopback(each.host):
            raise click.UsageError(f"--insecure is for loopback only: {each.text} needs --certs DIR")


def certificates(folder: Path | None, role: str, *, insecure: bool) -> Certificates | None:
    """What to show the other side, and to ask of it; None: no TLS."""
    from bpfrl.rpc import tls  # noqa: PLC0415 - half a second that other commands do not need

    if (folder is None) != insecure:
        raise click.UsageError("use one of --certs DIR (bpfrl certs init makes them) and, on loopback only, --insecure")
    return tls.Certificates(folder, role) if folder else None


def show(findings: Sequence[Finding]) -> None:
    """Print what was found: folded to a terminal's width, or in whole lines."""
    console = Console(width=None if sys.stdout.isatty() else UNCUT_WIDTH, highlight=False)
    console.print(render.checklist(findings))


def nothing_limited(agent: Agent) -> str:
    """What to say where a list is empty."""
    return "no pods are limited here" if agent.is_mounted() else f"no pods are limited here: no bpffs on {agent.bpffs}"
