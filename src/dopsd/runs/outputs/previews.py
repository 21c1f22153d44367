"""Previews: the same prompts on the same noise, generated again and again by student, teacher and
base while training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dopsd.config.recipe import Recipe
from dopsd.data.cache import Row
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import Noise, generate, noise_for
from dopsd.files import atomic_path, write_json
from dopsd.images import cover_crop, grid, open_image, to_pil
from dopsd.methods.base import Roles
from dopsd.runs.resolve import PreviewPrompt


@dataclass(frozen=True)
class Preview:
    """What is wanted, read; its noise; `privileged` where the teacher sees an image with it."""

    wanted: PreviewPrompt
    context: Context
    privileged: Context | None
    noise: Noise


def read_previews(
    wanted: Sequence[PreviewPrompt], text_encoder: TextEncoder, images: Sequence[Image.Image]
) -> tuple[Preview, ...]:
    """Read the prompts, and for the teacher each with one of the images in turn (none: the teacher
    has no row)."""
    previews = []
    for index, each in enumerate(wanted):
        seeing = each.read(text_encoder, images[index % len(images)]) if images else None
        previews.append(
            Preview(
                each, each.read(text_encoder), seeing, noise_for([each.seed], *each.latent_shape)
            )
        )
    return tuple(previews)


def generate_previews(
    folder: Path,
    previews: Sequence[Preview],
    roles: Roles,
    vae: VAE,
    schedule_for: Callable[[int, int], Schedule],
    device: torch.device,
) -> None:
    """Write `<role>_<index>_<seed>.png`, `grid.png` (one row a role) and `preview.json`: the roles,
    and of each image prompt, seed, names of its references, and sigmas."""
    schedules = [schedule_for(*preview.noise.latent_shape[1:]) for preview in previews]
    texts = [preview.context for preview in previews]
    seeing = [preview.privileged for preview in previews if preview.privileged]
    rows: dict[str, tuple[Velocity, Sequence[Context]]] = {"base": (roles.base, texts)}
    if seeing:
        rows["teacher"] = (roles.teacher, seeing)
    rows["student"] = (roles.student, texts)
    noises = [preview.noise for preview in previews]
    images = {
        role: generate_each(*row, vae, schedules, noises, device) for role, row in rows.items()
    }
    about = [
        {
            "prompt": preview.wanted.prompt,
            "seed": preview.wanted.seed,
            "references": [path.name for path in preview.wanted.references],
            "sigmas": schedule.times.tolist(),
        }
        for preview, schedule in zip(previews, schedules, strict=True)
    ]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for role, row in images.items():
            for index, (preview, image) in enumerate(zip(previews, row, strict=True)):
                to_pil(image[None])[0].save(temporary / f"{role}_{index}_{preview.wanted.seed}.png")
        grid(list(images.values())).save(temporary / "grid.png")
        write_json(temporary / "preview.json", {"rows": list(rows), "images": about})


def preview_folder(run: Path, step: int) -> Path:
    """Where the previews of a run after `step` steps are."""
    return run / "samples" / f"step-{step:06d}"


def read_preview(folder: Path) -> dict[str, Any]:
    """preview.json of a preview's folder, of any version: "images" was once "pictures"."""
    preview = json.loads((folder / "preview.json").read_text(encoding="utf-8"))
    if "pictures" in preview:
        preview["images"] = preview.pop("pictures")
    return preview


def generate_each(
    velocity: Velocity,
    contexts: Sequence[Context],
    vae: VAE,
    schedules: Sequence[Schedule],
    noises: Sequence[Noise],
    device: torch.device,
) -> list[torch.Tensor]:
    """Each image, uint8 [H, W, 3]; those of one size, with contexts of one layout, are generated
    together."""
    generated: dict[int, torch.Tensor] = {}
    kinds = [
        (noise.latent_shape, context.layout)
        for noise, context in zip(noises, contexts, strict=True)
    ]
    for kind in dict.fromkeys(kinds):
        latent_shape, same = kind[0], [index for index, each in enumerate(kinds) if each == kind]
        context = Context.stack([contexts[index] for index in same]).to(device)
        noise = Noise(tuple(seed for index in same for seed in noises[index].seeds), latent_shape)
        generated |= zip(
            same, generate(velocity, vae, schedules[same[0]], context, noise), strict=True
        )
    return [generated[index] for index in range(len(noises))]


EXAMPLES = 3  # images of the data that the report shows


def _show_examples(recipe: Recipe, rows: Sequence[Row]) -> None:
    """The first images: `samples/data-<i>.png`."""
    for index, row in enumerate(rows[:EXAMPLES]):
        with atomic_path(recipe.run_folder / "samples" / f"data-{index}.png") as temporary:
            _example(row).save(temporary, "png")


def _example(row: Row) -> Image.Image:
    """The image as it is cut; beside it, first, those that it is edited from, no larger."""
    images = [*map(open_image, row.example.references), _crop(row)]
    for image in images:
        image.thumbnail(row.size)
    return grid([[torch.from_numpy(np.array(image)) for image in images]])


def _crop(row: Row) -> Image.Image:
    return cover_crop(open_image(row.example.path), row.size)
