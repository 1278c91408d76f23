"""What a limiter did to sockets, undone.

Pacing rates and window limits stay with a socket when the limiter goes. ``sockets.bpf.c`` visits the TCP sockets of one
network namespace, so it is run once for each namespace that the pod's processes are in.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Final

from bpfrl import cgroup, libc
from bpfrl.bpf import generator, libbpf
from bpfrl.bpf.libbpf import Descriptor, LoadedObject
from bpfrl.errors import CompilerError, KernelError

log = logging.getLogger(__name__)

_SOURCE: Final = "sockets.bpf.c"


@cache  # and warn of it once
def prepare() -> None:
    """Compile what :func:`release` will need, while whoever attaches can still do something about it."""
    try:
        generator.compile_object(_SOURCE)
    except CompilerError as error:
        log.warning("when this limit is lifted, idle connections will keep their pacing rate: %s", error)


def release(storage: Descriptor, path: Path) -> None:
    """Give back its pacing rate and window to every TCP socket that has an entry in a limiter's storage.

    Args:
        storage: the limiter's socket storage map.
        path: the limiter's cgroup, in whose processes' network namespaces the sockets are looked for.

    Raises:
        CompilerError: the program is not in the cache, and clang cannot make it.
        KernelError: the kernel has no such iterators (before 5.16), or refused.
    """
    with ExitStack() as stack:
        namespaces = [stack.enter_context(Descriptor(number)) for number in cgroup.open_network_namespaces(path)]
        if not namespaces:
            return
        loaded = stack.enter_context(LoadedObject(generator.compile_object(_SOURCE), reuse={"sockets": storage}))
        program = loaded.program("bpfrl_release")
        for namespace in namespaces:
            # setns(2) moves a thread: one of its own, so that nothing else is moved.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(_iterate_in, namespace, program).result()


def _iterate_in(namespace: Descriptor, program: Descriptor) -> None:
    try:
        libc.setns(namespace.number, libc.CLONE_NEWNET)
        libbpf.iterate(program)
    except OSError as error:
        raise KernelError(f"cannot visit a network namespace's sockets: {error.strerror}") from error
