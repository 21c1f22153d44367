"""The pages of a run and of a comparison, made from real small files and read back as a browser
would."""

import base64
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.evaluation.pages import Panel, write_comparison
from dopsd.evaluation.plots import POINTS
from dopsd.pocket.world.scenes import draw_scene, render
from dopsd.runs.outputs.report import write_report

PROMPTS = ["a small red circle on night", 'a toy <script>alert(1)</script> & "more" at the left']
VOID = {"meta", "img", "br", "hr", "link", "input"}
FOLDER = "/home/someone/secret/pictures"


@dataclass
class Page(HTMLParser):
    """A parsed page. Fails on a tag that is closed out of order; `open` must be empty in the end."""

    text: str = field(repr=False)
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list, repr=False)
    words: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        sources = [image["src"].partition(";base64,")[2] for image in self.all("img")]
        return [
            Image.open(io.BytesIO(base64.b64decode(source, validate=True))) for source in sources
        ]


def page_of(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "some tags are never closed"
    return page


def scene(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(render(draw_scene(np.random.default_rng(seed)))).resize((side, side))


def write_preview(
    run: Path, step: int, side: int = 64, roles: tuple[str, ...] = ("base", "teacher", "student")
) -> None:
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for row, role in enumerate(roles):
        for index in range(len(PROMPTS)):
            scene(step + 10 * row + index, side).save(folder / f"{role}_{index}_{7 + index}.png")
    sigmas = [1.0, 0.7, 0.30000001192092896, 0.0]
    images = [
        {"prompt": prompt, "seed": 7 + index, "sigmas": sigmas}
        for index, prompt in enumerate(PROMPTS)
    ]
    said = {"rows": roles, "images": images}
    (folder / "preview.json").write_text(json.dumps(said), encoding="utf-8")


def write_metrics(run: Path, steps: int) -> None:
    rows = [
        {
            "step": step,
            "loss": 1 / step,
            "loss_at_0": 2 / step,
            "loss_at_1": 0.5 / step,
            "grad_norm": 0.1 * step,
            "learning_rate": 1e-4,
            "images": 4,
            "seconds": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture()
def bare_run(tmp_path: Path) -> Path:
    """A recipe and one step, nothing else."""
    run = tmp_path / "zib"
    run.mkdir()
    config = f"model:\n  name_or_path: pocket\ndata:\n  folder: {FOLDER}\nmethod:\n  name: dopsd\nrun_name: zib\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    write_metrics(run, 1)
    return run


@pytest.fixture()
def run(bare_run: Path) -> Path:
    """A finished run of 30 steps with three previews."""
    write_metrics(bare_run, 30)
    for step in (0, 15, 30):
        write_preview(bare_run, step)
    refused = [["broken.png", f"{FOLDER}/broken.png cannot be decoded."]]
    environment = {
        "torch": "2.13",
        "device": "cpu (2)",
        "licence_of_base": "Apache-2.0",
        "images": 4,
    }
    for index in range(2):
        scene(70 + index).save(bare_run / "samples" / f"data-{index}.png")
    environment["data"] = {
        "images": 4,
        "source": ".txt files",
        "buckets": {"64 x 64": 4},
        "sha256": "0" * 64,
        "examples": ["a zib at the left", "a big zib"],
    }
    (bare_run / "env.json").write_text(
        json.dumps(environment | {"refused": refused}), encoding="utf-8"
    )
    return bare_run


def points_of(page: Page) -> list[int]:
    return [len(line["points"].split()) for line in page.all("polyline")]


def test_report_shows_the_preview_pictures_pixel_for_pixel(run: Path):
    shown = {image.tobytes() for image in page_of(write_report(run)).images()}
    samples = run / "samples"
    files = {*samples.glob("step-0000[03]0/*.png"), *samples.glob("*/student_*.png")}
    assert len(files) == 14
    assert all(Image.open(file).convert("RGB").tobytes() in shown for file in files)


def test_before_and_after_stand_under_their_prompt_and_seed(run: Path):
    page = page_of(write_report(run))
    alts = [image["alt"] for image in page.all("img")]
    assert alts[:3] == [
        f"{PROMPTS[0]} (seed 7): before, step 0, {role}" for role in ("base", "student", "teacher")
    ]
    assert alts[3] == f"{PROMPTS[0]} (seed 7): after, step 30, base"
    assert (
        page.images()[4].tobytes() == scene(30 + 20).tobytes()
    )  # the student's, third in preview.json's rows


def test_prompts_are_escaped(run: Path):
    page = page_of(write_report(run))
    assert page.all("script") == []
    assert PROMPTS[1] in page.words


def test_report_needs_no_network_and_names_no_folder_of_the_machine(run: Path):
    text = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<link|<script", text)
    assert "someone" not in text and str(run.parent) not in text
    assert "folder: …/pictures" in text and ">broken.png cannot be decoded." in text


def test_a_recipe_without_absolute_folders_is_shown_as_it_is(run: Path):
    config = (
        (run / "config.yaml")
        .read_text(encoding="utf-8")
        .replace(FOLDER, "pictures  # four of them")
    )
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert config in page_of(write_report(run)).words


def test_headline_adds_up_the_metrics(run: Path):
    text = write_report(run).read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts == {
        "method": "dopsd",
        "base model": "pocket",
        "licence of the base": "Apache-2.0",
        "steps": "30",
        "images": "4",
        "pictures seen, with repeats": "120",
        "training time": "15 s",
        "a step (median)": "0.5 s",
        "device": "cpu (2)",
    }


def test_report_tells_the_walk_of_the_sampler(run: Path):
    words = page_of(write_report(run)).words
    assert (
        "3 forwards of the network for a picture, at these shares of noise: 1 → 0.7 → 0.3 → 0."
        in words
    )


def test_curves_have_a_point_for_each_step(run: Path):
    page = page_of(write_report(run))
    assert len(page.all("svg")) == 3
    assert (
        points_of(page) == [30] * 6
    )  # loss and gradient norm: measured and smoothed; two steps of the walk


def test_a_curve_of_a_long_run_is_thinned_and_says_so(run: Path):
    write_metrics(run, 2 * POINTS + 1)
    page = page_of(write_report(run))
    assert set(points_of(page)) == {(2 * POINTS + 1 + 2) // 3}
    assert "Each point is the mean of 3 steps." in page.words


def test_curves_stay_inside_their_drawing(run: Path):
    page = page_of(write_report(run))
    places = [place.split(",") for line in page.all("polyline") for place in line["points"].split()]
    assert all(0 <= float(x) <= 480 and 0 <= float(y) <= 190 for x, y in places)


def test_one_step_and_no_pictures_make_a_report(bare_run: Path):
    page = page_of(write_report(bare_run))
    assert page.all("img") == [] and page.all("polyline") == []
    assert len(page.all("circle")) == 6
    assert "Before and after" not in page.words and "Refused" not in page.words


def test_an_unfinished_preview_is_passed_over(run: Path):
    (run / "samples" / "step-000030" / "preview.json").unlink()
    (run / "samples" / "step-000015" / "teacher_1_8.png").unlink()
    page = page_of(write_report(run))
    assert len(page.all("img")) == 6 + 2  # of the first preview, and of the data
    assert "before, step 0" in page.words and "after, step" not in page.words


def test_a_method_without_teacher_has_no_teacher_column(bare_run: Path):
    write_preview(bare_run, 0, roles=("base", "student"))
    page = page_of(write_report(bare_run))
    assert len(page.all("img")) == 4 and "teacher" not in page.words


def test_large_pictures_are_smaller_copies(bare_run: Path):
    write_preview(bare_run, 0, side=1024)
    images = page_of(write_report(bare_run)).images()
    assert {(image.format, image.size) for image in images} == {("JPEG", (640, 640))}


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_folder_that_is_no_run_is_refused(run: Path, name: str):
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_recipe_that_is_none_is_refused(run: Path):
    (run / "config.yaml").write_text("- just: [a", encoding="utf-8")
    with pytest.raises(ValueError, match="not the recipe of a run"):
        write_report(run)


def test_a_row_that_was_cut_is_left_out(run: Path):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 31, "lo')
    assert points_of(page_of(write_report(run))) == [30] * 6


def test_comparison_shows_its_table_pictures_and_notes(tmp_path: Path):
    images = tuple(scene(seed) for seed in range(6))
    panels = [
        Panel("New <scenes>", ("left", "right"), (("base", images[:2]), ("dopsd", images[2:4]))),
        Panel("Unrelated", ("one", "two"), (("base", images[4:]),)),
    ]
    table = [["base", "0.9", "-"], ["dopsd", "0.1 [0.0, 0.2]", "60"]]
    path = write_comparison(
        tmp_path / "page" / "compare.html",
        "A & B",
        "Same data.",
        ["model", "error", "s"],
        table,
        panels,
        ["One seed."],
    )
    page = page_of(path)
    assert [image.tobytes() for image in page.images()] == [image.tobytes() for image in images]
    assert len(page.all("tr")) == (1 + 2) + (1 + 2) + (1 + 1)
    assert all(cell in page.words for row in table for cell in row)
    assert all(
        words in page.words for words in ("A & B", "Same data.", "New <scenes>", "One seed.")
    )


def test_comparison_without_pictures_has_no_place_for_them(tmp_path: Path):
    page = page_of(
        write_comparison(tmp_path / "compare.html", "A", "B", ["model", "s"], [["base", "1"]], [])
    )
    assert "In a column" not in page.words and page.all("figure") == []
