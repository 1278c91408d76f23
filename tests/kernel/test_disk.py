"""A disk without room: what was there before is whole, what is wanted is said in one line, and limits need none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import BPFRL, Lab, run
from tests.kernel.conftest import attached, only


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root")
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path))
    yield tmp_path
    run("umount", str(tmp_path))


def fill(disk: Path) -> Path:
    """Leave no room."""
    file = disk / "full"
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(bytes(2**20))
    return file


def bpfrl(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [BPFRL, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_certificates_that_cannot_be_renewed_stay(disk: Path) -> None:
    certs = disk / "certs"
    assert bpfrl("certs", "init", str(certs))[0] == 0
    before, full = content(certs), fill(disk)
    code, said = bpfrl("certs", "init", "--renew", str(certs))
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith(f"bpfrl: {certs}/")
    assert said.endswith(": No space left on device\n")
    assert content(certs) == before
    full.unlink()
    assert bpfrl("certs", "init", "--renew", str(certs))[0] == 0
    assert content(certs).keys() == before.keys()


def test_an_object_is_written_whole_or_not_at_all(disk: Path) -> None:
    full, target = fill(disk), disk / "pod.o"
    assert bpfrl("generate", "--rate", "1mbit", "-o", str(target)) == (
        1,
        f"bpfrl: {target}: No space left on device\n",
    )
    assert not target.exists()
    full.unlink()
    assert bpfrl("generate", "--rate", "1mbit", "-o", str(target))[0] == 0


def test_a_limit_needs_no_room_for_the_compile_cache(bed: Lab, disk: Path) -> None:
    fill(disk)
    places = {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    code, said = bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit", XDG_CACHE_HOME=str(disk), **places)
    assert code == 0, said
    assert "no compile cache in" in said
    assert len(attached(bed)) == 3
    assert "error" not in only(bed)
