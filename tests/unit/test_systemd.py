"""The systemd units, as systemd reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bpfrl.cli import cli
from tools.manifests import objects

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
units = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
INSTALLED = "/opt/bpfrl/bin/bpfrl"


@pytest.fixture(autouse=True)
def systemd() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")


def settings(unit: Path) -> dict[str, list[str]]:
    """What a unit says of its service; a setting may stand there several times."""
    found: dict[str, list[str]] = {}
    lines = unit.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_there_is_one_for_each_daemon() -> None:
    assert [unit.stem for unit in UNITS] == ["bpfrl-master", "bpfrl-node"]


@units
def test_systemd_has_nothing_to_say_of_it(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    assert INSTALLED in text
    copy = tmp_path / unit.name
    # That it is installed where the unit says is not to be asked of the machine that tests it.
    copy.write_text(text.replace(INSTALLED, str(Path(sys.executable).with_name("bpfrl"))))
    done = analyze("verify", "--man=no", "--recursive-errors=one", copy)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_have_something_to_say(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.service"
    wrong.write_text(UNITS[0].read_text().replace(INSTALLED, "/bin/true").replace("ProtectSystem=", "ProtectSysten="))
    done = analyze("verify", "--man=no", "--recursive-errors=one", wrong)
    assert "ProtectSysten" in done.stderr


@pytest.mark.parametrize(("unit", "most"), [*zip(UNITS, (1.5, 3.2), strict=True)], ids=lambda each: str(each)[-20:])
def test_it_is_exposed_to_little(unit: Path, most: float) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={round(most * 10)}", unit)
    assert done.returncode == 0, done.stdout


@units
def test_it_starts_a_command_that_there_is(unit: Path) -> None:
    [line] = settings(unit)["ExecStart"]
    program, command, options = line.split()
    assert (program, options) == (INSTALLED, "$OPTIONS")
    assert command in cli.commands
    assert command == unit.stem.replace("bpfrl-", "serve-")


def test_the_node_may_do_what_the_daemonset_may() -> None:
    [spec] = [each["spec"]["template"]["spec"] for each in objects() if each["kind"] == "DaemonSet"]
    wanted = spec["containers"][0]["securityContext"]["capabilities"]["add"]
    [found] = settings(UNITS[1])["CapabilityBoundingSet"]
    assert found.split() == [f"CAP_{name}" for name in wanted]
    assert settings(UNITS[0])["CapabilityBoundingSet"] == [""]


def test_pins_land_in_the_machines_own_bpffs() -> None:
    """Settings that would hide it, close it for good, or give the unit users of its own, are not there."""
    own = settings(UNITS[1])
    assert "/sys" in own["ReadOnlyPaths"][0].split()
    assert own["ReadWritePaths"] == ["/sys/fs/bpf"]
    assert "/sys" not in own["InaccessiblePaths"][0]
    hiding = {"RootDirectory", "RootImage", "TemporaryFileSystem", "ProtectKernelTunables"}
    assert not (hiding | {"PrivateUsers", "PrivateNetwork"}) & own.keys()
    assert "RequiresMountsFor=/sys/fs/bpf" in UNITS[1].read_text().splitlines()


def test_the_masters_user_is_made() -> None:
    [user] = settings(UNITS[0])["User"]
    text = UNITS[0].with_name("bpfrl.sysusers").read_text()
    assert [line.split()[:2] for line in text.splitlines() if not line.startswith("#")] == [["u", user]]
