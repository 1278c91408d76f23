"""Objects of 100 KB, each fetched over a connection of its own: what a browser or a crawler does."""

from __future__ import annotations

import argparse
import socket
import socketserver
import threading
import time
from typing import Final

from bench.ends import ready, say

OBJECT_BYTES: Final = 100_000
WORKERS: Final = 8

_TIMEOUT_SECONDS: Final = 10.0
_CHUNK: Final = 1 << 16


def main() -> None:
    """Serve objects until the end, or fetch them for some time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["serve", "fetch"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--skip", type=float)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if options.role == "serve":
        with _Server((options.address, options.port), _Handler) as server:
            ready()
            server.serve_forever()
    ready()
    fetched = _Fetched(options.address, options.port, time.monotonic() + options.skip, options.seconds)
    workers = [threading.Thread(target=fetched.work) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    say(milliseconds=fetched.milliseconds, failures=fetched.failures, bytes=fetched.bytes)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        if self.request.recv(_CHUNK):
            self.request.sendall(bytes(OBJECT_BYTES))


class _Fetched:
    """What all workers together have fetched in the time that counts."""

    def __init__(self, address: str, port: int, begin: float, seconds: float) -> None:
        self._target = (address, port)
        self._begin, self._end = begin, begin + seconds
        self._lock = threading.Lock()
        self.milliseconds: list[float] = []
        self.failures = 0
        self.bytes = 0

    def work(self) -> None:
        """Fetch one object after the other."""
        while (start := time.monotonic()) < self._end:
            try:
                self._fetch()
            except OSError:
                with self._lock:
                    self.failures += start >= self._begin
                continue
            if start >= self._begin:
                with self._lock:
                    self.milliseconds.append(round((time.monotonic() - start) * 1000, 3))

    def _fetch(self) -> None:
        """Raises OSError where less than an object comes."""
        left = OBJECT_BYTES
        with socket.create_connection(self._target, timeout=_TIMEOUT_SECONDS) as connection:
            connection.sendall(b"an object, please")
            while count := len(connection.recv(_CHUNK)):
                left -= count
                if self._begin <= time.monotonic() < self._end:
                    with self._lock:
                        self.bytes += count
        if left:
            raise ConnectionError("an object was cut short")


if __name__ == "__main__":
    main()
