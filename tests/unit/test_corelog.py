from __future__ import annotations

import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.rpc import authority, corelog, tls
from bpfrl.rpc.corelog import Entry, entries

SECONDS = 10.0
# What a client of HTTP/2 says first, and an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")

# What gRPC 1.85 writes, cut in the middle of its arguments.

ADDED = (
    "I1123 05:02:55.467078   21514 handshaker.cc:80] handshake_manager 0x7f8690002010: adding handshaker security"
    " [0x2c2eec30] at index 1"
)
CALLING = "I1123 05:02:55.871847   21535 channel_trace.h:396] handshake manager 0x7f5c200020c0:  calling handshaker"
ARGS = (
    " args={endpoint=0x7f5c20001c20, args={grpc.experimental.event_engine=0x34863a50,"
    " grpc.internal.endpoint_local_address=ipv4:127.0.0.1:43989,"
    " grpc.internal.endpoint_peer_address=ipv4:127.0.0.1:57962, grpc.internal.security_connector=0x348758c0,"
    " grpc.resource_quota=0x34862bf0}, read_buffer.Length()=0, exit_early=0}"
)
ARGS_6 = ARGS.replace("ipv4:127.0.0.1", "ipv6:%5B::1%5D")
NEXT = "I1123 05:02:55.872714   21536 handshaker.cc:155] CallNextHandshakerLocked: error="
FAILED = "I1123 05:02:55.872726   21536 channel_trace.h:396] handshake manager 0x7f5c200020c0: Failed with error: "
SSL = (
    "UNKNOWN: Ssl handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000c0:SSL routines:OPENSSL_internal:"
)
TRACE = ["=== Source Location Trace: ===", "src/core/util/status_helper.cc:68"]
SAID = "I1123 05:02:55.872651   21536 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: error:"
GOOD = [ADDED, f"{NEXT}OK shutdown=false index=1,{ARGS}", CALLING, f"{NEXT}OK shutdown=false index=2,{ARGS}"]
WARNED = "E1123 05:13:59.242975   30338 ssl_transport_security.cc:3238] No match found for server name: node.bpfrl"
TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "/usr/lib/python3.11/threading.py", line 1038, in _bootstrap_inner',
    "    self.run()",
    "ValueError: I1123 is no date",
]


def failing(reason: str, args: str = ARGS) -> list[str]:
    """The core's lines about a handshake that fails."""
    lines = [ADDED, f"{NEXT}OK shutdown=false index=1,{args}", CALLING, f"{SAID}{reason}"]
    lines += [f"{NEXT}{reason}", *TRACE, f" shutdown=false index=2,{args}"]
    return [*lines, f"{FAILED}{reason}", *TRACE, ""]


WORDS = {
    f"{SSL}PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context: OK": "it has no certificate",
    f"{SSL}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK": (
        "its certificate is refused: certificate has expired"
    ),
    f"{SSL}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK": (
        "its certificate is refused: unable to get local issuer certificate"
    ),
    f"{SSL}WRONG_VERSION_NUMBER: OK": "it does not speak TLS",
    f"{SSL}HTTP_REQUEST: OK": "it does not speak TLS",
    f"{SSL}TLSV1_ALERT_UNKNOWN_CA: OK": "it refuses this certificate: UNKNOWN CA",
    f"{SSL}SOMETHING_NEW: OK": f"{SSL}SOMETHING_NEW",
}


@pytest.mark.parametrize(("reason", "words"), WORDS.items(), ids=WORDS.values())
def test_a_refusal_is_one_entry_with_the_peer_and_the_reason(reason: str, words: str) -> None:
    assert list(entries(failing(reason))) == [Entry(logging.WARNING, f"refused 127.0.0.1:57962: {words}")]
    assert list(entries(failing(reason, ARGS_6))) == [Entry(logging.WARNING, f"refused [::1]:57962: {words}")]


def test_each_of_several_refusals_is_told() -> None:
    lines = [*failing("one"), *GOOD, *failing("two", ARGS_6), *failing("three"), *GOOD]
    told = [entry.text for entry in entries(lines) if isinstance(entry, Entry)]
    assert told == ["refused 127.0.0.1:57962: one", "refused [::1]:57962: two", "refused 127.0.0.1:57962: three"]


def test_a_refusal_is_told_once_however_often_the_peer_is_named() -> None:
    lines = [f"{NEXT}a reason", f" shutdown=false index=2,{ARGS}", f" shutdown=false index=2,{ARGS}"]
    assert len(list(entries(lines))) == 1


def test_a_handshake_that_succeeds_is_not_told() -> None:
    assert list(entries(GOOD)) == []


def test_what_the_core_warns_of_is_told() -> None:
    [entry] = entries([WARNED])
    assert entry == Entry(logging.ERROR, f"gRPC: {WARNED.partition('] ')[2]}")
    levels = [entry.level for entry in entries(level + WARNED[1:] for level in "IWEF") if isinstance(entry, Entry)]
    assert levels == [logging.WARNING, logging.ERROR, logging.CRITICAL]


@pytest.mark.parametrize("before", [[], GOOD, failing("x"), [WARNED]], ids=["", "good", "failed", "warned"])
def test_what_is_not_the_cores_passes_unchanged(before: list[str]) -> None:
    lines = [*before, *TRACEBACK, *GOOD, "Fatal Python error: Segmentation fault"]
    passed = [entry for entry in entries(lines) if isinstance(entry, str)]
    assert passed == [*TRACEBACK, "Fatal Python error: Segmentation fault"]


@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_other_programs_lines_pass_whatever_they_are(lines: list[str]) -> None:
    # The core's begin with a letter, a date and a time.
    assert list(entries(lines)) == lines


fragments = st.sampled_from([*GOOD, *failing(f"{SSL}ALERT_X"), WARNED, *TRACEBACK, NEXT, SAID, "", " shutdown="])
pieces = fragments | st.text(max_size=20) | st.builds(str.__getitem__, fragments, st.builds(slice, st.integers(0, 200)))
torn = st.lists(st.lists(pieces, max_size=3).map("".join), max_size=30)


@given(torn)
def test_torn_and_mixed_lines_do_no_harm(lines: list[str]) -> None:
    found = list(entries(lines))
    assert len(found) <= 2 * len(lines)
    assert {entry for entry in found if isinstance(entry, str)} <= set(lines)


# A real core, in a process of its own, with its stderr as it is and redirected.

SERVER = """
import asyncio, logging, os, sys
from pathlib import Path
if sys.argv[1] == "redirected":
    from bpfrl.rpc import corelog
    corelog.redirect()
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
else:
    os.environ["GRPC_TRACE"] = "handshaker"
import grpc
from bpfrl.rpc import tls

async def serve():
    server = grpc.aio.server()
    node = tls.Certificates(Path(sys.argv[2]), tls.NODE)
    ports = [server.add_secure_port(host + ":0", tls.server_credentials(node)) for host in ("127.0.0.1", "[::1]")]
    await server.start()
    print(*ports, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

asyncio.run(serve())
"""


@dataclass
class Server:
    """A process that listens, and where its stderr goes."""

    pki: Path
    ports: tuple[int, int]
    stderr: Path
    redirected: bool

    @contextmanager
    def watching(self) -> Iterator[Callable[[], list[str]]]:
        """What has been told since then, as lines of a log."""
        with self.stderr.open() as file:
            file.seek(0, os.SEEK_END)
            lines: list[str] = []

            def told() -> list[str]:
                lines.extend(file.read().splitlines())
                if self.redirected:
                    return lines
                return [
                    f"{logging.getLevelName(entry.level)} {entry.text}" if isinstance(entry, Entry) else entry
                    for entry in entries(lines)
                ]

            yield told

    def dial(self, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        host, port = ("127.0.0.1", self.ports[0]) if family == socket.AF_INET else ("::1", self.ports[1])
        return socket.create_connection((host, port), SECONDS)

    def greet(self, certificate: Path | None, trusted: Path | None = None, *, six: bool = False) -> str:
        """Say hello as a master does, hear the server out, and return this end's address."""
        context = ssl.create_default_context(cafile=trusted or self.pki / "ca.crt")
        if trusted:
            # In TLS 1.3, OpenSSL's alert comes in a form that BoringSSL does not read.
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
        with self.dial(socket.AF_INET6 if six else socket.AF_INET) as plain:
            host, port = plain.getsockname()[:2]
            try:
                with context.wrap_socket(plain, server_hostname=tls.NODE) as wrapped:
                    wrapped.sendall(PREFACE)
                    wrapped.recv(1)  # the server's SETTINGS, or its refusal
            except (ssl.SSLError, ConnectionError):
                pass
        return f"[{host}]:{port}" if six else f"{host}:{port}"

    def say(self, text: bytes) -> str:
        """Say something else than TLS."""
        with self.dial() as plain:
            host, port = plain.getsockname()
            plain.sendall(text)
            try:
                while plain.recv(4096):
                    pass
            except ConnectionError:
                pass
        return f"{host}:{port}"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, another one beside it, and a certificate that has expired."""
    folder = tmp_path_factory.mktemp("corelog")
    authority.init(folder / "pki", 30)
    authority.init(folder / "foreign", 30)
    expired = folder / "expired"
    shutil.copytree(folder / "pki" / "master", expired)
    signer = load_pem_private_key((folder / "pki" / "ca.key").read_bytes(), None)
    own = x509.load_pem_x509_certificate((folder / "pki" / "ca.crt").read_bytes())
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    authority._make_certificate(expired, own, signer, tls.MASTER, usage, timedelta(minutes=-1))
    return folder


@pytest.fixture(scope="module", params=["raw", "redirected"])
def server(request: pytest.FixtureRequest, pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    stderr = tmp_path_factory.mktemp("stderr") / "stderr"
    command = [sys.executable, "-c", SERVER, request.param, pki / "pki" / "node"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    with (
        stderr.open("w") as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment, text=True
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        try:
            ports = process.stdout.readline().split()
            assert len(ports) == 2, stderr.read_text()
            yield Server(pki / "pki", (int(ports[0]), int(ports[1])), stderr, request.param == "redirected")
            process.stdin.close()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def settled(server: Server, told: Callable[[], list[str]], expected: int) -> list[str]:
    """What is told of some connections, when nothing more of them can come."""
    deadline = time.monotonic() + SECONDS
    while len(told()) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    server.greet(server.pki / "master")
    time.sleep(0.05)
    return told()


def test_real_handshakes_that_succeed_are_not_told(server: Server) -> None:
    with server.watching() as told:
        for six in (False, True):
            server.greet(server.pki / "master", six=six)
        assert settled(server, told, 0) == []


REFUSED: dict[str, tuple[Callable[[Server], str], str]] = {
    "no certificate": (lambda server: server.greet(None), "it has no certificate"),
    "no certificate, by IPv6": (lambda server: server.greet(None, six=True), "it has no certificate"),
    "an expired one": (
        lambda server: server.greet(server.pki.with_name("expired")),
        "its certificate is refused: certificate has expired",
    ),
    "a foreign one": (
        lambda server: server.greet(server.pki.with_name("foreign") / "master"),
        "its certificate is refused: unable to get local issuer certificate",
    ),
    "a node's own": (
        lambda server: server.greet(server.pki / "node"),
        "its certificate is refused: unsupported certificate purpose",
    ),
    "none, from one who trusts another authority": (
        lambda server: server.greet(None, server.pki.with_name("foreign") / "ca.crt"),
        "it refuses this certificate: UNKNOWN CA",
    ),
    "HTTP/2 without TLS": (lambda server: server.say(PREFACE), "it does not speak TLS"),
    "HTTP": (lambda server: server.say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "it does not speak TLS"),
    "noise": (lambda server: server.say(bytes(range(256))), "it does not speak TLS"),
}


@pytest.mark.parametrize(("connect", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_real_refusal_is_one_line_with_the_peer_and_the_reason(
    server: Server, connect: Callable[[Server], str], reason: str
) -> None:
    with server.watching() as told:
        peer = connect(server)
        assert settled(server, told, 1) == [f"WARNING refused {peer}: {reason}"]


# stderr.

SPEAKER = """
import logging, os, sys, threading, time
from bpfrl.rpc import corelog
corelog.redirect()
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
os.write(2, sys.argv[1].encode())
os.system("echo from a child >&2")
os.write(2, b"not \\xff text\\n")
print(os.environ["GRPC_TRACE"], file=sys.stderr)
time.sleep(0.5)
"""


def test_stderr_is_still_there_for_everybody_else() -> None:
    text = "\n".join([*TRACEBACK, *GOOD, WARNED, *failing("a reason"), ""])
    command = [sys.executable, "-c", SPEAKER, text]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=environment)
    lines = done.stderr.splitlines()
    # The command's own line takes no detour, so it may come first.
    lines.remove("handshaker")
    assert lines == [
        *TRACEBACK,
        f"ERROR gRPC: {WARNED.partition('] ')[2]}",
        "WARNING refused 127.0.0.1:57962: a reason",
        "from a child",
        "not \ufffd text",
    ]


def test_the_operators_own_trace_setting_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER, ""],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=os.environ | {"GRPC_TRACE": "http"},
    )
    assert "http" in done.stderr.splitlines()


def test_importing_it_does_not_import_grpc() -> None:
    """The setting must be there before gRPC is."""
    code = f"import sys; import {corelog.__name__}; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
