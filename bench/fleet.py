"""A test bed with a control plane and several nodes, all of them real processes on one machine.

    namespace TAG             10.78.0.1  ── bridge ── API servers, masters
    namespace TAG-node-0      10.78.0.10 ── veth ──┘  serve-node, with a bpffs and a cgroup tree of its own
    namespace TAG-node-1      10.78.0.11 ── veth ──┘  ...

A node's pods are cgroups laid out as the kubelet's systemd driver does; :meth:`Node.start_pod` plays the kubelet.
TLS is real, by ``bpfrl certs init``. Everything carries this process's id in its name and is gone when the context
ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.lab import BPFRL, in_namespace, remove_cgroups, run
from bpfrl import cgroup
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.limits import Limits
from bpfrl.node.agent import Agent

# Kinds of the programs that a limiter has on its pod's cgroup, and cooperation on that of all pods.
LIMITER_KINDS: Final = ["cgroup_inet_egress", "cgroup_inet_ingress", "cgroup_sock_ops"]
COOPERATION_KINDS: Final = ["cgroup_sock_ops"]
CONTROL_ADDRESS: Final = "10.78.0.1"
NODE_PORT: Final = 10002
_NODE_ADDRESS: Final = "10.78.0.{}"
_FIRST_NODE: Final = 10
_STOP_SECONDS: Final = 30.0
_START_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02
_QOS: Final = {"Guaranteed": "", "Burstable": "-burstable", "BestEffort": "-besteffort"}
_JOIN: Final = 'echo 0 >"$1/cgroup.procs" && shift && exec "$@"'
# What a kernel with its own iterators (CONFIG_BPF_PRELOAD) puts into each bpffs.
_OF_THE_KERNEL: Final = frozenset({"maps.debug", "progs.debug"})


@dataclass
class Daemon:
    """A process that may be ended and started again; its log is one file throughout."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    _before: int = field(default=0, init=False)

    @property
    def alive(self) -> bool:
        """True while it runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self.process is None:
            with self.log.open("ab") as log:
                self._before = log.tell()
                self.process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it as a service manager does, and return its exit status."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def output(self) -> str:
        """Everything that it has logged."""
        return self.log.read_text() if self.log.exists() else ""

    def news(self) -> str:
        """What it has logged since it was started last."""
        return self.log.read_bytes()[self._before :].decode() if self.log.exists() else ""

    def wait(self, seconds: float = _STOP_SECONDS) -> int:
        """Wait until it ends by itself, and return its exit status."""
        if self.process is None:
            raise RuntimeError("it does not run")
        status = self.process.wait(seconds)
        self.process = None
        return status

    @property
    def pid(self) -> int:
        """The process's id.

        Raises:
            RuntimeError: it does not run.
        """
        if self.process is None:
            raise RuntimeError("it does not run")
        return self.process.pid

    def memory(self) -> int:
        """Its resident memory, byte."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """The most resident memory that it ever had, byte."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def cpu(self) -> float:
        """The CPU time that it has used, s."""
        # The command's name may hold spaces; behind its bracket, user and system time are the 12th and 13th.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@dataclass(eq=False)
class Node:
    """One node: its daemon, its pods' cgroups and its bpffs."""

    name: str
    address: str
    namespace: str
    cgroup_root: Path
    bpffs: Path
    daemon: Daemon
    pods: dict[str, Path] = field(default_factory=dict)

    @property
    def kubepods(self) -> Path:
        """The cgroup of all pods, which the kubelet makes as it starts."""
        return self.cgroup_root / "kubepods.slice"

    @property
    def cooperation(self) -> str:
        """The name in the bpffs of what all pods share."""
        return f"cooperation-{cgroup.id_of(self.kubepods)}"

    def start_pod(self, uid: str, qos: str = "BestEffort") -> Path:
        """Make a pod's cgroup, as the kubelet does, with one container."""
        stem = f"kubepods{_QOS[qos]}"
        parent = self.kubepods / (f"{stem}.slice" if _QOS[qos] else "")
        path = parent / f"{stem}-pod{uid.replace('-', '_')}.slice"
        (path / "container").mkdir(parents=True)
        self.pods[uid] = path
        return path

    def end_pod(self, uid: str) -> None:
        """Remove a pod's cgroup."""
        remove_cgroups(self.pods.pop(uid))

    def in_pod(self, uid: str, *command: str) -> list[str]:
        """The command line that runs a command as a process of a pod, in the network namespace that is here."""
        return ["sh", "-c", _JOIN, "sh", str(self.pods[uid] / "container"), *command]

    def serves(self) -> bool:
        """True when its daemon has said, since it was started last, that it serves."""
        return "serving on" in self.daemon.news()

    def connect(self) -> None:
        """Plug its network cable in."""
        run("ip", "-n", self.namespace, "link", "set", "eth0", "up")

    def disconnect(self) -> None:
        """Pull its network cable: nothing is refused, and nothing answers."""
        run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def limits(self) -> dict[str, tuple[int, int]]:
        """What is in force here by UID, as (egress, ingress) in bit/s with 0 for none.

        A broken folder has (-1, -1). It is what bpfrl list tells, asked for without a process of its own.
        """
        found = Agent(self.bpffs).limiters()
        return {each.uid: (-1, -1) for each in found if isinstance(each, Broken)} | {
            each.pod.uid: _rates(each.limits) for each in found if isinstance(each, Status)
        }

    def items(self) -> dict[str, dict[str, Any]]:
        """What bpfrl list tells programs, by UID."""
        return {item["uid"]: item for item in json.loads(self.bpfrl("list", "-o", "json"))["items"]}

    def attached(self) -> dict[str, list[str]]:
        """Kinds of the programs on each pod's cgroup, as bpftool sees them; pods without any are left out."""
        return {uid: [kind for kind, _ in programs] for uid, programs in self.programs().items()}

    def programs(self) -> dict[str, list[tuple[str, int]]]:
        """The same with the programs' ids."""
        return {uid: programs for uid, path in self.pods.items() if (programs := _programs(path))}

    def cooperating(self) -> list[str]:
        """Kinds of the programs on the cgroup of all pods, as bpftool sees them."""
        return [kind for kind, _ in _programs(self.kubepods)]

    def pinned(self) -> list[str]:
        """The names in the bpffs."""
        return sorted({*os.listdir(self.bpffs)} - _OF_THE_KERNEL)

    def limiters(self) -> list[str]:
        """The names in the bpffs, but for what all pods share."""
        return [name for name in self.pinned() if name != self.cooperation]

    def bpfrl(self, *arguments: str) -> str:
        """Run the command by hand on this node, and return what it says."""
        return subprocess.run(
            [BPFRL, *arguments],
            env=self.daemon.environment,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=True,
        ).stdout


@dataclass
class Fleet:
    """Nodes, and whatever masters are started; see :func:`fleet`."""

    tag: str
    folder: Path
    nodes: list[Node]
    masters: list[Daemon] = field(default_factory=list)

    @property
    def certificates(self) -> Path:
        """The folder of ``bpfrl certs init``."""
        return self.folder / "certs"

    def master(self, *options: str, start: bool = True) -> Daemon:
        """A master in the control plane's namespace, with this fleet's certificates."""
        command = [BPFRL, "serve-master", "--certs", str(self.certificates / "master"), *options]
        log = self.folder / f"master-{len(self.masters)}.log"
        daemon = Daemon(in_namespace(self.tag, *command), dict(os.environ), log)
        self.masters.append(daemon)
        if start:
            daemon.start()
        return daemon

    def stop(self) -> None:
        """End every daemon."""
        for daemon in (*self.masters, *(node.daemon for node in self.nodes)):
            daemon.kill()


@contextlib.contextmanager
def fleet(count: int = 1) -> Iterator[Fleet]:
    """Build the test bed with nodes that serve and whose pods cooperate, and take it down whatever happens."""
    tag = f"bpfrl-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=tag)))
        bed = Fleet(tag, folder, [])
        run(BPFRL, "certs", "init", str(bed.certificates))
        _add_namespace(tag, undo)
        run("ip", "-n", tag, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", tag, "address", "add", f"{CONTROL_ADDRESS}/24", "dev", "bridge")
        run("ip", "-n", tag, "link", "set", "bridge", "up")
        root = cgroup.mount_point() / tag
        root.mkdir()
        undo.callback(remove_cgroups, root)
        for number in range(count):
            bed.nodes.append(_add_node(bed, number, root, undo))
        undo.callback(bed.stop)
        for node in bed.nodes:
            node.daemon.start()
        for node in bed.nodes:
            wait_for(node.serves, _START_SECONDS, node.daemon.output)
        wait_for(lambda: all(node.pinned() == [node.cooperation] for node in bed.nodes), _START_SECONDS)
        yield bed


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], Any] = lambda: None) -> float:
    """Return how long it took, s, until a condition holds.

    Raises:
        TimeoutError: it does not; the text ends with what ``what`` says then.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"not within {seconds} s: {what()}")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - start


def _add_node(bed: Fleet, number: int, root: Path, undo: contextlib.ExitStack) -> Node:
    name = f"node-{number}"
    namespace, address = f"{bed.tag}-{name}", _NODE_ADDRESS.format(_FIRST_NODE + number)
    _add_namespace(namespace, undo)
    ends = ("link", "add", f"node{number}", "netns", bed.tag, "type", "veth", "peer", "name", "eth0")
    run("ip", *ends, "netns", namespace)
    run("ip", "-n", bed.tag, "link", "set", f"node{number}", "master", "bridge", "up")
    run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", namespace, "link", "set", "eth0", "up")
    bpffs = bed.folder / name
    bpffs.mkdir()
    run("mount", "-t", "bpf", "bpf", str(bpffs))
    undo.callback(run, "umount", str(bpffs))
    cgroup_root = root / name
    (cgroup_root / "kubepods.slice").mkdir(parents=True)
    environment = os.environ | {"BPFRL_BPFFS": str(bpffs), "BPFRL_CGROUP_ROOT": str(cgroup_root)}
    command = [BPFRL, "serve-node", "--certs", str(bed.certificates / "node"), "--listen", f"{address}:{NODE_PORT}"]
    daemon = Daemon(in_namespace(namespace, *command), environment, bed.folder / f"{name}.log")
    return Node(name, address, namespace, cgroup_root, bpffs, daemon)


def _add_namespace(name: str, undo: contextlib.ExitStack) -> None:
    run("ip", "netns", "add", name)
    undo.callback(run, "ip", "netns", "del", name)
    run("ip", "-n", name, "link", "set", "lo", "up")


def _programs(path: Path) -> list[tuple[str, int]]:
    """Kinds and ids of the programs on a cgroup."""
    output = subprocess.run(["bpftool", "-j", "cgroup", "show", path], capture_output=True, check=True).stdout
    return sorted((program["attach_type"], program["id"]) for program in json.loads(output.strip() or b"[]"))


def _rates(limits: Limits) -> tuple[int, int]:
    egress, ingress = (rate.bits if rate else 0 for rate in (limits.egress, limits.ingress))
    return egress, ingress
