"""``/metrics``, ``/livez`` and ``/readyz`` of a daemon, on its own event loop.

Imported only where somebody has asked for that: aiohttp and the Prometheus client take memory that a daemon can do
without. Each daemon has a registry of its own; nothing is kept in the library's global one.

A scrape has two steps. :meth:`Monitored.refresh` learns, on the loop and without waiting for long, what is the case;
then a thread writes it down. One scrape is carried out at a time, and those that ask for the same meanwhile get the
same answer, so that scrapes never pile up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from bpfrl import __version__
from bpfrl.errors import KernelError
from bpfrl.rpc.tls import Certificates

log = logging.getLogger(__name__)

# Who asks for readiness waits for a second by default (Kubernetes' timeoutSeconds).
_READY_SECONDS: Final = 0.8
_GRACE_SECONDS: Final = 1.0
# Anybody may connect: who asks for nothing, or never comes to the end of it, is let go of. Prometheus connects anew.
_IDLE_SECONDS: Final = 30.0
# Those who are served need one for a moment each: the oldest is nobody's of them.
_MOST_CONNECTIONS: Final = 128
# When each series began would double what is sent, and Prometheus needs it for nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Monitored:
    """What a daemon shows of itself.

    Attributes:
        registry: the metrics of this daemon.

    Args:
        component: which daemon this is.
        certificates: what it shows the other side, None: no TLS.
    """

    def __init__(self, component: str, certificates: Certificates | None) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        build = Info("bpfrl_build", "Which daemon this is, and of which version.", registry=self.registry)
        build.info({"component": component, "version": __version__})
        if certificates:
            expiry = Gauge(
                "bpfrl_certificate_expiry_timestamp_seconds",
                "When the certificate expires that this daemon shows, seconds since the epoch.",
                registry=self.registry,
            )
            expiry.set_function(lambda: certificates.expires().timestamp())

    async def refresh(self) -> None:
        """Learn what the registry's collectors are to tell; before each scrape, and never twice at once."""

    async def unready(self) -> str:
        """Why the daemon cannot do its work now, in one line; "" if it can."""
        return ""


@asynccontextmanager
async def serving(address: str, monitored: Monitored) -> AsyncIterator[int]:
    """Serve while the context lasts, and say on which port.

    Args:
        address: where to listen, as HOST:PORT; ``[::]`` is every address.
        monitored: what to show.

    Raises:
        KernelError: the address cannot be had.
    """
    pages = _Pages(monitored)
    application = web.Application()
    application.add_routes(
        [web.get("/metrics", pages.metrics), web.get("/livez", pages.livez), web.get("/readyz", pages.readyz)]
    )
    runner = web.AppRunner(
        application, access_log=None, shutdown_timeout=_GRACE_SECONDS, keepalive_timeout=_IDLE_SECONDS
    )
    await runner.setup()
    listener = None
    try:
        host, _, port = address.rpartition(":")
        try:
            listener = await asyncio.get_running_loop().create_server(
                partial(_accept, runner), None if host == "[::]" else host.strip("[]"), int(port)
            )
        except OSError as error:
            # asyncio writes a sentence of its own into the error, unless no such host is known.
            reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            raise KernelError(f"cannot serve metrics on {address}: {reason}") from error
        found: int = listener.sockets[0].getsockname()[1]
        log.info("metrics on %s (port %d)", address, found)
        yield found
    finally:
        if listener:
            listener.close()
        await runner.cleanup()


def _accept(runner: web.AppRunner) -> asyncio.Protocol:
    """What handles a connection that is about to be made. Where there are too many, the oldest one goes for it."""
    server = runner.server
    if server is None:
        raise RuntimeError("the runner is not set up")
    connections = server.connections
    for oldest in connections[: max(0, len(connections) + 1 - _MOST_CONNECTIONS)]:
        if oldest.transport:
            oldest.transport.abort()
    return server()


class _Pages:
    """The three paths."""

    def __init__(self, monitored: Monitored) -> None:
        self._monitored = monitored
        self._one_at_a_time = asyncio.Lock()
        self._scrapes: dict[str, asyncio.Task[bytes]] = {}

    async def livez(self, _: web.Request) -> web.Response:
        """The loop turns: nothing else that may be wrong would be better after a restart."""
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """Whether the daemon can do its work; if not, why."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                reason = await self._monitored.unready()
        except TimeoutError:
            reason = f"no answer within {_READY_SECONDS} s"
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """Everything in the registry, in the form that the client asks for."""
        try:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        except (TypeError, ValueError):
            # It reads versions without looking at them.
            raise web.HTTPNotAcceptable(text="no such version of the format\n") from None
        scrape = self._scrapes.get(content_type)
        if scrape is None:
            scrape = self._scrapes[content_type] = asyncio.create_task(self._scrape(encode))
            scrape.add_done_callback(lambda _: self._scrapes.pop(content_type))
        response = web.Response(body=await asyncio.shield(scrape), headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    async def _scrape(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        async with self._one_at_a_time:
            await self._monitored.refresh()
            return await asyncio.to_thread(encode, self._monitored.registry)
