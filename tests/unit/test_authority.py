from __future__ import annotations

import base64
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from bpfrl.errors import CertificateError
from bpfrl.rpc import authority, tls

ROLES = {"node": "node.bpfrl", "master": "master.bpfrl", "operator": "operator.bpfrl"}
USAGES = {
    "node": ExtendedKeyUsageOID.SERVER_AUTH,
    "master": ExtendedKeyUsageOID.CLIENT_AUTH,
    "operator": ExtendedKeyUsageOID.CLIENT_AUTH,
}
CERTIFICATES = ("ca.crt", "node/tls.crt", "master/tls.crt", "operator/tls.crt")
FILES = {
    *("ca.crt", "ca.key"),
    *("node/ca.crt", "node/tls.crt", "node/tls.key"),
    *("master/ca.crt", "master/tls.crt", "master/tls.key"),
    *("operator/ca.crt", "operator/tls.crt", "operator/tls.key"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def made(results: list[tuple[Path, bool]], folder: Path) -> set[str]:
    """Which certificates were made just now; all of them are told of."""
    assert tuple(str(path.relative_to(folder)) for path, _ in results) == CERTIFICATES
    return {str(path.relative_to(folder)) for path, new in results if new}


def refusal(folder: Path) -> str:
    """The one line that says why a folder is left as it is."""
    before = contents(folder)
    with pytest.raises(CertificateError) as caught:
        authority.init(folder, 30)
    text = str(caught.value)
    assert text.isprintable(), text
    assert str(folder) in text
    assert contents(folder) == before
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole authority."""
    authority.init(tmp_path / "pki", 30)
    return tmp_path / "pki"


# What is made.


def test_an_authority_and_a_certificate_for_each_role_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pki"
    assert made(authority.init(folder, 30), folder) == set(CERTIFICATES)
    assert set(contents(folder)) == FILES
    own = (folder / "ca.crt").read_bytes()
    assert [(folder / name / "ca.crt").read_bytes() for name in ROLES] == [own] * 3


def test_nobody_else_can_read_a_key(folder: Path) -> None:
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in FILES}
    assert modes == {name: 0o600 if name.endswith(".key") else 0o644 for name in FILES}
    for each in (folder, *(folder / name for name in ROLES)):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700


def test_the_authority_signs_certificates_and_no_further_authorities(folder: Path) -> None:
    certificate = load(folder / "ca.crt")
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    assert certificate.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3649)
    certificate.verify_directly_issued_by(certificate)


@pytest.mark.parametrize("name", ROLES)
def test_a_certificate_is_good_for_its_role_and_nothing_else(folder: Path, name: str) -> None:
    certificate = load(folder / name / "tls.crt")
    found = certificate.extensions
    assert list(found.get_extension_for_class(x509.SubjectAlternativeName).value) == [x509.DNSName(ROLES[name])]
    assert list(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == [USAGES[name]]
    assert not found.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = found.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    validity = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=30) - timedelta(minutes=1) < validity <= timedelta(days=30)
    assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=4)


def verifier(folder: Path) -> PolicyBuilder:
    """The rules of the Web's certificates, which are stricter than gRPC's."""
    return PolicyBuilder().store(Store([load(folder / "ca.crt")]))


def test_another_implementation_verifies_the_nodes_certificate(folder: Path) -> None:
    certificate = load(folder / "node" / "tls.crt")
    verify = verifier(folder).build_server_verifier(x509.DNSName("node.bpfrl")).verify
    assert verify(certificate, []) == [certificate, load(folder / "ca.crt")]
    with pytest.raises(VerificationError):
        verifier(folder).build_client_verifier().verify(certificate, [])


@pytest.mark.parametrize("name", ["master", "operator"])
def test_another_implementation_verifies_a_clients_certificate(folder: Path, name: str) -> None:
    certificate = load(folder / name / "tls.crt")
    verified = verifier(folder).build_client_verifier().verify(certificate, [])
    assert list(verified.subjects or ()) == [x509.DNSName(ROLES[name])]
    with pytest.raises(VerificationError):
        verifier(folder).build_server_verifier(x509.DNSName(ROLES[name])).verify(certificate, [])


# Again: what is good is kept.


def test_what_is_good_is_kept(folder: Path) -> None:
    before = contents(folder)
    assert made(authority.init(folder, 30), folder) == set()
    assert made(authority.init(folder, 365), folder) == set()
    assert contents(folder) == before


def test_a_folder_of_before_there_were_operators_gets_their_certificate(folder: Path) -> None:
    shutil.rmtree(folder / "operator")
    before = contents(folder)
    assert made(authority.init(folder, 30), folder) == {"operator/tls.crt"}
    after = contents(folder)
    assert set(after) == FILES
    assert before.items() <= after.items()


def test_renewing_makes_all_certificates_anew_and_keeps_the_authority(folder: Path) -> None:
    before = contents(folder)
    assert made(authority.init(folder, 60, renew=True), folder) == {f"{name}/tls.crt" for name in ROLES}
    after = contents(folder)
    changed = {name for name in FILES if before[name] != after[name]}
    assert changed == {f"{name}/{file}" for name in ROLES for file in ("tls.crt", "tls.key")}
    for name in ROLES:
        load(folder / name / "tls.crt").verify_directly_issued_by(load(folder / "ca.crt"))
        assert load(folder / name / "tls.crt").not_valid_after_utc > datetime.now(UTC) + timedelta(days=59)


def remake(folder: Path, name: str, after: timedelta, before: timedelta = timedelta()) -> None:
    """Make a role's certificate as :func:`authority.init` does, so that it ends in a while and began a while ago."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(load(folder / "ca.crt").subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - before)
        .not_valid_after(datetime.now(UTC) + after)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(ROLES[name])]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    (folder / name / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / name / "tls.key").write_bytes(pem)


@pytest.mark.parametrize(
    ("left", "anew"),
    [(timedelta(days=11), False), (timedelta(days=9), True), (timedelta(days=-1), True)],
    ids=["more than a third is left", "less than a third is left", "expired"],
)
def test_a_certificate_that_is_about_to_expire_is_made_anew(folder: Path, left: timedelta, *, anew: bool) -> None:
    remake(folder, "node", left, timedelta(days=30) - left)
    assert made(authority.init(folder, 30), folder) == ({"node/tls.crt"} if anew else set())
    rest = load(folder / "node" / "tls.crt").not_valid_after_utc - datetime.now(UTC)
    assert rest > timedelta(days=29) if anew else rest < timedelta(days=12)


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("files", [("ca.crt", "tls.crt", "tls.key"), ("tls.crt", "tls.key")], ids=["all", "but ca.crt"])
def test_a_certificate_of_another_authority_is_replaced(
    folder: Path, tmp_path: Path, name: str, files: tuple[str, ...]
) -> None:
    authority.init(tmp_path / "other", 30)
    for file in files:
        shutil.copy(tmp_path / "other" / name / file, folder / name / file)
    assert made(authority.init(folder, 30), folder) == {f"{name}/tls.crt"}
    load(folder / name / "tls.crt").verify_directly_issued_by(load(folder / "ca.crt"))
    assert (folder / name / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


SPOILED: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no certificate": lambda own: (own / "tls.crt").unlink(),
    "no key": lambda own: (own / "tls.key").unlink(),
    "no authority": lambda own: (own / "ca.crt").unlink(),
    "another authority beside it": lambda own: (own / "ca.crt").write_bytes((own / "tls.crt").read_bytes()),
    "an empty certificate": lambda own: (own / "tls.crt").write_bytes(b""),
    "a damaged certificate": lambda own: (own / "tls.crt").write_bytes((own / "tls.crt").read_bytes()[:200]),
    "a damaged key": lambda own: (own / "tls.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n"),
    "the other role's": lambda own: shutil.copytree(
        own.parent / ("master" if own.name == "node" else "node"), own, dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_certificate_that_cannot_be_used_is_made_anew(folder: Path, spoil: Callable[[Path], Any], name: str) -> None:
    spoil(folder / name)
    assert made(authority.init(folder, 30), folder) == {f"{name}/tls.crt"}
    assert set(contents(folder)) == FILES
    tls.Certificates(folder / name, ROLES[name])
    assert made(authority.init(folder, 30), folder) == set()


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def fail(_: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CertificateError, match=rf"^{folder}/[a-z/.]+: No space left on device$"):
        authority.init(folder, 30, renew=True)
    assert contents(folder) == before


# What is damaged is not overwritten: other certificates hang on it.

BAD_AUTHORITIES: dict[str, tuple[str, bytes | None, str]] = {
    "no key": ("ca.key", None, "No such file or directory"),
    "an empty certificate": ("ca.crt", b"", "the authority's files are damaged"),
    "text for a certificate": ("ca.crt", b"hello\n", "the authority's files are damaged"),
    "bytes for a certificate": ("ca.crt", bytes(range(256)), "the authority's files are damaged"),
    "an empty key": ("ca.key", b"", "the authority's files are damaged"),
    "a damaged key": ("ca.key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "damaged"),
    "another key": (
        "ca.key",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "ca.key is not the key of ca.crt",
    ),
    "a key of another kind": (
        "ca.key",
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "ca.key is not the key of ca.crt",
    ),
    "a key with a passphrase": (
        "ca.key",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
        ),
        "the authority's files are damaged",
    ),
}


@pytest.mark.parametrize(("file", "content", "reason"), BAD_AUTHORITIES.values(), ids=BAD_AUTHORITIES)
def test_a_damaged_authority_is_refused_in_one_line_and_kept(
    folder: Path, file: str, content: bytes | None, reason: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert reason in refusal(folder)


def test_an_authority_that_is_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").mkdir()
    assert "ca.crt: Is a directory" in refusal(tmp_path)


# Secrets.


def test_secrets_carry_the_certificates_and_not_the_authoritys_key(folder: Path) -> None:
    text = authority.secrets(folder, "limits")
    documents = list(yaml.safe_load_all(text))
    assert [document["metadata"] for document in documents] == [
        {"name": "bpfrl-node", "namespace": "limits"},
        {"name": "bpfrl-master", "namespace": "limits"},
    ]
    for document, name in zip(documents, ("node", "master"), strict=True):
        kind = (document["apiVersion"], document["kind"], document["type"])
        assert kind == ("v1", "Secret", "kubernetes.io/tls")
        data = {file: base64.b64decode(value, validate=True) for file, value in document["data"].items()}
        assert data == {file: (folder / name / file).read_bytes() for file in ("ca.crt", "tls.crt", "tls.key")}
    key = (folder / "ca.key").read_bytes()
    assert key not in text.encode()
    assert base64.b64encode(key).decode() not in text
    carried = [base64.b64decode(value) for document in documents for value in document["data"].values()]
    assert not any(key in value or key.splitlines()[1] in value for value in carried)


def test_secrets_of_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CertificateError) as caught:
        authority.secrets(tmp_path, "bpfrl")
    assert str(caught.value).startswith(f"{tmp_path / 'node' / 'ca.crt'}: No such file or directory: ")


def test_secrets_of_damaged_files_is_one_line(folder: Path) -> None:
    (folder / "master" / "tls.key").write_bytes(b"")
    with pytest.raises(CertificateError) as caught:
        authority.secrets(folder, "bpfrl")
    assert str(caught.value).isprintable()
    assert str(folder / "master") in str(caught.value)


def test_an_authority_whose_certificate_is_lost_is_not_replaced(folder: Path) -> None:
    (folder / "ca.crt").unlink()
    assert refusal(folder) == f"{folder} has ca.key without ca.crt: copy that back from {folder}/node"


def test_an_authority_that_has_expired_signs_nothing_more(tmp_path: Path) -> None:
    authority._make_authority(tmp_path, timedelta(minutes=-1))
    assert refusal(tmp_path) == f"{tmp_path}/ca.crt has expired: make a new authority in another folder"
