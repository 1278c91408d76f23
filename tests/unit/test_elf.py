"""The reader of symbols beside pyelftools, on objects of which something was changed."""

from __future__ import annotations

import itertools
from ctypes import sizeof
from io import BytesIO
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.bpf import elf, generator
from bpfrl.bpf.layout import IdentityData, LimitsData
from tests.fuzzing import examples

WANTED = {"limits": sizeof(LimitsData), "identity": sizeof(IdentityData)}


@pytest.fixture(scope="module")
def image() -> bytes:
    return generator.compile_object("limiter.bpf.c")


def by_pyelftools(image: bytes) -> dict[str, int]:
    """Where the symbols' data are, as another reader sees it."""
    parsed = ELFFile(BytesIO(image))
    table: Any = parsed.get_section_by_name(".symtab")
    found = {}
    for name in WANTED:
        [symbol] = table.get_symbol_by_name(name)
        found[name] = parsed.get_section(symbol["st_shndx"])["sh_offset"] + symbol["st_value"]
    return found


def test_it_finds_what_another_reader_finds(image: bytes) -> None:
    assert elf.places(image, WANTED) == by_pyelftools(image)


def test_a_symbol_of_another_size_is_left_out(image: bytes) -> None:
    assert elf.places(image, WANTED | {"limits": 8}).keys() == {"identity"}
    assert elf.places(image, {"nowhere": 8}) == {}


@examples(200, 5_000)
@given(st.data())
def test_what_it_finds_lies_in_the_object_and_what_it_is_given_may_be_anything(
    image: bytes, data: st.DataObject
) -> None:
    parsed = ELFFile(BytesIO(image))
    table: Any = parsed.get_section_by_name(".symtab")
    headers = [
        *range(64),
        *range(parsed["e_shoff"], parsed["e_shoff"] + parsed["e_shnum"] * 64),
        *range(table["sh_offset"], table["sh_offset"] + table["sh_size"]),
    ]
    changed = bytearray(image)
    changes = st.tuples(st.sampled_from(headers), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    for at, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        changed[at] = value
    length = data.draw(st.just(len(image)) | st.integers(0, len(image)))
    found = elf.places(bytes(changed[:length]), WANTED)
    spans = sorted((at, at + WANTED[name]) for name, at in found.items())
    assert all(0 <= start < end <= length for start, end in spans)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
