"""What a cluster's objects are called, which is all that a shell needs to complete their names."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from bpfrl.errors import ApiError
from bpfrl.master.api import Api, connect

# One page, as client-go's: nobody chooses from more.
_MOST: Final = "500"
# All of each object is what comes otherwise, or from a server that does not know this; it can be read likewise.
_METADATA: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"


class _Metadata(msgspec.Struct):
    name: str
    namespace: str = ""


class _Object(msgspec.Struct):
    metadata: _Metadata


class _List(msgspec.Struct):
    items: list[_Object]


async def names(
    kubeconfig: Path | None, context: str | None, resource: str, namespace: str = ""
) -> list[tuple[str, str]]:
    """Namespace ("" where there is none) and name of a cluster's objects of one kind, 500 at most.

    Args:
        kubeconfig: as for :func:`bpfrl.master.api.connect`.
        context: likewise.
        resource: what they are: ``pods``, ``nodes``, ``namespaces``.
        namespace: only those of this one.

    Raises:
        ClusterError: no cluster is named.
        ApiError: it does not answer, or refuses.
    """
    path = f"/api/v1/namespaces/{quote(namespace, safe='')}/{resource}" if namespace else f"/api/v1/{resource}"
    client = await connect(kubeconfig, context)
    try:
        async with Api(client).request("GET", path, {"limit": _MOST}, accept=_METADATA) as response:
            found = msgspec.json.decode(await response.read(), type=_List)
    except msgspec.MsgspecError as error:
        raise ApiError(f"the API server does not answer with a list: {error}") from error
    finally:
        await client.close()
    return [(each.metadata.namespace, each.metadata.name) for each in found.items]
