"""generate, attach, detach and list as an operator uses them: the installed command, on a real cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from itertools import takewhile
from pathlib import Path

import pytest

from bench.lab import BPFRL, PEER_ADDRESS, Lab
from bpfrl import cgroup
from tests.kernel.conftest import attached, bpftool, items, only
from tests.measuring import unmeasured
from tests.objects import of_another_build, sealed

LIMITER = {"cgroup_inet_egress", "cgroup_inet_ingress", "cgroup_sock_ops"}


def kinds(bed: Lab) -> list[str]:
    return [kind for kind, _ in attached(bed)]


def test_attach_pins_and_attaches_three_programs_and_detach_leaves_nothing(bed: Lab) -> None:
    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    assert done.stdout.startswith(f"pod/{bed.pod_uid} limited: egress 1mbit, ingress 1mbit")
    assert done.stdout.count("\n") == 1
    assert not done.stderr
    assert set(kinds(bed)) == LIMITER
    assert len(kinds(bed)) == 3
    assert os.listdir(bed.bpffs / bed.pod_uid)

    done = bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert done.stdout == f"pod/{bed.pod_uid} detached\n"
    assert attached(bed) == []
    assert [name for name in os.listdir(bed.bpffs) if not name.endswith(".debug")] == []


def test_detach_of_what_is_not_attached_says_so_and_succeeds(bed: Lab) -> None:
    done = bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert done.stdout == f"pod/{bed.pod_uid} not limited\n"
    bed.bpfrl("detach", "--all")


def test_attach_again_changes_the_limits_in_place(bed: Lab) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit", "--pod-name", "default/web")
    bed.ping(3)
    before, programs = only(bed), attached(bed)
    assert before["egress"]["passed_packets"] >= 3

    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--egress", "20M", "--burst", "64Ki")
    assert " updated: egress 20mbit, ingress unlimited" in done.stdout
    after = only(bed)
    assert attached(bed) == programs
    assert after["egress"]["limit_bits_per_second"] == 20_000_000
    assert after["ingress"]["limit_bits_per_second"] is None
    assert after["burst_bytes"] == 65536
    assert after["egress"]["passed_packets"] >= before["egress"]["passed_packets"]
    assert after["attached_at"] == before["attached_at"]
    assert (after["namespace"], after["name"]) == ("default", "web")

    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--egress", "20M", "--burst", "64Ki")
    assert " unchanged: " in done.stdout
    assert attached(bed) == programs


def test_a_limiter_of_another_build_is_replaced_on_its_own_maps(bed: Lab, tmp_path: Path) -> None:
    """An upgrade of bpfrl: other programs, the same counters, and the links are never let go of."""
    bed.bpfrl("generate", "--rate", "5mbit", "-o", str(tmp_path / "other.o"))
    (tmp_path / "other.o").write_bytes(of_another_build((tmp_path / "other.o").read_bytes()))

    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(tmp_path / "other.o"), "--pod-name", "a/b")
    bed.ping(3)
    before, programs, links = only(bed), attached(bed), _links(bed)
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "6mbit")
    after = only(bed)
    assert {number for _, number in attached(bed)}.isdisjoint({number for _, number in programs})
    assert _links(bed) == links
    assert after["egress"]["limit_bits_per_second"] == 6_000_000
    assert after["egress"]["passed_packets"] == before["egress"]["passed_packets"] > 0
    assert (after["namespace"], after["name"]) == ("a", "b")
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert attached(bed) == []


def _links(bed: Lab) -> set[int]:
    return {link["id"] for link in bpftool("link") if link.get("cgroup_id") == cgroup.id_of(bed.pod_cgroup)}


def test_generated_object_is_what_bpftool_loads_and_attach_takes(bed: Lab, tmp_path: Path) -> None:
    file = tmp_path / "pod.o"
    bed.bpfrl("generate", "--egress", "3mbit", "--ingress", "4mbit", "-o", str(file))
    by_hand = bed.bpffs / "by_hand"
    subprocess.run(["bpftool", "prog", "loadall", str(file), str(by_hand)], check=True)
    assert set(os.listdir(by_hand)) == {"bpfrl_egress", "bpfrl_ingress", "bpfrl_sockops"}
    for pin in by_hand.iterdir():
        pin.unlink()
    by_hand.rmdir()

    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(file))
    item = only(bed)
    assert item["egress"]["limit_bits_per_second"] == 3_000_000
    assert item["ingress"]["limit_bits_per_second"] == 4_000_000


def test_generate_writes_to_a_pipe(bed: Lab) -> None:
    command = [BPFRL, "generate", "--rate", "1mbit", "-o", "-"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.startswith(b"\x7fELF")
    assert items(bed) == []


def test_a_cgroup_that_is_no_pod(bed: Lab) -> None:
    path = str(bed.pod_cgroup / "container")
    done = bed.bpfrl("attach", "--cgroup", path, "--rate", "1mbit")
    name = f"cgroup-{cgroup.id_of(Path(path))}"
    assert done.stdout.startswith(f"{name} limited")
    assert only(bed)["cgroup"] == path
    assert bed.bpfrl("detach", "--cgroup", path).stdout == f"{name} detached\n"
    bed.bpfrl("attach", "--cgroup", path, "--rate", "1mbit")
    assert bed.bpfrl("detach", "--pod-uid", name).stdout == f"{name} detached\n"


def test_wait_for_a_pod_whose_cgroup_comes_later(bed: Lab) -> None:
    late = str(uuid.uuid4())
    folder = bed.cgroup_root / "kubepods.slice" / f"kubepods-pod{late.replace('-', '_')}.slice"
    kubelet = threading.Timer(0.5, folder.mkdir)
    kubelet.start()
    done = bed.bpfrl("attach", "--pod-uid", late, "--rate", "1mbit", "--wait", "10")
    kubelet.join()
    assert done.stdout.rstrip().endswith(str(folder))

    never = bed.bpfrl("attach", "--pod-uid", str(uuid.uuid4()), "--rate", "1mbit", "--wait", "0.2", check=False)
    assert (never.returncode, never.stdout) == (1, "")
    assert never.stderr.startswith("bpfrl: no cgroup for pod")
    assert never.stderr.count("\n") == 1


def test_dry_run_changes_nothing(bed: Lab) -> None:
    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit", "--dry-run")
    assert "would be limited" in done.stdout
    assert str(bed.pod_cgroup) in done.stdout
    assert attached(bed) == []
    assert items(bed) == []


@pytest.mark.parametrize(
    "layout",
    [
        "kubepods.slice/kubepods-pod{systemd}.slice",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice",
        "a.slice/a-kubepods.slice/a-kubepods-besteffort.slice/a-kubepods-besteffort-pod{systemd}.slice",
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice",
        "system.slice/docker-abc.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice",
        "kubepods/pod{uid}",
        "kubepods/burstable/pod{uid}",
        "kubelet/kubepods/besteffort/pod{uid}",
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_every_layout_of_the_kubelet(bed: Lab, layout: str, static: bool) -> None:
    uid = uuid.uuid4().hex if static else str(uuid.uuid4())
    folder = bed.cgroup_root / layout.format(uid=uid, systemd=uid.replace("-", "_"))
    (folder / "container").mkdir(parents=True)
    done = bed.bpfrl("attach", "--pod-uid", uid, "--rate", "1mbit")
    assert done.stdout.rstrip().endswith(f" at {folder}")
    assert only(bed)["cgroup"] == str(folder)


def test_unified_layout_and_a_bpffs_that_is_not_mounted(bed: Lab, tmp_path: Path) -> None:
    """In a mount namespace where cgroup v2 stands where systemd puts it, and where no bpffs is."""
    folder = f"/sys/fs/cgroup/{bed.pod_cgroup.relative_to(cgroup.mount_point())}"
    script = f"""
        set -e
        mount -t cgroup2 none /sys/fs/cgroup
        {BPFRL} --bpffs {tmp_path} attach --pod-uid {bed.pod_uid} --rate 2mbit
        findmnt -n -o FSTYPE {tmp_path}
        {BPFRL} --bpffs {tmp_path} list -o wide
        {BPFRL} --bpffs {tmp_path} detach --all
        bpftool cgroup show {folder}
    """
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f" at {folder}")
    assert lines[1] == "bpf"
    assert lines[3].split()[2] == "2mbit"
    assert lines[3].rstrip().endswith(folder)
    assert lines[4:] == [f"pod/{bed.pod_uid} detached"]


def test_hybrid_layout_is_discovered(bed: Lab) -> None:
    """In a mount namespace where version 1 has /sys/fs/cgroup and version 2 stands beside it."""
    script = f"""
        set -e
        mount -t tmpfs none /sys/fs/cgroup
        mkdir /sys/fs/cgroup/unified
        mount -t cgroup2 none /sys/fs/cgroup/unified
        {BPFRL} attach --pod-uid {bed.pod_uid} --rate 2mbit --dry-run
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BPFRL")}
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    relative = bed.pod_cgroup.relative_to(cgroup.mount_point())
    assert done.stdout.rstrip().endswith(f" at /sys/fs/cgroup/unified/{relative}")


def test_other_programs_on_the_cgroup_are_left_alone(bed: Lab, tmp_path: Path) -> None:
    other = _other_program(bed, tmp_path)
    subprocess.run(["bpftool", "cgroup", "attach", bed.pod_cgroup, "egress", "pinned", other, "multi"], check=True)
    [theirs] = attached(bed)
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "2mbit")
    assert theirs in attached(bed)
    assert len(attached(bed)) == 4
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert attached(bed) == [theirs]


def test_a_cgroup_that_another_program_has_to_itself(bed: Lab, tmp_path: Path) -> None:
    other = _other_program(bed, tmp_path)
    subprocess.run(["bpftool", "cgroup", "attach", bed.pod_cgroup, "egress", "pinned", other], check=True)
    [theirs] = attached(bed)
    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit", check=False)
    assert done.returncode == 1
    assert "another program has this cgroup" in done.stderr
    assert done.stderr.count("\n") == 1
    assert attached(bed) == [theirs]
    assert items(bed) == []
    assert sorted(os.listdir(bed.bpffs)) == ["maps.debug", "other", "progs.debug"]


def _other_program(bed: Lab, tmp_path: Path) -> Path:
    source, binary, pin = tmp_path / "other.c", tmp_path / "other.o", bed.bpffs / "other"
    source.write_text('__attribute__((section("cgroup_skb/egress"))) int other(void *skb) { return 1; }\n')
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", source, "-o", binary], check=True)
    subprocess.run(["bpftool", "prog", "load", binary, pin], check=True)
    return pin


def test_list_shows_what_is_broken_and_passes_over_what_is_foreign(bed: Lab, tmp_path: Path) -> None:
    whole, empty, partial = bed.pod_uid, str(uuid.uuid4()), str(uuid.uuid4())
    bed.bpfrl("attach", "--pod-uid", whole, "--rate", "1mbit")
    (bed.bpffs / empty).mkdir()
    (bed.bpffs / partial).mkdir()
    options = ["type", "array", "key", "4", "value", "8", "entries", "1", "name", "odd"]
    subprocess.run(["bpftool", "map", "create", bed.bpffs / partial / "limits", *options], check=True)
    (bed.bpffs / "cilium").mkdir()
    (bed.bpffs / str(uuid.uuid4())).symlink_to(tmp_path)

    found = {item["uid"]: item for item in items(bed)}
    assert set(found) == {whole, empty, partial}
    assert "error" not in found[whole]
    assert "counters is missing: attach the pod again" in found[empty]["error"]
    assert "counters is missing: attach the pod again" in found[partial]["error"]
    table = bed.bpfrl("list").stdout
    assert table.count("broken:") == 2
    assert "cilium" not in table

    # A broken folder is replaced by attaching, and removed by detaching.
    assert bed.bpfrl("detach", "--pod-uid", partial).stdout == f"pod/{partial} detached\n"
    assert bed.bpfrl("detach", "--pod-uid", empty).stdout == f"pod/{empty} detached\n"
    assert [item["uid"] for item in items(bed)] == [whole]
    (bed.bpffs / "cilium").rmdir()


@pytest.mark.parametrize("pin", ["counters", "egress_link", "sockets"])
def test_a_folder_in_a_pins_place_breaks_nothing_else(bed: Lab, pin: str) -> None:
    odd = bed.bpffs / str(uuid.uuid4())
    (odd / pin).mkdir(parents=True)
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    found = {item["uid"]: "error" in item for item in items(bed)}
    assert found == {odd.name: True, bed.pod_uid: False}
    done = bed.bpfrl("detach", "--pod-uid", odd.name, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{odd} holds what was not made by bpfrl" in done.stderr
    (odd / pin).rmdir()
    bed.bpfrl("detach", "--pod-uid", odd.name)
    assert {item["uid"] for item in items(bed)} == {bed.pod_uid}


def test_a_foreign_folder_under_a_pods_name_is_refused_and_kept(bed: Lab, tmp_path: Path) -> None:
    folder = bed.bpffs / bed.pod_uid
    folder.mkdir()
    _other_program(bed, tmp_path).rename(folder / "theirs")
    for command in (("attach", "--rate", "1mbit"), ("detach",)):
        done = bed.bpfrl(*command, "--pod-uid", bed.pod_uid, check=False)
        assert done.returncode == 1
        assert "was not made by bpfrl" in done.stderr
        assert done.stderr.count("\n") == 1
    assert os.listdir(folder) == ["theirs"]
    assert attached(bed) == []


def test_foreign_pins_beside_ours_are_kept(bed: Lab, tmp_path: Path) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    theirs = bed.bpffs / bed.pod_uid / "theirs"
    _other_program(bed, tmp_path).rename(theirs)
    for command in (("attach", "--rate", "2mbit"), ("detach",)):
        done = bed.bpfrl(*command, "--pod-uid", bed.pod_uid, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "was not made by bpfrl" in done.stderr
    assert theirs.exists()
    theirs.unlink()
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert attached(bed) == []


@pytest.mark.parametrize("mark", ["", "~new", "~old"])
def test_links_under_a_pods_name_are_not_followed(bed: Lab, tmp_path: Path, mark: str) -> None:
    (tmp_path / "state").touch()
    link = bed.bpffs / (bed.pod_uid + mark)
    link.symlink_to(tmp_path)
    for command in (("attach", "--rate", "1mbit"), ("detach",)):
        done = bed.bpfrl(*command, "--pod-uid", bed.pod_uid, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"{link} is no folder" in done.stderr
    bed.bpfrl("list")
    assert attached(bed) == []
    assert link.is_symlink()
    assert (tmp_path / "state").exists()


def test_a_limiter_that_lost_a_program_is_shown_as_broken(bed: Lab) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    subprocess.run(["bpftool", "link", "detach", "pinned", bed.bpffs / bed.pod_uid / "egress_link"], check=True)
    assert "egress is not attached" in only(bed)["error"]
    assert " limited: " in bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit").stdout
    assert set(kinds(bed)) == LIMITER
    assert len(kinds(bed)) == 3


def test_one_cgroup_never_has_two_limiters(bed: Lab) -> None:
    """Not under another name, and not above or below each other: they would pace the same sockets."""
    container = bed.pod_cgroup / "container"
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    for path in (bed.pod_cgroup, container, bed.pod_cgroup.parent):
        done = bed.bpfrl("attach", "--cgroup", str(path), "--rate", "2mbit", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "has a limiter under another name" in done.stderr
    assert [item["uid"] for item in items(bed)] == [bed.pod_uid]
    assert len(attached(bed)) == 3
    assert bed.bpfrl("detach", "--cgroup", str(bed.pod_cgroup)).stdout == f"pod/{bed.pod_uid} detached\n"
    assert attached(bed) == []


@pytest.mark.parametrize("mode", [0o700, 0o1777])
def test_without_root(bed: Lab, tmp_path: Path, mode: int) -> None:
    """What needs root says so in a line, and what does not works."""
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    bed.bpffs.chmod(mode)
    (tmp_path / "cache").mkdir()
    tmp_path.chmod(0o777)
    (tmp_path / "cache").chmod(0o777)
    for folder in takewhile(lambda folder: folder != Path(tempfile.gettempdir()), tmp_path.parents):
        folder.chmod(0o755)
    environment = unmeasured() | {
        "BPFRL_BPFFS": str(bed.bpffs),
        "BPFRL_CGROUP_ROOT": str(bed.cgroup_root),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [BPFRL, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, user=65534)

    for arguments in (
        ("list",),
        ("detach", "--pod-uid", bed.pod_uid),
        ("attach", "--pod-uid", bed.pod_uid, "--rate", "2mbit"),
    ):
        done = nobody(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert "needs root" in done.stderr
    assert nobody("generate", "--rate", "1mbit", "-o", str(tmp_path / "pod.o")).returncode == 0
    assert nobody("attach", "--pod-uid", bed.pod_uid, "--rate", "2mbit", "--dry-run").returncode == 0
    assert len(attached(bed)) == 3
    assert only(bed)["egress"]["limit_bits_per_second"] == 1_000_000


def test_a_damaged_object_is_refused_and_the_present_limit_stays(bed: Lab, tmp_path: Path) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    before = attached(bed)
    file = tmp_path / "bad.o"
    bed.bpfrl("generate", "--rate", "2mbit", "-o", str(file))
    file.write_bytes(file.read_bytes()[:5000])
    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(file), check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert attached(bed) == before
    assert only(bed)["egress"]["limit_bits_per_second"] == 1_000_000


def test_what_the_verifier_rejects_leaves_nothing(bed: Lab, tmp_path: Path) -> None:
    """A limiter whose code was tampered with: its first instruction reads what no program may read."""
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    file = tmp_path / "bad.o"
    bed.bpfrl("generate", "--rate", "2mbit", "-o", str(file))
    image = bytearray(file.read_bytes())
    with file.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name("cgroup_skb/egress")
        assert section is not None
        place = section["sh_offset"]
    image[place : place + 8] = bytes.fromhex("7912ff7f00000000")  # r2 = *(u64 *)(r1 + 32767)
    file.write_bytes(sealed(bytes(image)))
    done = bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--object", str(file), check=False)
    assert done.returncode == 1
    assert "the kernel refuses the BPF programs" in done.stderr
    assert "invalid bpf_context access" in done.stderr
    assert done.stderr.count("\n") == 1
    assert attached(bed) == []
    assert sorted(os.listdir(bed.bpffs)) == ["maps.debug", "progs.debug"]


def test_a_pod_whose_cgroup_was_made_anew_is_limited_again(bed: Lab) -> None:
    """A static pod that restarts keeps its UID; the pins outlive the old cgroup."""
    folder = bed.cgroup_root / "kubepods" / "pod0123456789abcdef0123456789abcdef"
    uid = folder.name.removeprefix("pod")
    folder.mkdir(parents=True)
    bed.bpfrl("attach", "--pod-uid", uid, "--rate", "1mbit")
    folder.rmdir()
    assert _until(lambda: only(bed)["cgroup_id"] is None)
    assert f"gone: {uid}: " in bed.bpfrl("list").stdout
    folder.mkdir()
    done = bed.bpfrl("attach", "--pod-uid", uid, "--rate", "1mbit")
    assert " limited: " in done.stdout
    assert only(bed)["cgroup_id"] == cgroup.id_of(folder)
    folder.rmdir()
    assert bed.bpfrl("detach", "--pod-uid", uid).stdout == f"pod/{uid} detached\n"


def _until(condition: object, seconds: float = 5) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_attach_takes_less_than_a_second_with_a_warm_cache(bed: Lab) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
    bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    times = []
    for _ in range(3):
        start = time.monotonic()
        bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "1mbit")
        times.append(time.monotonic() - start)
        bed.bpfrl("detach", "--pod-uid", bed.pod_uid)
    assert min(times) < 1


def test_watch_shows_the_current_rates(bed: Lab) -> None:
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", "10mbit")
    ping = bed.start(bed.in_pod("ping", "-q", "-i", "0.01", "-s", "1000", PEER_ADDRESS))
    environment = os.environ | {"BPFRL_BPFFS": str(bed.bpffs)}
    # A shell's background jobs, and so their children, ignore it otherwise.
    command = ["env", "--default-signal=INT", BPFRL, "list", "-w"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        drawn = [watch.stdout.readline() for _ in range(6)]
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=10)
    ping.terminate()
    assert watch.returncode == 130
    assert not errors.strip()
    assert drawn[0].split() == ["UID", "POD", "EGRESS", "SENDING", "INGRESS", "RECEIVING", "DROPPING"]
    sending = drawn[5].split()[3]
    assert sending.endswith("kbit")
    assert 100 < float(sending.removesuffix("kbit")) < 2000
