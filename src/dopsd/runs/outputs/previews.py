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
from dopsd.diffusion.components import VAE, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.files import atomic_path, write_json
from dopsd.images import cover_crop, grid, open_image, to_pil
from dopsd.methods.base import Roles
from dopsd.models.pipeline import EncodedRequest, ImageRequest, generate_images


@dataclass(frozen=True)
class Preview:
    """An image to show; `privileged` where the teacher sees an image with its prompt."""

    student: EncodedRequest
    privileged: EncodedRequest | None

    @property
    def request(self) -> ImageRequest:
        return self.student.request


def read_previews(
    requests: Sequence[ImageRequest], text_encoder: TextEncoder, images: Sequence[Image.Image]
) -> tuple[Preview, ...]:
    """Encode the prompts, and for the teacher each with one of the images in turn (none: the
    teacher has no row)."""
    previews = []
    for index, request in enumerate(requests):
        privileged = None
        if images:
            seen = images[index % len(images)]
            privileged = EncodedRequest(request, request.encode(text_encoder, seen))
        student = EncodedRequest(request, request.encode(text_encoder))
        previews.append(Preview(student, privileged))
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
    texts = [preview.student for preview in previews]
    seeing = [preview.privileged for preview in previews if preview.privileged]
    rows: dict[str, tuple[Velocity, Sequence[EncodedRequest]]] = {"base": (roles.base, texts)}
    if seeing:
        rows["teacher"] = (roles.teacher, seeing)
    rows["student"] = (roles.student, texts)
    images = {
        role: generate_images(velocity, vae, schedule_for, encoded, device)
        for role, (velocity, encoded) in rows.items()
    }
    about = [
        {
            "prompt": preview.request.prompt,
            "seed": preview.request.seed,
            "references": [path.name for path in preview.request.references],
            "sigmas": schedule_for(*preview.request.latent_shape[1:]).times.tolist(),
        }
        for preview in previews
    ]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for role, row in images.items():
            for index, (preview, image) in enumerate(zip(previews, row, strict=True)):
                to_pil(image[None])[0].save(
                    temporary / f"{role}_{index}_{preview.request.seed}.png"
                )
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


EXAMPLES = 3  # images of the data that the report shows


def write_examples(recipe: Recipe, rows: Sequence[Row]) -> None:
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
