"""What an adapter adds to a weight, in closed form: LoRA, LoCon, LoKr, LoHa and whole differences.

Sources: LyCORIS (arXiv:2309.14859) and its implementation for LoKr, LoHa and their Tucker forms.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]  # of a delta: out, in; for a convolution `in` is input channels times kernel


class LowRank(NamedTuple):
    """B @ A. a: [r, in], b: [out, r], float32, the scale in b."""

    a: Tensor
    b: Tensor

    @property
    def size(self) -> Size:
        return len(self.b), self.a.shape[1]

    def dense(self) -> Tensor:
        """The delta, float64 [out, in]."""
        return self.b.double() @ self.a.double()

    def apply(self, x: Tensor) -> Tensor:
        """The delta times a vector [in], float64 [out]."""
        return self.b.double() @ (self.a.double() @ x.double())


@dataclass(frozen=True)
class ClosedForm:
    """A delta that is not of low rank, computed when it is needed. kind: its name, for messages."""

    kind: str
    size: Size
    compute: Callable[[], Tensor]

    def dense(self) -> Tensor:
        """The delta, float64 [out, in]."""
        return self.compute()

    def apply(self, x: Tensor) -> Tensor:
        """The delta times a vector [in], float64 [out]."""
        return self.compute() @ x.double()


Delta = LowRank | ClosedForm
Slots = Mapping[str, Tensor]  # a module's tensors by slot (lora_keys.SLOTS), float32
Scale = Callable[[int | None], float]  # from the rank; None: LoKr whose factors are both whole


def delta_of(slots: Slots, scale: Scale) -> Delta:
    """The delta of a module's tensors. Raises ValueError, in words that follow the module's name,
    where they do not fit together."""
    for kind, build in _BUILDERS.items():
        if own := {name for name in slots if re.fullmatch(kind, name)}:
            if others := slots.keys() - own - {"alpha"}:
                raise ValueError(f"has {min(others)} beside {min(own)}: two adapters of one module")
            return build(slots, scale)
    raise ValueError(f"has {', '.join(sorted(slots))} and no weights")


def rows_of(delta: Delta, index: int, count: int) -> Delta:
    """The `index`-th of `count` equal parts of a delta's rows."""
    rows = delta.size[0] // count
    start, stop = index * rows, (index + 1) * rows
    if isinstance(delta, LowRank):
        b = delta.b[start:stop]
        # Ranks that serve only the other parts, as where several LoRAs were fused into one.
        used = b.any(dim=0)
        return LowRank(delta.a[used], b[:, used]) if used.any() else LowRank(delta.a[:1], b[:, :1])
    return ClosedForm(delta.kind, (rows, delta.size[1]), lambda: delta.dense()[start:stop])


def swap_halves(delta: Delta) -> Delta:
    """The delta with the halves of its rows exchanged."""
    half = delta.size[0] // 2
    if isinstance(delta, LowRank):
        return LowRank(delta.a, delta.b.roll(half, dims=0))
    return ClosedForm(delta.kind, delta.size, lambda: delta.dense().roll(half, dims=0))


def _low_rank(slots: Slots, scale: Scale) -> LowRank:
    if missing := {"a", "b"} - slots.keys():
        raise ValueError(f"is half a LoRA: lora_{missing.pop().upper()} is missing")
    a, b = slots["a"], slots["b"]
    shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)} do not make a LoRA"
    if a.ndim not in (2, 4) or b.ndim not in (2, 4) or len(a) != b.shape[1]:
        raise ValueError(shapes)
    if b.numel() != len(b) * len(a):
        raise ValueError(shapes)
    if not len(a):
        raise ValueError("has rank 0")
    if "mid" in slots:  # LoCon: A is decomposed once more, into mid [r, r', k, k] and A [r', in]
        a = torch.einsum("rskl,si->rikl", slots["mid"], a.flatten(1))
    rank = b.shape[1]
    return LowRank(a.flatten(1), b.flatten(1) * scale(rank))


def _difference(slots: Slots, scale: Scale) -> ClosedForm:
    difference = slots["diff"]
    if "alpha" in slots:
        raise ValueError("is a whole weight difference with an alpha, which has no meaning there")
    if difference.ndim < 2:
        raise ValueError("is a difference of a vector, not of a weight matrix")
    flat = difference.flatten(1)
    return ClosedForm("a whole difference", _size(flat), flat.double)


def _kronecker(slots: Slots, scale: Scale) -> ClosedForm:
    """kron(w1, w2), each factor whole or a product of rank r."""
    ranks = [len(slots[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in slots]
    left, right = _factor(slots, "lokr_w1"), _factor(slots, "lokr_w2", "lokr_t2")
    factor = scale(ranks[-1] if ranks else None)
    flat = right.flatten(1).contiguous()  # torch.kron takes no other
    size = (len(left) * len(flat), left.shape[1] * flat.shape[1])
    return ClosedForm("LoKr", size, lambda: torch.kron(left, flat) * factor)


def _hadamard(slots: Slots, scale: Scale) -> ClosedForm:
    """The elementwise product of two products of rank r, times alpha / r."""
    left, right = (_factor(slots, f"hada_w{i}", f"hada_t{i}").flatten(1) for i in "12")
    if left.shape != right.shape:
        raise ValueError(f"its factors are {tuple(left.shape)} and {tuple(right.shape)}")
    factor = scale(len(slots["hada_w1_b"]))
    return ClosedForm("LoHa", _size(left), partial(_scaled_product, left, right, factor))


# Names of slots -> what builds a delta of them.
_BUILDERS: dict[str, Callable[[Slots, Scale], Delta]] = {
    "a|b|mid": _low_rank,
    "diff": _difference,
    "lokr_.*": _kronecker,
    "hada_.*": _hadamard,
}


def _scaled_product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    return left * right * factor


def _factor(slots: Slots, name: str, core: str = "") -> Tensor:
    """A factor in float64: whole, a product a @ b, or a Tucker form with the core
    [r, r, k, k], a [r, out] and b [r, in]."""
    if name in slots:
        whole = slots[name].double()
        if whole.ndim < 2:
            raise ValueError(f"{name} has {whole.ndim} dimensions")
        return whole
    if missing := [f"{name}_{end}" for end in "ab" if f"{name}_{end}" not in slots]:
        raise ValueError(f"lacks {missing[0]}")
    a, b = slots[f"{name}_a"].double(), slots[f"{name}_b"].double()
    try:
        if core in slots:
            return torch.einsum("ijkl,ip,jr->prkl", slots[core].double(), a, b)
        return a @ b
    except RuntimeError as error:  # shapes that do not fit
        raise ValueError(
            f"{name}_a {tuple(a.shape)} and {name}_b {tuple(b.shape)} do not fit together"
        ) from error


def _size(matrix: Tensor) -> Size:
    return matrix.shape[0], matrix.shape[1]
