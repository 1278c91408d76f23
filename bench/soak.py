"""Everything goes wrong that may, in any order, for as long as one likes: ``python -m bench.soak --help``.

A round is one of :mod:`bench.chaos`, or one in which a fault of :mod:`bench.faults` happens; each ends with everything
as it should be and nothing left over. Which it is follows from the seed and the round's number, and so do the dice that
choose what is done to which pod; the log tells each action. A soak with the same seed does the same again, and with
``--first`` begins at a later round. Besides, no daemon may come to hold ever more descriptors, threads or memory.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from bench import chaos
from bench.chaos import ChaosError, Cluster, Round
from bench.faults import FAULTS
from bench.kubeapi import RealApi, StandIn

log = logging.getLogger("bench.soak")  # run as a command, its name would be another

_KILLS_SHARE: Final = 0.3
_MIB: Final = 2**20
# What Python and gRPC come to keep in their first minutes; a leak goes on for ever.
_GROWTH_MIB: Final = 24.0
_SHORTEST_LIFE: Final = 9


class Soak:
    """A soak, as it goes.

    Attributes:
        rounds: what was played.
        memory: what each daemon had after each round, MiB, by its name and process id.
    """

    def __init__(self, seed: int, server: type[StandIn | RealApi]) -> None:
        self.rounds: list[Round] = []
        self.memory: dict[str, list[float]] = {}
        self._seed = seed
        self._server = server
        self._often = [fault for fault in FAULTS.values() if fault.often and (server is StandIn or not fault.stand_in)]

    def run(self, seconds: float, first: int, tell: Callable[[str], None]) -> None:
        """Play rounds until the time is over.

        Raises:
            ChaosError: a round has not ended as it should, or a daemon holds ever more.
        """
        end = time.monotonic() + seconds
        number = first
        with chaos.cluster(self._server, self._seed) as built:
            while time.monotonic() < end:
                self.rounds.append(played := self._play(built, number))
                self._weigh(built)
                names = ", ".join(fault.victim for fault in played.faults)
                tell(f"{number:5} {names}: {sum(played.operations.values())} operations; {played.seconds:.1f} s")
                number += 1
            built.finish(number)
        if (held := chaos.growth(self.rounds)) > chaos.GROWTH:
            raise ChaosError(f"seed {self._seed}: a daemon holds {held} descriptors or threads more than at first")
        if (grown := self.growth()) > _GROWTH_MIB:
            raise ChaosError(f"seed {self._seed}: a daemon has {grown:.0f} MiB more than at first: {self.memory}")

    def growth(self) -> float:
        """By how much any daemon has grown, from the first third of its life to the last, MiB; as chaos.growth."""
        lives = [life for life in self.memory.values() if len(life) >= _SHORTEST_LIFE]
        thirds = ((life[: len(life) // 3], life[-(len(life) // 3) :]) for life in lives)
        return max((statistics.median(last) - statistics.median(first) for first, last in thirds), default=0.0)

    def __str__(self) -> str:
        """A few lines for people."""
        operations = sum(sum(played.operations.values()) for played in self.rounds)
        faults = Counter(fault.victim for played in self.rounds for fault in played.faults)
        longest = max(self.rounds, key=lambda played: played.seconds)
        lines = (
            f"seed {self._seed} against {self._server.__name__}: {len(self.rounds)} rounds, all came right again",
            f"{operations} operations on pods, {faults.total()} faults: {dict(sorted(faults.items()))}",
            f"right again after {longest.seconds:.1f} s at the latest, in round {longest.number}",
            f"grown by at most {chaos.growth(self.rounds)} descriptors or threads, and {self.growth():.1f} MiB",
        )
        return "\n".join(lines)

    def _play(self, built: Cluster, number: int) -> Round:
        dice = random.Random(f"{self._seed} {number} what")  # noqa: S311 - nobody must be kept from guessing it
        if dice.random() < _KILLS_SHARE:
            log.debug("round %d: kills", number)
            return built.play(number)
        disturbance = dice.choice(self._often).disturbance
        log.debug("round %d: %s", number, disturbance.name)
        return built.endure(number, disturbance)

    def _weigh(self, built: Cluster) -> None:
        for name, daemon in built.daemons().items():
            if daemon.alive:
                self.memory.setdefault(f"{name} {daemon.pid}", []).append(round(daemon.memory() / _MIB, 1))
        log.debug("memory, MiB: %s", {name: amounts[-1] for name, amounts in self.memory.items()})


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--seconds", type=click.IntRange(min=1), default=600, show_default=True, help="For how long.")
@click.option("--seed", type=int, default=1, show_default=True, help="What is done follows from this number.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="The first round's number.")
@click.option("--real", is_flag=True, help="Use etcd and kube-apiserver, not the stand-in.")
@click.option(
    "--log",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("build/soak.log"),
    show_default=True,
    help="Where each action is told.",
)
def main(seconds: int, seed: int, first: int, real: bool, file: Path) -> None:
    """Have everything go wrong that may, at random, and see that all comes right again.

    Exits with 1 when a round does not end as it should.
    """
    if os.geteuid() != 0:
        raise click.ClickException("this loads BPF programs and makes namespaces: run it as root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    file.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=file, filemode="w", format="%(asctime)s %(message)s")
    logging.getLogger("bench").setLevel(logging.DEBUG)
    soak = Soak(seed, RealApi if real else StandIn)
    try:
        soak.run(seconds, first, lambda line: click.echo(line, err=True))
    except ChaosError as error:
        log.error("%s", error)  # noqa: TRY400 - where it was raised tells nothing
        raise click.ClickException(str(error)) from error
    click.echo(soak)


if __name__ == "__main__":
    main()
