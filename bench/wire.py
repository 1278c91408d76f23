"""The delay line of the test bed: compiles wire.c, which says what it does, and starts it."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("wire.c")
_MICROSECONDS: Final = 1000


@functools.cache
def binary() -> Path:
    """Compile the program, for as long as this process lives.

    Raises:
        RuntimeError: the compiler does not take it.
    """
    folder = tempfile.mkdtemp(prefix="bpfrl-wire-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compiled = Path(folder, "wire")
    command = ["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(compiled), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"clang: {done.stderr}")
    return compiled


def start(near: tuple[str, str], far: tuple[str, str], rtts: Mapping[str, float]) -> subprocess.Popen[str]:
    """Connect two network namespaces; returns the running wire, whose devices are there.

    It ends with the thread that starts it, at the latest.

    Args:
        near: a namespace, and the name of the device to make in it.
        far: the other end.
        rtts: the round-trip time, ms, of each address of the far end.

    Raises:
        RuntimeError: it could not be started.
    """
    delays = [f"{address}={round(rtt * _MICROSECONDS)}" for address, rtt in rtts.items()]
    process = subprocess.Popen(
        [str(binary()), *near, *far, *delays],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not (process.stdout and process.stdout.readline()):
        raise RuntimeError(f"wire: {process.communicate()[1]}")
    return process
