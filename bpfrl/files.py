"""Files that nobody else may read or change, whatever the umask is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o600


def make_folder(folder: Path) -> None:
    """Make a folder for this user alone, and what is missing above it, which others may enter. Raises OSError."""
    for missing in reversed([parent for parent in folder.parents if not parent.exists()]):
        missing.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def write(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file that appears whole, and is at no time open to more than its mode says. Raises OSError."""
    number, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
