"""The bpfrl command: options in, one library call, a line or a table out.

Results go to stdout, everything else to stderr. An error is one line; the exit code is 2 when what was typed cannot
be meant, and 1 when it could not be done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, cast

import click
from rich.console import Console
from rich.live import Live

from bpfrl import __version__, cgroup, render
from bpfrl.bpf import generator
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import BpfrlError, CgroupNotFoundError, InvalidValueError
from bpfrl.limits import Limits, PodRef
from bpfrl.node.agent import DEFAULT_BPFFS, Agent
from bpfrl.units import Rate, parse_size

if TYPE_CHECKING:
    from bpfrl.rpc.tls import Certificates

Function = TypeVar("Function", bound=Callable[..., Any])

_FAILURE: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
DEFAULT_PORT: Final = 10002
_REDRAW_SECONDS: Final = 1.0
# Wider than any row: a UID that is cut off is of no use.
_UNCUT_WIDTH: Final = 4096
# A limiter has 24 KB; what is a thousand times as long is not one.
_LONGEST_OBJECT: Final = 16 * 2**20


class _OneLineErrors(click.Group):
    """A group whose errors are one line each, and never a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(_USAGE)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "bpfrl"
            _die(f"{command}: {error.format_message()} (see {command} --help)", _USAGE)
        except click.ClickException as error:
            _die(f"bpfrl: {error.format_message()}", error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(_INTERRUPTED)
        except InvalidValueError as error:
            _die(f"bpfrl: {error}", _USAGE)
        except BpfrlError as error:
            _die(f"bpfrl: {error}", _FAILURE)
        except BrokenPipeError:
            # The reader has seen enough. Nothing more can be flushed at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_FAILURE)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _die(f"bpfrl: {place}{error.strerror or error}", _FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def _die(message: str, code: int) -> None:
    click.echo(message.replace("\n", " "), err=True)
    sys.exit(code)


class _Parsed(click.ParamType[Any]):
    """A parameter that one of the library's own parsers reads."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidValueError as error:
            self.fail(str(error), param, ctx)


def _parse_uid(text: str) -> str:
    return PodRef(text.strip().lower()).uid


def _parse_pod_name(text: str) -> tuple[str, str]:
    namespace, separator, name = text.partition("/")
    if not (separator and namespace and name):
        raise InvalidValueError(f"'{text}' is no pod's name: write it as NAMESPACE/NAME")
    return namespace, name


_RATE: Final = _Parsed("rate", Rate.parse)
_SIZE: Final = _Parsed("size", parse_size)
_UID: Final = _Parsed("uid", _parse_uid)
_POD_NAME: Final = _Parsed("namespace/name", _parse_pod_name)
# Whether it can be read is for the command to find out that needs it.
_FOLDER: Final = click.Path(path_type=Path, readable=False)


@dataclass(frozen=True)
class _Node:
    """Where this node's limiters and cgroups are."""

    bpffs: Path
    cgroup_root: Path | None

    def agent(self) -> Agent:
        return Agent(self.bpffs)

    def tree(self) -> CgroupTree:
        return CgroupTree(cgroup.check(self.cgroup_root) if self.cgroup_root else None)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="bpfrl")
@click.option("-v", "--verbose", count=True, help="Say what is done; twice for every detail.")
@click.option(
    "--bpffs",
    type=_FOLDER,
    default=DEFAULT_BPFFS,
    show_default=True,
    envvar="BPFRL_BPFFS",
    help="Where limiters are pinned. A BPF file system is mounted there if none is. [env: BPFRL_BPFFS]",
)
@click.option(
    "--cgroup-root",
    type=_FOLDER,
    envvar="BPFRL_CGROUP_ROOT",
    help="Where pods' cgroups are looked for: the cgroup v2 mount, or a folder below it. [env: BPFRL_CGROUP_ROOT]",
)
@click.pass_context
def cli(context: click.Context, verbose: int, bpffs: Path, cgroup_root: Path | None) -> None:
    """Limit the network bandwidth of pods, with eBPF programs on their cgroups.

    A limiter holds one pod, or any other cgroup, to a rate in each direction. It works with every CNI plugin,
    with host-network pods, and for traffic that stays on the node. TCP is paced where it is sent, so that no queue
    grows; what cannot be paced is held to the rate by dropping.

    \b
    RATES are bits per second at layer 3, headers included:
      tc forms     10mbit  500kbit  2gbit
      Kubernetes   10M  500k  2G  1Mi
    SIZES are bytes: 64Ki  1Mi  65536

    \b
    EXAMPLES
      bpfrl attach --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10 --rate 10mbit
      bpfrl attach --cgroup /sys/fs/cgroup/system.slice/backup.service --egress 100mbit
      bpfrl list
      bpfrl detach --pod-uid 8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10

    \b
    EXIT STATUS
      0  done, or there was nothing to do
      1  it could not be done
      2  the options cannot be meant
    """
    logging.basicConfig(
        format="bpfrl: %(message)s", level=_LEVELS[min(verbose, len(_LEVELS) - 1)], stream=sys.stderr, force=True
    )
    context.obj = _Node(bpffs, cgroup_root)


def _limit_options(function: Function) -> Function:
    """Give a command the limit options, as one argument."""

    @wraps(function)
    def with_limits(
        *args: Any, rate: Rate | None, egress: Rate | None, ingress: Rate | None, burst: int | None, **others: Any
    ) -> Any:
        return function(*args, limits=Limits(egress or rate, ingress or rate, burst), **others)

    for option in (
        click.option("--burst", type=_SIZE, help="What an idle pod may send or receive at once. [default: by rate]"),
        click.option("--ingress", type=_RATE, help="What the pod may receive; the other direction is left alone."),
        click.option("--egress", type=_RATE, help="What the pod may send; the other direction is left alone."),
        click.option("--rate", type=_RATE, help="The limit for each direction that is not given by itself."),
    ):
        with_limits = option(with_limits)
    return cast(Function, with_limits)


def _pod_options(function: Function) -> Function:
    """Give a command the options that name a pod, as one argument."""

    @wraps(function)
    def with_pod(*args: Any, pod_uid: str | None, pod_name: tuple[str, str] | None, **others: Any) -> Any:
        if pod_name and not pod_uid:
            raise click.UsageError("--pod-name goes with --pod-uid")
        return function(*args, pod=PodRef(pod_uid, *(pod_name or ())) if pod_uid else None, **others)

    for option in (
        click.option("--pod-name", type=_POD_NAME, help="The pod's name, for bpfrl list to show."),
        click.option("--pod-uid", type=_UID, help="The pod's UID: kubectl get pod -o jsonpath={.metadata.uid}"),
    ):
        with_pod = option(with_pod)
    return cast(Function, with_pod)


def _limiting(limits: Limits) -> Limits:
    if limits.unlimited:
        raise click.UsageError("no limit is given: use --rate, --egress or --ingress, for example --rate 10mbit")
    return limits


_NO_TERMINAL: Final = "an object is not for a terminal: use -o FILE, or pipe it somewhere"


@cli.command()
@_limit_options
@_pod_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write; - for a pipe.")
def generate(limits: Limits, pod: PodRef | None, output: Path) -> None:
    """Write a limiter as a BPF object, without attaching it.

    The object is complete: it carries its limits, and any loader takes it ('bpftool prog loadall', 'bpfrl
    attach --object'). This needs clang, but neither root nor BPF.
    """
    to_stdout = str(output) == "-"
    if to_stdout and (sys.stdout is None or sys.stdout.isatty()):
        raise click.UsageError(_NO_TERMINAL)
    image = generator.generate(pod, _limiting(limits))
    if to_stdout:
        rest = memoryview(image)
        while rest:  # with PYTHONUNBUFFERED, one call may write a part and no more
            rest = rest[sys.stdout.buffer.write(rest) :]
        sys.stdout.buffer.flush()
    else:
        _write(output, image)


def _write(output: Path, image: bytes) -> None:
    """A regular file appears whole or not at all; what is a pipe or a device stays one."""
    if output.is_dir():
        raise click.UsageError(f"'{output}' is a folder: name a file in it")
    if output.is_char_device():
        with output.open("wb") as device:
            if device.isatty():
                raise click.UsageError(_NO_TERMINAL)
    whole = output.is_file() or not output.exists()
    target = Path(os.path.realpath(output))
    written = target.with_name(f".{target.name}.{os.getpid()}") if whole else output
    try:
        written.write_bytes(image)
        if whole:
            if target.exists():
                shutil.copymode(target, written)
            written.replace(target)
    except OSError as error:
        error.filename = str(output)
        raise
    finally:
        if whole:
            with suppress(OSError):
                written.unlink()


@cli.command()
@_limit_options
@_pod_options
@click.option("--cgroup", "path", type=_FOLDER, help="This cgroup v2 folder, of a pod or of anything else.")
@click.option("--object", "file", type=click.File("rb"), help="Attach what bpfrl generate wrote, with its limits.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait as long for a pod whose cgroup is not there yet.",
)
@click.option("--dry-run", is_flag=True, help="Find the cgroup and say what would be done, and change nothing.")
@click.option(
    "--cooperate",
    is_flag=True,
    help="With --cgroup, the one that holds all pods: no limit, but senders keep to what limited receivers ask for.",
)
@click.pass_obj
def attach(
    node: _Node,
    limits: Limits,
    pod: PodRef | None,
    path: Path | None,
    file: BinaryIO | None,
    wait: float,
    dry_run: bool,
    cooperate: bool,
) -> None:
    """Limit a pod, or change the limits of one that has some.

    Finds the pod's cgroup whatever the kubelet's cgroup driver and the pod's QoS class. New limits
    replace the present ones in place: there is no moment without a limit, connections go on, and the counters too.

    With --cooperate, limited pods below the cgroup tell their senders how fast to send, in a TCP option on ACKs, and
    pods that send keep to what they are told. bpfrl serve-node sees to this by itself.
    """
    if cooperate:
        if path is None or pod or file or limits != Limits() or wait or dry_run:
            raise click.UsageError("--cooperate goes with --cgroup, the one that holds all pods, and nothing else")
        attached = node.agent().cooperate(cgroup.check(path))
        click.echo(f"{path} {'cooperates' if attached else 'unchanged'}")
        return
    image = None
    if file is None:
        _limiting(limits)
    elif limits == Limits():
        image = file.read(_LONGEST_OBJECT)
        limits = generator.inspect(image).limits
    else:
        raise click.UsageError("--object brings its own limits: leave out --rate, --egress, --ingress and --burst")

    folder = _find(node, pod, path, wait)
    pod = pod or PodRef.of_cgroup(cgroup.id_of(folder))
    done = "would be limited (dry run)"
    if not dry_run:
        done = node.agent().attach(image or generator.generate(None, limits), pod, folder).value
    click.echo(f"{pod.label} {done}: {limits} at {folder}")


def _find(node: _Node, pod: PodRef | None, path: Path | None, wait: float) -> Path:
    if path:
        return _limitable(path)
    if pod:
        try:
            return node.tree().wait(pod.uid, wait)
        except CgroupNotFoundError as error:
            raise CgroupNotFoundError(f"{error} (--wait waits for it)") from error
    raise click.UsageError("which pod? use --pod-uid UID, or --cgroup PATH for a cgroup that is no pod")


def _limitable(path: Path) -> Path:
    if cgroup.check(path).samefile(cgroup.mount_point()):
        raise InvalidValueError(f"'{path}' is the root cgroup, which is the whole machine: take one below it")
    return path


@cli.command()
@click.option("--pod-uid", "uids", type=_UID, multiple=True, help="This pod, as bpfrl list shows it. Repeatable.")
@click.option("--cgroup", "path", type=_FOLDER, help="This cgroup.")
@click.option("--all", "everything", is_flag=True, help="Every limiter on this node.")
@click.option("--cooperate", is_flag=True, help="With --cgroup: what attach --cooperate did there.")
@click.pass_obj
def detach(node: _Node, uids: tuple[str, ...], path: Path | None, everything: bool, cooperate: bool) -> None:
    """Take the limit off a pod, and leave nothing of it behind.

    Connections go on at full speed. A pod that has no limit is no error.
    """
    if cooperate:
        if path is None or uids or everything:
            raise click.UsageError("--cooperate goes with --cgroup, as at bpfrl attach, and nothing else")
        detached = node.agent().stop_cooperating(cgroup.id_of(cgroup.check(path)))
        click.echo(f"{path} {'cooperates no more' if detached else 'does not cooperate'}")
        return
    if sum((bool(uids), path is not None, everything)) != 1:
        raise click.UsageError("which pod? use one of --pod-uid UID, --cgroup PATH and --all")
    agent = node.agent()
    if path:
        uid, change = agent.detach_cgroup(cgroup.check(path))
        click.echo(f"{PodRef(uid).label} {change.value}")
        return
    targets: Sequence[str] = uids
    if everything:
        targets = [found.uid if isinstance(found, Broken) else found.pod.uid for found in agent.limiters()]
        if not targets:
            click.echo(_nothing(agent), err=True)
    failed = False
    for uid in targets:
        try:
            change = agent.detach(uid)
        except BpfrlError as error:
            # With several to do, one that cannot be done is no reason to leave the others.
            click.echo(f"bpfrl: {error}", err=True)
            failed = True
        else:
            click.echo(f"{PodRef(uid).label} {change.value}")
    if failed:
        sys.exit(_FAILURE)


def _nothing(agent: Agent) -> str:
    return "no pods are limited here" if agent.is_mounted() else f"no pods are limited here: no bpffs on {agent.bpffs}"


@cli.command("list")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml", "name"]),
    default="table",
    show_default=True,
    help="The form of the output.",
)
@click.option("-w", "--watch", is_flag=True, help="Draw the table again each second, with the current rates.")
@click.pass_obj
def list_(node: _Node, output: str, watch: bool) -> None:
    """Show the limited pods of this node.

    Everything comes from the kernel; no daemon has to run. TX is what the pod has sent and RX what it has received
    since it was limited, in bytes at layer 3 and in packets; DROP is what did not pass.
    """
    if watch and output not in ("table", "wide"):
        raise click.UsageError(f"--watch draws tables: it does not go with -o {output}")
    agent = node.agent()
    if watch:
        _watch(agent, wide=output == "wide")
        return
    rows, broken = _look(agent, paths=output not in ("table", "name"))
    if output in ("table", "wide"):
        if rows or broken:
            _console().print(render.table(rows, broken, wide=output == "wide"))
        else:
            click.echo(_nothing(agent), err=True)
        return
    form = {"json": render.to_json, "yaml": render.to_yaml, "name": render.to_names}[output]
    text = form(rows, broken)
    if text:
        click.echo(text)


def _look(agent: Agent, *, paths: bool) -> tuple[list[render.Row], list[Broken]]:
    found, now = agent.limiters(), time.time()
    rows = [
        render.Row(status, now, cgroup.path_of(status.cgroup_id) if paths and status.cgroup_id else None)
        for status in found
        if isinstance(status, Status)
    ]
    return rows, [folder for folder in found if isinstance(folder, Broken)]


def _watch(agent: Agent, *, wide: bool) -> None:
    console = _console(cut=True)
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else None
    before: dict[str, tuple[Status, float]] = {}
    with live or nullcontext():
        while True:
            rows, broken = _look(agent, paths=wide)
            rows = [row._replace(before=before.get(row.status.pod.uid)) for row in rows]
            drawn = render.table(rows, broken, wide=wide, rates=True)
            if live:
                live.update(drawn, refresh=True)
            else:
                console.print(drawn)
            before = {row.status.pod.uid: (row.status, row.now) for row in rows}
            time.sleep(_REDRAW_SECONDS)


def _console(*, cut: bool = False) -> Console:
    """Where tables go. Only one that is drawn again and again is cut to the terminal: a list is to be read whole."""
    return Console(width=None if cut and sys.stdout.isatty() else _UNCUT_WIDTH, highlight=False)


_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


def _parse_endpoint(text: str) -> str:
    """HOST:PORT, with an IPv6 address in brackets; without a host, every address."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (separator and _PORT.fullmatch(port) and int(port) < 2**16) or (":" in host and not bracketed):
        raise InvalidValueError(f"'{text}' is no address to listen on: write it as HOST:PORT, [::1]:PORT or :PORT")
    return f"{host or '[::]'}:{port}"


_ENDPOINT: Final = _Parsed("host:port", _parse_endpoint)


def _daemon_options(function: Function) -> Function:
    """Give a daemon the options that say whom it trusts."""
    for option in (
        click.option("--insecure", is_flag=True, help="Without TLS, which is for loopback only."),
        click.option(
            "--certs",
            type=_FOLDER,
            envvar="BPFRL_CERTS",
            metavar="DIR",
            help="The folder with ca.crt, tls.crt and tls.key. [env: BPFRL_CERTS]",
        ),
    ):
        function = option(function)
    return function


def _certificates(folder: Path | None, role: str, *, insecure: bool) -> Certificates | None:
    from bpfrl.rpc import tls  # noqa: PLC0415 - half a second that other commands do not need

    if (folder is None) != insecure:
        raise click.UsageError("use one of --certs DIR (bpfrl certs init makes them) and, on loopback only, --insecure")
    return tls.Certificates(folder, role) if folder else None


def _serve(daemon: Coroutine[Any, Any, None], context: click.Context) -> None:
    """Run a daemon until it is told to stop. It says what it does without being asked."""
    verbose = context.find_root().params["verbose"]
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        force=True,
    )
    if not verbose:
        logging.getLogger("bpfrl.bpf").setLevel(logging.WARNING)  # each step of each limiter
    asyncio.run(daemon)


@cli.command("serve-node")
@click.option(
    "--listen",
    type=_ENDPOINT,
    default=f":{DEFAULT_PORT}",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; without a host, on every address.",
)
@click.option(
    "--cooperate/--no-cooperate",
    default=True,
    show_default=True,
    help="Have pods that send keep to what limited receivers ask for, on this node and others.",
)
@_daemon_options
@click.pass_context
def serve_node(context: click.Context, listen: str, cooperate: bool, certs: Path | None, insecure: bool) -> None:
    """Let a master limit this node's pods.

    Runs on every node, as root, until SIGTERM. Limits are pinned in the kernel: they stay in force when this process
    ends, however it ends, and the next one finds them.
    """
    from bpfrl.rpc import corelog  # noqa: PLC0415 - before grpc is imported

    corelog.redirect()
    from bpfrl.node import daemon  # noqa: PLC0415
    from bpfrl.rpc import tls  # noqa: PLC0415

    node: _Node = context.obj
    certificates = _certificates(certs, tls.NODE, insecure=insecure)
    if insecure and not tls.is_loopback(listen.rpartition(":")[0].strip("[]")):
        raise click.UsageError("--insecure is for loopback only: use --listen 127.0.0.1:PORT, or --certs DIR")
    _serve(daemon.serve(node.agent(), node.tree(), listen, certificates, cooperate=cooperate), context)


@cli.command("serve-master")
@click.option("--manifests", type=_FOLDER, metavar="DIR", help="Take the pods from this folder of manifests.")
@click.option("--kubeconfig", type=_FOLDER, metavar="FILE", help="Take them from this cluster's API server.")
@click.option("--context", help="Which of the kubeconfig's contexts. [default: its current one]")
@click.option(
    "--node-port",
    type=click.IntRange(1, 2**16 - 1),
    default=DEFAULT_PORT,
    show_default=True,
    help="Where the nodes' daemons listen.",
)
@click.option(
    "--resync",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How often each node is asked what it has, and that repaired.",
)
@click.option(
    "--leader-elect/--no-leader-elect",
    default=True,
    show_default=True,
    help="Of several masters in a cluster, only the holder of the Lease bpfrl-master acts.",
)
@click.option(
    "--lease-namespace", metavar="NAMESPACE", help="The Lease's namespace. [default: the pod's own, or kube-system]"
)
@click.option(
    "--lease-duration",
    type=click.IntRange(3),
    default=15,
    show_default=True,
    metavar="SECONDS",
    help="How long others wait for a leader that says nothing.",
)
@_daemon_options
@click.pass_context
def serve_master(
    context_: click.Context, /, certs: Path | None, insecure: bool, context: str | None, **settings: Any
) -> None:
    """Keep all pods of a cluster limited as their annotations say.

    \b
    READS OF EACH POD
      annotation kubernetes.io/egress-bandwidth    10M, bits per second
      annotation kubernetes.io/ingress-bandwidth
      annotation bpfrl.io/burst                    64Ki, bytes
      label rate                                   each direction that has no annotation

    The cluster is the one of --kubeconfig, of KUBECONFIG, of the pod around this process, or of ~/.kube/config, in
    this order. With --manifests no API server is needed: pods come from the folder's files, and are on this machine
    unless status.hostIP names another. Limits stay in force while no master runs.
    """
    from bpfrl.rpc import corelog  # noqa: PLC0415 - before grpc is imported

    corelog.redirect()
    from bpfrl.master import daemon  # noqa: PLC0415
    from bpfrl.rpc import tls  # noqa: PLC0415

    if settings["manifests"] and (settings["kubeconfig"] or context):
        raise click.UsageError("--manifests takes the place of an API server: leave out --kubeconfig and --context")
    certificates = _certificates(certs, tls.MASTER, insecure=insecure)
    _serve(daemon.serve(daemon.Settings(certificates=certificates, context=context, **settings)), context_)


@cli.group()
def certs() -> None:
    """Make the certificates that master and nodes show each other."""


@certs.command("init")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@click.option("--days", type=click.IntRange(1, 36_500), default=365, show_default=True, help="How long they are good.")
@click.option("--renew", is_flag=True, help="Make both certificates anew, whatever time they have left.")
def certs_init(folder: Path, days: int, renew: bool) -> None:
    """Make an authority, and certificates for the nodes and the master.

    DIR/node is for bpfrl serve-node --certs and DIR/master for bpfrl serve-master --certs. Keep DIR/ca.key to
    yourself: who has it can limit any pod. What is there and good for a while is kept, so that the same command
    renews what is about to expire; the daemons read changed files by themselves.
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    for path, made in authority.init(folder, days, renew=renew):
        click.echo(f"{path} {'made' if made else 'kept'}")


@certs.command("secrets")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@click.option("-n", "--namespace", default="bpfrl", show_default=True, help="The Secrets' namespace.")
def certs_secrets(folder: Path, namespace: str) -> None:
    """Print the certificates of DIR as Kubernetes Secrets, for kubectl apply -f -.

    bpfrl-node is for the nodes' daemons and bpfrl-master for the master. The authority's key is in neither.
    """
    from bpfrl.rpc import authority  # noqa: PLC0415

    click.echo(authority.secrets(folder, namespace), nl=False)


def main() -> None:
    """The entry point of the installed command."""
    cli.main(prog_name="bpfrl")
