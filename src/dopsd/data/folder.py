"""A folder of images and captions as examples; whatever cannot be used is named in one sentence.

Captions come from a metadata file, else from a text file beside each image, else from one instance
prompt, else from the trigger alone. Sizes are left to `buckets`, tensors to `cache`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dopsd.data.captions import as_caption
from dopsd.data.examples import Example, Listing
from dopsd.data.folder_files import CAPTION_EXTENSIONS, CaptionFiles, images_below, images_in
from dopsd.data.folder_notes import (
    CaptionLines,
    notes_on_frames,
    notes_on_texts,
    notes_on_transparency,
)
from dopsd.data.masks import MaskSource, pair_masks, refuse_unusable_mask
from dopsd.data.metadata import METADATA, Finding, read_metadata_file
from dopsd.images import (
    FORMATS,
    NOT_READ,
    kind_of_image,
    open_alpha,
    open_image,
)

MAX_LISTED = 5  # refused items that an error lists


def read_folder(
    folder: Path,
    instance_prompt: str | None = None,
    caption_extension: str | None = None,
    skip_bad: bool = False,
    decode: bool = True,
    trigger: str | None = None,
    caption_lines: CaptionLines = "joined",
    masks: MaskSource = "files",
) -> Listing:
    """Every image of the folder with its caption, sorted by path.

    A metadata file may name images in subfolders; without one, only the folder itself is read.
    instance_prompt: caption of images without one of their own. trigger: caption of those, where
    there is no instance prompt; it is not put into other captions here. caption_extension: only
    captions of this extension. decode: decode each image once, to know that it can be.
    caption_lines: what the lines of a text file are. masks: where masks come from; files that are
    masks are never images to train on, whatever it is.

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
    images, mask_of, refused_masks = pair_masks(images_in(folder))
    if present:
        findings, mask_of = _from_metadata(present[0], images, mask_of, refused_masks)
        source, notes = present[0].name, []
    else:
        prompt = None
        if instance_prompt is not None:
            prompt = as_caption(instance_prompt, "the instance prompt")
        texts = CaptionFiles(folder, _extensions(caption_extension))
        findings, source = _from_captions_beside(folder, images, texts, prompt, trigger)
        notes = notes_on_texts(texts, images, mask_of, caption_lines)
        if caption_lines == "each":
            findings = [_with_a_caption_each_line(finding) for finding in findings]
        findings += refused_masks
    if masks == "files":
        findings = [_with_mask(finding, mask_of) for finding in findings]
    if decode:
        findings = [_decoded(finding) for finding in findings]
        if masks == "alpha":
            findings = [_with_alpha(finding) for finding in findings]
        findings = [_with_usable_mask(finding) for finding in findings]
        notes += notes_on_frames(findings)
    findings.sort(key=lambda finding: finding[0].as_posix())
    examples = tuple(result for _, result in findings if isinstance(result, Example))
    refused = tuple((path, result) for path, result in findings if isinstance(result, str))
    if refused and not (skip_bad and examples):
        reasons = [reason for _, reason in refused]
        raise ValueError(_complaint(folder, reasons, len(findings), skip_bad))
    if masks == "alpha" and decode:
        notes += notes_on_transparency(folder, examples)
    return Listing(examples, refused, source, tuple(notes))


def _from_metadata(
    metadata: Path,
    images: Sequence[Path],
    mask_of: Mapping[Path, Path],
    refused_masks: Sequence[Finding],
) -> tuple[list[Finding], dict[Path, Path]]:
    """One finding per row of a metadata file, and one per file beside it that no row names; and the
    masks that are left by name, without images that rows name as references or rejected ones."""
    findings, named = read_metadata_file(metadata)
    examples = [result for _, result in findings if isinstance(result, Example)]
    other = {path for e in examples for path in (*e.references, *e.rejected)}
    mask_of = {image: mask for image, mask in mask_of.items() if mask not in other}
    owner_of = {mask: image for image, mask in mask_of.items()}
    findings = [
        (path, f"{path.name} is the mask of {owner_of[path].name}: it is no image to train on.")
        if isinstance(result, Example) and path in owner_of
        else (path, result)
        for path, result in findings
    ]
    unnamed = f"has no caption: no row of {metadata.name} names it."
    findings += [(path, f"{path.name} {unnamed}") for path in images if path not in named]
    findings += [(path, reason) for path, reason in refused_masks if path not in named]
    return findings, mask_of


def _extensions(given: str | None) -> tuple[str, ...]:
    return CAPTION_EXTENSIONS if given is None else (f".{given.lstrip('.')}",)


def _from_captions_beside(
    folder: Path,
    images: Sequence[Path],
    caption_files: CaptionFiles,
    prompt: str | None,
    trigger: str | None,
) -> tuple[list[Finding], str]:
    """One finding per image, captioned by the file beside it or else by `prompt` or `trigger`; and
    where captions came from."""
    if not images:
        below = images_below(folder)
        theirs = (
            f" ({len(below)} lie there, first: {below[0].relative_to(folder)})" if below else ""
        )
        raise ValueError(
            f"no images in {folder}: looked for {', '.join(FORMATS)} in it, not in its subfolders"
            f"{theirs}."
        )
    extensions = caption_files.extensions
    texts = {path: caption_files.of(path) for path in images}
    used = {text[0].suffix.lower() for text in texts.values() if text}
    sources = [f"{e} files" for e in extensions if e.lower() in used]
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
    path: Path, texts: list[Path], default: str | None, extensions: Sequence[str]
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
            if kind := kind_of_image(image):
                return path, (
                    f"{image.name} is not read: it begins like a {kind} file; rename it to "
                    f"{image.name}{kind}."
                )
            return path, f"{image.name} is not one of {', '.join(FORMATS)}: convert it."
        try:
            open_image(image)
        except ValueError as error:
            return path, str(error)
    return finding


def _with_a_caption_each_line(finding: Finding) -> Finding:
    path, result = finding
    if isinstance(result, str):
        return finding
    caption, *also = (line.strip() for line in result.caption.splitlines() if line.strip())
    return path, replace(result, caption=caption, also=tuple(also))


def _with_mask(finding: Finding, mask_of: Mapping[Path, Path]) -> Finding:
    """With the mask that lies beside the image, unless a row of metadata names one."""
    path, result = finding
    if isinstance(result, str) or result.mask or path not in mask_of:
        return finding
    return path, replace(result, mask=mask_of[path])


def _with_alpha(finding: Finding) -> Finding:
    path, result = finding
    if isinstance(result, str) or open_alpha(path) is None:
        return finding
    return path, replace(result, mask=path)


def _with_usable_mask(finding: Finding) -> Finding:
    path, result = finding
    if isinstance(result, str) or result.mask is None:
        return finding
    try:
        refuse_unusable_mask(result)
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
