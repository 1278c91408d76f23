"""From a pod's annotations to its limits.

kubernetes.io/egress-bandwidth    a Quantity, bit/s: what the kubelet and the CNI bandwidth plugin read too
kubernetes.io/ingress-bandwidth   likewise
bpfrl.io/burst                    a Quantity, byte
label rate                        a Quantity, bit/s: each direction that has no annotation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from bpfrl.errors import InvalidValueError
from bpfrl.limits import Limits
from bpfrl.units import Rate, parse_size

Value = TypeVar("Value")

EGRESS: Final = "kubernetes.io/egress-bandwidth"
INGRESS: Final = "kubernetes.io/ingress-bandwidth"
BURST: Final = "bpfrl.io/burst"
RATE_LABEL: Final = "rate"


def limits_of(annotations: Mapping[str, str], labels: Mapping[str, str]) -> Limits | None:
    """The limits that a pod asks for, or None if it asks for none.

    Raises:
        InvalidValueError: a value cannot be meant; the text names it.
    """
    both = _read(labels, RATE_LABEL, Rate.parse_quantity, "label")
    egress = _read(annotations, EGRESS, Rate.parse_quantity, "annotation")
    ingress = _read(annotations, INGRESS, Rate.parse_quantity, "annotation")
    burst = _read(annotations, BURST, parse_size, "annotation")
    try:
        limits = Limits(egress or both, ingress or both, burst)
    except InvalidValueError as error:
        raise InvalidValueError(f"annotation {BURST}: {error}") from error
    return None if limits.unlimited else limits


def _read(values: Mapping[str, str], key: str, parse: Callable[[str], Value], kind: str) -> Value | None:
    text = values.get(key)
    if text is None:
        return None
    try:
        return parse(text)
    except InvalidValueError as error:
        raise InvalidValueError(f"{kind} {key}: {error}") from error
