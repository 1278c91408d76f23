"""The bpfrl command.

Results go to stdout, everything else to stderr. An error is one line; the exit code is 2 when what was typed cannot
be meant, and 1 when it could not be done.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from bpfrl import __version__, logs
from bpfrl.commands.attach import attach
from bpfrl.commands.certs import certs
from bpfrl.commands.completing import PROGRAM, VARIABLE, answer_a_shell
from bpfrl.commands.completion import completion
from bpfrl.commands.detach import detach
from bpfrl.commands.doctor import doctor
from bpfrl.commands.explain import explain
from bpfrl.commands.generate import generate
from bpfrl.commands.list import list_
from bpfrl.commands.options import FAILURE, FOLDER, LocalNode
from bpfrl.commands.serve import serve_master, serve_node
from bpfrl.errors import BpfrlError, InvalidValueError
from bpfrl.node.agent import DEFAULT_BPFFS
from bpfrl.plain import plain

_USAGE: Final = 2
_INTERRUPTED: Final = 130
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)


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
            _die(f"bpfrl: {error}", FAILURE)
        except BrokenPipeError:
            # The reader has seen enough. Nothing more can be flushed at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILURE)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _die(f"bpfrl: {place}{error.strerror or error}", FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def _die(message: str, code: int) -> None:
    click.echo(plain(message.replace("\n", " ")), err=True)
    sys.exit(code)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="bpfrl")
@click.option("-v", "--verbose", count=True, help="Say what is done; twice for every detail.")
@click.option(
    "--bpffs",
    type=FOLDER,
    default=DEFAULT_BPFFS,
    show_default=True,
    envvar="BPFRL_BPFFS",
    help="Where limiters are pinned. A BPF file system is mounted there if none is. [env: BPFRL_BPFFS]",
)
@click.option(
    "--cgroup-root",
    type=FOLDER,
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
      130  it was interrupted
    """
    logging.basicConfig(level=_LEVELS[min(verbose, len(_LEVELS) - 1)], stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(logs.TextFormatter("bpfrl: %(message)s"))
    context.obj = LocalNode(bpffs, cgroup_root)


for _command in (generate, attach, detach, list_, explain, doctor, serve_node, serve_master, certs, completion):
    cli.add_command(_command)


def main() -> None:
    """The entry point of the installed command."""
    answer_a_shell()
    cli.main(prog_name=PROGRAM, complete_var=VARIABLE)
