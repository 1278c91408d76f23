"""Whoever wants to know what the node's daemon does."""

from __future__ import annotations


class Observer:
    """Told of everything that the daemon does; this one forgets it."""

    def serves(self, *, serving: bool) -> None:
        """Masters are answered from now on, or no longer."""

    def answered(self, operation: str, result: str, seconds: float) -> None:
        """A call has ended.

        Args:
            operation: its name in lower case.
            result: what has changed, as :class:`bpfrl.limits.Change` names it in lower case; OK for a call that
                changes nothing; or the gRPC status code's name.
            seconds: since the node could begin with it, s.
        """

    def swept(self, limiters: int) -> None:
        """What no running pod needs any more was looked for, and so many limiters removed."""

    def failed_to_tend(self) -> None:
        """That could not be done."""


UNOBSERVED = Observer()
