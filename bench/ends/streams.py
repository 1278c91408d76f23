"""TCP in bulk, with what arrives counted in short windows: iperf3's are too long to see how soon a limit holds."""

from __future__ import annotations

import argparse
import contextlib
import select
import signal
import socket
import time
from typing import Final

from bench.ends import ready, say

WINDOW_SECONDS: Final = 0.05

_CHUNK: Final = 1 << 17
_TCP_CONGESTION: Final = 13


def main() -> None:
    """Send, receive as fast as it comes, or receive slowly."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["send", "receive", "sip"])
    parser.add_argument("address", help="to send to, or to listen at")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--rate", type=int, help="at which to sip, bit/s")
    parser.add_argument("--seconds", type=float, help="for how long to sip")
    parser.add_argument("--bind", default="", help="the address to send from")
    options = parser.parse_args()
    if options.role == "send":
        send(options.address, options.port, options.bind, options.connections)
        return
    with socket.create_server((options.address, options.port)) as listener:
        ready()
        if options.role == "receive":
            receive([listener.accept()[0] for _ in range(options.connections)])
        else:
            sip(listener.accept()[0], options.rate, options.seconds)


def send(address: str, port: int, bind: str, count: int) -> None:
    """Send as fast as it goes, until nobody listens any more."""
    connections = [socket.create_connection((address, port), source_address=(bind, 0)) for _ in range(count)]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, b"cubic")
        connection.setblocking(False)
    ready()
    chunk = bytes(_CHUNK)
    while connections:
        for connection in select.select([], connections, [])[1]:
            try:
                connection.send(chunk)
            except BlockingIOError:
                continue
            except ConnectionError:
                connections.remove(connection)
                connection.close()


def receive(connections: list[socket.socket]) -> None:
    """Count what comes until SIGTERM, in windows on the machine's own clock."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    windows: dict[int, int] = {}
    buffer = bytearray(_CHUNK)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            readable = select.select(connections, [], [])[0]
            window = int((time.monotonic() - begin) / WINDOW_SECONDS)
            windows[window] = windows.get(window, 0) + sum(each.recv_into(buffer) for each in readable)
    say(begin=begin, windows=[windows.get(index, 0) for index in range(max(windows, default=-1) + 1)])


def sip(connection: socket.socket, rate: int, seconds: float) -> None:
    """Read no faster than a rate, and tell how much of it came in some time."""
    begin, total = time.monotonic(), 0
    while (now := time.monotonic()) < begin + seconds:
        wanted = int((now - begin) * rate / 8) - total
        if wanted > 0:
            total += len(connection.recv(wanted))
        time.sleep(WINDOW_SECONDS / 10)
    say(rate=total * 8 / (time.monotonic() - begin))


if __name__ == "__main__":
    main()
