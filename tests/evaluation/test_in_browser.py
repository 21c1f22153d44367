"""The report of a real run in a headless browser: offline, at a desk's and a phone's width, and
printed."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from dopsd.config.recipe import parse_recipe
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.train import train

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    "",
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")

LOOK = """<script>addEventListener("load", () => {
  const seen = [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]);
  const wide = document.documentElement.scrollWidth - innerWidth;
  const fetched = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name);
  document.title = JSON.stringify({seen, wide, fetched});
})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two steps, with previews, health and data."""
    folder = tmp_path_factory.mktemp("browser")
    write_concept(folder / "lesson", 1_000_100)
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(folder / "lesson")},
            "method": {"name": "dopsd", "nfe": 2},
            "lora": {"rank": 2},
            "train": {"max_steps": 2},
            "sample": {"every": 1},
            "output_dir": str(folder),
            "run_name": "shown",
        }
    )
    for _ in train(recipe):
        pass
    return recipe.run_folder / "report.html"


def browse(tmp_path: Path, page: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("width", [1300, 500])
def test_every_picture_is_visible_nothing_overflows_and_nothing_is_fetched(page, tmp_path, width):
    looked = tmp_path / "looked.html"
    looked.write_text(
        page.read_text(encoding="utf-8").replace("</body>", LOOK + "</body>"), encoding="utf-8"
    )
    done = browse(tmp_path, looked, f"--window-size={width},900", "--dump-dom")
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert (
        len(found["seen"]) >= 6 * 6 + 3
    )  # six prompts before and after, in three roles; three images of the data
    assert all(natural == 64 and shown > 40 for natural, shown in found["seen"])
    assert found["wide"] <= 0 and found["fetched"] == []
    assert "CONSOLE" not in done.stderr


def test_it_prints(page, tmp_path):
    browse(tmp_path, page, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Subtype\s*/Image", pdf)) >= 6
