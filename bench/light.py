"""The node daemons of a large cluster in one process: ``python -m bench.light`` is what :class:`LightNodes` runs.

They speak the protocol, with TLS, check what they are sent as far as that goes without a kernel, and remember what they
were told and when. One server listens on every address; a connection to a local address comes from that same
address where the route names no other source, and so tells which node was meant.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import click
import grpc
import msgspec

from bench.lab import in_namespace
from bpfrl.rpc import node_pb2, node_pb2_grpc, tls

_Context = grpc.aio.ServicerContext[Any, Any]

_STOP_SECONDS: Final = 30.0
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 2**20),
    # As a node's daemon.
    ("grpc.http2.min_ping_interval_without_data_ms", tls.KEEPALIVE_SECONDS * 500),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Call(msgspec.Struct, array_like=True):
    """A call as it came in.

    Attributes:
        verb: ``attach``, ``update`` or ``detach``.
        address: the node that it was made to.
        uid: the pod's.
        egress: what the pod may send, bit/s; 0 for none.
        at: when the node knew all of that, s.
    """

    verb: str
    address: str
    uid: str
    egress: int
    at: float


class Totals(msgspec.Struct):
    """How much there is of everything.

    Attributes:
        limiters: limiters in force.
        nodes: nodes that have been called at all.
        lists: how often nodes were asked for what they have.
        calls: how often they were asked to change something.
        wrong: programs that were not what was announced, and calls that a node would have refused.
    """

    limiters: int = 0
    nodes: int = 0
    lists: int = 0
    calls: int = 0
    wrong: int = 0


class _Nodes(node_pb2_grpc.NodeServicer):
    """All nodes; what differs is what each has, by address and UID."""

    def __init__(self) -> None:
        self.has: defaultdict[str, dict[str, node_pb2.Limiter]] = defaultdict(dict)
        self.calls: list[Call] = []
        self.totals = Totals()

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[node_pb2.AttachRequest], context: _Context
    ) -> AsyncIterator[node_pb2.AttachReply]:
        """As node.proto says."""
        address, header = _address(context), (await anext(request_iterator)).header
        self._note("attach", address, header.pod.uid, header.limits)
        before = self.has[address].get(header.pod.uid)
        limiter = node_pb2.Limiter(
            pod=header.pod, limits=header.limits, build=header.build, cgroup_id=1, attached_at=time.time()
        )
        stages: list[node_pb2.Stage.ValueType] = []
        if before is None or before.build != header.build:
            yield node_pb2.AttachReply(stages=[node_pb2.STAGE_PROCEED])
            image = b"".join([request.chunk async for request in request_iterator])
            if hashlib.sha256(image).digest() != header.sha256:
                self.totals.wrong += 1
                await context.abort(grpc.StatusCode.DATA_LOSS, "this is not what was announced")
            stages = [node_pb2.STAGE_RECEIVED, node_pb2.STAGE_LOADED, node_pb2.STAGE_PINNED]
        change = node_pb2.CHANGE_ATTACHED
        if before:
            change = node_pb2.CHANGE_UNCHANGED if before.limits == header.limits else node_pb2.CHANGE_UPDATED
        self.has[address][header.pod.uid] = limiter
        yield node_pb2.AttachReply(stages=[*stages, node_pb2.STAGE_ATTACHED], change=change)

    async def Update(self, request: node_pb2.UpdateRequest, context: _Context) -> node_pb2.Done:  # noqa: N802
        """As node.proto says."""
        address = _address(context)
        self._note("update", address, request.uid, request.limits)
        limiter = self.has[address].get(request.uid)
        if limiter is None:
            self.totals.wrong += 1
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.uid} has no limiter")
            raise RuntimeError("the call has ended")
        limiter.limits.CopyFrom(request.limits)
        return node_pb2.Done(change=node_pb2.CHANGE_UPDATED)

    async def Detach(self, request: node_pb2.DetachRequest, context: _Context) -> node_pb2.Done:  # noqa: N802
        """As node.proto says."""
        address = _address(context)
        self._note("detach", address, request.uid, None)
        found = self.has[address].pop(request.uid, None)
        return node_pb2.Done(change=node_pb2.CHANGE_DETACHED if found else node_pb2.CHANGE_ABSENT)

    async def List(self, request: node_pb2.ListRequest, context: _Context) -> node_pb2.ListReply:  # noqa: ARG002, N802
        """As node.proto says."""
        self.totals.lists += 1
        return node_pb2.ListReply(limiters=self.has[_address(context)].values())

    async def Explain(  # noqa: N802
        self,
        request: node_pb2.ExplainRequest,  # noqa: ARG002
        context: _Context,
    ) -> node_pb2.ExplainReply:
        """Not asked for by masters."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "these nodes explain nothing")
        raise RuntimeError("the call has ended")

    def _note(self, verb: str, address: str, uid: str, limits: node_pb2.Limits | None) -> None:
        egress = limits.egress_bits_per_second if limits else 0
        self.calls.append(Call(verb, address, uid, egress, time.monotonic()))

    def answer(self, command: str) -> object:
        """What :class:`LightNodes` asks for."""
        if command == "calls":
            calls, self.calls = self.calls, []
            self.totals.calls += len(calls)
            return calls
        if command == "state":
            return {
                address: {
                    uid: (each.limits.egress_bits_per_second, each.limits.ingress_bits_per_second)
                    for uid, each in has.items()
                }
                for address, has in self.has.items()
            }
        return msgspec.structs.replace(
            self.totals,
            limiters=sum(map(len, self.has.values())),
            nodes=len(self.has),
            calls=self.totals.calls + len(self.calls),
        )


def _address(context: _Context) -> str:
    """The node that was called: ``ipv4:198.18.0.1:40000`` is where the call comes from, and goes to."""
    return str(context.peer()).split(":")[1]


class LightNodes:
    """The process, in a network namespace.

    Args:
        namespace: its name.
        certificates: the node's.
        port: where every node listens.
    """

    def __init__(self, namespace: str, certificates: Path, port: int) -> None:
        command = [sys.executable, "-m", "bench.light", "--certs", str(certificates), "--port", str(port)]
        self._command = in_namespace(namespace, *command)

    def __enter__(self) -> Self:
        """Start it, and return when it listens."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.totals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate(timeout=_STOP_SECONDS)

    def totals(self) -> Totals:
        """How much there is of everything."""
        return msgspec.json.decode(self._ask("totals"), type=Totals)

    def calls(self) -> list[Call]:
        """What nodes were told since this was asked last."""
        return msgspec.json.decode(self._ask("calls"), type=list[Call])

    def state(self) -> dict[str, dict[str, tuple[int, int]]]:
        """What is in force by address and UID: (egress, ingress) in bit/s."""
        return msgspec.json.decode(self._ask("state"), type=dict[str, dict[str, tuple[int, int]]])

    def _ask(self, command: str) -> bytes:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("it has no pipes")
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nodes have ended")
        return answer


async def _serve(certificates: Path, port: int) -> None:
    nodes = _Nodes()
    server = grpc.aio.server(options=_OPTIONS)
    node_pb2_grpc.add_NodeServicer_to_server(nodes, server)
    server.add_secure_port(f"0.0.0.0:{port}", tls.server_credentials(tls.Certificates(certificates, tls.NODE)))
    await server.start()
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while command := await commands.readline():
        sys.stdout.buffer.write(msgspec.json.encode(nodes.answer(command.decode().strip())) + b"\n")
        sys.stdout.buffer.flush()


@click.command()
@click.option("--certs", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--port", type=int, required=True)
def main(certs: Path, port: int) -> None:
    """Serve until stdin ends."""
    asyncio.run(_serve(certs, port))


if __name__ == "__main__":
    main()
