"""Several folders as one listing: repeats, loss weights and trigger words, each per folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dopsd.data.captions import with_trigger
from dopsd.data.examples import Example, Listing
from dopsd.data.folder import read_folder
from dopsd.data.folder_notes import CaptionLines, notes_on_subfolders
from dopsd.data.masks import MaskSource


@dataclass(frozen=True)
class Source:
    """A folder of images.

    instance_prompt: caption of images without one. trigger: the word for the new thing or style, in
    the captions of this folder alone (`with_trigger`); without an instance prompt it is the caption
    of images without one. caption_lines: whether the lines of a text file are one caption or one
    each. masks: where they come from. repeats: how often an epoch visits each image. weight: of
    each image's loss; a regularisation folder takes less than 1.
    """

    folder: Path
    instance_prompt: str | None = None
    trigger: str | None = None
    caption_extension: str | None = None
    caption_lines: CaptionLines = "joined"
    masks: MaskSource = "files"
    repeats: int = 1
    weight: float = 1.0


def read_sources(sources: Sequence[Source], skip_bad: bool = False) -> Listing:
    """Every source's examples, in order, each with the trigger of its folder. Raises ValueError as
    `read_folder` does, and for a `[trigger]` in the captions of a folder without a trigger."""
    listings = [
        read_folder(
            source.folder,
            source.instance_prompt,
            source.caption_extension,
            skip_bad,
            trigger=source.trigger,
            caption_lines=source.caption_lines,
            masks=source.masks,
        )
        for source in sources
    ]
    examples = [
        replace(_with_trigger(example, source.trigger), weight=source.weight)
        for source, listing in zip(sources, listings, strict=True)
        for example in listing.examples
        for _ in range(source.repeats)
    ]
    origins = [
        f"{source.folder}: {listing.source}"
        for source, listing in zip(sources, listings, strict=True)
    ]
    folders = [source.folder for source in sources]
    unread = [note for each in folders for note in notes_on_subfolders(each, examples, folders)]
    return Listing(
        tuple(examples),
        tuple(refusal for listing in listings for refusal in listing.refused),
        listings[0].source if len(sources) == 1 else "; ".join(origins),
        tuple(note for listing in listings for note in listing.notes) + tuple(unread),
    )


def show_next_image(listing: Listing) -> Listing:
    """The same examples, where the teacher sees the next image of the same folder instead of the
    example's own (the first after the last). Raises ValueError for a folder of one image."""
    images_of: dict[Path, list[Path]] = {}
    for example in listing.examples:
        images = images_of.setdefault(example.path.parent, [])
        if example.path not in images:
            images.append(example.path)
    single = next((folder for folder, images in images_of.items() if len(images) == 1), None)
    if single:
        raise ValueError(
            f"{single} holds one image, and the teacher is to see another one: add images, or set "
            "method.teacher_sees: target."
        )

    def next_image(path: Path) -> Path:
        images = images_of[path.parent]
        return images[(images.index(path) + 1) % len(images)]

    return replace(
        listing, examples=tuple(replace(e, shown=next_image(e.path)) for e in listing.examples)
    )


def split_captions(listing: Listing) -> Listing:
    """The same images, once with each of their captions."""
    examples = [
        replace(e, caption=text, also=()) for e in listing.examples for text in (e.caption, *e.also)
    ]
    return replace(listing, examples=tuple(examples))


def _with_trigger(example: Example, trigger: str | None) -> Example:
    return replace(
        example,
        caption=with_trigger(example.caption, trigger),
        also=tuple(with_trigger(text, trigger) for text in example.also),
        teacher_text=with_trigger(example.teacher_text, trigger) if example.teacher_text else None,
    )
