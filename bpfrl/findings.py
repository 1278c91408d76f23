"""What somebody has looked at, and what came of it: the rows of ``bpfrl explain`` and ``bpfrl doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """How it is with one thing that was looked at."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        mark: how it is with it.
        found: what was found, a line each.
        advice: what to do where it is not as it should be, "" where there is nothing to do.
    """

    name: str
    mark: Mark
    found: tuple[str, ...]
    advice: str = ""
