"""The agent, over gRPC: ``node.proto``'s service.

Bytes are received without holding anything, and then applied in one go by the agent: a transfer that breaks
off has touched nothing, and of two for one pod each is applied whole, one after the other. The agent's calls run in
a few threads of their own, for they wait for the kernel: it verifies the programs of several pods at once, and
everything else happens one at a time. All others wait in the event loop, where ten thousand idle calls cost nothing but
memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc

from bpfrl import logs
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Stage
from bpfrl.cgroup import CgroupTree, Search
from bpfrl.errors import (
    BpfrlError,
    CgroupNotFoundError,
    DamagedTransferError,
    InvalidObjectError,
    InvalidValueError,
    NotLimitedError,
    OversizedError,
    RoleError,
    TransferError,
    TransferTimeoutError,
    UnknownProgramError,
)
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node import explain
from bpfrl.node.agent import Agent
from bpfrl.node.observer import UNOBSERVED, Observer
from bpfrl.rpc import messages, node_pb2, statuses, tls
from bpfrl.rpc.node_pb2_grpc import NodeServicer

log = logging.getLogger(__name__)
# Whoever can connect can make the log say this.
refusals = logging.getLogger(f"{__name__}.refusals")
refusals.addFilter(logs.Sparing())

Result = TypeVar("Result")
_Context = grpc.aio.ServicerContext[Any, Any]
_Requests = AsyncIterator[node_pb2.AttachRequest]
_Stages = deque["node_pb2.Stage.ValueType"]

# A limiter has 24 KB. With a master's certificate a thousand may be on their way at once.
_LARGEST_PROGRAM_BYTES: Final = 2**17
# What the kernel does for one pod takes milliseconds; a master makes eight calls at a time. One is more than there are
# CPUs, for those that wait for the lock.
_MOST_WORKERS: Final = 4
# On a bad line a limiter takes a second or two.
_TRANSFER_SECONDS: Final = 20.0
# The master asks again; calls that wait for nothing do not pile up here.
_LONGEST_WAIT_SECONDS: Final = 300.0
# Which roles may make which call, by the word that refusals and the log have for it.
_MAY: Final[Mapping[str, tuple[str, ...]]] = {
    "attach": (tls.MASTER,),
    "update": (tls.MASTER,),
    "detach": (tls.MASTER,),
    "list": (tls.MASTER, tls.OPERATOR),
    "explain": (tls.MASTER, tls.OPERATOR),
}
# An attach takes some milliseconds, and each message to tell of it half of one.
_UNTOLD_SECONDS: Final = 0.1
_STAGES: Final = {Stage.LOADED: node_pb2.STAGE_LOADED, Stage.PINNED: node_pb2.STAGE_PINNED}


@dataclass
class _Call:
    """How a call is going.

    Attributes:
        uid: the pod that it is about, as far as it has said so; "" for none whose refusal is worth remembering.
        began: since when the node works on it, s.
        change: what it has done.
        result: how it has ended, if nothing was done: a gRPC status code's name.
    """

    uid: str = ""
    began: float = field(default_factory=time.monotonic)
    change: Change | None = None
    result: str = grpc.StatusCode.UNKNOWN.name

    def begins(self) -> None:
        """What came before was waiting for somebody else."""
        self.began = time.monotonic()


class NodeService(NodeServicer):
    """What a master, or an operator, may ask of this node.

    Args:
        agent: what does it.
        tree: where the pods' cgroups are.
        roles: whether the caller's certificate must have a role that may make the call; False only without TLS.
        cooperate: whether this node's senders keep to what limited receivers ask for.
        known_only: take no programs but those that this version compiles or ships.
        observer: who wants to know of the calls.
    """

    def __init__(
        self,
        agent: Agent,
        tree: CgroupTree,
        *,
        roles: bool,
        cooperate: bool,
        known_only: bool = False,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self._agent = agent
        self._tree = tree
        self._roles = roles
        self._cooperate = cooperate
        self._known_only = known_only
        self._observer = observer
        self._refusals = explain.Refusals()
        workers = min(len(os.sched_getaffinity(0)) + 1, _MOST_WORKERS)
        self._worker = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="agent")
        self._listing = asyncio.Lock()
        self._next_list: asyncio.Task[node_pb2.ListReply] | None = None
        # Who only looks, which may mean at every socket of the node, keeps nobody from being limited.
        self._looker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")

    async def Attach(  # noqa: N802 - gRPC's names
        self, request_iterator: _Requests, context: _Context
    ) -> AsyncIterator[node_pb2.AttachReply]:
        """Give a pod a limiter, or change the one it has."""
        async with self._answering(context, "attach") as call:
            header, pod, limits = await self._header(request_iterator)
            call.uid = pod.uid
            if self._known_only and header.build != generator.build():
                raise _unknown(header.build)
            path = await self._cgroup(pod.uid, header.wait_ms / 1000)
            call.begins()
            stages = _Stages()
            change = await self._keep(pod, limits, header.build, path)
            if change is None:
                yield node_pb2.AttachReply(stages=[node_pb2.STAGE_PROCEED])
                image = await _receive(request_iterator, header)
                _compare(image, header, limits)
                if self._known_only and not generator.is_known(image):
                    raise _unknown(header.build)
                stages.append(node_pb2.STAGE_RECEIVED)
                attached = self._start_attach(image, pod, path, stages)
                while not attached.done():
                    await asyncio.wait({attached}, timeout=_UNTOLD_SECONDS)
                    if stages and not _has_succeeded(attached):
                        yield node_pb2.AttachReply(stages=_taken(stages))
                change = await attached
            call.change = change
            log.info("%s %s: %s", pod, change.value, limits)
            stages.append(node_pb2.STAGE_ATTACHED)
            yield node_pb2.AttachReply(stages=_taken(stages), change=messages.from_change(change))

    async def Update(  # noqa: N802
        self, request: node_pb2.UpdateRequest, context: _Context
    ) -> node_pb2.Done:
        """Change the limits of a pod that has a limiter."""
        async with self._answering(context, "update") as call:
            call.uid = uid = messages.to_uid(request.uid)
            limits = _limiting(messages.to_limits(request.limits))
            change = await self._do(self._agent.update, uid, limits)
            call.change = change
            log.info("%s %s: %s", uid, change.value, limits)
            return node_pb2.Done(change=messages.from_change(change))

    async def Detach(  # noqa: N802
        self, request: node_pb2.DetachRequest, context: _Context
    ) -> node_pb2.Done:
        """Take a pod's limiter off."""
        async with self._answering(context, "detach") as call:
            call.uid = uid = messages.to_uid(request.uid)
            change = await self._do(self._agent.detach, uid)
            call.change = change
            log.info("%s %s", uid, change.value)
            return node_pb2.Done(change=messages.from_change(change))

    async def List(  # noqa: N802
        self,
        request: node_pb2.ListRequest,  # noqa: ARG002
        context: _Context,
    ) -> node_pb2.ListReply:
        """Every limiter of this node."""
        async with self._answering(context, "list"):
            return await self._shared_list()

    async def Explain(  # noqa: N802
        self, request: node_pb2.ExplainRequest, context: _Context
    ) -> node_pb2.ExplainReply:
        """Why a pod is limited, or not, as far as this node knows."""
        async with self._answering(context, "explain"):
            uid = messages.to_uid(request.uid)
            refusal = self._refusals.of(uid)
            loop = asyncio.get_running_loop()
            report = await loop.run_in_executor(self._looker, explain.examine, self._agent, self._tree, uid, refusal)
            return messages.from_report(report)

    async def tend(self) -> None:
        """Remove what no running pod needs any more, and have the pods cooperate, or not."""
        swept = await self._do(self._agent.sweep)
        for uid in swept:
            log.info("%s swept: its pod has ended", uid)
        self._observer.swept(len(swept))
        await self._do(self._tend_cooperation)

    def close(self) -> None:
        """Finish what is being done, and take nothing more."""
        self._worker.shutdown()
        self._looker.shutdown()

    def _tend_cooperation(self) -> None:
        if self._cooperate:
            for path in self._tree.tops():
                try:
                    if self._agent.cooperate(path):
                        log.info("senders below %s keep to what limited receivers ask for", path)
                except BpfrlError as error:
                    log.warning("senders below %s do not cooperate: %s", path, error)
            return
        for cgroup_id in self._agent.cooperating():
            self._agent.stop_cooperating(cgroup_id)
            log.info("senders do not cooperate any more")

    async def _shared_list(self) -> node_pb2.ListReply:
        """One look for all who have asked before it began: however many ask, a change waits for one of them only."""
        if self._next_list is None:
            self._next_list = asyncio.create_task(self._list())
            self._next_list.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._next_list)

    async def _list(self) -> node_pb2.ListReply:
        async with self._listing:
            self._next_list = None
            found = await self._do(self._agent.limiters)
        return node_pb2.ListReply(limiters=map(messages.from_limiter, found))

    async def _header(self, requests: _Requests) -> tuple[node_pb2.Header, PodRef, Limits]:
        try:
            async with asyncio.timeout(_TRANSFER_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            raise TransferTimeoutError(f"no header came within {_TRANSFER_SECONDS:.0f} s") from None
        if first is None:
            raise DamagedTransferError("the call was cut off before its header came")
        if first.WhichOneof("step") != "header":
            raise InvalidValueError("the first message must be the header")
        header = first.header
        if header.size > _LARGEST_PROGRAM_BYTES:
            raise OversizedError(
                f"a program of {header.size} byte is no limiter: those have at most {_LARGEST_PROGRAM_BYTES}"
            )
        pod = messages.to_pod(header.pod)
        messages.to_uid(pod.uid)
        return header, pod, _limiting(messages.to_limits(header.limits))

    async def _cgroup(self, uid: str, wait: float) -> Path:
        search = Search(self._tree, uid, min(wait, _LONGEST_WAIT_SECONDS))
        while (found := search.look()) is None:
            await asyncio.sleep(search.pause())
        return found

    async def _keep(self, pod: PodRef, limits: Limits, build: bytes, path: Path) -> Change | None:
        """Change the limits of a pod that runs this very program; None if it does not."""
        if not self._agent.has(pod.uid) or not await self._do(self._agent.runs, pod, path, build):
            return None
        try:
            return await self._do(self._agent.update, pod.uid, limits)
        except NotLimitedError:  # gone between the two
            return None

    def _start_attach(self, image: bytes, pod: PodRef, path: Path, stages: _Stages) -> asyncio.Future[Change]:
        def report(stage: Stage) -> None:
            stages.append(_STAGES[stage])

        loop = asyncio.get_running_loop()
        attached = loop.run_in_executor(self._worker, self._agent.attach, image, pod, path, report)
        # Where the caller has gone meanwhile, nobody asks how it went.
        attached.add_done_callback(lambda done: done.cancelled() or done.exception())
        return attached

    async def _do(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    @asynccontextmanager
    async def _answering(self, context: _Context, what: str) -> AsyncIterator[_Call]:
        """Admit the caller, and turn what goes wrong into a status, a line in the log and a memory of it."""
        call = _Call()
        try:
            if self._roles:
                _admit(tls.peer_roles(context.auth_context()), what)
            yield call
            call.result = grpc.StatusCode.OK.name
            self._refusals.forget(call.uid)
        except BpfrlError as error:
            # gRPC's call and its end hold each other, and with them, until garbage is looked for, all that came.
            traceback.clear_frames(error.__traceback__)
            call.result = statuses.code_of(error).name
            if call.uid:
                self._refusals.remember(call.uid, what, error)
            # A pod that comes or goes, and a master that goes: neither is anybody's mistake.
            usual = isinstance(error, CgroupNotFoundError | NotLimitedError | TransferError)
            level = logging.INFO if usual else logging.WARNING
            refusals.log(level, "refused %s from %s: %s", what, context.peer(), error)
            await context.abort(statuses.code_of(error), str(error))
        except OSError as error:
            call.result = grpc.StatusCode.INTERNAL.name
            log.exception("failed to %s for %s", what, context.peer())
            await context.abort(grpc.StatusCode.INTERNAL, f"the node cannot {what}: {error.strerror or error}")
        except (asyncio.CancelledError, GeneratorExit):
            call.result = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            result = call.change.name.lower() if call.change else call.result
            self._observer.answered(what, result, time.monotonic() - call.began)


def _has_succeeded(attached: asyncio.Future[Change]) -> bool:
    return attached.done() and not attached.cancelled() and attached.exception() is None


def _taken(stages: _Stages) -> list[node_pb2.Stage.ValueType]:
    """What there is to tell, once; more may come meanwhile."""
    return [stages.popleft() for _ in range(len(stages))]


def _admit(roles: list[str], what: str) -> None:
    if not set(roles) & set(_MAY[what]):
        shown, wanted = ", ".join(roles) or "nothing", " or ".join(_MAY[what])
        raise RoleError(f"the certificate is for {shown}: it must have the DNS name {wanted}")


def _limiting(limits: Limits) -> Limits:
    if limits.unlimited:
        raise InvalidValueError("the limits limit nothing: detach the pod instead")
    return limits


def _unknown(build: bytes) -> UnknownProgramError:
    shown, own = (each.hex()[: generator.BUILD_DIGITS] or "none" for each in (build, generator.build()))
    return UnknownProgramError(
        "this node takes the programs of its own version alone (--require-known-program), which are build"
        f" {own}; build {shown} came, or one with other numbers in it: have master and nodes run one version"
    )


async def _receive(requests: _Requests, header: node_pb2.Header) -> bytes:
    image = bytearray()
    try:
        async with asyncio.timeout(_TRANSFER_SECONDS):
            async for request in requests:
                if request.WhichOneof("step") != "chunk":
                    raise InvalidValueError("after the header, nothing but the program's bytes may come")
                image += request.chunk
                if len(image) > header.size:
                    raise DamagedTransferError(f"more than the {header.size} byte came that were announced")
    except TimeoutError:
        raise TransferTimeoutError(
            f"{len(image)} of {header.size} byte came within {_TRANSFER_SECONDS:.0f} s"
        ) from None
    return bytes(image)


def _compare(image: bytes, header: node_pb2.Header, limits: Limits) -> None:
    """What came must be what was announced, and a limiter with the limits that were announced."""
    if len(image) != header.size:
        raise DamagedTransferError(f"{len(image)} byte came, {header.size} were announced")
    if hashlib.sha256(image).digest() != header.sha256:
        raise DamagedTransferError("the program's SHA-256 is not the announced one")
    contents = generator.inspect(image)
    if contents.limits != limits or contents.build != header.build:
        raise InvalidObjectError("the program's limits or build are not those in the header")
