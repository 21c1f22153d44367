"""A model card: README.md of the run folder, in the hub's format, so that the folder can be
uploaded as it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dopsd.config.recipe import Recipe
from dopsd.files import write_text
from dopsd.models.base import Usage

HUB_LICENCES = ("apache-2.0", "cc-by-nc-4.0", "openrail++")
LABELS = {
    "distilled_by": "the base is made a few-step model by",
    "method": "method",
    "method_settings": "its settings",
    "teacher_context": "the teacher sees",
    "ss_network_dim": "rank",
    "ss_learning_rate": "learning rate",
    "ss_steps": "steps",
    "ss_seed": "seed",
    "images": "images",
    "data_sha256": "data (hash of pictures and captions)",
    "parent_adapter_sha256": "went on from the LoRA",
    "trained_on": "trained on the weights of",
    "training_adapter_sha256": "with a LoRA in the weights while training, off now",
    "sigmas": "noise levels of the walk",
}


def write_card(recipe: Recipe, usage: Usage, metadata: Mapping[str, str], step: int) -> Path:
    """Write README.md from what the run's result says of itself and the previews after `step`
    steps. usage: how the base is generated with."""
    samples = f"samples/step-{step:06d}"
    preview = json.loads((recipe.run_folder / samples / "preview.json").read_text(encoding="utf-8"))
    shown = [
        (each["prompt"], f"{index}_{each['seed']}.png")
        for index, each in enumerate(preview["images"])
    ]
    edited = preview["images"][0]["references"]
    kind = "image-to-image" if edited else "text-to-image"
    images = f", image=[Image.open(path) for path in {json.dumps(edited)}]" if edited else ""
    widget = [
        {"text": prompt, "output": {"url": f"{samples}/student_{file}"}} for prompt, file in shown
    ]
    head: dict[str, Any] = {
        "base_model": metadata["base_model"],
        "library_name": "diffusers",
        "pipeline_tag": kind,
        **_licence(metadata["modelspec.license"]),
        "tags": [*(["lora"] if recipe.adapter == "lora" else []), "diffusers", kind, "dopsd"],
        "widget": widget,
    }
    if recipe.data.trigger:
        head["instance_prompt"] = recipe.data.trigger
    base = metadata["base_model"]
    base = (
        base if "/" in base else f"path/to/{base}"
    )  # a local folder: its name is all that the file may say
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    rows = [
        f"| {_cell(p)} | ![]({samples}/base_{f}) | ![]({samples}/student_{f}) |" for p, f in shown
    ]
    facts = [
        f"| {words} | {_cell(metadata[key])} |" for key, words in LABELS.items() if key in metadata
    ]
    imports = ["import torch", "from diffusers import DiffusionPipeline", *usage.imports]
    imports += ["from PIL import Image"] if edited else []
    lora, result = recipe.adapter == "lora", recipe.result().name
    opened_from = json.dumps(base if lora else result)
    opened = [
        f"pipeline = DiffusionPipeline.from_pretrained({opened_from}, torch_dtype=torch.bfloat16)",
        *usage.setup,
    ]
    if lora:
        what = f"A LoRA (strength 1) for {metadata['base_model']}"
        opened.append(f'pipeline.load_lora_weights(".", weight_name="{result}")')
    else:
        what = f"{metadata['base_model']} with every weight of its network"
    text = f"""---
{front}---

# {recipe.run_name}

{what}, tuned with dopsd {metadata["dopsd_version"]}. It paints in {metadata["nfe"]} steps
without guidance{f", and answers to `{recipe.data.trigger}`" if recipe.data.trigger else ""}.

| prompt | untouched model | tuned |
|---|---|---|
{chr(10).join(rows)}

Same noise in a row.

## Use

```python
{chr(10).join(imports)}

{chr(10).join(opened)}
prompt = {json.dumps(shown[0][0], ensure_ascii=False)}
picture = pipeline(prompt=prompt{images}, {usage.arguments}).images[0]
```

## Training

| | |
|---|---|
{chr(10).join(facts)}
"""
    path = recipe.run_folder / "README.md"
    write_text(path, text)
    return path


def _licence(name: str) -> dict[str, str]:
    """In the hub's words: one that it knows by its identifier, another as `other` with its name."""
    known = name.lower()
    return (
        {"license": known} if known in HUB_LICENCES else {"license": "other", "license_name": name}
    )


def _cell(text: str) -> str:
    """One line, and no bar that would end a cell."""
    return " ".join(text.split()).replace("|", "/")
