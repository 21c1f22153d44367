"""Write the results pages of docs/ from the JSON files in benchmarks/results; nothing is measured.

python benchmarks/write_pages.py
"""

from pathlib import Path

import cost_page
import health
import results_page

from dopsd.files import write_text

DOCS = Path(__file__).parents[1] / "docs"


def pages() -> dict[str, str]:
    """The pages by file name."""
    return {
        "results.md": results_page.page(),
        "model_and_cost.md": cost_page.page(),
        "health_measured.md": health.page(),
    }


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        write_text(DOCS / name, text)
        print(DOCS / name)


if __name__ == "__main__":
    main()
