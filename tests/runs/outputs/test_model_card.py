"""The model card, parsed by the hub's own reader and rendered by a CommonMark parser."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.outputs.model_card import write_card

HOSTILE = (
    'a | b\n\n# heading\n<script>alert("1")</script>',
    "![](https://example.com/track.png) [here](javascript:alert(1)) `code` **bold** &amp; $x$",
    "```\n---\n<img src=x onerror=alert(1)> | \\| www.example.com someone@example.com",
)
METADATA = {
    "base_model": "a_b",
    "dopsd_version": "0",
    "nfe": "4",
    "method_settings": '{"a_b": "|"}',
}


def write_preview(recipe: Recipe, prompts: tuple[str, ...]) -> None:
    folder = recipe.run_folder / "samples" / "step-000003"
    folder.mkdir(parents=True)
    images = [
        {"prompt": prompt, "seed": 5 + index, "references": []}
        for index, prompt in enumerate(prompts)
    ]
    text = json.dumps({"rows": ["base", "student"], "images": images})
    (folder / "preview.json").write_text(text, encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket"},
            "data": {"folder": "images", "trigger": "zib\n# <b>x</b>"},
            "method": {"name": "sft"},
            "output_dir": str(tmp_path),
            "run_name": "a_run_name",
        }
    )


def rendered(text: str) -> list[Token]:
    """Every token of the card's body, those inside paragraphs and cells included."""
    body = text.split("\n---\n", 1)[1]
    blocks = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def test_hostile_captions_are_shown_as_text_and_nothing_else(recipe, pocket):
    write_preview(recipe, HOSTILE)
    write_card(recipe, pocket, METADATA, 3)
    text = (recipe.run_folder / "README.md").read_text(encoding="utf-8")
    tokens = rendered(text)
    assert not [token.type for token in tokens if token.type.startswith(("html", "link", "em_"))]
    sources = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert sources == [
        f"samples/step-000003/{role}_{index}_{5 + index}.png"
        for index in range(len(HOSTILE))
        for role in ("base", "student")
    ]
    shown = ["".join(t.content for t in token.children or ()) for token in tokens]
    assert all(" ".join(prompt.split()) in shown for prompt in HOSTILE)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2"]
    assert '{"a_b": "|"}' in shown and "Its trigger is zib # <b>x</b>." in "".join(shown)
    assert not any(text.count(link, text.index("\n# ")) > 1 for link in ("://example", "www.ex"))


def test_the_header_of_a_card_with_hostile_captions_is_read_by_the_hub(recipe, pocket):
    write_preview(recipe, HOSTILE)
    write_card(recipe, pocket, METADATA, 3)
    card = ModelCard((recipe.run_folder / "README.md").read_text(encoding="utf-8"))
    widget = card.data.to_dict()["widget"]
    assert [each["text"] for each in widget] == list(HOSTILE)
    assert card.data.instance_prompt == recipe.data.trigger
    assert card.data.license == "apache-2.0" and "license_name" not in card.data.to_dict()


def test_a_licence_unknown_to_the_hub_is_other_with_its_name_as_an_identifier(
    recipe, pocket, monkeypatch
):
    write_preview(recipe, ("a toy",))
    monkeypatch.setattr(pocket, "hub_licence", "other", raising=False)
    monkeypatch.setattr(pocket, "licence", "Stability AI Community License", raising=False)
    write_card(recipe, pocket, METADATA, 3)
    header = ModelCard((recipe.run_folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
    assert header["license"] == "other"
    assert header["license_name"] == "stability-ai-community-license"


def test_the_code_of_a_card_is_python(recipe, pocket):
    write_preview(recipe, HOSTILE)
    write_card(recipe, pocket, METADATA, 3)
    text = (recipe.run_folder / "README.md").read_text(encoding="utf-8")
    (code,) = [token.content for token in rendered(text) if token.type == "fence"]
    compile(code, "README.md", "exec")
    assert 'from_pretrained("path/to/a_b"' in code
    assert 'load_lora_weights(".", weight_name="a_run_name.safetensors")' in code
