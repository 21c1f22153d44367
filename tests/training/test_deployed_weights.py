"""LoRA trained on other weights than the deployed ones: which weights train, and which are used for
previews and export."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dopsd.config.recipe import parse_recipe
from dopsd.diffusion.sampling import noise_for
from dopsd.models import load_family
from dopsd.models.lora import merge_loras
from dopsd.models.lora_source import LoraFile
from dopsd.pocket.__main__ import app
from dopsd.runs.check import check
from dopsd.runs.outputs.metadata import weights_metadata
from dopsd.runs.resolve import resolve
from dopsd.runs.session import Session

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many_step_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "model"
    assert CliRunner().invoke(app, ["many-step", str(folder)]).exit_code == 0
    return folder


def recipe_for(concept, output, **model):
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"} | model,
            "data": {"folder": str(concept)},
            "method": {"name": "sft"},
            "lora": {"rank": 4, "alpha": 8},
            "train": {"max_steps": 1},
            "output_dir": str(output),
            "run_name": "elsewhere",
        }
    )


def opened(recipe, pocket, text_encoder):
    """A session whose student has moved."""
    session = Session.open(resolve(recipe), False, text_encoder.context(["a"]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in session.trainable.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return session


def answer(velocity, pocket, text_encoder):
    latents = noise_for([5, 6], pocket.channels, 16, 16).start
    with torch.no_grad():
        return velocity(
            latents,
            torch.tensor([0.9, 0.5]),
            text_encoder.context(["a star", "a big toy at the left"]),
        )


def with_lora(family, file):
    denoiser = family.load_denoiser(CPU, torch.float32)
    merge_loras(denoiser.network, [LoraFile(file)], family)
    return denoiser


def test_lora_trains_on_the_many_step_model_and_is_shown_and_saved_for_the_distilled_one(
    many_step_model, concept, tmp_path, pocket, pocket_text_encoder
):
    session = opened(
        recipe_for(concept, tmp_path, train_on=str(many_step_model)), pocket, pocket_text_encoder
    )

    def ask(velocity):
        return answer(velocity, pocket, pocket_text_encoder)

    many_step, own = (
        each.load_denoiser(CPU, torch.float32)
        for each in (load_family(str(many_step_model)), pocket)
    )
    assert torch.equal(ask(session.roles.base), ask(many_step)) and torch.equal(
        ask(session.deployed_roles.base), ask(own)
    )
    assert (ask(many_step) - ask(own)).abs().max() > 0.01
    session.export(tmp_path / "lora.safetensors", weights_metadata(session.run, 1))
    trained, shown = ask(session.roles.student), ask(session.deployed_roles.student)
    torch.testing.assert_close(
        ask(with_lora(pocket, tmp_path / "lora.safetensors")), shown, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        ask(with_lora(load_family(str(many_step_model)), tmp_path / "lora.safetensors")),
        trained,
        atol=1e-4,
        rtol=0,
    )
    assert weights_metadata(session.run, 1)["trained_on"] == "model"


def test_a_training_adapter_is_in_the_weights_that_train_and_not_in_the_deployed_ones(
    concept, tmp_path, pocket, pocket_text_encoder
):
    first = opened(recipe_for(concept, tmp_path), pocket, pocket_text_encoder)
    adapter = tmp_path / "adapter.safetensors"
    first.export(adapter, weights_metadata(first.run, 1))
    session = opened(
        recipe_for(concept, tmp_path, training_adapter=str(adapter)), pocket, pocket_text_encoder
    )

    def ask(velocity):
        return answer(velocity, pocket, pocket_text_encoder)

    torch.testing.assert_close(
        ask(session.roles.base), ask(with_lora(pocket, adapter)), atol=1e-5, rtol=0
    )
    assert torch.equal(
        ask(session.deployed_roles.base), ask(pocket.load_denoiser(CPU, torch.float32))
    )
    session.export(tmp_path / "lora.safetensors", weights_metadata(session.run, 1))
    deployed = ask(with_lora(pocket, tmp_path / "lora.safetensors"))
    torch.testing.assert_close(ask(session.deployed_roles.student), deployed, atol=1e-4, rtol=0)
    assert (ask(session.roles.student) - deployed).abs().max() > 1e-3
    assert len(weights_metadata(session.run, 1)["training_adapter_sha256"]) == 64


def test_without_other_weights_the_deployed_roles_are_those_that_train(
    concept, tmp_path, pocket, pocket_text_encoder
):
    session = opened(recipe_for(concept, tmp_path), pocket, pocket_text_encoder)
    assert session.deployed_roles is session.roles


def test_another_architecture_is_refused_by_check(many_step_model, concept, tmp_path):
    config = many_step_model / "transformer" / "config.json"
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"n_layers": 2}))
    try:
        with pytest.raises(
            ValueError, match=r"model\.train_on .* is of another architecture than pocket"
        ):
            check(resolve(recipe_for(concept, tmp_path, train_on=str(many_step_model))))
    finally:
        config.write_text(original)


@pytest.mark.parametrize(
    "other", [{"quantize": "nf4"}, {"offload": True}, {"training_adapter": "a.safetensors"}]
)
def test_settings_that_exclude_one_another_are_refused(other, concept, tmp_path):
    with pytest.raises(ValueError, match="exclude one another: choose one"):
        recipe_for(concept, tmp_path, train_on="somewhere", **other)
    with pytest.raises(ValueError, match="adapter: full trains the deployed weights themselves"):
        parse_recipe(
            recipe_for(concept, tmp_path, train_on="somewhere").model_dump() | {"adapter": "full"}
        )
