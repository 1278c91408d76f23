from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from bpfrl import __version__, cgroup
from bpfrl.bpf import generator
from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cli import cli
from bpfrl.errors import BpfrlError, BrokenLimiterError, CompilerError, KernelError, PermissionDeniedError
from bpfrl.limits import Change, Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
from tests.measuring import unmeasured
from tests.unit.conftest import forget_programs, make

pytestmark = pytest.mark.usefixtures("logs")

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
STATIC_UID = "0123456789abcdef0123456789abcdef"
POD = ("--pod-uid", UID)
NOBODY = 65534
COMMAND = Path(sys.executable).with_name("bpfrl")

WEB = Status(
    PodRef(UID, "shop", "cart-0"),
    Limits(Rate(10**7), None, 65_536),
    Counters(1_000, 1_500_000, 2, 3_000),
    Counters(4, 5, 6, 7),
    4_711,
    1_700_000_000.0,
)
BROKEN = Broken(STATIC_UID, "attach or detach was cut off: repeat it")


def run(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner(env={"COLUMNS": None}).invoke(cli, [str(each) for each in arguments], prog_name="bpfrl")


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command as it is installed."""
    options.setdefault("stdout", subprocess.PIPE)
    if "user" in options:
        options.setdefault("env", unmeasured())
    return subprocess.run([COMMAND, *arguments], stderr=subprocess.PIPE, timeout=30, check=False, **options)


def failure(result: Result | subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line that a failed command has said, without its end."""
    if isinstance(result, Result):
        exit_code, stdout, stderr = result.exit_code, result.stdout, result.stderr
    else:
        exit_code, stdout, stderr = result.returncode, (result.stdout or b"").decode(), result.stderr.decode()
    assert exit_code == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.endswith("\n")
    line = stderr.removesuffix("\n")
    assert line.isprintable(), stderr
    assert line.startswith("bpfrl")
    return line


def success(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


# Help.


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], *([name] for name in sorted(cli.commands))])
def test_every_command_explains_itself_and_each_of_its_options(command: Sequence[str], flag: str) -> None:
    text = success(run(*command, flag))
    assert text.startswith(f"Usage: {' '.join(['bpfrl', *command])} [OPTIONS]")
    assert max(map(len, text.splitlines())) <= 100
    described: click.Command = cli.commands[command[0]] if command else cli
    assert described.help
    for parameter in described.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert all(name in text for name in parameter.opts)


def test_the_commands_are_those_that_operators_know() -> None:
    assert sorted(cli.commands) == [
        *("attach", "certs", "completion", "detach", "doctor", "explain", "generate", "list"),
        *("serve-master", "serve-node"),
    ]


def test_without_a_command_it_shows_the_help_and_fails() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: bpfrl [OPTIONS] COMMAND [ARGS]...\n")
    assert result.stderr.splitlines() == run("--help").stdout.splitlines()


def test_the_version_is_told() -> None:
    assert success(run("--version")) == f"bpfrl, version {__version__}\n"


# What was typed cannot be meant: exit 2, and one line that says what to do.

USAGE_ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "no such command": (("atach",), "No such command 'atach'"),
    "no such option": (("--bpfs", "/x", "list"), "No such option '--bpfs'"),
    "no such option of a command": (("attach", "--uid", UID), "bpfrl attach: No such option '--uid'"),
    "an argument too many": (("list", "all"), "unexpected extra argument"),
    "an option without its value": (("attach", *POD, "--rate"), "'--rate' requires an argument"),
    "generate: nowhere to write": (("generate", "--rate", "1mbit"), "Missing option '-o' / '--output'"),
    "generate: no limit": (("generate", "-o", "x"), "use --rate, --egress or --ingress, for example --rate 10mbit"),
    "generate: only a burst": (("generate", "--burst", "64Ki", "-o", "x"), "no limit is given"),
    "generate: a name alone": (
        ("generate", "--rate", "1M", "--pod-name", "a/b", "-o", "x"),
        "--pod-name goes with --pod-uid",
    ),
    "rate: no unit": (("generate", "--rate", "10x", "-o", "x"), "'--rate': rate '10x' has no known unit: write it as"),
    "rate: bytes": (("generate", "--egress", "10MB/s", "-o", "x"), "'--egress': rate '10MB/s' may mean bits or bytes"),
    "rate: thousandths": (("generate", "--ingress", "10m", "-o", "x"), "did you mean 10M?"),
    "rate: negative": (("generate", "--rate", "-1mbit", "-o", "x"), "is not a positive number"),
    "rate: too fast": (("generate", "--rate", "1e999", "-o", "x"), "it must be 1kbit to 1000tbit"),
    "rate: control characters": (
        ("generate", "--rate", "1\x1b[31m\n2", "-o", "x"),
        r"'1\x1b[31m\n2' is not a positive",
    ),
    "rate: empty": (("generate", "--rate", "", "-o", "x"), "rate '' is not a positive number"),
    "burst: kilobytes": (("attach", *POD, "--rate", "1M", "--burst", "64kb"), "write it in bytes as 64Ki"),
    "burst: too small": (("attach", *POD, "--rate", "1M", "--burst", "100"), "it must be 1500 (one packet) to 16Gi"),
    "burst: too large": (("attach", *POD, "--rate", "1M", "--burst", "1e999"), "size '1e999' is out of range"),
    "attach: no pod": (("attach", "--rate", "1M"), "use --pod-uid UID, or --cgroup PATH"),
    "attach: no limit": (("attach", *POD), "use --rate, --egress or --ingress"),
    "attach: a pod's name for a UID": (("attach", "--pod-uid", "cart-0", "--rate", "1M"), "kubectl get pod NAME -o"),
    "attach: a UID with a path": (("attach", "--pod-uid", "../x", "--rate", "1M"), "'../x' is no pod UID"),
    "attach: a name alone": (
        ("attach", "--cgroup", "/x", "--rate", "1M", "--pod-name", "a/b"),
        "--pod-name goes with --pod-uid",
    ),
    "attach: a name without namespace": (
        ("attach", *POD, "--rate", "1M", "--pod-name", "cart"),
        "write it as NAMESPACE/NAME",
    ),
    "attach: a name that cannot be": (
        ("attach", *POD, "--rate", "1M", "--pod-name", "shop/Cart", "--dry-run"),
        "'Cart' is no pod name: lower-case letters",
    ),
    "attach: no object": (("attach", *POD, "--object", "/nonexistent/x.o"), "'/nonexistent/x.o': No such file"),
    "attach: an object and a rate": (
        ("attach", *POD, "--object", "/dev/null", "--rate", "1M"),
        "leave out --rate, --egress, --ingress and --burst",
    ),
    "attach: an object and a burst": (("attach", *POD, "--object", "/dev/null", "--burst", "1Mi"), "leave out --rate"),
    "attach: waiting backwards": (("attach", *POD, "--rate", "1M", "--wait", "-1"), "'--wait': -1"),
    "attach: waiting for what": (("attach", *POD, "--rate", "1M", "--wait", "1m"), "'1m' is not a valid float"),
    "attach: no cgroup": (
        ("attach", "--cgroup", "/nonexistent", "--rate", "1M", "--dry-run"),
        "'/nonexistent' is no cgroup: No such file or directory",
    ),
    "attach: a cgroup's name over lines": (
        ("attach", "--cgroup", "/a\nb", "--rate", "1M", "--dry-run"),
        "'/a b' is no cgroup",
    ),
    "detach: no pod": (("detach",), "use one of --pod-uid UID, --cgroup PATH and --all"),
    "detach: all and one": (("detach", "--all", *POD), "use one of --pod-uid UID, --cgroup PATH and --all"),
    "detach: a pod and a cgroup": (("detach", "--cgroup", "/x", *POD), "use one of"),
    "detach: no UID": (("detach", "--pod-uid", "web"), "'web' is no pod UID"),
    **{
        f"attach: cooperation and {' '.join(others) or 'nowhere'}": (
            ("attach", "--cooperate", *others),
            "bpfrl attach: --cooperate goes with --cgroup, the one that holds all pods, and nothing else",
        )
        for others in (
            (),
            POD,
            ("--rate", "1M"),
            ("--cgroup", "/x", *POD),
            ("--cgroup", "/x", *POD, "--pod-name", "a/b"),
            ("--cgroup", "/x", "--rate", "1M"),
            ("--cgroup", "/x", "--egress", "1M"),
            ("--cgroup", "/x", "--ingress", "1M"),
            ("--cgroup", "/x", "--burst", "64Ki"),
            ("--cgroup", "/x", "--object", "/dev/null"),
            ("--cgroup", "/x", "--wait", "1"),
            ("--cgroup", "/x", "--dry-run"),
        )
    },
    "attach: cooperation of a name alone": (
        ("attach", "--cooperate", "--cgroup", "/x", "--pod-name", "a/b"),
        "--pod-name goes with --pod-uid",
    ),
    "attach: cooperation of no cgroup": (
        ("attach", "--cooperate", "--cgroup", "/nonexistent"),
        "'/nonexistent' is no cgroup: No such file or directory",
    ),
    **{
        f"detach: cooperation and {' '.join(others) or 'nowhere'}": (
            ("detach", "--cooperate", *others),
            "bpfrl detach: --cooperate goes with --cgroup, as at bpfrl attach, and nothing else",
        )
        for others in (
            (),
            POD,
            ("--all",),
            ("--all", *POD),
            ("--cgroup", "/x", *POD),
            ("--cgroup", "/x", "--all"),
        )
    },
    "detach: cooperation of no cgroup": (
        ("detach", "--cooperate", "--cgroup", "/nonexistent"),
        "'/nonexistent' is no cgroup: No such file or directory",
    ),
    "cooperation with a value": (("attach", "--cooperate=yes", "--cgroup", "/x"), "does not take a value"),
    "list: no such form": (("list", "-o", "xml"), "'xml' is not one of 'table', 'wide', 'json', 'yaml', 'name'"),
    "list: watching json": (("list", "-w", "-o", "json"), "--watch draws tables: it does not go with -o json"),
}


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent fails the test if anything is asked of it."""

    def fail(*_: object) -> None:
        pytest.fail("the agent was asked")

    for method in (
        *("attach", "detach", "detach_cgroup", "limiters", "sweep"),
        *("cooperate", "stop_cooperating", "cooperating", "mount"),
    ):
        monkeypatch.setattr(Agent, method, fail)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("arguments", "advice"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_what_cannot_be_meant_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = failure(run(*arguments), 2)
    assert advice in line
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("attach", "--bogus"), ("generate",), ("list", "-o", "x"), ("detach",)])
def test_a_usage_error_names_the_help_to_read(arguments: Sequence[str]) -> None:
    assert failure(run(*arguments), 2).endswith(f"(see bpfrl {arguments[0]} --help)")


def test_the_installed_command_fails_likewise() -> None:
    assert "use --pod-uid UID" in failure(process("attach", "--rate", "1mbit"), 2)


# Generate.


@pytest.mark.parametrize(
    ("arguments", "pod", "limits"),
    [
        (("--rate", "10mbit"), None, Limits(Rate(10**7), Rate(10**7))),
        (("--egress", "1M"), None, Limits(egress=Rate(10**6))),
        (("--ingress", "2gbit"), None, Limits(ingress=Rate(2 * 10**9))),
        (("--rate", "1M", "--egress", "2M"), None, Limits(Rate(2 * 10**6), Rate(10**6))),
        (("--ingress", "3M", "--rate", "1M"), None, Limits(Rate(10**6), Rate(3 * 10**6))),
        (("--rate", " 1M ", "--burst", "64Ki"), None, Limits(Rate(10**6), Rate(10**6), 65_536)),
        (("--rate", "1M", "--pod-uid", UID.upper()), PodRef(UID), Limits(Rate(10**6), Rate(10**6))),
        (
            ("--rate", "1M", *POD, "--pod-name", "shop/cart-0"),
            PodRef(UID, "shop", "cart-0"),
            Limits(Rate(10**6), Rate(10**6)),
        ),
    ],
)
def test_generate_writes_what_was_asked_for(
    tmp_path: Path, arguments: Sequence[str], pod: PodRef | None, limits: Limits
) -> None:
    output = tmp_path / "pod.o"
    assert success(run("generate", *arguments, "-o", output)) == ""
    contents = generator.inspect(output.read_bytes())
    assert (contents.pod, contents.limits) == (pod, limits)
    assert list(tmp_path.iterdir()) == [output]


def test_generate_writes_to_a_pipe(tmp_path: Path) -> None:
    success(run("generate", "--rate", "10mbit", "-o", tmp_path / "pod.o"))
    done = process("generate", "--rate", "10mbit", "-o", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == tmp_path.joinpath("pod.o").read_bytes()


@pytest.mark.parametrize("by_name", [False, True])
def test_an_object_is_refused_to_a_terminal(*, by_name: bool) -> None:
    controller, terminal = pty.openpty()
    try:
        output = os.ttyname(terminal) if by_name else "-"
        done = process("generate", "--rate", "10mbit", "-o", output, stdout=terminal)
        assert "use -o FILE, or pipe it somewhere" in failure(done, 2)
        os.set_blocking(controller, False)
        with pytest.raises(BlockingIOError):
            os.read(controller, 1)
    finally:
        os.close(terminal)
        os.close(controller)


def test_a_process_without_a_stdout_is_told_to_name_a_file() -> None:
    closed: list[str | Path] = ["sh", "-c", 'exec "$0" generate --rate 1mbit -o - >&-', COMMAND]
    done = subprocess.run(closed, stderr=subprocess.PIPE, timeout=30, check=False)
    assert "use -o FILE" in failure(done, 2)


def fail_to_compile(_: str) -> bytes:
    raise CompilerError("clang is not installed: apt-get install clang")


def test_a_file_stays_as_it_was_when_there_is_no_object_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "pod.o"
    output.write_bytes(b"before")
    forget_programs()
    monkeypatch.setattr(generator, "compile_object", fail_to_compile)
    assert "apt-get install clang" in failure(run("generate", "--rate", "1mbit", "-o", output), 1)
    assert output.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("existing", [b"before", None])
def test_a_file_stays_as_it_was_when_the_object_does_not_fit(tmp_path: Path, existing: bytes | None) -> None:
    generator.compile_object("limiter.bpf.c")  # into the cache, where the process below takes it from
    output = tmp_path / "pod.o"
    if existing:
        output.write_bytes(existing)
    limited: list[str | Path] = [
        "sh",
        "-c",
        'ulimit -f 8 && exec "$@"',
        "sh",
        COMMAND,
        "generate",
        "--rate",
        "1M",
        "-o",
    ]
    done = subprocess.run([*limited, output], env=unmeasured(), capture_output=True, timeout=30, check=False)
    assert f"{output}: File too large" in failure(done, 1)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([existing] if existing else [])


def test_a_link_to_itself_is_no_place_to_keep(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    success(run("generate", "--rate", "1mbit", "-o", loop))
    assert generator.inspect(loop.read_bytes()).limits == Limits(Rate(10**6), Rate(10**6))


def test_a_file_that_is_written_anew_keeps_its_mode_and_a_link_stays_one(tmp_path: Path) -> None:
    file, link = tmp_path / "file.o", tmp_path / "link.o"
    file.write_bytes(b"before")
    file.chmod(0o640)
    link.symlink_to(file)
    success(run("generate", "--rate", "1mbit", "-o", link))
    assert link.is_symlink()
    assert generator.inspect(file.read_bytes()).limits == Limits(Rate(10**6), Rate(10**6))
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        success(run("generate", "--rate", "1mbit", "-o", tmp_path / "pod.o"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(tmp_path.joinpath("pod.o").stat().st_mode) == 0o666 & ~umask


def test_a_device_stays_one() -> None:
    success(run("generate", "--rate", "1mbit", "-o", "/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert "/dev/full: No space left on device" in failure(run("generate", "--rate", "1mbit", "-o", "/dev/full"), 1)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_named_pipe_stays_one_and_gets_the_object(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        success(run("generate", "--rate", "1mbit", "-o", pipe))
        read, _ = reader.communicate(timeout=30)
    assert generator.inspect(read).limits == Limits(Rate(10**6), Rate(10**6))
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent/pod.o", "No such file or directory"), ("file/x", "Not a directory")],
)
def test_a_place_that_cannot_be_written_is_named_as_it_was_typed(tmp_path: Path, name: str, reason: str) -> None:
    tmp_path.joinpath("file").touch()
    line = failure(run("generate", "--rate", "1mbit", "-o", tmp_path / name), 1)
    assert line.startswith(f"bpfrl: {tmp_path / name}: {reason}")


def test_a_folder_is_no_place_for_an_object(tmp_path: Path) -> None:
    line = failure(run("generate", "--rate", "1mbit", "-o", tmp_path), 2)
    assert f"'{tmp_path}' is a folder: name a file in it" in line


def test_a_reader_that_has_seen_enough_gets_no_complaint() -> None:
    generator.compile_object("limiter.bpf.c")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process("generate", "--rate", "1mbit", "-o", "-", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_before_the_end_gets_no_complaint_either(
    monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    left = len(generator.compile_object("limiter.bpf.c"))
    command: list[str | Path] = [COMMAND, "generate", "--rate", "1mbit", "-o", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pipesize=4_096) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        # What then is left after a full pipe is no more than Python's buffer holds until the process exits.
        while left > 8_192:
            left -= len(writer.stdout.read(4_096))
        while fcntl.ioctl(writer.stdout, termios.FIONREAD, bytes(4)) != struct.pack("i", 4_096):
            time.sleep(0.001)
        writer.stdout.close()
        assert (writer.stderr.read(), writer.wait(30)) == (b"", 1)


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        assert "No space left" in failure(process("generate", "--rate", "1mbit", "-o", "-", stdout=full), 1)
        assert "No space left" in failure(process("--help", stdout=full), 1)


# Attach and detach: the options, down to the call of the agent.


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fabricated tree with one pod, in which folders pass for cgroups."""
    root = make(tmp_path / "cgroups" / "kubepods" / "burstable" / f"pod{UID}").parents[2]
    monkeypatch.setattr(cgroup, "check", lambda path: path)
    monkeypatch.setattr(cgroup, "mount_point", lambda: root)
    return root


Calls = list[tuple[Limits, PodRef, Path]]


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the agent was asked to attach."""
    calls: Calls = []

    def attach(_: Agent, image: bytes, pod: PodRef, path: Path) -> Change:
        calls.append((generator.inspect(image).limits, pod, path))
        return Change.ATTACHED

    monkeypatch.setattr(Agent, "attach", attach)
    return calls


@pytest.mark.usefixtures("untouched")
def test_a_dry_run_says_what_would_be_done_and_needs_no_compiler(
    cgroups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    forget_programs()
    options = ("--cgroup-root", cgroups, "--bpffs", tmp_path / "bpf")
    text = success(run(*options, "attach", *POD, "--egress", "10mbit", "--dry-run"))
    pod = cgroups / "kubepods" / "burstable" / f"pod{UID}"
    assert text == f"pod/{UID} would be limited (dry run): egress 10mbit, ingress unlimited at {pod}\n"
    assert not tmp_path.joinpath("bpf").exists()


@pytest.mark.usefixtures("untouched")
def test_a_dry_run_finds_out_that_the_pod_is_not_here(cgroups: Path) -> None:
    line = failure(run("--cgroup-root", cgroups, "attach", "--pod-uid", STATIC_UID, "--rate", "1M", "--dry-run"), 1)
    assert f"no cgroup for pod {STATIC_UID} under {cgroups}" in line
    assert "--wait" in line


@pytest.mark.usefixtures("untouched")
def test_a_root_that_is_no_cgroup_is_a_usage_error(tmp_path: Path) -> None:
    line = failure(run("--cgroup-root", tmp_path, "attach", *POD, "--rate", "1M", "--dry-run"), 2)
    assert f"'{tmp_path}' is no cgroup v2 folder" in line or "cgroup v2 is not mounted" in line


def test_attach_hands_the_limits_the_pod_and_its_cgroup_to_the_agent(cgroups: Path, attached: Calls) -> None:
    pod = cgroups / "kubepods" / "burstable" / f"pod{UID}"
    arguments = ("attach", *POD, "--pod-name", "shop/cart-0", "--rate", "1M", "--burst", "64Ki")
    text = success(run("--cgroup-root", cgroups, *arguments))
    assert attached == [(Limits(Rate(10**6), Rate(10**6), 65_536), PodRef(UID, "shop", "cart-0"), pod)]
    assert text == f"pod/{UID} limited: egress 1mbit, ingress 1mbit at {pod}\n"


def test_attach_takes_a_cgroup_that_is_no_pod(cgroups: Path, attached: Calls) -> None:
    service = make(cgroups / "system.slice" / "backup.service")
    text = success(run("attach", "--cgroup", service, "--ingress", "1M"))
    itself = PodRef.of_cgroup(service.stat().st_ino)
    assert attached == [(Limits(ingress=Rate(10**6)), itself, service)]
    assert text == f"{itself.uid} limited: egress unlimited, ingress 1mbit at {service}\n"


@pytest.mark.usefixtures("untouched")
def test_attach_refuses_to_limit_the_whole_machine(cgroups: Path) -> None:
    for root in (cgroups, cgroups / "kubepods" / ".."):
        assert "which is the whole machine: take one below it" in failure(
            run("attach", "--cgroup", root, "--rate", "1M", "--dry-run"), 2
        )


def test_attach_takes_a_pods_cgroup_from_who_knows_it(cgroups: Path, attached: Calls) -> None:
    elsewhere = make(cgroups / "elsewhere")
    success(run("attach", "--cgroup", elsewhere, *POD, "--rate", "1M"))
    assert [(pod, path) for _, pod, path in attached] == [(PodRef(UID), elsewhere)]


def test_attach_takes_an_object_with_its_limits(cgroups: Path, attached: Calls, tmp_path: Path) -> None:
    success(run("generate", "--egress", "3mbit", "--burst", "1Mi", "-o", tmp_path / "pod.o"))
    success(run("--cgroup-root", cgroups, "attach", *POD, "--object", tmp_path / "pod.o"))
    assert [limits for limits, _, _ in attached] == [Limits(Rate(3 * 10**6), None, 2**20)]


@pytest.mark.usefixtures("untouched", "cgroups")
@pytest.mark.parametrize("content", [b"", b"no object", b"\x7fELF" + bytes(100)])
def test_attach_refuses_a_file_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pod.o"
    file.write_bytes(content)
    assert "make it with bpfrl generate" in failure(run("attach", *POD, "--object", file, "--cgroup", tmp_path), 1)


@pytest.mark.usefixtures("untouched", "cgroups")
def test_attach_reads_no_object_without_end(tmp_path: Path) -> None:
    arguments = ("attach", *POD, "--object", "/dev/zero", "--cgroup", tmp_path)
    assert "this is not a bpfrl limiter" in failure(run(*arguments), 1)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KernelError("cannot load the BPF programs: Invalid argument"), "bpfrl: cannot load the BPF programs: "),
        (PermissionDeniedError("cannot attach: this needs root"), "bpfrl: cannot attach: this needs root"),
        (OSError(28, "No space left on device", "/sys/fs/bpf/x"), "bpfrl: /sys/fs/bpf/x: No space left on device"),
        (OSError(5, "Input/output error"), "bpfrl: Input/output error"),
        (OSError("of an unknown kind"), "bpfrl: of an unknown kind"),
        (KernelError("a\nb"), "bpfrl: a b"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object) -> Change:
        raise error

    monkeypatch.setattr(Agent, "attach", fail)
    assert failure(run("--cgroup-root", cgroups, "attach", *POD, "--rate", "1M"), 1).startswith(line)


@pytest.mark.usefixtures("cgroups")
def test_interrupting_ends_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> Change:
        raise KeyboardInterrupt

    monkeypatch.setattr(Agent, "attach", interrupt)
    result = run("attach", *POD, "--cgroup", tmp_path, "--rate", "1M")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


Detached = list[str]


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch, cgroups: Path) -> Detached:
    """The UIDs that the agent was asked to detach; the static pod's folder is somebody else's."""
    monkeypatch.setenv("BPFRL_CGROUP_ROOT", str(cgroups))
    calls: Detached = []

    def detach(_: Agent, uid: str) -> Change:
        calls.append(uid)
        if uid == STATIC_UID:
            raise BrokenLimiterError("this was not made by bpfrl")
        return Change.DETACHED if uid == UID else Change.ABSENT

    def detach_cgroup(agent: Agent, path: Path) -> tuple[str, Change]:
        uid = f"cgroup-{path.stat().st_ino}"
        return uid, detach(agent, uid)

    monkeypatch.setattr(Agent, "detach", detach)
    monkeypatch.setattr(Agent, "detach_cgroup", detach_cgroup)
    monkeypatch.setattr(Agent, "limiters", lambda _: [BROKEN, WEB])
    return calls


def test_detach_takes_several_pods_and_one_without_a_limit_is_no_error(detached: Detached) -> None:
    text = success(run("detach", *POD, "--pod-uid", "cgroup-7"))
    assert text == f"pod/{UID} detached\ncgroup-7 not limited\n"
    assert detached == [UID, "cgroup-7"]


def test_detach_takes_a_cgroup_that_is_no_pod(detached: Detached, cgroups: Path) -> None:
    uid = f"cgroup-{cgroups.stat().st_ino}"
    assert success(run("detach", "--cgroup", cgroups)) == f"{uid} not limited\n"
    assert detached == [uid]


@pytest.mark.parametrize("mounted", [True, False])
def test_detach_of_all_where_there_is_none_says_so(
    detached: Detached, monkeypatch: pytest.MonkeyPatch, *, mounted: bool
) -> None:
    monkeypatch.setattr(Agent, "limiters", lambda _: [])
    monkeypatch.setattr(Agent, "is_mounted", lambda _: mounted)
    result = run("--bpffs", "/b", "detach", "--all")
    assert (result.exit_code, result.stdout, detached) == (0, "", [])
    assert result.stderr == f"no pods are limited here{'' if mounted else ': no bpffs on /b'}\n"


@pytest.mark.parametrize("arguments", [("--all",), ("--pod-uid", STATIC_UID, *POD)])
def test_detach_does_the_others_when_one_cannot_be_done(detached: Detached, arguments: Sequence[str]) -> None:
    result = run("detach", *arguments)
    assert detached == [STATIC_UID, UID]
    assert (result.exit_code, result.stdout) == (1, f"pod/{UID} detached\n")
    assert result.stderr == "bpfrl: this was not made by bpfrl\n"


@pytest.mark.parametrize(
    ("command", "method", "before", "said"),
    [
        ("attach", "cooperate", False, "cooperates"),
        ("attach", "cooperate", True, "unchanged"),
        ("detach", "stop_cooperating", True, "cooperates no more"),
        ("detach", "stop_cooperating", False, "does not cooperate"),
    ],
)
def test_cooperation_begins_and_ends_on_the_cgroup_that_is_named(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, command: str, method: str, said: str, *, before: bool
) -> None:
    pods = cgroups / "kubepods"
    asked: list[object] = []

    def change(agent: Agent, what: object) -> bool:
        asked.append((agent.bpffs, what))
        return before is (command == "detach")

    monkeypatch.setattr(Agent, method, change)
    text = success(run("--bpffs", "/b", command, "--cooperate", "--cgroup", pods))
    assert text == f"{pods} {said}\n"
    assert asked == [(Path("/b"), pods if command == "attach" else pods.stat().st_ino)]


@pytest.mark.parametrize(("command", "method"), [("attach", "cooperate"), ("detach", "stop_cooperating")])
def test_cooperation_that_the_kernel_refuses_is_one_line(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, command: str, method: str
) -> None:
    def fail(*_: object) -> bool:
        raise KernelError("cannot attach (cgroup_sock_ops): played")

    monkeypatch.setattr(Agent, method, fail)
    line = failure(run(command, "--cooperate", "--cgroup", cgroups / "kubepods"), 1)
    assert line == "bpfrl: cannot attach (cgroup_sock_ops): played"


# List.


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Status | Broken]:
    """What the agent finds on this node, to be changed by the test."""
    found: list[Status | Broken] = [WEB, BROKEN]
    monkeypatch.setattr(Agent, "limiters", lambda _: found)
    monkeypatch.setattr(cgroup, "path_of", lambda number: Path(f"/x/{number}"))
    return found


@pytest.mark.usefixtures("listed")
def test_list_draws_a_table_that_is_whole_where_it_is_piped() -> None:
    header, web, broken = success(run("list")).splitlines()
    assert header.split()[:3] == ["UID", "POD", "EGRESS"]
    assert web.split()[:4] == [UID, "shop/cart-0", "10mbit", "1.50M"]
    assert broken == f"broken: {STATIC_UID}: {BROKEN.reason}"
    assert "CGROUP" not in header
    assert success(run("list", "-o", "wide")).splitlines()[0].split()[-3:] == ["PACED", "BURST", "CGROUP"]


@pytest.mark.usefixtures("listed")
def test_list_writes_json_yaml_and_names_for_programs() -> None:
    items = json.loads(success(run("list", "-o", "json")))["items"]
    assert [item["uid"] for item in items] == [UID, STATIC_UID]
    assert items[0]["egress"]["passed_bytes"] == 1_500_000
    assert items[0]["paced"] == "all"
    assert [item["uid"] for item in yaml.safe_load(success(run("list", "-o", "yaml")))["items"]] == [UID, STATIC_UID]
    assert success(run("list", "-o", "name")) == f"pod/{UID}\npod/{STATIC_UID}\n"


@pytest.mark.parametrize("mounted", [True, False])
def test_list_of_nothing_says_so_to_people_and_lists_nothing_to_programs(
    listed: list[Status | Broken], monkeypatch: pytest.MonkeyPatch, *, mounted: bool
) -> None:
    listed.clear()
    monkeypatch.setattr(Agent, "is_mounted", lambda _: mounted)
    for form in ("table", "wide"):
        result = run("--bpffs", "/b", "list", "-o", form)
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr == f"no pods are limited here{'' if mounted else ': no bpffs on /b'}\n"
    assert json.loads(success(run("list", "-o", "json"))) == {"items": []}
    assert yaml.safe_load(success(run("list", "-o", "yaml"))) == {"items": []}
    assert success(run("list", "-o", "name")) == ""


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(("form", "shown"), [("wide", True), ("json", True), ("table", False), ("name", False)])
def test_list_looks_up_where_a_limiter_is_attached_only_to_show_it(
    monkeypatch: pytest.MonkeyPatch, form: str, *, shown: bool
) -> None:
    asked: list[int] = []

    def path_of(cgroup_id: int) -> Path:
        asked.append(cgroup_id)
        return Path("/x/found")

    monkeypatch.setattr(cgroup, "path_of", path_of)
    assert ("/x/found" in success(run("list", "-o", form))) is shown
    assert asked == ([4_711] if shown else [])


def test_watching_draws_again_with_current_rates_until_interrupted(
    listed: list[Status | Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(range(3))
    monkeypatch.setattr(time, "time", iter([100.0, 102.0, 104.0]).__next__)

    def later(_: float) -> None:
        if next(looks) == 2:
            raise KeyboardInterrupt
        last = listed[0]
        assert isinstance(last, Status)
        sent = Counters(0, last.egress.passed_bytes + 2_500_000)
        listed[0] = Status(last.pod, last.limits, sent, last.ingress, 4_711, 0.0)

    monkeypatch.setattr(time, "sleep", later)
    result = run("list", "--watch")
    assert result.exit_code == 130
    lines = [line.split() for line in result.stdout.splitlines()]
    header = ["UID", "POD", "EGRESS", "SENDING", "INGRESS", "RECEIVING", "DROPPING"]
    assert [line for line in lines if line[0] == "UID"] == [header] * 3
    assert [line[3] for line in lines if line[0] == UID] == ["-", "10.0Mbit", "10.0Mbit"]


LIST_AT_A_TERMINAL = """
from pathlib import Path
from bpfrl import cgroup
from bpfrl.cli import cli
from bpfrl.node.agent import Agent
from tests.unit.test_cli import BROKEN, WEB
Agent.limiters = lambda self: [WEB, BROKEN]
cgroup.path_of = lambda number: Path("/x" * 200)
cli.main(["list", "-o", "wide"])
"""


def test_at_a_narrow_terminal_a_list_is_still_whole() -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", LIST_AT_A_TERMINAL], stdout=terminal, env=environment, check=False)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other end any more
        while chunk := os.read(controller, 65_536):
            text += chunk
    os.close(controller)
    assert done.returncode == 0
    header, web, broken = text.decode().splitlines()
    assert header.split()[-1] == "CGROUP"
    assert web.split()[0] == UID
    assert web.split()[-1] == "/x" * 200
    assert f"broken: {STATIC_UID}: {BROKEN.reason}" in broken


# What the whole command is told from outside.


@pytest.mark.usefixtures("untouched")
def test_places_come_from_the_environment_too(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BPFRL_CGROUP_ROOT", str(cgroups))
    assert str(cgroups) in success(run("attach", *POD, "--rate", "1M", "--dry-run"))
    asked: list[Path] = []

    def limiters(agent: Agent) -> list[Status | Broken]:
        asked.append(agent.bpffs)
        return []

    monkeypatch.setattr(Agent, "limiters", limiters)
    for variable, options, bpffs in ((None, (), "/sys/fs/bpf"), ("/b", (), "/b"), ("/b", ("--bpffs", "/c"), "/c")):
        if variable:
            monkeypatch.setenv("BPFRL_BPFFS", variable)
        run(*options, "list")
        assert asked.pop() == Path(bpffs)


def test_details_are_told_on_request_and_apart_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generate = ("generate", "--rate", "1mbit", "-o", "/dev/null")
    for options, said in ((("-v",), True), ((), False)):
        forget_programs()
        result = run(*options, *generate)
        assert (result.exit_code, result.stdout) == (0, "")
        assert ("bpfrl: compiling limiter.bpf.c\n" in result.stderr) is said


def test_every_error_of_the_library_has_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kinds = [BpfrlError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    monkeypatch.setattr(cgroup, "check", lambda path: path)
    for kind in kinds:

        def fail(*_: object, kind: type[BpfrlError] = kind) -> Change:
            raise kind("a reason")

        monkeypatch.setattr(Agent, "attach", fail)
        code = 2 if issubclass(kind, ValueError) else 1
        assert failure(run("attach", *POD, "--cgroup", tmp_path, "--rate", "1M"), code) == "bpfrl: a reason"
    assert len(kinds) > 5


# Without privileges. (As somebody else already, there is nobody to become.)

Options = dict[str, Any]


@pytest.fixture(scope="module")
def nobody() -> Options:
    """How to start a process without privileges, if such a one can read what is tested here."""
    options: Options = {} if os.geteuid() else {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", "import bpfrl.cli"], cwd="/", check=True, capture_output=True, **options)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this folder is closed to users without privileges")
    return options


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everyone reaches and writes to; caches are below it."""
    with tempfile.TemporaryDirectory(prefix="bpfrl-") as folder:
        Path(folder).chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{folder}/cache")
        monkeypatch.setenv("HOME", "/nonexistent")
        yield Path(folder)


def test_generate_needs_no_privileges(nobody: Options, shared: Path) -> None:
    done = process("generate", "--rate", "10mbit", "-o", shared / "pod.o", cwd="/", **nobody)
    assert (done.returncode, done.stderr) == (0, b"")
    contents = generator.inspect(shared.joinpath("pod.o").read_bytes())
    assert contents.limits == Limits(Rate(10**7), Rate(10**7))
    assert len(list(shared.glob("cache/bpfrl/*.o"))) == 1


@pytest.mark.parametrize("arguments", [("list",), ("list", "-o", "json"), ("detach", *POD), ("detach", "--all")])
def test_looking_into_a_closed_bpffs_needs_root(nobody: Options, shared: Path, arguments: Sequence[str]) -> None:
    closed = make(shared / "closed")
    closed.chmod(0o700 if nobody else 0)
    line = failure(process("--bpffs", closed / "bpf", *arguments, cwd="/", **nobody), 1)
    assert line == f"bpfrl: cannot look into {closed / 'bpf'}: this needs root"


ATTACH = """
import sys
from pathlib import Path
from bpfrl.bpf import generator
from bpfrl.errors import PermissionDeniedError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import Agent
from bpfrl.units import Rate
try:
    Agent(Path(sys.argv[1])).attach(generator.generate(None, Limits(Rate(1_000_000))), PodRef("f" * 32), Path("/"))
except PermissionDeniedError as error:
    print(error)
"""


def test_mounting_a_bpffs_needs_root(nobody: Options, shared: Path) -> None:
    bpffs = make(shared / "bpf")
    command: list[str | Path] = [sys.executable, "-c", ATTACH, bpffs]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True, timeout=30, **nobody)
    assert done.stdout == f"cannot mount a BPF file system on {bpffs}: this needs root\n"
    assert not bpffs.is_mount()
