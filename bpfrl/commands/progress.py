"""A progress bar, or a word, for what takes so long that somebody may wonder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Final

from rich.console import Console

_PATIENCE_SECONDS: Final = 2.0


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr while the context lasts, at a terminal and only after two seconds.

    What is written meanwhile goes above the bar, if it goes to ``sys.stdout`` and ``sys.stderr`` as they are then:
    click.echo must be told, for it finds what is behind them by itself.

    >>> with progress("detaching", len(uids)) as done:
    ...     for uid in uids:
    ...         agent.detach(uid)
    ...         click.echo(f"pod/{uid} detached", file=sys.stdout)
    ...         done()

    Args:
        text: what is being done.
        total: how many things.

    Yields:
        What to call when one of them is done.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Results that go elsewhere must not come here.
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    task = bar.add_task(text, total=total)
    # What is waited for may say nothing for long.
    timer = Timer(_PATIENCE_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: bar.advance(task)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def patience(text: str) -> Iterator[Callable[[str], None]]:
    """A word on stderr of what is waited for while the context lasts, at a terminal and only after two seconds.

    Yields:
        What to call when it is something else.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda _: None
        return
    status = console.status(text)
    timer = Timer(_PATIENCE_SECONDS, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield status.update
    finally:
        timer.cancel()
        timer.join()
        status.stop()
