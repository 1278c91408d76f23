"""Debian's kernels, from the mirror that this machine's apt uses, in a folder of our own: nothing is installed."""

from __future__ import annotations

import lzma
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The oldest that bpfrl runs on first.
SUITES: Final = ("bullseye", "bookworm", "trixie", "trixie-backports")
_PACKAGE: Final = "linux-image-cloud-amd64"
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UNPACKED: Final = "unpacked"
_DONE: Final = "version"


class NoKernelError(Exception):
    """The mirror does not have the suite, or not in a form that is known here."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that was unpacked.

    Attributes:
        suite: of Debian.
        package: its name and version there.
        image: what boots.
        modules: the folder of its modules.
    """

    suite: str
    package: str
    image: Path
    modules: Path

    def modules_for(self, names: tuple[str, ...]) -> list[bytes]:
        """The modules of these names and those that they need, in the order to load them; not what is built in."""
        files = {_module_name(path): path for path in self.modules.rglob("*.ko*")}
        found: dict[str, bytes] = {}

        def add(name: str) -> None:
            if name in files and name not in found:
                content = files[name].read_bytes()
                if files[name].suffix == ".xz":
                    content = lzma.decompress(content)
                for needed in _needs(content):
                    add(needed)
                found[name] = content

        for name in names:
            add(name)
        return list(found.values())


def fetch(suite: str, folder: Path) -> Kernel:
    """A suite's present kernel, downloaded and unpacked unless it is there already.

    Raises:
        NoKernelError: the mirror does not have it.
    """
    for place in ("lists/partial", "cache/archives/partial"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    # Backports need what they are ports to.
    lines = (f"deb [signed-by={_KEYRING}] {_mirror()} {name} main\n" for name in {suite, suite.partition("-")[0]})
    (folder / "sources.list").write_text("".join(lines))
    _apt(folder, "apt-get", "-qq", "update")
    planned = _apt(folder, "apt-get", "-s", "-t", suite, "--no-install-recommends", "install", _PACKAGE)
    # What it would pull in besides (an initramfs, its tools) is not wanted.
    wanted = dict(re.findall(r"^Inst (linux-(?:image|binary|modules)-\d\S*) \((\S+)", planned, re.MULTILINE))
    if not wanted:
        raise NoKernelError(f"{suite} has no {_PACKAGE}")
    package = " ".join(next((name, version) for name, version in wanted.items() if name.startswith("linux-image")))
    unpacked, done = folder / _UNPACKED, folder / _DONE
    if not done.exists() or done.read_text() != package:
        done.unlink(missing_ok=True)
        names = [f"{name}={version}" for name, version in wanted.items()]
        _apt(folder, "apt-get", "-qq", "download", *names)
        subprocess.run(["rm", "-rf", unpacked], check=True)
        for archive in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            archive.unlink()
        done.write_text(package)
    return Kernel(suite, package, _only(unpacked, "vmlinuz*"), _only(unpacked, "modules").resolve())


def _mirror() -> str:
    """Where this machine has the packages of its own release from."""
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    known = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(SITE)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in known.splitlines():
        name, _, site = line.partition(" ")
        if release and name == release[1]:
            return site
    raise NoKernelError("apt has no source of this machine's own release")


def _apt(folder: Path, *command: str) -> str:
    """Run apt with nothing of this machine's own: no sources, no packages, no state."""
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
        "APT::Architecture": "amd64",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoKernelError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout


def _only(folder: Path, pattern: str) -> Path:
    found = [path for path in folder.rglob(pattern) if "share" not in path.parts]
    if len(found) != 1:
        raise NoKernelError(f"{folder} has {len(found)} of {pattern}")
    return found[0]


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _needs(module: bytes) -> Iterator[str]:
    """The modules that one says it needs (the "depends" of its .modinfo)."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    yield from filter(None, found[1].decode().replace("-", "_").split(",") if found else [])
