"""The main job, shown: ``make demo``.

A pod-like cgroup in a network namespace of its own sends to a peer as fast as it can; it is limited to 10 Mbit/s,
looked at, and let go again. Everything is real (cgroup, BPF programs, TCP) and everything is removed at the end.
"""

from __future__ import annotations

import subprocess
import threading
from statistics import mean
from typing import Final

from rich.console import Console

from bench.lab import PEER_ADDRESS, POD_ADDRESS, Lab, lab

RATE: Final = "10mbit"
_SECONDS: Final = "4"
_PINGS: Final = 40

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the demonstration."""
    with lab() as bed:
        console.print(f"A pod-like cgroup with UID {bed.pod_uid}, {POD_ADDRESS}, sends to {PEER_ADDRESS}.\n")
        _measure(bed, "no limit")
        _show(bed, "attach", "--pod-uid", bed.pod_uid, "--pod-name", "default/demo", "--rate", RATE)
        _measure(bed, RATE)
        _show(bed, "list")
        _show(bed, "detach", "--pod-uid", bed.pod_uid)
        _measure(bed, "detached")
    console.print("Nothing is left of it: the cgroup, the namespaces and the BPF file system are gone.")


def _show(bed: Lab, *arguments: str) -> None:
    """Run a bpfrl command and show it with its output, as a terminal would."""
    console.print(f"[bold]# bpfrl {' '.join(arguments)}[/bold]")
    done = bed.bpfrl(*arguments)
    print(done.stdout)


def _measure(bed: Lab, title: str) -> None:
    """Send over one TCP connection, and ping beside it."""
    trips: list[float] = []
    pinging = threading.Thread(target=lambda: trips.extend(bed.ping(_PINGS)))
    pinging.start()
    report = bed.iperf3("-t", _SECONDS, "-O", "1")
    pinging.join()
    stream = report["end"]["streams"][0]["sender"]
    goodput = report["end"]["sum_received"]["bits_per_second"] / 1e6
    console.print(
        f"[green]{title:>9}:[/green] {goodput:9.2f} Mbit/s of payload, {stream['retransmits']} retransmits,"
        f" round trip {stream['mean_rtt'] / 1000:.2f} ms (TCP), {mean(trips):.2f} ms (ping)\n"
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"demo: {error}: {error.stderr or error.stdout}") from error
