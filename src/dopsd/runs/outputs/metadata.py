"""What exported weights say of themselves: the metadata of a LoRA file or a model folder."""

import json
import time
from importlib.metadata import version
from pathlib import Path

from dopsd.files import sha256_of
from dopsd.models.lora_source import as_loras, find_lora
from dopsd.runs.resolve import ResolvedRun

# As other trainers write them.
OPTIMIZER_NAMES = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW8bit",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "prodigy": "Prodigy",
    "schedule_free_adamw": "AdamWScheduleFree",
}


def weights_metadata(run: ResolvedRun, step: int) -> dict[str, str]:
    """Metadata after `step` optimizer steps.

    ModelSpec keys (`modelspec.*`), the keys that kohya's tools and LoRA managers show (`ss_*`), and
    the project's own. No path of a machine and no caption is in it.
    """
    recipe, family, nfe = run.recipe, run.family, run.deployed_nfe
    base = _public_name(recipe.model.name_or_path)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.run_name,
        "modelspec.date": time.strftime("%Y-%m-%d"),
        "modelspec.license": family.licence,
        "modelspec.description": f"{recipe.run_name}, tuned on {base} with dopsd "
        f"({recipe.method.name}) for {nfe} steps",
        "modelspec.resolution": f"{run.side}x{run.side}",
        "modelspec.usage_hint": f"{nfe} steps, no guidance",
        "ss_base_model_version": family.base_version,
        "ss_learning_rate": str(recipe.train.learning_rate),
        "ss_optimizer": OPTIMIZER_NAMES[recipe.train.optimizer],
        "ss_steps": str(step),
        "ss_seed": str(recipe.train.seed),
        "ss_output_name": recipe.run_name,
        "dopsd_version": version("dopsd"),
        "base_model": base,
        "method": recipe.method.name,
        "method_settings": recipe.method.model_dump_json(),
        "teacher_context": str(family.teacher_context) if run.learns_from_teacher else "none",
        "images": str(len(run.listing.examples)),
        "data_sha256": run.data_sha256,
        "nfe": str(nfe),
        "sigmas": json.dumps(run.deployed_schedule(*run.latent_size).times.tolist()),
    }
    if recipe.adapter == "lora":
        metadata |= {
            "modelspec.architecture": f"{family.architecture}/lora",
            "modelspec.usage_hint": f"{nfe} steps, no guidance, strength 1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(recipe.lora.rank),
            "ss_network_alpha": str(recipe.lora.rank),  # the true alpha is multiplied into B
        }
    return metadata | _optional_metadata(run)


def _optional_metadata(run: ResolvedRun) -> dict[str, str]:
    """What only some runs have."""
    model, recipe = run.recipe.model, run.recipe
    metadata = {}
    if model.distilled_by:
        metadata["distilled_by"] = _public_name(model.distilled_by)
    if model.quantize:
        metadata["base_while_training"] = model.quantize
    if model.train_on:
        metadata["trained_on"] = _public_name(model.train_on)
    if model.training_adapter:
        metadata["training_adapter_sha256"] = sha256_of(model.training_adapter)
    if recipe.data.trigger:
        metadata["modelspec.trigger_phrase"] = recipe.data.trigger
    if recipe.lora.init_from:
        parents = [sha256_of(find_lora(each.path)) for each in as_loras(recipe.lora.init_from)]
        metadata["parent_adapter_sha256"] = ", ".join(parents)
    return metadata


def _public_name(name_or_path: str) -> str:
    """A hub id as it is; of a local path only the last part: no path of a machine leaves it."""
    path = Path(name_or_path)
    return path.name if path.exists() else name_or_path
