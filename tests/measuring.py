"""Coverage, where a process cannot be measured."""

from __future__ import annotations

import os


def unmeasured() -> dict[str, str]:
    """The environment for a process that may not write where coverage keeps its data, and would complain of that."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
