"""A bpffs with anything in it: nobody dies of it, and what is not bpfrl's stays."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from bench.lab import Lab
from bpfrl.bpf import generator, libbpf, limiter, probe
from bpfrl.bpf.libbpf import AttachType, Descriptor, MapShape, MapType, ProgramType
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import BpfrlError, BrokenLimiterError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node import explain
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.fuzzing import runs
from tests.kernel.conftest import attached

SLOW = Limits(Rate(10**6))
NAMES = (*sorted(limiter._OURS), "program", "link", "theirs", "a b", "ü", "x" * 200)
MARKS = ("", limiter.STAGED, limiter.RETIRED, "~", "~new~new", "~old~new")
FOLDERS = (
    "globals",
    "cooperation-1",
    "cooperation-7~new",
    "cooperation-",
    "cgroup-0",
    "cgroup-5",
    "CGROUP-5",
    "0" * 31,
)


class Builder:
    """Puts strange things into a bpffs."""

    def __init__(self, root: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._root = root
        self.uids = [str(uuid.UUID(int=self._random.getrandbits(128))) for _ in range(6)]

    def build(self, count: int) -> None:
        for _ in range(count):
            name = self._random.choice((*self.uids, *FOLDERS)) + self._random.choice(MARKS)
            path = self._root / name
            with suppress(OSError, BpfrlError):
                self._random.choice((self._folder, self._folder, self._folder, self._pin, self._link))(path)

    def _folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        names = NAMES if self._random.random() < 0.5 else sorted(limiter._PINS)
        for name in self._random.sample(names, self._random.randrange(len(names) + 1)):
            with suppress(OSError, BpfrlError):
                self._random.choice((self._pin, self._pin, self._pin, Path.mkdir, self._link))(path / name)

    def _pin(self, path: Path) -> None:
        with self._random.choice((self._map, self._map, self._program))() as thing:
            thing.pin(path)

    def _link(self, path: Path) -> None:
        path.symlink_to(self._random.choice(("/etc", "/nowhere", path, self._root / self.uids[0])))

    def _map(self) -> Descriptor:
        kind = self._random.choice((MapType.ARRAY, MapType.PERCPU_ARRAY))
        return libbpf.make_map("theirs", MapShape(kind, 4, self._random.choice((8, 128, 272, 432, 4096)), 1, 0))

    def _program(self) -> Descriptor:
        return libbpf.load("theirs", ProgramType.CGROUP_SKB, probe._end(1), AttachType.CGROUP_INET_EGRESS)


def everything(root: Path) -> set[tuple[str, int]]:
    """What is in the bpffs, but for what the kernel puts there: where, and which it is."""
    found = set()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            found.add((str(path.relative_to(root)), path.lstat().st_ino))
    return {(name, number) for name, number in found if not name.endswith(".debug")}


def not_ours(things: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Of these, what has no name that bpfrl gives anything, and the folders around that."""
    kept = set()
    for name, number in things:
        top, _, rest = name.partition("/")
        uid = top.removesuffix(limiter.STAGED).removesuffix(limiter.RETIRED)
        with suppress(BpfrlError):
            PodRef(uid)
            if not rest or rest in limiter._OURS:
                continue
        if not top.startswith("cooperation-") or (rest and rest not in {"program", "link", "sockets"}):
            kept.add((name, number))
    return kept


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", runs(6, 300))
def test_a_bpffs_with_anything_in_it_is_lived_with(bed: Lab, seed: int) -> None:
    builder, agent, tree = Builder(bed.bpffs, seed), Agent(bed.bpffs), CgroupTree(bed.cgroup_root)
    builder.build(random.Random(seed).randrange(30))
    foreign = not_ours(everything(bed.bpffs))
    image = generator.generate(None, SLOW)

    listed = agent.limiters()
    assert all(isinstance(each, Broken) and each.reason.isprintable() for each in listed)
    calls: list[Callable[[str], object]] = [
        agent.limiter,
        agent.detach,
        lambda uid: agent.update(uid, SLOW),
        lambda uid: explain.examine(agent, tree, uid, None),
        lambda _: agent.sweep(),
        lambda _: agent.costs(),
        lambda _: agent.cooperating(),
        lambda _: agent.cooperate(bed.cgroup_root),
        lambda _: agent.stop_cooperating(1),
        lambda uid: agent.attach(image, PodRef(uid), bed.pod_cgroup),
        lambda _: agent.limiters(),
    ]
    order = random.Random(seed)
    for _ in range(20):
        with suppress(BpfrlError):
            order.choice(calls)(order.choice(builder.uids))
        assert foreign <= everything(bed.bpffs)
    for uid in builder.uids:
        with suppress(BpfrlError):
            agent.detach(uid)
    with suppress(BpfrlError):
        agent.detach_cgroup(bed.pod_cgroup)
    assert attached(bed) == []
    # And a pod beside all that is limited as ever.
    assert agent.attach(image, PodRef(bed.pod_uid), bed.pod_cgroup) is Change.ATTACHED
    assert agent.detach(bed.pod_uid) is Change.DETACHED
    assert foreign <= everything(bed.bpffs)


@pytest.mark.parametrize("name", ["limits", "sockops_link"])
@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("/etc")], ids=["a folder", "a link"])
def test_what_looks_like_a_limiter_and_has_something_else_in_it_is_none(
    bed: Lab, put: Callable[[Path], object], name: str
) -> None:
    agent, pod = Agent(bed.bpffs), PodRef(bed.pod_uid)
    (bed.bpffs / bed.pod_uid).mkdir()
    put(bed.bpffs / bed.pod_uid / name)
    before = everything(bed.bpffs)
    with pytest.raises(BrokenLimiterError, match="not made by bpfrl: look at it, and remove it"):
        agent.attach(generator.generate(None, SLOW), pod, bed.pod_cgroup)
    with pytest.raises(BrokenLimiterError, match="not made by bpfrl: look at it, and remove it"):
        agent.detach(bed.pod_uid)
    assert (attached(bed), everything(bed.bpffs)) == ([], before)


def test_a_cooperations_folder_with_more_in_it_is_told_and_stays(bed: Lab) -> None:
    (bed.bpffs / "cooperation-1" / "theirs").mkdir(parents=True)
    with pytest.raises(BrokenLimiterError, match="holds what bpfrl has not made: look at it, and remove it"):
        Agent(bed.bpffs).stop_cooperating(1)
    assert (bed.bpffs / "cooperation-1" / "theirs").is_dir()


def test_thousands_of_folders_are_no_more_than_slow(bed: Lab) -> None:
    for number in range(3_000):
        (bed.bpffs / str(uuid.UUID(int=number))).mkdir()
    agent = Agent(bed.bpffs)
    assert len(agent.limiters()) == 3_000
    assert agent.attach(generator.generate(None, SLOW), PodRef(bed.pod_uid), bed.pod_cgroup) is Change.ATTACHED
    assert agent.detach(str(uuid.UUID(int=1))) is Change.DETACHED
    whole = [each for each in agent.limiters() if not isinstance(each, Broken)]
    assert [each.pod.uid for each in whole] == [bed.pod_uid]


@pytest.mark.parametrize("pin", ["state", "identity", "egress", "sockets"])
def test_a_limiter_that_was_known_and_has_changed_is_looked_at_anew(bed: Lab, pin: str) -> None:
    """What is known of a folder that has been as it is for a while goes by its time (limiter._identity)."""
    agent, uid = Agent(bed.bpffs), bed.pod_uid
    agent.attach(generator.generate(None, Limits(Rate(10**6))), PodRef(uid, "shop", "cart"), bed.pod_cgroup)
    folder = bed.bpffs / uid
    known = limiter._identified.cache_info()
    for _ in range(3):
        os.utime(folder, ns=(1, 1))
        assert isinstance(agent.limiter(uid), Status)
    assert limiter._identified.cache_info().hits == known.hits + 2
    (folder / pin).unlink()
    found = agent.limiter(uid)
    assert isinstance(found, Broken)
    assert f"{pin} is missing" in found.reason
    agent.detach(uid)


def test_a_limiter_that_has_just_come_is_not_known_by_its_time(bed: Lab) -> None:
    agent, uid = Agent(bed.bpffs), bed.pod_uid
    agent.attach(generator.generate(None, Limits(Rate(10**6))), PodRef(uid), bed.pod_cgroup)
    known = limiter._identified.cache_info()
    for _ in range(3):
        assert isinstance(agent.limiter(uid), Status)
    assert limiter._identified.cache_info() == known
    agent.detach(uid)
