"""The master's side of the node service: one node, by address.

Each method is one call and ends in one of three ways: the node did it; the node said no
(:class:`~bpfrl.errors.RefusedError`, with the code); or there is no telling
(:class:`~bpfrl.errors.UnreachableError`): no connection, no answer in time, cut off.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, cast

import grpc

from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import InvalidValueError, RefusedError, UnreachableError
from bpfrl.explanation import Report
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc import messages, node_pb2, statuses, tls
from bpfrl.rpc.node_pb2_grpc import NodeStub

if TYPE_CHECKING:
    from bpfrl.rpc.node_pb2_grpc import NodeAsyncStub

# An answer takes milliseconds; a node that is busy with hundreds of pods takes a second or two.
_CALL_SECONDS: Final = 15.0
_CHUNK_BYTES: Final = 64 * 2**10
_OPTIONS: Final = (
    # When to try a connection again is the caller's to decide; these only keep gRPC from waiting longer than that.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # One channel a node, none shared: a node that does not answer is nobody else's trouble.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 16 * 2**20),
    # Nodes are in the cluster's own network, whatever the way out of it is.
    ("grpc.enable_http_proxy", 0),
    # A node that has lost its power says nothing: it is asked twice a minute. The node's side must allow that.
    ("grpc.keepalive_time_ms", tls.KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Connections:
    """The connections of many clients, of which only so many stay open while nothing is asked.

    One takes some 100 KiB, most of which is TLS's buffers; making it anew takes each side 2 ms of its CPU.

    Args:
        most: how many; of more, the one that was not used for longest is closed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: OrderedDict[NodeClient, None] = OrderedDict()

    def use(self, client: NodeClient) -> None:
        """This one has something to ask."""
        self._idle.pop(client, None)

    def rest(self, client: NodeClient) -> NodeClient | None:
        """This one has nothing to ask any more; returns another whose connection is to be closed."""
        self._idle[client] = None
        return self._idle.popitem(last=False)[0] if len(self._idle) > self._most else None


class NodeClient:
    """Calls to one node.

    Args:
        address: its IP address or host name.
        port: where its daemon listens.
        certificates: what to connect with; None: without TLS, on loopback only.
        connections: those that this one's belongs to; None: it stays open.
    """

    def __init__(
        self,
        address: str,
        port: int,
        certificates: tls.Certificates | None,
        connections: Connections | None = None,
    ) -> None:
        self.target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._refusal = "" if certificates or tls.is_loopback(address) else "no TLS (--insecure) beyond loopback"
        self._certificates = certificates
        self._connection: _Connection | None = None
        self._connections = connections
        self._saved = False  # there is no connection for want of use
        self._made_again: asyncio.Future[None] | None = None  # what waits for another one then

    async def attach(self, pod: PodRef, limits: Limits, image: bytes, build: bytes, wait: float = 0) -> Change:
        """Give a pod a limiter.

        Args:
            pod: the pod.
            limits: its limits, which the object carries too.
            image: the object.
            build: the digest of its programs, as :attr:`bpfrl.bpf.generator.Contents.build`.
            wait: how long the node may wait for the pod's cgroup, s.
        """
        header = node_pb2.Header(
            pod=messages.from_pod(pod),
            limits=messages.from_limits(limits),
            size=len(image),
            sha256=hashlib.sha256(image).digest(),
            build=build,
            wait_ms=round(wait * 1000),
        )
        change = None
        async with self._calling() as node:
            stream = node.Attach(timeout=_CALL_SECONDS + wait)
            try:
                await _write(stream, node_pb2.AttachRequest(header=header))
                async for reply in _replies(stream):
                    if node_pb2.STAGE_PROCEED in reply.stages:
                        for start in range(0, len(image), _CHUNK_BYTES):
                            await _write(stream, node_pb2.AttachRequest(chunk=image[start : start + _CHUNK_BYTES]))
                        await _end(stream)
                    elif node_pb2.STAGE_ATTACHED in reply.stages:
                        change = messages.to_change(reply.change)
            finally:
                stream.cancel()
        if change is None:
            raise UnreachableError(f"node {self.target}: the answer ends before the limiter is attached")
        return change

    async def update(self, uid: str, limits: Limits) -> Change:
        """Change the limits of a pod that has a limiter."""
        request = node_pb2.UpdateRequest(uid=uid, limits=messages.from_limits(limits))
        async with self._calling() as node:
            done = await node.Update(request, timeout=_CALL_SECONDS)
            return messages.to_change(done.change)

    async def detach(self, uid: str) -> Change:
        """Take a pod's limiter off."""
        async with self._calling() as node:
            done = await node.Detach(node_pb2.DetachRequest(uid=uid), timeout=_CALL_SECONDS)
            return messages.to_change(done.change)

    async def list(self) -> list[Status | Broken]:
        """Every limiter of the node, and every folder that should be one."""
        async with self._calling() as node:
            reply = await node.List(node_pb2.ListRequest(), timeout=_CALL_SECONDS)
            return [messages.to_limiter(limiter) for limiter in reply.limiters]

    async def explain(self, uid: str) -> Report:
        """What the node knows of a pod."""
        async with self._calling() as node:
            reply = await node.Explain(node_pb2.ExplainRequest(uid=uid), timeout=_CALL_SECONDS)
            return messages.to_report(reply)

    async def lost(self) -> None:
        """Return when the node may have been started anew since it was called.

        That is when the connection to it is gone, or has never been; one that was closed here for want of use tells
        nothing, so then it is when another has been made.
        """
        await self._ended()
        if self._saved:
            self._made_again = asyncio.get_running_loop().create_future()
            await self._made_again

    async def _ended(self) -> None:
        """Return when the connection is gone. Nothing of it is held any more then."""
        connection = self._connection
        # What is closed by us cannot be asked any more.
        with suppress(grpc.aio.UsageError):
            while connection and connection.channel.get_state() is grpc.ChannelConnectivity.READY:
                await connection.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    async def close(self) -> None:
        """Close the connection, when its last call has ended."""
        if self._connections:
            self._connections.use(self)
        await self._retire()

    async def _retire(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.retired = True
            await connection.close_if_done()

    async def _save(self) -> None:
        """Do without the connection until there is something to ask."""
        self._saved = True
        await self._retire()

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[NodeAsyncStub]:
        """The service, over a connection that is made with the certificates as they are now."""
        if self._refusal:
            raise UnreachableError(f"node {self.target}: {self._refusal}")
        bundle = self._certificates.current() if self._certificates else None
        if self._connection is None or bundle != self._connection.bundle:
            await self._retire()
            self._connection = _Connection(self._connect(bundle), bundle)
            self._saved = False
            if self._made_again and not self._made_again.done():
                self._made_again.set_result(None)
        connection = self._connection
        connection.calls += 1
        if self._connections:
            self._connections.use(self)
        try:
            yield connection.node
        except grpc.aio.AioRpcError as error:
            failure = statuses.error_of(self.target, error)
            if isinstance(failure, UnreachableError) and connection is self._connection:
                # gRPC would go on trying, with memory and threads of its own, at a pace that is not ours.
                await self._retire()
            raise failure from error
        except InvalidValueError as error:
            raise RefusedError(f"its answer cannot be understood: {error}", grpc.StatusCode.INTERNAL.name) from error
        finally:
            connection.calls -= 1
            await connection.close_if_done()
            if self._connections and self._connection and not self._connection.calls:
                unused = self._connections.rest(self)
                if unused:
                    await unused._save()  # noqa: SLF001 - another one of this class

    def _connect(self, bundle: tls.Bundle | None) -> grpc.aio.Channel:
        if bundle is None:
            return grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        options = (*_OPTIONS, *tls.CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.target, tls.channel_credentials(bundle), options=options)


class _Connection:
    """A channel, which ends with its last call when another has taken its place: closing it would cut calls off."""

    def __init__(self, channel: grpc.aio.Channel, bundle: tls.Bundle | None) -> None:
        self.channel = channel
        self.node: NodeAsyncStub = NodeStub(channel)
        self.bundle = bundle
        self.calls = 0
        self.retired = False

    async def close_if_done(self) -> None:
        if self.retired and not self.calls:
            await self.channel.close()


_Stream = grpc.aio.StreamStreamCall[node_pb2.AttachRequest, node_pb2.AttachReply]


async def _write(stream: _Stream, request: node_pb2.AttachRequest) -> None:
    # Where the call has ended meanwhile, reading tells why.
    with suppress(asyncio.InvalidStateError):
        await stream.write(request)


async def _end(stream: _Stream) -> None:
    with suppress(asyncio.InvalidStateError, grpc.aio.InternalError):
        await stream.done_writing()


async def _replies(stream: _Stream) -> AsyncIterator[node_pb2.AttachReply]:
    while (reply := await stream.read()) is not grpc.aio.EOF:
        yield cast(node_pb2.AttachReply, reply)
