"""Bad recipes, checkpoints, runs, LoRA files and arguments: each ends with exit code 2 and one
sentence, and changes no file.

Bad image folders are in data/test_bad_images.py. An expected message that begins with "late! "
belongs to a case that is refused only after something has been written (a log line, a cache); it
must not change or remove what was there.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.pocket import CHECKPOINT as POCKET

# Makes the bad input in the working folder, which holds a valid images/ and recipe.yaml.
Build = Callable[[], object]
Command = tuple[str, ...]
# The folder of the fixture `valid_inputs`: images, recipe.yaml and the run that it trains.
VALID_INPUTS: list[Path] = []
MAX_MESSAGE_LENGTH = 2000  # characters
DEEPLY_NESTED = "[" * 20_000
RECIPE = {
    "model": {"name_or_path": "pocket", "memory": "high"},
    "data": {"folder": "images"},
    "method": {"name": "sft"},
    "lora": {"rank": 2},
    "train": {"max_steps": 2},
    "sample": {"every": 0, "prompts": "a star"},
    "save": {"every": 1},
    "health": {"every": 0},
}


def in_turn(*builds: Build) -> Build:
    return lambda: [build() for build in builds]


def write(path: str | Path, content: str | bytes) -> Build:
    """Write a file in place of the one at the path, which may be a link."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).write_bytes(data))


def remove(path: str | Path) -> Build:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def edit(path: str | Path, **changes: object) -> Build:
    """Change values of a JSON file."""
    return lambda: write(path, json.dumps(json.loads(Path(path).read_text()) | changes))()


def model(*builds: Build, source: str = ".", to: str = "model") -> Build:
    """Copy the pocket checkpoint with its weights as links, then apply the builds."""

    def place(old: str, new: str) -> None:
        (os.symlink if old.endswith(".safetensors") else shutil.copy)(old, new)

    return in_turn(lambda: shutil.copytree(POCKET / source, to, copy_function=place), *builds)


def finished(*builds: Build) -> Build:
    """Copy the finished run of recipe.yaml (two steps, two checkpoints), then apply the builds."""
    return in_turn(lambda: shutil.copytree(VALID_INPUTS[0] / "runs", "runs"), *builds)


def damaged_checkpoints(change: Callable[[Path], Build]) -> Build:
    """Damage all checkpoints of the run: it would fall back to one that is intact."""
    return finished(lambda: [change(path)() for path in sorted(Path(RUN, "checkpoints").iterdir())])


def swap(path: str, old: str, new: str) -> Build:
    return lambda: write(path, Path(path).read_text().replace(old, new))()


def tensors(named: dict[str, Tensor], adapter_metadata: str = "{}") -> Build:
    """Write a LoRA file; adapter_metadata: the JSON text with its alpha and rank."""
    copies = {name: tensor.clone() for name, tensor in named.items()}
    return lambda: save_file(copies, FILE, {"lora_adapter_metadata": adapter_metadata})


def lora(
    a: Tensor | None,
    b: Tensor | None,
    to: str = "layers.0.attention.to_q",
    adapter_metadata: str = "{}",
    **more: Tensor,
):
    """Write a LoRA file of one module; more: further tensors by the ends of their names."""
    named = {"lora_A.weight": a, "lora_B.weight": b, **more}
    return tensors(
        {f"transformer.{to}.{end}": t for end, t in named.items() if t is not None},
        adapter_metadata,
    )


def trained_lora(change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor) -> Build:
    """Copy the LoRA of the finished run and change its tensors."""
    return lambda: tensors(
        {
            n: change(n, t)
            for n, t in load_file(VALID_INPUTS[0] / RUN / "recipe.safetensors").items()
        }
    )()


nothing, vlm = in_turn(), partial(model, source="vlm", to="vlm")
FILE, RUN, STATE, LAST = "lora.safetensors", "runs/recipe", "state.json", "student.safetensors"
CHECK, TRAIN, COMPARE = (
    ("check", "recipe.yaml"),
    ("train", "recipe.yaml"),
    ("compare", "recipe.yaml"),
)
NO_YAML, NO_SECTIONS = (
    "recipe.yaml is not valid YAML",
    "recipe.yaml must hold sections (model, data, method, ...), not",
)
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "unclosed list": ("a: [1", NO_YAML),
    "NUL character": ("a: \0", NO_YAML),
    "impossible date": ("a: 2020-13-45", NO_YAML),
    "Python object tag": ("a: !!python/object/apply:os.getcwd []", NO_YAML),
    "two documents": ("a: 1\n---\na: 2", NO_YAML),
    "20000 nested lists": (DEEPLY_NESTED, NO_YAML),
    "comments only": ("# to do\n", NO_SECTIONS),
    "empty file": ("", NO_SECTIONS),
    "list instead of sections": ("- model", NO_SECTIONS),
    "Latin-1 encoding": (b"a: \xea", "recipe.yaml is not UTF-8"),
    "missing sections": ("run_name: a", "model is missing. data is missing. method is missing."),
    "section that contains itself": (
        "model: &a {name_or_path: *a}",
        "model.name_or_path is {'name_or_path': {",
    ),
    "exponentially expanding aliases": (
        f"a: &a [{'1,' * 99}1]\nb: &b [{'*a,' * 99}*a]\nlora: [{'*b,' * 9}*b]",
        "lora is",
    ),
    "duplicate section": (yaml.safe_dump(RECIPE) + "lora: {rank: 8}\n", "lora"),
}
WRONG = """
    lora.rank=0 lora.rank=-1 lora.rank=1.5 lora.rank=many lora.rank= lora.rank=true lora.alpha=0
    lora.alpha=-1 lora.alpha=.nan lora.alpha=.inf train.max_steps=0
    train.max_steps=-1 train.max_steps=many train.batch_size=0 train.batch_size=-1
    train.gradient_accumulation_steps=0 train.learning_rate=0 train.learning_rate=-1
    train.learning_rate=.nan train.learning_rate=.inf train.learning_rate=fast
    train.warmup_steps=-1 train.weight_decay=-0.1 train.max_grad_norm=0
    train.max_skipped_steps=0 train.seed=-1 train.seed=100000000000000000000
    train.lr_schedule=linear sample.every=-1 sample.nfe=0 sample.seed=-1
    sample.seed=100000000000000000000 sample.width=0 sample.width=-8 sample.height=0
    health.every=-1 save.every=-1 save.keep_last=1 save.keep_last=0 data.repeats=0 data.weight=0
    data.weight=.inf data.caption_dropout=1 data.caption_dropout=-0.1 data.trigger=''
    method.nfe=0 method.nfe=-1 method.shift=0 method.times=sometimes model.dtype=fp8
    model.memory=medium model.allow_base=perhaps track.project='' run_name=a/b run_name=''
    run_name=.. output_dir= health.prompts=star health.prompts=[star]
"""
# A --set of an otherwise valid recipe: part of the message.
SETTINGS = {
    **{
        s: f"{s.partition('=')[0]} is {yaml.safe_load(s.partition('=')[2])!r}: "
        for s in WRONG.split()
    },
    "lora.rank": "--set lora.rank: write it as key=value",
    "=3": "--set =3: write it as key=value",
    "lora.rank.x=1": "--set lora.rank.x=1: rank is a value",
    "lora=7": "lora is 7, not a section: write lora: {rank: 7}",
    "lora=": "lora is None, not a section",
    "train=[1]": "train is [1], not a section",
    "lora.rank=[1": "'[1' is not a YAML value",
    f"lora.rank={DEEPLY_NESTED}": "--set lora.rank=",
    "run_name=2020-13-45": "--set run_name=",
    "lora.rnak=8": "lora.rnak is no key of a recipe (did you mean lora.rank",
    "method.name=magic": "one of dopsd, sft",
    "method.teacher_decay=1": "teacher_decay is no key of a recipe; it is one of dopsd",
    "method={nfe: 4}": "one of dopsd, sft",
    "method={name: dopsd, teacher_decay: 2}": "method.teacher_decay is 2: input should be less",
    "track.to=mlflow": "is 'mlflow': input should be 'tensorboard'",
    "data.folder=nowhere": "nowhere is not a folder",
    "sample.prompts=[[a]]": "sample.prompts.0 is ['a']",
    "data.more=[{folder: gone}]": "gone is not a folder",
    "data.caption_extension=a/b": "caption_extension",
    "data.trigger=' '": "data.trigger is ' '",
    "data.resolution=0": "data.resolution.0 is 0",
    "data.resolution=[64, -8]": "data.resolution.1 is -8",
    "data.resolution=big": "resolution.0 is 'big'",
    "data.resolution=3": "data.resolution is 3; sides of this model's images are multiples of",
    "data.resolution=60": "are multiples of 8 pixels: set 56 or 64",
    "data.resolution=[64, 1001]": "data.resolution is 1001;",
    "sample.width=60": "sample.width is 60;",
    "sample.prompts=[{prompt: a, height: 1}]": "the height of a prompt is 1; ",
    "sample.prompts=p.csv": "prompts are read from .txt and .jsonl files",
    "data.instance_prompt=caption.txt": "caption.txt stands where a caption is expected",
    "method={name: dreambooth, class_prompt: dog.txt}": "dog.txt stands where a caption is",
    "sample.prompts=p.txt": "p.txt does not exist: give a .txt or .jsonl of prompts",
    "sample.prompts=[a star, p.txt]": "sample.prompts names the file p.txt among 2 entries",
    "health.prompts=[a star, p.jsonl]": "health.prompts names the file p.jsonl among 2",
    "health.prompts=p.txt": "p.txt does not exist",
    'data.folder="C:\\new\\train"': "write the path in single quotes",
    'model.name_or_path="C:\\base\\turbo"': "write the path in single quotes",
    'output_dir="D:\\runs"': "write the path in single quotes",
    "lora.targets=nope": "the LoRA targets 'nope' match no linear layer",
    "lora.targets=(": "targets",
    "lora.targets=''": "lora.targets",
    "lora.init_from=images": "images is a folder without a LoRA file",
    "lora.init_from=gone.safetensors": "gone.safetensors is not a readable safetensors file",
    "model.name_or_path=./gone": "./gone does not exist: give a folder",
    "model.name_or_path=a b/c": "a b/c",
    "model.name_or_path=images": "images has no model_index",
    "model.name_or_path=''": "name_or_path",
    "model.name_or_path=owner/name": "owner/name is not a local folder and not complete in the hub",
    f"model.name_or_path={'x' * 300}": "does not exist",
    "lora.network_dim=8": "network_dim is lora.rank here",
    "train.lr=1": "lr is train.learning_rate here",
    "train.max_train_steps=5": "is train.max_steps here",
}
INDEX, VAE, NET = "model/model_index.json", "model/vae/config.json", "model/transformer/config.json"
SCHEDULER, SETTINGS_FILE, TEXT = (
    "model/scheduler/scheduler_config.json",
    "model/dopsd.json",
    "model/text_encoder",
)
MODELS: dict[str, tuple[Build, str]] = {
    "index missing": (remove(INDEX), "no model_index.json"),
    "index truncated": (write(INDEX, "{"), "is not valid JSON"),
    "index deeply nested": (write(INDEX, DEEPLY_NESTED), "index"),
    "index a list": (write(INDEX, "[]"), "index"),
    "index of another pipeline": (edit(INDEX, _class_name="FluxPipeline"), "is a FluxPipeline"),
    "component null": (edit(INDEX, vae=None), "lacks vae in its"),
    "component folder missing": (remove(TEXT), "the folder text_encoder"),
    "many-step base model": (edit(SCHEDULER, shift=6.0), "many-step base model"),
    "scheduler config missing": (remove(SCHEDULER), "scheduler"),
    "VAE config truncated": (write(VAE, "{"), "vae"),
    "VAE config a list": (write(VAE, "[]"), "vae"),
    "VAE config empty": (write(VAE, "{}"), "vae"),
    "transformer config missing": (remove(NET), "transformer"),
    "transformer config with a word for a number": (edit(NET, dim="wide"), "transformer"),
    "dopsd.json a list": (write(SETTINGS_FILE, "[]"), "json"),
    "dopsd.json truncated": (write(SETTINGS_FILE, "{"), "dopsd.json"),
}
RESUME, NOT_WHOLE = (*TRAIN, "--resume", "latest"), "is not a complete checkpoint of dopsd"
STATES = ('{"step":', b"\xff", "{}", "[]", DEEPLY_NESTED, '{"sha256": []}')
RUNS: dict[str, tuple[Build, Command, str]] = {
    "train into a finished run": (finished(), TRAIN, "runs/recipe already holds a run"),
    "resume without a run": (nothing, RESUME, "runs/recipe holds no run yet: leave out --resume"),
    "resume without a run from a folder": (
        nothing,
        (*TRAIN, "--resume", "images"),
        "runs/recipe holds no run yet",
    ),
    "check a run folder": (finished(), ("check", RUN), f"give a recipe file, such as {RUN}/config"),
    "check a LoRA file": (
        finished(),
        ("check", f"{RUN}/recipe.safetensors"),
        "holds weights and is no recipe: `dopsd inspect",
    ),
    "resume from a missing checkpoint": (
        finished(),
        (*TRAIN, "--resume", "gone"),
        "--resume gone: there is no such checkpoint folder",
    ),
    "resume with another rank": (
        finished(),
        (*RESUME, "--set", "lora.rank=4"),
        "begun with lora.rank = 2, now it is",
    ),
    "resume without config.yaml": (
        finished(remove(f"{RUN}/config.yaml")),
        RESUME,
        "runs/recipe/config.yaml does not exist",
    ),
    "checkpoint with one changed byte": (
        damaged_checkpoints(
            lambda path: write(path / LAST, (path / LAST).read_bytes()[:-1] + b"\x7f")
        ),
        RESUME,
        "late! is damaged",
    ),
    "checkpoint without its teacher": (
        damaged_checkpoints(lambda path: remove(path / "teacher.safetensors")),
        RESUME,
        f"late! {NOT_WHOLE}",
    ),
    **{
        f"checkpoint with state.json {text[:14]!r}": (
            damaged_checkpoints(lambda path, t=text: write(path / STATE, t)),
            RESUME,
            f"late! {NOT_WHOLE}",
        )
        for text in STATES
    },
    **{
        f"checkpoint of step {step}": (
            damaged_checkpoints(lambda path, s=step: edit(path / STATE, step=s)),
            RESUME,
            f"late! {NOT_WHOLE} ({STATE}",
        )
        for step in (None, "one", -1)
    },
    "checkpoint of another rank": (
        finished(swap(f"{RUN}/config.yaml", "rank: 2", "rank: 4")),
        (*RESUME, "--set", "lora.rank=4"),
        "late! was lora.rank changed?",
    ),
    "checkpoint of other modules": (
        finished(swap(f"{RUN}/config.yaml", "targets: null", "targets: .*to_q")),
        (*RESUME, "--set", "lora.targets=.*to_q"),
        "late! was lora.targets changed?",
    ),
    "resume with metrics without steps": (
        finished(write(f"{RUN}/metrics.jsonl", "{}\n")),
        RESUME,
        "metrics.jsonl",
    ),
    "compare without config.yaml": (finished(remove(f"{RUN}/config.yaml")), COMPARE, "config.yaml"),
    "compare without metrics.jsonl": (
        finished(remove(f"{RUN}/metrics.jsonl")),
        COMPARE,
        "metrics.jsonl",
    ),
}
A, B, ONE = torch.ones(4, 128), torch.ones(128, 4), torch.ones(())
UNREADABLE, NO_LORA, NO_PAIR = (
    f"{FILE} is not a readable safetensors",
    f"{FILE} is no LoRA",
    "none belongs to an adapter",
)
# What to build, and the messages of `sample --lora` and of `inspect` (None: inspect accepts it).
LORAS: dict[str, tuple[Build, str, str | None]] = {
    "file missing": (nothing, UNREADABLE, UNREADABLE),
    "text file": (write(FILE, "a pointer"), UNREADABLE, UNREADABLE),
    "empty file": (write(FILE, ""), UNREADABLE, UNREADABLE),
    "no tensors": (tensors({}), NO_LORA, NO_PAIR),
    "truncated file": (
        in_turn(lora(A, B), lambda: os.truncate(FILE, 3000)),
        UNREADABLE,
        UNREADABLE,
    ),
    "pickled file": (lambda: torch.save({"lora_A.weight": A}, FILE), UNREADABLE, UNREADABLE),
    "folder": (lambda: Path(FILE).mkdir(), f"{FILE} is a folder", f"{FILE} is a folder"),
    "B without A": (lora(None, B), "lora_A is missing", None),
    "no LoRA tensors": (tensors({"layers.0.weight": A}), NO_LORA, NO_PAIR),
    "A without B": (lora(A, None), "lora_B is missing", None),
    "DoRA": (lora(A, B, dora_scale=A), "DoRA", None),
    "half a LoKr": (lora(None, None, lokr_w1=A), "lacks lokr_w2_a", None),
    "half a LoHa": (lora(None, None, hada_w1_a=A), "lacks hada_w1_b", None),
    "two adapters of one module": (lora(A, B, diff=A), "has diff beside a", None),
    "unknown extra tensor": (lora(A, B, extra=A), NO_LORA, None),
    "alpha a vector": (lora(A, B, alpha=A[0]), "has an alpha of 128 numbers", None),
    "A too narrow": (lora(A[:, :9], B), "as 128 x 9;", None),
    "A and B one-dimensional": (lora(A[0], B[:, 0]), "do not make a LoRA", None),
    "B too short": (lora(A, B[:9]), "as 9 x 128;", None),
    "A and B scalars": (lora(ONE, ONE), "do not make a LoRA", None),
    "A and B of different ranks": (lora(A, B[:, :3]), "do not make a LoRA", None),
    "module that the model lacks": (
        lora(A, B, "layers.99.attention.to_q"),
        "layers.99.attention.to_q, which this model does not",
        None,
    ),
    "NaN": (lora(A * torch.nan, B), "layers.0.attention.to_q holds NaN or infinite values", None),
    "int8": (lora(A, B.to(torch.int8)), "is stored as torch.int8", None),
    "metadata truncated": (lora(A, B, adapter_metadata="{"), "its lora_adapter_metadata", None),
    "metadata a list": (lora(A, B, adapter_metadata="[]"), "its lora_adapter_metadata", None),
}
FROM, LOADED = (
    (*TRAIN, "--set", f"lora.init_from={FILE}"),
    (*TRAIN, "--set", "model.name_or_path=./model"),
)
WITH_VLM = ("--set", "method={name: dopsd, nfe: 1}", "--set", "model.vlm=./vlm")
VLM, LIMIT, LONG_PROMPT = (
    "the teacher's VLM ./vlm",
    "tokens; the limit is 512. Shorten it",
    "star " * 600,
)
WEIGHTS, VOCABULARY = (
    "model/transformer/diffusion_pytorch_model.safetensors",
    "model/tokenizer/tokenizer.json",
)
TRAINED: dict[str, tuple[Build, Command, str]] = {
    "init_from of another rank": (
        trained_lora(),
        (*FROM, "--set", "lora.rank=1"),
        "has rank 2 and lora.rank is 1: set lora.rank: 2",
    ),
    "init_from of other modules": (
        lora(A[:2], B[:, :2], "t_embedder.mlp.0"),
        FROM,
        "adapts other modules than lora.targets",
    ),
    "init_from with A too narrow": (
        trained_lora(lambda name, t: t[:, :9] if "lora_A" in name else t),
        FROM,
        " as 128 x 9, and here it is 128 x 128: it was made for another model",
    ),
    "init_from with B too short": (
        trained_lora(lambda name, t: t[:1] if "lora_B" in name else t),
        FROM,
        "lora.init_from adapts",
    ),
    "VLM missing": (nothing, (*TRAIN, *WITH_VLM), VLM),
    "VLM missing in check": (nothing, (*CHECK, *WITH_VLM), VLM),
    "VLM truncated": (vlm(write("vlm/model.safetensors", "")), (*TRAIN, *WITH_VLM), f"late! {VLM}"),
    "VLM without processor": (
        vlm(remove("vlm/preprocessor_config.json")),
        (*TRAIN, *WITH_VLM),
        VLM,
    ),
    "VLM of another size": (
        in_turn(
            vlm(),
            model(
                edit(f"{TEXT}/config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
            ),
        ),
        (*LOADED, *WITH_VLM),
        "does not match the checkpoint's text encoder: num_hidden_layers 3, not 2. Set model.vlm",
    ),
    "VLM of another architecture": (
        vlm(edit("vlm/config.json", model_type="qwen2_vl")),
        (*CHECK, *WITH_VLM),
        f"{VLM} is a qwen2_vl, not a Qwen3-VL",
    ),
    "transformer weights missing": (model(remove(WEIGHTS)), LOADED, "late! transformer"),
    "text encoder truncated": (
        model(write(f"{TEXT}/model.safetensors", "")),
        LOADED,
        "late! text_encoder",
    ),
    "tokenizer vocabulary missing": (model(remove(VOCABULARY)), LOADED, "./model"),
    "caption over the limit": (write("images/0.txt", LONG_PROMPT), TRAIN, LIMIT),
    "preview size not a multiple of 8": (
        nothing,
        (*TRAIN, "--set", "sample.width=65"),
        "sample.width is 65; sides of this model",
    ),
    "output_dir inside a file": (
        nothing,
        (*TRAIN, "--set", "output_dir=recipe.yaml"),
        "recipe.yaml/recipe cannot be written",
    ),
    "run_name too long": (nothing, (*TRAIN, "--set", "run_name=" + "a" * 300), "run_name is 'aaa"),
}
GENERATE = ("sample", "a star", "--model", "pocket", "--nfe", "1")
ARGUMENTS: dict[Command, str] = {
    ("check", "images"): "images is a folder: give a recipe file.",
    ("check", "images/0.png"): "images/0.png is not UTF-8",
    ("sample",): "'prompts'",
    ("train", "gone.yaml"): "gone.yaml does not exist: give a recipe file",
    ("sample", "a", "--nfe", "0"): "'--nfe'",
    ("sample", LONG_PROMPT, "--model", "pocket"): LIMIT,
    ("sample", "a star", "--model", "./gone"): "./gone does not exist",
    (*GENERATE, "--width", "65"): "65 x 64 pixels: both sides must be multiples of 8",
    (*GENERATE, "--width", "-8"): "'--width'",
    (*GENERATE, "--width", "0"): "width",
    (*GENERATE, "--seed", "9" * 20): "seed",
    (*GENERATE, "--strength", "nan"): "strength",
    (*GENERATE, "--out", "recipe.yaml"): "recipe.yaml",
    (*GENERATE, "--lora", "a.bin"): "a.bin is not a .safetensors file",
    ("list", "--json", "images"): "images",
    ("init", "magic"): "choose one of dopsd, sft",
    ("init", "sft", "--out", "recipe.yaml"): "is not overwritten",
    ("init", "sft", "--out", "recipe.yaml/new.yaml"): "recipe.yaml/new.yaml",
}
# name: (what to build, command, part of the message)
CASES: dict[str, tuple[Build, Command, str]] = {
    **{
        f"recipe: {name}": (write("recipe.yaml", text), CHECK, message)
        for name, (text, message) in TEXTS.items()
    },
    **{
        f"--set {s[:40]}": (nothing, (*CHECK, "--set", s), message)
        for s, message in SETTINGS.items()
    },
    **{
        f"model: {name}": (model(build), ("check", *LOADED[1:]), message)
        for name, (build, message) in MODELS.items()
    },
    **RUNS,
    **TRAINED,
    **{
        " ".join(command)[:50]: (nothing, command, message)
        for command, message in ARGUMENTS.items()
    },
    **{
        f"sample: {name}": (build, (*GENERATE, "--lora", FILE), message)
        for name, (build, message, _) in LORAS.items()
    },
    **{
        f"inspect: {n}": (build, ("inspect", FILE), message)
        for n, (build, _, message) in LORAS.items()
        if message
    },
}
IN_OWN_PROCESS = (
    "recipe: empty file",
    "inspect: text file",
    "inspect: truncated file",
    "inspect: file missing",
    "inspect: no LoRA tensors",
    "init magic",
    "inspect: folder",
    "init sft --out recipe.yaml",
    "sample a --nfe 0",
    "sample",
)
LATE = [name for name, (_, _, message) in CASES.items() if message.startswith("late! ")]


def snapshot(folder: Path) -> dict[str, object]:
    """Every path under the folder with its bytes, or the target of a link; None for a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def refused(name: str, code: int, printed: str) -> bool:
    """Whether a case ended with exit code 2 and one sentence of dopsd, or with the usage error of
    Typer."""
    before, prefix, sentence = " ".join(printed.split()).rpartition("dopsd: ")
    whole = (
        prefix and sentence.endswith((".", "?")) and len(sentence) < MAX_MESSAGE_LENGTH
    ) or "Usage:" in sentence
    return bool(
        code == 2
        and whole
        and CASES[name][2].rpartition("! ")[2] in sentence
        and "Traceback" not in before
    )


@pytest.fixture(scope="module", autouse=True)
def valid_inputs(tmp_path_factory) -> None:
    VALID_INPUTS[:] = [tmp_path_factory.mktemp("valid")]
    with contextlib.chdir(VALID_INPUTS[0]):
        Path("images").mkdir()
        for index in range(2):
            Image.new("RGB", (64, 64), (90 * index, 9, 9)).save(f"images/{index}.png")
            Path(f"images/{index}.txt").write_text("a red star")
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        assert CliRunner().invoke(app, TRAIN).exit_code == 0


def lay_out(name: str, folder: Path) -> dict[str, object]:
    """Build a case in an empty folder and return its snapshot."""
    shutil.copytree(VALID_INPUTS[0] / "images", folder / "images")
    shutil.copy(VALID_INPUTS[0] / "recipe.yaml", folder)
    with contextlib.chdir(folder):
        CASES[name][0]()
    return snapshot(folder)


def run_in(folder: Path, name: str, monkeypatch) -> None:
    """Run a case in this process and assert that it is refused."""
    monkeypatch.chdir(folder)
    # A library may log to the closed stream of an earlier case.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    if "VLM" not in name:  # the memory forecast takes seconds and refuses none of the other cases
        monkeypatch.setattr("dopsd.cli.train.print_memory", lambda *_: None)
    result = CliRunner().invoke(app, CASES[name][1])
    assert refused(name, result.exit_code, result.output), (
        result.exit_code,
        result.exception,
        result.output,
    )


def expected_to_write(name: str):
    """The parameter of a case; one that is refused late fails where nothing may be written."""
    late = CASES[name][2].rpartition("! ")[0]
    return pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=late)) if late else name


@pytest.mark.parametrize("name", map(expected_to_write, CASES))
def test_bad_input_is_refused_with_one_sentence_and_changes_no_file(name, tmp_path, monkeypatch):
    before = lay_out(name, tmp_path)
    run_in(tmp_path, name, monkeypatch)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", LATE)
def test_input_that_is_refused_late_adds_files_and_changes_none(name, tmp_path, monkeypatch):
    before = lay_out(name, tmp_path)
    run_in(tmp_path, name, monkeypatch)
    after = snapshot(tmp_path)
    log = f"{RUN}/run.log"
    if log in before:
        assert after[log].startswith(before.pop(log))
    assert after != before and after == after | before


@pytest.mark.parametrize("name", IN_OWN_PROCESS)
def test_the_command_in_its_own_process_refuses_the_same_input(name, tmp_path):
    before = lay_out(name, tmp_path)
    command = [sys.executable, "-m", "dopsd.cli", *CASES[name][1]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused(name, result.returncode, result.stderr) and not result.stdout, result
    assert snapshot(tmp_path) == before


def test_at_least_220_cases_are_distinct(tmp_path):
    commands_and_folders = [
        (case[1], lay_out(name, tmp_path / str(i))) for i, (name, case) in enumerate(CASES.items())
    ]
    assert len({repr(each) for each in commands_and_folders}) == len(CASES) >= 220
