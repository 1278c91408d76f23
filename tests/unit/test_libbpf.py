from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfrl.bpf import libbpf
from bpfrl.errors import KernelError


@pytest.fixture
def without_bcc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an environment is like that was not made from Debian's interpreter."""
    libbpf._lib.cache_clear()
    monkeypatch.setitem(sys.modules, "bcc", None)
    yield
    libbpf._lib.cache_clear()


@pytest.mark.usefixtures("without_bcc")
def test_without_bcc_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"^python3-bpfcc is missing: apt-get install python3-bpfcc, and make the"):
        libbpf.open_pinned(tmp_path)
