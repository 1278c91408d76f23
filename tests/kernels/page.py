"""``docs/kernels.md``, made from nothing but what the runs have left in ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

RESULTS: Final = Path(__file__).with_name("results.json")
PAGE: Final = Path(__file__).parents[2] / "docs/kernels.md"


@dataclass(frozen=True, slots=True)
class Run:
    """What a kernel's run has come to.

    Attributes:
        suite: of Debian.
        package: its name and version there.
        release: what the kernel calls itself.
        seconds: from power on to off.
        tests: "passed", "failed" or "skipped", by name.
        figures: what each test has measured, by its name.
    """

    suite: str
    package: str
    release: str
    seconds: float
    tests: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """How many tests have passed."""
        return f"{list(self.tests.values()).count('passed')} of {len(self.tests)} passed"


def load() -> list[Run]:
    """What is kept."""
    return [Run(**each) for each in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def save(runs: Sequence[Run]) -> None:
    """Keep runs, and write the page."""
    RESULTS.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
