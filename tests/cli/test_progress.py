"""One bar at a time on a terminal; elsewhere at most five lines for each phase."""

import io

import pytest
from rich.console import Console

from dopsd.cli import progress
from dopsd.cli.progress import duration, progress_bar


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture()
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_long_phase_is_five_lines_with_the_time_left(clock, capsys):
    with progress_bar() as advance:
        for step in range(1, 1001):
            clock.now += 1.0
            advance(f"training  loss 0.{step:04}", step, 1000)
    printed = lines(capsys)
    assert len(printed) == 5
    assert printed[0] == "training  loss 0.0200  200 of 1000, 13 min left"
    assert printed[-1] == "training  loss 0.1000  1000 of 1000"


def test_without_a_terminal_a_quick_phase_is_one_line_and_a_brief_one_none(clock, capsys):
    with progress_bar() as advance:
        for done in range(5):
            clock.now += 0.1
            advance("caching", done, 4)
        for done in range(5):
            clock.now += 1.0
            advance("generating", done, 4)
    assert lines(capsys) == ["generating  4 of 4"]


def test_a_resumed_run_measures_its_own_time_and_a_repeated_phase_begins_again(clock, capsys):
    with progress_bar() as advance:
        for step in range(501, 1001):
            clock.now += 10.0
            advance("training", step, 1000)
        for done in (1, 2):
            clock.now += 10.0
            advance("training", done, 2)
    printed = lines(capsys)
    assert printed[0] == "training  600 of 1000, 67 min left"
    assert printed[-2:] == ["training  1 of 2, 10 s left", "training  2 of 2"]


def test_on_a_terminal_one_bar_is_visible_at_a_time(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=20)
    monkeypatch.setattr(progress, "err", console)
    with progress_bar() as advance:
        bar = advance.__self__  # type: ignore[attr-defined]

        def visible() -> list[str]:
            return [task.description for task in bar._progress.tasks if task.visible]

        advance("caching", 1, 4)
        assert visible() == ["caching"]
        advance("training  loss [1.0]", 3, 10)
        assert visible() == ["training  loss [1.0]"]
        advance("caching", 4, 4)
        assert visible() == []
        advance("training  loss 0.5", 1, 10)
        assert visible() == ["training  loss 0.5"]
        assert [task.completed for task in bar._progress.tasks if task.visible] == [1]
        bar._progress.refresh()
    assert "loss 0.5" in screen.getvalue()


def test_durations_are_read_easily():
    assert [duration(s) for s in (4, 89, 600, 9000)] == ["4 s", "89 s", "10 min", "2.5 h"]
