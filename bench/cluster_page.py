"""The page about how a cluster's limits come about, made from nothing but what was measured.

``python -m bench.cluster_page`` writes it from what :mod:`bench.converge` and :mod:`bench.chaos` have left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import chaos, converge
from bench.kubeapi import RealApi, StandIn

_PAGE: Final = Path(__file__).parent.parent / "docs" / "convergence.md"
_HEAD: Final = """\
<!-- Made by bench/cluster_page.py from bench/results: run `make bench-cluster`, do not edit. -->
# Convergence

How soon a cluster's limits hold, and that they come to what pods ask for whatever is killed on the way. Two API
servers were asked: a stand-in that speaks the protocol (`bench/standin.py`), and etcd with kube-apiserver.
"""
_CHAOS: Final = """\
## Kills at random

In each round pods are created, annotated (also with what cannot be meant), completed and deleted on three nodes, and
cgroups come late and go early. Meanwhile one or several of the two masters, two of the three node daemons and the API
server are killed with SIGKILL and started again. Then the kernel's state must become what the pods ask for, as bpftool
and `bpfrl list` see it, and nothing else may be left: no pin, program, link or map. A round that does not end so fails
the run.
"""


_NAMES: Final = {StandIn.__name__: "stand-in", RealApi.__name__: "kube-apiserver"}


def main() -> None:
    """Write the page."""
    text = "\n".join([_HEAD, converge.section(converge.load(converge.FIGURES)), "", _CHAOS, *_rounds()])
    _PAGE.write_text(text.rstrip() + "\n")


def _rounds() -> Iterator[str]:
    for server, summary in chaos.load(chaos.FIGURES).items():
        yield f"### {_NAMES[server]}"
        yield ""
        for line in str(summary).splitlines():
            yield f"- {line[0].upper()}{line[1:]}."
        yield ""
        yield f"Repeat it: `{summary.command}`"
        yield ""


if __name__ == "__main__":
    main()
