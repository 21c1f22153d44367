"""Plain lines, tables and JSON files: everything that a command prints goes through here."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

<<<<<<< HEAD
if TYPE_CHECKING:
    from dopsd.runs.check import Checked
    from dopsd.runs.resolve import ResolvedRun
=======
WIDTH = 160  # of tables where there is no terminal
LABEL = 10  # columns of the label of a line such as "model      pocket"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
>>>>>>> main

# No markup, emoji or highlighting: file names and captions are printed as they are.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "emoji": False, "highlight": False}
out = Console(width=None if sys.stdout.isatty() else WIDTH, **_PLAIN)
err = Console(stderr=True, **_PLAIN)


<<<<<<< HEAD
def summarise(run: "ResolvedRun", checked: "Checked") -> None:
    """Print what a recipe would do."""
    loaded, listing = run.recipe, run.listing
    train = loaded.train
    out.print(
        f"model      {loaded.model.name_or_path} ({run.family.name}, {run.family.licence})",
        highlight=False,
    )
    out.print(
        f"pictures   {len(listing.examples)}, captions from {listing.source}", highlight=False
    )
    for example in listing.examples[:3]:
        out.print(
            f"           {example.path.name}: {example.caption[:80]}", markup=False, highlight=False
        )
    for path, why in listing.refused:
        out.print(f"left out   {path.name}: {why}", markup=False, highlight=False)
    sizes = ", ".join(
        f"{count} at {width} x {height}" for (width, height), count in sorted(run.buckets.items())
    )
    out.print(f"buckets    {sizes}", highlight=False)
    of = f"LoRA       rank {loaded.lora.rank} on" if loaded.adapter == "lora" else "full      "
    out.print(f"{of} {checked.coverage}", highlight=False)
    images = train.max_steps * train.batch_size * train.gradient_accumulation_steps
    out.print(
        f"training   {loaded.method.name}, {train.max_steps} steps, {images} pictures, "
        f"walks of {run.nfe} forwards; {images * checked.forwards_per_image} forward units (a backward counts two)",
        highlight=False,
    )


def foretell(run: "ResolvedRun", card: float | None) -> None:
    """Peak memory of a step at each `model.memory`, and which of them fits. Raises ValueError where
    full fine-tuning fits at neither."""
    from dopsd.evaluation.rewards import find_reward
    from dopsd.runs.memory import forecast_run, planned_device, refuse_too_large

    recipe, device = run.recipe, planned_device(run, card)
    peaks = {
        level: forecast_run(run, device.dtype, low_memory=level == "low")
        for level in ("low", "high")
    }
    told = ", ".join(f"{level} {peak.peak / 2**30:.2f} GiB" for level, peak in peaks.items())
    fitting = [level for level, peak in peaks.items() if peak.fits(device.room)]
    verdict = f"{device.name} takes {' and '.join(fitting) or 'neither'}"
    dtype = str(device.dtype).removeprefix("torch.")
    out.print(f"memory     {told} in a training step ({dtype}); {verdict}", highlight=False)
    if (reward := recipe.method.reward_name) and (model := find_reward(reward).model):
        out.print(f"           the judge's own model, {model}, comes on top", highlight=False)
    if recipe.adapter == "full":
        refuse_too_large(recipe, peaks["low"], device)
=======
def printable(text: str) -> str:
    """The text on one line, with control characters as escapes such as \\x1b: a caption or a file
    name cannot move the cursor or forge a line."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: str) -> None:
    """A line of a command's result, on standard output."""
    out.print(printable(text))
>>>>>>> main


def field(label: str, value: object, width: int = LABEL) -> None:
    """A line of a result with its label in a column."""
    say(f"{label:<{width}} {value}")


def note(text: str) -> None:
    """A line about what is going on, on standard error."""
    err.print(printable(text))


def refuse(text: str) -> None:
    """Why a command ends, on standard error."""
    err.print(f"dopsd: {printable(text)}", style="red")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    out.print(table)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """The same as JSON, where asked for."""
    if path:
        from dopsd.files import write_json

        write_json(path, numbers)
        field("numbers", path)
