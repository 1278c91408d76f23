"""``bpfrl serve-master``: a source of pods, a controller, and the lease that says which of several masters acts."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpfrl import libc
from bpfrl.bpf import generator
from bpfrl.master.controller import Controller
from bpfrl.master.events import Recorder
from bpfrl.master.observer import UNOBSERVED, Observer
from bpfrl.rpc import tls
from bpfrl.rpc.client import Connections, NodeClient

log = logging.getLogger(__name__)

# All of the nodes of most clusters, in 30 MB. Beyond that, a node that was started anew may be noticed only when there
# is something to tell it, or at the next resync.
_IDLE_CONNECTIONS: Final = 300
# With 150,000 pods, looking for garbage in all of memory takes 0.3 s, in which nothing else is done.
_FREEZE_SECONDS: Final = 30.0
_FREEZES: Final = 20


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        certificates: what to connect to nodes with; None: without TLS, on loopback only.
        manifests: the folder that holds the desired state; None: the API server does.
        kubeconfig: where the API server is told; None: see :func:`bpfrl.master.api.connect`.
        context: which of its contexts; None: its current one.
        node_port: where the nodes' daemons listen.
        resync: how often each node is asked what it has, s.
        leader_elect: whether to act only while holding the Lease.
        lease_namespace: the Lease's; None: this pod's own.
        lease_duration: how long a leader that says nothing counts as one, s.
        http: where metrics are told, as HOST:PORT; None: nowhere.
        max_nodes_in_metrics: how many nodes are told one by one at most.
    """

    certificates: tls.Certificates | None
    manifests: Path | None
    kubeconfig: Path | None
    context: str | None
    node_port: int
    resync: float
    leader_elect: bool
    lease_namespace: str | None
    lease_duration: int
    http: str | None
    max_nodes_in_metrics: int


async def serve(settings: Settings) -> None:
    """Keep all nodes' limits as their pods ask for them, until SIGTERM or SIGINT.

    Raises:
        ClusterError: there is nothing to watch.
        CompilerError: no limiter can be generated here.
        KernelError: the address for metrics cannot be had.
    """
    libc.share_arena()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    # Two masters of one node's network have its name, and both may be process 1.
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"

    connections = Connections(_IDLE_CONNECTIONS)

    def connect(address: str) -> NodeClient:
        return observer.client(address, settings.node_port, settings.certificates, connections)

    async with AsyncExitStack() as stack:
        observer = await _monitor(settings, stack)
        await asyncio.to_thread(generator.build)
        if settings.manifests:
            from bpfrl.master.manifests import ManifestWatch  # noqa: PLC0415 - only one of the two is ever needed

            recorder = Recorder(None, identity, observer)
            controller = Controller(connect, recorder, settings.resync, observer)
            work = [ManifestWatch(settings.manifests, controller).run(), controller.run()]
        else:
            from bpfrl.master import api, apiserver, leader  # noqa: PLC0415

            client = await api.connect(settings.kubeconfig, settings.context)
            stack.push_async_callback(client.close)
            server = api.Api(client)
            recorder = Recorder(server, identity, observer)
            controller = Controller(connect, recorder, settings.resync, observer)
            work = [apiserver.PodWatch(server, controller, observer).run(), recorder.run()]
            if settings.leader_elect:
                namespace = settings.lease_namespace or leader.own_namespace()
                leadership = leader.Leadership(client, namespace, identity, settings.lease_duration)
                stack.push_async_callback(leadership.release)
                work.append(leadership.run(controller.run))
            else:
                work.append(controller.run())
        observer.attend(controller.census)
        stack.push_async_callback(controller.close)

        tasks = [asyncio.create_task(each) for each in (*work, _spare_garbage_collection())]
        waiting = asyncio.create_task(stopped.wait())
        try:
            await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.is_set():
                log.info("stopping; limits stay in force")
                await controller.drain()
                await recorder.flush()
        finally:
            for task in (waiting, *tasks):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result


async def _spare_garbage_collection() -> None:
    """Have Python look for garbage only in what is new, and in all that there is every ten minutes.

    By itself it looks through everything each time when a quarter has been added, which in a master are pods, what is
    known of nodes, and other things that stay. Few cycles ever become garbage here.
    """
    while True:
        for _ in range(_FREEZES):
            gc.freeze()
            # Lists of pods, and handshakes with many nodes, leave some megabytes behind.
            await asyncio.to_thread(libc.give_back_memory)
            await asyncio.sleep(_FREEZE_SECONDS)
        gc.unfreeze()
        gc.collect()


async def _monitor(settings: Settings, stack: AsyncExitStack) -> Observer:
    if not settings.http:
        return UNOBSERVED
    # Memory that a master without has no use for.
    from bpfrl import monitoring  # noqa: PLC0415
    from bpfrl.master.metrics import MasterMetrics  # noqa: PLC0415

    metrics = MasterMetrics(settings.certificates, settings.max_nodes_in_metrics)
    await stack.enter_async_context(monitoring.serving(settings.http, metrics))
    return metrics
