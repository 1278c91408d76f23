"""bpfrl list beyond this node: with nodes and an API server on loopback."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest
import yaml
from click.testing import CliRunner, Result

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cli import cli
from bpfrl.limits import Limits, PodRef
from bpfrl.master.annotations import EGRESS
from bpfrl.rpc import authority, messages, node_pb2, tls
from bpfrl.rpc.node_pb2_grpc import NodeServicer, add_NodeServicer_to_server
from bpfrl.units import Rate
from tests.unit.fakes import uid_of

pytestmark = pytest.mark.usefixtures("logs", "settings")

TRUST = "use one of --certs DIR (bpfrl certs init makes them) and, on loopback only, --insecure"
SLOW = Limits(Rate(10**6))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the operator's."""
    for name in ("BPFRL_CERTS", "KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command's own, which would stay


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(cli, ["list", *map(str, arguments)], prog_name="bpfrl")


def failure(result: Result, code: int) -> str:
    """The one line that a failed command has said, without its end."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.isprintable(), result.stderr
    assert line.startswith("bpfrl")
    return line


def success(result: Result) -> str:
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stderr == ""
    return result.stdout


def rows(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


# Nodes.


class Node(NodeServicer):
    """A node's daemon on loopback.

    Attributes:
        found: what it has.
        port: where it listens.
        roles: of whom has asked.
        ill: it answers with nothing but an error.
    """

    def __init__(self) -> None:
        self.found: list[Status | Broken] = []
        self.port = 0
        self.roles: list[list[str]] = []
        self.ill = False

    def Attach(self, *_: object) -> Any:  # noqa: N802
        raise AssertionError("a list changes nothing")

    def Update(self, *_: object) -> Any:  # noqa: N802
        raise AssertionError("a list changes nothing")

    def Detach(self, *_: object) -> Any:  # noqa: N802
        raise AssertionError("a list changes nothing")

    def Explain(self, *_: object) -> Any:  # noqa: N802
        raise AssertionError("a list asks for no reasons")

    def List(self, _: node_pb2.ListRequest, context: Any) -> Any:  # noqa: N802
        self.roles.append(tls.peer_roles(context.auth_context()))
        if self.ill:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it is ill")
        return node_pb2.ListReply(limiters=map(messages.from_limiter, self.found))

    def give(self, number: int, limits: Limits = SLOW, *, sent: int = 0) -> None:
        """Let it have a limiter for the pod with this number."""
        pod = PodRef(uid_of(number), "shop", f"cart-{number}")
        self.found.append(Status(pod, limits, Counters(passed_bytes=sent), Counters(), 4_711, time.time() - 90))


@contextmanager
def serving(node: Node, certificates: tls.Certificates | None = None) -> Iterator[Node]:
    with ThreadPoolExecutor(2) as workers:
        server = grpc.server(workers)
        add_NodeServicer_to_server(node, server)
        if certificates:
            node.port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(certificates))
        else:
            node.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield node
        finally:
            server.stop(0).wait()


@pytest.fixture
def node() -> Iterator[Node]:
    with serving(Node()) as served:
        yield served


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that nobody else gets, and where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_nodes_limiters_are_shown_as_its_own_list_does(node: Node) -> None:
    node.give(0)
    node.found.append(Broken("f" * 32, "attach or detach was cut off: repeat it"))
    place = f"127.0.0.1:{node.port}"
    header, limiter, broken = rows(success(run("--node", place, "--insecure")))
    assert header[:3] == ["UID", "POD", "EGRESS"]
    assert limiter[:3] == [uid_of(0), "shop/cart-0", "1mbit"]
    assert limiter[-1] == "1m"
    assert broken == [f"broken: {place}: {'f' * 32}: attach or detach was cut off: repeat it"]
    header, limiter, _ = rows(success(run("--node", place, "--insecure", "-o", "wide")))
    assert (header[2], limiter[2], limiter[-1]) == ("NODE", place, "id=4711")
    text = success(run("--node", place, "--insecure", "-o", "json"))
    assert [(item["uid"], item["node"]) for item in json.loads(text)["items"]] == [
        (uid_of(0), place),
        ("f" * 32, place),
    ]
    assert yaml.safe_load(success(run("--node", place, "--insecure", "-o", "yaml")))["items"][0]["uid"] == uid_of(0)
    names = success(run("--node", place, "--insecure", "-o", "name"))
    assert names == f"pod/{uid_of(0)}\npod/{'f' * 32}\n"


def test_a_nodes_port_is_the_usual_one_unless_it_is_named(node: Node) -> None:
    node.give(0)
    for place in ("127.0.0.1", "localhost"):
        assert uid_of(0) in success(run("--node", place, "--node-port", str(node.port), "--insecure"))
    assert uid_of(0) in success(run("--node", f"127.0.0.1:{node.port}", "--node-port", "1", "--insecure"))


def test_several_nodes_are_shown_in_their_order_or_sorted(node: Node) -> None:
    node.give(1, sent=5)
    with serving(Node()) as other:
        other.give(0, sent=4)
        other.give(2, sent=6)
        options = ("--insecure", *(x for each in (node, other) for x in ("--node", f"127.0.0.1:{each.port}")))

        def order(*more: str) -> list[str]:
            return [line[1] for line in rows(success(run(*options, *more)))[1:]]

        assert order() == ["shop/cart-1", "shop/cart-0", "shop/cart-2"]
        assert order("--sort-by", "name") == ["shop/cart-0", "shop/cart-1", "shop/cart-2"]
        assert order("--sort-by", "sent") == ["shop/cart-2", "shop/cart-1", "shop/cart-0"]
        text = success(run(*options, "--sort-by", "sent", "-o", "json"))
        assert [item["name"] for item in json.loads(text)["items"]] == ["cart-2", "cart-1", "cart-0"]


def test_a_node_that_does_not_answer_is_a_line_and_the_others_are_shown(node: Node, closed_port: int) -> None:
    node.give(0)
    places = (f"127.0.0.1:{closed_port}", f"127.0.0.1:{node.port}")
    for form in ("table", "wide", "json", "yaml", "name"):
        result = run("--insecure", "-o", form, *(x for place in places for x in ("--node", place)))
        assert result.exit_code == 1
        assert uid_of(0) in result.stdout
        [line] = result.stderr.splitlines()
        assert line.startswith(f"bpfrl: node {places[0]}: ")
        assert "Connection refused" in line


def test_nodes_without_limiters_are_no_error(node: Node) -> None:
    result = run("--insecure", "--node", f"127.0.0.1:{node.port}")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no pods are limited there\n")


def test_an_operators_certificate_is_shown(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Node(), tls.Certificates(pki / "node", tls.NODE)) as secure:
        secure.give(0)
        place = f"127.0.0.1:{secure.port}"
        assert uid_of(0) in success(run("--node", place, "--certs", pki / "operator"))
        assert secure.roles == [["operator.bpfrl"]]
        monkeypatch.setenv("BPFRL_CERTS", str(pki / "operator"))
        assert uid_of(0) in success(run("--node", place))
        told = f"bpfrl: {pki}/master/tls.crt is for master.bpfrl: it must have the DNS name operator.bpfrl"
        assert failure(run("--node", place, "--certs", pki / "master"), 1) == told
        line = failure(run("--node", place, "--certs", pki / "nothing"), 1)
        assert line.startswith(f"bpfrl: {pki}/nothing/ca.crt: No such file or directory")


def test_a_stranger_is_not_asked(pki: Path, tmp_path: Path) -> None:
    authority.init(tmp_path / "foreign", 30)
    with serving(Node(), tls.Certificates(tmp_path / "foreign" / "node", tls.NODE)) as secure:
        secure.give(0)
        place = f"127.0.0.1:{secure.port}"
        line = failure(run("--node", place, "--certs", pki / "operator"), 1)
        assert line.startswith(f"bpfrl: node {place}: ")
        assert secure.roles == []


# What cannot be meant.

USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "no certificate": (("--node", "127.0.0.1"), TRUST),
    "no certificate for a cluster": (("-A",), TRUST),
    "no TLS beyond loopback": (("--node", "10.0.0.1", "--insecure"), "--insecure is for loopback only: 10.0.0.1 needs"),
    "nodes and a cluster": (("--node", "127.0.0.1", "-A"), "--node asks nodes alone, and -A, -n and -l a cluster"),
    "nodes and a namespace": (("--node", "127.0.0.1", "-n", "x"), "--node asks nodes alone"),
    "nodes and labels": (("--node", "127.0.0.1", "-l", "x"), "--node asks nodes alone"),
    "all namespaces and one": (("-A", "-n", "x"), "-A is all namespaces: leave out -n"),
    "certificates for here": (("--certs", "x"), "--certs goes with --node, -A, -n or -l"),
    "no TLS for here": (("--insecure",), "--insecure goes with --node, -A, -n or -l"),
    "a port for here": (("--node-port", "1"), "--node-port goes with --node, -A, -n or -l"),
    "a cluster for here": (("--kubeconfig", "x"), "--kubeconfig goes with --node, -A, -n or -l"),
    "a cluster for nodes": (("--kubeconfig", "x", "--node", "::1"), "--kubeconfig goes with -A, -n or -l"),
    "a context for nodes": (("--context", "x", "--node", "::1"), "--context goes with -A, -n or -l"),
    "sorted by what nobody knows": (("--sort-by", "colour"), "'colour' is not one of 'name', 'age', 'egress'"),
    "sorted by what passes now": (("--sort-by", "sending"), "is about what passes now: it goes with -w"),
    "watched as JSON": (("-w", "-o", "json", "-A"), "--watch draws tables: it does not go with -o json"),
}


@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line_that_says_what_to_do(arguments: Sequence[str], advice: str) -> None:
    line = failure(run(*arguments), 2)
    assert advice in line
    assert line.endswith("(see bpfrl list --help)")


@pytest.mark.parametrize(
    "place",
    [
        *("", ":", ":1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:x", "a b", "a/b", "10.0.0.1:1\n"),
        *("a..b", "[10.0.0.1]", "[::1", "::1]", "[::1]:", "[::1]x", "1:2:3", "[x]:1", "node\u00e4"),
    ],
    ids=ascii,
)
def test_an_address_that_is_none_is_one_line_with_the_forms(place: str) -> None:
    line = failure(run("--insecure", "--node", place), 2)
    assert "is no node's address: write it as ADDRESS, ADDRESS:PORT or [IPV6]:PORT" in line


@pytest.mark.parametrize("place", ["::1", "[::1]", "[::1]:7", "0:0::1"])
def test_an_ipv6_address_may_have_brackets(place: str) -> None:
    port = "7" if place.endswith(":7") else "9"
    line = failure(run("--insecure", "--node-port", "9", "--node", place), 1)
    assert line.startswith(f"bpfrl: node {place}: ")
    assert f"]:{port}" in line.replace("%5D", "]")


# A cluster.


class ApiServer:
    """An API server on loopback that knows some pods.

    Attributes:
        pods: the pods.
        asked: path and query of each request.
        status: what it answers with.
        url: where it is.
    """

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.status = 200
        self.url = ""

    def add(self, number: int, egress: str = "", *, namespace: str = "shop", node: str = "here", ip: str = "") -> None:
        """A pod of a node."""
        marks = {EGRESS: egress} if egress else {}
        metadata = {"name": f"cart-{number}", "namespace": namespace, "uid": uid_of(number), "annotations": marks}
        status = {"phase": "Running", "hostIP": ip or "127.0.0.1"}
        self.pods.append({"metadata": metadata, "spec": {"nodeName": node}, "status": status})


@pytest.fixture
def api() -> Iterator[ApiServer]:
    played = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target = urlsplit(self.path)
            played.asked.append((target.path, parse_qs(target.query)))
            found: dict[str, Any] = {"metadata": {"resourceVersion": "1"}, "items": played.pods}
            if played.status != 200:
                found = {"kind": "Status", "message": "unable to parse requirement"}
            body = json.dumps(found).encode()
            self.send_response(played.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        played.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield played
        server.shutdown()


@pytest.fixture
def cluster(api: ApiServer, node: Node, tmp_path: Path) -> tuple[str | Path, ...]:
    """The options for that API server, whose node is on loopback; its kubeconfig names a namespace in one context."""
    contexts = [
        {"name": "plain", "context": {"cluster": "it", "user": "me"}},
        {"name": "named", "context": {"cluster": "it", "user": "me", "namespace": "till"}},
    ]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "plain",
                "clusters": [{"name": "it", "cluster": {"server": api.url}}],
                "users": [{"name": "me", "user": {"token": "secret"}}],
                "contexts": contexts,
            }
        )
    )
    return ("--kubeconfig", kubeconfig, "--insecure", "--node-port", str(node.port))


def test_a_clusters_pods_are_shown_with_what_their_nodes_have(
    api: ApiServer, node: Node, cluster: tuple[str | Path, ...]
) -> None:
    api.add(0, "1M")
    api.add(1, "2M", namespace="till")
    api.add(2)
    api.add(3, "fast")
    node.give(0)
    node.give(2)
    node.give(9)
    header, *lines = rows(success(run(*cluster, "-A")))
    assert [*header[:4], header[-1]] == ["NAMESPACE", "POD", "NODE", "EGRESS", "STATE"]
    assert [[*line[:4], line[-1].partition(":")[0]] for line in lines] == [
        ["shop", "cart-0", "here", "1mbit", "ok"],
        ["shop", "cart-2", "here", "1mbit", "orphan"],
        ["shop", "cart-3", "here", "-", "invalid"],
        ["shop", "cart-9", "here", "1mbit", "orphan"],
        ["till", "cart-1", "here", "-", "pending"],
    ]
    states = {item["name"]: item["state"] for item in json.loads(success(run(*cluster, "-A", "-o", "json")))["items"]}
    assert states == {"cart-0": "ok", "cart-1": "pending", "cart-2": "orphan", "cart-3": "invalid", "cart-9": "orphan"}
    assert success(run(*cluster, "-A", "-o", "name")).split() == [f"pod/cart-{number}" for number in (0, 2, 3, 9, 1)]
    assert success(run(*cluster, "-A", "-o", "name", "--sort-by", "egress")).split()[-2:] == [
        "pod/cart-3",
        "pod/cart-1",
    ]


@pytest.mark.parametrize(
    ("options", "path", "labels", "columns"),
    [
        (("-A",), "/api/v1/pods", None, ["NAMESPACE", "POD"]),
        (("-A", "-l", "app=web"), "/api/v1/pods", ["app=web"], ["NAMESPACE", "POD"]),
        (("-n", "x"), "/api/v1/namespaces/x/pods", None, ["POD", "NODE"]),
        (("-n", "x", "-l", "!a"), "/api/v1/namespaces/x/pods", ["!a"], ["POD", "NODE"]),
        # As with kubectl: in the namespace of the kubeconfig.
        (("-l", "a"), "/api/v1/namespaces/default/pods", ["a"], ["POD", "NODE"]),
        (("-n", ""), "/api/v1/namespaces/default/pods", None, ["POD", "NODE"]),
        (("-l", "a", "--context", "named"), "/api/v1/namespaces/till/pods", ["a"], ["POD", "NODE"]),
    ],
)
def test_selectors_choose_pods(
    api: ApiServer,
    node: Node,
    cluster: tuple[str | Path, ...],
    options: tuple[str, ...],
    path: str,
    labels: list[str] | None,
    columns: list[str],
) -> None:
    api.add(0, "1M")
    node.give(0)
    header, line = rows(success(run(*cluster, *options)))
    assert header[:2] == columns
    assert line[-1] == "ok"
    [(asked, query)] = api.asked
    assert (asked, query.get("labelSelector")) == (path, labels)


def test_a_cluster_without_limits_is_no_error(api: ApiServer, cluster: tuple[str | Path, ...]) -> None:
    api.add(0)
    result = run(*cluster, "-A")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no pods are limited, or ask to be\n")
    result = run(*cluster, "-n", "x")
    assert result.stderr == "no pods are limited, or ask to be, in namespace x\n"
    assert json.loads(success(run(*cluster, "-A", "-o", "json"))) == {"items": []}


def test_a_clusters_silent_node_is_a_line_and_its_pods_are_shown(
    api: ApiServer, node: Node, cluster: tuple[str | Path, ...]
) -> None:
    api.add(0, "1M")
    api.add(1, "1M", node="there", ip="192.0.2.1")  # and without TLS, nothing is sent there
    node.give(0)
    result = run(*cluster, "-A")
    assert result.exit_code == 1
    assert [line[-1] for line in rows(result.stdout)[1:]] == [
        "ok",
        "unknown: asks for egress 1mbit, ingress unlimited",
    ]
    assert result.stderr == "bpfrl: node there: no TLS (--insecure) beyond loopback\n"


@pytest.mark.parametrize("options", [("-A",), ("-n", "x"), ("-l", "x"), ("-n", "x", "-l", "y")])
def test_without_a_cluster_there_are_no_namespaces_and_no_labels(options: tuple[str, ...], tmp_path: Path) -> None:
    line = failure(run("--insecure", *options), 2)
    assert f"{tmp_path}/home/.kube/config is not there (--kubeconfig names one, which -A, -n and -l need;" in line
    assert line.endswith("(see bpfrl list --help)")


def test_a_context_that_is_not_there_is_one_line(cluster: tuple[str | Path, ...]) -> None:
    assert "nowhere" in failure(run(*cluster, "-l", "x", "--context", "nowhere"), 2)


def test_an_api_server_that_refuses_is_one_line(api: ApiServer, cluster: tuple[str | Path, ...]) -> None:
    api.status = 400
    line = failure(run(*cluster, "-A", "-l", "a in"), 2)
    assert "--selector cannot be meant: the API server answers 400 Bad Request: unable to parse requirement" in line
    api.status = 403
    assert "the API server answers 403" in failure(run(*cluster, "-A"), 1)


def test_an_api_server_that_is_not_there_is_one_line(
    api: ApiServer, cluster: tuple[str | Path, ...], closed_port: int
) -> None:
    kubeconfig = Path(cluster[1])
    kubeconfig.write_text(kubeconfig.read_text().replace(api.url, f"http://127.0.0.1:{closed_port}"))
    assert failure(run(*cluster, "-A"), 1).startswith("bpfrl: no connection to the API server: ")


# Again and again.


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], object]]:
    """What happens after which look; the third is the last, by Ctrl-C."""
    meanwhile: dict[int, Callable[[], object]] = {}
    looks = iter(range(1, 4))

    def sleep(_: float) -> None:
        turn = next(looks)
        meanwhile.get(turn, lambda: None)()
        if turn == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    return meanwhile


def test_other_nodes_are_watched_and_a_silent_one_keeps_its_limiters(
    node: Node, turns: dict[int, Callable[[], object]]
) -> None:
    node.give(0)
    with serving(Node()) as other:
        other.give(1)
        turns[1] = lambda: setattr(other, "ill", True)
        turns[2] = lambda: setattr(other, "ill", False)
        places = [f"127.0.0.1:{each.port}" for each in (node, other)]
        result = run("--insecure", "-w", "-o", "wide", *(x for place in places for x in ("--node", place)))
    assert (result.exit_code, result.stderr) == (130, "\n")
    lines = rows(result.stdout)
    assert [line[4] for line in lines if line[0] == uid_of(0)] == ["-", "0bit", "0bit"]
    # Its node does not answer the second time; then the rate is over both turns.
    assert [line[4] for line in lines if line[0] == uid_of(1)] == ["-", "-", "0bit"]
    [told] = [line[0] for line in lines if line[0].startswith("node ")]
    assert told.startswith(f"node {places[1]}: ")
    assert lines.index([told]) == 6


def test_a_cluster_is_watched(
    api: ApiServer, node: Node, cluster: tuple[str | Path, ...], turns: dict[int, Callable[[], object]]
) -> None:
    api.add(0, "1M")
    turns[1] = lambda: node.give(0)
    result = run(*cluster, "-A", "-w", "--sort-by", "sending")
    assert result.exit_code == 130
    lines = [line for line in rows(result.stdout) if line[0] == "shop"]
    assert [line[-1].partition(":")[0] for line in lines] == ["pending", "ok", "ok"]
    assert [line[4] for line in lines] == ["-", "-", "0bit"]
    assert len(api.asked) == 1
