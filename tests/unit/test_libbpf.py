from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfrl.bpf import libbpf
from bpfrl.errors import KernelError


@pytest.fixture
def without_libbpf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a machine is like where nothing has brought it, or only within another library."""
    libbpf._lib.cache_clear()
    monkeypatch.setattr(libbpf, "_LIBRARY", "libbpf.so.none")
    yield
    libbpf._lib.cache_clear()


@pytest.mark.usefixtures("without_libbpf")
def test_bccs_library_has_it_too() -> None:
    assert libbpf.version().startswith("v")
    assert libbpf._library()._name.startswith("libbcc")


def test_bcc_and_its_compiler_are_not_loaded_where_libbpf_is() -> None:
    script = (
        "import sys; from pathlib import Path; from bpfrl.bpf import libbpf; libbpf.version();"
        " sys.exit('bcc' in sys.modules or 'LLVM' in Path('/proc/self/maps').read_text())"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.usefixtures("without_libbpf")
def test_without_bcc_either_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(KernelError, match=r"^libbpf is missing: apt-get install python3-bpfcc, and make the"):
        libbpf.open_pinned(tmp_path)
