"""What those cannot do who would rather have no limit, as SECURITY.md says it, and what they can."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lab import BPFRL, PEER_ADDRESS, PEER_ADDRESS_6, Lab
from bpfrl.bpf import limiter
from bpfrl.bpf.limiter import Broken
from bpfrl.errors import BrokenLimiterError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.rpc import authority
from bpfrl.units import Rate
from tests.kernel.conftest import attached, entries, flowing, limit, peer_end, pod_end, rates, until
from tests.kernel.test_service import program
from tests.measuring import unmeasured

MBIT = 10**6
LIMIT = 10 * MBIT
SECONDS = 1.5
# What may pass beyond the rate for a moment is 256 KiB, and headers count here that count nowhere else.
MOST = 1.3 * LIMIT * SECONDS + 8 * 2**19
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

# Sends for some seconds as fast as it can, the way that its first argument names.
SEND = """
import socket, struct, sys, time
way, address, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
if way == "raw":
    sock = socket.socket(family, socket.SOCK_RAW, 253)
elif way == "packet":
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    sock.bind(("eth0", 0x88B5))
else:
    sock = socket.socket(family, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 47, struct.pack("I", 0xFFFFFFFF))  # SO_MAX_PACING_RATE
if way == "marked":
    for option in (socket.SO_MARK, socket.SO_PRIORITY):
        sock.setsockopt(socket.SOL_SOCKET, option, 6)
    sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_SNDBUFFORCE
if way == "segmented":
    sock.setsockopt(socket.IPPROTO_UDP, 103, 1400)  # UDP_SEGMENT
payload = bytes(42_000 if way == "segmented" else 1400)
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        if way == "packet":
            sock.sendto(payload, ("eth0", 0x88B5, 0, 0, b"\\xff" * 6))
        else:
            sock.sendto(payload, (address, 0 if way == "raw" else 9))
    except (BlockingIOError, OSError):
        pass
"""


def arrived(bed: Lab) -> int:
    """What has come to the other end of the veth so far, bit, as its driver counts."""
    command = ["ip", "-n", bed.peer_namespace, "-s", "-j", "link", "show", "eth0"]
    [device] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(device["stats64"]["rx"]["bytes"]) * 8


def sent(bed: Lab, way: str, address: str = PEER_ADDRESS, *within: str) -> int:
    """What arrives of what the pod sends one way, bit."""
    before = arrived(bed)
    command = bed.in_pod(*within, sys.executable, "-c", SEND, way, address, str(SECONDS))
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert not done.returncode, done.stderr
    return arrived(bed) - before


# A pod.


@pytest.mark.parametrize("address", [PEER_ADDRESS, PEER_ADDRESS_6])
@pytest.mark.parametrize("way", ["marked", "segmented", "raw"])
def test_no_option_of_a_socket_lifts_the_limit(bed: Lab, way: str, address: str) -> None:
    """Not even for a pod that may do with sockets what it likes (CAP_NET_RAW, CAP_NET_ADMIN)."""
    limit(bed, "--egress", "10mbit")
    assert sent(bed, way, address) < MOST


def test_a_packet_socket_passes_by_the_limit(bed: Lab) -> None:
    """What CAP_NET_RAW is good for; without it there is no such socket."""
    limit(bed, "--egress", "10mbit")
    assert sent(bed, "packet") > 3 * LIMIT * SECONDS
    with pytest.raises(AssertionError, match="Operation not permitted"):
        sent(bed, "packet", PEER_ADDRESS, *NOBODY, "--inh-caps=-all", "--bounding-set=-all")


def test_an_application_cannot_raise_its_own_pacing(bed: Lab) -> None:
    limit(bed, "--egress", "10mbit")
    sender, receiver = flowing(pod_end(bed), peer_end(bed), PEER_ADDRESS)
    until(lambda: receiver.each("received")[0] > MBIT / 8)
    for _ in range(20):
        sender.end.pace(sender.numbers[0], 2**31 - 1)
        time.sleep(0.01)
    [rate] = rates(receiver, SECONDS)
    assert rate * SECONDS < MOST


def test_a_cgroup_of_its_own_is_below_the_pods(bed: Lab) -> None:
    """In a cgroup namespace, with cgroups mounted writable, all that there is to move to is below the pod's."""
    limit(bed, "--egress", "10mbit")
    root = bed.pod_cgroup / "container"
    inside = (
        'mount -t cgroup2 none "$1" && mkdir "$1/own" && echo 0 >"$1/own/cgroup.procs" && '
        'grep -qx 0::/own /proc/self/cgroup && shift && exec "$@"'
    )
    mountpoint = bed.bpffs.with_name(f"{bed.bpffs.name}-cgroups")
    mountpoint.mkdir()
    try:
        within = ("unshare", "--cgroup", "--mount", "sh", "-c", inside, "sh", str(mountpoint))
        assert sent(bed, "plain", PEER_ADDRESS, *within) < MOST
        assert (root / "own").is_dir()
    finally:
        mountpoint.rmdir()


# Another user of the node.


def as_nobody(bed: Lab, *command: str) -> subprocess.CompletedProcess[str]:
    environment = unmeasured() | {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    # Without the bounding set it is no other user where user namespaces give nobody anything anyway.
    return subprocess.run(
        [*NOBODY, "--bounding-set=-all", "--inh-caps=-all", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=30,
    )


def test_another_user_takes_no_limit_off_and_reads_no_key(bed: Lab, tmp_path: Path) -> None:
    limit(bed, "--rate", "10mbit")
    programs = attached(bed)
    authority.init(tmp_path / "certs", 30)
    pins = bed.bpffs / bed.pod_uid
    for command in (
        [sys.executable, BPFRL, "detach", "--pod-uid", bed.pod_uid],
        [sys.executable, BPFRL, "attach", "--pod-uid", bed.pod_uid, "--rate", "100gbit"],
        ["bpftool", "link", "detach", "pinned", str(pins / "egress_link")],
        ["rm", "-rf", str(pins)],
        ["sh", "-c", f"echo $$ >{bed.world_cgroup}/cgroup.procs"],
        ["cat", str(tmp_path / "certs" / "node" / "tls.key")],
        ["cat", str(tmp_path / "certs" / "ca.key")],
    ):
        done = as_nobody(bed, *command)
        assert done.returncode, command
        assert "Traceback" not in done.stderr
        assert "PRIVATE" not in done.stdout
    assert attached(bed) == programs
    [found] = Agent(bed.bpffs).limiters()
    assert getattr(found, "limits", None) == Limits(Rate(LIMIT), Rate(LIMIT))


def test_pins_are_roots_alone(bed: Lab) -> None:
    before = os.umask(0)
    try:
        Agent(bed.bpffs).attach(program(Limits(Rate(LIMIT))), PodRef(bed.pod_uid), bed.pod_cgroup)
        Agent(bed.bpffs).cooperate(bed.cgroup_root / "kubepods.slice")
    finally:
        os.umask(before)
    found = [path for name in entries(bed) for path in (bed.bpffs / name, *(bed.bpffs / name).iterdir())]
    assert len(found) > 10
    assert not [path for path in found if stat.S_IMODE(path.lstat().st_mode) & 0o077]


def test_what_another_user_puts_into_an_open_bpffs_is_not_touched(bed: Lab) -> None:
    """It may be a link to somebody's limiter by the time that it is used; a limiter's own folder cannot become one."""
    bed.bpffs.chmod(0o1777)
    agent = Agent(bed.bpffs)
    assert agent.attach(program(Limits(Rate(LIMIT))), PodRef(bed.pod_uid), bed.pod_cgroup) is Change.ATTACHED
    programs, theirs = attached(bed), "f" * 32
    for name in (theirs, f"{theirs}{limiter.RETIRED}", f"cooperation-1{limiter.STAGED}", "0"):
        assert as_nobody(bed, "mkdir", "-m", "777", str(bed.bpffs / name)).returncode == 0
    linked = "e" * 32
    for name in (linked, f"{linked}{limiter.RETIRED}", "1"):
        assert as_nobody(bed, "ln", "-s", str(bed.bpffs / bed.pod_uid), str(bed.bpffs / name)).returncode == 0
    assert as_nobody(bed, "mv", str(bed.bpffs / bed.pod_uid), str(bed.bpffs / "mine")).returncode
    before = entries(bed)
    assert agent.sweep() == []
    for uid, reason in ((theirs, "belongs to another user"), (linked, "is no folder")):
        with pytest.raises(BrokenLimiterError, match=reason):
            agent.detach(uid)
        with pytest.raises(BrokenLimiterError, match=reason):
            agent.attach(program(Limits(Rate(LIMIT))), PodRef(uid), bed.world_cgroup)
    assert [found.uid if isinstance(found, Broken) else found.pod.uid for found in agent.limiters()] == [bed.pod_uid]
    assert (entries(bed), attached(bed)) == (before, programs)


# Links in the place of cgroups.


def test_only_cgroup_v2_is_searched_for_pods_where_there_are_no_links(bed: Lab, tmp_path: Path) -> None:
    parent = tmp_path / "kubepods.slice"
    parent.mkdir()
    (parent / f"kubepods-pod{bed.pod_uid.replace('-', '_')}.slice").symlink_to(bed.pod_cgroup)
    environment = os.environ | {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(tmp_path)}
    command = [BPFRL, "attach", "--pod-uid", bed.pod_uid, "--rate", "10mbit"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, attached(bed)) == (2, [])
    assert f"'{tmp_path}' is no cgroup v2 folder" in done.stderr
    with pytest.raises(PermissionError):
        (bed.cgroup_root / "kubepods.slice" / "link").symlink_to(bed.pod_cgroup)
