"""What a shell offers for an option's value: what is there, on this node or in the cluster.

A public function that takes a context, a parameter and what is typed so far is an option's ``shell_complete``. What
it cannot look at, for want of a privilege, a cluster or time, it leaves out: nobody reads errors while typing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from bpfrl import cgroup
from bpfrl.bpf.limiter import Broken
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import BpfrlError
from bpfrl.node.agent import Agent

if TYPE_CHECKING:
    from bpfrl.master.names import Named

    Items = list[CompletionItem[str]]

PROGRAM: Final = "bpfrl"
SHELLS: Final = ("bash", "zsh", "fish")
# What click's scripts put their question in, and how it ends if it is one.
VARIABLE: Final = "_BPFRL_COMPLETE"
_QUESTION: Final = "_complete"
_PATIENCE_SECONDS: Final = 1.0


def script(command: click.Command, shell: str) -> str:
    """Click's script that has a shell complete a command.

    Args:
        command: the outermost one.
        shell: one of :data:`SHELLS`.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(shell)
    # Bash's own source() looks at the bash of this machine, and the script may be for another.
    return ShellComplete.source(kind(command, {}, PROGRAM, VARIABLE))


def answer_a_shell() -> None:
    """Let a shell that asks this process see nothing but the answer, and within a second that or nothing."""
    if not os.environ.get(VARIABLE, "").endswith(_QUESTION):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)
    # A look-up of a name may take longer, and no time-out in Python ends it.
    watchdog = threading.Timer(_PATIENCE_SECONDS, os._exit, (0,))
    watchdog.daemon = True
    watchdog.start()


# On this node.


def limited(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The UIDs of what is limited here, with the pods' names."""
    return _offer(_limited(context), incomplete, context, parameter)


def pods_here(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The UIDs of the pods that are here, limited or not."""
    found: list[tuple[str, str]] = []
    with suppress(BpfrlError, OSError):
        found = [(uid, "") for uid in CgroupTree(context.find_root().params["cgroup_root"]).uids()]
    return _offer(sorted((dict(found) | dict(_limited(context))).items()), incomplete, context, parameter)


def cgroups(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """The cgroups whose paths begin like this, a level at a time."""
    try:
        mount = cgroup.mount_point()
        above = mount if str(mount).startswith(incomplete) else Path(f"{incomplete}*").parent
        found = _folders(above, incomplete) if above.is_relative_to(mount) else []
        if len(found) == 1:
            # A single value is a whole word to a shell, which this is not while there is something below it.
            found += _folders(Path(found[0]), incomplete)
    except (BpfrlError, OSError, ValueError):
        return []
    return _offer([(path, "") for path in found], incomplete)


# In the cluster.


def contexts(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """The kubeconfig's contexts."""
    from bpfrl.master import api  # noqa: PLC0415 - a third of a second that most values do not need

    with suppress(BpfrlError):
        return _offer([(name, "") for name in api.contexts(context.params.get("kubeconfig"))], incomplete)
    return []


def namespaces(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """The cluster's namespaces."""
    return _offer([(found.name, "") for found in _names(context, "namespaces")], incomplete)


def nodes(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The addresses of the cluster's nodes, with their names."""
    found = [(each.address, each.name) for each in _names(context, "nodes") if each.address]
    return _offer(
        [(f"[{place}]" if ":" in place else place, name) for place, name in found], incomplete, context, parameter
    )


def pods(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The names of the pods of --namespace, or of the kubeconfig's own."""
    found = _names(context, "pods", context.params.get("namespace") or _usual_namespace(context))
    return _offer([(pod.name, "") for pod in found], incomplete, context, parameter)


def pod_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """The cluster's pods, as NAMESPACE/NAME."""
    namespace, complete, _ = incomplete.partition("/")
    found = _names(context, "pods", namespace if complete else "")
    return _offer([(f"{pod.namespace}/{pod.name}", "") for pod in found], incomplete)


def _usual_namespace(context: click.Context) -> str:
    from bpfrl.master import api  # noqa: PLC0415 - as above

    with suppress(BpfrlError):
        return api.namespace_of(context.params.get("kubeconfig"), context.params.get("context"))
    return "default"


def _offer(
    values: Iterable[tuple[str, str]],
    incomplete: str,
    context: click.Context | None = None,
    parameter: click.Parameter | None = None,
) -> Items:
    """Values with what is told about them; what begins otherwise, or is given already, is not offered."""
    given = context.params.get(parameter.name) if context and parameter and parameter.name else None
    taken = given if isinstance(given, tuple) else ()
    return [
        CompletionItem(value, help=told or None)
        for value, told in values
        if value.startswith(incomplete) and value not in taken
    ]


def _limited(context: click.Context) -> list[tuple[str, str]]:
    with suppress(BpfrlError, OSError):
        return [
            (found.uid, found.reason)
            if isinstance(found, Broken)
            else (found.pod.uid, str(found.pod) if found.pod.name else "")
            for found in Agent(context.find_root().params["bpffs"]).limiters()
        ]
    return []


def _folders(above: Path, beginning: str) -> list[str]:
    return sorted(str(path) for path in above.iterdir() if str(path).startswith(beginning) and path.is_dir())


def _names(context: click.Context, resource: str, namespace: str = "") -> list[Named]:
    from bpfrl.master.names import names  # noqa: PLC0415 - as above

    with suppress(BpfrlError):
        return asyncio.run(names(context.params.get("kubeconfig"), context.params.get("context"), resource, namespace))
    return []
