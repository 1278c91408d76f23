"""What the limiter's programs cost, by the kernel's own account (bpf(2), kernel.bpf_stats_enabled).

The kernel's clock readings cost about as much as a short program, so an empty program is attached behind each of the
limiter's: behind, because the first to run finds the caches cold, and that is the limiter's to bear.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.lab import Json, Lab, lab
from bench.peers import bpfrl_counters, limiting
from bench.record import Case, Cost
from bench.traffic import udp_options

COST_SECONDS: Final = 3

_STATISTICS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
_EMPTY_SOURCE: Final = Path(__file__).with_name("empty.bpf.c")
# The limiter's programs: bpftool's names for where they attach, and the counters of the packets they see.
_PROGRAMS: Final = {
    "egress": ("egress", "egress"),
    "ingress": ("ingress", "ingress"),
    "sockops": ("sock_ops", "egress"),
}


def measure_cost(case: Case) -> list[Cost]:
    """Send for some seconds under bpfrl, and read how long each of its programs has run.

    Raises:
        RuntimeError: iperf3 has failed.
    """
    options = udp_options(case.rate) if case.traffic == "udp" else ["-P", str(case.flows), "-C", case.congestion]
    with _statistics(), lab() as bed, limiting(bed, case):
        empty = _attach_empty(bed)
        bed.iperf3("-t", str(COST_SECONDS), *options)
        counters = bpfrl_counters(bed)
        packets = {
            direction: counters[direction]["passed_packets"] + counters[direction]["dropped_packets"]
            for direction in ("egress", "ingress")
        }
        return [
            _cost(case, program, packets, bed.bpffs / bed.pod_uid / program, empty / f"empty_{program}")
            for program in _PROGRAMS
        ]


def _cost(case: Case, program: str, packets: dict[str, int], pin: Path, empty_pin: Path) -> Cost:
    account, empty = _show(pin), _show(empty_pin)
    return Cost(
        traffic=case.traffic,
        rate=case.rate or 0,
        program=program,
        runs=account["run_cnt"],
        run_ns=account["run_time_ns"] / account["run_cnt"],
        empty_ns=empty["run_time_ns"] / empty["run_cnt"],
        packets=packets[_PROGRAMS[program][1]],
        packet_ns=account["run_time_ns"] / packets["egress"],
    )


@contextmanager
def _statistics() -> Iterator[None]:
    """Have the kernel keep accounts, for no longer than needed: they slow every program down."""
    before = _STATISTICS.read_text()
    _STATISTICS.write_text("1")
    try:
        yield
    finally:
        _STATISTICS.write_text(before)


def _attach_empty(bed: Lab) -> Path:
    """Attach an empty program behind each of the limiter's; they go with the lab's cgroup and bpffs."""
    pins = bed.bpffs / "empty"
    with tempfile.NamedTemporaryFile(suffix=".o") as built:
        _run("clang", "-target", "bpf", "-O2", "-c", str(_EMPTY_SOURCE), "-o", built.name)
        _run("bpftool", "prog", "loadall", built.name, str(pins))
    for program, (attach_type, _) in _PROGRAMS.items():
        pin = str(pins / f"empty_{program}")
        _run("bpftool", "cgroup", "attach", str(bed.pod_cgroup), attach_type, "pinned", pin, "multi")
    return pins


def _show(pin: Path) -> Json:
    shown: Json = json.loads(_run("bpftool", "-j", "prog", "show", "pinned", str(pin)))
    return shown


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
