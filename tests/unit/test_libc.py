"""What malloc is told: in a process of its own, for it cannot be told otherwise again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """if True:
    import ctypes, sys, threading
    from bpfrl import libc

    if sys.argv[1] == "told":
        libc.share_arena()
    own = ctypes.CDLL(None)
    own.malloc.restype, own.fdopen.restype = ctypes.c_void_p, ctypes.c_void_p
    met = threading.Barrier(12)

    def allocate():
        own.malloc(4096)
        met.wait()

    threads = [threading.Thread(target=allocate) for _ in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    file = ctypes.c_void_p(own.fdopen(1, b"w"))
    own.malloc_info(0, file)
    own.fflush(file)
"""


@pytest.mark.parametrize("told", [False, True])
def test_threads_share_an_arena(*, told: bool) -> None:
    command = [sys.executable, "-c", _SCRIPT, "told" if told else "as it is"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.count("<heap nr=") == 1) is told
