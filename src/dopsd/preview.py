"""Previews: the same prompts on the same noise, painted again and again by student, teacher and base while training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dopsd.batch import Context
from dopsd.families.base import Painter, Reader
from dopsd.files import atomic_path, write_json
from dopsd.flow import Schedule
from dopsd.methods.base import Roles
from dopsd.paint import grid, noise_for, paint, to_images
from dopsd.rollout import Velocity


@dataclass(frozen=True)
class Preview:
    """A prompt, its noise [1, C, h, w] and the noise's seed; `privileged` where the teacher sees a picture with it."""

    prompt: str
    seed: int
    context: Context
    privileged: Context | None
    noise: torch.Tensor


def read_previews(
    prompts: Sequence[str],
    reader: Reader,
    pictures: Sequence[Image.Image],
    cells: tuple[int, int, int],
    seed: int,
) -> tuple[Preview, ...]:
    """Read the prompts, and for the teacher each with one of the pictures in turn (none: the teacher has no row).

    cells: latent (channels, height, width). Preview i starts from noise seed + i.
    """
    previews = []
    for index, prompt in enumerate(prompts):
        seeing = reader.context([prompt], [pictures[index % len(pictures)]]) if pictures else None
        noise = noise_for([seed + index], *cells)
        previews.append(Preview(prompt, seed + index, reader.context([prompt]), seeing, noise))
    return tuple(previews)


def paint_previews(
    folder: Path,
    previews: Sequence[Preview],
    roles: Roles,
    painter: Painter,
    schedule_for: Callable[[int, int], Schedule],
    device: torch.device,
) -> None:
    """Write `<role>_<index>_<seed>.png`, `grid.png` (one row a role) and `preview.json` (rows, prompts, sigmas)."""
    noise = torch.cat([preview.noise for preview in previews])
    schedule = schedule_for(*noise.shape[-2:])
    text = Context.stack([preview.context for preview in previews]).to(device)
    seeing = [preview.privileged for preview in previews if preview.privileged]
    rows: dict[str, tuple[Velocity, Context]] = {"base": (roles.base, text)}
    if seeing:
        rows["teacher"] = (roles.teacher, Context.stack(seeing).to(device))
    rows["student"] = (roles.student, text)
    pictures = {role: paint(velocity, painter, schedule, context, noise) for role, (velocity, context) in rows.items()}
    prompts = [preview.prompt for preview in previews]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for role, row in pictures.items():
            for index, (preview, image) in enumerate(zip(previews, to_images(row), strict=True)):
                image.save(temporary / f"{role}_{index}_{preview.seed}.png")
        grid(list(pictures.values())).save(temporary / "grid.png")
        write_json(
            temporary / "preview.json", {"rows": list(rows), "prompts": prompts, "sigmas": schedule.times.tolist()}
        )
