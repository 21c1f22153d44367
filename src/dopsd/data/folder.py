"""A folder of images and captions as examples; whatever cannot be used is named in one sentence.

Captions come from a metadata file, else from a text file beside each image, else from one instance
prompt, else from the trigger alone. Sizes are left to `buckets`, tensors to `cache`.
"""

import os
from pathlib import Path

from dopsd.data.captions import as_caption
from dopsd.data.examples import Example, Listing
from dopsd.data.metadata import METADATA, Finding, read_metadata_file
from dopsd.images import FORMATS, NOT_READ, open_image

CAPTION_EXTENSIONS = (".txt", ".caption")
MAX_LISTED = 5  # refused items that an error lists


def read_folder(
    folder: Path,
    instance_prompt: str | None = None,
    caption_extension: str | None = None,
    skip_bad: bool = False,
    decode: bool = True,
    trigger: str | None = None,
) -> Listing:
    """Every image of the folder with its caption, sorted by path.

    A metadata file may name images in subfolders; without one, only the folder itself is read.
    instance_prompt: caption of images without one of their own. trigger: caption of those, where
    there is no instance prompt; it is not put into other captions here. caption_extension: only
    captions of this extension. decode: decode each image once, to know that it can be.

    Raises ValueError when there is nothing to read and, unless `skip_bad`, when anything in the
    folder is refused.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of images.")
    present = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(present) > 1:
        raise ValueError(
            f"{folder} holds both {' and '.join(METADATA)}: keep one, so that captions have one "
            "source."
        )
    if present:
        findings, source = _from_metadata(present[0]), present[0].name
    else:
        prompt = None
        if instance_prompt is not None:
            prompt = as_caption(instance_prompt, "the instance prompt")
        findings, source = _from_captions_beside(folder, prompt, trigger, caption_extension)
    if decode:
        findings = [_decoded(finding) for finding in findings]
    findings.sort(key=lambda finding: finding[0].as_posix())
    examples = tuple(result for _, result in findings if isinstance(result, Example))
    refused = tuple((path, result) for path, result in findings if isinstance(result, str))
    if refused and not (skip_bad and examples):
        reasons = [reason for _, reason in refused]
        raise ValueError(_complaint(folder, reasons, len(findings), skip_bad))
    return Listing(examples, refused, source)


def images_in(folder: Path) -> list[Path]:
    """Files with the extension of an image, sorted; hidden files, which belong to the system, are
    left out."""
    files = (
        path
        for path in folder.iterdir()
        if path.name[0] != "." and (path.is_symlink() or path.is_file())
    )
    return sorted(path for path in files if path.suffix.lower() in FORMATS.keys() | NOT_READ.keys())


def _from_metadata(metadata: Path) -> list[Finding]:
    """One finding per row of a metadata file, and one per image beside it that no row names."""
    findings, named = read_metadata_file(metadata)
    unnamed = f"has no caption: no row of {metadata.name} names it."
    images = images_in(metadata.parent)
    return findings + [(path, f"{path.name} {unnamed}") for path in images if path not in named]


def _from_captions_beside(
    folder: Path, prompt: str | None, trigger: str | None, extension: str | None
) -> tuple[list[Finding], str]:
    """One finding per image, captioned by the file beside it or else by `prompt` or `trigger`; and
    where captions came from."""
    images = images_in(folder)
    if not images:
        raise ValueError(
            f"no images in {folder}: looked for {', '.join(FORMATS)} in it, not in its subfolders."
        )
    extensions = CAPTION_EXTENSIONS if extension is None else (f".{extension.lstrip('.')}",)
    texts = {
        path: [text for e in extensions if os.path.lexists(text := path.with_suffix(e))]
        for path in images
    }
    used = {text[0].suffix for text in texts.values() if text}
    sources = [f"{e} files" for e in extensions if e in used]
    default = trigger if prompt is None else prompt
    if not used and default is None:
        raise ValueError(
            f"{folder} holds {len(images)} images and no captions. "
            f"{_ways_to_caption(folder, images[0], extensions[0])}"
        )
    if not all(texts.values()) and default is not None:
        sources.append("the trigger alone" if prompt is None else "instance prompt")
    findings = [(path, _captioned(path, text, default, extensions)) for path, text in texts.items()]
    return findings, " and ".join(sources)


def _ways_to_caption(folder: Path, image: Path, extension: str) -> str:
    return (
        "Set data.instance_prompt to one caption for all, or let a model write captions: dopsd "
        f"caption {folder}. Or write them: {image.stem}{extension} beside {image.name} and so on, "
        f"or {METADATA[0]} with file_name and text."
    )


def _captioned(
    path: Path, texts: list[Path], default: str | None, extensions: tuple[str, ...]
) -> Example | str:
    """The image with the first of its texts, or with the default caption; or why not."""
    if not texts and default is None:
        expected = " or ".join(path.stem + e for e in extensions)
        return f"{path.name} has no caption: there is no {expected}."
    if not texts:
        return Example(path, str(default))
    text = texts[0]
    try:
        content = text.read_text(encoding="utf-8-sig")
        return Example(path, as_caption(content, f"the caption {text.name}"))
    except UnicodeDecodeError as error:
        return f"the caption {text.name} is not UTF-8 ({error})."
    except OSError as error:
        return f"the caption {text.name} cannot be read ({error.strerror})."
    except ValueError as error:
        return str(error)


def _decoded(finding: Finding) -> Finding:
    """The same finding, or a refusal where one of its images cannot be decoded."""
    path, result = finding
    if isinstance(result, str):
        return finding
    for image in (path, *result.references, *result.rejected):
        extension = image.suffix.lower()
        if extension in NOT_READ:
            return path, f"{image.name} is not read: {NOT_READ[extension]}."
        if extension not in FORMATS:
            return path, f"{image.name} is not one of {', '.join(FORMATS)}: convert it."
        try:
            open_image(image)
        except ValueError as error:
            return path, str(error)
    return finding


def _complaint(folder: Path, refused: list[str], count: int, skip_bad: bool) -> str:
    """The first refused items and what to do. refused: a sentence each; count: items in all."""
    listed = "\n  ".join(refused[:MAX_LISTED])
    more = f"\n  and {len(refused) - MAX_LISTED} more" if len(refused) > MAX_LISTED else ""
    advice = []
    if any("has no caption: there is no " in reason for reason in refused):
        advice.append(
            "Images without a caption: set data.instance_prompt to one caption for them, or let a "
            f"model write captions: dopsd caption {folder}."
        )
    if any("has no caption: no row" in reason for reason in refused):
        advice.append("Images without a caption: add a row for each.")
    if skip_bad:
        advice.append("Nothing is left to train on.")
    else:
        repair = "Or leave them out" if advice else "Repair them, or leave them out"
        advice.append(f"{repair}: data.skip_bad: true.")
    text = " ".join(advice)
    return f"{len(refused)} of {count} items in {folder} cannot be used:\n  {listed}{more}\n{text}"
