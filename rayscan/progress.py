"""What people see while work goes on: a live bar on a terminal, plain lines in job logs.

Everything here goes to stderr, so that stdout stays data. In logs a line comes after the first second, at
most every few from then on, and at the end, each complete in itself: nobody scrolls back in a job log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rayscan.terminal import console, lines

_FIRST_AFTER_S, _LOG_EVERY_S = 1.0, 5.0
Advance = Callable[[int, str], None]
"""Call with how many units were finished, and a note on the current state ("" for none)."""


def say(text: str) -> None:
    """One line for people."""
    console(stderr=True).print(lines(text))


@contextmanager
def track(label: str, total: int, unit: str, before: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` units of work under `label` while the block runs.

    `before` of them were done earlier: they count as done, and say nothing about the speed.
    """
    if sys.stderr.isatty():
        yield from _bar(label, total, before)
    else:
        yield from _lines(label, total, unit, before)


def _bar(label: str, total: int, before: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=before, note="")
        yield lambda n, note: bar.update(task, advance=n, note=note)


def _lines(label: str, total: int, unit: str, before: int) -> Iterator[Advance]:
    start = time.monotonic()
    due, done = start + _FIRST_AFTER_S, before

    def advance(n: int, note: str) -> None:
        nonlocal done, due
        done += n
        now = time.monotonic()
        if now >= due or done == total:
            due = now + _LOG_EVERY_S
            left = (total - done) * (now - start) / (done - before) if done > before else 0.0
            tail = (
                f", about {duration(left)} left" if before < done < total else f" in {duration(now - start)}"
            )
            say(f"{label}: {done:,} of {total:,} {unit}{tail}{'; ' + note if note else ''}")

    yield advance


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
