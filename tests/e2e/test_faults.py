"""Things go wrong, and come right again within the time that docs/faults.md states: bench.endure in its short form."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from bench import endure
from bench.faults import FAULTS
from bench.kubeapi import StandIn

# One of each kind; `make faults` has all of them.
CHOSEN = (
    "node killed at a step",
    "master killed at a step",
    "server truncates lists",
    "bpffs hidden",
    "node out of descriptors",
    "bpf() says ENOMEM",
    "verifier refuses",
)


def test_all_comes_right_again() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    # At one step of them all.
    faults = [replace(FAULTS[name], steps=0) for name in CHOSEN]

    outcomes, failures = endure.run_all(faults, 1, StandIn, print)

    assert failures == []
    assert outcomes.keys() == set(CHOSEN)
