"""Captions for images without one: a text file beside each, which `folder` reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from dopsd.data.folder_files import CAPTION_EXTENSIONS, CaptionFiles, images_in
from dopsd.data.masks import pair_masks
from dopsd.data.metadata import METADATA
from dopsd.files import write_text
from dopsd.images import open_image

QUESTION = (
    "Describe this picture in one sentence, as a prompt from which a text-to-image model could "
    "paint it: the subject, what it does, where it is, and how the picture is made. Answer with "
    "the sentence alone."
)


def uncaptioned(folder: Path, overwrite: bool = False) -> tuple[list[Path], int]:
    """The images to describe, and the number of those that have a caption and keep it (none with
    `overwrite`). Raises ValueError where captions are in a metadata file, and for a folder without
    images."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of images.")
    if metadata := [name for name in METADATA if (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has its captions in {metadata[0]}: text files beside images are not read."
        )
    images, _, _ = pair_masks(images_in(folder))
    if not images:
        raise ValueError(f"no images in {folder}.")
    texts = CaptionFiles(folder, CAPTION_EXTENSIONS)
    todo = [path for path in images if overwrite or not texts.of(path)]
    return todo, len(images) - len(todo)


def write_captions(
    images: Sequence[Path],
    describe: Callable[[Image.Image], str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `<stem>.txt` beside each image. `progress(done, total)` counts images. Raises
    ValueError for one that cannot be decoded or gets an empty caption; files written before stay.
    """
    for done, path in enumerate(images, start=1):
        caption = describe(open_image(path))
        if not caption:
            raise ValueError(
                f"the model's caption of {path.name} is empty: write it by hand, or change the "
                "question."
            )
        write_text(path.with_suffix(CAPTION_EXTENSIONS[0]), caption + "\n")
        if progress:
            progress(done, len(images))
