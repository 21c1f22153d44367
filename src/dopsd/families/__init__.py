"""The families, by the name of the pipeline class in a checkpoint's `model_index.json`. Nothing heavy is imported here.

`load_family` opens a local folder or a hub id; a family's module is imported only when it is asked for.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dopsd.families.base import Family

FAMILIES = {"zimage": "dopsd.families.zimage:ZImage"}
PIPELINES = {"ZImagePipeline": "zimage"}

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"  # what the name "pocket" stands for


def family_class(name: str) -> "type[Family]":
    """The class of a family by its name in FAMILIES."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)


def load_family(name_or_path: str, vlm: str | None = None, revision: str | None = None) -> "Family":
    """Open a checkpoint: a local diffusers folder, a hub id, or "pocket". Only its index and configs are read.

    Raises ValueError when the folder is missing, incomplete, or of a family that is not here.
    """
    path = str(POCKET) if name_or_path == "pocket" else name_or_path
    index = _model_index(path, revision)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        known = ", ".join(f"{family} ({cls})" for cls, family in PIPELINES.items())
        raise ValueError(f"{name_or_path} is a {pipeline} checkpoint; dopsd knows {known}.")
    return family_class(PIPELINES[pipeline])(path, index, vlm=vlm, revision=revision)  # type: ignore[call-arg]


def _model_index(path: str, revision: str | None) -> dict:
    folder = Path(path)
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{path} has no model_index.json: give a diffusers folder, a hub id, or `pocket`.")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(f"{path} does not exist: give a diffusers folder, a hub id like owner/name, or `pocket`.")
    else:
        file = _from_hub(path, revision)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): the checkpoint is damaged, fetch it again.") from error


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo, "model_index.json", revision=revision))
    except GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its licence on the hub, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repo} is neither a local folder nor a repository on the hub (or it is private).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{repo} is no local folder, and the hub could not be reached to look for it.") from error
