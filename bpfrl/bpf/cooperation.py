"""The half of cooperation that all pods of a node share: ``cooperate.bpf.c`` on the cgroup that holds them.

Limited pods' ACKs then tell their senders how fast to send, and pods that send keep to what they are told. It is
pinned as a folder like a limiter, with the same promise: it is whole or it does not exist.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from bpfrl import cgroup
from bpfrl.bpf import generator, libbpf, sockets
from bpfrl.bpf.libbpf import AttachType, Cost, LoadedObject
from bpfrl.errors import BpfrlError, BrokenLimiterError, KernelError

log = logging.getLogger(__name__)

_SOURCE: Final = "cooperate.bpf.c"
_FUNCTION: Final = "bpfrl_cooperate"
_PROGRAM: Final = "program"
_LINK: Final = "link"
_PINS: Final = frozenset((_PROGRAM, _LINK, sockets.STORAGE))
_STAGED: Final = "~new"
_FOLDER: Final = re.compile(rf"cooperation-([0-9]+)(?:{_STAGED})?", re.ASCII)
# What a connection is to tell of: BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG (linux/bpf.h).
_CALLBACKS: Final = 1 << 5


def attach(path: Path, bpffs: Path) -> bool:
    """Have the senders below a cgroup keep to what limited receivers ask, and limited receivers there ask.

    Returns:
        False where that is so already, with the program of this version.

    Raises:
        CompilerError: the program is not in the cache, and clang cannot make it.
        KernelError: the kernel refused some step; nothing is left of it.
        BrokenLimiterError: in the place of its folder is something that bpfrl has not made.
    """
    image = generator.compile_object(_SOURCE)
    folder = bpffs / f"cooperation-{cgroup.id_of(path)}"
    staged = folder.with_name(folder.name + _STAGED)
    with ExitStack() as stack:
        target = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, target)
        shared = sockets.shared(bpffs)
        for descriptor in shared.values():
            stack.enter_context(descriptor)
        loaded = stack.enter_context(LoadedObject(image, reuse=shared))
        program, storage = loaded.program(_FUNCTION), loaded.map(sockets.STORAGE)
        if _attached_to(folder) and _runs(folder, libbpf.tag(program)):
            return False
        for left in (staged, folder):
            if libbpf.is_folder(left):
                _discard(left)
        with ExitStack() as undo:
            staged.mkdir(mode=0o700)
            undo.callback(_discard, staged)
            storage.pin(staged / sockets.STORAGE)
            program.pin(staged / _PROGRAM)
            with libbpf.attach(program, target, AttachType.CGROUP_SOCK_OPS) as link:
                link.pin(staged / _LINK)
            staged.rename(folder)
            undo.pop_all()
        try:
            if sockets.adopt(storage, path, _CALLBACKS).refused:
                log.warning("connections that were there before do not cooperate: the kernel lacks the option (6.12)")
        except BpfrlError as error:
            log.warning("connections that were there before do not cooperate: %s", error)
    log.info("senders below %s cooperate", path)
    return True


def detach(cgroup_id: int, bpffs: Path) -> bool:
    """Undo :func:`attach`, and let senders forget what they were asked; False where there is nothing to undo.

    Raises:
        KernelError: the kernel refused.
        BrokenLimiterError: its folder holds what bpfrl has not made; that, and the folder, stay.
    """
    found = [folder for folder, number in _folders(bpffs) if number == cgroup_id]
    for folder in found:
        with suppress(KernelError), libbpf.open_pinned(folder / _LINK) as link:
            libbpf.detach(link)
        path = cgroup.path_of(cgroup_id)
        try:
            if path:
                with libbpf.open_pinned(folder / sockets.STORAGE) as storage:
                    sockets.forget(storage, path)
        except BpfrlError as error:
            log.warning("connections keep the rate that was asked for until the next ACKs: %s", error)
        _discard(folder)
    return bool(found)


def attached(bpffs: Path) -> list[int]:
    """The ids of the cgroups whose pods cooperate."""
    return sorted(number for folder, number in _folders(bpffs) if _attached_to(folder))


def costs(bpffs: Path) -> list[Cost]:
    """What the programs of all cooperations have cost; one that cannot be looked at is left out."""
    found = []
    for folder, _ in _folders(bpffs):
        with suppress(KernelError), libbpf.open_pinned(folder / _PROGRAM) as program:
            found.append(libbpf.cost(program))
    return found


def sweep(bpffs: Path) -> list[int]:
    """Remove what is left of cooperations that were cut off on their way, or whose cgroups are gone; their ids."""
    swept = []
    for folder, number in _folders(bpffs):
        if not _attached_to(folder):
            try:
                _discard(folder)
                swept.append(number)
            except BrokenLimiterError as error:
                log.warning("cannot sweep %s: %s", folder, error)
    return swept


def _folders(bpffs: Path) -> list[tuple[Path, int]]:
    """What has the name of a cooperation's folder and is one: links are not followed."""
    matches = [(bpffs / name, _FOLDER.fullmatch(name)) for name in libbpf.folders(bpffs)]
    return [(path, int(match[1])) for path, match in matches if match]


def _attached_to(folder: Path) -> int:
    """The cgroup of a whole cooperation, by its id; 0 for what is none."""
    if not folder.name.endswith(_STAGED):
        with suppress(KernelError), libbpf.open_pinned(folder / _LINK) as link:
            return libbpf.linked(link).cgroup_id
    return 0


def _runs(folder: Path, tag: bytes) -> bool:
    with suppress(KernelError), libbpf.open_pinned(folder / _PROGRAM) as program:
        return libbpf.tag(program) == tag
    return False


def _discard(folder: Path) -> None:
    with suppress(KernelError), libbpf.open_pinned(folder / _LINK) as link:
        libbpf.detach(link)
    try:
        for name in _PINS.intersection(os.listdir(folder)):
            (folder / name).unlink()
        folder.rmdir()
    except OSError as error:
        raise BrokenLimiterError(f"{folder} holds what bpfrl has not made: look at it, and remove it") from error
