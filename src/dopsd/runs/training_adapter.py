"""De-distillation adapter: a LoRA that absorbs the damage that SFT does to a few-step model.

It is trained by SFT on images that the model generated in its own few steps. Their content is known
to the model, so the LoRA learns only what SFT changes in any case: to predict means, as a many-step
model does. While another LoRA is trained, the adapter is merged into the weights; afterwards it is
left out (`model.training_adapter`), and with it most of the damage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.data.buckets import bucket_sizes
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
    """Generate `images` images of each prompt with the model, unless they exist, and return the
    recipe that trains on them.

    changes: keys of the recipe, among them `run_name`, with sections as mappings. All other keys
    are those that the model family recommends for SFT.
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
    recipe = parse_recipe(tree, "the adapter")
    side = max(recipe.data.resolution, default=family.resolution)
    square = bucket_sizes(side, family.multiple)[0]
    kinds = [(prompt, square) for prompt in dict.fromkeys(prompts)]
    generated = generate_once(recipe, family, kinds, images, progress)
    folder = next(iter(generated.values()))[0].parent
    return parse_recipe(tree | {"data": {**tree["data"], "folder": str(folder)}}, "the adapter")


def default_name(model: str) -> str:
    """The run name of an adapter for a model."""
    return f"{Path(model).name}-dedistill"
