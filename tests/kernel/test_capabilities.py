"""The nodes' daemon with just what its DaemonSet gives it, and with less.

What it may do is read from the rendered chart, so that the two cannot part. Capabilities are taken away as a container
runtime does it, by the bounding set, and mounts and process numbers by namespaces.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import pytest

from bench.lab import BPFRL, PEER_ADDRESS, Lab
from bpfrl import cgroup
from bpfrl.bpf import generator
from bpfrl.errors import BpfrlError, RefusedError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc.client import NodeClient
from bpfrl.units import Rate
from tests.kernel.conftest import UNPACED, Side, cooperation, entries, flowing, only, peer_end, pod_end, until
from tests.kernel.test_service import Daemon, program
from tests.measuring import unmeasured
from tools.manifests import objects

MBIT: Final = 10**6
SLOW, FAST = Limits(Rate(10 * MBIT)), Limits(Rate(50 * MBIT))
[POD] = [each["spec"]["template"]["spec"] for each in objects() if each["kind"] == "DaemonSet"]
[CONTAINER] = POD["containers"]
CAPABILITIES: Final[list[str]] = CONTAINER["securityContext"]["capabilities"]["add"]
# Where a later kernel takes another capability for this one: from which version on.
COVERED_FROM: Final = {"NET_ADMIN": (6, 5)}
# Without each: how what cannot be done is told.
TOLD: Final = {
    "DAC_READ_SEARCH": "cannot change or read",
    "NET_ADMIN": "cannot attach",
    "SYS_ADMIN": "cannot load the BPF programs",
    "SYS_PTRACE": "the network namespace of process",
}
KERNEL: Final = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    """As in the image, where they are compiled already; these tests take them from the cache."""
    for source in ("limiter.bpf.c", "sockets.bpf.c", "cooperate.bpf.c"):
        generator.compile_object(source)


def with_just(capabilities: Sequence[str]) -> list[str]:
    """The command that runs another one as root without all other capabilities, for itself and whatever it starts."""
    kept = ",".join(f"+{name.lower()}" for name in capabilities)
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"]


def contained(bed: Lab, capabilities: Sequence[str]) -> list[str]:
    """And in a container: one with a cgroup namespace, whose root file system and cgroups are read-only."""
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert mounts["cgroup"]["readOnly"]
    assert not mounts["bpffs"].get("readOnly")
    places = ["/", str(cgroup.mount_point())]
    join = f'echo 0 >{bed.world_cgroup}/cgroup.procs && exec "$@"'
    remount = "".join(f"mount -o remount,bind,ro {place} && " for place in places) + 'exec "$@"'
    return [
        *("sh", "-ec", join, "sh"),
        *("unshare", "--cgroup", "--mount", "--propagation", "slave"),
        *("sh", "-ec", remount, "sh"),
        *with_just(capabilities),
    ]


def connection(bed: Lab) -> list[Side]:
    """One out of the pod that there is already; the process in the pod has more capabilities than the daemon."""
    sides = flowing(pod_end(bed), peer_end(bed), PEER_ADDRESS)
    until(lambda: sides[1].each("received")[0] > MBIT)
    return sides


def pacing(sender: Side) -> float:
    """What the sending socket may send at most, bit/s."""
    [rate] = sender.each("pacing")
    return float(rate) * 8 if rate != UNPACED else float("inf")


def confined(bed: Lab, within: Sequence[str]) -> Daemon:
    """The daemon, with metrics as in the chart."""
    assert any(word.startswith("--http=") for word in CONTAINER["args"])
    return Daemon(bed, None, "127.0.0.1:0", "--http", "127.0.0.1:0", within=within)


def scrape(node: Daemon) -> str:
    """What Prometheus is told."""
    with urlopen(f"http://127.0.0.1:{node.port_of('metrics on')}/metrics", timeout=20) as answer:
        text: str = answer.read().decode()
    return text


def everything(bed: Lab, node: Daemon, sender: Side) -> None:
    """Attach, adopt, update, list, count, cooperate and detach, each with the effect that it is to have."""
    until(lambda: cooperation(bed.cgroup_root / "kubepods.slice") in entries(bed), what=lambda: node.log)
    assert node.attach(bed.pod_uid, SLOW) is Change.ATTACHED
    assert only(bed)["paced"] == "all"
    until(lambda: pacing(sender) < 1.25 * 10 * MBIT)
    assert node.call(lambda client: client.update(bed.pod_uid, FAST)) is Change.UPDATED
    until(lambda: 20 * MBIT < pacing(sender) < 1.25 * 50 * MBIT)
    [found] = node.call(lambda client: client.list())
    assert (found.pod.uid, found.limits, found.adopted) == (bed.pod_uid, FAST, True)
    assert found.egress.passed_bytes > 0
    assert bed.pod_uid in scrape(node)
    report = node.call(lambda client: client.explain(bed.pod_uid))
    assert {program.name for program in report.programs} >= {"bpfrl_egress", "bpfrl_sockops", "bpfrl_cooperate"}
    assert report.sockets
    assert report.sockets.known
    assert node.call(lambda client: client.detach(bed.pod_uid)) is Change.DETACHED
    until(lambda: pacing(sender) == float("inf"))
    assert node.call(lambda client: client.list()) == []


def test_the_doctor_finds_nothing_missing_there(bed: Lab) -> None:
    places = {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    command = [*contained(bed, CAPABILITIES), BPFRL, "doctor", "-o", "json"]
    done = subprocess.run(command, env=unmeasured() | places, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    rows = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["privileges"]["mark"] == "ok"
    assert rows["cgroup links"]["mark"] == "warning"


def warnings(node: Daemon) -> list[str]:
    return [line for line in node.log if " WARNING " in line or " ERROR " in line or "Traceback" in line]


def test_it_does_all_of_its_work_with_what_the_chart_gives_it(bed: Lab) -> None:
    sender, _ = connection(bed)
    with confined(bed, contained(bed, CAPABILITIES)) as node:
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        [effective] = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
        assert int(effective, 16).bit_count() == len(CAPABILITIES)
        everything(bed, node, sender)
        assert warnings(node) == []


@pytest.mark.parametrize("missing", CAPABILITIES)
def test_without_one_of_its_capabilities_it_says_what_it_cannot_do(bed: Lab, missing: str) -> None:
    sender, _ = connection(bed)
    left = [name for name in CAPABILITIES if name != missing]
    with confined(bed, contained(bed, left)) as node:
        if COVERED_FROM.get(missing, (99, 0)) <= KERNEL:
            everything(bed, node, sender)
            assert warnings(node) == []
            return
        calls: list[Callable[[NodeClient], Awaitable[Change]]] = [
            lambda client: client.attach(PodRef(bed.pod_uid), SLOW, program(SLOW), generator.build()),
            lambda client: client.detach(bed.pod_uid),
        ]
        refused: list[BpfrlError] = []
        for call in calls:
            try:
                node.call(call)
            except BpfrlError as error:
                refused.append(error)
        assert all(isinstance(error, RefusedError) for error in refused), refused
        told = [str(error) for error in refused] + warnings(node)
        assert any(TOLD[missing] in line and "needs root" in line for line in told), told
        assert not any("Traceback" in line for line in node.log)


def test_where_processes_cannot_be_seen_their_connections_are_not_said_to_be_paced(bed: Lab) -> None:
    """In a container without hostPID, cgroups tell of processes without a number."""
    sender, _ = connection(bed)
    assert POD["hostPID"]
    within = [*contained(bed, CAPABILITIES), "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with confined(bed, within) as node:
        assert node.attach(bed.pod_uid, SLOW) is Change.ATTACHED
        assert only(bed)["paced"] == "new"
        assert pacing(sender) == float("inf")
        assert any("hostPID" in line for line in warnings(node)), node.log


def test_a_container_mounts_no_bpffs_that_would_end_with_it(bed: Lab) -> None:
    """Whatever is mounted in a mount namespace of its own is gone with its last process, and so would all limits be."""
    script = f'umount {bed.bpffs} && exec "$@"'
    within = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh"]
    command = [*within, BPFRL, "--bpffs", str(bed.bpffs), "serve-node", "--insecure", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"bpfrl: no BPF file system on {bed.bpffs}, and this is a container or sandbox")
    assert "mount -t bpf bpf" in last
    with suppress(FileNotFoundError):
        assert entries(bed) == []
