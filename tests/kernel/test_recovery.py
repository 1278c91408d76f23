"""kill -9 at every step of attach, update, upgrade and detach, and what is found afterwards.

Each case runs the command again and again in a process of its own that kills itself just before its n-th change to the
kernel, for every n until the command gets to its end. After each kill nothing may limit the pod that the list
does not show, and the same command, repeated, must finish the job.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lab import Lab
from bpfrl.bpf import generator, libbpf
from bpfrl.cli import cli
from bpfrl.errors import KernelError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.kernel.conftest import attached, attached_to, cooperation, entries, items, only
from tests.objects import of_another_build

# Everything by which bpfrl changes the kernel's state.
STEPS: list[tuple[Any, str]] = [
    (libbpf.LoadedObject, "__init__"),
    (libbpf.Descriptor, "pin"),
    (libbpf, "attach"),
    (libbpf, "replace"),
    (libbpf, "detach"),
    (libbpf, "write"),
    (libbpf, "iterate"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "unlink"),
    (os, "rmdir"),
]


def arm(fatal: int) -> None:
    """Make this process kill itself just before its n-th step."""
    taken = 0

    def before(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return run

    for owner, name in STEPS:
        setattr(owner, name, before(getattr(owner, name)))


def killed(bed: Lab, fatal: int, *command: str) -> bool:
    """Run a command that is killed before its n-th step; False if it got to its end first."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ.update(BPFRL_BPFFS=str(bed.bpffs), BPFRL_CGROUP_ROOT=str(bed.cgroup_root))
            arm(fatal)
            cli.main(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture(autouse=True)
def _warm_cache() -> None:
    """What is under test is the kernel's state: compiling is not part of it."""
    sys.stdout.flush()
    for source in ("limiter.bpf.c", "sockets.bpf.c", "cooperate.bpf.c"):
        generator.compile_object(source)


def test_attach(bed: Lab) -> None:
    command = ("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    steps = 1
    while killed(bed, steps, *command):
        if attached(bed):
            assert [item["uid"] for item in items(bed)] == [bed.pod_uid], f"hidden limiter after step {steps}"
        # Either way out is open: every other time it is detach that has to clean up.
        if steps % 2:
            bed.bpfrl(*command)
            assert "error" not in only(bed)
            assert len(attached(bed)) == 3
        bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
        assert (attached(bed), entries(bed)) == ([], []), f"left behind after step {steps}"
        steps += 1
    assert steps > 15
    assert len(attached(bed)) == 3


def test_detach(bed: Lab) -> None:
    command = ("detach", "--pod-uid", bed.pod_uid)
    steps = 0
    while True:
        steps += 1
        bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
        if not killed(bed, steps, *command):
            break
        if attached(bed):
            assert [item["uid"] for item in items(bed)] == [bed.pod_uid], f"hidden limiter after step {steps}"
        if steps % 2:
            bed.bpfrl(*command)
            assert (attached(bed), entries(bed)) == ([], []), f"left behind after step {steps}"
    assert steps > 15
    assert (attached(bed), entries(bed)) == ([], [])


@pytest.mark.parametrize("command", [("attach", "--rate", "2mbit"), ("detach",)])
def test_sweep(bed: Lab, command: tuple[str, ...]) -> None:
    """It clears up after attach and detach, and does not touch a limiter that is whole."""
    agent, swept, steps = Agent(bed.bpffs), 0, 1
    if command[0] == "detach":
        bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    while killed(bed, steps, *command, "--pod-uid", bed.pod_uid):
        whole = bed.pod_uid in entries(bed)
        cut_off = entries(bed) not in ([], [bed.pod_uid])
        assert agent.sweep() == ([bed.pod_uid] if cut_off else [])
        swept += cut_off
        assert entries(bed) == ([bed.pod_uid] if whole else [])
        assert len(attached(bed)) == (3 if whole else 0), f"left behind after step {steps}"
        assert agent.sweep() == []
        if command[0] == "detach":
            bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
        steps += 1
    assert swept > 10


def test_update_and_upgrade_never_leave_the_pod_without_its_limiter(bed: Lab, tmp_path: Path) -> None:
    objects = [tmp_path / "one.o", tmp_path / "two.o"]
    for mark, file in enumerate(objects):
        bed.bpfrl("generate", "--rate", f"{mark + 1}mbit", "-o", str(file))
        file.write_bytes(of_another_build(file.read_bytes(), mark))
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(objects[0]))
    bed.ping(2)
    counted = only(bed)["egress"]["passed_packets"]
    steps = 1
    while killed(bed, steps, "attach", "--pod-uid", bed.pod_uid, "--object", str(objects[steps % 2])):
        assert len(attached(bed)) == 3, f"no limiter after step {steps}"
        bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(objects[steps % 2]))
        assert len(attached(bed)) == 3
        item = only(bed)
        assert item["egress"]["limit_bits_per_second"] == (steps % 2 + 1) * 1_000_000
        assert item["egress"]["passed_packets"] == counted
        steps += 1
    assert steps > 8


def test_replacing_a_broken_limiter_leaves_no_moment_without_one(bed: Lab) -> None:
    command = ("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    steps = 0
    while True:
        steps += 1
        bed.bpfrl(*command)
        (bed.bpffs / bed.pod_uid / "identity").unlink()
        if not killed(bed, steps, *command):
            break
        assert len(attached(bed)) >= 3, f"no limiter after step {steps}"
        bed.bpfrl(*command)
        assert len(attached(bed)) == 3
        assert "error" not in only(bed)
    assert steps > 15
    assert len(attached(bed)) == 3
    assert entries(bed) == [bed.pod_uid]


def test_cooperation(bed: Lab) -> None:
    """Killed on its way in or out, it is what it was or what it was to become, or is swept away as nothing whole."""
    agent, place = Agent(bed.bpffs), ("--cooperate", "--cgroup", str(bed.cgroup_root))
    folder = cooperation(bed.cgroup_root)
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    limiter = [bed.pod_uid]
    for command in (("attach", *place), ("detach", *place)):
        steps = 1
        while killed(bed, steps, *command):
            assert len(attached(bed)) == 3
            if steps % 2:
                bed.bpfrl(*command)
            elif command[0] == "attach":
                agent.sweep()
                whole = bool(agent.cooperating())
                assert entries(bed) == sorted([*limiter, *([folder] if whole else [])]), f"left after step {steps}"
                assert len(attached_to(bed.cgroup_root)) == whole
            bed.bpfrl("attach", *place)
            assert entries(bed) == sorted([*limiter, folder])
            assert len(attached_to(bed.cgroup_root)) == 1
            if command[0] == "attach":
                bed.bpfrl("detach", *place)
                assert (attached_to(bed.cgroup_root), entries(bed)) == ([], limiter), f"left after step {steps}"
            steps += 1
        assert steps > 5
    assert (attached_to(bed.cgroup_root), entries(bed)) == ([], limiter)
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert (attached(bed), entries(bed)) == ([], [])


def test_a_kernel_that_refuses_any_step_leaves_everything_as_it_was(bed: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No crash this time, but an error from each step of attach in turn."""
    agent = Agent(bed.bpffs)
    image = generator.generate(None, Limits(Rate(10**6)))
    tried = 0
    # What libbpf has made of the object is kept from here on.
    agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup)
    agent.detach(bed.pod_uid)
    descriptors = len(os.listdir("/proc/self/fd"))
    for owner, name in ((libbpf.LoadedObject, "__init__"), (libbpf.Descriptor, "pin"), (libbpf, "attach")):
        real = getattr(owner, name)
        for fatal in range(1, 20):
            calls = 0

            def refuse(*args: Any, fatal: int = fatal, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    raise KernelError("refused")
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, refuse)
                try:
                    agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup)
                except KernelError:
                    tried += 1
                    assert (attached(bed), entries(bed)) == ([], [])
                    assert len(os.listdir("/proc/self/fd")) <= descriptors
                else:
                    break
        agent.detach(bed.pod_uid)
    assert tried == 1 + 11 + 3


@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_a_kernel_that_refuses_a_successor_leaves_the_predecessor_as_it_was(
    bed: Lab, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    """Also where that has stopped pacing already, so that two do not pace the same sockets."""
    agent, image = Agent(bed.bpffs), generator.generate(None, Limits(Rate(10**6)))
    agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup)
    (bed.bpffs / bed.pod_uid / "identity").unlink()
    kinds, pins = [kind for kind, _ in attached(bed)], sorted((bed.bpffs / bed.pod_uid).iterdir())
    real, calls = libbpf.attach, 0

    def refuse(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise KernelError("refused")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(libbpf, "attach", refuse)
        with pytest.raises(KernelError, match=r"^refused$"):
            agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup)
    assert [kind for kind, _ in attached(bed)] == kinds
    assert sorted((bed.bpffs / bed.pod_uid).iterdir()) == pins
    assert entries(bed) == [bed.pod_uid]
    agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup)
    assert len(attached(bed)) == 3
    assert "error" not in only(bed)
