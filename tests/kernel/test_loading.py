"""What libbpf has made of one object is loaded again for others, and is what libbpf would have loaded."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.lab import Lab
from bpfrl import cgroup
from bpfrl.bpf import generator, law, libbpf, limiter, sockets
from bpfrl.bpf.layout import IdentityData, LimitsData
from bpfrl.bpf.libbpf import Descriptor, LoadedObject
from bpfrl.bpf.limiter import Loaded, Status
from bpfrl.errors import KernelError, PermissionDeniedError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.kernel.conftest import SECONDS, bpftool, storages

PODS = [PodRef(digit * 32, "shop", f"cart-{digit}") for digit in "ab"]
LIMITS = [Limits(Rate(10**6), Rate(2 * 10**6)), Limits(Rate(3 * 10**6), None, 65_536)]
PROGRAMS = ["bpfrl_egress", "bpfrl_ingress", "bpfrl_sockops"]
MAPS = [".bss", ".data.limits", ".rodata.identity", "counters", sockets.STORAGE]
SHAPE = {"type", "flags", "bytes_key", "bytes_value", "max_entries", "frozen"}
# Much less is normal, and twice as much doubles what an attach takes.
MOST_VERIFIED = {"bpfrl_egress": 2_400, "bpfrl_ingress": 600, "bpfrl_sockops": 4_000}


@pytest.fixture
def readied(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The objects that libbpf has to make ready from here on."""
    found: list[bytes] = []
    make = libbpf._make_ready

    def count(image: bytes, shape: libbpf.Shape | None) -> libbpf._Ready:
        found.append(image)
        return make(image, shape)

    monkeypatch.setattr(libbpf, "_readied", {})
    monkeypatch.setattr(libbpf, "_make_ready", count)
    return found


class _Info(ctypes.Structure):
    """struct bpf_prog_info (linux/bpf.h), as far as 5.16 has it."""

    _fields_ = (
        ("known", libbpf._ProgramInfo),
        ("recursion_misses", ctypes.c_uint64),
        ("verified_instructions", ctypes.c_uint32),
    )


def shown(bed: Lab, descriptor: Descriptor) -> Any:
    """What another tool says of a map."""
    pin = bed.bpffs / "looked_at"
    descriptor.pin(pin)
    try:
        return bpftool("map", "show", "pinned", str(pin))
    finally:
        pin.unlink()


def descriptors() -> int:
    """How many of this process's descriptors are of BPF programs, maps or links."""
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return sum(str(link.readlink()).startswith("anon_inode:bpf") for link in links if link.is_symlink())


def maps_of(program: dict[str, Any]) -> list[str]:
    """The maps that a program has, but for their numbers and names."""
    maps = [bpftool("map", "show", "id", str(number)) for number in program["map_ids"]]
    return sorted(json.dumps({key: value for key, value in each.items() if key in SHAPE}) for each in maps)


def test_objects_of_one_build_are_made_ready_once_and_differ_in_their_data(bed: Lab, readied: list[bytes]) -> None:
    for pod, limits in zip(PODS, LIMITS, strict=True):
        with limiter._load(generator.generate(pod, limits), {}) as loaded:
            assert isinstance(loaded, LoadedObject)
            assert sorted(loaded._programs) == PROGRAMS
            assert sorted(loaded._maps) == MAPS
            assert law.decode(libbpf.read(loaded.map(".data.limits"), 0, LimitsData)) == limits
            identity = libbpf.read(loaded.map(".rodata.identity"), 0, IdentityData)
            assert generator.read_identity(identity) == pod
            assert shown(bed, loaded.map(".rodata.identity"))["frozen"] == 1
            with pytest.raises(PermissionDeniedError, match="cannot write a map: "):
                libbpf.write(loaded.map(".rodata.identity"), 0, identity)
    assert len(readied) == 1


def test_an_object_that_differs_elsewhere_is_another(bed: Lab, readied: list[bytes]) -> None:  # noqa: ARG001 - root
    image = generator.generate(PODS[0], LIMITS[0])
    place = image.index(b"Dual BSD/GPL")
    for each in (image, image[:place] + b"Dual MIT/GPL" + image[place + 12 :], image):
        with LoadedObject(each, {}, limiter._SHAPE, generator.data(each)):
            pass
    assert len(readied) == 2


def test_few_objects_are_kept_ready(bed: Lab, readied: list[bytes]) -> None:  # noqa: ARG001
    image, before = generator.compile_object("sockets.bpf.c"), len(os.listdir("/proc/self/fd"))
    for number in range(libbpf._MOST_READIED + 2):
        with LoadedObject(image + bytes(8 * number)):
            pass
    assert len(readied) == libbpf._MOST_READIED + 2
    assert len(libbpf._readied) == libbpf._MOST_READIED
    # The types of each one's maps.
    assert len(os.listdir("/proc/self/fd")) <= before + libbpf._MOST_READIED
    libbpf._readied.clear()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_is_loaded_again_is_what_another_loader_makes_of_the_object(bed: Lab, tmp_path: Path) -> None:
    image = generator.generate(PODS[0], LIMITS[0])
    file, theirs = tmp_path / "pod.o", bed.bpffs / "theirs"
    file.write_bytes(image)
    subprocess.run(["bpftool", "prog", "loadall", file, theirs], check=True, capture_output=True)
    with limiter._load(image, {}) as loaded:
        own = bed.bpffs / "own"
        own.mkdir()
        for name in PROGRAMS:
            loaded.program(name).pin(own / name)
        for name in PROGRAMS:
            seen = [bpftool("prog", "show", "pinned", str(folder / name)) for folder in (theirs, own)]
            for key in ("type", "name", "tag", "gpl_compatible"):
                assert seen[0][key] == seen[1][key], (name, key)
            assert maps_of(seen[0]) == maps_of(seen[1])
    subprocess.run(["rm", "-r", theirs, own], check=True)


def test_only_the_programs_that_are_asked_for_are_loaded(bed: Lab) -> None:  # noqa: ARG001
    with LoadedObject(generator.compile_object("sockets.bpf.c"), programs={"bpfrl_adopt"}) as loaded:
        assert loaded.program("bpfrl_adopt").number > 0
        with pytest.raises(KernelError, match="cannot find the program bpfrl_release"):
            loaded.program("bpfrl_release")


def test_a_map_that_the_object_does_not_have_cannot_be_kept(bed: Lab) -> None:  # noqa: ARG001
    image = generator.compile_object("sockets.bpf.c")
    before = len(os.listdir("/proc/self/fd"))
    with LoadedObject(image) as loaded, pytest.raises(KernelError, match="cannot keep the map foreign"):
        LoadedObject(image, reuse={"foreign": loaded.map(sockets.STORAGE)})
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the types of its maps


def test_two_first_pods_at_once_share_one_map_of_sockets(bed: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are loaded before either is installed, when there is no such map yet."""
    agent, both = Agent(bed.bpffs), threading.Barrier(2, timeout=SECONDS)
    load = limiter.load

    def wait_for_the_other(image: bytes, bpffs: Path) -> Loaded:
        loaded = load(image, bpffs)
        both.wait()
        return loaded

    monkeypatch.setattr(limiter, "load", wait_for_the_other)
    paths = [bed.cgroup_root / pod.name for pod in PODS]
    for path in paths:
        path.mkdir()
    before = descriptors()
    with ThreadPoolExecutor(max_workers=2) as threads:
        images = [generator.generate(None, limits) for limits in LIMITS]
        assert list(threads.map(agent.attach, images, PODS, paths)) == [Change.ATTACHED] * 2
    found = [each for each in agent.limiters() if isinstance(each, Status)]
    assert [(each.pod, each.limits) for each in found] == list(zip(PODS, LIMITS, strict=True))
    assert len(storages(bed)) == 1
    assert descriptors() <= before
    for pod in PODS:
        agent.detach(pod.uid)


def test_what_was_loaded_for_a_cgroup_that_is_another_meanwhile_is_not_used(
    bed: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, load, path = Agent(bed.bpffs), limiter.load, bed.cgroup_root / "again"

    def make_it_again(image: bytes, bpffs: Path) -> Loaded:
        loaded = load(image, bpffs)
        path.rmdir()
        # The kernel gives a number again only when it has given all others.
        path.mkdir()
        return loaded

    monkeypatch.setattr(limiter, "load", make_it_again)
    path.mkdir()
    assert agent.attach(generator.generate(None, LIMITS[0]), PODS[0], path) is Change.ATTACHED
    with libbpf.open_pinned(bed.bpffs / PODS[0].uid / "identity") as identity:
        assert libbpf.read(identity, 0, IdentityData).cgroup == cgroup.id_of(path)
    agent.detach(PODS[0].uid)


def test_the_verifier_has_little_to_do(bed: Lab) -> None:  # noqa: ARG001
    """Each pod has programs of its own, so what the verifier takes is most of what an attach takes."""
    with limiter._load(generator.generate(PODS[0], LIMITS[0]), {}) as loaded:
        for name, most in MOST_VERIFIED.items():
            verified = libbpf._info(loaded.program(name), _Info).verified_instructions
            assert verified <= most, name


def test_a_node_carries_a_hundred_pods(tmp_path: Path, bed: Lab) -> None:  # noqa: ARG001
    """Everything must be done, and nothing may take ten times as long, or as much, as it does."""
    figures = tmp_path / "node.json"
    command = [sys.executable, "-m", "bench.node", "--pods", "100", "--rounds", "1", "--output", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    [measured] = found["rounds"]
    for wave in measured["waves"]:
        assert wave["rate"] > 8, wave
    assert measured["full"]["resident"] < 200
    assert measured["listed"]["median"] < 500
    assert measured["scraped"]["median"] < 2_000
    assert measured["empty"]["descriptors"] <= found["begun"]["descriptors"] + 10
