"""kill -9, and a refusal, at every system call of attach, update, upgrade and detach.

test_recovery.py does so at the steps that bpfrl knows; here strace does it at those that the kernel knows. CI takes a
sample of them; with BPFRL_EVERY_STEP set, as `make faults` has it, there is none that is left out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from bench import inject
from bench.lab import Lab, lab
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import BpfrlError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.kernel.conftest import attached, entries
from tests.objects import of_another_build

# Everything by which state in the kernel comes, changes and goes.
CALLS = "bpf,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,setns"
REFUSALS = ("ENOMEM", "EPERM", "ENOSPC", "EBUSY")
EVERY = bool(os.environ.get("BPFRL_EVERY_STEP"))
STRIDE = 1 if EVERY else 17
# An attach makes some two hundred; one that fails whatever happens is not tried for ever.
MOST_STEPS = 1000
SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(2 * 10**6), Rate(3 * 10**6))


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    """A pod with a process, so that its connections are looked for, and the compile cache filled."""
    if os.geteuid():
        pytest.skip("needs root")
    for source in ("limiter.bpf.c", "sockets.bpf.c"):
        generator.compile_object(source)
    with lab() as built:
        built.start(built.in_pod("sleep", "1000"))
        yield built


@pytest.fixture
def bed(place: Lab) -> Iterator[Lab]:
    yield place
    Agent(place.bpffs).detach(place.pod_uid)
    assert (attached(place), entries(place)) == ([], [])


class Change(NamedTuple):
    """What is interrupted: what there is before, what is done, and what there is to be."""

    before: Limits | None
    do: Callable[[Agent, Lab], object]
    after: Limits | None


def give(limits: Limits, *, another: bool = False) -> Callable[[Agent, Lab], object]:
    """Attach, or change what is attached: with other programs of another build."""

    def attach(agent: Agent, bed: Lab) -> object:
        image = generator.generate(None, limits)
        return agent.attach(of_another_build(image) if another else image, PodRef(bed.pod_uid), bed.pod_cgroup)

    return attach


CHANGES = {
    "attach": Change(None, give(SLOW), SLOW),
    "update": Change(SLOW, lambda agent, bed: agent.update(bed.pod_uid, FAST), FAST),
    "upgrade": Change(SLOW, give(FAST, another=True), FAST),
    "detach": Change(SLOW, lambda agent, bed: agent.detach(bed.pod_uid), None),
}


class Ended(NamedTuple):
    """How a process has ended: 0, 1 for a refusal, or -SIGKILL; and whether anything was done to it."""

    code: int
    met: bool


def interrupted(action: Callable[[], object], rule: str) -> Ended:
    """Do something in a process of whose system calls one is its last, or fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        with suppress(BaseException):
            os.read(reader, 1)
            try:
                action()
                code = 0
            except (BpfrlError, OSError):
                code = 1
        os._exit(code)
    try:
        with inject.system_calls(child, rule) as injected:
            os.write(writer, b"!")
            _, status = os.waitpid(child, 0)
        ended = Ended(os.waitstatus_to_exitcode(status), injected.met > 0)
    finally:
        os.close(reader)
        os.close(writer)
    assert ended.code in {0, 1, -signal.SIGKILL}
    return ended


def prepare(bed: Lab, agent: Agent, limits: Limits | None) -> None:
    if limits is None:
        agent.detach(bed.pod_uid)
        assert (attached(bed), entries(bed)) == ([], [])
    else:
        give(limits)(agent, bed)
        assert in_force(bed, agent) == limits


def in_force(bed: Lab, agent: Agent) -> Limits | None:
    """The limits of the one whole limiter that is there, and nothing besides; None: nothing at all."""
    if not entries(bed):
        assert attached(bed) == []
        return None
    assert entries(bed) == [bed.pod_uid]
    [found] = agent.limiters()
    assert isinstance(found, Status), found
    assert len(attached(bed)) == 3
    return found.limits


@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_any_system_call(bed: Lab, name: str) -> None:
    """Nothing limits the pod that nobody sees, and the same again brings all to its end; or the next daemon does."""
    agent, change = Agent(bed.bpffs), CHANGES[name]
    for step in range(1, MOST_STEPS, STRIDE):
        prepare(bed, agent, change.before)
        if not interrupted(lambda: change.do(agent, bed), f"{CALLS}:signal=KILL:when={step}").code:
            break
        if attached(bed):
            assert [found.uid if isinstance(found, Broken) else found.pod.uid for found in agent.limiters()] == [
                bed.pod_uid
            ], f"hidden limiter after step {step}"
        if change.before and change.after:
            assert len(attached(bed)) == 3, f"no limiter after step {step}"
        if step % 2:
            agent.sweep()
            assert in_force(bed, agent) in (change.before, change.after)
        if change.after is None:
            agent.detach(bed.pod_uid)
        else:
            give(change.after)(agent, bed)
        assert in_force(bed, agent) == change.after, f"after step {step}"
    assert step > 1
    assert in_force(bed, agent) == change.after


@pytest.mark.parametrize("refusal", REFUSALS if EVERY else REFUSALS[:1])
@pytest.mark.parametrize("name", CHANGES)
def test_refused_at_any_bpf_call(bed: Lab, name: str, refusal: str) -> None:
    """It fails, and all is as it was; or it is done nevertheless, and whole."""
    agent, change = Agent(bed.bpffs), CHANGES[name]
    for step in range(1, MOST_STEPS, STRIDE):
        prepare(bed, agent, change.before)
        descriptors = len(os.listdir("/proc/self/fd"))
        ended = interrupted(lambda: change.do(agent, bed), f"bpf:error={refusal}:when={step}")
        if ended.code and change.after is None:
            # It is seen that this was cut off, and the same again ends it.
            assert [isinstance(found, Broken) for found in agent.limiters()] == [True]
            continue
        assert in_force(bed, agent) == (change.before if ended.code else change.after), f"after step {step}"
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        if not ended.met:
            break
    assert step > STRIDE
