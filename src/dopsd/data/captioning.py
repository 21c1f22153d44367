"""Captions for pictures that have none: a text beside each, which `folder` reads."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dopsd.data.folder import CAPTION_EXTENSIONS, METADATA, open_picture, pictures_in
from dopsd.files import write_text

QUESTION = (
    "Describe this picture in one sentence, as a prompt from which a text-to-image model could paint it: the subject, "
    "what it does, where it is, and how the picture is made. Answer with the sentence alone."
)


def caption_folder(
    folder: Path,
    describe: Callable[[Image.Image], str],
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Write `<stem>.txt` beside every picture; (how many were written, how many kept theirs). A caption that is there
    stays unless `overwrite`. Raises ValueError where captions live in a metadata file, where there are no pictures, and
    for a picture that cannot be decoded or for which nothing is said; what was written before stays."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of pictures.")
    if listed := [name for name in METADATA if (folder / name).is_file()]:
        raise ValueError(f"{folder} has its captions in {listed[0]}: a text beside a picture would not be read.")
    pictures = pictures_in(folder)
    if not pictures:
        raise ValueError(f"no pictures in {folder}.")
    todo = [p for p in pictures if overwrite or not any(p.with_suffix(e).is_file() for e in CAPTION_EXTENSIONS)]
    for done, path in enumerate(todo, start=1):
        caption = describe(open_picture(path))
        if not caption:
            raise ValueError(f"the model says nothing of {path.name}: write its caption by hand, or ask otherwise.")
        write_text(path.with_suffix(CAPTION_EXTENSIONS[0]), caption + "\n")
        if progress:
            progress(done, len(todo))
    return len(todo), len(pictures) - len(todo)
