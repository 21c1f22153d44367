"""A resumable training loop for the stages of the pocket model, with AdamW or Muon and weight
averaging.

Under `torchrun --nproc-per-node 2` each process draws its own batches and gradients are averaged:
two processes of one thread are faster here than one of two.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dopsd.files import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors


@dataclass(frozen=True)
class Stage:
    """The settings of a training loop."""

    name: str
    steps: int
    learning_rate: float
    warm_up: int = 100
    average_decay: float = 0.0  # of the weight average; 0 = no average
    save_every: int = 250
    muon: bool = False  # Muon for the matrices inside blocks, AdamW for the rest


def process_rank() -> int:
    """Index of this process among those of torchrun, which it joins at the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank()


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, averaged in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def optimise(
    stage: Stage, folder: Path, modules: Mapping[str, nn.Module], loss_at: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """Minimise `loss_at(step)` with linear warm-up and decay, resuming from the folder.

    Returns the averaged weights under `<module>.<parameter>` (without an average, the last ones).
    They are also written to `<folder>/<stage>.safetensors` and loaded into the modules.
    """
    named = {
        f"{m}.{n}": p
        for m, module in modules.items()
        for n, p in module.named_parameters()
        if p.requires_grad
    }
    optimizers = _optimizers(stage, named)
    average = {n: p.detach().clone() for n, p in named.items()}
    rank, state_file = process_rank(), folder / f"{stage.name}.state.safetensors"
    start = 0
    if state_file.exists():
        start = _load_state(state_file, named, average, optimizers)
        print(f"stage={stage.name} resumed_at={start}", flush=True)
    began, shown = time.perf_counter(), []
    for step in range(start, stage.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = (
                stage.learning_rate * min((step + 1) / stage.warm_up, 1) * (1 - step / stage.steps)
            )
        loss = loss_at(step)
        loss.backward()
        if dist.is_initialized():
            _average_gradients(list(named.values()))
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(stage.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in named.items():
                average[name].lerp_(parameter, 1 - decay)
        shown.append(loss.item())
        if rank == 0 and (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.perf_counter() - began)
            left = (stage.steps - step - 1) / rate / 60
            print(
                f"stage={stage.name} step={step + 1}/{stage.steps} loss={np.mean(shown[-50:]):.4f} "
                f"steps_per_second={rate:.2f} minutes_left={left:.1f}",
                flush=True,
            )
        if rank == 0 and ((step + 1) % stage.save_every == 0 or step + 1 == stage.steps):
            _save_state(state_file, step + 1, named, average, optimizers)
    if rank == 0:
        write_tensors(folder / f"{stage.name}.safetensors", average)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(average[name])
    return average


def _optimizers(stage: Stage, named: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    inner = {
        n: p for n, p in named.items() if stage.muon and p.ndim == 2 and re.search(r"\.\d+\.", n)
    }
    outer = [p for n, p in named.items() if n not in inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if inner:
        optimizers.append(
            torch.optim.Muon(
                inner.values(),
                lr=stage.learning_rate,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _save_state(
    path: Path,
    step: int,
    named: Mapping,
    average: Mapping,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    tensors = {f"weight:{n}": p for n, p in named.items()}
    tensors |= {f"average:{n}": p for n, p in average.items()}
    for index, optimizer in enumerate(optimizers):
        tensors |= {f"optimizer{index}:{n}": p for n, p in optimizer_tensors(optimizer).items()}
    write_tensors(path, tensors | {"step": torch.tensor(step)})


def _load_state(
    path: Path, named: Mapping, average: Mapping, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    tensors = read_tensors(path)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weight:{name}"])
            average[name].copy_(tensors[f"average:{name}"])
    for index, optimizer in enumerate(optimizers):
        prefix = f"optimizer{index}:"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        load_optimizer_tensors(optimizer, own)
    return int(tensors["step"])
