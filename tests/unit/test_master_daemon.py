"""What a master's process does besides its work."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from bpfrl.master import daemon
from tests.unit.fakes import run, running, until


class Ring:
    """Something that refers to itself, so that only the garbage collector ends it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_looked_for_in_what_is_new_and_now_and_then_in_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_FREEZE_SECONDS", 0.05)
    monkeypatch.setattr(daemon, "_FREEZES", 3)

    async def work() -> None:
        async with running(daemon._spare_garbage_collection()):
            ring = Ring()
            gone = weakref.ref(ring)
            before = gc.get_freeze_count()
            await until(lambda: gc.get_freeze_count() > before)
            del ring
            await until(lambda: gone() is None)
            await asyncio.sleep(0)
            assert gc.get_freeze_count() > 0

    try:
        run(work())
    finally:
        gc.unfreeze()
