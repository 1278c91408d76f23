"""Without an API server: the pods come from a folder of manifests."""

from __future__ import annotations

import dataclasses
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from bench.fleet import NODE_PORT, Daemon, Fleet, Node, wait_for
from bench.lab import BPFRL, in_namespace
from tests.e2e.conftest import EGRESS, INGRESS, MBIT, SECONDS, Pod, await_acting, converge

BROKEN = "kind: Pod\nmetadata: [this is not closed\n"


@pytest.fixture(autouse=True)
def clean(bed: Fleet) -> Iterator[None]:
    """Whatever a test does, nothing of it is left."""
    first = len(bed.masters)
    yield
    for master in bed.masters[first:]:
        master.kill()
    for node in bed.nodes:
        node.daemon.start()
        if node.limiters():
            node.bpfrl("detach", "--all")
        for uid in [*node.pods]:
            node.end_pod(uid)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "manifests"
    made.mkdir()
    return made


def new_pod(node: Node, *, cgroup: bool = True) -> Pod:
    uid = str(uuid.uuid4())
    pod = Pod(f"pod-{uid[:8]}", uid, node, uid)
    if cgroup:
        pod.start()
    return pod


def manifest(pod: Pod, annotations: Mapping[str, str], host_ip: str | None = None) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod.name, "uid": pod.uid, "annotations": dict(annotations)},
            "status": {"hostIP": host_ip or pod.node.address},
        }
    )


def write(folder: Path, name: str, *documents: str) -> None:
    """Write a file as editors do: beside its place, and then into it."""
    scratch = folder / f".{name}.swp"
    scratch.write_text("---\n".join(documents))
    scratch.replace(folder / name)


def start(bed: Fleet, folder: Path, *options: str) -> Daemon:
    master = bed.master("--manifests", str(folder), *options)
    await_acting(master)
    return master


def logged(daemon: Daemon, text: str) -> None:
    wait_for(lambda: text in daemon.news(), SECONDS, lambda: f"no {text!r} in {daemon.news()}")


def test_files_come_change_and_go(bed: Fleet, folder: Path) -> None:
    start(bed, folder)
    one, two, three = (new_pod(bed.nodes[number]) for number in (0, 1, 1))
    converge(bed, {})
    write(folder, "one.yaml", manifest(one, {EGRESS: "10M"}))
    converge(bed, {one: (10 * MBIT, 0)})
    write(folder, "others.yml", manifest(two, {INGRESS: "20M"}), manifest(three, {EGRESS: "30M"}))
    converge(bed, {one: (10 * MBIT, 0), two: (0, 20 * MBIT), three: (30 * MBIT, 0)})
    programs = bed.nodes[0].programs()
    write(folder, "one.yaml", manifest(one, {EGRESS: "15M"}))
    converge(bed, {one: (15 * MBIT, 0), two: (0, 20 * MBIT), three: (30 * MBIT, 0)})
    assert bed.nodes[0].programs() == programs
    # In place, as nobody should.
    (folder / "one.yaml").write_text(manifest(one, {EGRESS: "16M"}))
    write(folder, "others.yml", manifest(three, {}))
    converge(bed, {one: (16 * MBIT, 0)})
    (folder / "one.yaml").unlink()
    converge(bed, {})


def test_what_is_there_when_the_master_starts(bed: Fleet, folder: Path) -> None:
    pods = [new_pod(node) for node in bed.nodes]
    for pod in pods:
        write(folder, f"{pod.name}.json", manifest(pod, {EGRESS: "10M"}))
    orphan = new_pod(bed.nodes[0])
    bed.nodes[0].bpfrl("attach", "--pod-uid", orphan.uid, "--rate", "77mbit")
    start(bed, folder)
    converge(bed, dict.fromkeys(pods, (10 * MBIT, 0)))


def test_a_pod_may_come_after_its_manifest(bed: Fleet, folder: Path) -> None:
    start(bed, folder)
    pod = new_pod(bed.nodes[2], cgroup=False)
    write(folder, "pod.yaml", manifest(pod, {EGRESS: "10M"}))
    logged(bed.nodes[2].daemon, f"no cgroup for pod {pod.uid}")
    converge(bed, {})
    pod.start()
    converge(bed, {pod: (10 * MBIT, 0)})


def test_a_broken_file_counts_as_it_did_before(bed: Fleet, folder: Path) -> None:
    master = start(bed, folder)
    one, two, three = (new_pod(bed.nodes[0]) for _ in range(3))
    write(folder, "one.yaml", manifest(one, {EGRESS: "10M"}))
    write(folder, "two.yaml", manifest(two, {EGRESS: "20M"}))
    converge(bed, {one: (10 * MBIT, 0), two: (20 * MBIT, 0)})
    write(folder, "one.yaml", BROKEN)
    logged(master, f"{folder}/one.yaml: no YAML")
    write(folder, "two.yaml", manifest(two, {EGRESS: "25M"}))
    write(folder, "three.yaml", manifest(three, {EGRESS: "30M"}))
    converge(bed, {one: (10 * MBIT, 0), two: (25 * MBIT, 0), three: (30 * MBIT, 0)})
    (folder / "two.yaml").unlink()
    converge(bed, {one: (10 * MBIT, 0), three: (30 * MBIT, 0)})
    write(folder, "one.yaml", manifest(one, {EGRESS: "11M"}))
    converge(bed, {one: (11 * MBIT, 0), three: (30 * MBIT, 0)})
    write(folder, "one.yaml", BROKEN)
    (folder / "one.yaml").unlink()
    converge(bed, {three: (30 * MBIT, 0)})


def test_a_value_that_cannot_be_meant_leaves_the_last_good_limit(bed: Fleet, folder: Path) -> None:
    master = start(bed, folder)
    pod, other = (new_pod(bed.nodes[0]) for _ in range(2))
    write(folder, "pods.yaml", manifest(pod, {EGRESS: "10M"}), manifest(other, {EGRESS: "10M"}))
    converge(bed, {pod: (10 * MBIT, 0), other: (10 * MBIT, 0)})
    write(folder, "pods.yaml", manifest(pod, {EGRESS: "fast"}), manifest(other, {EGRESS: "20M"}))
    logged(master, "BandwidthLimitInvalid")
    converge(bed, {pod: (10 * MBIT, 0), other: (20 * MBIT, 0)})


def test_a_master_that_has_never_read_a_file_takes_nothing_away(bed: Fleet, folder: Path) -> None:
    master = start(bed, folder, "--resync", "1")
    one, two = (new_pod(bed.nodes[0]) for _ in range(2))
    write(folder, "one.yaml", manifest(one, {EGRESS: "10M"}))
    write(folder, "two.yaml", manifest(two, {EGRESS: "20M"}))
    converge(bed, {one: (10 * MBIT, 0), two: (20 * MBIT, 0)})
    master.kill()
    write(folder, "one.yaml", BROKEN)
    write(folder, "two.yaml", manifest(two, {EGRESS: "25M"}))
    master.start()
    # Several times it finds what it cannot explain: the limiter of the file that it cannot read.
    for _ in range(2):
        converge(bed, {one: (10 * MBIT, 0), two: (25 * MBIT, 0)})
        bed.nodes[0].bpfrl("detach", "--pod-uid", two.uid)
    converge(bed, {one: (10 * MBIT, 0), two: (25 * MBIT, 0)})
    # What it can explain it may take away.
    write(folder, "two.yaml", manifest(two, {}))
    converge(bed, {one: (10 * MBIT, 0)})
    # Now that everything is readable, nothing mentions the first pod.
    write(folder, "one.yaml", manifest(new_pod(bed.nodes[1]), {}))
    converge(bed, {})


def test_one_machine_without_tls(bed: Fleet, folder: Path) -> None:
    ordinary = bed.nodes[0]
    assert ordinary.daemon.stop() == 0
    listen = ("--insecure", "--listen", f"127.0.0.1:{NODE_PORT}")
    daemon = Daemon(
        in_namespace(bed.tag, BPFRL, "serve-node", *listen), ordinary.daemon.environment, bed.folder / "insecure.log"
    )
    node = dataclasses.replace(ordinary, daemon=daemon)
    daemon.start()
    try:
        wait_for(node.serves, SECONDS, daemon.news)
        # Fleet.master gives certificates.
        command = in_namespace(bed.tag, BPFRL, "serve-master", "--insecure", "--manifests", str(folder))
        master = Daemon(command, ordinary.daemon.environment, bed.folder / "insecure-master.log")
        bed.masters.append(master)
        master.start()
        await_acting(master)
        here, beyond = new_pod(ordinary), new_pod(bed.nodes[1])
        write(folder, "beyond.yaml", manifest(beyond, {EGRESS: "10M"}))
        text = manifest(here, {EGRESS: "10M"}, host_ip="127.0.0.1")
        write(folder, "here.yaml", text)
        converge(bed, {here: (10 * MBIT, 0)})
        logged(master, f"node {beyond.node.address}:{NODE_PORT}: no TLS (--insecure) beyond loopback")
        document = yaml.safe_load(text)
        del document["status"]
        document["metadata"]["annotations"][EGRESS] = "20M"
        write(folder, "here.yaml", yaml.safe_dump(document))
        converge(bed, {here: (20 * MBIT, 0)})
        assert master.stop() == 0
        assert daemon.stop() == 0
        converge(bed, {here: (20 * MBIT, 0)})
    finally:
        daemon.kill()


@pytest.mark.parametrize("address", ["0.0.0.0:10003", "10.78.0.10:10003", ":10003", "[::]:10003"])
def test_no_node_listens_beyond_loopback_without_tls(bed: Fleet, address: str) -> None:
    command = [BPFRL, "serve-node", "--insecure", "--listen", address]
    result = subprocess.run(
        in_namespace(bed.nodes[0].namespace, *command),
        env=bed.nodes[0].daemon.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 2
    assert "--insecure is for loopback only" in result.stderr
    assert result.stdout == ""
