"""Whatever is killed, limits come to what pods ask for: ``python -m bench.chaos --help``.

Three nodes, two masters of which one leads, and an API server, all of them real processes. In each round pods are
created, annotated, completed and deleted while some of the daemons, or the API server, are killed with SIGKILL and
started again. Then every node's kernel must come to what the pods ask for, and nothing may be left over: no folder, no
program, no link, no map and no file descriptor. Every round ends with another limit for a pod of each node, so that
masters and nodes have to work again, and do not just leave things as they happen to be.

What is done, and in which order, follows from the seed. What the daemons are doing at that moment does not.

What a pod must have is known but in one case: an annotation that cannot be meant leaves the limit as it is, and which
of the limits before it the master had seen by then, nobody can tell. Any of those since the last round will do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec

from bench import machine
from bench.fleet import CONTROL_ADDRESS, COOPERATION_KINDS, LIMITER_KINDS, Daemon, Fleet, Node, fleet, wait_for
from bench.kubeapi import Api, ApiError, RealApi, StandIn
from bench.record import Machine
from bpfrl.bpf import generator
from bpfrl.bpf.layout import IdentityData
from bpfrl.bpf.limiter import RETIRED, STAGED, Broken
from bpfrl.limits import Limits
from bpfrl.master.annotations import EGRESS, INGRESS
from bpfrl.node.agent import Agent

log = logging.getLogger(__name__)

Rates = tuple[int, int]

FIGURES: Final = Path(__file__).parent / "results" / "chaos.json"
_LEASE: Final = ("kube-system", "bpfrl-master")
LEASE_SECONDS: Final = 3
_MASTER_OPTIONS: Final = ("--lease-duration", str(LEASE_SECONDS), "--resync", "5")
_MASTERS: Final = 2
_NODES: Final = 3
_NODE_NAMES: Final = tuple(f"node-{number}" for number in range(_NODES))
# Killed are these, of one round one to three. The last node's daemon never is: what it leaks adds up.
_VICTIMS: Final = ("leader", "follower", "server", "node-0", "node-1")
_HOW_MANY: Final = (1, 1, 1, 2, 2, 3)
_LONGEST_OUTAGE_SECONDS: Final = 2.0
_ROUND_SECONDS: Final = (0.4, 2.0)
_OPERATIONS: Final = (8, 20)
_PODS: Final = 40
_CREATE: Final = "create"
_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
_LOOKS: Final = 5
_LOG_LINES: Final = 25
_INVALID: Final = ("fast", "10mbps", "-5M", "0", "10m", "9e99", "1.5.5M")
# An attach that is refused for want of a cgroup is tried again after at most this long.
_PATIENCE_SECONDS: Final = 60.0
_AIM_SECONDS: Final = 0.2
# A follower that comes to lead opens ten descriptors for three nodes, and then no more.
GROWTH: Final = 16
_SHORTEST_LIFE: Final = 6
_IDENTITY: Final = ".rodata.identit"  # the kernel keeps 15 characters of a map's name
# A limiter's programs, the links that attach them, and its own maps; the map of sockets is one for all of a node.
_OBJECTS: Final = {"programs": 3, "links": 3, "maps": 4}


class ChaosError(Exception):
    """The cluster has not come to what it should be; the text tells all that is known."""


@dataclass
class Pod:
    """A pod, and what it may have.

    Attributes:
        name: its name.
        uid: its UID.
        node: where it runs.
        asked: what its annotations ask for, while they can be meant; None: no limit.
        valid: whether they can be meant.
        good: what it may have while they cannot: what it has asked for, or had, since the last round.
        cgroup: whether its cgroup is there.
        late: whether its cgroup is still to come.
        ended: whether it has run to its end.
    """

    name: str
    uid: str
    node: Node
    asked: Rates | None
    valid: bool
    good: set[Rates | None]
    cgroup: bool = False
    late: bool = False
    ended: bool = False

    def __str__(self) -> str:
        """What a report says of it."""
        asked = self.asked if self.valid else "what cannot be meant"
        return f"{self.name} ({self.uid}; asks for {asked}; cgroup: {self.cgroup}; ended: {self.ended})"

    def allowed(self) -> set[Rates | None]:
        """What it may have now."""
        if self.ended or not self.cgroup:
            return {None}
        return {self.asked} if self.valid else self.good

    def ask(self, rates: Rates | None) -> None:
        """Its annotations ask for this."""
        self.asked, self.valid = rates, True
        self.good.add(rates)

    def lose(self) -> None:
        """It has no limit any more, and what cannot be meant does not bring back the last."""
        self.good.add(None)

    def settle(self) -> None:
        """It has what it should have."""
        # What cannot be meant now may still be made what it asked for before: the master knows that, or not.
        if self.valid:
            self.good = {self.asked if self.cgroup else None, self.asked}


@dataclass(frozen=True, slots=True)
class Fault:
    """Who was killed, and for how long it was gone, s."""

    victim: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Use:
    """What a daemon holds at the end of a round."""

    descriptors: int
    threads: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.descriptors} descriptors and {self.threads} threads"


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was, and how it ended.

    Attributes:
        number: from 0.
        faults: who was killed.
        halfway: how many nodes' daemons were killed while they attached or detached a limiter.
        operations: what was done to pods, and how often.
        seconds: how long, after the last operation and the last start, until everything was as it should be.
        limited: how many pods had a limit then.
        uses: what each daemon held then, by its name and process id.
    """

    number: int
    faults: Sequence[Fault]
    halfway: int
    operations: dict[str, int]
    seconds: float
    limited: int
    uses: dict[str, Use]


@dataclass(frozen=True, slots=True)
class Summary:
    """All rounds.

    Attributes:
        machine: where it was.
        server: which API server.
        seed: what everything followed from.
        rounds: how many.
        operations: how many of each.
        kills: how many of each.
        halfway: how many of them met a node's daemon while it attached or detached a limiter.
        median: of the rounds' times to converge, s.
        p99: likewise.
        longest: likewise.
        leaks: what was left over at the end of a round; a round that leaves anything fails.
        growth: by how many descriptors, or threads, a daemon that lived for some rounds has grown at most.
        witness: what the daemon that is never killed held after the first round and after the last.
        course: each round.
    """

    machine: Machine
    server: str
    seed: int
    rounds: int
    operations: dict[str, int]
    kills: dict[str, int]
    halfway: int
    median: float
    p99: float
    longest: float
    leaks: int
    growth: int
    witness: tuple[Use, Use]
    course: Sequence[Round]

    @property
    def command(self) -> str:
        """How to repeat it."""
        real = " --real" if self.server == RealApi.__name__ else ""
        return f"python -m bench.chaos --rounds {self.rounds} --seed {self.seed}{real}"

    def __str__(self) -> str:
        """A few lines for people."""
        first, last = self.witness
        lines = (
            f"{self.rounds} rounds with seed {self.seed} against {self.server}: all converged, nothing was left over",
            f"operations: {_counted(self.operations)}",
            f"killed: {_counted(self.kills)}; {self.halfway} of them while a limiter was half attached or detached",
            f"converged after {self.median:.1f} s (median), {self.p99:.1f} s (p99), {self.longest:.1f} s (longest)",
            f"{_NODE_NAMES[-1]}, never killed, held {first} after the first round, and {last} after the last",
            f"no daemon has grown by more than {self.growth} descriptors or threads",
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Something that happens to a cluster, lasts for a while and ends.

    Attributes:
        name: what people call it.
        happens: begins it, and ends it; what has to stay as it is until everything is as it should be again, such as a
            clock that was set, is undone by what is put on the stack.
        lasts: how long it is kept up, s.
        within: how long after its end everything must be as it should be, s.
        served: whether the API server takes what is wanted of it meanwhile.
    """

    name: str
    happens: Callable[[Cluster, ExitStack], AbstractContextManager[None]]
    lasts: float
    within: float
    served: bool = True


class _Act(NamedTuple):
    """Something that happens in a round: at a time, s after its begin."""

    at: float
    what: str
    victim: str = ""


class _Operation(NamedTuple):
    """Something that is done to a pod: how often, to which of them, and how."""

    weight: int
    pods: Callable[[], list[Pod]]
    do: Callable[[Pod], None]


class Cluster:
    """The daemons, the API server, and the pods as they should be."""

    def __init__(self, bed: Fleet, api: Api, seed: int) -> None:
        self.bed = bed
        self.api = api
        self.pods: dict[str, Pod] = {}
        self._seed = seed
        self._dice = random.Random(seed)  # noqa: S311 - nobody must be kept from guessing it
        self._numbers = 0
        self._uids: set[str] = set()
        self._owners: dict[int, str] = {}  # a map's id: whose identity it holds
        self._leader = bed.masters[0]
        self._mounted = _mounted(bed.tag)
        self._anchors: list[Pod] = []
        self._down: dict[str, Daemon] = {}
        self._served = True
        self._waiting = 0
        self._halfway = 0
        self._done: Counter[str] = Counter()
        self._operations = {
            "annotate": _Operation(8, self._living, lambda pod: self._annotate(pod, self._rates())),
            "annotate what cannot be meant": _Operation(3, self._living, self._spoil),
            "remove the annotations": _Operation(2, self._living, lambda pod: self._annotate(pod, None)),
            "delete": _Operation(2, self._all, self._delete),
            "delete what has ended": _Operation(6, self._ended, self._delete),
            "complete": _Operation(2, self._living, self._complete),
        }
        # What a kubelet does needs no API server.
        self._kubelet = {
            "make a late cgroup": _Operation(4, lambda: [pod for pod in self._all() if pod.late], self._start),
            "remove a cgroup early": _Operation(1, lambda: [pod for pod in self._living() if pod.cgroup], self._end),
        }

    def begin(self) -> None:
        """Have a pod on each node, which tells its address and is never deleted, and wait for all to be limited."""
        self._anchors = [self._make(f"anchor-{node.name}", node, self._rates()) for node in self.bed.nodes]
        for pod in self._anchors:
            self._start(pod)
        self._settle(-1)

    def play(self, number: int) -> Round:
        """Play a round.

        Raises:
            ChaosError: it has not ended as it should.
        """
        self._prepare(number)
        acts, faults = self._plan()
        start = time.monotonic()
        for act in acts:
            time.sleep(max(0.0, start + act.at - time.monotonic()))
            self._act(act)
        return self._conclude(number, faults, _PATIENCE_SECONDS)

    def endure(self, number: int, disturbance: Disturbance) -> Round:
        """Play a round in which one thing happens, besides what is done to pods.

        Raises:
            ChaosError: it has not ended as it should.
        """
        self._prepare(number)
        moments = sorted(self._dice.uniform(0, disturbance.lasts) for _ in range(self._dice.randint(*_OPERATIONS)))
        with ExitStack() as undo:
            self._served = disturbance.served
            with disturbance.happens(self, undo):
                start = time.monotonic()
                for moment in moments:
                    time.sleep(max(0.0, start + moment - time.monotonic()))
                    self._operate()
                time.sleep(max(0.0, start + disturbance.lasts - time.monotonic()))
            self._serve_again()
            ended = self._conclude(number, [Fault(disturbance.name, disturbance.lasts)], disturbance.within)
        # Undoing it may have been a disturbance too.
        for pod in self._anchors:
            self._annotate(pod, self._rates())
        self._settle(number)
        return ended

    def _prepare(self, number: int) -> None:
        self._dice = random.Random(f"{self._seed} {number}")  # noqa: S311
        self._clear()
        self._find_leader()
        self._done.clear()
        self._halfway = 0

    def _conclude(self, number: int, faults: Sequence[Fault], patience: float) -> Round:
        for pod in self._anchors:
            self._annotate(pod, self._rates())
        seconds = self._settle(number, patience)
        limited = sum(pod.allowed() != {None} for pod in self.pods.values())
        done = dict(sorted(self._done.items()))
        return Round(number, faults, self._halfway, done, round(seconds, 2), limited, self._uses())

    def finish(self, rounds: int) -> None:
        """Delete all pods, and see that nothing is left of them.

        Raises:
            ChaosError: something is.
        """
        for pod in [*self.pods.values()]:
            self._delete(pod)
        self._settle(rounds)

    # What a disturbance may want.

    @property
    def dice(self) -> random.Random:
        """What chooses in this round."""
        return self._dice

    def leader(self) -> Daemon:
        """The master that leads."""
        self._find_leader()
        return self._leader

    def await_acting(self) -> None:
        """Wait until one of the masters that were started anew acts, and all nodes serve."""
        wait_for(lambda: any("acting:" in master.news() for master in self.bed.masters), _START_SECONDS)
        wait_for(lambda: all(node.serves() for node in self.bed.nodes), _START_SECONDS)

    def flicker(self, seconds: float) -> None:
        """Have a pod whose cgroup is there for so long, and not for longer."""
        pod = self._make(self._name(), self._dice.choice(self.bed.nodes), self._rates())
        self._start(pod)
        time.sleep(seconds)
        self._end(pod)
        self.api.delete_pod(pod.name)
        del self.pods[pod.name]

    def restart_pods(self, node: Node) -> None:
        """Make the cgroups of a node's pods anew."""
        for pod in self.pods.values():
            if pod.node is node and pod.cgroup:
                self._end(pod)
                self._start(pod)

    def lose_limits(self, node: Node) -> None:
        """All limits of a node have gone."""
        for pod in self.pods.values():
            if pod.node is node:
                pod.lose()

    # What happens.

    def _plan(self) -> tuple[list[_Act], list[Fault]]:
        span = self._dice.uniform(*_ROUND_SECONDS)
        acts = [_Act(self._dice.uniform(0, span), "operate") for _ in range(self._dice.randint(*_OPERATIONS))]
        faults = []
        for victim in self._dice.sample(_VICTIMS, self._dice.choice(_HOW_MANY)):
            # Some while nothing else happens, most just after an operation, while somebody works on it.
            moment = self._dice.choice(acts).at + self._dice.uniform(0, 0.04)
            fault = Fault(victim, round(self._dice.uniform(0, _LONGEST_OUTAGE_SECONDS), 2))
            acts += [_Act(moment, "kill", victim), _Act(moment + fault.seconds, "start", victim)]
            faults.append(fault)
        return sorted(acts), faults

    def _act(self, act: _Act) -> None:
        match act.what:
            case "kill":
                self._kill(act.victim)
            case "start":
                self._revive(act.victim)
            case _:
                self._operate()

    def _kill(self, victim: str) -> None:
        if victim == "server":
            self.api.kill()
            self._served = False
            return
        if victim in _NODE_NAMES and self._served and self._chance(0.5):
            self._halfway += self._aim(self.bed.nodes[_NODE_NAMES.index(victim)])
        self._down[victim] = daemon = self._who(victim)
        daemon.kill()

    def _aim(self, node: Node) -> bool:
        """Have a limiter attached or detached on a node; True is returned while that is half done.

        It takes a millisecond or two, which a kill at any moment would hardly ever meet.
        """
        limited = [pod for pod in self._living() if pod.node is node and pod.cgroup and pod.valid and pod.asked]
        if limited and self._chance(0.5):
            self._annotate(self._dice.choice(limited), None)
        else:
            self._start(self._make(self._name(), node, self._rates()))
        deadline = time.monotonic() + _AIM_SECONDS
        while time.monotonic() < deadline:
            if any(name.endswith((STAGED, RETIRED)) for name in os.listdir(node.bpffs)):
                return True
        return False

    def _revive(self, victim: str) -> None:
        if victim != "server":
            self._down.pop(victim).start()
            return
        self.api.start()
        self._serve_again()

    def _serve_again(self) -> None:
        self._served = True
        waiting, self._waiting = self._waiting, 0
        for _ in range(waiting):
            self._operate()

    def _who(self, victim: str) -> Daemon:
        if victim in _NODE_NAMES:
            return self.bed.nodes[_NODE_NAMES.index(victim)].daemon
        self._find_leader()
        running = [master for master in self.bed.masters if master.process]
        return next((each for each in running if (each is self._leader) is (victim == "leader")), running[0])

    def _find_leader(self) -> None:
        """Learn which master leads; while nobody can tell, it is the one that did."""
        if not self._served:
            return
        try:
            holder = self.api.lease(*_LEASE)["spec"].get("holderIdentity") or ""
        except ApiError:
            return
        for master in self.bed.masters:
            if holder and master.alive and f"leading as {holder}\n" in master.news():
                self._leader = master

    def _operate(self) -> None:
        """Do something to a pod: to the API's, or, like a kubelet, to its cgroup."""
        possible = self._kubelet | (self._operations if self._served else {})
        choices = {kind: pods for kind, operation in possible.items() if (pods := operation.pods())}
        weights = [possible[kind].weight for kind in choices]
        if self._served:
            choices[_CREATE] = []
            weights.append(max(1, _PODS - len(self.pods)))
        elif not choices or self._chance(0.5):
            # Whoever wants something of an API server that is down tries again.
            self._waiting += 1
            return
        [kind] = self._dice.choices([*choices], weights)
        self._done[kind] += 1
        if kind == _CREATE:
            self._create()
        else:
            pod = self._dice.choice(choices[kind])
            log.debug("%s %s", kind, pod)
            possible[kind].do(pod)

    def _create(self) -> None:
        node = self._dice.choice(self.bed.nodes)
        rates = self._rates() if self._chance(0.8) else None
        pod = self._make(self._name(), node, rates, valid=self._chance(0.9))
        if self._chance(0.3):
            pod.late = True
            self._done["without its cgroup"] += 1
        else:
            self._start(pod)

    def _name(self) -> str:
        self._numbers += 1
        return f"pod-{self._numbers}"

    def _make(self, name: str, node: Node, rates: Rates | None, *, valid: bool = True) -> Pod:
        annotations = {key: value for key, value in _asking(rates).items() if value}
        if not valid:
            annotations[EGRESS] = self._dice.choice(_INVALID)
        # No UID of the dice: what is ours is told by it, from what another run with the same seed does meanwhile.
        created = self.api.create_pod(name, node=node.name, host_ip=node.address, annotations=annotations)
        uid = created["metadata"]["uid"]
        self._uids.add(uid)
        pod = Pod(name, uid, node, rates if valid else None, valid, {None, rates} if valid else {None})
        self.pods[name] = pod
        log.debug("create %s on %s", pod, node.name)
        return pod

    def _start(self, pod: Pod) -> None:
        pod.node.start_pod(pod.uid, self._dice.choice(("Guaranteed", "Burstable", "BestEffort")))
        pod.cgroup, pod.late = True, False

    def _end(self, pod: Pod) -> None:
        pod.node.end_pod(pod.uid)
        pod.cgroup = False
        pod.lose()

    def _annotate(self, pod: Pod, rates: Rates | None) -> None:
        self.api.annotate(pod.name, _asking(rates))
        pod.ask(rates)

    def _spoil(self, pod: Pod) -> None:
        self.api.annotate(pod.name, {EGRESS: self._dice.choice(_INVALID)})
        pod.valid = False

    def _complete(self, pod: Pod) -> None:
        self.api.set_phase(pod.name, self._dice.choice(("Succeeded", "Failed")))
        pod.ended, pod.late = True, False
        if pod.cgroup and self._chance(0.5):
            self._end(pod)

    def _delete(self, pod: Pod) -> None:
        """Delete a pod. Its cgroup goes before, or after it, or at the begin of the next round."""
        when = self._dice.choice(("before", "after", "later"))
        if pod.cgroup and when == "before":
            self._end(pod)
        self.api.delete_pod(pod.name)
        del self.pods[pod.name]
        if pod.cgroup and when == "after":
            self._end(pod)

    def _clear(self) -> None:
        """Remove the cgroups of pods that are no more, as a kubelet does some time later."""
        alive = {pod.uid for pod in self.pods.values()}
        for node in self.bed.nodes:
            for gone in node.pods.keys() - alive:
                node.end_pod(gone)

    def _rates(self) -> Rates:
        egress, ingress = self._rate(), self._rate()
        direction = self._dice.choice(("both", "both", "both", "egress", "ingress"))
        return (egress if direction != "ingress" else 0, ingress if direction != "egress" else 0)

    def _rate(self) -> int:
        return 1000 * self._dice.randint(1_000, 100_000)

    def _chance(self, share: float) -> bool:
        return self._dice.random() < share

    def _all(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod not in self._anchors]

    def _living(self) -> list[Pod]:
        return [pod for pod in self._all() if not pod.ended]

    def _ended(self) -> list[Pod]:
        return [pod for pod in self._all() if pod.ended or not (pod.cgroup or pod.late)]

    # What comes of it.

    def _settle(self, number: int, patience: float = _PATIENCE_SECONDS) -> float:
        """Wait until everything is as it should be, and return how long that took, s."""
        start = time.monotonic()
        while differences := self._differences():
            if time.monotonic() - start > patience:
                raise ChaosError(self._report(number, differences, patience))
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - start
        for pod in self.pods.values():
            pod.settle()
        return seconds

    def _differences(self) -> list[str]:
        """What is not as it should be. Other tools are asked only when bpfrl's own agent has nothing to complain of."""
        found = [line for node in self.bed.nodes for line in self._limiters(node)]
        return found or [line for node in self.bed.nodes for line in self._programs(node)] or [*self._leaks()]

    def _limiters(self, node: Node) -> Iterator[str]:
        pods = {pod.uid: pod for pod in self.pods.values() if pod.node is node}
        limiters: dict[str, Rates | None] = {}
        for each in Agent(node.bpffs).limiters():
            if isinstance(each, Broken):
                yield f"{node.name}: {each.uid} is broken: {each.reason}"
            elif each.cgroup_id:
                limiters[each.pod.uid] = _rates(each.limits)
            elif each.pod.uid not in pods or pods[each.pod.uid].ended:
                # Those of pods that live are swept once a minute.
                yield f"{node.name}: {each.pod.uid} has no cgroup and no pod, and is still pinned"
        for uid in limiters.keys() - pods.keys():
            yield f"{node.name}: {uid} is limited, and no pod"
        for uid, pod in pods.items():
            has = limiters.get(uid)
            if has not in pod.allowed():
                yield f"{node.name}: {pod} has {has}, and not {pod.allowed()}"
        for name in node.limiters():
            if name.endswith((STAGED, RETIRED)) or name not in self._uids:
                yield f"{node.name}: {name} is pinned"

    def _programs(self, node: Node) -> Iterator[str]:
        """What bpftool sees on the pods' cgroups, and on the one of them all."""
        if node.cooperating() != COOPERATION_KINDS:
            yield f"{node.name}: all pods have the programs {node.cooperating()}, and not {COOPERATION_KINDS}"
        attached = node.attached()
        limited = {each.pod.uid for each in Agent(node.bpffs).limiters() if not isinstance(each, Broken)}
        for uid in node.pods:
            expected = LIMITER_KINDS if uid in limited else []
            if attached.get(uid, []) != expected:
                yield f"{node.name}: {uid} has the programs {attached.get(uid)}, and not {expected}"

    def _leaks(self) -> Iterator[str]:
        """What there is of our limiters' objects in the kernel beyond those that are pinned."""
        limiters = [len(node.limiters()) for node in self.bed.nodes]
        expected = {kind: sum(limiters) * each for kind, each in _OBJECTS.items()}
        expected["maps"] += sum(1 for each in limiters if each)
        for kind, count in self._objects().items():
            if count != expected[kind]:
                yield f"{count} {kind} of {sum(limiters)} limiters in the kernel, and not {expected[kind]}"
        for node in self.bed.nodes:
            held = [link for link in _descriptors(node.daemon) if link.startswith("anon_inode:bpf")]
            if held:
                yield f"{node.name}: the daemon holds {held}"
        for name, daemon in self.daemons().items():
            if daemon.alive and (children := _children(daemon)):
                yield f"{name}: has the processes {children}"
        if (mounted := _mounted(self.bed.tag)) != self._mounted:
            yield f"mounted: {mounted}, and not {self._mounted}"

    def _objects(self) -> dict[str, int]:
        """How many programs, links and maps of our pods' limiters the kernel has, whoever holds them.

        Others may test on this machine too: what is ours is told by the UID in a limiter's identity, a map that all of
        its programs are bound to.
        """
        maps = _listed("map")
        identities = {each["id"] for each in maps if each.get("name") == _IDENTITY and self._is_ours(each["id"])}
        programs = [each for each in _listed("prog") if identities.intersection(each.get("map_ids", ()))]
        numbers = {each["id"] for each in programs}
        links = [each for each in _listed("link") if each.get("prog_id") in numbers]
        bound = identities.union(*(each["map_ids"] for each in programs))
        return {"programs": len(programs), "links": len(links), "maps": len(bound)}

    def _is_ours(self, number: int) -> bool:
        if number not in self._owners:
            self._owners[number] = _owner(number)
        return self._owners[number] in self._uids

    def _uses(self) -> dict[str, Use]:
        return {f"{name} {each.pid}": _use(each) for name, each in self.daemons().items() if each.alive}

    def daemons(self) -> dict[str, Daemon]:
        """All that runs of bpfrl, by name."""
        masters = {f"master-{number}": master for number, master in enumerate(self.bed.masters)}
        return masters | {node.name: node.daemon for node in self.bed.nodes}

    def _report(self, number: int, differences: Sequence[str], patience: float) -> str:
        lines = [f"seed {self._seed}, round {number}: after {patience:.0f} s still", *differences]
        for name, daemon in self.daemons().items():
            lines += ["", f"{name}, its last lines:", *daemon.output().splitlines()[-_LOG_LINES:]]
        return "\n".join(lines)


def run(rounds: int, seed: int, server: type[StandIn | RealApi], tell: Callable[[str], None] = print) -> Summary:
    """Play some rounds.

    Args:
        rounds: how many.
        seed: what everything follows from.
        server: which API server.
        tell: told of each round.

    Raises:
        ChaosError: a round has not ended as it should, or a daemon holds ever more.
    """
    facts, course = machine.describe(), []
    with cluster(server, seed) as built:
        for number in range(rounds):
            course.append(played := built.play(number))
            tell(_line(played))
        built.finish(rounds)
    summary = _summary(facts, course, server.__name__, seed)
    if summary.growth > GROWTH:
        raise ChaosError(f"seed {seed}: a daemon holds {summary.growth} descriptors or threads more than at first")
    return summary


@contextmanager
def cluster(server: type[StandIn | RealApi], seed: int) -> Iterator[Cluster]:
    """Nodes, masters and an API server that have come to work together."""
    with fleet(_NODES) as bed, server(CONTROL_ADDRESS, bed.tag) as api:
        for _ in range(_MASTERS):
            bed.master("--kubeconfig", str(api.kubeconfig), *_MASTER_OPTIONS)
        for master in bed.masters:
            wait_for(lambda master=master: "watching" in master.output(), _START_SECONDS, master.output)  # type: ignore[misc]
        built = Cluster(bed, api, seed)
        built.begin()
        yield built


def load(path: Path) -> dict[str, Summary]:
    """Read what :func:`save` wrote, by API server; nothing where there is no such file."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Summary]) if path.exists() else {}


def save(summary: Summary, path: Path) -> None:
    """Write as JSON, one round a line, beside what is there about the other API server."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = []
    for server, content in (known | {summary.server: asdict(summary)}).items():
        *others, (last, course) = content.items()
        lines = [f' "{key}": {json.dumps(value)}' for key, value in others]
        lines.append(f' "{last}": [\n  ' + ",\n  ".join(map(json.dumps, course)) + "\n ]")
        texts.append(f'"{server}": {{\n' + ",\n".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def _line(played: Round) -> str:
    killed = ", ".join(f"{fault.victim} for {fault.seconds:.1f} s" for fault in played.faults)
    done = sum(played.operations.values())
    return (
        f"{played.number:4} killed {killed}; {done} operations; {played.limited} limited after {played.seconds:.2f} s"
    )


def _summary(facts: Machine, course: Sequence[Round], server: str, seed: int) -> Summary:
    seconds = sorted(played.seconds for played in course)
    operations = sum((Counter(played.operations) for played in course), Counter[str]())
    kills = Counter(fault.victim for played in course for fault in played.faults)
    witness = [use for played in course for name, use in played.uses.items() if name.startswith(_NODE_NAMES[-1])]
    return Summary(
        machine=facts,
        server=server,
        seed=seed,
        rounds=len(course),
        operations=dict(sorted(operations.items())),
        kills=dict(sorted(kills.items())),
        halfway=sum(played.halfway for played in course),
        median=statistics.median(seconds),
        p99=seconds[math.ceil(0.99 * len(seconds)) - 1],
        longest=seconds[-1],
        leaks=0,
        growth=growth(course),
        witness=(witness[0], witness[-1]),
        course=course,
    )


def growth(course: Sequence[Round]) -> int:
    """By how much any daemon has grown, from the first third of its life to the last; short lives tell nothing."""
    lives: dict[str, list[Use]] = {}
    for played in course:
        for name, use in played.uses.items():
            lives.setdefault(name, []).append(use)
    long = [life for life in lives.values() if len(life) >= _SHORTEST_LIFE]
    return max((_grown(figures) for life in long for figures in zip(*map(astuple, life), strict=True)), default=0)


def _grown(figures: Sequence[int]) -> int:
    third = len(figures) // 3
    return round(statistics.median(figures[-third:]) - statistics.median(figures[:third]))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _asking(rates: Rates | None) -> dict[str, str | None]:
    """The annotations that ask for some rates; None is for an annotation that has to go."""
    return {key: str(rate) if rate else None for key, rate in zip((EGRESS, INGRESS), rates or (0, 0), strict=True)}


def _rates(limits: Limits) -> Rates:
    egress, ingress = (rate.bits if rate else 0 for rate in (limits.egress, limits.ingress))
    return egress, ingress


def _use(daemon: Daemon) -> Use:
    status = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    [threads] = [int(line.split()[1]) for line in status if line.startswith("Threads:")]
    return Use(len(_descriptors(daemon)), threads)


def _descriptors(daemon: Daemon) -> list[str]:
    """What a daemon has open."""
    found = []
    for path in Path(f"/proc/{daemon.pid}/fd").iterdir():
        try:
            found.append(str(path.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def _children(daemon: Daemon) -> list[str]:
    """The processes that a daemon has started and that have not ended."""
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def _mounted(tag: str) -> list[str]:
    """Where something is mounted whose path has this in it, and how."""
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return sorted(f"{fields[4]} {fields[fields.index('-') + 1]} {fields[5]}" for fields in lines if tag in fields[4])


def _owner(number: int) -> str:
    """The UID in the identity map with this id; empty if the map has gone, or is nobody's."""
    try:
        [entry] = _bpftool("map", "dump", "id", str(number))
        value = bytes(int(digits, 16) for digits in entry["value"])
        pod = generator.read_identity(IdentityData.from_buffer_copy(value))
    except (subprocess.CalledProcessError, LookupError, ValueError):
        return ""
    return pod.uid if pod else ""


def _listed(kind: str) -> list[dict[str, Any]]:
    """All objects of a kind; bpftool gives up where one of anybody's goes while it looks."""
    for _ in range(_LOOKS):
        with suppress(subprocess.CalledProcessError):
            return _bpftool(kind, "show")
        time.sleep(_POLL_SECONDS)
    return _bpftool(kind, "show")


def _bpftool(*arguments: str) -> list[dict[str, Any]]:
    output = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(output or "[]")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True, help="How many rounds.")
@click.option("--seed", type=int, default=1, show_default=True, help="What is done follows from this number.")
@click.option("--real", is_flag=True, help="Use etcd and kube-apiserver, not the stand-in.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=FIGURES, help="Where the JSON goes.")
def main(rounds: int, seed: int, real: bool, output: Path) -> None:
    """Kill daemons and the API server at any moment, and see that limits come to what pods ask for.

    What was found with the other API server stays in the JSON. Exits with 1 when a round does not end as it should.
    """
    if os.geteuid() != 0:
        raise click.ClickException("this loads BPF programs and makes namespaces: run it as root")
    # Ended from outside, everything is taken down as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = run(rounds, seed, RealApi if real else StandIn, lambda line: click.echo(line, err=True))
    except ChaosError as error:
        raise click.ClickException(str(error)) from error
    save(summary, output)
    click.echo(summary)


if __name__ == "__main__":
    main()
