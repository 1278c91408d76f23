"""Any argument text: exit 2 with one line, or 1 where it could be meant and nothing is there; and never a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

import bpfrl.master.daemon
import bpfrl.node.daemon
from bpfrl.bpf import generator
from bpfrl.cli import cli
from bpfrl.commands.options import LocalNode
from bpfrl.errors import KernelError
from bpfrl.rpc import authority, corelog
from tests.fuzzing import examples

pytestmark = pytest.mark.usefixtures("logs")

# What a process can be given: no NUL, and bytes that are no text as Python has them. Nothing that leads
# out of the test's own folder, nor a process's own descriptors.
WORDS = st.sampled_from(
    [
        *("8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10", "cgroup-1", "0" * 32, "", "-", "--", "x", "..", "."),
        *("10mbit", "10M", "10mbps", "1e400", "nan", "inf", "-1", "9" * 400, "64Ki", "0", "1", "65536", "1_000", "٣"),
        *(
            "127.0.0.1:0",
            ":1",
            "[::1]:2",
            "::1:2",
            "host:port",
            "a:99999",
            "\x00",
            "a\nb",
            "\x1b[2J",
            "ü" * 300,
            "\udcff",
        ),
        *("json", "yaml", "text", "bash", "uid", "a/b", "a/b/c", "A/B"),
    ]
) | st.text(st.characters(exclude_characters="/\0"), max_size=20)
COMMANDS = [
    *(["generate"], ["attach"], ["detach"], ["serve-node"], ["serve-master"]),
    *(["certs", "init"], ["certs", "secrets"], ["completion"], ["list"], []),
]


def options(path: list[str]) -> list[str]:
    """The options of a command, but for those by which it would ask another machine, or read what is typed."""
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    named = [name for each in command.params if isinstance(each, click.Option) for name in each.opts]
    return [name for name in named if name not in {"--node", "--all-namespaces", "-A", "--watch", "-w", "-l", "-n"}]


@st.composite
def typed(draw: st.DrawFn) -> list[str]:
    path = draw(st.sampled_from(COMMANDS))
    known = [*options(path), "--help"]
    arguments = st.lists(st.sampled_from(known) | WORDS, max_size=7)
    return (
        [*draw(st.lists(WORDS, max_size=1)), *path, *draw(arguments)]
        if draw(st.booleans())
        else [*path, *draw(arguments)]
    )


def refuse(*_: object, **__: object) -> NoReturn:
    raise KernelError("cannot: played")


class Nothing:
    """An agent and a tree that refuse whatever they are asked."""

    bpffs = Path("/nowhere")

    def __getattr__(self, name: str) -> Any:
        return refuse


@pytest.fixture(scope="module", autouse=True)
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is done, whatever is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr(LocalNode, "agent", lambda _: Nothing())
        patch.setattr(LocalNode, "tree", lambda _: Nothing())
        patch.setattr(corelog, "redirect", lambda **_: None)
        for owner, name in (
            *((authority, "init"), (authority, "secrets"), (generator, "generate")),
            *((bpfrl.node.daemon, "serve"), (bpfrl.master.daemon, "serve")),
        ):
            patch.setattr(owner, name, refuse)
        yield


@pytest.mark.fuzz
@examples(150, 3_000)
@given(typed())
@example(["attach", "--cgroup", "--rate", "1M"])
@example(["attach", "--object", "--pod-uid", "cgroup-1"])
@example(["attach", "--wait", "nan", "--rate", "1M", "--pod-uid", "0" * 32])
@example(["serve-node", "--certs", "\udcff", "--listen", "\udcff:1"])
@example(["serve-node", "--insecure", "--listen", "127.0.0.1:" + "9" * 400])
@example(["--bpffs", "list"])
def test_whatever_is_typed_is_done_or_refused_in_a_line(arguments: list[str]) -> None:
    result = CliRunner(env={"COLUMNS": None}).invoke(cli, arguments, prog_name="bpfrl")
    assert result.exception is None or isinstance(result.exception, SystemExit), arguments
    assert result.exit_code in (0, 1, 2), arguments
    if result.exit_code and "Usage:" not in result.stderr:
        line = result.stderr.removesuffix("\n")
        assert line.startswith("bpfrl"), (arguments, line)
        assert "\n" not in line, (arguments, line)
    assert os.listdir() == []
