"""What gRPC's core has to say, in our log.

The core is C++ and writes to stderr in a form of its own. Most of it is for its authors, but one thing is told nowhere
else: who was refused in the TLS handshake and why, in its trace of the handshakers. So stderr becomes a pipe; what
matters is logged, with the peer, and the rest dropped. Nothing depends on the text: if a later version words
it differently, refusals go on and only their lines are missing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from threading import Thread
from typing import Final, NamedTuple, TextIO

from bpfrl import logs

log = logging.getLogger(__name__)
log.addFilter(logs.Sparing())

_RECORD: Final = re.compile(r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?P<place>[\w.]+):\d+\] (?P<text>.*)")
_HANDSHAKE: Final = re.compile(r"CallNextHandshakerLocked: error=(?!OK)(?P<reason>.*)")
_PEER: Final = re.compile(r"grpc\.internal\.endpoint_peer_address=(?P<peer>[^,}]+)")
_TRACES: Final = frozenset({"handshaker.cc", "channel_trace.h", "ssl_transport_security.cc"})
# What fails there is an error that whoever called it tells.
_TOLD: Final = frozenset({"add_port.cc"})
_CONTINUATION: Final = re.compile(r"=== |src/| shutdown=|\{|$")
_LEVELS: Final = {"W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# A probe that only connects, or a peer that refuses us: nobody was refused.
_HUNG_UP: Final = "Handshake read failed"
# BoringSSL's words for what happens most.
_REASONS: Final = (
    (re.compile(r"PEER_DID_NOT_RETURN_A_CERTIFICATE"), "it has no certificate"),
    (re.compile(r"CERTIFICATE_VERIFY_FAILED: (.*?)(?:: OK)?$"), r"its certificate is refused: \1"),
    (re.compile(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|UNKNOWN_PROTOCOL"), "it does not speak TLS"),
    (re.compile(r"ALERT_(\w+)"), r"it refuses this certificate: \1"),
)


class Entry(NamedTuple):
    """One line for the log."""

    level: int
    text: str


def redirect(*, as_log: bool = False) -> None:
    """Send this process's stderr through here from now on. Call it once, and before grpc is imported.

    Args:
        as_log: what is not the core's becomes a log record, too, so that stderr has nothing else.
    """
    os.environ.setdefault("GRPC_TRACE", "handshaker")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    Thread(target=_follow, args=(reader, None if as_log else sys.stderr), name="grpc-core-log", daemon=True).start()


def entries(lines: Iterable[str]) -> Iterator[Entry | str]:
    """What is worth telling of the core's lines: entries for the log, and lines that are not the core's."""
    reason, trace = "", False
    for line in lines:
        record = _RECORD.match(line)
        if record:
            failed = _HANDSHAKE.match(record["text"])
            reason, trace = failed["reason"] if failed else "", record["place"] in _TRACES
            if record["level"] in _LEVELS and record["place"] not in _TOLD:
                yield Entry(_LEVELS[record["level"]], f"gRPC: {record['text']}")
        elif not (trace and _CONTINUATION.match(line)):
            yield line
        peer = _PEER.search(line) if reason else None
        if peer and _HUNG_UP in reason:
            yield Entry(logging.INFO, f"{_address(peer['peer'])} hung up in the handshake")
        elif peer:
            yield Entry(logging.WARNING, f"refused {_address(peer['peer'])}: {_plain(reason)}")
        if peer:
            reason = ""


def _follow(reader: int, stderr: TextIO | None) -> None:
    with os.fdopen(reader, errors="replace") as lines:
        for entry in entries(line.rstrip("\n") for line in lines):
            if isinstance(entry, Entry):
                log.log(entry.level, "%s", entry.text)
            elif stderr:
                print(entry, file=stderr)
            else:
                log.warning("%s", entry)


def _address(peer: str) -> str:
    """From ipv4:1.2.3.4:5 and ipv6:%5B::1%5D:5 to what everybody writes."""
    return peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]")


def _plain(reason: str) -> str:
    for pattern, words in _REASONS:
        if found := pattern.search(reason):
            return found.expand(words).replace("_", " ") if found.groups() else words
    return reason.removesuffix(": OK")
