"""What one node carries: ``python -m bench.node --help``.

One ``bpfrl serve-node`` with TLS and ``--http``, with cgroups laid out as the kubelet does it, each with a process in a
network namespace of its own. The calls are those of a master, by its own client over one connection: first one after
the other, then as many at a time as a master makes to a node. Each round attaches all pods, changes them and detaches
them, so that what is left behind each time shows as growth.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import click

from bench import machine
from bench.converge import Spread, limits
from bench.fleet import NODE_PORT, Node, fleet, wait_for
from bench.node_page import FIGURES, Results, Round, Size, Wave, save, section
from bpfrl import libc
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Status
from bpfrl.limits import Limits, PodRef
from bpfrl.rpc import tls
from bpfrl.rpc.client import NodeClient

_HTTP_PORT: Final = 10003
# As many as a master makes to one node (bpfrl/master/nodes.py).
_AT_ONCE: Final = 8
_LOOKS: Final = 30
_PATIENCE_SECONDS: Final = 30.0
_FIRST: Final = limits((10_000_000, 20_000_000))
_SECOND: Final = limits((5_000_000, 6_000_000))
_THIRD: Final = limits((7_000_000, 8_000_000))


@contextmanager
def serving(pods: int) -> Iterator[tuple[Node, NodeClient, list[PodRef]]]:
    """A node with so many pods that nothing limits, and a master's client of it, in whose network this process is."""
    with ExitStack() as undo:
        bed = undo.enter_context(fleet(1))
        [node] = bed.nodes
        node.daemon.stop()
        node.daemon.command += ["--http", f"{node.address}:{_HTTP_PORT}"]
        node.daemon.start()
        wait_for(node.serves, _PATIENCE_SECONDS, node.daemon.news)
        refs = [PodRef(str(uuid.uuid4()), "default", f"pod-{number}") for number in range(pods)]
        for ref in refs:
            node.start_pod(ref.uid)
        processes = undo.enter_context(_inhabitants())
        for ref in refs:
            processes.append(subprocess.Popen(node.in_pod(ref.uid, "unshare", "--net", "sleep", "infinity")))
        # The client's threads inherit it, so it has none yet.
        undo.enter_context(_inside(bed.tag))
        certificates = tls.Certificates(bed.certificates / "master", tls.MASTER)
        yield node, NodeClient(node.address, NODE_PORT, certificates), refs


async def measure(node: Node, client: NodeClient, pods: Sequence[PodRef], rounds: int) -> tuple[Size, list[Round]]:
    """Do all of it, and let go of the node in the end."""
    number = node.daemon.pid
    await client.list()
    await _scrape(node)
    begun = Size.of(number)
    try:
        return begun, [await _round(node, client, pods) for _ in range(rounds)]
    finally:
        await client.close()


async def _round(node: Node, client: NodeClient, pods: Sequence[PodRef]) -> Round:
    build = generator.build()

    def attach(pod: PodRef) -> Awaitable[object]:
        return client.attach(pod, _FIRST, generator.generate(pod, _FIRST), build)

    def update(wanted: Limits) -> Callable[[PodRef], Awaitable[object]]:
        return lambda pod: client.update(pod.uid, wanted)

    def detach(pod: PodRef) -> Awaitable[object]:
        return client.detach(pod.uid)

    waves = []
    for at_once in (1, _AT_ONCE):
        for name, call, wanted in (
            ("attach", attach, _FIRST),
            ("update", update(_SECOND if at_once == 1 else _THIRD), _SECOND if at_once == 1 else _THIRD),
        ):
            waves.append(await _wave(node, name, call, pods, at_once))
            await _check(client, pods, wanted)
        if at_once > 1:
            listed = Spread.of([await _time(client.list()) for _ in range(_LOOKS)])
            scraped = Spread.of([await _time(_scrape(node)) for _ in range(_LOOKS)])
            full = Size.of(node.daemon.pid)
        waves.append(await _wave(node, "detach", detach, pods, at_once))
        await _check(client, [], _FIRST)
    return Round(waves, full, Size.of(node.daemon.pid), listed, scraped)


async def _wave(
    node: Node, name: str, call: Callable[[PodRef], Awaitable[object]], pods: Sequence[PodRef], at_once: int
) -> Wave:
    slots, before, own = asyncio.Semaphore(at_once), node.daemon.cpu(), time.process_time()

    async def one(pod: PodRef) -> float:
        async with slots:
            return await _time(call(pod))

    start = time.monotonic()
    took = await asyncio.gather(*map(one, pods))
    elapsed = time.monotonic() - start
    node_cpu, client_cpu = (
        round(1000 * spent / len(pods), 2) for spent in (node.daemon.cpu() - before, time.process_time() - own)
    )
    return Wave(name, at_once, round(len(pods) / elapsed, 1), Spread.of(took), node_cpu, client_cpu)


async def _check(client: NodeClient, pods: Sequence[PodRef], wanted: Limits) -> None:
    """What was measured must have been done."""
    found = {each.pod: each.limits for each in await client.list() if isinstance(each, Status)}
    if found != dict.fromkeys(pods, wanted):
        raise RuntimeError(f"{len(found)} pods are limited, and not {len(pods)} to {wanted}")


async def _scrape(node: Node) -> None:
    def get() -> None:
        connection = http.client.HTTPConnection(node.address, _HTTP_PORT, timeout=_PATIENCE_SECONDS)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            if b"bpfrl_limiters_read_success 1.0" not in answer.read():
                raise RuntimeError("a scrape without limiters")
        finally:
            connection.close()

    await asyncio.to_thread(get)


async def _time(call: Awaitable[object]) -> float:
    start = time.monotonic()
    await call
    return time.monotonic() - start


@contextmanager
def _inhabitants() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Move this thread into a network namespace, and back."""
    with open("/proc/thread-self/ns/net", "rb") as own, open(f"/run/netns/{namespace}", "rb") as other:  # noqa: PTH123
        libc.setns(other.fileno(), libc.CLONE_NEWNET)
        try:
            yield
        finally:
            libc.setns(own.fileno(), libc.CLONE_NEWNET)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--pods", type=click.IntRange(min=1), default=500, show_default=True, help="Pods on the node.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often to do all of it.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=FIGURES, help="Where the JSON goes.")
def main(pods: int, rounds: int, output: Path) -> None:
    """Measure what one node's daemon does in a second, and what it holds."""
    if os.geteuid() != 0:
        raise click.ClickException("this loads BPF programs and makes namespaces: run it as root")
    # Ended from outside, everything is taken down as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = machine.describe()
    with serving(pods) as (node, client, refs):
        begun, found = asyncio.run(measure(node, client, refs, rounds))
    results = Results(facts, f"python -m bench.node --pods {pods} --rounds {rounds}", pods, begun, found)
    save(results, output)
    click.echo(section(results))


if __name__ == "__main__":
    main()
