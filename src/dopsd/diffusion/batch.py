"""A batch of training examples, and the contexts (encoded prompts) that a denoiser reads.

Only the model family that made a Context knows what its tensors mean; all other code stacks, splits
and moves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Layout = tuple[tuple[str, tuple[int, ...]], ...]
Part = Literal["latents", "prior", "replay"]  # parts of a batch that a loss may be a mean over


@dataclass(frozen=True)
class Context:
    """What a denoiser reads beside the latents.

    tokens: [B, L, D] hidden states, padded on the right with zeros. lengths: of each row without
    padding. extras: further tensors with a batch axis first and no padding; contexts of one
    `layout` can be stacked.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layout(self) -> Layout:
        """Names and shapes of the extras without their batch axis."""
        return tuple(
            (name, tuple(tensor.shape[1:])) for name, tensor in sorted(self.extras.items())
        )

    def to(self, device: torch.device | str) -> Self:
        """The same context on another device; dtypes stay."""
        extras = {name: tensor.to(device) for name, tensor in self.extras.items()}
        return replace(self, tokens=self.tokens.to(device), extras=extras)

    def rows(self) -> list[Tensor]:
        """The tokens of each row without padding: [l, D] each."""
        return [tokens[:length] for tokens, length in zip(self.tokens, self.lengths, strict=True)]

    def row(self, index: int) -> Self:
        """One example without padding: tokens [1, l, D]."""
        length = self.lengths[index]
        return replace(
            self,
            tokens=self.tokens[index : index + 1, :length],
            lengths=(length,),
            extras={name: tensor[index : index + 1] for name, tensor in self.extras.items()},
        )

    @classmethod
    def stack(cls, contexts: Sequence["Context"]) -> "Context":
        """Contexts of one layout as one, in order; batch sizes and lengths may differ. Tokens are
        padded on the right with zeros."""
        assert len({c.layout for c in contexts}) == 1, "contexts of several layouts cannot be one"
        return cls(
            tokens=pad_sequence([row for c in contexts for row in c.rows()], batch_first=True),
            lengths=tuple(length for c in contexts for length in c.lengths),
            extras={
                name: torch.cat([c.extras[name] for c in contexts]) for name in contexts[0].extras
            },
        )


@dataclass(frozen=True)
class Replay:
    """Prompts unrelated to the data, on which the student is held to the base model.

    context: of R prompts. latents: what the base model generates for them, clean, float32
    [R, C, h, w]; None where only the prompts are needed.
    """

    context: Context
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def to(self, device: torch.device | str) -> "Replay":
        """The same on another device; dtypes stay."""
        latents = None if self.latents is None else self.latents.to(device)
        return Replay(self.context.to(device), latents)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of examples of one size.

    latents: clean, float32 [B, C, h, w]. context: what the student reads. prompts: as texts.
    weight: float32 [B], 1 = an ordinary example. The rest is None unless the method or the data
    needs it. mask: float32 [B, 1, h, w] in [0, 1], the weight of the loss at each latent position
    (1 everywhere is the same as None). privileged: what the teacher reads, of prompt and image.
    rejected: latents of a worse image for the same prompt, like `latents`. prior: images of the
    class. replay: of retention, where this micro-batch has any.
    """

    latents: Tensor
    context: Context
    prompts: tuple[str, ...]
    weight: Tensor
    privileged: Context | None = None
    rejected: Tensor | None = None
    prior: "Batch | None" = None
    replay: Replay | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def rows_of(self, part: Part) -> int:
        """Number of rows of a part; 0 where the batch does not have it."""
        value: Tensor | Batch | Replay | None = getattr(self, part)
        return 0 if value is None else len(value)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; dtypes stay."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: part.to(device)
            for name, part in parts.items()
            if isinstance(part, Tensor | Context | Batch | Replay)
        }
        return replace(self, **moved)
