"""What a stranger needs of a run, in a folder that can be uploaded as it is: the weights, the model
card and the images that it shows. No path of a machine, no training image, and no caption unless it
is asked for."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from dopsd.config.recipe import Recipe, load_recipe
from dopsd.files import atomic_path, read_metadata, read_tensors, write_tensors, write_text
from dopsd.models.base import Family
from dopsd.models.folder import tuning_metadata
from dopsd.runs.outputs.model_card import ShownImage, model_card, shown_previews
from dopsd.runs.prompts import preview_prompts, unrelated_prompts
from dopsd.runs.resolve import open_family


def gather_upload(
    run_folder: Path, folder: Path, author: str | None = None, captions: bool = False
) -> None:
    """Write the folder, which must not exist.

    author: for the metadata and the card. captions: also show previews whose prompts are captions
    of the training images. Raises ValueError for a run that has not finished.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists and is not overwritten: choose another folder.")
    recipe, result = _recipe_of(run_folder), result_of(run_folder)
    family = open_family(recipe)
    is_lora = recipe.adapter == "lora"
    metadata = read_metadata(result) if is_lora else tuning_metadata(result)
    if author:
        metadata |= {"modelspec.author": author}
    with atomic_path(folder) as temporary:
        if is_lora:
            temporary.mkdir()
            write_tensors(temporary / result.name, read_tensors(result), metadata)
        else:
            shutil.copytree(result, temporary)
        images = _images(recipe, family, metadata, captions)
        for image in images:
            for name in (image.base, image.tuned):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run_folder / name, temporary / name)
        write_text(temporary / "README.md", model_card(recipe, family, metadata, images))


def result_of(run_folder: Path) -> Path:
    """What a run has made: its LoRA file, or its model folder. Raises ValueError for a run that has
    not finished."""
    result = run_folder / _recipe_of(run_folder).result().name
    if not result.exists():
        raise ValueError(
            f"{run_folder} is the folder of a run that has not finished: it holds no {result.name}."
        )
    return result


def _recipe_of(run_folder: Path) -> Recipe:
    """The run's recipe, with the folder where it is now."""
    config = run_folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run_folder} is not the folder of a run: it has no config.yaml.")
    recipe = load_recipe(config)
    if run_folder.absolute().name != recipe.run_name:
        raise ValueError(
            f"{run_folder} was renamed: it holds the run {recipe.run_name}; give it that name."
        )
    return recipe.model_copy(update={"output_dir": run_folder.absolute().parent})


def _images(
    recipe: Recipe, family: Family, metadata: Mapping[str, str], captions: bool
) -> list[ShownImage]:
    """The previews after the last step, those of captions only on request."""
    written = {section.prompt for section in preview_prompts(recipe)}
    written |= set(unrelated_prompts(recipe, family))
    shown = shown_previews(recipe, int(metadata["ss_steps"]))
    return [image for image in shown if captions or image.prompt in written]
