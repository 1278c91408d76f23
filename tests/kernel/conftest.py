"""The kernel tests run on a real kernel: real cgroups, namespaces, programs and sockets, all of them their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bench.lab import Lab, lab
from bench.traffic import jain


@pytest.fixture
def bed() -> Iterator[Lab]:
    if os.geteuid():
        pytest.skip("needs root")
    with lab() as built:
        yield built


@dataclass(frozen=True)
class Flows:
    """What a run of TCP flows came to: payload in bit/s, Jain's index, and what the senders saw."""

    goodput: float
    jain: float
    retransmits: int
    rtt_ms: float

    @classmethod
    def of(cls, report: dict[str, Any]) -> Flows:
        end = report["end"]
        rates = [stream["receiver"]["bits_per_second"] for stream in end["streams"]]
        senders = [stream["sender"] for stream in end["streams"]]
        return cls(
            goodput=end["sum_received"]["bits_per_second"],
            jain=jain(rates),
            retransmits=end["sum_sent"]["retransmits"],
            rtt_ms=sum(sender["mean_rtt"] for sender in senders) / len(senders) / 1000,
        )


def items(bed: Lab) -> list[dict[str, Any]]:
    """What bpfrl list tells programs."""
    found: list[dict[str, Any]] = json.loads(bed.bpfrl("list", "-o", "json").stdout)["items"]
    return found


def only(bed: Lab) -> dict[str, Any]:
    """The single limiter of this lab."""
    [item] = items(bed)
    return item


def bpftool(*arguments: str) -> Any:
    """Ask another tool than the one under test."""
    output = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(output) if output.strip() else None


def attached(bed: Lab) -> list[tuple[str, int]]:
    """Kind and id of every program on the pod's cgroup, as bpftool sees them."""
    found = bpftool("cgroup", "show", str(bed.pod_cgroup)) or []
    return sorted((program["attach_type"], program["id"]) for program in found)
