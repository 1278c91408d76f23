"""A pod as the master sees it, from the API server's or a manifest's JSON.

Most pods of a cluster have no limits, and there are many of them: what is kept of one is a few words. What is read
refers to nothing that refers back, so it is none of the garbage collector's business (gc=False): to that, each of the
pages of a long list would be a reason to look at everything that there is, which takes tenths of a second.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Final

import msgspec

from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.master.annotations import limits_of

# The kubelet's own mark on the API's image of a static pod, and the hash that its cgroup is named by.
MIRROR: Final = "kubernetes.io/config.mirror"
STATIC_HASH: Final = "kubernetes.io/config.hash"
_HASH: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_ENDED: Final = frozenset({"Succeeded", "Failed"})


class Metadata(msgspec.Struct, rename="camel", gc=False):
    """What is read of a pod's metadata."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None  # null in a bookmark
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Spec(msgspec.Struct, rename="camel", gc=False):
    """What is read of a pod's spec."""

    node_name: str | None = None


class Status(msgspec.Struct, rename={"phase": "phase", "host_ip": "hostIP"}, gc=False):
    """What is read of a pod's status."""

    phase: str = ""
    host_ip: str | None = None


class RawPod(msgspec.Struct, gc=False):
    """What is read of a pod; all the rest is skipped, which is most of it."""

    metadata: Metadata
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status = msgspec.field(default_factory=Status)


class Pod(msgspec.Struct, frozen=True, gc=False):
    """A scheduled pod that has not been deleted.

    Attributes:
        uid: the API's UID, by which it is known here.
        ref: whose cgroup it is: the same UID, but for static pods.
        node: the name of its node.
        address: the node's address, "" while the kubelet has not told it.
        limits: what it asks for; None: nothing, or it has run to its end.
        problem: why its annotations cannot be meant, "" if they can.
        ended: it has run to its end.
        created: when, as the API server says it; later ones sort later. "" but for static pods, of which several may
            claim one cgroup.
    """

    uid: str
    ref: PodRef
    node: str
    address: str
    limits: Limits | None = None
    problem: str = ""
    ended: bool = False
    created: str = ""


def read(raw: RawPod) -> Pod:
    """The pod that an object describes.

    Raises:
        InvalidValueError: the object has no proper UID or name.
    """
    metadata = raw.metadata
    marks: Mapping[str, str] = metadata.annotations or {}
    uid = _cgroup_uid(metadata.uid, marks)
    # Many pods have these in common.
    namespace, node, address = map(sys.intern, (metadata.namespace, raw.spec.node_name or "", raw.status.host_ip or ""))
    ref = PodRef(uid, namespace, metadata.name)
    limits, problem = None, ""
    ended = raw.status.phase in _ENDED
    if not ended:
        try:
            limits = limits_of(marks, metadata.labels or {})
        except InvalidValueError as error:
            problem = str(error)
    return Pod(
        uid=metadata.uid,
        ref=ref,
        node=node,
        address=address,
        limits=limits,
        problem=problem,
        ended=ended,
        created=(metadata.creation_timestamp or "") if uid != metadata.uid else "",
    )


def _cgroup_uid(uid: str, marks: Mapping[str, str]) -> str:
    """The UID in the name of the cgroup: a static pod's is the hash that the kubelet has made of its manifest.

    Only where the kubelet's other mark stands too, and only in the form of such a hash, which no other pod's UID
    has. Who claims the hash of a static pod all the same is judged by the controller.
    """
    static = marks.get(STATIC_HASH, "")
    return static if MIRROR in marks and _HASH.fullmatch(static) else uid
