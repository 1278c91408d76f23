"""What a limiter did to sockets, undone.

Pacing rates and window limits stay with a socket when the limiter goes. ``sockets.bpf.c`` visits the TCP sockets of one
network namespace, so it is run once for each namespace that the pod's processes are in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bpfrl import libc
from bpfrl.bpf import generator, libbpf
from bpfrl.bpf.libbpf import Descriptor, LoadedObject
from bpfrl.errors import BpfrlError

log = logging.getLogger(__name__)


def release(storage: Descriptor, namespaces: Iterable[Path]) -> None:
    """Give back its pacing rate and window to every TCP socket that has an entry in a limiter's storage.

    A kernel without TCP iterators (before 5.16) leaves that to the limiter's own callbacks, which have done so for
    each socket that was active meanwhile; it is logged, and no error.

    Args:
        storage: the limiter's socket storage map.
        namespaces: paths of network namespaces, as :func:`bpfrl.cgroup.network_namespaces` finds them.
    """
    try:
        image = generator.compile_object("sockets.bpf.c")
        with LoadedObject(image, reuse={"sockets": storage}) as loaded:
            program = loaded.program("bpfrl_release")
            for namespace in namespaces:
                # setns(2) moves a thread: one of its own, so that nothing else is moved.
                with ThreadPoolExecutor(max_workers=1) as thread:
                    thread.submit(_iterate_in, namespace, program).result()
    except BpfrlError as error:
        log.warning("idle sockets keep the pacing rate they had: %s", error)


def _iterate_in(namespace: Path, program: Descriptor) -> None:
    try:
        number = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        log.info("%s is gone: %s", namespace, error.strerror)
        return
    with Descriptor(number):
        libc.setns(number, libc.CLONE_NEWNET)
    libbpf.iterate(program)
