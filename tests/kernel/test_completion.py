"""Values completed by a real shell, with real limiters."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from bench.lab import BPFRL, Lab
from tests.kernel.conftest import SECONDS
from tests.measuring import unmeasured

SCRIPT = Path(__file__).parents[2] / "completions" / "bpfrl.bash"
TAB = "\t"
FOLDER = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice"


def environment(bed: Lab, *, measured: bool = True) -> dict[str, str]:
    own = {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    return (os.environ if measured else unmeasured()) | own | {"PATH": f"{Path(BPFRL).parent}:{os.environ['PATH']}"}


def ask(bed: Lab, shell: str, *typed: str, user: int | None = None) -> list[str]:
    """The lines with which the installed command answers a shell's script.

    Not a byte says that a busy machine was too slow: it is asked again.
    """
    question = {"_BPFRL_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(["bpfrl", *typed])}
    position = {"COMP_CWORD": typed[-1] if shell == "fish" else str(len(typed))}
    own = environment(bed, measured=user is None) | question | position
    for _ in range(5):
        done = subprocess.run([BPFRL], env=own, capture_output=True, text=True, check=True, user=user)
        assert done.stderr == ""
        if done.stdout:
            break
    return done.stdout.splitlines()


class Terminal:
    """Somebody at a terminal with bash."""

    def __init__(self, bed: Lab) -> None:
        self._controller, terminal = pty.openpty()
        self._shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            env=environment(bed) | {"PS1": "$ ", "TERM": "dumb", "INPUTRC": "/dev/null"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            text=True,
        )
        os.close(terminal)
        bed.adopt(self._shell)

    def types(self, text: str, expected: str) -> str:
        """Type something, and return all that is shown until what is expected stands there."""
        shown = ""
        deadline = time.monotonic() + SECONDS
        os.write(self._controller, text.encode())
        while expected not in shown:
            ready, _, _ = select.select([self._controller], [], [], SECONDS / 5)
            if ready:
                shown += os.read(self._controller, 65536).decode()
            else:
                assert time.monotonic() < deadline, shown
                # A busy machine was too slow for bash: Tab again.
                os.write(self._controller, text.encode() if text == TAB else b"")
        return shown

    def close(self) -> None:
        """Hang up, which ends a shell that takes no SIGTERM."""
        os.close(self._controller)
        self._shell.wait(SECONDS)


def test_tab_completes_a_limited_pods_uid(bed: Lab) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    terminal = Terminal(bed)
    try:
        terminal.types(f"source {SCRIPT}\n", "\n")
        terminal.types("bpfrl det", "bpfrl det")
        terminal.types(TAB, "ach ")
        terminal.types("--pod", "--pod")
        terminal.types(TAB, "-uid ")
        terminal.types(TAB, bed.pod_uid)
        terminal.types("\n", f"pod/{bed.pod_uid} detached")
    finally:
        terminal.close()


def test_detach_offers_what_is_limited_and_attach_what_is_here(bed: Lab) -> None:
    other = str(uuid.uuid4())
    (bed.cgroup_root / FOLDER.format(other.replace("-", "_"))).mkdir(parents=True)
    assert ask(bed, "bash", "detach", "--pod-uid", "") == [""]
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit", "--pod-name", "shop/cart-0")
    assert ask(bed, "bash", "detach", "--pod-uid", "") == [f"plain,{bed.pod_uid}"]
    assert ask(bed, "bash", "attach", "--pod-uid", "") == [f"plain,{uid}" for uid in sorted([bed.pod_uid, other])]
    assert ask(bed, "bash", "attach", "--pod-uid", other[:6]) == [f"plain,{other}"]
    # The others show the pod's name beside it.
    assert ask(bed, "zsh", "detach", "--pod-uid", "") == ["plain", bed.pod_uid, "shop/cart-0"]
    assert ask(bed, "fish", "detach", "--pod-uid", "") == [f"plain,{bed.pod_uid}\tshop/cart-0"]


def test_a_broken_limiter_is_offered_with_what_is_wrong(bed: Lab) -> None:
    broken = str(uuid.uuid4())
    (bed.bpffs / broken).mkdir()
    kind, uid, told = ask(bed, "zsh", "detach", "--pod-uid", "")
    assert (kind, uid) == ("plain", broken)
    assert "counters is missing" in told


def test_cgroups_are_offered(bed: Lab) -> None:
    typed = str(bed.cgroup_root)
    offered = ask(bed, "bash", "attach", "--cgroup", typed)
    assert offered[0] == f"plain,{typed}"
    assert f"plain,{typed}/kubepods.slice" in offered
    assert f"plain,{bed.pod_cgroup}" in ask(bed, "bash", "attach", "--cgroup", f"{bed.pod_cgroup.parent}/")


@pytest.mark.parametrize("command", ["detach", "attach"])
def test_who_may_not_see_limiters_sees_no_error(bed: Lab, command: str) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    # The pods' cgroups are there for everybody to see; the bpffs is root's.
    expected = [f"plain,{bed.pod_uid}"] if command == "attach" else [""]
    assert ask(bed, "bash", command, "--pod-uid", "", user=65534) == expected
