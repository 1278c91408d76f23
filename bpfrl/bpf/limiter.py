"""One limiter in the kernel: installing it, and everything that is done to its pins afterwards.

A limiter is a folder in the bpffs that holds three links, their programs and their maps, and the folder is all there
is: no process and no file knows more. It is whole or it does not exist. :func:`install` builds it under a name
of its own and renames it when its last link is pinned; :func:`remove` renames it back before
the first pin goes. What a crash leaves behind therefore never has a limiter's name, and :func:`leftovers` finds it.
(bpffs refuses a '.' in names, so the marks below do without.)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from ctypes import sizeof
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol, Self

from bpfrl import cgroup
from bpfrl.bpf import apart, generator, law, libbpf, sockets
from bpfrl.bpf.layout import (
    EGRESS,
    INGRESS,
    LAYOUT,
    STATE_BYTES,
    Counters,
    CountersData,
    IdentityData,
    LimitsData,
)
from bpfrl.bpf.libbpf import AttachType, Cost, Descriptor, LoadedObject, MapShape, MapType, ProgramType, Shape
from bpfrl.errors import BpfrlError, BrokenLimiterError, CompilerError, KernelError
from bpfrl.limits import Limits, PodRef

log = logging.getLogger(__name__)

STAGED: Final = "~new"
RETIRED: Final = "~old"

# A program's pin, its function in the object, and where it attaches. What paces comes last: where a limiter is
# replaced, its predecessor must have given the sockets back by then.
_SOCKOPS: Final = "sockops"
_PROGRAMS: Final = (
    ("egress", "bpfrl_egress", AttachType.CGROUP_INET_EGRESS),
    ("ingress", "bpfrl_ingress", AttachType.CGROUP_INET_INGRESS),
    (_SOCKOPS, "bpfrl_sockops", AttachType.CGROUP_SOCK_OPS),
)
# What runs for a limited pod, by where it runs, both in the kernel's words.
HOOKS: Final = {kind.name.lower(): function for _, function, kind in _PROGRAMS}
# A map's pin, and its name in the object. The identity stands apart: it goes with the programs' build.
_LIMITS: Final = ".data.limits"
_STATE_MAPS: Final = (
    ("limits", _LIMITS),
    ("state", ".bss"),
    ("counters", "counters"),
    (sockets.STORAGE, sockets.STORAGE),
)
_IDENTITY: Final = ("identity", ".rodata.identity")
# Times of folders are those of the kernel's last tick, which may be 10 ms ago.
_SETTLED_NS: Final = 1_000_000_000
# The kubelet lets a node have 110 pods, and some have five times as many.
_MOST_IDENTIFIED: Final = 2048
# What it takes to pace again.
_RESUMING: Final = (_SOCKOPS, sockets.STORAGE)
# linux/bpf.h
_READ_ONLY: Final = 1 << 7
_MMAPABLE: Final = 1 << 10
# Nothing else is loaded, whoever has sent it. The sizes are those of limiter.h and sockets.h.
_SHAPE: Final = Shape(
    programs={
        "bpfrl_egress": (ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS),
        "bpfrl_ingress": (ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS),
        "bpfrl_sockops": (ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
    },
    maps={
        ".data.limits": MapShape(MapType.ARRAY, 4, sizeof(LimitsData), 1, _MMAPABLE),
        ".rodata.identity": MapShape(MapType.ARRAY, 4, sizeof(IdentityData), 1, _MMAPABLE | _READ_ONLY),
        ".bss": MapShape(MapType.ARRAY, 4, STATE_BYTES, 1, _MMAPABLE),
        "counters": MapShape(MapType.PERCPU_ARRAY, 4, sizeof(CountersData), len((EGRESS, INGRESS)), 0),
        sockets.STORAGE: sockets.SHAPE,
    },
)
# What a connection is to tell of: BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG (linux/bpf.h).
_CALLBACKS: Final = 1 << 6
# As long as a busy connection may take to send its next segment.
_LIFTED_SECONDS: Final = 0.5
_LINK: Final = "_link"
_PINS: Final = frozenset(name for program, _, _ in _PROGRAMS for name in (program, program + _LINK)) | frozenset(
    name for name, _ in (*_STATE_MAPS, _IDENTITY)
)
# While programs are replaced, a pin's successor stands beside it for a moment.
_OURS: Final = _PINS | {name + STAGED for name in _PINS}
_REPEAT: Final = "attach the pod again to replace it, or detach it"


class Stage(Enum):
    """How far :func:`install` has come; when it returns, the limiter is attached."""

    LOADED = "loaded"
    PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class Status:
    """What a limiter's pins say.

    Attributes:
        pod: whose it is.
        limits: what is in force.
        egress: counted since attach.
        ingress: counted since attach.
        cgroup_id: where it is attached; 0 when that cgroup is gone.
        attached_at: when it was attached, seconds since the epoch.
        build: the digest of its programs, as :attr:`generator.Contents.build`.
        adopted: the connections that were there before are paced like those that came later; else they are only held
            to the limit as a whole.
    """

    pod: PodRef
    limits: Limits
    egress: Counters
    ingress: Counters
    cgroup_id: int
    attached_at: float
    build: bytes = b""
    adopted: bool = True


@dataclass(frozen=True, slots=True)
class Broken:
    """A pod's folder that is no whole limiter."""

    uid: str
    reason: str


class Limiter:
    """A whole limiter, by its folder.

    Attributes:
        pod: whose it is.
        build: the digest of its programs, as :attr:`generator.Contents.build`.
        cgroup_id: where all three programs are attached; 0 when that cgroup is gone.

    Raises (the constructor):
        BrokenLimiterError: the folder is none, or one of another layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = str(folder)  # a node has hundreds, and a Path costs as much as opening a pin
        self.pod, self.build = _identity(self._place)
        try:
            self._data = self.data
            self._limits = law.decode(self._data)
            cgroups = {name: self._linked_cgroup(name) for name, _, _ in _PROGRAMS}
        except (KernelError, ValueError) as error:
            raise _unlike(error) from error
        if len(set(cgroups.values())) > 1:
            loose = ", ".join(name for name, attached in cgroups.items() if attached != max(cgroups.values()))
            raise BrokenLimiterError(f"{loose} is not attached where the rest is: {_REPEAT}")
        self.cgroup_id = max(cgroups.values())

    @property
    def data(self) -> LimitsData:
        """The limits in force, as the programs see them."""
        with self._open("limits") as limits:
            return libbpf.read(limits, 0, LimitsData)

    def change(self, data: LimitsData) -> bool:
        """Put other limits in force; False where they are those already."""
        with self._open("limits") as limits:
            present = libbpf.read(limits, 0, LimitsData)
            data.adopted = present.adopted
            if bytes(present) == bytes(data):
                return False
            libbpf.write(limits, 0, data)
        return True

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return law.decode(self.data)

    def status(self) -> Status:
        """Everything that the pins say; the limits as they were when the folder was opened."""
        with self._open("counters") as counters:
            egress, ingress = map(Counters.total, libbpf.read_per_cpu(counters, (EGRESS, INGRESS), CountersData))
        attached_at = os.stat(f"{self._place}/egress{_LINK}").st_mtime
        adopted = bool(self._data.adopted)
        return Status(self.pod, self._limits, egress, ingress, self.cgroup_id, attached_at, self.build, adopted)

    def upgrade(self, image: bytes) -> None:
        """Put an object's programs in the place of the present ones, on the same maps.

        Nothing is lost, and the limit holds throughout. Cut off on the way, some programs are the new ones: they are
        of the same layout, and the next attach finishes the work.
        """
        with ExitStack() as stack:
            kept = {symbol: stack.enter_context(self._open(name)) for name, symbol in _STATE_MAPS}
            new = stack.enter_context(_load(image, kept))
            programs = {name: new.program(function) for name, function, _ in _PROGRAMS}
            links = {name: stack.enter_context(self._open(name + _LINK)) for name in programs}
            for name, program in programs.items():
                libbpf.replace(links[name], program)
            for name, descriptor in [*programs.items(), (_IDENTITY[0], new.map(_IDENTITY[1]))]:
                successor = self.folder / (name + STAGED)
                if os.path.lexists(successor):
                    successor.unlink()
                descriptor.pin(successor)
                successor.rename(self.folder / name)
        log.info("replaced the programs of %s", self.folder)

    def _linked_cgroup(self, program: str) -> int:
        with self._open(program + _LINK) as link:
            return libbpf.linked(link).cgroup_id

    def _open(self, name: str) -> Descriptor:
        return libbpf.open_pinned(f"{self._place}/{name}")


class Loaded(Protocol):
    """An object in the kernel, whoever has loaded it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def program(self, name: str) -> Descriptor:
        """A program, by its function's name; the descriptor belongs to the object."""

    def map(self, name: str) -> Descriptor:
        """A map, by its name or its section's; the descriptor belongs to the object."""


def load(image: bytes, bpffs: Path) -> Loaded:
    """Have the kernel take a limiter's object, for :func:`install`: what takes time, and changes nothing yet.

    Raises:
        InvalidObjectError: the object holds other programs or maps than a limiter's.
        VerifierError: the kernel does not take its programs.
        KernelError: it refused for another reason.
    """
    with ExitStack() as stack:
        shared = sockets.shared(bpffs)
        for descriptor in shared.values():
            stack.enter_context(descriptor)
        return _load(image, shared)


def install(
    image: bytes,
    path: Path,
    folder: Path,
    report: Callable[[Stage], None] = lambda _: None,
    loaded: Loaded | None = None,
) -> None:
    """Attach a limiter's object to a cgroup and pin it as a folder, in the place of what is there.

    Args:
        image: the object.
        path: the cgroup.
        folder: the limiter's, in the bpffs.
        report: told of each stage.
        loaded: the same object by :func:`load`, if that was called before.

    Raises:
        InvalidObjectError: the object holds other programs or maps than a limiter's.
        KernelError: the kernel refused some step; the limit is as it was.
        PermissionDeniedError: likewise, for want of privileges.
    """
    staged = folder.with_name(folder.name + STAGED)
    retired = folder.with_name(folder.name + RETIRED)
    with ExitStack() as stack:
        target = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, target)
        shared = sockets.shared(folder.parent)
        for descriptor in shared.values():
            stack.enter_context(descriptor)
        if loaded is None or not _shares(loaded, shared):
            loaded = stack.enter_context(_load(image, shared))
        log.info("loaded the programs for %s", path)
        report(Stage.LOADED)
        with ExitStack() as undo:
            undo.callback(_resume_pacing, folder, path, target)
            staged.mkdir(mode=0o700)
            undo.callback(discard, staged)
            for name, symbol in (*_STATE_MAPS, _IDENTITY):
                loaded.map(symbol).pin(staged / name)
            for name, function, _ in _PROGRAMS:
                loaded.program(function).pin(staged / name)
            report(Stage.PINNED)
            for name, function, kind in _PROGRAMS:
                if name == _SOCKOPS and folder.exists():
                    _stop_pacing(folder)
                with libbpf.attach(loaded.program(function), target, kind) as link:
                    link.pin(staged / (name + _LINK))
            if folder.exists():
                folder.rename(retired)
                undo.callback(retired.rename, folder)
            staged.rename(folder)
            undo.pop_all()
        log.info("attached and pinned in %s", folder)
        _adopt(loaded, path)
    if retired.exists():
        _take_down(retired)  # its pacing has gone before, and what it would give back now is its successor's


def remove(folder: Path) -> None:
    """Lift a limiter's limit, whole or broken, give the sockets back what was theirs, and leave nothing behind.

    Raises:
        BrokenLimiterError: as :func:`discard`.
    """
    retired = folder.rename(folder.with_name(folder.name + RETIRED))
    if _attached_to(retired) and not sockets.reachable():
        _lift(retired)
    discard(retired)


def discard(folder: Path) -> None:
    """Remove what is left of a limiter: its pacing, then whatever else is attached, then the folder.

    Raises:
        BrokenLimiterError: the folder holds what bpfrl has not made; that, and the folder, stay.
    """
    _stop_pacing(folder)
    _take_down(folder)


def _take_down(folder: Path) -> None:
    """:func:`discard`, for what does not pace any more."""
    for name, _, _ in _PROGRAMS:
        # Unlinking the pin alone would let go of the cgroup some time later.
        with suppress(KernelError), libbpf.open_pinned(folder / (name + _LINK)) as link:
            libbpf.detach(link)
    try:
        for name in sorted(_OURS.intersection(os.listdir(folder))):
            (folder / name).unlink()
        folder.rmdir()
    except OSError as error:
        raise BrokenLimiterError(f"{folder} holds what bpfrl has not made: look at it, and remove it") from error
    log.info("removed %s", folder)


def others(path: Path, folder: Path) -> bool:
    """True when another limiter than a folder's is on a cgroup, or on one above or below it."""
    own = set()
    with suppress(KernelError), libbpf.open_pinned(folder / (_SOCKOPS + _LINK)) as link:
        own.add(libbpf.linked(link).program_id)
    found = _sockops_on(path, effective=True)
    for below, _, _ in os.walk(path):
        with suppress(FileNotFoundError):  # containers come and go
            found |= _sockops_on(Path(below), effective=False)
    return bool(found - own)


def costs(folder: Path) -> dict[str, Cost]:
    """What each of a limiter's programs has cost, by its pin; one that cannot be looked at is left out."""
    found = {}
    place = str(folder)
    for name, _, _ in _PROGRAMS:
        with suppress(KernelError), libbpf.open_pinned(f"{place}/{name}") as program:
            found[name] = libbpf.cost(program)
    return found


def _identity(folder: str) -> tuple[PodRef, bytes]:
    """Whose a limiter is, and the build of its programs, if its folder holds everything, and nothing else.

    What is pinned cannot change: a folder that is as it was holds what it held. A look at hundreds of them goes by that
    for a quarter of its work, but where one changed so lately that its time may not tell.

    Raises:
        BrokenLimiterError: it does not.
    """
    status = os.stat(folder)
    settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
    look = _identified if settled else _identified.__wrapped__
    return look(folder, status.st_dev, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=_MOST_IDENTIFIED)
def _identified(folder: str, *_version: int) -> tuple[PodRef, bytes]:
    if (names := _names(folder)) is None:
        raise BrokenLimiterError("not made by bpfrl: look at it, and remove it")
    if missing := _PINS - names:
        raise BrokenLimiterError(f"{min(missing)} is missing: {_REPEAT}")
    try:
        with libbpf.open_pinned(f"{folder}/{_IDENTITY[0]}") as pinned:
            identity = libbpf.read(pinned, 0, IdentityData)
        pod = generator.read_identity(identity)
    except (KernelError, ValueError) as error:
        raise _unlike(error) from error
    if identity.layout != LAYOUT or pod is None:
        raise BrokenLimiterError(f"made by another version, with layout {identity.layout}: {_REPEAT}")
    return pod, bytes(identity.build)


def _unlike(error: Exception) -> BrokenLimiterError:
    return BrokenLimiterError(f"made by another version, or by something else ({error}): {_REPEAT}")


def is_ours(folder: Path) -> bool:
    """False for a folder that something else has put under a pod's name: folders and links in it are none of ours."""
    return _names(str(folder)) is not None


def _names(folder: str) -> set[str] | None:
    """The pins in a folder; None for one that holds something else."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    return set(found) if found.keys() <= _OURS and all(found.values()) else None


def leftovers(folder: Path) -> list[Path]:
    """What attaching or detaching this limiter has left behind when it was cut off."""
    return [path for mark in (STAGED, RETIRED) if libbpf.is_folder(path := folder.with_name(folder.name + mark))]


def _load(image: bytes, reuse: Mapping[str, Descriptor]) -> Loaded:
    """Have the kernel take a limiter's object: of our own making here, and of others' where it can do no harm."""
    try:
        known = generator.is_known(image)
    except CompilerError:
        known = False
    data = generator.data(image)
    return LoadedObject(image, reuse, data=data) if known else apart.LoadedApart(image, reuse, _SHAPE, data)


def _shares(loaded: Loaded, shared: Mapping[str, Descriptor]) -> bool:
    """True for an object that has the node's map of what sockets carry: that may have come about meanwhile."""
    return all(libbpf.is_same_map(loaded.map(name), descriptor) for name, descriptor in shared.items())


def _stop_pacing(folder: Path) -> None:
    """Detach what paces, and give the sockets back what was theirs; the limit is still enforced."""
    attached_to = _attached_to(folder)
    with suppress(KernelError), libbpf.open_pinned(folder / (_SOCKOPS + _LINK)) as link:
        libbpf.detach(link)
    path = cgroup.path_of(attached_to) if attached_to else None
    if path is None:
        return
    try:
        with libbpf.open_pinned(folder / sockets.STORAGE) as storage:
            sockets.release(storage, path)
    except BpfrlError as error:
        log.warning("connections that do not send keep the pacing rate they had: %s", error)


def _attached_to(folder: Path) -> int:
    """The id of the cgroup that a limiter is on, whole or broken; 0: of none that is still there."""
    for name, _, _ in _PROGRAMS:
        with suppress(KernelError), libbpf.open_pinned(folder / (name + _LINK)) as link:
            if found := libbpf.linked(link).cgroup_id:
                return found
    return 0


def _lift(folder: Path) -> None:
    """Have no limits for a moment in which sockops gives connections back what was theirs, as they send."""
    with suppress(KernelError), libbpf.open_pinned(folder / "limits") as limits:
        libbpf.write(limits, 0, LimitsData())
        time.sleep(_LIFTED_SECONDS)


def _resume_pacing(folder: Path, path: Path, target: int) -> None:
    """Undo :func:`_stop_pacing` where a cgroup's limiter stays after all; one that still paces is left alone."""
    if not folder.exists():
        return
    pin = folder / (_SOCKOPS + _LINK)
    try:
        with ExitStack() as stack:
            links = [stack.enter_context(libbpf.open_pinned(folder / (name + _LINK))) for name, _, _ in _PROGRAMS]
            *enforcing, pacing = (libbpf.linked(link).cgroup_id for link in links)
            if pacing or cgroup.id_of(path) not in enforcing:
                return
            program, storage = (stack.enter_context(libbpf.open_pinned(folder / name)) for name in _RESUMING)
            link = stack.enter_context(libbpf.attach(program, target, AttachType.CGROUP_SOCK_OPS))
            successor = pin.with_name(pin.name + STAGED)
            link.pin(successor)
            successor.rename(pin)
            sockets.adopt(storage, path, _CALLBACKS)
    except (BpfrlError, OSError) as error:
        log.warning("%s only drops from now on: attach the pod again: %s", folder, error)


def _adopt(loaded: Loaded, path: Path) -> None:
    """Reach the connections that were there before; the limits then tell that this was done.

    The limiter is at work by now: what cannot be done here is no reason to say that it is not.
    """
    try:
        if sockets.adopt(loaded.map(sockets.STORAGE), path, _CALLBACKS).refused:
            raise KernelError("the kernel lacks the option (6.12 has it)")
        limits = loaded.map(_LIMITS)
        data = libbpf.read(limits, 0, LimitsData)
        data.adopted = 1
        libbpf.write(limits, 0, data)
    except BpfrlError as error:
        log.warning("connections that were there before are only policed: %s", error)


def _sockops_on(path: Path, *, effective: bool) -> set[int]:
    target = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with Descriptor(target):
        programs = libbpf.attached(target, AttachType.CGROUP_SOCK_OPS, effective=effective).programs
    return {program.id for program in programs if program.name == "bpfrl_sockops"}
