"""What several commands are told in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from bpfrl import cgroup
from bpfrl.cgroup import CgroupTree
from bpfrl.commands import completing
from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate, parse_size

if TYPE_CHECKING:
    from bpfrl.rpc.tls import Certificates

Function = TypeVar("Function", bound=Callable[..., Any])

FAILURE: Final = 1
DEFAULT_PORT: Final = 10002
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


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


def _parse_endpoint(text: str) -> str:
    """HOST:PORT, with an IPv6 address in brackets; without a host, every address."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (separator and _PORT.fullmatch(port) and int(port) < 2**16) or (":" in host and not bracketed):
        raise InvalidValueError(f"'{text}' is no address to listen on: write it as HOST:PORT, [::1]:PORT or :PORT")
    return f"{host or '[::]'}:{port}"


RATE: Final = Parsed("rate", Rate.parse)
SIZE: Final = Parsed("size", parse_size)
UID: Final = Parsed("uid", _parse_uid)
POD_NAME: Final = Parsed("namespace/name", _parse_pod_name)
# Whether it can be read is for the command to find out that needs it.
FOLDER: Final = click.Path(path_type=Path, readable=False)
ENDPOINT: Final = Parsed("host:port", _parse_endpoint)


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


def certificates(folder: Path | None, role: str, *, insecure: bool) -> Certificates | None:
    """What to show the other side, and to ask of it; None: no TLS."""
    from bpfrl.rpc import tls  # noqa: PLC0415 - half a second that other commands do not need

    if (folder is None) != insecure:
        raise click.UsageError("use one of --certs DIR (bpfrl certs init makes them) and, on loopback only, --insecure")
    return tls.Certificates(folder, role) if folder else None


def nothing_limited(agent: Agent) -> str:
    """What to say where a list is empty."""
    return "no pods are limited here" if agent.is_mounted() else f"no pods are limited here: no bpffs on {agent.bpffs}"
