"""The value objects that everything passes around: which pod, and how much it may send and receive.

Frozen, and validated where they are made, so that no layer below checks them again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from bpfrl.errors import InvalidValueError
from bpfrl.units import Rate

_CGROUP: Final = "cgroup-"
# The forms of a UID. They become the name of a folder in the bpffs, so nothing else may pass.
_UID: Final = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # a pod's UID
    r"|[0-9a-f]{32}"  # a static pod's: the hash of its manifest
    rf"|{_CGROUP}[1-9][0-9]{{0,19}}",  # a cgroup that is no pod: its id
    re.ASCII,
)
_DNS_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
# Kubernetes does not hold the parts of a pod's name to the 63 characters of a label.
_DNS_SUBDOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_LONGEST_NAME: Final = 253


@dataclass(frozen=True, order=True, slots=True)
class PodRef:
    """One pod: the UID that its cgroup carries, and its names where they are known ("" where not)."""

    uid: str
    namespace: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not _UID.fullmatch(self.uid):
            raise InvalidValueError(
                f"{self.uid[:80]!r} is no pod UID: it has the form 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
                " (kubectl get pod NAME -o jsonpath={.metadata.uid}), or 32 hexadecimal digits for a static pod"
            )
        if self.namespace and not _DNS_LABEL.fullmatch(self.namespace):
            raise InvalidValueError(f"{self.namespace[:80]!r} is no namespace: lower-case letters, digits and '-'")
        if self.name and not (len(self.name) <= _LONGEST_NAME and _DNS_SUBDOMAIN.fullmatch(self.name)):
            raise InvalidValueError(f"{self.name[:80]!r} is no pod name: lower-case letters, digits, '-' and '.'")

    @property
    def is_pod(self) -> bool:
        """False for a cgroup that is no pod."""
        return not self.uid.startswith(_CGROUP)

    @property
    def label(self) -> str:
        """What a line of output calls it: pod/<uid>, or the cgroup's own name."""
        return f"pod/{self.uid}" if self.is_pod else self.uid

    @classmethod
    def of_cgroup(cls, cgroup_id: int) -> PodRef:
        """The reference to a cgroup that is no pod, by the id that the kernel gave it."""
        return cls(f"{_CGROUP}{cgroup_id}")

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else self.uid


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pod may send and receive.

    Attributes:
        egress: what the pod may send, or None: not limited.
        ingress: what the pod may receive, or None: not limited.
        burst: what an idle pod may send or receive at once before the rate holds, byte; None: the
            default, which follows from each rate.
    """

    egress: Rate | None = None
    ingress: Rate | None = None
    burst: int | None = None

    # One packet of Ethernet's MTU; and what at 1 kbit/s still counts in 64 bits of ns.
    MIN_BURST = 1500
    MAX_BURST = 16 * 2**30

    def __post_init__(self) -> None:
        if self.burst is not None and not self.MIN_BURST <= self.burst <= self.MAX_BURST:
            raise InvalidValueError(
                f"burst {self.burst} byte is out of range: it must be {self.MIN_BURST} (one packet) to 16Gi"
            )

    @property
    def unlimited(self) -> bool:
        """True when no direction has a limit: traffic is counted, and otherwise left alone."""
        return self.egress is None and self.ingress is None

    def __str__(self) -> str:
        """Both directions in one line, for people."""
        rates = (("egress", self.egress), ("ingress", self.ingress))
        return ", ".join(f"{direction} {rate or 'unlimited'}" for direction, rate in rates)


class Change(Enum):
    """What a call changed, in the past tense of its one-line report."""

    ATTACHED = "limited"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    DETACHED = "detached"
    ABSENT = "not limited"
