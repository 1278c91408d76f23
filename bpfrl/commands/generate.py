"""``bpfrl generate``: a limiter as a file."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from bpfrl.bpf import generator
from bpfrl.commands.options import limit_options, limiting, pod_options
from bpfrl.limits import Limits, PodRef

_NO_TERMINAL: Final = "an object is not for a terminal: use -o FILE, or pipe it somewhere"


@click.command()
@limit_options
@pod_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write; - for a pipe.")
def generate(limits: Limits, pod: PodRef | None, output: Path) -> None:
    """Write a limiter as a BPF object, without attaching it.

    The object is complete: it carries its limits, and any loader takes it ('bpftool prog loadall', 'bpfrl
    attach --object'). This needs clang, but neither root nor BPF.

    \b
    EXAMPLES
      bpfrl generate --rate 10mbit -o pod.o
      bpfrl generate --rate 10mbit -o - | ssh node bpfrl attach --pod-uid UID --object -
    """
    to_stdout = str(output) == "-"
    if to_stdout and (sys.stdout is None or sys.stdout.isatty()):
        raise click.UsageError(_NO_TERMINAL)
    image = generator.generate(pod, limiting(limits))
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
