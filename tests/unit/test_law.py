"""The numbers that the programs are given, against what the programs do with them (clock.h), redone here.

test_programs.py holds what is redone here to the programs themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import sizeof
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bpfrl.bpf import law
from bpfrl.bpf.layout import EGRESS, INGRESS, RATIO_SHIFT, SHIFT_BITS, LimitData, LimitsData
from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits
from bpfrl.units import Rate
from tests.unit.native import constant

NS = 10**9
MS = 10**6
U64 = 2**64

# The tolerance of a socket that is not paced; and how a backlog is carried to another limit.
SHARE_TOLERANCE_BYTES = constant("SHARE_TOLERANCE_BYTES", "limiter.bpf.c")
RESCALE_SHIFT = constant("RESCALE_SHIFT", "clock.h")
# What a burst that was asked for goes at.
FASTEST = constant("BPFRL_FASTEST", "limiter.h")
# BIG TCP's longest packet (512 KB) with its segments' headers, however small those are; the shortest of IP and TCP.
LONGEST_PACKET = 2**21 - 1
SHORTEST_PACKET = 40

RATES = [Rate(digit * 10**power) for power in range(3, 15) for digit in (1, 2, 5, 9)] + [
    *(
        Rate(bits)
        for bits in (1_001, 1_007, 1_008, 1_023, 26_214_399, 26_214_400, 26_214_401, 2**38 * 8, 2**38 * 8 + 8)
    ),
    *(Rate(bits) for bits in (10**15 - 1, 10**15)),
]
rates = (
    st.integers(3, 14)
    .flatmap(lambda power: st.integers(10**power, 10 ** (power + 1)))
    .map(Rate)
    .filter(lambda rate: rate.bits <= Rate.MAX_BITS)
)
bursts = st.none() | st.integers(Limits.MIN_BURST, Limits.MAX_BURST)
Law = Callable[[Rate, int | None], LimitData]
both = pytest.mark.parametrize("direction", [law.egress, law.ingress], ids=["egress", "ingress"])
lengths = st.integers(SHORTEST_PACKET, LONGEST_PACKET)


class Checked(LimitData):
    """A LimitData that refuses what ctypes would cut to the field's size without a word."""

    def __setattr__(self, name: str, value: Any) -> None:
        field = getattr(LimitData, name)
        types: dict[str, Any] = dict(self._fields_)
        signed = types[name](-1).value < 0
        bits = 8 * field.size - signed
        if not (isinstance(value, int) and -(2**bits) * signed <= value < 2**bits):
            raise OverflowError(f"{name} = {value} does not fit")
        super().__setattr__(name, value)


def fair_rate(limit: LimitData, backlog: int) -> int:
    """The function of this name in clock.h, with every step held to 64 bits."""
    if backlog <= limit.fair_onset_ns:
        return FASTEST if backlog < limit.reserve_ns else int(limit.fair_cap)
    ratio = limit.fair_d0 // fits(backlog)
    power = int(limit.rate)
    for _ in range(4 if limit.fair_steep else 2):
        power = fits(power * ratio) >> RATIO_SHIFT
    harmonic = fits(limit.fair_q2 * ratio) >> RATIO_SHIFT
    return fits(max(power, harmonic) + 1)


def settled(limit: LimitData, flows: int) -> int:
    """The longest backlog, ns, at which so many flows still use the limit up."""
    least, most = 0, 2**44
    while most - least > 1:
        middle = (least + most) // 2
        if flows * (fair_rate(limit, middle) - 1) >= limit.rate:
            least = middle
        else:
            most = middle
    return least


def shared(rate: Rate) -> tuple[tuple[LimitData, int, int, int], ...]:
    """Each direction's limit at a rate, its D0 and Q2, and the power of its backlog by which the fair rate falls."""
    return (
        (law.egress(rate, None), law.EGRESS_D0_NS, law.EGRESS_Q2_BYTES, 2),
        (law.ingress(rate, None), law.INGRESS_D0_NS, law.INGRESS_Q2_BYTES, 4),
    )


def charge(limit: LimitData, length: int) -> int:
    """What the function of this name in clock.h moves the clock on by."""
    cost = int(limit.cost)
    return fits(length * (cost >> SHIFT_BITS)) >> (cost & (1 << SHIFT_BITS) - 1)


def rescale(old: Rate, limit: LimitData, backlog: int) -> int:
    """The backlog, ns, that a positive one becomes when the limit changes (clock.h, by the same name)."""
    if old.bits >= limit.rate_bits:
        return backlog
    return fits(backlog * (fits(old.bits << RESCALE_SHIFT) // limit.rate_bits)) >> RESCALE_SHIFT


def fits(value: int) -> int:
    assert 0 <= value < U64, f"{value} overflows"
    return value


def longest_backlog(limit: LimitData) -> int:
    """One of the longest packets may have passed just before the clock was too far ahead even for short ones."""
    return int(limit.drop_short_ns) + charge(limit, LONGEST_PACKET)


def check_cost(limit: LimitData, rate: Rate, length: int) -> None:
    exact = length * 8 * NS / rate.bits
    assert abs(charge(limit, length) - exact) <= max(1, 1e-4 * exact), (rate, length)


@given(rates, bursts)
def test_every_number_fits_its_field_at_any_rate_and_burst(rate: Rate, burst: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(law, "LimitData", Checked)
        for rate_or_bound in (rate, Rate(Rate.MIN_BITS), Rate(Rate.MAX_BITS), None):
            assert isinstance(law.egress(rate_or_bound, burst), Checked)
            assert isinstance(law.ingress(rate_or_bound, burst), Checked)


@pytest.mark.parametrize(("field", "value"), [("burst_ns", 2**63), ("rate", 2**64), ("rate", -1), ("drop_ns", 0.5)])
def test_the_check_above_sees_what_does_not_fit(field: str, value: float) -> None:
    with pytest.raises(OverflowError):
        Checked(**{field: value})
    with pytest.raises(OverflowError):
        setattr(Checked(), field, value)
    Checked(burst_ns=2**63 - 1, rate=2**64 - 1, drop_ns=-(2**63))


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_a_packet_costs_its_time_at_the_rate(rate: Rate) -> None:
    for limit in (law.egress(rate, None), law.ingress(rate, None)):
        for length in (SHORTEST_PACKET, 41, 64, 576, 1_280, 1_500, 9_000, 65_536, 524_288, 600_000, LONGEST_PACKET):
            check_cost(limit, rate, length)


@given(rates, lengths)
def test_any_packet_costs_its_time_at_any_rate(rate: Rate, length: int) -> None:
    check_cost(law.egress(rate, None), rate, length)
    check_cost(law.ingress(rate, None), rate, length)


@given(rates, st.lists(lengths, min_size=50, max_size=50))
def test_rounding_does_not_let_a_stream_of_packets_through_faster(rate: Rate, stream: list[int]) -> None:
    limit = law.egress(rate, None)
    charged = sum(charge(limit, length) for length in stream)
    exact = sum(stream) * 8 * NS / rate.bits
    assert charged >= exact * (1 - 1e-4) - len(stream)
    assert charged <= exact * (1 + 1e-4)


@both
@given(rates, st.floats(0, 1), lengths)
def test_the_programs_arithmetic_stays_within_64_bits_at_any_backlog(
    direction: Law, rate: Rate, part: float, length: int
) -> None:
    limit = direction(rate, None)
    first, last = int(limit.fair_onset_ns) + 1, longest_backlog(limit)
    for backlog in {first, int(limit.drop_ns), int(limit.drop_short_ns), last, int(first * (last / first) ** part)}:
        fair = fair_rate(limit, backlog)
        assert 0 < fair <= limit.fair_cap + 2
        # over_share() looks at what over_limit() lets by.
        if backlog <= limit.drop_short_ns and direction is law.egress:
            ns_per_byte = fits(NS << 16) // fair
            fits(SHARE_TOLERANCE_BYTES * ns_per_byte)
            fits(length * ns_per_byte)


@both
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_what_windows_and_shares_are_made_of_stays_within_64_bits(direction: Law, rate: Rate) -> None:
    limit = direction(rate, None)
    ceiling, slack = (constant(name, "sockets.h") for name in ("RTT_CEILING_US", "RTT_SLACK_US"))
    backlogs = [int(limit.fair_onset_ns * 1.01**step) for step in range(2_000)]
    below = [each for each in backlogs if each <= longest_backlog(limit)]
    for backlog in (limit.reserve_ns - 1, 0, *below, longest_backlog(limit)):
        fair = fair_rate(limit, backlog)
        # In open_window, clamp_cwnd, payload_rate and is_ahead.
        fits(fair * (ceiling + slack))
        fits(fair * (2 * ceiling + slack))
        fits(fair * constant("PAYLOAD_256THS", "sockets.h"))
        share = min(fits(fair * constant("SHARE_PERCENT", "limiter.bpf.c")) // 100, limit.rate)
        assert share > 0
    # Divided by as little as 1 byte/s, it is still to be added to a time.
    assert constant("SHARE_GAIN_CEILING", "limiter.bpf.c") * NS < 2**62


@given(rates, rates, st.floats(0, 1))
def test_a_backlog_keeps_its_bytes_when_the_limit_is_raised_and_its_time_when_it_is_lowered(
    old: Rate, new: Rate, part: float
) -> None:
    for direction in (law.egress, law.ingress):
        before, limit = direction(old, None), direction(new, None)
        backlog = 1 + int(part * longest_backlog(before))
        scaled = rescale(old, limit, backlog)
        exact = min(backlog * old.bits / new.bits, backlog)
        assert exact - (1 + backlog / 2**RESCALE_SHIFT) <= scaled <= exact + 1
        # What passes before the change passes after it.
        if backlog <= before.drop_ns:
            assert scaled <= limit.drop_ns + 1


@both
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_the_fair_rate_falls_from_the_cap_without_a_step_as_the_backlog_grows(direction: Law, rate: Rate) -> None:
    limit = direction(rate, None)
    onset, last = int(limit.fair_onset_ns), longest_backlog(limit)
    assert fair_rate(limit, -int(limit.burst_ns)) == fair_rate(limit, onset) == limit.fair_cap
    assert fair_rate(limit, onset + 1) == pytest.approx(limit.fair_cap, rel=0.01, abs=2)
    backlogs = [onset, onset + 1, *(int(onset * 1.07**step) for step in range(1, 400))]
    curve = [fair_rate(limit, backlog) for backlog in backlogs if backlog <= last]
    assert all(later <= earlier + 1 for earlier, later in pairwise(curve))


@pytest.mark.parametrize("rate", [rate for rate in RATES if 10**8 <= rate.bits <= 2**41], ids=str)
@pytest.mark.parametrize("flows", [1, 2, 4, 9, 16])
def test_flows_that_share_settle_where_they_use_the_limit_up(rate: Rate, flows: int) -> None:
    for limit, d0, q2, power in shared(rate):
        # N C (D0/D)^n = C, where Q2/D is less than that.
        backlog = int(d0 * flows ** (1 / power))
        if q2 * NS / backlog < rate.bits / 8 / flows:
            assert flows * fair_rate(limit, backlog) == pytest.approx(rate.bits / 8, rel=0.01)
        else:
            assert flows * fair_rate(limit, backlog) >= rate.bits / 8


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate.bits <= 10**7], ids=str)
def test_at_low_rates_each_flow_keeps_its_bytes_in_the_backlog(rate: Rate) -> None:
    for limit, d0, q2, power in shared(rate):
        for flows in (1, 4, 16):
            backlog = flows * law.time_of(q2, rate)
            if 1.2 * d0 * flows ** (1 / power) < backlog <= limit.drop_ns:
                assert flows * fair_rate(limit, backlog) == pytest.approx(rate.bits / 8, rel=0.02, abs=flows)


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate.bits >= 10**7], ids=str)
@pytest.mark.parametrize("flows", [1, 2, 16, 64])
def test_flows_that_share_settle_below_the_backlog_that_drops(rate: Rate, flows: int) -> None:
    for limit, *_ in shared(rate):
        assert settled(limit, flows) < 0.95 * limit.drop_ns


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_a_lone_flow_settles_below_the_backlog_that_drops_at_any_rate(rate: Rate) -> None:
    for limit, *_ in shared(rate):
        assert settled(limit, 1) < 0.5 * limit.drop_ns


def test_a_sender_may_be_paused_only_where_a_lone_flow_would_have_settled() -> None:
    for rate in RATES:
        if rate.bits >= 10**6:
            limit = law.ingress(rate, None)
            assert settled(limit, 1) < limit.share_ns < limit.drop_ns


def test_a_pause_is_a_persist_timer_and_ends_before_packets_are_dropped() -> None:
    lead, credit = (constant(name, "limiter.bpf.c") for name in ("SHARE_LEAD_NS", "SHARE_CREDIT_NS"))
    # TCP_RTO_MIN, which the persist timer begins with.
    assert 200 * MS < lead + credit < law.INGRESS_DROP_NS


@both
def test_a_lone_flow_without_backlog_may_go_a_quarter_faster_than_the_limit(direction: Law) -> None:
    for rate in RATES:
        limit = direction(rate, None)
        if rate.bits // 8 <= 2**38:
            assert limit.rate == rate.bits // 8
        assert limit.fair_cap == limit.rate * 125 // 100 > 0
        assert limit.fair_onset_ns > 0


@pytest.mark.parametrize(
    ("rate", "burst"),
    [
        ("1kbit", 16 * 1024),
        ("10mbit", 16 * 1024),
        ("26mbit", 16 * 1024),
        ("100mbit", 62_500),
        ("1gbit", 625_000),
        ("1tbit", 625_000_000),
    ],
)
def test_the_default_burst_is_16_kib_or_5_ms_of_the_rate(rate: str, burst: int) -> None:
    limit = Rate.parse(rate)
    assert law.default_burst(limit) == burst
    for data in (law.egress(limit, None), law.ingress(limit, None)):
        assert data.burst_ns == pytest.approx(burst * 8 * NS / limit.bits, abs=1)


@both
@given(rates, bursts)
def test_only_what_is_asked_for_beyond_the_default_burst_goes_as_fast_as_it_can(
    direction: Law, rate: Rate, burst: int | None
) -> None:
    limit, default = direction(rate, burst), law.default_burst(rate)
    fastest = fair_rate(limit, -int(limit.burst_ns)) == FASTEST
    assert fastest is (law.time_of(burst or 0, rate) > law.time_of(default, rate))
    assert fair_rate(limit, -law.time_of(default, rate)) == fair_rate(limit, 0) == limit.fair_cap


def test_what_is_reckoned_with_as_the_fastest_rate_is_the_programs() -> None:
    assert law._FAIR_RATE_CEILING == FASTEST
    assert law.egress(Rate(Rate.MAX_BITS), None).rate == FASTEST


@given(rates, st.integers(Limits.MIN_BURST, Limits.MAX_BURST))
def test_a_burst_that_is_asked_for_is_given_in_both_directions(rate: Rate, burst: int) -> None:
    for data in (law.egress(rate, burst), law.ingress(rate, burst)):
        assert abs(data.burst_ns - burst * 8 * NS / rate.bits) <= 1 + 1e-9 * data.burst_ns


@pytest.mark.parametrize(
    ("rate", "egress_ms", "ingress_ms"),
    [
        # 16 KiB at least, whatever that takes.
        ("1kbit", 131_072, 131_072),
        ("8kbit", 16_384, 16_384),
        ("64kbit", 2_048, 2_048),
        # 256 KiB up to 2 s, down to 100 ms.
        ("100kbit", 2_000, 1_310.72),
        ("1mbit", 2_000, 250),
        ("1048576bit", 2_000, 250),
        ("2mbit", 1_048.576, 250),
        ("10mbit", 209.7152, 250),
        ("20mbit", 104.8576, 250),
        ("21mbit", 100, 250),
        ("1gbit", 100, 250),
        ("1000tbit", 100, 250),
    ],
)
def test_the_depth_of_the_backlog_follows_from_the_rate(rate: str, egress_ms: float, ingress_ms: float) -> None:
    limit = Rate.parse(rate)
    assert law.egress(limit, None).drop_ns == pytest.approx(egress_ms * MS, abs=1)
    assert law.ingress(limit, None).drop_ns == pytest.approx(ingress_ms * MS, abs=1)


@given(rates, bursts)
def test_depths_are_in_an_order_that_lets_packets_through(rate: Rate, burst: int | None) -> None:
    out, back = law.egress(rate, burst), law.ingress(rate, burst)
    assert 0 < out.share_ns <= out.fresh_ns <= out.drop_ns
    assert out.fresh_ns >= 100 * MS
    assert 0 < back.share_ns < back.drop_ns
    for limit in (out, back):
        assert 0 < limit.fair_onset_ns < limit.drop_ns
        # One large send and some packets fit below the depth, however low the rate.
        assert limit.drop_ns >= law.time_of(16 * 1024, rate)
        assert limit.drop_ns >= 100 * MS
        assert limit.drop_short_ns > limit.drop_ns + law.time_of(1_500, rate)
        assert limit.burst_ns >= 0
        assert limit.rate_bits == rate.bits


@given(rates, rates)
def test_a_faster_rate_never_has_a_deeper_backlog(one: Rate, other: Rate) -> None:
    assume(one != other)
    slow, fast = sorted((one, other))
    assert law.egress(slow, None).drop_ns >= law.egress(fast, None).drop_ns
    assert law.ingress(slow, None).drop_ns >= law.ingress(fast, None).drop_ns
    assert law.egress(slow, None).share_ns >= law.egress(fast, None).share_ns
    assert law.ingress(slow, None).share_ns >= law.ingress(fast, None).share_ns


def test_a_direction_without_a_limit_counts_only() -> None:
    nothing = bytes(sizeof(LimitData))
    for burst in (None, 65_536):
        data = law.encode(Limits(ingress=Rate(10**6), burst=burst))
        assert data.direction[INGRESS].rate_bits == 10**6
        assert bytes(data.direction[EGRESS]) == nothing
        assert bytes(law.encode(Limits(Rate(10**6), None, burst)).direction[INGRESS]) == nothing


BOUNDS = (None, Rate(Rate.MIN_BITS), Rate(10**7), Rate(Rate.MAX_BITS))


@pytest.mark.parametrize(
    "limits",
    [Limits(*each) for each in product(BOUNDS, BOUNDS, (None, Limits.MIN_BURST, 65_536, Limits.MAX_BURST))],
    ids=str,
)
def test_limits_are_read_back_as_they_were_given(limits: Limits) -> None:
    assert law.decode(law.encode(limits)) == limits


@given(st.none() | rates, st.none() | rates, bursts)
def test_any_limits_are_read_back_as_they_were_given(out: Rate | None, back: Rate | None, burst: int | None) -> None:
    data = LimitsData.from_buffer_copy(bytes(law.encode(Limits(out, back, burst))))
    assert law.decode(data) == Limits(out, back, burst)


@pytest.mark.parametrize(
    ("burst", "out", "back"), [(0, 999, 0), (0, 0, 10**15 + 1), (0, 2**64 - 1, 0), (1_499, 1_000, 0), (2**64 - 1, 0, 0)]
)
def test_numbers_that_no_limits_make_are_refused(burst: int, out: int, back: int) -> None:
    data = LimitsData(burst=burst, direction=(LimitData(rate_bits=out), LimitData(rate_bits=back)))
    with pytest.raises(InvalidValueError, match="out of range"):
        law.decode(data)
