"""The methods by name, and which of them a family can run."""

from typing import Annotated

from pydantic import Field

from dopsd.methods.base import Loss, Method, Roles
from dopsd.methods.dopsd import DOPSD
from dopsd.methods.sft import SFT

METHODS: dict[str, type[Method]] = {"dopsd": DOPSD, "sft": SFT}
AnyMethod = Annotated[DOPSD | SFT, Field(discriminator="name")]

__all__ = ["DOPSD", "METHODS", "SFT", "AnyMethod", "Loss", "Method", "Roles", "missing"]


def missing(method: type[Method], teacher_contexts: tuple[str, ...]) -> str | None:
    """Why a family with these teacher contexts cannot run the method; None where it can."""
    if "privileged" in method.needs and not teacher_contexts:
        return "its encoders read no picture, so there is no teacher that sees the target"
    return None
