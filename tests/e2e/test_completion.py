"""What a shell completes from a cluster, with both API servers."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator

import pytest

from bench.kubeapi import Api, RealApi, StandIn, real_assets
from bench.lab import BPFRL
from bpfrl.master.names import Named, names


@pytest.fixture(scope="module", params=[StandIn, RealApi])
def server(request: pytest.FixtureRequest) -> Iterator[Api]:
    if request.param is RealApi and real_assets() is None:
        pytest.skip("needs etcd, kube-apiserver and kubectl; their folder is $KUBEBUILDER_ASSETS")
    with request.param() as api:
        api.create_pod("web")
        api.create_pod("cart-0", namespace="shop")
        yield api


def offered(server: Api, *typed: str) -> list[str]:
    """What is offered for the last of these words.

    Not a byte says that a busy machine was too slow: it is asked again.
    """
    question = {
        "KUBECONFIG": str(server.kubeconfig),
        "_BPFRL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["bpfrl", *typed]),
        "COMP_CWORD": str(len(typed)),
    }
    for _ in range(5):
        done = subprocess.run([BPFRL], env=os.environ | question, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        if done.stdout:
            break
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line]


def test_pods_are_offered_by_namespace_and_name(server: Api) -> None:
    assert offered(server, "attach", "--pod-name", "") == ["default/web", "shop/cart-0"]
    assert offered(server, "attach", "--pod-name", "shop/") == ["shop/cart-0"]
    assert offered(server, "attach", "--pod-name", "shop/x") == []


def test_contexts_are_offered(server: Api) -> None:
    assert offered(server, "serve-master", "--context", "") == ["test"]
    assert offered(server, "serve-master", "--context", "x") == []


def test_namespaces_are_offered(server: Api) -> None:
    # The stand-in has no objects for them, which is not a matter for a shell.
    real = isinstance(server, RealApi)
    found = offered(server, "certs", "secrets", "-n", "")
    assert {"default", "kube-system"} <= set(found) if real else found == []


@pytest.mark.parametrize("server", [RealApi], indirect=True)
def test_nodes_are_told_with_their_addresses(server: Api) -> None:
    addresses = [{"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "192.0.2.7"}]
    node = {"kind": "Node", "metadata": {"name": "node-1"}, "status": {"addresses": addresses}}
    server.request("POST", "/api/v1/nodes", node)
    assert asyncio.run(names(server.kubeconfig, None, "nodes")) == [Named("node-1", "", "192.0.2.7")]
    assert {each.name for each in asyncio.run(names(server.kubeconfig, None, "pods"))} == {"web", "cart-0"}


def test_a_server_that_is_gone_offers_nothing(server: Api) -> None:
    server.kill()
    try:
        assert offered(server, "attach", "--pod-name", "") == []
    finally:
        server.start()
