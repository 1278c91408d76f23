from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from bpfrl import cgroup
from bpfrl.cgroup import CgroupTree, Search
from bpfrl.errors import AmbiguousCgroupError, CgroupNotFoundError, InvalidValueError, PermissionDeniedError
from bpfrl.mounts import mounts
from tests.unit.conftest import make

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
OTHER_UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f11"
STATIC_UID = "0123456789abcdef0123456789abcdef"
SLICE = UID.replace("-", "_")

KIND = "kubelet.slice/kubelet-kubepods.slice"
DOCKER = f"system.slice/docker-{'ab' * 32}.scope"

# Every layout that the module's documentation names: the pod's folder, and its UID where that is not UID.
LAYOUTS = {
    "systemd guaranteed": f"kubepods.slice/kubepods-pod{SLICE}.slice",
    "systemd burstable": f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice",
    "systemd besteffort": f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice",
    "kind guaranteed": f"{KIND}/kubelet-kubepods-pod{SLICE}.slice",
    "kind burstable": f"{KIND}/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{SLICE}.slice",
    "kind besteffort": f"{KIND}/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{SLICE}.slice",
    "kind in docker": f"{DOCKER}/{KIND}/kubelet-kubepods-pod{SLICE}.slice",
    "systemd in docker": f"{DOCKER}/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice",
    "cgroupfs guaranteed": f"kubepods/pod{UID}",
    "cgroupfs burstable": f"kubepods/burstable/pod{UID}",
    "cgroupfs besteffort": f"kubepods/besteffort/pod{UID}",
    "cgroupfs nested": f"kubelet/kubepods/pod{UID}",
    "cgroupfs nested besteffort": f"kubelet/kubepods/besteffort/pod{UID}",
    "cgroupfs in docker": f"{DOCKER}/kubelet/kubepods/burstable/pod{UID}",
    "cgroupfs in another slice": f"foo.slice/kubepods/besteffort/pod{UID}",
}
STATIC_LAYOUTS = {
    "systemd": f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC_UID}.slice",
    "kind": f"{KIND}/kubelet-kubepods-pod{STATIC_UID}.slice",
    "cgroupfs": f"kubepods/burstable/pod{STATIC_UID}",
}
# Folders that look like the pod's, and are none that a kubelet makes.
STRANGERS = {
    "not under a parent": f"kubepods-pod{SLICE}.slice",
    "a slice of another service": f"user.slice/user-pod{SLICE}.slice",
    "dashes under systemd": f"kubepods.slice/kubepods-pod{UID}.slice",
    "underlines under cgroupfs": f"kubepods/pod{SLICE}",
    "another class's prefix": f"kubepods.slice/kubepods-burstable.slice/kubepods-pod{SLICE}.slice",
    "no such class": f"kubepods/guaranteed/pod{UID}",
    "a class outside kubepods": f"burstable/pod{UID}",
    "a class's slice outside kubepods": f"besteffort.slice/besteffort-pod{SLICE}.slice",
    "no such class's slice": f"kubepods.slice/kubepods-extra.slice/kubepods-extra-pod{SLICE}.slice",
    "a slice below a class": f"kubepods.slice/kubepods-burstable-extra.slice/kubepods-burstable-extra-pod{SLICE}.slice",
    "a name that ends in kubepods": f"mykubepods/pod{UID}",
    "a scope": f"kubepods.slice/kubepods-pod{SLICE}.scope",
    "another pod": f"kubepods/pod{OTHER_UID}",
}


def tree(root: Path, *folders: str) -> CgroupTree:
    for folder in folders:
        make(root / folder)
    return CgroupTree(root)


@pytest.mark.parametrize("folder", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pod_is_found_in_every_layout_of_the_kubelet(tmp_path: Path, folder: str) -> None:
    assert tree(tmp_path, folder).find(UID) == tmp_path / folder


@pytest.mark.parametrize("folder", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pods_uid_is_told_in_every_layout_of_the_kubelet(tmp_path: Path, folder: str) -> None:
    assert tree(tmp_path, folder, *map("x.slice/{}".format, LAYOUTS.values())).uids() == [UID]


@pytest.mark.parametrize("folder", STATIC_LAYOUTS.values(), ids=STATIC_LAYOUTS)
def test_a_static_pods_uid_is_told_too(tmp_path: Path, folder: str) -> None:
    assert tree(tmp_path, folder, LAYOUTS["systemd burstable"]).uids() == [STATIC_UID, UID]


@pytest.mark.parametrize("folder", [folder for folder in STRANGERS.values() if OTHER_UID not in folder])
def test_what_is_no_pods_folder_has_no_uid(tmp_path: Path, folder: str) -> None:
    (tmp_path / "kubepods.slice").mkdir()
    (tmp_path / "kubepods.slice" / "kubepods-pod1234.slice").mkdir()
    (tmp_path / "kubepods.slice" / f"kubepods-pod{SLICE}.slice").touch()
    assert tree(tmp_path, folder).uids() == []


@pytest.mark.parametrize("folder", STATIC_LAYOUTS.values(), ids=STATIC_LAYOUTS)
def test_a_static_pod_is_found_by_the_hash_of_its_manifest(tmp_path: Path, folder: str) -> None:
    assert tree(tmp_path, folder).find(STATIC_UID) == tmp_path / folder


@pytest.mark.parametrize("folder", LAYOUTS.values(), ids=LAYOUTS)
def test_the_root_may_itself_be_the_folder_that_holds_pods(tmp_path: Path, folder: str) -> None:
    pod = make(tmp_path / folder)
    assert CgroupTree(pod.parent).find(UID) == pod


@pytest.mark.parametrize("folder", STRANGERS.values(), ids=STRANGERS)
def test_what_no_kubelet_makes_is_not_taken_for_the_pod(tmp_path: Path, folder: str) -> None:
    with pytest.raises(
        CgroupNotFoundError, match=rf"no cgroup for pod {UID} under {tmp_path}: is it running on this node\?$"
    ):
        tree(tmp_path, folder).find(UID)


# What holds the pods of each layout, from above.
TOPS = {
    name: next(above for above in Path(pod).parents[::-1] if above.name.removesuffix(".slice").endswith("kubepods"))
    for name, pod in LAYOUTS.items()
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_holds_all_pods_is_found_in_every_layout_of_the_kubelet(tmp_path: Path, layout: str) -> None:
    assert tree(tmp_path, LAYOUTS[layout]).tops() == [tmp_path / TOPS[layout]]
    assert CgroupTree(tmp_path / TOPS[layout]).tops() == [tmp_path / TOPS[layout]]


def test_what_holds_all_pods_is_one_folder_whatever_the_classes(tmp_path: Path) -> None:
    here = tree(tmp_path, *(folder for name, folder in LAYOUTS.items() if name.startswith(("systemd", "cgroupfs"))))
    found = here.tops()
    assert len(found) == len(set(found))
    assert set(found) == {tmp_path / top for name, top in TOPS.items() if name.startswith(("systemd", "cgroupfs"))}


def test_where_no_pods_are_nothing_holds_them(tmp_path: Path) -> None:
    assert tree(tmp_path, "system.slice/backup.service", "mykubepods", "burstable").tops() == []


def test_what_a_pod_makes_below_itself_holds_no_pods(tmp_path: Path) -> None:
    here = tree(tmp_path, f"{LAYOUTS['systemd burstable']}/x/kubepods/pod{OTHER_UID}")
    assert here.tops() == [tmp_path / "kubepods.slice"]


def test_what_holds_all_pods_may_come_later_and_go(tmp_path: Path) -> None:
    here = CgroupTree(tmp_path)
    assert here.tops() == []
    top = make(tmp_path / "kubepods")
    assert here.tops() == [top]
    top.rmdir()
    assert here.tops() == []


def test_a_file_is_no_cgroup(tmp_path: Path) -> None:
    make(tmp_path / "kubepods").joinpath(f"pod{UID}").touch()
    with pytest.raises(CgroupNotFoundError, match="no cgroup"):
        CgroupTree(tmp_path).find(UID)


def test_one_pod_is_told_from_its_neighbours(tmp_path: Path) -> None:
    here = tree(tmp_path, LAYOUTS["systemd burstable"], f"kubepods/pod{OTHER_UID}", f"kubepods/pod{STATIC_UID}")
    assert here.find(UID) == tmp_path / LAYOUTS["systemd burstable"]
    assert here.find(OTHER_UID) == tmp_path / f"kubepods/pod{OTHER_UID}"
    assert here.find(STATIC_UID) == tmp_path / f"kubepods/pod{STATIC_UID}"


def test_two_candidates_are_an_error_that_names_both_and_not_waited_for(tmp_path: Path) -> None:
    folders = (LAYOUTS["systemd guaranteed"], LAYOUTS["kind in docker"])
    here = tree(tmp_path, *folders)
    for look in (here.find, partial(here.wait, seconds=60)):
        with pytest.raises(AmbiguousCgroupError, match=r"several cgroups.*--cgroup") as caught:
            look(UID)
        for folder in folders:
            assert str(tmp_path / folder) in str(caught.value)


def test_a_class_that_gets_its_first_pod_later_is_still_found(tmp_path: Path) -> None:
    here = tree(tmp_path, LAYOUTS["systemd guaranteed"].replace(SLICE, OTHER_UID.replace("-", "_")))
    here.find(OTHER_UID)
    make(tmp_path / LAYOUTS["systemd besteffort"])
    assert here.find(UID) == tmp_path / LAYOUTS["systemd besteffort"]


def test_a_class_that_goes_and_comes_back_is_still_found(tmp_path: Path) -> None:
    here = tree(tmp_path, LAYOUTS["cgroupfs burstable"])
    pod = here.find(UID)
    pod.rmdir()
    pod.parent.rmdir()
    with pytest.raises(CgroupNotFoundError):
        here.find(UID)
    make(pod)
    assert here.find(UID) == pod


def test_a_pod_that_changes_its_class_is_found_where_it_is_now(tmp_path: Path) -> None:
    here = tree(tmp_path, LAYOUTS["cgroupfs burstable"])
    here.find(UID).rmdir()
    make(tmp_path / LAYOUTS["cgroupfs guaranteed"])
    assert here.find(UID) == tmp_path / LAYOUTS["cgroupfs guaranteed"]


@pytest.mark.parametrize("pod", [LAYOUTS["systemd burstable"], LAYOUTS["cgroupfs guaranteed"]])
def test_what_a_pod_makes_below_itself_is_not_searched(tmp_path: Path, pod: str) -> None:
    inner = f"{pod}/cri-containerd-1.scope/kubepods/pod{OTHER_UID}"
    here = tree(tmp_path, inner)
    assert here.find(UID) == tmp_path / pod
    with pytest.raises(CgroupNotFoundError, match="no cgroup"):
        here.find(OTHER_UID)


def test_a_pod_cannot_pass_for_another_by_what_it_makes_below_itself(tmp_path: Path) -> None:
    victim, pretender = LAYOUTS["kind burstable"], f"{LAYOUTS['kind guaranteed']}/x/kubepods/pod{OTHER_UID}"
    here = tree(tmp_path, victim.replace(SLICE, OTHER_UID.replace("-", "_")), pretender)
    assert here.find(OTHER_UID) == tmp_path / victim.replace(SLICE, OTHER_UID.replace("-", "_"))


def test_later_looks_for_known_parents_walk_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tree(tmp_path, LAYOUTS["systemd burstable"])
    here.find(UID)
    monkeypatch.setattr(os, "walk", None)
    make(tmp_path / LAYOUTS["systemd burstable"].replace(SLICE, OTHER_UID.replace("-", "_")))
    assert here.find(UID).name.endswith(f"pod{SLICE}.slice")
    assert OTHER_UID.replace("-", "_") in here.find(OTHER_UID).name


def test_waiting_ends_when_the_kubelet_makes_the_cgroup(tmp_path: Path) -> None:
    here = CgroupTree(tmp_path)
    pod = tmp_path / LAYOUTS["systemd burstable"]
    kubelet = threading.Timer(0.1, make, [pod])
    kubelet.start()
    try:
        assert here.wait(UID, 30) == pod
    finally:
        kubelet.join()


def test_a_pod_that_is_there_is_not_waited_for(tmp_path: Path) -> None:
    here = tree(tmp_path, LAYOUTS["cgroupfs guaranteed"])
    started = time.monotonic()
    assert here.wait(UID, 60).is_dir()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("seconds", [0.0, 0.1, float("nan"), -1.0])
def test_waiting_ends_without_the_pod_when_the_time_is_over(tmp_path: Path, seconds: float) -> None:
    started = time.monotonic()
    with pytest.raises(CgroupNotFoundError, match="no cgroup"):
        CgroupTree(tmp_path).wait(UID, seconds)
    assert not time.monotonic() - started < seconds


class Clock:
    """Time that passes only where somebody sleeps, and in which something may happen."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.plans: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        for plan in self.plans[:]:
            when, do = plan
            if self.now >= when:
                self.plans.remove(plan)
                do()

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.plans.append((self.now + seconds, do))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    played = Clock()
    monkeypatch.setattr(cgroup, "time", played)
    return played


@pytest.fixture
def walks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the whole tree was walked."""
    walked: list[float] = []
    real = cgroup._parents

    def parents(root: Path) -> Iterator[Path]:
        walked.append(clock.now)
        return real(root)

    monkeypatch.setattr(cgroup, "_parents", parents)
    return walked


@pytest.mark.parametrize(
    ("beside", "made_after", "longest"),
    [
        # Beside other pods it is found within a tenth of the time that it took, elsewhere with the next walk.
        (True, 0.001, 0.002),
        (True, 0.05, 0.007),
        (True, 0.4, 0.05),
        (True, 7.0, 0.1),
        (False, 0.05, 0.5),
        (False, 0.7, 0.4),
        (False, 7.2, 0.5 + 0.1),
    ],
)
def test_a_pod_that_appears_later_is_found_soon(
    tmp_path: Path, clock: Clock, beside: bool, made_after: float, longest: float
) -> None:
    if beside:
        make(tmp_path / f"kubepods/pod{OTHER_UID}")
    pod = tmp_path / f"kubepods/pod{UID}"
    due = clock.now + made_after
    clock.after(made_after, lambda: make(pod))
    search = Search(CgroupTree(tmp_path), UID, 30)
    while (found := search.look()) is None:
        clock.sleep(search.pause())
    assert found == pod
    assert 0 <= clock.now - due < longest + 1e-9


@pytest.mark.parametrize("seconds", [0.001, 0.3, 5.0, 60.0])
def test_pauses_grow_to_a_tenth_of_a_second_and_never_reach_beyond_the_end(
    tmp_path: Path, clock: Clock, seconds: float
) -> None:
    end = clock.now + seconds
    with pytest.raises(CgroupNotFoundError, match=f"no cgroup for pod {UID}"):
        CgroupTree(tmp_path).wait(UID, seconds)
    assert clock.now == pytest.approx(end)
    # What floats leave of the time comes after the last pause proper.
    *growing, _ = [pause for pause in clock.slept if pause > 1e-6]
    assert growing == sorted(growing)
    assert clock.slept[0] == pytest.approx(min(0.002, seconds))
    assert max(clock.slept) <= 0.1
    assert (max(clock.slept) == 0.1) == (seconds > 1.1)


def test_a_pause_that_is_overslept_leaves_one_last_look(tmp_path: Path, clock: Clock) -> None:
    search = Search(CgroupTree(tmp_path), UID, 1)
    assert search.look() is None
    clock.sleep(100)
    assert search.pause() == 0
    with pytest.raises(CgroupNotFoundError, match="no cgroup"):
        search.look()


@pytest.mark.usefixtures("clock")
def test_the_whole_tree_is_walked_at_most_twice_a_second(tmp_path: Path, walks: list[float]) -> None:
    with pytest.raises(CgroupNotFoundError):
        CgroupTree(tmp_path).wait(UID, 10)
    assert walks[0] == 1000
    between = [after - before for before, after in pairwise(walks)]
    assert all(0.5 <= pause <= 0.6 + 1e-9 for pause in between)
    assert len(walks) >= 10 / 0.6


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_without_time_a_search_is_one_look_everywhere(
    tmp_path: Path, clock: Clock, walks: list[float], seconds: float
) -> None:
    with pytest.raises(CgroupNotFoundError, match="no cgroup"):
        CgroupTree(tmp_path).wait(UID, seconds)
    assert (len(walks), clock.slept) == (1, [])
    pod = make(tmp_path / LAYOUTS["kind burstable"])
    assert CgroupTree(tmp_path).wait(UID, seconds) == pod
    assert (len(walks), clock.slept) == (2, [])


def test_many_that_wait_walk_the_tree_no_more_often_than_one(tmp_path: Path, clock: Clock, walks: list[float]) -> None:
    here = CgroupTree(tmp_path)
    searches = [Search(here, UID, 10) for _ in range(100)]
    assert [search.look() for search in searches] == [None] * 100
    assert len(walks) == 1
    clock.now += 0.5
    pod = make(tmp_path / LAYOUTS["systemd besteffort"])
    assert [search.look() for search in searches] == [pod] * 100
    assert len(walks) == 2


def test_a_look_without_a_survey_sees_known_parents_only(tmp_path: Path, walks: list[float]) -> None:
    here = tree(tmp_path, f"kubepods/pod{OTHER_UID}", LAYOUTS["kind burstable"])
    with pytest.raises(CgroupNotFoundError):
        here.find(OTHER_UID, survey=False)
    assert walks == []
    here.find(OTHER_UID)
    assert here.find(UID, survey=False) == tmp_path / LAYOUTS["kind burstable"]
    make(tmp_path / f"kubepods/burstable/pod{STATIC_UID}")
    with pytest.raises(CgroupNotFoundError):
        here.find(STATIC_UID, survey=False)
    assert len(walks) == 1


# Tables as the kernel writes them, and where pods are to be looked for.
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = """31 23 0:28 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"""
BIND = "50 30 0:26 /kubepods.slice /k rw - cgroup2 cgroup2 rw"
MOUNT_POINTS = {
    "unified": (UNIFIED, "/sys/fs/cgroup"),
    "hybrid": (HYBRID, "/sys/fs/cgroup/unified"),
    "a bind mount of a part, before": (f"{BIND}\n{UNIFIED}", "/sys/fs/cgroup"),
    "a bind mount of a part, after": (f"{UNIFIED}\n{BIND}", "/sys/fs/cgroup"),
    "only a part": (BIND, "/k"),
    "twice": (f"60 1 0:26 / /var/lib/x/cgroup rw - cgroup2 c rw\n{UNIFIED}", "/sys/fs/cgroup"),
    "escaped": (r"30 23 0:26 / /my\040groups/all\134of\011them rw - cgroup2 cgroup2 rw", "/my groups/all\\of\tthem"),
}

Tables = Callable[[str], None]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """Lets the cgroup module read a table of mounts that a test has written."""

    def use(text: str) -> None:
        path = tmp_path / "mountinfo"
        path.write_text(f"{text}\n")
        monkeypatch.setattr(cgroup, "mounts", partial(mounts, table=path))

    return use


@pytest.mark.parametrize(("text", "path"), MOUNT_POINTS.values(), ids=MOUNT_POINTS)
def test_cgroup_v2_is_found_wherever_it_is_mounted(tables: Tables, text: str, path: str) -> None:
    tables(text)
    assert cgroup.mount_point() == Path(path)
    assert CgroupTree().root == Path(path)


def test_without_cgroup_v2_the_error_says_how_to_mount_it(tables: Tables) -> None:
    tables("32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu")
    with pytest.raises(CgroupNotFoundError, match="mount -t cgroup2"):
        CgroupTree()


def on_device_of(path: Path) -> str:
    device = path.stat().st_dev
    return f"30 23 {os.major(device)}:{os.minor(device)} / {path} rw - cgroup2 cgroup2 rw"


def test_a_folder_on_cgroup_v2_passes_the_check(tmp_path: Path, tables: Tables) -> None:
    tables(on_device_of(tmp_path))
    assert cgroup.check(make(tmp_path / "a" / "b")) == tmp_path / "a" / "b"


def test_a_folder_on_another_file_system_is_refused_with_where_to_look(tmp_path: Path, tables: Tables) -> None:
    tables(UNIFIED.replace("0:26", "0:4000000"))
    with pytest.raises(InvalidValueError, match=rf"'{tmp_path}' is no cgroup v2 folder: take one below /sys/fs/cgroup"):
        cgroup.check(tmp_path)


def test_a_file_in_a_cgroup_is_refused(tmp_path: Path, tables: Tables) -> None:
    tables(on_device_of(tmp_path))
    procs = tmp_path / "cgroup.procs"
    procs.touch()
    with pytest.raises(InvalidValueError, match="is no cgroup v2 folder"):
        cgroup.check(procs)


@pytest.mark.parametrize(
    ("name", "reason"), [("absent", "No such file"), ("file/below", "Not a directory"), ("x" * 300, "name too long")]
)
def test_a_path_that_leads_nowhere_is_refused_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    tmp_path.joinpath("file").touch()
    with pytest.raises(InvalidValueError, match=f"is no cgroup: .*{reason}"):
        cgroup.check(tmp_path / name)


def test_the_kernel_knows_a_cgroup_by_its_inode(tmp_path: Path) -> None:
    assert cgroup.id_of(tmp_path) == tmp_path.stat().st_ino


def test_each_network_namespace_of_a_cgroups_processes_is_opened_once(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for folder, pids in {"": [], "a": [os.getpid()], "a/b": [ended.pid, os.getpid()], "c": [os.getpid()]}.items():
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        path.joinpath("cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    make(tmp_path / "without procs")
    before = set(os.listdir("/proc/self/fd"))
    [found] = cgroup.open_network_namespaces(tmp_path)
    try:
        assert os.fstat(found).st_ino == Path("/proc/self/ns/net").stat().st_ino
    finally:
        os.close(found)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("tables", "found"),
    [
        (("sockets: used 2\nTCP: inuse 0 orphan 9 tw 3\nUDP: inuse 1\n", "TCP6: inuse 0\nUDP6: inuse 7\n"), 0),
        (("sockets: used 2\nTCP: inuse 1 orphan 0 tw 0\n", "TCP6: inuse 0\n"), 1),
        (("sockets: used 2\nTCP: inuse 0 orphan 0 tw 0\n", "TCP6: inuse 12\n"), 1),
        (("TCP: inuse 0 orphan 0 tw 0\n", None), 1),
        ((None, None), 1),
        (("something else\n", "TCP6: inuse 0\n"), 1),
    ],
)
def test_namespaces_that_have_no_tcp_sockets_for_certain_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: tuple[str | None, str | None], found: int
) -> None:
    tmp_path.joinpath("cgroup.procs").write_text(f"{os.getpid()}\n")
    told = dict(zip((f"/proc/{os.getpid()}/net/{name}" for name in ("sockstat", "sockstat6")), tables, strict=True))
    read = Path.read_text

    def play(path: Path) -> str:
        if str(path) not in told:
            return read(path)
        if (text := told[str(path)]) is None:
            raise FileNotFoundError(2, os.strerror(2), str(path))
        return text

    monkeypatch.setattr(Path, "read_text", play)
    before = set(os.listdir("/proc/self/fd"))
    numbers = cgroup.open_network_namespaces(tmp_path, with_tcp=True)
    assert len(numbers) == found
    for number in numbers:
        os.close(number)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_cgroup_without_processes_or_gone_has_no_namespaces(tmp_path: Path) -> None:
    tmp_path.joinpath("cgroup.procs").touch()
    assert cgroup.open_network_namespaces(tmp_path) == []
    assert cgroup.open_network_namespaces(tmp_path / "gone") == []


def test_processes_of_another_pid_namespace_are_not_taken_for_none(tmp_path: Path) -> None:
    tmp_path.joinpath("cgroup.procs").write_text("0\n0\n")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionDeniedError, match="hostPID"):
        cgroup.open_network_namespaces(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_hidden_processes_are_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was opened of others by then is closed again."""
    hidden = os.getppid()
    tmp_path.joinpath("cgroup.procs").write_text(f"{os.getpid()}\n{hidden}\n")
    opened = os.open

    def refuse(path: str, *arguments: int) -> int:
        if path == f"/proc/{hidden}/ns/net":
            raise PermissionError(13, os.strerror(13), path)
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionDeniedError, match=rf"process {hidden} is hidden: this needs root \(CAP_SYS_PTRACE\)"):
        cgroup.open_network_namespaces(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before
