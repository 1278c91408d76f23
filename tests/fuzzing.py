"""How long tests with made-up input run: in CI for a moment, and with ``make fuzz`` for as long as it is told.

BPFRL_FUZZ is the number of the round. Each round makes other input than the one before it, and the same whenever it is
run again; without it, it is round 0, whose input is always the same.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import Phase, settings

ROUND: Final = int(os.environ.get("BPFRL_FUZZ", "0"))
_LONGER: Final = 20


def runs(short: int, long: int) -> range:
    """The seeds of this round, so many in CI and so many in a long run."""
    return range(long * ROUND, long * (ROUND + 1)) if ROUND else range(short)


def examples(short: int, long: int = 0) -> settings:
    """For hypothesis: so many examples in CI, and so many in a long run."""
    phases = (Phase.explicit, Phase.generate, Phase.target, Phase.shrink)
    return settings(max_examples=(long or _LONGER * short) if ROUND else short, phases=phases, print_blob=True)
