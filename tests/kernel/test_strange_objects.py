"""Objects with anything in them: refused in a line or harmless, and nobody dies who is not there for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from io import BytesIO

import pytest
from elftools.elf.elffile import ELFFile

from bpfrl.bpf import apart, generator, limiter
from bpfrl.errors import BpfrlError, InvalidObjectError
from bpfrl.limits import Limits, PodRef
from bpfrl.units import Rate
from tests.fuzzing import runs
from tests.objects import sealed

LIMITS = Limits(Rate(10**7))
PER_SEED = 20
NUMBERS = (0, 1, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
POD = PodRef("0" * 32)


class Mutator:
    """Makes something else of a limiter's object, anywhere in it, as often of its headers as of each section."""

    def __init__(self, image: bytes, seed: int) -> None:
        self._image = image
        self._random = random.Random(seed)
        elf = ELFFile(BytesIO(image))
        headers = [*range(64), *range(elf["e_shoff"], elf["e_shoff"] + elf["e_shnum"] * elf["e_shentsize"])]
        self._sections = [
            range(section["sh_offset"], section["sh_offset"] + section["sh_size"])
            for section in elf.iter_sections()
            if section["sh_size"] and section["sh_type"] != "SHT_NOBITS"
        ]
        self._areas = [headers, headers, *map(list, self._sections)]

    def one(self) -> bytes:
        """Another one."""
        how = self._random.choices((self._havoc, self._cut, self._swap), (8, 1, 1))[0]
        return how()

    def _havoc(self) -> bytes:
        changed, area = bytearray(self._image), self._random.choice(self._areas)
        for _ in range(self._random.choice((1, 1, 1, 2, 4, 16))):
            at, size = self._random.choice(area), self._random.choice((1, 2, 4, 8))
            place = self._random.choice(area)
            data = self._random.choice(
                (
                    bytes([changed[at] ^ 1 << self._random.randrange(8)]),
                    self._random.randbytes(size),
                    (self._random.choice(NUMBERS) % 256**size).to_bytes(size, "little"),
                    bytes(changed[place : place + self._random.randrange(64)]),
                )
            )
            changed[at : at + len(data)] = data
        return bytes(changed[: len(self._image)])

    def _cut(self) -> bytes:
        return self._image[: self._random.randrange(len(self._image))]

    def _swap(self) -> bytes:
        """Two sections, or as much of them as the shorter one has."""
        one, two = self._random.sample(self._sections, 2)
        size = min(len(one), len(two))
        changed = bytearray(self._image)
        changed[one.start : one.start + size] = self._image[two.start : two.start + size]
        changed[two.start : two.start + size] = self._image[one.start : one.start + size]
        return bytes(changed)


@pytest.fixture(scope="module")
def image() -> bytes:
    return generator.generate(None, LIMITS)


@pytest.fixture(scope="module", autouse=True)
def loader() -> Iterator[None]:
    yield
    apart._LOADER._end()


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", runs(6, 400))
def test_an_object_that_was_changed_and_sealed_again_is_loaded_apart_or_refused(image: bytes, seed: int) -> None:
    """As by one with a master's certificate, who has read the sources: libbpf gets to see all of these."""
    mutator = Mutator(image, seed)
    for _ in range(PER_SEED):
        changed = mutator.one()
        try:
            changed = sealed(changed)
            generator.inspect(changed)
            with apart.LoadedApart(changed, {}, limiter._SHAPE, generator.data(changed)) as loaded:
                assert loaded.program("bpfrl_sockops").number > 0
        except BpfrlError as error:
            refusal = str(error)
            assert refusal.isprintable()
            assert len(refusal) < 2_000


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", runs(20, 1_000))
def test_an_object_that_was_changed_on_its_way_reaches_nobody(image: bytes, seed: int) -> None:
    """No byte but those of its limits and of its pod may be another, and those are checked or put there anew."""
    mutator, whole = Mutator(image, seed), generator._measured(image)[0]
    for _ in range(PER_SEED):
        changed = mutator.one()
        try:
            contents = generator.inspect(changed)
        except InvalidObjectError as error:
            refusal = str(error)
            assert refusal.isprintable()
            continue
        assert generator._is_like(changed, image, whole)
        assert contents.build == generator.build()
        if generator.is_known(changed):
            own = generator.generate(None, contents.limits)
            assert generator.relabel(changed, contents, POD, 1) == generator.relabel(
                own, generator.inspect(own), POD, 1
            )
