"""Where an ELF object has the data of its symbols.

Objects come from elsewhere, and may be anything. So this reads no more than it needs, each piece once, and takes a
time that does not depend on what the bytes say: no more sections and symbols than a limiter could have.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

# elf(5), in the machine's own order: what it is, and of headers and symbols what is read here.
_IDENTIFICATION: Final = struct.pack("=4sBB", b"\x7fELF", 2, 1 if sys.byteorder == "little" else 2)
_HEADER: Final = struct.Struct("=16x2xH20xQ10xHH2x")
_SECTION: Final = struct.Struct("=4xI16xQQII8xQ")
_SYMBOL: Final = struct.Struct("=I2xHQQ")
_EM_BPF: Final = 247
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3

# A limiter has 16 sections and 30 symbols.
_MOST_SECTIONS: Final = 64
_MOST_SYMBOLS: Final = 1024


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int
    info: int
    entry: int


def places(image: bytes, wanted: Mapping[str, int]) -> dict[str, int]:
    """The offsets in a BPF object of the data of symbols.

    Args:
        image: the object, or whatever it is.
        wanted: the symbols, and how long the data of each is to be, byte.

    Returns:
        The offset of each, all within the object and none in another's data. One that is not there, twice there, or of
        another size is left out, and all are if this is no BPF object.
    """
    sections = _sections(image)
    data = [section for section in sections if section.kind in {_PROGBITS, _SYMTAB, _STRTAB}]
    tables = [section for section in data if section.kind == _SYMTAB]
    if len(tables) != 1 or any(section.offset + section.size > len(image) for section in data):
        return {}
    found: dict[str, list[int]] = {name: [] for name in wanted}
    for name, number, value, size in _symbols(image, sections, tables[0], wanted):
        home = sections[number] if number < len(sections) else tables[0]
        fits = home.kind == _PROGBITS and size == wanted[name] and value + size <= home.size
        found[name].append(home.offset + value if fits else -1)
    known = {name: at[0] for name, at in found.items() if len(at) == 1 and at[0] >= 0}
    ends = sorted((at, at + wanted[name]) for name, at in known.items())
    apart = all(end <= start for (_, end), (start, _) in pairwise(ends))
    return known if apart else {}


def _sections(image: bytes) -> list[_Section]:
    """The sections; none where the header is no BPF object's."""
    if len(image) < _HEADER.size or not image.startswith(_IDENTIFICATION):
        return []
    machine, at, size, count = _HEADER.unpack_from(image)
    if machine != _EM_BPF or size != _SECTION.size or count > _MOST_SECTIONS or at + count * size > len(image):
        return []
    return [_Section(*_SECTION.unpack_from(image, at + number * size)) for number in range(count)]


def _symbols(
    image: bytes, sections: Sequence[_Section], table: _Section, wanted: Iterable[str]
) -> Iterator[tuple[str, int, int, int]]:
    """Of each symbol with a name that is wanted: that, its section's number, its value and its size."""
    if table.entry != _SYMBOL.size or table.size > _MOST_SYMBOLS * _SYMBOL.size or table.link >= len(sections):
        return
    names = sections[table.link]
    if names.kind != _STRTAB:
        return
    text = image[names.offset : names.offset + names.size]
    labels = {at: name for name in wanted for at in _every(text, name.encode() + b"\0")}
    whole = table.size - table.size % _SYMBOL.size
    for at, *entry in _SYMBOL.iter_unpack(image[table.offset : table.offset + whole]):
        if at in labels:
            yield labels[at], *entry


def _every(text: bytes, part: bytes) -> Iterator[int]:
    """Each place where a part stands in a text; a name may be the end of another."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
