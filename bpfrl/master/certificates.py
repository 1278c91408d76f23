"""The certificates of a cluster, kept in its own Secrets: ``bpfrl certs apply``.

:mod:`bpfrl.rpc.authority` works on a folder. Here the folder is laid out from the Secrets, worked on, and what has
changed goes back:

    bpfrl-ca        tls.crt  tls.key          the authority, as cert-manager's CA issuer reads one
    bpfrl-node      ca.crt  tls.crt  tls.key  as they are mounted
    bpfrl-master    likewise
    bpfrl-operator  likewise, for people, who have no folder of their own to take it from

Two that do so at once agree on one authority: whoever finds that something was changed meanwhile starts again from
what is there then.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any, Final

from bpfrl.errors import ApiError, CertificateError
from bpfrl.master.api import Api
from bpfrl.rpc import authority, tls

AUTHORITY: Final = "bpfrl-ca"
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409
_TRIES: Final = 5

_Secret = dict[str, Any]


async def keep(api: Api, namespace: str, days: int, *, renew: bool = False) -> list[tuple[str, bool]]:
    """Have good certificates in a namespace's Secrets; as :func:`bpfrl.rpc.authority.init` has them in a folder.

    Args:
        api: the cluster's API server.
        namespace: where the Secrets are.
        days: how long new certificates are good for.
        renew: make all but the authority anew in any case.

    Returns:
        Each Secret's name, and whether its content was made just now.

    Raises:
        ApiError: the API server did not answer, or said no.
        CertificateError: the authority that is there cannot be used.
    """
    tries = _TRIES
    while True:
        try:
            return await _keep(api, f"/api/v1/namespaces/{namespace}/secrets", namespace, days, renew=renew)
        except ApiError as error:
            tries -= 1
            if error.status != _CONFLICT or not tries:
                raise


async def _keep(api: Api, path: str, namespace: str, days: int, *, renew: bool) -> list[tuple[str, bool]]:
    present = {name: await _read(api, path, name) for name in (AUTHORITY, *authority.SECRETS)}
    with tempfile.TemporaryDirectory(prefix="bpfrl-") as scratch:
        folder = Path(scratch)
        for name, secret in present.items():
            _lay_out(folder, name, secret or {})
        try:
            made = [new for _, new in authority.init(folder, days, renew=renew)]
        except CertificateError as error:
            reason = str(error).replace(scratch, AUTHORITY)
            raise CertificateError(f"secret/{AUTHORITY} is no authority ({reason}): delete it for a new one") from error
        wanted = [_authority(folder, namespace), *authority.role_secrets(folder, namespace)]
    results = []
    # The authority comes first: should this be cut off, the next one goes on with it.
    for secret, new in zip(wanted, made, strict=True):
        name = secret["metadata"]["name"]
        if new:
            await _write(api, path, present[name], secret)
        results.append((name, new))
    return results


async def _read(api: Api, path: str, name: str) -> _Secret | None:
    try:
        async with api.request("GET", f"{path}/{name}") as response:
            secret: _Secret = await response.json()
            return secret
    except ApiError as error:
        if error.status != _NOT_FOUND:
            raise
        return None


async def _write(api: Api, path: str, present: _Secret | None, wanted: _Secret) -> None:
    """Create a Secret, or replace the content of the very one that was read."""
    if present is None:
        method, target, body = "POST", path, wanted
    else:
        # Its type cannot be changed, and labels are somebody's.
        method, target, body = "PUT", f"{path}/{wanted['metadata']['name']}", present | {"data": wanted["data"]}
    async with api.request(method, target, body=body):
        pass


def _authority(folder: Path, namespace: str) -> _Secret:
    files = ((tls.CERTIFICATE_FILE, tls.AUTHORITY_FILE), (tls.KEY_FILE, authority.AUTHORITY_KEY))
    return authority.secret(AUTHORITY, namespace, {key: (folder / file).read_bytes() for key, file in files})


def _lay_out(folder: Path, name: str, secret: _Secret) -> None:
    """Put a Secret's content where :func:`bpfrl.rpc.authority.init` has it."""
    data = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
    if name == AUTHORITY:
        places = {tls.CERTIFICATE_FILE: folder / tls.AUTHORITY_FILE, tls.KEY_FILE: folder / authority.AUTHORITY_KEY}
    else:
        own = folder / authority.SECRETS[name]
        own.mkdir(mode=0o700)
        places = {file: own / file for file in (tls.AUTHORITY_FILE, tls.CERTIFICATE_FILE, tls.KEY_FILE)}
    for key, place in places.items():
        if key in data:
            place.write_bytes(data[key])
