"""A node under attack: whatever others do to its ports, its master is served, and afterwards everything is as before.

The attacks are made of bytes, not of calls, where no client library would do such a thing. ``make hostile`` makes ten
times as many connections, which is more than a node takes, and goes on for longer.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest

from bench.lab import lab
from bpfrl import monitoring
from bpfrl.errors import UnreachableError
from bpfrl.limits import Change
from bpfrl.node import daemon
from bpfrl.rpc import authority, tls
from bpfrl.rpc.client import NodeClient
from tests.kernel.attackers import CONNECTIONS, FLOODS, READY
from tests.kernel.test_service import FAST, SLOW, Daemon
from tests.measuring import unmeasured

ROOT = Path(__file__).parents[2]
FLOOD_SECONDS = float(os.environ.get("HOSTILE_SECONDS", "1"))
# A call takes milliseconds where nobody is in its way.
SOON_SECONDS = 8.0
LATER_SECONDS = 30.0
MOST_MEGABYTES = 512  # the chart's limit
# What the daemon may have open for a moment: pins, and connections that are about to go.
SPARE = 20
MOST_LINES = 3_000


class Node:
    """A node's daemon, its master, and its attackers."""

    def __init__(self, node: Daemon, attackers: subprocess.Popen[str], pki: Path, pod: str) -> None:
        self._attackers = attackers
        self._pki = pki
        self._metrics_port = node.port_of("metrics on")
        self.daemon = node
        self.pod = pod
        self.at_rest = self.descriptors

    @property
    def descriptors(self) -> int:
        """How many the daemon has open."""
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    @property
    def megabytes(self) -> int:
        """What it has in memory."""
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10

    def master(self) -> NodeClient:
        return NodeClient("127.0.0.1", self.daemon.port, tls.Certificates(self._pki / "master", tls.MASTER))

    def probe(self) -> bytes:
        """What the kubelet is told; nothing, where a stranger takes the connection's place."""
        try:
            with urlopen(f"http://127.0.0.1:{self._metrics_port}/livez", timeout=LATER_SECONDS) as answer:
                text: bytes = answer.read()
        except ConnectionError:
            return b""
        return text

    async def order(self, line: str, answer: str) -> None:
        """Have the attackers begin or end."""
        assert self._attackers.stdin
        assert self._attackers.stdout
        print(line, file=self._attackers.stdin, flush=True)
        assert (await asyncio.to_thread(self._attackers.stdout.readline)).strip() == answer


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    if os.geteuid():
        pytest.skip("needs root")
    pki = tmp_path_factory.mktemp("hostile")
    authority.init(pki, 30)
    authority.init(pki / "foreign", 30)
    # As most services are started: with few descriptors, of which there may be more.
    within = ["prlimit", "--nofile=1024:20000"]
    with lab() as bed, Daemon(bed, pki, "127.0.0.1:0", "--http", "127.0.0.1:0", within=within) as serving:
        assert serving.attach(bed.pod_uid, SLOW) is Change.ATTACHED
        ports = (str(serving.port), str(serving.port_of("metrics on")))
        command = [sys.executable, "-m", "tests.kernel.attackers", *ports, str(pki), bed.pod_uid]
        attackers = subprocess.Popen(
            command, cwd=ROOT, env=unmeasured(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield Node(serving, attackers, pki, bed.pod_uid)
        finally:
            attackers.kill()
            attackers.communicate()


async def served(node: Node, master: NodeClient) -> float:
    """How long it takes to serve a master, who changes a limit and looks, and a probe: the slowest of them, s."""
    start = time.monotonic()
    # As the kubelet does, which asks again: strangers may have taken a connection's place.
    while (answer := await asyncio.to_thread(node.probe)) != b"ok\n":
        assert not answer
        assert time.monotonic() < start + SOON_SECONDS
    slowest = time.monotonic() - start
    for limits in (FAST, SLOW):
        start = time.monotonic()
        await master.update(node.pod, limits)
        slowest, start = max(slowest, time.monotonic() - start), time.monotonic()
        [found] = await master.list()
        assert getattr(found, "limits", None) == limits
        slowest = max(slowest, time.monotonic() - start)
    return slowest


async def served_anew(node: Node) -> float:
    """How long it takes until a master that has no connection is served, s."""
    start = time.monotonic()
    while True:
        master = node.master()
        try:
            await served(node, master)
            return time.monotonic() - start
        except UnreachableError:
            assert time.monotonic() - start < LATER_SECONDS
            await asyncio.sleep(0.1)
        finally:
            await master.close()


def attack(node: Node, name: str, seconds: float, kept: int | None = None) -> int:
    """Have an attack made, and see to the master and the probes meanwhile.

    Args:
        node: who is attacked.
        name: the attack's.
        seconds: for how long.
        kept: and until there are no more connections than these, where that is said.

    Returns:
        How many descriptors the daemon had at most.
    """

    async def work() -> int:
        async with AsyncExitStack() as stack:
            master = node.master()
            stack.push_async_callback(master.close)
            await served(node, master)
            before = node.descriptors
            # That takes a while, too: what is held first may have been let go of when the last comes.
            beginning = asyncio.create_task(node.order(name, "begun"))
            stack.push_async_callback(node.order, "", "ended")
            stack.push_async_callback(asyncio.wait, [beginning])
            deadline, most, megabytes, slowest, anew = time.monotonic() + seconds, 0, 0, 0.0, 0.0
            while (
                not beginning.done()
                or time.monotonic() < deadline
                or (kept is not None and node.descriptors > before + kept)
            ):
                assert time.monotonic() < deadline + 2 * LATER_SECONDS, (before, node.descriptors)
                slowest, anew = max(slowest, await served(node, master)), max(anew, await served_anew(node))
                most, megabytes = max(most, node.descriptors), max(megabytes, node.megabytes)
            await beginning
            figures = f"{most} descriptors, {megabytes} MB, calls {slowest * 1000:.0f} ms, anew {anew:.1f} s"
            sys.stdout.write(f"{name}: {figures}\n")
            assert slowest < SOON_SECONDS
            assert 0 < megabytes < MOST_MEGABYTES
            return most

    return asyncio.run(asyncio.wait_for(work(), 200))


def test_connections_that_are_held_keep_nobody_waiting(node: Node) -> None:
    """Those who have shown no certificate are let go of soon, and those who have may stay for a while."""
    most = attack(node, "held", 0, READY + monitoring._MOST_CONNECTIONS + SPARE)
    assert most > 0.9 * min(CONNECTIONS, daemon._MOST_CONNECTIONS)


@pytest.mark.parametrize("name", FLOODS)
def test_who_sends_for_ever_keeps_nobody_waiting(node: Node, name: str) -> None:
    attack(node, name, FLOOD_SECONDS)


def test_nothing_is_left_of_it(node: Node) -> None:
    """The daemon that was started is still there, and its log is no longer than it has to be."""
    deadline = time.monotonic() + LATER_SECONDS
    while node.descriptors > node.at_rest + SPARE:
        assert time.monotonic() < deadline, (node.at_rest, node.descriptors)
        time.sleep(0.1)
    assert node.daemon.process.poll() is None
    assert "Traceback" not in "\n".join(node.daemon.log)
    assert len([line for line in node.daemon.log if "refused" in line or "hung up" in line]) < MOST_LINES
