"""From a rate to the numbers that the programs compare with.

``limiter.bpf.c`` explains what they do there. Each number was chosen by measurement (docs/datapath.md has the
runs); the reasons stand beside them.
"""

from __future__ import annotations

from typing import Final

from bpfrl.bpf.layout import EGRESS, INGRESS, RATIO_SHIFT, SHIFT_BITS, LimitData, LimitsData
from bpfrl.limits import Limits
from bpfrl.units import Rate

NSEC_PER_SEC: Final = 10**9
_MS: Final = 10**6

# The backlog, ns, at which a lone flow's fair rate equals the limit. Small on egress, because every socket sees the
# backlog before each segment: one ms is some segments at any rate that paces at all.
EGRESS_D0_NS: Final = 1 * _MS
# At low rates one packet is more than D0 of backlog; then flows share as if each kept Q2 byte in it.
EGRESS_Q2_BYTES: Final = 3000
# A sender elsewhere learns of the backlog a round trip later, so D0 must be about the longest of those; and it must be
# one constant for the pod, or else the flow with the longer round trip takes everything.
INGRESS_D0_NS: Final = 80 * _MS
INGRESS_Q2_BYTES: Final = 3000
# Backlog below which no sender is paused: what a lone flow needs to be at its limit, and a little more.
INGRESS_SHARE_NS: Final = 100 * _MS
# A flow may send faster than the limit while there is no backlog, or the limit would never be reached.
FAIR_CAP_PERCENT: Final = 125
# Credit that an idle pod keeps. 16 KB lets a first exchange pass unhindered (10 segments of a new connection);
# 5 ms of the rate outlasts the naps of a busy machine's senders (2 ms: down to 95.3 % of 100 Mbit/s, 96.5 is full).
BURST_BYTES: Final = 16 * 1024
BURST_NS: Final = 5 * _MS
# Backlog below which nothing is taken from unpaced sockets: with none, UDP reached 97.5 % of its limit.
SHARE_BYTES: Final = 3000
# Where pacing does not hold, packets are dropped once the backlog is this long. Many flows at a low rate need
# room (with 96 KB, 64 flows at 1 Mbit/s shared with a Jain index of 0.72): 256 KB, yet never more
# than 2 s of the rate, nor so little that one large send does not fit.
EGRESS_DROP_NS: Final = 100 * _MS
EGRESS_DROP_BYTES: Final = 256 * 1024
EGRESS_DROP_LONGEST_NS: Final = 2 * NSEC_PER_SEC
DROP_LEAST_BYTES: Final = 16 * 1024
# Short packets get through where bulk is dropped: what bulk overshoots by is a packet, far below a quarter.
DROP_SHORT_PERCENT: Final = 125
# A sender that is not paced from here is only stopped by loss, and then waits out its retransmission timeout of
# 200 ms; a bucket that holds less than that much runs dry meanwhile (100 ms: 52 % of the limit; 250 ms: 95 %).
INGRESS_DROP_NS: Final = 250 * _MS

# The programs multiply a rate of up to 2^38 byte/s by D0/D < 2 with 24 fraction bits: within 64 bits. Faster limits are
# shared as 2^38 byte/s would be; no pacing rate is near it (the socket option ends at 2^32).
_FAIR_RATE_CEILING: Final = 2**38  # BPFRL_FASTEST
# Lengths stay below 2^21 byte (BIG TCP: 512 KB, and as much again of headers and more where the MSS is tiny), so
# that length * multiplier fits 64 bits.
_COST_BITS: Final = 43
_COST_SHIFT_CEILING: Final = 63


def egress(rate: Rate | None, burst: int | None) -> LimitData:
    """The egress program's numbers for a rate and a burst in byte (None: the default burst)."""
    if rate is None:
        return LimitData()
    longest = min(time_of(EGRESS_DROP_BYTES, rate), EGRESS_DROP_LONGEST_NS)
    data = _clock(rate, burst, drop_ns=max(EGRESS_DROP_NS, longest))
    data.fresh_ns = max(EGRESS_DROP_NS, time_of(DROP_LEAST_BYTES, rate))
    data.share_ns = max(EGRESS_D0_NS, time_of(SHARE_BYTES, rate))
    _share(data, rate, EGRESS_D0_NS, EGRESS_Q2_BYTES, steep=False)
    return data


def ingress(rate: Rate | None, burst: int | None) -> LimitData:
    """The ingress program's numbers for a rate and a burst in byte (None: the default burst)."""
    if rate is None:
        return LimitData()
    data = _clock(rate, burst, drop_ns=INGRESS_DROP_NS)
    data.share_ns = INGRESS_SHARE_NS
    # The fourth power: the backlog of 64 flows is then still below the drops.
    _share(data, rate, INGRESS_D0_NS, INGRESS_Q2_BYTES, steep=True)
    return data


def time_of(size: int, rate: Rate) -> int:
    """How long, ns, the rate takes for a size in byte."""
    return size * 8 * NSEC_PER_SEC // rate.bits


def default_burst(rate: Rate) -> int:
    """The credit, byte, that an idle pod keeps when none is asked for."""
    return max(BURST_BYTES, rate.bits * BURST_NS // (8 * NSEC_PER_SEC))


def _clock(rate: Rate, burst: int | None, drop_ns: int) -> LimitData:
    drop_ns = max(drop_ns, time_of(DROP_LEAST_BYTES, rate))
    return LimitData(
        rate_bits=rate.bits,
        cost=_cost(rate),
        burst_ns=time_of(default_burst(rate) if burst is None else burst, rate),
        drop_ns=drop_ns,
        drop_short_ns=drop_ns * DROP_SHORT_PERCENT // 100,
        # What is left of the default burst smooths; only what was asked for beyond it may go at once.
        reserve_ns=-time_of(default_burst(rate), rate),
    )


def _share(data: LimitData, rate: Rate, d0_ns: int, q2_bytes: int, *, steep: bool) -> None:
    """Fill in the constants of the fair rate."""
    data.rate = min(rate.bits // 8, _FAIR_RATE_CEILING)
    data.fair_cap = data.rate * FAIR_CAP_PERCENT // 100
    data.fair_d0 = d0_ns << RATIO_SHIFT
    data.fair_q2 = q2_bytes * NSEC_PER_SEC // d0_ns
    # Where the larger of the two branches falls below the cap: C (D0/D)^n = cap, or Q2/D = cap.
    onset_ns = int(d0_ns * (100 / FAIR_CAP_PERCENT) ** (0.25 if steep else 0.5))
    data.fair_onset_ns = max(onset_ns, q2_bytes * NSEC_PER_SEC // data.fair_cap)
    data.fair_steep = steep


def _cost(rate: Rate) -> int:
    """Ns per byte, as exact as 64 bits allow for the longest packet; the low bits tell how many bits are fraction."""
    for shift in range(_COST_SHIFT_CEILING, 0, -1):
        multiplier = ((8 * NSEC_PER_SEC << shift) + rate.bits // 2) // rate.bits
        if multiplier < 1 << _COST_BITS:
            return multiplier << SHIFT_BITS | shift
    raise AssertionError("a Rate is at least 1 kbit/s, whose multiplier fits with a shift of 20")


def encode(limits: Limits) -> LimitsData:
    """What the programs are to be given for these limits."""
    return LimitsData(
        burst=limits.burst or 0,
        direction=(egress(limits.egress, limits.burst), ingress(limits.ingress, limits.burst)),
    )


def decode(data: LimitsData) -> Limits:
    """The limits behind what the programs were given.

    Raises:
        InvalidValueError: the data was not made by :func:`encode`.
    """
    rates = [Rate(direction.rate_bits) if direction.rate_bits else None for direction in data.direction]
    return Limits(egress=rates[EGRESS], ingress=rates[INGRESS], burst=data.burst or None)
