"""A few numbers as one line of blocks, as high as each is of a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.segment import Segment

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
# For terminals that have nothing else.
_ASCII: Final = "_.-=+*%#"
_UNKNOWN: Final = " "


class Sparkline:
    """A line of blocks: the lowest is nothing, a full one the whole or more, and a gap what nobody knows.

    It is as long as there are shares, or as there is room: then the latest are shown.

    Args:
        shares: of the whole, in the order of time.
    """

    def __init__(self, shares: Sequence[float | None]) -> None:
        self._shares = shares

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterable[Segment]:
        """Draw it."""
        blocks = _ASCII if options.ascii_only else _BLOCKS
        yield Segment("".join(_block(share, blocks) for share in self._shares[-options.max_width :]))

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        """Any width will do."""
        return Measurement(1, max(1, min(len(self._shares), options.max_width)))


def _block(share: float | None, blocks: str) -> str:
    if share is None:
        return _UNKNOWN
    return blocks[round(min(max(share, 0.0), 1.0) * (len(blocks) - 1))]
