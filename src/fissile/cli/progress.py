"""Progress on stderr: a bar with the remaining time on a terminal, one line per unit elsewhere.

A display is called as `show(stage, done, total, detail)`; the library knows nothing else of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from fissile.run.together import follows

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Show: TypeAlias = Callable[[str, int, int, str], None]

# Stages with more units than this (training steps, not layers) write at most one line a second.
EVERY_UNIT = 100


@contextmanager
def progress(args: argparse.Namespace) -> Iterator[Show]:
    """Yield the display that fits the terminal and the flags, and take it down afterwards.

    Args:
        args: parsed arguments; `quiet` is read.
    """
    if args.quiet or follows():
        yield _silent
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        yield from _bar()
    else:
        yield Lines()


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


def _bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:  # rich honours NO_COLOR
        yield Bars(bars)


class Bars:
    """One rich bar per stage.

    Args:
        bars: a started rich display.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Move the bar of `stage` to `done` of `total` units."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, detail=detail)
        self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail)


@dataclass
class _Pace:
    began: float
    base: int
    wrote: float = float("-inf")


class Lines:
    """One line per finished unit, with the elapsed and the expected remaining time of its stage.

    Args:
        clock: seconds since any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()
        self._paces: dict[str, _Pace] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """Write the line for `done` of `total` units of `stage`."""
        now = self._clock()
        if stage not in self._paces:
            # A stage that does not announce itself with done=0 began when the last unit ended.
            self._paces[stage] = _Pace(now if done == 0 else self._last, max(done - 1, 0))
        pace = self._paces[stage]
        self._last = now
        if total > EVERY_UNIT and done < total and now - pace.wrote < 1.0:
            return
        pace.wrote = now
        text = f"[{_minutes(now - self._start)}] {stage} {done}/{total}"
        if detail:
            text += f"  {detail}"
        if pace.base < done < total:
            rate = (now - pace.began) / (done - pace.base)
            text += f"  (about {_minutes(rate * (total - done))} left)"
        _write_line(text)


def _write_line(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        # Nobody reads it any more; hours of work do not stop for that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    clock = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{clock}" if hours else clock
