from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient
from kubernetes.aio.config import incluster_config, kube_config

from bpfrl.errors import ApiError, ClusterError
from bpfrl.master import api as module
from bpfrl.master.api import Api, connect
from bpfrl.rpc import authority
from tests.unit.fakes import api_server, client_of, run, until

# Which cluster.


def write_kubeconfig(path: Path, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> Path:
    """A kubeconfig with two contexts, whose servers are named after the file."""
    servers = {"here": f"https://{path.stem}.example", "there": f"https://{path.stem}-there.example"}
    contexts = [{"name": name, "context": {"cluster": name, "user": "me"}} for name in servers]
    whole = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": name, "cluster": {"server": url} | (cluster or {})} for name, url in servers.items()],
        "users": [{"name": "me", "user": user or {"token": "secret"}}],
        "contexts": contexts,
    }
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that names no cluster at all."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def home(nothing: None, tmp_path: Path) -> None:  # noqa: ARG001 - it goes first
    """One whose user has a kubeconfig."""
    (tmp_path / "home" / ".kube").mkdir(parents=True)
    write_kubeconfig(tmp_path / "home.yaml").rename(tmp_path / "home" / ".kube" / "config")


@pytest.fixture
def pod(nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - it goes first
    """A pod with a service account."""
    authority.init(tmp_path / "authority", 1)
    [certificate, *_] = (tmp_path / "authority").rglob("ca.crt")
    (tmp_path / "token").write_text("of the pod")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")


@pytest.fixture
def environment_names_one(nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """One whose environment names a kubeconfig."""
    path = write_kubeconfig(tmp_path / "environment.yaml")
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))


async def server_of(kubeconfig: Path | None = None, context: str | None = None) -> str:
    """The cluster that is found."""
    client = await connect(kubeconfig, context)
    async with closing(client):
        return str(client.configuration.host)


@asynccontextmanager
async def closing(client: ApiClient) -> AsyncIterator[ApiClient]:
    try:
        yield client
    finally:
        await client.close()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("machine", "argument", "context", "server"),
    [
        (["home"], False, None, "https://home.example"),
        (["home"], False, "there", "https://home-there.example"),
        (["home", "pod"], False, None, "https://10.96.0.1:443"),
        (["home", "pod", "environment_names_one"], False, None, "https://environment.example"),
        (["home", "pod", "environment_names_one"], False, "there", "https://environment-there.example"),
        (["home", "pod", "environment_names_one"], True, None, "https://argument.example"),
        (["home", "pod", "environment_names_one"], True, "there", "https://argument-there.example"),
        # A context is one of a kubeconfig.
        (["home", "pod"], False, "there", "https://home-there.example"),
        (["pod"], True, None, "https://argument.example"),
    ],
)
def test_the_cluster_is_the_one_that_is_named_closest(
    machine: list[str], argument: bool, context: str | None, server: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for each in machine:
        request.getfixturevalue(each)
    path = write_kubeconfig(tmp_path / "argument.yaml") if argument else None
    assert run(server_of(path, context)) == server


@pytest.mark.usefixtures("pod")
def test_a_service_account_is_used_with_its_token() -> None:
    async def work() -> None:
        async with closing(await connect(None, None)) as client:
            settings: Any = await client.configuration.auth_settings()
            assert settings["BearerToken"]["value"] == "bearer of the pod"

    run(work())


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, ""),
        ("", ""),
        ("[]", ""),
        ("7", ""),
        ("apiVersion: v1", ""),
        ("a: [", ""),
        ("a: \tb\n- c", ""),
        ("current-context: here\ncontexts: []\nclusters: []\nusers: []", "here"),
    ],
)
def test_a_kubeconfig_that_names_no_cluster_is_told_in_one_line(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClusterError) as caught:
        run(server_of(path))
    assert problem in str(caught.value)
    assert_tells_what_to_do(caught.value)


def assert_tells_what_to_do(error: ClusterError) -> None:
    assert str(error).startswith("no cluster to watch: ")
    assert str(error).endswith("(--kubeconfig names one, --manifests does without)")
    assert str(error).isprintable()


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    "cluster",
    [
        {"certificate-authority": "/nowhere/ca.crt"},
        {"certificate-authority-data": "not base64"},
        {"certificate-authority-data": base64.b64encode(b"no certificate").decode()},
    ],
    ids=["missing", "no base64", "no certificate"],
)
def test_a_cluster_whose_certificate_cannot_be_read_is_told_in_one_line(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig", cluster)
    with pytest.raises(ClusterError) as caught:
        run(server_of(path))
    assert_tells_what_to_do(caught.value)


@pytest.mark.usefixtures("home")
def test_a_context_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(ClusterError, match="nowhere") as caught:
        run(server_of(context="nowhere"))
    assert_tells_what_to_do(caught.value)


@pytest.mark.usefixtures("nothing")
def test_without_any_cluster_it_says_how_to_name_one() -> None:
    with pytest.raises(ClusterError) as caught:
        run(server_of())
    assert_tells_what_to_do(caught.value)


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("missing", ["token", "authority"])
def test_a_pod_without_a_service_account_is_told_in_one_line(missing: str, tmp_path: Path) -> None:
    path = tmp_path / missing
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ClusterError) as caught:
        run(server_of())
    assert_tells_what_to_do(caught.value)


@pytest.mark.usefixtures("nothing")
def test_credentials_that_a_command_gives_out_are_kept_fresh(tmp_path: Path) -> None:
    """Those of managed clusters: such a token holds for a quarter of an hour."""
    count, script = tmp_path / "count", tmp_path / "login"
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "token-NUMBER", "expirationTimestamp": "2020-01-01T00:00:00Z"},
    }
    script.write_text(
        f"#!/bin/sh\necho >> {count}\nsed s/NUMBER/$(wc -l < {count})/ <<'END'\n{json.dumps(credential)}\nEND\n"
    )
    script.chmod(0o755)
    user = {"exec": {"apiVersion": credential["apiVersion"], "command": str(script)}}

    async def work() -> None:
        seen: list[str] = []

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            seen.append(request.headers["Authorization"])
            return web.json_response({})

        async with api_server(answer) as other:
            kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", {"server": other.configuration.host}, user)
            async with closing(await connect(kubeconfig, None)) as client:
                for _ in range(2):
                    async with Api(client).request("GET", "/api"):
                        pass
        assert seen[0].startswith("Bearer token-")
        assert seen[0] != seen[1]

    run(work())


# Requests.


def test_a_request_says_all_that_it_should() -> None:
    async def work() -> None:
        seen: list[tuple[str, dict[str, str], dict[str, str], str]] = []

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            headers = {name: request.headers[name] for name in ("Accept", "Content-Type", "Authorization")}
            seen.append((f"{request.method} {request.path}", dict(request.query), headers, await request.text()))
            return web.json_response({"answer": 42})

        async with api_server(answer) as client:
            client.configuration.api_key["BearerToken"] = "Bearer secret"
            query = {"fieldSelector": "spec.nodeName!=", "continue": "a+b/c=&d"}
            async with Api(client).request("GET", "/api/v1/pods", query) as response:
                assert await response.json() == {"answer": 42}
            async with Api(client).request(
                "PATCH", "/api/v1/x", body={"count": 2}, content_type="application/merge-patch+json"
            ):
                pass
        (first, second) = seen
        accept = {"Accept": "application/json", "Authorization": "Bearer secret"}
        assert first == ("GET /api/v1/pods", query, accept | {"Content-Type": "application/json"}, "")
        assert second[0] == "PATCH /api/v1/x"
        assert second[2] == accept | {"Content-Type": "application/merge-patch+json"}
        assert json.loads(second[3]) == {"count": 2}

    run(work())


def error_of(response: web.Response | None, timeout: aiohttp.ClientTimeout = module._CALL) -> ApiError:
    """What a request raises when this is the answer; None: there is none."""

    async def work() -> ApiError:
        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            if response is None:
                await asyncio.sleep(60)
            assert response
            return response

        async with api_server(answer) as client:
            with pytest.raises(ApiError) as caught:
                async with Api(client).request("GET", "/api", timeout=timeout):
                    raise AssertionError("there is no answer to read")
        return caught.value

    return run(work())


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (400, '{"message": "bad field"}', "the API server answers 400 Bad Request: bad field"),
        (401, '{"message": "Unauthorized"}', "the API server answers 401 Unauthorized: Unauthorized"),
        (403, "{}", "the API server answers 403 Forbidden"),
        (404, "<html>", "the API server answers 404 Not Found"),
        (410, '{"message": 7}', "the API server answers 410 Gone"),
        (500, "", "the API server answers 500 Internal Server Error"),
        (503, "[]", "the API server answers 503 Service Unavailable"),
        (599, '{"message": "' + "x" * 5000 + '"}', "the API server answers 599 : " + "x" * 300),
    ],
)
def test_a_refusal_keeps_its_status_and_its_reason(status: int, body: str, text: str) -> None:
    error = error_of(web.Response(status=status, text=body))
    assert (str(error), error.status, error.retry_after) == (text, status, 0.0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 1.0),
        ("120", 120.0),
        ("0", 0.0),
        ("", 0.0),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("nan", 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
    ],
)
def test_a_refusal_may_say_how_long_to_wait(header: str, seconds: float) -> None:
    assert error_of(web.Response(status=429, headers={"Retry-After": header})).retry_after == seconds


def test_an_answer_that_does_not_come_is_an_error() -> None:
    error = error_of(None, aiohttp.ClientTimeout(total=0.02))
    assert (str(error), error.status) == ("the API server does not answer", 0)


def test_a_request_waits_half_a_minute_unless_told_otherwise() -> None:
    timeout = inspect.signature(Api.request).parameters["timeout"].default
    assert timeout == module._CALL == aiohttp.ClientTimeout(total=30)


def test_no_server_at_all_is_an_error() -> None:
    async def work() -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            async with client_of(f"http://127.0.0.1:{closed.getsockname()[1]}") as client:
                with pytest.raises(ApiError, match=r"^no connection to the API server: .*[Cc]onnect") as caught:
                    async with Api(client).request("GET", "/api"):
                        pass
                assert caught.value.status == 0

    run(work())


def test_an_answer_that_breaks_off_is_an_error() -> None:
    async def work() -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b"{")
            assert request.transport
            request.transport.close()
            return response

        async with api_server(answer) as client:
            with pytest.raises(ApiError, match=r"^no connection to the API server: "):
                async with Api(client).request("GET", "/api") as response:
                    await response.read()

    run(work())


def test_an_answer_that_stops_halfway_is_an_error() -> None:
    async def work() -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await asyncio.sleep(60)
            return response

        async with api_server(answer) as client:
            timeout = aiohttp.ClientTimeout(total=None, sock_read=0.02)
            with pytest.raises(ApiError, match=r"^the API server does not answer$"):
                async with Api(client).request("GET", "/api", timeout=timeout) as response:
                    await response.read()

    run(work())


def test_credentials_that_cannot_be_refreshed_are_an_error() -> None:
    def refuse(_: object) -> None:
        raise config.ConfigException("Token file exists but empty.")

    async def work() -> None:
        async with client_of("http://127.0.0.1:1") as client:
            client.configuration.api_key["BearerToken"] = "Bearer of an hour ago"
            client.configuration.refresh_api_key_hook = refuse
            with pytest.raises(ApiError, match="Token file exists but empty"):
                async with Api(client).request("GET", "/api"):
                    pass

    run(work())


def test_what_goes_wrong_with_an_answer_elsewhere_is_no_error_of_the_api() -> None:
    async def work() -> None:
        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            return web.json_response({})

        async with api_server(answer) as client:
            with pytest.raises(ZeroDivisionError):
                async with Api(client).request("GET", "/api"):
                    raise ZeroDivisionError

    run(work())


def test_a_connection_is_given_back_however_a_request_ends() -> None:
    async def work() -> None:
        open_now = 0

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal open_now
            open_now += 1
            try:
                response = web.StreamResponse()
                await response.prepare(request)
                await asyncio.sleep(60)
                return response
            finally:
                open_now -= 1

        async with api_server(answer) as client:
            async with Api(client).request("GET", "/api"):
                await until(lambda: open_now == 1)
            await until(lambda: open_now == 0)

            async def ask() -> None:
                async with Api(client).request("GET", "/api") as response:
                    await response.read()

            asking = asyncio.create_task(ask())
            await until(lambda: open_now == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await until(lambda: open_now == 0)

    run(work())


@pytest.mark.usefixtures("pod")
def test_a_service_accounts_server_must_prove_itself() -> None:
    async def work() -> ssl.VerifyMode:
        async with closing(await connect(None, None)) as client:
            context: ssl.SSLContext = client.rest_client.ssl_context
            return context.verify_mode

    assert run(work()) is ssl.CERT_REQUIRED


# Which namespace.


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("current", "context", "namespace"),
    [("here", None, "shop"), ("there", None, "default"), ("here", "there", "default"), ("there", "here", "shop")],
)
def test_a_context_names_the_namespace(current: str, context: str | None, namespace: str, tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "kubeconfig")
    whole = yaml.safe_load(path.read_text())
    whole["current-context"] = current
    whole["contexts"][0]["context"]["namespace"] = "shop"
    path.write_text(yaml.safe_dump(whole))
    assert module.namespace_of(path, context) == namespace


@pytest.mark.usefixtures("home")
def test_without_more_said_it_is_the_users_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert module.namespace_of(None, None) == "default"
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(ClusterError, match="nowhere is not there"):
        module.namespace_of(None, None)


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("context", [None, "nowhere"])
@pytest.mark.parametrize("text", [None, "", "[]", "a: [", "contexts: 7", "contexts: [{name: nowhere}]"])
def test_a_namespace_that_is_not_named_is_told_in_one_line(
    text: str | None, context: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClusterError) as caught:
        module.namespace_of(path, context)
    assert str(caught.value).startswith("no namespace: ")
    assert str(caught.value).endswith(" (-n names one, -A is all of them)")
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("nothing")
def test_who_names_no_cluster_gets_the_callers_advice(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"is not there \(do something else\)$"):
        run(connect(tmp_path / "nowhere", None, "do something else"))


# What nobody is told.

TOKEN = "hunter2hunter2hunter2"  # noqa: S105 - it is nobody's


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    "text",
    [
        f"users:\n- name: me\n  user: {{token: {TOKEN}",
        f'users:\n- name: me\n  user:\n    token: "{TOKEN}\n',
        f"users:\n- name: me\n  user:\n    token: {TOKEN}: {TOKEN}\n",
        f"users:\n- user:\n    token: {TOKEN}\ncurrent-context: here\ncontexts: [{{name: here}}]",
        f"current-context: here\ncontexts: [{{name: here, context: {{cluster: a, user: {{token: {TOKEN}}}}}}}]",
        f"users: {TOKEN}",
    ],
)
def test_a_malformed_kubeconfig_is_told_without_what_is_secret_in_it(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "kubeconfig").write_text(text)
    with pytest.raises(ClusterError) as caught:
        run(server_of(tmp_path / "kubeconfig"))
    assert TOKEN not in str(caught.value) + caplog.text


@pytest.mark.parametrize("status", [200, 401, 500])
def test_no_level_of_the_log_has_the_token_nor_what_was_said(
    status: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"message": "no", "data": TOKEN}, status=status)

    async def work() -> None:
        async with api_server(answer) as client:
            client.configuration.debug = True
            client.configuration.api_key["BearerToken"] = f"Bearer {TOKEN}"
            try:
                async with Api(client).request("PUT", "/api/v1/x", body={"data": TOKEN}) as response:
                    await response.read()
            except ApiError as error:
                told.append(str(error))

    run(work())
    assert len(told) == (status != 200)
    assert TOKEN not in "".join((*told, caplog.text, *capsys.readouterr()))
