"""Those who attack a node, as a process of their own: :mod:`tests.kernel.test_hostile` tells it whom, and when to end.

Many attacks are made of bytes, not of calls, where no client library would do such a thing. A line of stdin names one,
``begun`` answers when it is under way, and another line ends it, which ``ended`` answers.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bpfrl.rpc import node_pb2, tls
from bpfrl.rpc.node_pb2_grpc import NodeStub
from tests.kernel.test_service import FAST, connected, credentials, header, program

CONNECTIONS = int(os.environ.get("HOSTILE_CONNECTIONS", "1000"))
# Of them: a TLS handshake costs this side, too.
SILENT, SHAKING, SPEAKING, READY = CONNECTIONS * 6 // 10, CONNECTIONS * 2 // 10, CONNECTIONS // 10, CONNECTIONS // 10
HTTP = CONNECTIONS // 2
AT_ONCE = 50


@dataclass
class Target:
    """A node that is attacked.

    Attributes:
        port: where it listens.
        metrics_port: and for HTTP.
        pki: the certificates, among them the attackers'.
        pod: a pod of it.
    """

    port: int
    metrics_port: int
    pki: Path
    pod: str


def knock(number: int) -> socket.socket:
    """A socket that is bound to one of many addresses, so that there are ports enough."""
    opened = socket.socket()
    opened.setblocking(False)
    opened.bind((f"127.0.{1 + number // 250 % 250}.{1 + number % 250}", 0))
    return opened


async def plain(target: Target, number: int, port: int = 0) -> socket.socket:
    """A TCP connection over which nothing has been said."""
    opened = knock(number)
    await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", port or target.port))
    return opened


def context(target: Target, role: str) -> ssl.SSLContext:
    """What shows a certificate of ours."""
    made = ssl.create_default_context(cafile=target.pki / "ca.crt")
    made.set_alpn_protocols(["h2"])
    made.load_cert_chain(target.pki / role / "tls.crt", target.pki / role / "tls.key")
    return made


def hello(target: Target) -> bytes:
    """The first message of a TLS handshake."""
    written = ssl.MemoryBIO()
    shaking = context(target, "operator").wrap_bio(ssl.MemoryBIO(), written, server_hostname=tls.NODE)
    with suppress(ssl.SSLWantReadError):
        shaking.do_handshake()
    return written.read()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def secure(target: Target, number: int, trusted: ssl.SSLContext) -> Stream:
    """A TLS connection over which no HTTP/2 has been spoken."""
    opened = await plain(target, number)
    return await asyncio.open_connection(sock=opened, ssl=trusted, server_hostname=tls.NODE)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


DATA, HEADERS, RESET, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_HEADERS, END_STREAM = 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def field(name: str, value: str) -> bytes:
    """A header, spelled out (RFC 7541, section 6.2.2)."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


def fields(method: str) -> bytes:
    """The headers of a call."""
    found = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/bpfrl.v1.Node/{method}",
        ":authority": tls.NODE,
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(itertools.starmap(field, found.items()))


async def speaking(target: Target, number: int, trusted: ssl.SSLContext) -> Stream:
    """A connection on which HTTP/2 is set up."""
    reader, writer = await secure(target, number, trusted)
    writer.write(PREFACE)
    await reader.readexactly(9)
    return reader, writer


Attack = Callable[[Target], AbstractAsyncContextManager[None]]


async def many(count: int, make: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """So many of them, as far as the node takes them."""
    found = []
    for start in range(0, count, AT_ONCE):
        made = await asyncio.gather(
            *(make(number) for number in range(start, min(start + AT_ONCE, count))), return_exceptions=True
        )
        assert all(isinstance(each, OSError) for each in made if isinstance(each, BaseException)), made
        found += [each for each in made if not isinstance(each, BaseException)]
    return found


@asynccontextmanager
async def silent(target: Target) -> AsyncIterator[None]:
    """Connections over which nothing is ever said."""
    held = await many(SILENT, lambda number: plain(target, number))
    yield
    for each in held:
        each.close()


@asynccontextmanager
async def slow_handshakes(target: Target) -> AsyncIterator[None]:
    """TLS handshakes of which a byte comes now and then, and some that are never answered."""
    first, loop = hello(target), asyncio.get_running_loop()
    held = await many(SHAKING, lambda number: plain(target, number))

    async def trickle() -> None:
        for place in itertools.count():
            for number, each in enumerate(held):
                with suppress(OSError):
                    await loop.sock_sendall(each, first if number % 2 and not place else first[place : place + 1])
            await asyncio.sleep(0.2)

    async with working([trickle()]):
        yield
    for each in held:
        each.close()


async def hang_up(held: list[Stream]) -> None:
    for _, writer in held:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for _, writer in held), return_exceptions=True)


@asynccontextmanager
async def slow_prefaces(target: Target) -> AsyncIterator[None]:
    """TLS connections of an operator over which HTTP/2 is never set up."""
    trusted = context(target, "operator")
    held = await many(SPEAKING, lambda number: secure(target, number, trusted))
    for number, (_, writer) in enumerate(held):
        writer.write(PREFACE[: number % len(PREFACE)])
    yield
    await hang_up(held)


@asynccontextmanager
async def idle(target: Target) -> AsyncIterator[None]:
    """Connections of an operator that are ready, and not used."""
    trusted = context(target, "operator")
    held = await many(READY, lambda number: speaking(target, number, trusted))
    yield
    await hang_up(held)


@asynccontextmanager
async def unfinished(target: Target) -> AsyncIterator[None]:
    """Calls whose headers never end, and calls whose message never comes."""
    trusted = context(target, "operator")
    held = await many(20, lambda number: speaking(target, number, trusted))
    for number, (_, writer) in enumerate(held):
        for call in range(1, 200, 2):
            flags = END_HEADERS if number % 2 else 0
            writer.write(frame(HEADERS, flags, call, fields("List")))
            if not flags:
                break
    yield
    await hang_up(held)


@asynccontextmanager
async def slow_http(target: Target) -> AsyncIterator[None]:
    """Connections to the other port: silent, with a question that has no end, and with an answer that nobody reads."""
    said = (b"", b"GET /metrics HTTP/1.1\r\nHost: ", b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 20)
    held = await many(HTTP, lambda number: plain(target, number, target.metrics_port))
    for number, each in enumerate(held):
        with suppress(OSError):
            each.send(said[number % len(said)])
    yield
    for each in held:
        each.close()


@asynccontextmanager
async def flood(target: Target, frames: Callable[[int], bytes]) -> AsyncIterator[None]:
    """Connections of an operator that send frames for ever, as fast as the node reads, and anew when they are cut."""
    trusted = context(target, "operator")

    async def send(number: int) -> None:
        while True:
            with suppress(OSError):
                _, writer = await speaking(target, number, trusted)
                try:
                    for turn in itertools.count():
                        writer.write(frames(turn))
                        await writer.drain()
                        await asyncio.sleep(0)
                finally:
                    writer.transport.abort()

    async with working(send(number) for number in range(2)):
        yield


@asynccontextmanager
async def working(work: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """What goes on for ever, until the context ends."""
    tasks = [asyncio.create_task(each) for each in work]
    yield
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


def resets(turn: int) -> bytes:
    """Calls that are taken back as soon as they are made (CVE-2023-44487)."""
    calls = range(1 + 100 * turn, 1 + 100 * (turn + 1), 2)
    return b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, call, fields("List")) + frame(RESET, 0, call, b"\0\0\0\x08")
        for call in calls
    )


def pings(_: int) -> bytes:
    return frame(PING, 0, 0, bytes(8)) * 100


def settings(_: int) -> bytes:
    return frame(SETTINGS, 0, 0) * 100


def continuations(turn: int) -> bytes:
    """Headers that go on and on (CVE-2024-24549 and its like)."""
    more = frame(CONTINUATION, 0, 1, field("x-more", "x" * 100) * 100)
    return more if turn else frame(HEADERS, 0, 1, fields("List")) + more


def empty_data(turn: int) -> bytes:
    """A message that consists of nothing, again and again."""
    more = frame(DATA, 0, 1) * 100
    return more if turn else frame(HEADERS, END_HEADERS, 1, fields("List")) + more


@asynccontextmanager
async def calling(target: Target, role: str, call: Callable[[Any], Awaitable[Any]]) -> AsyncIterator[None]:
    """A hundred callers that call again as soon as they have their answer."""

    async def again(channel: grpc.aio.Channel) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call(channel)

    async with (
        connected(target.port, credentials(target.pki / role)) as channel,
        working(again(channel) for _ in range(100)),
    ):
        yield


def oversized() -> node_pb2.ListRequest:
    """A question of a megabyte, in a field that nobody knows."""
    made = node_pb2.ListRequest()
    made.ParseFromString(b"\x0a\xf0\xff\x3f" + bytes(1_048_560))
    return made


def listing(target: Target) -> AbstractAsyncContextManager[None]:
    return calling(target, "operator", lambda channel: NodeStub(channel).List(node_pb2.ListRequest()))


def explaining(target: Target) -> AbstractAsyncContextManager[None]:
    request = node_pb2.ExplainRequest(uid=target.pod)
    return calling(target, "operator", lambda channel: NodeStub(channel).Explain(request))


def large_questions(target: Target) -> AbstractAsyncContextManager[None]:
    request = oversized()
    return calling(target, "operator", lambda channel: NodeStub(channel).List(request))


def forbidden(target: Target) -> AbstractAsyncContextManager[None]:
    request = node_pb2.DetachRequest(uid=target.pod)
    return calling(target, "operator", lambda channel: NodeStub(channel).Detach(request))


def health(target: Target) -> AbstractAsyncContextManager[None]:
    request = health_pb2.HealthCheckRequest()
    return calling(target, "operator", lambda channel: cast(Any, health_pb2_grpc.HealthStub(channel)).Check(request))


def endless_programs(target: Target) -> AbstractAsyncContextManager[None]:
    """Who has a master's certificate, too, sends a program that does not end."""

    async def attach(channel: grpc.aio.Channel) -> None:
        stream = NodeStub(channel).Attach(timeout=20)
        await stream.write(header(target.pod, program(FAST), build=bytes(32)))
        async for _ in stream:
            while not stream.done():
                await stream.write(node_pb2.AttachRequest(chunk=bytes(100_000)))

    return calling(target, "master", attach)


@asynccontextmanager
async def strangers(target: Target) -> AsyncIterator[None]:
    """Handshakes with a certificate of another authority, one after the other: each is refused."""
    trusted = ssl.create_default_context(cafile=target.pki / "ca.crt")
    trusted.set_alpn_protocols(["h2"])
    foreign = target.pki / "foreign" / "master"
    trusted.load_cert_chain(foreign / "tls.crt", foreign / "tls.key")

    async def again(number: int) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await secure(target, number, trusted)
                with suppress(OSError):
                    await reader.read()
                writer.transport.abort()

    async with working(again(number) for number in range(10)):
        yield


FLOODS: dict[str, Attack] = {
    "resets": lambda target: flood(target, resets),
    "pings": lambda target: flood(target, pings),
    "settings": lambda target: flood(target, settings),
    "continuations": lambda target: flood(target, continuations),
    "empty data": lambda target: flood(target, empty_data),
    "list": listing,
    "explain": explaining,
    "large questions": large_questions,
    "forbidden calls": forbidden,
    "health": health,
    "endless programs": endless_programs,
    "strangers": strangers,
}
HELD: tuple[Attack, ...] = (idle, unfinished, slow_prefaces, slow_handshakes, silent, slow_http)


@asynccontextmanager
async def held(target: Target) -> AsyncIterator[None]:
    """All of these at once."""
    async with AsyncExitStack() as stack:
        for made in HELD:
            await stack.enter_async_context(made(target))
        yield


ATTACKS: dict[str, Attack] = FLOODS | {"held": held}


def say(word: str) -> None:
    """Answer."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


async def obey(target: Target) -> None:
    """Do what stdin says."""
    while name := (await asyncio.to_thread(sys.stdin.readline)).strip():
        async with ATTACKS[name](target):
            say("begun")
            await asyncio.to_thread(sys.stdin.readline)
        say("ended")


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(obey(Target(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
