"""What the commands share: exit codes, and options of one meaning. Nothing heavy is imported here."""

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dopsd.cli.console import err

RecipeFile = Annotated[
    Path, typer.Argument(help="Recipe (YAML); see recipes/.", show_default=False)
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key: train.max_steps=500. Repeatable.")
]
DistilledBy = Annotated[
    str | None,
    typer.Option(
        help="What makes an SDXL base a few-step model: DMD2's LoRA or UNet (.safetensors)."
    ),
]
AsJson = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


def refusing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bad input (ValueError) becomes one sentence and exit code 2; anything else is our bug, with
    its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for noisy in ("httpx", "httpx2", "accelerate", "diffusers", "transformers"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("bitsandbytes").setLevel(
            logging.ERROR
        )  # on a CPU it misses kernels and says so every time
        try:
            return command(*args, **kwargs)
        except ValueError as error:
            logging.getLogger(__name__).debug("refused", exc_info=True)
            err.print(f"dopsd: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("dopsd: interrupted.", style="red")
            raise typer.Exit(130) from error

    return guarded
