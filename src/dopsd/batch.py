"""What travels: a batch of training examples, and the contexts that a family's denoiser reads.

A Context is opaque to everyone but the family that made it; the house only stacks, splits and moves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Context:
    """tokens: [B, L, D] hidden states; mask: [B, L] bool, True = real; extras: further batch-first tensors."""

    tokens: Tensor
    mask: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Self:
        """The same context on another device; dtypes stay."""
        extras = {name: tensor.to(device) for name, tensor in self.extras.items()}
        return replace(self, tokens=self.tokens.to(device), mask=self.mask.to(device), extras=extras)

    def row(self, index: int) -> Self:
        """One example without its padding: tokens [1, l, D]."""
        keep = self.mask[index]
        return replace(
            self,
            tokens=self.tokens[index : index + 1, keep],
            mask=self.mask[index : index + 1, keep],
            extras={name: tensor[index : index + 1] for name, tensor in self.extras.items()},
        )

    @classmethod
    def stack(cls, contexts: Sequence["Context"]) -> "Context":
        """Contexts of any batch sizes and lengths as one, padded on the right with zeros."""
        rows = [(t, m) for c in contexts for t, m in zip(c.tokens, c.mask, strict=True)]
        return cls(
            tokens=pad_sequence([tokens for tokens, _ in rows], batch_first=True),
            mask=pad_sequence([mask for _, mask in rows], batch_first=True),
            extras={name: torch.cat([c.extras[name] for c in contexts]) for name in contexts[0].extras},
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of examples of one size.

    latents: clean, float32 [B, C, h, w]. context: what the student reads. privileged: what the teacher reads, one per
    (caption, picture) pair, or None where no method asked for it. weight: [B] float32, 1 = an ordinary example.
    """

    latents: Tensor
    context: Context
    prompts: tuple[str, ...]
    weight: Tensor
    privileged: Context | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        privileged = self.privileged.to(device) if self.privileged else None
        return replace(
            self,
            latents=self.latents.to(device),
            context=self.context.to(device),
            weight=self.weight.to(device),
            privileged=privileged,
        )
