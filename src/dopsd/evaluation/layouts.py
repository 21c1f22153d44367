"""Image sets in the folder layouts that the scorers of GenEval and DPG-Bench read."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from dopsd.data.prompts import EvaluationPrompt
from dopsd.evaluation.image_sets import ImageSet
from dopsd.files import atomic_path, write_jsonl
from dopsd.images import open_image


def geneval(image_set: ImageSet, questions: Sequence[EvaluationPrompt], folder: Path) -> None:
    """Write `<row>/metadata.jsonl`, the prompt's own row, and `<row>/samples/<seed>.png`: the
    layout of github.com/djghosh13/geneval, whose evaluation_metadata.jsonl is the prompts file."""
    for row, question in enumerate(questions):
        place = folder / f"{row:05}"
        write_jsonl(place / "metadata.jsonl", [question.row])
        for image in (p for p in image_set.images if p.row == row):
            with atomic_path(place / "samples" / f"{image.seed:04}.png") as temporary:
                shutil.copyfile(image.path, temporary)


def dpg(image_set: ImageSet, questions: Sequence[EvaluationPrompt], folder: Path) -> None:
    """Write `<name of the prompt>.png`, four images as a 2 x 2 grid, row by row: what
    dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA reads with --pic-num 4 and the
    side of one image as --resolution. Raises ValueError for fewer, or for images that are not
    square."""
    for row, question in enumerate(questions):
        images = [open_image(p.path) for p in image_set.images if p.row == row][:4]
        if len(images) < 4 or images[0].width != images[0].height:
            raise ValueError(
                "DPG-Bench needs four square images a prompt: set --seeds 4, and equal sides."
            )
        side = images[0].width
        grid = Image.new("RGB", (2 * side, 2 * side))
        for place, image in enumerate(images):
            grid.paste(image, (place % 2 * side, place // 2 * side))
        with atomic_path(folder / f"{question.name}.png") as temporary:
            grid.save(temporary, format="PNG")


LAYOUTS: Mapping[str, Callable[[ImageSet, Sequence[EvaluationPrompt], Path], None]] = {
    "geneval": geneval,
    "dpg": dpg,
}
