"""Files and folders of our own under an umask that would open them to everybody."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfrl import files
from bpfrl.bpf import generator
from bpfrl.rpc import authority


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_its_owners_and_nobody_else_writes_above_it(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "one" / "two" / "own")
    assert mode(tmp_path / "one" / "two" / "own") == 0o700
    assert (mode(tmp_path / "one"), mode(tmp_path / "one" / "two")) == (0o755, 0o755)
    files.make_folder(tmp_path / "one" / "two" / "own")


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o750)
    files.make_folder(tmp_path / "own")
    assert mode(tmp_path / "own") == 0o750


def test_a_file_has_its_mode_and_takes_the_place_of_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"theirs")
    (tmp_path / "own").symlink_to(other)
    files.write(tmp_path / "own", b"ours")
    assert (mode(tmp_path / "own"), (tmp_path / "own").read_bytes()) == (0o600, b"ours")
    assert other.read_bytes() == b"theirs"
    files.write(tmp_path / "public", b"", 0o644)
    assert mode(tmp_path / "public") == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own", "public"]


def test_certificates_are_nobody_elses_to_change_and_keys_nobody_elses_to_read(tmp_path: Path) -> None:
    authority.init(tmp_path / "etc" / "certs", 30)
    found = [tmp_path / "etc", *(tmp_path / "etc").rglob("*")]
    assert not [path for path in found if mode(path) & 0o022]
    keys = [path for path in found if path.suffix == ".key"]
    assert keys
    assert not [path for path in keys if mode(path) & 0o077]


def test_what_was_compiled_is_nobody_elses_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the kernel as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    generator._keep(generator._cache_folder() / "program.o", b"program")
    [kept] = (tmp_path / "home" / "cache" / "bpfrl").iterdir()
    assert generator._kept(kept) == b"program"
    assert not [path for path in (kept, *kept.parents) if tmp_path in path.parents and mode(path) & 0o022]
    for others in (0o620, 0o602):
        kept.chmod(others)
        assert generator._kept(kept) is None
