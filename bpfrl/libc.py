"""What bpfrl needs of libc and Python 3.11 does not have: five system calls, and two words to malloc."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

BPF_FS: Final = 0xCAFE4A11  # linux/magic.h: BPF_FS_MAGIC
CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
MOUNT_NO_TRICKS: Final = 2 | 4 | 8  # linux/mount.h: MS_NOSUID, MS_NODEV, MS_NOEXEC
_ARENA_MAX: Final = -8  # malloc.h: M_ARENA_MAX
_FILEID_KERNFS: Final = 0xFE  # linux/exportfs.h
_STATFS_WORDS: Final = 16  # sys/statfs.h: struct statfs has 15, and its kind is the first


class _KernfsHandle(ctypes.Structure):
    """struct file_handle (fcntl.h) with a kernfs node's id, which is 64 bits, as its content."""

    _fields_ = (("handle_bytes", ctypes.c_uint), ("handle_type", ctypes.c_int), ("id", ctypes.c_uint64))
    _pack_ = 4


def mount(kind: str, target: Path, flags: int, options: str) -> None:
    """Mount a file system that has no device (mount(2)). Raises OSError."""
    _check(_libc.mount(kind.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()))


def file_system(path: Path) -> int:
    """Which kind of file system a path is in, by its magic number (statfs(2)). Raises OSError."""
    found = (ctypes.c_ulong * _STATFS_WORDS)()
    _check(_libc.statfs(os.fsencode(path), found))
    return found[0]


def setns(namespace: int, kind: int) -> None:
    """Move the calling thread into the namespace of a descriptor (setns(2)). Raises OSError."""
    _check(_libc.setns(namespace, kind))


def unshare(kinds: int) -> None:
    """Move the calling thread into new namespaces of these kinds (unshare(2)). Raises OSError."""
    _check(_libc.unshare(kinds))


def open_kernfs(mounted: int, node: int) -> int:
    """Open a node of a kernfs, such as a cgroup, by its id (open_by_handle_at(2)). Raises OSError."""
    handle = _KernfsHandle(ctypes.sizeof(ctypes.c_uint64), _FILEID_KERNFS, node)
    return _check(_libc.open_by_handle_at(mounted, ctypes.byref(handle), os.O_RDONLY | os.O_CLOEXEC))


def share_arena() -> None:
    """Have all threads allocate from one arena (mallopt(3)); to be called before there are threads.

    glibc gives each thread an arena of its own, up to eight a CPU, and what is free in one is of no use to the others:
    beside the interpreter's lock, gRPC's dozen threads lose less by waiting for each other than by that.
    A libc that has no arenas is left as it is.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Let the kernel have what is free (malloc_trim(3)), which after many connections is most of what they took.

    A libc that cannot is left as it is.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
