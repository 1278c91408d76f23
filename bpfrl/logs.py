"""What a daemon logs, as text for people or as JSON for what collects logs: one line for each record."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Final

from bpfrl.plain import plain

TEXT: Final = "text"
JSON: Final = "json"
FORMATS: Final = (TEXT, JSON)
# A node with 500 pods that are new to it is told of whole.
_LINES_AT_ONCE: Final = 500.0
_LINES_A_SECOND: Final = 5.0

log = logging.getLogger(__name__)


class TextFormatter(logging.Formatter):
    """A record as one line for people: nobody whose name or words are in it can add a line, or speak to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, without what went wrong."""
        record.message = plain(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (RFC 3339, UTC), level, logger, message, and what went wrong."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and (error := record.exc_info[1]):
            line["error"] = f"{type(error).__name__}: {error}"
            line["stack"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line)


class Sparing(logging.Filter):
    """For what strangers can make a log say: some lines at once, then a few each second, and how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._room = _LINES_AT_ONCE
        self._at = time.monotonic()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is told."""
        now = time.monotonic()
        self._room, self._at = min(_LINES_AT_ONCE, self._room + (now - self._at) * _LINES_A_SECOND), now
        if self._room < 1:
            self._left_out += 1
            return False
        self._room -= 1
        if self._left_out:
            record.msg, record.args = f"{record.getMessage()} (and {self._left_out} before it)", ()
            self._left_out = 0
        return True


def set_up(form: str, level: int) -> None:
    """Log to stderr from now on, and nothing but log lines: errors that nobody has caught are records, too.

    Args:
        form: :data:`TEXT` or :data:`JSON`.
        level: what is told, as in :mod:`logging`.
    """
    logging.basicConfig(level=level, stream=sys.stderr, force=True)
    made = JsonFormatter() if form == JSON else TextFormatter("%(asctime)s %(levelname)s %(message)s")
    logging.getLogger().handlers[0].setFormatter(made)
    if form == JSON:
        logging.captureWarnings(capture=True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda thread: _uncaught(thread.exc_type, thread.exc_value, thread.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    log.critical("a mistake in bpfrl", exc_info=(kind, error or kind(), trace))
