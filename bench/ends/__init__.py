"""Programs that run at the two ends of the test bed, as processes of the pod or of the rest of the world.

Each is started with :func:`launch`, says "ready" when it can be talked to or begins to talk, and at its end prints
what it has seen as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Final

from bench.lab import Json, Lab

_READY: Final = "ready"
# The longest that any of them runs, and what a queue of some seconds makes of its end.
_SECONDS: Final = 60.0
_REAL_TIME_PRIORITY: Final = 1


class Running:
    """A program at one end; see :func:`launch`."""

    def __init__(self, bed: Lab, process: subprocess.Popen[str]) -> None:
        self._bed = bed
        self._process = process

    def answer(self) -> Json:
        """Wait for its end, and return what it says.

        Raises:
            RuntimeError: it has failed.
        """
        output, errors = self._process.communicate(timeout=_SECONDS)
        self._bed.end(self._process)
        if self._process.returncode:
            raise RuntimeError(_last_line(errors))
        found: Json = json.loads(output)
        return found

    def stop(self) -> Json:
        """Have it end now, and return what it says."""
        self._process.terminate()
        return self.answer()

    def end(self) -> None:
        """End one that would go on and has nothing to say."""
        self._bed.end(self._process)


def launch(bed: Lab, side: Callable[..., list[str]], name: str, *arguments: object) -> Running:
    """Start a program of this package, and return when it is ready.

    Args:
        bed: where it runs, and what it ends with at the latest.
        side: the end: one of the lab's ``in_…`` methods.
        name: the module.
        arguments: of its command line.

    Raises:
        RuntimeError: it has failed.
    """
    process = bed.start(side(sys.executable, "-m", f"{__name__}.{name}", *map(str, arguments)))
    if process.stdout is None or process.stdout.readline().strip() != _READY:
        raise RuntimeError(_last_line(process.communicate(timeout=_SECONDS)[1]))
    return Running(bed, process)


def ready() -> None:
    """Say it, in a program of this package."""
    print(_READY, flush=True)


def say(**what: object) -> None:
    """Answer, in a program of this package."""
    print(json.dumps(what))


def measure_in_real_time() -> None:
    """Have this process run before others, so that what it measures is the network and not its turn on a CPU."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_REAL_TIME_PRIORITY))


def _last_line(errors: str) -> str:
    return next(iter(errors.strip().splitlines()[-1:]), "it says nothing")
