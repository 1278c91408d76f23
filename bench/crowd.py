"""The stand-in with a crowd in it: ``python -m bench.crowd`` is what :class:`Crowd` runs.

It begins with the pods of a large cluster instead of a journal, and can change them by itself, so many times a second:
each change is noted with the moment at which it was committed, by the clock that all processes of a machine share.
Everything follows from numbers and a seed: which pod is on which node, which are limited, and what changes when.

It adds to the stand-in's paths:

    POST /churn {"rate": 50, "seconds": 20}    begins to change pods
    GET /churn                                 the changes so far, and whether more are to come
    GET /wanted                                what limited pods should have by now
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import random
import ssl
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import msgspec
from aiohttp import web

from bench import standin
from bench.kubeapi import Api
from bpfrl.master.annotations import EGRESS, INGRESS

# For benchmarks (RFC 2544): nobody has such an address.
NODE_NETWORK: Final = ipaddress.IPv4Network("198.18.0.0/15")
PODS_PER_NODE: Final = 30
LIMITED_PER_NODE: Final = 6
_NAMESPACES: Final = 40
_EGRESS: Final = 10**6
_INGRESS: Final = 20 * 10**6
# Of a hundred changes: other rates, a new pod, a pod less; and the rest concerns nobody here.
_CHANGED: Final = 70
_CREATED: Final = 10
_DELETED: Final = 10
_HUNDRED: Final = 100
_CREATED_AT: Final = "2026-01-01T00:00:00Z"
_HISTORY: Final = 100_000
_BOOKMARK_SECONDS: Final = 60.0


class Change(msgspec.Struct, array_like=True):
    """A change that a node is to be told of.

    Attributes:
        kind: ``change``, ``create`` or ``delete``.
        uid: the pod's.
        address: its node's.
        egress: what it may send from then on, bit/s; it grows from change to change.
        at: when it was committed, s.
    """

    kind: str
    uid: str
    address: str
    egress: int
    at: float


class Changes(msgspec.Struct):
    """The changes so far.

    Attributes:
        running: whether more are to come.
        made: how many there were, those that concern nobody included.
        told: those that a node is to be told of.
    """

    running: bool
    made: int
    told: list[Change]


class Wanted(msgspec.Struct, array_like=True):
    """What a limited pod should have: (egress, ingress) in bit/s on a node."""

    address: str
    egress: int
    ingress: int


@dataclass(frozen=True)
class Size:
    """How large a cluster is.

    Attributes:
        nodes: how many nodes, each with :data:`PODS_PER_NODE` pods of which :data:`LIMITED_PER_NODE` are limited.
    """

    nodes: int

    @property
    def pods(self) -> int:
        """How many pods."""
        return self.nodes * PODS_PER_NODE

    @property
    def limited(self) -> int:
        """How many of them are limited."""
        return self.nodes * LIMITED_PER_NODE


def address_of(node: int) -> str:
    """A node's address, by its number."""
    return str(NODE_NETWORK[node + 1])


def _uid_of(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


class _Crowd:
    """The pods, and what is to become of them."""

    def __init__(self, store: standin.Store, size: Size, seed: int) -> None:
        self._store = store
        self._table = store.tables["pods"]
        self._nodes = size.nodes
        self._random = random.Random(seed)  # noqa: S311 - the same each time
        self._number = 0
        self._limited: list[str] = []  # the keys
        self._others: list[str] = []
        self.wanted: dict[str, Wanted] = {}
        self.changes = Changes(running=False, made=0, told=[])
        for number in range(size.pods):
            limited = number // size.nodes % (PODS_PER_NODE // LIMITED_PER_NODE) == 0
            self._create(number % size.nodes, limited=limited, running=True)
        self._table.forget(store.version)

    async def churn(self, rate: float, seconds: float) -> None:
        """Change pods, so many times a second for so long."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            for number in range(round(rate * seconds)):
                await asyncio.sleep(start + number / rate - loop.time())
                self._change()
        finally:
            self.changes.running = False

    def _change(self) -> None:
        self.changes.made += 1
        dice = self._random.randrange(_HUNDRED)
        if dice < _CHANGED:
            self._rate(self._random.choice(self._limited))
        elif dice < _CHANGED + _CREATED:
            key = self._create(self._random.randrange(self._nodes), limited=True, running=False)
            self._note("create", self._uid(key))
        elif dice < _CHANGED + _CREATED + _DELETED:
            # The last takes the place of what goes, so that choosing one stays cheap.
            place = self._random.randrange(len(self._limited))
            key, self._limited[place] = self._limited[place], self._limited[-1]
            self._limited.pop()
            uid = self._uid(key)
            self._note("delete", uid)
            del self.wanted[uid]
            self._store.remove(self._table, key)
        else:
            self._touch(self._random.choice(self._others))

    def _rate(self, key: str) -> None:
        content = self._table.objects[key].content()
        uid = content["metadata"]["uid"]
        self.wanted[uid].egress = _EGRESS + 1000 * self.changes.made
        content["metadata"]["annotations"][EGRESS] = str(self.wanted[uid].egress)
        self._note("change", uid)
        self._store.put(self._table, key, content)

    def _touch(self, key: str) -> None:
        """What a kubelet does to pods all the time."""
        content = self._table.objects[key].content()
        ready = content["status"]["conditions"][0]
        ready["status"] = "False" if ready["status"] == "True" else "True"
        self._store.put(self._table, key, content)

    def _note(self, kind: str, uid: str) -> None:
        wanted = self.wanted[uid]
        self.changes.told.append(Change(kind, uid, wanted.address, wanted.egress, time.monotonic()))

    def _uid(self, key: str) -> str:
        uid: str = self._table.objects[key].content()["metadata"]["uid"]
        return uid

    def _create(self, node: int, *, limited: bool, running: bool) -> str:
        number, self._number = self._number, self._number + 1
        uid = _uid_of(number)
        namespace, name = f"team-{number % _NAMESPACES}", f"web-{number:06d}-{uid[:5]}"
        key = f"{namespace}/{name}"
        annotations = {"example.org/config": uid * 2}
        if limited:
            wanted = self.wanted[uid] = Wanted(address_of(node), _EGRESS + 1000 * self.changes.made, _INGRESS)
            annotations |= {EGRESS: str(wanted.egress), INGRESS: str(wanted.ingress)}
        (self._limited if limited else self._others).append(key)
        self._store.put(self._table, key, _pod(namespace, name, uid, node, annotations, running=running))
        return key


def _pod(namespace: str, name: str, uid: str, node: int, annotations: dict[str, str], *, running: bool) -> standin.Json:
    """A pod of a Deployment, as long as they usually are without what tells who manages which field."""
    conditions = ("Ready", "Initialized", "ContainersReady", "PodScheduled")
    container = {
        "name": "main",
        "image": "registry.example.org/shop/web:1.27.3",
        "ports": [{"containerPort": 8080, "protocol": "TCP"}],
        "env": [{"name": f"SETTING_{number}", "value": f"value-{number}"} for number in range(6)],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "token", "readOnly": True, "mountPath": "/var/run/secrets/kubernetes.io"}],
        "imagePullPolicy": "IfNotPresent",
        "terminationMessagePath": "/dev/termination-log",
    }
    status: standin.Json = {"phase": "Pending"}
    if running:
        status = {
            "phase": "Running",
            "hostIP": address_of(node),
            "podIP": "10.0.0.1",
            "startTime": _CREATED_AT,
            "conditions": [{"type": each, "status": "True", "lastTransitionTime": _CREATED_AT} for each in conditions],
            "containerStatuses": [{"name": "main", "ready": True, "restartCount": 0, "imageID": uid * 3}],
        }
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "creationTimestamp": _CREATED_AT,
            "labels": {"app": "web", "pod-template-hash": uid[:10], "app.kubernetes.io/part-of": "shop"},
            "annotations": annotations,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name[:-6], "uid": uid}],
        },
        "spec": {
            "nodeName": f"node-{node}",
            "restartPolicy": "Always",
            "schedulerName": "default-scheduler",
            "serviceAccountName": "default",
            "containers": [container],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"}],
            "volumes": [{"name": "token", "projected": {"defaultMode": 420}}],
        },
        "status": status,
    }


class _Server(standin.Server):
    """The stand-in's HTTP side, with the crowd's paths."""

    def __init__(self, store: standin.Store, token: str, crowd: _Crowd) -> None:
        super().__init__(store, token, _BOOKMARK_SECONDS)
        self._crowd = crowd
        self._churning: asyncio.Task[None] | None = None

    def application(self) -> web.Application:
        """Everything that is served."""
        application = super().application()
        application.router.add_post("/churn", self._begin)
        application.router.add_get("/churn", self._tell)
        application.router.add_get("/wanted", self._want)
        return application

    async def _begin(self, request: web.Request) -> web.Response:
        self._crowd.changes = Changes(running=True, made=self._crowd.changes.made, told=[])
        self._churning = asyncio.create_task(self._crowd.churn(**await request.json()))
        return web.json_response({})

    async def _tell(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._crowd.changes))

    async def _want(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._crowd.wanted))


class Crowd(Api):
    """The server as a process; see the module's text.

    Args:
        address: as for every :class:`~bench.kubeapi.Api`.
        namespace: likewise.
        size: the cluster's.
        seed: what the changes follow from.
    """

    def __init__(self, address: str, namespace: str, size: Size, seed: int) -> None:
        super().__init__(address, namespace)
        self.size = size
        self._seed = seed

    def _prepare(self, undo: object) -> None:
        pass

    def _command(self) -> list[str]:
        options = {
            "--address": self.address,
            "--port": self.port,
            "--tls-cert": self.folder / "server.crt",
            "--tls-key": self.folder / "server.key",
            "--token": self.token,
            "--seed": self._seed,
        } | {f"--{name}": value for name, value in asdict(self.size).items()}
        return [sys.executable, "-m", "bench.crowd", *_words(options)]

    def churn(self, rate: float, seconds: float) -> None:
        """Begin to change pods, so many times a second for so long."""
        self.request("POST", "/churn", {"rate": rate, "seconds": seconds})

    def changes(self) -> Changes:
        """What :meth:`churn` has done."""
        return msgspec.convert(self.request("GET", "/churn"), Changes)

    def wanted(self) -> dict[str, Wanted]:
        """What limited pods should have by now, by UID."""
        return msgspec.convert(self.request("GET", "/wanted"), dict[str, Wanted])

    def compact(self) -> None:
        """Forget all history: every watch is told that it is too old."""
        self.request("POST", "/faults", {"compact": True})


def _words(options: dict[str, object]) -> Iterator[str]:
    for name, value in options.items():
        yield from (name, str(value))


_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--address", required=True)
@click.option("--port", type=int, required=True)
@click.option("--tls-cert", type=_FILE, required=True)
@click.option("--tls-key", type=_FILE, required=True)
@click.option("--token", required=True)
@click.option("--seed", type=int, required=True)
@click.option("--nodes", type=int, required=True)
def main(address: str, port: int, tls_cert: Path, tls_key: Path, token: str, seed: int, nodes: int) -> None:
    """Serve until SIGTERM."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tls_cert, tls_key)
    # What is lost with this process is not wanted again.
    store = standin.Store(Path("/dev/null"), _HISTORY)
    crowd = _Crowd(store, Size(nodes), seed)
    # The real one does not stop for tenths of a second to look for garbage.
    gc.freeze()
    asyncio.run(standin.run(_Server(store, token, crowd), address, port, tls))


if __name__ == "__main__":
    main()
