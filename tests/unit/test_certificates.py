from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from cryptography import x509

from bpfrl.errors import ApiError, CertificateError
from bpfrl.master import certificates
from bpfrl.master.api import Api
from bpfrl.rpc import authority, tls
from tests.unit.fakes import Handler, api_server, run

NAMESPACE = "limits"
NAMES = [certificates.AUTHORITY, *authority.SECRETS]
FOLDER = f"/api/v1/namespaces/{NAMESPACE}/secrets"


class Secrets:
    """The part of the API server that keeps Secrets.

    Attributes:
        kept: by name.
        changes: each request that was not a GET: its method, and the Secret.
        before: what is called with each request's method and the Secret's name before it is answered.
    """

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.changes: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda _method, _name: None

    def put(self, secret: dict[str, Any]) -> None:
        """Keep a Secret under a version of its own."""
        metadata = secret["metadata"] | {"resourceVersion": str(len(self.changes) + 100)}
        self.kept[metadata["name"]] = secret | {"metadata": metadata}

    def data(self) -> dict[str, Any]:
        return {name: secret["data"] for name, secret in self.kept.items()}

    def file(self, name: str, file: str) -> bytes:
        return base64.b64decode(self.kept[name]["data"][file], validate=True)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.text() or "{}")
        name = body["metadata"]["name"] if body else request.path.rpartition("/")[2]
        assert request.path == (FOLDER if request.method == "POST" else f"{FOLDER}/{name}")
        self.before(request.method, name)
        if request.method == "GET":
            return web.json_response(self.kept.get(name, {}), status=200 if name in self.kept else 404)
        present = self.kept.get(name, {"metadata": {}})
        expected = present["metadata"].get("resourceVersion")
        if body["metadata"].get("resourceVersion") != expected:
            return web.json_response({"message": "changed meanwhile"}, status=409)
        assert "type" not in present or present["type"] == body["type"]
        self.changes.append((request.method, name))
        self.put(body)
        return web.json_response(self.kept[name])


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


def keep(secrets: Secrets, days: int = 30, *, renew: bool = False, answer: Handler | None = None) -> set[str]:
    """Which were made just now; all of them are told of, in order."""

    async def work() -> list[tuple[str, bool]]:
        async with api_server(answer or secrets.answer) as client:
            return await certificates.keep(Api(client), NAMESPACE, days, renew=renew)

    results = run(work())
    assert [name for name, _ in results] == NAMES
    return {name for name, made in results if made}


def expiry(secrets: Secrets, name: str) -> timedelta:
    certificate = x509.load_pem_x509_certificate(secrets.file(name, "tls.crt"))
    return certificate.not_valid_after_utc - datetime.now(UTC)


def usable(secrets: Secrets, folder: Path) -> None:
    """Each role's Secret, mounted, is what its daemon takes."""
    roles = {"bpfrl-node": tls.NODE, "bpfrl-master": tls.MASTER}
    own = x509.load_pem_x509_certificate(secrets.file(certificates.AUTHORITY, "tls.crt"))
    for name, role in roles.items():
        mounted = folder / name
        mounted.mkdir(parents=True, exist_ok=True)
        for file in secrets.kept[name]["data"]:
            (mounted / file).write_bytes(secrets.file(name, file))
        bundle = tls.Certificates(mounted, role).current()
        assert bundle.authority == secrets.file(certificates.AUTHORITY, "tls.crt")
        x509.load_pem_x509_certificate(bundle.certificate).verify_directly_issued_by(own)


def test_where_nothing_is_everything_is_made_and_then_kept(secrets: Secrets, tmp_path: Path) -> None:
    assert keep(secrets) == set(NAMES)
    assert secrets.changes == [("POST", name) for name in NAMES]
    usable(secrets, tmp_path)
    before = secrets.data()
    assert keep(secrets) == set()
    assert secrets.changes == [("POST", name) for name in NAMES]
    assert secrets.data() == before


def test_the_authoritys_key_is_in_its_own_secret_alone(secrets: Secrets) -> None:
    keep(secrets)
    key = secrets.file(certificates.AUTHORITY, "tls.key")
    others = [value for name in authority.SECRETS for value in secrets.data()[name].values()]
    assert base64.b64encode(key).decode() not in others
    assert {secret["type"] for secret in secrets.kept.values()} == {"kubernetes.io/tls"}


def test_what_is_about_to_expire_is_made_anew_by_the_same_authority(secrets: Secrets, tmp_path: Path) -> None:
    keep(secrets)
    own = secrets.data()[certificates.AUTHORITY]
    aged(secrets, "bpfrl-node", tmp_path)
    assert expiry(secrets, "bpfrl-node") < timedelta(days=1)
    assert keep(secrets) == {"bpfrl-node"}
    assert expiry(secrets, "bpfrl-node") > timedelta(days=29)
    assert secrets.data()[certificates.AUTHORITY] == own
    usable(secrets, tmp_path / "mounted")


def aged(secrets: Secrets, name: str, folder: Path) -> None:
    """Put a certificate of the same authority into a Secret that has less than a third of its time left."""
    for file, key in (("ca.crt", "tls.crt"), ("ca.key", "tls.key")):
        (folder / file).write_bytes(secrets.file(certificates.AUTHORITY, key))
    own, key_ = authority._load_authority(folder)
    role = authority.SECRETS[name]
    (folder / role).mkdir()
    authority._make_certificate(folder / role, own, key_, *authority._ROLES[role], timedelta(minutes=1))
    data = {file: (folder / role / file).read_bytes() for file in ("ca.crt", "tls.crt", "tls.key")}
    secrets.put(authority.secret(name, NAMESPACE, data))


def test_all_roles_are_made_anew_where_that_is_wanted(secrets: Secrets) -> None:
    keep(secrets)
    before = secrets.data()
    assert keep(secrets, 90, renew=True) == set(authority.SECRETS)
    assert secrets.data()[certificates.AUTHORITY] == before[certificates.AUTHORITY]
    assert all(secrets.data()[name] != before[name] for name in authority.SECRETS)
    assert expiry(secrets, "bpfrl-master") > timedelta(days=89)


@pytest.mark.parametrize("data", [None, {}, {"tls.crt": "", "tls.key": "AAAA"}, {"ca.crt": "bm9uZQ=="}])
def test_a_damaged_secret_is_replaced_and_keeps_what_else_it_says(
    secrets: Secrets, data: dict[str, str] | None, tmp_path: Path
) -> None:
    keep(secrets)
    foreign = secrets.kept["bpfrl-master"]
    foreign |= {"type": "Opaque", "data": data}
    foreign["metadata"]["labels"] = {"team": "net"}
    assert keep(secrets) == {"bpfrl-master"}
    assert secrets.changes[-1] == ("PUT", "bpfrl-master")
    assert secrets.kept["bpfrl-master"]["type"] == "Opaque"
    assert secrets.kept["bpfrl-master"]["metadata"]["labels"] == {"team": "net"}
    usable(secrets, tmp_path)


def test_a_lost_authority_is_replaced_and_everything_with_it(secrets: Secrets, tmp_path: Path) -> None:
    keep(secrets)
    del secrets.kept[certificates.AUTHORITY]
    assert keep(secrets) == set(NAMES)
    usable(secrets, tmp_path)


def test_a_damaged_authority_is_one_line_and_changes_nothing(secrets: Secrets) -> None:
    keep(secrets)
    secrets.kept[certificates.AUTHORITY]["data"]["tls.key"] = secrets.data()["bpfrl-node"]["tls.key"]
    before = secrets.data()
    with pytest.raises(CertificateError) as caught:
        keep(secrets)
    assert str(caught.value) == (
        "secret/bpfrl-ca is no authority (bpfrl-ca: ca.key is not the key of ca.crt): delete it for a new one"
    )
    assert secrets.data() == before


@pytest.mark.parametrize("at", NAMES)
def test_two_at_once_agree_on_one_authority(secrets: Secrets, tmp_path: Path, at: str) -> None:
    other = Secrets()
    keep(other)

    def overtake(method: str, name: str) -> None:
        if (method, name) == ("POST", at) and at not in secrets.kept:
            for secret in other.kept.values():
                secrets.put(secret)

    secrets.before = overtake
    made = keep(secrets)
    assert secrets.data()[certificates.AUTHORITY] == other.data()[certificates.AUTHORITY]
    # Whoever was before the other one has its own roles replaced: they are of another authority.
    assert made == set()
    usable(secrets, tmp_path)


def test_who_is_overtaken_again_and_again_gives_up(secrets: Secrets) -> None:
    def touch(method: str, name: str) -> None:
        if method == "GET" and name == NAMES[-1]:
            secrets.kept.pop(name, None)
        if method == "POST":
            secrets.put(authority.secret(name, NAMESPACE, {}))

    keep(secrets)
    secrets.before = touch
    with pytest.raises(ApiError, match="409"):
        keep(secrets)


def test_a_refusal_is_told(secrets: Secrets) -> None:
    async def refuse(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"message": 'cannot get resource "secrets"'}, status=403)

    with pytest.raises(ApiError, match='403 Forbidden: cannot get resource "secrets"'):
        keep(secrets, answer=refuse)


def test_they_are_the_secrets_that_certs_secrets_prints(secrets: Secrets, tmp_path: Path) -> None:
    authority.init(tmp_path, 30)
    printed = list(yaml.safe_load_all(authority.secrets(tmp_path, NAMESPACE)))
    keep(secrets)
    for secret in printed:
        kept = secrets.kept[secret["metadata"]["name"]]
        assert (kept["type"], set(kept["data"])) == (secret["type"], set(secret["data"]))


def test_no_level_of_the_log_has_a_key(
    secrets: Secrets, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    keep(secrets)
    secrets.kept["bpfrl-node"]["data"]["tls.crt"] = ""
    keep(secrets)
    keep(secrets, renew=True)
    secrets.kept[certificates.AUTHORITY]["data"]["tls.crt"] = "AAAA"
    with pytest.raises(CertificateError) as caught:
        keep(secrets)
    said = "".join((str(caught.value), caplog.text, *capsys.readouterr()))
    for name in NAMES:
        key = secrets.file(name, "tls.key").decode()
        assert "PRIVATE KEY" in key
        lines = [line for line in key.splitlines() if not line.startswith("-")]
        assert not [part for part in (*lines, secrets.kept[name]["data"]["tls.key"][:80]) if part in said]
