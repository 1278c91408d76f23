"""Whether this machine can limit pods: one look at each thing that it takes.

Each check is a function that returns what it has found; none raises for what is missing, none changes anything that
stays, and none waits for long.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from bpfrl.bpf import generator, libbpf, probe
from bpfrl.bpf.libbpf import LoadedObject
from bpfrl.bpf.probe import Feature
from bpfrl.cgroup import CgroupTree, mount_point
from bpfrl.errors import BpfrlError, CgroupNotFoundError, PermissionDeniedError
from bpfrl.findings import Finding, Mark
from bpfrl.mounts import mounts
from bpfrl.node.agent import Agent

Check = Callable[[], Finding]

_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_STATUS: Final = Path("/proc/self/status")
# linux/capability.h
# linux/capability.h. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON; it alone lets see others' programs.
_CAPABILITIES: Final = {"CAP_DAC_READ_SEARCH": 2, "CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
# To see the network namespaces of pods' processes.
_TO_ADOPT: Final = {"CAP_SYS_PTRACE": 19}
_SCRATCH: Final = "doctor"
_TOOL_SECONDS: Final = 5.0
_AS_ROOT: Final = "run bpfrl as root"
_INSTALL: Final = "apt-get install clang llvm libbpf-dev"
# A program, and whether anything is limited without it.
_PROGRAMS: Final = {"limiter.bpf.c": True, "sockets.bpf.c": False, "cooperate.bpf.c": False}


def checks(agent: Agent, tree: Callable[[], CgroupTree]) -> Iterator[tuple[str, Check]]:
    """All there is to look at on a machine, by name, in the order in which one thing needs another.

    Args:
        agent: its limiters.
        tree: makes its pods' tree.
    """
    yield "privileges", privileges
    yield "kernel", kernel
    yield "kernel BTF", kernel_btf
    yield "cgroup v2", cgroups
    yield "pods", partial(pods, tree)
    yield "bpffs", partial(bpffs, agent)
    yield "libbpf", library
    yield "compiler", compiler
    for feature in probe.FEATURES:
        yield feature.name, partial(kernel_feature, feature)
    yield "programs", programs


def privileges() -> Finding:
    """What this process may do."""
    [held] = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("CapEff:")]
    absent, unseeing = (
        [name for name, bit in wanted.items() if not int(held, 16) >> bit & 1] for wanted in (_CAPABILITIES, _TO_ADOPT)
    )
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    if absent:
        return Finding("privileges", Mark.MISSING, (f"{user}, without {', '.join(absent)}",), _AS_ROOT)
    if unseeing:
        advice = "without it, connections that are older than a limit are not paced"
        return Finding("privileges", Mark.WARNING, (f"{user}, without {', '.join(unseeing)}",), advice)
    return Finding("privileges", Mark.OK, (f"{user}, with {', '.join((*_CAPABILITIES, *_TO_ADOPT))}",))


def kernel() -> Finding:
    """Its version; what it can do is probed."""
    release = platform.release()
    found, oldest = probe.version_of(release), probe.version_of(probe.OLDEST)
    if found and oldest and found < oldest:
        return Finding("kernel", Mark.MISSING, (f"Linux {release}",), f"bpfrl needs Linux {probe.OLDEST} or newer")
    return Finding("kernel", Mark.OK, (f"Linux {release}, {platform.machine()}",))


def kernel_btf() -> Finding:
    """What the programs learn the kernel's own structures from."""
    if _BTF.exists():
        return Finding("kernel BTF", Mark.OK, (str(_BTF),))
    return Finding("kernel BTF", Mark.MISSING, (f"no {_BTF}",), "take a kernel with CONFIG_DEBUG_INFO_BTF=y")


def cgroups() -> Finding:
    """Where version 2 is mounted, and what beside it."""
    try:
        place = mount_point()
    except CgroupNotFoundError as error:
        return Finding("cgroup v2", Mark.MISSING, (str(error),), "boot with systemd.unified_cgroup_hierarchy=1")
    layout = "hybrid: version 1 is mounted too" if mounts("cgroup") else "unified"
    return Finding("cgroup v2", Mark.OK, (f"{place}, {layout}",))


def pods(tree: Callable[[], CgroupTree]) -> Finding:
    """The kubelet's cgroups."""
    try:
        found = tree()
        tops, count = found.tops(), len(found.uids())
    except (BpfrlError, OSError) as error:
        return Finding("pods", Mark.WARNING, (str(error),))
    if not tops:
        advice = "on a Kubernetes node, see where the kubelet makes them (--cgroup-root); elsewhere, use --cgroup PATH"
        return Finding("pods", Mark.WARNING, (f"no kubepods cgroup below {found.root}",), advice)
    lines = (f"{top}, {'systemd' if top.name.endswith('.slice') else 'cgroupfs'} driver" for top in tops)
    return Finding("pods", Mark.OK, (*lines, f"{count} pod{'' if count == 1 else 's'}"))


def bpffs(agent: Agent) -> Finding:
    """Where limiters are pinned."""
    place = agent.bpffs
    try:
        if agent.is_mounted():
            scratch = place / f"{_SCRATCH}-{os.getpid()}"
            scratch.mkdir(mode=0o700)
            scratch.rmdir()
            return Finding("bpffs", Mark.OK, (f"{place}, writable",))
        if os.listdir(place):
            advice = "name an empty folder, or a BPF file system, with --bpffs"
            return Finding("bpffs", Mark.MISSING, (f"{place} is no BPF file system, and not empty",), advice)
        if not os.access(place, os.W_OK):
            return Finding("bpffs", Mark.MISSING, (f"none on {place}, and it cannot be mounted",), _AS_ROOT)
    except BpfrlError as error:
        return Finding("bpffs", Mark.MISSING, (str(error),), _AS_ROOT)
    except OSError as error:
        return Finding("bpffs", Mark.MISSING, (f"{place}: {error.strerror}",), "run bpfrl as root, or use --bpffs")
    return Finding("bpffs", Mark.OK, (f"not mounted on {place} yet: the first limiter mounts it",))


def library() -> Finding:
    """What the kernel is talked to with."""
    try:
        return Finding("libbpf", Mark.OK, (libbpf.version(),))
    except BpfrlError as error:
        text, _, advice = str(error).partition(": ")
        return Finding("libbpf", Mark.MISSING, (text,), advice)


def compiler() -> Finding:
    """clang, or what it has made of these very programs before."""
    try:
        for source in _PROGRAMS:
            generator.compile_object(source)
    except BpfrlError as error:
        return Finding("compiler", Mark.MISSING, (str(error),), _INSTALL)
    try:
        done = subprocess.run(["clang", "--version"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return Finding("compiler", Mark.OK, ("no clang, but the compiled programs are in the cache",))
    return Finding("compiler", Mark.OK, (done.stdout.partition("\n")[0],))


def kernel_feature(feature: Feature) -> Finding:
    """One thing that the kernel can do, tried."""
    mark = Mark.MISSING if feature.needed else Mark.WARNING
    if library().mark is not Mark.OK:
        return Finding(feature.name, mark, ("not tried: libbpf is missing",))
    try:
        feature.probe()
    except PermissionDeniedError as error:
        return Finding(feature.name, mark, (f"not tried: {error}",), _AS_ROOT)
    except probe.UntriedError as error:
        return Finding(feature.name, Mark.WARNING, (f"not tried: {error}",), "run bpfrl doctor on the machine itself")
    except BpfrlError as error:
        advice = f"Linux {feature.since} has it, for {feature.purpose}"
        advice += f"; here, {feature.instead}" if feature.instead else ""
        return Finding(feature.name, mark, (str(error),), advice)
    return Finding(feature.name, Mark.OK, (f"works, for {feature.purpose}",))


def programs() -> Finding:
    """The programs of bpfrl themselves, loaded and let go again."""
    lines, mark = [], Mark.OK
    for source, needed in _PROGRAMS.items():
        try:
            image = generator.compile_object(source)
            with LoadedObject(image):
                lines.append(f"{source} loads, build {hashlib.sha256(image).hexdigest()[: generator.BUILD_DIGITS]}")
        except PermissionDeniedError as error:
            return Finding("programs", Mark.MISSING, (f"not tried: {error}",), _AS_ROOT)
        except BpfrlError as error:
            lines.append(f"{source} does not load: {error}")
            mark = Mark.MISSING if needed or mark is Mark.MISSING else Mark.WARNING
    advice = "" if mark is Mark.OK else "the rows above say what is missing; else report it, with these lines"
    return Finding("programs", mark, tuple(lines), advice)
