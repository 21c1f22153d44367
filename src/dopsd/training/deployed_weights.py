"""Training on other weights than those that users deploy: a many-step model, or the model with a
training adapter merged in.

The network holds the weights that train. The deployed weights stay in main memory and are put in
place where a run shows what its users will get.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from dopsd.diffusion.components import Denoiser
from dopsd.methods.base import Roles
from dopsd.training.roles import Teacher, velocity_under
from dopsd.training.trainable import Student


def copy_in_main_memory(network: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's parameters on the CPU, by name."""
    return {name: p.detach().to("cpu", copy=True) for name, p in network.named_parameters()}


def as_deployed(
    roles: Roles,
    denoiser: Denoiser,
    student: Student,
    teacher: Teacher,
    deployed: Mapping[str, Tensor],
) -> Roles:
    """The roles with deployed weights under the adapters.

    deployed: tensors by the names that they have in a network without adapters. Parameters that are
    not among them keep the network's own values.
    """
    names = {
        name.replace(".base_layer.", "."): name for name, _ in denoiser.network.named_parameters()
    }
    weights = {names[name]: tensor for name, tensor in deployed.items()}
    return replace(
        roles,
        student=velocity_under(denoiser, {**weights, **student.weights}),
        teacher=velocity_under(denoiser, {**weights, **teacher.tensors}),
        base=velocity_under(denoiser, {**weights, **student.base}),
    )
