from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtensionOID

from bpfrl.errors import CertificateError
from bpfrl.rpc import authority, tls

HOW = "bpfrl certs init DIR makes certificates"


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """An authority with its certificates."""
    authority.init(tmp_path / "pki", 30)
    return tmp_path / "pki"


@pytest.fixture
def folder(pki: Path) -> Path:
    return pki / "node"


def files(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key"))


def refusal(folder: Path, role: str = tls.NODE) -> str:
    with pytest.raises(CertificateError) as caught:
        tls.Certificates(folder, role)
    text = str(caught.value)
    assert text.isprintable(), text
    assert text.startswith(str(folder))
    return text


def certificate(*extensions: x509.ExtensionType, days: int = 1) -> tuple[bytes, bytes]:
    """A certificate that has signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), pem


def put(folder: Path, pair: tuple[bytes, bytes]) -> None:
    for name, content in zip(("tls.crt", "tls.key"), pair, strict=True):
        (folder / name).write_bytes(content)


# What can be used.


@pytest.mark.parametrize(("name", "role"), [("node", tls.NODE), ("master", tls.MASTER), ("operator", tls.OPERATOR)])
def test_a_folder_of_certificates_is_read(pki: Path, name: str, role: str) -> None:
    assert tls.Certificates(pki / name, role).current() == files(pki / name)


def test_a_certificate_may_have_several_roles(folder: Path) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("x.example"), x509.DNSName(tls.MASTER), x509.DNSName(tls.NODE)])
    put(folder, certificate(names))
    for role in (tls.NODE, tls.MASTER):
        assert tls.Certificates(folder, role).current() == files(folder)


def test_a_chain_is_known_by_its_first_certificate(pki: Path) -> None:
    chain = pki / "node" / "tls.crt"
    chain.write_bytes(chain.read_bytes() + (pki / "ca.crt").read_bytes())
    assert tls.Certificates(pki / "node", tls.NODE).current().certificate == chain.read_bytes()


def test_an_expired_certificate_is_used_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(folder, certificate(x509.SubjectAlternativeName([x509.DNSName(tls.NODE)]), days=-1))
    assert tls.Certificates(folder, tls.NODE).current() == files(folder)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{folder}/tls.crt has expired: ")


# What cannot.


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"{folder}/{name}: No such file or directory: {HOW}"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none/ca.crt: No such file or directory: {HOW}"


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_a_folder_for_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder) == f"{folder}/{name}: Is a directory: {HOW}"


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", bytes(range(256)), b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"],
    ids=["nothing", "text", "bytes", "damaged"],
)
def test_what_is_no_pem_is_one_line(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    text = refusal(folder)
    assert text.startswith(f"{folder}: not certificates and a key in PEM (")
    assert text.endswith(f"): {HOW}")


def test_a_key_with_a_passphrase_is_one_line(folder: Path) -> None:
    key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "tls.key").write_bytes(secret)
    assert refusal(folder).startswith(f"{folder}: not certificates and a key in PEM (")


def test_a_key_of_another_certificate_is_refused(pki: Path) -> None:
    shutil.copy(pki / "master" / "tls.key", pki / "node" / "tls.key")
    assert refusal(pki / "node") == f"{pki}/node: tls.key is not the key of tls.crt"


def test_a_certificate_for_another_role_is_refused(pki: Path) -> None:
    told = f"{pki}/master/tls.crt is for master.bpfrl: it must have the DNS name node.bpfrl"
    assert refusal(pki / "master", tls.NODE) == told
    told = f"{pki}/node/tls.crt is for node.bpfrl: it must have the DNS name master.bpfrl"
    assert refusal(pki / "node", tls.MASTER) == told


NAMELESS: dict[str, tuple[x509.ExtensionType, ...]] = {
    "no names": (),
    "no DNS names": (x509.SubjectAlternativeName([x509.RFC822Name(tls.NODE), x509.UniformResourceIdentifier("x:y")]),),
}


@pytest.mark.parametrize("extensions", NAMELESS.values(), ids=NAMELESS)
def test_a_certificate_without_a_role_is_refused(folder: Path, extensions: tuple[x509.ExtensionType, ...]) -> None:
    put(folder, certificate(*extensions))
    assert refusal(folder) == f"{folder}/tls.crt is for nothing: it must have the DNS name node.bpfrl"


def test_a_certificate_with_damaged_names_is_one_line(folder: Path) -> None:
    damaged = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x7f")
    put(folder, certificate(damaged))
    assert refusal(folder).endswith(HOW)


# Changed files.


def test_changed_files_are_read_again_and_that_is_told_once(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    certificates = tls.Certificates(pki / "node", tls.NODE)
    before = certificates.current()
    assert certificates.current() is before
    assert caplog.messages == []

    authority.init(pki, 30, renew=True)
    after = certificates.current()
    assert after == files(pki / "node") != before
    assert certificates.current() is after
    assert caplog.messages == [f"read the changed certificates in {pki / 'node'}"]


def test_a_server_puts_certificates_in_place_only_where_they_have_changed(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda *found, **_: made.append(found))
    tls.server_credentials(tls.Certificates(pki / "node", tls.NODE))
    [(first, changed)] = made
    assert first
    assert [changed(), changed()] == [None, None]
    authority.init(pki, 30, renew=True)
    assert changed()
    assert changed() is None


def test_a_mounted_secret_that_is_swapped_is_read_again(pki: Path, tmp_path: Path) -> None:
    """The kubelet writes a new folder and moves a link to it."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shutil.copytree(pki / "node", mounted / "..1")
    (mounted / "..data").symlink_to("..1")
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (mounted / name).symlink_to(f"..data/{name}")
    certificates = tls.Certificates(mounted, tls.NODE)
    authority.init(pki, 30, renew=True)
    shutil.copytree(pki / "node", mounted / "..2")
    assert certificates.current() == files(mounted / "..1")
    (mounted / "..new").symlink_to("..2")
    (mounted / "..new").rename(mounted / "..data")
    assert certificates.current() == files(mounted / "..2")


BAD: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "a missing file": lambda folder: (folder / "ca.crt").unlink(),
    "half a file": lambda folder: (folder / "tls.crt").write_bytes((folder / "tls.crt").read_bytes()[:300]),
    "a key that is ahead of its certificate": lambda folder: shutil.copy(
        folder.parent / "master" / "tls.key", folder / "tls.key"
    ),
    "another role": lambda folder: shutil.copytree(folder.parent / "master", folder, dirs_exist_ok=True),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_while_files_cannot_be_used_those_read_before_are(
    pki: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any]
) -> None:
    certificates = tls.Certificates(pki / "node", tls.NODE)
    before = certificates.current()
    spoil(pki / "node")
    assert certificates.current() is before
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"going on with the certificates read before: {pki / 'node'}")
    assert record.message.isprintable()

    shutil.rmtree(pki / "node", ignore_errors=True)
    authority.init(pki, 30)
    assert certificates.current() == files(pki / "node") != before


def test_a_file_of_the_same_size_and_time_in_anothers_place_is_seen(pki: Path) -> None:
    """A restored backup has old times: the inode tells."""
    certificates = tls.Certificates(pki / "node", tls.NODE)
    old = pki / "node" / "ca.crt"
    status = old.stat()
    new = old.with_name("new")
    new.write_bytes(old.read_bytes()[:-1] + b" ")
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(old)
    assert certificates.current().authority == old.read_bytes()


# Names, roles and places.


def test_names_are_the_dns_names(pki: Path) -> None:
    for pem, expected in (
        ((pki / "node" / "tls.crt").read_bytes(), ["node.bpfrl"]),
        ((pki / "ca.crt").read_bytes(), []),
        (certificate(x509.SubjectAlternativeName([x509.RFC822Name("a@b")]))[0], []),
        (certificate(x509.SubjectAlternativeName([x509.DNSName("a"), x509.DNSName("b")]))[0], ["a", "b"]),
    ):
        assert tls.names(x509.load_pem_x509_certificate(pem)) == expected


def shown(**names: list[bytes]) -> dict[str, list[bytes]]:
    """What gRPC tells of a certificate with these names: each kind by itself, and all of them together."""
    return names | {"x509_subject_alternative_name": [name for each in names.values() for name in each]}


@pytest.mark.parametrize(
    ("context", "roles"),
    [
        ({}, []),
        ({"x509_common_name": [b"master.bpfrl"], "x509_subject": [b"CN=master.bpfrl"]}, []),
        (shown(peer_dns=[b"master.bpfrl"]), ["master.bpfrl"]),
        (shown(peer_dns=[b"a", b"b"]), ["a", "b"]),
        (shown(peer_dns=[b"\xff"]), ["\ufffd"]),
        (shown(peer_uri=[b"master.bpfrl"]), []),
        (shown(peer_email=[b"master.bpfrl"], peer_dns=[b"other.example"]), ["other.example"]),
    ],
    ids=["nothing", "a common name", "one", "two", "no text", "a URI is no role", "a mail address is no role"],
)
def test_a_peers_roles_are_in_its_certificates_names(context: dict[str, list[bytes]], roles: list[str]) -> None:
    assert tls.peer_roles(context) == roles


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_is_where_no_other_machine_is(host: str) -> None:
    assert tls.is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "fe80::1", "localhost.example", "127.0.0.1.example", "lo"],  # noqa: S104
)
def test_everywhere_else_is_not_loopback(host: str) -> None:
    assert not tls.is_loopback(host)


# What a node listens with.


def test_grpc_is_given_certificates_only_when_they_have_changed(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each that it is given, it frees what handshakes under way may be about to use."""
    asked: list[Callable[[], Any]] = []
    monkeypatch.setattr(grpc, "ssl_server_certificate_configuration", lambda pairs, roots: (*pairs, roots))
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda _, fetch, **__: asked.append(fetch))
    tls.server_credentials(tls.Certificates(pki / "node", tls.NODE))
    [change] = asked
    assert [change() for _ in range(3)] == [None] * 3
    authority.init(pki, 30, renew=True)
    ca, certificate, key = files(pki / "node")
    assert change() == ((key, certificate), ca)
    assert [change() for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("damage", [lambda key: key[:-40], lambda key: key[:60] + b"!" + key[60:]])
def test_a_damaged_key_is_told_without_what_is_in_it(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    key = (folder / "tls.key").read_bytes()
    (folder / "tls.key").write_bytes(damage(key))
    assert key.splitlines()[1].decode()[:20] not in refusal(folder)
