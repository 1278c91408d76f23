"""What the doctor finds over the network: certificates, nodes, and the API server."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from aiohttp import web
from cryptography.x509.oid import ExtendedKeyUsageOID

from bpfrl import __version__
from bpfrl.errors import ClusterError
from bpfrl.explanation import Report
from bpfrl.findings import Finding, Mark
from bpfrl.master import api, leader
from bpfrl.master import checks as cluster_checks
from bpfrl.rpc import authority, checks, tls
from tests.unit import test_client
from tests.unit.fakes import api_server, run
from tests.unit.test_client import Node

OK, WARNING, MISSING = Mark.OK, Mark.WARNING, Mark.MISSING


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority.init(folder, 90)
    authority.init(folder / "foreign", 90)
    return folder


@pytest.fixture
def pki(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "pki")


# Certificates.


@pytest.mark.parametrize(("name", "role"), [("node", tls.NODE), ("master", tls.MASTER), ("operator", tls.OPERATOR)])
def test_a_certificate_is_told_with_its_role_and_its_days(made: Path, name: str, role: str) -> None:
    found = checks.certificate(made / name)
    assert found.mark is OK
    assert found.found[0] == f"{made / name / 'tls.crt'}, for {role}"
    assert "for 89 days more" in found.found[1]


@pytest.mark.parametrize(
    ("days", "mark", "text"), [(29.0, WARNING, "for 28 days more"), (-1e-4, MISSING, "expired: it was")]
)
def test_a_certificate_that_expires_is_pointed_at(pki: Path, days: float, mark: Mark, text: str) -> None:
    own, key = authority._load_authority(pki)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    authority._make_certificate(pki / "master", own, key, tls.MASTER, usage, timedelta(days=days))
    found = checks.certificate(pki / "master")
    assert (found.mark, text in found.found[1], "certs init" in found.advice) == (mark, True, True)


def other_authority(pki: Path) -> None:
    shutil.copy(pki / "foreign" / "ca.crt", pki / "master" / "ca.crt")


def other_key(pki: Path) -> None:
    shutil.copy(pki / "node" / "tls.key", pki / "master" / "tls.key")


def no_role(pki: Path) -> None:
    own, key = authority._load_authority(pki)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    authority._make_certificate(pki / "master", own, key, "other.example", usage, timedelta(days=90))


def nothing(pki: Path) -> None:
    shutil.rmtree(pki / "master")


def garbage(pki: Path) -> None:
    (pki / "master" / "tls.crt").write_text("x")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (other_authority, "not issued by ca.crt beside it"),
        (other_key, "tls.key is not the key of tls.crt"),
        (no_role, "is for other.example"),
        (nothing, "No such file or directory"),
        (garbage, "Unable to load PEM file"),
    ],
)
def test_certificates_that_cannot_be_used_are_missing(pki: Path, damage: Callable[[Path], None], text: str) -> None:
    damage(pki)
    found = checks.certificate(pki / "master")
    assert found.mark is MISSING
    assert text in " ".join(found.found)
    assert "bpfrl certs init DIR" in found.advice


# Nodes.


def ask(node: Node, certificates: tls.Certificates | None = None, client: tls.Certificates | None = None) -> Finding:
    async def work() -> Finding:
        async with test_client.serving(node, certificates) as port:
            [found] = await checks.nodes([("127.0.0.1", port)], client)
            return found

    return asyncio.run(work())


def test_a_node_that_answers_is_told_with_its_version() -> None:
    found = ask(Node())
    assert (found.mark, found.found) == (OK, (f"answers, with bpfrl {__version__}",))
    assert found.name.startswith("node 127.0.0.1:")


def test_a_node_of_another_version_is_pointed_at() -> None:
    node = Node()
    node.report = Report("9.9")
    found = ask(node)
    assert (found.mark, found.found) == (WARNING, ("answers, with bpfrl 9.9",))
    assert found.advice == f"this bpfrl is {__version__}: upgrade the older one"


def test_a_node_that_is_too_old_to_explain_is_pointed_at() -> None:
    node = Node()
    node.refusal = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    found = ask(node)
    assert (found.mark, found.found) == (WARNING, ("answers, and is older than this bpfrl",))


def test_a_node_that_refuses_is_missing() -> None:
    node = Node()
    node.refusal = (grpc.StatusCode.PERMISSION_DENIED, "the certificate is for nothing")
    assert ask(node).found == ("answers, and refuses: the certificate is for nothing",)


def test_a_node_of_another_authority_is_missing(made: Path) -> None:
    shown = tls.Certificates(made / "node", tls.NODE)
    assert ask(Node(), shown, tls.Certificates(made / "master", tls.MASTER)).mark is OK
    found = ask(Node(), shown, tls.Certificates(made / "foreign" / "master", tls.MASTER))
    assert (found.mark, found.found[0][:33]) == (MISSING, "a TCP connection, and no answer: ")


def test_a_node_that_is_not_there_is_missing_beside_one_that_is() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def work() -> list[Finding]:
            async with test_client.serving(Node()) as other:
                return await checks.nodes([("127.0.0.1", port), ("127.0.0.1", other)], None)

        gone, there = asyncio.run(work())
    assert (gone.mark, "no TCP connection: " in gone.found[0]) == (MISSING, True)
    assert there.mark is OK


def test_a_node_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_CALL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        found = asyncio.run(checks.nodes([("127.0.0.1", mute.getsockname()[1])], None))
    assert found[0].found == ("a TCP connection, and no answer: it does not answer",)


# The API server.


class Server:
    """An API server that allows all but some, or answers with a status."""

    def __init__(
        self, denied: tuple[str, ...] = (), status: dict[str, int] | None = None, garbage: Sequence[str] = ()
    ) -> None:
        self.denied = denied
        self.garbage = garbage
        self.status = status or {}
        self.asked: list[dict[str, str]] = []

    def look(self, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
        async def work() -> list[Finding]:
            async with api_server(self._answer) as client:

                async def connect(*_: object) -> object:
                    return client

                monkeypatch.setattr(api, "connect", connect)
                return await cluster_checks.cluster(None, None)

        return run(work())

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if code := self.status.get(request.path):
            return web.json_response({"message": "played"}, status=code)
        if request.path in self.garbage:
            return web.Response(body=b"<html>\xff", content_type="text/html")
        if request.path == "/version":
            return web.json_response({"gitVersion": "v1.99.0"})
        review = json.loads(await request.text())
        attributes = review["spec"]["resourceAttributes"]
        self.asked.append(attributes)
        allowed = f"{attributes['verb']} {attributes['resource']}" not in self.denied
        return web.json_response({"status": {"allowed": allowed}}, status=201)


def test_an_api_server_that_allows_all_is_told_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    assert [(each.name, each.mark, each.found) for each in server.look(monkeypatch)] == [
        ("API server", OK, ("Kubernetes v1.99.0",)),
        ("RBAC", OK, ("may do what a master does: pods, events, its Lease",)),
    ]
    asked = [(each["verb"], each["resource"], each.get("name", "")) for each in server.asked]
    assert asked == [
        ("get", "pods", ""),
        ("list", "pods", ""),
        ("watch", "pods", ""),
        ("create", "events", ""),
        ("patch", "events", ""),
        ("create", "leases", ""),
        ("get", "leases", "bpfrl-master"),
        ("update", "leases", "bpfrl-master"),
    ]


def test_what_the_api_server_does_not_allow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = Server(denied=("watch pods", "create leases")).look(monkeypatch)
    assert (found.mark, found.found) == (MISSING, ("may not: watch pods, create leases",))


def test_rights_that_cannot_be_asked_for_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = Server(status={cluster_checks._REVIEWS: 404}).look(monkeypatch)
    assert (found.mark, found.found[0].startswith("not known: the API server answers 404")) == (WARNING, True)


def test_an_api_server_that_refuses_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = Server(status={"/version": 401}).look(monkeypatch)
    assert (found.name, found.mark, "401" in found.found[0]) == ("API server", MISSING, True)


@pytest.mark.parametrize("path", ["/version", cluster_checks._REVIEWS])
def test_something_that_is_no_api_server_is_missing(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    [found] = Server(garbage=[path]).look(monkeypatch)
    assert (found.name, found.mark) == ("API server", MISSING)


def test_the_lease_is_looked_for_where_a_master_of_this_pod_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "namespace").write_text("bandwidth\n")
    monkeypatch.setattr(leader, "_SERVICE_ACCOUNT_NAMESPACE", tmp_path / "namespace")
    server = Server()
    server.look(monkeypatch)
    assert [each["namespace"] for each in server.asked if each["resource"] == "leases"] == ["bandwidth"] * 3


@pytest.mark.parametrize("error", [ClusterError("no cluster to watch"), TimeoutError()])
def test_no_api_server_at_all_is_missing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(api, "connect", fail)
    [found] = run(cluster_checks.cluster(None, None))
    assert (found.mark, found.found[0]) == (MISSING, str(error) or "no answer within 10 s")
