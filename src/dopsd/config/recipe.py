"""Recipes as YAML files: read into the tree of settings, every fault one sentence, unknown keys
with a suggestion."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dopsd.config.schema import PromptSection, Recipe, Section, TrainSection
from dopsd.files import shorten
from dopsd.methods import METHODS

log = logging.getLogger(__name__)

__all__ = [
    "PromptSection",
    "Recipe",
    "TrainSection",
    "known_keys",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
]

# Words of other tools, and what they are called here.
ALIASES = {
    "pretrained_model_name_or_path": "model.name_or_path",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear": "lora.rank",
    "linear_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lr": "train.learning_rate",
    "steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "train_batch_size": "train.batch_size",
    "num_inference_steps": "sample.nfe",
    "sample_steps": "sample.nfe",
    "ema_decay": "method.teacher_decay",
    "save_every": "save.every",
    "checkpointing_steps": "save.every",
    "sample_every": "sample.every",
    "validation_prompt": "sample.prompts",
    "sample_prompts": "sample.prompts",
    "caption_ext": "data.caption_extension",
    "name_or_path": "model.name_or_path",
    "instance_data_dir": "data.folder",
    "dataset_path": "data.folder",
    "dataset_name": "data.dataset",
    "train_data_dir": "data.folder",
    "folder_path": "data.folder",
    "num_repeats": "data.repeats",
    "trigger_word": "data.trigger",
    "caption_dropout_rate": "data.caption_dropout",
    "max_step_saves_to_keep": "save.keep_last",
    "checkpoints_total_limit": "save.keep_last",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "optimizer_type": "train.optimizer",
    "use_8bit_adam": "train.optimizer",
    "lr_scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "output_name": "run_name",
    "resume_from_checkpoint": "the --resume flag",
    "memory": "model.memory",
    "load_in_4bit": "model.quantize",
    "base_quant": "model.quantize",
    "gradient_checkpointing": "model.memory",
    "report_to": "track.to",
    "log_with": "track.to",
    "wandb_project": "track.project",
    "tracker_project_name": "track.project",
}


# Recipe keys that were renamed: the old one still works, and a line says what to write.
RENAMED = {"method.judge": "method.reward", "method.class_pictures": "method.class_images"}


class _OnlyOnce(yaml.SafeLoader):
    """A key that comes twice is an error: YAML would drop the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` changes. Raises ValueError with one sentence a
    fault.

    Relative paths in the file are relative to the working directory, as on the command line.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give a recipe file, or start from one in recipes/."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it again as UTF-8.") from error
    return read_recipe(text, str(path), {"run_name": path.stem}, changes)


def read_recipe(
    text: str, source: str, defaults: Mapping[str, Any], changes: Sequence[str] = ()
) -> Recipe:
    """Like `load_recipe`, from YAML text; `defaults` stand where the text has no such key."""
    try:
        tree = yaml.load(text, _OnlyOnce)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{source} must hold sections (model, data, method, ...), not {type(tree).__name__}."
        )
    tree = {
        **defaults,
        **{key: {} if value is None else value for key, value in tree.items()},
    }  # comments alone: None
    for change in changes:
        _apply(tree, change)
    return parse_recipe(tree, source)


def parse_recipe(tree: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A nested mapping as a Recipe. Raises ValueError with one sentence a fault."""
    try:
        return Recipe.model_validate(_with_current_names(tree, source))
    except ValidationError as error:
        raise ValueError(f"{source}: " + " ".join(_sentences(error))) from error


def _with_current_names(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The tree with renamed keys under their current names. A key that is given under both is left
    for the schema to refuse."""
    current = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()
    }
    for old, new in RENAMED.items():
        (section, old_key), new_key = old.split("."), new.split(".")[1]
        keys = current.get(section)
        if isinstance(keys, dict) and old_key in keys and new_key not in keys:
            keys[new_key] = keys.pop(old_key)
            log.warning("%s: %s is now called %s; the old name still works.", source, old, new)
    return current


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(
            f"--set {shorten(change)}: write it as key=value, for instance train.max_steps=500."
        )
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {shorten(change)}: {section} is a value, not a section.")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--set {shorten(change)}: {shorten(repr(value))} is not a YAML value."
        ) from error
    tree[name] = parsed


def _sentences(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        # a discriminated union adds the method's name to the location
        place = ".".join(
            str(part)
            for part in fault["loc"]
            if not (fault["loc"][0] == "method" and part in METHODS)
        )
        if fault["type"] == "extra_forbidden":
            yield f"{place} is no key of a recipe{_hint(place)}."
        elif fault["type"] == "missing":
            yield f"{place} is missing."
        elif fault["type"].startswith("union_tag"):
            yield f"method.name must be one of {', '.join(METHODS)}."
        elif not place:  # of the recipe as a whole
            yield f"{fault['msg'].removeprefix('Value error, ')}."
        else:
            yield f"{place} is {_shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


def _shown(value: Any) -> str:
    return shorten(repr(value)) if isinstance(value, str) else shorten(value)


def known_keys() -> list[str]:
    """Every key of a recipe as section.key."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    for method in METHODS.values():
        keys += [f"method.{key}" for key in method.model_fields]
    return sorted(set(keys))


def _hint(place: str) -> str:
    last = place.rpartition(".")[2]
    if last in ALIASES:
        return f"; {last} is {ALIASES[last]} here"
    keys = known_keys()
    if place in keys:  # of another method than the recipe's
        owners = [
            name
            for name, method in METHODS.items()
            if place.removeprefix("method.") in method.model_fields
        ]
        return f"; it is one of {', '.join(owners)}"
    close = difflib.get_close_matches(place, keys, 1, 0.6)
    close = close or [
        k for k in keys if difflib.SequenceMatcher(None, k.rpartition(".")[2], last).ratio() > 0.7
    ]
    return (
        f" (did you mean {close[0]}?)"
        if close
        else f"; the sections are {', '.join(Recipe.model_fields)}"
    )
