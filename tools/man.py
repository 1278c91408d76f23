"""A command's manual page, in the man(7) macros of roff."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from bpfrl import __version__
from bpfrl.commands.completing import PROGRAM
from tools.manual import EXAMPLES, EXIT_STATUS, FILES, VARIABLES, Block, Page, columns, stand_ins

# roff would bend quotes, break lines at hyphens, and draw some of these as characters that no shell takes.
_ESCAPES: Final = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"})
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]")
_OPTION: Final = re.compile(r"((?<![\w-])--?[A-Za-z][\w-]*)")
_OTHERS: Final = ("bpftool(8)", "kubectl(1)", "tc(8)")

Pairs = Iterable[tuple[str, str]]


def page(command: Page, commands: Sequence[Page]) -> str:
    """The source of a command's page.

    Args:
        command: which.
        commands: all that there are, the outermost first.
    """
    lines = [
        r".\" Generated from the help texts: make generated",
        f'.TH {_escaped(command.slug.upper())} 1 "" "{PROGRAM} {__version__}"',
        ".nh",
        ".ad l",
    ]
    for heading, content in _sections(command, commands):
        if content:
            lines += [f".SH {heading}", *content]
    return "\n".join(lines) + "\n"


def _sections(command: Page, commands: Sequence[Page]) -> Iterator[tuple[str, list[str]]]:
    """In the order of man-pages(7); some have nothing in them."""
    outermost = commands[0]
    summary = command.summary[:1].lower() + command.summary[1:]
    yield "NAME", [rf"{_escaped(command.slug)} \- {_escaped(summary)}"]
    yield "SYNOPSIS", [f".B {_escaped(command.name)}", _escaped(command.usage)]
    yield "DESCRIPTION", _paragraphs(command.description)
    for heading, text in command.sections.items():
        if heading not in (EXAMPLES, EXIT_STATUS):
            yield heading, _literal(text)
    yield "COMMANDS", _list((f"{command.name} {name}", f"{summary}.") for name, summary in command.commands)
    options = _list((option.names, option.full_text) for option in command.options)
    if command is not outermost:
        options += [".PP", f"The options of {_reference(outermost)} go before the command."]
    yield "OPTIONS", options
    yield EXIT_STATUS, _list(columns({**outermost.sections, **command.sections}[EXIT_STATUS]))
    told = commands if command is outermost else (outermost, command)
    yield (
        "ENVIRONMENT",
        _list([*stand_ins(told), *((each.name, each.text) for each in VARIABLES if command.concerns(each))]),
    )
    yield "FILES", _list((each.name, each.text) for each in FILES if command.concerns(each))
    yield EXAMPLES, _literal(command.sections.get(EXAMPLES, ""))
    others = [_reference(each) for each in commands if each is not command]
    yield "SEE ALSO", [",\n".join([*others, *_OTHERS])]


def _paragraphs(blocks: Iterable[Block]) -> list[str]:
    lines: list[str] = []
    for text, literal in blocks:
        lines += [".PP", *(_literal(text) if literal else [_protected(_marked(text))])]
    return lines[1:]


def _literal(text: str) -> list[str]:
    """Lines that stay as they are."""
    return [".nf", *(_protected(_escaped(line)) for line in text.splitlines()), ".fi"] if text else []


def _list(pairs: Pairs) -> list[str]:
    # A long choice may be broken where it says or.
    entries = ((_marked(name).replace("|", r"|\:"), _marked(text)) for name, text in pairs)
    return [line for name, text in entries for line in (".TP", _protected(name), _protected(text))]


def _marked(text: str) -> str:
    """Text with its options in bold."""
    return "".join(
        rf"\fB{_escaped(part)}\fR" if _OPTION.fullmatch(part) else _escaped(part) for part in _OPTION.split(text)
    )


def _escaped(text: str) -> str:
    return _NOT_ASCII.sub(lambda found: rf"\[u{ord(found[0]):04X}]", text.translate(_ESCAPES))


def _protected(line: str) -> str:
    """A line that begins with what begins a request, were it not for what roff draws nothing for."""
    return rf"\&{line}" if line.startswith((".", "'")) else line


def _reference(command: Page) -> str:
    return f"{_escaped(command.slug)}(1)"
