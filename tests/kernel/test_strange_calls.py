"""Calls of any order, size and content: the node goes on serving, and has what a model of it has."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from bench.lab import Lab
from bpfrl import cgroup
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Status
from bpfrl.limits import Limits
from bpfrl.node.agent import Agent
from bpfrl.rpc import authority, messages, node_pb2
from bpfrl.units import Rate
from tests.fuzzing import runs
from tests.kernel.conftest import attached_to
from tests.kernel.test_service import connected, credentials, serving
from tests.objects import of_another_build

STEPS: Final = 60
LIMITS: Final = [Limits(Rate(10**number)) for number in (4, 6, 8)] + [Limits(None, Rate(10**7), 65_536)]
# What a refusal may be called; anything else is the node's own fault.
REFUSALS: Final = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "DATA_LOSS",
    "RESOURCE_EXHAUSTED",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
}
CUT_OFF: Final = "cut off"
UNARY: Final = {"Update": node_pb2.UpdateRequest, "Detach": node_pb2.DetachRequest, "Explain": node_pb2.ExplainRequest}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    authority.init(folder, 30)
    return folder


class Caller:
    """A master with a bad day.

    Attributes:
        model: what must be in force, by UID.
        unsure: what a call may have changed of it whose answer was not heard.
        refused: the codes of the refusals so far.
    """

    def __init__(self, bed: Lab, channel: grpc.aio.Channel, seed: int) -> None:
        self._random = random.Random(seed)
        self._channel = channel
        self.model: dict[str, Limits] = {}
        self.unsure: dict[str, Limits] = {}
        self.refused: set[str] = set()
        self._own = {limits: generator.generate(None, limits) for limits in LIMITS}
        self.uids = {str(uuid.UUID(int=self._random.getrandbits(128))): True for _ in range(3)}
        for uid in self.uids:
            (bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{uid.replace('-', '_')}.slice").mkdir()
        self.uids |= {str(uuid.UUID(int=self._random.getrandbits(128))): False, "cgroup-1": False, "../x": False}

    def accept(self, found: dict[str, Limits]) -> None:
        """What is in force must be what the model has; where the answer was not heard, with that or without."""
        assert found in (self.model, self.model | self.unsure)
        self.model, self.unsure = found, {}

    async def step(self) -> None:
        step = self._random.choice((self._attach, self._attach, self._update, self._detach, self._garble, self._garble))
        await step()

    async def _attach(self) -> None:
        uid, limits = self._random.choice([*self.uids]), self._random.choice(LIMITS)
        image = self._own[limits]
        if self._random.random() < 0.2:
            image = of_another_build(image, self._random.randrange(3))
        requests = self._requests(uid, limits, image)
        spoilt = self._random.random() < 0.5
        if spoilt:
            requests = self._spoil(requests)
        code = await self._stream(requests)
        if code == "OK":
            # However it was spoilt, what was taken is what its header said.
            assert self.uids[uid]
            self.model[uid] = limits
        elif code == CUT_OFF:
            self.unsure = {uid: limits}
        else:
            assert spoilt or not self.uids[uid], code

    def _requests(self, uid: str, limits: Limits, image: bytes) -> list[bytes]:
        header = node_pb2.Header(
            pod=node_pb2.Pod(uid=uid),
            limits=messages.from_limits(limits),
            size=len(image),
            sha256=hashlib.sha256(image).digest(),
            build=generator.inspect(image).build,
        )
        size = self._random.choice((997, 8_192, 65_536))
        chunks = [node_pb2.AttachRequest(chunk=image[at : at + size]) for at in range(0, len(image), size)]
        return [each.SerializeToString() for each in (node_pb2.AttachRequest(header=header), *chunks)]

    def _spoil(self, requests: list[bytes]) -> list[bytes]:
        at = self._random.randrange(len(requests))
        before, request, after = requests[:at], requests[at], requests[at + 1 :]
        return self._random.choice(
            (
                before,
                [*before, request, request, *after],
                self._random.sample(requests, len(requests)),
                [*before, self._mutated(request), *after],
                [*requests, b""],
                [*before, request + b"\xfa\x3f\x03abc", *after],  # a field of the future, which is no mistake
                [*before, request + bytes(2**20), *after],
                [self._random.randbytes(self._random.randrange(60))],
            )
        )

    async def _update(self) -> None:
        uid, limits = self._random.choice([*self.uids]), self._random.choice(LIMITS)
        request = node_pb2.UpdateRequest(uid=uid, limits=messages.from_limits(limits))
        code = await self._unary("Update", request.SerializeToString())
        assert (code == "OK") == (uid in self.model), code
        if code == "OK":
            self.model[uid] = limits

    async def _detach(self) -> None:
        uid = self._random.choice([*self.uids])
        code = await self._unary("Detach", node_pb2.DetachRequest(uid=uid).SerializeToString())
        assert (code == "OK") == (len(uid) == len(str(uuid.UUID(int=0)))), code
        self.model.pop(uid, None)

    async def _garble(self) -> None:
        """Something that the model is none the wiser for: who says it has not named a pod of ours."""
        name, kind = self._random.choice([*UNARY.items()])
        whole = kind(uid=str(uuid.UUID(int=self._random.getrandbits(128)))).SerializeToString()
        content = self._random.choice(
            (
                self._mutated(whole),
                whole[: self._random.randrange(len(whole))],
                self._random.randbytes(20),
                bytes(2**21),
            )
        )
        await self._unary(self._random.choice((name, name, "Attach", "List", "Nothing")), content)

    def _mutated(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self._random.choice((1, 1, 2, 8))):
            changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        return bytes(changed)

    async def _unary(self, method: str, content: bytes) -> str:
        try:
            call: Any = self._channel.unary_unary(f"/bpfrl.v1.Node/{method}")
            await call(content, timeout=20)
        except grpc.aio.AioRpcError as error:
            return self._said(error.code(), error.details())
        return "OK"

    async def _stream(self, requests: list[bytes]) -> str:
        stream: Any = self._channel.stream_stream("/bpfrl.v1.Node/Attach")(timeout=20)
        try:
            for request in requests:
                await stream.write(request)
            await stream.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # it has said no already
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return self._said(error.code(), error.details())
        return self._said(await stream.code(), await stream.details())

    def _said(self, code: grpc.StatusCode, reason: str | None) -> str:
        if code is not grpc.StatusCode.OK:
            # Who still writes when the answer comes hears of that alone, from gRPC on this side, and never the answer.
            if reason == "Internal error from Core":
                return CUT_OFF
            assert code.name in REFUSALS, (code, reason)
            assert (reason or "").isprintable()
            self.refused.add(code.name)
        return code.name


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", runs(2, 60))
def test_calls_of_any_order_leave_what_a_model_has(
    bed: Lab, pki: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    async def calls() -> None:
        async with serving(bed, pki) as wire, connected(wire.port, credentials(pki / "master")) as channel:
            caller = Caller(bed, channel, seed)
            for _ in range(STEPS):
                await caller.step()
                caller.accept(in_force(await wire.client.list()))
            for uid in caller.model:
                folder = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{uid.replace('-', '_')}.slice"
                assert len(attached_to(folder)) == 3
            assert caller.refused

    def in_force(found: list[Any]) -> dict[str, Limits]:
        assert all(isinstance(each, Status) for each in found)
        return {each.pod.uid: each.limits for each in found}

    asyncio.run(calls())
    for record in caplog.records:
        # gRPC tells of the event loop of a test before this one, which has ended.
        told = caplog.handler.format(record)
        assert "Traceback" not in told or "PollerCompletionQueue" in record.getMessage(), told
    for found in Agent(bed.bpffs).limiters():
        assert isinstance(found, Status)
        assert cgroup.path_of(found.cgroup_id)
        Agent(bed.bpffs).detach(found.pod.uid)
