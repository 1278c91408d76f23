"""What the service does unasked, with an agent that is only played; tests/kernel has what it is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from bpfrl.cgroup import CgroupTree
from bpfrl.errors import CompilerError, KernelError
from bpfrl.node import daemon
from bpfrl.node.agent import Agent
from bpfrl.node.server import NodeService
from tests.unit.fakes import UID, run, running, until

TOPS = [Path("/x/kubepods.slice"), Path("/x/kubelet.slice/kubelet-kubepods.slice")]


class Played:
    """An agent and a tree, with what was asked of them; what is put in ``failing`` is raised then."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.failing: dict[object, Exception] = {}
        self.swept: list[str] = []
        self.cooperating_now: list[object] = []

    def sweep(self) -> list[str]:
        self._did("sweep")
        return self.swept

    def tops(self) -> list[Path]:
        self._did("tops")
        return TOPS

    def cooperate(self, path: Path) -> bool:
        self._did(path)
        new = path not in self.cooperating_now
        self.cooperating_now += [path] if new else []
        return new

    def cooperating(self) -> list[object]:
        self._did("cooperating")
        return list(self.cooperating_now)

    def stop_cooperating(self, cgroup_id: object) -> bool:
        self._did(("stop", cgroup_id))
        self.cooperating_now.remove(cgroup_id)
        return True

    def _did(self, what: object) -> None:
        self.calls.append(what)
        if what in self.failing:
            raise self.failing[what]


@pytest.fixture
def played() -> Played:
    return Played()


Makes = Callable[[bool], NodeService]


@pytest.fixture
def makes(played: Played) -> Iterator[Makes]:
    """Makes the service, with or without cooperation."""
    made: list[NodeService] = []

    def make(cooperate: bool) -> NodeService:
        agent, tree = cast(Agent, played), cast(CgroupTree, played)
        made.append(NodeService(agent, tree, roles=False, cooperate=cooperate))
        return made[-1]

    yield make
    for service in made:
        service.close()


def test_tending_sweeps_and_then_has_the_pods_cooperate(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    played.swept = [UID]
    service = makes(True)
    run(service.tend())
    assert played.calls == ["sweep", "tops", *TOPS]
    assert f"{UID} swept: its pod has ended" in caplog.text
    assert [f"senders below {top} keep to" in caplog.text for top in TOPS] == [True, True]
    caplog.clear()
    played.swept = []
    run(service.tend())
    # Each time, for whatever has come or was taken off meanwhile; it is told only when something was done.
    assert played.calls[4:] == ["sweep", "tops", *TOPS]
    assert caplog.text == ""


def test_tending_without_cooperation_sweeps_and_ends_what_an_earlier_process_began(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    played.cooperating_now = [7, 8]
    service = makes(False)
    run(service.tend())
    assert played.calls == ["sweep", "cooperating", ("stop", 7), ("stop", 8)]
    assert caplog.text.count("senders do not cooperate any more") == 2
    caplog.clear()
    run(service.tend())
    assert played.calls[4:] == ["sweep", "cooperating"]
    assert caplog.text == ""


@pytest.mark.parametrize("error", [KernelError("cannot attach: played"), CompilerError("no clang: played")])
def test_one_cgroup_that_cannot_cooperate_keeps_neither_the_sweep_nor_the_others_from_it(
    played: Played, makes: Makes, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.INFO)
    played.swept = [UID]
    played.failing[TOPS[0]] = error
    run(makes(True).tend())
    assert played.calls[0] == "sweep"
    assert played.calls[-1] == TOPS[-1]
    assert f"{UID} swept" in caplog.text
    assert f"senders below {TOPS[0]} do not cooperate: {error}" in caplog.text


@pytest.mark.parametrize("what", ["sweep", "tops"])
@pytest.mark.parametrize("error", [KernelError("cannot: played"), OSError(5, "played")])
def test_a_daemon_goes_on_tending_after_an_error(
    played: Played,
    makes: Makes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: object,
    error: Exception,
) -> None:
    monkeypatch.setattr(daemon, "_SWEEP_SECONDS", 0.0)
    played.failing[what] = error

    async def tend() -> None:
        async with running(daemon._tend_for_ever(makes(True))):
            await until(lambda: played.calls.count("sweep") >= 3)
            assert "cannot tend this node's limiters: " in caplog.text
            played.failing.clear()
            await until(lambda: set(TOPS) <= set(played.calls))

    run(tend())


def test_tending_waits_for_what_the_agent_is_doing(played: Played, makes: Makes) -> None:
    service = makes(True)
    order: list[Any] = played.calls

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(service._do(order.append, "first"))
            group.create_task(service.tend())

    run(both())
    assert order == ["first", "sweep", "tops", *TOPS]
