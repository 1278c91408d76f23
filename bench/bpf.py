"""The benchmarks' own BPF programs: compiled by clang, loaded and attached by bpftool."""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from bench.lab import Json

# Where Debian has the headers of the machine's own architecture.
_HEADERS: Final = f"-I/usr/include/{platform.machine()}-linux-gnu"
_FLAGS: Final = ("-target", "bpf", "-O2", "-g", "-Wall", _HEADERS)


def load(source: str, pins: Path) -> None:
    """Compile a program of this folder, and pin what it consists of below ``pins``."""
    with tempfile.NamedTemporaryFile(suffix=".o") as built:
        _run("clang", *_FLAGS, "-c", str(Path(__file__).with_name(source)), "-o", built.name)
        _run("bpftool", "prog", "loadall", built.name, str(pins), "pinmaps", str(pins))


def attach(folder: Path, attach_type: str, pin: Path) -> None:
    """Attach a program to a cgroup, behind those that are there."""
    _run("bpftool", "cgroup", "attach", str(folder), attach_type, "pinned", str(pin), "multi")


def detach(folder: Path, attach_type: str, pin: Path) -> None:
    """Undo :func:`attach`."""
    _run("bpftool", "cgroup", "detach", str(folder), attach_type, "pinned", str(pin))


def program(pin: Path) -> Json:
    """What bpftool tells of a program."""
    shown: Json = json.loads(_run("bpftool", "-j", "prog", "show", "pinned", str(pin)))
    return shown


def values(pin: Path) -> list[Json]:
    """The entries of an array, as its types describe them."""
    return [
        entry["formatted"]["value"] for entry in json.loads(_run("bpftool", "-j", "map", "dump", "pinned", str(pin)))
    ]


def update(pin: Path, index: int, value: bytes) -> None:
    """Write an entry of an array."""
    key = [str(byte) for byte in index.to_bytes(4, "little")]
    _run("bpftool", "map", "update", "pinned", str(pin), "key", *key, "value", *map(str, value))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
