"""What passed at the last looks: from one look to the next, for lists that are drawn again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from bpfrl.bpf.limiter import Status
from bpfrl.render import Row, Sample, sample

# At one look a second, half a minute.
SAMPLES: Final = 30
_UNKNOWN: Final = Sample(None, None)

_Key = tuple[str, str]


class _Seen(NamedTuple):
    row: Row
    status: Status
    samples: deque[Sample]


class History:
    """The last looks at some limiters.

    Rates are over the time that has really passed since a limiter was last seen, which is longer than from one look to
    the next where its node was silent in between.
    """

    def __init__(self) -> None:
        self._seen: dict[_Key, _Seen] = {}

    def follow(self, rows: Iterable[Row], silent: Collection[str] = ()) -> list[Row]:
        """The rows of a new look, with what the earlier ones tell of them.

        Args:
            rows: what was found.
            silent: the nodes that did not answer. Their limiters stay, with no rates.
        """
        before, self._seen = self._seen, {}
        followed = [self._followed(row, before.pop(_key(row), None)) for row in rows]
        for key, seen in before.items():
            if seen.row.node in silent:
                followed.append(self._missed(key, seen))
        return followed

    def _followed(self, row: Row, seen: _Seen | None) -> Row:
        key, status = _key(row), row.status
        if status is None:
            # A pod whose node is silent, or which has lost its limiter: the former may be back.
            return row if seen is None else row._replace(samples=self._missed(key, seen).samples)
        if seen:
            row = row._replace(before=(seen.status, seen.row.now))
        samples = seen.samples if seen else deque(maxlen=SAMPLES)
        samples.append(sample(row))
        self._seen[key] = _Seen(row, status, samples)
        return row._replace(samples=tuple(samples))

    def _missed(self, key: _Key, seen: _Seen) -> Row:
        """The limiter as it was seen last."""
        seen.samples.append(_UNKNOWN)
        self._seen[key] = seen
        return seen.row._replace(before=None, samples=tuple(seen.samples))


def _key(row: Row) -> _Key:
    return row.node, row.ref.uid
