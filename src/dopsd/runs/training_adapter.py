"""A de-distill adapter: a LoRA that has already learned what plain fine-tuning does to a few-step
model.

It is trained by SFT on images that the model generated itself, at its own few steps: there is
nothing to learn from them but to predict means. Merged into the weights while another LoRA is
trained and left out afterwards (`model.training_adapter`), it spares that LoRA the damage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.methods import SFT
from dopsd.runs.class_images import Progress, generate_once
from dopsd.runs.resolve import open_family


def adapter_recipe(
    model: str,
    prompts: Sequence[str],
    images: int,
    changes: dict[str, Any],
    progress: Progress | None = None,
) -> Recipe:
    """Generate `images` of each prompt with the model, unless they are there, and return the recipe
    that trains on them.

    changes: keys of the recipe, `run_name` among them, sections as mappings; all other keys are
    those that the model recommends for SFT.
    """
    tree: dict[str, Any] = {
        "model": {"name_or_path": model},
        "data": {"folder": "."},
        "method": {"name": "sft"},
    }
    family = open_family(parse_recipe(tree | {"run_name": "adapter"}, "the adapter"))
    for place, value in family.starting_points(SFT()).items():
        section, _, key = place.partition(".")
        tree.setdefault(section, {})[key] = value
    for section, value in changes.items():
        tree[section] = {**tree.get(section, {}), **value} if isinstance(value, dict) else value
    generated = generate_once(
        parse_recipe(tree, "the adapter"), family, list(dict.fromkeys(prompts)), images, progress
    )
    folder = next(iter(generated.values()))[0].parent
    return parse_recipe(tree | {"data": {**tree["data"], "folder": str(folder)}}, "the adapter")


def default_name(model: str) -> str:
    """The run name of an adapter for a model."""
    return f"{Path(model).name}-dedistill"
