"""The sockops programs at work in this process: compiled for this machine, with a kernel that is only played.

What the programs do with numbers needs no kernel to be seen, and here clang counts the products that leave their type.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from ctypes import Structure, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from importlib import resources
from pathlib import Path
from typing import Any

from bpfrl.bpf.layout import LimitData, LimitsData
from bpfrl.limits import Limits

HERE = Path(__file__).parent
SOURCES = Path(str(resources.files("bpfrl.bpf")))
UNLIMITED = 2**32 - 1
# The limiter's.
CGROUP = 4_711
# bpf_getsockopt(TCP_WINDOW_CLAMP) of a new socket: 64 KB at a window scale of 8.
OWN_WINDOW = 65_535 << 8

_FLAGS = ("-O1", "-shared", "-fPIC", "-w")
_COUNTED = ("unsigned-integer-overflow", "signed-integer-overflow", "integer-divide-by-zero")
_TYPES: dict[str, Any] = {"__u64": c_uint64, "__s64": c_int64, "__u32": c_uint32, "__u16": c_uint16, "__u8": c_uint8}


def source(name: str) -> str:
    """One of the programs' files."""
    return SOURCES.joinpath(name).read_text()


def constant(name: str, file: str) -> int:
    """The value of one of the programs' macros that stands for a plain number, or one that is shifted."""
    found = re.search(rf"^#define {name}\s+\(*(\d+)U?L*(?: << (\d+)\))?", source(file), re.MULTILINE)
    assert found, name
    return int(found[1]) << int(found[2] or 0)


def operations() -> dict[str, int]:
    """The numbers of sockops' operations and flags, by their names without BPF_SOCK_OPS_ (linux/bpf.h)."""
    header = Path("/usr/include/linux/bpf.h").read_text()
    listed = re.search(r"enum \{\s*BPF_SOCK_OPS_VOID,(.*?)\};", header, re.DOTALL)
    assert listed
    names = re.findall(r"^\s*BPF_SOCK_OPS_(\w+),", listed[1], re.MULTILINE)
    flags = re.findall(r"BPF_SOCK_OPS_(\w+_FLAG)\s*= \(1<<(\d+)\)", header)
    return {name: number for number, name in enumerate(names, 1)} | {name: 1 << int(bit) for name, bit in flags}


def mirror(name: str, file: str) -> type[Structure]:
    """A structure that only the programs have, if it is made of integers alone."""
    body = re.search(rf"^struct {name} \{{\n(.*?)^\}}", source(file), re.MULTILINE | re.DOTALL)
    assert body
    fields = re.findall(r"^\t(__[us]\d+) (\w+);", body[1], re.MULTILINE)
    assert len(fields) == len(re.findall(r"^\t\w", body[1], re.MULTILINE))
    return type(name, (Structure,), {"_fields_": [(field, _TYPES[kind]) for kind, field in fields]})


_Clock: Any = mirror("clock", "clock.h")
Socket: Any = mirror("bpfrl_socket", "sockets.h")
Played: Any = type(
    "Played",
    (Structure,),
    {
        "_fields_": [
            (name, _TYPES[kind])
            for kind, name in re.findall(r"^\t(__u\d\d) (\w+);", HERE.joinpath("played.c").read_text(), re.MULTILINE)
        ]
    },
)
OPERATIONS = operations()


class Clock(_Clock):  # type: ignore[misc]
    """struct clock."""

    @property
    def tat(self) -> int:
        """Up to when the limit is used up, ns."""
        return int(self.origin + self.charged) % 2**64

    @tat.setter
    def tat(self, value: int) -> None:
        self.origin = (value - self.charged) % 2**64


def build(program: str, entry: str, folder: Path) -> ctypes.CDLL:
    """Compile one of the programs, and load it."""
    library = folder / f"{program}.so"
    command = [
        *("clang", *_FLAGS, f"-fsanitize={','.join(_COUNTED)}", "-fsanitize-minimal-runtime"),
        *(f'-DPROGRAM="{program}"', f"-DENTRY={entry}", *(["-DLIMITER"] if "limiter" in program else [])),
        *(f"-I{SOURCES}", f"-I/usr/include/{platform.machine()}-linux-gnu"),
        *(str(HERE / "played.c"), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class Program:
    """A program with its socket; :meth:`reset` makes both new."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.call.argtypes = (c_uint32, c_uint32, c_uint32, c_uint64, c_uint32, c_uint32)
        self.played = Played.in_dll(library, "played")
        self.socket = Socket.in_dll(library, "storage")
        self.reset()

    def reset(self) -> None:
        self.library.reset()
        self.played.pacing, self.played.cwnd, self.played.window = UNLIMITED, 2**31 - 1, OWN_WINDOW
        self.played.now = 10**12

    def call(
        self, operation: str, *, srtt_us: int = 0, mss: int = 1_448, received: int = 0, length: int = 0, nxt: int = 0
    ) -> None:
        """One call of sockops; the smoothed round-trip time is in us, shifted as the kernel has it."""
        self.library.call(OPERATIONS[operation], srtt_us << 3, mss, received, length, nxt)

    def begin(self) -> None:
        """A connection that was asked for begins."""
        self.call("TCP_CONNECT_CB")
        self.call("ACTIVE_ESTABLISHED_CB", srtt_us=1_000, length=40)

    def send(self, **about: int) -> None:
        """A segment of data leaves."""
        self.call("HDR_OPT_LEN_CB", **{"length": 1_448, **about})

    def acknowledge(self, **about: int) -> None:
        """An ACK without data leaves."""
        self.call("HDR_OPT_LEN_CB", **about)


class Limiter(Program):
    """The limiter, with its limits and clocks."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, result, arguments in (
            ("fair_rate_of", c_uint64, (ctypes.POINTER(LimitData), c_int64)),
            ("rescale_of", c_int64, (ctypes.POINTER(Clock), ctypes.POINTER(LimitData), c_int64)),
            ("charge_of", None, (ctypes.POINTER(Clock), ctypes.POINTER(LimitData), c_uint64)),
            ("least_of", c_int64, (c_int64, c_int64)),
            ("greatest_of", c_int64, (c_int64, c_int64)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.packet.argtypes = (c_uint32, c_uint32, ctypes.c_uint8)
        self.limits = LimitsData.in_dll(library, "limits")
        super().__init__(library)

    def limit(self, limits: Limits) -> None:
        """Put limits in force."""
        from bpfrl.bpf import law  # noqa: PLC0415 - a test may have changed it

        ctypes.pointer(self.limits)[0] = law.encode(limits)

    def clock(self, direction: int) -> Any:
        """One of the clocks."""
        lines: Any = ((ctypes.c_uint8 * 64) * 2).in_dll(self.library, "clocks")
        return Clock.from_buffer(lines[direction])

    def packet(self, direction: int, length: int, protocol: int) -> bool:
        """A packet that leaves or arrives: True where it passes."""
        passed = self.library.packet(direction, length, protocol)
        assert passed >= 0
        return bool(passed)
