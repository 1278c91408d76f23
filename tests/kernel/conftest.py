"""The kernel tests run on a real kernel: real cgroups, namespaces, programs and sockets, all of them their own."""

from __future__ import annotations

import json
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest

from bench.lab import Lab, in_namespace, lab
from bench.traffic import jain
from bpfrl import cgroup, libc
from bpfrl.bpf import generator

# A machine that stands still for a moment spoils a measurement, so each may be repeated: what is wrong is wrong twice.
MEASURES = [pytest.mark.measures, pytest.mark.flaky(reruns=1, only_rerun="AssertionError")]
SECONDS = 20.0
POLL_SECONDS = 0.02
UNPACED = 0xFFFFFFFF
ENDS = Path(__file__).with_name("ends.py")


@pytest.fixture
def bed() -> Iterator[Lab]:
    if os.geteuid():
        pytest.skip("needs root")
    with lab() as built:
        yield built


@dataclass(frozen=True)
class Flows:
    """What a run of TCP flows came to: payload in bit/s, Jain's index, and what the senders saw."""

    goodput: float
    jain: float
    retransmits: int
    rtt_ms: float

    @classmethod
    def of(cls, report: dict[str, Any]) -> Flows:
        end = report["end"]
        rates = [stream["receiver"]["bits_per_second"] for stream in end["streams"]]
        senders = [stream["sender"] for stream in end["streams"]]
        return cls(
            goodput=end["sum_received"]["bits_per_second"],
            jain=jain(rates),
            retransmits=end["sum_sent"]["retransmits"],
            rtt_ms=sum(sender["mean_rtt"] for sender in senders) / len(senders) / 1000,
        )


def limit(bed: Lab, *options: str) -> None:
    """Limit the pod, or change its limits."""
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, *options)


def detach(bed: Lab) -> None:
    """Let the pod go."""
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)


def items(bed: Lab) -> list[dict[str, Any]]:
    """What bpfrl list tells programs."""
    found: list[dict[str, Any]] = json.loads(bed.bpfrl("list", "-o", "json").stdout)["items"]
    return found


def only(bed: Lab) -> dict[str, Any]:
    """The single limiter of this lab."""
    [item] = items(bed)
    return item


def bpftool(*arguments: str) -> Any:
    """Ask another tool than the one under test."""
    output = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(output) if output.strip() else None


def attached(bed: Lab) -> list[tuple[str, int]]:
    """Kind and id of every program on the pod's cgroup, as bpftool sees them."""
    return attached_to(bed.pod_cgroup)


def attached_to(path: Path) -> list[tuple[str, int]]:
    """The same of any cgroup."""
    found = bpftool("cgroup", "show", str(path)) or []
    return sorted((program["attach_type"], program["id"]) for program in found)


def entries(bed: Lab) -> list[str]:
    """What is in the bpffs, but for what the kernel puts there."""
    return sorted(name for name in os.listdir(bed.bpffs) if not name.endswith(".debug"))


def cooperation(path: Path) -> str:
    """The folder in the bpffs of a cgroup below which senders cooperate."""
    return f"cooperation-{cgroup.id_of(path)}"


def storages(bed: Lab) -> set[int]:
    """The ids of the maps of sockets that are pinned in this lab's bpffs, as bpftool sees them."""
    return {bpftool("map", "show", "pinned", str(pin))["id"] for pin in bed.bpffs.glob("*/sockets")}


def until(condition: Callable[[], Any], seconds: float = SECONDS, what: Callable[[], Any] = lambda: None) -> Any:
    """Wait until a condition holds, and return what it says then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(POLL_SECONDS)
    return found


# Connections.


class End:
    """A process in a network namespace and a cgroup that has one end of connections: see ends.py.

    Its methods are those of :class:`tests.kernel.ends.Orders`.
    """

    def __init__(self, bed: Lab, namespace: str, path: Path) -> None:
        command = in_namespace(namespace, sys.executable, str(ENDS), str(path))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        bed.adopt(self.process)
        assert self._read() == "ready"

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def order(*arguments: Any, **options: Any) -> Any:
            assert self.process.stdin is not None
            print(json.dumps([method, arguments, options]), file=self.process.stdin, flush=True)
            answer = json.loads(self._read())
            assert "error" not in answer, answer
            return answer["result"]

        return order

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()


def pod_end(bed: Lab) -> End:
    """One in the pod."""
    return End(bed, bed.pod_namespace, bed.pod_cgroup / "container")


def peer_end(bed: Lab) -> End:
    """One beside the pod's node, on the other end of the veth."""
    return End(bed, bed.peer_namespace, bed.world_cgroup)


def far_end(bed: Lab) -> End:
    """One at the other end of the wire."""
    return End(bed, bed.far_namespace, bed.world_cgroup)


class Side(NamedTuple):
    """An end, and the numbers that it knows its connections by."""

    end: End
    numbers: list[int]

    def states(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.end.state(self.numbers)
        return found

    def each(self, key: str) -> list[Any]:
        return [state[key] for state in self.states()]

    def send(self, size: int | None = None) -> None:
        self.end.send(self.numbers, size)

    def receive(self, rate: int | None = None) -> None:
        self.end.receive(self.numbers, rate)


def connect(client: End, server: End, address: str, count: int = 1, port: int = 7000, **options: Any) -> list[Side]:
    """Make connections to a port on which the server listens, and return the client's side and the server's."""
    numbers = client.connect(address, port, count, **options)
    return [Side(client, numbers), Side(server, server.accept(port, count))]


def flowing(client: End, server: End, address: str, count: int = 1, port: int = 7000, **options: Any) -> list[Side]:
    """As :func:`connect`, and the client sends without end."""
    server.listen(port)
    sides = connect(client, server, address, count, port, **options)
    sides[1].receive()
    sides[0].send()
    return sides


def rates(receiver: Side, seconds: float) -> list[float]:
    """What comes by each connection while so many seconds pass, bit/s of payload."""
    before, start = receiver.each("received"), time.monotonic()
    time.sleep(seconds)
    after, elapsed = receiver.each("received"), time.monotonic() - start
    return [(now - then) * 8 / elapsed for now, then in zip(after, before, strict=True)]


def arrived(sender: Side, receiver: Side, seconds: float = SECONDS) -> None:
    """Everything that was sent arrives within some seconds, byte for byte."""
    until(lambda: all(receiver.each("ended")), seconds, lambda: (sender.states(), receiver.states()))
    sent, received = sender.states(), receiver.states()
    assert [state["error"] for state in sent + received] == [""] * len(sent + received)
    assert [state["sent"] for state in sent] == [state["received"] for state in received]
    assert [state["sent_digest"] for state in sent] == [state["received_digest"] for state in received]


class Counted(NamedTuple):
    """What a direction has counted within some time."""

    passed_packets: int
    passed_bytes: int
    dropped_packets: int
    dropped_bytes: int

    @classmethod
    def now(cls, bed: Lab, direction: str) -> Self:
        item = only(bed)[direction]
        return cls(*(item[field] for field in cls._fields))

    def since(self, before: Counted) -> Counted:
        return Counted(*(now - then for now, then in zip(self, before, strict=True)))


# What goes over the wire.

ETH_P_ALL = 3
FIN, SYN, RST = 1, 2, 4
OPTION_ID = bytes.fromhex("eb9f")


class Segment(NamedTuple):
    """A TCP segment as it was seen.

    Attributes:
        ports: the source's and the destination's.
        flags: of the TCP header.
        window: as it stands there, unscaled.
        payload: how many bytes it carries.
        options: the kind of each, and what follows its length.
        at: when, s.
    """

    ports: tuple[int, int]
    flags: int
    window: int
    payload: int
    options: list[tuple[int, bytes]]
    at: float

    @property
    def is_pure_ack(self) -> bool:
        return not self.payload and not self.flags & (SYN | FIN | RST)

    @property
    def offer(self) -> int | None:
        """The rate in bit/s that it asks its receiver to send at, if it has bpfrl's option."""
        found = [content for kind, content in self.options if kind == 254 and content.startswith(OPTION_ID)]
        assert len(found) <= 1
        return int.from_bytes(found[0][2:], "big") * 64 if found else None


class Capture:
    """Every TCP segment that crosses a namespace's eth0, from a packet socket there."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._ended = threading.Event()
        self.segments: list[Segment] = []

    def __enter__(self) -> Self:
        # setns(2) moves a thread: one of its own, so that nothing else is moved.
        with ThreadPoolExecutor(max_workers=1) as thread:
            self._socket = thread.submit(self._open).result()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def sent_from(self, port: int) -> list[Segment]:
        """What has left a port so far."""
        return [segment for segment in self.segments.copy() if segment.ports[0] == port]

    def _open(self) -> socket.socket:
        with open(f"/run/netns/{self._namespace}", "rb") as namespace:  # noqa: PTH123 - a descriptor is wanted
            libc.setns(namespace.fileno(), libc.CLONE_NEWNET)
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        opened.bind(("eth0", ETH_P_ALL))
        opened.settimeout(POLL_SECONDS)
        return opened

    def _read(self) -> None:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                segment = parse(self._socket.recv(200))
                if segment:
                    self.segments.append(segment)


def parse(packet: bytes) -> Segment | None:
    """The beginning of a packet at layer 3, if it is TCP without options or extensions of IP."""
    version = packet[0] >> 4
    start, protocol = (20, packet[9]) if version == 4 else (40, packet[6])
    if protocol != socket.IPPROTO_TCP:
        return None
    length = int.from_bytes(packet[2:4], "big") if version == 4 else 40 + int.from_bytes(packet[4:6], "big")
    source, target, _, _, offset, flags, window = struct.unpack_from("!HHIIBBH", packet, start)
    end = start + (offset >> 4) * 4
    return Segment(
        (source, target), flags, window, length - end, parse_options(packet[start + 20 : end]), time.monotonic()
    )


def parse_options(field: bytes) -> list[tuple[int, bytes]]:
    """The options of a TCP header, which must be well-formed."""
    found: list[tuple[int, bytes]] = []
    place = 0
    while place < len(field) and field[place]:
        if field[place] == 1:
            place += 1
            continue
        kind, length = field[place], field[place + 1]
        assert 2 <= length <= len(field) - place, field.hex()
        found.append((kind, field[place + 2 : place + length]))
        place += length
    return found


# Programs of others.


@contextmanager
def program_on(bed: Lab, source: str, kind: str, *paths: Path) -> Iterator[None]:
    """Compile a BPF program that stands beside this file, and have bpftool attach it to cgroups."""
    place = Path(__file__).parent
    pin = bed.bpffs / f"theirs_{uuid.uuid4().hex[:6]}"
    binary = bed.bpffs.with_name(f"{bed.bpffs.name}-{pin.name}.o")
    headers = [f"-I/usr/include/{platform.machine()}-linux-gnu", f"-I{Path(generator.__file__).parent}"]
    done: list[Path] = []
    try:
        subprocess.run(["clang", *generator._FLAGS, *headers, "-c", str(place / source), "-o", binary], check=True)
        subprocess.run(["bpftool", "prog", "load", binary, pin], check=True, capture_output=True)
        for path in paths:
            subprocess.run(["bpftool", "cgroup", "attach", path, kind, "pinned", pin, "multi"], check=True)
            done.append(path)
        yield
    finally:
        for path in done:
            subprocess.run(["bpftool", "cgroup", "detach", path, kind, "pinned", pin], check=True)
        pin.unlink(missing_ok=True)
        binary.unlink(missing_ok=True)
