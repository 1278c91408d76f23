from __future__ import annotations

import pytest

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.history import SAMPLES, History
from bpfrl.limits import Limits, PodRef
from bpfrl.render import Row, Sample
from bpfrl.units import Rate
from tests.unit.fakes import uid_of

LIMITS = Limits(Rate(10**6))
UNKNOWN = Sample(None, None)


def seen(second: float, sent: int, received: int = 0, *, number: int = 0, node: str = "a") -> Row:
    """A limiter at a time, with what it has counted (byte)."""
    counted = (Counters(passed_bytes=sent), Counters(passed_bytes=received))
    return Row(Status(PodRef(uid_of(number)), LIMITS, *counted, 7, 0.0), second, node=node)


def test_rates_are_over_the_time_that_has_passed() -> None:
    history = History()
    [first] = history.follow([seen(10.0, 0)])
    assert (first.before, first.samples) == (None, (UNKNOWN,))
    [second] = history.follow([seen(10.5, 1_000, 500)])
    assert second.samples == (UNKNOWN, Sample(16_000, 8_000))
    [third] = history.follow([seen(14.5, 3_000, 500)])
    assert third.before is not None
    assert third.before[1] == 10.5
    assert third.samples == (UNKNOWN, Sample(16_000, 8_000), Sample(4_000, 0))


def test_as_many_samples_are_kept_as_can_be_drawn() -> None:
    history = History()
    for second in range(2 * SAMPLES):
        [row] = history.follow([seen(second, second * second)])
    assert len(row.samples) == SAMPLES
    assert row.samples[-1] == Sample(8 * (4 * SAMPLES - 3), 0)


def test_limiters_of_different_nodes_and_pods_are_kept_apart() -> None:
    history = History()
    history.follow([seen(0, 0, node="a"), seen(0, 0, node="b"), seen(0, 0, number=1)])
    rows = history.follow([seen(1, 1, node="a"), seen(1, 2, node="b"), seen(1, 3, number=1)])
    assert [row.samples[-1].egress for row in rows] == [8, 16, 24]


def test_what_has_gone_is_forgotten() -> None:
    history = History()
    history.follow([seen(0, 0), seen(0, 0, number=1)])
    [row] = history.follow([seen(1, 0)])
    assert row.ref.uid == uid_of(0)
    [again, other] = history.follow([seen(2, 0), seen(2, 9, number=1)])
    assert (len(again.samples), other.samples, other.before) == (3, (UNKNOWN,), None)


def test_limiters_of_a_silent_node_stay_without_rates() -> None:
    history = History()
    history.follow([seen(0, 0, node="a"), seen(0, 0, node="b")])
    other, silent = history.follow([seen(1, 1, node="b")], {"a"})
    assert (other.node, silent.node) == ("b", "a")
    assert (silent.before, silent.samples) == (None, (UNKNOWN, UNKNOWN))
    other, silent = history.follow([seen(2, 1, node="b")], {"a"})
    assert len(silent.samples) == 3
    # Back: the rate is over all the time that nobody knows.
    back, _ = history.follow([seen(4, 1_000, node="a"), seen(4, 1, node="b")])
    assert back.samples[-1] == Sample(2_000, 0)


def test_pods_of_a_silent_node_keep_their_past() -> None:
    """In a cluster they are shown all the same, for the API server still knows them."""
    history = History()
    [row] = history.follow([seen(0, 0)._replace(pod=PodRef(uid_of(0)), state="ok")])
    unknown = Row(None, 1.0, node="a", pod=PodRef(uid_of(0)), state="unknown", wanted=LIMITS)
    [row] = history.follow([unknown], {"a"})
    assert (row.state, row.found, row.samples) == ("unknown", None, (UNKNOWN, UNKNOWN))
    [row] = history.follow([seen(2, 100)])
    assert row.samples == (UNKNOWN, UNKNOWN, Sample(400, 0))


@pytest.mark.parametrize("found", [None, Broken(uid_of(0), "broken")])
def test_what_has_no_counters_has_no_past(found: Broken | None) -> None:
    history = History()
    row = Row(found, 0.0, pod=PodRef(uid_of(0)))
    assert history.follow([row]) == history.follow([row]) == [row]


def test_a_limiter_that_counts_anew_has_sent_nothing() -> None:
    history = History()
    history.follow([seen(0, 1_000)])
    [row] = history.follow([seen(1, 10)])
    assert row.samples[-1] == Sample(0, 0)
