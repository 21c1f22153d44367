"""The scale of a LoRA file: from its alpha tensors, from PEFT's adapter_config.json beside it, or
from the same settings in its metadata, as diffusers writes them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.files import read_bytes, read_metadata, shorten

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "LOKR", "LOHA")
# Starts of training that change the base weights too: the delta alone is not what was trained.
RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "milora", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's settings that a scale depends on. source: where they stand, for messages."""

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, names: Sequence[str], rank: int | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA (arXiv:2312.03732), for a
        module by its names in the file and in the network. rank: of the tensors; None: not of low
        rank. Raises ValueError where the settings give another rank."""
        alpha = _of_pattern(self.alpha_pattern, names, self.alpha)
        stated = _of_pattern(self.rank_pattern, names, self.rank)
        if rank not in (stated, None):
            raise ValueError(f"has rank {rank}, and {self.source} says {stated}")
        rank = rank or stated
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(pattern: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the name."""
    for name in names:
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default


def config_beside(path: Path) -> Path | None:
    """PEFT's adapter_config.json that belongs to a file: where it is, None where there is none."""
    config = path.with_name(CONFIG_NAME)
    return config if path.name == WEIGHTS_NAME and config.is_file() else None


def read_config(path: Path, component: str) -> AdapterConfig | None:
    """The settings that belong to a LoRA file; None where it has none. component: prefix of the
    network's settings in the metadata, such as `transformer`. Raises ValueError, in a sentence with
    the file's name, for settings that cannot be read, or of an adapter that is not read."""
    if config := config_beside(path):
        source, text = str(config), read_bytes(config).decode("utf-8", errors="replace")
    else:
        source = "its lora_adapter_metadata"
        text = read_metadata(path).get("lora_adapter_metadata", "")
    if not text:
        return None
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("it is not a JSON object")
        if not config:
            prefixed = {
                key.removeprefix(f"{component}."): value
                for key, value in tree.items()
                if key.startswith(f"{component}.")
            }
            tree = prefixed or (tree if "r" in tree else {})
        return _config(tree, source) if tree else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {source} cannot be used ({shorten(str(error))}).") from error


def _config(tree: Mapping[str, Any], source: str) -> AdapterConfig:
    kind = str(tree.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in KINDS:
        raise ValueError(f"the adapter is {kind}; LoRA, LoKr and LoHa are read")
    if tree.get("use_dora"):
        raise ValueError("use_dora: DoRA is not read")
    if tree.get("fan_in_fan_out"):
        raise ValueError("fan_in_fan_out: the weights are transposed")
    if (start := str(tree.get("init_lora_weights")).lower()).startswith(RESIDUAL_STARTS):
        raise ValueError(
            f"init_lora_weights: {start} changed the base weights as well; convert the adapter to "
            "plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    rank = _number(tree, "r")
    if not rank or rank != int(rank):
        raise ValueError(f"r is {shorten(tree.get('r'))}")
    alpha = _number(tree, "lora_alpha" if kind == "LORA" else "alpha")
    return AdapterConfig(
        source=source,
        rank=int(rank),
        alpha=rank if alpha is None else alpha,
        rank_pattern=_pattern(tree, "rank_pattern"),
        alpha_pattern=_pattern(tree, "alpha_pattern"),
        use_rslora=bool(tree.get("use_rslora")) and kind == "LORA",
    )


def _number(tree: Mapping[str, Any], key: str) -> float | None:
    value = tree.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {shorten(value)}, not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is too large") from error
    if not math.isfinite(number):
        raise ValueError(f"{key} is {number}")
    return number


def _pattern(tree: Mapping[str, Any], key: str) -> dict[str, float]:
    pattern = tree.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{key} is {shorten(pattern)}, not a mapping")
    for name in pattern:
        if len(name) > 500:
            raise ValueError(f"{key} holds a name of {len(name)} characters")
        # A repeated group can take exponential time to match.
        if re.search(r"\)[*+{]", name):
            raise ValueError(f"{key}: {shorten(name)} repeats a group")
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{key}: {shorten(name)} is no regular expression") from error
    return {name: _number(pattern, name) or 0.0 for name in pattern}
