"""Objects of other makers, loaded by a process of their own.

libbpf is C, and reads an object's headers, relocations and types as if whoever wrote them were a friend. What this
version has not made itself it therefore reads elsewhere, in ``python -m bpfrl.bpf.apart``: that process compares and
loads an object, and hands its programs and maps over as descriptors. Whatever the object does to it, nothing of that
comes here but a line. It is there while such objects come, and ends some seconds after the last.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, Self

from bpfrl.bpf import libbpf
from bpfrl.bpf.libbpf import Descriptor, LoadedObject, MapShape, Shape
from bpfrl.errors import BpfrlError, InvalidObjectError, KernelError, PermissionDeniedError, VerifierError

_COMMAND: Final = (sys.executable, "-P", "-m", "bpfrl.bpf.apart")
# The kernel's verifier may take a second; libbpf takes some milliseconds.
_LOAD_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 5.0
_MESSAGE_BYTES: Final = 1 << 16
_MOST_DESCRIPTORS: Final = 32
# What a thousand times as much as an object needs is more than.
_ADDRESS_SPACE_BYTES: Final = 2**31
_CPU_SECONDS: Final = 60
_ERRORS: Final = {
    kind.__name__: kind for kind in (InvalidObjectError, KernelError, PermissionDeniedError, VerifierError)
}
_DAMAGED: Final = "it is damaged or hostile: generate it again with this version"


class LoadedApart:
    """As :class:`~bpfrl.bpf.libbpf.LoadedObject`, of any bytes, and whatever they do to libbpf.

    Raises (the constructor):
        InvalidObjectError: it is damaged, does not have that shape, or did the process harm.
        VerifierError: the kernel does not take its programs.
    """

    def __init__(self, image: bytes, reuse: Mapping[str, Descriptor], shape: Shape, data: Mapping[str, slice]) -> None:
        with ExitStack() as stack:
            with _possible():
                file = stack.enter_context(os.fdopen(os.memfd_create("bpfrl-object", os.MFD_CLOEXEC), "wb"))
                file.write(image)
                file.flush()
            places = {name: (at.start, at.stop) for name, at in data.items()}
            order = json.dumps(
                {"reuse": [*reuse], "programs": shape.programs, "maps": shape.maps, "data": places}
            ).encode()
            answer, numbers = _LOADER.ask(order, [file.fileno(), *(each.number for each in reuse.values())])
        with ExitStack() as stack:
            descriptors = [stack.enter_context(Descriptor(number)) for number in numbers]
            self._found = dict(zip([*shape.programs, *shape.maps], descriptors, strict=False))
            _check(answer, descriptors, self._found, shape)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def program(self, name: str) -> Descriptor:
        """A program, by its function's name; the descriptor belongs to the object."""
        return self._found[name]

    def map(self, name: str) -> Descriptor:
        """A map, by its name or its section's; the descriptor belongs to the object."""
        return self._found[name]


def _check(answer: bytes, descriptors: list[Descriptor], found: Mapping[str, Descriptor], shape: Shape) -> None:
    """What came must be everything: the other process has read what may have changed it, and its word is not enough."""
    try:
        kind, reason = json.loads(answer)
        error = _ERRORS[kind](reason) if kind else None
    except (ValueError, TypeError, LookupError):
        error = InvalidObjectError(f"reading the object ended in nonsense: {_DAMAGED}")
    if error:
        raise error
    if (
        len(descriptors) != len(shape.programs) + len(shape.maps)
        or not all(libbpf.has_kind(found[name], kind) for name, (kind, _) in shape.programs.items())
        or not all(libbpf.has_shape(found[name], wanted) for name, wanted in shape.maps.items())
    ):
        raise InvalidObjectError(f"not the programs and maps of a limiter: {_DAMAGED}")


@contextmanager
def _possible() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelError(f"cannot start what loads objects of other makers: {error.strerror}") from error


class _Loader:
    """The other process, and what it is asked: one object at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._own: socket.socket | None = None
        self._idle: threading.Timer | None = None

    def ask(self, order: bytes, descriptors: list[int]) -> tuple[bytes, list[int]]:
        """What the process says, and the descriptors that it hands over.

        Raises:
            InvalidObjectError: it did not live to say anything.
            KernelError: it cannot be started.
        """
        with self._lock:
            if self._idle:
                self._idle.cancel()
            if self._own is None or self._process is None or self._process.poll() is not None:
                self._end()
                self._own, self._process = self._start()
            try:
                socket.send_fds(self._own, [order], descriptors)
                text, numbers, _, _ = socket.recv_fds(
                    self._own, _MESSAGE_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                self._end()
                raise InvalidObjectError(
                    f"the object was not loaded within {_LOAD_SECONDS:.0f} s: {_DAMAGED}"
                ) from None
            except OSError:  # it is no more
                text, numbers = b"", []
            if not text:
                how = self._end()
                raise InvalidObjectError(f"libbpf did not survive reading the object ({how}): {_DAMAGED}")
            self._idle = threading.Timer(_IDLE_SECONDS, self._rest)
            self._idle.daemon = True
            self._idle.start()
        return text, numbers

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        with _possible(), ExitStack() as undo:
            own, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(own.close)
            own.settimeout(_LOAD_SECONDS)
            with others:
                # What the C library says of a broken heap is nobody's concern.
                process = subprocess.Popen(
                    [*_COMMAND, str(others.fileno())],
                    pass_fds=(others.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            undo.pop_all()
        return own, process

    def _rest(self) -> None:
        if self._lock.acquire(blocking=False):  # else another object has come meanwhile
            try:
                self._end()
            finally:
                self._lock.release()

    def _end(self) -> str:
        """Let the process go, and tell how it has ended."""
        if self._own:
            self._own.close()
        process, self._own, self._process = self._process, None, None
        if process is None:
            return ""
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


_LOADER: Final = _Loader()


def main(number: int) -> None:
    """Load objects for the process at the other end of a socket, until that goes."""
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES)
    with socket.socket(fileno=number) as asked:
        while True:
            order, numbers, _, _ = socket.recv_fds(asked, _MESSAGE_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            if not order:
                return
            _bound(resource.RLIMIT_CPU, _used() + _CPU_SECONDS)
            try:
                _answer(asked, json.loads(order), numbers)
            finally:
                for each in numbers:
                    os.close(each)


def _answer(asked: socket.socket, order: dict[str, Any], numbers: list[int]) -> None:
    content, *kept = numbers
    reuse = {name: Descriptor(each) for name, each in zip(order["reuse"], kept, strict=True)}
    shape = Shape(
        {name: (kind, attach) for name, (kind, attach) in order["programs"].items()},
        {name: MapShape(*fields) for name, fields in order["maps"].items()},
    )
    try:
        with os.fdopen(content, "rb", closefd=False) as file:
            file.seek(0)
            image = file.read()
        data = {name: slice(*place) for name, place in order["data"].items()}
        with LoadedObject(image, reuse, shape, data) as loaded:
            found = [*map(loaded.program, shape.programs), *map(loaded.map, shape.maps)]
            socket.send_fds(asked, [b'["", ""]'], [each.number for each in found])
    except BpfrlError as error:
        asked.send(json.dumps([type(error).__name__, str(error)]).encode())


def _bound(kind: int, most: int) -> None:
    """Let this process have no more of something; where it may not even say so, its time is bounded from outside."""
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _used() -> int:
    """The CPU time that this process has had, in whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime) + 1


if __name__ == "__main__":
    main(int(sys.argv[1]))
