"""bpfrl list from an operator's desk: no root, no bpffs, no cgroups, but the API server and the nodes' daemons."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from bench.fleet import NODE_PORT, Daemon, Fleet, wait_for
from bench.kubeapi import Api
from bench.lab import BPFRL, in_namespace
from tests.e2e.conftest import EGRESS, INGRESS, MBIT, ONE_API, SECONDS, Cluster, Pod
from tests.measuring import unmeasured

pytestmark = [ONE_API, pytest.mark.usefixtures("master")]

_NOBODY: Final = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
# Where this checkout is closed to others: root's files, and none of root's rights.
_POWERLESS: Final = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
_ROWS, _COLUMNS = 50, 200

# Has a node take a limiter off. What is in the arguments: the node's address, the pod's UID and the certificates.
_DETACH: Final = """
import asyncio, sys
from pathlib import Path
from bpfrl.errors import BpfrlError
from bpfrl.limits import Limits
from bpfrl.rpc import tls
from bpfrl.rpc.client import NodeClient
from bpfrl.units import Rate
address, port, uid, folder = sys.argv[1:]
async def main():
    client = NodeClient(address, int(port), tls.Certificates(Path(folder), tls.OPERATOR))
    for call in (client.detach(uid), client.update(uid, Limits(Rate(1000))), client.list()):
        try:
            print(await call and "done")
        except BpfrlError as error:
            print(error.code, error)
    await client.close()
asyncio.run(main())
"""


@dataclass
class Desk:
    """Where an operator sits: beside the control plane, with a kubeconfig and an operator's certificate."""

    namespace: str
    folder: Path
    become: tuple[str, ...]

    def command(self, *arguments: str) -> list[str]:
        """The command line of ``bpfrl list`` there."""
        return in_namespace(self.namespace, *self.become, BPFRL, "list", *arguments)

    def environment(self) -> dict[str, str]:
        """What the operator has set: no root's home, and a bpffs that is none."""
        own = {"KUBECONFIG": f"{self.folder}/kubeconfig", "BPFRL_CERTS": f"{self.folder}/operator"}
        return unmeasured() | own | {"HOME": "/nonexistent", "BPFRL_BPFFS": "/nonexistent", "TERM": "xterm"}

    def list(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it there."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
            timeout=SECONDS,
            cwd="/",
        )

    def items(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """What it tells programs, by pod."""
        done = self.list("-o", "json", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return {item["name"]: item for item in json.loads(done.stdout)["items"]}


@pytest.fixture(scope="module")
def desk(bed: Fleet, api: Api) -> Iterator[Desk]:
    tried = subprocess.run([*_NOBODY, BPFRL, "--version"], capture_output=True, check=False, cwd="/")
    become = _POWERLESS if tried.returncode else _NOBODY
    with tempfile.TemporaryDirectory(prefix="desk-") as name:
        folder = Path(name)
        (folder / "operator").mkdir()
        for file in ("ca.crt", "tls.crt", "tls.key"):
            (folder / "operator" / file).write_bytes((bed.certificates / "operator" / file).read_bytes())
        (folder / "kubeconfig").write_bytes(api.kubeconfig.read_bytes())
        if become is _NOBODY:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
        yield Desk(bed.tag, folder, become)


def rows(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def test_nobody_has_no_rights_on_this_node(desk: Desk) -> None:
    """Else the tests below would say little."""
    command = [*desk.become, "cat", "/proc/self/status"]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^CapEff:\t0{16}$", status, re.MULTILINE)


def test_pods_of_all_nodes_are_listed_with_what_is_in_force(cluster: Cluster, desk: Desk) -> None:
    pods = [cluster.create(number, {EGRESS: f"{number + 1}M", INGRESS: "7M"}) for number in range(3)]
    plain = cluster.create(0)
    cluster.converge({pod: ((number + 1) * MBIT, 7 * MBIT) for number, pod in enumerate(pods)})
    done = desk.list("-A")
    assert (done.returncode, done.stderr) == (0, "")
    header, *lines = rows(done.stdout)
    assert [*header[:4], header[-1]] == ["NAMESPACE", "POD", "NODE", "EGRESS", "STATE"]
    shown = {line[1]: (line[0], *line[2:4], line[8], line[-1]) for line in lines}
    for number, pod in enumerate(pods):
        assert shown.pop(pod.name) == ("default", pod.node.name, f"{number + 1}mbit", "7mbit", "ok")
    assert shown == {}
    assert plain.name not in done.stdout
    # What it says of one is what the node itself says.
    for pod in pods:
        item, own = desk.items("-A")[pod.name], pod.node.items()[pod.uid]
        assert (item["uid"], item["node"], item["state"]) == (pod.uid, pod.node.name, "ok")
        assert item["wanted"]["egress_bits_per_second"] == own["egress"]["limit_bits_per_second"]
        for key in ("egress", "ingress", "burst_bytes", "paced", "cgroup_id", "attached_at"):
            assert item[key] == own[key]
        assert own["cgroup"].endswith(".slice")
        assert item["cgroup"] is None
    wide = desk.list("-A", "-o", "wide").stdout
    assert all(f"id={pod.node.items()[pod.uid]['cgroup_id']}" in wide for pod in pods)


def test_namespaces_and_labels_choose(cluster: Cluster, desk: Desk) -> None:
    web = [cluster.create(number, {EGRESS: "1M"}, labels={"app": "web", "tier": str(number)}) for number in range(2)]
    db = cluster.create(2, {EGRESS: "1M"}, labels={"app": "db"})
    name, namespace = f"pod-{uuid.uuid4().hex[:8]}", f"ns-{uuid.uuid4().hex[:8]}"
    node = cluster.nodes[1]
    made = cluster.api.create_pod(
        name, namespace=namespace, node=node.name, host_ip=node.address, annotations={EGRESS: "2M"}
    )
    other = Pod(name, made["metadata"]["uid"], node, made["metadata"]["uid"])
    other.start()
    try:
        cluster.converge(dict.fromkeys([*web, db], (MBIT, 0)) | {other: (2 * MBIT, 0)})
        own = {pod.name for pod in (*web, db)}
        assert desk.items("-A").keys() == own | {name}
        assert desk.items("-n", "default").keys() == own
        assert desk.items("-n", namespace).keys() == {name}
        assert desk.items("-n", "nothing-there") == {}
        assert desk.items("-l", "app=web").keys() == {pod.name for pod in web}
        assert desk.items("-l", "app=web,tier!=0").keys() == {web[1].name}
        assert desk.items("-A", "-l", "app!=web,app!=db").keys() == {name}
        # One namespace needs no column.
        assert rows(desk.list("-n", namespace).stdout)[0][:2] == ["POD", "NODE"]
        assert desk.list("-A", "-o", "name", "--sort-by", "egress").stdout.splitlines()[0] == f"pod/{name}"
    finally:
        cluster.api.delete_pod(name, namespace)


def test_what_is_not_as_it_is_asked_for_is_listed_too(cluster: Cluster, desk: Desk, master: Daemon) -> None:
    good = cluster.create(0, {EGRESS: "1M"})
    waiting = cluster.create(0, {EGRESS: "1M"}, cgroup=False)
    wrong = cluster.create(1, {EGRESS: "10mbps"})
    left = cluster.create(2)
    cluster.converge({good: (MBIT, 0)})
    master.kill()
    cluster.annotate(good, EGRESS, "2M")
    left.node.bpfrl("attach", "--pod-uid", left.uid, "--rate", "3mbit")
    gone = str(uuid.uuid4())
    left.node.start_pod(gone)
    left.node.bpfrl("attach", "--pod-uid", gone, "--rate", "4mbit")
    found = {line[1]: line[-1] for line in rows(desk.list("-A").stdout)[1:]}
    assert found == {
        good.name: "pending: asks for egress 2mbit, ingress unlimited",
        waiting.name: "pending: asks for egress 1mbit, ingress unlimited",
        wrong.name: found[wrong.name],
        left.name: "orphan: the pod asks for no limit",
        gone: "orphan: no such pod",
    }
    assert found[wrong.name].startswith(f"invalid: annotation {EGRESS}: rate '10mbps'")
    master.start()
    waiting.start()
    cluster.converge({good: (2 * MBIT, 0), waiting: (MBIT, 0)})
    found = {line[1]: line[-1] for line in rows(desk.list("-A").stdout)[1:]}
    assert found == {good.name: "ok", waiting.name: "ok", wrong.name: found[wrong.name]}


@pytest.mark.parametrize("end", ["a daemon that has ended", "a cable that is unplugged"])
def test_a_node_that_is_down_keeps_none_of_the_others_from_being_listed(cluster: Cluster, desk: Desk, end: str) -> None:
    pods = [cluster.create(number, {EGRESS: "1M"}) for number in range(3)]
    cluster.converge(dict.fromkeys(pods, (MBIT, 0)))
    down = pods[1].node
    if end == "a daemon that has ended":
        down.daemon.kill()
    else:
        down.disconnect()
    begun = time.monotonic()
    done = desk.list("-A")
    assert time.monotonic() - begun < 15
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"bpfrl: node {down.name}: ")
    found = {line[1]: line[-1] for line in rows(done.stdout)[1:]}
    assert found == {
        pods[0].name: "ok",
        pods[1].name: "unknown: asks for egress 1mbit, ingress unlimited",
        pods[2].name: "ok",
    }
    if end == "a daemon that has ended":
        places = [x for pod in pods for x in ("--node", pod.node.address)]
        done = desk.list(*places, "-o", "name")
        assert (done.returncode, done.stdout) == (1, f"pod/{pods[0].uid}\npod/{pods[2].uid}\n")
        assert done.stderr.startswith(f"bpfrl: node {down.address}: ")


def test_one_node_is_listed_by_its_address(cluster: Cluster, desk: Desk) -> None:
    pods = [cluster.create(number, {EGRESS: "1M"}) for number in range(2)]
    cluster.converge(dict.fromkeys(pods, (MBIT, 0)))
    for place in (pods[0].node.address, f"{pods[0].node.address}:{NODE_PORT}"):
        header, line = rows(desk.list("--node", place).stdout)
        assert header[:2] == ["UID", "POD"]
        assert line[:3] == [pods[0].uid, f"default/{pods[0].name}", "1mbit"]
    assert desk.items("--node", pods[0].node.address).keys() == {pods[0].name}


def test_an_operator_changes_nothing(cluster: Cluster, desk: Desk) -> None:
    pod = cluster.create(0, {EGRESS: "1M"})
    cluster.converge({pod: (MBIT, 0)})
    arguments = (pod.node.address, str(NODE_PORT), pod.uid, f"{desk.folder}/operator")
    done = subprocess.run(
        in_namespace(desk.namespace, sys.executable, "-c", _DETACH, *arguments),
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
    )
    refusal = "PERMISSION_DENIED the certificate is for operator.bpfrl: it must have the DNS name master.bpfrl"
    assert done.stdout.splitlines() == [refusal, refusal, "done"]
    cluster.converge({pod: (MBIT, 0)})
    [line] = cluster.logged(pod.node.daemon, "refused detach from ipv4:10.78.0.1:")
    assert line.endswith(refusal.removeprefix("PERMISSION_DENIED "))


def test_a_watched_cluster_draws_what_passes(cluster: Cluster, desk: Desk) -> None:
    """At a terminal: pictures of traffic that is held to its limit, and a silent node's pods without numbers."""
    pod = cluster.create(0, {EGRESS: "1M", INGRESS: "1M"})
    other = cluster.create(1, {EGRESS: "1M"})
    cluster.converge({pod: (MBIT, MBIT), other: (MBIT, 0)})
    flood = pod.node.in_pod(pod.cgroup_uid, "ping", "-q", "-i", "0.002", "-s", "1400", "127.0.0.1")
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    drawn = ""

    def read() -> bool:
        nonlocal drawn
        while select.select([controller], [], [], 0.05)[0]:
            drawn += os.read(controller, 65_536).decode(errors="replace")
        return True

    def seen(pattern: str) -> Callable[[], bool]:
        return lambda: read() and re.search(pattern, drawn) is not None

    pinging = subprocess.Popen(in_namespace(pod.node.namespace, *flood), stdout=subprocess.DEVNULL)
    watch = subprocess.Popen(
        # What a shell starts in the background, these tests perhaps, is not to heed Ctrl-C.
        ["env", "--default-signal=INT", *desk.command("-A", "-w", "--sort-by", "dropping")],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=desk.environment() | {"LANG": "C.UTF-8"},
        cwd="/",
    )
    os.close(terminal)
    try:
        # Full height is the limit, and what is above is dropped.
        wait_for(seen(rf"{pod.name} .*1mbit .*bit .*[▆▇█]{{3}}.* [1-9][0-9.]*%"), SECONDS, lambda: drawn)
        assert "TX-LOAD" in drawn
        # The last row that was drawn may be one of half a table.
        wait_for(lambda: read() and drawn.rindex(pod.name) < drawn.rindex(other.name), SECONDS, lambda: drawn)
        other.node.daemon.kill()
        wait_for(seen(rf"node {other.node.name}: "), SECONDS, lambda: drawn)
        wait_for(seen(rf"{other.name} .*unknown: asks"), SECONDS, lambda: drawn)
        other.node.daemon.start()
        drawn = ""
        wait_for(seen(rf"{other.name} .*1mbit .*0bit .*ok"), SECONDS, lambda: drawn)
        watch.send_signal(signal.SIGINT)

        def ended() -> bool:
            # A terminal that nobody reads fills up, and who draws the last table at it waits.
            with contextlib.suppress(OSError):  # EIO: nobody is at the other end any more
                read()
            return watch.poll() is not None

        wait_for(ended, SECONDS, lambda: drawn)
        assert watch.returncode == 130
        assert "Traceback" not in drawn
    finally:
        for process in (pinging, watch):
            process.kill()
            process.wait()
        os.close(controller)
