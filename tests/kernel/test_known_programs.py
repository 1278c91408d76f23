"""A node that takes the programs of its own version alone, and what else there is to send it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.lab import Lab
from bpfrl.bpf import generator
from bpfrl.bpf.layout import LimitData, LimitsData
from bpfrl.errors import RefusedError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.rpc import authority
from bpfrl.units import Rate
from tests.kernel.conftest import attached, entries, only
from tests.kernel.test_agent import build, instead
from tests.kernel.test_service import Daemon, build_of, filled, section
from tests.objects import of_another_build, sealed

SLOW, FAST = Limits(Rate(10**6)), Limits(Rate(10**7))
REFUSAL = "this node takes the programs of its own version alone"


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    authority.init(tmp_path / "pki", 30)
    return tmp_path / "pki"


def lenient(folder: Path) -> bytes:
    """A limiter that lets everything pass, made with care: same programs by name and kind, same maps."""
    return filled(build(folder, instead("#define EGRESS_DROP 2", "#define EGRESS_DROP 1")), SLOW)


def without_cost(folder: Path) -> bytes:  # noqa: ARG001
    """Our own programs, with numbers for them by which a packet costs nothing."""
    image = bytearray(generator.generate(None, SLOW))
    place = section(bytes(image), ".data.limits") + LimitsData.direction.offset + LimitData.cost.offset
    image[place : place + 8] = bytes(8)
    return bytes(image)


def one_instruction(folder: Path) -> bytes:  # noqa: ARG001
    """Our own programs but for an instruction, under their own build's name: as one who hopes that nobody compares."""
    image = bytearray(generator.generate(None, SLOW))
    image[section(bytes(image), "cgroup_skb/egress")] ^= 8
    return bytes(image)


FORGED: dict[str, tuple[Callable[[Path], bytes], str, str]] = {
    "a limiter that does not limit": (lenient, "FAILED_PRECONDITION", REFUSAL),
    "an honest one of another build": (
        lambda _: of_another_build(generator.generate(None, SLOW)),
        "FAILED_PRECONDITION",
        REFUSAL,
    ),
    "other numbers in our own": (without_cost, "FAILED_PRECONDITION", REFUSAL),
    "another instruction in our own": (one_instruction, "INVALID_ARGUMENT", "the object is damaged"),
    "another instruction, sealed again": (
        lambda folder: sealed(one_instruction(folder)),
        "FAILED_PRECONDITION",
        REFUSAL,
    ),
}


def send(node: Daemon, uid: str, image: bytes) -> None:
    """Send an object as a master does that has made it."""
    build_id = build_of(image)
    node.call(lambda client: client.attach(PodRef(uid), SLOW, image, build_id))


def test_a_forged_limiter_is_refused_whatever_certificate_it_comes_with(bed: Lab, pki: Path, tmp_path: Path) -> None:
    """One daemon, for it takes its time to start: nothing of what it refuses changes anything."""
    with Daemon(bed, pki, "127.0.0.1:0", "--require-known-program", "--no-cooperate") as node:
        assert node.wait_for("taking no programs but those of build").endswith(generator.build().hex())
        for number, (name, (make, code, reason)) in enumerate(FORGED.items()):
            folder = tmp_path / str(number)
            folder.mkdir()
            image = make(folder)
            with pytest.raises(RefusedError, match=reason) as caught:
                send(node, bed.pod_uid, image)
            assert caught.value.code == code, name
            assert str(caught.value).isprintable()
            assert (entries(bed), attached(bed)) == ([], []), name
        assert node.attach(bed.pod_uid, SLOW) is Change.ATTACHED
        assert node.attach(bed.pod_uid, FAST) is Change.UPDATED
        before = attached(bed)
        with pytest.raises(RefusedError, match=REFUSAL):
            send(node, bed.pod_uid, of_another_build(generator.generate(None, SLOW)))
        assert (attached(bed), only(bed)["egress"]["limit_bits_per_second"]) == (before, 10**7)


def test_without_anything_to_compare_with_the_daemon_does_not_start(
    bed: Lab, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3", "findmnt"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("--listen", "127.0.0.1:0", "--certs", str(pki / "node"), "--require-known-program")
    done = bed.bpfrl("serve-node", *options, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bpfrl: clang is not installed: apt-get install clang llvm libbpf-dev"
