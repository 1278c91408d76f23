"""The page about faults tells what the suite measured, and no fault has taken longer than is stated."""

from __future__ import annotations

from dataclasses import replace

from bench import endure
from bench.faults import FAULTS
from bench.kubeapi import StandIn


def test_the_page_is_made_of_the_faults_and_the_figures() -> None:
    assert endure.PAGE.read_text() == endure.page(endure.load())


def test_every_fault_has_happened_and_none_has_taken_longer_than_is_stated() -> None:
    measured = endure.load()
    assert measured[StandIn.__name__].outcomes.keys() == FAULTS.keys()
    for found in measured.values():
        for name, outcome in found.outcomes.items():
            assert outcome.seconds <= FAULTS[name].disturbance.within, name
            assert outcome.times == max(1, FAULTS[name].steps), name


def test_a_fault_that_happens_at_steps_happens_at_each() -> None:
    stepwise = next(fault for fault in FAULTS.values() if fault.steps)
    assert len([*replace(stepwise, steps=7).all_steps()]) == 7
    assert len([*replace(stepwise, steps=0).all_steps()]) == 1
