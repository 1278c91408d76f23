from __future__ import annotations

import asyncio
import hashlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from bpfrl import __version__
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.bpf.sockets import Counted
from bpfrl.errors import BpfrlError, RefusedError, UnreachableError
from bpfrl.explanation import Refusal, Report
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc import authority, client, messages, node_pb2, tls
from bpfrl.rpc.client import Connections, NodeClient
from bpfrl.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from bpfrl.units import Rate

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
POD = PodRef(UID, "shop", "cart-0")
LIMITS = Limits(Rate(10**7), None, 65_536)
BUILD = bytes(range(32))
IMAGE = bytes(range(251)) * 1_000
STATUS = Status(POD, LIMITS, Counters(1, 2, 3, 4), Counters(5, 6, 7, 8), 4_711, 1_700_000_000.5, BUILD)

Result = TypeVar("Result")
Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[node_pb2.AttachRequest]
Behaviour = Callable[[Requests, Context], AsyncIterator[node_pb2.AttachReply]]


PROCEED = node_pb2.AttachReply(stages=[node_pb2.STAGE_PROCEED])
STAGES = tuple(
    node_pb2.AttachReply(stages=[stage])
    for stage in (node_pb2.STAGE_RECEIVED, node_pb2.STAGE_LOADED, node_pb2.STAGE_PINNED)
)
ATTACHED = node_pb2.AttachReply(stages=[node_pb2.STAGE_ATTACHED], change=node_pb2.CHANGE_ATTACHED)


async def drain(requests: Requests) -> None:
    async for _ in requests:
        pass


class Node(NodeServicer):
    """A node that answers as a test wants it to, and remembers what was asked."""

    def __init__(self, attach: Behaviour | None = None, done: int = node_pb2.CHANGE_UPDATED) -> None:
        self.attach = attach or self.take
        self.done = done
        self.asked: list[Any] = []
        self.peers: list[str] = []
        self.limiters: list[node_pb2.Limiter] = []
        self.report = Report(__version__)
        self.refusal: tuple[grpc.StatusCode, str] | None = None

    async def take(self, requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        """What a node does where all goes well."""
        self.asked.append(await anext(requests))
        yield PROCEED
        async for request in requests:
            self.asked.append(request)
        for reply in (*STAGES, ATTACHED):
            yield reply

    async def Attach(  # noqa: N802
        self, request_iterator: Requests, context: Context
    ) -> AsyncIterator[node_pb2.AttachReply]:
        async for reply in self.attach(request_iterator, context):
            yield reply

    async def Update(self, request: node_pb2.UpdateRequest, context: Context) -> node_pb2.Done:  # noqa: N802
        return await self._answer(request, context)

    async def Detach(self, request: node_pb2.DetachRequest, context: Context) -> node_pb2.Done:  # noqa: N802
        return await self._answer(request, context)

    async def List(self, request: node_pb2.ListRequest, context: Context) -> node_pb2.ListReply:  # noqa: N802
        await self._answer(request, context)
        return node_pb2.ListReply(limiters=self.limiters)

    async def Explain(  # noqa: N802
        self, request: node_pb2.ExplainRequest, context: Context
    ) -> node_pb2.ExplainReply:
        await self._answer(request, context)
        return messages.from_report(self.report)

    async def _answer(self, request: object, context: Context) -> node_pb2.Done:
        self.asked.append(request)
        self.peers.append(context.peer())
        if self.refusal:
            await context.abort(*self.refusal)
        return node_pb2.Done(change=self.done)  # type: ignore[arg-type]


@asynccontextmanager
async def serving(
    node: Node, certificates: tls.Certificates | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """The port at which a node answers on loopback."""
    server = grpc.aio.server()
    add_NodeServicer_to_server(node, server)
    place = f"[{host}]:0" if ":" in host else f"{host}:0"
    if certificates:
        port = server.add_secure_port(place, tls.server_credentials(certificates))
    else:
        port = server.add_insecure_port(place)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def call(node: Node, method: Callable[[NodeClient], Awaitable[Result]], host: str = "127.0.0.1") -> Result:
    """One call of a client to a node, from beginning to end."""

    async def run() -> Result:
        async with serving(node, host=host) as port:
            own = NodeClient(host, port, None)
            try:
                return await asyncio.wait_for(method(own), 30)
            finally:
                await own.close()

    return asyncio.run(run())


def attach(own: NodeClient) -> Coroutine[Any, Any, Change]:
    return own.attach(POD, LIMITS, IMAGE, BUILD, 1.5)


def refused(node: Node, method: Callable[[NodeClient], Awaitable[object]]) -> tuple[str, str]:
    """The code and the reason with which a node's answer ends."""
    with pytest.raises(RefusedError) as caught:
        call(node, method)
    assert str(caught.value).isprintable()
    return caught.value.code, str(caught.value)


def unreachable(node: Node, method: Callable[[NodeClient], Awaitable[object]]) -> str:
    with pytest.raises(UnreachableError) as caught:
        call(node, method)
    assert str(caught.value).isprintable()
    return str(caught.value)


# What is sent, and what is made of the answer.


def test_attach_sends_the_header_then_the_program_and_reads_the_stages() -> None:
    node = Node()
    assert call(node, attach) is Change.ATTACHED
    first, *rest = node.asked
    assert first.header == node_pb2.Header(
        pod=node_pb2.Pod(uid=UID, namespace="shop", name="cart-0"),
        limits=node_pb2.Limits(egress_bits_per_second=10**7, burst_bytes=65_536),
        size=len(IMAGE),
        sha256=hashlib.sha256(IMAGE).digest(),
        build=BUILD,
        wait_ms=1500,
    )
    assert {request.WhichOneof("step") for request in rest} == {"chunk"}
    assert [len(request.chunk) for request in rest] == [65_536, 65_536, 65_536, len(IMAGE) - 3 * 65_536]
    assert b"".join(request.chunk for request in rest) == IMAGE


@pytest.mark.parametrize("change", [Change.UPDATED, Change.UNCHANGED])
def test_no_bytes_travel_to_a_node_that_has_the_program(change: Change) -> None:
    more: list[object] = []

    async def keep(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        await anext(requests)
        yield node_pb2.AttachReply(stages=[node_pb2.STAGE_ATTACHED], change=messages.from_change(change))
        try:
            more.append(await asyncio.wait_for(anext(requests), 0.3))
        except TimeoutError:
            more.append("nothing")

    assert call(Node(keep), attach) is change
    assert more == ["nothing"]


def test_update_sends_the_uid_and_the_limits() -> None:
    node = Node()
    assert call(node, lambda own: own.update(UID, LIMITS)) is Change.UPDATED
    limits = node_pb2.Limits(egress_bits_per_second=10**7, burst_bytes=65_536)
    assert node.asked == [node_pb2.UpdateRequest(uid=UID, limits=limits)]


def test_detach_sends_the_uid() -> None:
    node = Node(done=node_pb2.CHANGE_ABSENT)
    assert call(node, lambda own: own.detach(UID)) is Change.ABSENT
    assert node.asked == [node_pb2.DetachRequest(uid=UID)]


def test_list_reads_what_is_whole_and_what_is_broken() -> None:
    node = Node()
    found: list[Status | Broken] = [STATUS, Broken("0123456789abcdef0123456789abcdef", "cut off")]
    node.limiters = [messages.from_limiter(each) for each in found]
    assert call(node, lambda own: own.list()) == found


def test_a_list_of_all_pods_of_a_large_node_is_read() -> None:
    """The default of gRPC is 4 MiB."""
    node = Node()
    node.limiters = [messages.from_limiter(STATUS)] * 40_000
    assert node_pb2.ListReply(limiters=node.limiters).ByteSize() > 4 * 2**20
    assert len(call(node, lambda own: own.list())) == 40_000


def test_calls_go_over_one_connection() -> None:
    node = Node()

    async def several(own: NodeClient) -> None:
        await asyncio.gather(*(own.update(UID, LIMITS) for _ in range(20)))
        await own.update(UID, LIMITS)

    call(node, several)
    assert len(node.peers) == 21
    assert len(set(node.peers)) == 1


def test_of_many_connections_the_one_that_was_not_used_for_longest_is_closed() -> None:
    async def run() -> None:
        connections = Connections(2)
        nodes = [Node(), Node(), Node()]
        async with serving(nodes[0]) as one, serving(nodes[1]) as two, serving(nodes[2]) as three:
            clients = [NodeClient("127.0.0.1", port, None, connections) for port in (one, two, three)]
            for number in (0, 1, 0, 2, 0, 2):
                await clients[number].update(UID, LIMITS)
            # The second has made room for the third, and nobody has noticed.
            lost = [asyncio.create_task(each.lost()) for each in clients]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in lost)
            assert len(set(nodes[0].peers)) == len(set(nodes[2].peers)) == 1
            # It is made again where it is needed, and then whoever waits is told that much may have happened.
            await clients[1].update(UID, LIMITS)
            await asyncio.wait_for(lost[1], 5)
            assert len(set(nodes[1].peers)) == 2
            await asyncio.sleep(0.1)
            assert not lost[0].done()
            assert not lost[2].done()
            for task in lost:
                task.cancel()
            await asyncio.gather(*lost, return_exceptions=True)
            for each in clients:
                await each.close()

    asyncio.run(run())


def test_a_connection_with_a_call_on_it_is_not_closed_for_want_of_use() -> None:
    async def run() -> None:
        finish = asyncio.Event()
        begun = asyncio.Event()

        async def slow(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
            await anext(requests)
            begun.set()
            await finish.wait()
            yield ATTACHED

        connections = Connections(0)
        async with serving(Node(slow)) as one, serving(Node()) as two:
            first, second = (NodeClient("127.0.0.1", port, None, connections) for port in (one, two))
            attaching = asyncio.create_task(attach(first))
            await begun.wait()
            await second.update(UID, LIMITS)
            await first.update(UID, LIMITS)
            finish.set()
            assert await asyncio.wait_for(attaching, 5) is Change.ATTACHED
            await asyncio.gather(first.close(), second.close())

    asyncio.run(run())


def test_nothing_is_left_of_a_connection_that_does_not_come_about(closed_port: int) -> None:
    async def run() -> None:
        own = NodeClient("127.0.0.1", closed_port, None)
        for _ in range(20):
            with pytest.raises(UnreachableError):
                await own.list()
            # gRPC tries no connection by itself that nobody has asked for.
            assert own._connection is None
        await own.close()

    asyncio.run(run())


# Refusals.


@pytest.mark.parametrize("code", ["NOT_FOUND", "INVALID_ARGUMENT", "PERMISSION_DENIED", "FAILED_PRECONDITION"])
def test_a_refusal_keeps_its_code_and_reason(code: str) -> None:
    node = Node()
    node.refusal = (grpc.StatusCode[code], "a reason\nin two lines")
    for method in (
        lambda own: own.update(UID, LIMITS),
        lambda own: own.detach(UID),
        lambda own: own.list(),
        lambda own: own.explain(UID),
    ):
        assert refused(node, method) == (code, "a reason in two lines")


async def at_once(_: Requests, context: Context) -> AsyncIterator[node_pb2.AttachReply]:
    await context.abort(grpc.StatusCode.DATA_LOSS, "no such luck")
    yield ATTACHED


async def after_the_header(requests: Requests, context: Context) -> AsyncIterator[node_pb2.AttachReply]:
    await anext(requests)
    yield PROCEED
    await context.abort(grpc.StatusCode.DATA_LOSS, "no such luck")


async def after_a_chunk(requests: Requests, context: Context) -> AsyncIterator[node_pb2.AttachReply]:
    await anext(requests)
    yield PROCEED
    await anext(requests)
    await context.abort(grpc.StatusCode.DATA_LOSS, "no such luck")


async def at_the_end(requests: Requests, context: Context) -> AsyncIterator[node_pb2.AttachReply]:
    await anext(requests)
    yield PROCEED
    await drain(requests)
    for reply in STAGES:
        yield reply
    await context.abort(grpc.StatusCode.DATA_LOSS, "no such luck")


@pytest.mark.parametrize("behaviour", [at_once, after_the_header, after_a_chunk, at_the_end])
def test_a_node_that_says_no_while_the_program_travels_is_heard(behaviour: Behaviour) -> None:
    """When the answer overtakes the bytes is a matter of luck, so it is tried often, and with many bytes.

    A write that fails makes gRPC forget what the node has said: then the call counts as one that was not answered.
    """
    large = bytes(2**20)

    async def often(own: NodeClient) -> list[BpfrlError]:
        calls = (own.attach(POD, LIMITS, large, BUILD) for _ in range(50))
        return [
            error for error in await asyncio.gather(*calls, return_exceptions=True) if isinstance(error, BpfrlError)
        ]

    errors = call(Node(behaviour), often)
    told = [(error.code, str(error)) for error in errors if isinstance(error, RefusedError)]
    assert set(told) <= {("DATA_LOSS", "no such luck")}
    unanswered = [error for error in errors if isinstance(error, UnreachableError)]
    assert len(told) + len(unanswered) == 50
    assert behaviour is not at_the_end or not unanswered


NO_LIMITERS = {
    "no pod": node_pb2.Limiter(),
    "a pod that is a path": node_pb2.Limiter(pod=node_pb2.Pod(uid="../../etc")),
    "a broken one without a pod": node_pb2.Limiter(broken="why"),
    "an impossible rate": node_pb2.Limiter(pod=node_pb2.Pod(uid=UID), limits=node_pb2.Limits(egress_bits_per_second=1)),
    "an impossible burst": node_pb2.Limiter(pod=node_pb2.Pod(uid=UID), limits=node_pb2.Limits(burst_bytes=1)),
}


@pytest.mark.parametrize("limiter", NO_LIMITERS.values(), ids=NO_LIMITERS)
def test_a_list_with_what_cannot_be_is_a_refusal(limiter: node_pb2.Limiter) -> None:
    node = Node()
    node.limiters = [messages.from_limiter(STATUS), limiter]
    code, reason = refused(node, lambda own: own.list())
    assert code == "INTERNAL"
    assert reason.startswith("its answer cannot be understood: ")


@pytest.mark.parametrize("number", [node_pb2.CHANGE_UNSPECIFIED, 99])
def test_a_change_that_nobody_knows_is_a_refusal(number: int) -> None:
    async def odd(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        await anext(requests)
        yield node_pb2.AttachReply(stages=[node_pb2.STAGE_ATTACHED], change=number)  # type: ignore[arg-type]

    node = Node(odd, done=number)
    for method in (attach, lambda own: own.update(UID, LIMITS), lambda own: own.detach(UID)):
        code, reason = refused(node, method)
        assert code == "INTERNAL"
        assert reason.startswith(f"its answer cannot be understood: the answer names change {number}")


# No telling.


@pytest.mark.parametrize(
    "replies", [(), (PROCEED,), (PROCEED, *STAGES)], ids=["nothing", "proceed", "all but the last"]
)
def test_an_answer_that_ends_before_the_limiter_is_attached(replies: tuple[node_pb2.AttachReply, ...]) -> None:
    async def end(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        await anext(requests)
        for reply in replies:
            yield reply
            if reply is PROCEED:
                await drain(requests)

    assert unreachable(Node(end), attach).endswith(": the answer ends before the limiter is attached")


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"])
def test_what_leaves_open_whether_it_was_done(code: str) -> None:
    node = Node()
    node.refusal = (grpc.StatusCode[code], "gone")
    assert unreachable(node, lambda own: own.update(UID, LIMITS)).endswith(": gone")


def test_a_node_that_fails_on_the_way() -> None:
    async def fail(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        await anext(requests)
        yield PROCEED
        await drain(requests)
        raise OSError("the disk is full")

    assert "node 127.0.0.1:" in unreachable(Node(fail), attach)


@pytest.mark.parametrize("pause", [0, 0.1], ids=["when they begin", "in the middle"])
def test_a_connection_that_is_cut_off_while_programs_travel(pause: float) -> None:
    """More bytes than a connection takes before the other end reads them."""

    async def run() -> None:
        begun: asyncio.Queue[None] = asyncio.Queue()

        async def hang(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
            await anext(requests)
            yield PROCEED
            begun.put_nowait(None)
            await asyncio.sleep(60)

        async with serving(Node(hang)) as port:
            own = NodeClient("127.0.0.1", port, None)
            calls = [asyncio.create_task(own.attach(POD, LIMITS, bytes(2**20), BUILD)) for _ in range(20)]
            for _ in calls:
                await begun.get()
            await asyncio.sleep(pause)
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert {type(end) for end in ends} == {UnreachableError}
        assert all(str(end).startswith(f"node 127.0.0.1:{port}: ") for end in ends)
        await own.close()

    asyncio.run(run())


def test_who_gives_up_ends_the_call_at_the_node_too() -> None:
    async def run() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def hang(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
            await anext(requests)
            yield PROCEED
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async with serving(Node(hang)) as port:
            own = NodeClient("127.0.0.1", port, None)
            attaching = asyncio.create_task(attach(own))
            await begun.wait()
            attaching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attaching
            await asyncio.wait_for(ended.wait(), 5)
            await own.close()

    asyncio.run(run())


def one_call(address: str, port: int, certificates: tls.Certificates | None = None) -> tuple[str, float]:
    """Why a node cannot be reached, and how long it took to find out."""

    async def run() -> None:
        own = NodeClient(address, port, certificates)
        try:
            await asyncio.wait_for(own.update(UID, LIMITS), 30)
        finally:
            await own.close()

    start = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        asyncio.run(run())
    assert str(caught.value).isprintable()
    return str(caught.value), time.monotonic() - start


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that nobody else gets, and where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port at which connections come about, and nobody says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_refused_connection_is_known_at_once(closed_port: int) -> None:
    text, seconds = one_call("127.0.0.1", closed_port)
    assert text.startswith(f"node 127.0.0.1:{closed_port}: ")
    assert "Connection refused" in text
    assert seconds < 5


@pytest.mark.parametrize("secure", [False, True])
def test_a_node_that_says_nothing_is_given_up_in_time(
    silent_port: int, pki: Path, monkeypatch: pytest.MonkeyPatch, *, secure: bool
) -> None:
    monkeypatch.setattr(client, "_CALL_SECONDS", 0.5)
    certificates = tls.Certificates(pki / "master", tls.MASTER) if secure else None
    text, seconds = one_call("127.0.0.1", silent_port, certificates)
    assert text.startswith(f"node 127.0.0.1:{silent_port}: ")
    assert 0.5 <= seconds < 3


def test_a_node_has_as_much_longer_as_it_may_wait_for_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CALL_SECONDS", 0.3)

    async def late(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
        await anext(requests)
        await asyncio.sleep(0.6)
        yield ATTACHED

    assert call(Node(late), lambda own: own.attach(POD, LIMITS, IMAGE, BUILD, 2)) is Change.ATTACHED
    unreachable(Node(late), lambda own: own.attach(POD, LIMITS, IMAGE, BUILD))


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1", "node.example", "0.0.0.0", "::"])  # noqa: S104
def test_beyond_loopback_there_is_no_connection_without_tls(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for connect in ("insecure_channel", "secure_channel"):
        monkeypatch.setattr(grpc.aio, connect, lambda *_, **__: pytest.fail("a connection was made"))

    async def run() -> None:
        own = NodeClient(address, 10_002, None)
        for method in (attach(own), own.update(UID, LIMITS), own.detach(UID), own.list()):
            with pytest.raises(UnreachableError) as caught:
                await method
            assert str(caught.value) == f"node {own.target}: no TLS (--insecure) beyond loopback"
        await own.close()

    asyncio.run(run())


# Addresses.


@pytest.mark.parametrize(
    ("address", "target"),
    [("10.0.0.1", "10.0.0.1:10002"), ("fd00::1", "[fd00::1]:10002"), ("node.example", "node.example:10002")],
)
def test_the_form_of_an_address(address: str, target: str) -> None:
    assert NodeClient(address, 10_002, None).target == target


def test_a_node_is_reached_by_ipv6() -> None:
    node = Node()
    assert call(node, lambda own: own.update(UID, LIMITS), "::1") is Change.UPDATED
    assert node.peers[0].startswith("ipv6:")


# Certificates.


_SERVER = """if True:
    import asyncio, sys
    from pathlib import Path
    from bpfrl.rpc import tls
    from tests.unit.test_client import Node, serving

    async def run():
        async with serving(Node(), tls.Certificates(Path(sys.argv[1]), tls.NODE)) as port:
            print(port, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())
"""


def test_a_node_outlives_many_connections_at_once(pki: Path) -> None:
    """They are made on gRPC's own threads, and each asks for the certificates."""

    async def connect(port: int) -> None:
        master = tls.Certificates(pki / "master", tls.MASTER)
        for _ in range(8):
            clients = [NodeClient("127.0.0.1", port, master) for _ in range(100)]
            await asyncio.gather(*(each.list() for each in clients))
            await asyncio.gather(*(each.close() for each in clients))

    command = [sys.executable, "-c", _SERVER, str(pki / "node")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        asyncio.run(connect(port))
        server.communicate(timeout=30)
    assert server.returncode == 0


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    authority.init(folder / "own", 30)
    authority.init(folder / "foreign", 30)
    return folder


@pytest.fixture
def pki(authorities: Path, tmp_path: Path) -> Path:
    """An authority of this test's own, with both certificates."""
    shutil.copytree(authorities / "own", tmp_path / "pki")
    return tmp_path / "pki"


def test_master_and_node_trust_each_other(pki: Path) -> None:
    async def run() -> Change:
        async with serving(Node(), tls.Certificates(pki / "node", tls.NODE)) as port:
            own = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
            try:
                return await attach(own)
            finally:
                await own.close()

    assert asyncio.run(run()) is Change.ATTACHED


def test_calls_on_the_way_end_on_the_old_connection_when_certificates_are_replaced(pki: Path) -> None:
    async def run() -> None:
        begun, finish = asyncio.Event(), asyncio.Event()
        streams: list[str] = []

        async def slow(requests: Requests, context: Context) -> AsyncIterator[node_pb2.AttachReply]:
            streams.append(context.peer())
            await anext(requests)
            yield PROCEED
            begun.set()
            await finish.wait()
            await drain(requests)
            yield ATTACHED

        node = Node(slow)
        async with serving(node, tls.Certificates(pki / "node", tls.NODE)) as port:
            own = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
            await own.update(UID, LIMITS)
            attaching = asyncio.create_task(attach(own))
            await begun.wait()
            authority.init(pki, 30, renew=True)
            for _ in range(3):
                await own.update(UID, LIMITS)
            await asyncio.sleep(0.1)
            assert not attaching.done()
            finish.set()
            assert await asyncio.wait_for(attaching, 5) is Change.ATTACHED
            old, *new = node.peers
            assert streams == [old]
            assert len(set(new)) == 1
            assert old not in new
            await own.close()

    asyncio.run(run())


def test_a_call_that_waits_for_a_cgroup_outlasts_the_replacing_of_certificates(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take longer than any other call."""
    monkeypatch.setattr(client, "_CALL_SECONDS", 0.5)

    async def run() -> None:
        begun = asyncio.Event()

        async def late(requests: Requests, _: Context) -> AsyncIterator[node_pb2.AttachReply]:
            await anext(requests)
            begun.set()
            await asyncio.sleep(1)
            yield ATTACHED

        async with serving(Node(late), tls.Certificates(pki / "node", tls.NODE)) as port:
            own = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
            attaching = asyncio.create_task(own.attach(POD, LIMITS, IMAGE, BUILD, 5))
            await begun.wait()
            authority.init(pki, 30, renew=True)
            await own.update(UID, LIMITS)
            done, _ = await asyncio.wait({attaching}, timeout=5)
            assert done
            assert not attaching.cancelled()
            assert await attaching is Change.ATTACHED
            await own.close()

    asyncio.run(run())


def test_a_node_with_another_role_is_not_trusted(pki: Path) -> None:
    """Whoever holds some certificate of the authority cannot pose as a node."""
    other = pki / "other"
    shutil.copytree(pki / "node", other)
    own, key = authority._load_authority(pki)
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    authority._make_certificate(other, own, key, "other.example", usage, timedelta(days=1))
    node = Node()

    async def run() -> None:
        async with serving(node, tls.Certificates(other, "other.example")) as port:
            master = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
            try:
                await master.update(UID, LIMITS)
            finally:
                await master.close()

    with pytest.raises(UnreachableError, match="Hostname Verification Check failed"):
        asyncio.run(run())
    assert node.asked == []


def test_a_node_of_another_authority_is_not_trusted(pki: Path, authorities: Path) -> None:
    node = Node()

    async def run() -> None:
        async with serving(node, tls.Certificates(authorities / "foreign" / "node", tls.NODE)) as port:
            own = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
            try:
                await own.update(UID, LIMITS)
            finally:
                await own.close()

    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(run())
    assert node.asked == []


# Explaining.


def test_a_node_explains_one_pod() -> None:
    node = Node()
    node.report = Report("1", cgroup="/x", limiter=STATUS, sockets=Counted(3, 2), refusal=Refusal(1.0, "attach", "no"))
    assert call(node, lambda own: own.explain(UID)) == node.report
    assert node.asked == [node_pb2.ExplainRequest(uid=UID)]


def test_a_node_that_does_not_know_how_to_explain_is_told_by_the_code() -> None:
    node = Node()
    node.refusal = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert refused(node, lambda own: own.explain(UID)) == ("UNIMPLEMENTED", "Method not found!")
