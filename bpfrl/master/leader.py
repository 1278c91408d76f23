"""One master acts, the others wait: a Lease, held as the ``kubernetes`` client's own election does it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
from kubernetes.aio.client import ApiClient, ApiException, V1Lease, V1LeaseSpec, V1ObjectMeta
from kubernetes.aio.config import ConfigException
from kubernetes.aio.leaderelection import leaderelection
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

log = logging.getLogger(__name__)

LEASE: Final = "bpfrl-master"
_SERVICE_ACCOUNT_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_DEFAULT_NAMESPACE: Final = "kube-system"
# client-go's proportions: 15 s, 10 s and 2 s.
_RENEW_SHARE: Final = 2 / 3
_RETRY_SHARE: Final = 2 / 15
# What the client's election takes at least.
_SHORTEST_RETRY_SECONDS: Final = 1.0


def own_namespace() -> str:
    """Where the Lease is unless somebody says otherwise: in the namespace of the pod around this process, if any."""
    try:
        return _SERVICE_ACCOUNT_NAMESPACE.read_text().strip() or _DEFAULT_NAMESPACE
    except OSError:
        return _DEFAULT_NAMESPACE


class _Lock(LeaseLock):
    """The client's lock, for which an API server that cannot be reached is one that says no."""

    def __init__(self, namespace: str, identity: str, client: ApiClient, timeout: float) -> None:
        super().__init__(LEASE, namespace, identity, client)
        self._timeout = timeout

    async def get(self, name: str, namespace: str) -> Any:
        found = await self._ask(super().get(name, namespace))
        return (False, ApiException(status=0, reason="the API server does not answer")) if found is None else found

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        # Not the client's own: that passes pretty=True, which its generated half refuses (kubernetes 37).
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return bool(await self._ask(self.api_instance.create_namespaced_lease(namespace, lease)))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return bool(await self._ask(super().update(name, namespace, updated_record)))

    async def release(self) -> None:
        """Let another one lead at once, if this one does."""
        held, record = await self.get(self.name, self.namespace)
        lease = self.lease_reference
        if not held or lease is None or getattr(record, "holder_identity", None) != self.identity:
            return
        lease.spec = V1LeaseSpec(lease_duration_seconds=1)
        await self._ask(self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease))

    async def _ask(self, call: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await call
        except (ApiException, ConfigException, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.warning("lease %s: %s", LEASE, " ".join(str(error).split()) or type(error).__name__)
            return None


class _SteadyTime:
    """The time of day when this was made, and evenly on from there, whatever is done to the machine's clock.

    The client's election measures with the time of day how long it has seen no sign of a leader. Set back by a day,
    it would wait a day longer for one that is gone; set ahead, it would take the Lease from one that leads.
    """

    def __init__(self) -> None:
        self._begun = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def time(self) -> float:
        """What time.time() would tell, s."""
        return self._begun + time.clock_gettime(time.CLOCK_BOOTTIME)


leaderelection.time = _SteadyTime()  # type: ignore[assignment, attr-defined]


class Leadership:
    """Leads while it can, and follows while it must.

    Args:
        client: the API server.
        namespace: the Lease's.
        identity: this master's own name.
        duration: how long a leader that says nothing counts as one, s.
    """

    def __init__(self, client: ApiClient, namespace: str, identity: str, duration: int) -> None:
        self._retry = max(_SHORTEST_RETRY_SECONDS, duration * _RETRY_SHARE)
        self._duration = duration
        self._lock = _Lock(namespace, identity, client, self._retry * 2)
        self._acting: asyncio.Task[None] | None = None
        # There a conflict over the Lease, which is how elections go, has a traceback, and what _ask tells comes again.
        for module in (LeaseLock.__module__, leaderelection.__name__):
            logging.getLogger(module).setLevel(logging.CRITICAL)

    async def run(self, act: Callable[[], Awaitable[None]]) -> None:
        """Act while leading, until cancelled. What ``act`` raises is raised here."""

        async def started() -> None:
            log.info("leading as %s", self._lock.identity)
            self._acting = asyncio.current_task()
            try:
                await act()
            except Exception as error:  # noqa: BLE001 - the client's election would go on without a word
                failed.set_exception(error)

        async def stopped() -> None:
            log.warning("not leading any more: the lease %s was not renewed in time", LEASE)
            await self._end()

        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        config = Config(self._lock, self._duration, self._duration * _RENEW_SHARE, self._retry, started, stopped)
        while True:
            log.info("waiting for the lease %s/%s", self._lock.namespace, LEASE)
            election = asyncio.create_task(leaderelection.LeaderElection(config).run())
            try:
                await asyncio.wait({election, failed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                election.cancel()
                [result] = await asyncio.gather(election, return_exceptions=True)
                await self._end()
            if failed.done():
                failed.result()
            if isinstance(result, Exception):
                log.error("the election has failed: %r", result)
                await asyncio.sleep(self._retry)

    async def release(self) -> None:
        """Let another one lead at once, if this one does."""
        await self._lock.release()

    async def _end(self) -> None:
        acting, self._acting = self._acting, None
        if acting:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
