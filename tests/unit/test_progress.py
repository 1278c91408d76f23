"""What is drawn and drawn again, at a terminal of its own, for it is for those alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from bpfrl.commands.progress import patience, progress

WORK = """
import sys, time
import click
from bpfrl.commands import progress
progress._PATIENCE_SECONDS = float(sys.argv[1])
with progress.progress("working", 4) as done:
    for number in range(4):
        click.echo(f"result {number}", file=sys.stdout)
        done()
        time.sleep(float(sys.argv[2]))
print("the end")
"""


WAIT = """
import sys, time
from bpfrl.commands import progress
progress._PATIENCE_SECONDS = float(sys.argv[1])
with progress.patience("looking") as now:
    time.sleep(float(sys.argv[2]))
    now("asking")
    time.sleep(float(sys.argv[2]))
print("the end")
"""


def at_a_terminal(
    patience: float, pause: float, *, piped: bool, work: str = WORK, columns: int = 80, status: int = 0
) -> tuple[str, str]:
    """What is drawn at a terminal, and what is piped elsewhere, by work of four steps."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "LANG": "C.UTF-8"}
    command = [sys.executable, "-c", work, str(patience), str(pause)]
    stdout = subprocess.PIPE if piped else terminal
    done = subprocess.run(command, stdout=stdout, stderr=terminal, env=environment, check=False, timeout=30)
    os.close(terminal)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other end any more
        while chunk := os.read(controller, 65_536):
            drawn += chunk
    os.close(controller)
    assert done.returncode == status, drawn
    return drawn.decode(), (done.stdout or b"").decode()


RESULTS = "".join(f"result {number}\n" for number in range(4)) + "the end\n"


def test_what_takes_long_has_a_bar_and_its_results_are_whole() -> None:
    drawn, results = at_a_terminal(0.0, 0.3, piped=True)
    assert results == RESULTS
    assert "working" in drawn
    assert "4/4" in drawn
    # It is gone when it is done.
    assert drawn.rstrip().endswith("\x1b[2K") or "\x1b[2K" in drawn[drawn.rindex("4/4") :]
    assert "\x1b[?25h" in drawn


def test_results_for_the_same_terminal_stand_above_the_bar() -> None:
    drawn, _ = at_a_terminal(0.0, 0.3, piped=False)
    assert "working" in drawn
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    for line in RESULTS.splitlines():
        assert re.search(rf"(?:^|[\r\n]){line}\r\n", plain), (line, plain)


@pytest.mark.parametrize("piped", [True, False])
def test_what_is_done_soon_has_none(*, piped: bool) -> None:
    drawn, results = at_a_terminal(20.0, 0.0, piped=piped)
    assert (drawn.replace("\r\n", "\n") + results) == RESULTS


DETACH = """
import sys, time
from bpfrl.bpf.limiter import Broken
from bpfrl.cli import cli
from bpfrl.commands import progress
from bpfrl.errors import KernelError
from bpfrl.limits import Change
from bpfrl.node.agent import Agent
progress._PATIENCE_SECONDS = float(sys.argv[1])
def detach(self, uid):
    time.sleep(float(sys.argv[2]))
    if uid.startswith("2"):
        raise KernelError("played")
    return Change.DETACHED
Agent.limiters = lambda self: [Broken(str(number) * 32, "played") for number in range(4)]
Agent.detach = detach
cli.main(["detach", "--all"])
"""


@pytest.mark.parametrize("piped", [True, False])
def test_taking_many_limits_off_has_a_bar(*, piped: bool) -> None:
    drawn, results = at_a_terminal(0.0, 0.3, piped=piped, work=DETACH, status=1)
    assert re.search(r"detaching .*3/4", drawn)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    lines = [f"pod/{str(number) * 32} detached" for number in (0, 1, 3)]
    assert re.search(r"(?:^|[\r\n])bpfrl: played\r\n", plain)
    if piped:
        assert results.splitlines() == lines
    else:
        assert all(re.search(rf"(?:^|[\r\n]){line}\r\n", plain) for line in lines)


WATCH = """
import itertools, time
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Status
from bpfrl.cli import cli
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
seconds = itertools.count(1)
def sleep(_):
    if next(seconds) == 4:
        raise KeyboardInterrupt
time.time = lambda: float(next(seconds))
time.sleep = sleep
sent = itertools.count(0, 1_250_000)
limits = Limits(Rate(10_000_000))
def limiters(self):
    counters = Counters(0, next(sent), 0, 0)
    return [Status(PodRef("f" * 32, "shop", "cart"), limits, counters, Counters(), 7, 0.0)]
Agent.limiters = limiters
cli.main(["list", "--watch"])
"""


def test_a_list_that_is_watched_draws_pictures_and_leaves_the_last_ones_there() -> None:
    drawn, _ = at_a_terminal(0, 0, piped=False, work=WATCH, columns=160, status=130)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert "UID" not in plain
    header, last = plain.splitlines()[-3:-1]
    assert header.split() == [
        *("POD", "EGRESS", "SENDING", "TX-LOAD", "INGRESS", "RECEIVING", "RX-LOAD", "DROPPING", "DROPS")
    ]
    # A look each two seconds, each with half of what the limit lets through.
    assert last.split() == ["shop/cart", "10mbit", "5.00Mbit", "▅", "-", "0bit", "-", "0bit", "0.0%"]
    assert "\x1b[?25h" in drawn


MANY = """
import time
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Status
from bpfrl.cli import cli
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
def sleep(_):
    raise KeyboardInterrupt
time.sleep = sleep
pods = [PodRef(f"{number:032x}", "shop", f"cart-{number}") for number in range(40)]
Agent.limiters = lambda self: [Status(pod, Limits(Rate(1000)), Counters(), Counters(), 7, 0.0) for pod in pods]
cli.main(["list", "--watch"])
"""


def test_of_more_limiters_than_there_are_lines_the_first_are_drawn() -> None:
    drawn, _ = at_a_terminal(0, 0, piped=False, work=MANY, columns=160, status=130)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).splitlines()
    # It is drawn once more at the end.
    assert [line.split()[0] for line in lines if "cart-" in line] == [f"shop/cart-{n}" for n in range(21)] * 2
    assert "and 19 more" in lines


def test_without_a_terminal_there_is_none(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfrl.commands.progress._PATIENCE_SECONDS", 0.0)
    with progress("working", 1) as done:
        done()
    assert capfd.readouterr() == ("", "")


def test_what_is_waited_for_is_said_after_a_while_and_gone_at_the_end() -> None:
    drawn, results = at_a_terminal(0.0, 0.3, piped=True, work=WAIT)
    assert results == "the end\n"
    assert drawn.index("looking") < drawn.index("asking")
    assert "\x1b[2K" in drawn[drawn.rindex("asking") :]
    assert at_a_terminal(20.0, 0.0, piped=True, work=WAIT) == ("", "the end\n")


def test_without_a_terminal_nothing_is_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpfrl.commands.progress._PATIENCE_SECONDS", 0.0)
    with patience("looking") as now:
        now("asking")
    assert capfd.readouterr() == ("", "")
