"""Objects of other makers: the process that loads them, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lab import Lab
from bpfrl.bpf import apart, generator
from bpfrl.errors import BpfrlError, InvalidObjectError, KernelError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.kernel.conftest import attached, entries, until
from tests.objects import of_another_build

LIMITS = Limits(Rate(10**7))
# What a process that has read the wrong object may do, given the socket that it is asked on.
ENDS = {
    "dies": ("os.kill(os.getpid(), signal.SIGSEGV)", "libbpf did not survive reading the object (SIGSEGV)"),
    "aborts": ("os.abort()", "libbpf did not survive reading the object (SIGABRT)"),
    "exits": ("sys.exit(3)", "libbpf did not survive reading the object (exit status 3)"),
    "hangs": ("time.sleep(60)", "the object was not loaded within 1 s"),
    "says nonsense": ("asked.send(b'\\xff{')", "reading the object ended in nonsense"),
    "names no error": ('asked.send(b\'["OSError", ""]\')', "reading the object ended in nonsense"),
    "says too little": ('asked.send(b\'["", ""]\')', "not the programs and maps of a limiter"),
    "hands over something else": (
        'socket.send_fds(asked, [b\'["", ""]\'], [0] * 8)',
        "not the programs and maps of a limiter",
    ),
    "hands over too much": ('socket.send_fds(asked, [b\'["", ""]\'], [0] * 30)', "not the programs and maps of a"),
}
SCRIPT = """
import os, signal, socket, sys, time
asked = socket.socket(fileno=int(sys.argv[1]))
asked.recv(1)
{}
time.sleep(60)
"""


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> apart._Loader:
    """One of this test's own."""
    own = apart._Loader()
    monkeypatch.setattr(apart, "_LOADER", own)
    return own


def child(loader: apart._Loader) -> subprocess.Popen[bytes]:
    assert loader._process is not None
    return loader._process


@pytest.mark.parametrize(("end", "reason"), ENDS.values(), ids=ENDS)
def test_whatever_becomes_of_the_other_process_is_a_line_here(
    bed: Lab, loader: apart._Loader, monkeypatch: pytest.MonkeyPatch, end: str, reason: str
) -> None:
    agent, pod = Agent(bed.bpffs), PodRef(bed.pod_uid)
    foreign = of_another_build(generator.generate(None, LIMITS))
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(apart, "_COMMAND", (sys.executable, "-c", SCRIPT.format(end)))
        patch.setattr(apart, "_LOAD_SECONDS", 1.0)
        with pytest.raises(BpfrlError) as caught:
            agent.attach(foreign, pod, bed.pod_cgroup)
        assert str(caught.value).startswith(reason)
        assert isinstance(caught.value, InvalidObjectError | KernelError)
        assert (attached(bed), entries(bed)) == ([], [])
        loader._end()
    assert len(os.listdir("/proc/self/fd")) <= before  # some of earlier tests may close meanwhile
    # And the next one is none the worse for it.
    assert agent.attach(foreign, pod, bed.pod_cgroup) is Change.ATTACHED
    loader._end()


def test_the_other_process_is_for_objects_of_other_makers_and_goes_after_the_last(
    bed: Lab, loader: apart._Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_IDLE_SECONDS", 0.5)
    agent, pod, own = Agent(bed.bpffs), PodRef(bed.pod_uid), generator.generate(None, LIMITS)
    agent.attach(own, pod, bed.pod_cgroup)
    assert loader._process is None
    numbers = set()
    for mark in (1, 2, 3):
        assert agent.attach(of_another_build(own, mark), pod, bed.pod_cgroup) is Change.UPDATED
        numbers.add(child(loader).pid)
    assert len(numbers) == 1
    ended = child(loader)
    until(lambda: ended.returncode is not None)
    assert (ended.returncode, loader._process) == (0, None)
    agent.attach(of_another_build(own, 4), pod, bed.pod_cgroup)
    loader._end()


def test_it_ends_with_whoever_has_started_it(bed: Lab, tmp_path: Path) -> None:
    """Killed, this side can tell it nothing any more."""
    bed.bpfrl("generate", "--rate", "5mbit", "-o", str(tmp_path / "own.o"))
    (tmp_path / "other.o").write_bytes(of_another_build((tmp_path / "own.o").read_bytes()))
    script = (
        "import sys, time; from pathlib import Path; from bpfrl.bpf import apart, limiter;"
        f"apart.LoadedApart(Path({str(tmp_path / 'other.o')!r}).read_bytes(), {{}}, limiter._SHAPE, {{}});"
        "print(apart._LOADER._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        assert Path(f"/proc/{number}").exists()
        parent.send_signal(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{number}/exe").exists())


def test_a_process_that_was_killed_meanwhile_is_replaced(bed: Lab, loader: apart._Loader) -> None:
    agent, own = Agent(bed.bpffs), generator.generate(None, LIMITS)
    agent.attach(of_another_build(own, 1), PodRef(bed.pod_uid), bed.pod_cgroup)
    child(loader).kill()
    time.sleep(0.1)
    assert agent.attach(of_another_build(own, 2), PodRef(bed.pod_uid), bed.pod_cgroup) is Change.UPDATED
    loader._end()
