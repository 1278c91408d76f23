"""The doctor on a real machine: it finds this one sound, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.lab import BPFRL, Lab
from bpfrl import cgroup
from bpfrl.bpf import libbpf, probe
from bpfrl.errors import KernelError, VerifierError
from tests.kernel.conftest import attached_to, bpftool, entries, until
from tests.measuring import unmeasured


def doctor(bed: Lab, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bed.bpfrl("doctor", "-o", "json", *options, check=False).stdout)
    return found


def left() -> list[Any]:
    """What the kernel has under a probe's name, as bpftool sees it, and the cgroups of probes."""
    things = (*(bpftool("prog", "show") or []), *(bpftool("map", "show") or []))
    return [each for each in things if each.get("name") == probe.NAME] + [*cgroup.mount_point().glob("bpfrl-probe-*")]


def test_this_machine_is_sound(bed: Lab) -> None:
    found = doctor(bed)
    assert found["ok"] is True, found
    rows = {check["name"]: check for check in found["checks"]}
    assert rows["pods"]["found"] == [f"{bed.cgroup_root}/kubepods.slice, systemd driver", "1 pod"]
    assert rows["bpffs"]["found"] == [f"{bed.bpffs}, writable"]
    assert all(check["mark"] in ("ok", "warning") for check in found["checks"])
    assert bed.bpfrl("doctor").stdout.count("\n") > len(rows)


@pytest.mark.parametrize("feature", probe.FEATURES, ids=lambda feature: feature.name)
def test_a_probe_leaves_nothing_behind(feature: probe.Feature) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    descriptors = len(os.listdir("/proc/self/fd"))
    namespace = Path("/proc/self/ns/net").readlink()
    feature.probe()
    # Fewer are none of its doing: channels of earlier tests close some time later.
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert Path("/proc/self/ns/net").readlink() == namespace
    # The kernel lets go of a program's maps a moment after the program.
    until(lambda: not left(), what=left)


def test_the_doctor_leaves_nothing_behind(bed: Lab) -> None:
    pins, programs = entries(bed), attached_to(cgroup.mount_point())
    doctor(bed)
    until(lambda: not left(), what=left)
    assert entries(bed) == pins
    assert attached_to(cgroup.mount_point()) == programs


def test_what_a_kernel_does_not_know_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of probe fails where the kernel lacks what it tries: a helper, an option, or an iterator."""
    if os.geteuid():
        pytest.skip("needs root")
    monkeypatch.setattr(probe, "_CB_FLAGS", 999_999)
    with pytest.raises(KernelError, match="an iterator cannot set the option: Invalid argument"):
        probe._callback_flags()
    monkeypatch.setattr(probe, "_WINDOW_CLAMP", 999_999)
    with pytest.raises(KernelError, match="a program on a cgroup cannot set the option: Invalid argument"):
        probe._window_clamp()
    monkeypatch.setattr(probe, "_LISTEN", "raise SystemExit(1)")
    with pytest.raises(probe.UntriedError, match="no process can be put into a cgroup"):
        probe._window_clamp()
    assert not list(cgroup.mount_point().glob(f"bpfrl-probe-{os.getpid()}"))
    monkeypatch.setattr(probe, "_RESERVE_OPTION", 999_999)
    with pytest.raises(VerifierError, match=r"the kernel refuses the BPF programs: .*invalid func"):
        probe._header_options()
    monkeypatch.setattr(probe, "_DROP_AND_SIGNAL", 7)
    with pytest.raises(VerifierError, match="R0"):
        probe._egress()
    with pytest.raises(KernelError, match="cannot find the iterator over nothing"):
        libbpf.load("bpfrl_probe", libbpf.ProgramType.TRACING, b"", libbpf.AttachType.TRACE_ITER, "nothing")


def test_nobody_is_told_what_is_missing(bed: Lab) -> None:
    environment = unmeasured() | {
        "BPFRL_BPFFS": str(bed.bpffs),
        "BPFRL_CGROUP_ROOT": str(bed.cgroup_root),
        "HOME": "/nonexistent",
    }
    command = [sys.executable, BPFRL, "doctor", "-o", "json"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    rows = {check["name"]: check for check in found["checks"]}
    assert found["ok"] is False
    assert "CAP_SYS_ADMIN" in rows["privileges"]["found"][0]
    for feature in probe.FEATURES:
        row = rows[feature.name]
        assert row["mark"] == ("missing" if feature.needed else "warning")
        assert row["found"][0].startswith("not tried: ")
        assert row["advice"] == "run bpfrl as root"
