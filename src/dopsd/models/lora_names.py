"""Names of a network's modules in LoRA files and single-file checkpoints: from any public spelling
to diffusers' modules, and back to the names of the original model.

A family lists its modules as rows of a table (`Row`). A name in a file is split at dots and
underscores, so that `layers.0.attention.to_q`, `lora_unet_layers_0_attention_to_q` and
`lycoris_layers_0_attention_to_q` are one name behind different prefixes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Prefixes that tools put before a module's name, any number of them, in tokens.
PREFIXES = {
    "diffusion_model": "ComfyUI, ai-toolkit, diffusion-pipe",
    "transformer": "diffusers, SimpleTuner",
    "unet": "diffusers",
    "base_model_model": "PEFT",
    "lora_unet": "kohya, musubi, OneTrainer",
    "lora_transformer": "OneTrainer",
    "lycoris": "LyCORIS, SimpleTuner",
    "pipe_dit": "DiffSynth",
    "dit": "DiffSynth",
    "model": "single-file checkpoints",
    "module": "DistributedDataParallel",
}
# What compiling, sharding and old attention processors leave inside a name.
WRAPPERS = (
    ("orig", "mod"),
    ("fsdp", "wrapped", "module"),
    ("checkpoint", "wrapped", "module"),
    ("processor",),
)
# First tokens of parts that are not the network.
OTHER_PARTS = {
    "text encoder": (
        r"lora_(prior_)?te\d*|te\d*|text_encoders?(_\d)?|text_model|conditioner|cond_stage_model"
        r"|clip_[lgh]|qwen3?|qwen_?3_?\w*b|llm"
    ),
    "embedding": r"bundle_emb|emb_params|string_to_param|embedding",
    "VAE": r"first_stage_model|vae|lora_vae",
}


@dataclass(frozen=True)
class Row:
    """A module of the original model: its name, and the diffusers modules that it consists of, in
    the order of its output rows. `{}` stands for the same number in all of them. swapped: the
    halves of its rows are the other way round in diffusers."""

    native: str
    parts: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Place:
    """Where a name in a file lies in the network: diffusers modules, in the order of the file's
    output rows. prefix: what stood before the module's name, in tokens."""

    parts: tuple[str, ...]
    swapped: bool
    prefix: str
    is_native: bool


def same(*names: str) -> tuple[Row, ...]:
    """Rows of modules that have the same name in the original model and in diffusers."""
    return tuple(Row(name, (name,)) for name in names)


def tokens_of(name: str) -> tuple[str, ...]:
    """A name's parts between dots and underscores, without what wrappers add."""
    tokens = [token for token in re.split(r"[._]+", name) if token]
    for wrapper in WRAPPERS:
        size = len(wrapper)
        index = 0
        while index <= len(tokens) - size:
            if tuple(tokens[index : index + size]) == wrapper:
                del tokens[index : index + size]
            else:
                index += 1
    return tuple(tokens)


def other_part(name: str) -> str | None:
    """What a name adapts where it is not the network: one of OTHER_PARTS."""
    flat = "_".join(tokens_of(name))
    before = f"(({'|'.join(PREFIXES)})_)*"
    for part, pattern in OTHER_PARTS.items():
        if re.match(f"{before}({pattern})(_|$)", flat):
            return part
    return None


_Key = tuple[str, ...]  # tokens, numbers as "{}"


@dataclass(frozen=True)
class ModuleNames:
    """The names of a family's modules.

    rows: of every module with weights. aliases: further spellings of diffusers' names, as rows
    whose `native` is the alias. weights: what the original model calls the weight of a module whose
    name ends so, where it is not `weight`.
    """

    rows: tuple[Row, ...]
    aliases: tuple[Row, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index: dict[_Key, list[tuple[_Key, Row, tuple[str, ...], bool]]] = {}
        for row in (*self.rows, *self.aliases):
            own = [(row.native, row.parts, row.native != row.parts[0])]
            own += [(part, (part,), False) for part in row.parts]
            for template, parts, is_native in own:
                tokens = tokens_of(template)
                key = tuple("{}" if _is_number(token) else token for token in tokens)
                index.setdefault(key, []).append((tokens, row, parts, is_native))
        object.__setattr__(self, "_index", index)

    def find(self, name: str) -> Place | None:
        """The place of a module's name in any spelling; None where it is not of this family."""
        return self._find(tokens_of(name), "")

    def _find(self, tokens: Sequence[str], prefix: str) -> Place | None:
        key = tuple("{}" if token.isdecimal() else token for token in tokens)
        for template, row, parts, is_native in self._index.get(key, ()):  # type: ignore[attr-defined]
            numbers = _matched_numbers(template, tokens)
            if numbers is not None:
                filled = tuple(part.format(*numbers) for part in parts)
                return Place(filled, row.swapped and is_native, prefix, is_native)
        for before in PREFIXES:
            first = tuple(before.split("_"))
            if tuple(tokens[: len(first)]) == first and len(tokens) > len(first):
                place = self._find(tokens[len(first) :], f"{prefix}{before}.")
                if place:
                    return place
        return None

    def unknown_prefix(self, name: str) -> str | None:
        """What stands before a known module's name where `find` does not know it."""
        tokens = tokens_of(name)
        for start in range(1, len(tokens)):
            if self._find(tokens[start:], ""):
                rest = "[._]+".join(map(re.escape, tokens[start:]))
                match = re.search(rf"(?<![^._]){rest}$", name)
                return name[: match.start()] if match else "_".join(tokens[:start])
        return None

    def native_rows(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The original model's names of diffusers modules, each with all the diffusers modules that
        it consists of, in order, given or not."""
        found: dict[str, tuple[str, ...]] = {}
        for module in modules:
            row, numbers = self._row_of(module)
            found[row.native.format(*numbers)] = tuple(part.format(*numbers) for part in row.parts)
        return found

    def swapped(self, module: str) -> bool:
        """Whether the halves of a diffusers module's rows are the other way round in the original
        model."""
        return self._row_of(module)[0].swapped

    def _row_of(self, module: str) -> tuple[Row, tuple[str, ...]]:
        """The row of a diffusers module and its numbers. Raises KeyError for another name."""
        tokens = tokens_of(module)
        key = tuple("{}" if token.isdecimal() else token for token in tokens)
        for template, row, parts, is_native in self._index.get(key, ()):  # type: ignore[attr-defined]
            numbers = _matched_numbers(template, tokens)
            if numbers is not None and not is_native and row not in self.aliases:
                assert len(parts) == 1
                return row, numbers
        raise KeyError(module)


def _is_number(token: str) -> bool:
    return token == "{}" or token.isdecimal()


def _matched_numbers(template: Sequence[str], tokens: Sequence[str]) -> tuple[str, ...] | None:
    """The numbers at the template's `{}`; None where its own numbers differ."""
    numbers = []
    for expected, token in zip(template, tokens, strict=True):
        if expected == "{}":
            numbers.append(str(int(token)))
        elif expected != token:
            return None
    return tuple(numbers)
