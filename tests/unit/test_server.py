"""What the service does unasked, and whom it listens to, with an agent that is only played.

tests/kernel has what it is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from bpfrl.cgroup import CgroupTree
from bpfrl.errors import CgroupNotFoundError, CompilerError, KernelError
from bpfrl.limits import Change, Limits
from bpfrl.node import daemon, server
from bpfrl.node.agent import Agent
from bpfrl.node.server import NodeService
from bpfrl.rpc import authority, node_pb2, tls
from bpfrl.rpc.node_pb2_grpc import NodeStub, add_NodeServicer_to_server
from bpfrl.units import Rate
from tests.unit.fakes import UID, run, running, until

TOPS = [Path("/x/kubepods.slice"), Path("/x/kubelet.slice/kubelet-kubepods.slice")]


class Played:
    """An agent and a tree, with what was asked of them; what is put in ``failing`` is raised then."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.failing: dict[object, Exception] = {}
        self.swept: list[str] = []
        self.cooperating_now: list[object] = []

    def sweep(self) -> list[str]:
        self._did("sweep")
        return self.swept

    def tops(self) -> list[Path]:
        self._did("tops")
        return TOPS

    def cooperate(self, path: Path) -> bool:
        self._did(path)
        new = path not in self.cooperating_now
        self.cooperating_now += [path] if new else []
        return new

    def cooperating(self) -> list[object]:
        self._did("cooperating")
        return list(self.cooperating_now)

    def stop_cooperating(self, cgroup_id: object) -> bool:
        self._did(("stop", cgroup_id))
        self.cooperating_now.remove(cgroup_id)
        return True

    def limiter(self, uid: str) -> None:
        self._did(("limiter", uid))

    def find(self, uid: str) -> Path:
        raise CgroupNotFoundError(f"no cgroup for pod {uid}: played")

    def limiters(self) -> list[object]:
        self._did("limiters")
        return []

    def update(self, uid: str, limits: Limits) -> Change:
        self._did(("update", uid, limits))
        return Change.UPDATED

    def detach(self, uid: str) -> Change:
        self._did(("detach", uid))
        return Change.DETACHED

    def _did(self, what: object) -> None:
        self.calls.append(what)
        if what in self.failing:
            raise self.failing[what]


@pytest.fixture
def played() -> Played:
    return Played()


Makes = Callable[[bool], NodeService]


@pytest.fixture
def makes(played: Played) -> Iterator[Makes]:
    """Makes the service, with or without cooperation."""
    made: list[NodeService] = []

    def make(cooperate: bool) -> NodeService:
        agent, tree = cast(Agent, played), cast(CgroupTree, played)
        made.append(NodeService(agent, tree, roles=False, cooperate=cooperate))
        return made[-1]

    yield make
    for service in made:
        service.close()


def test_tending_sweeps_and_then_has_the_pods_cooperate(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    played.swept = [UID]
    service = makes(True)
    run(service.tend())
    assert played.calls == ["sweep", "tops", *TOPS]
    assert f"{UID} swept: its pod has ended" in caplog.text
    assert [f"senders below {top} keep to" in caplog.text for top in TOPS] == [True, True]
    caplog.clear()
    played.swept = []
    run(service.tend())
    # Each time, for whatever has come or was taken off meanwhile; it is told only when something was done.
    assert played.calls[4:] == ["sweep", "tops", *TOPS]
    assert caplog.text == ""


def test_tending_without_cooperation_sweeps_and_ends_what_an_earlier_process_began(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    played.cooperating_now = [7, 8]
    service = makes(False)
    run(service.tend())
    assert played.calls == ["sweep", "cooperating", ("stop", 7), ("stop", 8)]
    assert caplog.text.count("senders do not cooperate any more") == 2
    caplog.clear()
    run(service.tend())
    assert played.calls[4:] == ["sweep", "cooperating"]
    assert caplog.text == ""


@pytest.mark.parametrize("error", [KernelError("cannot attach: played"), CompilerError("no clang: played")])
def test_one_cgroup_that_cannot_cooperate_keeps_neither_the_sweep_nor_the_others_from_it(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.INFO)
    played.swept = [UID]
    played.failing[TOPS[0]] = error
    run(makes(True).tend())
    assert played.calls[0] == "sweep"
    assert played.calls[-1] == TOPS[-1]
    assert f"{UID} swept" in caplog.text
    assert f"senders below {TOPS[0]} do not cooperate: {error}" in caplog.text


@pytest.mark.parametrize("what", ["sweep", "tops"])
@pytest.mark.parametrize("error", [KernelError("cannot: played"), OSError(5, "played")])
def test_a_daemon_goes_on_tending_after_an_error(
    played: Played,
    makes: Makes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: object,
    error: Exception,
) -> None:
    monkeypatch.setattr(daemon, "_SWEEP_SECONDS", 0.0)
    played.failing[what] = error

    async def tend() -> None:
        async with running(daemon._tend_for_ever(makes(True))):
            await until(lambda: played.calls.count("sweep") >= 3)
            assert "cannot tend this node's limiters: " in caplog.text
            played.failing.clear()
            await until(lambda: set(TOPS) <= set(played.calls))

    run(tend())


def test_tending_waits_for_what_the_agent_is_doing(played: Played, makes: Makes) -> None:
    service = makes(True)
    order: list[Any] = played.calls

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(service._do(order.append, "first"))
            group.create_task(service.tend())

    run(both())
    assert order == ["first", "sweep", "tops", *TOPS]


# Who may make which call.

ROLES = {"master": ["master.bpfrl"], "operator": ["operator.bpfrl"], "other": ["other.example"], "node": ["node.bpfrl"]}
# To the master's empty Attach, the answer is that it is empty.
MAY = {
    "master": {"Attach": "DATA_LOSS", "Update": "OK", "Detach": "OK", "List": "OK", "Explain": "OK"},
    "operator": {"Attach": "", "Update": "", "Detach": "", "List": "OK", "Explain": "OK"},
    "other": {"Attach": "", "Update": "", "Detach": "", "List": "", "Explain": ""},
    "node": {"Attach": "", "Update": "", "Detach": "", "List": "", "Explain": ""},
}
REQUESTS: dict[str, Any] = {
    "Update": node_pb2.UpdateRequest(uid=UID, limits=node_pb2.Limits(egress_bits_per_second=10**6)),
    "Detach": node_pb2.DetachRequest(uid=UID),
    "List": node_pb2.ListRequest(),
    "Explain": node_pb2.ExplainRequest(uid=UID),
}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a client's certificate for each role, and for none of them."""
    folder = tmp_path_factory.mktemp("roles")
    authority.init(folder, 30)
    signer, key = authority._load_authority(folder)
    for name, [role] in ROLES.items():
        client = folder / f"{name}-client"
        client.mkdir()
        authority._make_certificate(client, signer, key, role, ExtendedKeyUsageOID.CLIENT_AUTH, timedelta(days=1))
    return folder


async def answers(port: int, folder: Path) -> dict[str, tuple[str, str]]:
    """How each call ends, and what is said of it."""
    bundle = tls.Bundle(*((folder / name).read_bytes() for name in tls._FILES))
    credentials = tls.channel_credentials(bundle)
    ended: dict[str, tuple[str, str]] = {}
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=tls.CHANNEL_OPTIONS) as channel:
        stub: Any = NodeStub(channel)
        for method in MAY["master"]:
            try:
                if method == "Attach":
                    stream = stub.Attach()
                    await stream.done_writing()
                    await stream.read()
                else:
                    await getattr(stub, method)(REQUESTS[method])
            except grpc.aio.AioRpcError as error:
                ended[method] = (error.code().name, error.details() or "")
            else:
                ended[method] = ("OK", "")
    return ended


@pytest.mark.parametrize("name", ROLES)
def test_a_call_is_for_those_roles_that_may_make_it(played: Played, pki: Path, name: str) -> None:
    async def work() -> dict[str, tuple[str, str]]:
        listener = grpc.aio.server()
        agent, tree = cast(Agent, played), cast(CgroupTree, played)
        service = NodeService(agent, tree, roles=True, cooperate=True)
        add_NodeServicer_to_server(service, listener)
        shown = tls.server_credentials(tls.Certificates(pki / "node", tls.NODE))
        port = listener.add_secure_port("127.0.0.1:0", shown)
        await listener.start()
        try:
            return await answers(port, pki / f"{name}-client")
        finally:
            await listener.stop(0)
            service.close()

    ended = run(work())
    for method, expected in MAY[name].items():
        code, reason = ended[method]
        assert code == (expected or "PERMISSION_DENIED"), (method, reason)
        if not expected:
            wanted = "master.bpfrl or operator.bpfrl" if method in ("List", "Explain") else "master.bpfrl"
            assert reason == f"the certificate is for {ROLES[name][0]}: it must have the DNS name {wanted}"
    done = {call if isinstance(call, str) else cast(tuple[str], call)[0] for call in played.calls}
    assert done == {
        "master": {"update", "detach", "limiters", "limiter"},
        "operator": {"limiters", "limiter"},
    }.get(name, set())


def test_every_call_of_the_service_says_who_may_make_it() -> None:
    methods = node_pb2.DESCRIPTOR.services_by_name["Node"].methods
    assert {method.name.lower() for method in methods} == set(server._MAY)
    assert all(tls.MASTER in roles for roles in server._MAY.values())


# Who asks too much.


def test_a_change_waits_for_one_look_however_many_ask(played: Played, makes: Makes) -> None:
    service, context = makes(True), cast(Any, None)

    def look() -> list[object]:
        played.calls.append("limiters")
        time.sleep(0.05)
        return []

    played.limiters = look  # type: ignore[method-assign]

    async def ask() -> None:
        asking = [asyncio.create_task(service.List(node_pb2.ListRequest(), context)) for _ in range(100)]
        await until(lambda: played.calls)
        later = [asyncio.create_task(service.List(node_pb2.ListRequest(), context)) for _ in range(100)]
        await asyncio.sleep(0)
        start = time.monotonic()
        await service._do(played.update, UID, Limits(Rate(10**6)))
        assert time.monotonic() - start < 1
        await asyncio.gather(*asking, *later)
        # Who asks while somebody looks has an answer of later than that.
        assert played.calls.count("limiters") == 2

    run(ask())


def test_a_look_that_fails_is_everybodys_and_the_next_one_is_another(played: Played, makes: Makes) -> None:
    service = makes(True)

    async def look() -> node_pb2.ListReply:
        return await service._shared_list()

    async def ask() -> None:
        played.failing["limiters"] = KernelError("played")
        failed = await asyncio.gather(look(), look(), return_exceptions=True)
        assert [str(each) for each in failed] == ["played"] * 2
        played.failing.clear()
        goes, stays = asyncio.create_task(look()), asyncio.create_task(look())
        await asyncio.sleep(0)
        goes.cancel()
        assert not (await stays).limiters

    run(ask())


@pytest.mark.parametrize(
    ("limits", "room", "soft"),
    [
        ((1024, 524_288), 2_000, 2_512),
        ((1024, -1), 2_000, 2_512),
        ((-1, -1), 2_000, -1),
        ((1_000_000, 1_000_000), 2_000, 1_000_000),
        ((1024, 1024), 512, 1024),
        ((256, 256), 1, 256),
    ],
)
def test_connections_leave_descriptors_for_the_work(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], room: int, soft: int
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: now.append(wanted))
    assert daemon._room() == room
    assert now[-1] == (soft, limits[1])
