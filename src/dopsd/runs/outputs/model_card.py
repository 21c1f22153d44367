"""The model card: README.md of a run folder, in the hub's format, laid out by card.md.jinja."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dopsd.config.recipe import Recipe
from dopsd.files import write_text
from dopsd.models.base import Family
from dopsd.models.hub import is_hub_id
from dopsd.runs.outputs.previews import preview_folder, read_preview

FACTS = {  # metadata key -> row of the table "Training"
    "distilled_by": "file that makes the base a few-step model",
    "method": "method",
    "method_settings": "settings of the method",
    "teacher_context": "how the teacher sees images",
    "ss_network_dim": "rank",
    "ss_learning_rate": "learning rate",
    "ss_steps": "steps",
    "ss_seed": "seed",
    "images": "images",
    "data_sha256": "SHA-256 of images and captions",
    "parent_adapter_sha256": "SHA-256 of the LoRA it started from",
    "trained_on": "weights it was trained on",
    "training_adapter_sha256": "SHA-256 of the LoRA in the weights during training only",
    "sigmas": "noise levels of the sampler",
}


def write_card(recipe: Recipe, family: Family, metadata: Mapping[str, str], step: int) -> None:
    """Write README.md from the metadata of the exported weights and the previews at `step`."""
    text = model_card(recipe, family, metadata, shown_previews(recipe, step))
    write_text(recipe.run_folder / "README.md", text)


@dataclass(frozen=True)
class ShownImage:
    """A row of the card: a prompt, and its images in the run folder by the base model and by the
    tuned one."""

    prompt: str
    base: str
    tuned: str
    references: tuple[str, ...] = ()


def shown_previews(recipe: Recipe, step: int) -> list[ShownImage]:
    """The previews at a step."""
    folder = preview_folder(recipe.run_folder, step)
    samples = folder.relative_to(recipe.run_folder).as_posix()
    return [
        ShownImage(
            image["prompt"],
            f"{samples}/base_{index}_{image['seed']}.png",
            f"{samples}/student_{index}_{image['seed']}.png",
            tuple(image.get("references", ())),
        )
        for index, image in enumerate(read_preview(folder)["images"])
    ]


def model_card(
    recipe: Recipe, family: Family, metadata: Mapping[str, str], images: Sequence[ShownImage]
) -> str:
    """The card. images: its rows; none: the card shows no images."""
    references = list(images[0].references) if images else []
    widget = [{"text": image.prompt, "output": {"url": image.tuned}} for image in images]
    prompt = images[0].prompt if images else recipe.data.trigger or "PROMPT"
    front = _front_matter(recipe, family, metadata, bool(references))
    front |= {"widget": widget} if widget else {}
    environment = Environment(
        loader=PackageLoader("dopsd.runs.outputs", ""),
        autoescape=False,  # Markdown, not HTML: the filter `markdown` escapes for both
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = escape_markdown
    return environment.get_template("card.md.jinja").render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=recipe.run_name,
        kind="LoRA (strength 1)" if recipe.adapter == "lora" else "All weights of the network",
        base_model=metadata["base_model"],
        version=metadata["dopsd_version"],
        nfe=metadata["nfe"],
        trigger=recipe.data.trigger,
        images=images,
        code=_code(recipe, family, metadata, prompt, references),
        facts=[(label, metadata[key]) for key, label in FACTS.items() if key in metadata],
    )


def escape_markdown(text: str) -> str:
    """A foreign text as one line of Markdown that renders as these characters: no markup, HTML,
    link, image or table cell begins in it."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    return re.sub(r"(?i)(?<=\w):(?=//)|(?<=www)\.|@", _entity, text)


def _entity(match: re.Match[str]) -> str:
    """A character as an HTML entity, which stops GitHub's and the hub's automatic links."""
    return f"&#{ord(match[0])};"


def _front_matter(
    recipe: Recipe, family: Family, metadata: Mapping[str, str], edits: bool
) -> dict[str, Any]:
    """The YAML header of the card in the hub's keys, without the widget."""
    task = "image-to-image" if edits else "text-to-image"
    licence = {"license": family.hub_licence}
    if family.hub_licence == "other":
        licence["license_name"] = re.sub(r"[^a-z0-9.]+", "-", family.licence.lower()).strip("-")
        licence["license_link"] = f"https://huggingface.co/{family.repo}/blob/main/LICENSE.md"
    # A name that is not of the hub is no base model there.
    base = {"base_model": metadata["base_model"]} if is_hub_id(metadata["base_model"]) else {}
    header: dict[str, Any] = {
        **base,
        "library_name": "diffusers",
        "pipeline_tag": task,
        **licence,
        "tags": [*(["lora"] if recipe.adapter == "lora" else []), "diffusers", task, "dopsd"],
    }
    if recipe.data.trigger:
        header["instance_prompt"] = recipe.data.trigger
    return header


def _code(
    recipe: Recipe,
    family: Family,
    metadata: Mapping[str, str],
    prompt: str,
    references: list[str],
) -> list[str]:
    """Lines of Python that generate the first preview with diffusers."""
    usage, base = family.usage(int(metadata["nfe"])), metadata["base_model"]
    weights, is_lora = json.dumps(recipe.result().name), recipe.adapter == "lora"
    # Of a local folder the metadata name only the last part
    opened = json.dumps(base if "/" in base else f"path/to/{base}") if is_lora else weights
    load = [f'pipeline.load_lora_weights(".", weight_name={weights})'] if is_lora else []
    imports, images = [], ""
    if references:
        imports = ["from PIL import Image"]
        images = f", image=[Image.open(path) for path in {json.dumps(references)}]"
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *usage.imports,
        *imports,
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({opened}, torch_dtype=torch.bfloat16)",
        *usage.setup,
        *load,
        f"prompt = {json.dumps(' '.join(prompt.split()), ensure_ascii=False)}",
        f"image = pipeline(prompt=prompt{images}, {usage.arguments}).images[0]",
    ]
