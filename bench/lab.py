"""A test bed: a pod-like cgroup in a network namespace of its own, and a peer to talk to.

    pod namespace  10.77.0.2  fd77::2  ── veth ──  10.77.0.1  fd77::1  peer namespace

and, where round-trip times are asked for, a third namespace behind the peer, with a pair of addresses for each:

    peer namespace  ── wire, RTT 0 ──  10.78.0.1  fd78::1  far namespace
                    ── wire, RTT 1 ──  10.78.0.2  fd78::2

Processes started with :meth:`Lab.in_pod` are in the pod's namespace and in a cgroup laid out as the kubelet's
systemd driver does; those of :meth:`Lab.in_peer` and :meth:`Lab.in_far` are the rest of the world and under no limit,
in a cgroup beside the kubelet's. Everything carries this process's id in its name, stands under a cgroup and a
bpffs of its own, and is gone when the context ends.
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

from bench import wire
from bpfrl import cgroup

# The command that is installed beside this interpreter.
BPFRL: Final = str(Path(sys.executable).with_name("bpfrl"))

POD_ADDRESS: Final = "10.77.0.2"
PEER_ADDRESS: Final = "10.77.0.1"
POD_ADDRESS_6: Final = "fd77::2"
PEER_ADDRESS_6: Final = "fd77::1"

# What TCP needs to fill 1 Gbit/s with one flow over 80 ms: twice the 10 MB under way, and what the kernel adds to each.
# And nothing that one transfer found out may be remembered by the next one to the same address.
_LONG_TCP: Final = (
    "net.ipv4.tcp_rmem=4096 131072 67108864",
    "net.ipv4.tcp_wmem=4096 16384 67108864",
    "net.ipv4.tcp_no_metrics_save=1",
)
_FORWARDING: Final = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
_WIRE: Final = "wire"
# Packets that the kernel keeps for the wire: more than any sender has under way, so that none is lost on the way in.
_WIRE_QUEUE: Final = 10_000

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
    far_namespace: str
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def world_cgroup(self) -> Path:
        """The cgroup of all processes that are not the pod's."""
        return self.cgroup_root / "world"

    def in_pod(self, *command: str) -> list[str]:
        """The command line that runs a command as a process of the pod."""
        return in_namespace(self.pod_namespace, *_in_cgroup(self.pod_cgroup / "container", *command))

    def in_peer(self, *command: str) -> list[str]:
        """The command line that runs a command on the other end of the veth."""
        return in_namespace(self.peer_namespace, *_in_cgroup(self.world_cgroup, *command))

    def in_far(self, *command: str) -> list[str]:
        """The command line that runs a command on the other end of the wire; see :func:`far_address`."""
        return in_namespace(self.far_namespace, *_in_cgroup(self.world_cgroup, *command))

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
        end(process)
        self._processes.remove(process)

    def stop(self) -> None:
        """End what :meth:`start` started, the latest first."""
        for process in reversed(self._processes.copy()):
            self.end(process)

    def transfer(
        self,
        *options: str,
        port: int = 5201,
        to_pod: bool = False,
        address: str | None = None,
        far: str | None = None,
    ) -> Transfer:
        """Prepare an iperf3 transfer from the pod to its peer, or the other way round: its server listens.

        Args:
            options: those of iperf3's client.
            port: the server's; transfers at the same time each need their own.
            to_pod: the server is in the pod.
            address: of the server, where it is not the usual one.
            far: the other end is not the peer but this :func:`far_address`, and the RTT is the one of that.
        """
        world, namespace = (self.in_far, self.far_namespace) if far else (self.in_peer, self.peer_namespace)
        # What is bound in the far namespace makes the RTT, whichever side is there.
        bound = ["-B", far] if far else []
        server_command = ["iperf3", "-s", "-J", "-1", "-p", str(port)]
        client_command = ["iperf3", "-J", "-p", str(port), *options, "-c"]
        if to_pod:
            target = address or (POD_ADDRESS_6 if far and ":" in far else POD_ADDRESS)
            server = self.start(self.in_pod(*server_command))
            wait_for_listener(self.pod_namespace, port)
            return Transfer(self, server, world(*client_command, target, *bound))
        server = self.start(world(*server_command, *bound))
        wait_for_listener(namespace, port)
        return Transfer(self, server, self.in_pod(*client_command, address or far or PEER_ADDRESS))

    def iperf3(
        self,
        *options: str,
        port: int = 5201,
        to_pod: bool = False,
        address: str | None = None,
        far: str | None = None,
    ) -> Json:
        """Run iperf3 from the pod to its peer (or the other way round) and return the client's report."""
        transfer = self.transfer(*options, port=port, to_pod=to_pod, address=address, far=far)
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
def lab(mtu: int = 1500, rtts: Sequence[float] = ()) -> Iterator[Lab]:
    """Build the test bed, and take it down whatever happens.

    Args:
        mtu: of the veth, and of the wire.
        rtts: round-trip times, ms, at which the pod finds a :func:`far_address` each; none: there is no far namespace.
    """
    tag = f"bpfrl-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    pod_uid = str(uuid.uuid4())
    cgroup_root = cgroup.mount_point() / tag
    stem = "kubepods-besteffort"
    pod_cgroup = cgroup_root / "kubepods.slice" / f"{stem}.slice" / f"{stem}-pod{pod_uid.replace('-', '_')}.slice"
    bpffs = Path(tempfile.mkdtemp(prefix=tag))
    bed = Lab(pod_uid, cgroup_root, pod_cgroup, bpffs, f"{tag}-pod", f"{tag}-peer", f"{tag}-far")
    with contextlib.ExitStack() as undo:
        undo.callback(bed.bpffs.rmdir)
        run("mount", "-t", "bpf", "bpf", str(bed.bpffs))
        undo.callback(run, "umount", str(bed.bpffs))
        (pod_cgroup / "container").mkdir(parents=True)
        undo.callback(remove_cgroups, cgroup_root)
        bed.world_cgroup.mkdir()
        for namespace in (bed.pod_namespace, bed.peer_namespace, *([bed.far_namespace] if rtts else [])):
            run("ip", "netns", "add", namespace)
            undo.callback(run, "ip", "netns", "del", namespace)
        _connect(bed, mtu)
        undo.callback(bed.stop)
        if rtts:
            _connect_far(bed, mtu, rtts)
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


def _connect_far(bed: Lab, mtu: int, rtts: Sequence[float]) -> None:
    pod, peer, far = bed.pod_namespace, bed.peer_namespace, bed.far_namespace
    addresses = {far_address(index, ipv6): rtt for index, rtt in enumerate(rtts) for ipv6 in (False, True)}
    bed.adopt(wire.start((peer, _WIRE), (far, _WIRE), addresses))
    for namespace, settings in ((pod, _LONG_TCP), (far, _LONG_TCP), (peer, _FORWARDING)):
        run(*in_namespace(namespace, "sysctl", "-qw", *settings))
    for namespace in (peer, far):
        options = ("mtu", str(mtu), "txqueuelen", str(_WIRE_QUEUE), "addrgenmode", "none")
        run("ip", "-n", namespace, "link", "set", _WIRE, *options, "up")
    run("ip", "-n", far, "link", "set", "lo", "up")
    for address in addresses:
        nodad = ("nodad",) if ":" in address else ()
        run("ip", "-n", far, "address", "add", address, "dev", _WIRE, *nodad)
        run("ip", "-n", peer, "route", "add", address, "dev", _WIRE)
    for version, gateway in (("-4", PEER_ADDRESS), ("-6", PEER_ADDRESS_6)):
        run("ip", "-n", far, version, "route", "add", "default", "dev", _WIRE)
        run("ip", "-n", pod, version, "route", "add", "default", "via", gateway)
    _wait_for_link(bed)


def _wait_for_link(bed: Lab) -> None:
    # IPv6 takes up to a second to see that a new veth is up, and says that there is no route until then.
    deadline = time.monotonic() + _START_SECONDS
    while not bed.ping(1, address=PEER_ADDRESS_6):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the pod has no link after {_START_SECONDS} s")
        time.sleep(0.02)


def far_address(index: int, ipv6: bool = False) -> str:
    """The address in the far namespace whose RTT is the one of that index in what :func:`lab` was given."""
    return f"fd78::{index + 1:x}" if ipv6 else f"10.78.0.{index + 1}"


def wait_for_listener(namespace: str, port: int) -> None:
    """Return when something listens on a TCP port of a namespace."""
    command = in_namespace(namespace, "ss", "-Hltn", f"sport = :{port}")
    deadline = time.monotonic() + _START_SECONDS
    while not subprocess.run(command, capture_output=True, check=True).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port} after {_START_SECONDS} s")
        time.sleep(0.02)


def end(process: subprocess.Popen[Any], seconds: float = _STOP_SECONDS) -> None:
    """Ask a process to end, and see to it after so many seconds."""
    process.terminate()
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def in_namespace(namespace: str, *command: str) -> list[str]:
    """The command line that runs a command in a network namespace, with the cgroups that are here."""
    # Not `ip netns exec`: it mounts a new /sys, in which there are no cgroups.
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


def _in_cgroup(folder: Path, *command: str) -> list[str]:
    return ["sh", "-c", _JOIN, "sh", str(folder), *command]


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
