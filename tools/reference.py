"""docs/reference.md: all that can be typed, annotated and found, in tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from bpfrl.commands.completing import PROGRAM
from bpfrl.master.annotations import KEYS
from bpfrl.master.events import Reason
from tools.manual import EXIT_STATUS, FILES, VARIABLES, Option, Page, columns, stand_ins

_OPENING: Final = """\
<!-- Generated from the commands, the parser of annotations and tools/manual.py: make generated -->
# Reference

What `bpfrl COMMAND --help` and the manual pages in [man/](man/) say of each command, and what pods may carry.
"""
# Every command has it.
_HELP: Final = "--help"
_PODS: Final = """\
The master reads these of each pod. A value that cannot be meant raises the Event `BandwidthLimitInvalid` and leaves the
limits as they are.
"""
_EVENTS: Final = {
    Reason.LIMITED: "The pod has a limit, or another one; the message tells it.",
    Reason.UNLIMITED: "It asks for none any more, and has none.",
    Reason.INVALID: "A value cannot be meant; the message tells which, and why.",
    Reason.FAILED: "The node could not limit it, or is not there; the message tells why. The master keeps trying.",
}


def reference(commands: Sequence[Page]) -> str:
    """The whole page.

    Args:
        commands: all that there are, the outermost first.
    """
    outermost = commands[0]
    variables = [*stand_ins(commands), *((each.name, each.text) for each in VARIABLES)]
    parts = [
        _OPENING,
        "## Commands\n",
        *(part for command in commands for part in _command(command)),
        "## Annotations and labels\n",
        _PODS,
        _table(
            ("", "Key", "Example", "Meaning"),
            ((key.kind, _code(key.name), _code(key.example), key.meaning) for key in KEYS),
        ),
        "## Events\n",
        _table(
            ("Reason", "Type", "Meaning"), ((_code(each.value[0]), each.value[1], _EVENTS[each]) for each in Reason)
        ),
        "## Exit status\n",
        _table(("Status", "Meaning"), columns(outermost.sections[EXIT_STATUS])),
        "## Environment\n",
        _table(("Variable", "Meaning"), ((_code(name), text) for name, text in variables)),
        "## Files\n",
        _table(("Path", "Meaning"), ((_code(each.name), each.text) for each in FILES)),
    ]
    return "\n".join(parts)


def _command(command: Page) -> Iterator[str]:
    yield f"### {command.name}\n"
    yield _block(f"{command.name} {command.usage}")
    for text, literal in command.description:
        yield _block(text) if literal else f"{text}\n"
    if command.commands:
        links = ((f"[{command.name} {name}](#{command.slug}-{name})", summary) for name, summary in command.commands)
        yield _table(("Command", "Does"), links)
    options = [option for option in command.options if option.name != _HELP]
    if options:
        yield _table(("Option", "Meaning", "Default", "Environment"), map(_option, options))
    for heading, text in command.sections.items():
        # The command's as a whole has a table of its own below.
        if heading != EXIT_STATUS or command.name != PROGRAM:
            yield f"{heading.capitalize()}:\n"
            yield _block(text)


def _option(option: Option) -> tuple[str, ...]:
    asides = [*(["Required."] if option.required else []), *([f"Range: {option.range}."] if option.range else [])]
    return (
        _code(option.names),
        " ".join([option.text, *asides]),
        _code(option.default) if " " not in option.default else option.default,
        _code(option.variable),
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
