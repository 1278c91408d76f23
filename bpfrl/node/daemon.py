"""``bpfrl serve-node``: the service's process.

It holds no state. Limits are pinned in the kernel, so they outlive it however it ends, and what a former process or a
reboot of pods has left behind is swept when it starts and once a minute.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bpfrl import libc, mounts
from bpfrl.bpf import generator, sockets
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import BpfrlError, KernelError
from bpfrl.node.agent import Agent
from bpfrl.node.observer import UNOBSERVED, Observer
from bpfrl.node.readable import Readable
from bpfrl.node.server import NodeService
from bpfrl.rpc import node_pb2, tls
from bpfrl.rpc.node_pb2_grpc import add_NodeServicer_to_server

log = logging.getLogger(__name__)

SERVICE: Final = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name
# The kernel lets go of a removed cgroup by itself: what is swept is only the empty pins.
_SWEEP_SECONDS: Final = 60.0
# An attach makes some hundred objects that last until it has ended.
_GARBAGE_THRESHOLD: Final = 10_000
# Calls on the way take milliseconds; only one that waits for a cgroup is cut off.
_GRACE_SECONDS: Final = 5.0
# A master has one connection, people have some. One takes up to 80 KB, so that this many fit into the chart's memory
# limit beside 500 pods; more are closed as they come.
_MOST_CONNECTIONS: Final = 2_000
# What else is open: pins, cgroups, and the connections of --http.
_OWN_DESCRIPTORS: Final = 512
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second daemon on this port is a mistake, and not to share the work
    # A master sends its programs in pieces of 64 KiB.
    ("grpc.max_receive_message_length", 2**17),
    # Calls that wait for pods' cgroups are the most that a master has on the way: a node has some hundred pods.
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.http2.bdp_probe", 0),
    # Until TLS and HTTP/2 are set up. Whoever cannot show a certificate holds a connection no longer than this.
    ("grpc.server_handshake_timeout_ms", 5_000),
    # Longer than masters leave a node alone (--resync), for each end of a connection makes them look at all of it.
    ("grpc.max_connection_idle_ms", 900_000),
    # Masters see twice a minute whether this node is still there.
    ("grpc.http2.min_ping_interval_without_data_ms", tls.KEEPALIVE_SECONDS * 500),
    ("grpc.keepalive_permit_without_calls", 1),
    # And the node sees whether a silent master is: what has lost its other end is not kept for an hour.
    ("grpc.keepalive_time_ms", tls.KEEPALIVE_SECONDS * 2000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A certificate is checked in the handshake: once an hour there is a new one.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
)


@dataclass(frozen=True)
class Monitoring:
    """What is told over HTTP.

    Attributes:
        address: where, as HOST:PORT.
        pod_labels: tell each pod's namespace and name beside its UID.
        most_pods: how many pods are told one by one at most.
    """

    address: str
    pod_labels: bool
    most_pods: int


async def serve(
    agent: Agent,
    tree: CgroupTree,
    address: str,
    certificates: tls.Certificates | None,
    *,
    cooperate: bool,
    known_only: bool = False,
    monitoring: Monitoring | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        agent: this node's limiters.
        tree: this node's pods.
        address: where to listen, as HOST:PORT.
        certificates: what to show and to ask for; None: no TLS.
        cooperate: have this node's senders keep to what limited receivers ask for, and its limited pods ask.
        known_only: take no programs but those that this version compiles or ships.
        monitoring: what is told over HTTP; None: nothing.

    Raises:
        CompilerError: these are wanted, and are neither here nor can be made.
        KernelError: an address, or a BPF file system, cannot be had.
        PermissionDeniedError: this needs root.
    """
    libc.share_arena()
    async with AsyncExitStack() as stack:
        observer = await _monitor(monitoring, agent, certificates, stack) if monitoring else UNOBSERVED
        await _serve(agent, tree, address, certificates, observer, cooperate=cooperate, known_only=known_only)


async def _monitor(
    monitoring: Monitoring, agent: Agent, certificates: tls.Certificates | None, stack: AsyncExitStack
) -> Observer:
    # Memory that a node without has no use for.
    from bpfrl import monitoring as pages  # noqa: PLC0415
    from bpfrl.node.metrics import NodeMetrics  # noqa: PLC0415

    metrics = NodeMetrics(agent, certificates, pod_labels=monitoring.pod_labels, most_pods=monitoring.most_pods)
    stack.push_async_callback(asyncio.to_thread, metrics.close)
    await stack.enter_async_context(pages.serving(monitoring.address, metrics))
    return metrics


async def _serve(
    agent: Agent,
    tree: CgroupTree,
    address: str,
    certificates: tls.Certificates | None,
    observer: Observer,
    *,
    cooperate: bool,
    known_only: bool,
) -> None:
    options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", _room()))
    server = grpc.aio.server(options=options, interceptors=(Readable(),))
    roles = certificates is not None
    service = NodeService(agent, tree, roles=roles, cooperate=cooperate, known_only=known_only, observer=observer)
    add_NodeServicer_to_server(service, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    try:
        if certificates:
            port = server.add_secure_port(address, tls.server_credentials(certificates))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise KernelError(
            f"cannot listen on {address}: another process does, or the address is none of this machine's"
        ) from error

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if known_only:
        build = await asyncio.to_thread(generator.build)
        log.info("taking no programs but those of build %s", build.hex())
    await asyncio.to_thread(_warm_up, agent)
    # What is there by now stays: looking through it for garbage would take a tenth of the time of each attach.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    await server.start()
    for name in ("", SERVICE):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    observer.serves(serving=True)
    log.info("serving on %s (port %d)%s", address, port, "" if certificates else " without TLS")
    tending = asyncio.create_task(_tend_for_ever(service, observer))
    try:
        await stopped.wait()
    finally:
        log.info("stopping; limits stay in force")
        observer.serves(serving=False)
        tending.cancel()
        await healthy.enter_graceful_shutdown()
        await server.stop(_GRACE_SECONDS)
        await asyncio.to_thread(service.close)


def _room() -> int:
    """How many connections may be open at once, when this process may have as many descriptors as it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return (
        _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(_MOST_CONNECTIONS, soft - _OWN_DESCRIPTORS))
    )


async def _tend_for_ever(service: NodeService, observer: Observer = UNOBSERVED) -> None:
    while True:
        try:
            await service.tend()
        except (BpfrlError, OSError) as error:
            observer.failed_to_tend()
            log.warning("cannot tend this node's limiters: %s", error)
        libc.give_back_memory()
        await asyncio.sleep(_SWEEP_SECONDS)


def _warm_up(agent: Agent) -> None:
    """What the first call would otherwise wait for, or fail of: the bpffs, libbpf, and a compiler run."""
    if not agent.is_mounted() and not mounts.are_the_machines():
        # Mounted here, it would end with this container, and all limits with it.
        raise KernelError(
            f"no BPF file system on {agent.bpffs}, and this is a container or sandbox, whose mounts end with it:"
            f" have the machine mount one there (mount -t bpf bpf {agent.bpffs}) and let this process see it"
        )
    agent.mount()
    agent.limiters()
    sockets.prepare()
