"""How processes come to fail: system calls that fail or kill, packets that get lost, other clocks."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.lab import end, in_namespace, run

_SOURCE: Final = Path(__file__).with_name("clock.c")
_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01


@dataclass
class Injected:
    """What :func:`system_calls` has done, when it has ended: how many system calls were met."""

    met: int = 0


@contextmanager
def system_calls(pid: int, *rules: str) -> Iterator[Injected]:
    """Have a process's system calls fail, as long as the context lasts and the process lives.

    Args:
        pid: the process, with all threads that it has and will have.
        rules: what strace(1) takes for ``--inject``; ``when=`` counts for each thread by itself.

    Raises:
        TimeoutError: strace did not get hold of the process.
    """
    calls = ",".join(rule.partition(":")[0] for rule in rules)
    with tempfile.NamedTemporaryFile() as trace:
        command = ["strace", "-f", "-qq", "-o", trace.name, "-p", str(pid), f"--trace={calls}"]
        tracer = subprocess.Popen(
            [*command, *(f"--inject={rule}" for rule in rules)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        injected = Injected()
        try:
            _await_tracer(pid, tracer)
            yield injected
        finally:
            # Not SIGKILL: strace lets go of the process in order.
            end(tracer, _SECONDS)
            injected.met = trace.read().count(b"(INJECTED)")


def _await_tracer(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not all(_is_traced(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline or tracer.poll() is not None:
            raise TimeoutError(f"strace does not trace {pid}")
        time.sleep(_POLL_SECONDS)


def _is_traced(task: Path) -> bool:
    """True, too, for what has ended meanwhile: the first call may have been its last."""
    try:
        status = (task / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return "TracerPid:\t0\n" not in status or "State:\tZ" in status


@contextmanager
def lost(namespace: str, *rules: str) -> Iterator[None]:
    """Drop packets without a word in a network namespace.

    Args:
        namespace: its name.
        rules: which packets, each a chain and what iptables(8) matches: ``"INPUT -p tcp --dport 10002"``.
    """
    with ExitStack() as undo:
        for rule in rules:
            chain, *matches = rule.split()
            run(*in_namespace(namespace, "iptables", "-w", "-I", chain, *matches, "-j", "DROP"))
            undo.callback(run, *in_namespace(namespace, "iptables", "-w", "-D", chain, *matches, "-j", "DROP"))
        yield


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing, and not end either."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Clock:
    """A wall clock for some processes that can be set while they run.

    Args:
        folder: where its library and its state go.
    """

    def __init__(self, folder: Path) -> None:
        self._state = folder / "clock"
        self._library = folder / "clock.so"
        self.set(0)
        run("clang", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", str(_SOURCE), "-o", str(self._library), "-ldl")

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process must be started with to go by it."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_STATE": str(self._state)}

    def set(self, ahead: int) -> None:
        """Have it go so many seconds ahead of the machine's."""
        # In place: the file is mapped.
        with self._state.open("r+b" if self._state.exists() else "w+b") as state:
            state.write(struct.pack("q", ahead))
