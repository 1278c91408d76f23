"""What the nodes' daemon asks of the kernel, beside what its systemd unit lets it ask.

strace looks over its shoulder while it does all of its work; systemd itself says what the unit's filter means.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from bench.lab import lab
from tests.kernel.conftest import until
from tests.kernel.test_capabilities import confined, connection, everything, programs

__all__ = ["programs"]  # a fixture

UNIT: Final = Path(__file__).parents[2] / "deploy" / "systemd" / "bpfrl-node.service"
# "1234 name(arguments" and no more: a call that another thread's interrupts is told in two halves.
CALL: Final = re.compile(r"^\d+ +(?P<name>\w+)\((?P<arguments>.*)$")


class Call(NamedTuple):
    """A system call: its name, and its arguments and result as strace writes them."""

    name: str
    arguments: str


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, programs: None) -> list[Call]:  # noqa: ARG001 - it goes first
    """What the daemon asks from its first instruction to its last."""
    if os.geteuid():
        pytest.skip("needs root")
    trace = tmp_path_factory.mktemp("trace") / "calls"
    with pytest.MonkeyPatch.context() as patch, lab() as bed:
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        sender, _ = connection(bed)
        with confined(bed, ["strace", "-D", "-f", "-q", "-o", str(trace)]) as node:
            everything(bed, node, sender)
            assert node.end(signal.SIGTERM) == 0
            until(lambda: f"{node.process.pid} +++ exited" in re.sub(" +", " ", trace.read_text(errors="replace")))
    matches = [CALL.match(line) for line in trace.read_text(errors="replace").splitlines()]
    found = [Call(match["name"], match["arguments"]) for match in matches if match]
    assert {"bpf", "setns", "open_by_handle_at"} <= {call.name for call in found}
    return found


def setting(key: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def members(name: str) -> set[str]:
    """A system call, or those of a group and of the groups in it."""
    if not name.startswith("@"):
        return {name}
    command = ["systemd-analyze", "syscall-filter", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    inner = [line.strip() for line in lines[1:] if line.strip() and not line.strip().startswith("#")]
    return {call for each in inner for call in members(each)}


def allowed() -> set[str]:
    """What the unit's filter lets through: each line adds, or with a tilde takes away."""
    # systemd adds these to every list, so that a process can be started and end at all.
    calls = members("@default")
    for line in setting("SystemCallFilter"):
        found = {call for name in line.removeprefix("~").split() for call in members(name)}
        calls = calls - found if line.startswith("~") else calls | found
    return calls


def test_every_system_call_passes_the_filter(asked: list[Call]) -> None:
    assert {call.name for call in asked} - allowed() == set()


def test_no_other_sockets_are_made(asked: list[Call]) -> None:
    families = {call.arguments.split(",")[0] for call in asked if call.name in ("socket", "socketpair")}
    assert families <= set(setting("RestrictAddressFamilies")[0].split())


def test_no_other_namespaces_are_made_or_entered(asked: list[Call]) -> None:
    assert setting("RestrictNamespaces") == ["net"]
    entered = {kind for call in asked if call.name == "setns" for kind in re.findall(r"CLONE_\w+", call.arguments)}
    assert entered == {"CLONE_NEWNET"}
    assert not [call for call in asked if call.name in ("clone", "clone3", "unshare") and "CLONE_NEW" in call.arguments]


def test_no_memory_is_both_written_and_executed(asked: list[Call]) -> None:
    assert setting("MemoryDenyWriteExecute") == ["yes"]
    made = [call.arguments for call in asked if call.name in ("mmap", "mprotect", "pkey_mprotect")]
    assert not [each for each in made if "PROT_WRITE|PROT_EXEC" in each]
    assert not [call for call in asked if call.name.endswith("mprotect") and "PROT_EXEC" in call.arguments]


def test_nothing_is_written_but_pins(asked: list[Call]) -> None:
    """The root file system is read-only, in the unit and in the container."""
    written = re.compile(r'"(?P<path>[^"]*)".*(O_WRONLY|O_RDWR|O_CREAT)')
    opened = [written.search(call.arguments) for call in asked if call.name in ("open", "openat")]
    places = {match["path"] for match in opened if match}
    assert not {place for place in places if not place.startswith(("/dev/", "/proc/self/"))}
