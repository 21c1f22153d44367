"""The families, by the name of the pipeline class in a checkpoint's `model_index.json`. Nothing
heavy is imported here.

`load_family` opens a local folder or a hub id; a family's module is imported only when it is asked
for.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dopsd.models.hub import Checkpoint

if TYPE_CHECKING:
    from dopsd.models.base import Family, TeacherVision

FAMILIES = {
    "zimage": "dopsd.models.zimage:ZImage",
    "flux2_klein": "dopsd.models.flux2_klein:Flux2Klein",
    "sdxl": "dopsd.models.sdxl:SDXL",
}
PIPELINES = {
    "ZImagePipeline": "zimage",
    "Flux2KleinPipeline": "flux2_klein",
    "StableDiffusionXLPipeline": "sdxl",
}

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"  # what the name "pocket" stands for


def family_class(name: str) -> "type[Family]":
    """The class of a family by its name in FAMILIES."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)


def load_family(
    name_or_path: str,
    revision: str | None = None,
    teacher_vision: "TeacherVision | None" = None,
    distilled_by: str | None = None,
) -> "Family":
    """Open a checkpoint: a local diffusers folder, a hub id, or "pocket". Only its index and
    configs are read.

    distilled_by: a file that makes a base checkpoint a few-step one. Raises ValueError when the
    folder is missing, incomplete, or of a family that is not here, where its teacher cannot see
    images as `sight` wants, and where it is not to be distilled by a file.
    """
    checkpoint = Checkpoint(str(POCKET) if name_or_path == "pocket" else name_or_path, revision)
    index = _model_index(checkpoint)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        known = ", ".join(f"{family} ({cls})" for cls, family in PIPELINES.items())
        raise ValueError(f"{name_or_path} is a {pipeline} checkpoint; dopsd knows {known}.")
    kind = family_class(PIPELINES[pipeline])
    if teacher_vision and teacher_vision.context not in (None, *kind.teacher_contexts):
        possible = " or ".join(kind.teacher_contexts) or "none"
        raise ValueError(
            f"{kind.name} has no teacher context {teacher_vision.context}: model.teacher_context can be {possible}."
        )
    if distilled_by and not kind.distillable:
        raise ValueError(
            f"{kind.name} takes no model.distilled_by: its few-step checkpoint is {kind.repo}."
        )
    further = {"distilled_by": distilled_by} if distilled_by else {}
    return kind(checkpoint, index, teacher_vision, **further)  # type: ignore[call-arg]


def _model_index(checkpoint: Checkpoint) -> dict:
    file = checkpoint.folder / "model_index.json"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint.name} has no model_index.json: give a diffusers folder, a hub id, or `pocket`."
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}): the checkpoint is damaged, fetch it again."
        ) from error
