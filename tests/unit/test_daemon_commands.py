"""What serve-node and serve-master refuse before anything is served."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import bpfrl.master.daemon
import bpfrl.node.daemon
from bpfrl import cgroup
from bpfrl.cli import cli
from bpfrl.node.daemon import Monitoring
from bpfrl.rpc import corelog, tls

pytestmark = pytest.mark.usefixtures("logs", "settings")

COMMAND = Path(sys.executable).with_name("bpfrl")
NODE_FORM = "write it as HOST:PORT, [::1]:PORT or :PORT"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the operator's, and this process keeps its stderr."""
    for name in ("BPFRL_CERTS", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(corelog, "redirect", lambda **_: None)


@dataclass
class Served:
    """What a daemon was asked to serve with."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Served]:
    """Daemons that end as soon as they have begun."""
    calls: list[Served] = []

    async def serve(*arguments: object, **options: object) -> None:
        calls.append(Served(arguments, options))

    monkeypatch.setattr(bpfrl.node.daemon, "serve", serve)
    monkeypatch.setattr(bpfrl.master.daemon, "serve", serve)
    monkeypatch.setattr(cgroup, "mount_point", lambda: Path("/sys/fs/cgroup"))
    return calls


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(cli, [str(each) for each in arguments], prog_name="bpfrl")


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=30, check=False)


def failure(result: Result | subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a failed command has said, without its end."""
    exit_code = result.exit_code if isinstance(result, Result) else result.returncode
    assert exit_code == code, result.stderr
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.isprintable(), result.stderr
    assert line.startswith("bpfrl")
    return line


# What cannot be meant.

TRUST = "use one of --certs DIR (bpfrl certs init makes them) and, on loopback only, --insecure"
USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "node: trusts nobody": (("serve-node",), TRUST),
    "node: trusts everybody and somebody": (("serve-node", "--insecure", "--certs", "x"), TRUST),
    "node: without TLS on every address": (("serve-node", "--insecure"), "--insecure is for loopback only"),
    "node: an argument": (("serve-node", "127.0.0.1:1"), "unexpected extra argument"),
    "master: trusts nobody": (("serve-master", "--manifests", "x"), TRUST),
    "master: trusts everybody and somebody": (("serve-master", "--insecure", "--certs", "x"), TRUST),
    "master: two sources of pods": (
        ("serve-master", "--insecure", "--manifests", "x", "--kubeconfig", "y"),
        "--manifests takes the place of an API server: leave out --kubeconfig and --context",
    ),
    "master: a context of no cluster": (
        ("serve-master", "--insecure", "--manifests", "x", "--context", "y"),
        "leave out --kubeconfig and --context",
    ),
    "node: no address for metrics": (("serve-node", "--insecure", "--http", "here"), NODE_FORM),
    "node: no number of pods": (("serve-node", "--insecure", "--max-pods-in-metrics", "-1"), "-1 is not in the range"),
    "node: no log format": (("serve-node", "--insecure", "--log-format", "xml"), "'xml' is not one of 'text', 'json'"),
    "master: no address for metrics": (("serve-master", "--insecure", "--http", "::1:1"), NODE_FORM),
    "master: no log format": (("serve-master", "--insecure", "--log-format", "xml"), "'xml' is not one of"),
    "master: no port": (("serve-master", "--insecure", "--node-port", "0"), "'--node-port': 0 is not in the range"),
    "master: no such port": (("serve-master", "--insecure", "--node-port", "65536"), "65536 is not in the range"),
    "master: asks without end": (("serve-master", "--insecure", "--resync", "0"), "'--resync': 0 is not in the"),
    "master: a lease of no time": (("serve-master", "--insecure", "--lease-duration", "2"), "'--lease-duration': 2 is"),
}


@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line_that_says_what_to_do(
    served: list[Served], arguments: Sequence[str], advice: str
) -> None:
    line = failure(run(*arguments), 2)
    assert advice in line
    assert line.endswith(f"(see bpfrl {arguments[0]} --help)")
    assert served == []


@pytest.mark.parametrize(
    "place",
    [
        *("", "10002", "127.0.0.1", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:-1", "127.0.0.1:65536", "127.0.0.1: 80"),
        *("::1", "::1:10002", "::", "[::1]", "[::1]:", "[::1:10002", "::1]:10002", "fe80::1:10002", "a:b:1"),
        *("127.0.0.1:1.5", "127.0.0.1:0x50", "127.0.0.1:+1", "127.0.0.1:1\n", "127.0.0.1:" + "9" * 5000),
        *("127.0.0.1:\u0661", "127.0.0.1:\u00b2", "..:1", "a" * 64 + ":1"),
    ],
    ids=lambda place: ascii(place[:20]),
)
def test_a_place_that_is_none_is_one_line_with_the_forms(served: list[Served], place: str) -> None:
    line = failure(run("serve-node", "--insecure", "--listen", place), 2)
    assert NODE_FORM in line
    assert served == []


@pytest.mark.parametrize(
    "place", [":10002", "0.0.0.0:10002", "[::]:10002", "10.0.0.1:1", "[fd00::1]:1", "node.example:1", "127.0.0.1.x:1"]
)
def test_without_tls_it_listens_on_loopback_only(served: list[Served], place: str) -> None:
    line = failure(run("serve-node", "--insecure", "--listen", place), 2)
    assert "--insecure is for loopback only: use --listen 127.0.0.1:PORT, or --certs DIR" in line
    assert served == []


# What cannot be done.

ROLES: dict[str, tuple[str, str, str, str]] = {
    "serve-node": ("node", "master", "node.bpfrl", "master.bpfrl"),
    "serve-master": ("master", "node", "master.bpfrl", "node.bpfrl"),
}


@pytest.mark.parametrize("command", ROLES)
@pytest.mark.parametrize("file", ["ca.crt", "tls.crt", "tls.key"])
def test_a_missing_file_is_named_in_one_line(served: list[Served], pki: Path, command: str, file: str) -> None:
    own = pki / ROLES[command][0]
    (own / file).unlink()
    told = f"bpfrl: {own}/{file}: No such file or directory: bpfrl certs init DIR makes certificates"
    assert failure(run(command, "--certs", own), 1) == told
    assert served == []


@pytest.mark.parametrize("command", ROLES)
def test_a_missing_folder_is_named_in_one_line(served: list[Served], tmp_path: Path, command: str) -> None:
    line = failure(run(command, "--certs", tmp_path / "none"), 1)
    assert line.startswith(f"bpfrl: {tmp_path}/none/ca.crt: No such file or directory: ")
    assert served == []


@pytest.mark.parametrize("command", ROLES)
def test_a_certificate_for_another_role_is_one_line(served: list[Served], pki: Path, command: str) -> None:
    _, other, wanted, found = ROLES[command]
    told = f"bpfrl: {pki}/{other}/tls.crt is for {found}: it must have the DNS name {wanted}"
    assert failure(run(command, "--certs", pki / other), 1) == told
    assert served == []


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no certificate": (lambda own: (own / "tls.crt").write_bytes(b"x"), "not certificates and a key in PEM"),
    "half a key": (lambda own: (own / "tls.key").write_bytes((own / "tls.key").read_bytes()[:99]), "in PEM"),
    "another key": (lambda own: shutil.copy(own.parent / "ca.key", own / "tls.key"), "tls.key is not the key of"),
}


@pytest.mark.parametrize("command", ROLES)
@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_one_line(
    served: list[Served], pki: Path, command: str, damage: Callable[[Path], Any], reason: str
) -> None:
    own = pki / ROLES[command][0]
    damage(own)
    line = failure(run(command, "--certs", own), 1)
    assert line.startswith(f"bpfrl: {own}: ")
    assert reason in line
    assert served == []


def test_a_root_that_is_no_cgroup_is_one_line(served: list[Served], tmp_path: Path) -> None:
    line = failure(run("--cgroup-root", tmp_path, "serve-node", "--insecure", "--listen", "127.0.0.1:0"), 2)
    assert f"'{tmp_path}' is no cgroup" in line
    assert served == []


# The installed command, whose stderr the core's log passes through.


def test_the_installed_command_fails_likewise(pki: Path) -> None:
    assert TRUST in failure(process("serve-node"), 2)
    assert NODE_FORM in failure(process("serve-node", "--insecure", "--listen", "::1:1"), 2)
    assert "is for loopback only" in failure(process("serve-node", "--insecure", "--listen", ":1"), 2)
    assert "master.bpfrl: it must have" in failure(process("serve-node", "--certs", pki / "master"), 1)
    assert TRUST in failure(process("serve-master"), 2)
    assert "node.bpfrl: it must have" in failure(process("serve-master", "--certs", pki / "node"), 1)


# What is handed on.


@pytest.fixture
def root_logger() -> Iterator[None]:
    """A daemon says more than a command: other tests are not to hear of it."""
    own = logging.getLogger("bpfrl.bpf")
    level = own.level
    yield
    own.setLevel(level)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("127.9.9.9:65535", "127.9.9.9:65535"),
        ("[::1]:10002", "[::1]:10002"),
        ("localhost:1", "localhost:1"),
    ],
)
def test_without_tls_a_node_is_served_on_loopback(served: list[Served], typed: str, place: str) -> None:
    result = run("--bpffs", "/nowhere", "serve-node", "--insecure", "--listen", typed)
    assert (result.exit_code, result.stdout) == (0, "")
    [(agent, _, address, certificates)] = [each.arguments for each in served]
    assert (agent.bpffs, address, certificates) == (Path("/nowhere"), place, None)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(("typed", "place"), [((), "[::]:10002"), (("--listen", ":1"), "[::]:1")])
def test_with_certificates_a_node_is_served_on_every_address(
    served: list[Served], pki: Path, monkeypatch: pytest.MonkeyPatch, typed: tuple[str, ...], place: str
) -> None:
    monkeypatch.setenv("BPFRL_CERTS", str(pki / "node"))
    assert run("serve-node", *typed).exit_code == 0
    [(_, _, address, certificates)] = [each.arguments for each in served]
    assert address == place
    assert certificates.current() == tls.Certificates(pki / "node", tls.NODE).current()


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("typed", "cooperates"), [((), True), (("--cooperate",), True), (("--no-cooperate",), False)], ids=str
)
def test_a_nodes_pods_cooperate_unless_it_is_told_otherwise(
    served: list[Served], typed: tuple[str, ...], *, cooperates: bool
) -> None:
    assert run("serve-node", "--insecure", "--listen", "127.0.0.1:0", *typed).exit_code == 0
    assert [each.options["cooperate"] for each in served] == [cooperates]


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("typed", [(), ("--require-known-program",)], ids=str)
def test_a_node_takes_other_programs_than_its_own_unless_it_is_told_otherwise(
    served: list[Served], typed: tuple[str, ...]
) -> None:
    assert run("serve-node", "--insecure", "--listen", "127.0.0.1:0", *typed).exit_code == 0
    assert [each.options for each in served] == [{"cooperate": True, "known_only": bool(typed), "monitoring": None}]


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("typed", "monitoring"),
    [
        (("--http", ":10003"), Monitoring("[::]:10003", pod_labels=True, most_pods=500)),
        (
            ("--http", "127.0.0.1:1", "--no-pod-labels", "--max-pods-in-metrics", "0"),
            Monitoring("127.0.0.1:1", pod_labels=False, most_pods=0),
        ),
        (("--no-pod-labels",), None),
    ],
)
def test_a_node_is_monitored_where_it_is_asked_for(
    served: list[Served], typed: tuple[str, ...], monitoring: Monitoring | None
) -> None:
    assert run("serve-node", "--insecure", "--listen", "127.0.0.1:0", *typed).exit_code == 0
    assert [each.options["monitoring"] for each in served] == [monitoring]


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("typed", "http", "most"),
    [
        ((), None, 1000),
        (("--http", "[::1]:10004"), "[::1]:10004", 1000),
        (("--http", ":1", "--max-nodes-in-metrics", "7"), "[::]:1", 7),
    ],
)
def test_a_master_is_monitored_where_it_is_asked_for(
    served: list[Served], tmp_path: Path, typed: tuple[str, ...], http: str | None, most: int
) -> None:
    assert run("serve-master", "--insecure", "--manifests", tmp_path, *typed).exit_code == 0
    [settings] = [each.arguments[0] for each in served]
    assert (settings.http, settings.max_nodes_in_metrics) == (http, most)


@pytest.mark.usefixtures("root_logger")
def test_without_http_nothing_of_it_is_imported() -> None:
    """A node's memory is other people's."""
    program = (
        "import sys; from bpfrl.cli import cli; import bpfrl.node.daemon, bpfrl.node.server;"
        "print(sorted({'aiohttp', 'prometheus_client'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.usefixtures("root_logger")
def test_a_master_gets_what_was_typed(served: list[Served], pki: Path, tmp_path: Path) -> None:
    options = ("--node-port", "1", "--resync", "2", "--no-leader-elect", "--lease-duration", "3")
    assert run("serve-master", "--manifests", tmp_path, "--certs", pki / "master", *options).exit_code == 0
    assert (
        run("serve-master", "--kubeconfig", "x", "--context", "y", "--lease-namespace", "z", "--insecure").exit_code
        == 0
    )
    assert [each.options for each in served] == [{}, {}]
    first, second = (each.arguments[0] for each in served)
    assert first.certificates.folder == pki / "master"
    assert (first.manifests, first.kubeconfig, first.context) == (tmp_path, None, None)
    assert (first.node_port, first.resync, first.leader_elect, first.lease_duration) == (1, 2.0, False, 3)
    assert (second.certificates, second.manifests, second.kubeconfig, second.context) == (None, None, Path("x"), "y")
    assert (second.node_port, second.resync, second.leader_elect) == (10_002, 300.0, True)
    assert (second.lease_namespace, second.lease_duration) == ("z", 15)
