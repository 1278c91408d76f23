"""Log lines as JSON: each record is one line, whatever is in it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bpfrl.logs import JsonFormatter, Sparing, TextFormatter

COMMAND = Path(sys.executable).with_name("bpfrl")


def formatted(**fields: Any) -> dict[str, Any]:
    """What a record comes to; it is one line."""
    record = logging.makeLogRecord({"name": "bpfrl.test", "levelname": "WARNING", "msg": "told", **fields})
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    found: dict[str, Any] = json.loads(line)
    return found


def records(text: str) -> list[dict[str, Any]]:
    """The records in what a process has said, which must say nothing else."""
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_has_time_level_logger_and_message() -> None:
    moment = datetime(2026, 2, 3, 4, 5, 6, 789_000, tzinfo=UTC).timestamp()
    assert formatted(created=moment, msg="%s limited: %d", args=("pod", 7)) == {
        "time": "2026-02-03T04:05:06.789Z",
        "level": "warning",
        "logger": "bpfrl.test",
        "message": "pod limited: 7",
    }


@pytest.mark.parametrize(
    "message", ["two\nlines", "\r\n", '"quoted"', "\u2028\u2029\x85", "\x1b[31mred", "caf\u00e9", "\ud800", "\x00"]
)
def test_whatever_is_in_a_message_it_stays_one_line(message: str) -> None:
    assert formatted(msg="%s", args=(message,))["message"] == message


def test_an_exception_is_in_the_same_line() -> None:
    def fail() -> None:
        raise ValueError("one\ntwo") from KeyError("cause")

    try:
        fail()
    except ValueError:
        found = formatted(exc_info=sys.exc_info())
    assert found["error"] == "ValueError: one\ntwo"
    assert "Traceback (most recent call last):\n" in found["stack"]
    assert "KeyError: 'cause'" in found["stack"]


def test_no_exception_is_no_error() -> None:
    assert "error" not in formatted(exc_info=(None, None, None))


# What takes stderr over for a whole process is tried in one.

PROGRAM = """
import asyncio, logging, os, sys, threading, warnings
from bpfrl import logs
from bpfrl.rpc import corelog
corelog.redirect(as_log=True)
logs.set_up("json", logging.INFO)
log = logging.getLogger("bpfrl.test")
log.info("plain")
try:
    {}["x"]
except KeyError:
    log.exception("caught")
warnings.warn("careful")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
os.write(2, b"a library's own line\\n")
async def loop():
    asyncio.get_running_loop().call_soon(lambda: [][1])
    await asyncio.sleep(0)
    await asyncio.sleep(0.3)
asyncio.run(loop())
raise RuntimeError("uncaught\\nin two lines")
"""


def test_a_process_says_nothing_but_records() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    found = records(result.stderr)
    told = {each["message"]: each for each in found}
    assert told["plain"]["level"] == "info"
    assert told["caught"]["error"] == "KeyError: 'x'"
    assert told["a library's own line"]["logger"] == "bpfrl.rpc.corelog"
    assert [each for each in found if each["logger"] == "py.warnings" and "careful" in each["message"]]
    errors = [each.get("error", "") for each in found]
    assert "ZeroDivisionError: division by zero" in errors
    assert "IndexError: list index out of range" in errors
    assert found[-1]["error"] == "RuntimeError: uncaught\nin two lines"
    assert found[-1]["level"] == "critical"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_daemon_that_cannot_start_says_one_line_in_that_form(tmp_path: Path, form: str) -> None:
    arguments = ("serve-master", "--insecure", "--manifests", str(tmp_path / "none"), "--log-format", form)
    result = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    message = f"{tmp_path}/none is no folder of Pod manifests"
    if form == "text":
        assert result.stderr == f"bpfrl: {message}\n"
    else:
        [found] = records(result.stderr)
        assert (found["level"], found["message"]) == ("critical", message)


# What others can make a log say.


def test_a_line_for_people_is_one_line_and_tells_a_terminal_nothing() -> None:
    record = logging.makeLogRecord({"msg": "%s limited", "args": ("web\n\x1b[2Jall is well",), "levelname": "INFO"})
    assert TextFormatter("%(levelname)s %(message)s").format(record) == "INFO web\\n\\x1b[2Jall is well limited"


def test_who_repeats_himself_is_told_of_for_a_while_and_then_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = logging.getLogger(f"{__name__}.played")
    log.propagate = False
    log.addHandler(caplog.handler)
    log.addFilter(Sparing())
    for number in range(10_000):
        log.warning("refused %d", number)
    assert len(caplog.messages) == 500
    now += 1.0
    for number in range(10):
        log.warning("again %d", number)
    assert caplog.messages[500:] == ["again 0 (and 9500 before it)", *(f"again {number}" for number in range(1, 5))]
    now += 3600.0
    log.warning("later")
    assert caplog.messages[-1] == "later (and 5 before it)"
