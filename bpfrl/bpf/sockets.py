"""The TCP sockets that are there already.

Programs on a cgroup see a connection begin; what is set on a socket stays there when they go. ``sockets.bpf.c`` reaches
sockets from outside, idle ones too: those that began before a limiter came, and those that it has left behind. It
visits the sockets of one network namespace, so it is run once for each namespace that the pod's processes are in.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from bpfrl import cgroup, libc
from bpfrl.bpf import generator, libbpf
from bpfrl.bpf.layout import SOCKET_BYTES, VisitData
from bpfrl.bpf.libbpf import Descriptor, LoadedObject, MapShape, MapType
from bpfrl.errors import BpfrlError, BrokenLimiterError, CompilerError, KernelError, VerifierError

log = logging.getLogger(__name__)

_SOURCE: Final = "sockets.bpf.c"
_VISIT: Final = ".bss"
# linux/bpf.h
_NO_PREALLOC: Final = 1 << 0

_RELEASE: Final = "bpfrl_release"
# The map, and its pin: a node has one.
STORAGE: Final = "sockets"
SHAPE: Final = MapShape(MapType.SK_STORAGE, 4, SOCKET_BYTES, 0, _NO_PREALLOC)


class Visited(NamedTuple):
    """How many sockets a program has dealt with, and how many the kernel did not let it."""

    done: int
    refused: int


class Counted(NamedTuple):
    """How many sockets a limiter knows, and how many of these have a pacing rate set."""

    known: int
    paced: int


def reachable() -> bool:
    """True where the sockets that are there already can be visited: the kernel can, and the program is to be had."""
    try:
        _try_release()
    except BpfrlError:
        return False
    return True


@cache  # what works once goes on working
def _try_release() -> None:
    with LoadedObject(generator.compile_object(_SOURCE), programs={_RELEASE}):
        pass


@cache  # and warn of it once
def prepare() -> None:
    """Compile what reaches sockets, while whoever attaches can still do something about it."""
    try:
        generator.compile_object(_SOURCE)
    except CompilerError as error:
        log.warning("connections that are there already cannot be reached: %s", error)


def adopt(storage: Descriptor, path: Path, callbacks: int) -> Visited:
    """Have the connections that a cgroup's processes have already be paced as new ones are.

    Args:
        storage: the node's socket storage map.
        path: the cgroup, in whose processes' network namespaces the sockets are looked for.
        callbacks: what they are to call sockops for, as BPF_SOCK_OPS_*_CB_FLAG.

    Raises:
        CompilerError: the program is not in the cache, and clang cannot make it.
        KernelError: the kernel has no such iterators, or not what they read (before 6.1), or refused.
    """
    return _visited("bpfrl_adopt", storage, path, VisitData(cgroup=cgroup.id_of(path), callbacks=callbacks))


def release(storage: Descriptor, path: Path) -> Visited:
    """Give back its pacing rate and windows to every TCP socket that a cgroup's limiter has; as :func:`adopt`."""
    return _visited(_RELEASE, storage, path, VisitData(cgroup=cgroup.id_of(path)))


def forget(storage: Descriptor, path: Path) -> Visited:
    """Let every TCP socket of a cgroup forget what its receiver has asked for; as :func:`adopt`."""
    return _visited("bpfrl_forget", storage, path, VisitData(cgroup=cgroup.id_of(path)))


def count(storage: Descriptor, path: Path) -> Counted:
    """How many TCP sockets a cgroup's limiter has, and how many of them are paced; as :func:`adopt`."""
    found = _visit("bpfrl_count", storage, path, VisitData(cgroup=cgroup.id_of(path)))
    return Counted(found.done, found.paced)


# A folder in which the map was found: with hundreds of pods, looking for one takes longer than opening it.
_lately: Path | None = None


def shared(bpffs: Path) -> dict[str, Descriptor]:
    """The node's map of what sockets carry, by its name, if anything pinned there has it; the caller closes it."""
    global _lately  # noqa: PLW0603
    lately = _lately
    for folder in chain([lately] if lately else (), map(bpffs.joinpath, libbpf.folders(bpffs))):
        with suppress(KernelError, BrokenLimiterError), ExitStack() as stack:
            if folder.parent != bpffs or not libbpf.is_folder(folder):
                continue
            found = stack.enter_context(libbpf.open_pinned(folder / STORAGE))
            if libbpf.has_shape(found, SHAPE):
                stack.pop_all()
                _lately = folder
                return {STORAGE: found}
    return {}


def _visited(name: str, storage: Descriptor, path: Path, data: VisitData) -> Visited:
    found = _visit(name, storage, path, data)
    return Visited(found.done, found.refused)


def _visit(name: str, storage: Descriptor, path: Path, data: VisitData) -> VisitData:
    with ExitStack() as stack:
        numbers = cgroup.open_network_namespaces(path, with_tcp=True)
        namespaces = [stack.enter_context(Descriptor(number)) for number in numbers]
        if not namespaces:
            return data
        image = generator.compile_object(_SOURCE)
        try:
            loaded = stack.enter_context(LoadedObject(image, reuse={STORAGE: storage}, programs={name}))
        except VerifierError as error:
            raise KernelError(f"iterators over sockets, which Linux 6.1 has, cannot be loaded: {error}") from error
        program, visit = loaded.program(name), loaded.map(_VISIT)
        libbpf.write(visit, 0, data)
        for namespace in namespaces:
            # setns(2) moves a thread: one of its own, so that nothing else is moved.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(_iterate_in, namespace, program).result()
        return libbpf.read(visit, 0, VisitData)


def _iterate_in(namespace: Descriptor, program: Descriptor) -> None:
    try:
        libc.setns(namespace.number, libc.CLONE_NEWNET)
        libbpf.iterate(program)
    except OSError as error:
        raise KernelError(f"cannot visit a network namespace's sockets: {error.strerror}") from error
