from __future__ import annotations

from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console
from rich.measure import Measurement

from bpfrl.sparkline import Sparkline


def drawn(shares: list[float | None], width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(Sparkline(shares), end="")
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("share", "block"),
    [
        (-1.0, "▁"),
        (0.0, "▁"),
        (0.07, "▁"),
        (0.08, "▂"),
        (0.5, "▅"),
        (0.92, "▇"),
        (0.93, "█"),
        (1.0, "█"),
        (25.0, "█"),
        (float("inf"), "█"),
        (None, " "),
    ],
)
def test_a_block_is_as_high_as_its_share(share: float | None, block: str) -> None:
    assert drawn([share]) == block


def test_time_goes_from_left_to_right_and_the_latest_are_shown() -> None:
    rising = [number / 7 for number in range(8)]
    assert drawn([*rising]) == "▁▂▃▄▅▆▇█"
    assert drawn([*rising], width=3) == "▆▇█"
    assert drawn([*rising[:2], None, *rising[:1]]) == "▁▂ ▁"
    assert drawn([]) == ""


def test_a_terminal_without_blocks_gets_ascii() -> None:
    console = Console(file=TextIOWrapper(BytesIO(), encoding="ascii"), width=80, color_system=None)
    with console.capture() as capture:
        console.print(Sparkline([number / 7 for number in range(8)]), end="")
    assert capture.get() == "_.-=+*%#"


def test_it_takes_the_room_that_there_is() -> None:
    console = Console(file=StringIO(), width=20)
    for count, width, measured in ((30, 20, (1, 20)), (30, 200, (1, 30)), (0, 20, (1, 1))):
        options = console.options.update_width(width)
        assert Measurement.get(console, options, Sparkline([0.5] * count)) == measured
