"""What the commands share: options with one meaning everywhere, and exit codes."""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from dopsd.cli.console import refuse, replace_unencodable
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
TakenModel = Annotated[
    str | None,
    typer.Option(
        help="Local diffusers folder, hub id, or `pocket` (the toy model); default: the model "
        "that the LoRA file names."
    ),
]
LORA_HELP = (
    "LoRA: a file (.safetensors), a PEFT folder or owner/name on the hub, or one of those with "
    "@STRENGTH"
)
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help=f"{LORA_HELP}. Repeatable: the LoRAs are added up."),
]
Strength = Annotated[
    float, typer.Option(help="Strength of the LoRA, 1 is as trained; multiplies that of each.")
]
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

# Environment variables of launchers: number of processes, and which of them this is.
LAUNCHERS = (
    ("WORLD_SIZE", "RANK"),  # torchrun, accelerate launch
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)
MOST_FORWARDS = 1000  # no sampler takes more steps
MOST_SEED = 2**31 - 1  # of `--seeds`


def numbers_of(option: str, text: str | None, least: int, most: int) -> tuple[int, ...]:
    """The numbers of an option such as `--nfe 1,2,4,8`, sorted and each once; empty for None.
    Raises ValueError for a text that is no such list, or has a number out of its range."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and least <= int(part) <= most for part in parts):
        raise ValueError(
            f"{option} {text}: give numbers from {least} to {most}, separated by commas, such as "
            f"{option} 1,2,4."
        )
    return tuple(sorted({int(part) for part in parts}))


def seeds_of(text: str | None) -> tuple[int, ...]:
    """The numbers of `--seeds`."""
    return numbers_of("--seeds", text, 0, MOST_SEED)


def forwards_of(text: str | None) -> tuple[int, ...]:
    """The numbers of `--nfe`."""
    return numbers_of("--nfe", text, 1, MOST_FORWARDS)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with `--verbose`, for which bad input (ValueError) and lack of memory end with one
    sentence and exit code 2. Other exceptions are bugs and keep their traceback."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(*args: Any, verbose: bool = False, **kwargs: Any) -> Any:
        replace_unencodable()
        show_logs(verbose)
        try:
            refuse_many_processes()
            refuse_undecodable(kwargs)
            return command(*args, **kwargs)
        except KeyboardInterrupt as error:
            refuse("interrupted.")
            raise typer.Exit(130) from error
        except Exception as error:
            if ran_out_of_memory(error):
                sentence = f"out of memory. {memory_advice(signature.parameters)}"
            elif isinstance(error, ValueError):
                sentence = str(error)
            else:
                raise
            logging.getLogger(__name__).debug("refused", exc_info=True)
            refuse(sentence)
            raise typer.Exit(2) from error

    # Typer reads the options from the signature and the annotations.
    option = inspect.Parameter(
        "verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__doc__ = unwrapped(command.__doc__ or "")
    run.__annotations__ = command.__annotations__ | {"verbose": Verbose}
    return run


class OnceCommand(TyperCommand):
    """A command that refuses an option which is given twice and takes one value; the parser would
    use the last one and say nothing."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param in order:
            takes_one = isinstance(param, TyperOption) and not (param.multiple or param.is_flag)
            if takes_one and order.count(param) > 1:
                refuse(f"{param.opts[0]} is given twice, and takes one value.")
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


def unwrapped(docstring: str) -> str:
    """A docstring with one line for each paragraph, to be wrapped at the terminal's width."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def refuse_undecodable(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument whose bytes are not UTF-8: Python holds them as half
    surrogate pairs, which can be neither printed nor written."""
    for value in arguments.values():
        for each in value if isinstance(value, list | tuple) else [value]:
            text = str(each) if isinstance(each, str | Path) else ""
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                shown = text.encode("utf-8", "backslashreplace").decode()
                raise ValueError(f"the argument {shown} is not UTF-8: write it, or rename it, so.")


def refuse_many_processes() -> None:
    """Raise ValueError where a launcher has started more than one process. All but the first exit
    without a word, so that the sentence is printed once."""
    for size, rank in LAUNCHERS:
        count = os.environ.get(size, "1")
        if not count.isdecimal() or int(count) <= 1:
            continue
        if os.environ.get(rank, "0") != "0":
            raise typer.Exit(2)
        raise ValueError(
            f"dopsd was started as {count} processes ({size}={count}), and it works in one: "
            "start it without torchrun, accelerate launch, srun or mpirun."
        )


def ran_out_of_memory(error: Exception) -> bool:
    """Whether the memory of a device or of the machine was full, as torch or Python report it, or
    that was the cause of an error such as "the VAE cannot be read"."""
    torch, cause = sys.modules.get("torch"), error.__cause__
    return (
        isinstance(error, MemoryError)
        or (isinstance(cause, Exception) and ran_out_of_memory(cause))
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in str(error)
    )


def memory_advice(parameters: Collection[str]) -> str:
    """What to change in a command with these parameters."""
    if {"recipe", "recipes"} & set(parameters):
        return (
            "Set model.memory: low, then train.batch_size: 1, model.quantize: nf4, "
            "model.offload: true or a smaller data.resolution; `dopsd check RECIPE` forecasts what "
            "a training step takes."
        )
    smaller = "Give a smaller --width and --height, or free" if "width" in parameters else "Free"
    return f"{smaller} the memory that other programs take; `dopsd doctor` shows the device."
