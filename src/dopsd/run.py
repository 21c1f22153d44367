"""One run: a recipe becomes a LoRA. Assembles the rooms and keeps house (log, preview, save); computes nothing itself.

The only room that knows all others; only cli imports it.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import __version__ as diffusers_version
from PIL import Image

from dopsd import __version__
from dopsd.data.buckets import bucket_sizes, cover_crop, nearest_bucket
from dopsd.data.cache import Row, prepare
from dopsd.data.folder import Listing, open_picture, picture_size, read_folder
from dopsd.data.loader import Loader
from dopsd.evaluation.report import write_report
from dopsd.export import merge_lora
from dopsd.families import load_family
from dopsd.families.base import Family
from dopsd.files import write_json, write_text
from dopsd.methods import METHODS, missing
from dopsd.paint import noise_for, to_images, to_pictures
from dopsd.preview import Preview, read_previews
from dopsd.recipe import Recipe, load_recipe
from dopsd.rollout import walk
from dopsd.session import Session
from dopsd.training.adapters import Coverage, coverage
from dopsd.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dopsd.training.loop import Plan, StepReport, steps

PREVIEWS = 4  # captions shown when the recipe names no prompts
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Checked:
    """What `check` found before any weight was loaded."""

    family: Family
    listing: Listing
    buckets: dict[tuple[int, int], int]
    coverage: Coverage
    nfe: int
    forwards_per_picture: int  # network forwards, a backward counted as two


def open_family(recipe: Recipe) -> Family:
    """The recipe's checkpoint, refused with one sentence when it or its method cannot be tuned."""
    family = load_family(recipe.model.name_or_path, recipe.model.vlm, recipe.model.revision)
    if reason := missing(METHODS[recipe.method.name], family.teacher_contexts):
        raise ValueError(f"{recipe.method.name} cannot run on {family.name}: {reason}. `dopsd list` shows what can.")
    if not family.distilled and not recipe.model.allow_base:
        raise ValueError(
            f"{recipe.model.name_or_path} is a many-step base model, and few-step tuning needs a distilled one such as "
            f"{family.repo}. Set model.allow_base: true to tune it all the same."
        )
    return family


def check(recipe: Recipe) -> Checked:
    """Everything that can be known, and refused, before a weight is loaded."""
    family = open_family(recipe)
    listing = _read_data(recipe)
    buckets: dict[tuple[int, int], int] = {}
    for example in listing.examples:
        resolution = recipe.data.resolution or family.resolution
        size = nearest_bucket(*picture_size(example.path), bucket_sizes(resolution, family.multiple))
        buckets[size] = buckets.get(size, 0) + 1
    with init_empty_weights():
        network = family.empty_network()
    nfe = recipe.method.nfe or family.default_nfe
    return Checked(
        family=family,
        listing=listing,
        buckets=buckets,
        coverage=coverage(network, recipe.lora.targets or family.lora_targets, recipe.lora.rank),
        nfe=nfe,
        forwards_per_picture=recipe.method.forwards(nfe),
    )


def train(recipe: Recipe, resume: str | None = None, progress: Progress | None = None) -> Iterator[StepReport]:
    """Run a recipe: a generator of optimizer steps that logs, previews and saves between them.

    resume: "latest", a checkpoint folder, or None for a new run. Leaves `<run_name>.safetensors` and `report.html` in
    the run folder. Raises ValueError for bad input, before anything is trained where it can be known.
    """
    family = open_family(recipe)
    listing = _read_data(recipe)
    folder, state = _claim_folder(recipe, resume)
    accelerator = Accelerator()
    dtype = _dtype(recipe, accelerator.device)
    material = _read_and_encode(recipe, family, listing, accelerator.device, dtype, progress)
    session = Session.open(recipe, family, accelerator.device, dtype)
    start = load_checkpoint(state, session.trainable, session.teacher, session.optimizer) if state else 0
    _write_header(recipe, folder, family, listing, accelerator.device, fresh=not state)
    plan = Plan(
        max_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate,
        warmup_steps=recipe.train.warmup_steps,
        decay=recipe.train.lr_schedule,
        accumulate=recipe.train.gradient_accumulation_steps,
        clip=recipe.train.max_grad_norm,
        seed=recipe.train.seed,
    )
    loader = Loader(material.rows, recipe.train.batch_size, recipe.train.seed)
    if start == 0:
        session.preview(material.previews, folder, 0)
    _keep_metrics(folder, start)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for report in steps(
            session.roles, recipe.method, loader, session.trainable, session.optimizer, session.teacher,
            accelerator, plan, start,
        ):  # fmt: skip
            metrics.write(json.dumps(_flat(report)) + "\n")
            metrics.flush()
            done = report.step == plan.max_steps
            if done or _due(report.step, recipe.sample.every):
                session.preview(material.previews, folder, report.step)
            if done:  # before the last checkpoint: a run killed in between does its last steps again and exports
                session.export(folder / f"{recipe.run_name}.safetensors")
                write_report(folder)
            if done or _due(report.step, recipe.save.every):
                save_checkpoint(folder, report.step, session.trainable, session.teacher, session.optimizer)
            yield report


def sample(
    name_or_path: str,
    prompts: Sequence[str],
    lora: Path | None = None,
    strength: float = 1.0,
    nfe: int | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
) -> list[Image.Image]:
    """Paint prompts as deployed, picture i from seed + i. Sizes in pixels; None: the model's own."""
    family = load_family(name_or_path)
    cells = cells_of(family, height or family.resolution, width or family.resolution)
    noise = noise_for(range(seed, seed + len(prompts)), family.channels, *cells)
    clean = sample_latents(family, prompts, noise, lora, strength, nfe)
    return to_images(to_pictures(family.load_painter(clean.device, torch.float32), clean))


def sample_latents(
    family: Family,
    prompts: Sequence[str],
    noise: torch.Tensor,
    lora: Path | None = None,
    strength: float = 1.0,
    nfe: int | None = None,
) -> torch.Tensor:
    """The clean latents [B, C, h, w] that the prompts' walks from `noise` end at."""
    device, dtype = deployed_on()
    context = family.load_reader(device, dtype, pictures=False).context(list(prompts))
    denoiser = family.load_denoiser(device, dtype)
    if lora:
        merge_lora(denoiser.network, lora, family.export_prefix, strength)
    return walk(denoiser, noise.to(device), family.schedule(nfe or family.default_nfe, *noise.shape[-2:]), context)


def deployed_on() -> tuple[torch.device, torch.dtype]:
    """The device accelerate chooses here, and the dtype that networks are deployed in on it."""
    device = Accelerator().device
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class _Material:
    """What the encoders leave behind before they leave memory."""

    rows: tuple[Row, ...]
    previews: tuple[Preview, ...]


def preview_prompts(recipe: Recipe) -> list[str]:
    """The prompts a run shows: the recipe's, or its first captions."""
    return _preview_prompts(recipe, _read_data(recipe))


def _preview_prompts(recipe: Recipe, listing: Listing) -> list[str]:
    captions = dict.fromkeys(example.caption for example in listing.examples)
    return list(recipe.sample.prompts or captions)[: len(recipe.sample.prompts) or PREVIEWS]


def _read_data(recipe: Recipe) -> Listing:
    data = recipe.data
    return read_folder(data.folder, data.instance_prompt, data.caption_extension, data.skip_bad)


def _claim_folder(recipe: Recipe, resume: str | None) -> tuple[Path, Path | None]:
    """The run folder and the checkpoint to go on from. A folder that holds another run is refused."""
    folder = recipe.run_folder
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run. Go on with --resume latest, or choose another run_name "
                "(--set run_name=...)."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder, None
    state = latest_checkpoint(folder) if resume == "latest" else Path(resume)
    if state is None or not state.is_dir():
        where = folder if resume == "latest" else resume
        raise ValueError(f"there is no checkpoint to resume from in {where}; remove the folder to start again.")
    _refuse_other_recipe(recipe, folder)
    return folder, state


def _refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """A resumed run may be longer, save and sample otherwise; what makes its numbers must be the same."""
    before = load_recipe(folder / "config.yaml")
    for section in ("model", "data", "method", "lora", "train"):
        old, new = getattr(before, section).model_dump(), getattr(recipe, section).model_dump()
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key) and (section, key) != ("train", "max_steps"):
                raise ValueError(
                    f"{folder} was begun with {section}.{key} = {old.get(key)}, now it is {new.get(key)}: a resumed "
                    "run must be the same run. Put it back, or choose another run_name."
                )


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32


def cells_of(family: Family, height: int, width: int) -> tuple[int, int]:
    """A picture size in pixels as latent cells. Raises ValueError where the family cannot paint it."""
    if height % family.multiple or width % family.multiple:
        raise ValueError(f"{width} x {height} pixels: both sides must be multiples of {family.multiple}.")
    return height // family.cell, width // family.cell


def _read_and_encode(
    recipe: Recipe,
    family: Family,
    listing: Listing,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> _Material:
    """Cache latents and contexts, read the preview prompts; reader and painter are gone when this returns."""
    privileged = "privileged" in recipe.method.needs
    reader = family.load_reader(device, dtype, pictures=privileged)
    resolution = recipe.data.resolution or family.resolution
    rows = prepare(
        listing.examples,
        recipe.output_dir / "cache",
        reader,
        family.load_painter(device, torch.float32),
        resolution=resolution,
        multiple=family.multiple,
        privileged=privileged,
        device=device,
        progress=(lambda done, total: progress("caching", done, total)) if progress else None,
    )
    wanted = recipe.sample
    height, width = cells_of(family, wanted.height or resolution, wanted.width or resolution)
    previews = read_previews(
        _preview_prompts(recipe, listing),
        reader,
        pictures=[_crop(row) for row in rows[:PREVIEWS]] if privileged else [],
        cells=(family.channels, height, width),
        seed=wanted.seed,
    )
    return _Material(rows, previews)


def _crop(row: Row) -> Image.Image:
    return cover_crop(open_picture(row.example.path), row.size)


def _write_header(
    recipe: Recipe, folder: Path, family: Family, listing: Listing, device: torch.device, fresh: bool
) -> None:
    """`config.yaml` (the resolved recipe) and `env.json`."""
    if fresh:
        recipe.save_as(folder / "config.yaml")
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    environment = {
        "dopsd": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "device": name,
        "family": family.name,
        "licence_of_base": family.licence,
        "pictures": len(listing.examples),
        "refused": [[str(path.name), why] for path, why in listing.refused],
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(folder / "env.json", environment)


def _keep_metrics(folder: Path, steps_done: int) -> None:
    """Drop the rows that a resumed run will write again."""
    path = folder / "metrics.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= steps_done]
    write_text(path, "".join(row + "\n" for row in kept))


def _flat(report: StepReport) -> dict[str, float]:
    return {
        "step": report.step,
        **report.log,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "pictures": report.pictures,
        "seconds": round(report.seconds, 4),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
