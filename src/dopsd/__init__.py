"""Tune few-step text-to-image models without losing the few steps.

from dopsd import Recipe, load_recipe, train, sample, load_family
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dopsd.config.recipe import Recipe, load_recipe
    from dopsd.models import load_family
    from dopsd.models.pipeline import sample
    from dopsd.runs.train import train

__version__ = "0.1.0"
__all__ = ["Recipe", "load_family", "load_recipe", "sample", "train"]

_HOMES = {
    "load_family": "dopsd.models",
    "Recipe": "dopsd.config.recipe",
    "load_recipe": "dopsd.config.recipe",
    "sample": "dopsd.models.pipeline",
    "train": "dopsd.runs.train",
}


def __getattr__(name: str) -> Any:
    """Import the public words when first used: `dopsd --help` must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dopsd' has no attribute {name!r}")
