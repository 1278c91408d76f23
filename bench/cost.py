"""What the limiter's programs cost, by the kernel's own account (bpf(2), kernel.bpf_stats_enabled).

The kernel's clock readings cost about as much as a short program, so an empty program is attached behind each of the
limiter's: behind, because the first to run finds the caches cold, and that is the limiter's to bear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench import bpf
from bench.lab import Lab, lab
from bench.peers import bpfrl_counters, limiting
from bench.record import Case, Cost
from bench.traffic import udp_options

COST_SECONDS: Final = 3

_STATISTICS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
# The limiter's programs, and bpftool's names for where they attach.
_PROGRAMS: Final = {"egress": "egress", "ingress": "ingress", "sockops": "sock_ops"}


def measure_cost(case: Case) -> list[Cost]:
    """Send for some seconds under bpfrl, and read how long each of its programs has run.

    Raises:
        RuntimeError: iperf3 has failed.
    """
    options = udp_options(case.rate) if case.traffic == "udp" else ["-P", str(case.flows), "-C", case.congestion]
    with _statistics(), lab() as bed, limiting(bed, case):
        empty = _attach_empty(bed)
        bed.iperf3("-t", str(COST_SECONDS), *options, to_pod=case.direction == "ingress")
        counters = bpfrl_counters(bed)[case.direction]
        packets = counters["passed_packets"] + counters["dropped_packets"]
        return [
            _cost(case, program, packets, bed.bpffs / bed.pod_uid / program, empty / f"empty_{program}")
            for program in _PROGRAMS
        ]


def _cost(case: Case, program: str, packets: int, pin: Path, empty_pin: Path) -> Cost:
    account, empty = bpf.program(pin), bpf.program(empty_pin)
    return Cost(
        traffic=case.traffic,
        direction=case.direction,
        rate=case.rate or 0,
        program=program,
        runs=account["run_cnt"],
        run_ns=account["run_time_ns"] / account["run_cnt"],
        empty_ns=empty["run_time_ns"] / empty["run_cnt"],
        packets=packets,
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
    bpf.load("empty.bpf.c", pins)
    for program, attach_type in _PROGRAMS.items():
        bpf.attach(bed.pod_cgroup, attach_type, pins / f"empty_{program}")
    return pins
