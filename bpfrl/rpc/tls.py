"""The certificates that master, nodes and operators show each other.

Each has a folder with ``ca.crt``, ``tls.crt`` and ``tls.key``, as a Kubernetes TLS Secret is mounted and as
cert-manager writes it. What a certificate is good for stands among its DNS names (subject alternative names): a node
has ``node.bpfrl``, its master ``master.bpfrl``, and people who look at nodes have ``operator.bpfrl``. Addresses do not
matter: nodes come and go, and all of them are reached by IP address.

Files are read again when they have changed: at each new connection.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple, cast

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from bpfrl.errors import CertificateError

log = logging.getLogger(__name__)

NODE: Final = "node.bpfrl"
MASTER: Final = "master.bpfrl"
OPERATOR: Final = "operator.bpfrl"
AUTHORITY_FILE: Final = "ca.crt"
CERTIFICATE_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
# How often a master sees whether a silent node is still there.
KEEPALIVE_SECONDS: Final = 30
# A certificate with less of its time left than this is to be made anew.
RENEWAL_SHARE: Final = 1 / 3
_REMINDER_SECONDS: Final = 86_400.0
_FILES: Final = (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE)
_HOW: Final = "bpfrl certs init DIR makes certificates"

_Signature = tuple[tuple[int, int, int], ...]


class Bundle(NamedTuple):
    """One state of a folder's files, PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


class Certificates:
    """A folder of certificates, and what it holds now.

    Args:
        folder: with ca.crt, tls.crt and tls.key.
        role: what tls.crt must be good for, :data:`NODE`, :data:`MASTER` or :data:`OPERATOR`.

    Raises (the constructor):
        CertificateError: the files are not there, or cannot be used.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self.folder = folder
        self._role = role
        self._lock = Lock()  # gRPC asks from threads of its own
        self._remind_at = 0.0
        self._signature = self._sign()
        self._bundle = self._read()

    def current(self) -> Bundle:
        """The files' content, or the last that could be used while what stands there now cannot."""
        with self._lock:
            try:
                signature = self._sign()
                if signature != self._signature:
                    self._bundle = self._read()
                    self._signature = signature
                    log.info("read the changed certificates in %s", self.folder)
            except CertificateError as error:
                log.warning("going on with the certificates read before: %s", error)
            self._remind()
            return self._bundle

    def expires(self) -> datetime:
        """When the certificate expires that :meth:`current` holds."""
        self.current()
        return self._expires

    def _remind(self) -> None:
        """Say once a day that the certificate is about to expire, or has."""
        left, now = self._expires - datetime.now(UTC), time.monotonic()
        if left < self._validity * RENEWAL_SHARE and now >= self._remind_at:
            self._remind_at = now + _REMINDER_SECONDS
            words = "has expired" if left < timedelta(0) else "is about to expire"
            log.warning("%s %s: %s", self.folder / CERTIFICATE_FILE, words, self._expires)

    def _sign(self) -> _Signature:
        try:
            found = [os.stat(self.folder / name) for name in _FILES]
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}: {_HOW}") from error
        return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)

    def _read(self) -> Bundle:
        try:
            bundle = Bundle(*((self.folder / name).read_bytes() for name in _FILES))
            x509.load_pem_x509_certificates(bundle.authority)
            certificate = x509.load_pem_x509_certificates(bundle.certificate)[0]
            key = load_pem_private_key(bundle.key, None)
            form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            belong = certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
            roles = names(certificate)
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}: {_HOW}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{self.folder}: not certificates and a key in PEM ({error}): {_HOW}") from error
        if not belong:
            raise CertificateError(f"{self.folder}: {KEY_FILE} is not the key of {CERTIFICATE_FILE}")
        if self._role not in roles:
            raise CertificateError(
                f"{self.folder / CERTIFICATE_FILE} is for {', '.join(roles) or 'nothing'}:"
                f" it must have the DNS name {self._role}"
            )
        self._expires = certificate.not_valid_after_utc
        self._validity = self._expires - certificate.not_valid_before_utc
        return bundle


def names(certificate: x509.Certificate) -> list[str]:
    """The DNS names that a certificate is good for. Raises ValueError where they cannot be read."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """What a node listens with, at one port: the peer needs a certificate of the same authority."""
    shown = certificates.current()

    def configuration(bundle: Bundle) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(bundle.key, bundle.certificate)], bundle.authority)

    def change() -> grpc.ServerCertificateConfiguration | None:
        # Asked at every handshake, one at a time. With each answer but None, gRPC frees what other handshakes may be
        # about to use: a few hundred at once would end the process (grpcio 1.85).
        nonlocal shown
        bundle = certificates.current()
        if bundle == shown:
            return None
        shown = bundle
        return configuration(bundle)

    # The stubs do not know that None means: as before.
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], change)
    return grpc.dynamic_ssl_server_credentials(configuration(shown), fetch, require_client_authentication=True)


def channel_credentials(bundle: Bundle) -> grpc.ChannelCredentials:
    """What a master or an operator connects with; see also :data:`CHANNEL_OPTIONS`."""
    return grpc.ssl_channel_credentials(bundle.authority, bundle.key, bundle.certificate)


# The peer must have the node's role, whatever its address.
CHANNEL_OPTIONS: Final = (("grpc.ssl_target_name_override", NODE),)


def peer_roles(auth_context: Mapping[str, Iterable[bytes]]) -> list[str]:
    """The DNS names in the certificate of a call's peer, which the handshake has verified."""
    return [name.decode(errors="replace") for name in auth_context.get("peer_dns", ())]


def is_loopback(host: str) -> bool:
    """True for an address that no other machine can reach: there, and only there, TLS may be left out."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
