"""The kernel's BPF interface, typed.

Debian's bcc brings libbpf, which its own library is linked with. Loaded by itself it costs 2 MB; with bcc come LLVM
and clang, which are 60 MB and a tenth of a second. Elsewhere bcc may have libbpf in itself: then it is taken there.

What the kernel hands out is a :class:`Descriptor`, closed where its ``with`` ends; those of a :class:`LoadedObject`
belong to it, and end with it. All functions
raise :class:`PermissionDeniedError` without the privileges and :class:`KernelError` where the kernel refuses,
with the reason in the text.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, NoReturn, Self, TypeVar

from bpfrl.errors import BrokenLimiterError, InvalidObjectError, KernelError, PermissionDeniedError, VerifierError
from bpfrl.plain import plain

Data = TypeVar("Data", bound=Structure)

_LIBRARY: Final = "libbpf.so.1"
_LOG_BYTES: Final = 1 << 20
_LOG_LINES: Final = 3
_LOG_CHARACTERS: Final = 1000
_NAMES: Final = 3
# bpf/libbpf.h: LIBBPF_ERRNO__START
_LIBBPF_ERRNO: Final = 4000
_REASON_BYTES: Final = 100
_OBJECT_NAME: Final = b"bpfrl"
# libbpf puts the object's name before the names of some sections' maps.
_SECTION_MAP: Final = re.compile(rf"{_OBJECT_NAME.decode()}(?=\.)")
_READ_BYTES: Final = 1 << 16
# What stands for the type of a program that libbpf leaves out, so that it is like none.
_NOT_LOADED: Final = (-1, -1)
# What the kernel calls a program's descriptor (kernel/bpf/syscall.c).
_PROGRAM_LINK: Final = "anon_inode:bpf-prog"
# struct bpf_insn (linux/bpf.h): what to do, two registers, an offset, and a number.
_INSTRUCTION: Final = struct.Struct("=BBhi")
_INSTRUCTION_BYTES: Final = _INSTRUCTION.size
_IMMEDIATE: Final = struct.Struct("=i")
_IMMEDIATE_AT: Final = 4
# Loading 64 bits, which are a map or lie in one: BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE.
_LOAD_IMMEDIATE: Final = 0x18
_OF_A_MAP: Final = (1, 2)
_SOURCE_SHIFT: Final = 4
_LICENSE: Final = b"Dual BSD/GPL"
# linux/btf.h: a header, one type, which is a signed integer of 32 bits, and its name.
_BTF_OF_INT: Final = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 16, 16, 5) + struct.pack(
    "=IIII5s", 1, 1 << 24, 4, 1 << 24 | 32, b"\0int\0"
)

# linux/bpf.h
_LINK_TYPE_CGROUP: Final = 3
_QUERY_EFFECTIVE: Final = 1
_ALLOW_OVERRIDE: Final = 1
_ALLOW_MULTI: Final = 2
# The kernel lets 64 programs attach to one cgroup (BPF_CGROUP_MAX_PROGS); the levels above add theirs.
_QUERY_PROGRAMS: Final = 1024
_READ_ONLY_TO_PROGRAMS: Final = 1 << 7


class AttachType(IntEnum):
    """enum bpf_attach_type (linux/bpf.h), as far as bpfrl attaches."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_SOCK_OPS = 3
    TRACE_ITER = 28


class ProgramType(IntEnum):
    """enum bpf_prog_type (linux/bpf.h), as far as bpfrl loads."""

    CGROUP_SKB = 8
    SOCK_OPS = 13
    TRACING = 26


class MapType(IntEnum):
    """enum bpf_map_type (linux/bpf.h), as far as bpfrl makes."""

    ARRAY = 2
    PERCPU_ARRAY = 6
    SK_STORAGE = 24


class MapShape(NamedTuple):
    """What a map is made as; sizes in byte, flags as BPF_F_* (linux/bpf.h)."""

    kind: int
    key_size: int
    value_size: int
    entries: int
    flags: int


class Shape(NamedTuple):
    """Everything that an object holds for the kernel.

    Attributes:
        programs: by their functions' names, what each is and where it may attach.
        maps: by their names or their sections'.
    """

    programs: Mapping[str, tuple[int, int]]
    maps: Mapping[str, MapShape]


class _OpenOptions(Structure):
    """struct bpf_object_open_opts (bpf/libbpf.h)."""

    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("_removed", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
        ("kernel_log_buf", c_void_p),
        ("kernel_log_size", c_size_t),
        ("kernel_log_level", c_uint32),
    )


class _ProgramOptions(Structure):
    """struct bpf_prog_load_opts (bpf/bpf.h)."""

    _fields_ = (
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_void_p),
    )


class _MapOptions(Structure):
    """struct bpf_map_create_opts (bpf/bpf.h), without its last fields."""

    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
    )


class _CgroupLinkInfo(Structure):
    """struct bpf_link_info (linux/bpf.h), of a link to a cgroup."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("cgroup_id", c_uint64),
        ("attach_type", c_uint32),
        ("_rest", c_uint32 * 16),
    )


class _MapInfo(Structure):
    """The beginning of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("_entries_and_flags", c_uint32 * 2),
        ("_name", c_char * 16),
        ("_device", c_uint32 * 2),
        ("_namespace", c_uint64 * 2),
        ("btf_id", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
    )


class _ProgramInfo(Structure):
    """The beginning of struct bpf_prog_info (linux/bpf.h)."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("_instructions", c_uint64 * 3),
        ("load_time", c_uint64),
        ("_maps", c_uint64 * 2),
        ("name", c_char * 16),
        ("_between", c_uint64 * 14),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
    )


_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libbpf_set_print": (c_void_p, (c_void_p,)),
    "libbpf_num_possible_cpus": (c_int, ()),
    "libbpf_version_string": (c_char_p, ()),
    "libbpf_strerror": (c_int, (c_int, c_char_p, c_size_t)),
    "libbpf_find_vmlinux_btf_id": (c_int, (c_char_p, c_int)),
    "bpf_prog_load": (c_int, (c_int, c_char_p, c_char_p, c_char_p, c_size_t, POINTER(_ProgramOptions))),
    "bpf_map_create": (c_int, (c_int, c_char_p, c_uint32, c_uint32, c_uint32, POINTER(_MapOptions))),
    "bpf_btf_load": (c_int, (c_char_p, c_size_t, c_void_p)),
    "bpf_object__open_mem": (c_void_p, (c_char_p, c_size_t, POINTER(_OpenOptions))),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__type": (c_int, (c_void_p,)),
    "bpf_program__expected_attach_type": (c_int, (c_void_p,)),
    "bpf_program__autoload": (c_bool, (c_void_p,)),
    "bpf_program__section_name": (c_char_p, (c_void_p,)),
    "bpf_program__insns": (c_void_p, (c_void_p,)),
    "bpf_program__insn_cnt": (c_size_t, (c_void_p,)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__type": (c_int, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map__max_entries": (c_uint32, (c_void_p,)),
    "bpf_map__map_flags": (c_uint32, (c_void_p,)),
    "bpf_map__pin_path": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__is_internal": (c_bool, (c_void_p,)),
    "bpf_map_freeze": (c_int, (c_int,)),
    "bpf_btf_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_prog_bind_map": (c_int, (c_int, c_int, c_void_p)),
    "bpf_obj_pin": (c_int, (c_int, c_char_p)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, POINTER(c_uint32))),
    "bpf_link_create": (c_int, (c_int, c_int, c_int, c_void_p)),
    "bpf_link_update": (c_int, (c_int, c_int, c_void_p)),
    "bpf_link_detach": (c_int, (c_int,)),
    "bpf_prog_query": (c_int, (c_int, c_int, c_uint32, c_void_p, POINTER(c_uint32), POINTER(c_uint32))),
    "bpf_prog_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_iter_create": (c_int, (c_int,)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
}

# What takes milliseconds, or waits for others who change cgroups: Python's other threads run meanwhile.
_WAITING: Final = {
    "bpf_prog_load",
    "bpf_object__open_mem",
    "bpf_object__load",
    "bpf_object__close",
    "libbpf_find_vmlinux_btf_id",
    "bpf_link_create",
    "bpf_link_update",
    "bpf_link_detach",
    "bpf_prog_query",
    "bpf_iter_create",
}


class Descriptor:
    """A file descriptor of a BPF object, closed when its context ends."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)

    def again(self) -> Descriptor:
        """Another one of the same, to be closed for itself."""
        try:
            return Descriptor(fcntl.fcntl(self.number, fcntl.F_DUPFD_CLOEXEC))
        except OSError as error:
            raise KernelError(f"cannot copy a descriptor: {error.strerror}") from error

    def pin(self, path: Path) -> None:
        """Give the object a name in a bpffs; it lives at least as long as that."""
        _check(_lib().bpf_obj_pin(self.number, os.fsencode(path)), f"pin {path}")


class LoadedObject:
    """The programs and maps of an object in the kernel, until its context ends or something pins them."""

    def __init__(
        self,
        image: bytes,
        reuse: Mapping[str, Descriptor] | None = None,
        shape: Shape | None = None,
        data: Mapping[str, slice] | None = None,
        programs: Collection[str] | None = None,
    ) -> None:
        """Load programs, and make every map but those in ``reuse``, which are taken instead.

        Args:
            image: the object.
            reuse: maps that are there already, by name.
            shape: what it must hold, no less and no more, if that is not known for certain.
            data: where the object has the contents of maps in which it differs from others that are the same else.
            programs: which of them to load; None: all.

        Raises:
            InvalidObjectError: it is damaged, or does not have that shape; nothing of it has gone to the kernel.
            VerifierError: the kernel does not take its programs.
        """
        reuse, data = reuse or {}, data or {}
        ready = _ready(image, shape, data)
        if missing := reuse.keys() - ready.maps.keys():
            raise KernelError(f"cannot keep the map {min(missing)}: the object has none")
        contents = {name: image[place] for name, place in data.items()}
        with ExitStack() as stack:
            self._maps = {
                name: stack.enter_context(
                    reuse[name].again() if name in reuse else plan.make(contents.get(name, plan.content))
                )
                for name, plan in ready.maps.items()
            }
            self._programs = {
                name: stack.enter_context(plan.load(self._maps))
                for name, plan in ready.programs.items()
                if programs is None or name in programs
            }
            for name, plan in ready.maps.items():
                if plan.is_constant:
                    self._bind(name)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def program(self, name: str) -> Descriptor:
        """A program, by its function's name; the descriptor belongs to the object."""
        if name not in self._programs:
            raise KernelError(f"cannot find the program {name}")
        return self._programs[name]

    def map(self, name: str) -> Descriptor:
        """A map, by its name or its section's; the descriptor belongs to the object."""
        if name not in self._maps:
            raise KernelError(f"cannot find the map {name}")
        return self._maps[name]

    def _bind(self, name: str) -> None:
        """Have every program tell whose it is, also those that do not read it."""
        for program in self._programs.values():
            _check(_lib().bpf_prog_bind_map(program.number, self._maps[name].number, None), f"bind {name}")


class _Program(NamedTuple):
    """A program as this kernel wants it.

    Attributes:
        name: its function's.
        kind: its type.
        attach: where it goes.
        iterates: what it goes over, by the number of that in the kernel's types; 0: nothing.
        instructions: struct bpf_insn (linux/bpf.h), one after the other.
        maps: at which offsets in there a map's descriptor belongs, and which map's.
    """

    name: str
    kind: int
    attach: int
    iterates: int
    instructions: bytes
    maps: Sequence[tuple[int, str]]

    def load(self, maps: Mapping[str, Descriptor]) -> Descriptor:
        """Have the kernel take it, with these maps."""
        instructions = bytearray(self.instructions)
        for place, name in self.maps:
            _IMMEDIATE.pack_into(instructions, place + _IMMEDIATE_AT, maps[name].number)
        options = _ProgramOptions(expected_attach_type=self.attach, attach_btf_id=self.iterates)
        return _load(self.name, self.kind, bytes(instructions), options)


class _Types:
    """The types of maps' keys and values in the kernel, as long as anyone makes maps with them."""

    def __init__(self, number: int) -> None:
        self.number = _check(_lib().bpf_btf_get_fd_by_id(number), "look at a map's types")
        weakref.finalize(self, os.close, self.number).atexit = False


class _Map(NamedTuple):
    """A map as it is made.

    Attributes:
        name: the kernel's name for it.
        shape: what it is made as.
        types: the types of its keys and values: the object that has them, if any, and their numbers in it.
        content: what it begins with; empty: zeros.
        is_constant: nobody may change it.
    """

    name: str
    shape: MapShape
    types: tuple[_Types | None, int, int]
    content: bytes
    is_constant: bool

    def make(self, content: bytes) -> Descriptor:
        """Make it, with some content in the place of its own."""
        types, key, value = self.types
        options = _MapOptions(map_flags=self.shape.flags, btf_key_type_id=key, btf_value_type_id=value)
        options.btf_fd = types.number if types else 0
        made = _make_map(self.name, self.shape, options)
        with ExitStack() as undo:
            undo.enter_context(made)
            if content:
                written = _lib().bpf_map_update_elem(made.number, byref(c_uint32(0)), content, 0)
                _check(written, f"fill {self.name}")
            if self.is_constant:
                _check(_lib().bpf_map_freeze(made.number), f"freeze {self.name}")
            undo.pop_all()
        return made


class _Ready(NamedTuple):
    """An object as libbpf has made it ready for this kernel: by name, its programs and its maps."""

    programs: Mapping[str, _Program]
    maps: Mapping[str, _Map]


# By the digest of what objects have in common. libbpf takes tens of milliseconds, and as many megabytes, to find the
# places of a few fields in the kernel's types, each time anew; and pods' objects differ by nothing but their data.
_readied: Final[dict[bytes, _Ready]] = {}
# Those of one version, and of one beside it.
_MOST_READIED: Final = 8
_READYING: Final = threading.Lock()


def _ready(image: bytes, shape: Shape | None, data: Mapping[str, slice]) -> _Ready:
    """Have libbpf make an object ready, unless it has done so with one that differs by nothing but its data."""
    common = hashlib.sha256(repr((shape, sorted((name, at.start, at.stop) for name, at in data.items()))).encode())
    start = 0
    for at in sorted(data.values(), key=lambda each: each.start):
        common.update(image[start : at.start])
        start = at.stop
    common.update(image[start:])
    key = common.digest()
    with _READYING:
        if key not in _readied:
            found = _make_ready(image, shape)
            while len(_readied) >= _MOST_READIED:
                del _readied[next(iter(_readied))]
            _readied[key] = found
        return _readied[key]


def _make_ready(image: bytes, shape: Shape | None) -> _Ready:
    """Open an object, load it once, and see what libbpf has made of it."""
    lib = _lib()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options = _OpenOptions(object_name=_OBJECT_NAME, kernel_log_buf=ctypes.addressof(log), kernel_log_size=len(log))
    options.sz = ctypes.sizeof(options)
    opened = lib.bpf_object__open_mem(image, len(image), byref(options))
    if not opened:
        raise InvalidObjectError(f"libbpf cannot open the object: {_reason(ctypes.get_errno())}")
    try:
        if shape:
            _compare(opened, shape)
        if lib.bpf_object__load(opened) < 0:
            number, verdict = ctypes.get_errno(), _last_lines(log.value.decode(errors="replace"))
            if shape and not verdict and (number == errno.EINVAL or number >= _LIBBPF_ERRNO):
                # An object that is known for certain may be beyond this kernel; any other is more likely damaged.
                raise InvalidObjectError(f"libbpf cannot load the object: {_reason(number)}")
            _refused(verdict)
        types = cache(_Types)  # an object's maps have them in common
        maps = {handle: _map_of(handle, types) for handle in _each(lib.bpf_object__next_map, opened)}
        names = {lib.bpf_map__fd(handle): name for handle, (name, _) in maps.items()}
        programs = [_program_of(handle, names) for handle in _each(lib.bpf_object__next_program, opened)]
    finally:
        lib.bpf_object__close(opened)
    return _Ready({program.name: program for program in programs}, dict(maps.values()))


def _each(following: Callable[[int, int | None], int | None], opened: int) -> Iterator[int]:
    handle = None
    while handle := following(opened, handle):
        yield handle


def _program_of(handle: int, names: Mapping[int, str]) -> _Program:
    """A program that libbpf has loaded."""
    lib = _lib()
    code = ctypes.string_at(lib.bpf_program__insns(handle), lib.bpf_program__insn_cnt(handle) * _INSTRUCTION_BYTES)
    maps = []
    places = iter(range(0, len(code), _INSTRUCTION_BYTES))
    for place in places:
        operation, registers, _, value = _INSTRUCTION.unpack_from(code, place)
        if operation == _LOAD_IMMEDIATE:
            next(places, None)  # its second half
            if registers >> _SOURCE_SHIFT in _OF_A_MAP:
                maps.append((place, names[value]))
    attach = lib.bpf_program__expected_attach_type(handle)
    over = lib.bpf_program__section_name(handle).decode().partition("/")[2]
    iterates = _find_iterator(over) if attach == AttachType.TRACE_ITER else 0
    return _Program(lib.bpf_program__name(handle).decode(), lib.bpf_program__type(handle), attach, iterates, code, maps)


def _map_of(handle: int, types: Callable[[int], _Types]) -> tuple[str, _Map]:
    """A map that libbpf has made, and what the object calls it."""
    lib = _lib()
    name = lib.bpf_map__name(handle).decode()
    shape = _shape_of(handle)
    number = lib.bpf_map__fd(handle)
    info = _info(Descriptor(number), _MapInfo)
    content = b""
    if lib.bpf_map__is_internal(handle) and shape.value_size:
        value = (c_uint8 * shape.value_size)()
        _check(lib.bpf_map_lookup_elem(number, byref(c_uint32(0)), byref(value)), "read a map")
        content = bytes(value) if any(value) else b""
    constant = bool(shape.flags & _READ_ONLY_TO_PROGRAMS)
    known = (types(info.btf_id) if info.btf_id else None, info.btf_key_type_id, info.btf_value_type_id)
    return _SECTION_MAP.sub("", name), _Map(name, shape, known, content, constant)


def version() -> str:
    """Which libbpf this is."""
    text: bytes = _lib().libbpf_version_string()
    return text.decode()


def load(
    name: str, kind: ProgramType, instructions: bytes, attach: AttachType | None = None, iterates: str = ""
) -> Descriptor:
    """Load a program as it is, without an object.

    Args:
        name: at most 15 characters.
        kind: its type.
        instructions: struct bpf_insn (linux/bpf.h), one after the other.
        attach: where it is to be attached, where its type leaves that open.
        iterates: what it goes over, for an iterator.

    Raises:
        VerifierError: the kernel does not take it.
        KernelError: the kernel has no such iterator.
    """
    options = _ProgramOptions(expected_attach_type=attach or 0)
    options.attach_btf_id = _find_iterator(iterates) if iterates else 0
    return _load(name, kind, instructions, options)


def make_map(name: str, shape: MapShape) -> Descriptor:
    """Make a map whose keys and values, if it is one that wants to know, are integers."""
    options = _MapOptions(map_flags=shape.flags)
    with ExitStack() as stack:
        if shape.kind == MapType.SK_STORAGE:
            described = _check(_lib().bpf_btf_load(_BTF_OF_INT, len(_BTF_OF_INT), None), "load types")
            stack.enter_context(Descriptor(described))
            options.btf_fd, options.btf_key_type_id, options.btf_value_type_id = described, 1, 1
        return _make_map(name, shape, options)


def is_folder(path: Path) -> bool:
    """True for a folder that is root's or this user's, False where nothing is.

    Raises:
        BrokenLimiterError: there is something else; links are not followed.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise BrokenLimiterError(f"{path} is no folder, and not made by bpfrl: remove it")
    if not _is_safe(found):
        raise BrokenLimiterError(f"{path} belongs to another user, and was not made by bpfrl: remove it")
    return True


def folders(bpffs: Path) -> Iterator[str]:
    """The names of the folders in a bpffs that :func:`is_folder` accepts; there may be other things."""
    with os.scandir(bpffs) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False) and _is_safe(entry.stat(follow_symlinks=False)):
                    yield entry.name


def _is_safe(folder: os.stat_result) -> bool:
    """True for what nobody else can put something in the place of.

    A bpffs may be writable by everybody, with the sticky bit. What belongs to another may be a link, to the limiter of
    another pod say, by the time it is used.
    """
    return folder.st_uid in (0, os.geteuid())


def open_pinned(path: Path | str) -> Descriptor:
    """Open a pinned program, map or link."""
    number = _lib().bpf_obj_get(os.fsencode(path))
    if number < 0 and ctypes.get_errno() == errno.EACCES and Path(path).is_dir():
        # Not for want of privileges: whoever makes folders here must not stop what looks at all pins.
        raise KernelError(f"cannot open {path}: it is a folder")
    return Descriptor(_check(number, f"open {path}"))


def attach(program: Descriptor, target: int, kind: AttachType) -> Descriptor:
    """Link a program to a cgroup's descriptor; others that are attached there stay."""
    number = _lib().bpf_link_create(program.number, target, kind, None)
    if number < 0 and ctypes.get_errno() == errno.EPERM:
        # Not for want of privileges: the program would not have been loaded.
        raise KernelError(
            f"cannot attach ({kind.name.lower()}): another program has this cgroup, or one above it, to itself;"
            " find it with bpftool cgroup tree, and have it attached with 'multi'"
        )
    return Descriptor(_check(number, f"attach ({kind.name.lower()})"))


def replace(link: Descriptor, program: Descriptor) -> None:
    """Put another program in a link's place, at once."""
    _check(_lib().bpf_link_update(link.number, program.number, None), "replace a program")


def detach(link: Descriptor) -> None:
    """Take a link's program off its cgroup now, whoever still holds the link."""
    _check(_lib().bpf_link_detach(link.number), "detach")


class Linked(NamedTuple):
    """What a link connects: the cgroup's id is 0 once that is gone, or the link detached."""

    cgroup_id: int
    program_id: int


def linked(link: Descriptor) -> Linked:
    """What a link to a cgroup connects."""
    info = _info(link, _CgroupLinkInfo)
    if info.type != _LINK_TYPE_CGROUP:
        raise KernelError("a pin that should be a link to a cgroup is something else")
    return Linked(int(info.cgroup_id), int(info.prog_id))


class Program(NamedTuple):
    """What the kernel says of a program.

    Attributes:
        id: its number, which no other has while the machine runs.
        name: at most 15 characters.
        tag: the kernel's digest of its instructions.
        kind: its type in the kernel's words, or the number of one that is not known here.
    """

    id: int
    name: str
    tag: bytes
    kind: str


class Attached(NamedTuple):
    """What is attached to a cgroup in one place.

    Attributes:
        programs: in the order in which they run.
        mode: how those of the cgroup itself go with others: "multi", "override" (one below takes their place) or
            "exclusive"; it says nothing where there are none.
    """

    programs: list[Program]
    mode: str


def attached(target: int, kind: AttachType, *, effective: bool) -> Attached:
    """The programs on a cgroup's descriptor; effective: and on those above it, all that run for it."""
    ids = (c_uint32 * _QUERY_PROGRAMS)()
    count, flags = c_uint32(len(ids)), c_uint32()
    scope = _QUERY_EFFECTIVE if effective else 0
    _check(_lib().bpf_prog_query(target, kind, scope, byref(flags), ids, byref(count)), "look what is attached")
    found = []
    for number in ids[: count.value]:
        descriptor = _lib().bpf_prog_get_fd_by_id(number)
        if descriptor < 0 and ctypes.get_errno() == errno.ENOENT:
            continue  # gone meanwhile
        with Descriptor(_check(descriptor, "look what is attached")) as program:
            info = _info(program, _ProgramInfo)
        found.append(Program(number, info.name.decode(errors="replace"), bytes(info.tag), _kind(info.type)))
    mode = "multi" if flags.value & _ALLOW_MULTI else "override" if flags.value & _ALLOW_OVERRIDE else "exclusive"
    return Attached(found, mode)


class Cost(NamedTuple):
    """What a program has cost while the kernel counted that (kernel.bpf_stats_enabled).

    Attributes:
        program_id: the kernel's number for the program; no other ever gets it while this one is loaded.
        loaded_ns: when it was loaded, ns since boot.
        run_ns: how long it has run, ns.
        runs: how often.
    """

    program_id: int
    loaded_ns: int
    run_ns: int
    runs: int


def cost(program: Descriptor) -> Cost:
    """What a program has cost so far."""
    info = _info(program, _ProgramInfo)
    return Cost(int(info.id), int(info.load_time), int(info.run_time_ns), int(info.run_cnt))


def tag(program: Descriptor) -> bytes:
    """The kernel's digest of a program's instructions."""
    return bytes(_info(program, _ProgramInfo).tag)


def read(array: Descriptor, index: int, kind: type[Data]) -> Data:
    """The value at an index of an array map."""
    value = kind()
    _expect(array, MapType.ARRAY, ctypes.sizeof(kind))
    _check(_lib().bpf_map_lookup_elem(array.number, byref(c_uint32(index)), byref(value)), "read a map")
    return value


def read_per_cpu(array: Descriptor, indices: Sequence[int], kind: type[Data]) -> list[list[Data]]:
    """The values at some indices of a per-CPU array map, of each one for each possible CPU."""
    lib = _lib()
    _expect(array, MapType.PERCPU_ARRAY, ctypes.sizeof(kind))
    values = [(kind * _check(lib.libbpf_num_possible_cpus(), "count the CPUs"))() for _ in indices]
    for index, found in zip(indices, values, strict=True):
        _check(lib.bpf_map_lookup_elem(array.number, byref(c_uint32(index)), byref(found)), "read a map")
    return [list(found) for found in values]


def write(array: Descriptor, index: int, value: Structure) -> None:
    """Replace the value at an index of an array map."""
    _expect(array, MapType.ARRAY, ctypes.sizeof(value))
    _check(_lib().bpf_map_update_elem(array.number, byref(c_uint32(index)), byref(value), 0), "write a map")


def has_kind(descriptor: Descriptor, kind: int) -> bool:
    """True for a program of a type."""
    is_program = str(Path(f"/proc/self/fd/{descriptor.number}").readlink()) == _PROGRAM_LINK
    return is_program and bool(_info(descriptor, _ProgramInfo).type == kind)


def has_shape(descriptor: Descriptor, shape: MapShape) -> bool:
    """True for a map of a kind, with keys and values of these sizes."""
    info = _info(descriptor, _MapInfo)
    return (info.type, info.key_size, info.value_size) == (shape.kind, shape.key_size, shape.value_size)


def is_same_map(one: Descriptor, other: Descriptor) -> bool:
    """True for two descriptors of one map."""
    return bool(_info(one, _MapInfo).id == _info(other, _MapInfo).id)


def iterate(program: Descriptor) -> None:
    """Run an iterator program over everything that the calling thread's network namespace has."""
    with Descriptor(_check(_lib().bpf_link_create(program.number, 0, AttachType.TRACE_ITER, None), "iterate")) as link:
        number = _check(_lib().bpf_iter_create(link.number), "iterate")
    with Descriptor(number):
        while os.read(number, _READ_BYTES):
            pass


def _load(name: str, kind: int, instructions: bytes, options: _ProgramOptions) -> Descriptor:
    """Have the kernel take a program, and ask it why only where it does not."""
    options.sz = ctypes.sizeof(options)
    what = (kind, name.encode(), _LICENSE, instructions, len(instructions) // _INSTRUCTION_BYTES)
    number = _lib().bpf_prog_load(*what, byref(options))
    if number < 0:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options.log_size, options.log_buf = len(log), ctypes.addressof(log)
        number = _lib().bpf_prog_load(*what, byref(options))
        if number < 0:
            _refused(_last_lines(log.value.decode(errors="replace")))
    return Descriptor(number)


def _make_map(name: str, shape: MapShape, options: _MapOptions) -> Descriptor:
    options.sz = ctypes.sizeof(options)
    sizes = (shape.key_size, shape.value_size, shape.entries)
    return Descriptor(_check(_lib().bpf_map_create(shape.kind, name.encode(), *sizes, byref(options)), "make a map"))


@cache  # libbpf reads all of the kernel's types for it
def _find_iterator(over: str) -> int:
    number = _lib().libbpf_find_vmlinux_btf_id(over.encode(), AttachType.TRACE_ITER)
    return _check(number, f"find the iterator over {over}")


def _kind(number: int) -> str:
    try:
        return ProgramType(number).name.lower()
    except ValueError:
        return f"type {number}"


def _expect(array: Descriptor, kind: int, value_size: int) -> None:
    """The kernel copies as much as the map's values have: a foreign map must not overrun ours."""
    info = _info(array, _MapInfo)
    if (info.type, info.key_size, info.value_size) != (kind, ctypes.sizeof(c_uint32), value_size):
        raise KernelError(f"a map has values of {info.value_size} byte where {value_size} were expected")


def _info(descriptor: Descriptor, kind: type[Data]) -> Data:
    info = kind()
    size = c_uint32(ctypes.sizeof(kind))
    if _lib().bpf_obj_get_info_by_fd(descriptor.number, byref(info), byref(size)) < 0:
        _fail("look at a pin")
    return info


def _check(result: int, action: str) -> int:
    if result < 0:
        _fail(action)
    return result


def _fail(action: str) -> NoReturn:
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.EACCES):
        raise PermissionDeniedError(f"cannot {action}: this needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)")
    raise KernelError(f"cannot {action}: {_reason(number)}")


def _reason(number: int) -> str:
    """What an error's number means; libbpf has some of its own."""
    if number < _LIBBPF_ERRNO:
        return os.strerror(number)
    text = ctypes.create_string_buffer(_REASON_BYTES)
    _lib().libbpf_strerror(number, text, len(text))
    return text.value.decode()


def _refused(verdict: str) -> NoReturn:
    """The load failed: for the programs' sake if the verifier has something to say."""
    if not verdict:
        _fail("load the BPF programs")
    raise VerifierError(f"the kernel refuses the BPF programs: {verdict}")


def _compare(opened: int, shape: Shape) -> None:
    programs, maps, pinned = _contents(opened)
    # Counted: of two things with one name, libbpf's look-ups find only the first.
    found, expected = Counter((*programs, *maps)), Counter((*shape.programs.items(), *shape.maps.items()))
    names = {name for name, _ in (found - expected) + (expected - found)} | pinned
    if names:
        raise InvalidObjectError(f"not the programs and maps of a limiter: {_plain(', '.join(sorted(names)[:_NAMES]))}")


def _contents(opened: int) -> tuple[list[tuple[str, tuple[int, int]]], list[tuple[str, MapShape]], set[str]]:
    """Programs and maps of an object that is open, and which maps want to be pinned somewhere."""
    lib = _lib()
    programs, maps, pinned = [], [], set()
    for handle in _each(lib.bpf_object__next_program, opened):
        name = lib.bpf_program__name(handle).decode(errors="replace")
        kind = (lib.bpf_program__type(handle), lib.bpf_program__expected_attach_type(handle))
        programs.append((name, kind if lib.bpf_program__autoload(handle) else _NOT_LOADED))
    for handle in _each(lib.bpf_object__next_map, opened):
        name = _SECTION_MAP.sub("", lib.bpf_map__name(handle).decode(errors="replace"))
        maps.append((name, _shape_of(handle)))
        if lib.bpf_map__pin_path(handle):
            pinned.add(name)
    return programs, maps, pinned


def _shape_of(handle: int) -> MapShape:
    """What libbpf makes a map as."""
    lib = _lib()
    return MapShape(
        lib.bpf_map__type(handle),
        lib.bpf_map__key_size(handle),
        lib.bpf_map__value_size(handle),
        lib.bpf_map__max_entries(handle),
        lib.bpf_map__map_flags(handle),
    )


def _last_lines(log: str) -> str:
    """The end of the verifier's log, where it says what it did not like."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    return _plain("; ".join(lines[-_LOG_LINES:]))


def _plain(text: str) -> str:
    """The beginning of what may repeat what an object holds."""
    return plain(text[:_LOG_CHARACTERS])


@cache
def _lib() -> Any:
    waiting = _library()
    # A thread that lets the interpreter go for some microseconds waits for longer until it has it back.
    quick = ctypes.PyDLL(waiting._name, use_errno=True)  # noqa: SLF001 - documented, as all of ctypes' names like it
    functions = {name: getattr(waiting if name in _WAITING else quick, name) for name in _PROTOTYPES}
    for name, function in functions.items():
        function.restype, function.argtypes = _PROTOTYPES[name]
    functions["libbpf_set_print"](None)  # the reasons come back in errno and the log
    return SimpleNamespace(**functions)


def _library() -> ctypes.CDLL:
    with suppress(OSError):
        return ctypes.CDLL(_LIBRARY, use_errno=True)
    try:
        from bcc import lib  # noqa: PLC0415
    except ImportError as error:
        raise KernelError(
            "libbpf is missing: apt-get install python3-bpfcc, and make the virtual environment"
            " with /usr/bin/python3 -m venv --system-site-packages"
        ) from error
    found: ctypes.CDLL = lib
    return found
