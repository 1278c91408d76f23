"""What the doctor finds, each thing missing in turn; tests/kernel has it look at a real machine."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bpfrl import cgroup
from bpfrl.bpf import generator, libbpf, probe
from bpfrl.bpf.probe import Feature
from bpfrl.cgroup import CgroupTree
from bpfrl.cli import cli
from bpfrl.errors import (
    CertificateError,
    CgroupNotFoundError,
    CompilerError,
    KernelError,
    PermissionDeniedError,
    VerifierError,
)
from bpfrl.findings import Finding, Mark
from bpfrl.mounts import Mount
from bpfrl.node import doctor
from bpfrl.node.agent import Agent
from bpfrl.rpc import tls
from tests.unit.conftest import make
from tests.unit.fakes import UID, uid_of

pytestmark = pytest.mark.usefixtures("logs")

OK, WARNING, MISSING = Mark.OK, Mark.WARNING, Mark.MISSING


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# The machine.


@pytest.mark.parametrize(
    ("held", "mark", "absent"),
    [
        ("000001ffffffffff", OK, ""),
        ("000001fffeffffff", OK, ""),  # CAP_SYS_RESOURCE, which nothing needs
        ("0000000000000000", MISSING, "CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_SYS_ADMIN"),
        ("000001fffff7ffff", WARNING, "CAP_SYS_PTRACE"),
        ("0000000000281004", OK, ""),  # what the chart gives
    ],
)
def test_capabilities_count_and_not_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, mark: Mark, absent: str
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tbpfrl\nCapPrm:\t0\nCapEff:\t{held}\n")
    monkeypatch.setattr(doctor, "_STATUS", status)
    found = doctor.privileges()
    assert found.mark is mark
    assert (f"without {absent}" in found.found[0]) == bool(absent)
    assert bool(found.advice) == bool(absent)


@pytest.mark.parametrize(
    ("release", "mark"),
    [("5.9.16", MISSING), ("4.19", MISSING), ("5.10.0-rc1", OK), ("6.1.0-18-amd64", OK), ("odd", OK)],
)
def test_a_kernel_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, release: str, mark: Mark) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    assert doctor.kernel().mark is mark
    assert f"Linux {release}" in doctor.kernel().found[0]


def test_a_kernel_without_btf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BTF", tmp_path / "vmlinux")
    assert "CONFIG_DEBUG_INFO_BTF=y" in doctor.kernel_btf().advice
    (tmp_path / "vmlinux").touch()
    assert doctor.kernel_btf().mark is OK


@pytest.mark.parametrize(("first", "layout"), [([], "unified"), (["cgroup"], "hybrid: version 1 is mounted too")])
def test_the_layout_of_cgroups_is_told(monkeypatch: pytest.MonkeyPatch, first: Sequence[str], layout: str) -> None:
    found = [Mount(Path("/sys/fs/cgroup"), "/", "0:1", kind) for kind in first]
    monkeypatch.setattr(doctor, "mounts", lambda kind: [each for each in found if each.type == kind])
    monkeypatch.setattr(doctor, "mount_point", lambda: Path("/sys/fs/cgroup"))
    assert doctor.cgroups() == Finding("cgroup v2", OK, (f"/sys/fs/cgroup, {layout}",))


def test_without_cgroup_v2_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "mount_point", raising(CgroupNotFoundError("cgroup v2 is not mounted")))
    found = doctor.cgroups()
    assert (found.mark, found.found) == (MISSING, ("cgroup v2 is not mounted",))


def test_the_pods_are_counted_for_each_driver(tmp_path: Path) -> None:
    systemd = make(tmp_path / "kubepods.slice" / "kubepods-burstable.slice").parent
    for number, stem in enumerate(("kubepods-burstable.slice/kubepods-burstable", "kubepods")):
        make(systemd / f"{stem}-pod{uid_of(number).replace('-', '_')}.slice" / "container")
    make(tmp_path / "kubelet" / "kubepods" / "besteffort" / f"pod{UID}" / "container")
    make(tmp_path / "system.slice" / "podman.service")
    tree = CgroupTree(tmp_path)
    found = doctor.pods(lambda: tree)
    assert found.mark is OK
    assert sorted(found.found) == sorted(
        (
            f"{tmp_path}/kubepods.slice, systemd driver",
            f"{tmp_path}/kubelet/kubepods, cgroupfs driver",
            "3 pods",
        )
    )


def test_a_machine_without_a_kubelet_is_told_what_it_can_do(tmp_path: Path) -> None:
    found = doctor.pods(lambda: CgroupTree(tmp_path))
    assert (found.mark, "--cgroup PATH" in found.advice) == (WARNING, True)
    assert doctor.pods(raising(CgroupNotFoundError("not mounted"))).found == ("not mounted",)


def test_a_bpffs_is_written_to_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent, "is_mounted", lambda _: True)
    assert doctor.bpffs(Agent(tmp_path)) == Finding("bpffs", OK, (f"{tmp_path}, writable",))
    assert list(tmp_path.iterdir()) == []


def test_a_bpffs_that_is_not_there_yet_can_be_mounted_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent, "is_mounted", lambda _: False)
    assert doctor.bpffs(Agent(tmp_path)).mark is OK
    (tmp_path / "file").touch()
    full = doctor.bpffs(Agent(tmp_path))
    assert (full.mark, "not empty" in full.found[0], "--bpffs" in full.advice) == (MISSING, True, True)
    gone = doctor.bpffs(Agent(tmp_path / "nowhere"))
    assert (gone.mark, "No such file" in gone.found[0]) == (MISSING, True)
    monkeypatch.setattr(Agent, "is_mounted", raising(PermissionDeniedError("cannot look: this needs root")))
    assert doctor.bpffs(Agent(tmp_path)).found == ("cannot look: this needs root",)


def test_without_bccs_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "version", raising(KernelError("libbpf is missing: apt-get install python3-bpfcc")))
    assert doctor.library() == Finding("libbpf", MISSING, ("libbpf is missing",), "apt-get install python3-bpfcc")
    monkeypatch.setattr(libbpf, "version", lambda: "v9.9")
    assert doctor.library().found == ("v9.9",)


def test_without_clang_the_cache_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "compile_object", lambda _: b"")
    monkeypatch.setattr(subprocess, "run", raising(FileNotFoundError()))
    assert doctor.compiler().found == ("no clang, but the compiled programs are in the cache",)
    monkeypatch.setattr(generator, "compile_object", raising(CompilerError("clang is not installed")))
    found = doctor.compiler()
    assert (found.mark, found.found) == (MISSING, ("clang is not installed",))
    assert "apt-get install clang" in found.advice


@pytest.mark.parametrize("needed", [True, False])
def test_what_the_kernel_cannot_do_says_since_when_others_can(monkeypatch: pytest.MonkeyPatch, *, needed: bool) -> None:
    monkeypatch.setattr(libbpf, "version", lambda: "v1")
    instead = "" if needed else "nothing stays"
    feature = Feature("links", "5.7", "attaching", instead, raising(VerifierError("unknown func")))
    advice = "Linux 5.7 has it, for attaching" + ("" if needed else "; here, nothing stays")
    expected = Finding("links", MISSING if needed else WARNING, ("unknown func",), advice)
    assert doctor.kernel_feature(feature) == expected
    denied = doctor.kernel_feature(feature._replace(probe=raising(PermissionDeniedError("no"))))
    assert (denied.found, denied.advice) == (("not tried: no",), "run bpfrl as root")
    assert doctor.kernel_feature(feature._replace(probe=lambda: None)).mark is OK
    monkeypatch.setattr(libbpf, "version", raising(KernelError("libbpf is missing: apt-get install python3-bpfcc")))
    untried = doctor.kernel_feature(feature)
    assert (untried.mark, untried.found) == (MISSING if needed else WARNING, ("not tried: libbpf is missing",))


NEEDED = [feature.name for feature in probe.FEATURES if feature.needed]


def lacking(monkeypatch: pytest.MonkeyPatch, lacks: str, error: Exception | None = None) -> None:
    """Play a kernel that has all features but one."""
    refuse = raising(error or VerifierError("unknown func bpf_reserve_hdr_opt#144"))
    features = (each._replace(probe=refuse if each.name == lacks else lambda: None) for each in probe.FEATURES)
    monkeypatch.setattr(probe, "FEATURES", tuple(features))
    monkeypatch.setattr(platform, "release", lambda: "5.4.0-42-generic")
    monkeypatch.setattr(libbpf, "version", lambda: "v1")


@pytest.mark.parametrize("lacks", NEEDED)
def test_a_kernel_that_is_refused_is_told_what_it_lacks_and_the_version_that_has_it(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    lacking(monkeypatch, lacks)
    [feature] = [each for each in probe.FEATURES if each.name == lacks]
    found = doctor.kernel_feature(feature)
    assert (found.mark, f"Linux {feature.since} has it" in found.advice) == (MISSING, True)
    assert doctor.kernel().advice == "bpfrl needs Linux 5.10 or newer"
    explained = probe.explain(VerifierError("the kernel refuses the BPF programs: 7: (85) call"))
    assert type(explained) is VerifierError
    assert str(explained) == (
        f"this kernel (5.4.0-42-generic) has no {lacks}, for {feature.purpose}: bpfrl needs Linux 5.10 or newer"
    )


def test_what_a_kernel_does_without_explains_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = VerifierError("the kernel refuses the BPF programs: R1 invalid mem access")
    optional = [each.name for each in probe.FEATURES if not each.needed]
    assert optional
    for name in optional:
        lacking(monkeypatch, name)
        assert probe.explain(refused) is refused
        monkeypatch.undo()


def test_a_kernel_that_is_new_enough_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_NET_ADMIN, say, what needs it cannot be tried either."""
    lacking(monkeypatch, "cgroup links", KernelError("cannot attach: another program has this cgroup to itself"))
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-50-cloud-amd64")
    refused = KernelError("cannot attach")
    assert probe.explain(refused) is refused


@pytest.mark.parametrize("error", [PermissionDeniedError("no"), probe.UntriedError("read-only here")])
def test_what_cannot_be_tried_explains_no_refusal(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lacking(monkeypatch, "cgroup links", error)
    refused = KernelError("cannot attach")
    assert probe.explain(refused) is refused


class Loads:
    """The kernel, which takes all objects but some."""

    def __init__(self, refused: dict[bytes, Exception]) -> None:
        self._refused = refused

    def __call__(self, image: bytes) -> Loads:
        if image in self._refused:
            raise self._refused[image]
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


PROGRAMS: dict[str, tuple[dict[bytes, Exception], Mark]] = {
    "all": ({}, OK),
    "not the limiter": ({b"limiter.bpf.c": VerifierError("cross")}, MISSING),
    "not what reaches sockets": ({b"sockets.bpf.c": VerifierError("cross")}, WARNING),
    "neither": ({b"limiter.bpf.c": VerifierError("cross"), b"cooperate.bpf.c": VerifierError("cross")}, MISSING),
    "nobody may": ({b"limiter.bpf.c": PermissionDeniedError("needs root")}, MISSING),
}


@pytest.mark.parametrize(("refused", "mark"), PROGRAMS.values(), ids=PROGRAMS)
def test_the_programs_themselves_are_loaded(
    monkeypatch: pytest.MonkeyPatch, refused: dict[bytes, Exception], mark: Mark
) -> None:
    monkeypatch.setattr(generator, "compile_object", str.encode)
    monkeypatch.setattr(doctor, "LoadedObject", Loads(refused))
    found = doctor.programs()
    assert found.mark is mark
    assert bool(found.advice) == (mark is not OK)


def test_every_feature_is_tried_under_a_name_of_its_own() -> None:
    names = [name for name, _ in doctor.checks(Agent(Path("/x")), lambda: CgroupTree(Path("/x")))]
    assert len(set(names)) == len(names)
    assert {feature.name for feature in probe.FEATURES} < set(names)
    assert names[0] == "privileges"
    assert all(feature.purpose and feature.since for feature in probe.FEATURES)


# The command.

GOOD, ODD, BAD = Finding("a", OK, ("fine",)), Finding("b", WARNING, ("odd",), "look"), Finding("c", MISSING, ("no",))


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(cli, ["doctor", *map(str, arguments)], prog_name="bpfrl")


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found on the machine."""
    found = [GOOD]
    monkeypatch.setattr(doctor, "checks", lambda *_: [(each.name, lambda each=each: each) for each in found])
    monkeypatch.setattr(cgroup, "mount_point", lambda: Path("/sys/fs/cgroup"))
    monkeypatch.delenv("BPFRL_CERTS", raising=False)
    return found


@pytest.mark.parametrize(("more", "code"), [((), 0), ((ODD,), 0), ((ODD, BAD), 1)])
def test_the_exit_status_says_whether_anything_is_missing(
    findings: list[Finding], more: Sequence[Finding], code: int
) -> None:
    findings += more
    result = run()
    assert (result.exit_code, result.stderr) == (code, "")
    assert len(result.stdout.splitlines()) == len(findings) + bool(more)
    document = json.loads(run("-o", "json").stdout)
    assert document["ok"] is (code == 0)
    assert [check["name"] for check in document["checks"]] == [each.name for each in findings]
    assert run("-o", "yaml").stdout.startswith(f"ok: {'true' if code == 0 else 'false'}\n")


def test_a_row_says_how_it_is_what_was_found_and_what_to_do(findings: list[Finding]) -> None:
    findings += [ODD, BAD]
    assert run().stdout.splitlines() == [
        "ok       a  fine",
        "warning  b  odd",
        "            -> look",
        "missing  c  no",
    ]


USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "trust in everybody and somebody": (("--certs", "x", "--insecure"), "use one of --certs DIR and"),
    "a node without trust": (("--node", "192.0.2.1"), "--node needs --certs DIR (bpfrl certs init makes one"),
    "no TLS beyond loopback": (("--node", "h", "--insecure"), "--insecure is for loopback only: h needs --certs DIR"),
    "trust in nobody": (("--insecure",), "--insecure goes with --node"),
    "no node": (("--node", "h:x", "--insecure"), "'h:x' is no node's address"),
    "no such form": (("-o", "text"), "'text' is not one of 'table', 'json', 'yaml'"),
    "an argument": (("all",), "unexpected extra argument"),
    "no such port": (("--node-port", "70000"), "70000 is not in the range"),
}


@pytest.mark.usefixtures("findings")
@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line(arguments: Sequence[str], advice: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert advice in result.stderr
    assert result.stderr.removesuffix("\n").isprintable()


@pytest.mark.usefixtures("findings")
def test_what_is_named_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def nodes(targets: Sequence[tuple[str, int]], certificates: object) -> list[Finding]:
        asked.append((targets, certificates))
        return [ODD]

    async def cluster(kubeconfig: Path | None, context: str | None) -> list[Finding]:
        asked.append((kubeconfig, context))
        return [BAD]

    import bpfrl.master.checks  # noqa: PLC0415
    import bpfrl.rpc.checks  # noqa: PLC0415

    monkeypatch.setattr(bpfrl.rpc.checks, "nodes", nodes)
    monkeypatch.setattr(bpfrl.master.checks, "cluster", cluster)
    result = run("--node", "127.0.0.1", "--node", "[::1]:7", "--insecure", "--kubeconfig", "/k", "--context", "c")
    assert result.exit_code == 1
    assert asked == [([("127.0.0.1", 10002), ("::1", 7)], None), (Path("/k"), "c")]
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok", "warning", "->", "missing"]


@pytest.mark.usefixtures("findings")
def test_certificates_that_cannot_be_used_ask_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tls, "Certificates", raising(CertificateError("for node.bpfrl")))
    result = run("--certs", tmp_path, "--node", "127.0.0.1")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[1].split()[:2] == ["missing", "certificates"]
    assert any("not asked: for node.bpfrl" in line for line in lines)
