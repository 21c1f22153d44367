"""What the commands share: options with one meaning everywhere, and exit codes."""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dopsd.cli.console import refuse
from dopsd.cli.logs import show_logs

RecipeFile = Annotated[
    Path, typer.Argument(help="Recipe (YAML); see recipes/.", show_default=False)
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as train.max_steps=500. Repeatable."),
]
Model = Annotated[
    str, typer.Option(help="Local diffusers folder, hub id, or `pocket` (the toy model).")
]
Lora = Annotated[Path | None, typer.Option(help="LoRA file (.safetensors).")]
Strength = Annotated[float, typer.Option(help="Strength of the LoRA; 1 is as trained.")]
Side = Annotated[int | None, typer.Option(help="Pixels; default: the model's own.", min=1)]
DistilledBy = Annotated[
    str | None,
    typer.Option(
        help="LoRA or UNet (.safetensors) that makes an SDXL base a few-step model, such as DMD2's."
    ),
]
Resume = Annotated[
    str | None, typer.Option(help="`latest`, or a checkpoint folder, to go on from.")
]
AsJson = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the log, and what libraries print.")
]

MOST_FORWARDS = 1000  # no sampler takes more steps


def forwards_of(text: str | None) -> tuple[int, ...]:
    """The numbers of `--nfe 1,2,4,8`, sorted and each once; empty for None. Raises ValueError for
    any other text."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_FORWARDS for part in parts):
        raise ValueError(
            f"--nfe {text}: give numbers of forwards from 1 to {MOST_FORWARDS}, e.g. --nfe 1,2,4,8."
        )
    return tuple(sorted({int(part) for part in parts}))


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with `--verbose`, whose ValueErrors become one sentence and exit code 2. Other
    exceptions are bugs and keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, verbose: bool = False, **kwargs: Any) -> Any:
        show_logs(verbose)
        try:
            return command(*args, **kwargs)
        except ValueError as error:
            logging.getLogger(__name__).debug("refused", exc_info=True)
            refuse(str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            refuse("interrupted.")
            raise typer.Exit(130) from error

    # Typer reads the options from the signature and the annotations.
    signature = inspect.signature(command)
    option = inspect.Parameter(
        "verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__doc__ = unwrapped(command.__doc__ or "")
    run.__annotations__ = command.__annotations__ | {"verbose": Verbose}
    return run


def unwrapped(docstring: str) -> str:
    """A docstring with one line for each paragraph, to be wrapped at the terminal's width."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
