"""One end of TCP connections, as a process in a cgroup of its own choice: :class:`tests.kernel.conftest.End` drives it.

Orders come as lines of JSON, a method and its arguments, and each is answered by one line. Connections are known by
numbers. What is sent is a stream in which every 8 bytes differ, so that nothing lost, doubled or moved goes unnoticed.
Nothing but the standard library is imported, for this runs under any Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

_SO_MAX_PACING_RATE: Final = 47
_SECONDS: Final = 30.0
_CHUNK: Final = 65_536
# struct tcp_info (linux/tcp.h)
_RTT_AT: Final = 68
_TOTAL_RETRANS_AT: Final = 100


class Connection:
    """A socket, and what has gone through it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.sent = self.received = 0
        self.sent_digest, self.received_digest = hashlib.sha256(), hashlib.sha256()
        self.ended = False
        self.error = ""

    def send(self, size: int | None) -> None:
        """Send so many bytes and the end, or go on for ever."""
        try:
            while size is None or self.sent < size:
                length = _CHUNK if size is None else min(_CHUNK, size - self.sent)
                chunk = b"".join(place.to_bytes(8, "big") for place in range(self.sent, self.sent + length, 8))[:length]
                self.socket.sendall(chunk)
                self.sent_digest.update(chunk)
                self.sent += length
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.error = str(error)

    def receive(self, rate: int | None) -> None:
        """Read to the end, no faster than a rate in bit/s."""
        start = time.monotonic()
        try:
            while data := self.socket.recv(_CHUNK if rate is None else 4096):
                self.received += len(data)
                self.received_digest.update(data)
                if rate:
                    time.sleep(max(0.0, start + self.received * 8 / rate - time.monotonic()))
            self.ended = True
        except OSError as error:
            self.error = str(error)

    def answer(self, size: int) -> None:
        """Send back what comes, in pieces of a size."""
        with contextlib.suppress(OSError):
            while data := self.socket.recv(size, socket.MSG_WAITALL):
                self.socket.sendall(data)

    def state(self) -> dict[str, Any]:
        """What there is to say of it."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return {
            "sent": self.sent,
            "received": self.received,
            "sent_digest": self.sent_digest.hexdigest(),
            "received_digest": self.received_digest.hexdigest(),
            "ended": self.ended,
            "error": self.error,
            "pacing": self.socket.getsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE) & 0xFFFFFFFF,
            "rtt_us": struct.unpack_from("I", info, _RTT_AT)[0],
            "retransmits": struct.unpack_from("I", info, _TOTAL_RETRANS_AT)[0],
        }


class Orders:
    """What this process may be told to do."""

    def __init__(self) -> None:
        self._listeners: dict[int, socket.socket] = {}
        self._connections: list[Connection] = []

    def listen(self, port: int) -> None:
        """Listen, on both versions of IP."""
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        listener.settimeout(_SECONDS)
        self._listeners[port] = listener

    def accept(self, port: int, count: int) -> list[int]:
        """Wait for so many connections."""
        return [self._add(self._listeners[port].accept()[0]) for _ in range(count)]

    def connect(
        self, address: str, port: int, count: int, own: int = 0, source: str = "", congestion: str = ""
    ) -> list[int]:
        """Make so many connections; with the application's own pacing rate, byte/s, where one is given."""
        made = []
        for _ in range(count):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            sock.settimeout(_SECONDS)
            self._congestion(sock, congestion)
            if own:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, own)
            if source:
                sock.bind((source, 0))
            sock.connect((address, port))
            made.append(self._add(sock))
        return made

    def send(self, numbers: list[int], size: int | None = None) -> None:
        """Begin to send over each."""
        self._start(numbers, "send", size)

    def receive(self, numbers: list[int], rate: int | None = None) -> None:
        """Begin to read from each."""
        self._start(numbers, "receive", rate)

    def answer(self, numbers: list[int], size: int) -> None:
        """Begin to answer requests."""
        self._start(numbers, "answer", size)

    def ask(self, number: int, size: int, think: float, count: int) -> list[float]:
        """Make requests one after the other, and tell how long each took, s."""
        sock, times = self._connections[number].socket, []
        for _ in range(count):
            time.sleep(think)
            start = time.monotonic()
            sock.sendall(bytes(size))
            received = 0
            while received < size:
                received += len(sock.recv(size - received))
            times.append(time.monotonic() - start)
        return times

    def widest(self, port: int) -> int:
        """The widest window, byte, that connections which are accepted here may advertise; 0: as the kernel has it."""
        return self._listeners[port].getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)

    def pace(self, number: int, rate: int) -> None:
        """Set the application's own pacing rate, byte/s."""
        self._connections[number].socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)

    def keepalive(self, number: int) -> None:
        """Have the kernel look every second whether the other end is still there."""
        sock = self._connections[number].socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)

    def state(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What there is to say of each."""
        return [self._connections[number].state() for number in numbers]

    def _add(self, sock: socket.socket) -> int:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append(Connection(sock))
        return len(self._connections) - 1

    def _start(self, numbers: list[int], method: str, argument: int | None) -> None:
        for number in numbers:
            work = getattr(self._connections[number], method)
            threading.Thread(target=work, args=(argument,), daemon=True).start()

    @staticmethod
    def _congestion(sock: socket.socket, name: str) -> None:
        if name:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def say(line: str) -> None:
    """Answer."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Join a cgroup, and do what the lines of stdin say."""
    Path(sys.argv[1], "cgroup.procs").write_text("0")
    orders = Orders()
    say("ready")
    for line in sys.stdin:
        method, arguments, options = json.loads(line)
        try:
            answer = {"result": getattr(orders, method)(*arguments, **options)}
        except OSError as error:
            answer = {"error": str(error)}
        say(json.dumps(answer))


if __name__ == "__main__":
    main()
