"""What a cluster's objects are called, which is all that a shell needs to complete them."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

import msgspec

from bpfrl.errors import ApiError
from bpfrl.master.api import Api, connect

# One page, as client-go's: nobody chooses from more.
_MOST: Final = "500"
# All of each object is what comes otherwise, or from a server that does not know this; it can be read likewise.
_METADATA: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_ALL: Final = "application/json"
NODES: Final = "nodes"
_INTERNAL: Final = "InternalIP"


class Named(NamedTuple):
    """An object of a cluster.

    Attributes:
        name: its name.
        namespace: where it is, "" for what is in none.
        address: a node's, in the cluster; "" for others.
    """

    name: str
    namespace: str = ""
    address: str = ""


class _Metadata(msgspec.Struct):
    name: str
    namespace: str = ""


class _Address(msgspec.Struct):
    type: str
    address: str


class _Status(msgspec.Struct):
    addresses: list[_Address] = []


class _Object(msgspec.Struct):
    metadata: _Metadata
    status: _Status = msgspec.field(default_factory=_Status)


class _List(msgspec.Struct):
    items: list[_Object]


async def names(kubeconfig: Path | None, context: str | None, resource: str, namespace: str = "") -> list[Named]:
    """A cluster's objects of one kind, 500 at most.

    Args:
        kubeconfig: as for :func:`bpfrl.master.api.connect`.
        context: likewise.
        resource: what they are: ``pods``, ``namespaces``, :data:`NODES`.
        namespace: only those of this one.

    Raises:
        ClusterError: no cluster is named.
        ApiError: it does not answer, or refuses.
    """
    path = f"/api/v1/namespaces/{quote(namespace, safe='')}/{resource}" if namespace else f"/api/v1/{resource}"
    client = await connect(kubeconfig, context)
    try:
        accept = _ALL if resource == NODES else _METADATA
        async with Api(client).request("GET", path, {"limit": _MOST}, accept=accept) as response:
            found = msgspec.json.decode(await response.read(), type=_List)
    except msgspec.MsgspecError as error:
        raise ApiError(f"the API server does not answer with a list: {error}") from error
    finally:
        await client.close()  # type: ignore[no-untyped-call]
    return [Named(each.metadata.name, each.metadata.namespace, _address(each.status)) for each in found.items]


def _address(status: _Status) -> str:
    return next((each.address for each in status.addresses if each.type == _INTERNAL), "")
