"""The pocket world: images that can be read, and a small few-step model of them on which methods
are measured."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"  # the model that the name `pocket` stands for
