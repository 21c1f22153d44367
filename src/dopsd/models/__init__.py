"""Model families, by the pipeline class that a checkpoint's `model_index.json` names.

The registries are strings `module:attribute`: a family's module, and with it diffusers, is imported
only when a checkpoint of it is opened.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.models.hub import Checkpoint, quiet_libraries

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
# Checkpoints in the package itself: model name -> the path of a diffusers folder.
BUILT_IN = {"pocket": "dopsd.pocket:CHECKPOINT"}


def family_class(name: str) -> "type[Family]":
    """The class of a family by its name in FAMILIES."""
    return _load(FAMILIES[name])


def load_family(
    name_or_path: str,
    revision: str | None = None,
    teacher_vision: "TeacherVision | None" = None,
    distilled_by: str | None = None,
) -> "Family":
    """Open a checkpoint: a local diffusers folder, a hub id, or a name in BUILT_IN. Reads only its
    index and configs.

    teacher_vision: how a teacher sees images. distilled_by: a file that makes a base checkpoint a
    few-step one. Raises ValueError when the folder is missing, incomplete or of an unknown family,
    when the family has no such teacher context, or when it takes no `distilled_by`.
    """
    folder_or_id = str(_load(BUILT_IN[name_or_path])) if name_or_path in BUILT_IN else name_or_path
    if os.path.isfile(folder_or_id):
        import_module("dopsd.models.single_file").refuse_file(Path(folder_or_id))
    checkpoint = Checkpoint(folder_or_id, revision)
    index = model_index(checkpoint)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        known = ", ".join(f"{family} ({cls})" for cls, family in PIPELINES.items())
        raise ValueError(f"{name_or_path} is a {pipeline} checkpoint; dopsd knows {known}.")
    kind = family_class(PIPELINES[pipeline])
    if teacher_vision and teacher_vision.context not in (None, *kind.teacher_contexts):
        possible = " or ".join(kind.teacher_contexts) or "none"
        raise ValueError(
            f"{kind.name} has no teacher context {teacher_vision.context}: "
            f"model.teacher_context can be {possible}."
        )
    if distilled_by and not kind.distillable:
        raise ValueError(
            f"{kind.name} takes no model.distilled_by: its few-step checkpoint is {kind.repo}."
        )
    further = {"distilled_by": distilled_by} if distilled_by else {}
    return kind(checkpoint, index, teacher_vision, **further)  # type: ignore[call-arg]


def _load(entry: str) -> Any:
    module, _, attribute = entry.partition(":")
    with quiet_libraries():
        return getattr(import_module(module), attribute)


def model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's model_index.json. Raises ValueError where it is missing or damaged."""
    file = checkpoint.folder / "model_index.json"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint.name} has no model_index.json: give a diffusers folder or a hub id, "
            f"or {', '.join(BUILT_IN)}."
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}): the checkpoint is damaged, fetch it again."
        ) from error
