"""What a run was made with: versions, device, data."""

from typing import Any

import torch
from diffusers import __version__ as diffusers_version

from dopsd import __version__
from dopsd.runs.check import Checked
from dopsd.runs.outputs.previews import EXAMPLES
from dopsd.runs.session import Session


def _quantized(session: Session) -> str:
    if session.quantization_gap is None:
        return "no"
    return f"{session.recipe.model.quantize}; the base's first velocity moved by {session.quantization_gap:.1%}"


def _environment(found: Checked, session: Session) -> dict[str, Any]:
    family, listing, device = found.family, found.listing, session.device
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    return {
        "dopsd": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "memory": "low" if session.low_memory else "high",
        "quantized": _quantized(session),
        "family": family.name,
        "licence_of_base": family.licence,
        "images": len(listing.examples),
        "data": {
            "images": len(listing.examples),
            "edited": sum(1 for example in listing.examples if example.references),
            "source": listing.source if not session.recipe.data.more else "several folders",
            "buckets": {
                f"{width} x {height}": count
                for (width, height), count in sorted(found.buckets.items())
            },
            "sha256": session.data["data_sha256"],
            "examples": [example.caption for example in listing.examples[:EXAMPLES]],
        },
        "refused": [[str(path.name), why] for path, why in listing.refused],
    }
