"""Pictures on disk, by prompt and seed: painted by a model and its tuned twin on the same noise, or brought along."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dopsd.data.folder import pictures_in, read_folder
from dopsd.data.prompts import Question
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser, Painter
from dopsd.diffusion.sampling import noise_for, paint
from dopsd.files import atomic_path, sha256_of, write_json, write_text
from dopsd.images import to_images
from dopsd.models import load_family
from dopsd.models.base import Family, cells_of
from dopsd.models.lora import merge_lora, read_lora, refuse_strength
from dopsd.models.pipeline import deployed_on

Progress = Callable[[str, int, int], None]
SETTINGS = "evaluation.json"
BASE, AGAIN, TUNED = "base", "again", "tuned"
MOST_SEEDS = 1000
FIRST_NOISE, OTHER_NOISE = 300_000_000, 600_000_000  # far from training's, previews' and health's


@dataclass(frozen=True)
class Picture:
    """A file, and what it is measured against. row: of its prompt; seed: which of the prompt's pictures it is."""

    path: Path
    prompt: str
    target: Path | None = None
    kind: str = ""
    row: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Gallery:
    """The pictures of one model at one number of forwards. name: base, again (the base on other noise), tuned, or the
    folder's."""

    name: str
    pictures: tuple[Picture, ...]
    nfe: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.nfe is None else f"{self.name} at {self.nfe}"

    @property
    def shape(self) -> tuple[int, int]:
        """(prompts, most seeds of one)."""
        return 1 + max(p.row for p in self.pictures), 1 + max(p.seed for p in self.pictures)


@dataclass(frozen=True)
class Plan:
    """What to paint: by a model (diffusers folder, hub id, `pocket`) and with a LoRA file, if there is one. nfe:
    numbers of forwards; empty: the model's own. Sizes in pixels; None: the model's own."""

    model: str
    questions: tuple[Question, ...]
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


def read_gallery(folder: Path, name: str, captioned: bool, targets: Path | None = None) -> Gallery:
    """A folder's pictures; captions (metadata.jsonl, .txt) are the prompts, and pictures of one prompt its seeds.
    targets: a folder with a picture of the same name for each, or none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of pictures, or --prompts to paint some into it.")
    if captioned:
        listed = [(example.path, example.caption) for example in read_folder(folder, decode=False).examples]
    else:
        listed = [(path, "") for path in pictures_in(folder)]
    if not listed:
        raise ValueError(f"no pictures in {folder}.")
    rows: dict[str, list[Path]] = {}
    for path, prompt in listed:
        rows.setdefault(prompt or path.name, []).append(path)
    prompts = dict(listed)
    pictures = (
        Picture(path, prompts[path], _target_of(path, folder, targets), row=row, seed=seed)
        for row, paths in enumerate(rows.values())
        for seed, path in enumerate(paths)
    )
    return Gallery(name, tuple(pictures))


def _target_of(path: Path, folder: Path, targets: Path | None) -> Path | None:
    if targets is None:
        return None
    here = targets / path.relative_to(folder)
    found = sorted(file for file in here.parent.glob(f"{here.stem}.*") if file.suffix.lower() != ".txt")
    return found[0] if found else None


def refuse_unpaired(ours: Gallery, theirs: Gallery) -> None:
    """Raise ValueError where a gallery's files are not called as the other's, or are not of the same prompts."""
    mine, others = ({p.path.name: p.prompt for p in gallery.pictures} for gallery in (ours, theirs))
    if differing := sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name)):
        raise ValueError(
            f"the two folders differ in {differing[0]}{' and others' if len(differing) > 1 else ''}: pictures to "
            "compare must have the same names and prompts."
        )


def galleries_of(plan: Plan, folder: Path, progress: Progress) -> list[Gallery]:
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
    cells = (family.channels, *cells_of(family, plan.height or side, plan.width or side))
    if plan.lora:
        read_lora(plan.lora, family)
    family.count_tokens([question.prompt for question in plan.questions])
    _claim(folder, plan.settings())
    names = (BASE, AGAIN, TUNED) if plan.lora else (BASE, AGAIN)
    nfes = plan.nfe or (family.default_nfe,)
    galleries = [_gallery(name, nfe, plan, folder) for name in names for nfe in nfes]
    missing = [g for g in galleries if any(not p.path.exists() for p in g.pictures)]
    if missing:
        _paint(plan, family, cells, missing, progress)
    for gallery in galleries:
        _write_captions(gallery)
    return galleries


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


def _gallery(name: str, nfe: int, plan: Plan, folder: Path) -> Gallery:
    place = folder / name / f"nfe-{nfe}"
    pictures = (
        Picture(place / f"{row:04}_{seed:02}.png", q.scored_as or q.prompt, q.target, q.kind, row, seed)
        for row, q in enumerate(plan.questions)
        for seed in range(plan.seeds)
    )
    return Gallery(name, tuple(pictures), nfe)


def _write_captions(gallery: Gallery) -> None:
    """metadata.jsonl beside the pictures, those of an earlier call with more seeds too: any tool can measure them."""
    folder, prompts = gallery.pictures[0].path.parent, {f"{p.row:04}": p.prompt for p in gallery.pictures}
    rows = (
        {"file_name": file.name, "text": prompts[file.stem.rpartition("_")[0]]} for file in sorted(folder.glob("*.png"))
    )
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _paint(
    plan: Plan, family: Family, cells: tuple[int, int, int], missing: Sequence[Gallery], progress: Progress
) -> None:
    device, dtype = deployed_on()
    reader = family.load_reader(device, dtype, pictures=False)
    contexts = [reader.context([question.prompt]).to("cpu") for question in plan.questions]
    del reader  # gigabytes: one network at a time
    painter = family.load_painter(device, torch.float32)
    denoiser = family.load_denoiser(device, dtype)
    _fill([g for g in missing if g.name != TUNED], contexts, denoiser, painter, family, cells, progress)
    if tuned := [g for g in missing if g.name == TUNED]:
        assert plan.lora is not None
        merge_lora(denoiser.network, plan.lora, family, plan.strength)
        _fill(tuned, contexts, denoiser, painter, family, cells, progress)


def _fill(
    galleries: Sequence[Gallery],
    contexts: Sequence[Context],
    denoiser: Denoiser,
    painter: Painter,
    family: Family,
    cells: tuple[int, int, int],
    progress: Progress,
) -> None:
    device = deployed_on()[0]
    for gallery in galleries:
        assert gallery.nfe is not None
        first = OTHER_NOISE if gallery.name == AGAIN else FIRST_NOISE
        schedule = family.schedule(gallery.nfe, *cells[1:])
        for row, context in enumerate(contexts):
            todo = [p for p in gallery.pictures if p.row == row and not p.path.exists()]
            if todo:
                noise = noise_for([first + MOST_SEEDS * row + picture.seed for picture in todo], *cells)
                rows = Context.stack([context] * len(todo)).to(device)
                for picture, image in zip(
                    todo, to_images(paint(denoiser, painter, schedule, rows, noise)), strict=True
                ):
                    with atomic_path(picture.path) as temporary:
                        image.save(temporary, format="PNG")
            progress(f"painting {gallery.name} at {gallery.nfe}", row + 1, len(contexts))
