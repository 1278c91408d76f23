"""The node's service over the wire: real TLS, real bytes, and a kernel that is as it was after every refusal.

Most tests serve in this process, so that they can look into it; the last ones start the installed daemon.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from elftools.elf.elffile import ELFFile
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.lab import BPFRL, Lab
from bpfrl import cgroup
from bpfrl.bpf import generator, law, limiter
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import InvalidObjectError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node import daemon, server
from bpfrl.node.agent import Agent
from bpfrl.node.readable import Readable
from bpfrl.node.server import NodeService
from bpfrl.rpc import authority, messages, node_pb2, tls
from bpfrl.rpc.client import NodeClient
from bpfrl.rpc.node_pb2_grpc import NodeStub, add_NodeServicer_to_server
from bpfrl.units import Rate
from tests.kernel.conftest import attached, attached_to, cooperation, entries, items, only, until
from tests.kernel.test_agent import FOREIGN, build, end_pod, state, wait_until_gone
from tests.measuring import unmeasured
from tests.objects import of_another_build, sealed

SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**9), Rate(2 * 10**9), 65_536)
SECONDS = 20.0
CHUNK = 10_000
ROOT = Path(__file__).parents[2]
ALL_STAGES = ["PROCEED", "RECEIVED", "LOADED", "PINNED", "ATTACHED"]


# Programs, and what is said of them.


@functools.cache
def program(limits: Limits) -> bytes:
    return generator.generate(None, limits)


def section(image: bytes, name: str) -> int:
    """Where a section begins."""
    found = ELFFile(BytesIO(image)).get_section_by_name(name)
    assert found is not None
    return int(found["sh_offset"])


def filled(image: bytes, limits: Limits) -> bytes:
    """A program with its limits and its build, as the generator fills its own."""
    changed, data, place = bytearray(image), bytes(law.encode(limits)), section(image, ".data.limits")
    changed[place : place + len(data)] = data
    return sealed(bytes(changed))


def build_of(image: bytes) -> bytes:
    """The build that a program names, or that of ours if it is none."""
    try:
        return generator.inspect(image).build
    except InvalidObjectError:
        return generator.build()


def tampered(image: bytes) -> bytes:
    """A program whose first instruction reads what no program may read."""
    changed, place = bytearray(image), section(image, "cgroup_skb/egress")
    changed[place : place + 8] = bytes.fromhex("7912ff7f00000000")  # r2 = *(u64 *)(r1 + 32767)
    return sealed(bytes(changed))


def header(uid: str, image: bytes, limits: Limits = FAST, /, **others: Any) -> node_pb2.AttachRequest:
    """What announces a program truthfully, but for what is named."""
    fields: dict[str, Any] = {
        "pod": node_pb2.Pod(uid=uid),
        "limits": messages.from_limits(limits),
        "size": len(image),
        "sha256": hashlib.sha256(image).digest(),
        "build": build_of(image),
    }
    return node_pb2.AttachRequest(header=node_pb2.Header(**(fields | others)))


def chunks(image: bytes) -> list[node_pb2.AttachRequest]:
    return [node_pb2.AttachRequest(chunk=image[place : place + CHUNK]) for place in range(0, len(image), CHUNK)]


def whole(uid: str, image: bytes, limits: Limits = FAST, /, **others: Any) -> list[node_pb2.AttachRequest]:
    return [header(uid, image, limits, **others), *chunks(image)]


# The service, and who calls it.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority; beside what it makes, certificates with another role and of the past; and another authority."""
    folder = tmp_path_factory.mktemp("service")
    authority.init(folder, 30)
    authority.init(folder / "foreign", 30)
    own, key = authority._load_authority(folder)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    for name, role, minutes in (
        ("other", "other.example", 60),
        ("node-as-client", tls.NODE, 60),
        ("expired", tls.MASTER, -1),
    ):
        shutil.copytree(folder / "master", folder / name)
        authority._make_certificate(folder / name, own, key, role, usage, timedelta(minutes=minutes))
    return folder


@pytest.fixture
def pki(certificates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(certificates, tmp_path / "pki")


def credentials(folder: Path) -> grpc.ChannelCredentials:
    return tls.channel_credentials(tls.Bundle(*((folder / name).read_bytes() for name in tls._FILES)))


class Outcome(NamedTuple):
    """How a call ended."""

    stages: list[str]
    change: str
    code: str
    reason: str


@dataclass
class Wire:
    """A connection to a node, message by message."""

    stub: Any
    port: int
    client: NodeClient

    async def attach(self, *requests: node_pb2.AttachRequest, end: bool = True) -> Outcome:
        """Send the first message, and the rest when the node asks for it."""
        stream, stages, change = self.stub.Attach(timeout=SECONDS), [], ""
        try:
            await self._send(stream, *requests[:1])
            if len(requests) < 2 and end:
                await stream.done_writing()
            async for reply in replies(stream):
                stages += [node_pb2.Stage.Name(each).removeprefix("STAGE_") for each in reply.stages]
                change = node_pb2.Change.Name(reply.change).removeprefix("CHANGE_") if reply.change else change
                if stages == ["PROCEED"]:
                    await self._send(stream, *requests[1:])
                    if end:
                        await stream.done_writing()
            code, reason = await stream.code(), await stream.details()
        except grpc.aio.AioRpcError as error:
            code, reason = error.code(), error.details()
        finally:
            stream.cancel()
        return Outcome(stages, change, code.name, reason or "")

    async def call(self, method: str, request: Any) -> Outcome:
        try:
            done = await getattr(self.stub, method)(request, timeout=SECONDS)
        except grpc.aio.AioRpcError as error:
            return Outcome([], "", error.code().name, error.details() or "")
        change = node_pb2.Change.Name(done.change).removeprefix("CHANGE_") if method != "List" else ""
        return Outcome([], change, "OK", "")

    async def _send(self, stream: Any, *requests: node_pb2.AttachRequest) -> None:
        for request in requests:
            with suppress(asyncio.InvalidStateError):
                await stream.write(request)


async def replies(stream: Any) -> AsyncIterator[node_pb2.AttachReply]:
    while (reply := await stream.read()) is not grpc.aio.EOF:
        yield reply


@asynccontextmanager
async def connected(port: int, bundle: grpc.ChannelCredentials) -> AsyncIterator[Any]:
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", bundle, options=tls.CHANNEL_OPTIONS) as channel:
        yield channel


@asynccontextmanager
async def serving(bed: Lab, pki: Path) -> AsyncIterator[Wire]:
    """The service on loopback, as the daemon sets it up, and its master."""
    listener = grpc.aio.server(options=daemon._OPTIONS, interceptors=(Readable(),))
    service = NodeService(Agent(bed.bpffs), CgroupTree(bed.cgroup_root), roles=True, cooperate=True)
    add_NodeServicer_to_server(service, listener)
    shown = tls.server_credentials(tls.Certificates(pki / "node", tls.NODE))
    port = listener.add_secure_port("127.0.0.1:0", shown)
    await listener.start()
    client = NodeClient("127.0.0.1", port, tls.Certificates(pki / "master", tls.MASTER))
    try:
        async with connected(port, credentials(pki / "master")) as channel:
            yield Wire(NodeStub(channel), port, client)
    finally:
        await client.close()
        await listener.stop(0)
        await asyncio.to_thread(service.close)


def run(bed: Lab, pki: Path, calls: Callable[[Wire], Awaitable[None]]) -> None:
    """Some calls to a service of their own."""

    async def all_of_them() -> None:
        async with serving(bed, pki) as wire:
            await asyncio.wait_for(calls(wire), 60)

    asyncio.run(all_of_them())


# What is in the kernel.


def snapshot(bed: Lab) -> object:
    """Everything that a refusal must not change; BPF objects that this process holds on to count too."""
    held = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            held.append(str(Path("/proc/self/fd", number).readlink()))
    held = sorted(name for name in held if "bpf" in name and name.startswith("anon_inode:"))
    return state(bed), Agent(bed.bpffs).limiters(), sorted(os.listdir("/sys/fs/bpf")), held


def limit(bed: Lab, *, pod: PodRef | None = None) -> None:
    """Give the pod a limiter of another build, so that the present one has to travel."""
    assert (
        Agent(bed.bpffs).attach(of_another_build(program(SLOW)), pod or PodRef(bed.pod_uid), bed.pod_cgroup)
        is Change.ATTACHED
    )


def in_force(bed: Lab) -> dict[str, Limits]:
    """The limits by UID; nothing is broken."""
    found = Agent(bed.bpffs).limiters()
    assert not [each for each in found if isinstance(each, Broken)]
    return {each.pod.uid: each.limits for each in found if isinstance(each, Status)}


def another_pod(bed: Lab) -> tuple[str, Path]:
    """A second pod on the node, and later ones."""
    uid = str(uuid.uuid4())
    path = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{uid.replace('-', '_')}.slice"
    path.mkdir()
    return uid, path


# Attach, update, detach, list.


def test_attach_goes_through_every_stage_and_the_limits_are_in_force(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        pod = node_pb2.Pod(uid=bed.pod_uid, namespace="shop", name="cart-0")
        assert await wire.attach(*whole(bed.pod_uid, program(FAST), pod=pod)) == (ALL_STAGES, "ATTACHED", "OK", "")

    run(bed, pki, calls)
    assert len(attached(bed)) == 3
    item = only(bed)
    assert (item["uid"], item["namespace"], item["name"]) == (bed.pod_uid, "shop", "cart-0")
    assert item["egress"]["limit_bits_per_second"] == 10**9
    assert item["ingress"]["limit_bits_per_second"] == 2 * 10**9
    assert item["burst_bytes"] == 65_536
    assert item["cgroup"] == str(bed.pod_cgroup)


def test_each_stage_is_told_when_it_is_reached(bed: Lab, pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told early has not happened yet: the kernel is looked at, stage by stage, while the agent waits."""
    seen: list[tuple[str, int, list[str]]] = []
    real = Agent.attach

    def attach(agent: Agent, image: bytes, pod: PodRef, path: Path, report: Callable[[Any], None]) -> Change:
        def slowly(stage: Any) -> None:
            on_cgroup, pins = state(bed)
            seen.append((stage.name, len(on_cgroup), sorted({Path(pin).parts[0] for pin in pins})))
            report(stage)

        return real(agent, image, pod, path, slowly)

    monkeypatch.setattr(Agent, "attach", attach)

    async def calls(wire: Wire) -> None:
        assert (await wire.attach(*whole(bed.pod_uid, program(FAST)))).stages == ALL_STAGES

    run(bed, pki, calls)
    assert seen == [("LOADED", 0, []), ("PINNED", 0, [f"{bed.pod_uid}{limiter.STAGED}"])]


def test_the_same_again_needs_no_bytes_and_changes_nothing(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        await wire.attach(*whole(bed.pod_uid, program(FAST)))
        before = snapshot(bed)
        again = await wire.attach(*whole(bed.pod_uid, program(FAST)))
        assert again == (["ATTACHED"], "UNCHANGED", "OK", "")
        assert snapshot(bed) == before

    run(bed, pki, calls)
    assert in_force(bed) == {bed.pod_uid: FAST}


def test_other_limits_of_the_same_build_need_no_bytes(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        await wire.attach(*whole(bed.pod_uid, program(FAST)))
        before = state(bed)
        # Only the header comes: where bytes were asked for, the call would not end well.
        done = await wire.attach(header(bed.pod_uid, program(SLOW), SLOW))
        assert done == (["ATTACHED"], "UPDATED", "OK", "")
        assert state(bed) == before

    run(bed, pki, calls)
    assert in_force(bed) == {bed.pod_uid: SLOW}


def test_a_limiter_of_another_build_is_upgraded(bed: Lab, pki: Path) -> None:
    limit(bed)
    before = attached(bed)

    async def calls(wire: Wire) -> None:
        done = await wire.attach(*whole(bed.pod_uid, program(FAST)))
        assert done == (["PROCEED", "RECEIVED", "ATTACHED"], "UPDATED", "OK", "")

    run(bed, pki, calls)
    assert in_force(bed) == {bed.pod_uid: FAST}
    assert {number for _, number in attached(bed)}.isdisjoint({number for _, number in before})


def test_update_list_and_detach(bed: Lab, pki: Path) -> None:
    limit(bed, pod=PodRef(bed.pod_uid, "shop", "cart-0"))
    bed.ping(2)

    async def calls(wire: Wire) -> None:
        before = state(bed)
        update = node_pb2.UpdateRequest(uid=bed.pod_uid, limits=messages.from_limits(FAST))
        assert (await wire.call("Update", update))[1:3] == ("UPDATED", "OK")
        assert (await wire.call("Update", update))[1:3] == ("UNCHANGED", "OK")
        assert state(bed) == before

        broken = str(uuid.uuid4())
        (bed.bpffs / broken).mkdir()
        found = await wire.client.list()
        assert found == Agent(bed.bpffs).limiters()
        [status] = [each for each in found if isinstance(each, Status)]
        assert (status.pod.name, status.limits, status.build) == (
            "cart-0",
            FAST,
            build_of(of_another_build(program(SLOW))),
        )
        assert status.egress.passed_packets >= 2
        assert [each.uid for each in found if isinstance(each, Broken)] == [broken]
        assert (await wire.call("Detach", node_pb2.DetachRequest(uid=broken)))[1:3] == ("DETACHED", "OK")

        detach = node_pb2.DetachRequest(uid=bed.pod_uid)
        assert (await wire.call("Detach", detach))[1:3] == ("DETACHED", "OK")
        assert (await wire.call("Detach", detach))[1:3] == ("ABSENT", "OK")
        assert await wire.client.list() == []

    run(bed, pki, calls)
    assert state(bed) == ([], [])


def test_the_masters_client_and_the_node_understand_each_other(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        own, pod, image = wire.client, PodRef(bed.pod_uid, "shop", "cart-0"), program(FAST)
        assert await own.attach(pod, FAST, image, generator.build()) is Change.ATTACHED
        assert await own.attach(pod, FAST, image, generator.build()) is Change.UNCHANGED
        assert await own.update(bed.pod_uid, SLOW) is Change.UPDATED
        [found] = await own.list()
        assert [found] == Agent(bed.bpffs).limiters()
        assert isinstance(found, Status)
        assert (found.pod, found.limits, found.cgroup_id) == (pod, SLOW, cgroup.id_of(bed.pod_cgroup))
        assert await own.detach(bed.pod_uid) is Change.DETACHED
        assert await own.detach(bed.pod_uid) is Change.ABSENT

    run(bed, pki, calls)


# A pod whose cgroup is not there.


def test_an_unknown_pod_is_told_at_once_or_after_the_wait(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        for wait_ms, shortest, longest in ((0, 0.0, 1.0), (300, 0.3, 2.0)):
            uid, start = str(uuid.uuid4()), time.monotonic()
            done = await wire.attach(*whole(uid, program(FAST), wait_ms=wait_ms))
            assert shortest <= time.monotonic() - start < longest
            text = f"no cgroup for pod {uid} under {bed.cgroup_root}: is it running on this node?"
            assert done == ([], "", "NOT_FOUND", text)
        assert snapshot(bed) == before

    run(bed, pki, calls)


def test_a_pod_whose_cgroup_comes_during_the_wait_is_limited(bed: Lab, pki: Path) -> None:
    uid = str(uuid.uuid4())
    path = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{uid.replace('-', '_')}.slice"

    async def calls(wire: Wire) -> None:
        attaching = asyncio.create_task(wire.attach(*whole(uid, program(FAST), wait_ms=10_000)))
        await asyncio.sleep(0.3)
        assert not attaching.done()
        path.mkdir()
        assert await asyncio.wait_for(attaching, 2) == (ALL_STAGES, "ATTACHED", "OK", "")

    run(bed, pki, calls)
    assert in_force(bed) == {uid: FAST}


# Refusals.

Requests = list[node_pb2.AttachRequest]


def of(change: Callable[[bytes], bytes], **others: Any) -> Callable[[str], Requests]:
    """A program that is announced truthfully and is none that should run."""

    def requests(uid: str) -> Requests:
        image = change(program(FAST))
        return whole(uid, image, **others)

    return requests


def announced(**others: Any) -> Callable[[str], Requests]:
    """A program that is announced as something else."""
    return lambda uid: whole(uid, program(FAST), **others)


def sized(difference: int) -> Callable[[str], Requests]:
    return lambda uid: whole(uid, program(FAST), size=len(program(FAST)) + difference)


def named(text: str) -> Callable[[str], Requests]:
    return lambda _: whole(text, program(FAST))


# What is sent, the code, what the reason says, and whether bytes are asked for first. Nothing is sent after the message
# that ends the call: gRPC's client would tell of that instead.
REFUSED: dict[str, tuple[Callable[[str], Requests], str, str, bool]] = {
    "no UID": (named(""), "INVALID_ARGUMENT", "'' is no pod UID: ", False),
    "a path for a UID": (named("../../etc"), "INVALID_ARGUMENT", "'../../etc' is no pod UID: ", False),
    "a leftover's name": (lambda uid: named(f"{uid}~new")(uid), "INVALID_ARGUMENT", "is no pod UID: ", False),
    "a cgroup": (named("cgroup-123"), "INVALID_ARGUMENT", "cgroup-123 is a cgroup and no pod: use bpfrl on", False),
    "a name that is none": (
        lambda uid: whole(uid, program(FAST), pod=node_pb2.Pod(uid=uid, namespace="shop", name="a/b")),
        "INVALID_ARGUMENT",
        "'a/b' is no pod name: ",
        False,
    ),
    "no limits": (announced(limits=node_pb2.Limits()), "INVALID_ARGUMENT", "the limits limit nothing: detach", False),
    "only a burst": (
        announced(limits=node_pb2.Limits(burst_bytes=65_536)),
        "INVALID_ARGUMENT",
        "the limits limit nothing: detach the pod instead",
        False,
    ),
    "a rate too low": (
        announced(limits=node_pb2.Limits(egress_bits_per_second=999)),
        "INVALID_ARGUMENT",
        "rate 999 bit/s is out of range: ",
        False,
    ),
    "a rate too high": (
        announced(limits=node_pb2.Limits(ingress_bits_per_second=2**64 - 1)),
        "INVALID_ARGUMENT",
        f"rate {2**64 - 1} bit/s is out of range: ",
        False,
    ),
    "a burst too small": (
        announced(limits=node_pb2.Limits(egress_bits_per_second=10**6, burst_bytes=1499)),
        "INVALID_ARGUMENT",
        "burst 1499 byte is out of range: ",
        False,
    ),
    "a burst too large": (
        announced(limits=node_pb2.Limits(egress_bits_per_second=10**6, burst_bytes=2**63)),
        "INVALID_ARGUMENT",
        f"burst {2**63} byte is out of range: ",
        False,
    ),
    "nothing": (lambda _: [], "DATA_LOSS", "the call was cut off before its header came", False),
    "an empty message": (
        lambda _: [node_pb2.AttachRequest()],
        "INVALID_ARGUMENT",
        "the first message must be the header",
        False,
    ),
    "a chunk first": (
        lambda _: chunks(program(FAST)),
        "INVALID_ARGUMENT",
        "the first message must be the header",
        False,
    ),
    "two headers": (
        lambda uid: [header(uid, program(FAST))] * 2,
        "INVALID_ARGUMENT",
        "after the header, nothing but the program's bytes may come",
        True,
    ),
    "an empty message among the chunks": (
        lambda uid: [*whole(uid, program(FAST))[:2], node_pb2.AttachRequest()],
        "INVALID_ARGUMENT",
        "after the header, nothing but the program's bytes may come",
        True,
    ),
    "a size too small": (sized(-1), "DATA_LOSS", "byte came that were announced", True),
    "a size too large": (sized(1), "DATA_LOSS", "were announced", True),
    "no size": (
        lambda uid: whole(uid, program(FAST), size=0)[:2],
        "DATA_LOSS",
        "more than the 0 byte came that were announced",
        True,
    ),
    "no bytes": (lambda uid: whole(uid, program(FAST))[:1], "DATA_LOSS", "0 byte came, ", True),
    "half of the bytes": (lambda uid: whole(uid, program(FAST))[:2], "DATA_LOSS", f"{CHUNK} byte came, ", True),
    "another digest": (
        announced(sha256=bytes(32)),
        "DATA_LOSS",
        "the program's SHA-256 is not the announced one",
        True,
    ),
    "no digest": (announced(sha256=b""), "DATA_LOSS", "the program's SHA-256 is not the announced one", True),
    "chunks in another order": (
        lambda uid: [header(uid, program(FAST)), *reversed(chunks(program(FAST)))],
        "DATA_LOSS",
        "the program's SHA-256 is not the announced one",
        True,
    ),
    "more than any limiter has": (
        of(lambda image: image.ljust(2**17 + 1, b"\0")),
        "RESOURCE_EXHAUSTED",
        "a program of 131073 byte is no limiter: those have at most 131072",
        False,
    ),
    "as much as can be said": (announced(size=2**64 - 1), "RESOURCE_EXHAUSTED", "is no limiter: those have", False),
    "other limits than the program's": (
        announced(limits=messages.from_limits(SLOW)),
        "INVALID_ARGUMENT",
        "the program's limits or build are not those in the header",
        True,
    ),
    "another build than the program's": (
        announced(build=b"x" * 32),
        "INVALID_ARGUMENT",
        "the program's limits or build are not those in the header",
        True,
    ),
    "no build": (
        announced(build=b""),
        "INVALID_ARGUMENT",
        "the program's limits or build are not those in the header",
        True,
    ),
    "no program": (of(lambda _: b""), "INVALID_ARGUMENT", "this is not a bpfrl limiter, or one of another", True),
    "no ELF": (of(lambda _: b"no program" * 99), "INVALID_ARGUMENT", "this is not a bpfrl limiter, or one of", True),
    "a damaged ELF": (of(lambda image: image[:5000]), "INVALID_ARGUMENT", "this is not a bpfrl limiter, or one", True),
    "a machine's ELF": (
        of(lambda _: Path("/usr/bin/true").read_bytes()),
        "INVALID_ARGUMENT",
        "this is not a bpfrl limiter, or one of another version",
        True,
    ),
    "other programs for the kernel": (
        of(lambda _: generator.compile_object("sockets.bpf.c")),
        "INVALID_ARGUMENT",
        "this is not a bpfrl limiter, or one of another version",
        True,
    ),
    "a bit that has fallen over": (
        of(lambda image: image[:2000] + bytes([image[2000] ^ 1]) + image[2001:]),
        "INVALID_ARGUMENT",
        "the object is damaged, its programs do not have the SHA-256 that it names",
        True,
    ),
    "what the verifier refuses": (of(tampered), "FAILED_PRECONDITION", "invalid bpf_context access", True),
}


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
@pytest.mark.parametrize(("requests", "code", "reason", "proceeds"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_why_and_changes_nothing(
    bed: Lab,
    pki: Path,
    requests: Callable[[str], Requests],
    code: str,
    reason: str,
    *,
    proceeds: bool,
    limited: bool,
) -> None:
    if limited:
        limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        done = await wire.attach(*requests(bed.pod_uid))
        assert (done.code, done.change, done.stages[:1]) == (code, "", ["PROCEED"] if proceeds else [])
        assert not {"LOADED", "PINNED", "ATTACHED"}.intersection(done.stages)
        assert reason in done.reason
        assert done.reason.isprintable()
        assert snapshot(bed) == before
        # Nor is anything left that stands in the way.
        assert (await wire.attach(*whole(bed.pod_uid, program(FAST)))).stages[-1] == "ATTACHED"

    run(bed, pki, calls)
    assert in_force(bed) == {bed.pod_uid: FAST}


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
@pytest.mark.parametrize("extra", ["a fourth program of our own type", "a kprobe", "a map", "more state"])
def test_a_limiter_with_more_in_it_is_refused(
    bed: Lab, pki: Path, tmp_path: Path, extra: str, *, limited: bool
) -> None:
    if limited:
        limit(bed)
    change, its_name = FOREIGN[extra]
    image = filled(build(tmp_path, change), FAST)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        done = await wire.attach(*whole(bed.pod_uid, image))
        assert done.code == "INVALID_ARGUMENT"
        assert done.reason == f"not the programs and maps of a limiter: {its_name}"
        assert snapshot(bed) == before

    run(bed, pki, calls)


def test_a_limiter_made_elsewhere_is_taken(bed: Lab, pki: Path, tmp_path: Path) -> None:
    """So what the others are refused for is what is in them."""
    image = filled(build(tmp_path, str), FAST)

    async def calls(wire: Wire) -> None:
        done = await wire.attach(*whole(bed.pod_uid, image))
        assert done == (ALL_STAGES, "ATTACHED", "OK", "")

    run(bed, pki, calls)
    assert in_force(bed) == {bed.pod_uid: FAST}


@pytest.mark.parametrize("place", ["", "..", "container"], ids=["the same cgroup", "one above", "one below"])
def test_another_limiter_in_the_way_is_refused(bed: Lab, pki: Path, place: str) -> None:
    path = (bed.pod_cgroup / place).resolve()
    Agent(bed.bpffs).attach(program(SLOW), PodRef.of_cgroup(cgroup.id_of(path)), path)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        done = await wire.attach(*whole(bed.pod_uid, program(FAST)))
        assert done.code == "ALREADY_EXISTS"
        assert "has a limiter under another name" in done.reason
        assert done.reason.isprintable()
        assert snapshot(bed) == before

    run(bed, pki, calls)
    assert list(in_force(bed).values()) == [SLOW]


def test_a_foreign_folder_in_the_way_is_refused_and_kept(bed: Lab, pki: Path) -> None:
    folder = bed.bpffs / bed.pod_uid
    (folder / "theirs").mkdir(parents=True)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        limits = messages.from_limits(FAST)
        for done in (
            await wire.attach(*whole(bed.pod_uid, program(FAST))),
            await wire.call("Update", node_pb2.UpdateRequest(uid=bed.pod_uid, limits=limits)),
            await wire.call("Detach", node_pb2.DetachRequest(uid=bed.pod_uid)),
        ):
            assert (done.stages, done.change, done.code) == ([], "", "FAILED_PRECONDITION")
            assert done.reason == f"{folder} holds what was not made by bpfrl: look at it, and remove it"
        assert snapshot(bed) == before

    run(bed, pki, calls)


def test_two_cgroups_that_could_be_the_pods_are_refused(bed: Lab, pki: Path) -> None:
    (bed.cgroup_root / "kubepods" / f"pod{bed.pod_uid}").mkdir(parents=True)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        done = await wire.attach(*whole(bed.pod_uid, program(FAST)))
        assert (done.stages, done.code) == ([], "FAILED_PRECONDITION")
        assert done.reason.startswith(f"several cgroups for pod {bed.pod_uid}")
        assert snapshot(bed) == before

    run(bed, pki, calls)


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
def test_updates_and_detaches_that_cannot_be_meant_are_refused(bed: Lab, pki: Path, *, limited: bool) -> None:
    if limited:
        limit(bed)
    good, uid = messages.from_limits(FAST), bed.pod_uid
    too_slow = node_pb2.Limits(egress_bits_per_second=1)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        for method, request, reason in (
            ("Update", node_pb2.UpdateRequest(uid="../x", limits=good), "'../x' is no pod UID: "),
            ("Update", node_pb2.UpdateRequest(limits=good), "'' is no pod UID: "),
            ("Update", node_pb2.UpdateRequest(uid="cgroup-1", limits=good), "cgroup-1 is a cgroup and no pod: "),
            ("Update", node_pb2.UpdateRequest(uid=uid), "the limits limit nothing: "),
            ("Update", node_pb2.UpdateRequest(uid=uid, limits=too_slow), "rate 1 bit/s is out of range: "),
            ("Detach", node_pb2.DetachRequest(), "'' is no pod UID: "),
            ("Detach", node_pb2.DetachRequest(uid="../x"), "'../x' is no pod UID: "),
            ("Detach", node_pb2.DetachRequest(uid="cgroup-1"), "cgroup-1 is a cgroup and no pod: "),
        ):
            done = await wire.call(method, request)
            assert done.code == "INVALID_ARGUMENT"
            assert reason in done.reason
            assert done.reason.isprintable()
        assert snapshot(bed) == before

    run(bed, pki, calls)


def test_an_update_of_a_pod_without_a_limit_is_refused(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        for uid in (bed.pod_uid, str(uuid.uuid4())):
            before = snapshot(bed)
            request = node_pb2.UpdateRequest(uid=uid, limits=messages.from_limits(FAST))
            done = await wire.call("Update", request)
            assert done.code == "NOT_FOUND"
            assert done.reason.startswith(f"pod {uid} has no ")
            assert done.reason.endswith("limiter here to update: attach one")
            assert snapshot(bed) == before

    run(bed, pki, calls)


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
def test_a_program_that_is_announced_and_does_not_come_is_given_up(
    bed: Lab, pki: Path, monkeypatch: pytest.MonkeyPatch, *, limited: bool
) -> None:
    monkeypatch.setattr(server, "_TRANSFER_SECONDS", 0.3)
    if limited:
        limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        for number, reason in ((0, "no header came within "), (1, "0 of "), (2, f"{CHUNK} of ")):
            done = await wire.attach(*whole(bed.pod_uid, program(FAST))[:number], end=False)
            assert done.code == "DEADLINE_EXCEEDED"
            assert done.reason.startswith(reason)
            assert snapshot(bed) == before

    run(bed, pki, calls)


# Cut off.


async def half_sent(wire: Wire, uid: str) -> Any:
    """A call that has come to the middle of its program."""
    stream = wire.stub.Attach(timeout=SECONDS)
    announcement, *rest = whole(uid, program(FAST))
    await stream.write(announcement)
    assert (await stream.read()).stages == [node_pb2.STAGE_PROCEED]
    for request in rest[: len(rest) // 2]:
        await stream.write(request)
    return stream


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
def test_who_gives_up_halfway_has_changed_nothing(bed: Lab, pki: Path, *, limited: bool) -> None:
    if limited:
        limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        stream = await half_sent(wire, bed.pod_uid)
        assert stream.cancel()
        # The next call has the whole node again.
        assert await wire.client.list() == Agent(bed.bpffs).limiters()
        await asyncio.sleep(0.2)
        assert snapshot(bed) == before
        assert (await wire.attach(*whole(bed.pod_uid, program(FAST)))).stages[-1] == "ATTACHED"

    run(bed, pki, calls)


def test_who_gives_up_at_the_end_leaves_no_complaint_in_the_log(
    bed: Lab, pki: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the kernel says to a program whose sender has gone is nobody's to hear; that is no fault of the node."""

    async def calls(wire: Wire) -> None:
        announcement, *rest = whole(bed.pod_uid, tampered(program(FAST)))
        for _ in range(5):
            stream = wire.stub.Attach(timeout=SECONDS)
            await stream.write(announcement)
            assert (await stream.read()).stages == [node_pb2.STAGE_PROCEED]
            for request in rest:
                await stream.write(request)
            await stream.done_writing()
            assert (await stream.read()).stages == [node_pb2.STAGE_RECEIVED]
            stream.cancel()
            assert await wire.client.list() == []

    run(bed, pki, calls)
    gc.collect()
    assert [text for text in caplog.messages if "never retrieved" in text] == []
    assert state(bed) == ([], [])


def test_a_pod_that_ends_while_its_program_travels_is_not_found(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        stream = wire.stub.Attach(timeout=SECONDS)
        announcement, *rest = whole(bed.pod_uid, program(FAST))
        await stream.write(announcement)
        assert (await stream.read()).stages == [node_pb2.STAGE_PROCEED]
        end_pod(bed)
        for request in rest:
            await stream.write(request)
        await stream.done_writing()
        assert (await stream.read()).stages == [node_pb2.STAGE_RECEIVED]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == f"{bed.pod_cgroup} has gone: the pod has ended"

    run(bed, pki, calls)
    assert Agent(bed.bpffs).limiters() == []


HALF = """
import asyncio, sys
from pathlib import Path
from tests.kernel.test_service import NodeStub, Wire, connected, credentials, half_sent

async def hang():
    async with connected(int(sys.argv[2]), credentials(Path(sys.argv[1]))) as channel:
        stream = await half_sent(Wire(NodeStub(channel), 0, None), sys.argv[3])
        print("half", flush=True)
        await asyncio.sleep(60)

asyncio.run(hang())
"""


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited"])
def test_a_connection_that_breaks_halfway_has_changed_nothing(bed: Lab, pki: Path, *, limited: bool) -> None:
    if limited:
        limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        command = [sys.executable, "-c", HALF, str(pki / "master"), str(wire.port), bed.pod_uid]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout
        try:
            assert await asyncio.wait_for(process.stdout.readline(), SECONDS) == b"half\n"
        finally:
            process.kill()
            await process.wait()
        await asyncio.sleep(0.2)
        assert snapshot(bed) == before
        assert (await wire.attach(*whole(bed.pod_uid, program(FAST)))).stages[-1] == "ATTACHED"

    run(bed, pki, calls)


# Several at once.


def test_of_two_at_once_for_one_pod_each_is_applied_whole(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        for turn in range(5):
            done = await asyncio.gather(
                wire.attach(*whole(bed.pod_uid, program(FAST))), wire.attach(*whole(bed.pod_uid, program(SLOW), SLOW))
            )
            assert [each.stages[-1] for each in done] == ["ATTACHED", "ATTACHED"]
            assert sorted(each.change for each in done) == ["ATTACHED", "UPDATED"], turn
            assert in_force(bed) in ({bed.pod_uid: FAST}, {bed.pod_uid: SLOW})
            assert len(attached(bed)) == 3
            assert await wire.client.detach(bed.pod_uid) is Change.DETACHED
            assert state(bed) == ([], [])

    run(bed, pki, calls)


def test_many_pods_at_once(bed: Lab, pki: Path) -> None:
    pods = [another_pod(bed) for _ in range(20)]
    wanted = {uid: Limits(Rate(10**6 + number)) for number, (uid, _) in enumerate(pods)}

    async def calls(wire: Wire) -> None:
        attaching = (
            wire.client.attach(PodRef(uid), limits, program(limits), generator.build())
            for uid, limits in wanted.items()
        )
        assert await asyncio.gather(*attaching) == [Change.ATTACHED] * 20
        assert in_force(bed) == wanted
        found = await wire.client.list()
        assert {each.cgroup_id for each in found if isinstance(each, Status)} == {
            cgroup.id_of(path) for _, path in pods
        }
        assert await asyncio.gather(*(wire.client.detach(uid) for uid in wanted)) == [Change.DETACHED] * 20

    run(bed, pki, calls)
    assert state(bed) == ([], [])


def test_idle_calls_are_in_nobodys_way(bed: Lab, pki: Path) -> None:
    uid, path = another_pod(bed)
    Agent(bed.bpffs).attach(program(SLOW), PodRef(uid), path)

    async def calls(wire: Wire) -> None:
        async with connected(wire.port, credentials(pki / "master")) as channel:
            idle = [NodeStub(channel).Attach(timeout=SECONDS) for _ in range(200)]
            for stream in idle:
                await stream.write(header(bed.pod_uid, program(FAST)))
            for stream in idle:
                assert (await stream.read()).stages == [node_pb2.STAGE_PROCEED]
            start = time.monotonic()
            assert await wire.client.update(uid, FAST) is Change.UPDATED
            assert len(await wire.client.list()) == 1
            done = await wire.attach(*whole(bed.pod_uid, program(FAST)))
            assert done.stages == ALL_STAGES
            assert time.monotonic() - start < 1
            assert not any(stream.done() for stream in idle)
            for stream in idle:
                stream.cancel()

    run(bed, pki, calls)
    assert in_force(bed) == {uid: FAST, bed.pod_uid: FAST}


# Who may call.


async def each_method(stub: Any, uid: str) -> list[Outcome]:
    """Each of the service's calls, as a master would make it."""
    wire = Wire(stub, 0, NodeClient("127.0.0.1", 1, None))
    return [
        await wire.attach(*whole(uid, program(FAST))),
        await wire.call("Update", node_pb2.UpdateRequest(uid=uid, limits=messages.from_limits(FAST))),
        await wire.call("Detach", node_pb2.DetachRequest(uid=uid)),
        await wire.call("List", node_pb2.ListRequest()),
    ]


@pytest.mark.parametrize(("name", "role"), [("other", "other.example"), ("node-as-client", "node.bpfrl")])
def test_a_certificate_without_a_role_may_do_nothing(bed: Lab, pki: Path, name: str, role: str) -> None:
    limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        async with connected(wire.port, credentials(pki / name)) as channel:
            *changes, listing = await each_method(NodeStub(channel), bed.pod_uid)
            text = f"the certificate is for {role}: it must have the DNS name master.bpfrl"
            assert changes == [([], "", "PERMISSION_DENIED", text)] * 3
            assert listing == ([], "", "PERMISSION_DENIED", f"{text} or operator.bpfrl")
        assert snapshot(bed) == before

    run(bed, pki, calls)


def test_an_operator_may_look_and_change_nothing(bed: Lab, pki: Path) -> None:
    limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        async with connected(wire.port, credentials(pki / "operator")) as channel:
            *changes, listing = await each_method(NodeStub(channel), bed.pod_uid)
            text = "the certificate is for operator.bpfrl: it must have the DNS name master.bpfrl"
            assert changes == [([], "", "PERMISSION_DENIED", text)] * 3
            assert listing == ([], "", "OK", "")
        assert snapshot(bed) == before
        operator = NodeClient("127.0.0.1", wire.port, tls.Certificates(pki / "operator", tls.OPERATOR))
        try:
            assert [found.pod.uid for found in await operator.list() if isinstance(found, Status)] == [bed.pod_uid]
        finally:
            await operator.close()

    run(bed, pki, calls)


NAMES = (x509.UniformResourceIdentifier(tls.MASTER), x509.RFC822Name(tls.MASTER))


@pytest.mark.parametrize("name", NAMES, ids=["URI", "mail"])
def test_only_a_dns_name_is_a_role(bed: Lab, pki: Path, name: x509.GeneralName) -> None:
    """An authority that others use too may let them choose their mail addresses and URIs."""
    own, signer = authority._load_authority(pki)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(own.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    (pki / "other" / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (pki / "other" / "tls.key").write_bytes(pem)
    limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        async with connected(wire.port, credentials(pki / "other")) as channel:
            done = await each_method(NodeStub(channel), bed.pod_uid)
            assert [each.code for each in done] == ["PERMISSION_DENIED"] * 4
        assert snapshot(bed) == before

    run(bed, pki, calls)


def untrusted(pki: Path) -> dict[str, grpc.ChannelCredentials]:
    """Those that are not even listened to."""
    trusted = (pki / "ca.crt").read_bytes()
    foreign = tls.Bundle(*((pki / "foreign" / "master" / name).read_bytes() for name in tls._FILES))
    return {
        "no certificate": grpc.ssl_channel_credentials(trusted),
        "a foreign certificate": tls.channel_credentials(foreign._replace(authority=trusted)),
        "an expired certificate": credentials(pki / "expired"),
        "a node's certificate": credentials(pki / "node"),
        "no trust in the node": tls.channel_credentials(foreign),
        "no TLS": grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP),
    }


def test_who_cannot_show_a_certificate_is_not_listened_to(bed: Lab, pki: Path) -> None:
    limit(bed)

    async def calls(wire: Wire) -> None:
        before = snapshot(bed)
        for name, bundle in untrusted(pki).items():
            async with connected(wire.port, bundle) as channel:
                done = await each_method(NodeStub(channel), bed.pod_uid)
                assert [each.code for each in done] == ["UNAVAILABLE"] * 4, name
        assert snapshot(bed) == before

    run(bed, pki, calls)


# The installed daemon.


class Daemon:
    """bpfrl serve-node, as a process of its own; its log is a file.

    Its command line may stand behind another one, ``within``, that takes something away from it.
    """

    def __init__(
        self, bed: Lab, pki: Path | None, place: str = "127.0.0.1:0", *options: str, within: Sequence[str] = ()
    ) -> None:
        self._bed = bed
        self._pki = pki
        trust = ["--certs", str(pki / "node")] if pki else ["--insecure"]
        self._within = within
        self._command = [*within, BPFRL, "serve-node", "--listen", place, *trust, *options]
        self._file = bed.bpffs.with_name(f"{bed.bpffs.name}.{uuid.uuid4().hex[:6]}.log")
        self.port = 0

    def __enter__(self) -> Daemon:
        places = {"BPFRL_BPFFS": str(self._bed.bpffs), "BPFRL_CGROUP_ROOT": str(self._bed.cgroup_root)}
        # What coverage opens and writes is not the daemon's doing.
        environment = (unmeasured() if self._within else os.environ) | places
        with self._file.open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            self.port = self.port_of("serving on")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._file.unlink()

    @property
    def log(self) -> list[str]:
        return self._file.read_text().splitlines()

    def port_of(self, text: str) -> int:
        """The port that the first line of the log with a text tells."""
        return int(self.wait_for(text).split("(port ")[1].split(")")[0])

    def wait_for(self, text: str) -> str:
        """The first line of the log with a text."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for line in self.log:
                if text in line:
                    return line
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.log}")

    def end(self, number: signal.Signals) -> int:
        """The exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def call(self, method: Callable[[NodeClient], Awaitable[Any]]) -> Any:
        """One call of the master's client."""

        async def made() -> Any:
            certificates = tls.Certificates(self._pki / "master", tls.MASTER) if self._pki else None
            client = NodeClient("127.0.0.1", self.port, certificates)
            try:
                return await asyncio.wait_for(method(client), SECONDS)
            finally:
                await client.close()

        return asyncio.run(made())

    def attach(self, uid: str, limits: Limits = FAST) -> Any:
        return self.call(lambda client: client.attach(PodRef(uid), limits, program(limits), generator.build()))


@pytest.mark.parametrize("secure", [True, False], ids=["TLS", "insecure"])
def test_the_daemon_serves_until_it_is_told_to_stop_and_limits_stay(bed: Lab, pki: Path, *, secure: bool) -> None:
    with Daemon(bed, pki if secure else None) as node:
        assert node.attach(bed.pod_uid, SLOW) is Change.ATTACHED
        assert node.call(lambda client: client.update(bed.pod_uid, FAST)) is Change.UPDATED
        [found] = node.call(lambda client: client.list())
        assert [found] == Agent(bed.bpffs).limiters()
        assert found.limits == FAST
        before = state(bed)
        assert node.end(signal.SIGTERM) == 0
        assert "stopping; limits stay in force" in node.log[-1]
        assert "Traceback" not in "\n".join(node.log)
        assert state(bed) == before
    assert in_force(bed) == {bed.pod_uid: FAST}
    assert len(attached(bed)) == 3
    assert bed.bpfrl("detach", "--pod-uid", bed.pod_uid).stdout == f"pod/{bed.pod_uid} detached\n"


def test_the_services_health_is_asked_for_by_anybody_with_a_certificate(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:

        async def check() -> None:
            async with connected(node.port, credentials(pki / "other")) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                for name in ("", "bpfrl.v1.Node"):
                    request = health_pb2.HealthCheckRequest(service=name)
                    answer = await stub.Check(request, timeout=SECONDS)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING

        asyncio.run(check())


def test_a_daemon_that_is_killed_finds_everything_again(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:
        node.attach(bed.pod_uid)
        bed.ping(2)
        before, listed, programs = node.call(lambda client: client.list()), items(bed), attached(bed)
        assert node.end(signal.SIGKILL) == -signal.SIGKILL
    assert attached(bed) == programs
    with Daemon(bed, pki) as node:
        assert node.call(lambda client: client.list()) == before
        assert attached(bed) == programs
        assert [item | {"age_seconds": 0} for item in items(bed)] == [item | {"age_seconds": 0} for item in listed]
        assert node.attach(bed.pod_uid) is Change.UNCHANGED
        assert attached(bed) == programs


def test_a_daemon_that_is_told_to_stop_does_not_wait_for_a_pod_to_come(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:

        async def calls() -> None:
            async with connected(node.port, credentials(pki / "master")) as channel:
                wire = Wire(NodeStub(channel), 0, NodeClient("127.0.0.1", 1, None))
                waiting = wire.attach(*whole(str(uuid.uuid4()), program(FAST), wait_ms=60_000))
                attaching = asyncio.create_task(waiting)
                await asyncio.sleep(0.3)
                start = time.monotonic()
                assert await asyncio.to_thread(node.end, signal.SIGTERM) == 0
                assert time.monotonic() - start < daemon._GRACE_SECONDS + 3
                assert (await attaching).code == "UNAVAILABLE"

        asyncio.run(calls())
        assert "Traceback" not in "\n".join(node.log)


def test_what_no_pod_needs_any_more_is_swept_at_the_start(bed: Lab, pki: Path) -> None:
    agent, (kept, path) = Agent(bed.bpffs), another_pod(bed)
    agent.attach(program(FAST), PodRef(kept), path)
    cut_off, path = another_pod(bed)
    agent.attach(program(FAST), PodRef(cut_off), path)
    (bed.bpffs / cut_off).rename(bed.bpffs / f"{cut_off}{limiter.STAGED}")
    limit(bed)
    end_pod(bed)
    wait_until_gone(agent, bed.pod_uid)
    with Daemon(bed, pki) as node:
        for uid in (bed.pod_uid, cut_off):
            assert node.wait_for(f"{uid} swept").endswith(": its pod has ended")
        [found] = node.call(lambda client: client.list())
        assert (found.pod.uid, found.limits) == (kept, FAST)
    assert entries(bed) == sorted([kept, cooperation(bed.cgroup_root / "kubepods.slice")])


def test_the_daemon_has_all_pods_cooperate_until_it_is_told_not_to(bed: Lab, pki: Path) -> None:
    top = bed.cgroup_root / "kubepods.slice"
    with Daemon(bed, pki) as node:
        assert node.wait_for("keep to what limited receivers ask for").endswith(
            f"senders below {top} keep to what limited receivers ask for"
        )
        node.attach(bed.pod_uid)
        assert [kind for kind, _ in attached_to(top)] == ["cgroup_sock_ops"]
        assert entries(bed) == sorted([bed.pod_uid, cooperation(top)])
        assert len(attached(bed)) == 3
        before = attached_to(top)
        assert node.end(signal.SIGTERM) == 0
    assert attached_to(top) == before
    with Daemon(bed, pki) as node:
        node.attach(bed.pod_uid)
        assert attached_to(top) == before
    with Daemon(bed, pki, "127.0.0.1:0", "--no-cooperate") as node:
        node.wait_for("senders do not cooperate any more")
        until(lambda: attached_to(top) == [])
        assert entries(bed) == [bed.pod_uid]
        assert node.attach(bed.pod_uid) is Change.UNCHANGED


def test_a_second_daemon_at_the_same_place_is_one_line(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:
        place = f"127.0.0.1:{node.port}"
        for _ in range(3):
            second = bed.bpfrl("serve-node", "--listen", place, "--certs", str(pki / "node"), check=False)
            told = f"bpfrl: cannot listen on {place}: another process does, or the address is none of this machine's\n"
            assert (second.returncode, second.stdout, second.stderr) == (1, "", told)
        assert node.attach(bed.pod_uid) is Change.ATTACHED


def greet(port: int, context: ssl.SSLContext) -> str:
    """Knock as a master does, hear the node out, and return this end's address."""
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), SECONDS) as plain:
        host, own = plain.getsockname()
        with suppress(ssl.SSLError, ConnectionError), context.wrap_socket(plain, server_hostname=tls.NODE) as wrapped:
            wrapped.recv(1)
    return f"{host}:{own}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it has no certificate"),
        ("foreign/master", "its certificate is refused: unable to get local issuer certificate"),
        ("expired", "its certificate is refused: certificate has expired"),
        ("node", "its certificate is refused: unsupported certificate purpose"),
    ],
    ids=["none", "foreign", "expired", "a node's"],
)
def test_the_log_says_who_is_refused_and_why(bed: Lab, pki: Path, name: str, reason: str) -> None:
    with Daemon(bed, pki) as node:
        context = ssl.create_default_context(cafile=pki / "ca.crt")
        if name:
            context.load_cert_chain(pki / name / "tls.crt", pki / name / "tls.key")
        peer = greet(node.port, context)
        assert node.wait_for(f"refused {peer}").endswith(f" WARNING refused {peer}: {reason}")
        assert node.attach(bed.pod_uid) is Change.ATTACHED
        assert sum("WARNING" in line for line in node.log) == 1


def test_the_log_says_which_call_is_refused_and_why(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:

        async def call() -> None:
            async with connected(node.port, credentials(pki / "other")) as channel:
                request = node_pb2.DetachRequest(uid=bed.pod_uid)
                done = await Wire(NodeStub(channel), 0, NodeClient("127.0.0.1", 1, None)).call("Detach", request)
                assert done.code == "PERMISSION_DENIED"

        asyncio.run(call())
        line = node.wait_for("refused detach from ipv4:127.0.0.1:")
        assert line.endswith(": the certificate is for other.example: it must have the DNS name master.bpfrl")
        assert " WARNING " in line


def test_renewed_certificates_are_shown_and_asked_for_without_a_restart(bed: Lab, pki: Path) -> None:
    with Daemon(bed, pki) as node:
        assert node.attach(bed.pod_uid) is Change.ATTACHED
        old = shutil.copytree(pki / "master", pki / "before")
        # Another authority altogether: nothing of before is good any more.
        for name in ("ca.crt", "ca.key"):
            (pki / name).unlink()
        authority.init(pki, 30)
        assert node.attach(bed.pod_uid) is Change.UNCHANGED
        node.wait_for(f"read the changed certificates in {pki / 'node'}")

        async def call() -> str:
            async with connected(node.port, credentials(old)) as channel:
                done = await Wire(NodeStub(channel), 0, NodeClient("127.0.0.1", 1, None)).call(
                    "Detach", node_pb2.DetachRequest(uid=bed.pod_uid)
                )
                return done.code

        assert asyncio.run(call()) == "UNAVAILABLE"
    assert in_force(bed) == {bed.pod_uid: FAST}
