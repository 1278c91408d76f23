"""A Kubernetes API to run against, twice over: one interface, two servers.

:class:`StandIn` is :mod:`bench.standin` in a process of its own: it starts at once, needs nothing installed, and can be
made to fail in the ways that networks and API servers do. :class:`RealApi` is etcd and kube-apiserver; what holds with
it holds in a cluster. A test that takes an :class:`Api` runs with both.

Both listen on one address, where wanted in a network namespace, with a certificate of an authority of their own and one
bearer token; :attr:`Api.kubeconfig` tells clients all of it. What they store outlives :meth:`Api.stop` and
:meth:`Api.kill`, and is gone with their processes and files when the context ends.

    with StandIn() as api:
        pod = api.create_pod("web", annotations={"example.org/colour": "green"})
        api.delete_pod("web")
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import http.client
import ipaddress
import itertools
import json
import os
import random
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bpfrl import libc

Json = dict[str, Any]

MERGE_PATCH: Final = "application/merge-patch+json"

# The stand-in is started as a module of this checkout.
_ROOT: Final = Path(__file__).resolve().parent.parent
_CONTEXT: Final = "test"
_CONTROL_PLANE: Final = Path("/usr/local/kubebuilder/bin")
_ASSETS: Final = ("etcd", "kube-apiserver", "kubectl")
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_REQUEST_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.05
_LOG_LINES: Final = 20
# Below the ports that the kernel gives to clients: a client that retries while the server is down would some day be
# connected to itself, and keep the server off its port.
_PORTS: Final = range(20_000, 32_000)
# For benchmarks (RFC 2544): nobody has such an address.
_POD_NETWORK: Final = ipaddress.IPv4Network("198.18.0.0/15")
_LOOPBACK: Final = "127.0.0.1"
_OK: Final = 200
_FIRST_ERROR: Final = 400


class ApiError(Exception):
    """The server has refused a request.

    Attributes:
        code: the HTTP status.
        reason: the machine-readable reason, such as AlreadyExists.
        message: what the server says of it.
    """

    def __init__(self, code: int, message: str, reason: str = "") -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.message = message
        self.reason = reason


class Api(ABC):
    """A server and how to reach it; see the module's text for its life.

    Attributes:
        address: the address that it listens on.
        port: the TCP port, the same after every restart.
        token: the bearer token that it accepts.
        namespace: the network namespace that it runs in (a name under /run/netns), None for the caller's.
        folder: where its keys, logs and data are.
        kubeconfig: the file that tells clients the rest.
    """

    def __init__(self, address: str = _LOOPBACK, namespace: str | None = None) -> None:
        self.address = address
        self.namespace = namespace
        self.token = secrets.token_hex(16)
        self._undo = contextlib.ExitStack()
        self._server: _Process | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        """Make keys and files, and start the server."""
        with contextlib.ExitStack() as undo:
            self.folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="kubeapi-")))
            # Sockets belong to the namespace of the thread that makes them, so one thread makes them all.
            self._worker = undo.enter_context(ThreadPoolExecutor(1, initializer=_enter, initargs=(self.namespace,)))
            self.port = self._free_port()
            _write_certificates(self.folder, self.address)
            self._trust = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
            self._connection = self._new_connection()
            undo.callback(self._connection.close)
            self.kubeconfig = self.folder / "kubeconfig"
            self._write_kubeconfig()
            self._prepare(undo)
            undo.callback(self.kill)
            self.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process and remove every file."""
        self._undo.close()

    @abstractmethod
    def _prepare(self, undo: contextlib.ExitStack) -> None:
        """Set up what outlives a restart of the server."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server's command line."""

    def start(self) -> None:
        """Start the server, and return when it is ready.

        Raises:
            RuntimeError: it has not become ready; the text ends with its last words.
        """
        if self._server is None or self._server.ended():
            self._server = self._spawn("server", self._command())
            self._await_ready(self._server, "/readyz")

    def stop(self) -> None:
        """End the server as a service manager does, with SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash does, with SIGKILL."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server and start it again."""
        self.stop()
        self.start()

    @property
    def pid(self) -> int:
        """The server's process.

        Raises:
            RuntimeError: it does not run.
        """
        if self._server is None:
            raise RuntimeError("it does not run")
        return self._server.pid

    def _end(self, signum: signal.Signals) -> None:
        if self._server is not None:
            self._server.end(signum)
            self._server = None
        self._worker.submit(self._connection.close).result()

    def request(
        self, method: str, path: str, body: Json | None = None, content_type: str = "application/json", **query: object
    ) -> Json:
        """Make one request and return the object that it is answered with.

        Raises:
            ApiError: the server has refused it.
            OSError: there is no server.
        """
        return self._worker.submit(self._exchange, method, _target(path, query), body, content_type).result()

    @contextlib.contextmanager
    def watch(self, path: str, seconds: float = _REQUEST_SECONDS, **query: object) -> Iterator[Iterator[Json]]:
        """Watch a collection: the events as they come, up to the end of the stream.

        Args:
            path: the collection's path.
            seconds: how long to wait for each event.
            query: parameters besides `watch`.

        Raises:
            ApiError: the server has refused it.
            TimeoutError: no event has come in time.
            OSError: there is no server, or the connection is broken.
            http.client.HTTPException: the stream has no proper end.
        """
        connection = self._new_connection(seconds)
        with contextlib.closing(connection):
            response = self._worker.submit(
                self._send, connection, "GET", _target(path, {"watch": True, **query}), None, ""
            ).result()
            with contextlib.closing(response):
                if response.status != _OK:
                    raise _refusal(response.status, response.read())
                yield map(json.loads, _lines(response))

    def create_pod(
        self,
        name: str,
        *,
        uid: str | None = None,
        namespace: str = "default",
        node: str = "node-1",
        host_ip: str | None = None,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        phase: str = "Running",
        host_network: bool = False,
    ) -> Json:
        """Create a pod and report its status, as a kubelet would.

        Args:
            name: the pod's name.
            uid: its UID; a real API server ignores it and gives one of its own, which the result tells.
            namespace: its namespace.
            node: the node that it is scheduled on, empty for none.
            host_ip: the node's address; also the pod's with `host_network`.
            annotations: its annotations.
            labels: its labels.
            phase: its phase; a pending pod has no address.
            host_network: whether it shares the node's network.

        Returns:
            The pod as the server has stored it.
        """
        metadata = {"name": name, "uid": uid, "annotations": dict(annotations or {}), "labels": dict(labels or {})}
        spec = {
            "nodeName": node,
            "hostNetwork": host_network,
            "containers": [{"name": "main", "image": "example.org/main:1"}],
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {key: value for key, value in metadata.items() if value},
            "spec": {key: value for key, value in spec.items() if value},
        }
        self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        own_ip = str(_POD_NETWORK[next(self._numbers) % _POD_NETWORK.num_addresses])
        pod_ip = host_ip if host_network else own_ip
        status = {"phase": phase, "hostIP": host_ip, "podIP": None if phase == "Pending" else pod_ip}
        return self._patch_pod(name, namespace, {"status": status}, "/status")

    def annotate(self, name: str, annotations: Mapping[str, str | None], namespace: str = "default") -> Json:
        """Set annotations of a pod; None removes one."""
        return self._patch_pod(name, namespace, {"metadata": {"annotations": dict(annotations)}})

    def label(self, name: str, labels: Mapping[str, str | None], namespace: str = "default") -> Json:
        """Set labels of a pod; None removes one."""
        return self._patch_pod(name, namespace, {"metadata": {"labels": dict(labels)}})

    def set_phase(self, name: str, phase: str, namespace: str = "default") -> Json:
        """Report another phase of a pod."""
        return self._patch_pod(name, namespace, {"status": {"phase": phase}}, "/status")

    def delete_pod(self, name: str, namespace: str = "default") -> Json:
        """Delete a pod at once, without the grace period for which a kubelet would be needed."""
        return self.request("DELETE", _pod_path(name, namespace), gracePeriodSeconds=0)

    def events(self, uid: str) -> list[Json]:
        """The events about the object with this UID."""
        found: list[Json] = self.request("GET", "/api/v1/events", fieldSelector=f"involvedObject.uid={uid}")["items"]
        return found

    def lease(self, namespace: str, name: str) -> Json:
        """A lease as it is now."""
        return self.request("GET", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{name}")

    def _patch_pod(self, name: str, namespace: str, patch: Json, part: str = "") -> Json:
        return self.request("PATCH", _pod_path(name, namespace) + part, patch, MERGE_PATCH)

    def _new_connection(self, seconds: float = _REQUEST_SECONDS) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.address, self.port, timeout=seconds, context=self._trust)

    def _exchange(self, method: str, target: str, body: Json | None, content_type: str) -> Json:
        reused = self._connection.sock is not None
        try:
            response = self._send(self._connection, method, target, body, content_type)
            content = response.read()
        except (ConnectionError, http.client.HTTPException):
            self._connection.close()
            if not reused:
                raise
            # The server has closed the idle connection, which a client notices only now.
            return self._exchange(method, target, body, content_type)
        if response.status >= _FIRST_ERROR:
            raise _refusal(response.status, content)
        answer: Json = json.loads(content)
        return answer

    def _send(
        self,
        connection: http.client.HTTPSConnection,
        method: str,
        target: str,
        body: Json | None,
        content_type: str,
    ) -> http.client.HTTPResponse:
        headers = {"Authorization": f"Bearer {self.token}"}
        if body is not None:
            headers["Content-Type"] = content_type
        connection.request(method, target, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def _in_namespace(self, command: Sequence[str]) -> list[str]:
        # Not `ip netns exec`: it mounts a new /sys.
        return [*(["nsenter", f"--net={_namespace_path(self.namespace)}"] if self.namespace else []), *command]

    def _spawn(self, name: str, command: Sequence[str]) -> _Process:
        return _Process(self._in_namespace(command), self.folder / f"{name}.log")

    def _free_port(self) -> int:
        return self._worker.submit(_free_port, self.address).result()

    def _await_ready(self, process: _Process, path: str, port: int | None = None) -> None:
        """Return when a process answers a GET with 200."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._worker.submit(self._answers, path, port).result():
            if process.ended() or time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {process.last_words()}")
            time.sleep(_POLL_SECONDS)

    def _answers(self, path: str, port: int | None) -> bool:
        connection = self._new_connection() if port is None else http.client.HTTPConnection(_LOOPBACK, port)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            with contextlib.closing(connection.getresponse()) as response:
                return response.status == _OK
        return False

    def _write_kubeconfig(self) -> None:
        authority = base64.b64encode((self.folder / "ca.crt").read_bytes()).decode()
        cluster = {"server": f"https://{self.address}:{self.port}", "certificate-authority-data": authority}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": _CONTEXT, "cluster": cluster}],
            "users": [{"name": _CONTEXT, "user": {"token": self.token}}],
            "contexts": [{"name": _CONTEXT, "context": {"cluster": _CONTEXT, "user": _CONTEXT}}],
            "current-context": _CONTEXT,
        }
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(content))


class StandIn(Api):
    """The stand-in server; its options are those of :mod:`bench.standin`."""

    def __init__(
        self,
        address: str = _LOOPBACK,
        namespace: str | None = None,
        *,
        history: int | None = None,
        bookmark_interval: float | None = None,
    ) -> None:
        super().__init__(address, namespace)
        self._options = {"--history": history, "--bookmark-interval": bookmark_interval}

    def _prepare(self, undo: contextlib.ExitStack) -> None:
        pass

    def _command(self) -> list[str]:
        options: dict[str, object | None] = {
            "--address": self.address,
            "--port": self.port,
            "--tls-cert": self.folder / "server.crt",
            "--tls-key": self.folder / "server.key",
            "--token": self.token,
            "--journal": self.folder / "journal",
            **self._options,
        }
        given = itertools.chain.from_iterable((key, str(value)) for key, value in options.items() if value is not None)
        return [sys.executable, "-m", "bench.standin", *given]

    def faults(self, **fault: object) -> None:
        """Make the server fail: `stall=True`, `drop=True`, `status={"code": 429, "count": 5}` and so on."""
        self.request("POST", "/faults", fault)

    def counters(self) -> dict[str, dict[str, int]]:
        """How many requests were served, by resource and verb; also `refused` ones and `watching` now."""
        return self.request("GET", "/faults")


class RealApi(Api):
    """etcd and kube-apiserver. Restarts are the API server's; etcd runs as long as the context lasts.

    Nothing else of a cluster is there: no controllers, scheduler, kubelets or service accounts. Any namespace may be
    used without creating it.
    """

    def _prepare(self, undo: contextlib.ExitStack) -> None:
        self._etcd_port, peer_port = self._free_port(), self._free_port()
        client, peer = f"http://{_LOOPBACK}:{self._etcd_port}", f"http://{_LOOPBACK}:{peer_port}"
        etcd = _asset("etcd")
        command = [
            etcd,
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        ]
        help_text = subprocess.run([etcd, "--help"], capture_output=True, text=True, check=False)
        if "--unsafe-no-fsync" in help_text.stdout + help_text.stderr:
            command.append("--unsafe-no-fsync")
        process = self._spawn("etcd", command)
        undo.callback(process.end, signal.SIGKILL)
        self._await_ready(process, "/health", self._etcd_port)
        (self.folder / "tokens.csv").write_text(f'{self.token},test,test,"system:masters"\n')
        _write_key(self.folder / "service-accounts.key", ec.generate_private_key(ec.SECP256R1()))

    def _command(self) -> list[str]:
        accounts_key = self.folder / "service-accounts.key"
        return [
            _asset("kube-apiserver"),
            f"--etcd-servers=http://{_LOOPBACK}:{self._etcd_port}",
            f"--bind-address={self.address}",
            f"--secure-port={self.port}",
            # A namespace may have no address to advertise but the loopback's, which is refused.
            "--advertise-address=192.0.2.1",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=192.0.2.0/24",
            f"--cert-dir={self.folder}",
            f"--tls-cert-file={self.folder / 'server.crt'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--anonymous-auth=false",
            "--authorization-mode=AlwaysAllow",
            "--disable-admission-plugins=ServiceAccount,NamespaceLifecycle",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={accounts_key}",
            f"--service-account-signing-key-file={accounts_key}",
        ]

    def compact(self) -> None:
        """Drop etcd's history. The API server's own memory of it goes with the next restart."""
        key = base64.b64encode(b"\0").decode()
        revision = self._worker.submit(self._etcd, "range", {"key": key}).result()["header"]["revision"]
        self._worker.submit(self._etcd, "compaction", {"revision": revision, "physical": True}).result()

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl on this server and return its output.

        Raises:
            subprocess.CalledProcessError: it has failed.
        """
        options = ["--kubeconfig", str(self.kubeconfig), "--cache-dir", str(self.folder / "kubectl")]
        command = self._in_namespace([_asset("kubectl"), *options, *arguments])
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_START_SECONDS).stdout

    def _etcd(self, call: str, body: Json) -> Json:
        connection = http.client.HTTPConnection(_LOOPBACK, self._etcd_port, timeout=_REQUEST_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", f"/v3/kv/{call}", json.dumps(body))
            with contextlib.closing(connection.getresponse()) as response:
                content = response.read()
        if response.status != _OK:
            raise RuntimeError(f"etcd {call}: {content.decode()}")
        answer: Json = json.loads(content)
        return answer


def real_assets() -> Path | None:
    """Where etcd, kube-apiserver and kubectl are; None if one of them is missing."""
    folder = Path(os.environ.get("KUBEBUILDER_ASSETS") or _CONTROL_PLANE)
    return folder if all(os.access(folder / name, os.X_OK) for name in _ASSETS) else None


def _asset(name: str) -> str:
    folder = real_assets()
    if folder is None:
        raise RuntimeError(f"{', '.join(_ASSETS)} are neither in $KUBEBUILDER_ASSETS nor in {_CONTROL_PLANE}")
    return str(folder / name)


class _Process:
    """A process of ours, and what it has said."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=_ROOT
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def ended(self) -> bool:
        return self._child.poll() is not None

    def last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def end(self, signum: signal.Signals) -> None:
        """Send a signal, and have the process be gone."""
        self._child.send_signal(signum)
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _namespace_path(namespace: str) -> str:
    return f"/run/netns/{namespace}"


def _enter(namespace: str | None) -> None:
    """Move this thread into a network namespace."""
    if namespace is not None:
        descriptor = os.open(_namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc.setns(descriptor, libc.CLONE_NEWNET)
        finally:
            os.close(descriptor)


def _free_port(address: str) -> int:
    while True:
        port = random.choice(_PORTS)  # noqa: S311  # no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port


def _target(path: str, query: Mapping[str, object]) -> str:
    """A request's target. Booleans are written as Kubernetes reads them."""
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in query.items()}
    return f"{path}?{urllib.parse.urlencode(words)}" if words else path


def _pod_path(name: str, namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods/{name}"


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """A response's lines as they come. Reading it by lines would take a broken connection for the end."""
    rest = b""
    while block := response.read1():
        *lines, rest = (rest + block).split(b"\n")
        yield from lines


def _refusal(code: int, content: bytes) -> ApiError:
    """What a refused request comes to; not all of them are answered with a Status."""
    try:
        status = json.loads(content)
        return ApiError(code, status["message"], status.get("reason", ""))
    except (ValueError, KeyError, TypeError):
        return ApiError(code, content.decode(errors="replace").strip())


def _write_certificates(folder: Path, address: str) -> None:
    """Make an authority, and a server certificate by it: ca.crt, server.crt and server.key."""
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name, server_name = _name("kubeapi-ca"), _name("kubeapi")
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    addresses = {ipaddress.ip_address(_LOOPBACK), ipaddress.ip_address(address)}
    names = [x509.DNSName("localhost"), *map(x509.IPAddress, addresses)]
    server = (
        _certificate(server_name, authority_name, server_key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / "server.key", server_key)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Clocks may be set, by bench.faults: what expires is not to be this.
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=3650))
    )


def _write_key(file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    file.touch(mode=0o600)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
