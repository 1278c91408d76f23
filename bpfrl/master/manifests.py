"""Desired state from a folder of Pod manifests, as the kubelet takes static pods from one.

For machines without Kubernetes, and for trying it out. Each ``.yaml``, ``.yml`` or ``.json`` file holds Pods. A
Pod's UID says which cgroup is meant, so there must be one: ``metadata.uid``. It is on this machine unless
``status.hostIP`` names another. A file has at most 1 MiB, and no aliases, of which a few lines make gigabytes. One that
cannot be read counts as it did before, and while one has never been read, no limiter is removed that this folder does
not explain.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml
from watchfiles import awatch

from bpfrl.errors import ClusterError, InvalidValueError
from bpfrl.master.apiserver import Sink
from bpfrl.master.pods import Pod, RawPod, read

log = logging.getLogger(__name__)

_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
_LARGEST_BYTES: Final = 2**20
_THIS_MACHINE: Final = "127.0.0.1"
_DEFAULT_NAMESPACE: Final = "default"
# Editors write in several steps; a file system that tells of no changes is looked at all the same.
_SETTLE_MS: Final = 50
_LOOK_AGAIN_MS: Final = 30_000
_GONE_SECONDS: Final = 1.0
# libyaml's where there is one: a tenth of the time.
_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A Pod with everything has some hundred parts, ten in each other.
_MOST_EVENTS: Final = 100_000
_DEEPEST: Final = 64
_LONGEST_NUMBER: Final = 400
_LONGEST_REASON: Final = 80
_NUMBERS_BEGIN: Final = "+-.0123456789"
_KIND: Final = re.compile(r"[A-Za-z]{1,63}")


class ManifestWatch:
    """Keeps a sink told of the pods in a folder.

    Raises (the constructor):
        ClusterError: there is no such folder.
    """

    def __init__(self, folder: Path, sink: Sink) -> None:
        if not folder.is_dir():
            raise ClusterError(f"{folder} is no folder of Pod manifests")
        self._folder = folder
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change it sees
        self._sink = sink
        self._good: dict[Path, list[Pod]] = {}
        self._problems: dict[Path, str] = {}
        self._gone = False
        self._unwatched = False
        self._twice: set[tuple[Path, str, Path]] = set()

    async def run(self) -> None:
        """Read the folder now and after each change, until cancelled."""
        while True:
            self.look()
            try:
                async for _ in awatch(
                    self._folder,
                    watch_filter=None,
                    step=_SETTLE_MS,
                    rust_timeout=_LOOK_AGAIN_MS,
                    yield_on_timeout=True,
                    recursive=False,
                ):
                    self.look()
            except (OSError, RuntimeError) as error:
                # inotify has its limits: what cannot be watched is looked at all the same.
                if not self._gone and not self._unwatched:
                    log.warning("cannot watch %s, so it is read every second: %s", self._folder, error)
                    self._unwatched = True
            await asyncio.sleep(_GONE_SECONDS)

    def look(self) -> None:
        """Read the folder once."""
        try:
            files = manifests(self._folder)
        except OSError as error:
            if not self._gone:
                log.warning("%s: %s; the pods in it stay as they are", self._folder, error.strerror)
            self._gone = True
            return
        self._gone = False
        problems: dict[Path, str] = {}
        good: dict[Path, list[Pod]] = {}
        for path in files:
            try:
                good[path] = [read(raw) for raw in read_file(path)]
            except InvalidValueError as error:
                problems[path] = str(error)
                if path in self._good:
                    good[path] = self._good[path]
        for path, problem in problems.items():
            if self._problems.get(path) != problem:
                log.warning("%s: %s", path, problem)
        self._good, self._problems = good, problems
        pods = self._pods()
        for pod in pods:
            self._sink.put(pod)
        self._sink.keep({pod.uid for pod in pods}, complete=problems.keys() <= good.keys())

    def _pods(self) -> list[Pod]:
        found: dict[str, tuple[Path, Pod]] = {}
        twice: set[tuple[Path, str, Path]] = set()
        for path, pods in self._good.items():
            for pod in pods:
                first, _ = found.setdefault(pod.uid, (path, pod))
                if first != path:
                    twice.add((path, pod.uid, first))
        for each in sorted(twice - self._twice):
            log.warning("%s: pod %s is in %s already, which counts", *each)
        self._twice = twice
        return [pod for _, pod in found.values()]


def manifests(folder: Path) -> list[Path]:
    """The files of a folder that count, in their order. Raises OSError."""
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))


def read_file(path: Path) -> list[RawPod]:
    """The pods of a file.

    Raises:
        InvalidValueError: it cannot be read, or holds something else.
    """
    text = _content(path)
    try:
        _bounded(text)
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except InvalidValueError:
        raise
    # PyYAML raises whatever Python's own types do where a text is no number, day or truth value.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"no YAML: {_reason(error)}") from error
    if not documents:
        # As an editor leaves it for a moment; who wants it gone removes the file.
        raise InvalidValueError("holds no Pod")
    return [_pod(document) for document in documents]


def _content(path: Path) -> bytes:
    """What stands in a regular file; links are followed, for a ConfigMap's files are some."""
    try:
        # Looked at before, for opening a device may do something, and after, for it may be another by then.
        _regular(path.stat())
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _regular(os.fstat(file.fileno()))
            text = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise InvalidValueError(f"cannot be read: {error.strerror}") from error
    if len(text) > _LARGEST_BYTES:
        raise InvalidValueError(f"more than {_LARGEST_BYTES} byte is no manifest")
    return text


def _regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise InvalidValueError("a pipe, a socket or a device is no manifest")


def _bounded(text: bytes) -> None:
    """Refuse what takes much more time or memory than its length says, before anything is made of it.

    Raises:
        InvalidValueError: it does.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Loader)):
        if isinstance(event, yaml.AliasEvent):
            raise InvalidValueError("aliases (*name) are not read in manifests: write out what they stand for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and _may_be_a_number(event) and len(event.value) > _LONGEST_NUMBER:
            raise InvalidValueError(f"a number of {len(event.value)} characters is none that a Pod has")
        if number > _MOST_EVENTS or depth > _DEEPEST:
            raise InvalidValueError(f"more than {_MOST_EVENTS} parts, or {_DEEPEST} in each other, are no Pods")


def _may_be_a_number(event: yaml.ScalarEvent) -> bool:
    return bool(event.tag) or (not event.style and event.value[:1] in _NUMBERS_BEGIN)


def _reason(error: Exception) -> str:
    """What is wrong, and where; hardly anything of what stands there, which may be as long, and another's file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
        return f"{str(error.problem)[:_LONGEST_REASON]} in line {line}, column {column}"
    return type(error).__name__ if isinstance(error, yaml.YAMLError) else "a value that is none of its kind"


def _pod(document: Any) -> RawPod:
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind != "Pod":
        named = kind if isinstance(kind, str) and _KIND.fullmatch(kind) else "something"
        raise InvalidValueError(f"holds {named} where a Pod is expected")
    if isinstance(document.get("metadata"), dict):
        document["metadata"].pop("creationTimestamp", None)  # which YAML makes a time of, and nobody needs
    try:
        raw = msgspec.convert(document, RawPod)
    except msgspec.ValidationError as error:
        raise InvalidValueError(f"no Pod: {error}") from error
    if not raw.metadata.uid:
        raise InvalidValueError(
            f"pod {raw.metadata.name[:_LONGEST_REASON]!r} has no metadata.uid, which names its cgroup"
        )
    raw.metadata.namespace = raw.metadata.namespace or _DEFAULT_NAMESPACE
    raw.status.host_ip = raw.status.host_ip or _THIS_MACHINE
    return raw
