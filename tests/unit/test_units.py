from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from decimal import ROUND_CEILING, Decimal
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfrl.errors import InvalidValueError
from bpfrl.units import Rate, format_size, parse_size

TC_RATES = {
    "1000bit": 1_000,
    "1kbit": 1_000,
    "500kbit": 500_000,
    "10mbit": 10_000_000,
    "2gbit": 2_000_000_000,
    "3tbit": 3_000_000_000_000,
    "1000tbit": 10**15,
    "1kibit": 1_024,
    "10mibit": 10 * 1_048_576,
    "1gibit": 1_073_741_824,
    "1tibit": 1_099_511_627_776,
    "2.5gbit": 2_500_000_000,
    ".5mbit": 500_000,
    "1.mbit": 1_000_000,
    "1e3kbit": 1_000_000,
    "0010mbit": 10_000_000,
    "10mbit/s": 10_000_000,
    "5Kibit/S": 5_120,
}
QUANTITY_RATES = {
    "1000": 1_000,
    "10M": 10_000_000,
    "1500k": 1_500_000,
    "2G": 2_000_000_000,
    "1T": 10**12,
    "1P": 10**15,
    "0.001E": 10**15,
    "1Ki": 1_024,
    "10Mi": 10 * 1_048_576,
    "1Gi": 1_073_741_824,
    "1Ti": 1_099_511_627_776,
    "0.5Pi": 562_949_953_421_312,
    "0.0005Ei": 576_460_752_303_424,  # and a fraction
    "1e7": 10_000_000,
    "1E7": 10_000_000,
    "1e+7": 10_000_000,
    "1000000e-3": 1_000,
    ".5G": 500_000_000,
    "5000000m": 5_000,
    "5000000000u": 5_000,
    "5000000000000n": 5_000,
    "999.5": 1_000,
    "1000.000001": 1_001,
    "  10M\n": 10_000_000,
    "\t10M ": 10_000_000,
}
NO_NUMBER = (
    *("", " ", "\n", "mbit", "M", "k", ".", ".M", "e7", "e"),
    *("-1mbit", "-10M", "-0", "+10mbit", "--1", "10-M"),
    *("nan", "NaN", "nanM", "inf", "Inf", "-inf", "Infinity", "infinityM", "null", "None", "true"),
    *(
        "10 M",
        "10 mbit",
        "1 0M",
        "10,5M",
        "1_000k",
        "1'000k",
        "0x10M",
        "1.2.3M",
        "..5M",
        "1e5.5",
        "10ee3",
        "10M10",
        "10%",
    ),
    *("10\nM", "10\x00M", "10M\x00", "10\u00a0M"),
    # Arabic-Indic, fullwidth and superscript digits; a fullwidth M; Kelvin and micro signs.
    *("\u0661\u0660mbit", "\uff11\uff10M", "10\u00b2", "10\uff2d", "10\u212a", "10\u00b5", "\u2167M"),
    # Longer than any rate, and exponents that would make a long number of a short text.
    *("9" * 61, "1" * 100_000, "1e1000", "1e9999999999", "1e-1000", "0." + "0" * 60 + "1"),
)
NO_UNIT = (
    "10K",
    "10KI",
    "10mI",
    "10ki",
    "10g",
    "10t",
    "10p",
    "10x",
    "10e",
    "10Ee",
    "10kk",
    "10M/s",
    "1000/s",
    "10mbit/s/s",
    "10mbits",
)
OUT_OF_RANGE = ("0", "0M", "0mbit", "0.0", "1", "999", "999bit", "0.9k", "1001tbit", "1Pi", "1E", "1Ei", "2000000gbit")
OVERFLOWING = ("1e999", "9e999tbit", "1e999E", "9" * 60, "9" * 56 + "e999", "1e-999", "1e-999n")
AMBIGUOUS = {
    "8000bps": "8000bit",
    "500kbps": "500kbit",
    "10Mbps": "10mbit",
    "10MBps": "10mbit",
    "10mbps/s": "10mbit",
    "10MB/s": "10mbit",
    "10Mb/s": "10mbit",
    "10mb": "10mbit",
    "2GB": "2gbit",
    "8000b": "8000bit",
    "500KiB": "500kibit",
    "1MiBps": "1mibit",
    "1TBPS": "1tbit",
}

SIZES = {
    "0": 0,
    "65536": 65_536,
    "64Ki": 65_536,
    "64k": 64_000,
    "1Mi": 1_048_576,
    "1M": 1_000_000,
    "1.5Ki": 1_536,
    "2Gi": 2_147_483_648,
    "1e6": 1_000_000,
    "0.1": 1,
    "7Ei": 7 * 2**60,
    " 64Ki ": 65_536,
}
# What an annotation may hold, and tc's forms, which it may not.
ANNOTATIONS = {
    "500k": 500_000,
    "1G": 10**9,
    "0.5G": 500_000_000,
    "1k": Rate.MIN_BITS,
    "1P": Rate.MAX_BITS,
}
NO_ANNOTATIONS = {
    **dict.fromkeys(NO_NUMBER, "is not a positive number"),
    **dict.fromkeys((*OVERFLOWING, "0", "0M", "1", "999", "0.9k", "2P", "1Pi", "1E", "1Ei", "10m"), "is out of range"),
    **dict.fromkeys((*TC_RATES, "10Mbit", "9e999tbit", *NO_UNIT), "has no known unit"),
    **dict.fromkeys(AMBIGUOUS, "may mean bits or bytes"),
}
KILOBYTES = ("64kb", "64KB", "64Kb", "1mb", "1MB", "2gb", "2GB", "1TB")
NO_SIZE = ("64K", "64KiB", "64kib", "1b", "1B", "1m", "5u", "5n", "1mbit", "1kbit", "1x", "1bps")

# A Quantity's number: digits, perhaps a fraction, perhaps an exponent; short enough for both parsers to be exact.
numbers = st.from_regex(r"[0-9]{1,9}(\.[0-9]{0,6})?([eE][+-]?[0-9])?|\.[0-9]{1,6}", fullmatch=True)
suffixes = st.sampled_from(["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"])
rates = st.integers(Rate.MIN_BITS, Rate.MAX_BITS) | st.integers(3, 15).flatmap(
    lambda digits: st.integers(10 ** (digits - 1), 10**digits).map(lambda bits: max(bits, Rate.MIN_BITS))
)


def short(text: str) -> str:
    return ascii(text[:30])


def refusal(text: str, parse: Callable[[str], Rate] = Rate.parse) -> str:
    """Why a text is no rate, which is one line that can be shown anywhere."""
    with pytest.raises(InvalidValueError) as caught:
        parse(text)
    return one_line(caught.value)


def size_refusal(text: str) -> str:
    with pytest.raises(InvalidValueError) as caught:
        parse_size(text)
    return one_line(caught.value)


def one_line(error: InvalidValueError) -> str:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 1200, text
    return text


@pytest.mark.parametrize(("text", "bits"), (TC_RATES | QUANTITY_RATES).items())
def test_a_rate_is_read_in_both_dialects(text: str, bits: int) -> None:
    assert Rate.parse(text) == Rate(bits)


@pytest.mark.parametrize("unit", ["bit", "kbit", "mbit", "gbit", "tbit", "kibit", "mibit", "gibit", "tibit"])
def test_tc_units_are_read_in_every_case(unit: str) -> None:
    number = "5000" if unit == "bit" else "5"
    expected = Rate.parse(number + unit)
    for spelling in product(*((letter, letter.upper()) for letter in unit)):
        assert Rate.parse(number + "".join(spelling)) == expected


@pytest.mark.parametrize("text", NO_NUMBER, ids=short)
def test_what_is_no_number_is_refused_with_the_forms_to_use(text: str) -> None:
    reason = refusal(text)
    assert "is not a positive number" in reason
    assert "10mbit" in reason
    assert "10M" in reason


@pytest.mark.parametrize("text", NO_UNIT)
def test_an_unknown_unit_is_refused_with_the_forms_to_use(text: str) -> None:
    reason = refusal(text)
    assert f"'{text}' has no known unit" in reason
    assert "10mbit" in reason


@pytest.mark.parametrize("text", [*OUT_OF_RANGE, *OVERFLOWING])
def test_a_rate_outside_the_kubelets_bounds_is_refused(text: str) -> None:
    reason = refusal(text)
    assert "out of range: it must be 1kbit to 1000tbit" in reason
    assert "did you mean" not in reason


@pytest.mark.parametrize(("text", "meant"), [("10m", "10M"), ("0.5m", "0.5M"), ("999000m", "999000M")])
def test_thousandths_that_make_no_rate_are_taken_for_a_slip(text: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(text)


@pytest.mark.parametrize(("text", "bits"), AMBIGUOUS.items())
def test_bits_or_bytes_is_asked_back_with_the_bits_spelled_out(text: str, bits: str) -> None:
    reason = refusal(text)
    assert "may mean bits or bytes" in reason
    assert f"as {bits}, or eight times as much" in reason
    assert Rate.parse(bits)


@pytest.mark.parametrize(("text", "bits"), (QUANTITY_RATES | ANNOTATIONS).items())
def test_an_annotation_is_a_quantity(text: str, bits: int) -> None:
    assert Rate.parse_quantity(text) == Rate(bits)


@pytest.mark.parametrize(("text", "reason"), NO_ANNOTATIONS.items(), ids=short)
def test_an_annotation_that_is_none_is_refused_with_the_forms_that_it_may_have(text: str, reason: str) -> None:
    told = refusal(text, Rate.parse_quantity)
    assert reason in told
    # What was written is repeated; what is said of it must not suggest what would be refused again.
    said = told.partition(reason)[2]
    assert ("10M, 500k, 2G" in said) != ("must be 1k to 1P" in said)
    assert "kbit" not in said
    assert "mbit" not in said


@pytest.mark.parametrize(("text", "meant"), [("10m", "10M"), ("0.5m", "0.5M"), ("999000m", "999000M")])
def test_thousandths_in_an_annotation_are_taken_for_a_slip_too(text: str, meant: str) -> None:
    assert refusal(text, Rate.parse_quantity).endswith(f"must be 1k to 1P; 'm' is a thousandth, did you mean {meant}?")
    assert Rate.parse_quantity(meant)


def test_the_bounds_are_rates_and_their_neighbours_are_not() -> None:
    assert Rate.parse("1kbit") == Rate(Rate.MIN_BITS) == Rate(1_000)
    assert Rate.parse("1000tbit") == Rate(Rate.MAX_BITS) == Rate(10**15)
    for bits in (-1, 0, 999, 10**15 + 1):
        with pytest.raises(InvalidValueError, match="out of range"):
            Rate(bits)


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (1_000, "1kbit"),
        (1_001, "1001bit"),
        (1_024, "1024bit"),
        (1_500_000, "1500kbit"),
        (10_000_000, "10mbit"),
        (10**9, "1gbit"),
        (10**15, "1000tbit"),
        (10**15 - 1, "999999999999999bit"),
    ],
)
def test_a_rate_prints_with_the_largest_exact_unit(bits: int, text: str) -> None:
    assert str(Rate(bits)) == text


@given(rates)
def test_what_a_rate_prints_reads_back_the_same(bits: int) -> None:
    assert Rate.parse(str(Rate(bits))) == Rate(bits)


@given(st.text(st.characters(), max_size=80) | st.text("0123456789.eE+-kMGbitps/ \n", max_size=20))
def test_any_text_is_a_rate_or_refused_in_one_line(text: str) -> None:
    for parse in (Rate.parse, Rate.parse_quantity):
        try:
            rate = parse(text)
        except InvalidValueError as error:
            one_line(error)
        else:
            assert Rate.MIN_BITS <= rate.bits <= Rate.MAX_BITS
            assert Rate.parse(text) == rate


@given(numbers, suffixes)
def test_quantities_mean_what_the_kubernetes_client_makes_of_them(number: str, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's imports are not ours to mend
        from kubernetes.utils import parse_quantity  # noqa: PLC0415
    text = number + suffix
    value: Decimal = parse_quantity(text)  # type: ignore[no-untyped-call]
    expected = int(value.to_integral_value(rounding=ROUND_CEILING))

    if Rate.MIN_BITS <= expected <= Rate.MAX_BITS:
        assert Rate.parse(text) == Rate.parse_quantity(text) == Rate(expected)
    else:
        assert "out of range" in refusal(text)
        assert "out of range" in refusal(text, Rate.parse_quantity)
    if suffix in ("n", "u", "m"):
        assert "no known unit" in size_refusal(text)
    elif expected < 2**63:
        assert parse_size(text) == expected
    else:
        assert "out of range" in size_refusal(text)


def test_rates_order_by_speed_and_cannot_be_changed() -> None:
    texts = ["1gbit", "1kbit", "999kbit", "1mbit"]
    assert [str(rate) for rate in sorted(map(Rate.parse, texts))] == ["1kbit", "999kbit", "1mbit", "1gbit"]
    assert len({Rate(10**6), Rate.parse("1M"), Rate.parse("1000kbit")}) == 1
    with pytest.raises(FrozenInstanceError):
        Rate(1_000).bits = 2_000  # type: ignore[misc]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size_is_read_as_a_quantity(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", KILOBYTES)
def test_kilobytes_of_unclear_length_are_refused_with_the_forms_to_use(text: str) -> None:
    reason = size_refusal(text)
    assert "may mean 1000s or 1024s" in reason
    assert "64Ki" in reason


@pytest.mark.parametrize("text", NO_SIZE)
def test_a_size_of_unknown_unit_is_refused_with_the_forms_to_use(text: str) -> None:
    reason = size_refusal(text)
    assert f"'{text}' has no known unit" in reason
    assert "64Ki" in reason


@pytest.mark.parametrize("text", NO_NUMBER, ids=short)
def test_what_is_no_number_is_no_size(text: str) -> None:
    assert "is not a positive number" in size_refusal(text)


@pytest.mark.parametrize("text", ["8Ei", "1e999", "9" * 60, "9e999E"])
def test_a_size_that_63_bits_do_not_hold_is_refused(text: str) -> None:
    assert f"'{text}' is out of range" in size_refusal(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1_000, "1000"),
        (1_023, "1023"),
        (1_024, "1Ki"),
        (1_536, "1536"),
        (65_536, "64Ki"),
        (3 * 2**20, "3Mi"),
        (2**30, "1Gi"),
        (16 * 2**30, "16Gi"),
        (2**30 + 1_024, "1048577Ki"),
    ],
)
def test_a_size_prints_with_the_largest_exact_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**33 - 1).map(lambda number: number << 30))
def test_what_a_size_prints_reads_back_the_same(size: int) -> None:
    assert parse_size(format_size(size)) == size
