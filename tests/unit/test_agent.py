"""What the agent decides, with limiters and a bpffs that are only played: tests/kernel has the real ones."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from bpfrl import cgroup, libc
from bpfrl.bpf import cooperation, generator, law, libbpf, limiter, probe
from bpfrl.bpf.layout import Counters, IdentityData, LimitsData
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.bpf.probe import Feature
from bpfrl.errors import (
    AlreadyLimitedError,
    BrokenLimiterError,
    CgroupNotFoundError,
    InvalidObjectError,
    InvalidValueError,
    KernelError,
    NotLimitedError,
    PermissionDeniedError,
    VerifierError,
)
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node import agent as module
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.unit.conftest import make

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
OTHER_UID = "0123456789abcdef0123456789abcdef"
POD = PodRef(UID, "shop", "cart-0")
SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**9), Rate(10**9), 65_536)


@pytest.fixture
def bpffs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the agent takes for a mounted bpffs."""
    folder, real = make(tmp_path / "bpf"), libc.file_system
    monkeypatch.setattr(libc, "file_system", lambda path: libc.BPF_FS if path == folder else real(path))
    return folder


@pytest.fixture
def here(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent on that bpffs, in which every pin is an empty file: none can be opened."""

    def refuse(path: Path) -> libbpf.Descriptor:
        raise KernelError(f"cannot open {path}: played")

    monkeypatch.setattr(libbpf, "open_pinned", refuse)
    monkeypatch.setattr(limiter, "others", lambda *_: False)
    return Agent(bpffs)


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Agent]:
    """An agent whose bpffs is not mounted yet; nor afterwards, whatever went wrong."""
    plain = make(tmp_path / "plain")
    yield Agent(plain)
    if plain.is_mount():
        subprocess.run(["umount", plain], check=True)


class Pinned:
    """A limiter as the agent sees it, which records what is done to it."""

    def __init__(self, path: Path, limits: Limits = SLOW, pod: PodRef = POD, build: bytes | None = None) -> None:
        self.pod = pod
        self.build = build or generator.inspect(generator.generate(None, SLOW)).build
        self.cgroup_id = cgroup.id_of(path)
        self.data = law.encode(limits)
        self.done: list[object] = []

    def change(self, data: LimitsData) -> bool:
        if bytes(self.data) == bytes(data):
            return False
        self.data = data
        self.done.append(law.decode(data))
        return True

    def upgrade(self, image: bytes) -> None:
        identity = identity_of(image)
        assert identity.cgroup == self.cgroup_id
        self.done.append(generator.read_identity(identity))


def identity_of(image: bytes) -> IdentityData:
    return IdentityData.from_buffer_copy(image, generator.inspect(image).identity_at)


Installed = list[tuple[bytes, Path, Path]]
Plays = Callable[[Pinned | None], Installed]


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> Plays:
    """Puts a limiter in the pod's folder, or none, and returns the list of what will be installed."""

    def play(pinned: Pinned | None) -> Installed:
        installed: Installed = []
        monkeypatch.setattr(module, "_open", lambda _: pinned)
        monkeypatch.setattr(limiter, "load", lambda *_: nullcontext())
        monkeypatch.setattr(
            limiter,
            "install",
            lambda image, path, folder, *_: installed.append((image, path, folder)),
        )
        return installed

    return play


# Attach: what is installed, and what is changed in place.


def test_a_kernel_that_is_too_old_for_a_limiter_is_named_with_the_version_that_is_not(
    here: Agent, tmp_path: Path, plays: Plays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise VerifierError("the kernel refuses the BPF programs: unknown func")

    plays(None)
    monkeypatch.setattr(limiter, "install", refuse)
    old = Feature("header options", "5.10", "pacing", "", refuse)
    monkeypatch.setattr(probe, "FEATURES", (old,))
    monkeypatch.setattr(platform, "release", lambda: "5.4.0")
    with pytest.raises(VerifierError) as refused:
        here.attach(generator.generate(None, SLOW), POD, tmp_path)
    assert str(refused.value) == (
        "this kernel (5.4.0) has no header options, for pacing: bpfrl needs Linux 5.10 or newer"
    )


def test_a_pod_without_a_limiter_gets_one_that_carries_its_name(here: Agent, tmp_path: Path, plays: Plays) -> None:
    installed = plays(None)
    assert here.attach(generator.generate(None, SLOW), POD, tmp_path) is Change.ATTACHED
    [(image, path, folder)] = installed
    contents = generator.inspect(image)
    assert (contents.pod, contents.limits) == (POD, SLOW)
    assert (path, folder) == (tmp_path, here.bpffs / UID)


def test_a_new_limiter_knows_the_cgroup_whose_sockets_are_its_own(here: Agent, tmp_path: Path, plays: Plays) -> None:
    installed = plays(None)
    pods = [make(tmp_path / name) for name in ("one", "other")]
    for pod in pods:
        here.attach(generator.generate(None, SLOW), POD, pod)
    assert [identity_of(image).cgroup for image, _, _ in installed] == [cgroup.id_of(pod) for pod in pods]


def test_a_pod_that_was_made_again_gets_a_new_limiter(here: Agent, tmp_path: Path, plays: Plays) -> None:
    installed = plays(Pinned(make(tmp_path / "the cgroup before")))
    assert here.attach(generator.generate(None, SLOW), POD, make(tmp_path / "now")) is Change.ATTACHED
    assert [path for _, path, _ in installed] == [tmp_path / "now"]


@pytest.mark.parametrize(
    ("present", "asked", "pod", "change", "done"),
    [
        (SLOW, SLOW, POD, Change.UNCHANGED, []),
        (SLOW, SLOW, PodRef(UID), Change.UNCHANGED, []),
        (SLOW, FAST, POD, Change.UPDATED, [FAST]),
        (FAST, SLOW, PodRef(UID), Change.UPDATED, [SLOW]),
        (FAST, Limits(FAST.egress, FAST.ingress), POD, Change.UPDATED, [Limits(FAST.egress, FAST.ingress)]),
        (SLOW, SLOW, PodRef(UID, "shop", "renamed"), Change.UPDATED, [PodRef(UID, "shop", "renamed")]),
        (SLOW, FAST, PodRef(UID, "shop", "renamed"), Change.UPDATED, [PodRef(UID, "shop", "renamed"), FAST]),
    ],
)
def test_a_limiter_that_is_there_is_changed_in_place_and_only_as_far_as_needed(
    here: Agent, tmp_path: Path, plays: Plays, present: Limits, asked: Limits, pod: PodRef, change: Change, done: object
) -> None:
    pinned = Pinned(tmp_path, present)
    installed = plays(pinned)
    assert here.attach(generator.generate(None, asked), pod, tmp_path) is change
    assert pinned.done == done
    assert installed == []


@pytest.mark.parametrize(
    ("pod", "labelled"),
    [(POD, POD), (PodRef(UID), PodRef(UID, "known", "before")), (PodRef(UID, "a", "b"), PodRef(UID, "a", "b"))],
)
def test_programs_of_another_build_are_replaced_and_the_pods_name_is_kept(
    here: Agent, tmp_path: Path, plays: Plays, pod: PodRef, labelled: PodRef
) -> None:
    pinned = Pinned(tmp_path, SLOW, PodRef(UID, "known", "before"), build=bytes(32))
    installed = plays(pinned)
    assert here.attach(generator.generate(None, FAST), pod, tmp_path) is Change.UPDATED
    assert pinned.done == [labelled, FAST]
    assert installed == []


def test_what_is_no_object_is_refused_before_anything_is_touched(here: Agent, tmp_path: Path, plays: Plays) -> None:
    make(here.bpffs / f"{UID}{limiter.STAGED}")
    installed = plays(None)
    with pytest.raises(InvalidObjectError):
        here.attach(b"no object", POD, tmp_path)
    assert installed == []
    assert [path.name for path in here.bpffs.iterdir()] == [f"{UID}{limiter.STAGED}"]


def test_attaching_clears_away_what_a_cut_off_call_has_left(here: Agent, tmp_path: Path, plays: Plays) -> None:
    for mark in (limiter.STAGED, limiter.RETIRED):
        make(here.bpffs / f"{UID}{mark}").joinpath("egress").touch()
    bystander = make(here.bpffs / f"{OTHER_UID}{limiter.STAGED}")
    plays(None)
    here.attach(generator.generate(None, SLOW), POD, tmp_path)
    assert list(here.bpffs.iterdir()) == [bystander]


def test_limits_of_a_law_that_was_refined_are_an_update(here: Agent, tmp_path: Path, plays: Plays) -> None:
    pinned = Pinned(tmp_path, SLOW)
    pinned.data.direction[0].drop_ns += 1
    plays(pinned)
    assert here.attach(generator.generate(None, SLOW), POD, tmp_path) is Change.UPDATED
    assert bytes(pinned.data) == bytes(law.encode(SLOW))


def test_a_cgroup_with_a_limiter_under_another_name_gets_no_second_one(
    here: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plays: Plays
) -> None:
    asked: list[tuple[Path, Path]] = []

    def others(path: Path, folder: Path) -> bool:
        asked.append((path, folder))
        return True

    installed = plays(None)
    monkeypatch.setattr(limiter, "others", others)
    with pytest.raises(AlreadyLimitedError, match=f"{tmp_path}.*detach it first"):
        here.attach(generator.generate(None, SLOW), POD, tmp_path)
    assert asked == [(tmp_path, here.bpffs / UID)]
    assert installed == []


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a folder of theirs": lambda path: make(path / "theirs"),
    "a folder with ours and theirs": lambda path: make(path / "theirs").with_name("egress").touch(),
    "a file": lambda path: path.touch(),
    "a link": lambda path: path.symlink_to(make(path.with_name("elsewhere"))),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("mark", ["", limiter.STAGED, limiter.RETIRED])
def test_what_something_else_made_is_left_alone(
    here: Agent, tmp_path: Path, mark: str, stranger: Callable[[Path], object]
) -> None:
    stranger(here.bpffs / f"{UID}{mark}")
    theirs = {path for path in here.bpffs.rglob("*") if path.name != "egress"}
    with pytest.raises(BrokenLimiterError, match="not made"):
        here.attach(generator.generate(None, SLOW), POD, tmp_path)
    with pytest.raises(BrokenLimiterError, match="not made"):
        here.detach(UID)
    assert theirs <= set(here.bpffs.rglob("*"))


def test_a_bpffs_that_is_not_there_is_an_error_in_one_line(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "bpf"
    with pytest.raises(KernelError, match=f"^cannot open {absent}: No such file or directory$"):
        Agent(absent).attach(generator.generate(None, SLOW), POD, tmp_path)


def test_nothing_is_hidden_by_mounting_over_it(nowhere: Agent, tmp_path: Path) -> None:
    nowhere.bpffs.joinpath("file").touch()
    with pytest.raises(KernelError, match=f"{nowhere.bpffs} is no BPF file system, and not empty: .* --bpffs"):
        nowhere.attach(generator.generate(None, SLOW), POD, tmp_path)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EPERM, "Operation not permitted"), PermissionDeniedError("this needs root")),
        (OSError(errno.ENODEV, "No such device"), KernelError("No such device")),
    ],
    ids=["not root", "not in this kernel"],
)
def test_a_bpffs_that_cannot_be_mounted_is_told_with_the_reason(
    nowhere: Agent, monkeypatch: pytest.MonkeyPatch, error: OSError, told: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(libc, "mount", refuse)
    with pytest.raises(type(told), match=f"^cannot mount a BPF file system on {nowhere.bpffs}: {told}$"):
        nowhere.mount()


@pytest.mark.parametrize("error", [KernelError("cannot attach: No such device"), OSError(2, "No such file")])
def test_a_pod_that_ends_while_it_is_attached_is_told_from_other_trouble(
    here: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pod = make(tmp_path / "pod")
    ends = False

    def install(*_: object) -> None:
        if ends:
            pod.rmdir()
        raise error

    monkeypatch.setattr(limiter, "install", install)
    with pytest.raises(type(error)) as caught:
        here.attach(generator.generate(None, SLOW), POD, pod)
    assert caught.value is error
    ends = True
    with pytest.raises(CgroupNotFoundError, match=f"^{pod} has gone: the pod has ended$"):
        here.attach(generator.generate(None, SLOW), POD, pod)


# Update: one write, or nothing.


@pytest.mark.parametrize(
    ("present", "asked", "change", "done"),
    [
        (SLOW, SLOW, Change.UNCHANGED, []),
        (FAST, FAST, Change.UNCHANGED, []),
        (SLOW, FAST, Change.UPDATED, [FAST]),
        (FAST, SLOW, Change.UPDATED, [SLOW]),
        (FAST, Limits(), Change.UPDATED, [Limits()]),
        (FAST, Limits(FAST.egress, FAST.ingress), Change.UPDATED, [Limits(FAST.egress, FAST.ingress)]),
        (SLOW, Limits(None, SLOW.egress), Change.UPDATED, [Limits(None, SLOW.egress)]),
    ],
)
@pytest.mark.parametrize("build", [None, bytes(32)])
def test_an_update_writes_the_limits_and_leaves_the_programs_whatever_their_build(
    here: Agent,
    tmp_path: Path,
    plays: Plays,
    build: bytes | None,
    present: Limits,
    asked: Limits,
    change: Change,
    done: object,
) -> None:
    pinned = Pinned(tmp_path, present, build=build)
    installed = plays(pinned)
    assert here.update(UID, asked) is change
    assert pinned.done == done
    assert installed == []


def test_an_update_writes_what_a_refined_law_makes_of_the_same_limits(
    here: Agent, tmp_path: Path, plays: Plays
) -> None:
    pinned = Pinned(tmp_path, SLOW)
    pinned.data.direction[0].drop_ns += 1
    plays(pinned)
    assert here.update(UID, SLOW) is Change.UPDATED
    assert bytes(pinned.data) == bytes(law.encode(SLOW))


def test_a_pod_whose_cgroup_is_gone_has_no_limit_to_update(here: Agent, tmp_path: Path, plays: Plays) -> None:
    pinned = Pinned(tmp_path)
    pinned.cgroup_id = 0
    plays(pinned)
    with pytest.raises(NotLimitedError, match=f"^pod {UID} has no whole limiter here to update: attach one$"):
        here.update(UID, FAST)
    assert pinned.done == []


@pytest.mark.parametrize("pins", [None, (), ("egress",), ("limits", "state", "sockops", "identity")])
def test_a_pod_without_a_whole_limiter_has_no_limit_to_update(here: Agent, pins: tuple[str, ...] | None) -> None:
    if pins is not None:
        folder = make(here.bpffs / UID)
        for pin in pins:
            folder.joinpath(pin).touch()
    before = set(here.bpffs.rglob("*"))
    with pytest.raises(NotLimitedError, match=f"pod {UID} has no whole limiter here"):
        here.update(UID, SLOW)
    assert set(here.bpffs.rglob("*")) == before


def test_where_nothing_is_mounted_nothing_is_updated_nor_mounted(nowhere: Agent, tmp_path: Path) -> None:
    make(nowhere.bpffs / UID)
    for agent in (nowhere, Agent(tmp_path / "absent")):
        with pytest.raises(NotLimitedError, match="no whole limiter here"):
            agent.update(UID, SLOW)
    assert not nowhere.is_mounted()


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_what_something_else_made_is_no_limit_to_update(here: Agent, stranger: Callable[[Path], object]) -> None:
    stranger(here.bpffs / UID)
    before = set(here.bpffs.rglob("*"))
    with pytest.raises(BrokenLimiterError, match="not made"):
        here.update(UID, SLOW)
    assert set(here.bpffs.rglob("*")) == before


# Runs: whether there is anything to do but to write limits.


@pytest.mark.parametrize(
    ("pod", "present", "answer"),
    [
        (POD, POD, True),
        (PodRef(UID), POD, True),
        (PodRef(UID), PodRef(UID), True),
        (POD, PodRef(UID), False),
        (POD, PodRef(UID, "shop", "renamed"), False),
        (POD, PodRef(UID, "moved", POD.name), False),
    ],
)
def test_a_limiter_runs_where_the_pod_has_the_name_that_is_asked_for(
    here: Agent, tmp_path: Path, plays: Plays, pod: PodRef, present: PodRef, answer: bool
) -> None:
    pinned = Pinned(tmp_path, SLOW, present)
    plays(pinned)
    assert here.runs(pod, tmp_path, pinned.build) is answer
    assert not here.runs(pod, tmp_path, bytes(32))
    assert not here.runs(pod, make(tmp_path / "another cgroup"), pinned.build)
    pinned.cgroup_id = 0
    assert not here.runs(pod, tmp_path, pinned.build)
    assert pinned.done == []


@pytest.mark.parametrize("mark", [limiter.STAGED, limiter.RETIRED])
def test_a_limiter_with_leftovers_is_not_taken_to_run(here: Agent, tmp_path: Path, plays: Plays, mark: str) -> None:
    pinned = Pinned(tmp_path)
    plays(pinned)
    make(here.bpffs / f"{OTHER_UID}{mark}")
    assert here.runs(POD, tmp_path, pinned.build)
    left = make(here.bpffs / f"{UID}{mark}")
    assert not here.runs(POD, tmp_path, pinned.build)
    assert left.exists()


def test_where_there_is_no_whole_limiter_none_runs(here: Agent, tmp_path: Path) -> None:
    build = generator.inspect(generator.generate(None, SLOW)).build
    assert not here.runs(POD, tmp_path, build)
    make(here.bpffs / UID).joinpath("egress").touch()
    assert not here.runs(POD, tmp_path, build)


def test_where_nothing_is_mounted_none_runs_and_nothing_is_mounted_for_it(
    nowhere: Agent, tmp_path: Path, plays: Plays
) -> None:
    pinned = Pinned(tmp_path)
    plays(pinned)
    for agent in (nowhere, Agent(tmp_path / "absent")):
        assert not agent.runs(POD, tmp_path, pinned.build)
    assert not nowhere.is_mounted()


def test_whether_a_limiter_runs_on_a_cgroup_that_has_gone_is_an_error(
    here: Agent, tmp_path: Path, plays: Plays
) -> None:
    pod = make(tmp_path / "pod")
    pinned = Pinned(pod)
    plays(pinned)
    pod.rmdir()
    with pytest.raises(CgroupNotFoundError, match=f"^{pod} has gone: the pod has ended$"):
        here.runs(POD, pod, pinned.build)


# Detach.


def test_detaching_a_pod_that_has_no_limiter_is_no_error(here: Agent, nowhere: Agent, tmp_path: Path) -> None:
    assert here.detach(UID) is Change.ABSENT
    assert nowhere.detach(UID) is Change.ABSENT
    tmp_path.joinpath("file").touch()
    for bpffs in ("absent", "file/below"):
        assert Agent(tmp_path / bpffs).detach(UID) is Change.ABSENT


@pytest.mark.parametrize("mark", ["", limiter.STAGED, limiter.RETIRED])
@pytest.mark.parametrize("pins", [(), ("egress",), ("limits", "state", "sockops", "identity")])
def test_detaching_removes_what_is_left_of_a_limiter(here: Agent, mark: str, pins: tuple[str, ...]) -> None:
    folder = make(here.bpffs / f"{UID}{mark}")
    for pin in pins:
        folder.joinpath(pin).touch()
    neighbour = make(here.bpffs / OTHER_UID)
    assert here.detach(UID) is Change.DETACHED
    assert list(here.bpffs.iterdir()) == [neighbour]
    assert here.detach(UID) is Change.ABSENT


@pytest.mark.parametrize("uid", ["..", ".", "", "../bpf", "x", f"{UID}{limiter.STAGED}"])
def test_what_is_no_uid_reaches_no_folder(here: Agent, uid: str) -> None:
    make(here.bpffs / f"{UID}{limiter.STAGED}")
    make(here.bpffs / "x")
    with pytest.raises(InvalidValueError, match="is no pod UID"):
        here.detach(uid)
    with pytest.raises(InvalidValueError, match="is no pod UID"):
        here.update(uid, SLOW)
    assert len(list(here.bpffs.iterdir())) == 2


def test_a_cgroups_limiter_is_detached_whatever_its_name(
    here: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = cgroup.id_of(tmp_path)
    found: list[Status | Broken] = [Broken("f" * 32, "cut off"), status("cgroup-7", 7), status(UID, number)]
    detached: list[str] = []
    monkeypatch.setattr(here, "limiters", lambda: found)

    def detach(uid: str) -> Change:
        detached.append(uid)
        return Change.DETACHED

    monkeypatch.setattr(here, "detach", detach)
    assert here.detach_cgroup(tmp_path) == (UID, Change.DETACHED)
    del found[-1]
    assert here.detach_cgroup(tmp_path)[0] == f"cgroup-{number}"
    assert detached == [UID, f"cgroup-{number}"]


# List and sweep.


def status(uid: str, cgroup_id: int) -> Status:
    return Status(PodRef(uid), SLOW, Counters(), Counters(), cgroup_id, 0.0)


def test_where_nothing_is_mounted_nothing_is_limited(nowhere: Agent, tmp_path: Path) -> None:
    make(nowhere.bpffs / UID)
    assert nowhere.limiters() == []
    assert Agent(tmp_path / "absent").limiters() == []


def test_only_folders_with_a_uid_for_a_name_are_listed_once_each_and_in_order(here: Agent) -> None:
    for name in (UID, f"{UID}{limiter.STAGED}", f"{UID}{limiter.RETIRED}", f"{OTHER_UID}{limiter.RETIRED}", "cgroup-7"):
        make(here.bpffs / name)
    for name in ("tc", "ip", "cilium", UID.upper(), f"{UID}~older", f"x{UID}", f"pod{UID}", "cgroup-0"):
        make(here.bpffs / name)
    here.bpffs.joinpath("f" * 32).touch()
    here.bpffs.joinpath("e" * 32).symlink_to(here.bpffs / UID)
    assert [found.uid for found in here.limiters() if isinstance(found, Broken)] == [OTHER_UID, UID, "cgroup-7"]


@pytest.mark.parametrize(
    ("name", "pins", "reason"),
    [
        (UID, (), "counters is missing: attach the pod again to replace it, or detach it"),
        (UID, ("counters", "egress", "egress_link", "limits"), "identity is missing: attach the pod again"),
        (UID, ("their_map",), "not made by bpfrl: look at it, and remove it"),
        (UID, ("egress", "their_map"), "not made by bpfrl"),
        (f"{UID}{limiter.STAGED}", ("egress",), "attach or detach was cut off: repeat it"),
        (f"{UID}{limiter.RETIRED}", (), "attach or detach was cut off: repeat it"),
    ],
)
def test_what_is_no_whole_limiter_is_listed_with_what_is_wrong(
    here: Agent, name: str, pins: tuple[str, ...], reason: str
) -> None:
    folder = make(here.bpffs / name)
    for pin in pins:
        folder.joinpath(pin).touch()
    [found] = here.limiters()
    assert isinstance(found, Broken)
    assert found.uid == UID
    assert reason in found.reason


@pytest.mark.parametrize("error", [PermissionDeniedError("this needs root"), PermissionError(13, "Permission denied")])
def test_want_of_privileges_is_no_broken_limiter(
    here: Agent, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_: Path) -> None:
        raise error

    make(here.bpffs / UID)
    monkeypatch.setattr(module, "Limiter", refuse)
    with pytest.raises(PermissionDeniedError, match="this needs root"):
        here.limiters()


@pytest.mark.parametrize("error", [OSError(2, "No such file"), KernelError("cannot read"), BrokenLimiterError("other")])
def test_a_limiter_that_goes_while_it_is_looked_at_spoils_no_list(
    here: Agent, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: Path) -> None:
        raise error

    make(here.bpffs / UID)
    monkeypatch.setattr(module, "Limiter", fail)
    assert here.limiters() == [Broken(UID, str(error))]


def test_sweeping_detaches_those_whose_cgroup_is_gone_and_no_other(
    here: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {UID: status(UID, 0), "cgroup-7": status("cgroup-7", 7), OTHER_UID: Broken(OTHER_UID, "cut off")}
    for uid in found:
        make(here.bpffs / uid)
    monkeypatch.setattr(here, "_look", found.__getitem__)
    assert here.sweep() == [UID]
    assert sorted(path.name for path in here.bpffs.iterdir()) == [OTHER_UID, "cgroup-7"]


@pytest.mark.parametrize("marks", [(limiter.STAGED,), (limiter.RETIRED,), (limiter.STAGED, limiter.RETIRED)])
@pytest.mark.parametrize("pins", [(), ("egress", "state")])
def test_sweeping_removes_what_was_cut_off_and_keeps_the_limiter_beside_it(
    here: Agent, monkeypatch: pytest.MonkeyPatch, marks: tuple[str, ...], pins: tuple[str, ...]
) -> None:
    for mark in marks:
        folder = make(here.bpffs / f"{UID}{mark}")
        for pin in pins:
            folder.joinpath(pin).touch()
    rest = [make(here.bpffs / name) for name in (OTHER_UID, UID, "cilium", "theirs~new")]
    found = {UID: status(UID, 7), OTHER_UID: status(OTHER_UID, 8)}
    monkeypatch.setattr(here, "_look", found.__getitem__)
    assert here.sweep() == [UID]
    assert sorted(here.bpffs.iterdir()) == sorted(rest)
    assert here.sweep() == []


def test_sweeping_removes_a_limiter_that_was_cut_off_and_whose_cgroup_is_gone_once(
    here: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(here.bpffs / UID)
    make(here.bpffs / f"{UID}{limiter.STAGED}")
    monkeypatch.setattr(here, "_look", {UID: status(UID, 0)}.__getitem__)
    assert here.sweep() == [UID]
    assert list(here.bpffs.iterdir()) == []


TROUBLE: dict[str, Callable[[Path], object]] = {
    "what was cut off holds theirs too": lambda folder: make(folder.with_name(f"{folder.name}~new") / "theirs"),
    "what was cut off is a link": lambda folder: folder.with_name(f"{folder.name}~old").symlink_to("nowhere"),
    "the limiter holds theirs too": lambda folder: folder.joinpath("theirs").mkdir(),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_sweeping_goes_on_past_one_that_cannot_be_swept_and_says_so(
    here: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Callable[[Path], object]
) -> None:
    found = {OTHER_UID: status(OTHER_UID, 0), UID: status(UID, 0), "cgroup-7": status("cgroup-7", 0)}
    for uid in found:
        make(here.bpffs / uid)
    trouble(here.bpffs / OTHER_UID)
    monkeypatch.setattr(here, "_look", found.__getitem__)
    assert here.sweep() == [UID, "cgroup-7"]
    assert {path.name[: len(OTHER_UID)] for path in here.bpffs.iterdir()} == {OTHER_UID}
    assert f"cannot sweep {here.bpffs / OTHER_UID}: " in caplog.text


@pytest.mark.parametrize(
    "error", [KernelError("cannot detach: played"), BrokenLimiterError("played"), IsADirectoryError("played")]
)
def test_sweeping_goes_on_past_one_that_the_kernel_keeps(
    here: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    removed: list[str] = []

    def remove(folder: Path) -> None:
        if folder.name == OTHER_UID:
            raise error
        removed.append(folder.name)

    found = {OTHER_UID: status(OTHER_UID, 0), UID: status(UID, 0)}
    for uid in found:
        make(here.bpffs / uid)
    monkeypatch.setattr(here, "_look", found.__getitem__)
    monkeypatch.setattr(limiter, "remove", remove)
    assert here.sweep() == removed == [UID]
    assert f"cannot sweep {here.bpffs / OTHER_UID}: {error}" in caplog.text


def test_sweeping_without_privileges_says_so(here: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: str) -> Status:
        raise PermissionDeniedError("needs root: played")

    make(here.bpffs / UID)
    monkeypatch.setattr(here, "_look", look)
    with pytest.raises(PermissionDeniedError, match="played"):
        here.sweep()


def test_sweeping_where_nothing_is_mounted_finds_nothing(nowhere: Agent) -> None:
    make(nowhere.bpffs / UID)
    assert nowhere.sweep() == []


# Cooperation: one lock and one bpffs with the limiters; test_cooperation.py has what is done under it.

Cooperation = list[tuple[object, ...]]


@pytest.fixture
def cooperates(here: Agent, monkeypatch: pytest.MonkeyPatch) -> Cooperation:
    """What was done for cooperation, and with which lock held."""
    calls: Cooperation = []

    def held() -> str:
        try:
            with locked(here.bpffs, fcntl.LOCK_SH | fcntl.LOCK_NB):
                return "shared"
        except BlockingIOError:
            return "exclusive"

    def play(name: str, answer: object) -> None:
        def played(*arguments: object) -> object:
            calls.append((name, *arguments, held()))
            return answer

        monkeypatch.setattr(cooperation, name, played)

    for name, answer in (("attach", True), ("detach", True), ("attached", [7, 8]), ("sweep", [9])):
        play(name, answer)
    return calls


def test_cooperation_is_changed_by_one_and_looked_at_by_many(
    here: Agent, tmp_path: Path, cooperates: Cooperation
) -> None:
    assert here.cooperate(tmp_path) is True
    assert here.stop_cooperating(7) is True
    assert here.cooperating() == [7, 8]
    assert cooperates == [
        ("attach", tmp_path, here.bpffs, "exclusive"),
        ("detach", 7, here.bpffs, "exclusive"),
        ("attached", here.bpffs, "shared"),
    ]


def test_sweeping_clears_away_what_is_left_of_cooperation_too_and_names_pods_only(
    here: Agent, cooperates: Cooperation
) -> None:
    assert here.sweep() == []
    assert cooperates == [("sweep", here.bpffs, "exclusive")]


def test_sweeping_goes_on_past_cooperation_that_something_else_made(
    here: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(here.bpffs / "cooperation-7" / "theirs")
    make(here.bpffs / UID)
    monkeypatch.setattr(here, "_look", {UID: status(UID, 0)}.__getitem__)
    assert here.sweep() == [UID]
    assert [path.name for path in here.bpffs.iterdir()] == ["cooperation-7"]
    assert "cannot sweep" in caplog.text


def test_cooperation_is_no_limiter(here: Agent) -> None:
    make(here.bpffs / "cooperation-7")
    make(here.bpffs / "cooperation-7~new")
    assert here.limiters() == []


def test_where_nothing_is_mounted_nobody_cooperates_and_nothing_is_mounted_for_it(
    nowhere: Agent, tmp_path: Path
) -> None:
    make(nowhere.bpffs / "cooperation-7")
    for agent in (nowhere, Agent(tmp_path / "absent")):
        assert agent.cooperating() == []
        assert agent.stop_cooperating(7) is False
    assert (nowhere.bpffs / "cooperation-7").exists()
    assert not nowhere.is_mounted()


def test_cooperation_mounts_a_bpffs_first(here: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def attach(*_: object) -> bool:
        done.append("attach")
        return False

    monkeypatch.setattr(here, "mount", lambda: done.append("mount"))
    monkeypatch.setattr(cooperation, "attach", attach)
    assert here.cooperate(tmp_path) is False
    assert done == ["mount", "attach"]


@pytest.mark.parametrize("error", [KernelError("cannot attach: No such device"), OSError(2, "No such file")])
def test_a_cgroup_that_goes_while_it_begins_to_cooperate_is_told_from_other_trouble(
    here: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pods = make(tmp_path / "kubepods")

    def attach(*_: object) -> bool:
        raise error

    monkeypatch.setattr(cooperation, "attach", attach)
    with pytest.raises(type(error)) as caught:
        here.cooperate(pods)
    assert caught.value is error
    pods.rmdir()
    with pytest.raises(CgroupNotFoundError, match=f"^{pods} has gone"):
        here.cooperate(pods)


# Locks: lookers do not disturb each other, and nobody looks at a change half done.


@contextmanager
def locked(folder: Path, kind: int) -> Iterator[None]:
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, kind)
        yield
    finally:
        os.close(number)


def test_those_who_look_do_not_wait_for_each_other(here: Agent) -> None:
    with locked(here.bpffs, fcntl.LOCK_SH):
        assert here.limiters() == []


@pytest.mark.parametrize("other", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_change_waits_for_everyone_else(here: Agent, other: int) -> None:
    waits_for(here, other, lambda: here.detach(UID))


def test_a_look_waits_for_a_change(here: Agent) -> None:
    waits_for(here, fcntl.LOCK_EX, here.limiters)


@pytest.mark.parametrize("other", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_an_update_waits_for_everyone_else(here: Agent, tmp_path: Path, plays: Plays, other: int) -> None:
    plays(Pinned(tmp_path))
    waits_for(here, other, lambda: here.update(UID, FAST))


def test_whether_a_limiter_runs_waits_for_a_change_only(here: Agent, tmp_path: Path, plays: Plays) -> None:
    pinned = Pinned(tmp_path)
    plays(pinned)
    with locked(here.bpffs, fcntl.LOCK_SH):
        assert here.runs(POD, tmp_path, pinned.build)
    waits_for(here, fcntl.LOCK_EX, lambda: here.runs(POD, tmp_path, pinned.build))


def waits_for(here: Agent, other: int, call: Callable[[], object]) -> None:
    ended = threading.Event()

    def run() -> None:
        call()
        ended.set()

    thread = threading.Thread(target=run)
    with locked(here.bpffs, other):
        thread.start()
        assert not ended.wait(0.1)
    assert ended.wait(30)
    thread.join()


@pytest.mark.parametrize("name", ["limiters", "sweep"])
def test_waiting_for_what_hangs_ends(here: Agent, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    with locked(here.bpffs, fcntl.LOCK_EX), pytest.raises(KernelError, match=f"another process holds {here.bpffs}"):
        getattr(here, name)()


def test_an_error_lets_go_of_the_lock(here: Agent, tmp_path: Path) -> None:
    make(here.bpffs / UID).joinpath("their_map").touch()
    with pytest.raises(BrokenLimiterError):
        here.attach(generator.generate(None, SLOW), POD, tmp_path)
    with locked(here.bpffs, fcntl.LOCK_EX | fcntl.LOCK_NB):
        pass


def test_the_limiters_of_a_bpffs_that_one_may_not_enter_need_root(here: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    for call in (
        here.limiters,
        here.sweep,
        lambda: here.detach(UID),
        lambda: here.update(UID, SLOW),
        lambda: here.runs(POD, here.bpffs, b""),
        lambda: here.cooperate(here.bpffs),
        lambda: here.stop_cooperating(7),
        here.cooperating,
    ):
        with pytest.raises(PermissionDeniedError, match=f"^cannot open {here.bpffs}: this needs root$"):
            call()
