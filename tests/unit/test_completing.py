from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
import yaml
from aiohttp import web
from click.shell_completion import CompletionItem, ShellComplete
from click.testing import CliRunner

from bpfrl import cgroup
from bpfrl.bpf.limiter import Broken
from bpfrl.cli import cli
from bpfrl.commands import completing
from bpfrl.errors import ApiError, CgroupNotFoundError, ClusterError, PermissionDeniedError
from bpfrl.master import api, names
from bpfrl.master.names import Named
from bpfrl.node.agent import Agent
from tests.unit.conftest import make
from tests.unit.fakes import api_server, run
from tests.unit.test_cli import BROKEN, COMMAND, STATIC_UID, UID, WEB

ROOT = Path(__file__).parents[2]
# A second to find out, and what a busy machine takes to start Python.
SECONDS = 30.0
# What bash does when Tab is pressed, and then what it would offer.
PRESS_TAB = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_bpfrl_completion "$1"
printf '%s\n' "${COMPREPLY[@]}"
"""
POD_FOLDER = "kubepods.slice/kubepods-pod{}.slice"


def offered(*typed: str) -> dict[str, str]:
    """What is offered for the last of these words, with what is told about it, in this process."""
    shell = ShellComplete(cli, {}, "bpfrl", completing.VARIABLE)
    items: list[CompletionItem[str]] = shell.get_completions(list(typed[:-1]), typed[-1])
    return {item.value: item.help or "" for item in items}


def bash(*typed: str, **environment: str) -> list[str]:
    """What bash offers for the last word, as the installed command has it."""
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS_TAB, "bash", ROOT / "completions" / "bpfrl.bash", COMMAND, *typed],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert done.stderr == ""
    return done.stdout.split()


def ask(*typed: str, shell: str = "zsh", **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask the installed command, as a shell's script does."""
    question = {completing.VARIABLE: f"{shell}_complete", "COMP_WORDS": " ".join(["bpfrl", *typed])}
    return subprocess.run(
        [COMMAND],
        env=os.environ | question | {"COMP_CWORD": str(len(typed))} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with a limited pod, a broken limiter, and a pod without one; returns its cgroups' root."""
    found = [WEB, BROKEN]
    monkeypatch.setattr(Agent, "limiters", lambda _: found)
    monkeypatch.setattr(cgroup, "mount_point", lambda: tmp_path)
    for uid in (UID, other_uid()):
        make(tmp_path / POD_FOLDER.format(uid.replace("-", "_")))
    return tmp_path


def other_uid() -> str:
    return UID.replace("8c4a", "9d5b")


# The script.


@pytest.mark.parametrize("shell", completing.SHELLS)
def test_the_command_prints_each_shells_script(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell], prog_name="bpfrl")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == completing.script(cli, shell)
    assert f"{completing.VARIABLE}={shell}_complete" in result.stdout


def test_another_shell_is_a_mistake() -> None:
    result = CliRunner().invoke(cli, ["completion", "csh"], prog_name="bpfrl")
    assert result.exit_code == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in result.stderr
    with pytest.raises(ValueError, match="csh"):
        completing.script(cli, "csh")


def test_the_script_comes_without_that_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    result = CliRunner().invoke(cli, ["completion", "bash"], prog_name="bpfrl")
    assert (result.exit_code, result.stderr) == (0, "")


# What a real bash gets.


def test_bash_completes_commands_options_and_choices() -> None:
    assert bash("") == sorted(cli.commands)
    assert bash("at") == ["attach"]
    assert bash("attach", "--co") == ["--cooperate"]
    assert bash("list", "-o", "") == ["table", "wide", "json", "yaml", "name"]
    assert bash("list", "--output=wi") == ["wide"]
    assert bash("completion", "") == ["bash", "zsh", "fish"]


def test_fish_completes_too() -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not there")
    line = f"source {ROOT}/completions/bpfrl.fish; complete -C 'bpfrl completion '"
    environment = os.environ | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["fish", "--no-config", "-c", line],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert done.stdout.split() == ["bash", "fish", "zsh"]


def test_without_privileges_nothing_is_offered_and_nothing_said(tmp_path: Path) -> None:
    """Where there is no bpffs, and no cgroup below the root, either."""
    done = ask("--bpffs", str(tmp_path / "none"), "--cgroup-root", str(tmp_path), "detach", "--pod-uid", "")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "typed",
    [
        ("attach", "--bogus", ""),
        ("attach", "--pod-uid", "x", "--rate", "y", ""),
        ("--bpffs", "/nonexistent", "detach", "--pod-uid", ""),
        ("attach", "'--pod-uid", ""),
        ("serve-master", "--kubeconfig", "/nonexistent", "--context", ""),
        ("serve-master", "--kubeconfig", "/dev/null", "--context", ""),
        ("attach", "--cgroup", "/nonexistent/x/"),
        ("attach", "--cgroup", "relative/"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_no_matter_for_a_shell(typed: Sequence[str]) -> None:
    done = ask(*typed)
    assert (done.stdout.strip(), done.stderr) == ("", "")


IMPORTED = """
import sys
from click.shell_completion import ShellComplete
from bpfrl.cli import cli
place = sys.argv[1]
typed = ["--bpffs", place, "--cgroup-root", place, "attach", "--pod-uid"]
assert ShellComplete(cli, {}, "bpfrl", "X").get_completions(typed, "") == []
print(sorted({"grpc", "kubernetes", "aiohttp"} & sys.modules.keys()))
"""


def test_what_is_here_is_found_without_grpc_and_kubernetes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    assert done.stdout.strip() == "[]"


# On this node.


@pytest.mark.usefixtures("node")
def test_detach_offers_what_is_limited() -> None:
    assert offered("detach", "--pod-uid", "") == {UID: "shop/cart-0", STATIC_UID: BROKEN.reason}
    assert offered("detach", "--pod-uid", "8") == {UID: "shop/cart-0"}
    assert offered("detach", "--pod-uid", "f") == {}


@pytest.mark.usefixtures("node")
def test_a_pod_that_is_given_already_is_not_offered_again() -> None:
    assert list(offered("detach", "--pod-uid", UID, "--pod-uid", "")) == [STATIC_UID]


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("command", [("attach",), ("generate", "--rate", "1M")])
def test_attach_offers_the_pods_that_are_here_too(command: Sequence[str]) -> None:
    assert offered(*command, "--pod-uid", "") == {STATIC_UID: BROKEN.reason, UID: "shop/cart-0", other_uid(): ""}


def test_what_a_user_may_not_see_hides_nothing_else(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Agent) -> list[Broken]:
        raise PermissionDeniedError("needs root")

    monkeypatch.setattr(Agent, "limiters", refuse)
    assert offered("detach", "--pod-uid", "") == {}
    assert list(offered("attach", "--pod-uid", "")) == [UID, other_uid()]
    assert list(offered("--cgroup-root", str(node / "none"), "attach", "--pod-uid", "")) == []


def test_the_options_of_the_command_itself_count(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def look(agent: Agent) -> list[Broken]:
        seen.append(agent.bpffs)
        return []

    monkeypatch.setattr(Agent, "limiters", look)
    monkeypatch.setenv("BPFRL_BPFFS", "/from/environment")
    make(node / "elsewhere" / POD_FOLDER.format("11111111_2222_3333_4444_555555555555"))
    offered("detach", "--pod-uid", "")
    assert list(offered("--bpffs", "/x", "--cgroup-root", str(node / "elsewhere"), "attach", "--pod-uid", "")) == [
        "11111111-2222-3333-4444-555555555555"
    ]
    assert seen == [Path("/from/environment"), Path("/x")]


def test_cgroups_are_offered_a_level_at_a_time(node: Path) -> None:
    make(node / "system.slice" / "backup.service")
    (node / "cgroup.procs").touch()
    levels = [str(node / "kubepods.slice"), str(node / "system.slice")]
    for typed in ("", "/", str(node), f"{node}/"):
        assert list(offered("attach", "--cgroup", typed)) == levels
    # With what is below it, so that the shell does not take the word for whole.
    whole = [str(node / "system.slice"), str(node / "system.slice" / "backup.service")]
    assert list(offered("detach", "--cgroup", f"{node}/sys")) == whole
    assert list(offered("detach", "--cgroup", f"{node}/system.slice/")) == whole[1:]
    assert list(offered("detach", "--cgroup", f"{node}/system.slice/x")) == []


def test_nothing_is_offered_outside_of_cgroups(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for typed in ("/etc/", "/nonexistent/x", f"{node}/none/", f"{node}x/", "~", "\0"):
        assert list(offered("attach", "--cgroup", typed)) == [], typed

    def unmounted() -> Path:
        raise CgroupNotFoundError("cgroup v2 is not mounted")

    monkeypatch.setattr(cgroup, "mount_point", unmounted)
    assert list(offered("attach", "--cgroup", "")) == []


# The kubeconfig.


def write_kubeconfig(path: Path, *contexts: str, server: str = "http://127.0.0.1:1") -> Path:
    whole = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in contexts],
        "current-context": contexts[0] if contexts else "",
    }
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The operator's own cluster is not asked."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_contexts_are_those_of_the_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        write_kubeconfig(tmp_path / "1", "east", "west"),
        write_kubeconfig(tmp_path / "2", "weather", "east"),
    )
    assert list(offered("serve-master", "--context", "")) == []
    assert list(offered("serve-master", "--kubeconfig", str(first), "--context", "")) == ["east", "west"]
    monkeypatch.setenv("KUBECONFIG", f"{first}:{second}:{tmp_path}/none")
    assert list(offered("serve-master", "--context", "w")) == ["west", "weather"]
    (tmp_path / "home" / ".kube").mkdir(parents=True)
    write_kubeconfig(tmp_path / "home" / ".kube" / "config", "own")
    monkeypatch.delenv("KUBECONFIG")
    assert list(offered("serve-master", "--context", "")) == ["own"]


def test_contexts_without_a_current_one(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump({"contexts": [{"name": "a"}, {"name": "b"}]}))
    assert api.contexts(path) == ["a", "b"]


@pytest.mark.parametrize("content", ["", "[]", "contexts: 3", "contexts: [{}]", "{", "\0"])
def test_a_kubeconfig_that_is_none_is_an_error_of_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    with pytest.raises(ClusterError, match="no contexts: ") as caught:
        api.contexts(path)
    assert str(caught.value).isprintable()


# The cluster.

OBJECTS = {
    ("namespaces", ""): [Named("default"), Named("shop")],
    ("nodes", ""): [
        Named("a", "", "192.0.2.1"),
        Named("b", "", "192.0.2.2"),
        Named("c", "", "2001:db8::1"),
        Named("d"),
    ],
    ("pods", ""): [Named("web", "default"), Named("cart-0", "shop")],
    ("pods", "default"): [Named("web", "default")],
    ("pods", "shop"): [Named("cart-0", "shop"), Named("cart-1", "shop")],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path | None, str | None, str, str]]:
    """A cluster; returns what is asked of it."""
    found: list[tuple[Path | None, str | None, str, str]] = []

    async def answer(kubeconfig: Path | None, context: str | None, resource: str, namespace: str = "") -> list[Named]:
        found.append((kubeconfig, context, resource, namespace))
        return OBJECTS[resource, namespace]

    monkeypatch.setattr(names, "names", answer)
    return found


@click.command()
@click.option("-n", "--namespace", shell_complete=completing.namespaces)
@click.option("--node", "nodes", multiple=True, shell_complete=completing.nodes)
@click.option("--kubeconfig", type=click.Path(path_type=Path))
@click.option("--context", shell_complete=completing.contexts)
@click.argument("pod", shell_complete=completing.pods)
def reading() -> None:
    """A command that reads a cluster."""


def offered_by_reading(*typed: str) -> dict[str, str]:
    found = ShellComplete(reading, {}, "reading", "X").get_completions(list(typed[:-1]), typed[-1])
    return {item.value: item.help or "" for item in found}


def test_names_come_from_the_cluster_that_is_meant(asked: list[tuple[Path | None, str | None, str, str]]) -> None:
    assert offered_by_reading("-n", "s") == {"shop": ""}
    nodes = {"192.0.2.1": "a", "192.0.2.2": "b", "[2001:db8::1]": "c"}
    assert offered_by_reading("--kubeconfig", "x", "--context", "y", "--node", "") == nodes
    assert offered_by_reading("--node", "192.0.2.1", "--node", "192") == {"192.0.2.2": "b"}
    assert offered_by_reading("") == {"web": ""}
    assert offered_by_reading("-n", "shop", "cart-1") == {"cart-1": ""}
    assert asked == [
        (None, None, "namespaces", ""),
        (Path("x"), "y", "nodes", ""),
        (None, None, "nodes", ""),
        (None, None, "pods", "default"),
        (None, None, "pods", "shop"),
    ]


def test_options_that_exist_ask_the_cluster(asked: list[tuple[Path | None, str | None, str, str]]) -> None:
    assert list(offered("certs", "secrets", "-n", "")) == ["default", "shop"]
    assert list(offered("serve-master", "--context", "y", "--lease-namespace", "sh")) == ["shop"]
    assert list(offered("attach", "--pod-name", "")) == ["default/web", "shop/cart-0"]
    assert list(offered("attach", "--pod-name", "shop/cart-")) == ["shop/cart-0", "shop/cart-1"]
    assert [each[2:] for each in asked] == [("namespaces", ""), ("namespaces", ""), ("pods", ""), ("pods", "shop")]
    assert asked[1][1] == "y"


def test_what_looks_at_a_cluster_completes_its_nodes_and_pods(
    asked: list[tuple[Path | None, str | None, str, str]], tmp_path: Path
) -> None:
    path = write_kubeconfig(tmp_path / "config", "east")
    nodes = ["192.0.2.1", "192.0.2.2", "[2001:db8::1]"]
    for command in (["list"], ["explain"], ["doctor"]):
        assert list(offered(*command, "--kubeconfig", str(path), "--node", "")) == nodes
        assert list(offered(*command, "--kubeconfig", str(path), "--context", "")) == ["east"]
    assert {kubeconfig for kubeconfig, *_ in asked} == {path}
    for command in (["list"], ["explain"], ["certs", "apply"]):
        assert list(offered(*command, "-n", "sh")) == ["shop"]
    assert list(offered("explain", "-n", "shop", "")) == ["cart-0", "cart-1"]
    # Without -n it is the kubeconfig's own namespace.
    assert list(offered("explain", "--kubeconfig", str(path), "")) == ["web"]
    content = yaml.safe_load(path.read_text())
    content["contexts"][0]["context"]["namespace"] = "shop"
    path.write_text(yaml.safe_dump(content))
    assert list(offered("explain", "--kubeconfig", str(path), "")) == ["cart-0", "cart-1"]


def test_a_server_that_does_not_answer_takes_no_more_than_a_moment(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        path = write_kubeconfig(tmp_path / "config", "c", server=f"http://127.0.0.1:{silent.getsockname()[1]}")
        asked = False
        deadline = time.monotonic() + 6 * SECONDS  # a busy machine may not even come to ask, within its second
        while not asked and time.monotonic() < deadline:
            start = time.monotonic()
            done = ask("certs", "secrets", "-n", "", KUBECONFIG=str(path))
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert time.monotonic() - start < SECONDS / 2
            with contextlib.suppress(BlockingIOError):
                silent.accept()[0].close()
                asked = True
    assert asked


def test_a_server_that_is_not_there_is_no_matter_for_a_shell(tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config", "c")
    done = ask("certs", "secrets", "-n", "", KUBECONFIG=str(path))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# What is asked of an API server.


def answers(tmp_path: Path, status: int, body: str, resource: str, namespace: str = "") -> tuple[object, list[str]]:
    """What the names come to with a server that answers like this, and what it was asked."""
    seen: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(f"{request.raw_path} {request.headers['Authorization']} {request.headers['Accept']}")
        return web.Response(status=status, text=body, content_type="application/json")

    async def talk() -> object:
        async with api_server(handler) as client:
            path = write_kubeconfig(tmp_path / "config", "c", server=str(client.configuration.host))
            try:
                return await names.names(path, "c", resource, namespace)
            except ApiError as error:
                return str(error)

    return run(talk()), seen


def test_only_the_objects_metadata_is_asked_for(tmp_path: Path) -> None:
    body = json.dumps({"items": [{"metadata": {"name": "web", "namespace": "shop", "uid": "x"}, "spec": {}}]})
    found, seen = answers(tmp_path, 200, body, "pods", "sh/op")
    assert found == [Named("web", "shop")]
    [line] = seen
    assert line.startswith("/api/v1/namespaces/sh%2Fop/pods?limit=500 Bearer t application/json;as=Partial")
    assert line.endswith(",application/json")


def test_nodes_are_asked_for_whole_and_told_with_their_addresses(tmp_path: Path) -> None:
    addresses = [{"type": kind, "address": kind.lower()} for kind in ("Hostname", "InternalIP", "ExternalIP")]
    items = [
        {"metadata": {"name": "a"}, "status": {"addresses": addresses}},
        {"metadata": {"name": "b"}, "status": {"addresses": addresses[:1]}},
        {"metadata": {"name": "c"}},
    ]
    found, seen = answers(tmp_path, 200, json.dumps({"items": items}), "nodes")
    assert found == [Named("a", "", "internalip"), Named("b"), Named("c")]
    assert seen == ["/api/v1/nodes?limit=500 Bearer t application/json"]


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (403, '{"message": "nodes is forbidden"}', "the API server answers 403 Forbidden: nodes is forbidden"),
        (200, "{}", "the API server does not answer with a list: "),
        (200, "hello", "the API server does not answer with a list: "),
    ],
)
def test_what_is_no_list_is_one_error(tmp_path: Path, status: int, body: str, problem: str) -> None:
    found, _ = answers(tmp_path, status, body, "nodes")
    assert str(found).startswith(problem)
