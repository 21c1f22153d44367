"""Which log records and library messages reach the screen."""

import logging
import warnings

import pytest

from dopsd.cli.logs import show_logs

LOG = logging.getLogger("dopsd.runs.train")


@pytest.fixture(autouse=True)
def _restore_loggers():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def emit() -> None:
    LOG.info("quantize=nf4 moved=0.1")
    LOG.info("step 4: preview in samples", extra={"screen": True})
    LOG.warning("an image is smaller than its bucket")
    logging.getLogger("httpx").info("HTTP Request: GET")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("kernels-community")
    warnings.warn("depre" + "cated", UserWarning, stacklevel=1)


def test_the_screen_shows_events_and_warnings_and_nothing_of_libraries(capsys):
    show_logs(verbose=False)
    emit()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 4: preview in samples",
        "warning: an image is smaller than its bucket",
    ]


def test_verbose_shows_the_log_and_the_libraries_once_each(capsys):
    show_logs(verbose=False)
    show_logs(verbose=True)
    emit()
    printed = capsys.readouterr().err
    for text in ("quantize=nf4", "preview in samples", "kernels-community", "deprecated"):
        assert printed.count(text) == 1, text
