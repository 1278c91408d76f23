"""From a pod's annotations to its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits
from bpfrl.units import Rate, parse_size

Value = TypeVar("Value")

EGRESS: Final = "kubernetes.io/egress-bandwidth"
INGRESS: Final = "kubernetes.io/ingress-bandwidth"
BURST: Final = "bpfrl.io/burst"
RATE_LABEL: Final = "rate"


@dataclass(frozen=True, slots=True)
class Key(Generic[Value]):
    """A key of a pod's metadata that is read here.

    Attributes:
        kind: whether it is an annotation or a label.
        name: the key.
        parse: makes of the text what is meant, or raises InvalidValueError.
        example: a text that can be meant.
        meaning: what it says, for the reference.
    """

    kind: str
    name: str
    parse: Callable[[str], Value]
    example: str
    meaning: str

    def read(self, values: Mapping[str, str]) -> Value | None:
        """What a pod's annotations or labels say under this key, or None where they do not have it.

        Raises:
            InvalidValueError: the value cannot be meant; the text names the key.
        """
        text = values.get(self.name)
        if text is None:
            return None
        try:
            return self.parse(text)
        except InvalidValueError as error:
            raise InvalidValueError(f"{self.kind} {self.name}: {error}") from error


# The first two are what the kubelet and the CNI bandwidth plugin read too.
_EGRESS: Final = Key(
    "annotation", EGRESS, Rate.parse_quantity, "10M", "what the pod may send: bits per second, a Quantity from 1k to 1P"
)
_INGRESS: Final = Key("annotation", INGRESS, Rate.parse_quantity, "10M", "what the pod may receive, likewise")
_BURST: Final = Key(
    "annotation", BURST, parse_size, "64Ki", "what an idle pod may send or receive at once: bytes, a Quantity"
)
_RATE: Final = Key(
    "label", RATE_LABEL, Rate.parse_quantity, "1M", "the limit for each direction that has no annotation, likewise"
)
KEYS: Final[tuple[Key[Any], ...]] = (_EGRESS, _INGRESS, _BURST, _RATE)


def limits_of(annotations: Mapping[str, str], labels: Mapping[str, str]) -> Limits | None:
    """The limits that a pod asks for, or None if it asks for none.

    Raises:
        InvalidValueError: a value cannot be meant; the text names it.
    """
    both = _RATE.read(labels)
    egress = _EGRESS.read(annotations)
    ingress = _INGRESS.read(annotations)
    burst = _BURST.read(annotations)
    try:
        limits = Limits(egress or both, ingress or both, burst)
    except InvalidValueError as error:
        raise InvalidValueError(f"{_BURST.kind} {BURST}: {error}") from error
    return None if limits.unlimited else limits
