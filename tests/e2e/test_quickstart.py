"""The README's quick start, as a new user types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.lab import in_namespace, remove_cgroups, run
from bpfrl import cgroup

ROOT = Path(__file__).parents[2]
SECONDS = 120
PAUSE = "sleep 3\n"
# What fails is told, but for what is ended by timeout(1); nothing that was started stays.
TRAPS = """
trap 'test $? = 124 || echo "failed: $BASH_COMMAND"' ERR
trap 'trap - ERR; kill $(jobs -p) 2>&-' EXIT
"""
UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def quick_start() -> list[str]:
    _, _, rest = (ROOT / "README.md").read_text().partition("\n## Quick start\n")
    return blocks(rest.partition("\n## ")[0])


@contextmanager
def machine() -> Iterator[tuple[str, dict[str, str]]]:
    """A network namespace, and an environment with a bpffs and a part of the cgroup tree of its own."""
    tag = f"bpfrl-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=tag)))
        run("ip", "netns", "add", tag)
        undo.callback(run, "ip", "netns", "del", tag)
        run("ip", "-n", tag, "link", "set", "lo", "up")
        bpffs, pods = folder / "bpffs", cgroup.mount_point() / tag
        bpffs.mkdir()
        run("mount", "-t", "bpf", "bpf", str(bpffs))
        undo.callback(run, "umount", str(bpffs))
        pods.mkdir()
        undo.callback(remove_cgroups, pods)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        places = {"BPFRL_BPFFS": str(bpffs), "BPFRL_CGROUP_ROOT": str(pods)}
        yield tag, os.environ | places | {"PATH": path, "HOME": str(folder), "PWD": str(folder)}


def test_the_page_explains_the_commands_of_the_readme() -> None:
    assert blocks((ROOT / "docs" / "quickstart.md").read_text()) == quick_start()


def test_what_the_readme_says_works() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    install, *steps = quick_start()
    assert install.startswith("make demo\n")  # which is tested by itself
    with machine() as (namespace, environment):
        # Who reads and types takes some seconds a step.
        script = f"{TRAPS}\n{PAUSE.join(steps)}"
        done = subprocess.run(
            in_namespace(namespace, "bash", "-c", script),
            cwd=environment["HOME"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        left = os.listdir(environment["BPFRL_BPFFS"])
        cgroups = [path.name for path in Path(environment["BPFRL_CGROUP_ROOT"]).iterdir() if path.is_dir()]
    assert done.returncode == 0, done.stdout
    assert "failed:" not in done.stdout, done.stdout
    assert re.search(rf"^{UID}\s+shop/web\s+10mbit\s.*\s20mbit\s", done.stdout, re.MULTILINE)
    assert re.search(r"^verdict: limited", done.stdout, re.MULTILINE)
    limits = dict(
        re.findall(r'^bpfrl_pod_limit_bytes_per_second\{.*direction="(\w+)".*\} (\S+)$', done.stdout, re.MULTILINE)
    )
    assert {key: float(value) for key, value in limits.items()} == {"egress": 1.25e6, "ingress": 2.5e6}
    received = re.search(r"([\d.]+) Mbits/sec\s+receiver", done.stdout)
    assert received
    assert 8 < float(received[1]) < 10.5
    assert re.search(r"shop/web: BandwidthLimited: egress 50mbit", done.stdout)
    assert re.search(r"shop/web: BandwidthLimitInvalid: .*50m", done.stdout)
    assert not {name for name in left if not name.endswith(".debug")}
    assert cgroups == []
