"""LoRA files of other tools: every public form is read, described or refused; models are found by
their metadata."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from lora_files import FORMS, MODULES, SCALE, deltas, kohya_names, peft_names
from safetensors.torch import save_file

from dopsd.config.recipe import parse_recipe
from dopsd.models.folder import fuse
from dopsd.models.inspection import inspect_lora
from dopsd.models.lora import ModelReference, merge_loras, model_for, read_lora
from dopsd.models.lora_source import LoraFile
from dopsd.models.pipeline import sample
from dopsd.runs.train import train


@pytest.fixture(params=FORMS)
def file(request, tmp_path: Path) -> Path:
    make, metadata = FORMS[request.param]
    save_file(make(), tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors"


def test_every_public_form_of_a_lora_reads_as_the_same_deltas(file, pocket):
    pairs = read_lora(file, pocket)
    assert pairs.keys() == MODULES.keys()
    for name, (a, b) in deltas().items():
        torch.testing.assert_close(
            pairs[name].dense(), (b.double() @ a.double()) * SCALE, atol=1e-6, rtol=1e-6
        )


def test_a_merged_foreign_file_changes_exactly_its_modules(pocket, tmp_path):
    save_file(
        {k: v for k, v in kohya_names().items() if "feed_forward" not in k},
        tmp_path / "lora.safetensors",
    )
    network = pocket.load_denoiser(torch.device("cpu"), torch.float32).network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merge_loras(network, [LoraFile(tmp_path / "lora.safetensors")], pocket)
    for name, tensor in network.state_dict().items():
        module = name.removesuffix(".weight")
        if module in MODULES and "feed_forward" not in module:
            a, b = deltas()[module]
            torch.testing.assert_close(tensor, before[name] + b @ a * SCALE, atol=1e-4, rtol=1e-5)
        else:
            assert torch.equal(tensor, before[name]), name


def foreign(tensors: dict[str, torch.Tensor]):
    def make(path: Path) -> None:
        save_file(tensors, path)

    return make


A, B = torch.ones(4, 128), torch.ones(128, 4)
BAD = {
    "pickled": (lambda path: torch.save({"a": A}, path), "not a readable safetensors file"),
    "empty file": (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    "text": (lambda path: path.write_text("hello"), "not a readable safetensors file"),
    "no LoRA": (foreign({"layers.0.weight": A}), "no LoRA"),
    "half a pair": (
        foreign({"transformer.layers.0.attention.to_q.lora_A.weight": A}),
        "is half a LoRA: lora_B is missing",
    ),
    "half a LoKr": (
        foreign({"diffusion_model.layers.0.attention.to_q.lokr_w1": A}),
        "to_q lacks lokr_w2_a",
    ),
    "DoRA": (
        foreign(peft_names("transformer.") | {"transformer.layers.0.attention.to_q.dora_scale": A}),
        "DoRA",
    ),
    "of another family": (
        foreign(
            {
                f"transformer.single_transformer_blocks.0.attn.to_out.lora_{m}.weight": t
                for m, t in (("A", A), ("B", B))
            }
        ),
        "does not have: it is a LoRA of flux2_klein",
    ),
    "of another size": (
        foreign(
            {
                f"transformer.layers.0.attention.to_q.lora_{m}.weight": t
                for m, t in (("A", torch.ones(4, 64)), ("B", B))
            }
        ),
        "as 128 x 64; here it is",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_does_not_fit_is_refused_with_a_sentence(fault, pocket, tmp_path):
    make, sentence = BAD[fault]
    path = tmp_path / "lora.safetensors"
    make(path)
    network = pocket.load_denoiser(torch.device("cpu"), torch.float32).network
    with pytest.raises(ValueError, match=sentence):
        merge_loras(network, [LoraFile(path)], pocket)


def lora_of(path: Path, **metadata: str) -> Path:
    save_file(peft_names("transformer.", SCALE), path, metadata or None)
    return path


def test_without_a_model_the_lora_file_names_it(tmp_path):
    lora = lora_of(tmp_path / "lora.safetensors", base_model="pocket")
    images, expected = (sample(name, ["a star"], lora, nfe=1)[0] for name in (None, "pocket"))
    assert images.tobytes() == expected.tobytes()
    on_the_hub = {"base_model": "owner/sdxl", "distilled_by": "owner/dmd2/lora.safetensors"}
    lora = lora_of(tmp_path / "hub.safetensors", **on_the_hub)
    assert model_for([LoraFile(lora)]) == ModelReference(
        "owner/sdxl", "owner/dmd2/lora.safetensors"
    )
    assert model_for([LoraFile(lora)], "here") == ModelReference("here", None)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "does not record which model it was tuned on: give it with --model"),
        ({"base_model": "my-zimage"}, "a local model called my-zimage, whose path it does not"),
        ({"base_model": "a/b", "distilled_by": "x.safetensors"}, "give it with --distilled-by"),
    ],
)
def test_a_lora_file_that_does_not_lead_to_its_model_is_refused(metadata, sentence, tmp_path):
    lora = lora_of(tmp_path / "lora.safetensors", **metadata)
    for use in (
        lambda: sample(None, ["a star"], lora),
        lambda: fuse(None, lora, tmp_path / "fused"),
    ):
        with pytest.raises(ValueError, match=sentence):
            use()
    with pytest.raises(ValueError, match="no model and no LoRA file"):
        sample(None, ["a star"])


def recipe_from(concept: Path, output: Path, name: str, **lora):
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": "sft"},
            "lora": {"rank": 4} | lora,
            "train": {"max_steps": 1, "learning_rate": 1e-9},
            "sample": {"every": 0, "prompts": "a star"},
            "output_dir": str(output),
            "run_name": name,
        }
    )


def finish(recipe) -> Path:
    for _ in train(recipe):
        pass
    return recipe.run_folder / f"{recipe.run_name}.safetensors"


def test_training_goes_on_from_a_lora_file_whatever_the_alpha(concept, tmp_path, pocket):
    first = recipe_from(concept, tmp_path, "first")
    first = parse_recipe(
        first.model_dump() | {"train": first.train.model_dump() | {"learning_rate": 0.01}}
    )
    start = finish(first)
    again = finish(recipe_from(concept, tmp_path, "second", init_from=str(start), alpha=2))
    left, right = read_lora(start, pocket), read_lora(again, pocket)
    for module, (a, b) in left.items():
        assert b.any()
        torch.testing.assert_close(right[module].dense(), (b @ a).double(), atol=1e-6, rtol=1e-4)
    assert "parent_adapter_sha256" in dict(inspect_lora(again).lines)


def test_the_model_card_is_valid_shows_images_and_contains_no_local_path(concept, tmp_path):
    recipe = recipe_from(concept, tmp_path, "first")
    recipe = parse_recipe(
        recipe.model_dump() | {"data": {"folder": str(concept), "trigger": "zib"}}
    )
    file = finish(recipe)
    text = (recipe.run_folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert (
        card.data.base_model is None  # pocket is no name on the hub
        and card.data.instance_prompt == "zib"
        and card.data.license == "apache-2.0"
    )
    files = re.findall(r"!\[\w+]\(([^)]+)\)", text) + [
        each["output"]["url"] for each in card.data.to_dict()["widget"]
    ]
    assert len(files) == 9 and all((recipe.run_folder / name).is_file() for name in files)
    assert str(tmp_path) not in text
    lines = dict(inspect_lora(file).lines)
    assert lines["data_sha256"] in text and lines["images"] == "4"


def test_training_does_not_start_from_a_lora_of_larger_rank(concept, tmp_path):
    start = finish(recipe_from(concept, tmp_path, "first"))
    with pytest.raises(ValueError, match=r"has rank 4 and lora\.rank is 2: set lora\.rank: 4"):
        finish(recipe_from(concept, tmp_path, "second", init_from=str(start), rank=2))


def test_training_does_not_start_from_a_lora_of_other_modules(concept, tmp_path):
    start = finish(recipe_from(concept, tmp_path, "first"))
    with pytest.raises(ValueError, match="adapts other modules"):
        finish(
            recipe_from(
                concept,
                tmp_path,
                "second",
                init_from=str(start),
                targets=r"layers\.\d+\.attention\.to_q",
            )
        )
