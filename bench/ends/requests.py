"""Many small requests, each answered with as much: what somebody who types feels of the load beside.

The requests of a connection are sent after random pauses and do not wait for the responses to those before. So a
slow response holds nothing up, and whatever the queue, none of the time in it is left out.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import selectors
import socket
import time
from collections import deque
from typing import Final

from bench.ends import measure_in_real_time, ready, say

SIZE: Final = 100
CONNECTIONS: Final = 4
# Every run has the same pauses.
_SEED: Final = 1
# What is still on its way at the end has as long.
_GRACE_SECONDS: Final = 3.0
_READ: Final = 65536
_FAMILIES: Final = {False: socket.AF_INET, True: socket.AF_INET6}


def main() -> None:
    """Answer requests until the end, or make them for some time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["answer", "ask"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, help="requests a second on all connections together")
    parser.add_argument("--skip", type=float, help="seconds at the beginning whose requests do not count")
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    measure_in_real_time()
    if options.role == "answer":
        answer(options.address, options.port)
    else:
        say(**Asker(options.address, options.port).ask(options.rate, options.skip, options.seconds))


def answer(address: str, port: int) -> None:
    """Send back what comes."""
    listener = socket.create_server((address, port), family=_FAMILIES[":" in address])
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        ready()
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(connection, selectors.EVENT_READ, connection)
                elif content := key.data.recv(_READ):
                    key.data.sendall(content)
                else:
                    selector.unregister(key.data)
                    key.data.close()


class Asker:
    """Makes requests on some connections."""

    def __init__(self, address: str, port: int) -> None:
        self._connections = [socket.create_connection((address, port)) for _ in range(CONNECTIONS)]
        # When each of a connection's requests was sent, the oldest first, and the bytes of its response so far.
        self._waiting: dict[socket.socket, deque[float]] = {each: deque() for each in self._connections}
        self._received = dict.fromkeys(self._connections, 0)
        self._answered: list[tuple[float, float]] = []
        for connection in self._connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, rate: float, skip: float, seconds: float) -> dict[str, object]:
        """Make requests at a rate, and tell the milliseconds of those that count."""
        pauses = random.Random(_SEED)  # noqa: S311 nothing here is a secret
        longest = 2 * CONNECTIONS / rate
        ready()
        begin = time.perf_counter()
        end = begin + skip + seconds
        due = [(begin + pauses.uniform(0, longest), number) for number in range(CONNECTIONS)]
        heapq.heapify(due)
        while due[0][0] < end:
            at, number = due[0]
            self._receive(at)
            if time.perf_counter() >= at:
                self._send(self._connections[number])
                heapq.heapreplace(due, (at + pauses.uniform(0, longest), number))
        while any(self._waiting.values()) and time.perf_counter() < end + _GRACE_SECONDS:
            self._receive(end + _GRACE_SECONDS)
        now = time.perf_counter()
        left = [sent for waiting in self._waiting.values() for sent in waiting]
        times = [(sent, now - sent) for sent in left] + self._answered
        return {
            "milliseconds": [round(took * 1000, 4) for sent, took in times if sent >= begin + skip],
            "unanswered": sum(sent >= begin + skip for sent in left),
        }

    def _send(self, connection: socket.socket) -> None:
        # The time that counts begins here: only this process itself can have made it late.
        self._waiting[connection].append(time.perf_counter())
        connection.sendall(bytes(SIZE))

    def _receive(self, until: float) -> None:
        """Take in the responses that come before a moment, or are there."""
        # Of all ways to wait this one is exact to less than a millisecond.
        timeout = max(0.0, until - time.perf_counter())
        for connection in select.select(self._connections, [], [], timeout)[0]:
            content = connection.recv(_READ)
            if not content:
                raise ConnectionError("a connection for requests was closed")
            now = time.perf_counter()
            responses, self._received[connection] = divmod(self._received[connection] + len(content), SIZE)
            for _ in range(responses):
                sent = self._waiting[connection].popleft()
                self._answered.append((sent, now - sent))


if __name__ == "__main__":
    main()
