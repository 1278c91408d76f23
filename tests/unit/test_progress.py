"""The progress bar and its word, at a terminal of their own, for they are for those alone."""

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


def at_a_terminal(patience: float, pause: float, *, piped: bool, work: str = WORK) -> tuple[str, str]:
    """What is drawn at a terminal, and what is piped elsewhere, by work of four steps."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    command = [sys.executable, "-c", work, str(patience), str(pause)]
    stdout = subprocess.PIPE if piped else terminal
    done = subprocess.run(command, stdout=stdout, stderr=terminal, env=environment, check=False, timeout=30)
    os.close(terminal)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other end any more
        while chunk := os.read(controller, 65_536):
            drawn += chunk
    os.close(controller)
    assert done.returncode == 0, drawn
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
