"""From limits to a BPF object.

clang compiles ``limiter.bpf.c`` once; the result is the same for every pod and kept in a cache on disk under a
name that covers our sources, the flags and the compiler. A pod's object is that template with the pod's limits and
identity written into its data sections, at the places that the symbol table tells: no compiler runs per pod, and
anything that reads BPF objects (bpftool, libbpf) can load the result. The identity names the template's SHA-256, so
that a reader sees whether anything else has changed on the way.

An installation may come with its programs compiled (:func:`ship`): where these are of its very sources, they go before
any compiler and any cache, so that all of its nodes run one build and need no clang.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from ctypes import Structure, sizeof
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from bpfrl import files
from bpfrl.bpf import elf, law
from bpfrl.bpf.layout import LAYOUT, IdentityData, LimitsData
from bpfrl.errors import BpfrlError, CompilerError, InvalidObjectError, InvalidValueError
from bpfrl.limits import Limits, PodRef

log = logging.getLogger(__name__)

# -mcpu=v3 has 32-bit arithmetic and jumps (Linux 5.1); -g makes the BTF that libbpf needs for maps.
_FLAGS: Final = ("-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror")
# As many of a build's as people are shown.
BUILD_DIGITS: Final = 12
_SOURCE_SUFFIXES: Final = (".c", ".h")
_PROGRAM_SUFFIX: Final = ".bpf.c"
# Beside the sources; each is named for the digest of what it was made of.
_SHIPPED: Final = "compiled"
_LAST_LINES: Final = 3
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


class Contents(NamedTuple):
    """What a limiter's object says of itself.

    Attributes:
        pod: whom it was made for, if for anyone.
        limits: its limits.
        data: the same as the programs see them.
        build: the digest of the object before it was filled in.
        identity_at: where in the object the identity stands.
    """

    pod: PodRef | None
    limits: Limits
    data: LimitsData
    build: bytes
    identity_at: int


class _Places(NamedTuple):
    """Where in an object its limits and its identity stand."""

    limits: int
    identity: int


class _Template(NamedTuple):
    image: bytes
    build: bytes
    places: _Places


@cache
def _template() -> _Template:
    image = compile_object("limiter.bpf.c")
    return _Template(image, hashlib.sha256(image).digest(), _parse(image))


def build() -> bytes:
    """The digest of the programs that this version generates, as :attr:`Contents.build`.

    Raises:
        CompilerError: the template is not in the cache, and clang cannot make it.
    """
    return _template().build


def generate(pod: PodRef | None, limits: Limits) -> bytes:
    """The object of a limiter with these limits, and for this pod where it is known already.

    Raises:
        CompilerError: the template is not in the cache, and clang cannot make it.
    """
    template = _template()
    image = bytearray(template.image)
    _write(image, template.places.limits, law.encode(limits))
    _write(image, template.places.identity, _identity(pod, template.build))
    return bytes(image)


def is_known(image: bytes) -> bool:
    """True where an object is what this version compiles or ships: bit for bit, but for limits and an identity.

    And the limits' numbers are those that this version's law gives for their rates: nothing in the object is anybody
    else's choice.

    Raises:
        CompilerError: the template is not in the cache, and clang cannot make it.
    """
    template = _template()
    if not _is_like(image, template.image, template.places):
        return False
    data = LimitsData.from_buffer_copy(image, template.places.limits)
    try:
        return bytes(law.encode(law.decode(data))) == bytes(data)
    except InvalidValueError:
        return False


def relabel(image: bytes, contents: Contents, pod: PodRef, cgroup_id: int) -> bytes:
    """The same object, whose contents :func:`inspect` has found, for this pod and its cgroup."""
    changed = bytearray(image)
    _write(changed, contents.identity_at, _identity(pod, contents.build, cgroup_id))
    return bytes(changed)


def inspect(image: bytes) -> Contents:
    """Read back what :func:`generate` wrote.

    Raises:
        InvalidObjectError: the bytes are no limiter of this layout, or not those that were written.
    """
    places, build = _measured(image)
    identity = IdentityData.from_buffer_copy(image, places.identity)
    if identity.layout != LAYOUT:
        raise InvalidObjectError(
            f"the object has layout {identity.layout}, this bpfrl knows {LAYOUT}: generate it again with this version"
        )
    if bytes(identity.build) != build:
        raise InvalidObjectError(
            "the object is damaged, its programs do not have the SHA-256 that it names: generate it again"
        )
    data = LimitsData.from_buffer_copy(image, places.limits)
    try:
        pod = read_identity(identity)
        limits = law.decode(data)
    except (BpfrlError, UnicodeDecodeError) as error:
        raise InvalidObjectError(f"the object's limits or identity are damaged ({error}): generate it again") from error
    return Contents(pod, limits, data, build, places.identity)


def data(image: bytes) -> Mapping[str, slice]:
    """Where objects of one build differ: by the name of each map that begins with it.

    Raises:
        InvalidObjectError: the bytes are no limiter.
    """
    places, _ = _measured(image)
    return {
        ".data.limits": slice(places.limits, places.limits + sizeof(LimitsData)),
        ".rodata.identity": slice(places.identity, places.identity + sizeof(IdentityData)),
    }


def read_identity(identity: IdentityData) -> PodRef | None:
    """The pod that an object or a pinned map names, or None for one made for no pod in particular.

    Raises:
        InvalidValueError: it names no possible pod.
        UnicodeDecodeError: it does not even hold text.
    """
    if not identity.uid:
        return None
    return PodRef(identity.uid.decode(), identity.namespace.decode(), identity.name.decode())


@cache
def compile_object(source: str) -> bytes:
    """One of this package's programs: as it was shipped, from the cache, or compiled now.

    Raises:
        CompilerError: clang is missing or failed.
    """
    with resources.as_file(resources.files(__package__)) as folder:
        sources = _digest(folder, source)
        if shipped := _whole(_content(folder / _SHIPPED / f"{sources}.o")):
            return shipped
        try:
            clang, strip = (_tool(name) for name in ("clang", "llvm-strip"))
        except CompilerError:
            # What any compiler has made of the same sources will do.
            for cached in sorted(_cache_folder().glob(f"{sources}-*.o")):
                if kept := _kept(cached):
                    return kept
            raise
        cached = _cache_folder() / f"{sources}-{_version((clang, strip))}.o"
        if kept := _kept(cached):
            return kept
        log.info("compiling %s", source)
        with tempfile.TemporaryDirectory(prefix="bpfrl-") as scratch:
            output = Path(scratch, "output.o")
            headers = Path("/usr/include", f"{platform.machine()}-linux-gnu")
            # Where the sources lie must not show in the object: the same sources are the same build everywhere.
            here = f"-ffile-prefix-map={folder}=/{__package__}"
            _run([clang, *_FLAGS, here, f"-I{headers}", "-c", str(folder / source), "-o", str(output)])
            _run([strip, "-g", str(output)])
            image = output.read_bytes()
    _keep(cached, image)
    return image


def ship() -> dict[str, Path]:
    """Put every program, compiled, beside the sources of this installation, and nothing else there.

    Returns:
        Where each is, by its source's name.

    Raises:
        CompilerError: clang is missing or failed.
        OSError: the installation cannot be written to.
    """
    with resources.as_file(resources.files(__package__)) as folder:
        images = {
            path.name: compile_object(path.name)
            for path in sorted(folder.iterdir())
            if path.name.endswith(_PROGRAM_SUFFIX)
        }
        shipped = {source: folder / _SHIPPED / f"{_digest(folder, source)}.o" for source in images}
        shutil.rmtree(folder / _SHIPPED, ignore_errors=True)
        (folder / _SHIPPED).mkdir()
        for source, path in shipped.items():
            path.write_bytes(_sealed(images[source]))
    return shipped


def _version(tools: tuple[str, ...]) -> str:
    """A name for these versions of the tools."""
    digest = hashlib.sha256()
    for tool in tools:
        status = os.stat(tool)
        digest.update(repr((os.path.realpath(tool), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _digest(folder: Path, source: str) -> str:
    """A name for what goes into the compiler; system headers, which only declare, are left out."""
    digest = hashlib.sha256(repr((source, _FLAGS)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in _SOURCE_SUFFIXES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> Path:
    # The XDG Base Directory Specification's place for what can be made again; not everyone has a home.
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bpfrl")
    except RuntimeError:
        return Path("/var/cache/bpfrl")


def _kept(cached: Path) -> bytes | None:
    """What the cache holds, unless it was damaged, or somebody else may have written it."""
    try:
        with cached.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            content = file.read()
    except OSError:
        return None
    return _whole(content)


def _content(path: Path) -> bytes:
    """What a file holds; nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _sealed(image: bytes) -> bytes:
    """An object with its digest behind it, as it is kept in files."""
    return image + hashlib.sha256(image).digest()


def _whole(content: bytes) -> bytes | None:
    """What :func:`_sealed` was given, unless the content is damaged."""
    image = content[:-_DIGEST_BYTES]
    return image if image and _sealed(image) == content else None


def _keep(cached: Path, image: bytes) -> None:
    """Write to the cache whole or not at all; without one every process compiles, which is only slower."""
    try:
        files.make_folder(cached.parent)
        files.write(cached, _sealed(image))
    except OSError as error:
        log.warning("no compile cache in %s: %s", cached.parent, error.strerror)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise CompilerError(f"{name} is not installed: apt-get install clang llvm libbpf-dev")
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        reason = "; ".join(line.strip() for line in lines[:_LAST_LINES])
        raise CompilerError(f"{Path(command[0]).name} failed (is libbpf-dev installed?): {reason}")


def _identity(pod: PodRef | None, build: bytes, cgroup_id: int = 0) -> IdentityData:
    names = (part.encode() for part in (pod.uid, pod.namespace, pod.name)) if pod else ()
    return IdentityData(LAYOUT, *names, build=tuple(build), cgroup=cgroup_id)


def _write(image: bytearray, place: int, data: Structure) -> None:
    image[place : place + sizeof(data)] = bytes(data)


# The object whose digest was taken last, and what that gave.
_last: tuple[bytes, _Places, bytes] | None = None


def _measured(image: bytes) -> tuple[_Places, bytes]:
    """Where the limits and the identity are, and the digest of the object before they were filled in.

    Objects of one build differ only there, so the last one's are mostly it.
    """
    global _last  # noqa: PLW0603
    last = _last  # the daemon's threads look at objects side by side
    if last is None or not _is_like(image, *last[:2]):
        places = _parse(image)
        blank = bytearray(image)
        _write(blank, places.limits, LimitsData())
        _write(blank, places.identity, IdentityData(LAYOUT))
        _last = last = (image, places, hashlib.sha256(blank).digest())
    return last[1:]


def _is_like(image: bytes, other: bytes, places: _Places) -> bool:
    """True where two objects are the same but for their limits and identities."""
    if len(image) != len(other):
        return False
    start = 0
    for place, kind in sorted(zip(places, (sizeof(LimitsData), sizeof(IdentityData)), strict=True)):
        if image[start:place] != other[start:place]:
            return False
        start = place + kind
    return image[start:] == other[start:]


def _parse(image: bytes) -> _Places:
    """The places, checked against the structures that are to be there.

    Raises:
        InvalidObjectError: the bytes are no object, or have none.
    """
    found = elf.places(image, {"limits": sizeof(LimitsData), "identity": sizeof(IdentityData)})
    if len(found) < len(_Places._fields):
        raise InvalidObjectError("this is not a bpfrl limiter, or one of another version: make it with bpfrl generate")
    return _Places(**found)
