"""The image of the README, from a finished `dopsd demo`.

    dopsd demo                                # writes runs/demo
    python benchmarks/readme_image.py         # writes docs/assets/demo.png

Columns are the first of the benchmark's unseen scenes and of its unrelated prompts, in its own
order: nothing is picked by hand. Prompts and noise are those of the measurement, so these are
images that the table counts.
"""

import textwrap
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from dopsd import load_family, sample
from dopsd.images import to_pil
from dopsd.pocket.benchmark import NOISE_SEED, ConceptQuestions, render_scenes
from dopsd.pocket.demo import ARMS, NAMES
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import concept_of

SCENES, UNRELATED = 4, 2
# Pixels: an image, between images, row labels, column labels
SIDE, GAP, LABEL, HEADER = 128, 6, 92, 62
SECTION = 18  # pixels between the two groups of columns
ROWS = {NAMES["base"]: None} | {NAMES[arm]: arm for arm in ARMS}
TITLES = ("The new thing in new scenes", "Unrelated prompts")
MOST_BYTES = 200_000


def main(
    demo: Annotated[Path, typer.Argument(help="Folder of a finished demo.")] = Path("runs/demo"),
    file: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path(
        "docs/assets/demo.png"
    ),
) -> None:
    """Generate the images with each LoRA file of the demo and lay them out with labels."""
    concept = concept_of(demo / "images")
    if concept is None:
        raise typer.BadParameter(f"{demo} holds no finished demo: run `dopsd demo` first.")
    text_encoder = load_family("pocket").load_text_encoder(
        torch.device("cpu"), torch.float32, images=False
    )
    questions = ConceptQuestions.encode(concept.seed, text_encoder)
    scenes = [concept.caption(scene, concept.name) for scene in questions.scenes[:SCENES]]
    unrelated = [caption_of(stated) for stated in questions.stated[:UNRELATED]]

    rows: dict[str, list[Image.Image]] = {
        "how it\nshould look": to_pil(render_scenes(questions.scenes[:SCENES]))
    }
    for name, run in ROWS.items():
        lora = demo / run / f"{run}.safetensors" if run else None
        label = name.replace(" + ", " +\n")
        rows[label] = sample("pocket", scenes, lora, seed=NOISE_SEED)
        rows[label] += sample("pocket", unrelated, lora, seed=NOISE_SEED + len(questions.scenes))

    file.parent.mkdir(parents=True, exist_ok=True)
    lay_out(rows, [*scenes, *unrelated]).save(file, optimize=True)
    size = file.stat().st_size
    assert size <= MOST_BYTES, f"{file} has {size} bytes, more than {MOST_BYTES}"
    print(file, size, "bytes")


def lay_out(rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """One labelled grid; rows may be shorter than the list of prompts."""
    lefts = [
        LABEL + k * (SIDE + GAP) + (SECTION if k >= SCENES else 0) for k in range(len(prompts))
    ]
    size = (lefts[-1] + SIDE + GAP, HEADER + len(rows) * (SIDE + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    title, small = ImageFont.load_default(15), ImageFont.load_default(12)

    for text, column in zip(TITLES, (0, SCENES), strict=True):
        draw.text((lefts[column], 4), text, "black", title)
    for left, prompt in zip(lefts, prompts, strict=True):
        draw.multiline_text((left, 27), textwrap.fill(prompt, 21), "#444444", small, spacing=2)
    for row, (label, images) in enumerate(rows.items()):
        top = HEADER + row * (SIDE + GAP)
        draw.multiline_text((6, top + SIDE // 2 - 10), label, "black", title)
        for left, image in zip(lefts, images, strict=False):
            canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
    return canvas


if __name__ == "__main__":
    typer.run(main)
