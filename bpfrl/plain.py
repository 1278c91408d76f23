"""Text of others for people's eyes: names, reasons and paths may hold what a terminal obeys."""

from __future__ import annotations


def plain(text: str) -> str:
    r"""The same in one line, with what cannot be seen spelled out.

    >>> plain("web\x1b[2J\nINFO all is well")
    'web\\x1b[2J\\nINFO all is well'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
