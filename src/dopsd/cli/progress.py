"""One progress bar at a time on a terminal; elsewhere a few plain lines for each phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import rich.progress
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn

from dopsd.cli.console import err, note, printable

PARTS = 5  # lines of a phase, at most, where there is no terminal
PAUSE = 10.0  # seconds between two of them, at least
BRIEF = 1.0  # seconds: a phase that takes less prints nothing

Progress = Callable[[str, int, int], None]  # phase and remark ("training  loss 0.1"), done, total


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives the function to call with (phase, done, total). What follows two spaces in `phase` is a
    remark that may change from call to call."""
    if not err.is_terminal:
        yield _Lines().advance
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}", markup=False),
        TimeRemainingColumn(),
        TextColumn("left", markup=False),
    )
    with rich.progress.Progress(*columns, console=err, transient=True) as progress:
        yield _Bar(progress).advance


class _Bar:
    """Shows the bar of the phase that was advanced last, until that phase is finished."""

    def __init__(self, progress: rich.progress.Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}

    def advance(self, what: str, done: int, total: int) -> None:
        phase = what.split("  ")[0]
        if done < self._done.get(phase, 0):  # the phase begins again
            self._progress.remove_task(self._tasks.pop(phase))
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(printable(what), total=total)
        self._done[phase] = done
        for other, task in self._tasks.items():
            if other != phase:
                self._progress.update(task, visible=False)
        self._progress.update(
            self._tasks[phase],
            completed=done,
            total=total,
            description=printable(what),
            visible=done < total,
        )


@dataclass
class _Phase:
    """began: when `first` units were done; printed: units and time at the last line."""

    began: float
    first: int
    printed: tuple[int, float]


class _Lines:
    """Prints a line when another fifth of a phase is done, and its last."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._last_call = time.monotonic()

    def advance(self, what: str, done: int, total: int) -> None:
        now, name = time.monotonic(), what.split("  ")[0]
        if name not in self._phases or done < self._phases[name].printed[0]:
            first = max(done - 1, 0)  # the first unit has taken the time since the last call
            self._phases[name] = _Phase(self._last_call, first, (first, self._last_call))
        self._last_call, phase = now, self._phases[name]
        part, when = phase.printed
        is_due = done * PARTS // total > part * PARTS // total and now - when >= PAUSE
        is_last = done == total and now - phase.began >= BRIEF
        if done <= phase.first or not (is_due or is_last):
            return
        phase.printed = (done, now)
        remaining = (now - phase.began) / (done - phase.first) * (total - done)
        left = f", {duration(remaining)} left" if done < total else ""
        note(f"{what}  {done} of {total}{left}")


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
