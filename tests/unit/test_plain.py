"""Text of others, at a terminal and in a log."""

from __future__ import annotations

import pytest

from bpfrl.plain import plain


@pytest.mark.parametrize("text", ["", "web", "egress 10mbit, ingress unlimited", "caf\u00e9 \u65e5\u672c", "C:\\n"])
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("two\nlines\r\n", "two\\nlines\\r\\n"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),  # as ESC [, in one character
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),  # turns the writing round; ends a line
        ("/sys/\udcff", "/sys/\\udcff"),  # a path that is no text
        ("\0\t", "\\x00\\t"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: str, told: str) -> None:
    assert plain(text) == told
    assert plain(text).isprintable()
