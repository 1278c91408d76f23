"""The benchmark of large clusters with a small one: a real master, and everything that is done to it."""

from __future__ import annotations

import os

import pytest

from bench.crowd import Size
from bench.scale import Spans, measure


def test_a_master_keeps_up_while_pods_change_the_history_is_lost_and_nodes_are_gone() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    # That all limits are in force after each part, and nothing else, is what this waits for.
    found = measure(Size(20), Spans(settle=0.0, rest=0.5, churn=1.0, relist=1.0, cut=2.0))
    assert (found.pods, found.limited, found.refusing, found.silent) == (600, 120, 1, 1)
    assert found.wrong == 0
    assert found.relisted.relisting > 0
    for churned in (found.churned, found.relisted, found.cut):
        assert churned.changes > 20
        # Milliseconds, where the machine has nothing else to do; a node that is gone must not cost the others its time.
        assert churned.delays.median < 1_000
