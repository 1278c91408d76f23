"""Things go wrong, and come right again within the time that docs/faults.md states: bench.endure in its short form."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench import endure
from bench.faults import FAULTS, spoil_cache
from bench.kubeapi import StandIn
from tests.e2e.conftest import EGRESS, MBIT, Cluster

# One of each kind; `make faults` has all of them.
CHOSEN = (
    "node killed at a step",
    "master killed at a step",
    "server truncates lists",
    "bpffs hidden",
    "node out of descriptors",
    "bpf() says ENOMEM",
)


def test_all_comes_right_again() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    # At one step of them all.
    faults = [replace(FAULTS[name], steps=0) for name in CHOSEN]

    outcomes, failures = endure.run_all(faults, 1, StandIn, print)

    assert failures == []
    assert outcomes.keys() == set(CHOSEN)


@pytest.mark.parametrize("api", [StandIn], indirect=True)
def test_what_the_verifier_refuses_is_told_and_leaves_what_is_in_force(cluster: Cluster, tmp_path: Path) -> None:
    spoil_cache(tmp_path)
    first = cluster.master("--no-leader-elect")
    limited = cluster.create(0, {EGRESS: "10M"})
    cluster.converge({limited: (10 * MBIT, 0)})
    programs = limited.node.programs()
    first.kill()
    spoiled = cluster.fleet.master("--kubeconfig", str(cluster.api.kubeconfig), "--no-leader-elect", start=False)
    spoiled.environment["XDG_CACHE_HOME"] = str(tmp_path)
    spoiled.start()
    try:
        refused = cluster.create(1, {EGRESS: "20M"})
        cluster.await_events(refused, ("Warning", "BandwidthLimitFailed"))
        [event] = cluster.api.events(refused.uid)
        assert "the kernel refuses the BPF programs: " in event["message"]
        assert "!read_ok" in event["message"]
        # The pod that has good programs keeps them.
        cluster.await_events(limited, ("Normal", "BandwidthLimited"), ("Warning", "BandwidthLimitFailed"))
        cluster.converge({limited: (10 * MBIT, 0)})
        assert limited.node.programs() == programs
    finally:
        spoiled.kill()
    first.start()
    cluster.converge({limited: (10 * MBIT, 0), refused: (20 * MBIT, 0)})
