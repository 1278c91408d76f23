"""Where the figures come from: the machine, and the tools that were used."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Final

from bench import cni
from bench.record import Machine
from bpfrl import __version__

_TOOLS: Final = {
    "iperf3": ("iperf3", "--version"),
    "tc": ("tc", "-V"),
    "bpftool": ("bpftool", "version"),
    "clang": ("clang", "--version"),
    "ping": ("ping", "-V"),
}


def missing_tools() -> list[str]:
    """The tools that the benchmarks need and that are not here."""
    return [tool for tool in (*_TOOLS, "nsenter", "ip", "ss") if shutil.which(tool) is None]


def describe() -> Machine:
    """This machine, now."""
    return Machine(
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        kernel=platform.release(),
        cpu=_cpu(),
        cpus=os.cpu_count() or 0,
        load=os.getloadavg()[0],
        tools={
            "bpfrl": __version__,
            **{tool: _first_line(*command) for tool, command in _TOOLS.items()},
            "CNI bandwidth plugin": _plugin_version(),
        },
    )


def _cpu() -> str:
    """The CPU's name; Arm kernels give only numbers, for which the architecture stands in."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _plugin_version() -> str:
    """What the plugin says of itself, or the package's version where its build has left that out."""
    said = subprocess.run([cni.plugin()], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stderr
    version = next(iter(said.splitlines()), "unknown")
    if version.endswith("unknown") and shutil.which("dpkg-query"):
        query = ("dpkg-query", "-W", "-f", "${Package} ${Version}", "containernetworking-plugins")
        return _first_line(*query) or version
    return version


def _first_line(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next(iter(said.splitlines()), "")
