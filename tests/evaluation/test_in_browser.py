"""The pages in a headless browser, offline: at the width of a desk and of a phone, and printed."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.config.recipe import parse_recipe
from dopsd.evaluation.pages import Panel, write_comparison
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.train import train

BROWSERS = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
BROWSER = next(BROWSERS, "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")

# Headless Chromium has a least window width of about 500 pixels; a frame has none.
FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:20000px"></iframe></body></html>"""
MEASURE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => {
    const box = image.getBoundingClientRect();
    return [image.naturalWidth, box.width, box.left, box.right];
  });
  const scrolling = [...document.querySelectorAll("*")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline")
    .map(e => e.tagName + "." + e.className);
  const entries = performance.getEntriesByType("resource");
  const fetched = entries.filter(e => !e.name.startsWith("data:")).map(e => e.name);
  const width = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify({images, scrolling, fetched, width}), "*");
})</script>"""
RECEIVE = '<script>addEventListener("message", e => document.title = e.data)</script>'


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two steps, with previews, health and data."""
    folder = tmp_path_factory.mktemp("report")
    write_concept(folder / "concept", 1_000_100)
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(folder / "concept")},
            "method": {"name": "dopsd", "nfe": 2},
            "lora": {"rank": 2},
            "train": {"max_steps": 2},
            "sample": {"every": 1},
            "output_dir": str(folder),
            "run_name": "a_long_name_without_any_place_to_break_it_into_two_lines",
        }
    )
    for _ in train(recipe):
        pass
    return recipe.run_folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models with eight metrics, and eight prompts: wider than any screen in one table."""
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    models = [f"model-{index}" for index in range(4)]
    header = ["model", *(f"metric_{index}" for index in range(8))]
    table = [[model, *(["0.123 +0.045±0.006"] * 8)] for model in models]
    captions = tuple(f"a prompt of some words, number {index}" for index in range(8))
    panel = Panel("Prompts", captions, tuple((model, (image,) * 8) for model in models))
    path = tmp_path_factory.mktemp("comparison") / "compare.html"
    definitions = {name: "what it is" for name in header[1:]}
    return write_comparison(
        path, "Comparison", "", header, table, [panel], ["A note."], "A verdict.", definitions
    )


def browse(folder: Path, page: Path, *options: str) -> str:
    """Chromium's standard output."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return done.stdout


def measure(folder: Path, page: Path, width: int) -> dict:
    measured, frame = folder / "measured.html", folder / "frame.html"
    html = page.read_text(encoding="utf-8")
    measured.write_text(html.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame.write_text(
        FRAME.format(page=measured.name, width=width).replace("<iframe", RECEIVE + "<iframe"),
        encoding="utf-8",
    )
    dom = browse(folder, frame, f"--window-size={width},900", "--dump-dom")
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("page", "images"), [("report", 6 * 6 + 3), ("comparison", 4 * 8)])
def test_every_image_is_visible_nothing_scrolls_sideways_and_nothing_is_fetched(
    request, tmp_path, page, images, width
):
    measured = measure(tmp_path, request.getfixturevalue(page), width)
    assert len(measured["images"]) == images
    for natural, shown, left, right in measured["images"]:
        assert natural == 64 and shown >= 100 and left >= 0 and right <= width
    assert measured["width"] <= width and measured["fetched"] == []
    assert measured["scrolling"] == []


@pytest.mark.parametrize("page", ["report", "comparison"])
def test_a_page_prints_with_its_images(request, tmp_path, page):
    options = (f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    browse(tmp_path, request.getfixturevalue(page), *options)
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Subtype\s*/Image", pdf)) >= 1
