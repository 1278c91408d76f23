"""What the node's daemon tells over HTTP, beside what the kernel and other tools say of the same."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.fleet import Daemon, wait_for
from bench.lab import BPFRL, Lab, run
from bpfrl.bpf import generator
from bpfrl.errors import RefusedError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.rpc.client import NodeClient
from bpfrl.units import Rate
from tests.kernel.conftest import bpftool, items, limit, only, until

log = logging.getLogger(__name__)

SECONDS = 30.0
# linux/bpf.h, and asm/unistd.h
BPF_ENABLE_STATS, SYS_BPF = 32, {"x86_64": 321, "aarch64": 280}
MANY = 110
DIRECTIONS = ("egress", "ingress")
COUNTED = ("passed_packets", "passed_bytes", "dropped_packets", "dropped_bytes")
Key = tuple[tuple[str, str], ...]


class Scraped:
    """What one scrape has told."""

    def __init__(self, text: str) -> None:
        self._found: dict[str, dict[Key, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value

    def get(self, name: str, **labels: str) -> float | None:
        return self._found.get(f"bpfrl_{name}", {}).get(tuple(sorted(labels.items())))

    def count(self, name: str) -> int:
        return len(self._found.get(f"bpfrl_{name}", {}))

    def sum(self, name: str) -> float:
        return sum(self._found.get(f"bpfrl_{name}", {}).values())


class Watched:
    """A node's daemon, and its port for people."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        [self.port] = re.findall(r"metrics on \S+ \(port (\d+)\)", daemon.news())
        [self.rpc_port] = re.findall(r"serving on \S+ \(port (\d+)\)", daemon.news())

    def get(self, path: str, seconds: float = SECONDS) -> tuple[int, str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=seconds) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def scrape(self) -> Scraped:
        status, text = self.get("/metrics")
        assert status == 200
        return Scraped(text)


@pytest.fixture
def watch(bed: Lab, tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Starts the daemon, with options of the test's own."""
    started: list[Daemon] = []

    def start(*options: str) -> Watched:
        environment = os.environ | {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
        command = [BPFRL, "serve-node", "--insecure", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *options]
        daemon = Daemon(command, environment, tmp_path / f"node-{len(started)}.log")
        started.append(daemon)
        daemon.start()
        wait_for(lambda: "serving on" in daemon.news(), SECONDS, daemon.output)
        return Watched(daemon)

    yield start
    for daemon in started:
        daemon.kill()


def traffic(bed: Lab) -> None:
    """More datagrams than the limit lets through, both ways."""
    bed.iperf3("-u", "-b", "20M", "-t", "1")
    bed.iperf3("-u", "-b", "20M", "-t", "1", to_pod=True)


def pod_labels(item: dict[str, Any], direction: str) -> dict[str, str]:
    return {"uid": item["uid"], "direction": direction, "namespace": item["namespace"], "pod": item["name"]}


def told_of(scraped: Scraped, item: dict[str, Any], direction: str) -> dict[str, float | None]:
    """What a scrape tells of a pod's direction, named as bpfrl list names it."""
    labels = pod_labels(item, direction)
    return {name: scraped.get(f"pod_{name}_total", **labels) for name in COUNTED}


def test_metrics_are_what_list_says(bed: Lab, watch: Callable[..., Watched]) -> None:
    limit(bed, "--rate", "10mbit", "--pod-name", "shop/cart-0")
    watched = watch()
    traffic(bed)
    item, scraped = only(bed), watched.scrape()
    for direction in DIRECTIONS:
        assert told_of(scraped, item, direction) == {name: item[direction][name] for name in COUNTED}
        assert item[direction]["dropped_packets"] > 0
        limit_now = scraped.get("pod_limit_bytes_per_second", **pod_labels(item, direction))
        assert limit_now == item[direction]["limit_bits_per_second"] / 8 == 1_250_000
    assert scraped.get("limiters", state="ok") == 1
    limit(bed, "--rate", "20mbit")
    assert watched.scrape().get("pod_limit_bytes_per_second", **pod_labels(item, "egress")) == 2_500_000


def test_the_nodes_own_sums_keep_what_ended_pods_had(bed: Lab, watch: Callable[..., Watched]) -> None:
    limit(bed, "--rate", "10mbit")
    traffic(bed)
    watched = watch()
    # What was before it is not this process's.
    assert watched.scrape().sum("passed_packets_total") == 0
    before = only(bed)
    traffic(bed)
    after, scraped = only(bed), watched.scrape()
    sums = {}
    for direction in DIRECTIONS:
        for name in COUNTED:
            sums[direction, name] = scraped.get(f"{name}_total", direction=direction)
            assert sums[direction, name] == after[direction][name] - before[direction][name]
            assert sums[direction, name]
    bed.bpfrl("detach", "--all")
    scraped = watched.scrape()
    assert scraped.get("limiters", state="ok") == 0
    assert scraped.count("pod_passed_bytes_total") == 0
    assert {key: scraped.get(f"{key[1]}_total", direction=key[0]) for key in sums} == sums
    limit(bed, "--rate", "10mbit")
    traffic(bed)
    item, scraped = only(bed), watched.scrape()
    for (direction, name), so_far in sums.items():
        assert so_far is not None
        assert scraped.get(f"{name}_total", direction=direction) == so_far + item[direction][name]


def test_names_and_pods_may_be_left_out(bed: Lab, watch: Callable[..., Watched]) -> None:
    limit(bed, "--egress", "10mbit", "--pod-name", "shop/cart-0")
    nameless = watch("--no-pod-labels").scrape()
    assert nameless.get("pod_limit_bytes_per_second", uid=bed.pod_uid, direction="egress") == 1_250_000
    assert nameless.count("pod_limit_bytes_per_second") == 1
    none = watch("--max-pods-in-metrics", "0").scrape()
    assert none.count("pod_limit_bytes_per_second") == 0
    assert none.get("pods_left_out") == 1
    assert none.get("limiters", state="ok") == 1


# What the programs cost.


@contextmanager
def counting_cost() -> Iterator[None]:
    """The kernel counts what all programs cost while this lasts, as bpf(BPF_ENABLE_STATS) has it do."""
    attributes = ctypes.create_string_buffer(16)  # BPF_STATS_RUN_TIME is 0
    number = ctypes.CDLL(None, use_errno=True).syscall(
        SYS_BPF[os.uname().machine], BPF_ENABLE_STATS, attributes, len(attributes)
    )
    assert number >= 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.close(number)


def test_programs_cost_what_bpftool_says(bed: Lab, watch: Callable[..., Watched]) -> None:
    watched = watch()
    limit(bed, "--rate", "10mbit")
    assert watched.scrape().sum("program_runs_total") == 0
    with counting_cost():
        traffic(bed)
    scraped = watched.scrape()
    for program in ("egress", "ingress", "sockops"):
        shown = bpftool("prog", "show", "pinned", str(bed.bpffs / bed.pod_uid / program))
        assert scraped.get("program_runs_total", program=program) == shown["run_cnt"] > 0
        spent = scraped.get("program_run_seconds_total", program=program)
        assert spent == pytest.approx(shown["run_time_ns"] / 1e9)
        assert 10e-9 < spent / shown["run_cnt"] < 1e-4
    [cooperation] = bed.bpffs.glob("cooperation-*")
    shown = bpftool("prog", "show", "pinned", str(cooperation / "program"))
    assert scraped.get("program_runs_total", program="cooperate") == shown["run_cnt"]
    # What is gone stays in the sum.
    runs = scraped.get("program_runs_total", program="egress")
    bed.bpfrl("detach", "--all")
    assert watched.scrape().get("program_runs_total", program="egress") == runs


# Calls.


def test_calls_are_counted_by_what_came_of_them(bed: Lab, watch: Callable[..., Watched]) -> None:
    watched = watch()

    async def calls() -> None:
        client = NodeClient("127.0.0.1", int(watched.rpc_port), None)
        pod, build = PodRef(bed.pod_uid), generator.build()
        slow, fast = Limits(Rate(10**6)), Limits(Rate(10**7))
        await client.attach(pod, slow, generator.generate(pod, slow), build)
        await client.attach(pod, slow, generator.generate(pod, slow), build)
        await client.update(pod.uid, fast)
        absent = PodRef(str(uuid.uuid4()))
        with pytest.raises(RefusedError, match="no cgroup"):
            await client.attach(absent, slow, generator.generate(absent, slow), build)
        # Waiting for a pod to start is not part of how long attaching takes.
        late = PodRef(str(uuid.uuid4()))
        waits = asyncio.create_task(client.attach(late, slow, generator.generate(late, slow), build, 20))
        await asyncio.sleep(2)
        (bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{late.uid.replace('-', '_')}.slice").mkdir()
        await waits
        await client.detach(pod.uid)
        await client.detach(pod.uid)
        await client.list()
        await client.close()

    asyncio.run(asyncio.wait_for(calls(), SECONDS))
    scraped = watched.scrape()
    for operation, result, count in (
        ("attach", "attached", 2),
        ("attach", "unchanged", 1),
        ("attach", "NOT_FOUND", 1),
        ("update", "updated", 1),
        ("detach", "detached", 1),
        ("detach", "absent", 1),
        ("list", "OK", 1),
    ):
        labels = {"operation": operation, "result": result}
        assert scraped.get("operation_duration_seconds_count", **labels) == count
        assert 0 < (scraped.get("operation_duration_seconds_sum", **labels) or 0) < 1.5
    assert scraped.count("operation_duration_seconds_count") == 7


def test_what_is_swept_is_counted(bed: Lab, watch: Callable[..., Watched]) -> None:
    limit(bed, "--rate", "10mbit")
    (bed.pod_cgroup / "container").rmdir()
    bed.pod_cgroup.rmdir()
    watched = watch()
    until(lambda: watched.scrape().get("sweeps_total", result="ok"), SECONDS)
    until(lambda: not items(bed) or watched.daemon.output(), SECONDS)
    assert watched.scrape().get("sweeps_total", result="failed") == 0


# Readiness.


def test_a_node_without_its_bpffs_is_not_ready_but_lives(bed: Lab, watch: Callable[..., Watched]) -> None:
    watched = watch()
    assert watched.get("/readyz") == (200, "ok\n")
    # It has begun to tend its limiters, which does not take long.
    until(lambda: subprocess.run(["umount", bed.bpffs], capture_output=True, check=False).returncode == 0, SECONDS)
    try:
        assert watched.get("/readyz") == (503, f"no BPF file system on {bed.bpffs}\n")
        assert watched.get("/livez") == (200, "ok\n")
        assert watched.scrape().get("limiters", state="ok") == 0
    finally:
        run("mount", "-t", "bpf", "bpf", str(bed.bpffs))
    assert watched.get("/readyz") == (200, "ok\n")


def test_who_holds_the_bpffs_holds_no_scrape_for_long(bed: Lab, watch: Callable[..., Watched]) -> None:
    limit(bed, "--rate", "10mbit")
    watched = watch()
    watched.scrape()
    held = os.open(bed.bpffs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = time.monotonic()
        scraped = watched.scrape()
        # Prometheus gives a scrape ten seconds.
        assert time.monotonic() - begun < 9
        assert scraped.get("limiters_read_success") == 0
        assert scraped.count("pod_passed_bytes_total") == 0
        assert scraped.count("passed_bytes_total") == 2
        begun = time.monotonic()
        assert watched.get("/livez", 2) == (200, "ok\n")
        assert watched.get("/readyz", 2) == (200, "ok\n")
        assert time.monotonic() - begun < 2
    finally:
        os.close(held)
    until(lambda: watched.scrape().get("limiters_read_success"), SECONDS)
    assert watched.scrape().count("pod_passed_bytes_total") == 2


def test_an_address_in_use_is_one_line_before_anything_is_touched(
    bed: Lab, watch: Callable[..., Watched], tmp_path: Path
) -> None:
    taken = f"127.0.0.1:{watch().port}"
    command = [BPFRL, "--bpffs", str(tmp_path), "serve-node", "--insecure", "--listen", "127.0.0.1:0", "--http", taken]
    environment = os.environ | {"BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    before = os.listdir(tmp_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"bpfrl: cannot serve metrics on {taken}: Address already in use\n"
    assert os.listdir(tmp_path) == before
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


# How long a scrape takes.


def test_a_node_full_of_pods_is_scraped_in_a_moment(bed: Lab, watch: Callable[..., Watched]) -> None:
    agent, limits = Agent(bed.bpffs), Limits(Rate(10**7), Rate(10**7))
    for number in range(MANY):
        pod = PodRef(str(uuid.uuid4()), "shop", f"cart-{number}")
        path = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{pod.uid.replace('-', '_')}.slice"
        path.mkdir()
        agent.attach(generator.generate(pod, limits), pod, path)
    watched = watch()
    watched.scrape()
    taken = []
    for _ in range(11):
        begun = time.monotonic()
        status, text = watched.get("/metrics")
        taken.append(time.monotonic() - begun)
        assert status == 200
    scraped = Scraped(text)
    assert scraped.get("limiters", state="ok") == MANY
    assert scraped.count("pod_passed_bytes_total") == 2 * MANY
    reading = scraped.get("limiters_read_duration_seconds")
    log.info("%d limiters: scraped in %s s; reading took %s s; %d byte", MANY, sorted(taken), reading, len(text))
    # The least of them: this machine may have something else to do.
    assert min(taken) < 0.2
