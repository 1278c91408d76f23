"""One limiter in the kernel: installing it, and everything that is done to its pins afterwards.

A limiter is a folder in the bpffs that holds three links, their programs and their maps, and the folder is all there
is: no process and no file knows more. It is whole or it does not exist. :func:`install` builds it under a name
of its own and renames it when its last link is pinned; :meth:`Limiter.remove` renames it back before
the first pin goes. What a crash leaves behind therefore never has a limiter's name, and :func:`leftovers` finds it.
(bpffs refuses a '.' in names, so the marks below do without.)
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpfrl import cgroup
from bpfrl.bpf import generator, law, libbpf, sockets
from bpfrl.bpf.layout import EGRESS, INGRESS, LAYOUT, Counters, CountersData, IdentityData, LimitsData
from bpfrl.bpf.libbpf import AttachType, Descriptor, LoadedObject
from bpfrl.errors import BrokenLimiterError, KernelError
from bpfrl.limits import Limits, PodRef

STAGED: Final = "~new"
RETIRED: Final = "~old"

# A program's pin, its function in the object, and where it attaches. Pacing comes first: what
# enforces should find senders that have been told.
_PROGRAMS: Final = (
    ("sockops", "bpfrl_sockops", AttachType.CGROUP_SOCK_OPS),
    ("egress", "bpfrl_egress", AttachType.CGROUP_INET_EGRESS),
    ("ingress", "bpfrl_ingress", AttachType.CGROUP_INET_INGRESS),
)
# A map's pin, and its name in the object. The identity stands apart: it goes with the programs' build.
_STATE_MAPS: Final = (
    ("limits", ".data.limits"),
    ("state", ".bss"),
    ("counters", "counters"),
    ("sockets", "sockets"),
)
_IDENTITY: Final = ("identity", ".rodata.identity")
_LINK: Final = "_link"
_PINS: Final = frozenset(name for program, _, _ in _PROGRAMS for name in (program, program + _LINK)) | frozenset(
    name for name, _ in (*_STATE_MAPS, _IDENTITY)
)


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
    """

    pod: PodRef
    limits: Limits
    egress: Counters
    ingress: Counters
    cgroup_id: int
    attached_at: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A pod's folder that is no whole limiter."""

    uid: str
    reason: str


class Limiter:
    """A whole limiter, by its folder.

    Raises (the constructor):
        BrokenLimiterError: the folder is none, or one of another layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = _PINS - set(os.listdir(folder))
        if missing:
            raise BrokenLimiterError(f"{folder} is no whole limiter: {', '.join(sorted(missing))} missing")
        try:
            with self._open(_IDENTITY[0]) as identity:
                self._identity = libbpf.read(identity, 0, IdentityData)
            pod = generator.read_identity(self._identity)
            _ = self.limits
        except (KernelError, ValueError) as error:
            raise BrokenLimiterError(f"{folder} was made by another version, or by something else: {error}") from error
        if self._identity.layout != LAYOUT or pod is None:
            raise BrokenLimiterError(f"{folder} was made by another version, with layout {self._identity.layout}")
        self.pod = pod

    @property
    def build(self) -> bytes:
        """The digest of the programs, as :attr:`generator.Contents.build`."""
        return bytes(self._identity.build)

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        with self._open("limits") as limits:
            return law.decode(libbpf.read(limits, 0, LimitsData))

    @limits.setter
    def limits(self, limits: Limits) -> None:
        with self._open("limits") as current:
            libbpf.write(current, 0, law.encode(limits))

    def cgroup_id(self) -> int:
        """The cgroup that all three programs run for; 0 when it is gone."""
        attached = set()
        for name, _, _ in _PROGRAMS:
            with self._open(name + _LINK) as link:
                attached.add(libbpf.linked_cgroup(link))
        return attached.pop() if len(attached) == 1 else 0

    def status(self) -> Status:
        """Everything that the pins say."""
        with self._open("counters") as counters:
            egress, ingress = (
                Counters.total(libbpf.read_per_cpu(counters, direction, CountersData))
                for direction in (EGRESS, INGRESS)
            )
        attached_at = (self.folder / ("egress" + _LINK)).stat().st_mtime
        return Status(self.pod, self.limits, egress, ingress, self.cgroup_id(), attached_at)

    def upgrade(self, image: bytes) -> None:
        """Put an object's programs in the place of the present ones, on the same maps.

        Nothing is lost, and the limit holds throughout.
        """
        with ExitStack() as stack:
            kept = {symbol: stack.enter_context(self._open(name)) for name, symbol in _STATE_MAPS}
            new = stack.enter_context(LoadedObject(image, reuse=kept))
            for name, function, _ in _PROGRAMS:
                libbpf.replace(stack.enter_context(self._open(name + _LINK)), new.program(function))
            pins = [(name, new.program(function)) for name, function, _ in _PROGRAMS]
            for name, descriptor in [*pins, (_IDENTITY[0], new.map(_IDENTITY[1]))]:
                (self.folder / name).unlink()
                descriptor.pin(self.folder / name)

    def remove(self) -> None:
        """Lift the limit, give the sockets back what was theirs, and leave nothing behind.

        The limit goes first: from then on no socket is paced anew. Cut off before the rename, this
        leaves a whole limiter without limits, for which this can be called again.
        """
        self.limits = Limits()
        cgroup_id = self.cgroup_id()
        path = cgroup.path_of(cgroup_id) if cgroup_id else None
        if path:
            with self._open("sockets") as storage:
                sockets.release(storage, cgroup.network_namespaces(path))
        retired = self.folder.with_name(self.folder.name + RETIRED)
        self.folder.rename(retired)
        discard(retired)

    def _open(self, name: str) -> Descriptor:
        return libbpf.open_pinned(self.folder / name)


def install(image: bytes, path: Path, folder: Path) -> None:
    """Attach a limiter's object to a cgroup and pin it as a folder, in the place of what is there.

    Raises:
        KernelError: the kernel refused some step; everything is as it was.
        PermissionDeniedError: likewise, for want of privileges.
    """
    staged = folder.with_name(folder.name + STAGED)
    retired = folder.with_name(folder.name + RETIRED)
    target = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as undo, LoadedObject(image) as loaded:
        undo.callback(os.close, target)
        with ExitStack() as undo_staging:
            staged.mkdir(mode=0o700)
            undo_staging.callback(discard, staged)
            for name, symbol in (*_STATE_MAPS, _IDENTITY):
                loaded.map(symbol).pin(staged / name)
            for name, function, kind in _PROGRAMS:
                program = loaded.program(function)
                program.pin(staged / name)
                with libbpf.attach(program, target, kind) as link:
                    link.pin(staged / (name + _LINK))
            if folder.exists():
                folder.rename(retired)
                undo_staging.callback(retired.rename, folder)
            staged.rename(folder)
            undo_staging.pop_all()
    if retired.exists():
        discard(retired)


def discard(folder: Path) -> None:
    """Remove what is left of a limiter: first whatever is attached, then the folder."""
    for name, _, _ in _PROGRAMS:
        pin = folder / (name + _LINK)
        if os.path.lexists(pin):
            # Unlinking alone would let go of the cgroup some time later.
            with suppress(KernelError), libbpf.open_pinned(pin) as link:
                libbpf.detach(link)
            pin.unlink()
    shutil.rmtree(folder)


def is_ours(folder: Path) -> bool:
    """False for a folder that something else has put under a pod's name."""
    entries = set(os.listdir(folder))
    return not entries or bool(entries & _PINS)


def leftovers(folder: Path) -> list[Path]:
    """What attaching or detaching this limiter has left behind when it was cut off."""
    candidates = (folder.with_name(folder.name + mark) for mark in (STAGED, RETIRED))
    return [path for path in candidates if path.is_dir()]
