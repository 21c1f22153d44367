"""What `check` and `train` print about a recipe before it runs, and `train` about its result."""

from typing import TYPE_CHECKING

from dopsd.cli.console import field

if TYPE_CHECKING:
    from dopsd.config.recipe import Recipe
    from dopsd.runs.check import Checked
    from dopsd.runs.resolve import ResolvedRun

EXAMPLES = 3  # captions shown


def print_summary(run: "ResolvedRun", checked: "Checked") -> None:
    """What a recipe would do."""
    recipe, listing, family = run.recipe, run.listing, run.family
    train = recipe.train
    field("model", f"{recipe.model.name_or_path} ({family.name}, {family.licence})")
    field("images", f"{len(listing.examples)}, captions from {listing.source}")
    for example in listing.examples[:EXAMPLES]:
        field("", f"{example.path.name}: {example.caption[:80]}")
    for path, why in listing.refused:
        field("left out", f"{path.name}: {why}")
    sizes = sorted(run.buckets.items())
    field(
        "buckets", ", ".join(f"{count} at {width} x {height}" for (width, height), count in sizes)
    )
    if recipe.adapter == "lora":
        field("LoRA", f"rank {recipe.lora.rank} on {checked.coverage}")
    else:
        field("full", checked.coverage)
    images = train.max_steps * train.batch_size * train.gradient_accumulation_steps
    field("method", recipe.method.name)
    field("training", f"{train.max_steps} steps, {images} images")
    field(
        "compute",
        f"{images * checked.forwards_per_image} network forwards (a backward counts as two); "
        f"the sampler takes {run.nfe} steps",
    )


def print_memory(run: "ResolvedRun", card: float | None) -> None:
    """Peak memory of a step at each `model.memory`, and which of them fits. Raises ValueError where
    full fine-tuning fits at neither."""
    from dopsd.evaluation.rewards import find_reward
    from dopsd.runs.memory import forecast_run, planned_device, refuse_too_large

    recipe, device = run.recipe, planned_device(run, card)
    peaks = {
        level: forecast_run(run, device.dtype, low_memory=level == "low")
        for level in ("low", "high")
    }
    values = ", ".join(f"{level} {peak.peak / 2**30:.2f} GiB" for level, peak in peaks.items())
    fitting = [level for level, peak in peaks.items() if peak.fits(device.room)]
    field(
        "memory",
        f"{values} in a training step ({str(device.dtype).removeprefix('torch.')}); "
        f"{device.name} takes {' and '.join(fitting) or 'neither'}",
    )
    if (reward := recipe.method.reward_name) and (model := find_reward(reward).model):
        field("", f"the reward's own model, {model}, comes on top")
    if recipe.adapter == "full":
        refuse_too_large(recipe, peaks["low"], device)


def print_result(recipe: "Recipe") -> None:
    """Where the finished run's files are, and how they are used."""
    file = recipe.result()
    if recipe.adapter == "lora":
        field("LoRA file", file)
        line = f'pipeline.load_lora_weights("{file.parent}", weight_name="{file.name}")'
        field("diffusers", line)
        field("ComfyUI", "copy the LoRA file to ComfyUI/models/loras")
        field("try it", f'dopsd sample "PROMPT" --lora {file}')
    else:
        field("model", file)
        field("diffusers", f'DiffusionPipeline.from_pretrained("{file}")')
        field("try it", f'dopsd sample "PROMPT" --model {file}')
    field("look at", recipe.run_folder / "report.html")
