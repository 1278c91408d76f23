"""``limiter.h`` for Python: the structures that the programs and user space share.

ctypes lays them out as the C compiler does; a unit test compares every offset with the object's BTF.
"""

from __future__ import annotations

from ctypes import Structure, c_char, c_int64, c_uint8, c_uint32, c_uint64
from dataclasses import dataclass
from struct import Struct
from typing import Final, Self

LAYOUT: Final = 3
SHIFT_BITS: Final = 6
RATIO_SHIFT: Final = 24
# What only the programs read: the clocks with their mean, and struct bpfrl_socket.
STATE_BYTES: Final = 128
SOCKET_BYTES: Final = 88
EGRESS: Final = 0
INGRESS: Final = 1


class LimitData(Structure):
    """struct bpfrl_limit."""

    _fields_ = (
        ("rate_bits", c_uint64),
        ("cost", c_uint64),
        ("burst_ns", c_int64),
        ("drop_ns", c_int64),
        ("drop_short_ns", c_int64),
        ("fresh_ns", c_int64),
        ("share_ns", c_int64),
        ("fair_onset_ns", c_int64),
        ("fair_cap", c_uint64),
        ("fair_d0", c_uint64),
        ("fair_q2", c_uint64),
        ("rate", c_uint64),
        ("fair_steep", c_uint64),
        ("reserve_ns", c_int64),
        ("unused", c_uint64 * 2),
    )


class LimitsData(Structure):
    """struct bpfrl_limits."""

    _fields_ = (("direction", LimitData * 2), ("burst", c_uint64), ("adopted", c_uint64))


class IdentityData(Structure):
    """struct bpfrl_identity."""

    _fields_ = (
        ("layout", c_uint32),
        ("uid", c_char * 64),
        ("namespace", c_char * 64),
        ("name", c_char * 256),
        ("build", c_uint8 * 32),
        ("cgroup", c_uint64),
    )


class CountersData(Structure):
    """struct bpfrl_counters."""

    _fields_ = (
        ("passed_packets", c_uint64),
        ("passed_bytes", c_uint64),
        ("dropped_packets", c_uint64),
        ("dropped_bytes", c_uint64),
    )


# The same, for those who read hundreds of them at once.
_COUNTERS: Final = Struct(f"={len(CountersData._fields_)}Q")


class VisitData(Structure):
    """struct bpfrl_visit (sockets.bpf.c)."""

    _fields_ = (
        ("cgroup", c_uint64),
        ("callbacks", c_uint64),
        ("done", c_uint64),
        ("refused", c_uint64),
        ("paced", c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Counters:
    """What one direction has done since attach, as packets on the wire and their bytes at layer 3."""

    passed_packets: int = 0
    passed_bytes: int = 0
    dropped_packets: int = 0
    dropped_bytes: int = 0

    @classmethod
    def total(cls, per_cpu: list[CountersData]) -> Self:
        """The sum over the CPUs."""
        return cls(*map(sum, zip(*map(_COUNTERS.unpack, per_cpu), strict=True)))
