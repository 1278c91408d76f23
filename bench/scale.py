"""How a master fares in a large cluster: ``make bench-scale``, or ``python -m bench.scale --help``.

The master is the real command, with TLS. The API server is the stand-in with a crowd in it (:mod:`bench.crowd`), and
the nodes are one process that speaks the protocol (:mod:`bench.light`); all of it is in a network namespace whose
addresses are all local. There nftables makes nodes unreachable: half of them refuse connections, the others swallow
them.

A change is told when its node has received the call. What counts is the time from when the API server has committed
it, by one clock.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from bench import machine, scale_page
from bench.converge import Spread
from bench.crowd import NODE_NETWORK, Change, Crowd, Size, address_of
from bench.fleet import CONTROL_ADDRESS, NODE_PORT, Daemon, Fleet, fleet, wait_for
from bench.lab import in_namespace, run
from bench.light import Call, LightNodes
from bench.run import Places, make_page
from bench.scale_page import MEGA, Churned, Measured, Results

SIZES: Final = (Size(50), Size(500), Size(5000))
_RATE: Final = 50.0
_SEED: Final = 1
# One limit takes milliseconds of this machine, and a large cluster has 30,000.
_PATIENCE_SECONDS: Final = 300.0
_SHARE_UNREACHABLE: Final = 0.1
# What lasts no longer than this may be gone before its node has a connection.
_MOMENT_SECONDS: Final = 1.0
# The relist comes when so much of the time is over.
_RELIST_AFTER: Final = 0.2
_FIREWALL: Final = """\
table inet unreachable {{
  set silent {{ type ipv4_addr; }}
  set refusing {{ type ipv4_addr; }}
  chain input {{
    type filter hook input priority 0;
    ip daddr @silent drop
    ip daddr @refusing tcp dport {port} reject with tcp reset
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Spans:
    """How long each part lasts, s.

    Attributes:
        settle: what is left over of the first rush ends.
        rest: nothing happens.
        churn: pods change.
        relist: they do, and the API server forgets its history.
        cut: they do, and some nodes are unreachable.
    """

    settle: float = 3.0
    rest: float = 20.0
    churn: float = 20.0
    relist: float = 15.0
    cut: float = 25.0


class Bed:
    """A cluster with a master that acts."""

    def __init__(self, namespace: str, api: Crowd, nodes: LightNodes, master: Daemon) -> None:
        self._namespace = namespace
        self._api = api
        self._nodes = nodes
        self.master = master
        self._calls: list[Call] = []

    def converge(self) -> float:
        """How long it takes until all nodes have what they should have and nothing else, s."""
        wanted = sum(1 for _ in self._api.wanted())
        return wait_for(
            lambda: self._nodes.totals().limiters == wanted and self.is_right(), _PATIENCE_SECONDS, self._differs
        )

    def is_right(self) -> bool:
        """Whether all nodes have what they should have, and nothing else."""
        return self._has() == self._wants()

    def churn(self, seconds: float, without: Sequence[str] = (), meanwhile: float = 0.0) -> Churned:
        """Change pods for so long, and find out how soon their nodes knew.

        Args:
            seconds: for how long.
            without: nodes that cannot know.
            meanwhile: when the API server forgets its history, s; 0: it does not.
        """
        cpu, start = self.master.cpu(), time.monotonic()
        self._api.churn(_RATE, seconds)
        relisted = 0.0
        if meanwhile:
            time.sleep(meanwhile)
            relisted = self._relist()
        # Asking costs the machine something, too.
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        wait_for(lambda: not self._api.changes().running, 2 * seconds + _PATIENCE_SECONDS)
        cpu = (self.master.cpu() - cpu) / (time.monotonic() - start)
        left_out = {*without}
        changes = [each for each in _lasting(self._api.changes().told) if each.address not in left_out]
        wait_for(lambda: None not in self._delays(changes), _PATIENCE_SECONDS, lambda: self._unheard(changes))
        delays = [delay for delay in self._delays(changes) if delay is not None]
        self._calls.clear()
        return Churned(len(delays), Spread.of(delays), round(100 * cpu, 1), self.memory(), round(relisted, 2))

    @contextlib.contextmanager
    def cut(self, refusing: Sequence[str], silent: Sequence[str]) -> Iterator[None]:
        """Nodes that nobody can reach, as long as the context lasts."""
        rules = _FIREWALL.format(port=NODE_PORT)
        for name, addresses in (("refusing", refusing), ("silent", silent)):
            if addresses:
                rules += f"add element inet unreachable {name} {{ {', '.join(addresses)} }}\n"
        self._nft(rules)
        try:
            yield
        finally:
            self._nft("delete table inet unreachable\n")

    def rest(self, seconds: float) -> float:
        """The master's CPU time while nothing happens, as a share."""
        before, start = self.master.cpu(), time.monotonic()
        time.sleep(seconds)
        return (self.master.cpu() - before) / (time.monotonic() - start)

    def memory(self) -> float:
        """The master's memory, MB."""
        return round(self.master.memory() / MEGA, 1)

    def _relist(self) -> float:
        """Have the master list all pods again; how long that took, s."""
        with self.master.log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            self._api.compact()
            news = bytearray()

            def listed() -> bool:
                news.extend(log.read())
                return b" pods listed\n" in news

            return wait_for(listed, _PATIENCE_SECONDS, self.master.output)

    def _delays(self, changes: Sequence[Change]) -> list[float | None]:
        """How long each change took to its node, s; None: it has not come."""
        self._calls += self._nodes.calls()
        by_pod: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
        for call in self._calls:
            by_pod[call.address, call.uid].append(call)
        return [_delay(each, by_pod[each.address, each.uid]) for each in changes]

    def _unheard(self, changes: Sequence[Change]) -> list[Change]:
        return [each for each, delay in zip(changes, self._delays(changes), strict=True) if delay is None]

    def _has(self) -> dict[tuple[str, str], tuple[int, int]]:
        return {(address, uid): rates for address, has in self._nodes.state().items() for uid, rates in has.items()}

    def _wants(self) -> dict[tuple[str, str], tuple[int, int]]:
        return {(each.address, uid): (each.egress, each.ingress) for uid, each in self._api.wanted().items()}

    def _differs(self) -> str:
        has, wants = self._has(), self._wants()
        missing, more = wants.items() - has.items(), has.items() - wants.items()
        return f"{len(missing)} missing, {len(more)} more: {sorted(missing)[:3]}, {sorted(more)[:3]}"

    def _nft(self, rules: str) -> None:
        file = Path(self._api.folder, "rules.nft")
        file.write_text(rules)
        run(*in_namespace(self._namespace, "nft", "-f", str(file)))


def _lasting(told: Sequence[Change]) -> Iterator[Change]:
    """The changes without those that nobody has to be told of, for their pods were deleted a moment later."""
    deleted = {each.uid: each.at for each in told if each.kind == "delete"}
    created = {each.uid: each.at for each in told if each.kind == "create"}
    for each in told:
        if each.kind == "delete":
            brief = each.at - created.get(each.uid, -math.inf) < _MOMENT_SECONDS
        else:
            brief = deleted.get(each.uid, math.inf) - each.at < _MOMENT_SECONDS
        if not brief:
            yield each


def _delay(change: Change, calls: Sequence[Call]) -> float | None:
    """When a node knew a change, or a later one of the same pod, s after it was committed."""
    deleted = change.kind == "delete"
    return next(
        (
            max(0.0, call.at - change.at)
            for call in calls
            if call.at >= change.at
            and ((call.verb == "detach") is deleted)
            and (deleted or call.egress >= change.egress)
        ),
        None,
    )


@contextlib.contextmanager
def _cluster(size: Size, seed: int) -> Iterator[tuple[Fleet, Crowd, LightNodes]]:
    with fleet(0) as bed:
        # All of these addresses are this namespace's, and each is its own source.
        run("ip", "-n", bed.tag, "route", "add", "local", str(NODE_NETWORK), "dev", "lo")
        with (
            Crowd(CONTROL_ADDRESS, bed.tag, size, seed) as api,
            LightNodes(bed.tag, bed.certificates / "node", NODE_PORT) as nodes,
        ):
            yield bed, api, nodes


def measure(size: Size, spans: Spans, seed: int = _SEED) -> Measured:
    """Everything about a cluster of a size."""
    load = os.getloadavg()[0]
    with _cluster(size, seed) as (bed, api, nodes):
        options = ("--kubeconfig", str(api.kubeconfig), "--no-leader-elect", "--http", f"{CONTROL_ADDRESS}:10004")
        built = Bed(bed.tag, api, nodes, bed.master(*options))
        converged = built.converge()
        converging_cpu = built.master.cpu()
        time.sleep(spans.settle)
        peak, steady = built.master.peak() / MEGA, built.memory()
        nodes.calls()
        resting = built.rest(spans.rest)
        churned = built.churn(spans.churn)
        relisted = built.churn(spans.relist, meanwhile=_RELIST_AFTER * spans.relist)
        unreachable = random.Random(seed).sample(range(size.nodes), round(_SHARE_UNREACHABLE * size.nodes))  # noqa: S311
        addresses = [address_of(number) for number in unreachable]
        refusing, silent = addresses[::2], addresses[1::2]
        with built.cut(refusing, silent):
            cut = built.churn(spans.cut, addresses)
        mended = built.converge()
        return Measured(
            nodes=size.nodes,
            pods=size.pods,
            limited=size.limited,
            load=round(load, 2),
            converged=round(converged, 1),
            converging_cpu=round(converging_cpu, 1),
            peak=round(peak, 1),
            steady=steady,
            resting_cpu=round(100 * resting, 2),
            churned=churned,
            relisted=relisted,
            refusing=len(refusing),
            silent=len(silent),
            cut=cut,
            mended=round(mended, 1),
            highest=round(built.master.peak() / MEGA, 1),
            wrong=nodes.totals().wrong,
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--nodes",
    type=click.IntRange(min=10),
    multiple=True,
    help="Only a cluster of so many nodes; may be repeated. What there is of others is kept.",
)
@click.option("--seed", type=int, default=_SEED, show_default=True, help="What changes follow from.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Put the JSON there, and draw nothing. [default: bench/results, and the page]",
)
@click.option("--report-only", is_flag=True, help="Measure nothing: make the page again from the JSON.")
def main(nodes: tuple[int, ...], seed: int, output: Path | None, report_only: bool) -> None:
    """Measure a master in clusters of 1,500, 15,000 and 150,000 pods."""
    if not report_only:
        if os.geteuid() != 0:
            raise click.ClickException("this makes network namespaces: run it as root")
        # Ended from outside, everything is taken down as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        facts, place = machine.describe(), output or scale_page.FIGURES
        before = Results.load(place) if nodes else None
        found = {each.nodes: each for each in before.measured} if before else {}
        for size in [Size(each) for each in nodes] or SIZES:
            found[size.nodes] = measure(size, Spans(), seed)
            click.echo(found[size.nodes], err=True)
            Results(facts, _command(seed), _RATE, [found[each] for each in sorted(found)]).save(place)
    if output is None:
        for place in (scale_page.FIGURES, *make_page(Places.under(None))):
            click.echo(place)


def _command(seed: int) -> str:
    return "python -m bench.scale" + (f" --seed {seed}" if seed != _SEED else "")


if __name__ == "__main__":
    main()
