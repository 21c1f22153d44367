"""Training on other weights than the ones that are deployed: a many-step parent, or a LoRA merged
in meanwhile.

The network holds the weights that train; those that are deployed stay in main memory and are lent
where a run shows what its users will get.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from dopsd.diffusion.components import Denoiser
from dopsd.methods.base import Roles
from dopsd.training.roles import Teacher, velocity_under
from dopsd.training.trainable import Student


def kept(network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters in main memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in network.named_parameters()}


def as_deployed(
    roles: Roles,
    denoiser: Denoiser,
    student: Student,
    teacher: Teacher,
    deployed: Mapping[str, Tensor],
) -> Roles:
    """The roles with the deployed weights under the adapters. deployed: by the names that they have
    without adapters; whatever it lacks is the network's own."""
    names = {
        name.replace(".base_layer.", "."): name for name, _ in denoiser.network.named_parameters()
    }
    own = {names[name]: tensor for name, tensor in deployed.items()}
    return replace(
        roles,
        student=velocity_under(denoiser, {**own, **student.weights}),
        teacher=velocity_under(denoiser, {**own, **teacher.tensors}),
        base=velocity_under(denoiser, {**own, **student.base}),
    )
