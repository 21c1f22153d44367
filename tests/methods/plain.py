"""For the tests of methods: a small denoiser in float64, batches for it, and roles."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.flow import Schedule
from dopsd.methods import Method, Objective, Roles

TIMES = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)
SHAPE = (2, 4, 4)


class Plain(nn.Module):
    """Two linear layers over the flattened latents, the time and the mean context token."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(2 * 4 * 4 + 1 + 3, 24), nn.Linear(24, 2 * 4 * 4)
        self.double()

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        features = torch.cat([z.flatten(1), t[:, None].to(z), context.tokens.mean(1)], 1)
        return self.second(torch.tanh(self.first(features))).view_as(z)


def latents(seed: int, rows: int = 3) -> Tensor:
    return torch.randn(
        rows, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def context(seed: int, rows: int = 3) -> Context:
    tokens = torch.randn(
        rows, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return Context(tokens, (5,) * rows)


def batch(rows: int = 3, **parts) -> Batch:
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[:rows]
    return Batch(latents(1, rows), context(2, rows), ("a", "b", "c")[:rows], weight, **parts)


def pairs() -> Batch:
    """A batch with rejected images."""
    return batch(rejected=latents(4))


def redness(images: Tensor, prompts) -> Tensor:
    """A reward [B]: the mean of the first channel."""
    return images[:, 0].mean((1, 2)).float()


def roles(
    student, teacher=None, base=None, score=None, times: Tensor = TIMES, renoise=None
) -> Roles:
    """Roles of these velocities with a sampler at `times`, of Euler steps or with these shares of
    fresh noise."""
    schedule = Schedule(times, renoise or (0.0,) * (len(times) - 1))
    return Roles(student, teacher or student, base or student, lambda nfe, h, w: schedule, score)


@dataclass(frozen=True)
class Outcome:
    """Sums over the pieces of a batch: what they report, and their gradients by parameter."""

    log: dict[str, float]
    gradients: list[Tensor]
    pieces: int


def run(
    method: Objective, of_roles: Roles, of_batch: Batch, student: nn.Module, seed: int = 7
) -> Outcome:
    """Backward on each piece, as the optimizer loop does."""
    student.zero_grad()
    log: dict[str, float] = {}
    count = 0
    for piece in method.losses(of_roles, of_batch, torch.Generator().manual_seed(seed)):
        count += 1
        piece.surrogate.backward()
        for name, value in {**piece.log, **piece.counts}.items():
            log[name] = log.get(name, 0.0) + value.item()
    assert piece.last
    return Outcome(log, [p.grad.clone() for p in student.parameters()], count)


def run_pairs(method: Method, student, base, of_batch: Batch | None = None, seed: int = 7):
    """`run` on a batch of pairs with `redness` as reward."""
    of_roles = roles(student, base=base, score=redness)
    return run(method, of_roles, of_batch or pairs(), student, seed)


def same(
    left: list[Tensor], right: list[Tensor], factor: float = 1.0, tolerance: float = 1e-12
) -> bool:
    """Whether gradients are equal, the right ones times `factor`."""
    return all(
        torch.allclose(a, factor * b, atol=tolerance, rtol=1e-8)
        for a, b in zip(left, right, strict=True)
    )
