"""The structures of layout.py and the programs are one: compared through the BTF of the objects that clang makes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from importlib import resources
from io import BytesIO
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from bpfrl.bpf import generator, layout, limiter
from bpfrl.bpf.layout import Counters, CountersData, IdentityData, LimitData, LimitsData, VisitData
from tests.unit import native

STRUCTURES = {
    "bpfrl_limit": LimitData,
    "bpfrl_limits": LimitsData,
    "bpfrl_identity": IdentityData,
    "bpfrl_counters": CountersData,
    "bpfrl_visit": VisitData,
}
OBJECTS = ("limiter.bpf.c", "sockets.bpf.c", "cooperate.bpf.c")

Btf = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def image() -> bytes:
    return generator.compile_object("limiter.bpf.c")


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Btf]:
    """The types of each of the objects."""
    bpftool = shutil.which("bpftool", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin")))
    assert bpftool, "bpftool is not installed"
    found = {}
    for source in OBJECTS:
        path = tmp_path_factory.mktemp("btf") / f"{source}.o"
        path.write_bytes(generator.compile_object(source))
        dump = subprocess.run([bpftool, "btf", "dump", "file", path, "-j"], capture_output=True, check=True, text=True)
        found[source] = {each["id"]: each for each in json.loads(dump.stdout)["types"]}
    return found


@pytest.fixture
def btf(types: dict[str, Btf]) -> Btf:
    """The limiter's."""
    return types["limiter.bpf.c"]


@pytest.fixture
def header() -> str:
    return resources.files("bpfrl.bpf").joinpath("limiter.h").read_text()


def struct(btf: Btf, name: str) -> dict[str, Any]:
    [found] = [each for each in btf.values() if (each["kind"], each["name"]) == ("STRUCT", name)]
    return found


def shape(btf: Btf, number: int) -> str:
    """A C type as text: what it is made of, without the names of typedefs."""
    kind = btf[number]
    match kind["kind"]:
        case "TYPEDEF" | "CONST" | "VOLATILE":
            return shape(btf, kind["type_id"])
        case "ARRAY":
            return f"{shape(btf, kind['type_id'])}[{kind['nr_elems']}]"
        case "STRUCT":
            return f"struct {kind['name']}"
        case "INT":
            # A char is a char whether or not the machine's has a sign.
            signed = kind["encoding"] == "SIGNED"
            return "char" if kind["name"] == "char" else f"{'s' if signed else 'u'}{kind['nr_bits']}"
    raise AssertionError(f"limiter.h shares {kind}")


def python_shape(kind: Any) -> str:
    """The same of a ctypes type."""
    if issubclass(kind, ctypes.Array):
        return f"{python_shape(kind._type_)}[{kind._length_}]"
    if issubclass(kind, ctypes.Structure):
        [name] = [name for name, structure in STRUCTURES.items() if structure is kind]
        return f"struct {name}"
    if kind is ctypes.c_char:
        return "char"
    return f"{'s' if kind(-1).value < 0 else 'u'}{8 * ctypes.sizeof(kind)}"


@pytest.mark.parametrize(("name", "structure"), STRUCTURES.items(), ids=STRUCTURES)
def test_each_structure_has_the_same_fields_at_the_same_places_in_c_and_python(
    types: dict[str, Btf], name: str, structure: type[ctypes.Structure]
) -> None:
    btf = types["sockets.bpf.c" if structure is VisitData else "limiter.bpf.c"]
    in_c = struct(btf, name)
    fields = [(field["name"], field["bits_offset"] // 8, shape(btf, field["type_id"])) for field in in_c["members"]]
    in_python = [
        (field[0], getattr(structure, field[0]).offset, python_shape(field[1])) for field in structure._fields_
    ]
    assert in_python == fields
    assert ctypes.sizeof(structure) == in_c["size"]


def test_every_structure_that_user_space_reads_is_compared(types: dict[str, Btf]) -> None:
    shared = {
        each["name"]
        for btf in types.values()
        for each in btf.values()
        if each["kind"] == "STRUCT" and each["name"].startswith("bpfrl_")
    }
    # What a socket carries is the programs' own.
    assert shared - {"bpfrl_socket"} == set(STRUCTURES)


def test_what_a_socket_carries_is_the_same_to_every_program_and_as_large_as_the_map_is_made_for(
    types: dict[str, Btf],
) -> None:
    sockets = [struct(btf, "bpfrl_socket") for btf in types.values()]
    assert {each["size"] for each in sockets} == {layout.SOCKET_BYTES}
    fields = [[(field["name"], field["bits_offset"]) for field in each["members"]] for each in sockets]
    assert fields[0] == fields[1] == fields[2]
    # Nothing lies between two of them, which no program would have made 0.
    mirrored = native.Socket
    assert fields[0] == [(name, getattr(mirrored, name).offset * 8) for name, _ in mirrored._fields_]
    assert sum(ctypes.sizeof(kind) for _, kind in mirrored._fields_) == layout.SOCKET_BYTES


def test_the_clocks_have_a_cache_line_each_and_are_as_large_as_their_map(btf: Btf) -> None:
    clock = struct(btf, "clock")
    assert clock["size"] == 64
    assert 2 * clock["size"] == layout.STATE_BYTES


def test_what_every_packet_reads_of_a_limit_is_in_its_first_cache_line(btf: Btf) -> None:
    offsets = {field["name"]: field["bits_offset"] // 8 for field in struct(btf, "bpfrl_limit")["members"]}
    first = {name for name, offset in offsets.items() if offset < 64}
    assert {"rate_bits", "cost", "burst_ns", "drop_ns", "drop_short_ns"} <= first
    assert struct(btf, "bpfrl_limit")["size"] % 64 == 0


def test_the_constants_are_those_of_the_header(header: str) -> None:
    defined = {name: int(value) for name, value in re.findall(r"#define BPFRL_(\w+) (\d+)", header)}
    assert defined["LAYOUT"] == layout.LAYOUT
    assert defined["RATIO_SHIFT"] == layout.RATIO_SHIFT
    assert defined["SHIFT_BITS"] == layout.SHIFT_BITS


def test_the_directions_are_those_of_the_header(header: str) -> None:
    listed = re.search(r"enum bpfrl_direction \{([^}]*)\}", header)
    assert listed is not None
    assert re.findall(r"\w+", listed[1]) == ["BPFRL_EGRESS", "BPFRL_INGRESS", "BPFRL_DIRECTIONS"]
    assert (layout.EGRESS, layout.INGRESS) == (0, 1)


def test_the_programs_themselves_carry_the_layouts_number(image: bytes) -> None:
    section = ELFFile(BytesIO(image)).get_section_by_name(".rodata.identity")
    assert section is not None
    assert IdentityData.from_buffer_copy(section.data()).layout == layout.LAYOUT


def test_the_object_has_every_program_and_map_that_user_space_asks_for(image: bytes, btf: Btf) -> None:
    elf = ELFFile(BytesIO(image))
    symbols = {symbol.name for symbol in elf.get_section_by_name(".symtab").iter_symbols()}  # type: ignore[union-attr]
    assert {function for _, function, _ in limiter._PROGRAMS} <= symbols
    sections = {section.name for section in elf.iter_sections()}
    variables = {each["name"] for each in btf.values() if each["kind"] == "VAR"}
    for _, name in (*limiter._STATE_MAPS, limiter._IDENTITY):
        assert name in (sections if name.startswith(".") else variables)


def test_counters_add_up_over_the_cpus() -> None:
    per_cpu = [CountersData(1, 2, 3, 4), CountersData(10, 20, 30, 40), CountersData(2**63, 0, 0, 2**63), CountersData()]
    assert Counters.total(per_cpu) == Counters(11 + 2**63, 22, 33, 44 + 2**63)
    assert Counters.total([]) == Counters()
