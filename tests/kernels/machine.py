"""A machine of software alone, with a kernel of our choice and this machine's own files.

qemu's emulator (TCG) runs it, so that it needs nothing of the processor and is the same everywhere: some ten times
slower than the machine itself. Its root is this machine's, by virtiofs and read-only, under a tmpfs that takes what is
written; so whatever is installed here is there too, at the same paths, and no image has to be made. It has no network
but its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench.lab import end
from tests.kernels.debian import Kernel

# What Debian 12's qemu brings, and where later ones have it.
_SERVERS: Final = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))
_MODULES: Final = ("virtio_pci", "virtiofs", "overlay", "veth", "tcp_bbr", "tcp_diag", "udp_diag")
_MEMORY: Final = "2G"
_CPUS: Final = 2
_START_SECONDS: Final = 10.0
# What goes wrong before there are files comes out here, and what a command says on the other line.
_CONSOLE, _OUTPUT = "console", "output"
_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox --install /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
mount -t virtiofs -o ro host /host
mount -t tmpfs tmpfs /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work overlay /new
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t devtmpfs dev /new/dev
mount -t tmpfs tmpfs /new/run
mkdir /new/dev/shm
cp /command /new/run/command
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t bpf bpf /new/sys/fs/bpf
ip link set lo up
stty -F /dev/ttyS1 raw
exec </dev/null >/dev/ttyS1 2>&1
chroot /new /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb /bin/sh /run/command
sync
reboot -f
"""


class Ended(NamedTuple):
    """A machine that has run its command.

    Attributes:
        output: what the command has said, on both streams.
        console: what the kernel has.
        seconds: how long it took, from power on to off.
    """

    output: str
    console: str
    seconds: float


def run(kernel: Kernel, script: str, limit: float) -> Ended:
    """Boot a kernel, have sh run a script as root, and power off.

    Args:
        kernel: what boots.
        script: the text of it.
        limit: after so many seconds the power is cut.

    Raises:
        subprocess.TimeoutExpired: it was.
        OSError: qemu, its file server or busybox is not installed.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bpfrl-machine-")))
        socket = stack.enter_context(_files(scratch))
        command = [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", str(_CPUS), "-m", _MEMORY),
            *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"),
            *("-chardev", f"socket,id=files,path={socket}", "-device", "vhost-user-fs-pci,chardev=files,tag=host"),
            *("-kernel", str(kernel.image), "-initrd", str(_initramfs(kernel, script, scratch))),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
            *("-serial", f"file:{scratch / _CONSOLE}", "-serial", f"file:{scratch / _OUTPUT}"),
        ]
        start = time.monotonic()
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=limit)
        seconds = time.monotonic() - start
        output, console = ((scratch / name).read_text(errors="replace") for name in (_OUTPUT, _CONSOLE))
        return Ended(output, console, seconds)


@contextmanager
def _files(scratch: Path) -> Iterator[Path]:
    """This machine's root as a file server on a socket."""
    socket, log = scratch / "files", scratch / "files.log"
    program = next((path for path in _SERVERS if path.exists()), None)
    if program is None:
        raise FileNotFoundError("virtiofsd is not installed")
    options: Sequence[str] = ("-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot")
    with log.open("w") as said:
        server = subprocess.Popen([program, f"--socket-path={socket}", *options], stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"virtiofsd does not start: {log.read_text()}")
            time.sleep(0.02)
        yield socket
    finally:
        end(server)


def _initramfs(kernel: Kernel, script: str, scratch: Path) -> Path:
    """What the kernel begins with: busybox, the modules that it takes to reach the files, and what to do then."""
    root, packed = scratch / "root", scratch / "initramfs"
    for name in ("bin", "modules", "proc", "sys", "dev", "host", "new", "scratch"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "busybox", root / "bin/busybox")
    for number, module in enumerate(kernel.modules_for(_MODULES)):
        (root / "modules" / f"{number:02}.ko").write_bytes(module)
    (root / "command").write_text(script)
    init = root / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with packed.open("wb") as archive:
        command = ["cpio", "-o", "-H", "newc", "--quiet"]
        subprocess.run(command, cwd=root, input=names.encode(), stdout=archive, check=True)
    return packed
