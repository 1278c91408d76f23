"""The page about the figures, made from nothing but the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Final

from bench import bucket, cni, node_page, overheads, sections, summary
from bench.plots import Picture
from bench.record import Results
from bench.situations import NEAR, SPAN_PACKETS, SPANS
from bench.tables import burst, percent
from bench.traffic import (
    OMITTED_FAR_SECONDS,
    PAYLOAD,
    REQUEST_RATE,
    REQUEST_SHARE,
    UDP_PACKET,
)

_MTU: Final = 1500
_ETHERNET: Final = 14

_BEGIN: Final = "<!-- measured: written by bench/report.py -->"
_END: Final = "<!-- end -->"
_HEAD: Final = """\
<!-- Made by bench/report.py from bench/results: run `make bench` or `make bench-scale`, do not edit. -->
# Benchmarks

bpfrl beside the CNI bandwidth plugin (tbf queues on the host's end of the veth and on an ifb device), a plain token
bucket on the pod's cgroup, and no limit: measured by one command on one machine. The figures on this page, and what is
said of them, are computed from that run. [Large clusters](#large-clusters) are another one's.
"""

_METHOD: Final = """\
## What is measured, and how

- A pod-like cgroup in a network namespace sends to a peer in another over a veth, or receives from it. Where an RTT is
  given, a wire behind the peer (`bench/wire.c`) delays every packet by half of it; nothing else is on the way. Every
  run has fresh namespaces.
- **bpfrl** is attached by `bpfrl attach --rate`. **Cooperating**, the cgroup above both the pod and the senders is
  attached by `bpfrl attach --cooperate` as well.
- The **CNI plugin** is called as a container runtime calls it, with the same rate in both directions and a burst of
  {cni_burst} unless a row says otherwise: it has to be given one, and its queue has room for the burst and 25 ms of
  the rate.
- The **token bucket** (`bench/bucket.bpf.c`) drops what finds fewer tokens than it is long; it holds {bucket_burst}.
- What is compared runs one after the other, so that a noisy minute of the machine falls on all.
- **payload** is what the receiver counts, after the first second, or {far_seconds} of them over 20 ms or more. **Layer
  3** is the same with headers ({mtu} byte for {payload} of TCP, {udp} for {payload} of UDP) and the requests. bpfrl's
  limit is one at layer 3, of which TCP's payload is at most {ceiling}. A tbf counts the Ethernet header as well: where
  it is exact, {tbf} of the limit are left at layer 3.
- **peak** is the most that passed at layer 3 in any second, the first ones included, in which credits are spent.
- **Jain** is Jain's index of the flows' payloads: 1 when all are alike.
- **p50** and **p99** are those of the time from a request of 100 byte, sent by the pod, to its response of 100 byte.
  Requests are sent on four connections after random pauses, {rate} in a second or what is {share} of the limit, and
  wait for no other: what a queue does to one of them it does to those behind it too, and nothing of it is left out.
  Both ends run with a real-time priority, so that what is measured is not their turn on a CPU.
- **TCP RTT** is the mean of the senders' own mean round-trip times.
- **drops** are the limiter's own count, from beginning to end: wire packets for bpfrl and the bucket; for tbf what it
  queues, where many segments may be one packet. **sent again** are TCP's retransmits.
- A limit has **settled** where the payload is within {near} of it in {spans} spans of 100 ms in a row (of {packets}
  packets where these take longer), 50 ms apart, as the receiver counts it; the time is that until the first of these
  from when the command returned.
- bpfrl's own counters are checked on the way:
  {check}
"""

_REPEAT: Final = """\
## Repeat it

As root on a quiet machine, in a clone of this repository:

    make bench                                       # everything: at most 45 minutes
    python -m bench.run --quick --output somewhere   # a subset: some 4 minutes
    python -m bench.run --only ingress               # one group again, the others kept: see --help
    python -m bench.run --report-only                # this page again, from the JSON
"""


def write(results: Results, path: Path, pictures: Mapping[Picture, Path], scale: str = "") -> None:
    """Write the page, with the pictures shown in it.

    Args:
        results: of the datapath.
        path: the page.
        pictures: where they are.
        scale: the section about large clusters, if there is one.
    """
    parts = [
        _HEAD,
        summary.in_short(results),
        *(_shown(picture, place, path.parent) for picture, place in pictures.items()),
        summary.others_better(results),
        summary.at_a_glance(results),
        summary.comparison(results),
        summary.failings(results),
        sections.situations(results),
        overheads.throughput(results),
        overheads.programs(results),
        sections.first_second(results),
        scale,
        _method(results),
        *sections.details(results),
        *_carried(),
        _machine(results),
        _REPEAT,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def fill(results: Results, path: Path) -> None:
    """Put the figures that a page written by hand has room for in between its two marks."""
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    path.write_text(f"{before}{begin}\n{summary.spreads(results)}\n{end}{after}")


def _carried() -> list[str]:
    """What one node carries, if that was measured: it has figures of its own."""
    found = node_page.load(node_page.FIGURES)
    return [node_page.section(found)] if found else []


def _shown(picture: Picture, place: Path, folder: Path) -> str:
    return f"![{picture.title}]({Path(os.path.relpath(place, folder)).as_posix()})\n\n{picture.caption}"


def _machine(results: Results) -> str:
    facts = results.machine
    lines = [
        f"- {facts.cpus} x {facts.cpu}, kernel {facts.kernel}, load {facts.load:.2f} before the start",
        f"- {'; '.join(f'{tool}: {version}' for tool, version in facts.tools.items())}",
    ]
    measured: dict[tuple[str, str, int], list[str]] = {}
    for run in results.runs:
        measured.setdefault((run.date, run.command, run.seconds), []).append(f"{run.group} {run.minutes:.1f}")
    for (date, command, seconds), groups in measured.items():
        lines.append(f"- {date}, runs of {seconds} s, `{command}`; minutes: {', '.join(groups)}")
    return sections.section("Where and when", "\n".join(lines))


def _method(results: Results) -> str:
    checks = [row.figures.counted for row in results.rows if row.figures and row.figures.counted]
    check = (
        f"they have {percent(median(checks))} of the bytes that follow from the payload received (median;"
        f" {percent(min(checks))} to {percent(max(checks))}). Requests, handshakes, what is sent again and what is\n"
        "  still under way at the end come on top, and weigh most where the limit is low."
        if checks
        else "not in this run."
    )
    return _METHOD.format(
        cni_burst=burst(cni.BURST),
        bucket_burst=burst(bucket.BURST),
        far_seconds=OMITTED_FAR_SECONDS,
        mtu=_MTU,
        payload=PAYLOAD,
        udp=UDP_PACKET,
        ceiling=percent(PAYLOAD / _MTU),
        tbf=percent(_MTU / (_MTU + _ETHERNET)),
        rate=REQUEST_RATE,
        share=percent(REQUEST_SHARE),
        near=percent(NEAR),
        spans=SPANS,
        packets=SPAN_PACKETS,
        check=check,
    )
