"""Masks: which file is the mask of which image, and masks as weights at latent positions."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dopsd.data.examples import Example
from dopsd.images import Size, cover_crop, image_size, open_alpha, open_mask

# Where masks come from: files beside the images, the images' transparency, or nowhere.
MaskSource = Literal["files", "alpha", "ignore"]

# `cat-masklabel.png` is the mask of `cat.png`, as OneTrainer names it; the others are common too.
SURE_ENDINGS = ("-masklabel", "_masklabel")
ENDINGS = (*SURE_ENDINGS, "-mask", "_mask", ".mask")
BEGINNINGS = ("mask-", "mask_")
CONDITION = "-condlabel"  # of OneTrainer: images that control, which are not trained on either
ASPECT_TOLERANCE = 0.02  # relative, between an image and its mask: rounding of small sizes


def pair_masks(
    images: Sequence[Path],
) -> tuple[list[Path], dict[Path, Path], list[tuple[Path, str]]]:
    """Images of one folder as: those to train on, the mask of each that has one, and (file, reason)
    of those that can be neither.

    `cat_mask.png` is the mask of `cat.png` where that exists. Where it does not, it is an image
    itself, unless other images of the folder have masks.
    """
    stems: dict[str, list[Path]] = {}
    for path in images:
        stems.setdefault(path.stem.casefold(), []).append(path)
    owners = {path: _owners(path, stems) for path in images}
    has_masks = any(owners.values())
    plain: list[Path] = []
    masks: dict[Path, Path] = {}
    refused: list[tuple[Path, str]] = []
    for path in images:
        stem = path.stem.casefold()
        if owners[path]:
            masks |= dict.fromkeys(owners[path], path)
        elif stem.endswith(CONDITION):
            refused.append((path, f"{path.name} is an image that controls; dopsd uses none."))
        elif stem.endswith(SURE_ENDINGS) or (has_masks and _masked_stem(stem)):
            refused.append(
                (path, f"{path.name} is a mask, and the image that it masks is missing.")
            )
        else:
            plain.append(path)
    return plain, masks, refused


def _masked_stem(stem: str) -> str | None:
    """The name of the image that a mask of this name would be of."""
    for ending in ENDINGS:
        if stem.endswith(ending):
            return stem.removesuffix(ending)
    for beginning in BEGINNINGS:
        if stem.startswith(beginning):
            return stem.removeprefix(beginning)
    return None


def _owners(path: Path, stems: dict[str, list[Path]]) -> Collection[Path]:
    """The images that the file is the mask of."""
    stem = _masked_stem(path.stem.casefold())
    return stems.get(stem, []) if stem else []


def refuse_unusable_mask(example: Example) -> None:
    """Raise ValueError for a mask that cannot be decoded, has another shape than its image, or
    leaves nothing to train on."""
    assert example.mask is not None
    name, of = example.mask.name, example.path.name
    mask = _grey(example)
    (width, height), size = image_size(example.path), mask.size
    if abs(size[0] * height / (size[1] * width) - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"the mask {name} is {size[0]} x {size[1]} and {of} is {width} x {height}: a mask lies "
            "over its image, so it has the same shape."
        )
    if mask.getbbox() is None:
        what = f"{of} is transparent" if name == of else f"the mask {name} is black"
        raise ValueError(f"{what} everywhere: nothing of it would be trained on.")


def mask_weights(example: Example, size: Size, vae_scale_factor: int) -> Tensor:
    """The mask at latent positions, float32 [1, h, w] in [0, 1]: the mean of the pixels of each,
    cropped as the image is. size: (width, height) in pixels, multiples of the factor.

    Raises ValueError where the crop leaves out all of the mask.
    """
    grey = torch.frombuffer(
        bytearray(cover_crop(_grey(example), size).tobytes()), dtype=torch.uint8
    )
    weights = avg_pool2d(grey.view(1, size[1], size[0]).float() / 255, vae_scale_factor)
    if not weights.any():
        raise ValueError(
            f"the mask of {example.path} has nothing white in the part that is trained on, "
            f"{size[0]} x {size[1]} around its centre: crop the image to what matters."
        )
    return weights


def _grey(example: Example) -> Image.Image:
    """The mask in 8-bit grey."""
    assert example.mask is not None
    if example.mask != example.path:
        return open_mask(example.mask)
    alpha = open_alpha(example.path)
    assert alpha is not None, "a folder's images without transparency have no mask"
    return alpha
