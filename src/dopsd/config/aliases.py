"""Keys that are understood besides the schema's own: renamed ones, and hints for unknown ones."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

# Keys of other trainers, and what they are called here.
ALIASES = {
    "pretrained_model_name_or_path": "model.name_or_path",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear": "lora.rank",
    "linear_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "network_weights": "lora.init_from",
    "lr": "train.learning_rate",
    "unet_lr": "train.learning_rate",
    "steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "train_batch_size": "train.batch_size",
    "num_inference_steps": "sample.nfe",
    "sample_steps": "sample.nfe",
    "ema": "method.teacher_decay",
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
    "masked_loss": "data.masks",
    "masked_training": "data.masks",
    "alpha_mask": "data.masks",
    "mask_path": "data.masks",
    "conditioning_data_dir": "data.masks",
    "enable_wildcard": "data.caption_lines",
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
    "assistant_lora_path": "model.training_adapter",
    "base_weights": "model.training_adapter",
    "report_to": "track.to",
    "log_with": "track.to",
    "wandb_project": "track.project",
    "tracker_project_name": "track.project",
}

# Keys of other trainers for what dopsd does not do.
UNSUPPORTED = {
    "text_encoder_lr": "text encoders are not trained",
    "train_text_encoder": "text encoders are not trained",
}


@dataclass(frozen=True)
class Renamed:
    """The current name of a key, and its current values where those changed as well."""

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)


# Recipe keys that were renamed: the old name still works, and a line in the log gives the new one.
RENAMED = {
    "method.judge": Renamed("method.reward"),
    "method.class_pictures": Renamed("method.class_images"),
    "model.gradient_checkpointing": Renamed("model.memory", {True: "low", False: "high"}),
}


@dataclass(frozen=True)
class Moved:
    """The key that a removed one became, whose values mean something else, and the old value that
    meant the same as leaving the key out."""

    key: str
    off: Any


# Keys that are refused under their old name, unless at `off`, which old run folders hold.
MOVED = {
    "method.retention": Moved("retention.weight", 0),
    "data.replay": Moved("retention.prompts", []),
}

SIMILAR = 0.75  # difflib ratio from which a key is suggested: one typing error in four letters


def with_current_names(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The tree with renamed keys under their current names. A key that is given under both is left
    for the schema to refuse."""
    current = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in tree.items()
    }
    for old, renamed in RENAMED.items():
        (section, old_key), new_key = old.split("."), renamed.key.split(".")[1]
        keys = current.get(section)
        if isinstance(keys, dict) and old_key in keys and new_key not in keys:
            value = keys.pop(old_key)
            known = isinstance(value, bool | str) and value in renamed.values
            keys[new_key] = renamed.values[value] if known else value
            written = f"{renamed.key}: {keys[new_key]}" if known else renamed.key
            log.warning("%s: %s is now %s; the old name still works.", source, old, written)
    for old, moved in MOVED.items():
        section, old_key = old.split(".")
        keys = current.get(section)
        if isinstance(keys, dict) and old_key in keys and keys[old_key] == moved.off:
            del keys[old_key]
    return current


def hint(place: str, keys: Sequence[str], owners: Sequence[str]) -> str:
    """What to say after "`place` is no key of a recipe". keys: all keys as `section.key`; owners:
    methods that have the key, where it is one of another method than the recipe's."""
    last = place.rpartition(".")[2]
    if place in MOVED:
        return f"; it is {MOVED[place].key} now"
    if last in UNSUPPORTED:
        return f"; {UNSUPPORTED[last]}"
    if last in ALIASES:
        return f"; {last} is {ALIASES[last]} here"
    if owners:
        return f"; it is one of {', '.join(owners)}"
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    similar = max([*keys, *sections], key=lambda key: _similarity(place, key))
    if _similarity(place, similar) >= SIMILAR:
        return f" (did you mean {similar}?)"
    return f"; the sections are {', '.join(sections)}"


def _similarity(place: str, key: str) -> float:
    """Of the last parts of two keys; the sections only decide between equals."""
    last, section = place.rpartition(".")[2], place.partition(".")[0]
    ratio = difflib.SequenceMatcher(None, key.rpartition(".")[2], last).ratio()
    return ratio + 0.01 * (section == key.partition(".")[0]) if ratio >= SIMILAR else ratio
