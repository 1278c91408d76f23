"""The page about kernels says what their runs have left, and that is what a release needs."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from bpfrl.bpf import probe
from tests.kernels import page
from tests.kernels.debian import SUITES, Kernel
from tests.kernels.page import Run

RUNS = page.load()
SECONDS = 600


def test_the_page_is_what_the_results_say() -> None:
    assert page.PAGE.read_text() == page.text(RUNS), "python -m tests.kernels.page writes it"


def test_every_suite_has_been_run() -> None:
    assert [run.suite for run in RUNS] == list(SUITES)


@pytest.mark.parametrize("run", RUNS, ids=[run.suite for run in RUNS])
def test_a_kernel_passes_everything_in_time_and_has_all_that_is_needed(run: Run) -> None:
    assert run.tests
    assert set(run.tests.values()) == {"passed"}
    assert run.seconds < SECONDS
    found = run.found
    assert {feature.name for feature in probe.FEATURES} <= set(found), "features have changed: make kernels"
    assert all(found[feature.name] == "ok" for feature in probe.FEATURES if feature.needed)


@pytest.mark.parametrize("run", RUNS, ids=[run.suite for run in RUNS])
def test_a_feature_is_where_its_version_says(run: Run) -> None:
    """Vendors may bring features to older kernels, Debian's does not; and none may be missing from a newer one."""
    for feature in probe.FEATURES:
        newer = (probe.version_of(run.release) or ()) >= (probe.version_of(feature.since) or ())
        assert (run.found[feature.name] == "ok") == newer, feature.name


def test_a_kernel_without_figures_has_gaps_and_no_errors() -> None:
    text = page.text([Run("sid", "linux 9", "9.9.9-amd64", 1.0, {"test_a": "failed"})])
    assert "0 of 1 passed" in text
    assert "| TCP out, goodput | - |" in text


def test_modules_come_after_those_that_they_need_and_once(tmp_path: Path) -> None:
    def module(name: str, needs: str) -> bytes:
        return f"ELF\0name={name}\0depends={needs}\0".encode()

    (tmp_path / "virtio_pci.ko").write_bytes(module("virtio_pci", "virtio,virtio_ring"))
    (tmp_path / "virtio-ring.ko.xz").write_bytes(lzma.compress(module("virtio_ring", "")))
    (tmp_path / "virtio.ko").write_bytes(module("virtio", "virtio-ring"))
    found = Kernel("sid", "", tmp_path, tmp_path).modules_for(("virtio_pci", "virtio", "built_in"))
    assert found == [
        module("virtio_ring", ""),
        module("virtio", "virtio-ring"),
        module("virtio_pci", "virtio,virtio_ring"),
    ]
