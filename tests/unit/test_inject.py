"""A clock of some processes' own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.inject import Clock

DAY = 86_400
# Says what time it is, as often as a line comes: by the C library's calls that Python, OpenSSL and gRPC use.
_TELL = """
import datetime, ssl, sys, time
for _ in sys.stdin:
    print(time.time(), datetime.datetime.now().timestamp(), time.monotonic(), flush=True)
"""


def test_a_clock_is_set_while_a_process_runs_and_steady_time_goes_on(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    environment = os.environ | clock.environment
    with subprocess.Popen(
        [sys.executable, "-c", _TELL], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        for ahead in (0, DAY, -DAY, 0):
            clock.set(ahead)
            print(file=process.stdin, flush=True)
            told, now, steady = map(float, process.stdout.readline().split())
            assert abs(told - time.time() - ahead) < 60
            assert abs(now - time.time() - ahead) < 60
            assert abs(steady - time.monotonic()) < 60
        process.stdin.close()
