"""Making the certificates that :mod:`.tls` loads.

One authority signs three certificates, one for all nodes, one for the master and one for people:

    DIR/ca.crt  DIR/ca.key                              the authority; its key signs, and nothing else needs it
    DIR/node/{ca.crt,tls.crt,tls.key}                   for bpfrl serve-node --certs
    DIR/master/{ca.crt,tls.crt,tls.key}                 for bpfrl serve-master --certs
    DIR/operator/{ca.crt,tls.crt,tls.key}               for bpfrl list and explain --certs
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from bpfrl import files
from bpfrl.errors import CertificateError
from bpfrl.rpc import tls

AUTHORITY_KEY: Final = "ca.key"
_ROLES: Final[dict[str, tuple[str, ObjectIdentifier]]] = {
    "node": (tls.NODE, ExtendedKeyUsageOID.SERVER_AUTH),
    "master": (tls.MASTER, ExtendedKeyUsageOID.CLIENT_AUTH),
    "operator": (tls.OPERATOR, ExtendedKeyUsageOID.CLIENT_AUTH),
}
# Each role's Secret in a cluster, and its folder.
SECRETS: Final = {f"bpfrl-{folder}": folder for folder in _ROLES}
# Those of the daemons: people who have a folder keep theirs there.
_DAEMONS: Final = ("bpfrl-node", "bpfrl-master")
_AUTHORITY_DAYS: Final = 3650
# Clocks differ: a certificate is good a little before it is made.
_SKEW: Final = timedelta(minutes=5)


def init(folder: Path, days: int, *, renew: bool = False) -> list[tuple[Path, bool]]:
    """Make what is missing of an authority and its certificates, and what is about to expire.

    Args:
        folder: where; made if it is not there.
        days: how long the certificates are good for; the authority is for ten years at
            least, and no certificate outlives it.
        renew: make the certificates anew in any case, but not the authority.

    Returns:
        Each certificate, and whether it was made just now.

    Raises:
        CertificateError: what is there already cannot be used.
    """
    files.make_folder(folder)
    made = not (folder / tls.AUTHORITY_FILE).exists()
    if made and (folder / AUTHORITY_KEY).exists():
        raise CertificateError(
            f"{folder} has {AUTHORITY_KEY} without {tls.AUTHORITY_FILE}: copy that back from {folder / 'node'}"
        )
    if made:
        _make_authority(folder, timedelta(days=max(days, _AUTHORITY_DAYS)))
    authority, key = _load_authority(folder)
    left = authority.not_valid_after_utc - datetime.now(UTC)
    if left <= timedelta(0):
        raise CertificateError(f"{folder / tls.AUTHORITY_FILE} has expired: make a new authority in another folder")
    results = [(folder / tls.AUTHORITY_FILE, made)]
    for name, (role, usage) in _ROLES.items():
        own = folder / name
        files.make_folder(own)
        wanted = renew or not _is_good(own, authority)
        if wanted:
            _make_certificate(own, authority, key, role, usage, min(timedelta(days=days), left))
        results.append((own / tls.CERTIFICATE_FILE, wanted))
    return results


def secrets(folder: Path, namespace: str) -> str:
    """The daemons' certificates as Kubernetes Secrets (YAML), for kubectl apply.

    Raises:
        CertificateError: they are not there, or cannot be used.
    """
    return yaml.safe_dump_all(role_secrets(folder, namespace, _DAEMONS), sort_keys=False)


def role_secrets(folder: Path, namespace: str, roles: Iterable[str] = SECRETS) -> list[dict[str, Any]]:
    """The certificates as Kubernetes Secrets, one for each role; the authority's key is in none. As :func:`secrets`."""
    found = []
    for name in roles:
        own = SECRETS[name]
        bundle = tls.Certificates(folder / own, _ROLES[own][0]).current()
        files = zip((tls.AUTHORITY_FILE, tls.CERTIFICATE_FILE, tls.KEY_FILE), bundle, strict=True)
        found.append(secret(name, namespace, dict(files)))
    return found


def secret(name: str, namespace: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Files as a Kubernetes Secret for TLS."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "kubernetes.io/tls",
        "data": {file: base64.b64encode(content).decode() for file, content in files.items()},
    }


def _make_authority(folder: Path, validity: timedelta) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bpfrl")])
    certificate = (
        _builder(name, name, key, validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / AUTHORITY_KEY, _pem(key))
    _write(folder / tls.AUTHORITY_FILE, certificate.public_bytes(Encoding.PEM), 0o644)


def _make_certificate(
    folder: Path,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    role: str,
    usage: ObjectIdentifier,
    validity: timedelta,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
    certificate = (
        _builder(name, authority.subject, key, validity)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(role)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    # The daemons wait until key and certificate belong together: see tls.Certificates.
    _write(folder / tls.KEY_FILE, _pem(key))
    _write(folder / tls.CERTIFICATE_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
    _write(folder / tls.AUTHORITY_FILE, authority.public_bytes(Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, validity: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + validity)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / tls.AUTHORITY_FILE).read_bytes())
        key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    except OSError as error:
        raise CertificateError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{folder}: the authority's files are damaged ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateError(f"{folder}: {AUTHORITY_KEY} is not the key of {tls.AUTHORITY_FILE}")
    return certificate, key


def _is_good(folder: Path, authority: x509.Certificate) -> bool:
    """True where a role's files are whole, signed by this authority, and not about to expire."""
    role, _ = _ROLES[folder.name]
    try:
        bundle = tls.Certificates(folder, role).current()
        certificate = x509.load_pem_x509_certificate(bundle.certificate)
        certificate.verify_directly_issued_by(authority)
    except (CertificateError, InvalidSignature, ValueError, TypeError):
        return False
    validity = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    known = bundle.authority == authority.public_bytes(Encoding.PEM)
    return known and certificate.not_valid_after_utc - datetime.now(UTC) > validity * tls.RENEWAL_SHARE


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, mode: int = files.PRIVATE) -> None:
    try:
        files.write(path, content, mode)
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error
