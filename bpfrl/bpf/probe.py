"""What this kernel can do, found out by having it do that: tiny programs, made of instructions, that nobody compiles.

Each probe loads one or two and lets them go again; none is pinned. What has to run, runs in a cgroup or a network
namespace of its own that nobody else is in.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ctypes import Structure, c_int64
from pathlib import Path
from typing import Final, NamedTuple

from bpfrl import cgroup, libc
from bpfrl.bpf import libbpf
from bpfrl.bpf.libbpf import AttachType, Descriptor, MapShape, MapType, ProgramType
from bpfrl.errors import BpfrlError, KernelError, PermissionDeniedError

NAME: Final = "bpfrl_probe"

# linux/bpf.h: helpers, and offsets in what programs are called with.
_MAP_UPDATE, _SETSOCKOPT, _SK_FULLSOCK, _SK_STORAGE_GET, _TO_TCP_SOCK, _STORE_OPTION, _RESERVE_OPTION = (
    *(2, 49, 95, 107, 137, 143, 144),
)
_SKB_SK: Final = 168
_SOCK_OPS_SK: Final = 184
_ITER_SK: Final = 8
_CREATE: Final = 1
_DROP_AND_SIGNAL: Final = 2
_NO_PREALLOC: Final = 1
# asm-generic/socket.h, linux/tcp.h and linux/bpf.h
_SOL_SOCKET, _SO_MAX_PACING_RATE = 1, 47
_SOL_TCP, _WINDOW_CLAMP, _CB_FLAGS, _WRITE_HEADER_FLAG = 6, 10, 1008, 1 << 6
_OPTION_BYTES: Final = 4
_SOME_RATE: Final = 1_000_000
_SOME_WINDOW: Final = 1 << 20

_STORAGE: Final = MapShape(MapType.SK_STORAGE, 4, 4, 0, _NO_PREALLOC)
_RESULT: Final = MapShape(MapType.ARRAY, 4, 8, 1, 0)
_NOT_RUN: Final = 1

# Joins a cgroup, and listens there for a moment.
_LISTEN: Final = """\
import socket, sys
with open(sys.argv[1], "w") as processes:
    processes.write("0")
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
"""
_CHILD_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01


class UntriedError(BpfrlError):
    """What is around this process keeps a probe from being tried; that says nothing of the kernel."""


class Feature(NamedTuple):
    """Something that a kernel can do or not.

    Attributes:
        name: what.
        since: the first Linux that can.
        purpose: what bpfrl needs it for.
        instead: what becomes of that where the kernel cannot; empty where nothing can be limited then.
        probe: raises BpfrlError where the kernel cannot.
    """

    name: str
    since: str
    purpose: str
    instead: str
    probe: Callable[[], None]

    @property
    def needed(self) -> bool:
        """True where nothing is limited without it."""
        return not self.instead


def version_of(release: str) -> tuple[int, int] | None:
    """The numbers of a Linux release, as in 6.1.0-18-amd64."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


class _Result(Structure):
    _fields_ = (("value", c_int64),)


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One struct bpf_insn, whose two registers share a byte in the machine's order."""
    registers = target | source << 4 if sys.byteorder == "little" else target << 4 | source
    return struct.pack("=BBhi", code, registers, offset, value)


# Registers, and the few instructions that the probes are made of (linux/bpf_common.h, linux/bpf.h).
_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _, _STACK = range(11)


def _set(register: int, value: int) -> bytes:
    return _instruction(0xB7, register, value=value)


def _copy(register: int, source: int) -> bytes:
    return _instruction(0xBF, register, source)


def _place(register: int, offset: int) -> bytes:
    """The address of something on the stack."""
    return _copy(register, _STACK) + _instruction(0x07, register, value=offset)


def _read(register: int, source: int, offset: int) -> bytes:
    return _instruction(0x79, register, source, offset)


def _keep(offset: int, source: int) -> bytes:
    """Store a register on the stack."""
    return _instruction(0x7B, _STACK, source, offset)


def _put(offset: int, value: int) -> bytes:
    """Store 32 bits on the stack."""
    return _instruction(0x62, _STACK, offset=offset, value=value)


def _map(register: int, found: Descriptor) -> bytes:
    return _instruction(0x18, register, 1, value=found.number) + _instruction(0)


def _call(helper: int) -> bytes:
    return _instruction(0x85, value=helper)


def _end(value: int = 0) -> bytes:
    return _set(_R0, value) + _instruction(0x95)


def _need(register: int) -> bytes:
    """End here if there is nothing in a register."""
    return _instruction(0x55, register, offset=2) + _end()


def _storage_of(register: int, storage: Descriptor) -> bytes:
    """Get the storage of the socket in a register, anew where there is none."""
    arguments = (_copy(_R2, register), _set(_R3, 0), _set(_R4, _CREATE), _map(_R1, storage))
    return b"".join(arguments) + _call(_SK_STORAGE_GET)


def _load(kind: ProgramType, *code: bytes, attach: AttachType | None = None, iterates: str = "") -> Descriptor:
    return libbpf.load(NAME, kind, b"".join(code), attach, iterates)


def _egress() -> None:
    with _load(ProgramType.CGROUP_SKB, _end(_DROP_AND_SIGNAL), attach=AttachType.CGROUP_INET_EGRESS):
        pass
    with _load(ProgramType.CGROUP_SKB, _end(), attach=AttachType.CGROUP_INET_INGRESS):
        pass


def _sock_ops() -> None:
    with _load(ProgramType.SOCK_OPS, _end(1), attach=AttachType.CGROUP_SOCK_OPS):
        pass


def _header_options() -> None:
    context = _copy(_R6, _R1)
    reserve = (_set(_R2, _OPTION_BYTES), _set(_R3, 0), _call(_RESERVE_OPTION))
    store = (
        _put(-4, 0),
        _copy(_R1, _R6),
        _place(_R2, -4),
        _set(_R3, _OPTION_BYTES),
        _set(_R4, 0),
        _call(_STORE_OPTION),
    )
    with _load(ProgramType.SOCK_OPS, context, *reserve, *store, _end(1), attach=AttachType.CGROUP_SOCK_OPS):
        pass


def _socket_storage() -> None:
    with libbpf.make_map(NAME, _STORAGE) as storage:
        whole = (_read(_R1, _R1, _SKB_SK), _need(_R1), _call(_SK_FULLSOCK), _need(_R0))
        store = _storage_of(_R0, storage)
        with _load(ProgramType.CGROUP_SKB, *whole, store, _end(), attach=AttachType.CGROUP_INET_EGRESS):
            pass
        own = (_read(_R1, _R1, _SOCK_OPS_SK), _need(_R1))
        store = _storage_of(_R1, storage)
        with _load(ProgramType.SOCK_OPS, *own, store, _end(1), attach=AttachType.CGROUP_SOCK_OPS):
            pass


def _links() -> None:
    with ExitStack() as stack:
        folder, target = stack.enter_context(_scratch_cgroup())
        program = stack.enter_context(_load(ProgramType.CGROUP_SKB, _end(1), attach=AttachType.CGROUP_INET_EGRESS))
        link = stack.enter_context(libbpf.attach(program, target.number, AttachType.CGROUP_INET_EGRESS))
        if libbpf.linked(link).cgroup_id != cgroup.id_of(folder):
            raise KernelError("a link does not name its cgroup")
        libbpf.detach(link)


def _window_clamp() -> None:
    """Have a process in a cgroup listen, and set the option on its socket from there."""
    with ExitStack() as stack:
        folder, target = stack.enter_context(_scratch_cgroup())
        result = stack.enter_context(libbpf.make_map(NAME, _RESULT))
        libbpf.write(result, 0, _Result(_NOT_RUN))
        code = (_copy(_R7, _R1), *_set_and_tell(_SOL_TCP, _WINDOW_CLAMP, _SOME_WINDOW, result), _end(1))
        program = stack.enter_context(_load(ProgramType.SOCK_OPS, *code, attach=AttachType.CGROUP_SOCK_OPS))
        link = stack.enter_context(libbpf.attach(program, target.number, AttachType.CGROUP_SOCK_OPS))
        listen = [sys.executable, "-I", "-S", "-c", _LISTEN, str(folder / "cgroup.procs")]
        try:
            subprocess.run(listen, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_CHILD_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise UntriedError("no process can be put into a cgroup here to try it with") from error
        libbpf.detach(link)
        _expect_done(result, "a program on a cgroup cannot set the option")


@contextmanager
def _scratch_cgroup() -> Iterator[tuple[Path, Descriptor]]:
    """A cgroup that nobody else is in, and its descriptor."""
    folder = cgroup.mount_point() / f"bpfrl-probe-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UntriedError("the cgroups are read-only here") from error
        raise _refused("make a cgroup to try it on", error) from error
    try:
        with Descriptor(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as target:
            yield folder, target
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    # A process that has just ended leaves its cgroup a moment later.
    deadline = time.monotonic() + _CHILD_SECONDS
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _iterator() -> None:
    _try_on_socket(_SOL_SOCKET, _SO_MAX_PACING_RATE, _SOME_RATE)


def _callback_flags() -> None:
    _try_on_socket(_SOL_TCP, _CB_FLAGS, _WRITE_HEADER_FLAG)


def _try_on_socket(level: int, option: int, value: int) -> None:
    """Have an iterator find a socket, give it storage, and set an option on it."""
    with ExitStack() as stack:
        storage = stack.enter_context(libbpf.make_map(NAME, _STORAGE))
        result = stack.enter_context(libbpf.make_map(NAME, _RESULT))
        find = (_read(_R1, _R1, _ITER_SK), _need(_R1), _call(_TO_TCP_SOCK), _need(_R0), _copy(_R7, _R0))
        code = (*find, _storage_of(_R7, storage), *_set_and_tell(level, option, value, result), _end())
        program = stack.enter_context(_load(ProgramType.TRACING, *code, attach=AttachType.TRACE_ITER, iterates="tcp"))
        libbpf.write(result, 0, _Result(_NOT_RUN))
        # unshare(2) moves a thread: one of its own, so that nothing else is moved.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(_iterate_alone, program).result()
        _expect_done(result, "an iterator cannot set the option")


def _set_and_tell(level: int, option: int, value: int, result: Descriptor) -> tuple[bytes, ...]:
    """Set an option on what the seventh register has, and put what that returns into a map."""
    arguments = (_put(-4, value), _copy(_R1, _R7), _set(_R2, level), _set(_R3, option), _place(_R4, -4))
    set_option = (*arguments, _set(_R5, 4), _call(_SETSOCKOPT), _keep(-16, _R0))
    tell = (_put(-20, 0), _map(_R1, result), _place(_R2, -20), _place(_R3, -16), _set(_R4, 0), _call(_MAP_UPDATE))
    return *set_option, *tell


def _expect_done(result: Descriptor, otherwise: str) -> None:
    code_of = libbpf.read(result, 0, _Result).value
    if code_of:
        reason = "it did not visit a socket" if code_of == _NOT_RUN else os.strerror(-code_of)
        raise KernelError(f"{otherwise}: {reason}")


def _iterate_alone(program: Descriptor) -> None:
    """Run an iterator in a network namespace with one socket."""
    try:
        libc.unshare(libc.CLONE_NEWNET)
        with socket.socket() as visited:
            visited.bind(("0.0.0.0", 0))  # noqa: S104 - a namespace with no other end
            visited.listen()
            libbpf.iterate(program)
    except OSError as error:
        raise _refused("have a network namespace to try it in", error) from error


def _refused(action: str, error: OSError) -> BpfrlError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"cannot {action}: this needs root")
    return KernelError(f"cannot {action}: {error.strerror}")


FEATURES: Final = (
    Feature("cgroup_skb", "5.3", "counting, and dropping what cannot be paced", "", _egress),
    Feature("sock_ops", "4.13", "pacing TCP where it is sent", "", _sock_ops),
    Feature("header options", "5.10", "pacing each segment, and cooperation of senders", "", _header_options),
    Feature("socket storage", "5.3", "remembering what was set on each socket", "", _socket_storage),
    Feature("cgroup links", "5.7", "attaching beside other programs, and staying attached", "", _links),
    Feature(
        "window clamp",
        "5.11",
        "telling senders by the window what a limited pod can take",
        "senders that do not cooperate are held to the limit by dropping alone",
        _window_clamp,
    ),
    Feature(
        "iter/tcp",
        "6.1",
        "giving connections back what was theirs when a limit goes",
        "those that send within half a second of it get it back, and idle ones keep their pace",
        _iterator,
    ),
    Feature(
        "callback flags",
        "6.12",
        "pacing connections from before a limit",
        "those are held to the limit by dropping alone",
        _callback_flags,
    ),
)
# The first Linux that has everything which is needed.
OLDEST: Final = max(
    (feature.since for feature in FEATURES if feature.needed), key=lambda since: version_of(since) or ()
)


def explain(error: KernelError) -> KernelError:
    """Why a kernel has refused a limiter: where it is old, what it lacks of what is needed, in place of its own words.

    A newer one may refuse for want of much else, of privileges for example.
    """
    release = platform.release()
    found, oldest = version_of(release), version_of(OLDEST)
    if not found or not oldest or found >= oldest:
        return error
    for feature in FEATURES:
        if feature.needed:
            try:
                feature.probe()
            except (PermissionDeniedError, UntriedError):
                return error
            except BpfrlError:
                return type(error)(
                    f"this kernel ({release}) has no {feature.name}, for {feature.purpose}:"
                    f" bpfrl needs Linux {OLDEST} or newer"
                )
    return error
