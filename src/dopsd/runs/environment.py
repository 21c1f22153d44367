"""What a run was made with: versions, device, memory mode, and a summary of its data."""

from importlib.metadata import version
from typing import Any

import torch

from dopsd.runs.outputs.previews import EXAMPLES
from dopsd.runs.session import Session


def environment(session: Session) -> dict[str, Any]:
    """The content of `env.json`."""
    run = session.run
    listing, images = run.listing, len(run.listing.examples)
    return {
        "dopsd": version("dopsd"),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "device": _device_name(run.device),
        "memory": "low" if session.low_memory else "high",
        "quantized": _quantization(session),
        "family": run.family.name,
        "licence_of_base": run.family.licence,
        "images": images,
        "max_steps": run.recipe.train.max_steps,
        "data": {
            "images": images,
            "edited": sum(1 for example in listing.examples if example.references),
            "source": "several folders" if run.recipe.data.more else listing.source,
            "buckets": {
                f"{width} x {height}": count
                for (width, height), count in sorted(run.buckets.items())
            },
            "sha256": run.data_sha256,
            "rows_sha256": run.rows_sha256,
            "examples": [example.caption for example in listing.examples[:EXAMPLES]],
        },
        "refused": [[path.name, reason] for path, reason in listing.refused],
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _quantization(session: Session) -> str:
    if session.quantization_gap is None:
        return "no"
    kind, gap = session.run.recipe.model.quantize, session.quantization_gap
    return f"{kind}; the base's first velocity moved by {gap:.1%}"
