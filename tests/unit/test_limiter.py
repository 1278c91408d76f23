"""What a limiter's object may hold, and how one is installed in a kernel that is only played (fakes.Kernel).

libbpf reads objects without any privileges; nothing is loaded here.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfrl import cgroup
from bpfrl.bpf import generator, law, libbpf, limiter, sockets
from bpfrl.bpf.layout import LimitsData
from bpfrl.bpf.libbpf import AttachType, Descriptor, MapShape, MapType, ProgramType, Shape
from bpfrl.bpf.limiter import Limiter
from bpfrl.bpf.sockets import Visited
from bpfrl.errors import BpfrlError, BrokenLimiterError, CompilerError, InvalidObjectError, KernelError
from bpfrl.limits import Limits, PodRef
from bpfrl.units import Rate
from tests.unit.conftest import make
from tests.unit.fakes import Kernel, Thing


@pytest.fixture(scope="module")
def opened() -> Iterator[int]:
    """The template, open in libbpf."""
    image = generator.compile_object("limiter.bpf.c")
    options = libbpf._OpenOptions(object_name=libbpf._OBJECT_NAME)
    options.sz = ctypes.sizeof(options)
    handle = libbpf._lib().bpf_object__open_mem(image, len(image), ctypes.byref(options))
    assert handle
    yield handle
    libbpf._lib().bpf_object__close(handle)


def test_the_template_is_what_a_limiter_may_be(opened: int) -> None:
    programs, maps, pinned = libbpf._contents(opened)
    assert sorted(programs) == sorted(limiter._SHAPE.programs.items())
    assert sorted(maps) == sorted(limiter._SHAPE.maps.items())
    assert pinned == set()
    libbpf._compare(opened, limiter._SHAPE)


def test_every_program_and_map_that_is_pinned_is_in_the_shape() -> None:
    assert {function: kind for _, function, kind in limiter._PROGRAMS} == {
        function: kind for function, (_, kind) in limiter._SHAPE.programs.items()
    }
    assert {name for _, name in (*limiter._STATE_MAPS, limiter._IDENTITY)} == set(limiter._SHAPE.maps)


PROGRAMS, MAPS = dict(limiter._SHAPE.programs), dict(limiter._SHAPE.maps)
SKB, PLACE = PROGRAMS["bpfrl_egress"]
COUNTERS = MAPS["counters"]
# Shapes that the template does not have, and what is named as the difference.
OTHER_SHAPES: dict[str, tuple[dict[str, tuple[int, int]], dict[str, MapShape], str]] = {
    "one more program": ({**PROGRAMS, "theirs": (SKB, PLACE)}, MAPS, "theirs"),
    "one program less": ({name: PROGRAMS[name] for name in PROGRAMS if name != "bpfrl_egress"}, MAPS, "bpfrl_egress"),
    "another program type": ({**PROGRAMS, "bpfrl_egress": (ProgramType.SOCK_OPS, PLACE)}, MAPS, "bpfrl_egress"),
    "another place": ({**PROGRAMS, "bpfrl_egress": (SKB, AttachType.CGROUP_INET_INGRESS)}, MAPS, "bpfrl_egress"),
    "one more map": (PROGRAMS, {**MAPS, "theirs": COUNTERS}, "theirs"),
    "one map less": (PROGRAMS, {name: MAPS[name] for name in MAPS if name != "counters"}, "counters"),
    **{
        f"another {field}": (PROGRAMS, {**MAPS, "counters": COUNTERS._replace(**{field: value})}, "counters")
        for field, value in {"kind": MapType.ARRAY, "key_size": 8, "value_size": 24, "entries": 1, "flags": 1}.items()
    },
    "nothing": ({}, {}, ".bss, .data.limits, .rodata.identity"),
}


@pytest.mark.parametrize(("programs", "maps", "named"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_an_object_that_differs_in_anything_is_refused_and_the_difference_named(
    opened: int, programs: dict[str, tuple[int, int]], maps: dict[str, MapShape], named: str
) -> None:
    with pytest.raises(InvalidObjectError) as caught:
        libbpf._compare(opened, Shape(programs, maps))
    assert str(caught.value) == f"not the programs and maps of a limiter: {named}"


def test_two_things_with_one_name_are_not_one(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, maps, pinned = libbpf._contents(opened)
    for found in ((programs, [*maps, maps[0]], pinned), ([*programs, programs[0]], maps, pinned)):
        monkeypatch.setattr(libbpf, "_contents", lambda _, found=found: found)
        with pytest.raises(InvalidObjectError, match="not the programs and maps of a limiter: "):
            libbpf._compare(opened, limiter._SHAPE)


def test_what_libbpf_cannot_open_is_no_object() -> None:
    with pytest.raises(InvalidObjectError, match="libbpf cannot open the object"):
        libbpf.LoadedObject(b"\x7fELF")


# The connections that were there before.

POD = PodRef("8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10", "shop", "cart-0")
SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**9), Rate(10**9), 65_536)
Visits = list[tuple[Path, int, int]]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    played = Kernel()
    played.play(monkeypatch)
    return played


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What passes for the pod's cgroup."""
    path = make(tmp_path / "pod")
    monkeypatch.setattr(cgroup, "path_of", lambda number: path if cgroup.id_of(path) == number else None)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the limiter goes."""
    return make(tmp_path / "bpf") / POD.uid


def visiting(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, result: Visited | BpfrlError, visit: str = "adopt"
) -> Visits:
    """Let visits to connections end so; each is where it was, the callbacks, and how many links the cgroup had."""
    visits: Visits = []

    def visited(storage: Descriptor, path: Path, callbacks: int = 0) -> Visited:
        assert isinstance(storage, Thing)
        assert kernel.shapes[storage.identifier] == sockets.SHAPE
        visits.append((path, callbacks, len(kernel.attached_to(cgroup.id_of(path)))))
        if isinstance(result, BpfrlError):
            raise result
        return result

    monkeypatch.setattr(sockets, visit, visited)
    return visits


def install(pod: Path, folder: Path, limits: Limits = SLOW) -> Limiter:
    image = generator.generate(None, limits)
    limiter.install(generator.relabel(image, generator.inspect(image), POD, cgroup.id_of(pod)), pod, folder)
    return Limiter(folder)


def test_connections_that_were_there_are_reached_once_the_limiter_is_whole_and_it_says_so(
    kernel: Kernel,
    pod: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    visits = visiting(monkeypatch, kernel, Visited(3, 0))
    status = install(pod, folder).status()
    assert visits == [(pod, limiter._CALLBACKS, 3)]
    assert status.adopted
    assert (status.limits, status.pod, status.cgroup_id) == (SLOW, POD, cgroup.id_of(pod))
    assert caplog.text == ""
    assert kernel.left_open() == []


OLD_KERNEL = "connections that were there before are only policed: the kernel lacks the option"
FAILURES: dict[str, tuple[Visited | BpfrlError, str]] = {
    "all are refused": (Visited(0, 4), OLD_KERNEL),
    "one is refused": (Visited(3, 1), OLD_KERNEL),
    "no iterators": (KernelError("cannot iterate: played"), "are only policed: cannot iterate: played"),
    "no compiler": (CompilerError("no clang: played"), "are only policed: no clang: played"),
}


@pytest.mark.parametrize(("result", "warning"), FAILURES.values(), ids=FAILURES)
def test_where_they_cannot_be_reached_it_warns_and_limits_all_the_same(
    kernel: Kernel,
    pod: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    result: Visited | BpfrlError,
    warning: str,
) -> None:
    visiting(monkeypatch, kernel, result)
    status = install(pod, folder).status()
    assert not status.adopted
    assert status.limits == SLOW
    assert len(kernel.attached_to(cgroup.id_of(pod))) == 3
    assert warning in caplog.text
    assert len(caplog.records) == 1
    assert os.listdir(folder.parent) == [folder.name]
    assert kernel.left_open() == []


@pytest.mark.parametrize("adopted", [True, False])
def test_other_limits_leave_it_as_it_was_whether_earlier_connections_are_paced(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, adopted: bool
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0 if adopted else 1))
    here = install(pod, folder)
    assert not here.change(law.encode(SLOW))
    assert here.change(law.encode(FAST))
    assert (here.limits, here.status().adopted) == (FAST, adopted)
    assert not here.change(law.encode(FAST))
    given = law.encode(SLOW)
    given.adopted = not adopted
    assert here.change(given)
    assert (here.limits, here.status().adopted) == (SLOW, adopted)
    refined = law.encode(SLOW)
    refined.direction[0].drop_ns += 1
    assert here.change(refined)


@pytest.mark.parametrize("adopted", [True, False])
def test_other_programs_leave_it_as_it_was_and_go_to_no_connection(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, adopted: bool
) -> None:
    visits = visiting(monkeypatch, kernel, Visited(0, 0 if adopted else 1))
    here = install(pod, folder)
    storage = (folder / sockets.STORAGE).read_text()
    kernel.tag_now = b"new" + bytes(5)
    other = PodRef(POD.uid, "shop", "renamed")
    here.upgrade(generator.generate(other, FAST))
    again = Limiter(folder)
    assert again.pod == other
    assert (again.limits, again.status().adopted) == (SLOW, adopted)
    assert set(kernel.running.values()) == {kernel.tag_now}
    assert (folder / sockets.STORAGE).read_text() == storage
    assert len(visits) == 1
    assert kernel.left_open() == []


def test_a_limiter_shares_the_map_that_another_has_pinned(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0))
    install(pod, folder)
    install(pod, folder.with_name("cgroup-7"))
    assert (folder / sockets.STORAGE).read_text() == (folder.with_name("cgroup-7") / sockets.STORAGE).read_text()
    for name in ("limits", "state", "counters", "identity"):
        assert (folder / name).read_text() != (folder.with_name("cgroup-7") / name).read_text()


@pytest.mark.parametrize("step", ["load", "attach"])
def test_where_the_kernel_refuses_no_connection_is_touched_and_nothing_left(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    visits = visiting(monkeypatch, kernel, Visited(0, 0))
    kernel.refused.add(step)
    with pytest.raises(KernelError, match=f"cannot {step}: played"):
        install(pod, folder)
    assert visits == []
    assert os.listdir(folder.parent) == []
    assert kernel.left_open() == []


def test_a_limiter_that_is_removed_gives_its_sockets_back_while_the_limit_still_holds(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0))
    install(pod, folder)
    released = visiting(monkeypatch, kernel, Visited(1, 0), "release")
    limiter.remove(folder)
    # sockops has gone, or it would pace them again; the two that police have not.
    assert released == [(pod, 0, 2)]
    assert kernel.attached_to(cgroup.id_of(pod)) == []
    assert os.listdir(folder.parent) == []
    assert kernel.left_open() == []


def test_where_connections_cannot_be_visited_they_let_go_by_themselves_while_sockops_is_there(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0))
    install(pod, folder)
    [limits] = [int(word) for word in (folder / "limits").read_text().split()[1:]]
    monkeypatch.setattr(sockets, "reachable", lambda: False)
    visiting(monkeypatch, kernel, KernelError("no iterator"), "release")
    waited: list[tuple[int, bytes, list[str]]] = []

    def wait(_: float) -> None:
        waited.append((len(kernel.attached_to(cgroup.id_of(pod))), kernel.values[limits], os.listdir(folder.parent)))

    monkeypatch.setattr(time, "sleep", wait)
    limiter.remove(folder)
    # Cut off here, it is no limiter any more: what is left is removed by whoever comes next.
    assert waited == [(3, bytes(LimitsData()), [folder.name + limiter.RETIRED])]
    assert kernel.attached_to(cgroup.id_of(pod)) == []
    assert os.listdir(folder.parent) == []


def test_for_a_pod_that_has_ended_nobody_waits(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0))
    install(pod, folder)
    kernel.links.update(dict.fromkeys(kernel.links, 0))
    monkeypatch.setattr(sockets, "reachable", lambda: False)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    limiter.remove(folder)
    assert os.listdir(folder.parent) == []


@pytest.mark.parametrize("pin", sorted(limiter._PINS))
def test_a_limiter_of_which_a_pin_is_missing_is_broken(
    kernel: Kernel, pod: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    visiting(monkeypatch, kernel, Visited(0, 0))
    install(pod, folder)
    (folder / pin).unlink()
    with pytest.raises(BrokenLimiterError, match=f"^{pin} is missing: "):
        Limiter(folder)
