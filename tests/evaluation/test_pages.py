"""The page of a comparison, read back as a browser would."""

from pathlib import Path

import numpy as np
from html_page import Page, read_page
from PIL import Image

from dopsd.evaluation.pages import SAME_NOISE, Panel, write_comparison

TABLE = [["base", "0.9", "-"], ["dopsd", "0.1 [0.0, 0.2]", "60"]]
HEADER = ["model", "error", "s"]


def noise_image(seed: int, side: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def page_with(folder: Path, panels: list[Panel], **options) -> Page:
    path = folder / "page" / "compare.html"
    return read_page(
        write_comparison(path, "A & B", "Same data.", HEADER, TABLE, panels, **options)
    )


def test_a_comparison_opens_with_its_verdict_and_defines_its_columns_below_the_table(tmp_path):
    page = page_with(
        tmp_path,
        [],
        notes=["One seed."],
        verdict="dopsd <b>wins</b> by 0.8.",
        definitions={"error": "distance to the target", "s": "seconds of training"},
    )
    parts = [
        "A & B",
        "dopsd <b>wins</b> by 0.8.",
        "Same data.",
        "Metrics",
        "0.1 [0.0, 0.2]",
        "distance to the target",
        "seconds of training",
        "One seed.",
    ]
    places = [page.text.rindex(part) for part in parts]
    assert places == sorted(places)


def test_every_cell_names_its_column_for_narrow_screens(tmp_path):
    cells = page_with(tmp_path, []).all("td")
    assert [cell["data-name"] for cell in cells] == ["error", "s"] * 2


def test_images_of_one_column_stand_together_under_its_caption(tmp_path):
    images = [noise_image(seed) for seed in range(5)]
    panels = [
        Panel("New <scenes>", ("left", "right"), (("base", images[:2]), ("dopsd", images[2:4]))),
        Panel("Unrelated", ("one", "two"), (("base", images[4:]),)),
    ]
    page = page_with(tmp_path, panels)
    assert [image["alt"] for image in page.all("img")] == [
        "New <scenes>: base: left",
        "New <scenes>: dopsd: left",
        "New <scenes>: base: right",
        "New <scenes>: dopsd: right",
        "Unrelated: base: one",
    ]
    order = [images[index].tobytes() for index in (0, 2, 1, 3, 4)]
    assert [image.tobytes() for image in page.images()] == order
    assert SAME_NOISE in page.text


def test_a_comparison_without_images_has_no_section_for_them(tmp_path):
    page = page_with(tmp_path, [])
    assert SAME_NOISE not in page.text and page.all("figure") == []


def test_large_images_are_embedded_as_smaller_copies(tmp_path):
    page = page_with(tmp_path, [Panel("Large", ("one",), (("base", (noise_image(0, 1024),)),))])
    assert [(image.format, image.size) for image in page.images()] == [("JPEG", (640, 640))]
