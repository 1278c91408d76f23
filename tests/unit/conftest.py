"""Unit tests touch nothing of the machine: no kernel, no network, no cache but their own."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from bpfrl.bpf import generator
from bpfrl.rpc import authority
from tests import fuzzing

# Nothing is left beside the sources; no run differs from the last; and how long a call takes says most about the
# machine's other work.
set_hypothesis_home_dir(Path(__file__).parents[2] / ".cache" / "hypothesis")
settings.register_profile(
    "unit", database=None, deadline=None, derandomize=not fuzzing.ROUND, max_examples=1_000 if fuzzing.ROUND else 100
)
settings.load_profile("unit")


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this run's own, in which each program is compiled once, and none of the operator's settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # What make objects may have left in this checkout is not what is tested.
        patch.setattr(generator, "_SHIPPED", "compiled-for-tests")
        for name in ("BPFRL_BPFFS", "BPFRL_CGROUP_ROOT", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
            patch.delenv(name, raising=False)
        forget_programs()
        yield
    forget_programs()


@pytest.fixture
def logs() -> Iterator[None]:
    """The command sets up logging for its process; a test that runs it in this one puts that back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def forget_programs() -> None:
    """What another process would know of the programs: nothing."""
    generator.compile_object.cache_clear()
    generator._template.cache_clear()


def make(folder: Path) -> Path:
    """A folder, with those above it."""
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, made once."""
    folder = tmp_path_factory.mktemp("certs")
    authority.init(folder, 30)
    return folder


@pytest.fixture
def pki(made: Path, tmp_path: Path) -> Path:
    """An authority of this test's own."""
    shutil.copytree(made, tmp_path / "pki")
    return tmp_path / "pki"
