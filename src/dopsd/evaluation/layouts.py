"""Images in the layouts that the scorers of GenEval and DPG-Bench read. The scorers themselves are
not here."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from dopsd.data.prompts import EvaluationPrompt
from dopsd.evaluation.image_sets import ImageSet
from dopsd.files import atomic_path, write_jsonl
from dopsd.images import open_image


def geneval(image_set: ImageSet, questions: Sequence[EvaluationPrompt], folder: Path) -> None:
    """`00000/metadata.jsonl`, the prompt's own row, and `00000/samples/0000.png` ... , as the
    README of github.com/djghosh13/geneval asks for (its evaluation_metadata.jsonl is the prompts
    file)."""
    for row, question in enumerate(questions):
        place = folder / f"{row:05}"
        write_jsonl(place / "metadata.jsonl", [question.row])
        for image in (p for p in image_set.images if p.row == row):
            with atomic_path(place / "samples" / f"{image.seed:04}.png") as temporary:
                shutil.copyfile(image.path, temporary)


def dpg(image_set: ImageSet, questions: Sequence[EvaluationPrompt], folder: Path) -> None:
    """`<name of the prompt>.png`: four images as two rows of two, read from left to right, as
    dpg_bench/ compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA cuts it (--resolution: one
    image's side, --pic-num 4)."""
    for row, question in enumerate(questions):
        images = [open_image(p.path) for p in image_set.images if p.row == row][:4]
        if len(images) < 4 or images[0].width != images[0].height:
            raise ValueError(
                "DPG-Bench wants four square pictures a prompt: set --seeds 4, and equal sides."
            )
        side = images[0].width
        sheet = Image.new("RGB", (2 * side, 2 * side))
        for place, image in enumerate(images):
            sheet.paste(image, (place % 2 * side, place // 2 * side))
        with atomic_path(folder / f"{question.name}.png") as temporary:
            sheet.save(temporary, format="PNG")


LAYOUTS: Mapping[str, Callable[[ImageSet, Sequence[EvaluationPrompt], Path], None]] = {
    "geneval": geneval,
    "dpg": dpg,
}
