"""Why training ends early: SIGINT and SIGTERM (the step is finished and saved first), and lost
health."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """Training was asked to stop, and did after saving. code: 128 + the signal's number, as shells
    report it."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.name, self.step = signal.Signals(number).name, step


class Unhealthy(SystemExit):
    """The student lost its few-step health, and the recipe asked to stop then. code: 3."""

    def __init__(self, step: int, found: str):
        super().__init__(3)
        self.step, self.found = step, found


@contextmanager
def noticing_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block a first SIGINT or SIGTERM is only noted: the function given tells its
    number, None before.

    Python hands signals to the main thread alone; in another thread nothing is changed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {
        int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
