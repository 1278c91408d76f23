"""Everything that may go wrong in a cluster of :mod:`bench.chaos`, and how long it may take to come right again.

:mod:`bench.endure` has each of them happen, one after the other, and :mod:`bench.soak` at random.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Final

from elftools.elf.elffile import ELFFile

from bench import chaos, inject
from bench.chaos import Cluster, Disturbance
from bench.fleet import NODE_PORT, Daemon, Node, wait_for
from bench.kubeapi import StandIn
from bench.lab import BPFRL, in_namespace, run
from bpfrl import cgroup

_START_SECONDS: Final = 30.0
_DAY_SECONDS: Final = 86_400
# Where clocks of their own begin: whoever goes back from there by a day finds certificates that are valid already.
_AHEAD_SECONDS: Final = 2 * _DAY_SECONDS
_PODS: Final = "/api/v1/pods"
# What takes longer is too long for a soak.
_OFTEN_SECONDS: Final = 10.0
# Where there is one, it has the memory of all cgroups (version 1).
_MEMORY: Final = Path("/sys/fs/cgroup/memory")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


class Group:
    """What faults happen to, as headings of the page."""

    PROCESSES = "Processes"
    API = "The API server"
    NETWORK = "The network between master and node"
    NODE = "The node"
    CERTIFICATES = "Certificates and clocks"
    STEPS = "Each single step"


@dataclass(frozen=True)
class Fault:
    """A fault, as it is told.

    Attributes:
        group: under which heading.
        what: what is done, for people.
        disturbance: what does it.
        stand_in: whether only the stand-in API server can do it.
        steps: at how many steps it happens, one after the other, for what happens at a step.
    """

    group: str
    what: str
    disturbance: Disturbance
    stand_in: bool
    steps: int

    @property
    def often(self) -> bool:
        """Whether it may happen in a soak: it takes no minutes."""
        return self.disturbance.lasts <= _OFTEN_SECONDS

    def all_steps(self) -> Iterator[Disturbance]:
        """All that belongs to it."""
        for step in range(1, self.steps + 1):
            happens: Callable[..., AbstractContextManager[None]] = self.disturbance.happens
            yield replace(self.disturbance, happens=partial(happens, step=step))
        if not self.steps:
            yield self.disturbance


FAULTS: Final[dict[str, Fault]] = {}


def _fault(
    group: str,
    name: str,
    what: str,
    *,
    lasts: float,
    within: float,
    served: bool = True,
    stand_in: bool = False,
    steps: int = 0,
) -> Callable[[Callable[..., Iterator[None]]], Callable[..., Iterator[None]]]:
    def register(happens: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        disturbance = Disturbance(name, contextmanager(happens), lasts, within, served)
        FAULTS[name] = Fault(group, what, disturbance, stand_in, steps)
        return happens

    return register


def _victim(cluster: Cluster) -> Node:
    """The node that a fault meets: not the last one, whose daemon always lives, so that what it leaks adds up."""
    return cluster.dice.choice(cluster.bed.nodes[:-1])


# Processes.


@_fault(Group.PROCESSES, "node killed", "`kill -9` of a node's daemon; started again after 2 s", lasts=2, within=15)
def _node_killed(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    node.daemon.kill()
    yield
    node.daemon.start()


@_fault(Group.PROCESSES, "node stopped", "a node's daemon does nothing for 8 s (SIGSTOP)", lasts=8, within=30)
def _node_stopped(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.stopped(_victim(cluster).daemon.pid):
        yield


@_fault(
    Group.PROCESSES,
    "leader killed",
    "`kill -9` of the master that leads; the other takes the Lease over",
    lasts=2,
    within=30,
)
def _leader_killed(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    leader = cluster.leader()
    leader.kill()
    yield
    leader.start()


@_fault(
    Group.PROCESSES,
    "leader stopped",
    "the leading master does nothing for 8 s, longer than its Lease: two believe that they lead",
    lasts=8,
    within=30,
)
def _leader_stopped(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.stopped(cluster.leader().pid):
        yield


_STATE_CALLS: Final = "bpf,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,setns"
_TALK_CALLS: Final = "sendmsg,sendto,write,recvmsg,recvfrom,read"
_NODE_STEPS: Final = 60
_MASTER_STEPS: Final = 40


@_fault(
    Group.STEPS,
    "node killed at a step",
    f"`kill -9` of a node's daemon at the n-th system call that changes what the kernel has, n from 1 to {_NODE_STEPS},"
    " while it attaches, updates and detaches",
    lasts=1,
    within=20,
    steps=_NODE_STEPS,
)
def _node_killed_at(cluster: Cluster, _: ExitStack, step: int = 0) -> Iterator[None]:
    step = step or cluster.dice.randint(1, _NODE_STEPS)
    yield from _killed_at(_victim(cluster).daemon, f"{_STATE_CALLS}:signal=KILL:when={step}")


@_fault(
    Group.STEPS,
    "master killed at a step",
    "`kill -9` of the leading master at a thread's n-th system call that sends or receives, n from 1 to"
    f" {_MASTER_STEPS}: between deciding, calling, hearing the answer, and writing Event and Lease",
    lasts=1,
    within=30,
    steps=_MASTER_STEPS,
)
def _master_killed_at(cluster: Cluster, _: ExitStack, step: int = 0) -> Iterator[None]:
    step = step or cluster.dice.randint(1, _MASTER_STEPS)
    yield from _killed_at(cluster.leader(), f"{_TALK_CALLS}:signal=KILL:when={step}")


def _killed_at(daemon: Daemon, rule: str) -> Iterator[None]:
    with inject.system_calls(daemon.pid, rule):
        yield
    if not daemon.alive:
        daemon.restart()


# The API server.


@_fault(
    Group.API, "server killed", "`kill -9` of the API server; started again after 3 s", lasts=3, within=30, served=False
)
def _server_killed(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    cluster.api.kill()
    yield
    cluster.api.start()


@_fault(
    Group.API,
    "server stopped",
    "the API server takes connections and does not answer for 8 s (SIGSTOP)",
    lasts=8,
    within=40,
    served=False,
)
def _server_stopped(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.stopped(cluster.api.pid):
        yield


def _hindered(
    name: str, what: str, lasts: float, within: float, begins: Sequence[dict[str, object]], **end: object
) -> None:
    """A fault that the stand-in has itself."""

    def happens(cluster: Cluster, _: ExitStack) -> Iterator[None]:
        assert isinstance(cluster.api, StandIn)  # noqa: S101 - it is registered for nothing else
        for begin in begins:
            cluster.api.faults(**begin)
        yield
        cluster.api.faults(**end)

    _fault(Group.API, name, what, lasts=lasts, within=within, stand_in=True)(happens)


def _refusing(code: int, **more: object) -> dict[str, object]:
    return {"status": {"code": code, "count": 10**6, "path": _PODS, **more}}


_AGAIN: Final[dict[str, object]] = {"drop": True}
_hindered(
    "server says 429",
    "watches break; the API server refuses all lists and watches with 429 and Retry-After: 1",
    5,
    20,
    [_refusing(429, retryAfter=1), _AGAIN],
    status=None,
)
_hindered("server says 500", "the same with 500", 5, 30, [_refusing(500), _AGAIN], status=None)
_hindered(
    "server says 410",
    "history is forgotten; all watches are told 410, and the lists that follow 500",
    3,
    20,
    [_refusing(500, verb="list"), {"compact": True}],
    status=None,
)
_hindered("server breaks connections", "watches are cut off without a word", 2, 10, [_AGAIN], drop=True)
_hindered("server sends garbage", "watches get a line that is no JSON", 2, 10, [{"garbage": True}], garbage=True)
_hindered("server stalls", "watches stay open and are silent for 5 s", 5, 10, [{"stall": True}], stall=False)
_hindered(
    "server trickles",
    "lists and watches come at 2 kB/s; watches break before",
    5,
    30,
    [{"trickle": 2048}, _AGAIN],
    trickle=0,
)
_hindered(
    "server truncates lists",
    "history is forgotten; lists break off half-way for 5 s",
    5,
    20,
    [{"truncate": True}, {"compact": True}],
    truncate=False,
)


@_fault(
    Group.API,
    "server out of reach",
    "packets to and from the API server get lost for 8 s: no reset comes",
    lasts=8,
    within=60,
    served=False,
)
def _server_lost(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.lost(
        cluster.bed.tag, f"OUTPUT -p tcp --dport {cluster.api.port}", f"OUTPUT -p tcp --sport {cluster.api.port}"
    ):
        yield


@_fault(
    Group.API,
    "server's connections forgotten",
    "what is open to the API server is silent for ever, as behind a"
    " gateway that has forgotten it; new connections work",
    lasts=10,
    within=60,
)
def _server_half_open(cluster: Cluster, undo: ExitStack) -> Iterator[None]:
    # They stay lost until all is well again.
    ports = _connected(cluster, cluster.api.port)
    undo.enter_context(
        inject.lost(
            cluster.bed.tag,
            *(f"OUTPUT -p tcp --sport {port} --dport {cluster.api.port}" for port in ports),
            *(f"OUTPUT -p tcp --dport {port} --sport {cluster.api.port}" for port in ports),
        )
    )
    yield


def _connected(cluster: Cluster, port: int) -> list[int]:
    """The local ports of the masters' connections to a port here."""
    command = in_namespace(cluster.bed.tag, "ss", "-Htnp", "state", "established", f"( dport = :{port} )")
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pids = [f"pid={master.pid}," for master in cluster.bed.masters]
    return [int(line.split()[2].rpartition(":")[2]) for line in lines if any(each in line for each in pids)]


# The network.


@_fault(
    Group.NETWORK,
    "partition",
    "a node's link is down for 60 s, longer than connections are kept alive",
    lasts=60,
    within=40,
)
@_fault(
    Group.NETWORK,
    "cable pulled",
    "a node's link is down for 5 s: nothing is refused, and nothing answers",
    lasts=5,
    within=30,
)
def _link_down(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    node.disconnect()
    yield
    node.connect()


@_fault(
    Group.NETWORK,
    "node hears nothing",
    "what is sent to a node gets lost for 8 s, not what it sends",
    lasts=8,
    within=40,
)
def _deaf(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.lost(_victim(cluster).namespace, "INPUT -i eth0"):
        yield


@_fault(
    Group.NETWORK,
    "node is not heard",
    "what a node sends gets lost for 8 s, not what is sent to it: what was asked is done, and nobody hears of it",
    lasts=8,
    within=40,
)
def _mute(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with inject.lost(_victim(cluster).namespace, f"OUTPUT -p tcp --sport {NODE_PORT}"):
        yield


@_fault(Group.NETWORK, "30 % loss", "30 % of all packets to and from all nodes get lost for 10 s", lasts=10, within=40)
def _lossy(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    chance = "-m statistic --mode random --probability 0.3"
    with ExitStack() as stack:
        for node in cluster.bed.nodes:
            stack.enter_context(inject.lost(node.namespace, f"INPUT -i eth0 {chance}", f"OUTPUT -o eth0 {chance}"))
        yield


# The node.


def _umount(path: Path) -> None:
    # A daemon that holds its lock there is done in a moment.
    def unmounted() -> bool:
        return subprocess.run(["umount", path], capture_output=True, check=False).returncode == 0

    wait_for(unmounted, _START_SECONDS)


@_fault(
    Group.NODE,
    "bpffs remounted",
    "a node's bpffs is unmounted and mounted anew under the daemon: all pins are gone, and with them all limits",
    lasts=2,
    within=75,
)
def _bpffs_remounted(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    _umount(node.bpffs)
    cluster.lose_limits(node)
    run("mount", "-t", "bpf", "bpf", str(node.bpffs))
    yield


@_fault(
    Group.NODE,
    "bpffs hidden",
    "another bpffs is mounted over a node's for 3 s: limits are in force, and nobody sees them",
    lasts=3,
    within=75,
)
def _bpffs_hidden(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    run("mount", "-t", "bpf", "bpf", str(node.bpffs))
    try:
        yield
    finally:
        _umount(node.bpffs)


@_fault(Group.NODE, "bpffs read-only", "a node's bpffs is read-only for 3 s", lasts=3, within=30)
def _bpffs_read_only(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    run("mount", "-o", "remount,bind,ro", str(node.bpffs))
    yield
    run("mount", "-o", "remount,bind,rw", str(node.bpffs))


@_fault(
    Group.NODE,
    "cgroups come and go",
    "pods' cgroups are removed at any moment of attaching, for 4 s",
    lasts=4,
    within=30,
)
def _cgroups_flicker(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    end = time.monotonic() + 4
    while time.monotonic() < end:
        cluster.flicker(cluster.dice.uniform(0, 0.03))
    yield


@_fault(
    Group.NODE,
    "cgroups made anew",
    "all cgroups of a node's pods are removed, and made again with the same UIDs",
    lasts=1,
    within=75,
)
def _cgroups_anew(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    cluster.restart_pods(_victim(cluster))
    yield


@_fault(
    Group.NODE,
    "node out of descriptors",
    "a node's daemon can open no file for 4 s (RLIMIT_NOFILE)",
    lasts=4,
    within=30,
)
def _node_out_of_files(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with _out_of_descriptors(_victim(cluster).daemon):
        yield


@_fault(
    Group.NODE,
    "master out of descriptors",
    "the leading master can open no file for 4 s, and its connections break",
    lasts=4,
    within=40,
)
def _master_out_of_files(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    with _out_of_descriptors(cluster.leader()):
        if isinstance(cluster.api, StandIn):
            cluster.api.faults(drop=True)
        yield


@contextmanager
def _out_of_descriptors(daemon: Daemon) -> Iterator[None]:
    number = daemon.pid
    before = resource.prlimit(number, resource.RLIMIT_NOFILE)
    # What is open stays open.
    resource.prlimit(number, resource.RLIMIT_NOFILE, (1, before[1]))
    yield
    resource.prlimit(number, resource.RLIMIT_NOFILE, before)


def _refused_by_kernel(error: str) -> None:
    def happens(cluster: Cluster, _: ExitStack) -> Iterator[None]:
        with inject.system_calls(_victim(cluster).daemon.pid, f"bpf:error={error}:when=5+7"):
            yield

    _fault(
        Group.NODE,
        f"bpf() says {error}",
        f"every seventh bpf() of a node's daemon fails with {error} for 4 s",
        lasts=4,
        within=40,
    )(happens)


for _error in ("ENOMEM", "ENOSPC", "EPERM", "EBUSY"):
    _refused_by_kernel(_error)


@_fault(
    Group.NODE,
    "no memory",
    "a node's daemon may have no more memory than it has: the kernel ends it; it is started again",
    lasts=4,
    within=30,
)
def _no_memory(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    daemon = _victim(cluster).daemon
    root, limit = (_MEMORY, "memory.limit_in_bytes") if _MEMORY.is_dir() else (cgroup.mount_point(), "memory.max")
    group = root / f"{cluster.bed.tag}-memory"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(daemon.pid))
        # What it had before is charged elsewhere.
        (group / limit).write_text(str(2**20))
        yield
        daemon.restart()
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), _START_SECONDS)
        group.rmdir()


@_fault(
    Group.NODE,
    "disk full",
    "a node's daemon is killed and started where its compile cache is empty and no disk has"
    " any room; there is room again after 6 s",
    lasts=6,
    within=75,
)
def _disk_full(cluster: Cluster, undo: ExitStack) -> Iterator[None]:
    node = _victim(cluster)
    disk = _disk(undo)
    full = disk / "full"
    _fill(full)
    _restart_with(node.daemon, undo, {"XDG_CACHE_HOME": str(disk), "TMPDIR": str(disk)})
    yield
    full.unlink()
    if not node.daemon.alive:
        node.daemon.restart()


def _disk(undo: ExitStack) -> Path:
    """A small disk of its own."""
    disk = Path(tempfile.mkdtemp(prefix="disk-"))
    undo.callback(disk.rmdir)
    run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk))
    undo.callback(run, "umount", "-l", str(disk))
    return disk


def _fill(file: Path) -> None:
    try:
        file.write_bytes(bytes(2**20))
    except OSError:
        return
    raise RuntimeError(f"{file} is on a disk that has no end")


def _restart_with(daemon: Daemon, undo: ExitStack, environment: Mapping[str, str]) -> None:
    """Start a daemon anew with this besides, and, when all is well again, without it."""
    before = daemon.environment

    def restart(environment: dict[str, str]) -> None:
        daemon.environment = environment
        daemon.restart()

    undo.callback(restart, before)
    restart({**before, **environment})


@_fault(
    Group.NODE,
    "verifier refuses",
    "both masters are started anew with programs that no kernel takes; limits stay as"
    " they were. After 5 s they are started with good ones",
    lasts=5,
    within=40,
)
def _verifier_refuses(cluster: Cluster, _: ExitStack) -> Iterator[None]:
    cache = cluster.bed.folder / "spoiled"
    spoil_cache(cache)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, cache)
        for master in cluster.bed.masters:
            _restart_with(master, undo, {"XDG_CACHE_HOME": str(cache)})
        yield


def spoil_cache(folder: Path) -> None:
    """Fill a compile cache with what no kernel takes: a limiter's program reads a register that was never written."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    subprocess.run(
        [BPFRL, "generate", "--rate", "1mbit", "-o", os.devnull], env=environment, check=True, capture_output=True
    )
    [file] = (path for path in (folder / "bpfrl").iterdir() if b"bpfrl_egress" in path.read_bytes())
    image = bytearray(file.read_bytes()[:-_DIGEST_BYTES])
    place = _program_at(bytes(image), "cgroup_skb/egress")
    image[place : place + 8] = bytes((0xBF, 0x90, 0, 0, 0, 0, 0, 0))  # r0 = r9
    file.write_bytes(bytes(image) + hashlib.sha256(image).digest())


def _program_at(image: bytes, section: str) -> int:
    found = ELFFile(BytesIO(image)).get_section_by_name(section)
    if found is None:
        raise RuntimeError(f"no section {section}")
    return int(found["sh_offset"])


# Certificates and clocks.


def _clock_jumps(name: str, what: str, by: int, within: float) -> None:
    def happens(cluster: Cluster, undo: ExitStack) -> Iterator[None]:
        nodes = [node.daemon for node in cluster.bed.nodes[:-1]]
        clock = _by_own_clock(cluster, undo, *cluster.bed.masters, *nodes)
        cluster.await_acting()
        clock.set(_AHEAD_SECONDS + by)
        yield

    _fault(Group.CERTIFICATES, name, what, lasts=3, within=within)(happens)


def _by_own_clock(cluster: Cluster, undo: ExitStack, *daemons: Daemon) -> inject.Clock:
    clock = inject.Clock(cluster.bed.folder)
    clock.set(_AHEAD_SECONDS)
    for daemon in daemons:
        _restart_with(daemon, undo, clock.environment)
    return clock


_clock_jumps("clocks a day ahead", "the wall clocks of masters and nodes jump a day ahead", _DAY_SECONDS, 20)
_clock_jumps("clocks a day back", "they jump back by a day", -_DAY_SECONDS, 20)


@_fault(
    Group.CERTIFICATES,
    "clock back, leader killed",
    "the wall clock of the following master jumps back by a day, and the leader is killed",
    lasts=8,
    within=20,
)
def _clock_back_leader_killed(cluster: Cluster, undo: ExitStack) -> Iterator[None]:
    leader = cluster.leader()
    followers = [master for master in cluster.bed.masters if master is not leader]
    clock = _by_own_clock(cluster, undo, *followers)
    for follower in followers:
        wait_for(lambda follower=follower: "watching pods" in follower.news(), _START_SECONDS)  # type: ignore[misc]
    time.sleep(2 * chaos.LEASE_SECONDS)  # it has seen the leader's Lease
    clock.set(_AHEAD_SECONDS - _DAY_SECONDS)
    leader.kill()
    undo.callback(leader.start)
    yield


@_fault(
    Group.CERTIFICATES,
    "certificates expire",
    "all certificates expire at work, and connections break; after 6 s there"
    " are new ones on the disk, and nothing is started anew",
    lasts=6,
    within=40,
)
def _certificates_expire(cluster: Cluster, undo: ExitStack) -> Iterator[None]:
    clock = _by_own_clock(cluster, undo, *cluster.daemons().values())
    cluster.await_acting()
    clock.set(4 * 365 * _DAY_SECONDS)
    for node in cluster.bed.nodes:
        _break_connections(cluster, node)
    yield
    # The authority is good for ten years.
    certificates = cluster.bed.certificates
    subprocess.run(
        [BPFRL, "certs", "init", "--renew", str(certificates)],
        check=True,
        capture_output=True,
        env=os.environ | clock.environment,
    )
    undo.callback(run, BPFRL, "certs", "init", "--renew", str(certificates))


def _break_connections(cluster: Cluster, node: Node) -> None:
    run(*in_namespace(cluster.bed.tag, "ss", "-K", "dst", node.address))
