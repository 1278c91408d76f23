from __future__ import annotations

import json
import logging
import os
import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bpfrl.errors import ClusterError, InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.master import manifests as module
from bpfrl.master.annotations import EGRESS
from bpfrl.master.manifests import ManifestWatch
from bpfrl.master.pods import Pod, read
from bpfrl.units import Rate
from tests.unit.fakes import HASH, Sink, run, running, uid_of, until

TEN = Limits(egress=Rate(10**7))


def text(number: int, rate: str = "10M", **metadata: Any) -> str:
    """The manifest of the pod with this number."""
    whole = {"uid": uid_of(number), "name": f"cart-{number}", "annotations": {EGRESS: rate}} | metadata
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": whole})


class Folder:
    """A folder of manifests, and what a sink is told of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sink = Sink()
        self.watch = ManifestWatch(path, self.sink)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def look(self) -> tuple[list[str], bool]:
        """The UIDs that the sink is told of, and whether these are all."""
        self.sink.told.clear()
        self.watch.look()
        [(kind, uids, complete)] = self.sink.told
        assert kind == "keep"
        assert isinstance(uids, list)
        return uids, bool(complete)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_pod_is_on_this_machine_and_in_the_default_namespace_unless_it_says_otherwise(folder: Folder) -> None:
    elsewhere = {"status": {"hostIP": "192.0.2.7"}, "spec": {"nodeName": "node-7"}}
    folder.write("one.yaml", text(1))
    folder.write("two.yaml", text(2, namespace="shop") + yaml.safe_dump(elsewhere))
    folder.look()
    assert folder.sink.pods == {
        uid_of(1): Pod(uid_of(1), PodRef(uid_of(1), "default", "cart-1"), "", "127.0.0.1", TEN),
        uid_of(2): Pod(uid_of(2), PodRef(uid_of(2), "shop", "cart-2"), "node-7", "192.0.2.7", TEN),
    }


def test_files_may_hold_several_pods_in_yaml_and_json(folder: Folder) -> None:
    folder.write("a.yaml", "---\n" + text(1) + "---\n" + text(2) + "---\n---\n# nothing\n")
    folder.write("b.yml", text(3))
    folder.write("c.json", json.dumps(yaml.safe_load(text(4))))
    assert folder.look() == ([uid_of(number) for number in (1, 2, 3, 4)], True)


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n---\n"])
def test_a_file_that_is_empty_for_a_moment_counts_as_it_did(folder: Folder, content: str) -> None:
    folder.write("a.yaml", text(1))
    folder.look()
    folder.write("a.yaml", content)
    assert folder.look() == ([uid_of(1)], True)


def test_other_files_are_none_of_its_business(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(
        (".hidden.yaml", "notes.txt", "one.yaml~", "one.yaml.swp", "yaml", ".yaml", "a.YAML")
    ):
        folder.write(name, text(number))
    (folder.path / "folder").mkdir()
    assert folder.look() == ([], True)
    assert not caplog.records


def test_a_static_pods_uid_may_be_its_hash(folder: Folder) -> None:
    folder.write("one.yaml", text(1, uid=HASH))
    assert folder.look() == ([HASH], True)


def test_what_is_no_longer_there_is_no_longer_told(folder: Folder) -> None:
    folder.write("one.yaml", text(1))
    path = folder.write("two.yaml", text(2))
    folder.look()
    path.unlink()
    assert folder.look() == ([uid_of(1)], True)


def test_annotations_that_cannot_be_meant_are_the_pods_problem_and_not_the_files(folder: Folder) -> None:
    folder.write("one.yaml", text(1, "10mbit"))
    assert folder.look() == ([uid_of(1)], True)
    assert EGRESS in folder.sink.pods[uid_of(1)].problem


# Files that cannot be read.


def bomb(collection: str, entry: str = "*{1}") -> str:
    """Collections of which each has nine times the one before it."""
    lines = ["kind: Pod", "a: &a {k: v}"]
    for before, name in pairwise(string.ascii_lowercase):
        entries = ", ".join(entry.format(number, before) for number in range(9))
        lines.append(f"{name}: &{name} {collection.format(entries)}")
    return "\n".join([*lines, "metadata: *z"])


BAD: dict[str, tuple[str | bytes, str]] = {
    "no YAML": ("kind: [", "no YAML: "),
    "a tab": ("kind:\n\tPod", "no YAML: "),
    "no UTF-8": (b"\xff\xfe\xff", "no YAML: "),
    "a NUL": (b"kind: \x00", "no YAML: "),
    "a tag": ("!!python/object:os.system {}", "no YAML: "),
    "too deep": ("[" * 600, "more than 100000 parts, or 64 in each other, are no Pods"),
    "another kind": ("kind: Deployment", "holds Deployment where a Pod is expected"),
    "no kind": ("metadata: {}", "holds something where a Pod is expected"),
    "a text": ("hello", "holds something where a Pod is expected"),
    "a list": ("- kind: Pod", "holds something where a Pod is expected"),
    "an odd kind": ("kind: {a: [1, 2]}", "where a Pod is expected"),
    "a long kind": ("kind: |\n" + "  much\n" * 10_000, "where a Pod is expected"),
    "no metadata": ("kind: Pod", "no Pod: "),
    "no uid": ("kind: Pod\nmetadata: {name: cart-1}", "pod 'cart-1' has no metadata.uid, which names its cgroup"),
    "no such uid": (text(1, uid="cart-1"), "is no pod UID"),
    "no such name": (text(1, name="No Name"), "is no pod name"),
    "a number": (text(1).replace("10M", "10000000"), "no Pod: Expected `str`, got `int` - at `$.metadata.annotations"),
    "a number as name": (text(1, name=7), "no Pod: Expected `str`, got `int` - at `$.metadata.name`"),
    "too large": ("# " + "x" * 2**20, "more than 1048576 byte is no manifest"),
    "a second document": (text(1) + "---\nkind: Service", "holds Service where a Pod is expected"),
    # Bombs: small files, of which parsers make much, or take long for.
    "lists of lists of lists": (bomb("[{}]"), "aliases (*name) are not read in manifests"),
    "maps of maps of maps": (bomb("{{{}}}", "k{}: *{}"), "aliases (*name) are not read in manifests"),
    "merged again and again": (bomb("{{<<: [{}]}}"), "aliases (*name) are not read in manifests"),
    "a list in itself": ("&a [*a]", "aliases (*name) are not read in manifests"),
    "a pod in itself": ("&a {kind: Pod, metadata: *a}", "aliases (*name) are not read in manifests"),
    "deep as a well": ("[" * 500_000, "more than 100000 parts, or 64 in each other, are no Pods"),
    "a step a line": ("\n".join(" " * depth + "a:" for depth in range(1_000)), "more than 100000 parts, or 64 in"),
    "many": ("[" + "a," * 500_000 + "]", "more than 100000 parts, or 64 in each other, are no Pods"),
    "many documents": ("---\nkind: Pod\n" * 60_000, "more than 100000 parts, or 64 in each other, are no Pods"),
    "a number that takes an hour": ("x: 1" + ":59" * 100_000, "a number of 300001 characters is none that a Pod has"),
    "a long tag": (f"!<{'%1b' * 9_000}> 1", "no YAML: could not determine a constructor for the tag '"),
    "a long name": (f"kind: Pod\nmetadata: {{name: {'x' * 9_000}}}", "has no metadata.uid, which names its cgroup"),
    # What YAML takes for something else than text.
    "no such day": (text(1, labels={}) + "created: 2024-13-45\n", ""),
    "no such number": (text(1) + "replicas: !!int many\n", ""),
    "no such truth": (text(1) + "ready: !!bool perhaps\n", ""),
    "no such time": (text(1) + "created: !!timestamp yesterday\n", ""),
    "a number without end": (text(1) + "port: " + "9" * 5_000 + "\n", ""),
}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD.keys())
def test_a_file_that_cannot_be_read_is_told_of_once_and_leaves_others_alone(
    folder: Folder, caplog: pytest.LogCaptureFixture, content: str | bytes, problem: str
) -> None:
    bad = folder.write("bad.yaml", content)
    folder.write("good.yaml", text(9))
    # Nobody knows what it stands for: what is limited stays so.
    assert folder.look() == ([uid_of(9)], False)
    assert folder.look() == ([uid_of(9)], False)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"{bad}: {problem}" if problem.startswith(("no ", "holds", "pod", "more", "aliases")) else f"{bad}: "
    )
    assert problem in message
    assert "\n" not in message
    assert len(message) < 1_000
    bad.unlink()
    assert folder.look() == ([uid_of(9)], True)


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD.keys())
def test_a_file_that_breaks_counts_as_it_did(
    folder: Folder, caplog: pytest.LogCaptureFixture, content: str | bytes, problem: str
) -> None:
    path = folder.write("one.yaml", text(1))
    folder.look()
    before = dict(folder.sink.pods)
    folder.write("one.yaml", content)
    for _ in range(2):
        assert folder.look() == ([uid_of(1)], True)
    assert folder.sink.pods == before
    assert len(caplog.records) == 1
    assert problem in caplog.text
    path.write_text(text(2))
    assert folder.look() == ([uid_of(2)], True)
    # A file that has gone takes what it stood for with it.
    path.unlink()
    folder.write("one.yaml", content)
    assert folder.look()[0] == [uid_of(2)]
    path.unlink()
    assert folder.look() == ([], True)


def test_another_problem_of_the_same_file_is_told_of(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("kind: [", "kind: [", "kind: Service", "kind: Service", text(1), "kind: Service"):
        folder.write("one.yaml", content)
        folder.look()
    assert [("Service" in record.getMessage()) for record in caplog.records] == [False, True, True]


def test_a_folder_with_a_files_name_cannot_be_read(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / "folder.yaml").mkdir()
    assert folder.look() == ([], False)
    assert "cannot be read: Is a directory" in caplog.text


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_not_waited_for(folder: Folder, caplog: pytest.LogCaptureFixture, *, through_a_link: bool) -> None:
    pipe = folder.path / ("pipe" if through_a_link else "one.yaml")
    os.mkfifo(pipe)
    if through_a_link:
        (folder.path / "one.yaml").symlink_to(pipe)
    assert folder.look() == ([], False)
    assert "a pipe, a socket or a device is no manifest" in caplog.text


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "/dev/tty", "/proc/self/fd/0"])
def test_a_device_is_not_even_opened(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    (folder.path / "one.yaml").symlink_to(target)
    folder.write("two.yaml", text(2))
    opened: list[Path] = []
    really = os.open

    def watch(path: Path, *options: int) -> int:
        opened.append(path)
        return really(path, *options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watch)
        assert folder.look() == ([uid_of(2)], False)
    assert opened == [folder.path / "two.yaml"]
    assert "/one.yaml: " in caplog.text


def test_a_link_round_in_circles_cannot_be_read(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / "one.yaml").symlink_to("two.yaml")
    (folder.path / "two.yaml").symlink_to("one.yaml")
    folder.write("three.yaml", text(3))
    assert folder.look() == ([uid_of(3)], False)
    assert caplog.text.count("cannot be read: Too many levels of symbolic links") == 2


def test_what_stands_in_somebody_elses_file_is_not_told(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    secret = folder.write("shadow", "root:$6$salt$secret:19000:0:99999:7:::\ndaemon:*:19000:0\n\t'%@secret\n")
    (folder.path / "one.yaml").symlink_to(secret)
    assert folder.look() == ([], False)
    assert "secret" not in caplog.text


def test_files_that_vanish_while_they_are_read_are_gone(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("a.yaml", text(1))
    folder.write("b.yaml", text(2))
    really = os.open

    def vanish(path: Path, *options: int) -> int:
        if path.name == "a.yaml":
            path.unlink(missing_ok=True)
        return really(path, *options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", vanish)
        assert folder.look() == ([uid_of(2)], False)
    assert folder.look() == ([uid_of(2)], True)


def test_a_link_to_nowhere_cannot_be_read(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / "one.yaml").symlink_to("nowhere")
    assert folder.look() == ([], False)
    assert "cannot be read: No such file or directory" in caplog.text


_PIECES = st.sampled_from(
    [
        *"[]{}:-#&*!|>?%@`'\"\n,~",
        *("kind: Pod\n", "metadata:\n", " uid: ", uid_of(1), "---\n", ": ", "\n  ", "&a ", "*a", "<<: "),
        *("!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "2024-02-30", "0x", "1:2"),
    ]
)


@given(st.binary(max_size=100) | st.lists(_PIECES, max_size=20).map(lambda pieces: "".join(pieces).encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_no_content_of_a_file_is_more_than_a_problem(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.yaml").write_bytes(content)
    try:
        pods = [read(raw) for raw in module.read_file(tmp_path / "any.yaml")]
    except InvalidValueError:
        return
    assert {pod.uid for pod in pods} <= {uid_of(1)}


# The same pod twice.


def test_a_pod_in_two_files_is_the_first_ones_and_that_is_told_once(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("b.yaml", text(1, "1M"))
    first = folder.write("a.yaml", text(1, "10M"))
    for _ in range(3):
        assert folder.look() == ([uid_of(1)], True)
    assert folder.sink.pods[uid_of(1)].limits == TEN
    assert folder.sink.told == [("keep", [uid_of(1)], True)]
    [message] = [record.getMessage() for record in caplog.records]
    assert message == f"{folder.path / 'b.yaml'}: pod {uid_of(1)} is in {first} already, which counts"
    first.unlink()
    folder.look()
    assert folder.sink.pods[uid_of(1)].limits == Limits(egress=Rate(10**6))


def test_a_pod_twice_in_a_file_is_the_first_one(folder: Folder) -> None:
    folder.write("a.yaml", text(1, "10M") + "---\n" + text(1, "1M"))
    assert folder.look() == ([uid_of(1)], True)
    assert folder.sink.pods[uid_of(1)].limits == TEN


# The folder itself.


@pytest.mark.parametrize("make", [lambda _: None, Path.touch], ids=["missing", "a file"])
def test_without_a_folder_it_does_not_start(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "pods")
    with pytest.raises(ClusterError, match=r"/pods is no folder of Pod manifests$"):
        ManifestWatch(tmp_path / "pods", Sink())


def test_a_folder_that_cannot_be_read_keeps_its_pods(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("one.yaml", text(1))
    folder.look()

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        folder.watch.look()
    assert folder.sink.told == [("keep", [uid_of(1)], True)]
    assert f"{folder.path}: Permission denied; the pods in it stay as they are" in caplog.text
    assert folder.look() == ([uid_of(1)], True)


def test_a_folder_that_has_gone_keeps_its_pods(tmp_path: Path) -> None:
    (tmp_path / "pods").mkdir()
    folder = Folder(tmp_path / "pods")
    folder.write("one.yaml", text(1)).unlink()
    folder.write("two.yaml", text(2))
    folder.look()
    folder.path.rename(tmp_path / "elsewhere")
    folder.watch.look()
    assert folder.sink.told == [("keep", [uid_of(2)], True)]


class ConfigMap:
    """A mounted ConfigMap: files that link to a folder, which is exchanged whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = 0

    def write(self, files: dict[str, str]) -> None:
        self._version += 1
        version = self._path / f"..{self._version}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_text(content)
            if not (self._path / name).is_symlink():
                (self._path / name).symlink_to(Path("..data") / name)
        (self._path / "..data_tmp").symlink_to(version.name)
        os.replace(self._path / "..data_tmp", self._path / "..data")  # noqa: PTH105 - a link, and not where it leads


def test_a_mounted_config_map_is_read_through_its_links(folder: Folder) -> None:
    mounted = ConfigMap(folder.path)
    mounted.write({"one.yaml": text(1), "two.yaml": text(2)})
    assert folder.look() == ([uid_of(1), uid_of(2)], True)
    mounted.write({"one.yaml": text(3), "two.yaml": text(2)})
    assert folder.look() == ([uid_of(2), uid_of(3)], True)


# The loop, with changes that the kernel tells of.


def test_a_change_is_seen_soon(folder: Folder) -> None:
    async def work() -> None:
        folder.write("one.yaml", text(1))
        async with running(folder.watch.run()):
            await until(lambda: folder.sink.pods.keys() == {uid_of(1)})
            folder.write("two.yaml", text(2))
            await until(lambda: folder.sink.pods.keys() == {uid_of(1), uid_of(2)})
            folder.write("one.yaml", text(1, "1M"))
            await until(lambda: folder.sink.pods[uid_of(1)].limits == Limits(egress=Rate(10**6)))
            folder.write(".three.yaml.tmp", text(3)).rename(folder.path / "two.yaml")
            await until(lambda: folder.sink.pods.keys() == {uid_of(1), uid_of(3)})
            (folder.path / "one.yaml").unlink()
            await until(lambda: folder.sink.pods.keys() == {uid_of(3)})

    run(work())


def test_a_change_of_a_mounted_config_map_is_seen_soon(folder: Folder) -> None:
    async def work() -> None:
        mounted = ConfigMap(folder.path)
        mounted.write({"one.yaml": text(1)})
        async with running(folder.watch.run()):
            await until(lambda: folder.sink.pods.keys() == {uid_of(1)})
            mounted.write({"one.yaml": text(2)})
            await until(lambda: folder.sink.pods.keys() == {uid_of(2)})

    run(work())


def test_a_change_that_nobody_tells_of_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_AGAIN_MS", 50)
    (tmp_path / "pods").mkdir()
    folder = Folder(tmp_path / "pods")
    (folder.path / "one.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (tmp_path / "elsewhere.yaml").write_text(text(1))

    async def work() -> None:
        async with running(folder.watch.run()):
            await until(lambda: folder.sink.pods.keys() == {uid_of(1)})
            # The kernel tells of changes in the folder, and this is none.
            (tmp_path / "elsewhere.yaml").write_text(text(2))
            await until(lambda: folder.sink.pods.keys() == {uid_of(2)})

    run(work())


def test_a_folder_that_comes_back_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GONE_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LOOK_AGAIN_MS", 50)
    (tmp_path / "pods").mkdir()
    folder = Folder(tmp_path / "pods")

    async def work() -> None:
        folder.write("one.yaml", text(1))
        async with running(folder.watch.run()):
            await until(lambda: folder.sink.pods.keys() == {uid_of(1)})
            folder.path.rename(tmp_path / "elsewhere")
            folder.path.mkdir()
            folder.write("two.yaml", text(2))
            await until(lambda: folder.sink.pods.keys() == {uid_of(2)})

    run(work())


def test_a_folder_that_is_gone_at_first_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_GONE_SECONDS", 0.02)
    (tmp_path / "pods").mkdir()
    folder = Folder(tmp_path / "pods")
    folder.path.rmdir()

    async def work() -> None:
        async with running(folder.watch.run()):
            await until(lambda: bool(caplog.records))
            folder.path.mkdir()
            folder.write("one.yaml", text(1))
            await until(lambda: folder.sink.pods.keys() == {uid_of(1)})

    run(work())
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
