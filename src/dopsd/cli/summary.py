"""What `check` and `train` print about a recipe before it runs, and `train` about its result."""

from typing import TYPE_CHECKING

from dopsd.cli.console import field
from dopsd.cli.progress import progress_bar

if TYPE_CHECKING:
    from dopsd.config.recipe import Recipe
    from dopsd.runs.check import Checked
    from dopsd.runs.fit import Saver
    from dopsd.runs.memory import Forecast
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
    if masked := sum(example.mask is not None for example in listing.examples):
        field("masks", f"{masked} images are trained on where their masks are white")
    for note in listing.notes:
        field("note", note)
    sizes = sorted(run.buckets.items())
    field(
        "buckets", ", ".join(f"{count} at {width} x {height}" for (width, height), count in sizes)
    )
    if recipe.adapter == "lora":
        field("LoRA", f"rank {recipe.lora.rank} on {checked.coverage}")
    else:
        field("full", checked.coverage)
    field("method", recipe.method.name)
    if recipe.retention.weight:
        field("retention", _retention(run))
    field("training", _training(train.max_steps, checked))
    forwards = checked.images * checked.forwards_per_image
    field("compute", f"{forwards:.0f} network forwards (a backward counts as two);")
    field("", f"the sampler takes {run.nfe} steps")


def _retention(run: "ResolvedRun") -> str:
    """What is replayed, how often, and what is generated for it before training."""
    retention, prompts = run.recipe.retention, run.replay_prompts
    which = "the empty prompt" if prompts == ("",) else f"{len(prompts)} prompts"
    text = f"weight {retention.weight:g}, {retention.per_step} a step of {which}"
    if retention.states != "samples":
        return f"{text}, on the student's rollout"
    count = retention.samples * len(run.resolutions)
    return f"{text}, on {count} images that the base model generates first"


def _training(steps: int, checked: "Checked") -> str:
    """How many images the steps see, and how many of the data set's."""
    rows = sum(bucket.rows for bucket in checked.visits.values())
    visited = sum(bucket.visited for bucket in checked.visits.values())
    if visited < rows:
        share = f"only {visited} of the {rows} images are seen: set a larger train.max_steps"
    else:
        share = f"each {checked.images / rows:.3g} times on average"
    return f"{steps} steps, {checked.images} images, {share}"


def print_data(run: "ResolvedRun", checked: "Checked") -> None:
    """The size of the cache, images that are enlarged, and the time where a rate is known."""
    from dopsd.runs.outputs.folder import seconds_per_step

    cache = checked.cache
    folder = run.recipe.output_dir / "cache"
    field("cache", f"{cache.files} files, {cache.bytes / 2**20:.1f} MiB, in {folder}")
    if enlarged := checked.enlarged:
        worst = enlarged[0]
        (width, height), bucket = worst.size, worst.bucket
        field("warning", f"{len(enlarged)} images are smaller than they are trained at and are")
        field("", f"enlarged, most of all {worst.path.name}, {width} x {height}, to")
        field("", f"{bucket[0]} x {bucket[1]}: use larger images or a smaller data.resolution")
    if cropped := checked.cropped:
        worst = cropped[0]
        (width, height), bucket = worst.size, worst.bucket
        field("warning", f"{len(cropped)} images are so long that little of them is trained on,")
        field("", f"least of {worst.path.name}, {width} x {height}: {worst.kept:.0%} of it, at")
        field("", f"{bucket[0]} x {bucket[1]}: cut such images into pieces")
    if seconds := seconds_per_step(run.recipe):
        hours = run.recipe.train.max_steps * seconds / 3600
        field(
            "time", f"{hours:.1f} h for all steps, at the {seconds:.2g} s a step of this run so far"
        )


def print_memory(run: "ResolvedRun", card: float | None) -> None:
    """Peak memory of a step at each `model.memory`, which of them fits the device, and what makes
    it fit where neither does. Raises ValueError where full fine-tuning fits at neither."""
    from dopsd.evaluation.rewards import find_reward
    from dopsd.runs.fit import fitting_saver, planned_device, refuse_too_large
    from dopsd.runs.memory import forecast_run

    recipe, device = run.recipe, planned_device(run, card)
    high = saver = None
    with progress_bar() as advance:
        low = forecast_run(run, device.dtype, low_memory=True, progress=advance)
        if low.fits(device.room):  # where it does not, neither does high, which takes more
            high = forecast_run(run, device.dtype, low_memory=False, progress=advance)
        elif recipe.adapter == "lora":
            saver = fitting_saver(run, low, device, advance)

    levels = f"low {_gib(low)}" + (f", high {_gib(high)}" if high else "")
    dtype = str(device.dtype).removeprefix("torch.")
    field("memory", f"{levels} in a training step, {dtype} (model.memory)")
    if high is None:
        field("", f"{device.name} takes neither")
        if recipe.adapter == "lora":
            field("", _what_fits(saver))
    elif high.fits(device.room):
        field("", f"{device.name} takes both")
    else:
        change = "; set model.memory: low" if recipe.model.memory == "high" else ""
        field("", f"{device.name} takes low, not high{change}")
    if (reward := recipe.method.reward_name) and (model := find_reward(reward).model):
        field("", f"the reward's own model, {model}, comes on top")
    if recipe.adapter == "full":
        refuse_too_large(recipe, low, device)


def _what_fits(saver: "Saver | None") -> str:
    if saver:
        change = f"--set model.{saver.key}={saver.value}"
        return f"it takes low with {change}: {_gib(saver.forecast)}"
    return (
        "model.quantize and model.offload are not enough: use a smaller data.resolution, "
        "train.batch_size: 1 or a larger card"
    )


def _gib(forecast: "Forecast") -> str:
    return f"{forecast.peak / 2**30:.2f} GiB"


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
