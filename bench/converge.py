"""How soon a cluster's limits hold: ``python -m bench.converge --help``.

Everything is a real process: an API server, ``bpfrl serve-master`` and ``bpfrl serve-node``, in network namespaces of
their own, with TLS between them. A pod is created without a node; then its cgroup is made; then it is bound to the
node, as a scheduler does, and that write is the one that has it limited. Nodes tell their addresses beforehand, with a
pod each, as nodes of a cluster do that run anything at all.

A limiter's folder comes under the pod's name when all of it is attached, and goes when all of it is detached: inotify
tells both in microseconds and costs the machine nothing. A changed limit is read from the pinned map. The master is
started without an election, so that a restart is not a wait for the former one's Lease.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import math
import os
import signal
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import click
import msgspec

from bench import machine
from bench.fleet import CONTROL_ADDRESS, Daemon, Fleet, Node, fleet, wait_for
from bench.kubeapi import Api, RealApi, StandIn
from bench.record import Machine
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import RETIRED, Limiter
from bpfrl.limits import Limits, PodRef
from bpfrl.master.annotations import EGRESS, INGRESS
from bpfrl.node.agent import Agent
from bpfrl.units import Rate

Rates = tuple[int, int]
Figures = TypeVar("Figures")

FIGURES: Final = Path(__file__).parent / "results" / "converge.json"
_STAND_IN: Final = "stand-in"
_REAL: Final = "kube-apiserver"
_FIRST: Final[Rates] = (10_000_000, 20_000_000)
_SECOND: Final[Rates] = (5_000_000, 6_000_000)
_THIRD: Final[Rates] = (7_000_000, 8_000_000)
_REFERENCE_ATTACHES: Final = 100
_POLL_SECONDS: Final = 0.0002
# One pod takes milliseconds and a thousand take seconds: who waits for this long waits for something that failed.
_PATIENCE_SECONDS: Final = 120.0
# A master that has something to do after its first comparison does it at once.
_SETTLE_SECONDS: Final = 2.0
_MEBI: Final = 2**20
_PODS: Final = "/api/v1/namespaces/default/pods"
# linux/inotify.h
_MOVED_TO: Final = 0x80
_DELETED: Final = 0x200
_IGNORED: Final = 0x8000
_EVENT: Final = struct.Struct("iIII")
_EVENTS_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Spread:
    """How long something took, ms."""

    median: float
    p90: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """The spread of some durations, by nearest rank."""
        ordered = sorted(1000 * each for each in seconds)

        def rank(share: float) -> float:
            return round(ordered[math.ceil(share * len(ordered)) - 1], 3)

        return cls(round(statistics.median(ordered), 3), rank(0.9), rank(0.99), round(ordered[-1], 3))


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of change to pods, one pod after the other.

    Attributes:
        name: what is done to a pod.
        sent: from just before the write is sent, until the kernel has it.
        answered: from the write's answer on; the answer may come later than the limit.
        told: from just before the write is sent, until a watch that has nothing else to do hears of it.
        master_cpu: the master's CPU time for a pod, ms.
        node_cpu: the node's.
    """

    name: str
    sent: Spread
    answered: Spread
    told: Spread
    master_cpu: float
    node_cpu: float


@dataclass(frozen=True, slots=True)
class Latency:
    """One pod after the other, on one node.

    Attributes:
        pods: how many.
        load: the machine's before the start.
        steps: what was done to them.
        attach: the agent alone, called in this process: what the kernel and it take of the first step.
        detach: likewise, of the last.
    """

    pods: int
    load: float
    steps: Sequence[Step]
    attach: Spread
    detach: Spread


@dataclass(frozen=True, slots=True)
class Wave:
    """One kind of change to all pods at once, seconds.

    Attributes:
        name: what is done to the pods.
        written: until the last write was answered.
        done: until the kernels have all of it, from before the first write.
        master_cpu: the master's CPU time.
        node_cpu: that of all nodes.
    """

    name: str
    written: float
    done: float
    master_cpu: float
    node_cpu: float


@dataclass(frozen=True, slots=True)
class Restart:
    """A master that was killed comes back to pods that are limited.

    Attributes:
        seconds: from its start until it has compared everything. One pod of each node has changed meanwhile, and the
            last of them has its limit then.
        changed: how many pods have changed.
        calls: how many calls about other pods the nodes have had from it.
    """

    seconds: float
    changed: int
    calls: int


@dataclass(frozen=True, slots=True)
class Storm:
    """Many pods at once, on several nodes.

    Attributes:
        nodes: how many.
        pods: how many.
        load: the machine's before the start.
        waves: what was done to them.
        restart: the master's, between the waves.
        wrong: pods whose limit is another one by what bpfrl list tells after the first two waves and the restart, or
            that still have one after the last.
        master_peak: the most resident memory that the master ever had, MiB.
        node_peak: the same of the node that had most.
    """

    nodes: int
    pods: int
    load: float
    waves: Sequence[Wave]
    restart: Restart
    wrong: int
    master_peak: float
    node_peak: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured against one API server."""

    machine: Machine
    command: str
    latencies: Sequence[Latency]
    storms: Sequence[Storm]


class Folders:
    """When limiters come into force and when they are gone, as the folders in the bpffs tell it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._number = self._checked(self._libc.inotify_init1(os.O_CLOEXEC))
        self._watches = [
            self._checked(self._libc.inotify_add_watch(self._number, bytes(folder), _MOVED_TO | _DELETED))
            for folder in folders
        ]
        self._seen: dict[str, float] = {}
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        """Start looking."""
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop looking."""
        for watch in self._watches:
            self._libc.inotify_rm_watch(self._number, watch)
        self._reader.join()
        os.close(self._number)

    def limited(self, uid: str) -> float:
        """When a pod's limiter came into force."""
        return self._when(uid)

    def gone(self, uid: str) -> float:
        """When a pod's limiter was gone."""
        return self._when(uid + RETIRED)

    def _when(self, name: str) -> float:
        with self._news:
            if not self._news.wait_for(lambda: name in self._seen, _PATIENCE_SECONDS):
                raise TimeoutError(f"{name} not within {_PATIENCE_SECONDS} s")
            return self._seen[name]

    def _read(self) -> None:
        ignored = 0
        while ignored < len(self._watches):
            block, now = os.read(self._number, _EVENTS_BYTES), time.monotonic()
            with self._news:
                for mask, name in _events(block):
                    ignored += bool(mask & _IGNORED)
                    # What is retired on its way out is gone only when it is deleted.
                    if bool(mask & _DELETED) == name.endswith(RETIRED):
                        self._seen[name] = now
                self._news.notify_all()

    @staticmethod
    def _checked(number: int) -> int:
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return number


class Listener:
    """A watch that does nothing but look at the clock, to tell what of a delay is the API server's.

    Args:
        api: the server.
        last: the pod whose deletion ends it.
    """

    def __init__(self, api: Api, last: str) -> None:
        self._api = api
        self._last = last
        self._version = api.request("GET", _PODS)["metadata"]["resourceVersion"]
        self._seen: dict[tuple[str, str], float] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def when(self, event: str, name: str) -> float:
        """When it has heard of a pod; it forgets that."""
        with self._news:
            if not self._news.wait_for(lambda: (event, name) in self._seen, _PATIENCE_SECONDS):
                raise TimeoutError(f"no {event} of {name} within {_PATIENCE_SECONDS} s")
            return self._seen.pop((event, name))

    def _listen(self) -> None:
        query = {"fieldSelector": "spec.nodeName!=", "resourceVersion": self._version}
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            self._api.watch(_PODS, _PATIENCE_SECONDS, **query) as events,
        ):
            for event in events:
                now, name = time.monotonic(), event["object"]["metadata"]["name"]
                with self._news:
                    self._seen[event["type"], name] = now
                    self._news.notify_all()
                if (event["type"], name) == ("DELETED", self._last):
                    return


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the test bed."""

    name: str
    uid: str
    node: Node

    @property
    def folder(self) -> Path:
        """Where its limiter is, if it has one."""
        return self.node.bpffs / self.uid


@dataclass(frozen=True, slots=True)
class Cluster:
    """A fleet with an API server and a master that acts."""

    bed: Fleet
    api: Api
    master: Daemon

    def create(self, count: int, stem: str = "pod") -> list[Pod]:
        """Make pods that nobody has scheduled yet, and their cgroups, dealt out to the nodes in turn."""
        return [self._create(f"{stem}-{number}", self._dealt(number)) for number in range(count)]

    def place(self, name: str, node: Node) -> None:
        """Make a pod that runs on a node already."""
        created = self.api.create_pod(name, node=node.name, host_ip=node.address, annotations=asking(_FIRST))
        node.start_pod(created["metadata"]["uid"])

    def bind(self, pod: Pod) -> None:
        """Schedule a pod."""
        target = {"apiVersion": "v1", "kind": "Node", "name": pod.node.name}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name}, "target": target}
        self.api.request("POST", f"{_PODS}/{pod.name}/binding", binding)

    def change(self, pod: Pod, rates: Rates) -> None:
        """Give a pod other limits."""
        self.api.annotate(pod.name, asking(rates))

    def delete(self, pod: Pod) -> None:
        """Delete a pod; its cgroup stays."""
        self.api.delete_pod(pod.name)

    def cpu(self) -> tuple[float, float]:
        """The CPU time that the master, and all nodes together, have used, s."""
        return cpu(self.master), sum(cpu(node.daemon) for node in self.bed.nodes)

    def _dealt(self, number: int) -> Node:
        return self.bed.nodes[number % len(self.bed.nodes)]

    def _create(self, name: str, node: Node) -> Pod:
        created = self.api.create_pod(name, node="", phase="Pending", annotations=asking(_FIRST))
        uid = created["metadata"]["uid"]
        node.start_pod(uid)
        return Pod(name, uid, node)


@contextmanager
def cluster(server: type[StandIn | RealApi], nodes: int) -> Iterator[Cluster]:
    """A cluster whose master knows all nodes, and has limited a pod on each."""
    with fleet(nodes) as bed, server(CONTROL_ADDRESS, bed.tag) as api:
        options = ("--kubeconfig", str(api.kubeconfig), "--no-leader-elect")
        built = Cluster(bed, api, bed.master(*options))
        for node in bed.nodes:
            built.place(anchor(node), node)
        for node in bed.nodes:
            wait_for(lambda node=node: _has_one(node), _PATIENCE_SECONDS, built.master.output)  # type: ignore[misc]
        yield built


def anchor(node: Node) -> str:
    """The name of the pod that tells a node's address."""
    return f"anchor-{node.name}"


def asking(rates: Rates) -> dict[str, str]:
    """The annotations that ask for (egress, ingress) in bit/s."""
    return {key: str(rate) for key, rate in zip((EGRESS, INGRESS), rates, strict=True)}


def measure_latency(server: type[StandIn | RealApi], count: int) -> Latency:
    """Create, change and delete pods on one node, one after the other."""
    load = os.getloadavg()[0]
    with cluster(server, 1) as built, Folders([built.bed.nodes[0].bpffs]) as folders:
        pods = built.create(count)
        last = anchor(built.bed.nodes[0])
        listener = Listener(built.api, last)

        def step(name: str, event: str, write: Callable[[Pod], None], done: Callable[[Pod], float]) -> Step:
            before = built.cpu()
            sent, answered, told = zip(*(_time(pod, write, done, listener, event) for pod in pods), strict=True)
            master, nodes = (1000 * (now - then) / count for now, then in zip(built.cpu(), before, strict=True))
            return Step(name, Spread.of(sent), Spread.of(answered), Spread.of(told), round(master, 2), round(nodes, 2))

        steps = (
            step("create", "ADDED", built.bind, lambda pod: folders.limited(pod.uid)),
            step("change", "MODIFIED", lambda pod: built.change(pod, _SECOND), lambda pod: _in_force(pod, _SECOND)),
            step("delete", "DELETED", built.delete, lambda pod: folders.gone(pod.uid)),
        )
        built.api.delete_pod(last)
        return Latency(count, load, steps, *_reference(pods[:_REFERENCE_ATTACHES]))


def measure_storm(server: type[StandIn | RealApi], count: int, nodes: int) -> Storm:
    """Create, change and delete many pods at once, with a restart of the master before they are deleted."""
    load = os.getloadavg()[0]
    with cluster(server, nodes) as built, Folders([node.bpffs for node in built.bed.nodes]) as folders:
        pods = built.create(count)

        def wave(name: str, write: Callable[[Pod], None], done: Callable[[Pod], float]) -> Wave:
            before, start = built.cpu(), time.monotonic()
            for pod in pods:
                write(pod)
            written = time.monotonic() - start
            ended = max(map(done, pods)) - start
            master, node = (now - then for now, then in zip(built.cpu(), before, strict=True))
            return Wave(name, round(written, 3), round(ended, 3), round(master, 2), round(node, 2))

        created = wave("create", built.bind, lambda pod: folders.limited(pod.uid))
        wrong = _wrong(pods, dict.fromkeys((pod.uid for pod in pods), _FIRST))
        changed = wave("change", lambda pod: built.change(pod, _SECOND), lambda pod: _in_force(pod, _SECOND))
        wanted = dict.fromkeys((pod.uid for pod in pods), _SECOND)
        wrong += _wrong(pods, wanted)
        peak = _peak(built.master)
        sentinels = pods[:nodes]
        restart = _restart(built, sentinels)
        wrong += _wrong(pods, wanted | dict.fromkeys((pod.uid for pod in sentinels), _THIRD))
        deleted = wave("delete", built.delete, lambda pod: folders.gone(pod.uid))
        wrong += _wrong(pods, {})
        peak = max(peak, _peak(built.master))
        most = max(_peak(node.daemon) for node in built.bed.nodes)
        return Storm(nodes, count, load, (created, changed, deleted), restart, wrong, peak, most)


def section(results: Mapping[str, Results]) -> str:
    """What was measured, by API server, as a section of a Markdown page."""
    lines = ["## From an annotation to a limit in force", "", *_INTRODUCTION]
    for server, found in results.items():
        lines += ["", f"### {server}", "", *_lines(found)]
    return "\n".join(lines)


def load(path: Path) -> dict[str, Results]:
    """Read what :func:`save` wrote, by API server; nothing where there is no such file."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Results]) if path.exists() else {}


def save(results: Mapping[str, Results], path: Path) -> None:
    """Write as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({server: asdict(found) for server, found in results.items()}, indent=1) + "\n")


def _lines(results: Results) -> Iterator[str]:
    where = results.machine
    yield f"{where.date}, {where.cpus} x {where.cpu}, kernel {where.kernel}."
    yield from _latency_lines(results.latencies)
    yield from _storm_lines(results.storms)
    yield from ("", "Repeat it:", "", f"    {results.command}")


_INTRODUCTION: Final = (
    "Master, nodes and API server are real processes on one machine, with TLS between them. The clock starts just",
    "before a write is sent: a pod's binding to a node, which has it limited, another annotation, or its deletion. It",
    "stops when the kernel has all of it attached, changed or detached.",
)


def _latency_lines(latencies: Sequence[Latency]) -> Iterator[str]:
    pods, loads = latencies[0].pods, ", ".join(f"{each.load:.2f}" for each in latencies)
    yield ""
    yield f"{pods} pods on one node, one after the other, ms; medians of {len(latencies)} runs (load before: {loads})."
    yield ""
    yield "| what | median | p90 | p99 | longest of all | after the answer | server alone | master's CPU | node's CPU |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for steps in zip(*(latency.steps for latency in latencies), strict=True):
        sent = [step.sent for step in steps]
        figures = (
            statistics.median(each.median for each in sent),
            statistics.median(each.p90 for each in sent),
            statistics.median(each.p99 for each in sent),
            max(each.longest for each in sent),
            statistics.median(step.answered.median for step in steps),
            statistics.median(step.told.median for step in steps),
            statistics.median(step.master_cpu for step in steps),
            statistics.median(step.node_cpu for step in steps),
        )
        yield f"| {steps[0].name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |"
    attach, detach = (
        statistics.median(spread.median for spread in spreads)
        for spreads in zip(*((each.attach, each.detach) for each in latencies), strict=True)
    )
    yield ""
    yield (
        "**After the answer** counts from when the API server has answered the write, and **server alone** is how long"
        " a watch that does nothing else takes to hear of it. The node's agent alone, called without master and daemon,"
        f" attaches in {attach:.1f} ms and detaches in {detach:.1f} ms."
    )


def _storm_lines(storms: Sequence[Storm]) -> Iterator[str]:
    first = storms[0]
    loads = ", ".join(f"{each.load:.2f}" for each in storms)
    yield ""
    yield f"{first.pods} pods at once, on {first.nodes} nodes, s; medians of {len(storms)} runs (load before: {loads})."
    yield ""
    yield "| what | all written | all in force | longest of all | master's CPU | nodes' CPU |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for waves in zip(*(storm.waves for storm in storms), strict=True):
        written, done, master, nodes = (
            statistics.median(column)
            for column in zip(
                *((each.written, each.done, each.master_cpu, each.node_cpu) for each in waves), strict=True
            )
        )
        longest = max(each.done for each in waves)
        yield f"| {waves[0].name} | {written:.1f} | {done:.1f} | {longest:.1f} | {master:.1f} | {nodes:.1f} |"
    restarts = [storm.restart for storm in storms]
    seconds, calls = statistics.median(each.seconds for each in restarts), max(each.calls for each in restarts)
    peaks = [max(storm.master_peak for storm in storms), max(storm.node_peak for storm in storms)]
    yield ""
    yield (
        "**All written** is when the last write was answered. A master that was killed has compared all"
        f" {first.pods} pods {seconds:.1f} s after its start, and has asked the nodes for {calls} changes besides those"
        f" of the {restarts[0].changed} pods that had changed meanwhile. Its memory peaked at {peaks[0]:.0f} MiB, a"
        f" node's at {peaks[1]:.0f} MiB. Pods with another limit than they should have, by `bpfrl list`:"
        f" {sum(storm.wrong for storm in storms)}."
    )


def _has_one(node: Node) -> bool:
    # It also loads libbpf here, which the first pod's time would have in it otherwise.
    return len(Agent(node.bpffs).limiters()) == 1


def _time(
    pod: Pod, write: Callable[[Pod], None], done: Callable[[Pod], float], listener: Listener, event: str
) -> tuple[float, float, float]:
    """How long one write took to the kernel, the same from its answer on, and how long to a watch."""
    sent = time.monotonic()
    write(pod)
    answered, ended = time.monotonic(), done(pod)
    return ended - sent, ended - answered, listener.when(event, pod.name) - sent


def _in_force(pod: Pod, rates: Rates) -> float:
    """When a pod had these limits."""
    limiter, deadline = Limiter(pod.folder), time.monotonic() + _PATIENCE_SECONDS
    wanted = limits(rates)
    while limiter.limits != wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{pod.name} has {limiter.limits} for {_PATIENCE_SECONDS} s")
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


def limits(rates: Rates) -> Limits:
    """Limits of (egress, ingress) in bit/s."""
    egress, ingress = rates
    return Limits(Rate(egress), Rate(ingress))


def _reference(pods: Sequence[Pod]) -> tuple[Spread, Spread]:
    """Attach and detach without a master and its calls, in this process."""
    attached, detached = [], []
    for pod in pods:
        agent, ref, path = Agent(pod.node.bpffs), PodRef(pod.uid, "default", pod.name), pod.node.pods[pod.uid]
        start = time.monotonic()
        agent.attach(generator.generate(ref, limits(_FIRST)), ref, path)
        between = time.monotonic()
        agent.detach(pod.uid)
        attached.append(between - start)
        detached.append(time.monotonic() - between)
    return Spread.of(attached), Spread.of(detached)


def _restart(built: Cluster, sentinels: Sequence[Pod]) -> Restart:
    """Kill the master, change a pod of each node, and start it again.

    A worker compares all of its node's pods before it does anything about one.
    """
    built.master.kill()
    for pod in sentinels:
        built.change(pod, _THIRD)
    logs = {node.name: len(node.daemon.output()) for node in built.bed.nodes}
    start = time.monotonic()
    built.master.start()
    seconds = max(_in_force(pod, _THIRD) for pod in sentinels) - start
    time.sleep(_SETTLE_SECONDS)
    lines = [line for node in built.bed.nodes for line in node.daemon.output()[logs[node.name] :].splitlines()]
    own = [line for line in lines if any(pod.uid in line or f"/{pod.name} " in line for pod in sentinels)]
    return Restart(round(seconds, 3), len(sentinels), len(lines) - len(own))


def _wrong(pods: Sequence[Pod], wanted: Mapping[str, Rates]) -> int:
    """How many pods have another limit than they should have, as bpfrl list tells it on their nodes."""
    found = {
        uid: rates
        for node in {pod.node.name: pod.node for pod in pods}.values()
        for uid, rates in node.limits().items()
    }
    return sum(found.get(pod.uid) != wanted.get(pod.uid) for pod in pods)


def _events(block: bytes) -> Iterator[tuple[int, str]]:
    """The masks and names in what inotify has said."""
    place = 0
    while place < len(block):
        _, mask, _, length = _EVENT.unpack_from(block, place)
        place += _EVENT.size + length
        yield mask, block[place - length : place].rstrip(b"\0").decode()


def pid(daemon: Daemon) -> int:
    """The process's id.

    Raises:
        RuntimeError: it does not run.
    """
    if daemon.process is None:
        raise RuntimeError("it does not run")
    return daemon.process.pid


def cpu(daemon: Daemon) -> float:
    """The CPU time that the process has used, s."""
    # The command's name may hold spaces; behind its bracket, user and system time are the 12th and 13th.
    fields = Path(f"/proc/{pid(daemon)}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _peak(daemon: Daemon) -> float:
    """The most resident memory that it ever had, MiB."""
    [kibi] = [
        line.split()[1] for line in Path(f"/proc/{pid(daemon)}/status").read_text().splitlines() if "VmHWM" in line
    ]
    return round(int(kibi) * 1024 / _MEBI, 1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--real", is_flag=True, help="Use etcd and kube-apiserver, not the stand-in.")
@click.option("--pods", type=click.IntRange(min=1), default=300, show_default=True, help="Pods one after the other.")
@click.option("--at-once", type=click.IntRange(min=1), default=1000, show_default=True, help="Pods at once.")
@click.option("--nodes", type=click.IntRange(1, 200), default=10, show_default=True, help="Nodes for those at once.")
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="How often to measure each.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=FIGURES, help="Where the JSON goes.")
@click.option("--report-only", is_flag=True, help="Measure nothing: print the section again from the JSON.")
def main(real: bool, pods: int, at_once: int, nodes: int, runs: int, output: Path, report_only: bool) -> None:
    """Measure how soon limits hold after pods are created, changed and deleted.

    What was measured against the other API server stays in the JSON.
    """
    results = load(output)
    if not report_only:
        if os.geteuid() != 0:
            raise click.ClickException("this loads BPF programs and makes namespaces: run it as root")
        # Ended from outside, everything is taken down as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        name, server = (_REAL, RealApi) if real else (_STAND_IN, StandIn)
        facts = machine.describe()
        latencies = [_told(measure_latency(server, pods)) for _ in range(runs)]
        storms = [_told(measure_storm(server, at_once, nodes)) for _ in range(runs)]
        command = f"python -m bench.converge --pods {pods} --at-once {at_once} --nodes {nodes} --runs {runs}"
        results[name] = Results(facts, command + " --real" * real, latencies, storms)
        save(results, output)
    click.echo(section(results))


def _told(figures: Figures) -> Figures:
    click.echo(figures, err=True)
    return figures


if __name__ == "__main__":
    main()
