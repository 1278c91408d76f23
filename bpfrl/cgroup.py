"""From a pod's UID to its cgroup, and back.

The kubelet makes one cgroup per pod, and where it lies depends on the driver, the QoS class and how the node
itself is nested. With ROOT as the cgroup2 mount and, perhaps, some levels below it:

    driver     class       folder
    systemd    Guaranteed  ROOT/kubepods.slice/kubepods-pod<uid>.slice
               Burstable   ROOT/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice
               BestEffort  ROOT/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod<uid>.slice
               nested      ROOT/.../kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod<uid>.slice, and so on
    cgroupfs   Guaranteed  ROOT/kubepods/pod<uid>
               others      ROOT/kubepods/burstable/pod<uid>, ROOT/kubepods/besteffort/pod<uid>
               nested      ROOT/.../kubelet/kubepods/pod<uid>, and so on

systemd writes '-' in the UID as '_', because in the name of a slice it stands for a level. The UID of a
static pod is the hash of its manifest, 32 digits without any '-'.

So the folders that can hold pods ("parents") are few and known by name, and a pod's folder within each is
known exactly: parents are remembered, and a pod costs one look per parent. Only where no parent has the pod are
they looked for anew, in all of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bpfrl import libc
from bpfrl.errors import AmbiguousCgroupError, CgroupNotFoundError, InvalidValueError, PermissionDeniedError
from bpfrl.limits import PodRef
from bpfrl.mounts import mounts

_SLICE: Final = ".slice"
_QOS: Final = ("burstable", "besteffort")
# Whoever waits for a cgroup looks often at first, for the kubelet makes it within milliseconds or within seconds: after
# a tenth more of the time waited so far. A walk of the whole tree, for new parents, is worth it less often.
_POLL_SHARE: Final = 0.1
_SHORTEST_POLL_SECONDS: Final = 0.002
_LONGEST_POLL_SECONDS: Final = 0.1
_SURVEY_SECONDS: Final = 0.5
# As in /proc/net/sockstat and sockstat6.
_TCP_SOCKETS: Final = re.compile(r"^TCP6?: inuse ([0-9]+)", re.MULTILINE)
# What a process of another PID namespace is called.
_ELSEWHERE: Final = "0"


def mount_point() -> Path:
    """Where cgroup v2 is mounted: whole, or beside version 1 (the hybrid layout).

    Raises:
        CgroupNotFoundError: it is not mounted.
    """
    found = mounts("cgroup2")
    if not found:
        raise CgroupNotFoundError("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
    # A container may see bind mounts of parts beside the whole, whose root is "/".
    return min(found, key=lambda mount: (mount.root != "/", len(mount.path.parts))).path


class CgroupTree:
    """The pods' cgroups below a folder, by default the whole of cgroup v2."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or mount_point()
        self._parents: list[Path] = []
        self._surveyed_at = -math.inf

    def find(self, uid: str, *, survey: bool = True) -> Path:
        """The cgroup of the pod with this UID.

        Args:
            uid: the pod's UID.
            survey: walk the tree for new parents where those that are known do not have the pod.

        Raises:
            CgroupNotFoundError: there is none.
            AmbiguousCgroupError: there are several that could be it.
        """
        found = self._look(uid)
        if not found and survey:
            self._parents = list(_parents(self.root))
            self._surveyed_at = time.monotonic()
            found = self._look(uid)
        if not found:
            raise CgroupNotFoundError(f"no cgroup for pod {uid} under {self.root}: is it running on this node?")
        if len(found) > 1:
            raise AmbiguousCgroupError(
                f"several cgroups for pod {uid}, name one with --cgroup: {', '.join(map(str, found))}"
            )
        return found[0]

    def tops(self) -> list[Path]:
        """The folders that hold all pods: ``kubepods.slice`` or its like, mostly one."""
        parents = list(_parents(self.root))
        return [folder for folder in parents if folder.parent not in parents]

    def uids(self) -> list[str]:
        """The UIDs of all pods that have a cgroup here, as their cgroups carry them."""
        found = set()
        for parent in _parents(self.root):
            before, _, after = _pod_folder(parent, "*").partition("*")
            for folder in parent.glob(f"{before}*{after}"):
                uid = folder.name.removeprefix(before).removesuffix(after).replace("_", "-")
                if folder.name == _pod_folder(parent, uid) and _is_own(folder):
                    with contextlib.suppress(InvalidValueError):
                        found.add(PodRef(uid).uid)
        return sorted(found)

    def survey_due(self) -> bool:
        """True when it is worth it to walk the tree again, whoever has done so last."""
        return time.monotonic() - self._surveyed_at >= _SURVEY_SECONDS

    def wait(self, uid: str, seconds: float) -> Path:
        """Like :meth:`find`, but give the kubelet some time to make the cgroup first.

        Raises:
            CgroupNotFoundError: there is none even then.
        """
        search = Search(self, uid, seconds)
        while (found := search.look()) is None:
            time.sleep(search.pause())
        return found

    def _look(self, uid: str) -> list[Path]:
        candidates = (folder / _pod_folder(folder, uid) for folder in self._parents)
        return [folder for folder in candidates if _is_own(folder)]


class Search:
    """Waiting for a pod's cgroup, as looks with pauses between them that are the caller's to sleep.

    >>> search = Search(CgroupTree(), uid, 30)
    >>> while (found := search.look()) is None:
    ...     await asyncio.sleep(search.pause())
    """

    def __init__(self, tree: CgroupTree, uid: str, seconds: float) -> None:
        self._tree = tree
        self._uid = uid
        self._start = time.monotonic()
        self._seconds = seconds

    def look(self) -> Path | None:
        """The cgroup, or None while there is time left for it to come.

        Raises:
            CgroupNotFoundError: there is none, and no time left.
            AmbiguousCgroupError: there are several that could be it.
        """
        last = not time.monotonic() < self._start + self._seconds  # NaN is no time to wait either
        try:
            return self._tree.find(self._uid, survey=self._tree.survey_due())
        except CgroupNotFoundError:
            if last:
                raise
            return None

    def pause(self) -> float:
        """How long to sleep before the next look, s."""
        waited = time.monotonic() - self._start
        pause = min(max(waited * _POLL_SHARE, _SHORTEST_POLL_SECONDS), _LONGEST_POLL_SECONDS)
        return max(0.0, min(pause, self._seconds - waited))


def check(path: Path) -> Path:
    """The path, if it is a folder of cgroup v2.

    Raises:
        InvalidValueError: it is not.
    """
    try:
        device = os.stat(path).st_dev
    except OSError as error:
        raise InvalidValueError(f"'{path}' is no cgroup: {error.strerror}") from error
    if not path.is_dir() or f"{os.major(device)}:{os.minor(device)}" not in {m.device for m in mounts("cgroup2")}:
        raise InvalidValueError(f"'{path}' is no cgroup v2 folder: take one below {mount_point()}")
    return path


def id_of(path: Path) -> int:
    """The id that the kernel knows a cgroup by: on 64-bit machines the inode's number."""
    return os.stat(path).st_ino


def path_of(cgroup_id: int) -> Path | None:
    """The folder of the cgroup with this id, or None if it is gone. Needs CAP_DAC_READ_SEARCH."""
    root = os.open(mount_point(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        node = libc.open_kernfs(root, cgroup_id)
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOENT):
            return None
        raise
    finally:
        os.close(root)
    try:
        return Path(f"/proc/self/fd/{node}").readlink()
    finally:
        os.close(node)


def open_network_namespaces(path: Path, *, with_tcp: bool = False) -> list[int]:
    """A descriptor for each network namespace that processes of a cgroup, and of those below it, are in.

    They are the caller's to close.

    Args:
        path: the cgroup.
        with_tcp: leave out those that have no TCP sockets, as that of a pod that has just begun.

    Raises:
        PermissionDeniedError: some of the processes are hidden from this one.
    """
    found: dict[int, int] = {}
    with contextlib.ExitStack() as undo:
        for folder, _, _ in os.walk(path):
            for pid in _processes(Path(folder)):
                # Opened at once: a process may end at any moment, and its namespace with it.
                try:
                    number = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                except PermissionError as error:
                    raise PermissionDeniedError(
                        f"the network namespace of process {pid} is hidden: this needs root (CAP_SYS_PTRACE)"
                    ) from error
                except OSError:
                    continue
                if with_tcp and not _has_tcp(pid):
                    os.close(number)
                elif found.setdefault(os.fstat(number).st_ino, number) == number:
                    undo.callback(os.close, number)
                else:
                    os.close(number)
        undo.pop_all()
    return list(found.values())


def _has_tcp(pid: str) -> bool:
    """False where a process's network namespace has no TCP sockets for certain."""
    try:
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("sockstat", "sockstat6")]
    except OSError:  # it has just ended, or there is no IPv6
        return True
    return any(_TCP_SOCKETS.findall(table) != ["0"] for table in tables)


def _processes(folder: Path) -> list[str]:
    """The processes of a cgroup; those that end meanwhile, and cgroups that do, are no error."""
    try:
        found = Path(folder, "cgroup.procs").read_text().split()
    except OSError:
        return []
    if _ELSEWHERE in found:
        raise PermissionDeniedError(
            f"the processes of {folder} cannot be seen from this PID namespace: run in the machine's own (hostPID)"
        )
    return found


def _parents(root: Path) -> Iterator[Path]:
    """The folders that can hold pods, from the names that the kubelet gives them; pods are not entered."""
    for folder, subfolders, _ in os.walk(root):
        path = Path(folder)
        if _holds_pods(path):
            yield path
            subfolders[:] = [name for name in subfolders if _holds_pods(path / name)]


def _is_own(folder: Path) -> bool:
    """True for a folder of the tree. There are no links in cgroup v2, but there may be in another root."""
    try:
        return stat.S_ISDIR(folder.lstat().st_mode)
    except OSError:
        return False


def _holds_pods(path: Path) -> bool:
    stem = path.name.removesuffix(_SLICE)
    if path.name.endswith(_SLICE):
        levels = stem.split("-")
        return levels[-1] == "kubepods" or (levels[-2:-1] == ["kubepods"] and levels[-1] in _QOS)
    return stem == "kubepods" or (path.parent.name == "kubepods" and stem in _QOS)


def _pod_folder(parent: Path, uid: str) -> str:
    if parent.name.endswith(_SLICE):
        return f"{parent.name.removesuffix(_SLICE)}-pod{uid.replace('-', '_')}{_SLICE}"
    return f"pod{uid}"
