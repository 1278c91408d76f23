"""Whoever wants to know what the master does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from bpfrl.rpc.client import Connections, NodeClient
from bpfrl.rpc.tls import Certificates


class Backlog(NamedTuple):
    """What one or all nodes' workers have before them.

    Attributes:
        queued: pods that are to be looked at, or are being worked on.
        awaited: pods whose cgroup a node waits for.
        retrying: pods that are let alone for a while, after a failure.
    """

    queued: int = 0
    awaited: int = 0
    retrying: int = 0

    def plus(self, other: Backlog) -> Backlog:
        """Both together."""
        return Backlog(*map(sum, zip(self, other, strict=True)))


class Census(NamedTuple):
    """The state of everything at one moment.

    Attributes:
        synced: all pods were told once.
        acting: this master makes nodes have what they should have.
        pods: scheduled pods that are known.
        limited: those that have limits.
        invalid: those that ask for limits that cannot be meant.
        backlog: what is to be done; nothing while another master acts.
        nodes: the nodes' names by their addresses, "" where the name is not known.
    """

    synced: bool
    acting: bool
    pods: int
    limited: int
    invalid: int
    backlog: Backlog
    nodes: Mapping[str, str]


class Observer:
    """Told of everything that the master does; this one forgets it."""

    def attend(self, census: Callable[[], Census]) -> None:
        """This is how to learn the state of everything, on the event loop."""

    def client(
        self, address: str, port: int, certificates: Certificates | None, connections: Connections
    ) -> NodeClient:
        """The client for a node, as :class:`~bpfrl.rpc.client.NodeClient`, with its calls observed."""
        return NodeClient(address, port, certificates, connections)

    def let_go(self, address: str) -> None:
        """The node with this address has nothing to do with this master any more."""

    def settled(self, seconds: float) -> None:
        """A change of what a pod should have is in force, so long after it became known, s."""

    def listed(self) -> None:
        """The API server has told all pods."""

    def watching(self) -> None:
        """The API server begins to tell changes."""

    def heard(self) -> None:
        """The API server has said something."""

    def api_failed(self, status: int) -> None:
        """The API server has refused a list or a watch, or not answered (0)."""

    def told(self, result: str) -> None:
        """An Event was sent, has failed, or was dropped."""


UNOBSERVED = Observer()
