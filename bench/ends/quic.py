"""QUIC in bulk: UDP that has a congestion control of its own, and paces itself in user space."""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamDataReceived
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench.ends import ready, say

_PROTOCOLS: Final = ["bench"]
_NAME: Final = "bench"
# A packet of Ethernet's 1500 byte holds more; it is what QUIC may use without probing for more.
_DATAGRAM: Final = 1280
# More than is sent in any run, so that the windows are not what limits it.
_WINDOW: Final = 1 << 30
_TOTAL: Final = 1 << 28


def main() -> None:
    """Send for some time, or receive once and tell how much came in the time that counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["send", "receive"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--skip", type=float)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    run = send if options.role == "send" else receive
    asyncio.run(run(options.address, options.port, options.skip, options.seconds))


async def send(address: str, port: int, skip: float, seconds: float) -> None:
    """Send as fast as the congestion control lets it."""
    configuration = _configuration(is_client=True)
    configuration.verify_mode = ssl.CERT_NONE
    async with connect(address, port, configuration=configuration) as connection:
        ready()
        _, writer = await connection.create_stream()
        writer.write(bytes(_TOTAL))
        await asyncio.sleep(skip + seconds)
    say()


async def receive(address: str, port: int, skip: float, seconds: float) -> None:
    """Count what one connection brings."""
    configuration = _configuration(is_client=False)
    with tempfile.TemporaryDirectory() as folder:
        configuration.load_cert_chain(*_certificate(Path(folder)))
    received = _Received(skip, seconds)
    await serve(address, port, configuration=configuration, create_protocol=received.protocol)
    ready()
    await received.ended.wait()
    say(bytes=received.bytes, datagrams=received.datagrams)


class _Received:
    """What has come, of payload in the time that counts, and of datagrams in all."""

    def __init__(self, skip: float, seconds: float) -> None:
        self._skip, self._seconds = skip, seconds
        self._begin = 0.0
        self.bytes = 0
        self.datagrams = 0
        self.ended = asyncio.Event()

    def protocol(self, *arguments: Any, **options: Any) -> QuicConnectionProtocol:
        """A connection of the server's."""
        return _Counting(self, *arguments, **options)

    def datagram(self) -> None:
        """One has come."""
        self.datagrams += 1

    def payload(self, count: int) -> None:
        """Some of the stream has come."""
        now = time.monotonic()
        self._begin = self._begin or now + self._skip
        if self._begin <= now < self._begin + self._seconds:
            self.bytes += count


class _Counting(QuicConnectionProtocol):
    def __init__(self, received: _Received, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._received = received

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        self._received.datagram()
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._received.payload(len(event.data))
        elif isinstance(event, ConnectionTerminated):
            self._received.ended.set()


def _configuration(is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        alpn_protocols=_PROTOCOLS,
        congestion_control_algorithm="cubic",
        is_client=is_client,
        max_data=_WINDOW,
        max_stream_data=_WINDOW,
        max_datagram_size=_DATAGRAM,
    )


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that nobody looks at, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate", folder / "key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


if __name__ == "__main__":
    main()
