"""Captions that a text encoder does not take: all named, or left out with their images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dopsd.data.examples import Example, Listing
from dopsd.images import Size
from dopsd.models.base import Family, UnfitPrompts

MAX_LISTED = 50  # captions that an error lists


def with_fitting_captions(
    listing: Listing,
    family: Family,
    sizes: Sequence[Sequence[Size]],
    seen_by_teacher: bool,
    skip_bad: bool,
) -> Listing:
    """The listing, whose captions fit the student's context and, where a teacher sees the images,
    the teacher's.

    sizes: of each example, at each resolution. skip_bad: leave out images with a caption that does
    not fit. Raises ValueError, naming every such image, where they are not left out or none is
    left.
    """
    captions = [
        (index, caption)
        for index, example in enumerate(listing.examples)
        for caption in (example.caption, *example.also)
    ]
    texts = [caption for _, caption in captions]
    reasons = _unfit(family, texts, None)
    of_teacher = [listing.examples[index].read_by_teacher(caption) for index, caption in captions]
    for of_resolution in sizes if seen_by_teacher else ():
        with_image = _unfit(family, of_teacher, [of_resolution[index] for index, _ in captions])
        reasons = {**with_image, **reasons}
    if not reasons:
        return listing
    unfit = {listing.examples[captions[i][0]].path: reason for i, reason in sorted(reasons.items())}
    fitting = tuple(example for example in listing.examples if example.path not in unfit)
    if skip_bad and fitting:
        refused = tuple((path, f"its caption {reason}.") for path, reason in unfit.items())
        return replace(listing, examples=fitting, refused=(*listing.refused, *refused))
    raise ValueError(_complaint(unfit, listing.examples, skip_bad))


def _unfit(family: Family, texts: Sequence[str], sizes: Sequence[Size] | None) -> dict[int, str]:
    """What is wrong with each text that does not fit, by its position."""
    try:
        family.count_tokens(texts, sizes)
    except UnfitPrompts as error:
        return error.reasons
    return {}


def _complaint(unfit: Mapping[Path, str], examples: Sequence[Example], skip_bad: bool) -> str:
    """All of them in one text. unfit: reasons by image."""
    lines = [f"{path.name} {reason}." for path, reason in list(unfit.items())[:MAX_LISTED]]
    if len(unfit) > MAX_LISTED:
        lines.append(f"and {len(unfit) - MAX_LISTED} more")
    images = len({example.path for example in examples})
    advice = "Nothing is left to train on."
    if not skip_bad:
        advice = "Change the captions, or leave the images out: data.skip_bad: true."
    listed = "\n  ".join(lines)
    return f"the captions of {len(unfit)} of {images} images do not fit:\n  {listed}\n{advice}"
