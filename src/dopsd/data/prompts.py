"""Test prompts from a file: what to generate, and what each image is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.data.captions import as_caption
from dopsd.data.folder_files import file_in
from dopsd.data.metadata import CAPTION_COLUMNS
from dopsd.files import decode_line, read_jsonl, read_lines

# rewrite: the target's own scene in other words; scene: its object in another scene
KINDS = ("", "rewrite", "scene")


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt.

    target: image that the generated one should resemble. kind: one of KINDS. scored_as: the prompt
    in words that a text metric knows ("zib" replaced by "dog"). name: of the row. row: all of it.
    """

    prompt: str
    target: Path | None = None
    kind: str = ""
    scored_as: str = ""
    name: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> tuple[EvaluationPrompt, ...]:
    """Prompts of a `.txt` (one a line), a `.jsonl` (`prompt` and, optionally, `target`, `kind`,
    `scored_as`; targets relative to the file), or a folder of `.txt` files with one prompt each (as
    DPG-Bench's). Raises ValueError, naming file and line, for one that cannot be used."""
    if path.is_dir():
        prompts = [
            EvaluationPrompt(
                as_caption(decode_line(file.read_bytes(), file.name), file.name), name=file.stem
            )
            for file in sorted(path.glob("*.txt"))
        ]
    elif not path.is_file():
        raise ValueError(
            f"{path} does not exist: give a .txt or .jsonl of prompts, or a folder of .txt."
        )
    elif path.suffix == ".jsonl":
        prompts = [_prompt_of(row, path, number) for number, row in read_jsonl(path)]
    else:
        prompts = [
            EvaluationPrompt(
                as_caption(decode_line(line, where := f"{path.name} line {number}"), where),
                name=f"{number}",
            )
            for number, line in read_lines(path)
        ]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return tuple(prompts)


READ = (".txt", ".jsonl")
NOT_READ = (
    ".json",
    ".csv",
    ".tsv",
    ".yaml",
    ".yml",
    ".toml",
    ".md",
    ".parquet",
    ".text",
    ".prompt",
)


def is_file_name(text: str) -> bool:
    """Whether a text where a prompt stands is meant as a file: it ends like one and is there, or
    holds no space as a prompt would."""
    ends_like_one = text.lower().endswith((*READ, *NOT_READ))
    return ends_like_one and (" " not in text or Path(text).expanduser().is_file())


def prompts_of(texts: Sequence[str], called: str) -> tuple[EvaluationPrompt, ...]:
    """A list of prompts, or those of the one file that it names. called: the list, for messages.
    Raises ValueError for a file among prompts, and one that cannot be read."""
    files = [text for text in texts if is_file_name(text)]
    if files and len(texts) > 1:
        raise ValueError(
            f"{called} names the file {files[0]} among {len(texts)} entries: give one file alone, "
            "or prompts."
        )
    if files and not files[0].lower().endswith(READ):
        raise ValueError(f"{called} names {files[0]}: prompts are read from .txt and .jsonl files.")
    if files:
        return read_prompts(Path(files[0]).expanduser())
    return tuple(EvaluationPrompt(text, name=str(index)) for index, text in enumerate(texts))


def _prompt_of(row: dict[str, Any], path: Path, number: int) -> EvaluationPrompt:
    where = f"{path.name} line {number}"
    columns = [column for column in CAPTION_COLUMNS if column in row]
    if not columns:
        raise ValueError(f"{where} has no prompt: a row is a JSON object with `prompt`.")
    prompt = as_caption(row[columns[0]], f"the prompt of {where}")
    kind = row.get("kind", "")
    if kind not in KINDS:
        raise ValueError(f"the kind of {where} is {kind!r}: rewrite, scene, or none.")
    target = None
    if row.get("target") is not None:
        name = as_caption(row["target"], f"the target of {where}")
        target = file_in(path.parent, name) or path.parent / name
        if not target.is_file():
            raise ValueError(
                f"{where} names the target {row['target']}, and there is no such file in "
                f"{path.parent}."
            )
    scored_as = as_caption(row["scored_as"], f"scored_as of {where}") if "scored_as" in row else ""
    return EvaluationPrompt(prompt, target, kind, scored_as, name=str(number - 1), row=row)
