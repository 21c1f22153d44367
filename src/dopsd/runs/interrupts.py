"""Why training ends early: SIGINT or SIGTERM, after the step is finished and saved, and lost
few-step health."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """Training was stopped by a signal, after saving. Exit code: 128 + the signal's number, as
    shells report it."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.name, self.step = signal.Signals(number).name, step


class Unhealthy(SystemExit):
    """The student lost its few-step health, and the recipe stops for that. Exit code: 3."""

    def __init__(self, step: int, reason: str):
        super().__init__(3)
        self.step, self.reason = step, reason


@contextmanager
def noticing_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block the first SIGINT or SIGTERM is only noted, and the yielded function returns
    its number (None before); a second one acts as usual.

    Python delivers signals to the main thread alone; in another thread nothing is changed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {
        int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
