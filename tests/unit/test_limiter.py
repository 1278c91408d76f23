"""What a limiter's object may hold. libbpf reads objects without any privileges; nothing is loaded here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from bpfrl.bpf import generator, libbpf, limiter
from bpfrl.bpf.libbpf import AttachType, MapShape, MapType, ProgramType, Shape
from bpfrl.errors import InvalidObjectError


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
