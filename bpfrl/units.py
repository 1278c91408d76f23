"""Rates and sizes as people write them.

A rate has two dialects. Network people write tc's (``10mbit``, ``500kbit``, ``2gbit``, any case; see
tc(8), UNITS); Kubernetes people write a Quantity (``10M``, ``1500k``, ``1Gi``, ``1e7``), in bit/s, as the
bandwidth annotations do. The two share the grammar below and cannot be mistaken for each other, with
one exception that is caught: ``10m`` is ten thousandths in a Quantity and never what was meant.

Forms with ``bps`` are refused: tc reads them as bytes per second, everybody else as bits. Sizes with ``kb``
are refused for the like reason (1024 to tc, 1000 to most others).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Final, NamedTuple

from bpfrl.errors import InvalidValueError

_BINARY: Final = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_DECIMAL: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_FRACTIONS: Final = {"m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}

# The suffixes of k8s.io/apimachinery/pkg/api/resource, which are case-sensitive.
_QUANTITY: Final[dict[str, Decimal]] = {
    **{suffix: Decimal(factor) for suffix, factor in (_DECIMAL | _BINARY).items()},
    **_FRACTIONS,
}
# tc's names for rates in bits; tc compares them without regard to case.
_TC_RATE: Final[dict[str, Decimal]] = {
    "bit": Decimal(1),
    **{f"{prefix.lower()}bit": Decimal(_DECIMAL[prefix]) for prefix in ("k", "M", "G", "T")},
    **{f"{prefix.lower()}bit": Decimal(_BINARY[prefix]) for prefix in ("Ki", "Mi", "Gi", "Ti")},
}

# Sixty characters and three digits of exponent are more than any rate needs, and keep hostile input cheap.
_LONGEST: Final = 60
_LARGEST_SIZE: Final = 2**63 - 1
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)((?:[eE][+-]?[0-9]{1,3})?)([A-Za-z/]*)", re.ASCII)

_SIZE_FORMS: Final = "write it in bytes as 64Ki, 1Mi or 65536"


class _Dialect(NamedTuple):
    """How rates are written in one place.

    Attributes:
        units: the units besides a Quantity's suffixes, in lower case.
        forms: what to say to who has written something else.
        range: the bounds, as they are written here.
    """

    units: Mapping[str, Decimal]
    forms: str
    range: str


_COMMAND_LINE: Final = _Dialect(
    _TC_RATE,
    "write it as 10mbit, 500kbit, 2gbit (tc) or 10M, 500k, 2G (Kubernetes), in bits per second",
    "1kbit to 1000tbit",
)
_ANNOTATION: Final = _Dialect({}, "write it as 10M, 500k, 2G, in bits per second", "1k to 1P")


@dataclass(frozen=True, order=True, slots=True)
class Rate:
    """A bandwidth at layer 3 in bit/s, between 1 kbit/s and 1 Pbit/s (the bounds of the kubelet).

    >>> Rate.parse("10mbit") == Rate.parse("10M") == Rate(10_000_000)
    True
    """

    bits: int

    MIN_BITS = 10**3
    MAX_BITS = 10**15

    def __post_init__(self) -> None:
        if not self.MIN_BITS <= self.bits <= self.MAX_BITS:
            raise InvalidValueError(f"rate {self.bits} bit/s is out of range: it must be 1kbit to 1000tbit")

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read a rate in tc's form or as a Kubernetes Quantity; a fraction of a bit/s is rounded up.

        Raises:
            InvalidValueError: the text is neither, or the rate is out of range.
        """
        return cls._parse(text, _COMMAND_LINE)

    @classmethod
    def parse_quantity(cls, text: str) -> Rate:
        """Read a rate as a Kubernetes Quantity in bit/s, which is all that the bandwidth annotations may hold.

        Raises:
            InvalidValueError: the text is none, or the rate is out of range.
        """
        return cls._parse(text, _ANNOTATION)

    @classmethod
    def _parse(cls, text: str, dialect: _Dialect) -> Rate:
        text = text.strip()
        number, suffix = _split(text, "rate", dialect.forms)
        if suffix.lower().removesuffix("/s").endswith(("bps", "b")):
            right = f"write bits per second as {_bits_hint(text)}" if dialect.units else dialect.forms
            raise InvalidValueError(f"rate '{text}' may mean bits or bytes: {right}")
        # tc does not know "10mbit/s", but everybody else does.
        factor = dialect.units.get(suffix.lower().removesuffix("/s"), _QUANTITY.get(suffix))
        if factor is None:
            raise InvalidValueError(f"rate '{text}' has no known unit: {dialect.forms}")
        bits = _whole(number * factor)
        if not cls.MIN_BITS <= bits <= cls.MAX_BITS:
            hint = f"; 'm' is a thousandth, did you mean {text[:-1]}M?" if suffix == "m" else ""
            raise InvalidValueError(f"rate '{text}' is out of range: it must be {dialect.range}{hint}")
        return cls(bits)

    def __str__(self) -> str:
        """Tc's form with the largest unit that is exact: what :meth:`parse` reads back as the same rate."""
        for prefix in ("T", "G", "M", "k"):
            if self.bits % _DECIMAL[prefix] == 0:
                return f"{self.bits // _DECIMAL[prefix]}{prefix.lower()}bit"
        return f"{self.bits}bit"


def parse_size(text: str) -> int:
    """Read a size in byte, written as a Kubernetes Quantity (``64Ki``, ``64k``, ``65536``).

    Raises:
        InvalidValueError: the text is no size, or one that 63 bits do not hold.
    """
    text = text.strip()
    number, suffix = _split(text, "size", _SIZE_FORMS)
    if suffix.lower() in {"kb", "mb", "gb", "tb"}:
        raise InvalidValueError(f"size '{text}' may mean 1000s or 1024s: {_SIZE_FORMS}")
    factor = _QUANTITY.get(suffix)
    if factor is None or suffix in _FRACTIONS:
        raise InvalidValueError(f"size '{text}' has no known unit: {_SIZE_FORMS}")
    size = _whole(number * factor)
    if size > _LARGEST_SIZE:
        raise InvalidValueError(f"size '{text}' is out of range: {_SIZE_FORMS}")
    return size


def format_size(size: int) -> str:
    """A size in byte with the largest binary unit that is exact: what :func:`parse_size` reads back."""
    for suffix in ("Gi", "Mi", "Ki"):
        if size and size % _BINARY[suffix] == 0:
            return f"{size // _BINARY[suffix]}{suffix}"
    return str(size)


def _split(text: str, what: str, forms: str) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise InvalidValueError(f"{what} {text[:_LONGEST]!r} is not a positive number with a unit: {forms}")
    return Decimal(match[1] + match[2]), match[3]


def _whole(value: Decimal) -> int:
    return int(value.to_integral_value(rounding=ROUND_CEILING))


def _bits_hint(text: str) -> str:
    bits = re.sub(r"(?i)(bps|b)(/s)?$", "bit", text)
    return f"{bits.lower()}, or eight times as much if you meant bytes"
