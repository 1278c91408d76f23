"""An installation that comes with its programs compiled, as in the image, on a machine without any compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bpfrl
from bench.fleet import Daemon, wait_for
from bench.lab import Lab
from bpfrl.bpf import generator
from tests.kernel.conftest import SECONDS, cooperation, entries, items, until

RUN = "from bpfrl.cli import main; main()"
NODE, MASTER = "127.0.0.1:20902", "20902"


@pytest.fixture
def environment(bed: Lab, tmp_path: Path) -> dict[str, str]:
    """No PATH to speak of, no cache, and a copy of the package with what python -m bpfrl.bpf puts into it."""
    shutil.copytree(Path(bpfrl.__file__).parent, tmp_path / "site" / "bpfrl", ignore=shutil.ignore_patterns("compiled"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bpfrl.bpf"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    shipped = dict(line.split() for line in done.stdout.splitlines())
    assert set(shipped) == {"cooperate.bpf.c", "limiter.bpf.c", "sockets.bpf.c"}
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in shipped.values())
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "bin").mkdir()
    return environment | {
        "PATH": str(tmp_path / "bin"),
        "BPFRL_BPFFS": str(bed.bpffs),
        "BPFRL_CGROUP_ROOT": str(bed.cgroup_root),
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", RUN, *arguments]  # not what stands in this folder


def test_node_and_master_limit_a_pod_without_a_compiler(bed: Lab, environment: dict[str, str], tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    metadata = f"{{name: web, uid: {bed.pod_uid}, annotations: {{kubernetes.io/egress-bandwidth: 10M}}}}"
    (manifests / "web.yaml").write_text(f"kind: Pod\nmetadata: {metadata}\nstatus: {{hostIP: 127.0.0.1}}\n")
    node = Daemon(command("serve-node", "--insecure", "--listen", NODE), environment, tmp_path / "node.log")
    master = Daemon(
        command("serve-master", "--insecure", "--node-port", MASTER, "--manifests", str(manifests)),
        environment,
        tmp_path / "master.log",
    )
    try:
        node.start()
        wait_for(lambda: "serving on" in node.output(), SECONDS, node.output)
        master.start()
        wait_for(lambda: bool(items(bed)), SECONDS, lambda: node.output() + master.output())
        [item] = items(bed)
        assert (item["egress"]["limit_bits_per_second"], item["paced"]) == (10_000_000, "all")
        until(lambda: cooperation(bed.cgroup_root / "kubepods.slice") in entries(bed), what=node.output)
        assert "WARNING" not in node.output() + master.output()
    finally:
        for daemon in (master, node):
            daemon.kill()
    done = subprocess.run(command("detach", "--all"), env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not (tmp_path / "cache").exists()


def test_it_generates_the_very_object_that_this_compiler_makes(environment: dict[str, str], tmp_path: Path) -> None:
    line = command("generate", "--rate", "10mbit", "-o", str(tmp_path / "pod.o"))
    subprocess.run(line, env=environment, capture_output=True, check=True)
    assert generator.inspect((tmp_path / "pod.o").read_bytes()).build == generator.build()
