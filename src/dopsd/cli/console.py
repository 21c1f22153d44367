"""What the commands print: a recipe in words, progress, tables, numbers as JSON."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dopsd.runs.check import Checked
    from dopsd.runs.resolve import ResolvedRun

MOST_FORWARDS = 1000  # of a sampler that anyone asks for
WIDTH = 160  # where there is no terminal whose width must be kept
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, soft_wrap=True)


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


def forwards_of(text: str | None) -> tuple[int, ...]:
    """Of `--nfe 1,2,4,8`: each once, in order; empty for None. Raises ValueError for what is no
    such list."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_FORWARDS for part in parts):
        raise ValueError(
            f"--nfe {text}: give numbers of forwards from 1 to {MOST_FORWARDS}, e.g. --nfe 1,2,4,8."
        )
    return tuple(sorted({int(part) for part in parts}))


class bars:
    """Progress bars on a terminal, a plain line now and then elsewhere. Call it with (what, done,
    total)."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=err, disable=not err.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.progress.start()
        return self.advance

    def advance(self, what: str, done: int, total: int) -> None:
        key = what.split("  ")[0]
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[key], completed=done, total=total, description=what)
        if not err.is_terminal and (done == total or done % max(1, total // 10) == 0):
            err.print(f"{what}  {done}/{total}", highlight=False)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def show(header: list[str], rows: list[list[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """The same as JSON, where asked for."""
    if path:
        from dopsd.files import write_json

        write_json(path, numbers)
        out.print(f"numbers {path}", highlight=False)
