"""``bpfrl explain``: why a pod is limited, or not."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import click

from bpfrl import cgroup, render, sections
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.commands import completing
from bpfrl.commands.options import (
    FAILURE,
    FOLDER,
    NODE,
    UID,
    LocalNode,
    NodeAddress,
    Remote,
    output_option,
    reading_options_fit,
    remote_options,
    show,
)
from bpfrl.commands.progress import patience
from bpfrl.errors import (
    ApiError,
    CertificateError,
    CgroupNotFoundError,
    ClusterError,
    CompilerError,
    KernelError,
    PermissionDeniedError,
    RefusedError,
    UnreachableError,
)
from bpfrl.explanation import Explanation, Report, Request, verdict
from bpfrl.findings import Mark
from bpfrl.limits import PodRef
from bpfrl.node import explain as local
from bpfrl.plain import plain

if TYPE_CHECKING:
    from bpfrl.rpc.client import NodeClient

_THIS_MACHINE: Final = "this machine"
_DEFAULT_NAMESPACE: Final = "default"
# Nothing is sent; a port is only part of what to connect to.
_ANY_PORT: Final = 9
_UNIMPLEMENTED: Final = "UNIMPLEMENTED"


@dataclass(frozen=True)
class _Asked:
    """What was typed.

    Attributes:
        uid: the pod's; None: it has a name.
        namespace: of the name.
        name: the pod's.
        node: whom to ask; None: the pod's own node.
        manifests: the folder that takes the place of an API server.
        remote: how to reach them.
    """

    uid: str | None
    namespace: str
    name: str | None
    node: NodeAddress | None
    manifests: Path | None
    remote: Remote

    def is_it(self, request: Request) -> bool:
        """True for the pod that was named."""
        pod = request.pod
        return self.uid in (request.uid, pod.uid) or (self.namespace, self.name) == (pod.namespace, pod.name)


@click.command()
@click.argument("pod", required=False, shell_complete=completing.pods)
@click.option(
    "-n",
    "--namespace",
    metavar="NAMESPACE",
    shell_complete=completing.namespaces,
    help="The namespace of POD. [default: the kubeconfig's]",
)
@click.option("--pod-uid", "uid", type=UID, shell_complete=completing.pods_here, help="The pod with this UID.")
@click.option(
    "--cgroup",
    "path",
    type=FOLDER,
    shell_complete=completing.cgroups,
    help="This cgroup of this machine, of a pod or of anything else.",
)
@click.option(
    "--node",
    "address",
    type=NODE,
    shell_complete=completing.nodes,
    metavar="ADDRESS[:PORT]",
    help="Ask this node. [default: the pod's own]",
)
@click.option("--manifests", type=FOLDER, metavar="DIR", help="Take what it asks for from this folder of manifests.")
@output_option("text", "json", "yaml")
@remote_options
@click.pass_obj
def explain(
    node: LocalNode,
    pod: str | None,
    namespace: str | None,
    uid: str | None,
    path: Path | None,
    output: str,
    address: NodeAddress | None,
    manifests: Path | None,
    remote: Remote,
) -> None:
    """Say why a pod is limited, or why it is not.

    \b
    The pod is named in one of three ways:
      bpfrl explain -n shop web
      bpfrl explain --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10
      bpfrl explain --cgroup /sys/fs/cgroup/kubepods.slice/...

    What the pod asks for comes from the API server of --kubeconfig, of KUBECONFIG, of the pod around this process or
    of ~/.kube/config, or from the folder of --manifests; without any, only what the node knows is told. What it has
    comes from this machine, as root, or over the network from its node, with --certs. The last line says what it all
    comes to.

    \b
    EXIT STATUS
      0  the pod is as it asks to be, limited or not; or limited, where nobody can be asked
      1  it is not, or that cannot be told
      2  the options cannot be meant
    """
    if sum((pod is not None, uid is not None, path is not None)) != 1:
        raise click.UsageError("which pod? use one of POD, --pod-uid UID and --cgroup PATH")
    if namespace and pod is None:
        raise click.UsageError("--namespace goes with POD")
    if path and (address or manifests or remote.typed):
        raise click.UsageError("--cgroup is one of this machine, and nobody else is asked about it")
    if manifests and (remote.kubeconfig or remote.context):
        raise click.UsageError("--manifests takes the place of an API server: leave out --kubeconfig and --context")
    reading_options_fit(remote, [address] if address else [])
    with patience("asking..."):
        if path:
            found = _of_cgroup(node, path)
        else:
            scope = namespace or (_usual_namespace(manifests, remote) if pod else _DEFAULT_NAMESPACE)
            found = asyncio.run(_explained(node, _Asked(uid, scope, pod, address, manifests, remote)))
        build = _build()
    mark, text = verdict(found)
    if output == "text":
        show(sections.sections(found, build))
        click.echo(f"verdict: {plain(text)}")
    else:
        click.echo(render.dump(sections.document(found, build), output))
    sys.exit(FAILURE if mark is Mark.MISSING else 0)


def _usual_namespace(manifests: Path | None, remote: Remote) -> str:
    """The namespace of a pod that is named without one."""
    from bpfrl.master import api  # noqa: PLC0415 - half a second, which --cgroup does not need

    if not manifests:
        with suppress(ClusterError):
            return api.namespace_of(remote.kubeconfig, remote.context)
    return _DEFAULT_NAMESPACE


def _of_cgroup(node: LocalNode, path: Path) -> Explanation:
    pod, report = local.examine_cgroup(node.agent(), cgroup.check(path))
    why = "only the node was asked, about a cgroup" if pod.is_pod else "it is no pod"
    return Explanation(pod, _THIS_MACHINE, no_request=why, report=report)


async def _explained(node: LocalNode, asked: _Asked) -> Explanation:
    request, no_request = await _ask_cluster(asked)
    unheard_of = request is None and not no_request
    where = asked.manifests or "the cluster"
    if unheard_of and asked.name:
        raise ClusterError(f"{where} has no pod {asked.namespace}/{asked.name}")
    no_request = f"{where} has no such pod" if unheard_of else no_request
    address = request.address if request else ""
    source: _Source = _ThisMachine(node)
    if asked.node or (address and not _is_own(address)):
        source = _Daemon(asked.node or NodeAddress(address, address, None), asked.remote)
    try:
        pod = request.pod if request else PodRef(asked.uid) if asked.uid else await _by_limiter(source, asked)
        found = Explanation(pod, source.name, request=request, no_request=no_request, unheard_of=unheard_of)
        if request and not (address or asked.node):
            return replace(found, node=request.node or "none", no_report=_without_address(request))
        return await _with_report(found, source)
    finally:
        await source.close()


async def _with_report(found: Explanation, source: _Source) -> Explanation:
    """With what the node knows, or why that is not known."""
    try:
        report = await source.report(found.pod.uid)
    except UnreachableError as error:
        reason = str(error).removeprefix(f"node {source.name}: ")
        return replace(found, no_report=f"node {source.name} does not answer: {reason}")
    except RefusedError as error:
        old = error.code == _UNIMPLEMENTED
        why = "its bpfrl is older than this one" if old else str(error)
        return replace(found, no_report=f"node {source.name} cannot explain: {why}")
    except PermissionDeniedError as error:
        return replace(found, no_report=f"{error} (or --node ADDRESS --certs DIR, which asks its daemon)")
    except (CertificateError, KernelError, CgroupNotFoundError) as error:
        return replace(found, no_report=str(error))
    if not found.pod.name and isinstance(report.limiter, Status):
        found = replace(found, pod=report.limiter.pod)
    return replace(found, report=report)


async def _ask_cluster(asked: _Asked) -> tuple[Request | None, str]:
    """What the API server or the manifests say, None where they have no such pod; or why they say nothing."""
    from bpfrl.master import api, inquiry  # noqa: PLC0415 - half a second, which --cgroup does not need

    try:
        if asked.manifests:
            return inquiry.in_manifests(asked.manifests, asked.is_it), ""
        client = await api.connect(asked.remote.kubeconfig, asked.remote.context)
        try:
            server = api.Api(client)
            if asked.uid:
                return await inquiry.by_uid(server, asked.uid), ""
            return await inquiry.by_name(server, asked.namespace, asked.name or ""), ""
        finally:
            await client.close()  # type: ignore[no-untyped-call]
    except (ClusterError, ApiError) as error:
        return None, str(error)


async def _by_limiter(source: _Source, asked: _Asked) -> PodRef:
    """A pod by its name without an API server: limiters carry the names of their pods."""
    wanted = (asked.namespace, asked.name)
    for found in await source.limiters():
        if isinstance(found, Status) and (found.pod.namespace, found.pod.name) == wanted:
            return found.pod
    raise ClusterError(
        f"no limiter of {source.name} is for a pod {asked.namespace}/{asked.name}, and no API server can be asked:"
        " name the pod with --pod-uid, or the cluster with --kubeconfig"
    )


class _Source(Protocol):
    """Who knows what a pod has."""

    name: str

    async def limiters(self) -> list[Status | Broken]: ...

    async def report(self, uid: str) -> Report: ...

    async def close(self) -> None: ...


class _ThisMachine:
    """The kernel of this machine, which can be asked without a daemon."""

    def __init__(self, node: LocalNode) -> None:
        self.name = _THIS_MACHINE
        self._node = node

    async def limiters(self) -> list[Status | Broken]:
        return self._node.agent().limiters()

    async def report(self, uid: str) -> Report:
        return local.examine(self._node.agent(), self._node.tree(), uid)

    async def close(self) -> None:
        """There is nothing to close."""


class _Daemon:
    """A node's daemon, over the network; it is connected to when it is asked."""

    def __init__(self, place: NodeAddress, remote: Remote) -> None:
        self._host, self._port = place.host, place.port or remote.node_port
        self._remote = remote
        self.name = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        self._client: NodeClient | None = None

    async def limiters(self) -> list[Status | Broken]:
        return await self._connected().list()

    async def report(self, uid: str) -> Report:
        return await self._connected().explain(uid)

    async def close(self) -> None:
        if self._client:
            await self._client.close()

    def _connected(self) -> NodeClient:
        if self._client is None:
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it comes as an error
            from bpfrl.rpc.client import NodeClient  # noqa: PLC0415 - half a second that local pods do not need

            if not (self._remote.certs or self._remote.insecure):
                raise CertificateError(f"node {self.name} is another machine: --certs DIR asks its daemon")
            self._client = NodeClient(self._host, self._port, self._remote.certificates())
        return self._client


def _is_own(address: str) -> bool:
    """True for an address of this machine: the kernel takes that itself as the source of what is sent there."""
    try:
        [(family, *_, target), *_] = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as connected:
            connected.connect(target)
            return bool(connected.getsockname()[0] == target[0])
    except OSError:
        return False


def _without_address(request: Request) -> str:
    if not request.node:
        return "it is on no node yet"
    return f"node {request.node} has told no address for it yet (--node names one)"


def _build() -> bytes:
    """The digest of the programs that this version generates, where that can be told."""
    try:
        return generator.build()
    except CompilerError:
        return b""
