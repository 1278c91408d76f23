"""``bpfrl explain``: whom it asks, and what it makes of who does not answer; tests/e2e has the real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bpfrl import cgroup
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cli import cli
from bpfrl.commands import explain as command
from bpfrl.commands.options import LocalNode
from bpfrl.errors import (
    ApiError,
    CertificateError,
    ClusterError,
    CompilerError,
    PermissionDeniedError,
    RefusedError,
    UnreachableError,
)
from bpfrl.explanation import Report, Request
from bpfrl.limits import PodRef
from bpfrl.master import api, inquiry
from bpfrl.node import explain as local
from bpfrl.node.agent import Agent
from bpfrl.rpc import tls
from bpfrl.rpc.client import NodeClient
from tests.unit.fakes import BUILD, UID
from tests.unit.test_explanation import ASKING, BARE, HELD, NOTHING, UNPLACED, WHOLE

pytestmark = pytest.mark.usefixtures("logs")

LOOPBACK = "127.0.0.1"


@dataclass
class World:
    """Who can be asked, and what they say; an exception is raised.

    Attributes:
        request: the API server's answer.
        here: this machine's.
        there: a node's daemon's.
        limiters: of whichever of the two is asked.
        asked: who was asked for what.
    """

    request: Request | Exception | None = None
    here: Report | Exception = BARE
    there: Report | Exception = HELD
    limiters: list[Status | Broken] = field(default_factory=list)
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def say(self, answer: Any, *question: object) -> Any:
        self.asked.append(question)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    played = World()

    class Client:
        async def close(self) -> None:
            played.asked.append(("closed",))

    async def connect(kubeconfig: Path | None, context: str | None) -> Client:
        played.say(None, "connect", kubeconfig, context)
        if isinstance(played.request, ClusterError):
            raise played.request
        return Client()

    async def by_uid(_: object, uid: str) -> Any:
        return played.say(played.request, "uid", uid)

    async def by_name(_: object, namespace: str, name: str) -> Any:
        return played.say(played.request, "name", namespace, name)

    async def explain(client: NodeClient, uid: str) -> Any:
        return played.say(played.there, "node", client.target, uid)

    async def list_(client: NodeClient) -> Any:
        return played.say(played.limiters, "list", client.target)

    monkeypatch.setattr(api, "connect", connect)
    monkeypatch.setattr(inquiry, "by_uid", by_uid)
    monkeypatch.setattr(inquiry, "by_name", by_name)
    monkeypatch.setattr(NodeClient, "explain", explain)
    monkeypatch.setattr(NodeClient, "list", list_)
    monkeypatch.setattr(Agent, "limiters", lambda _: played.say(played.limiters, "limiters"))
    monkeypatch.setattr(local, "examine", lambda _agent, _tree, uid: played.say(played.here, "here", uid))
    monkeypatch.setattr(LocalNode, "tree", lambda _: None)
    monkeypatch.setattr(generator, "build", lambda: BUILD)
    monkeypatch.setattr(api, "namespace_of", lambda *_: "default")
    for name in ("BPFRL_CERTS", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    return played


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(cli, ["explain", *map(str, arguments)], prog_name="bpfrl")


def verdict(result: Result) -> str:
    """The last line."""
    assert result.stderr == ""
    *_, last = result.stdout.splitlines()
    return last.removeprefix("verdict: ")


def failure(result: Result, code: int) -> str:
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    line = result.stderr.removesuffix("\n")
    assert line.isprintable(), line
    return line


# What cannot be meant.

WHICH = "which pod? use one of POD, --pod-uid UID and --cgroup PATH"
USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), WHICH),
    "a name and a uid": (("web", "--pod-uid", UID), WHICH),
    "a name and a cgroup": (("web", "--cgroup", "/x"), WHICH),
    "a uid and a cgroup": (("--pod-uid", UID, "--cgroup", "/x"), WHICH),
    "a namespace alone": (("-n", "shop"), WHICH),
    "a namespace with a uid": (("-n", "shop", "--pod-uid", UID), "--namespace goes with POD"),
    **{
        f"a cgroup and {option[0]}": (("--cgroup", "/x", *option), "--cgroup is one of this machine, and nobody else")
        for option in (
            ("--node", "127.0.0.1", "--insecure"),
            ("--manifests", "x"),
            ("--kubeconfig", "x"),
            ("--certs", "x"),
        )
    },
    "no cgroup": (("--cgroup", "/nonexistent"), "'/nonexistent' is no cgroup"),
    "trust in everybody and somebody": (("web", "--certs", "x", "--insecure"), "use one of --certs DIR and"),
    "a node without trust": (("web", "--node", "192.0.2.1"), "--node needs --certs DIR (bpfrl certs init makes one"),
    "no TLS beyond loopback": (
        ("web", "--node", "h", "--insecure"),
        "--insecure is for loopback only: h needs",
    ),
    "a cluster and manifests": (("web", "--manifests", "x", "--kubeconfig", "y"), "--manifests takes the place of an"),
    "two pods": (("web", "cart"), "unexpected extra argument"),
    "no uid": (("--pod-uid", "web"), "'web' is no pod UID"),
    "no port": (("web", "--node", "h:x", "--insecure"), "'h:x' is no node's address: write it as ADDRESS"),
    "port 0": (("web", "--node", "h:0", "--insecure"), "is no node's address"),
    "an empty port": (("web", "--node", "h:", "--insecure"), "is no node's address"),
    "a high port": (("web", "--node", "h:65536", "--insecure"), "is no node's address"),
    "no host": (("web", "--node", ":10002", "--insecure"), "is no node's address"),
    "an odd host": (("web", "--node", "a b", "--insecure"), "is no node's address"),
    "no such form": (("web", "-o", "table"), "'table' is not one of 'text', 'json', 'yaml'"),
    "no such port": (("web", "--node-port", "0"), "0 is not in the range 1<=x<=65535"),
}


@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line(world: World, arguments: Sequence[str], advice: str) -> None:
    assert advice in failure(run(*arguments), 2)
    assert world.asked == []


# Whom it asks.


def test_a_pod_of_this_machine_needs_no_daemon(world: World) -> None:
    world.request = ASKING.__class__(ASKING.pod, UID, "node-1", LOOPBACK, "Running", limits=ASKING.limits)
    world.here = HELD
    result = run("-n", "shop", "cart", "--kubeconfig", "/k", "--context", "c")
    assert verdict(result) == "limited as asked: egress 10mbit"
    assert result.exit_code == 0
    assert world.asked == [("connect", Path("/k"), "c"), ("name", "shop", "cart"), ("closed",), ("here", UID)]


@pytest.mark.parametrize("named", ["", "shop"])
def test_the_namespace_is_the_kubeconfigs_where_there_is_one(
    world: World, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    def namespace_of(kubeconfig: Path | None, context: str | None) -> str:
        assert (kubeconfig, context) == (None, "c")
        if not named:
            raise ClusterError("no kubeconfig")
        return named

    monkeypatch.setattr(api, "namespace_of", namespace_of)
    world.request = UNPLACED
    run("cart", "--context", "c")
    assert ("name", named or "default", "cart") in world.asked


def test_a_pod_elsewhere_is_asked_for_at_its_node(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.request = ASKING
    shown: list[tuple[Path, str]] = []
    monkeypatch.setattr(tls, "Certificates", lambda folder, role: shown.append((folder, role)))
    result = run("--pod-uid", UID, "--certs", "/c", "--node-port", "99")
    assert verdict(result) == "limited as asked: egress 10mbit"
    assert (shown, world.asked[-1]) == ([(Path("/c"), tls.OPERATOR)], ("node", "192.0.2.1:99", UID))


def test_a_pod_elsewhere_that_nobody_may_be_asked_for_says_how(world: World) -> None:
    world.request = ASKING
    result = run("--pod-uid", UID)
    assert verdict(result) == (
        "NOT known to be limited although it asks for egress 10mbit:"
        " node 192.0.2.1:10002 is another machine: --certs DIR asks its daemon"
    )
    assert result.exit_code == 1


def test_a_node_that_is_named_is_asked_wherever_the_pod_is(world: World) -> None:
    world.request = UNPLACED
    assert verdict(run("--pod-uid", UID, "--node", LOOPBACK, "--insecure")) == "limited as asked: egress 10mbit"
    assert world.asked[-1] == ("node", "127.0.0.1:10002", UID)
    run("--pod-uid", UID, "--node", "[::1]:7", "--insecure")
    assert world.asked[-1] == ("node", "[::1]:7", UID)


def test_manifests_take_the_place_of_an_api_server(world: World, tmp_path: Path) -> None:
    world.here = HELD
    manifest = "kind: Pod\nmetadata: {name: NAME, namespace: shop, uid: UID, labels: {rate: 10M}}\n"
    (tmp_path / "pod.yaml").write_text(manifest.replace("UID", UID).replace("NAME", "cart"))
    for name in (("-n", "shop", "cart"), ("--pod-uid", UID)):
        found = run(*name, "--manifests", tmp_path)
        assert verdict(found).startswith(
            "limited to something else: egress 10mbit, although it asks for egress 10mbit,"
        )
        assert world.asked.pop() == ("here", UID)
    assert failure(run("cart", "--manifests", tmp_path), 1) == f"bpfrl: {tmp_path} has no pod default/cart"
    assert world.asked == []


def test_a_pod_on_no_node_is_nobodys_to_ask_for(world: World) -> None:
    world.request = UNPLACED
    assert verdict(run("cart")).endswith("asks for egress 10mbit: it is on no node yet")
    world.request = Request(ASKING.pod, UID, "node-1", "", "Pending", limits=ASKING.limits)
    assert "node node-1 has told no address for it yet (--node names one)" in verdict(run("cart"))
    assert not [question for question in world.asked if question[0] in ("here", "node")]


@pytest.mark.parametrize("error", [ClusterError("no cluster at all"), ApiError("the API server does not answer")])
def test_without_an_api_server_what_the_node_knows_is_told(world: World, error: Exception) -> None:
    world.request, world.here = error, HELD
    result = run("--pod-uid", UID)
    assert verdict(result) == "limited: egress 10mbit"
    assert str(error) in result.stdout
    assert "shop/cart, by its limiter's word" in result.stdout
    assert result.exit_code == 0


def test_without_an_api_server_limiters_say_whose_they_are(world: World) -> None:
    world.request, world.here = ClusterError("no cluster"), HELD
    world.limiters = [Broken(UID, "odd"), WHOLE]
    assert verdict(run("-n", "shop", "cart")) == "limited: egress 10mbit"
    assert world.asked[-2:] == [("limiters",), ("here", UID)]
    assert verdict(run("-n", "shop", "cart", "--node", LOOPBACK, "--insecure")) == "limited: egress 10mbit"
    assert world.asked[-2:] == [("list", "127.0.0.1:10002"), ("node", "127.0.0.1:10002", UID)]


def test_without_an_api_server_or_a_limiter_nobody_knows_the_name(world: World) -> None:
    world.request = ClusterError("no cluster")
    line = failure(run("-n", "shop", "cart"), 1)
    assert line.startswith("bpfrl: no limiter of this machine is for a pod shop/cart")
    assert "--pod-uid" in line


@pytest.mark.usefixtures("world")
def test_a_name_that_the_cluster_does_not_have_is_an_error() -> None:
    assert failure(run("-n", "shop", "cart"), 1) == "bpfrl: the cluster has no pod shop/cart"


def test_a_uid_that_the_cluster_does_not_have_may_still_be_limited(world: World) -> None:
    world.here = HELD
    result = run("--pod-uid", UID)
    assert verdict(result) == "limited to egress 10mbit although the cluster has no such pod"
    assert result.exit_code == 1


UNANSWERED: dict[str, tuple[Exception, str]] = {
    "down": (
        UnreachableError("node 127.0.0.1:10002: refused"),
        "node 127.0.0.1:10002 does not answer: refused",
    ),
    "old": (
        RefusedError("Method not found!", "UNIMPLEMENTED"),
        "node 127.0.0.1:10002 cannot explain: its bpfrl is older than this one",
    ),
    "refuses": (
        RefusedError("the certificate is for nothing", "PERMISSION_DENIED"),
        "node 127.0.0.1:10002 cannot explain: the certificate is for nothing",
    ),
    "certificates": (CertificateError("/c/tls.crt: no such file"), "/c/tls.crt: no such file"),
}


@pytest.mark.parametrize(("error", "text"), UNANSWERED.values(), ids=UNANSWERED)
def test_a_node_that_does_not_answer_is_a_part_of_the_explanation(world: World, error: Exception, text: str) -> None:
    world.request, world.there = ASKING, error
    result = run("--pod-uid", UID, "--node", LOOPBACK, "--insecure")
    assert verdict(result) == f"NOT known to be limited although it asks for egress 10mbit: {text}"
    assert result.exit_code == 1


def test_a_kernel_that_this_user_may_not_ask_is_a_part_of_it_too(world: World) -> None:
    world.request, world.here = ClusterError("no cluster"), PermissionDeniedError("cannot look: this needs root")
    told = verdict(run("--pod-uid", UID))
    assert told.startswith("nothing is known of it: no cluster; cannot look: this needs root (or --node ADDRESS")


def test_programs_get_a_document(world: World) -> None:
    world.request = NOTHING
    result = run("--pod-uid", UID, "--node", LOOPBACK, "--insecure", "-o", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"]["as_asked"] is False
    assert run("--pod-uid", UID, "-o", "yaml").stdout.startswith("pod:\n")


def test_without_a_compiler_only_the_build_is_not_known(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bytes:
        raise CompilerError("no clang")

    monkeypatch.setattr(generator, "build", fail)
    world.request, world.here = ClusterError("no cluster"), HELD
    assert verdict(run("--pod-uid", UID)) == "limited: egress 10mbit"


def test_a_cgroup_is_asked_for_here(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def examine(_: Agent, path: Path) -> tuple[PodRef, Report]:
        assert path == tmp_path
        return PodRef("cgroup-7"), BARE

    monkeypatch.setattr(cgroup, "check", lambda path: path)
    monkeypatch.setattr(local, "examine_cgroup", examine)
    result = run("--cgroup", tmp_path)
    assert verdict(result) == "not limited: nobody has attached a limiter to this cgroup"
    assert (result.exit_code, world.asked) == (0, [])


@pytest.mark.parametrize(
    ("address", "own"), [(LOOPBACK, True), ("::1", True), ("192.0.2.1", False), ("no host", False)]
)
def test_an_address_is_this_machines_if_it_can_be_bound(address: str, own: bool) -> None:
    assert command._is_own(address) is own
