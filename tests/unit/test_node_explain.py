"""What a node remembers of its refusals, and says of a pod that is not here; tests/kernel has those that are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import pytest

from bpfrl import __version__, cgroup
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import KernelError
from bpfrl.explanation import Report
from bpfrl.node import explain
from bpfrl.node.agent import Agent
from bpfrl.node.explain import Refusals
from tests.unit.fakes import UID, uid_of
from tests.unit.test_explanation import WHOLE


def test_the_last_refusal_is_remembered_until_the_pod_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 7.0)
    refusals = Refusals()
    assert refusals.of(UID) is None
    refusals.remember(UID, "attach", KernelError("first"))
    refusals.remember(UID, "update", KernelError("second"))
    assert refusals.of(UID) == (7.0, "update", "second")
    assert refusals.of(uid_of(1)) is None
    refusals.forget(uid_of(1))
    assert refusals.of(UID)
    refusals.forget(UID)
    assert refusals.of(UID) is None


def test_of_many_pods_those_of_late_are_remembered() -> None:
    refusals = Refusals()
    for number in range(explain._REMEMBERED):
        refusals.remember(uid_of(number), "attach", KernelError("x"))
    refusals.remember(uid_of(0), "attach", KernelError("again"))
    refusals.remember(uid_of(explain._REMEMBERED), "attach", KernelError("one more"))
    assert refusals.of(uid_of(0))
    assert refusals.of(uid_of(1)) is None
    assert refusals.of(uid_of(2))
    assert refusals.of(uid_of(explain._REMEMBERED))


class Played:
    """An agent with one limiter."""

    def limiter(self, uid: str) -> object:
        assert uid == UID
        return WHOLE


def test_a_pod_that_is_not_here_is_a_report_like_any_other(tmp_path: Path) -> None:
    refusals = Refusals()
    refusals.remember(UID, "attach", KernelError("x"))
    refusal = refusals.of(UID)
    found = explain.examine(cast(Agent, Played()), CgroupTree(tmp_path), UID, refusal)
    why = f"no cgroup for pod {UID} under {tmp_path}: is it running on this node?"
    assert found == Report(__version__, no_cgroup=why, limiter=WHOLE, refusal=refusal)
    (tmp_path / "kubepods" / f"pod{UID}").mkdir(parents=True)
    (tmp_path / "kubelet" / "kubepods" / f"pod{UID}").mkdir(parents=True)
    found = explain.examine(cast(Agent, Played()), CgroupTree(tmp_path), UID)
    assert found.no_cgroup.startswith(f"several cgroups for pod {UID}")


def test_a_pod_that_ends_while_it_is_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr(cgroup, "mount_point", lambda: tmp_path)
    found = explain._at(cast(Agent, Played()), gone, None, None)
    assert found == Report(__version__, no_cgroup="its cgroup went away while it was looked at")
