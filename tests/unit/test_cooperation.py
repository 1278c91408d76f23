"""What is pinned for cooperation, and what is left of it, in a kernel that is only played (fakes.Kernel)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bpfrl import cgroup
from bpfrl.bpf import cooperation, generator, sockets
from bpfrl.bpf.libbpf import Descriptor
from bpfrl.bpf.sockets import Visited
from bpfrl.errors import BrokenLimiterError, CompilerError, KernelError
from tests.unit.conftest import make
from tests.unit.fakes import Kernel, Thing

PINS = {"link", "program", "sockets"}
OLD_TAG = b"\2" * 8


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    played = Kernel()
    played.play(monkeypatch)
    monkeypatch.setattr(generator, "compile_object", lambda source: source.encode())
    return played


@pytest.fixture
def bpffs(tmp_path: Path) -> Path:
    return make(tmp_path / "bpf")


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What passes for the cgroup that holds the pods."""
    path = make(tmp_path / "kubepods")
    monkeypatch.setattr(
        cgroup, "path_of", lambda number: path if path.exists() and cgroup.id_of(path) == number else None
    )
    return path


@pytest.fixture(autouse=True)
def visits(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> list[tuple[object, ...]]:
    """Each visit to the connections that are there: what for, where, and how many links the cgroup had then."""
    made: list[tuple[object, ...]] = []

    def visit(kind: str, storage: Descriptor, path: Path, *callbacks: int) -> Visited:
        assert isinstance(storage, Thing)
        assert kernel.shapes[storage.identifier] == sockets.SHAPE
        made.append((kind, path, *callbacks, len(kernel.attached_to(cgroup.id_of(path)))))
        return Visited(1, 0)

    for kind in ("adopt", "forget"):
        monkeypatch.setattr(sockets, kind, lambda *arguments, kind=kind: visit(kind, *arguments))
    return made


def folder_of(bpffs: Path, path: Path) -> Path:
    return bpffs / f"cooperation-{cgroup.id_of(path)}"


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# Attach.


def test_it_is_whole_and_attached_once_and_reaches_the_connections_that_are_there(
    kernel: Kernel, bpffs: Path, pods: Path, visits: list[tuple[object, ...]]
) -> None:
    assert cooperation.attach(pods, bpffs)
    assert names(bpffs) == {folder_of(bpffs, pods).name}
    assert names(folder_of(bpffs, pods)) == PINS
    assert len(kernel.attached_to(cgroup.id_of(pods))) == 1
    assert cooperation.attached(bpffs) == [cgroup.id_of(pods)]
    assert visits == [("adopt", pods, cooperation._CALLBACKS, 1)]
    assert kernel.loaded == [(b"cooperate.bpf.c", {})]
    assert kernel.left_open() == []


def test_where_it_is_so_already_nothing_is_done(
    kernel: Kernel, bpffs: Path, pods: Path, visits: list[tuple[object, ...]]
) -> None:
    cooperation.attach(pods, bpffs)
    before = dict(kernel.links)
    visits.clear()
    assert not cooperation.attach(pods, bpffs)
    assert (kernel.links, visits) == (before, [])
    assert names(folder_of(bpffs, pods)) == PINS
    assert kernel.left_open() == []


def test_another_versions_program_is_replaced(kernel: Kernel, bpffs: Path, pods: Path) -> None:
    new_tag, kernel.tag_now = kernel.tag_now, OLD_TAG
    cooperation.attach(pods, bpffs)
    kernel.tag_now = new_tag
    assert cooperation.attach(pods, bpffs)
    [link] = kernel.attached_to(cgroup.id_of(pods))
    assert kernel.running[link] == new_tag
    assert names(folder_of(bpffs, pods)) == PINS
    assert names(bpffs) == {folder_of(bpffs, pods).name}
    assert not cooperation.attach(pods, bpffs)


@pytest.mark.parametrize("mark", ["", "~new"])
@pytest.mark.parametrize("pins", [(), ("sockets",), ("sockets", "program"), ("sockets", "program", "link")])
def test_what_a_cut_off_attach_has_left_is_cleared_away(
    kernel: Kernel, bpffs: Path, pods: Path, mark: str, pins: tuple[str, ...]
) -> None:
    cooperation.attach(pods, bpffs)
    whole = folder_of(bpffs, pods)
    for pin in PINS - set(pins):
        (whole / pin).unlink()
    if "link" not in pins:
        kernel.links.clear()
    whole.rename(whole.with_name(whole.name + mark))
    unchanged = not mark and set(pins) == PINS
    assert cooperation.attach(pods, bpffs) is not unchanged
    assert len(kernel.attached_to(cgroup.id_of(pods))) == 1
    assert names(bpffs) == {whole.name}
    assert names(whole) == PINS
    assert kernel.left_open() == []


def test_a_link_that_was_detached_is_made_again(kernel: Kernel, bpffs: Path, pods: Path) -> None:
    cooperation.attach(pods, bpffs)
    kernel.links = dict.fromkeys(kernel.links, 0)
    assert cooperation.attached(bpffs) == []
    assert cooperation.attach(pods, bpffs)
    assert cooperation.attached(bpffs) == [cgroup.id_of(pods)]


@pytest.mark.parametrize("step", ["load", "attach"])
def test_nothing_is_left_of_what_the_kernel_refuses(kernel: Kernel, bpffs: Path, pods: Path, step: str) -> None:
    kernel.refused.add(step)
    with pytest.raises(KernelError, match=f"cannot {step}: played"):
        cooperation.attach(pods, bpffs)
    assert names(bpffs) == set()
    assert kernel.attached_to(cgroup.id_of(pods)) == []
    assert kernel.left_open() == []
    kernel.refused.clear()
    assert cooperation.attach(pods, bpffs)


def test_without_a_compiler_what_is_there_stays(
    kernel: Kernel, bpffs: Path, pods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cooperation.attach(pods, bpffs)

    def fail(_: str) -> bytes:
        raise CompilerError("clang is not installed: played")

    monkeypatch.setattr(generator, "compile_object", fail)
    with pytest.raises(CompilerError, match="played"):
        cooperation.attach(pods, bpffs)
    assert cooperation.attached(bpffs) == [cgroup.id_of(pods)]
    assert len(kernel.attached_to(cgroup.id_of(pods))) == 1


def test_connections_that_cannot_be_reached_are_a_warning(
    bpffs: Path, pods: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Visited:
        raise KernelError("no iterators: played")

    monkeypatch.setattr(sockets, "adopt", fail)
    assert cooperation.attach(pods, bpffs)
    assert "connections that were there before do not cooperate: no iterators: played" in caplog.text
    assert cooperation.attached(bpffs) == [cgroup.id_of(pods)]


def test_a_kernel_that_lacks_the_option_is_a_warning(
    bpffs: Path, pods: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "adopt", lambda *_: Visited(0, 3))
    assert cooperation.attach(pods, bpffs)
    assert "connections that were there before do not cooperate: the kernel lacks the option" in caplog.text


def test_it_shares_the_map_that_a_limiter_has_pinned(kernel: Kernel, bpffs: Path, pods: Path) -> None:
    with kernel.make("map") as storage:
        kernel.shapes[storage.identifier] = sockets.SHAPE
        storage.pin(make(bpffs / "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10") / sockets.STORAGE)
    cooperation.attach(pods, bpffs)
    assert [taken for _, taken in kernel.loaded] == [{sockets.STORAGE: storage.identifier}]
    assert (folder_of(bpffs, pods) / sockets.STORAGE).read_text() == f"map {storage.identifier}"
    assert kernel.left_open() == []


# Detach.


def test_detaching_stops_it_and_then_lets_senders_forget(
    kernel: Kernel, bpffs: Path, pods: Path, visits: list[tuple[object, ...]]
) -> None:
    cooperation.attach(pods, bpffs)
    bystander = make(bpffs / f"cooperation-{cgroup.id_of(pods) + 1}")
    visits.clear()
    assert cooperation.detach(cgroup.id_of(pods), bpffs)
    assert kernel.attached_to(cgroup.id_of(pods)) == []
    # No link was there any more when they forgot, or they would have been told again.
    assert visits == [("forget", pods, 0)]
    assert list(bpffs.iterdir()) == [bystander]
    assert not cooperation.detach(cgroup.id_of(pods), bpffs)
    assert kernel.left_open() == []


def test_detaching_where_the_cgroup_is_gone_forgets_nothing(
    bpffs: Path, pods: Path, visits: list[tuple[object, ...]]
) -> None:
    cooperation.attach(pods, bpffs)
    number = cgroup.id_of(pods)
    visits.clear()
    pods.rmdir()
    assert cooperation.detach(number, bpffs)
    assert (visits, names(bpffs)) == ([], set())


def test_senders_that_cannot_forget_are_a_warning(
    kernel: Kernel, bpffs: Path, pods: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Visited:
        raise KernelError("no iterators: played")

    cooperation.attach(pods, bpffs)
    monkeypatch.setattr(sockets, "forget", fail)
    assert cooperation.detach(cgroup.id_of(pods), bpffs)
    assert "connections keep the rate that was asked for until the next ACKs: no iterators: played" in caplog.text
    assert kernel.attached_to(cgroup.id_of(pods)) == []
    assert names(bpffs) == set()


@pytest.mark.parametrize("pins", [(), ("link",), ("program", "sockets")])
def test_detaching_removes_what_is_left_of_one_that_was_cut_off(bpffs: Path, pods: Path, pins: tuple[str, ...]) -> None:
    cooperation.attach(pods, bpffs)
    whole = folder_of(bpffs, pods)
    for pin in PINS - set(pins):
        (whole / pin).unlink()
    whole.rename(whole.with_name(whole.name + "~new"))
    assert cooperation.detach(cgroup.id_of(pods), bpffs)
    assert names(bpffs) == set()


# List and sweep.

STRANGERS = ("cooperation", "cooperation-", "cooperation-x", "cooperation-7~old", "xcooperation-7", "cooperation-7\n")


def test_sweeping_removes_what_was_cut_off_and_whose_cgroup_is_gone_and_no_other(
    kernel: Kernel, bpffs: Path, tmp_path: Path
) -> None:
    whole, gone, cut = (make(tmp_path / name) for name in ("whole", "gone", "cut"))
    for each in (whole, gone, cut):
        cooperation.attach(each, bpffs)
    for link in kernel.attached_to(cgroup.id_of(gone)):
        kernel.links[link] = 0  # the kernel does that
    folder_of(bpffs, cut).rename(bpffs / f"{folder_of(bpffs, cut).name}~new")
    rest = {folder_of(bpffs, whole).name, *STRANGERS, "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"}
    for name in rest - {folder_of(bpffs, whole).name}:
        make(bpffs / name)
    assert cooperation.attached(bpffs) == [cgroup.id_of(whole)]
    assert sorted(cooperation.sweep(bpffs)) == sorted(cgroup.id_of(each) for each in (gone, cut))
    assert names(bpffs) == rest
    # Not even one whose link was in force.
    assert kernel.attached_to(cgroup.id_of(cut)) == []
    assert len(kernel.attached_to(cgroup.id_of(whole))) == 1
    assert cooperation.sweep(bpffs) == []
    assert kernel.left_open() == []


def test_several_cgroups_may_cooperate(bpffs: Path, tmp_path: Path) -> None:
    both = [make(tmp_path / name) for name in ("one", "other")]
    for each in both:
        cooperation.attach(each, bpffs)
    assert cooperation.attached(bpffs) == sorted(map(cgroup.id_of, both))
    cooperation.detach(cgroup.id_of(both[0]), bpffs)
    assert cooperation.attached(bpffs) == [cgroup.id_of(both[1])]


def test_sweeping_goes_on_past_what_something_else_made(bpffs: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("theirs", "link"):
        make(bpffs / f"cooperation-{len(name)}" / name)
    (bpffs / "cooperation-8").touch()
    make(bpffs / "cooperation-9")
    assert cooperation.sweep(bpffs) == [9]
    assert names(bpffs) == {"cooperation-4", "cooperation-6", "cooperation-8"}
    assert (bpffs / "cooperation-6" / "theirs").is_dir()
    for number in (4, 6):
        assert f"cannot sweep {bpffs / f'cooperation-{number}'}: " in caplog.text
    assert cooperation.attached(bpffs) == []


def test_links_in_the_bpffs_are_not_followed(bpffs: Path, pods: Path, tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere")
    for pin in PINS:
        (elsewhere / pin).touch()
    folder_of(bpffs, pods).symlink_to(elsewhere)
    with pytest.raises(BrokenLimiterError, match="is no folder, and not made by bpfrl: remove it"):
        cooperation.attach(pods, bpffs)
    assert cooperation.sweep(bpffs) == []
    assert not cooperation.detach(cgroup.id_of(pods), bpffs)
    assert names(elsewhere) == PINS
    assert folder_of(bpffs, pods).is_symlink()
