"""Reasons to end training early: SIGINT or SIGTERM, once the current step is saved, and a failed
health check."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """Training was stopped by a signal and has saved its state. Exit code: 128 plus the number of
    the signal, as shells report it."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.name, self.step = signal.Signals(number).name, step


class Unhealthy(SystemExit):
    """A health check failed, and the recipe ends training in that case. Exit code: 3."""

    def __init__(self, step: int, reason: str):
        super().__init__(3)
        self.step, self.reason = step, reason


@contextmanager
def noticing_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block the first SIGINT or SIGTERM is only recorded: the yielded function returns
    its number, None before. A second one has its usual effect.

    Python delivers signals to the main thread only; in other threads no handler is installed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {
        int(number): signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
