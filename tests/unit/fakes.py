"""What tests play with: pods, a sink, a node in memory, an API server on loopback, and the kernel's side of BPF."""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence, Set
from contextlib import asynccontextmanager
from ctypes import Structure, sizeof
from pathlib import Path
from typing import Any, Self, TypeVar
from unittest.mock import patch

import pytest
from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration

from bpfrl.bpf import apart, cooperation, generator, libbpf, limiter, sockets
from bpfrl.bpf.layout import Counters, CountersData, IdentityData
from bpfrl.bpf.libbpf import AttachType, Descriptor, Linked, MapShape, Shape
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import InvalidObjectError, KernelError, RefusedError, UnreachableError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.master.controller import Controller
from bpfrl.master.events import Reason, Recorder, Report
from bpfrl.master.pods import Pod
from bpfrl.rpc.client import NodeClient
from bpfrl.units import Rate

Result = TypeVar("Result")
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
HASH = "0123456789abcdef0123456789abcdef"
SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**9), Rate(10**9), 65_536)
BUILD, OLD_BUILD = b"\x01" * 32, b"\x02" * 32

# No test waits for as long as this unless it fails.
_PATIENCE_SECONDS = 6.0


def uid_of(number: int) -> str:
    """The UID of the pod with this number."""
    return f"{number:08x}{UID[8:]}"


def make_pod(
    number: int = 0,
    limits: Limits | None = None,
    *,
    node: str = "node-1",
    address: str = "192.0.2.1",
    cgroup_uid: str = "",
    problem: str = "",
    ended: bool = False,
) -> Pod:
    """The pod with this number."""
    uid = uid_of(number)
    return Pod(uid, PodRef(cgroup_uid or uid, "shop", f"cart-{number}"), node, address, limits, problem, ended)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a test's coroutine, and nothing of it for ever."""

    async def bounded() -> Result:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await work

    return asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    """Wait for what must come."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS / 2):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError("what must come does not") from None


async def a_while() -> None:
    """Time for what must not come: some hundred times as long as what must."""
    await asyncio.sleep(0.05)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Something endless at work in the background, which must not have ended by itself."""
    task = asyncio.create_task(work)
    try:
        yield task
        if task.done():
            task.result()
            raise AssertionError("it has ended")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def tell_all(controller: Controller, pods: Sequence[Pod], *, complete: bool = True) -> None:
    """Tell a controller all pods that there are, as its sources do."""
    for pod in pods:
        controller.put(pod)
    controller.keep({pod.uid for pod in pods}, complete=complete)


class Sink:
    """Whoever wants to know the pods, with all it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.pods: dict[str, Pod] = {}

    def keep(self, uids: Set[str], *, complete: bool = True) -> None:
        # The list itself is not told pod by pod.
        while self.told and self.told[-1][0] == "put" and self.told[-1][1] in uids:
            self.told.pop()
        self.told.append(("keep", sorted(uids), complete))
        self.pods = {uid: pod for uid, pod in self.pods.items() if uid in uids}

    def put(self, pod: Pod) -> None:
        self.told.append(("put", pod.uid))
        self.pods[pod.uid] = pod

    def remove(self, uid: str) -> None:
        self.told.append(("remove", uid))
        self.pods.pop(uid, None)


class Told(Recorder):
    """A recorder that remembers what it was asked to tell."""

    def __init__(self) -> None:
        super().__init__(None, "test")
        self.told: list[Report] = []

    def tell(self, pod: Pod, reason: Reason, message: str) -> None:
        self.told.append(Report(pod, reason, message))

    def of(self, reason: Reason) -> list[str]:
        """The messages that were told for one reason."""
        return [report.message for report in self.told if report.reason is reason]


class Node(NodeClient):
    """A node's daemon in memory, and the connection to it.

    Attributes:
        has: its limiters, by UID.
        absent: the UIDs of pods whose cgroup it has not made yet.
        calls: each call as it came in: the verb, the UID, and the limits; "wait" for a patient attach.
        meanwhile: what happens on the node before a call is carried out; it may wait and raise.
        flying: the UIDs of the pods with a call on the way, without patient ones.
        most: how many of those there have been at most.
        overlaps: the UIDs for which two calls were on the way at once.
        waiting: the UIDs that a patient attach waits for.
        cut: the connection is gone, until the next call.
    """

    def __init__(self) -> None:
        super().__init__("192.0.2.1", 1, None)
        self.has: dict[str, Status | Broken] = {}
        self.absent: set[str] = set()
        self.calls: list[tuple[object, ...]] = []
        self.meanwhile: Callable[[str, str], Awaitable[None]] | None = None
        self.flying: list[str] = []
        self.most = 0
        self.overlaps: list[str] = []
        self.waiting: set[str] = set()
        self.cut = False
        self.closed = False

    def give(self, number: int, limits: Limits = SLOW, *, build: bytes = BUILD, cgroup_id: int = 7) -> str:
        """Let the node have a limiter already; returns its UID."""
        ref = make_pod(number).ref
        self.has[ref.uid] = Status(ref, limits, Counters(), Counters(), cgroup_id, 1.0, build)
        return ref.uid

    def limits(self) -> dict[str, Limits | str]:
        """What is in force."""
        return {uid: each.reason if isinstance(each, Broken) else each.limits for uid, each in self.has.items()}

    def verbs(self, uid: str = "") -> list[str]:
        """The calls so far, but for lists; those for one pod."""
        return [str(call[0]) for call in self.calls if call[0] != "list" and (not uid or call[1] == uid)]

    async def lost(self) -> None:
        while not self.cut:
            await asyncio.sleep(0.005)

    async def attach(self, pod: PodRef, limits: Limits, image: bytes, build: bytes, wait: float = 0) -> Change:
        assert image == image_of(pod, limits)
        async with self._call("wait" if wait else "attach", pod.uid, limits):
            deadline = asyncio.get_running_loop().time() + wait
            while pod.uid in self.absent:
                if asyncio.get_running_loop().time() >= deadline:
                    raise RefusedError(f"no cgroup for {pod}", "NOT_FOUND")
                await asyncio.sleep(0.001)
            before = self.has.get(pod.uid)
            self.has[pod.uid] = Status(pod, limits, Counters(), Counters(), 7, 1.0, build)
            return Change.UNCHANGED if before == self.has[pod.uid] else Change.ATTACHED

    async def update(self, uid: str, limits: Limits) -> Change:
        async with self._call("update", uid, limits):
            before = self.has.get(uid)
            if not isinstance(before, Status):
                raise RefusedError(f"{uid} has no limiter", "NOT_FOUND")
            self.has[uid] = Status(before.pod, limits, Counters(), Counters(), 7, 1.0, before.build)
            return Change.UPDATED if before.limits != limits else Change.UNCHANGED

    async def detach(self, uid: str) -> Change:
        async with self._call("detach", uid):
            return Change.DETACHED if self.has.pop(uid, None) else Change.ABSENT

    async def list(self) -> list[Status | Broken]:
        self.calls.append(("list",))
        found = [*self.has.values()]
        if self.meanwhile:
            await self.meanwhile("list", "")
        return found

    async def close(self) -> None:
        self.closed = True

    @asynccontextmanager
    async def _call(self, verb: str, uid: str, *about: object) -> AsyncIterator[None]:
        self.calls.append((verb, uid, *about))
        if uid in self.flying or uid in self.waiting:
            self.overlaps.append(uid)
        try:
            if verb == "wait":
                self.waiting.add(uid)
            else:
                self.flying.append(uid)
                self.most = max(self.most, len(self.flying))
            await asyncio.sleep(0)
            if self.meanwhile:
                await self.meanwhile(verb, uid)
            yield
        finally:
            if verb == "wait":
                self.waiting.discard(uid)
            else:
                self.flying.remove(uid)


def image_of(pod: PodRef | None, limits: Limits) -> bytes:
    """What stands for a generated object."""
    return f"{pod} {limits}".encode()


def refusing(verb: str, code: str, times: int = 1) -> Callable[[str, str], Awaitable[None]]:
    """A node that says no so many times."""
    left = [times]

    async def refuse(asked: str, uid: str) -> None:
        if asked == verb and left[0]:
            left[0] -= 1
            raise RefusedError(f"no {verb} of {uid or 'anything'}", code)

    return refuse


def silent(verb: str, times: int = 1) -> Callable[[str, str], Awaitable[None]]:
    """A node that does not answer so many times."""
    left = [times]

    async def be_silent(asked: str, _: str) -> None:
        if asked == verb and left[0]:
            left[0] -= 1
            raise UnreachableError("the node does not answer")

    return be_silent


@asynccontextmanager
async def api_server(handler: Handler) -> AsyncIterator[ApiClient]:
    """An API server on loopback that answers with a function, and a client for it."""
    runner = web.ServerRunner(web.Server(handler, handler_cancellation=True), shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with client_of(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            yield client
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[ApiClient]:
    """A client for the API server at an address, whatever proxy the environment names."""
    configuration = Configuration(host=url)
    configuration.client_session_kwargs = {"trust_env": False}
    # Over plain HTTP, nobody needs the machine's certificates, which take longer to read than most tests.
    with patch.object(ssl, "create_default_context", lambda **_: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)):
        client = ApiClient(configuration)
    try:
        yield client
    finally:
        await client.close()  # type: ignore[no-untyped-call]


class Thing(Descriptor):
    """A map, a program or a link, open; its pins are files that say which it is."""

    def __init__(self, kind: str, identifier: int) -> None:
        super().__init__(os.memfd_create(f"played-{kind}"))
        self.kind = kind
        self.identifier = identifier

    def pin(self, path: Path) -> None:
        path.write_text(f"{self.kind} {self.identifier}")


class Kernel:
    """The kernel's side of BPF: :meth:`play` puts it in the place of the real one.

    Attributes:
        links: the cgroup's id of each link, 0 for one that is detached.
        running: the tag of each link's program, as far as it was replaced or attached.
        programs: the programs that were asked for, by name.
        tag_now: the tag of what is loaded from now on.
        tags: each program's.
        values: what is in each map.
        shapes: how each map is made.
        loaded: each object that was loaded: its bytes, and the maps that were to be taken.
        refused: the calls that fail, by name.
    """

    def __init__(self) -> None:
        self.links: dict[int, int] = {}
        self.running: dict[int, bytes] = {}
        self.programs: list[str] = []
        self.tag_now = b"\1" * 8
        self.tags: dict[int, bytes] = {}
        self.values: dict[int, bytes] = {}
        self.shapes: dict[int, MapShape] = {}
        self.loaded: list[tuple[bytes, dict[str, int]]] = []
        self.refused: set[str] = set()
        self.numbers = itertools.count(1)

    def play(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for the real one."""
        for name in (
            *("open_pinned", "linked", "attach", "detach", "replace"),
            *("tag", "has_shape", "read", "read_per_cpu", "write"),
        ):
            monkeypatch.setattr(libbpf, name, getattr(self, name))
        for module in (cooperation, limiter, sockets):
            monkeypatch.setattr(module, "LoadedObject", self.load)
        monkeypatch.setattr(apart, "LoadedApart", self.load)

    def load(
        self,
        image: bytes,
        reuse: dict[str, Thing] | None = None,
        shape: Shape | None = None,
        **_: object,
    ) -> LoadedThings:
        self._check("load")
        return LoadedThings(self, image, reuse or {}, shape)

    def make(self, kind: str) -> Thing:
        """Something new."""
        return Thing(kind, next(self.numbers))

    def open_pinned(self, path: Path | str) -> Thing:
        try:
            kind, number = Path(path).read_text().split()
        except (OSError, ValueError) as error:
            raise KernelError(f"cannot open {path}: played") from error
        return Thing(kind, int(number))

    def linked(self, link: Thing) -> Linked:
        if link.kind != "link":
            raise KernelError("a pin that should be a link to a cgroup is something else")
        return Linked(self.links[link.identifier], link.identifier)

    def attach(self, program: Thing, target: int, kind: AttachType) -> Thing:  # noqa: ARG002
        self._check("attach")
        link = self.make("link")
        self.links[link.identifier] = os.fstat(target).st_ino
        self.running[link.identifier] = self.tags[program.identifier]
        return link

    def detach(self, link: Thing) -> None:
        self.links[link.identifier] = 0

    def replace(self, link: Thing, program: Thing) -> None:
        self.running[link.identifier] = self.tags[program.identifier]

    def tag(self, program: Thing) -> bytes:
        return self.tags[program.identifier]

    def read(self, array: Thing, _: int, kind: type[Structure]) -> Structure:
        value = self.values[array.identifier]
        if len(value) != sizeof(kind):
            raise KernelError(f"a map has values of {len(value)} byte where {sizeof(kind)} were expected")
        return kind.from_buffer_copy(value)

    def read_per_cpu(self, _: object, indices: tuple[int, ...], __: object) -> list[list[CountersData]]:
        return [[CountersData()] for _ in indices]

    def write(self, array: Thing, _: int, value: Structure) -> None:
        self.values[array.identifier] = bytes(value)

    def has_shape(self, descriptor: Thing, shape: MapShape) -> bool:
        return self.shapes.get(descriptor.identifier) == shape

    def attached_to(self, cgroup_id: int) -> list[int]:
        """The links to a cgroup."""
        return [link for link, attached in self.links.items() if attached == cgroup_id]

    @staticmethod
    def left_open() -> list[str]:
        """Descriptors that nobody has closed."""
        found = []
        for number in os.listdir("/proc/self/fd"):
            try:
                found.append(str(Path("/proc/self/fd", number).readlink()))
            except OSError:  # the one that lists them
                continue
        return [name for name in found if "played-" in name]

    def _check(self, name: str) -> None:
        if name in self.refused:
            raise KernelError(f"cannot {name}: played")


class LoadedThings:
    """An object in that kernel."""

    def __init__(self, kernel: Kernel, image: bytes, reuse: dict[str, Thing], shape: Shape | None) -> None:
        self._kernel = kernel
        self._things: dict[str, Thing] = {}
        self._maps = {name: thing.identifier for name, thing in reuse.items()}
        self._image = image
        self._shape = shape
        kernel.loaded.append((image, dict(self._maps)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thing in self._things.values():
            os.close(thing.number)

    def program(self, name: str) -> Thing:
        if name not in self._things:
            self._things[name] = self._kernel.make("program")
            self._kernel.programs.append(name)
        thing = self._things[name]
        self._kernel.tags[thing.identifier] = self._kernel.tag_now
        return thing

    def map(self, name: str) -> Thing:
        if name in self._things:
            return self._things[name]
        if name in self._maps:
            self._things[name] = Thing("map", self._maps[name])
        else:
            thing = self._things[name] = self._kernel.make("map")
            if name == sockets.STORAGE:
                self._kernel.shapes[thing.identifier] = sockets.SHAPE
            self._kernel.values[thing.identifier] = self._content(name)
        return self._things[name]

    def _content(self, name: str) -> bytes:
        try:
            contents = generator.inspect(self._image)
        except InvalidObjectError:
            return b""
        if name == ".data.limits":
            return bytes(contents.data)
        return self._image[contents.identity_at :][: sizeof(IdentityData)] if name == ".rodata.identity" else b""
