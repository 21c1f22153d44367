"""One LoRA of the pocket model in every public form that tools write."""

import json

import torch

MODULES = {
    "layers.0.attention.to_q": (128, 128),
    "layers.3.attention.to_out.0": (128, 128),
    "noise_refiner.0.feed_forward.w1": (341, 128),
    "context_refiner.0.attention.to_k": (128, 128),
}
RANK, ALPHA = 4, 8


def deltas() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, inner, generator=generator),
            torch.randn(outer, RANK, generator=generator),
        )
        for name, (outer, inner) in MODULES.items()
    }


def peft_names(
    prefix: str,
    scale: float = 1.0,
    marks: tuple[str, str] = ("lora_A", "lora_B"),
    alpha: bool = False,
):
    """The same LoRA as different tools write it."""
    tensors = {}
    for name, (a, b) in deltas().items():
        tensors[f"{prefix}{name}.{marks[0]}.weight"] = a.clone()
        tensors[f"{prefix}{name}.{marks[1]}.weight"] = b * scale
        if alpha:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(ALPHA))
    return tensors


def kohya_names():
    tensors = {}
    for name, (a, b) in deltas().items():
        path = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{path}.lora_down.weight": a.clone(),
            f"{path}.lora_up.weight": b.clone(),
            f"{path}.alpha": torch.tensor(float(ALPHA)),
        }
    return tensors


SCALE = ALPHA / RANK
IN_METADATA = {
    "lora_adapter_metadata": json.dumps(
        {
            "transformer.r": RANK,
            "transformer.lora_alpha": ALPHA,
            "transformer.target_modules": list(MODULES),
        }
    )
}
FORMS = {
    "ours": (lambda: peft_names("transformer.", SCALE), None),
    "scale in the metadata": (lambda: peft_names("transformer."), IN_METADATA),
    "with alpha": (lambda: peft_names("transformer.", alpha=True), None),
    "ComfyUI's": (lambda: peft_names("diffusion_model.", SCALE), None),
    "ComfyUI's with alpha": (lambda: peft_names("diffusion_model.", alpha=True), None),
    "down and up": (
        lambda: peft_names("diffusion_model.", marks=("lora_down", "lora_up"), alpha=True),
        None,
    ),
    "bare names": (lambda: peft_names("", SCALE), None),
    "raw PEFT": (lambda: peft_names("base_model.model.", SCALE), None),
    "kohya": (kohya_names, None),
}
