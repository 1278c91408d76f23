"""Whether the API server answers, and lets a master do what it does: one look, which says what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from bpfrl.errors import ApiError, ClusterError
from bpfrl.findings import Finding, Mark
from bpfrl.master import api
from bpfrl.master.leader import LEASE, own_namespace

_SECONDS: Final = 10.0
_REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_SERVER: Final = "API server"
_RBAC: Final = "RBAC"


class _Right(NamedTuple):
    verb: str
    resource: str
    group: str = ""
    namespace: str = ""
    name: str = ""


def _wanted(namespace: str) -> list[_Right]:
    """What bpfrl serve-master asks of the API server. A Lease that is not there yet has no name to be allowed by."""
    return [
        *(_Right(verb, "pods") for verb in ("get", "list", "watch")),
        *(_Right(verb, "events") for verb in ("create", "patch")),
        _Right("create", "leases", "coordination.k8s.io", namespace),
        *(_Right(verb, "leases", "coordination.k8s.io", namespace, LEASE) for verb in ("get", "update")),
    ]


class _Version(msgspec.Struct, rename="camel"):
    git_version: str = "of no version"


class _Verdict(msgspec.Struct):
    allowed: bool = False


class _Review(msgspec.Struct):
    status: _Verdict = msgspec.field(default_factory=_Verdict)


async def cluster(kubeconfig: Path | None, context: str | None) -> list[Finding]:
    """The API server that these name, and what they may do there."""
    try:
        async with asyncio.timeout(_SECONDS):
            client = await api.connect(kubeconfig, context)
            try:
                return [await _version(api.Api(client)), await _rights(api.Api(client))]
            finally:
                await client.close()  # type: ignore[no-untyped-call]
    except (ApiError, ClusterError, TimeoutError, msgspec.MsgspecError) as error:
        reason = str(error) or f"no answer within {_SECONDS:.0f} s"
        return [Finding(_SERVER, Mark.MISSING, (reason,), "see that kubectl reaches it with the same kubeconfig")]


async def _version(server: api.Api) -> Finding:
    async with server.request("GET", "/version") as response:
        version = msgspec.json.decode(await response.read(), type=_Version)
    return Finding(_SERVER, Mark.OK, (f"Kubernetes {version.git_version}",))


async def _rights(server: api.Api) -> Finding:
    namespace = own_namespace()
    try:
        lacking = [right for right in _wanted(namespace) if not await _allowed(server, right)]
    except ApiError as error:
        return Finding(_RBAC, Mark.WARNING, (f"not known: {error}",))
    if lacking:
        found = ", ".join(f"{right.verb} {right.resource}" for right in lacking)
        advice = f"give the master these rights, and its Lease's in {namespace}; only serve-master needs them"
        return Finding(_RBAC, Mark.MISSING, (f"may not: {found}",), advice)
    return Finding(_RBAC, Mark.OK, ("may do what a master does: pods, events, its Lease",))


async def _allowed(server: api.Api, right: _Right) -> bool:
    attributes = {key: value for key, value in right._asdict().items() if value}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    async with server.request("POST", _REVIEWS, body=review) as response:
        return msgspec.json.decode(await response.read(), type=_Review).status.allowed
