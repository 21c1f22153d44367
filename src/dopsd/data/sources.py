"""Several folders as one listing: repeats, weights and a trigger word. What one folder holds is
left to `folder`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dopsd.data.folder import Example, Listing, read_folder


@dataclass(frozen=True)
class Source:
    """A folder of images. repeats: how often an epoch visits each; weight: of the loss of each (a
    regularisation folder takes less than 1)."""

    folder: Path
    instance_prompt: str | None = None
    caption_extension: str | None = None
    repeats: int = 1
    weight: float = 1.0


def read_sources(
    sources: Sequence[Source], trigger: str | None = None, skip_bad: bool = False
) -> Listing:
    """Every source's examples, in order; `trigger` is put before each caption that lacks it. Raises
    ValueError as `read_folder` does."""
    listings = [
        read_folder(s.folder, s.instance_prompt, s.caption_extension, skip_bad) for s in sources
    ]
    examples = [
        replace(_triggered(example, trigger), weight=source.weight)
        for source, listing in zip(sources, listings, strict=True)
        for example in listing.examples
        for _ in range(source.repeats)
    ]
    origins = [f"{s.folder}: {found.source}" for s, found in zip(sources, listings, strict=True)]
    return Listing(
        tuple(examples),
        tuple(refusal for found in listings for refusal in found.refused),
        listings[0].source if len(sources) == 1 else "; ".join(origins),
    )


def seen_in_turn(listing: Listing) -> Listing:
    """The same examples, where each teacher sees the next image of the same folder, the last one
    the first. Raises ValueError for a folder of one image."""
    folders: dict[Path, list[Path]] = {}
    for example in listing.examples:
        images = folders.setdefault(example.path.parent, [])
        if example.path not in images:
            images.append(example.path)
    if alone := next((folder for folder, images in folders.items() if len(images) == 1), None):
        raise ValueError(
            f"{alone} holds one picture, and the teacher is to see another one: method.teacher_sees: target."
        )

    def following(path: Path) -> Path:
        images = folders[path.parent]
        return images[(images.index(path) + 1) % len(images)]

    return replace(
        listing, examples=tuple(replace(e, shown=following(e.path)) for e in listing.examples)
    )


def one_caption_each(listing: Listing) -> Listing:
    """The same images, once with each of their captions."""
    apart = [
        replace(e, caption=text, also=()) for e in listing.examples for text in (e.caption, *e.also)
    ]
    return replace(listing, examples=tuple(apart))


def _triggered(example: Example, trigger: str | None) -> Example:
    if trigger is None:
        return example

    def told(caption: str) -> str:
        return caption if trigger in caption else f"{trigger}, {caption}"

    return replace(example, caption=told(example.caption), also=tuple(map(told, example.also)))
