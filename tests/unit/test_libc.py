"""What malloc is told: in a process of its own, for it cannot be told otherwise again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """if True:
    import ctypes, sys, threading
    from bpfrl import libc

    if sys.argv[1] != "as it is":
        libc.limit_arenas(int(sys.argv[1]))
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


@pytest.mark.parametrize(("told", "alone"), [("as it is", False), ("2", True)])
def test_threads_share_arenas(told: str, *, alone: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, told], capture_output=True, text=True, check=True)
    heaps = done.stdout.count("<heap nr=")
    assert (1 <= heaps <= 2) is alone
