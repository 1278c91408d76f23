"""What the sockops programs do, compiled for this machine (native.py); tests/kernel has them in the kernel."""

from __future__ import annotations

import socket
from ctypes import byref, sizeof

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpfrl.bpf import cooperation, law, layout, limiter
from bpfrl.bpf.layout import EGRESS, INGRESS, LimitData
from bpfrl.limits import Limits
from bpfrl.units import Rate
from tests.unit import native, test_law
from tests.unit.native import OPERATIONS, OWN_WINDOW, UNLIMITED, Clock, Limiter, Program, constant
from tests.unit.test_law import MS, NS, RATES, Law, both, bursts, lengths, longest_backlog, rates

DAY = 86_400 * NS
# No two of these are further apart than 64 bits can say.
halves = st.integers(-(2**62), 2**62 - 1)
PAUSE = constant("WINDOW_PAUSE", "limiter.bpf.c")
SLOW, FAST = Rate(10**7), Rate(10**9)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Limiter, Program]:
    folder = tmp_path_factory.mktemp("native")
    return (
        Limiter(native.build("limiter.bpf.c", "bpfrl_sockops", folder)),
        Program(native.build("cooperate.bpf.c", "bpfrl_cooperate", folder)),
    )


@pytest.fixture
def here(built: tuple[Limiter, Program]) -> Limiter:
    built[0].reset()
    return built[0]


@pytest.fixture
def sender(built: tuple[Limiter, Program]) -> Program:
    """The program of senders that cooperate."""
    built[1].reset()
    return built[1]


# What test_law.py redoes is what the programs do.


@both
@given(rate=rates, burst=bursts, part=st.floats(0, 1), length=lengths)
def test_the_fair_rate_and_the_cost_of_a_packet_are_those_of_the_law(
    built: tuple[Limiter, Program], direction: Law, rate: Rate, burst: int | None, part: float, length: int
) -> None:
    library, limit, clock = built[0].library, direction(rate, burst), Clock()
    for backlog in (
        -DAY,
        -int(part * limit.burst_ns),
        int(part * 3 * limit.fair_onset_ns),
        int(part * longest_backlog(limit)),
    ):
        assert library.fair_rate_of(byref(limit), backlog) == test_law.fair_rate(limit, backlog)
    library.charge_of(byref(clock), byref(limit), length)
    assert clock.tat == test_law.charge(limit, length)


@given(old=rates, new=rates, part=st.floats(0, 1))
def test_a_changed_limit_moves_the_clock_as_the_law_has_it(
    built: tuple[Limiter, Program], old: Rate, new: Rate, part: float
) -> None:
    limit = law.ingress(new, None)
    backlog = 1 + int(part * longest_backlog(law.ingress(old, None)))
    clock = Clock(tat=DAY + backlog, rate_bits=old.bits)
    scaled = built[0].library.rescale_of(byref(clock), byref(limit), DAY)
    assert scaled == test_law.rescale(old, limit, backlog) == clock.tat - DAY
    assert clock.rate_bits == new.bits


@given(old=rates, new=rates, share=st.floats(0.01, 1.25))
def test_a_changed_limit_leaves_everyones_share_of_it(
    built: tuple[Limiter, Program], old: Rate, new: Rate, share: float
) -> None:
    here, limit, before = built[0], law.ingress(new, None), int(share * law.ingress(old, None).rate)
    here.reset()
    clock = Clock(mean_fair=before, rate_bits=old.bits)
    here.library.rescale_of(byref(clock), byref(limit), 0)
    assert clock.mean_fair == pytest.approx(before * new.bits / old.bits, rel=0.02, abs=1 + new.bits / 2**16)
    assert counted(here) == (0, 0)


@given(a=halves, b=halves)
def test_the_lesser_and_the_greater_are_found_without_a_branch(built: tuple[Limiter, Program], a: int, b: int) -> None:
    library = built[0].library
    assert (library.least_of(a, b), library.greatest_of(a, b)) == (min(a, b), max(a, b))
    assert (library.least_of(a, a), library.greatest_of(a, a)) == (a, a)


def run_clocks(here: Limiter) -> None:
    """Have the clocks be of now, as a connection's first packets do."""
    for direction in (EGRESS, INGRESS):
        here.packet(direction, 60, socket.IPPROTO_TCP)


# Numbers that stay within their types.


def acknowledge_behind(here: Limiter, elapsed: int, backlog: int, **about: int) -> None:
    """After so many ns, and with such a backlog of what has come, an ACK leaves."""
    here.played.now += elapsed
    here.clock(INGRESS).tat = here.played.now + backlog
    here.acknowledge(**{"srtt_us": 1_000, **about})


def counted(program: Program) -> tuple[int, int]:
    return program.played.products, program.played.quotients


def test_what_leaves_its_type_is_counted(here: Limiter) -> None:
    limit = LimitData(fair_d0=2**63, rate=2**63)
    here.library.fair_rate_of(byref(limit), 1)
    assert here.played.products > 0


times = st.integers(0, 10**6) | st.integers(0, NS) | st.integers(0, DAY)


@settings(max_examples=150)
@given(
    out=st.none() | rates,
    back=st.none() | rates,
    burst=bursts,
    srtt_us=st.integers(0, 2**29 - 1),
    mss=st.integers(0, 65_535) | st.just(1_448),
    steps=st.lists(st.tuples(times, lengths, lengths, st.integers(0, 2**40)), max_size=20),
)
def test_nothing_that_a_connection_does_makes_a_product_too_large(
    built: tuple[Limiter, Program],
    out: Rate | None,
    back: Rate | None,
    burst: int | None,
    srtt_us: int,
    mss: int,
    steps: list[tuple[int, int, int, int]],
) -> None:
    here = built[0]
    here.reset()
    here.limit(Limits(out, back, burst))
    run_clocks(here)
    here.begin()
    received = 0
    for elapsed, sent, arrived, gained in steps:
        here.played.now += elapsed
        received += gained
        for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            here.packet(EGRESS, sent, protocol)
            here.packet(INGRESS, arrived, protocol)
        here.send(srtt_us=srtt_us, mss=mss, received=received)
        here.acknowledge(srtt_us=srtt_us, mss=mss, received=received)
        here.call("WRITE_HDR_OPT_CB", mss=mss)
    assert counted(here) == (0, 0)
    assert here.played.squeezed == 0


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**29 - 1), st.integers(0, 65_535))
def test_nothing_that_a_receiver_asks_for_makes_a_product_too_large(
    built: tuple[Limiter, Program], rate: int, srtt_us: int, mss: int
) -> None:
    sender = built[1]
    sender.reset()
    sender.begin()
    ask(sender, rate, srtt_us=srtt_us, mss=mss)
    assert counted(sender) == (0, 0)


@pytest.mark.parametrize("days", [1, 3, 4, 30, 365, 3_650])
@pytest.mark.parametrize("first", [True, False], ids=["since the machine was started", "since the last packet"])
def test_after_a_long_silence_the_mean_backlog_is_none(here: Limiter, days: int, *, first: bool) -> None:
    # The pod's first segment, or the first in days, leaves before anything has come that would move the clock up.
    here.played.now = days * DAY if first else DAY
    here.limit(Limits(None, SLOW))
    if not first:
        here.packet(INGRESS, 1_500, socket.IPPROTO_TCP)
        here.begin()
        here.played.now += days * DAY
    here.call("TCP_CONNECT_CB")
    here.send(srtt_us=1_000)
    assert counted(here) == (0, 0)
    assert here.clock(INGRESS).mean_backlog <= 0


@given(
    rate=rates,
    before=st.floats(0, 1),
    part=st.floats(0, 1),
    elapsed=st.integers(0, NS) | st.integers(0, 3_650 * DAY),
)
def test_the_mean_backlog_stays_between_what_it_was_and_what_is(
    built: tuple[Limiter, Program], rate: Rate, before: float, part: float, elapsed: int
) -> None:
    here = built[0]
    here.reset()
    here.limit(Limits(None, rate))
    run_clocks(here)
    here.begin()
    mean, backlog = (int(each * longest_backlog(here.limits.direction[INGRESS])) for each in (before, part))
    here.clock(INGRESS).mean_backlog = mean
    acknowledge_behind(here, elapsed, backlog)
    assert min(mean, backlog) - 1 <= here.clock(INGRESS).mean_backlog <= max(mean, backlog)
    assert counted(here) == (0, 0)


@pytest.mark.parametrize("step_ms", [0.2, 1, 10, 60])
def test_the_mean_backlog_outlasts_a_pause_and_forgets_within_some_seconds(here: Limiter, step_ms: float) -> None:
    here.limit(Limits(None, SLOW))
    run_clocks(here)
    here.begin()
    here.clock(INGRESS).mean_backlog = 0
    here.clock(INGRESS).mean_ns = here.played.now
    elapsed = int(step_ms * MS)
    for _ in range(200 * MS // elapsed):
        acknowledge_behind(here, elapsed, 100 * MS)
    assert 20 * MS <= here.clock(INGRESS).mean_backlog <= 50 * MS
    for _ in range(5 * NS // elapsed):
        acknowledge_behind(here, elapsed, 100 * MS)
    assert 99 * MS <= here.clock(INGRESS).mean_backlog <= 100 * MS


@pytest.mark.parametrize("days", [1, 30])
def test_some_milliseconds_after_a_long_silence_the_mean_backlog_is_of_now(here: Limiter, days: int) -> None:
    here.played.now = days * DAY
    here.limit(Limits(None, SLOW))
    here.call("TCP_CONNECT_CB")
    here.send(srtt_us=1_000)
    for _ in range(3_000):
        acknowledge_behind(here, MS, 120 * MS)
    assert 115 * MS <= here.clock(INGRESS).mean_backlog <= 120 * MS


# Senders.


@pytest.mark.parametrize("rate", [Rate(10**5), SLOW, FAST, Rate(10**11)], ids=str)
def test_a_segment_is_paced_to_the_fair_rate_of_the_backlog(here: Limiter, rate: Rate) -> None:
    for backlog in (0, 1, 4, 16):
        here.reset()
        here.limit(Limits(rate, None))
        here.packet(EGRESS, 60, socket.IPPROTO_TCP)
        here.begin()
        here.clock(EGRESS).mean_fair = 0
        here.clock(EGRESS).tat = here.played.now + backlog * MS
        here.send(srtt_us=20_000)
        fair = test_law.fair_rate(law.egress(rate, None), backlog * MS)
        assert here.played.lowest == pytest.approx(min(fair * 247 / 256, UNLIMITED), rel=0.01, abs=2)
        # What it is let up to is little more.
        assert here.played.lowest <= here.played.pacing <= 1.3 * here.played.lowest + 2


@pytest.mark.parametrize("idle", [0, 60 * NS, 30 * DAY])
@pytest.mark.parametrize("rate", [SLOW, FAST], ids=str)
def test_the_first_segment_after_a_silence_is_paced_as_any_other(here: Limiter, rate: Rate, idle: int) -> None:
    # Nobody has asked for more than the default burst: an idle pod has no reserve to spend at full speed. Nor has a
    # connection that was there before its limiter, whose clock has not begun (idle 0).
    here.limit(Limits(rate, None))
    if idle:
        run_clocks(here)
        here.begin()
        here.played.now += idle
    cap = law.egress(rate, None).fair_cap
    here.send(srtt_us=20_000)
    assert here.clock(EGRESS).mean_fair <= cap
    assert here.played.lowest <= cap
    assert here.played.pacing <= cap


@pytest.mark.parametrize("own", [UNLIMITED, 100_000])
def test_a_limit_that_is_lifted_gives_a_socket_back_what_was_its_own(here: Limiter, own: int) -> None:
    here.played.pacing = own
    here.limit(Limits(SLOW, SLOW))
    run_clocks(here)
    here.begin()
    here.played.window = OWN_WINDOW
    for _ in range(20):
        here.played.now += MS
        for direction in (EGRESS, INGRESS):
            here.packet(direction, 1_500, socket.IPPROTO_TCP)
        here.send(srtt_us=1_000)
        here.acknowledge(srtt_us=1_000)
    assert here.played.pacing < UNLIMITED
    assert here.played.pacing <= own
    assert here.played.window < OWN_WINDOW
    here.limit(Limits())
    here.send(srtt_us=1_000)
    assert here.played.pacing == own
    assert here.played.window == OWN_WINDOW
    assert here.played.cwnd >= 2**31 - 1


@pytest.mark.parametrize("before", [0, 1, 5, 40])
def test_a_rate_that_an_application_sets_meanwhile_is_kept_to_and_given_back(here: Limiter, before: int) -> None:
    def send(segments: int) -> None:
        for count in range(segments):
            here.clock(EGRESS).tat = here.played.now + count % 7 * MS // 2
            here.send(srtt_us=20_000)

    here.limit(Limits(FAST, None))
    run_clocks(here)
    here.begin()
    send(before)
    here.played.pacing = 100_000
    send(100)
    assert here.played.pacing == 100_000
    here.limit(Limits())
    here.send(srtt_us=20_000)
    assert here.played.pacing == 100_000


@pytest.mark.parametrize("backlog", [-MS, 0, MS])
def test_a_limit_that_goes_while_it_is_looked_at_leaves_no_socket_without_its_own_rate(
    here: Limiter, backlog: int
) -> None:
    here.limit(Limits(SLOW, None))
    run_clocks(here)
    here.begin()
    here.send(srtt_us=1_000)
    assert here.played.pacing < UNLIMITED
    here.clock(EGRESS).tat = here.played.now + backlog
    here.played.vanishing = 1
    here.send(srtt_us=1_000)
    assert here.limits.direction[EGRESS].rate_bits == 0
    here.send(srtt_us=1_000)
    assert here.played.pacing == UNLIMITED


@pytest.mark.parametrize("length", [1_448, 65_160])
def test_the_next_segments_turn_comes_when_the_backlog_is_gone(here: Limiter, length: int) -> None:
    """And not a minute later, as the fair rate has it for what was sent before the limit came."""
    rate, backlog = Rate(10**6), 2 * NS
    here.limit(Limits(rate, None))
    here.begin()
    here.clock(EGRESS).tat = here.played.now + backlog
    here.send(srtt_us=1_000, length=length)
    fair = test_law.fair_rate(law.egress(rate, None), backlog)
    turn = min((backlog + length * 8 * NS / rate.bits) / NS, length / fair)
    assert length / here.played.lowest == pytest.approx(turn, rel=0.1)


def flood(here: Limiter, rate: Rate, seconds: float) -> int:
    """How many of the datagrams pass that come twice as fast as a rate."""
    passed = 0
    for _ in range(int(2 * rate.bits / 8 / 1_500 * seconds)):
        here.played.now += 1_500 * 8 * NS // (2 * rate.bits)
        passed += here.packet(EGRESS, 1_500, socket.IPPROTO_UDP)
    return passed


def backlog(here: Limiter) -> float:
    """What the pod sends, ms."""
    ahead: int = here.clock(EGRESS).tat - here.played.now
    return ahead / MS


def test_who_sends_alone_finds_the_room_of_a_queue(here: Limiter) -> None:
    here.limit(Limits(SLOW, None))
    here.played.cookie = 1
    flood(here, SLOW, 1)
    assert 89 < backlog(here) < 93
    # Another comes, that takes what it is given; and then one that is paced.
    for _ in range(10):
        here.played.cookie = 2
        assert here.packet(EGRESS, 200, socket.IPPROTO_UDP)
        here.played.cookie = 1
        flood(here, SLOW, 0.05)
    assert backlog(here) < 10
    flood(here, SLOW, 1)
    assert backlog(here) > 89
    here.begin()
    for _ in range(10):
        here.send(srtt_us=1_000)
        flood(here, SLOW, 0.05)
    assert backlog(here) < 10


def test_beside_who_sends_alone_a_request_gets_through_and_is_not_forgotten_until_it_is_repeated(
    here: Limiter,
) -> None:
    rate = Rate(10**8)
    here.limit(Limits(rate, None))
    here.played.cookie = 1
    flood(here, rate, 1)
    for _ in range(3):
        here.played.cookie = 2
        here.send(srtt_us=1_000)
        assert here.packet(EGRESS, 500, socket.IPPROTO_TCP)
        here.played.cookie = 1
        flood(here, rate, 0.2)
        assert backlog(here) < 10


@pytest.mark.parametrize("each_second", [10, 2_000])
def test_short_packets_get_through_beside_who_sends_alone(here: Limiter, each_second: int) -> None:
    rate, lost = Rate(10**8), 0
    here.limit(Limits(rate, None))
    here.played.cookie = 1
    flood(here, rate, 1)
    for _ in range(each_second):
        here.played.cookie = 2
        lost += not here.packet(EGRESS, 100, socket.IPPROTO_UDP)
        here.played.cookie = 1
        flood(here, rate, 1 / each_second)
    assert lost == 0
    assert backlog(here) > 89


def test_a_flood_of_short_packets_shares_with_who_sends_alone(here: Limiter) -> None:
    here.limit(Limits(SLOW, None))
    bulk, short = 0, 0
    for _ in range(2_500):
        here.played.cookie = 2
        short += sum(here.packet(EGRESS, 100, socket.IPPROTO_UDP) for _ in range(20))
        here.played.cookie = 1
        bulk += flood(here, SLOW, 0.0012)
    assert 0.25 < bulk * 1_500 / (bulk * 1_500 + short * 100) < 0.75


# Receivers.


def receive(here: Limiter, share: float, seconds: float, *, backlog_ms: int = 120, srtt_us: int = 500) -> set[int]:
    """Let a socket receive at a part of what the fair rate is at a steady backlog; the windows it advertises."""
    limit, windows, received = here.limits.direction[INGRESS], set(), 0
    rate = share * test_law.fair_rate(limit, backlog_ms * MS) * 247 / 256
    step = min(MS, int((constant("SHARE_GAIN_CEILING", "limiter.bpf.c") - 1) / rate * NS))
    clock = here.clock(INGRESS)
    clock.mean_backlog, clock.rate_bits = backlog_ms * MS, limit.rate_bits
    for count in range(int(seconds * NS) // step):
        here.played.now += step
        clock.tat = here.played.now + backlog_ms * MS
        received = int(rate * count * step / NS)
        here.acknowledge(srtt_us=srtt_us, received=received)
        windows.add(here.played.window)
    return windows


@pytest.mark.parametrize("rate", [SLOW, FAST, Rate(10**10)], ids=str)
def test_a_socket_that_takes_more_than_its_share_is_paused_and_opened_again(here: Limiter, rate: Rate) -> None:
    here.limit(Limits(None, rate))
    here.begin()
    assert PAUSE in receive(here, 2, 1.0)
    assert here.played.window == PAUSE
    reserved = here.played.reserved
    assert reserved > 0
    here.call("WRITE_HDR_OPT_CB")
    assert here.played.window == 2 * 1_448
    # Without a backlog it is as wide as ever.
    here.clock(INGRESS).tat = here.played.now
    here.acknowledge(srtt_us=100_000, received=0)
    assert here.played.window > 2 * 1_448
    assert here.played.reserved == reserved


@pytest.mark.parametrize("rate", [rate for rate in RATES if 10**7 <= rate.bits <= 10**12], ids=str)
def test_a_socket_that_keeps_to_its_share_is_never_paused(here: Limiter, rate: Rate) -> None:
    here.limit(Limits(None, rate))
    here.begin()
    # A backlog at which a socket may be paused, and its share is most.
    backlog_ms = here.limits.direction[INGRESS].share_ns // MS + 1
    assert PAUSE not in receive(here, 1, 1.5 if rate.bits <= 10**10 else 0.6, backlog_ms=backlog_ms)


def test_ever_new_sockets_are_no_way_around_a_share(here: Limiter) -> None:
    """The more the pod is behind, the less a new one receives before it is paused."""
    first = []
    for backlog_ms in (101, 150, 240):
        here.reset()
        here.limit(Limits(None, SLOW))
        clock = here.clock(INGRESS)
        clock.rate_bits, clock.mean_backlog = SLOW.bits, 150 * MS
        clock.tat = here.played.now + backlog_ms * MS
        here.begin()
        clock.mean_backlog = 150 * MS
        for count in range(2_000):
            if here.played.window == PAUSE:
                break
            here.acknowledge(srtt_us=500, received=count * 1_448)
        first.append(count)
    assert here.played.window == PAUSE
    assert first[0] > 1.5 * first[1] > 1.5 * first[2] > 0


def test_a_connection_begins_with_a_window_of_ten_segments(here: Limiter) -> None:
    for limits, expected in ((Limits(), 0), (Limits(SLOW, None), 0), (Limits(None, SLOW), 10)):
        here.limit(limits)
        here.call("RWND_INIT")
        assert here.played.reply == expected


def test_what_listens_is_given_its_wide_windows_back(here: Limiter) -> None:
    widest = constant("WINDOW_CEILING", "limiter.bpf.c")
    here.limit(Limits(None, SLOW))
    here.played.window = 0
    here.call("TCP_LISTEN_CB")
    assert widest // 2 < here.played.window < widest
    assert here.socket.window == here.played.window
    assert here.socket.owner == native.CGROUP
    assert here.socket.own_window == 65_535 << 14
    # An application's own, narrower one stays.
    here.reset()
    here.limit(Limits(None, SLOW))
    here.played.window = 50_000
    here.call("TCP_LISTEN_CB")
    assert here.played.window == 50_000


def test_a_small_mss_makes_no_window_that_the_kernel_does_not_take(here: Limiter) -> None:
    here.limit(Limits(None, SLOW))
    run_clocks(here)
    here.begin()
    here.clock(INGRESS).tat = here.played.now + NS // 5
    for _ in range(100):
        here.played.now += MS
        here.acknowledge(srtt_us=500, mss=100)
        assert here.socket.own_window == OWN_WINDOW
    assert here.played.window >= 2 * 1_448


def test_a_segment_of_data_says_the_window_of_the_last_ack_unless_something_has_come(here: Limiter) -> None:
    here.limit(Limits(None, SLOW))
    run_clocks(here)
    here.begin()
    here.acknowledge(srtt_us=20_000, received=10_000)
    before = here.played.window
    here.clock(INGRESS).tat = here.played.now + NS // 5
    here.send(srtt_us=20_000, received=10_000)
    assert here.played.window == before
    here.send(srtt_us=20_000, received=11_000)
    assert here.played.window < before


def test_a_window_is_never_wider_than_the_applications_own(here: Limiter) -> None:
    here.limit(Limits(None, FAST))
    here.begin()
    here.played.window = 10_000
    for _ in range(10):
        here.played.now += MS
        here.acknowledge(srtt_us=200_000)
        assert here.played.window <= 10_000
    here.limit(Limits())
    here.acknowledge(srtt_us=200_000)
    assert here.played.window == 10_000


@pytest.mark.parametrize("rate", [SLOW, FAST], ids=str)
def test_a_window_is_what_the_fair_rate_brings_in_a_round_trip(here: Limiter, rate: Rate) -> None:
    here.limit(Limits(None, rate))
    run_clocks(here)
    here.begin()
    for backlog in (0, law.INGRESS_D0_NS):
        for _ in range(2_000):
            acknowledge_behind(here, MS, backlog, srtt_us=50_000)
    # At D0 a lone flow has the limit; 1 ms is the slack.
    assert here.played.window == pytest.approx(rate.bits / 8 * 0.051, rel=0.15)
    assert here.socket.offer << constant("OFFER_SHIFT", "sockets.h") == pytest.approx(rate.bits / 8, rel=0.01)


# Cooperation.


def ask(sender: Program, rate: int, **about: int) -> None:
    """An ACK comes with an option."""
    sender.played.told, sender.played.rate = 1, socket.htonl(rate)
    sender.call("PARSE_HDR_OPT_CB", **{"srtt_us": 20_000, **about})
    sender.played.told = 0


def test_a_sender_keeps_to_what_its_receiver_asks_until_that_is_silent_for_long(sender: Program) -> None:
    sender.begin()
    assert sender.played.flags == cooperation._CALLBACKS
    ask(sender, 125_000)
    paced = sender.played.pacing
    assert paced == pytest.approx(10**6 * 247 / 256, rel=0.001)
    assert sender.played.flags == cooperation._CALLBACKS | OPERATIONS["RTT_CB_FLAG"]
    silent = constant("SILENT_ROUND_TRIPS", "cooperate.bpf.c")
    for _ in range(silent - 1):
        sender.call("RTT_CB")
    assert sender.played.pacing == paced
    sender.call("RTT_CB")
    assert (sender.played.pacing, sender.played.cwnd) == (UNLIMITED, 2**31 - 1)


def test_a_sender_never_goes_faster_than_its_application_wants(sender: Program) -> None:
    sender.played.pacing = 10_000
    sender.begin()
    ask(sender, 125_000)
    assert sender.played.pacing == 10_000
    ask(sender, 250)
    assert sender.played.pacing == pytest.approx(2_000 * 247 / 256, rel=0.01)
    for _ in range(constant("SILENT_ROUND_TRIPS", "cooperate.bpf.c")):
        sender.call("RTT_CB")
    assert sender.played.pacing == 10_000


@pytest.mark.parametrize("rate", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("before", [(), (125,)])
def test_no_receiver_can_take_a_senders_pacing_away(sender: Program, before: tuple[int, ...], rate: int) -> None:
    # To the kernel a pacing rate of 0 is none (tcp_update_skb_after_send); to the program, nothing that it has set.
    sender.played.pacing = 10_000
    sender.begin()
    for asked in (*before, rate):
        ask(sender, asked)
        assert sender.played.lowest > 0
        assert 0 < sender.played.pacing <= 10_000
    for _ in range(constant("SILENT_ROUND_TRIPS", "cooperate.bpf.c")):
        sender.call("RTT_CB")
    assert sender.played.pacing == 10_000


def test_an_ack_tells_what_is_offered_once_for_what_it_acknowledges(sender: Program) -> None:
    sender.begin()
    ask(sender, 1_000)  # a receiver sends too, and has a place to keep its offer in
    sender.socket.offer = 4_711
    reserved = []
    for nxt in (1, 2, 2, 3):
        sender.acknowledge(nxt=nxt)
        reserved.append(sender.played.reserved)
    assert reserved == [8, 16, 16, 24]
    sender.call("WRITE_HDR_OPT_CB")
    assert socket.ntohl(sender.played.offered) == 4_711
    sender.send(nxt=4)
    sender.socket.offer = 0
    sender.acknowledge(nxt=5)
    assert sender.played.reserved == 24


def repeat(sender: Program, nxt: int) -> None:
    """After a pause, data come that have come before."""
    sender.played.now += NS
    sender.played.segments += 1
    sender.acknowledge(nxt=nxt, srtt_us=1_000)


def is_offering(sender: Program, nxt: int) -> bool:
    """Whether the next ACK has the option."""
    before = sender.played.reserved
    sender.played.segments += 1
    sender.acknowledge(nxt=nxt, srtt_us=1_000)
    return bool(sender.played.reserved > before)


@pytest.mark.parametrize(("apart", "lost"), [(100_000, True), (2 << 20, False)])
def test_offers_end_when_again_and_again_a_sender_has_not_seen_them(sender: Program, apart: int, lost: bool) -> None:
    sender.begin()
    ask(sender, 1_000)
    sender.socket.offer = 4_711
    for doubt in range(4):
        nxt = 1 + doubt * apart
        assert is_offering(sender, nxt) == (not lost or doubt < constant("DOUBTS", "cooperate.bpf.c"))
        repeat(sender, nxt)


def test_what_probes_a_connection_ends_no_offers(sender: Program) -> None:
    sender.begin()
    ask(sender, 1_000)
    sender.socket.offer = 4_711
    assert is_offering(sender, 1)
    for _ in range(10):
        sender.played.now += NS
        sender.acknowledge(nxt=1, srtt_us=1_000)
    assert is_offering(sender, 2)


def test_what_comes_slowly_behind_a_lost_segment_ends_no_offers(sender: Program) -> None:
    sender.begin()
    ask(sender, 1_000)
    sender.socket.offer = 4_711
    assert is_offering(sender, 1)
    for _ in range(10):
        sender.played.early += 1
        repeat(sender, 1)
    assert is_offering(sender, 2)


# Numbers that Python repeats.


def test_connections_that_were_there_call_for_what_new_ones_do(here: Limiter, sender: Program) -> None:
    for program, callbacks in ((here, limiter._CALLBACKS), (sender, cooperation._CALLBACKS)):
        for begun in ("ACTIVE_ESTABLISHED_CB", "PASSIVE_ESTABLISHED_CB"):
            program.reset()
            program.call(begun)
            assert program.played.flags == callbacks
    assert OPERATIONS["WRITE_HDR_OPT_CB_FLAG"] == limiter._CALLBACKS
    assert OPERATIONS["PARSE_UNKNOWN_HDR_OPT_CB_FLAG"] == cooperation._CALLBACKS


def test_what_is_played_is_laid_out_as_the_programs_have_it(here: Limiter) -> None:
    assert sizeof(native.Socket) == layout.SOCKET_BYTES
    here.limit(Limits(SLOW, None))
    here.begin()
    assert here.socket.owner == native.CGROUP
    here.limit(Limits(SLOW, FAST))
    assert law.decode(here.limits) == Limits(SLOW, FAST)
