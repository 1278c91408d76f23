"""What this node knows of a pod: its cgroup, what runs for it there, its limiter, and what that limiter reaches."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final

from bpfrl import __version__, cgroup
from bpfrl.bpf import libbpf
from bpfrl.bpf.libbpf import AttachType, Descriptor
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import AmbiguousCgroupError, BpfrlError, CgroupNotFoundError
from bpfrl.explanation import Attached, Refusal, Report
from bpfrl.limits import PodRef
from bpfrl.node.agent import Agent

_HOOKS: Final = (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS, AttachType.CGROUP_SOCK_OPS)
_REMEMBERED: Final = 1_000
_GONE: Final = "its cgroup went away while it was looked at"


class Refusals:
    """What could not be done for each pod, as long as it was not done since; the pods of late."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, Refusal] = OrderedDict()

    def remember(self, uid: str, call: str, error: Exception) -> None:
        """This call for a pod was refused just now."""
        self._last[uid] = Refusal(time.time(), call, str(error))
        self._last.move_to_end(uid)
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)

    def forget(self, uid: str) -> None:
        """A call for this pod was carried out."""
        self._last.pop(uid, None)

    def of(self, uid: str) -> Refusal | None:
        """The last refusal that still counts."""
        return self._last.get(uid)


def examine(agent: Agent, tree: CgroupTree, uid: str, refusal: Refusal | None = None) -> Report:
    """What the node knows of the pod with this UID; that it is not here is no error.

    Args:
        agent: the node's limiters.
        tree: its pods.
        uid: the pod.
        refusal: what its daemon remembers of it.

    Raises:
        PermissionDeniedError: this needs root.
        KernelError: the kernel refused.
    """
    limiter = agent.limiter(uid)
    try:
        path = tree.find(uid)
    except (CgroupNotFoundError, AmbiguousCgroupError) as error:
        return Report(__version__, no_cgroup=str(error), limiter=limiter, refusal=refusal)
    return _at(agent, path, limiter, refusal)


def examine_cgroup(agent: Agent, path: Path) -> tuple[PodRef, Report]:
    """The same of any cgroup, and whose limiter it has; without one, the cgroup's own name.

    Raises:
        PermissionDeniedError: this needs root.
        KernelError: the kernel refused.
    """
    number = cgroup.id_of(path)
    for found in agent.limiters():
        if isinstance(found, Status) and found.cgroup_id == number:
            return found.pod, _at(agent, path, found, None)
    pod = PodRef.of_cgroup(number)
    return pod, _at(agent, path, agent.limiter(pod.uid), None)


def _at(agent: Agent, path: Path, limiter: Status | Broken | None, refusal: Refusal | None) -> Report:
    try:
        levels = _levels(path)
        programs = tuple(program for hook in _HOOKS for program in _running(path, levels, hook))
        cooperates = not {cgroup.id_of(level) for level in levels}.isdisjoint(agent.cooperating())
    except FileNotFoundError:
        return Report(__version__, no_cgroup=_GONE, limiter=limiter, refusal=refusal)
    sockets, no_sockets = None, ""
    if isinstance(limiter, Status):
        try:
            sockets = agent.count_sockets(limiter.pod.uid, path)
        except (BpfrlError, OSError) as error:
            no_sockets = str(error)
    return Report(
        version=__version__,
        cgroup=str(path),
        limiter=limiter,
        programs=programs,
        cooperates=cooperates,
        sockets=sockets,
        no_sockets=no_sockets,
        refusal=refusal,
    )


def _levels(path: Path) -> list[Path]:
    """A cgroup and those above it, as far as they are to be seen here; the nearest first."""
    root = cgroup.mount_point()
    path = path.resolve()
    return [level for level in (path, *path.parents) if level == root or root in level.parents]


def _running(path: Path, levels: list[Path], hook: AttachType) -> list[Attached]:
    """What runs for a cgroup, in this order, each with the nearest cgroup that it is attached to."""
    own = [(level, _look(level, hook, effective=False)) for level in levels]
    places = [(program.id, level, attached.mode) for level, attached in own for program in attached.programs]
    found = []
    for program in _look(path, hook, effective=True).programs:
        place = next((each for each in places if each[0] == program.id), None)
        if place:  # attached twice, it runs twice
            places.remove(place)
        _, level, mode = place or (0, "", "")
        found.append(Attached(hook.name.lower(), program.id, program.name, program.tag, program.kind, str(level), mode))
    return found


def _look(path: Path, hook: AttachType, *, effective: bool) -> libbpf.Attached:
    with Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as target:
        return libbpf.attached(target.number, hook, effective=effective)
