from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from ctypes import sizeof
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from bpfrl.bpf import generator, law
from bpfrl.bpf.layout import LAYOUT, IdentityData, LimitsData
from bpfrl.errors import CompilerError, InvalidObjectError
from bpfrl.limits import Limits, PodRef
from bpfrl.units import Rate
from tests.objects import of_another_build
from tests.unit.conftest import forget_programs, make

POD = PodRef("8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10", "shop", "cart-0")
LIMITS = Limits(Rate(10**7), Rate(2 * 10**6), 65_536)
SOURCES = Path(generator.__file__).parent
DATA = {"limits": (".data.limits", LimitsData), "identity": (".rodata.identity", IdentityData)}

rates = st.none() | st.integers(Rate.MIN_BITS, Rate.MAX_BITS).map(Rate)
bursts = st.none() | st.integers(Limits.MIN_BURST, Limits.MAX_BURST)
uids = st.uuids().map(str) | st.uuids().map(lambda uid: uid.hex) | st.integers(1, 2**64 - 1).map("cgroup-{}".format)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=3).map(".".join)
pods = st.none() | st.builds(PodRef, uids) | st.builds(PodRef, uids, labels, names)


@pytest.fixture(scope="module")
def image() -> bytes:
    return generator.generate(POD, LIMITS)


def place(image: bytes, name: str) -> int:
    """Where an object has its limits or its identity, by the section alone."""
    section = ELFFile(BytesIO(image)).get_section_by_name(DATA[name][0])
    assert section is not None
    assert section["sh_size"] == sizeof(DATA[name][1])
    return int(section["sh_offset"])


def relabelled(image: bytes, pod: PodRef, cgroup_id: int = 0) -> bytes:
    return generator.relabel(image, generator.inspect(image), pod, cgroup_id)


def patched(image: bytes, at: int, data: bytes) -> bytes:
    return image[:at] + data + image[at + len(data) :]


# What the bytes carry.


@settings(max_examples=40)
@given(pods, rates, rates, bursts)
def test_an_object_tells_the_limits_and_the_pod_it_was_made_for(
    pod: PodRef | None, out: Rate | None, back: Rate | None, burst: int | None
) -> None:
    limits = Limits(out, back, burst)
    contents = generator.inspect(generator.generate(pod, limits))
    assert (contents.pod, contents.limits) == (pod, limits)
    assert bytes(contents.data) == bytes(law.encode(limits))


def test_the_programs_find_in_their_data_what_the_law_says(image: bytes) -> None:
    at = place(image, "limits")
    assert image[at : at + sizeof(LimitsData)] == bytes(law.encode(LIMITS))
    identity = IdentityData.from_buffer_copy(image, place(image, "identity"))
    assert identity.layout == LAYOUT
    assert (identity.uid, identity.namespace, identity.name) == (POD.uid.encode(), b"shop", b"cart-0")


def test_two_pods_objects_differ_in_their_data_alone(image: bytes) -> None:
    other = generator.generate(PodRef("0" * 32), Limits(ingress=Rate(10**15)))
    template = generator.compile_object("limiter.bpf.c")
    assert image != other
    for name, (_, structure) in DATA.items():
        blank, at = bytes(sizeof(structure)), place(template, name)
        image, other, template = (patched(each, at, blank) for each in (image, other, template))
    assert image == other == template


def test_names_of_every_length_are_carried_whole() -> None:
    for length in (1, 63, 64, 252, 253):
        pod = PodRef(POD.uid, "a" * min(length, 63), "b" * length)
        assert generator.inspect(generator.generate(pod, LIMITS)).pod == pod


def test_the_build_is_the_programs_and_not_the_pods(image: bytes) -> None:
    build = generator.inspect(image).build
    assert build == generator.inspect(generator.generate(None, Limits(Rate(1_000)))).build
    assert len(set(build)) > 1


@pytest.mark.parametrize("source", ["limiter.bpf.c", "sockets.bpf.c", "cooperate.bpf.c"])
def test_the_only_atomic_instruction_is_the_addition_that_the_oldest_kernel_has(source: str) -> None:
    """Compare-and-swap, exchanges, and additions that return something came with Linux 5.12 (linux/bpf.h)."""
    elf = ELFFile(BytesIO(generator.compile_object(source)))
    programs = [section.data() for section in elf.iter_sections() if section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR]
    assert programs
    for code, operation in (
        (code, each) for data in programs for code, _, _, each in struct.iter_unpack("<BBhi", data)
    ):
        if code & 0xE7 == 0xC3:  # BPF_STX | BPF_ATOMIC, of any size
            assert operation == 0, "not BPF_ADD"


def test_a_relabelled_object_is_the_one_that_would_have_been_made_for_the_pod(image: bytes) -> None:
    nobodys = generator.generate(None, LIMITS)
    another = generator.generate(PodRef("f" * 32, "x" * 63, "y" * 253), LIMITS)
    assert generator.inspect(nobodys).pod is None
    assert relabelled(nobodys, POD) == relabelled(another, POD) == image


@pytest.mark.parametrize("cgroup_id", [1, 4_711, 2**64 - 1])
def test_a_relabelled_object_names_the_cgroup_and_differs_in_nothing_else(image: bytes, cgroup_id: int) -> None:
    at = place(image, "identity") + IdentityData.cgroup.offset
    assert image[at : at + 8] == bytes(8)
    assert relabelled(image, POD, cgroup_id) == patched(image, at, cgroup_id.to_bytes(8, sys.byteorder))
    assert relabelled(relabelled(image, POD, cgroup_id), POD) == image


def test_a_relabelled_object_keeps_its_own_build(image: bytes) -> None:
    foreign = of_another_build(image)
    assert generator.inspect(relabelled(foreign, PodRef("0" * 32))).build == generator.inspect(foreign).build
    assert generator.inspect(foreign).build != generator.inspect(image).build


# What is no object, or a damaged one. Whatever the bytes are, only InvalidObjectError may come out.


def refusal(image: bytes) -> str:
    with pytest.raises(InvalidObjectError) as caught:
        generator.inspect(image)
    text = str(caught.value)
    assert text.isprintable()
    return text


def at_most_refused(image: bytes) -> None:
    with suppress(InvalidObjectError):
        generator.inspect(image)


def test_another_layout_is_refused_with_both_numbers(image: bytes) -> None:
    other = patched(image, place(image, "identity"), (LAYOUT + 1).to_bytes(4, "little"))
    assert f"layout {LAYOUT + 1}, this bpfrl knows {LAYOUT}" in refusal(other)


@pytest.mark.parametrize(
    ("name", "offset", "data"),
    [
        ("identity", IdentityData.uid.offset, b"../../etc/passwd\0"),
        ("identity", IdentityData.uid.offset, b"\xff"),
        ("identity", IdentityData.uid.offset, b"a" * 64),
        ("identity", IdentityData.namespace.offset, b"Shop"),
        ("identity", IdentityData.name.offset, b"\x80"),
        ("identity", IdentityData.name.offset, b"a" * 256),
        ("limits", LimitsData.burst.offset, b"\x01\x00\x00"),
        ("limits", LimitsData.direction.offset, b"\x01\x00\x00"),
        ("limits", LimitsData.direction.offset + 7, b"\xff"),
    ],
)
def test_impossible_limits_and_pods_are_refused(image: bytes, name: str, offset: int, data: bytes) -> None:
    assert "limits or identity are damaged" in refusal(patched(image, place(image, name) + offset, data))


NOT_OBJECTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "text": lambda _: b"apiVersion: v1\n" * 1_000,
    "zeros": lambda _: bytes(24_000),
    "a magic number": lambda _: b"\x7fELF",
    "a magic number and more": lambda image: image[:4] + b"\xff" * 1_000,
    "a program of the machine": lambda _: Path(sys.executable).resolve().read_bytes()[: 2**20],
    "a program of the machine, whole": lambda _: Path(shutil.which("true") or "").read_bytes(),
    "another BPF object": lambda _: generator.compile_object("sockets.bpf.c"),
    "for another machine": lambda image: patched(image, 18, b"\x3e\x00"),
    "behind a byte": lambda image: b"\0" + image,
}


@pytest.mark.parametrize("make_bytes", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_what_is_no_limiter_is_refused(image: bytes, make_bytes: Callable[[bytes], bytes]) -> None:
    assert "this is not a bpfrl limiter" in refusal(make_bytes(image))


def test_an_object_that_was_cut_off_is_refused_at_any_length(image: bytes) -> None:
    elf = ELFFile(BytesIO(image))
    ends = {section["sh_offset"] + section["sh_size"] for section in elf.iter_sections()} | {elf["e_shoff"]}
    ends |= set(range(70)) | set(range(0, len(image), 997)) | set(range(len(image) - 66, len(image)))
    for length in sorted(ends):
        if length < len(image):
            refusal(image[:length])


def headers(image: bytes) -> list[int]:
    """The offsets of everything that a reader of the object follows: its headers and its table of symbols."""
    elf = ELFFile(BytesIO(image))
    symbols = elf.get_section_by_name(".symtab")
    assert symbols is not None
    return [
        *range(elf["e_ehsize"]),
        *range(elf["e_shoff"], elf["e_shoff"] + elf["e_shnum"] * elf["e_shentsize"]),
        *range(symbols["sh_offset"], symbols["sh_offset"] + symbols["sh_size"]),
    ]


@settings(max_examples=60)
@given(st.data())
def test_damage_to_the_headers_is_at_most_refused(image: bytes, data: st.DataObject) -> None:
    damaged = bytearray(image)
    flips = st.tuples(st.sampled_from(headers(image)), st.integers(1, 255))
    for at, flip in data.draw(st.lists(flips, min_size=1, max_size=4)):
        damaged[at] ^= flip
    at_most_refused(bytes(damaged))


@pytest.mark.parametrize("value", [b"\xff" * 8, b"\x00" * 8])
def test_offsets_and_sizes_beyond_all_bounds_are_at_most_refused(image: bytes, value: bytes) -> None:
    elf = ELFFile(BytesIO(image))
    sections = [elf["e_shoff"] + number * elf["e_shentsize"] for number in range(elf["e_shnum"])]
    # Of the file: e_entry, e_phoff, e_shoff. Of each section: sh_addr, sh_offset, sh_size, sh_entsize.
    fields = [24, 32, 40, *(section + field for section in sections for field in (16, 24, 32, 56))]
    for at in fields:
        at_most_refused(patched(image, at, value))


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x01\x00\xf7\x00"])
)
def test_random_bytes_are_refused(tail: bytes, head: bytes) -> None:
    refusal(head + tail)


# The compiler and its cache. Each forget_programs() is what starting another process would be.


class Toolbox:
    """A clang that counts its runs, and a cache of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache = folder / "cache" / "bpfrl"
        self._folder = make(folder / "bin")
        self._runs = folder / "runs"
        self.tool("clang", f'echo run >>{self._runs}; exec {shutil.which("clang")} "$@"')
        patch.setenv("PATH", f"{self._folder}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("XDG_CACHE_HOME", str(self.cache.parent))
        forget_programs()

    def tool(self, name: str, script: str) -> None:
        path = self._folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    @property
    def runs(self) -> int:
        return len(self._runs.read_text().splitlines()) if self._runs.exists() else 0

    @property
    def kept(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toolbox]:
    yield Toolbox(tmp_path, monkeypatch)
    forget_programs()


def test_one_process_compiles_once_whatever_it_generates(tools: Toolbox) -> None:
    for bits in (10**6, 10**7, 10**8):
        generator.generate(POD, Limits(Rate(bits)))
    assert tools.runs == 1


def test_the_next_process_takes_the_object_from_the_cache(tools: Toolbox) -> None:
    first = generator.generate(POD, LIMITS)
    assert (tools.runs, len(tools.kept)) == (1, 1)
    forget_programs()
    assert generator.generate(POD, LIMITS) == first
    assert tools.runs == 1


def test_with_the_cache_clang_does_not_even_have_to_work(tools: Toolbox, tmp_path: Path) -> None:
    tools.tool("clang", f'test ! -e {tmp_path}/broken && exec {shutil.which("clang", path="/usr/bin:/bin")} "$@"')
    generator.generate(POD, LIMITS)
    forget_programs()
    tmp_path.joinpath("broken").touch()
    assert generator.inspect(generator.generate(POD, LIMITS)).limits == LIMITS
    shutil.rmtree(tools.cache)
    forget_programs()
    with pytest.raises(CompilerError):
        generator.generate(POD, LIMITS)


def test_the_cache_is_for_its_owner_alone_and_holds_nothing_unfinished(tools: Toolbox) -> None:
    generator.generate(POD, LIMITS)
    assert tools.cache.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in tools.kept] == [".o"]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda file: file[1:]])
def test_a_damaged_cache_is_made_again(tools: Toolbox, damage: Callable[[bytes], bytes]) -> None:
    first = generator.generate(POD, LIMITS)
    [kept] = tools.kept
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    forget_programs()
    assert generator.generate(POD, LIMITS) == first
    assert (tools.runs, tools.kept, kept.read_bytes()) == (2, [kept], whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_what_somebody_else_has_put_into_the_cache_is_not_trusted(tools: Toolbox) -> None:
    first = generator.generate(POD, LIMITS)
    [kept] = tools.kept
    os.chown(kept, 65534, 65534)
    forget_programs()
    assert generator.generate(POD, LIMITS) == first
    assert tools.runs == 2
    assert kept.stat().st_uid == 0


def test_another_compiler_makes_another_object(tools: Toolbox) -> None:
    generator.generate(POD, LIMITS)
    tools.tool("clang", f'# a newer one\nexec {shutil.which("clang", path="/usr/bin:/bin")} "$@"')
    forget_programs()
    generator.generate(POD, LIMITS)
    assert len(tools.kept) == 2


def copied_sources(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The package's sources at another place, from where they are compiled from now on."""
    sources = make(folder)
    for path in Path(generator.__file__).parent.glob("*.[ch]"):
        shutil.copy(path, sources)
    patch.setattr(generator, "resources", SimpleNamespace(files=lambda _: sources, as_file=nullcontext))
    forget_programs()
    return sources


@pytest.mark.parametrize("file", ["limiter.bpf.c", "limiter.h", "bpf_helpers.h"])
def test_a_changed_source_is_compiled_anew(
    tools: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    generator.generate(POD, LIMITS)
    source = copied_sources(tmp_path / "sources", monkeypatch) / file
    source.write_text(f"{source.read_text()}\n/* changed */\n")
    generator.generate(POD, LIMITS)
    assert (tools.runs, len(tools.kept)) == (2, 2)


@pytest.mark.usefixtures("tools")
def test_a_changed_program_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator.inspect(generator.generate(POD, LIMITS)).build
    source = copied_sources(tmp_path / "sources", monkeypatch) / "limiter.bpf.c"
    source.write_text(source.read_text().replace("#define EGRESS_DROP 2", "#define EGRESS_DROP 3"))
    assert generator.inspect(generator.generate(POD, LIMITS)).build != before


def test_the_same_sources_are_the_same_build_wherever_they_lie(
    tools: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = generator.generate(POD, LIMITS)
    shutil.rmtree(tools.cache)
    copied_sources(tmp_path / "some where else", monkeypatch)
    assert generator.generate(POD, LIMITS) == installed
    assert tools.runs == 2
    assert os.fsencode(Path(generator.__file__).parent) not in installed


@pytest.mark.parametrize("where", ["below a file", "full"])
def test_without_a_cache_it_works_and_warns_in_one_line(
    tools: Toolbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    if where == "full":
        monkeypatch.setattr(Path, "replace", no_space)
    else:
        tmp_path.joinpath("file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert generator.inspect(generator.generate(POD, LIMITS)).limits == LIMITS
    assert tools.kept == []
    [record] = caplog.records
    assert record.getMessage().startswith("no compile cache in ")
    assert record.getMessage().endswith(("Not a directory", "No space left on device"))


def no_space(path: Path, _: Path) -> Path:
    raise OSError(28, os.strerror(28), str(path))


def test_a_cache_that_cannot_be_read_is_no_error(tools: Toolbox) -> None:
    generator.generate(POD, LIMITS)
    [kept] = tools.kept
    kept.unlink()
    kept.mkdir()
    forget_programs()
    assert generator.inspect(generator.generate(POD, LIMITS)).limits == LIMITS


@pytest.mark.parametrize(
    ("cache", "home", "folder"),
    [
        ("/somewhere", "/home/x", "/somewhere/bpfrl"),
        ("", "/home/x", "/home/x/.cache/bpfrl"),
        (None, "/home/x", "/home/x/.cache/bpfrl"),
    ],
)
def test_the_cache_is_where_xdg_puts_it(
    monkeypatch: pytest.MonkeyPatch, cache: str | None, home: str, folder: str
) -> None:
    if cache is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", home)
    assert generator._cache_folder() == Path(folder)


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert generator._cache_folder().is_absolute()


def test_what_a_compiler_has_made_before_it_went_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_programs()
    made = generator.compile_object("limiter.bpf.c")
    forget_programs()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert generator.compile_object("limiter.bpf.c") == made
    [kept] = tmp_path.glob("bpfrl/*.o")
    kept.write_bytes(b"damaged")
    forget_programs()
    with pytest.raises(CompilerError, match="clang is not installed"):
        generator.compile_object("limiter.bpf.c")


@pytest.mark.parametrize("missing", ["clang", "llvm-strip"])
def test_a_missing_tool_is_named_with_what_to_install(
    tools: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    alone = make(tmp_path / "alone")
    for name in {"clang", "llvm-strip"} - {missing}:
        alone.joinpath(name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(alone))
    with pytest.raises(CompilerError, match=f"^{missing} is not installed: apt-get install clang llvm libbpf-dev$"):
        generator.generate(POD, LIMITS)
    assert tools.kept == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'x.c:1:10: fatal error: bpf/bpf_helpers.h: file not found' >&2; echo noise >&2; exit 1",
            "file not found",
        ),
        ("printf 'one\\ntwo\\n' >&2; exit 3", "one; two"),
        ("exit 1", "failed"),
        ('for n in 1 2 3 4 5 6; do echo "error $n" >&2; done; exit 1', "error 1; error 2; error 3"),
    ],
)
def test_a_failing_compiler_is_one_line_with_its_reason(tools: Toolbox, script: str, reason: str) -> None:
    tools.tool("clang", script)
    with pytest.raises(CompilerError) as caught:
        generator.generate(POD, LIMITS)
    text = str(caught.value)
    assert text.startswith("clang failed")
    assert reason in text
    assert "noise" not in text
    assert "error 4" not in text
    assert text.isprintable()
    assert tools.kept == []


# What an installation comes with. The sources are a copy, so that nothing is put into this checkout.


def shipped(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An installation with its programs compiled, in which nothing is left that could compile them again."""
    copied_sources(folder, patch)
    found = generator.ship()
    patch.setenv("PATH", str(make(folder.with_name("no-tools"))))
    patch.setenv("XDG_CACHE_HOME", str(folder.with_name("no-cache")))
    forget_programs()
    return found


def test_what_is_shipped_needs_neither_a_compiler_nor_a_cache(
    tools: Toolbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {path.name: generator.compile_object(path.name) for path in SOURCES.glob("*.bpf.c")}
    built = generator.build()
    assert set(shipped(tmp_path / "installed", monkeypatch)) == set(compiled)
    runs = tools.runs
    assert {source: generator.compile_object(source) for source in compiled} == compiled
    assert generator.build() == built
    assert tools.runs == runs
    assert not (tmp_path / "no-cache").exists()


@pytest.mark.usefixtures("tools")
def test_what_is_shipped_goes_before_this_machines_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_sources(tmp_path / "installed", monkeypatch)
    place, other = generator.ship()["limiter.bpf.c"], generator.compile_object("sockets.bpf.c")
    place.write_bytes(generator._sealed(other))
    forget_programs()
    assert generator.compile_object("limiter.bpf.c") == other


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("damage", [lambda _: b"", lambda content: content[1:], lambda content: content[:-1]])
def test_damaged_shipped_programs_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    place = shipped(tmp_path / "installed", monkeypatch)["limiter.bpf.c"]
    place.write_bytes(damage(place.read_bytes()))
    with pytest.raises(CompilerError, match="clang is not installed"):
        generator.compile_object("limiter.bpf.c")


@pytest.mark.usefixtures("tools")
def test_shipped_programs_of_other_sources_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped(tmp_path / "installed", monkeypatch)
    with (tmp_path / "installed" / "clock.h").open("a") as header:
        header.write("/* changed */\n")
    with pytest.raises(CompilerError, match="clang is not installed"):
        generator.compile_object("limiter.bpf.c")


@pytest.mark.usefixtures("tools")
def test_shipping_again_leaves_nothing_of_older_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copied_sources(tmp_path / "installed", monkeypatch) / "limiter.bpf.c"
    before = set(generator.ship().values())
    source.write_text(f"{source.read_text()}\n/* changed */\n")
    forget_programs()
    after = set(generator.ship().values())
    assert before.isdisjoint(after)
    assert {*next(iter(after)).parent.iterdir()} == after


def test_the_objects_sections_keep_what_loaders_need_and_no_more(image: bytes) -> None:
    sections = {section.name for section in ELFFile(BytesIO(image)).iter_sections()}
    assert {"license", ".maps", ".BTF", ".BTF.ext"} <= sections
    assert not {name for name in sections if name.startswith((".debug", ".rel.debug"))}


def test_generating_needs_no_bcc() -> None:
    script = "import sys; from bpfrl.bpf import generator; import bpfrl.cli; sys.exit('bcc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
