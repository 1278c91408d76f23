from __future__ import annotations

from pathlib import Path

import pytest

from bpfrl.mounts import Mount, are_the_machines, mounts

# proc_pid_mountinfo(5): id parent major:minor root path options [optional fields] - type source options
TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - tmpfs tmpfs rw,mode=755
41 31 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:10 master:3 - cgroup2 cgroup2 rw,nsdelegate
42 23 0:40 / /sys/fs/bpf rw,nosuid,nodev,noexec,relatime shared:11 - bpf bpf rw,mode=700
43 27 0:38 /kubepods.slice /host\040groups/kube\011pods rw - cgroup2 cgroup2 rw
44 27 0:41 / /mnt/a\134b\012c rw - bpf none rw
45 27 0:42 /a\040b /mnt/\134040 ro unbindable - bpf  rw
46 27 0:43 / /mnt/bpf rw - fuse.bpf bpf rw
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    return path


def test_mounts_of_one_type_come_in_the_tables_order(table: Path) -> None:
    assert mounts("cgroup2", table) == [
        Mount(Path("/sys/fs/cgroup/unified"), "/", "0:38", "cgroup2"),
        Mount(Path("/host groups/kube\tpods"), "/kubepods.slice", "0:38", "cgroup2"),
    ]


def test_escaped_characters_are_read_once_and_optional_fields_are_skipped(table: Path) -> None:
    assert mounts("bpf", table) == [
        Mount(Path("/sys/fs/bpf"), "/", "0:40", "bpf"),
        Mount(Path("/mnt/a\\b\nc"), "/", "0:41", "bpf"),
        Mount(Path("/mnt/\\040"), "/a b", "0:42", "bpf"),
    ]


def test_a_type_that_is_not_mounted_has_no_mounts(table: Path) -> None:
    assert mounts("cgroup", table) == []
    assert mounts("bp", table) == []


@pytest.mark.parametrize(
    "name",
    [
        *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"),  # ends of lines for str.splitlines
        *("\u00a0", "\u3000", "\x1f"),  # spaces for str.split
    ],
    ids=ascii,
)
def test_a_pods_oddly_named_mount_hides_no_other(tmp_path: Path, name: str) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(f"50 27 0:50 / /pod/sub{name}path rw - ext4 /dev/vda rw\n{TABLE}".encode())
    assert len(mounts("bpf", table)) == 3
    assert mounts("ext4", table) == [Mount(Path(f"/pod/sub{name}path"), "/", "0:50", "ext4")]


def test_a_path_that_is_no_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(b"50 27 0:50 / /pod/\xff\xfe rw - bpf bpf rw\n")
    [mount] = mounts("bpf", table)
    assert bytes(mount.path) == b"/pod/\xff\xfe"


def test_this_processes_own_mounts_are_read_by_default() -> None:
    assert Path("/proc") in [mount.path for mount in mounts("proc")]


def test_mounts_are_the_machines_where_process_1_sees_the_same(tmp_path: Path) -> None:
    own, first = tmp_path / "own", tmp_path / "first"
    own.symlink_to("mnt:[4026531841]")
    assert not are_the_machines(own, first)
    first.symlink_to("mnt:[4026531841]")
    assert are_the_machines(own, first)
    first.unlink()
    first.symlink_to("mnt:[4026532000]")
    assert not are_the_machines(own, first)
