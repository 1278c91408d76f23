"""A test bed: a pod-like cgroup in a network namespace of its own, and a peer to talk to.

    pod namespace  10.77.0.2  fd77::2  ── veth ──  10.77.0.1  fd77::1  peer namespace

Processes started with :meth:`Lab.in_pod` are in the pod's namespace and in a cgroup laid out as the kubelet's
systemd driver does; those of :meth:`Lab.in_peer` are the rest of the world and under no limit. Everything
carries this process's id in its name, stands under a cgroup and a bpffs of its own, and is gone when the context ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from bpfrl import cgroup

# The command that is installed beside this interpreter.
BPFRL: Final = str(Path(sys.executable).with_name("bpfrl"))

POD_ADDRESS: Final = "10.77.0.2"
PEER_ADDRESS: Final = "10.77.0.1"
POD_ADDRESS_6: Final = "fd77::2"
PEER_ADDRESS_6: Final = "fd77::1"

_JOIN: Final = 'echo 0 >"$1/cgroup.procs" && shift && exec "$@"'
_START_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 5.0
# The longest transfer, and what a queue of some seconds makes of its end.
_TRANSFER_SECONDS: Final = 90.0

Json = dict[str, Any]


@dataclass
class Lab:
    """One pod and its peer; see :func:`lab`."""

    pod_uid: str
    cgroup_root: Path
    pod_cgroup: Path
    bpffs: Path
    pod_namespace: str
    peer_namespace: str
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def in_pod(self, *command: str) -> list[str]:
        """The command line that runs a command as a process of the pod."""
        join = ["sh", "-c", _JOIN, "sh", str(self.pod_cgroup / "container"), *command]
        return in_namespace(self.pod_namespace, *join)

    def in_peer(self, *command: str) -> list[str]:
        """The command line that runs a command on the other end of the veth."""
        return in_namespace(self.peer_namespace, *command)

    def bpfrl(self, *arguments: str, timeout: float = 30, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the installed command on this lab's bpffs and cgroups."""
        environment = os.environ | {"BPFRL_BPFFS": str(self.bpffs), "BPFRL_CGROUP_ROOT": str(self.cgroup_root)}
        return subprocess.run(
            [BPFRL, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a process that ends with the lab at the latest."""
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.adopt(process)
        return process

    def adopt(self, process: subprocess.Popen[str]) -> None:
        """Have a process end with the lab that was started elsewhere."""
        self._processes.append(process)

    def end(self, process: subprocess.Popen[str]) -> None:
        """End one process that :meth:`start` started."""
        process.terminate()
        try:
            process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        self._processes.remove(process)

    def stop(self) -> None:
        """End what :meth:`start` started."""
        for process in self._processes.copy():
            self.end(process)

    def transfer(self, *options: str, port: int = 5201, to_pod: bool = False, address: str | None = None) -> Transfer:
        """Prepare an iperf3 transfer from the pod to its peer, or the other way round: its server listens."""
        server_side, client_side = (self.in_pod, self.in_peer) if to_pod else (self.in_peer, self.in_pod)
        server = self.start(server_side("iperf3", "-s", "-J", "-1", "-p", str(port)))
        wait_for_listener(self.pod_namespace if to_pod else self.peer_namespace, port)
        target = address or (POD_ADDRESS if to_pod else PEER_ADDRESS)
        return Transfer(self, server, client_side("iperf3", "-J", "-c", target, "-p", str(port), *options))

    def iperf3(self, *options: str, port: int = 5201, to_pod: bool = False, address: str | None = None) -> Json:
        """Run iperf3 from the pod to its peer (or the other way round) and return the client's report."""
        transfer = self.transfer(*options, port=port, to_pod=to_pod, address=address)
        transfer.begin()
        return transfer.finish().client

    def ping(self, count: int, interval: float = 0.05, address: str = PEER_ADDRESS) -> list[float]:
        """Round-trip times, ms, of pings from the pod; a lost one is missing."""
        command = self.in_pod("ping", "-n", "-c", str(count), "-i", str(interval), "-W", "1", address)
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [float(line.split("time=")[1].split()[0]) for line in output.splitlines() if "time=" in line]


class Reports(NamedTuple):
    """What the two ends of a transfer say of it."""

    client: Json
    server: Json


class Transfer:
    """An iperf3 transfer: its server listens when this is made. See :meth:`Lab.transfer`."""

    def __init__(self, bed: Lab, server: subprocess.Popen[str], command: Sequence[str]) -> None:
        self._bed = bed
        self._server = server
        self._command = command
        self._client: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Start the client, and with it the traffic."""
        self._client = self._bed.start(self._command)

    def finish(self) -> Reports:
        """Wait for the end of a transfer that was begun.

        Raises:
            RuntimeError: iperf3 could not carry it out, or it was never begun.
        """
        if self._client is None:
            raise RuntimeError("the transfer was never begun")
        try:
            client = _report(self._client)
            return Reports(client, _report(self._server))
        finally:
            self._bed.end(self._client)
            self._bed.end(self._server)


def _report(iperf3: subprocess.Popen[str]) -> Json:
    output, _ = iperf3.communicate(timeout=_TRANSFER_SECONDS)
    report: Json = json.loads(output)
    if "error" in report:
        raise RuntimeError(f"iperf3: {report['error']}")
    return report


@contextlib.contextmanager
def lab(mtu: int = 1500) -> Iterator[Lab]:
    """Build the test bed, and take it down whatever happens."""
    tag = f"bpfrl-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    pod_uid = str(uuid.uuid4())
    cgroup_root = cgroup.mount_point() / tag
    stem = "kubepods-besteffort"
    pod_cgroup = cgroup_root / "kubepods.slice" / f"{stem}.slice" / f"{stem}-pod{pod_uid.replace('-', '_')}.slice"
    bed = Lab(pod_uid, cgroup_root, pod_cgroup, Path(tempfile.mkdtemp(prefix=tag)), f"{tag}-pod", f"{tag}-peer")
    with contextlib.ExitStack() as undo:
        undo.callback(bed.bpffs.rmdir)
        run("mount", "-t", "bpf", "bpf", str(bed.bpffs))
        undo.callback(run, "umount", str(bed.bpffs))
        (pod_cgroup / "container").mkdir(parents=True)
        undo.callback(remove_cgroups, cgroup_root)
        for namespace in (bed.pod_namespace, bed.peer_namespace):
            run("ip", "netns", "add", namespace)
            undo.callback(run, "ip", "netns", "del", namespace)
        _connect(bed, mtu)
        undo.callback(bed.stop)
        yield bed


def _connect(bed: Lab, mtu: int) -> None:
    pod, peer = bed.pod_namespace, bed.peer_namespace
    veth = ("link", "add", "eth0", "mtu", str(mtu), "netns", pod, "type", "veth")
    run("ip", *veth, "peer", "name", "eth0", "mtu", str(mtu), "netns", peer)
    ends = ((pod, POD_ADDRESS, POD_ADDRESS_6), (peer, PEER_ADDRESS, PEER_ADDRESS_6))
    for namespace, address, address_6 in ends:
        run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", namespace, "address", "add", f"{address_6}/64", "dev", "eth0", "nodad")
        for device in ("lo", "eth0"):
            run("ip", "-n", namespace, "link", "set", device, "up")


def wait_for_listener(namespace: str, port: int) -> None:
    """Return when something listens on a TCP port of a namespace."""
    command = in_namespace(namespace, "ss", "-Hltn", f"sport = :{port}")
    deadline = time.monotonic() + _START_SECONDS
    while not subprocess.run(command, capture_output=True, check=True).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port} after {_START_SECONDS} s")
        time.sleep(0.02)


def in_namespace(namespace: str, *command: str) -> list[str]:
    """The command line that runs a command in a network namespace, with the cgroups that are here."""
    # Not `ip netns exec`: it mounts a new /sys, in which there are no cgroups.
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


def remove_cgroups(root: Path) -> None:
    """Remove a cgroup and those below it."""
    # Processes that were just ended leave their cgroup a moment later.
    deadline = time.monotonic() + _STOP_SECONDS
    for folder, _, _ in os.walk(root, topdown=False):
        while True:
            try:
                Path(folder).rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def run(*command: str) -> None:
    """Run a command that has nothing to say.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run(command, check=True, capture_output=True)
