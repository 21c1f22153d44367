"""What lies in a folder: images, caption files, and what would otherwise be left out in silence."""

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath

from dopsd.images import FORMATS, NOT_READ, kind_of_image

CAPTION_EXTENSIONS = (".txt", ".caption")


def images_in(folder: Path) -> list[Path]:
    """Files with the extension of an image, and such as begin like one whatever their name, sorted;
    hidden files, which belong to the system, are left out."""
    return sorted(path for path in _files(folder) if _is_image(path))


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name[0] != "." and (path.is_symlink() or path.is_file()):
            yield path


def _is_image(path: Path) -> bool:
    return _has_image_extension(path) or (path.is_file() and kind_of_image(path) is not None)


class CaptionFiles:
    """The text files of a folder, by the names of the images that they belong to.

    Names are compared after Unicode normalisation (macOS writes decomposed letters, most other
    software composed ones), and extensions without regard to case.
    """

    def __init__(self, folder: Path, extensions: Sequence[str]):
        """extensions: with their dot, in order of preference."""
        self.extensions = extensions
        wanted = [extension.lower() for extension in extensions]
        self._files: dict[tuple[str, str], Path] = {
            (_stem(path), path.suffix.lower()): path
            for path in sorted(_files(folder))
            if path.suffix.lower() in wanted
        }

    def of(self, image: Path) -> list[Path]:
        """The image's texts, the preferred one first."""
        keys = [(_stem(image), extension.lower()) for extension in self.extensions]
        return [self._files[key] for key in keys if key in self._files]

    def without_image(self, images: Iterable[Path]) -> list[Path]:
        """Text files that belong to none of the images."""
        stems = {_stem(image) for image in images}
        return [path for (stem, _), path in self._files.items() if stem not in stems]


def _stem(path: Path) -> str:
    return normalised(path.stem)


def normalised(name: str) -> str:
    """A file name in composed Unicode (NFC), for comparison."""
    return unicodedata.normalize("NFC", name)


def file_in(folder: Path, name: str) -> Path | None:
    """The file of a folder that a row of metadata names by a relative path, or by an absolute one
    into the folder; None where there is none.

    Backslashes separate folders where no file has one in its name, and names are compared after
    Unicode normalisation. Names that leave the folder (`..`) name no file.
    """
    spellings = dict.fromkeys((name, name.replace("\\", "/")))
    insides = (_inside(folder, spelling) for spelling in spellings)
    found = (_descend(folder, inside.parts) for inside in insides if inside)
    return next((path for path in found if path), None)


def is_outside(folder: Path, name: str) -> bool:
    """Whether a path of a row of metadata leads out of the folder, however it is written."""
    return bool(PureWindowsPath(name).drive) or _inside(folder, name.replace("\\", "/")) is None


def _inside(folder: Path, name: str) -> Path | None:
    """The path relative to the folder; None where it leads out of it."""
    path = Path(os.path.normpath(name))
    if path.is_absolute():
        roots = [root for root in (folder.absolute(), folder.resolve()) if root in path.parents]
        if not roots:
            return None
        path = path.relative_to(roots[0])
    return None if ".." in path.parts else path


def _descend(folder: Path, parts: Sequence[str]) -> Path | None:
    """The file at the end of the path, each part found as written or under an equal name."""
    path = folder
    for part in parts:
        if not os.path.lexists(path / part):
            if not os.path.isdir(path):
                return None
            equal = [each for each in os.listdir(path) if normalised(each) == normalised(part)]
            part = equal[0] if equal else part
        path = path / part
    return path if os.path.isfile(path) else None


def images_below(folder: Path, without: Collection[Path] = ()) -> list[Path]:
    """Images, by their extension, in the folder's subfolders at any depth, sorted; hidden ones and
    links are left out. without: resolved folders that are not looked into."""
    found: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.name[0] == "." or child.is_symlink() or not child.is_dir():
            continue
        if child.resolve() not in without:
            found += [path for path in sorted(_files(child)) if _has_image_extension(path)]
            found += images_below(child, without)
    return found


def _has_image_extension(path: Path) -> bool:
    return path.suffix.lower() in FORMATS.keys() | NOT_READ.keys()
