"""UDP from many sockets at once, none of which listens to the network."""

from __future__ import annotations

import argparse
import collections
import socket
import time
from typing import Final

from bench.ends import ready, say

PAYLOAD: Final = 1448

_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 1 << 24
_IDLE_SECONDS: Final = 1.0


def main() -> None:
    """Send datagrams, or count those that come from each socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["send", "receive"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--sockets", type=int)
    parser.add_argument("--rate", type=int, help="of all sockets together, bit/s of payload")
    parser.add_argument("--skip", type=float)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if options.role == "send":
        ready()
        send((options.address, options.port), options.sockets, options.rate, options.skip + options.seconds)
    else:
        receive((options.address, options.port), options.skip, options.seconds)


def send(target: tuple[str, int], count: int, rate: int, seconds: float) -> None:
    """Send from one socket after the other at an even pace; what a socket refuses is lost."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    payload, sent, refused, begin = bytes(PAYLOAD), 0, 0, time.monotonic()
    while (now := time.monotonic()) < begin + seconds:
        if sent * PAYLOAD * 8 > (now - begin) * rate:
            time.sleep(0.0005)
            continue
        try:
            sockets[sent % count].sendto(payload, target)
        except OSError:
            refused += 1
        sent += 1
    say(sent=sent, refused=refused)


def receive(where: tuple[str, int], skip: float, seconds: float) -> None:
    """Tell the datagrams of each socket in the time that counts."""
    counts: collections.Counter[int] = collections.Counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        listener.bind(where)
        ready()
        listener.recv(PAYLOAD)
        listener.settimeout(_IDLE_SECONDS)
        begin = time.monotonic() + skip
        try:
            while True:
                _, (_, port) = listener.recvfrom(PAYLOAD)
                if begin <= time.monotonic() < begin + seconds:
                    counts[port] += 1
        except TimeoutError:
            say(datagrams=list(counts.values()))


if __name__ == "__main__":
    main()
