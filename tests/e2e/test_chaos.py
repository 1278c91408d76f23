"""Daemons and API servers are killed, and limits come to what pods ask for: bench.chaos in its short form."""

from __future__ import annotations

import os

import pytest

from bench import chaos
from bench.kubeapi import RealApi, StandIn, real_assets


@pytest.mark.parametrize(("server", "rounds"), [(StandIn, 5), (RealApi, 3)])
def test_limits_come_to_what_pods_ask_for_whatever_is_killed(server: type[StandIn | RealApi], rounds: int) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    if server is RealApi and real_assets() is None:
        pytest.skip("needs etcd, kube-apiserver and kubectl; their folder is $KUBEBUILDER_ASSETS")

    summary = chaos.run(rounds, 1, server)

    assert summary.rounds == rounds
    assert sum(summary.operations.values()) > 5 * rounds
