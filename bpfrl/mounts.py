"""The mounts that this process sees."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    path: Path
    root: str
    device: str
    type: str


def mounts(kind: str, table: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """The mounts of a file system type, in the order in which they were made (proc_pid_mountinfo(5))."""
    found = []
    # Paths may hold whatever a pod has asked for: bytes that are no text, and what Python takes for ends of lines.
    for line in os.fsdecode(table.read_bytes()).split("\n"):
        # id parent major:minor root mount-point options [optional fields] - type source options
        mount, _, source = line.partition(" - ")
        if source.split(" ")[0] == kind:
            _, _, device, root, path, *_ = mount.split(" ")
            found.append(Mount(Path(_unescape(path)), _unescape(root), device, kind))
    return found


def are_the_machines(own: Path = Path("/proc/self/ns/mnt"), first: Path = Path("/proc/1/ns/mnt")) -> bool:
    """True where this process sees the machine's own mounts, those of process 1, and not a container's or sandbox's.

    What is mounted elsewhere ends with the last process there. False also where that cannot be seen.
    """
    try:
        return own.readlink() == first.readlink()
    except OSError:
        return False


def _unescape(text: str) -> str:
    r"""Space, tab, newline and backslash stand as \ooo in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
