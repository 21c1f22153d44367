"""Images and captions as tensors on disk, so that the encoders can leave memory before training.

The name of a file is a hash of everything its content depends on (caption, image, size, encoder): a
stale file is never read, and a file that is there is never stale. Batching is left to `loader`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.examples import Example
from dopsd.data.masks import mask_weights
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, TextEncoder
from dopsd.files import read_metadata, read_tensors, sha256_of, write_tensors
from dopsd.images import Size, cover_crop, image_size, open_image, to_pixels

log = logging.getLogger(__name__)

LAYOUT = 3  # part of every key: raise it when the same inputs would give other files
EXTRA = "extra."  # before the names of a context's extras

Encode = Callable[[Sequence["Row"]], Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Row:
    """One image with one caption, and the files that hold its tensors.

    size: (width, height) in pixels. privileged: context of caption and image, if asked for.
    mask: weights at latent positions, if the image has a mask. rejected: latents of the example's
    worse images, cut to the same size. also: the same image with
    its other captions. unconditional: the same image with the empty caption, if asked for.
    """

    example: Example
    size: Size
    latents: Path
    context: Path
    privileged: Path | None
    mask: Path | None = None
    rejected: tuple[Path, ...] = ()
    also: tuple["Row", ...] = ()
    unconditional: "Row | None" = None

    @property
    def versions(self) -> tuple["Row", ...]:
        """The image with every caption that an epoch can draw for it."""
        return (self, *self.also, *([self.unconditional] if self.unconditional else []))


def prepare(
    examples: Sequence[Example],
    cache_folder: Path,
    text_encoder: TextEncoder,
    vae: VAE,
    *,
    resolution: int,
    multiple: int,
    privileged: bool,
    unconditional: bool = False,
    batch_size: int = 4,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Row, ...]:
    """Write every file that is missing or broken, and return the rows in the order of the examples.

    Each image gets the bucket nearest to its shape; the privileged image is the very crop that is
    trained on. All captions of an example are encoded, and with `unconditional` the empty one, for
    caption dropout. `progress(done, total)` counts files and is first called with those that could
    be reused. Raises ValueError where a caption is over the text encoder's limit or an encoder
    returns numbers that are not finite.
    """
    buckets = bucket_sizes(resolution, multiple)
    rows = tuple(
        _row(example, cache_folder, text_encoder, vae, buckets, privileged, unconditional)
        for example in examples
    )
    captioned_rows = [version for row in rows for version in row.versions]

    # One encoder for each kind of file: rows of one size to the tensors of their files.
    def encode_images(batch: Sequence[Row]) -> Iterable[Mapping[str, Tensor]]:
        pixels = torch.stack([to_pixels(_crop(row)) for row in batch])
        return ({"latents": latents} for latents in vae.latents(pixels.to(device)).float())

    def encode_captions(
        batch: Sequence[Row], images: Sequence[Image.Image] | None = None
    ) -> Iterable[Mapping[str, Tensor]]:
        references = [[open_image(path) for path in row.example.references] for row in batch]
        captions = [row.example.caption for row in batch]
        if images is not None:
            captions = [row.example.read_by_teacher(row.example.caption) for row in batch]
        return _context_tensors(
            text_encoder.context(captions, images, references if any(references) else None)
        )

    def encode_privileged(batch: Sequence[Row]) -> Iterable[Mapping[str, Tensor]]:
        return encode_captions(batch, [shown_to_teacher(row) for row in batch])

    def encode_masks(batch: Sequence[Row]) -> Iterable[Mapping[str, Tensor]]:
        factor = vae.vae_scale_factor
        return ({"mask": mask_weights(row.example, row.size, factor)} for row in batch)

    # The files of each kind, those that are missing or broken, and how to make them.
    privileged_files = {row.privileged: row for row in captioned_rows if row.privileged}
    kinds: list[tuple[str, dict[Path, Row], Encode]] = [
        ("latents", {row.latents: row for row in rows} | _rejected_files(rows), encode_images),
        ("context", {row.context: row for row in captioned_rows}, encode_captions),
        ("privileged", privileged_files, encode_privileged),
        ("mask", {row.mask: row for row in rows if row.mask}, encode_masks),
    ]
    total = sum(len(files) for _, files, _ in kinds)
    missing = [
        (kind, {path: row for path, row in files.items() if not _is_usable(path, kind)}, encode)
        for kind, files, encode in kinds
    ]

    # Encode and write them.
    done = total - sum(len(files) for _, files, _ in missing)
    report = progress or (lambda done, total: None)
    report(done, total)
    for kind, files, encode in missing:
        for batch in _batches_of_one_size(files, batch_size):
            _write(batch, kind, encode)
            done += len(batch)
            report(done, total)
    return rows


@dataclass(frozen=True)
class CacheForecast:
    """How many files `prepare` writes, and the bytes of their tensors."""

    files: int
    bytes: int


def forecast_cache(
    examples: Sequence[Example],
    sizes: Sequence[Size],
    latent_bytes: Callable[[Size], int],
    context_bytes: Callable[[str, Sequence[Size]], int],
    privileged_bytes: Callable[[str, Size, Sequence[Size]], int] | None = None,
    unconditional: bool = False,
    mask_bytes: Callable[[Size], int] | None = None,
) -> CacheForecast:
    """What the files of these examples at these sizes take on disk, from shapes alone.

    latent_bytes(size): of an image. context_bytes(caption, sizes of the references).
    privileged_bytes(caption, size of the image, sizes of the references): where the method has a
    teacher. mask_bytes(size): of an image's mask, where images have masks. Images of equal content
    under two names are counted twice, so this is an upper bound; the headers of the files (about
    100 bytes each) are not counted.
    """
    files: dict[tuple[object, ...], int] = {}
    for example, size in zip(examples, sizes, strict=True):
        if example.mask and mask_bytes:
            files["mask", example.mask, size] = mask_bytes(size)
        references = [image_size(path) for path in example.references]
        for path in (example.path, *example.rejected):
            files["latents", path, size] = latent_bytes(size)
        shown = example.shown or example.path
        for caption in (example.caption, *example.also, *([""] if unconditional else [])):
            key = (caption, example.references)
            files["context", *key] = context_bytes(caption, references)
            if privileged_bytes:
                read = example.read_by_teacher(caption)
                bytes_of_pair = privileged_bytes(read, size, references)
                files["privileged", read, example.references, shown, size] = bytes_of_pair
    return CacheForecast(len(files), sum(files.values()))


def shown_to_teacher(row: Row) -> Image.Image:
    """The image that the teacher sees with the row's caption, cut to the row's size."""
    return cover_crop(open_image(row.example.shown or row.example.path), row.size)


def context_file(
    cache_folder: Path, caption: str, fingerprint: str, references: Sequence[str] = ()
) -> Path:
    """The file of a caption's context. fingerprint: of the text encoder; references: hashes of the
    images that the caption edits."""
    key = _key("context", caption, fingerprint, *references)
    return cache_folder / "context" / f"{key}.safetensors"


def read_context(path: Path) -> Context:
    """A cached context (plain or privileged) as a batch of one: tokens [1, l, D]. Raises ValueError
    for a file that cannot be read."""
    tensors = read_tensors(path)
    extras = {
        name.removeprefix(EXTRA): tensor[None]
        for name, tensor in tensors.items()
        if name.startswith(EXTRA)
    }
    tokens = tensors["tokens"]
    return Context(tokens[None], (len(tokens),), extras)


def read_latents(path: Path) -> Tensor:
    """Cached latents: float32 [C, h, w]. Raises ValueError for a file that cannot be read."""
    return read_tensors(path)["latents"]


def read_mask(path: Path) -> Tensor:
    """Cached weights of a mask: float32 [1, h, w]. Raises ValueError for a file that cannot be
    read."""
    return read_tensors(path)["mask"]


def _row(
    example: Example,
    folder: Path,
    text_encoder: TextEncoder,
    vae: VAE,
    buckets: Sequence[Size],
    privileged: bool,
    unconditional: bool,
) -> Row:
    size = nearest_bucket(*image_size(example.path), buckets)
    shown = sha256_of(example.shown or example.path)
    references = tuple(map(sha256_of, example.references))

    def latents_of(image: Path) -> Path:
        key = _key("latents", sha256_of(image), size, vae.fingerprint)
        return folder / "latents" / f"{key}.safetensors"

    mask = None
    if example.mask:
        source = "alpha" if example.mask == example.path else "file"
        key = _key("mask", source, sha256_of(example.mask), size, vae.vae_scale_factor)
        mask = folder / "mask" / f"{key}.safetensors"

    def captioned(caption: str) -> Row:
        read = example.read_by_teacher(caption)
        pair = _key("privileged", read, shown, size, text_encoder.fingerprint, *references)
        return Row(
            replace(example, caption=caption, also=()),
            size,
            latents=latents_of(example.path),
            context=context_file(folder, caption, text_encoder.fingerprint, references),
            privileged=folder / "privileged" / f"{pair}.safetensors" if privileged else None,
            mask=mask,
            rejected=tuple(map(latents_of, example.rejected)),
        )

    also = tuple(captioned(caption) for caption in example.also)
    return replace(
        captioned(example.caption),
        example=example,
        also=also,
        unconditional=captioned("") if unconditional else None,
    )


def _rejected_files(rows: Sequence[Row]) -> dict[Path, Row]:
    """For each file of rejected latents, a row whose image is the rejected one."""
    return {
        file: replace(row, example=replace(row.example, path=image))
        for row in rows
        for file, image in zip(row.rejected, row.example.rejected, strict=True)
    }


def _key(*parts: object) -> str:
    # JSON, so that no two lists of parts run together into one string
    return hashlib.sha256(json.dumps([LAYOUT, *parts]).encode()).hexdigest()


def _crop(row: Row) -> Image.Image:
    return cover_crop(open_image(row.example.path), row.size)


def _context_tensors(contexts: Context) -> Iterator[Mapping[str, Tensor]]:
    """Each context of a batch as named tensors without padding."""
    for row in map(contexts.row, range(len(contexts))):
        extras = {EXTRA + name: tensor[0] for name, tensor in row.extras.items()}
        yield {"tokens": row.tokens[0], **extras}


def _is_usable(path: Path, kind: str) -> bool:
    """Whether the file exists and is whole: its header names the kind and fits its length."""
    if not path.exists():
        return False
    try:
        if read_metadata(path).get("kind") == kind:
            return True
        reason = f"{path} does not hold {kind}."
    except ValueError as error:
        reason = str(error)
    log.warning("A cached file is made again: %s", reason)
    return False


def _batches_of_one_size(
    files: Mapping[Path, Row], batch_size: int
) -> Iterator[list[tuple[Path, Row]]]:
    """Small batches of rows whose images, and whose references, have the same sizes."""
    groups: dict[tuple[Size, ...], list[tuple[Path, Row]]] = {}
    for path, row in files.items():
        groups.setdefault((row.size, *map(image_size, row.example.references)), []).append(
            (path, row)
        )
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _write(batch: Sequence[tuple[Path, Row]], kind: str, encode: Encode) -> None:
    with torch.no_grad():
        encoded = list(encode([row for _, row in batch]))
    for (path, row), tensors in zip(batch, encoded, strict=True):
        # a VAE in float16 overflows on some images; cached, that NaN would only show up in training
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"the {kind} of {row.example.path} are not finite: use bfloat16 or float32 for the "
                "encoder."
            )
        write_tensors(path, tensors, {"kind": kind})
