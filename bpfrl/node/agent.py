"""Attach, update, detach and list on this node.

The command line and the daemon are two faces of this module. It keeps nothing in memory: the bpffs says what is
attached, so any number of processes may do this side by side and a restart forgets nothing. Changes take an exclusive
lock on the bpffs for the milliseconds that they last, and looking takes a shared one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Final

from bpfrl import cgroup, libc
from bpfrl.bpf import generator, limiter
from bpfrl.bpf.limiter import Broken, Limiter, Status
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import BpfrlError, BrokenLimiterError, InvalidValueError, KernelError, PermissionDeniedError
from bpfrl.limits import PodRef
from bpfrl.mounts import mounts

log = logging.getLogger(__name__)

DEFAULT_BPFFS: Final = Path("/sys/fs/bpf")
_MARK: Final = re.compile(rf"(?:{limiter.STAGED}|{limiter.RETIRED})$")


class Change(Enum):
    """What a call changed, in the past tense of its one-line report."""

    ATTACHED = "limited"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    DETACHED = "detached"
    ABSENT = "not limited"


class Agent:
    """This node's limiters.

    Args:
        bpffs: where they are pinned; mounted by the first change if nothing is mounted there.
        tree: where pods' cgroups are looked for.
    """

    def __init__(self, bpffs: Path = DEFAULT_BPFFS, tree: CgroupTree | None = None) -> None:
        self.bpffs = bpffs
        self.tree = tree or CgroupTree()

    def attach(self, image: bytes, pod: PodRef, path: Path) -> Change:
        """Hold a pod to the limits of an object, from now on.

        A pod that has a limiter keeps it: its limits change by one write, and programs of another build are replaced
        one for one on the same maps. In no case is the pod without a limit for a moment.

        Args:
            image: what :func:`bpfrl.bpf.generator.generate` makes.
            pod: the pod; the object's own identity does not matter.
            path: the pod's cgroup.

        Raises:
            InvalidObjectError: the object is no limiter.
            BrokenLimiterError: something else has put a folder where the limiter goes.
            KernelError: the kernel refused; everything is as it was.
        """
        contents = generator.inspect(image)
        self._mount()
        with self._lock(fcntl.LOCK_EX):
            folder = self._clean(pod)
            current = _open(folder)
            if current is None or current.cgroup_id() != cgroup.id_of(path):
                limiter.install(generator.relabel(image, pod), path, folder)
                return Change.ATTACHED
            if current.build != contents.build or (pod.name and current.pod != pod):
                current.upgrade(generator.relabel(image, pod if pod.name else current.pod))
            elif current.limits == contents.limits:
                return Change.UNCHANGED
            current.limits = contents.limits
            return Change.UPDATED

    def detach(self, uid: str) -> Change:
        """Take a pod's limiter off, whole or broken; :attr:`Change.ABSENT` if it has none.

        Raises:
            BrokenLimiterError: the folder there was not made by bpfrl.
            KernelError: the kernel refused.
        """
        if not self._is_mounted():
            return Change.ABSENT
        with self._lock(fcntl.LOCK_EX):
            pod = PodRef(uid)
            left = bool(limiter.leftovers(self.bpffs / uid))
            folder = self._clean(pod)
            if not folder.exists():
                return Change.DETACHED if left else Change.ABSENT
            current = _open(folder)
            if current is None:
                limiter.discard(folder)
            else:
                current.remove()
            return Change.DETACHED

    def limiters(self) -> list[Status | Broken]:
        """Every limiter of this node, and every folder that should be one, by UID."""
        if not self._is_mounted():
            return []
        with self._lock(fcntl.LOCK_SH):
            return [self._look(uid) for uid in self._uids()]

    def sweep(self) -> list[str]:
        """Remove the limiters whose cgroup is gone, and return their UIDs."""
        gone = [status.pod.uid for status in self.limiters() if isinstance(status, Status) and not status.cgroup_id]
        return [uid for uid in gone if self.detach(uid) is Change.DETACHED]

    def _uids(self) -> list[str]:
        """The pods that have a folder here; what has another kind of name is not ours."""
        found = set()
        for entry in os.scandir(self.bpffs):
            uid = _MARK.sub("", entry.name)
            try:
                PodRef(uid)
            except InvalidValueError:
                continue
            if entry.is_dir(follow_symlinks=False):
                found.add(uid)
        return sorted(found)

    def _look(self, uid: str) -> Status | Broken:
        folder = self.bpffs / uid
        try:
            if limiter.leftovers(folder):
                return Broken(uid, "attach or detach was cut off: repeat it")
            return Limiter(folder).status()
        except (BpfrlError, OSError) as error:
            if isinstance(error, PermissionDeniedError):
                raise
            return Broken(uid, str(error))

    def _clean(self, pod: PodRef) -> Path:
        """The pod's folder, with nothing beside it that an earlier call left behind."""
        folder = self.bpffs / pod.uid
        for left in limiter.leftovers(folder):
            log.warning("removing %s, left behind by a call that was cut off", left)
            limiter.discard(left)
        return folder

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        try:
            number = os.open(self.bpffs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError as error:
            raise PermissionDeniedError(f"cannot open {self.bpffs}: this needs root") from error
        try:
            fcntl.flock(number, kind)
            yield
        finally:
            os.close(number)

    def _is_mounted(self) -> bool:
        try:
            device = os.stat(self.bpffs).st_dev
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise PermissionDeniedError(f"cannot look into {self.bpffs}: this needs root") from error
        return f"{os.major(device)}:{os.minor(device)}" in {mount.device for mount in mounts("bpf")}

    def _mount(self) -> None:
        if self._is_mounted():
            return
        try:
            libc.mount("bpf", self.bpffs, libc.MOUNT_NO_TRICKS, "mode=0700")
        except PermissionError as error:
            raise PermissionDeniedError(f"cannot mount a bpffs on {self.bpffs}: this needs root") from error
        except OSError as error:
            raise KernelError(f"cannot mount a bpffs on {self.bpffs}: {error.strerror}") from error
        log.info("mounted a bpffs on %s", self.bpffs)


def _open(folder: Path) -> Limiter | None:
    """The limiter in a folder, or None where there is none or only what is left of one."""
    if not folder.exists():
        return None
    if not limiter.is_ours(folder):
        raise BrokenLimiterError(f"{folder} was not made by bpfrl: remove it, or find out what made it")
    try:
        return Limiter(folder)
    except BrokenLimiterError as error:
        log.warning("%s; it is replaced", error)
        return None
