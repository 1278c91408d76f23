"""The agent as a program calls it: what it reports on the way, and which objects it will not load."""

from __future__ import annotations

import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from bench.lab import Lab
from bpfrl import cgroup
from bpfrl.bpf import generator, limiter
from bpfrl.bpf.limiter import Stage, Status
from bpfrl.errors import CgroupNotFoundError, InvalidObjectError, NotLimitedError, VerifierError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.kernel.conftest import attached
from tests.objects import sealed

SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**9), Rate(10**9), 65_536)


def state(bed: Lab) -> tuple[list[tuple[str, int]], list[str]]:
    """Everything that a limiter is: what is on the pod's cgroup, and what is in the bpffs."""
    pins = (str(path.relative_to(bed.bpffs)) for path in bed.bpffs.rglob("*"))
    return attached(bed), sorted(pin for pin in pins if not pin.endswith(".debug"))


def end_pod(bed: Lab) -> None:
    (bed.pod_cgroup / "container").rmdir()
    bed.pod_cgroup.rmdir()


def limits_of(agent: Agent) -> list[Limits]:
    """Those in force; the list has nothing broken."""
    found = agent.limiters()
    assert all(isinstance(each, Status) for each in found)
    return [each.limits for each in found if isinstance(each, Status)]


def wait_until_gone(agent: Agent, uid: str) -> None:
    """The kernel detaches the programs of a cgroup a moment after that is removed."""
    deadline = time.monotonic() + 5
    while any(found.cgroup_id for found in agent.limiters() if isinstance(found, Status) and found.pod.uid == uid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The stages of attaching.


def test_attaching_reports_each_stage_when_it_is_reached(bed: Lab) -> None:
    agent, pod = Agent(bed.bpffs), PodRef(bed.pod_uid)
    reports: list[tuple[Stage, int, set[str]]] = []

    def report(stage: Stage) -> None:
        on_cgroup, pins = state(bed)
        reports.append((stage, len(on_cgroup), {Path(pin).parts[0] for pin in pins}))

    image = generator.generate(None, SLOW)
    assert agent.attach(image, pod, bed.pod_cgroup, report) is Change.ATTACHED
    assert reports == [(Stage.LOADED, 0, set()), (Stage.PINNED, 0, {f"{bed.pod_uid}{limiter.STAGED}"})]
    assert len(attached(bed)) == 3

    # Where only the limits change, nothing is loaded or pinned.
    assert agent.attach(generator.generate(None, FAST), pod, bed.pod_cgroup, report) is Change.UPDATED
    assert len(reports) == 2


@pytest.mark.parametrize("stage", Stage)
def test_whoever_gives_up_at_a_stage_leaves_everything_as_it_was(bed: Lab, stage: Stage) -> None:
    class GivenUpError(Exception):
        pass

    def report(reached: Stage) -> None:
        if reached is stage:
            raise GivenUpError

    agent, before = Agent(bed.bpffs), state(bed)
    with pytest.raises(GivenUpError):
        agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup, report)
    assert state(bed) == before


@pytest.mark.parametrize("stage", Stage)
def test_a_pod_that_ends_while_it_is_attached_leaves_nothing(bed: Lab, stage: Stage) -> None:
    def report(reached: Stage) -> None:
        if reached is stage:
            end_pod(bed)

    agent = Agent(bed.bpffs)
    with pytest.raises(CgroupNotFoundError, match=f"^{bed.pod_cgroup} has gone: the pod has ended$"):
        agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup, report)
    assert agent.limiters() == []
    assert [path for path in bed.bpffs.iterdir() if not path.name.endswith(".debug")] == []


# Update, runs and sweep.


def test_an_update_changes_the_limit_in_force_and_nothing_else(bed: Lab) -> None:
    agent, pod = Agent(bed.bpffs), PodRef(bed.pod_uid, "shop", "cart-0")
    agent.attach(generator.generate(None, SLOW), pod, bed.pod_cgroup)
    bed.ping(2)
    [before], pins = agent.limiters(), state(bed)
    assert isinstance(before, Status)
    assert before.egress.passed_packets >= 2

    assert agent.update(bed.pod_uid, FAST) is Change.UPDATED
    assert agent.limiters() == [replace(before, limits=FAST)]
    assert agent.update(bed.pod_uid, FAST) is Change.UNCHANGED
    assert agent.limiters() == [replace(before, limits=FAST)]
    assert state(bed) == pins


def test_an_update_of_a_pod_without_a_limit_does_not_give_it_one(bed: Lab) -> None:
    agent = Agent(bed.bpffs)
    with pytest.raises(NotLimitedError, match=bed.pod_uid):
        agent.update(bed.pod_uid, SLOW)
    assert state(bed) == ([], [])

    agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup)
    end_pod(bed)
    wait_until_gone(agent, bed.pod_uid)
    with pytest.raises(NotLimitedError, match=bed.pod_uid):
        agent.update(bed.pod_uid, FAST)
    assert limits_of(agent) == [SLOW]


def test_a_limiter_runs_while_its_build_its_cgroup_and_its_pods_name_are_those_asked_for(bed: Lab) -> None:
    agent, pod = Agent(bed.bpffs), PodRef(bed.pod_uid, "shop", "cart-0")
    image = generator.generate(None, SLOW)
    build = generator.inspect(image).build
    assert not agent.runs(pod, bed.pod_cgroup, build)
    agent.attach(image, pod, bed.pod_cgroup)
    [found] = agent.limiters()
    assert isinstance(found, Status)
    assert found.build == build
    assert agent.runs(pod, bed.pod_cgroup, build)
    assert agent.runs(PodRef(bed.pod_uid), bed.pod_cgroup, build)
    assert not agent.runs(PodRef(bed.pod_uid, "shop", "cart-1"), bed.pod_cgroup, build)
    assert not agent.runs(pod, bed.pod_cgroup, build[::-1])
    assert not agent.runs(pod, bed.pod_cgroup / "container", build)
    end_pod(bed)
    with pytest.raises(CgroupNotFoundError, match="has gone"):
        agent.runs(pod, bed.pod_cgroup, build)


def test_sweeping_leaves_nothing_of_a_pod_that_has_ended_and_all_of_the_others(bed: Lab) -> None:
    agent, other = Agent(bed.bpffs), PodRef(str(uuid.uuid4()))
    path = bed.cgroup_root / "kubepods" / f"pod{other.uid}"
    path.mkdir(parents=True)
    agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup)
    agent.attach(generator.generate(None, SLOW), other, path)
    assert agent.sweep() == []
    end_pod(bed)
    wait_until_gone(agent, bed.pod_uid)
    assert agent.sweep() == [bed.pod_uid]
    [found] = agent.limiters()
    assert isinstance(found, Status)
    assert (found.pod, found.cgroup_id) == (other, cgroup.id_of(path))

    path.rmdir()
    wait_until_gone(agent, other.uid)
    assert agent.sweep() == [other.uid]
    assert [path for path in bed.bpffs.iterdir() if not path.name.endswith(".debug")] == []


@pytest.mark.parametrize("mark", [limiter.STAGED, limiter.RETIRED])
def test_sweeping_lifts_what_was_cut_off(bed: Lab, mark: str) -> None:
    agent = Agent(bed.bpffs)
    agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup)
    folder = bed.bpffs / bed.pod_uid
    folder.rename(folder.with_name(folder.name + mark))
    assert agent.sweep() == [bed.pod_uid]
    assert state(bed) == ([], [])


# Objects that are no limiter of ours: made from the same sources, with something else in them.


def build(folder: Path, change: Callable[[str], str]) -> bytes:
    """An object from the limiter's sources with other text, compiled as the generator does it."""
    for source in resources.files("bpfrl.bpf").iterdir():
        if source.name.endswith((".c", ".h")):
            (folder / source.name).write_bytes(source.read_bytes())
    source, binary = folder / "limiter.bpf.c", folder / "limiter.bpf.o"
    source.write_text(change(source.read_text()))
    headers = f"-I/usr/include/{platform.machine()}-linux-gnu"
    subprocess.run(["clang", *generator._FLAGS, headers, "-c", source, "-o", binary], check=True)
    return sealed(binary.read_bytes())


def more(text: str) -> Callable[[str], str]:
    return lambda source: f"{source}\n{text}\n"


def instead(old: str, new: str) -> Callable[[str], str]:
    def change(source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    return change


A_MAP = """struct {{
	__uint(type, {kind});
	__uint(max_entries, {entries});
	__type(key, __u32);
	__type(value, {value});
}} theirs SEC(".maps");"""
COUNTERS = "__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);\n"
ENTRIES = "__uint(max_entries, BPFRL_DIRECTIONS);\n"

# What an object has that a limiter has not, and the name that the refusal gives it.
FOREIGN: dict[str, tuple[Callable[[str], str], str]] = {
    "a kprobe": (more('SEC("kprobe/do_unlinkat") int theirs(void *ctx) { return !ctx; }'), "theirs"),
    "an XDP program": (more('SEC("xdp") int theirs(struct xdp_md *ctx) { return !ctx; }'), "theirs"),
    "a fourth program of our own type": (
        more('SEC("cgroup_skb/egress") int theirs(struct __sk_buff *skb) { return !skb; }'),
        "theirs",
    ),
    "a section that libbpf does not know": (more('SEC("nowhere") int theirs(void *ctx) { return !ctx; }'), "theirs"),
    "a map": (more(A_MAP.format(kind="BPF_MAP_TYPE_HASH", entries=1, value="__u64")), "theirs"),
    "a map with the shape of one of ours": (
        more(A_MAP.format(kind="BPF_MAP_TYPE_PERCPU_ARRAY", entries=2, value="struct bpfrl_counters")),
        "theirs",
    ),
    "a section of data": (more('__u64 theirs SEC(".data.theirs") = 1;'), ".data.theirs"),
    "a map that is to be pinned": (instead(COUNTERS, f"{COUNTERS}__uint(pinning, LIBBPF_PIN_BY_NAME);\n"), "counters"),
    "a map whose name begins with the object's": (
        more(
            A_MAP.format(kind="BPF_MAP_TYPE_PERCPU_ARRAY", entries=2, value="struct bpfrl_counters").replace(
                "theirs", "bpfrlcounters"
            )
        ),
        "bpfrlcounters",
    ),
    "a map that user space may not read": (
        instead(COUNTERS, f"{COUNTERS}__uint(map_flags, BPF_F_WRONLY);\n"),
        "counters",
    ),
    "a program that is not loaded": (instead('SEC("sockops")', 'SEC("?sockops")'), "bpfrl_sockops"),
    "one more program, that is not loaded": (
        more('SEC("?kprobe/do_unlinkat") int theirs(void *ctx) { return !ctx; }'),
        "theirs",
    ),
    "a map of another type": (instead(COUNTERS, "__uint(type, BPF_MAP_TYPE_ARRAY);\n"), "counters"),
    "a map with many entries": (instead(ENTRIES, "__uint(max_entries, 1 << 20);\n"), "counters"),
    "more state": (more("__u64 theirs[1 << 20];"), ".bss"),
    "a program of another type": (
        instead('SEC("cgroup_skb/egress")\nint', 'SEC("socket")\nint'),
        "bpfrl_egress",
    ),
    "a program for the other direction": (
        instead('SEC("cgroup_skb/egress")\nint', 'SEC("cgroup_skb/ingress")\nint'),
        "bpfrl_egress",
    ),
    "a program under another name": (instead("int bpfrl_sockops(", "int theirs("), "bpfrl_sockops, theirs"),
}


@pytest.mark.parametrize(("change", "named"), FOREIGN.values(), ids=FOREIGN)
def test_an_object_with_what_a_limiter_has_not_never_reaches_the_kernel(
    bed: Lab, tmp_path: Path, change: Callable[[str], str], named: str
) -> None:
    agent, pod, image = Agent(bed.bpffs), PodRef(bed.pod_uid), build(tmp_path, change)
    everywhere = os.listdir("/sys/fs/bpf")

    def refuse() -> None:
        before = state(bed)
        with pytest.raises(InvalidObjectError) as caught:
            agent.attach(image, pod, bed.pod_cgroup)
        assert str(caught.value) == f"not the programs and maps of a limiter: {named}"
        assert state(bed) == before
        assert os.listdir("/sys/fs/bpf") == everywhere

    refuse()
    assert state(bed) == ([], [])
    agent.attach(generator.generate(None, SLOW), pod, bed.pod_cgroup)
    # Its build is another, so here it would replace the programs that are in force.
    refuse()
    assert limits_of(agent) == [SLOW]


def test_what_the_sources_make_is_taken_when_nothing_is_changed(bed: Lab, tmp_path: Path) -> None:
    """So what the others are refused for is their change."""
    agent = Agent(bed.bpffs)
    assert agent.attach(build(tmp_path, str), PodRef(bed.pod_uid), bed.pod_cgroup) is Change.ATTACHED
    assert limits_of(agent) == [Limits()]


EGRESS = 'SEC("cgroup_skb/egress")\nint bpfrl_egress(struct __sk_buff *skb)\n{\n'
BEYOND = instead(EGRESS, f"{EGRESS}\tif (skb->mark)\n\t\treturn *(volatile int *)(long)skb->data;\n")


def test_a_refusal_of_the_verifier_is_told_with_its_last_lines_and_changes_nothing(bed: Lab, tmp_path: Path) -> None:
    agent, pod, image = Agent(bed.bpffs), PodRef(bed.pod_uid), build(tmp_path, BEYOND)
    for before in ("no limit", "a limit"):
        if before == "a limit":
            agent.attach(generator.generate(None, SLOW), pod, bed.pod_cgroup)
        present = state(bed)
        with pytest.raises(VerifierError) as caught:
            agent.attach(image, pod, bed.pod_cgroup)
        text = str(caught.value)
        assert text.startswith("the kernel refuses the BPF programs: ")
        assert "invalid access to packet" in text
        assert text.endswith("offset is outside of the packet")
        assert text.isprintable()
        assert state(bed) == present
    assert limits_of(agent) == [SLOW]
