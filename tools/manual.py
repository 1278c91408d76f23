"""What there is to say about each command, taken from the commands themselves.

The help texts are click's: paragraphs apart by an empty line, and what follows a backspace stays as it is set. Such a
paragraph whose first line is in capitals is a section of its own.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import click

from bpfrl.cli import cli
from bpfrl.commands.completing import PROGRAM

EXAMPLES: Final = "EXAMPLES"
EXIT_STATUS: Final = "EXIT STATUS"

_AS_SET: Final = "\b\n"
_HEADING: Final = re.compile(r"[A-Z]{2,}(?: [A-Z]+)*")
# What a help text says in this way has a place of its own here.
_ASIDE: Final = re.compile(r"\s*\[(default|env): ([^]]*)\]")
_COLUMNS: Final = re.compile(r" {2,}")


class Fact(NamedTuple):
    """A file or an environment variable.

    Attributes:
        name: its own.
        text: what it is for.
        about: the options and commands that have to do with it; empty: all of them.
    """

    name: str
    text: str
    about: tuple[str, ...] = ()


# Besides those that stand for an option.
VARIABLES: Final = (
    Fact(
        "KUBECONFIG", "Where --kubeconfig names no file: the kubeconfigs, with colons between them.", ("--kubeconfig",)
    ),
    Fact(
        "KUBERNETES_SERVICE_HOST",
        "Set in a pod, whose service account is used if no kubeconfig is named.",
        ("--kubeconfig",),
    ),
    Fact("NO_COLOR", "If it is set, nothing is coloured.", ("list",)),
    Fact("XDG_CACHE_HOME", "Where compiled programs are kept, in a folder bpfrl; ~/.cache if it is not set."),
)
FILES: Final = (
    Fact("/sys/fs/bpf/UID/", "A pod's limiter: its programs, links and maps, pinned."),
    Fact("/sys/fs/bpf/cooperation-ID/", "What has the pods below a cgroup cooperate.", ("--cooperate",)),
    Fact("~/.cache/bpfrl/", "Compiled programs. They can be made again; without a home they are in /var/cache/bpfrl/."),
    Fact(
        "DIR/ca.crt, DIR/tls.crt, DIR/tls.key",
        "The authority, and the certificate and key to show. Changed files are read at the next connection.",
        ("--certs",),
    ),
    Fact("DIR/ca.key", "The authority's own key, which signs the certificates.", ("certs",)),
    Fact("~/.kube/config", "The cluster, if nothing else names one.", ("--kubeconfig",)),
)


class Block(NamedTuple):
    """A paragraph; literal: its lines stay as they are."""

    text: str
    literal: bool = False


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        names: as it is typed, with what follows it.
        text: what it is for.
        default: "" for none that can be told.
        variable: the environment variable that stands for it, or "".
        range: the numbers that it takes, or "".
        required: it cannot be left out.
    """

    names: str
    text: str
    default: str = ""
    variable: str = ""
    range: str = ""
    required: bool = False

    @property
    def name(self) -> str:
        """The long name."""
        return next(word for word in re.split(r"[\s,]+", self.names) if word.startswith("--"))

    @property
    def full_text(self) -> str:
        """The text, and after it all that there is to say besides."""
        asides = {"Range": self.range, "Default": self.default, "Environment": self.variable}
        told = [self.text, *(["Required."] if self.required else []), *(f"{k}: {v}." for k, v in asides.items() if v)]
        return " ".join(told)


@dataclass(frozen=True)
class Page:
    """A command.

    Attributes:
        name: as it is typed, after its parents.
        usage: what follows that.
        summary: its first sentence, without the full stop.
        description: all paragraphs but those of sections.
        sections: the others by heading, in order.
        options: its own.
        commands: name and summary of those below it.
    """

    name: str
    usage: str
    summary: str
    description: list[Block]
    sections: dict[str, str]
    options: list[Option]
    commands: list[tuple[str, str]] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name where it must be one word."""
        return self.name.replace(" ", "-")

    def concerns(self, fact: Fact) -> bool:
        """True where a fact has to do with this command; with the outermost one they all have."""
        words = {
            *self.name.split(),
            *(word for option in self.options for word in re.findall(r"--[\w-]+", option.names)),
        }
        return self.name == PROGRAM or not fact.about or not words.isdisjoint(fact.about)


def pages() -> list[Page]:
    """All commands: each before those below it, and these by name."""
    return list(_walk(cli, None))


def columns(section: str) -> list[tuple[str, str]]:
    """A section of two columns."""
    rows = (line.split(maxsplit=1) for line in section.splitlines())
    return [(first, second) for first, second in rows]


def stand_ins(commands: Iterable[Page]) -> list[tuple[str, str]]:
    """The environment variables that stand for options of these commands, and what to say of each."""
    options = (option for command in commands for option in command.options if option.variable)
    return list({option.variable: f"Stands for {option.name}." for option in options}.items())


def _walk(command: click.Command, parent: click.Context | None) -> Iterator[Page]:
    context = click.Context(command, parent, PROGRAM if parent is None else command.name, **command.context_settings)
    below = [command.commands[name] for name in sorted(command.commands)] if isinstance(command, click.Group) else []
    description, sections = _read(command.help or "")
    yield Page(
        name=context.command_path,
        usage=" ".join(command.collect_usage_pieces(context)),
        summary=_summary(command),
        description=description,
        sections=sections,
        options=[_option(each, context) for each in command.get_params(context) if isinstance(each, click.Option)],
        commands=[(each.name or "", _summary(each)) for each in below],
    )
    for each in below:
        yield from _walk(each, context)


def _summary(command: click.Command) -> str:
    return command.get_short_help_str(limit=1000).removesuffix(".")


def _read(text: str) -> tuple[list[Block], dict[str, str]]:
    description, sections = [], {}
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith(_AS_SET):
            description.append(Block(" ".join(paragraph.split())))
            continue
        lines = paragraph.removeprefix(_AS_SET)
        heading, _, rest = lines.partition("\n")
        if _HEADING.fullmatch(heading):
            sections[heading] = textwrap.dedent(rest)
        else:
            description.append(Block(lines, literal=True))
    return description, sections


def _option(option: click.Option, context: click.Context) -> Option:
    record = option.get_help_record(context)
    if record is None:
        raise ValueError(f"{option.name} is hidden: say so here how to tell of it")
    asides = dict(_ASIDE.findall(option.help or ""))
    return Option(
        names=record[0],
        text=_ASIDE.sub("", option.help or ""),
        default=asides.get("default") or option.get_help_extra(context).get("default", ""),
        variable=str(option.envvar or ""),
        range="" if option.count else _range(option.type),
        required=option.required,
    )


def _range(kind: Any) -> str:
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return ""
    if kind.min is None or kind.max is None:
        return f"{kind.min} or more" if kind.max is None else f"{kind.max} at most"
    return f"{kind.min} to {kind.max}"
