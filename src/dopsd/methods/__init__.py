"""Registry of the training methods, and which of them a model family can run."""

from typing import Annotated

from pydantic import Field

from dopsd.methods.base import Loss, Method, Objective, Roles, ToGenerate
from dopsd.methods.dopsd import DOPSD
from dopsd.methods.dpo import DPO
from dopsd.methods.dreambooth import DreamBooth
from dopsd.methods.pso import PSO
from dopsd.methods.pso_online import PSOOnline
from dopsd.methods.retention import Retention, WithRetention
from dopsd.methods.sft import SFT

METHODS: dict[str, type[Method]] = {
    "dopsd": DOPSD,
    "sft": SFT,
    "dreambooth": DreamBooth,
    "pso": PSO,
    "pso_online": PSOOnline,
    "dpo": DPO,
}
AnyMethod = Annotated[DOPSD | SFT | DreamBooth | PSO | PSOOnline | DPO, Field(discriminator="name")]

__all__ = [
    "DOPSD",
    "DPO",
    "METHODS",
    "PSO",
    "SFT",
    "AnyMethod",
    "DreamBooth",
    "Loss",
    "Method",
    "Objective",
    "PSOOnline",
    "Retention",
    "Roles",
    "ToGenerate",
    "WithRetention",
    "missing",
]


def missing(method: Method | type[Method], teacher_contexts: tuple[str, ...]) -> str | None:
    """Why a family with these teacher contexts cannot run the method; None where it can. A class
    stands for its default settings."""
    settings = method if isinstance(method, Method) else method.model_construct()
    if "privileged" in settings.needs and not teacher_contexts:
        return "its text encoders read no image, so there is no teacher that sees the target"
    return None
