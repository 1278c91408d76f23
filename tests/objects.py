"""Limiters' objects as other versions, other compilers, or nobody honest would have made them."""

from __future__ import annotations

from bpfrl.bpf import generator
from bpfrl.bpf.layout import IdentityData


def sealed(image: bytes) -> bytes:
    """An object that names the digest of what it is now, as its maker would have left it."""
    places, build = generator._measured(image)
    place = places.identity + IdentityData.build.offset
    return image[:place] + build + image[place + len(build) :]


def of_another_build(image: bytes, mark: int = 1) -> bytes:
    """The same programs, limits and pod, in an object of another build: with a byte behind, which nobody reads."""
    return sealed(image + bytes([mark]))
