"""Whether the certificates here are good, and nodes answer: one look at each, which says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from bpfrl import __version__
from bpfrl.errors import BpfrlError, CertificateError, RefusedError
from bpfrl.findings import Finding, Mark
from bpfrl.rpc import tls
from bpfrl.rpc.client import NodeClient

_ROLES: Final = (tls.NODE, tls.MASTER, tls.OPERATOR)
_EXPIRES_SOON: Final = timedelta(days=30)
_RENEW: Final = "bpfrl certs init DIR makes it anew, in the folder of its authority"
_CONNECT_SECONDS: Final = 3.0
_CALL_SECONDS: Final = 5.0
# No pod has it: a node that answers about it answers about any.
_NO_POD: Final = "00000000-0000-0000-0000-000000000000"


def certificate(folder: Path) -> Finding:
    """A folder of certificates: whether it is whole, whom it is for, and for how long."""
    try:
        [shown, *_] = x509.load_pem_x509_certificates((folder / tls.CERTIFICATE_FILE).read_bytes())
        roles = [name for name in tls.names(shown) if name in _ROLES]
        bundle = tls.Certificates(folder, roles[0] if roles else _ROLES[0]).current()
        issued = any(_issued(shown, authority) for authority in x509.load_pem_x509_certificates(bundle.authority))
    except (CertificateError, OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        return Finding("certificates", Mark.MISSING, (reason,), "bpfrl certs init DIR makes certificates")
    found = f"{folder / tls.CERTIFICATE_FILE}, for {', '.join(roles)}"
    if not issued:
        return Finding("certificates", Mark.MISSING, (found, f"not issued by {tls.AUTHORITY_FILE} beside it"), _RENEW)
    left = shown.not_valid_after_utc - datetime.now(UTC)
    until = f"until {shown.not_valid_after_utc:%Y-%m-%d}"
    if left <= timedelta(0):
        return Finding("certificates", Mark.MISSING, (found, f"expired: it was good {until}"), _RENEW)
    mark, advice = (Mark.WARNING, _RENEW) if left < _EXPIRES_SOON else (Mark.OK, "")
    return Finding("certificates", mark, (found, f"good {until}, for {left.days} days more"), advice)


async def nodes(targets: Sequence[tuple[str, int]], certificates: tls.Certificates | None) -> list[Finding]:
    """Whether nodes answer, all at the same time, with these certificates or, on loopback, without."""
    return await asyncio.gather(*(_node(address, port, certificates) for address, port in targets))


async def _node(address: str, port: int, certificates: tls.Certificates | None) -> Finding:
    client = NodeClient(address, port, certificates)
    name = f"node {client.target}"
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(address, port)
        writer.close()
    except (OSError, TimeoutError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Finding(name, Mark.MISSING, (f"no TCP connection: {reason}",), "see that bpfrl serve-node runs there")
    try:
        async with asyncio.timeout(_CALL_SECONDS):
            report = await client.explain(_NO_POD)
    except RefusedError as error:
        if error.code == "UNIMPLEMENTED":
            return Finding(name, Mark.WARNING, ("answers, and is older than this bpfrl",), "upgrade the older one")
        return Finding(name, Mark.MISSING, (f"answers, and refuses: {error}",), "use certificates of its authority")
    except (BpfrlError, TimeoutError) as error:
        reason = str(error).removeprefix(f"{name}: ") or "it does not answer"
        advice = "see that both sides have certificates of one authority; its log says whom it refuses"
        return Finding(name, Mark.MISSING, (f"a TCP connection, and no answer: {reason}",), advice)
    finally:
        await client.close()
    other = report.version != __version__
    return Finding(
        name,
        Mark.WARNING if other else Mark.OK,
        (f"answers, with bpfrl {report.version}",),
        f"this bpfrl is {__version__}: upgrade the older one" if other else "",
    )


def _issued(shown: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        shown.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
