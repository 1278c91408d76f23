from __future__ import annotations

from typing import Any

import pytest

from bpfrl.commands.serve import serve_master
from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits
from bpfrl.master.annotations import BURST, EGRESS, INGRESS, KEYS, RATE_LABEL, Key, limits_of
from bpfrl.units import Rate

ONE, TEN, MANY = Rate(10**6), Rate(10**7), Rate(10**9)


def test_the_keys_are_those_that_others_read() -> None:
    assert EGRESS == "kubernetes.io/egress-bandwidth"
    assert INGRESS == "kubernetes.io/ingress-bandwidth"
    assert BURST == "bpfrl.io/burst"
    assert RATE_LABEL == "rate"


@pytest.mark.parametrize(
    ("annotations", "labels", "limits"),
    [
        ({}, {}, None),
        ({"team": "10M", "rate": "10M"}, {"app": "web", EGRESS: "1M"}, None),
        ({EGRESS: "10M"}, {}, Limits(egress=TEN)),
        ({INGRESS: "10M"}, {}, Limits(ingress=TEN)),
        ({EGRESS: "10M", INGRESS: "1G"}, {}, Limits(TEN, MANY)),
        ({}, {"rate": "10M"}, Limits(TEN, TEN)),
        # An annotation says more about its direction than the label does.
        ({EGRESS: "1M"}, {"rate": "10M"}, Limits(ONE, TEN)),
        ({INGRESS: "1M"}, {"rate": "10M"}, Limits(TEN, ONE)),
        ({EGRESS: "1M", INGRESS: "1G"}, {"rate": "10M"}, Limits(ONE, MANY)),
        ({EGRESS: "10M", BURST: "64Ki"}, {}, Limits(egress=TEN, burst=65_536)),
        ({BURST: "64k"}, {"rate": "10M"}, Limits(TEN, TEN, 64_000)),
        # A burst without a rate limits nothing.
        ({BURST: "64Ki"}, {}, None),
        ({EGRESS: " 10M "}, {}, Limits(egress=TEN)),
    ],
)
def test_a_pod_asks_for_limits_in_annotations_and_a_label(
    annotations: dict[str, str], labels: dict[str, str], limits: Limits | None
) -> None:
    assert limits_of(annotations, labels) == limits


@pytest.mark.parametrize(
    ("text", "bits"),
    [("1k", 10**3), ("1000", 10**3), ("1P", 10**15), ("1Gi", 2**30), ("1e7", 10**7), ("0.5M", 500_000)],
)
def test_rates_are_quantities_between_1k_and_1p(text: str, bits: int) -> None:
    assert limits_of({EGRESS: text}, {}) == Limits(egress=Rate(bits))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("999", "out of range: it must be 1k to 1P"),
        ("0", "out of range"),
        ("1.001P", "out of range"),
        ("1E", "out of range"),
        ("10m", "did you mean 10M?"),
        ("-1M", "is not a positive number"),
        ("", "is not a positive number"),
        ("fast", "is not a positive number"),
        ("10 M", "is not a positive number"),
        # Only the command line knows tc's forms.
        ("10mbit", "has no known unit"),
        ("10Mbit/s", "has no known unit"),
        ("10M/s", "has no known unit"),
        ("10mbps", "may mean bits or bytes"),
        ("10MB", "may mean bits or bytes"),
    ],
)
@pytest.mark.parametrize(
    ("key", "kind"), [(EGRESS, "annotation"), (INGRESS, "annotation"), (RATE_LABEL, "label")], ids=["out", "in", "both"]
)
def test_a_rate_that_cannot_be_meant_is_named_with_its_place(text: str, problem: str, key: str, kind: str) -> None:
    marks = ({}, {key: text}) if kind == "label" else ({key: text}, {})
    with pytest.raises(InvalidValueError) as caught:
        limits_of(*marks)
    assert str(caught.value).startswith(f"{kind} {key}: rate {text!r}")
    assert problem in str(caught.value)
    assert "mbit" not in str(caught.value).replace(text, ""), "tc's forms do not help here"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("64KB", "size '64KB' may mean 1000s or 1024s"),
        ("64Kbit", "size '64Kbit' has no known unit"),
        ("big", "size 'big' is not a positive number"),
        ("10m", "size '10m' has no known unit"),
        ("1499", "burst 1499 byte is out of range"),
        ("17Gi", "is out of range"),
        ("8Ei", "is out of range"),
    ],
)
@pytest.mark.parametrize("rate", [{}, {EGRESS: "10M"}], ids=["alone", "with a rate"])
def test_a_burst_that_cannot_be_meant_is_named(text: str, problem: str, rate: dict[str, str]) -> None:
    with pytest.raises(InvalidValueError) as caught:
        limits_of({BURST: text} | rate, {})
    assert str(caught.value).startswith(f"annotation {BURST}: ")
    assert problem in str(caught.value)


def test_a_label_that_cannot_be_meant_is_no_less_a_mistake_where_annotations_hide_it() -> None:
    with pytest.raises(InvalidValueError, match=r"^label rate: "):
        limits_of({EGRESS: "1M", INGRESS: "1M"}, {"rate": "high"})


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_keys_example_can_be_meant(key: Key[Any]) -> None:
    assert key.read({key.name: key.example}) == key.parse(key.example)
    assert key.read({}) is None


def test_every_key_is_in_the_help_of_the_command_that_reads_it() -> None:
    text = serve_master.help or ""
    assert all(f"{key.kind} {key.name} " in text.replace("\n", " ") for key in KEYS)
