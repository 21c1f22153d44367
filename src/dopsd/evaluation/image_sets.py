"""Pictures on disk, by prompt and seed: painted by a model and its tuned twin on the same noise, or brought along."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dopsd.data.folder import images_in, read_folder
from dopsd.data.prompts import EvaluationPrompt
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser, VAE
from dopsd.diffusion.sampling import noise_for, generate
from dopsd.files import atomic_path, sha256_of, write_json, write_text
from dopsd.images import to_pil
from dopsd.models import load_family
from dopsd.models.base import Family, latent_size
from dopsd.models.lora import merge_lora, read_lora, refuse_strength
from dopsd.models.pipeline import deployed_on

Progress = Callable[[str, int, int], None]
SETTINGS = "evaluation.json"
BASE, AGAIN, TUNED = "base", "again", "tuned"
MOST_SEEDS = 1000
FIRST_NOISE, OTHER_NOISE = 300_000_000, 600_000_000  # far from training's, previews' and health's


@dataclass(frozen=True)
class GeneratedImage:
    """A file, and what it is measured against. row: of its prompt; seed: which of the prompt's pictures it is."""

    path: Path
    prompt: str
    target: Path | None = None
    kind: str = ""
    row: int = 0
    seed: int = 0


@dataclass(frozen=True)
class ImageSet:
    """The pictures of one model at one number of forwards. name: base, again (the base on other noise), tuned, or the
    folder's."""

    name: str
    images: tuple[GeneratedImage, ...]
    nfe: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.nfe is None else f"{self.name} at {self.nfe}"

    @property
    def shape(self) -> tuple[int, int]:
        """(prompts, most seeds of one)."""
        return 1 + max(p.row for p in self.images), 1 + max(p.seed for p in self.images)


@dataclass(frozen=True)
class Plan:
    """What to paint: by a model (diffusers folder, hub id, `pocket`) and with a LoRA file, if there is one. nfe:
    numbers of forwards; empty: the model's own. Sizes in pixels; None: the model's own."""

    model: str
    questions: tuple[EvaluationPrompt, ...]
    lora: Path | None = None
    strength: float = 1.0
    seeds: int = 4
    nfe: tuple[int, ...] = ()
    width: int | None = None
    height: int | None = None

    def settings(self) -> dict[str, Any]:
        """What makes the pictures, but for their number."""
        asked = json.dumps([q.prompt for q in self.questions])
        return {
            "model": self.model,
            "lora": sha256_of(self.lora) if self.lora else None,
            "strength": self.strength,
            "prompts": sha256(asked.encode()).hexdigest(),
            "width": self.width,
            "height": self.height,
        }


def read_image_set(folder: Path, name: str, captioned: bool, targets: Path | None = None) -> ImageSet:
    """A folder's pictures; captions (metadata.jsonl, .txt) are the prompts, and pictures of one prompt its seeds.
    targets: a folder with a picture of the same name for each, or none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of pictures, or --prompts to paint some into it.")
    if captioned:
        listed = [(example.path, example.caption) for example in read_folder(folder, decode=False).examples]
    else:
        listed = [(path, "") for path in images_in(folder)]
    if not listed:
        raise ValueError(f"no pictures in {folder}.")
    rows: dict[str, list[Path]] = {}
    for path, prompt in listed:
        rows.setdefault(prompt or path.name, []).append(path)
    prompts = dict(listed)
    images = (
        GeneratedImage(path, prompts[path], _target_of(path, folder, targets), row=row, seed=seed)
        for row, paths in enumerate(rows.values())
        for seed, path in enumerate(paths)
    )
    return ImageSet(name, tuple(images))


def _target_of(path: Path, folder: Path, targets: Path | None) -> Path | None:
    if targets is None:
        return None
    here = targets / path.relative_to(folder)
    found = sorted(file for file in here.parent.glob(f"{here.stem}.*") if file.suffix.lower() != ".txt")
    return found[0] if found else None


def refuse_unpaired(ours: ImageSet, theirs: ImageSet) -> None:
    """Raise ValueError where a gallery's files are not called as the other's, or are not of the same prompts."""
    mine, others = ({p.path.name: p.prompt for p in image_set.images} for image_set in (ours, theirs))
    if differing := sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name)):
        raise ValueError(
            f"the two folders differ in {differing[0]}{' and others' if len(differing) > 1 else ''}: pictures to "
            "compare must have the same names and prompts."
        )


def generate_image_sets(plan: Plan, folder: Path, progress: Progress) -> list[ImageSet]:
    """Paint what is missing of a plan into `folder/<name>/nfe-<n>/<prompt>_<seed>.png`, a prompt at a time: the base,
    the base again on other noise, and the tuned model on the base's noise. Each picture is whole or absent, so that a
    second call goes on. Raises ValueError where the folder holds another plan's pictures."""
    refuse_strength(plan.strength)
    if not 2 <= plan.seeds <= MOST_SEEDS:
        raise ValueError(
            f"{plan.seeds} seeds a prompt: an interval needs 2 ... {MOST_SEEDS}, and 4 or more say something."
        )
    family = load_family(plan.model)
    side = family.resolution
    latent_shape = (family.channels, *latent_size(family, plan.height or side, plan.width or side))
    if plan.lora:
        read_lora(plan.lora, family)
    family.count_tokens([question.prompt for question in plan.questions])
    _claim(folder, plan.settings())
    names = (BASE, AGAIN, TUNED) if plan.lora else (BASE, AGAIN)
    nfes = plan.nfe or (family.default_nfe,)
    image_sets = [_image_set(name, nfe, plan, folder) for name in names for nfe in nfes]
    missing = [g for g in image_sets if any(not p.path.exists() for p in g.images)]
    if missing:
        _generate(plan, family, latent_shape, missing, progress)
    for image_set in image_sets:
        _write_captions(image_set)
    return image_sets


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS
    if file.is_file():
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): choose another folder.") from error
        for key, value in settings.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{folder} was begun with {key} = {before.get(key)}, now it is {value}: choose another folder."
                )
    else:
        write_json(file, settings)


def _image_set(name: str, nfe: int, plan: Plan, folder: Path) -> ImageSet:
    place = folder / name / f"nfe-{nfe}"
    images = (
        GeneratedImage(place / f"{row:04}_{seed:02}.png", q.scored_as or q.prompt, q.target, q.kind, row, seed)
        for row, q in enumerate(plan.questions)
        for seed in range(plan.seeds)
    )
    return ImageSet(name, tuple(images), nfe)


def _write_captions(image_set: ImageSet) -> None:
    """metadata.jsonl beside the pictures, those of an earlier call with more seeds too: any tool can measure them."""
    folder, prompts = image_set.images[0].path.parent, {f"{p.row:04}": p.prompt for p in image_set.images}
    rows = (
        {"file_name": file.name, "text": prompts[file.stem.rpartition("_")[0]]} for file in sorted(folder.glob("*.png"))
    )
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _generate(
    plan: Plan, family: Family, latent_shape: tuple[int, int, int], missing: Sequence[ImageSet], progress: Progress
) -> None:
    device, dtype = deployed_on()
    text_encoder = family.load_text_encoder(device, dtype, images=False)
    contexts = [text_encoder.context([question.prompt]).to("cpu") for question in plan.questions]
    del text_encoder  # gigabytes: one network at a time
    vae = family.load_vae(device, torch.float32)
    denoiser = family.load_denoiser(device, dtype)
    _fill([g for g in missing if g.name != TUNED], contexts, denoiser, vae, family, latent_shape, progress)
    if tuned := [g for g in missing if g.name == TUNED]:
        assert plan.lora is not None
        merge_lora(denoiser.network, plan.lora, family, plan.strength)
        _fill(tuned, contexts, denoiser, vae, family, latent_shape, progress)


def _fill(
    image_sets: Sequence[ImageSet],
    contexts: Sequence[Context],
    denoiser: Denoiser,
    vae: VAE,
    family: Family,
    latent_shape: tuple[int, int, int],
    progress: Progress,
) -> None:
    device = deployed_on()[0]
    for image_set in image_sets:
        assert image_set.nfe is not None
        first = OTHER_NOISE if image_set.name == AGAIN else FIRST_NOISE
        schedule = family.schedule(image_set.nfe, *latent_shape[1:])
        for row, context in enumerate(contexts):
            todo = [p for p in image_set.images if p.row == row and not p.path.exists()]
            if todo:
                noise = noise_for([first + MOST_SEEDS * row + image.seed for image in todo], *latent_shape)
                rows = Context.stack([context] * len(todo)).to(device)
                for entry, image in zip(
                    todo, to_pil(generate(denoiser, vae, schedule, rows, noise)), strict=True
                ):
                    with atomic_path(entry.path) as temporary:
                        image.save(temporary, format="PNG")
            progress(f"painting {image_set.name} at {image_set.nfe}", row + 1, len(contexts))
