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
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from bpfrl import cgroup, libc
from bpfrl.bpf import cooperation, generator, law, libbpf, limiter, probe, sockets
from bpfrl.bpf.layout import LimitsData
from bpfrl.bpf.libbpf import Cost
from bpfrl.bpf.limiter import Broken, Limiter, Loaded, Stage, Status
from bpfrl.errors import (
    AlreadyLimitedError,
    BpfrlError,
    BrokenLimiterError,
    CgroupNotFoundError,
    InvalidValueError,
    KernelError,
    NotLimitedError,
    PermissionDeniedError,
)
from bpfrl.limits import Change, Limits, PodRef

log = logging.getLogger(__name__)

DEFAULT_BPFFS: Final = Path("/sys/fs/bpf")
# Changes hold the lock for milliseconds each; who waits as long as this waits for something that hangs.
_LOCK_SECONDS: Final = 30.0
_LOCK_POLL_SECONDS: Final = 0.005
_MARK: Final = re.compile(rf"(?:{limiter.STAGED}|{limiter.RETIRED})$")


class Agent:
    """This node's limiters.

    Args:
        bpffs: where they are pinned; mounted by the first change if nothing is mounted there.
    """

    def __init__(self, bpffs: Path = DEFAULT_BPFFS) -> None:
        self.bpffs = bpffs
        # This process's threads wait for each other here, and wake at once; on others it has to look again and again.
        self._turn = threading.Lock()

    def attach(self, image: bytes, pod: PodRef, path: Path, report: Callable[[Stage], None] = lambda _: None) -> Change:
        """Hold a pod to the limits of an object, from now on.

        A pod that has a limiter keeps it: its limits change by one write, and programs of another build are replaced
        one for one on the same maps. In no case is the pod without a limit for a moment.

        Args:
            image: what :func:`bpfrl.bpf.generator.generate` makes.
            pod: the pod; the object's own identity does not matter.
            path: the pod's cgroup.
            report: told of each stage, where a new limiter is installed.

        Raises:
            InvalidObjectError: the object is no limiter.
            VerifierError: the kernel does not take its programs; the limit is as it was.
            CgroupNotFoundError: the cgroup has gone meanwhile.
            AlreadyLimitedError: a limiter under another name is on this cgroup, or on one above or below it.
            BrokenLimiterError: something else has put a folder where the limiter goes.
            KernelError: the kernel refused; the limit is as it was.
        """
        contents = generator.inspect(image)
        sockets.prepare()
        self.mount()
        with (
            self._loaded(image, contents, pod, path) as (cgroup_id, loaded),
            self._lock(fcntl.LOCK_EX),
            _present(path),
        ):
            folder = self._clean(pod.uid)
            current = _open(folder)
            if limiter.others(path, folder):
                raise AlreadyLimitedError(
                    f"{path}, or a cgroup above or below it, has a limiter under another name:"
                    " bpfrl list -o wide shows it; detach it first"
                )
            number = cgroup.id_of(path)
            if current is None or current.cgroup_id != number:
                labelled = generator.relabel(image, contents, pod, number)
                with _explained():
                    limiter.install(labelled, path, folder, report, loaded if cgroup_id == number else None)
                return Change.ATTACHED
            if not _runs(current, pod, contents.build):
                current.upgrade(generator.relabel(image, contents, pod if pod.name else current.pod, current.cgroup_id))
                current.change(contents.data)
                return Change.UPDATED
            return _set(current, contents.data)

    @contextmanager
    def _loaded(
        self, image: bytes, contents: generator.Contents, pod: PodRef, path: Path
    ) -> Iterator[tuple[int, Loaded | None]]:
        """An object in the kernel, where the pod has no limiter yet, and for which cgroup.

        That takes most of the time of an attach, and nobody else has to wait for it.
        """
        with ExitStack() as stack:
            with _present(path):
                number, loaded = cgroup.id_of(path), None
                with self._lock(fcntl.LOCK_SH):
                    folder = self.bpffs / pod.uid
                    current = None if limiter.leftovers(folder) else _open(folder)
                if current is None or current.cgroup_id != number:
                    labelled = generator.relabel(image, contents, pod, number)
                    with _explained():
                        loaded = stack.enter_context(limiter.load(labelled, self.bpffs))
            yield number, loaded

    def has(self, uid: str) -> bool:
        """True where a pod may have a limiter: a look that waits for nobody, and says nothing of what it is."""
        return os.path.lexists(self.bpffs / uid)

    def runs(self, pod: PodRef, path: Path, build: bytes) -> bool:
        """True where a pod has the programs of a build on its cgroup, so that only its limits may have to change.

        Raises:
            CgroupNotFoundError: the cgroup has gone.
            BrokenLimiterError: something else has put a folder where the limiter goes.
        """
        if not self.is_mounted():
            return False
        with self._lock(fcntl.LOCK_SH), _present(path):
            folder = self.bpffs / pod.uid
            current = None if limiter.leftovers(folder) else _open(folder)
            return current is not None and current.cgroup_id == cgroup.id_of(path) and _runs(current, pod, build)

    def update(self, uid: str, limits: Limits) -> Change:
        """Change the limits of a pod that has some, by one write: no gap, no new programs.

        Raises:
            InvalidValueError: this is no UID.
            NotLimitedError: the pod has no limiter, or a broken one.
            BrokenLimiterError: what is there was not made by bpfrl.
            KernelError: the kernel refused.
        """
        folder = self.bpffs / PodRef(uid).uid
        if self.is_mounted():
            with self._lock(fcntl.LOCK_EX):
                # Beside what a call that was cut off has left, another limiter may be at work: attaching clears that.
                current = None if limiter.leftovers(folder) else _open(folder)
                if current is not None and current.cgroup_id:
                    return _set(current, law.encode(limits))
        raise NotLimitedError(f"pod {uid} has no whole limiter here to update: attach one")

    def detach(self, uid: str) -> Change:
        """Take a pod's limiter off, whole or broken; :attr:`Change.ABSENT` if it has none.

        Raises:
            InvalidValueError: this is no UID.
            BrokenLimiterError: what is there was not made by bpfrl.
            KernelError: the kernel refused.
        """
        uid = PodRef(uid).uid
        if not self.is_mounted():
            return Change.ABSENT
        with self._lock(fcntl.LOCK_EX):
            return self._detach(uid)

    def detach_cgroup(self, path: Path) -> tuple[str, Change]:
        """Take the limiter off a cgroup, whatever its name, and return that too."""
        wanted = cgroup.id_of(path)
        for found in self.limiters():
            if isinstance(found, Status) and found.cgroup_id == wanted:
                return found.pod.uid, self.detach(found.pod.uid)
        own = PodRef.of_cgroup(wanted).uid
        return own, self.detach(own)

    def limiters(self) -> list[Status | Broken]:
        """Every limiter of this node, and every folder that should be one, by UID."""
        if not self.is_mounted():
            return []
        with self._lock(fcntl.LOCK_SH):
            names = set(os.listdir(self.bpffs))  # once, and not for each
            return [self._look(uid, names) for uid in self._uids()]

    def costs(self) -> list[tuple[str, Cost]]:
        """What each program of bpfrl on this node has cost, by what it does: egress, ingress, sockops, cooperate."""
        if not self.is_mounted():
            return []
        with self._lock(fcntl.LOCK_SH):
            found = [each for uid in self._uids() for each in limiter.costs(self.bpffs / uid).items()]
            return found + [("cooperate", each) for each in cooperation.costs(self.bpffs)]

    def limiter(self, uid: str) -> Status | Broken | None:
        """A pod's limiter, or the folder that should be one; None where it has neither.

        Raises:
            InvalidValueError: this is no UID.
        """
        uid = PodRef(uid).uid
        if not self.is_mounted():
            return None
        with self._lock(fcntl.LOCK_SH):
            return self._look(uid) if uid in self._uids() else None

    def count_sockets(self, uid: str, path: Path) -> sockets.Counted:
        """How many TCP sockets a pod's limiter has, in the network namespaces of its cgroup's processes.

        Raises:
            NotLimitedError: the pod has no limiter.
            CompilerError: what counts is not in the cache, and clang cannot make it.
            KernelError: the kernel refused, or is too old.
        """
        with self._lock(fcntl.LOCK_SH):
            folder = self.bpffs / PodRef(uid).uid
            if not libbpf.is_folder(folder):
                raise NotLimitedError(f"pod {uid} has no limiter any more")
            storage = libbpf.open_pinned(folder / sockets.STORAGE)
        with storage, _present(path):  # nobody has to wait while the sockets are visited
            return sockets.count(storage, path)

    def sweep(self) -> list[str]:
        """Remove the limiters whose cgroup is gone and what was cut off on its way in or out; return their UIDs."""
        if not self.is_mounted():
            return []
        with self._lock(fcntl.LOCK_EX):
            cooperation.sweep(self.bpffs)
            return [uid for uid in self._uids() if self._swept(uid)]

    def cooperate(self, path: Path) -> bool:
        """Have senders below a cgroup keep to the rates that limited receivers ask for, and these ask.

        Returns:
            False where that is so already.

        Raises:
            CompilerError: the program is not in the cache, and clang cannot make it.
            CgroupNotFoundError: the cgroup has gone meanwhile.
            KernelError: the kernel refused; nothing is left of it.
        """
        self.mount()
        with self._lock(fcntl.LOCK_EX), _present(path), _explained():
            return cooperation.attach(path, self.bpffs)

    def stop_cooperating(self, cgroup_id: int) -> bool:
        """Undo :meth:`cooperate`; False where there is nothing to undo.

        Raises:
            KernelError: the kernel refused.
        """
        if not self.is_mounted():
            return False
        with self._lock(fcntl.LOCK_EX):
            return cooperation.detach(cgroup_id, self.bpffs)

    def cooperating(self) -> list[int]:
        """The ids of the cgroups below which senders cooperate."""
        if not self.is_mounted():
            return []
        with self._lock(fcntl.LOCK_SH):
            return cooperation.attached(self.bpffs)

    def mount(self) -> None:
        """Mount a BPF file system where the limiters go, unless one is there.

        Raises:
            KernelError: something else is there, or the kernel refused.
            PermissionDeniedError: this needs root.
        """
        if self.is_mounted():
            return
        with self._lock(fcntl.LOCK_EX):  # of the bare folder: two mounts would hide each other
            if self.is_mounted():
                return
            if os.listdir(self.bpffs):
                raise KernelError(f"{self.bpffs} is no BPF file system, and not empty: name another with --bpffs")
            try:
                libc.mount("bpf", self.bpffs, libc.MOUNT_NO_TRICKS, "mode=0700")
            except OSError as error:
                raise _refused(f"mount a BPF file system on {self.bpffs}", error) from error
        log.info("mounted a BPF file system on %s", self.bpffs)

    def is_mounted(self) -> bool:
        """True where the bpffs is; without it there is no limiter.

        Raises:
            PermissionDeniedError: that cannot be seen.
        """
        try:
            return libc.file_system(self.bpffs) == libc.BPF_FS
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError as error:
            raise _refused(f"look into {self.bpffs}", error) from error

    def _swept(self, uid: str) -> bool:
        try:
            left = bool(limiter.leftovers(self.bpffs / uid))
            self._clean(uid)
            found = self._look(uid)
            gone = isinstance(found, Status) and not found.cgroup_id
            if gone:
                self._detach(uid)
        except (PermissionDeniedError, PermissionError):
            raise
        except (BpfrlError, OSError) as error:
            log.warning("cannot sweep %s: %s", self.bpffs / uid, error)
            return False
        return left or gone

    def _detach(self, uid: str) -> Change:
        left = bool(limiter.leftovers(self.bpffs / uid))
        folder = self._clean(uid)
        if not libbpf.is_folder(folder):
            return Change.DETACHED if left else Change.ABSENT
        _refuse_foreign(folder)
        limiter.remove(folder)
        return Change.DETACHED

    def _uids(self) -> list[str]:
        """The pods that have a folder here; what has another kind of name, or is none, is not ours."""
        found = set()
        for name in libbpf.folders(self.bpffs):
            uid = _MARK.sub("", name)
            with suppress(InvalidValueError):
                found.add(PodRef(uid).uid)
        return sorted(found)

    def _look(self, uid: str, names: Container[str] | None = None) -> Status | Broken:
        folder = self.bpffs / uid
        try:
            marked = names is None or uid + limiter.STAGED in names or uid + limiter.RETIRED in names
            if marked and limiter.leftovers(folder):
                return Broken(uid, "attach or detach was cut off: repeat it")
            return Limiter(folder).status()
        except (PermissionDeniedError, PermissionError):
            raise
        except (BpfrlError, OSError) as error:
            return Broken(uid, str(error))

    def _clean(self, uid: str) -> Path:
        """The pod's folder, with nothing beside it that an earlier call left behind."""
        folder = self.bpffs / uid
        for left in limiter.leftovers(folder):
            log.warning("removing %s, left behind by a call that was cut off", left)
            limiter.discard(left)
        return folder

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        """Hold the bpffs against others; what needs more privileges in there says so in one way."""
        deadline = time.monotonic() + _LOCK_SECONDS
        if not self._turn.acquire(timeout=_LOCK_SECONDS):
            raise KernelError(f"another change or look holds {self.bpffs} for {_LOCK_SECONDS:.0f} s")
        try:
            with self._hold(kind, deadline):
                yield
        finally:
            self._turn.release()

    @contextmanager
    def _hold(self, kind: int, deadline: float) -> Iterator[None]:
        try:
            number = os.open(self.bpffs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _refused(f"open {self.bpffs}", error) from error
        try:
            while not _locked(number, kind):
                if time.monotonic() > deadline:
                    raise KernelError(f"another process holds {self.bpffs}: fuser -v {self.bpffs} tells which")
                time.sleep(_LOCK_POLL_SECONDS)
            yield
        except PermissionError as error:
            raise _refused(f"change or read {self.bpffs}", error) from error
        finally:
            os.close(number)


@contextmanager
def _explained() -> Iterator[None]:
    """Have a kernel that is too old say so."""
    try:
        yield
    except KernelError as error:
        raise probe.explain(error) from error


def _locked(number: int, kind: int) -> bool:
    try:
        fcntl.flock(number, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refused(action: str, error: OSError) -> KernelError | PermissionDeniedError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"cannot {action}: this needs root")
    return KernelError(f"cannot {action}: {error.strerror}")


def _refuse_foreign(folder: Path) -> None:
    if not limiter.is_ours(folder):
        raise BrokenLimiterError(f"{folder} holds what was not made by bpfrl: look at it, and remove it")


@contextmanager
def _present(path: Path) -> Iterator[None]:
    """Pods end at any moment: what fails because the cgroup has gone says so."""
    try:
        yield
    except (OSError, KernelError) as error:
        if path.exists():
            raise
        raise CgroupNotFoundError(f"{path} has gone: the pod has ended") from error


def _runs(current: Limiter, pod: PodRef, build: bytes) -> bool:
    return current.build == build and (not pod.name or current.pod == pod)


def _set(current: Limiter, data: LimitsData) -> Change:
    return Change.UPDATED if current.change(data) else Change.UNCHANGED


def _open(folder: Path) -> Limiter | None:
    """The limiter in a folder, or None where there is none or only what is left of one."""
    if not libbpf.is_folder(folder):
        return None
    _refuse_foreign(folder)
    try:
        return Limiter(folder)
    except BrokenLimiterError as error:
        log.info("%s is broken: %s", folder, error)
        return None
