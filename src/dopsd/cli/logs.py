"""Which log records reach the screen: warnings, events meant for it, and with --verbose all.

A module marks an event for the screen with `log.info("...", extra={"screen": True})`. A run's own
log file, run.log, holds every record of dopsd (`runs.outputs.folder`).
"""

import logging
import os

from dopsd.cli.console import note

LIBRARIES = {  # switches that these read when they are imported
    "TQDM_DISABLE": "1",  # bars of transformers and diffusers; downloads keep theirs
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class _Screen(logging.Handler):
    """Prints a record as a plain line."""

    def __init__(self, verbose: bool):
        super().__init__(logging.DEBUG)
        self._verbose = verbose

    def filter(self, record: logging.LogRecord) -> bool:
        if self._verbose:
            return record.levelno >= logging.INFO
        if not f"{record.name}.".startswith("dopsd."):
            return record.levelno >= logging.ERROR
        return record.levelno >= logging.WARNING or getattr(record, "screen", False)

    def emit(self, record: logging.LogRecord) -> None:
        is_event = getattr(record, "screen", False) and record.levelno < logging.WARNING
        prefix = "" if is_event else f"{record.levelname.lower()}: "
        note(prefix + record.getMessage())


def show_logs(verbose: bool) -> None:
    """Send log records to the screen as this module says, in place of an earlier call's choice.
    Python warnings are records of the logger py.warnings: shown with --verbose only."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Screen)]:
        root.removeHandler(handler)
    root.addHandler(_Screen(verbose))
    logging.getLogger("dopsd").setLevel(logging.INFO)
    logging.captureWarnings(True)
    if not verbose:
        os.environ.update(LIBRARIES)
