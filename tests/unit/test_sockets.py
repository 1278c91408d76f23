"""Which map a node's limiters share, in a kernel that is only played (fakes.Kernel)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bpfrl import cgroup
from bpfrl.bpf import generator, sockets
from bpfrl.bpf.layout import VisitData
from bpfrl.bpf.libbpf import MapShape
from bpfrl.errors import CompilerError
from tests.unit.conftest import make
from tests.unit.fakes import Kernel, Thing


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    played = Kernel()
    played.play(monkeypatch)
    return played


def pin(kernel: Kernel, folder: Path, shape: MapShape = sockets.SHAPE) -> int:
    """Pin a map under the shared one's name; its number."""
    with kernel.make("map") as made:
        kernel.shapes[made.identifier] = shape
        made.pin(make(folder) / sockets.STORAGE)
    return made.identifier


def taken(bpffs: Path) -> int:
    """The number of the map that is shared, 0 for none; it is closed again."""
    shared = sockets.shared(bpffs)
    assert set(shared) <= {sockets.STORAGE}
    for found in shared.values():
        assert isinstance(found, Thing)
        os.close(found.number)
        return found.identifier
    return 0


def test_where_nothing_is_pinned_nothing_is_shared(kernel: Kernel, tmp_path: Path) -> None:
    assert taken(tmp_path) == 0
    assert kernel.left_open() == []


@pytest.mark.parametrize("name", ["8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10", "cgroup-7", "cooperation-7", "cgroup-7~old"])
def test_the_map_of_whatever_is_there_is_shared(kernel: Kernel, tmp_path: Path, name: str) -> None:
    number = pin(kernel, tmp_path / name)
    assert taken(tmp_path) == number
    assert kernel.left_open() == []


def test_of_several_one_is_taken_and_the_rest_is_not_left_open(kernel: Kernel, tmp_path: Path) -> None:
    numbers = {pin(kernel, tmp_path / f"cgroup-{number}") for number in range(1, 6)}
    [found] = sockets.shared(tmp_path).values()
    assert len(kernel.left_open()) == 1
    assert isinstance(found, Thing)
    assert found.identifier in numbers
    os.close(found.number)


OTHER = {
    "an earlier version's": sockets.SHAPE._replace(value_size=16),
    "another kind of map": sockets.SHAPE._replace(kind=2),
    "other keys": sockets.SHAPE._replace(key_size=8),
}


@pytest.mark.parametrize("shape", OTHER.values(), ids=OTHER)
def test_a_map_that_does_not_fit_is_closed_and_passed_over(kernel: Kernel, tmp_path: Path, shape: MapShape) -> None:
    for number in range(1, 6):
        pin(kernel, tmp_path / f"cgroup-{number}", shape)
    assert taken(tmp_path) == 0
    assert kernel.left_open() == []
    fitting = pin(kernel, tmp_path / "cgroup-6")
    assert taken(tmp_path) == fitting
    assert kernel.left_open() == []


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a plain file": lambda bpffs: (bpffs / "progs.debug").touch(),
    "an empty folder": lambda bpffs: make(bpffs / "tc"),
    "a folder of folders": lambda bpffs: make(bpffs / "tc" / "globals"),
    "a folder with a folder of that name": lambda bpffs: make(bpffs / "theirs" / sockets.STORAGE),
    "a link to nowhere": lambda bpffs: (bpffs / "theirs").symlink_to("nowhere"),
    "something else that is pinned": lambda bpffs: (make(bpffs / "theirs") / sockets.STORAGE).write_text("program 7"),
    "what is no pin": lambda bpffs: (make(bpffs / "theirs") / sockets.STORAGE).touch(),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_what_something_else_has_put_there_is_passed_over(
    kernel: Kernel, tmp_path: Path, stranger: Callable[[Path], object]
) -> None:
    stranger(tmp_path)
    assert taken(tmp_path) == 0
    number = pin(kernel, tmp_path / "cgroup-7")
    assert taken(tmp_path) == number
    assert kernel.left_open() == []


def test_without_a_compiler_it_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: str) -> bytes:
        raise CompilerError("clang is not installed: played")

    monkeypatch.setattr(generator, "compile_object", fail)
    sockets.prepare.cache_clear()
    sockets.prepare()
    sockets.prepare()
    sockets.prepare.cache_clear()
    assert caplog.text.count("connections that are there already cannot be reached: clang is not installed") == 1


def test_a_cgroup_without_processes_has_no_connections_and_nothing_is_loaded(kernel: Kernel, tmp_path: Path) -> None:
    with kernel.make("map") as storage:
        assert sockets.adopt(storage, tmp_path, 1) == (0, 0)
        assert sockets.release(storage, tmp_path) == (0, 0)
        assert sockets.forget(storage, tmp_path) == (0, 0)
        assert sockets.count(storage, tmp_path) == (0, 0)
    assert kernel.loaded == []


VISITS = {"adopt": (72,), "release": (), "forget": (), "count": ()}


@pytest.mark.parametrize(("visit", "callbacks"), VISITS.items(), ids=VISITS)
def test_each_namespace_of_a_cgroup_is_visited_once_with_whose_sockets_are_meant(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visit: str, callbacks: tuple[int, ...]
) -> None:
    namespaces = [os.memfd_create(f"played-namespace-{number}") for number in range(2)]
    visited: list[tuple[int, int, int]] = []

    def iterate_in(namespace: Thing, _: Thing) -> None:
        [(number, value)] = [(number, value) for number, value in kernel.values.items() if value]
        data = VisitData.from_buffer_copy(value)
        visited.append((namespace.number, data.cgroup, data.callbacks))
        kernel.values[number] = bytes(
            VisitData(data.cgroup, data.callbacks, data.done + 2, data.refused + 1, data.paced + 1)
        )

    monkeypatch.setattr(generator, "compile_object", lambda source: source.encode())
    monkeypatch.setattr(sockets, "_iterate_in", iterate_in)
    monkeypatch.setattr(cgroup, "open_network_namespaces", lambda _, **__: list(namespaces))
    with kernel.make("map") as storage:
        assert getattr(sockets, visit)(storage, tmp_path, *callbacks) == (4, 2)
    assert kernel.loaded == [(b"sockets.bpf.c", {sockets.STORAGE: storage.identifier})]
    assert kernel.programs == [f"bpfrl_{visit}"]
    assert visited == [(number, cgroup.id_of(tmp_path), *(callbacks or (0,))) for number in namespaces]
    assert kernel.left_open() == []
