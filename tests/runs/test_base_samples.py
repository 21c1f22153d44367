"""Retention in whole runs: the base model's images are generated once and as it is deployed, and a
resumed run is bit-equal."""

from pathlib import Path

import pytest
import torch
from latents import sample_latents
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.diffusion.sampling import noise_for
from dopsd.runs.base_samples import FIRST_SEED, base_samples
from dopsd.runs.check import check
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

PROMPTS = ["a red star", "a green tree on beach"]


def recipe_of(concept: Path, output: Path, name: str = "run", **sections) -> Recipe:
    tree = {
        "model": {"name_or_path": "pocket", "memory": "high"},
        "data": {"folder": str(concept)},
        "method": {"name": "sft"},
        "retention": {"weight": 1, "samples": 3},
        "lora": {"rank": 4},
        "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-3},
        "sample": {"every": 0, "prompts": "a toy at the left"},
        "save": {"every": 2},
        "output_dir": str(output),
        "run_name": name,
    }
    return parse_recipe({key: tree.get(key, {}) for key in tree} | merged(tree, sections))


def merged(tree: dict, sections: dict) -> dict:
    return {name: tree.get(name, {}) | keys for name, keys in sections.items()}


def test_the_images_are_those_of_the_deployed_model_and_are_generated_once(
    concept, tmp_path, pocket
):
    run = resolve(recipe_of(concept, tmp_path, retention={"prompts": PROMPTS}))
    (samples,) = base_samples(run)
    assert samples.prompts == (PROMPTS[0], PROMPTS[1], PROMPTS[0])
    noise = noise_for(range(FIRST_SEED, FIRST_SEED + 3), pocket.channels, 16, 16)
    expected = sample_latents(pocket, samples.prompts, noise)
    torch.testing.assert_close(samples.latents, expected, rtol=0, atol=1e-4)
    files = sorted((tmp_path / "cache" / "generated").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    progress = []
    (again,) = base_samples(run, lambda *counts: progress.append(counts))
    assert torch.equal(again.latents, samples.latents) and len(files) == 3 and not progress
    assert [file.stat().st_mtime_ns for file in files] == times


def test_an_interrupted_folder_gets_only_its_missing_images(concept, tmp_path):
    run = resolve(recipe_of(concept, tmp_path))
    (samples,) = base_samples(run)
    files = sorted((tmp_path / "cache" / "generated").rglob("*.safetensors"))
    files[1].unlink()
    progress = []
    (again,) = base_samples(run, lambda *counts: progress.append(counts))
    assert torch.equal(again.latents, samples.latents) and progress == [(2, 3)]


def test_each_resolution_has_square_images_of_its_own(concept, tmp_path):
    run = resolve(recipe_of(concept, tmp_path, data={"resolution": [64, 32]}))
    groups = base_samples(run)
    assert [tuple(group.latents.shape) for group in groups] == [(3, 8, 16, 16), (3, 8, 8, 8)]


@pytest.mark.parametrize("retention", [{"weight": 0}, {"states": "walk"}, {"states": "step"}])
def test_nothing_is_generated_where_no_image_is_needed(retention, concept, tmp_path):
    assert base_samples(resolve(recipe_of(concept, tmp_path, retention=retention))) == ()


def test_other_prompts_and_other_sizes_get_other_folders(concept, tmp_path):
    for sections in ({}, {"retention": {"prompts": PROMPTS}}, {"data": {"resolution": 32}}):
        base_samples(resolve(recipe_of(concept, tmp_path, **sections)))
    assert len(list((tmp_path / "cache" / "generated").iterdir())) == 3


def state_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Student and optimizer after the last step."""
    folder = recipe.run_folder / "checkpoints" / "step-000004"
    return {
        f"{name}.{key}": tensor
        for name in ("student", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


@pytest.mark.parametrize("states", ["samples", "walk", "step"])
def test_a_resumed_run_with_retention_equals_the_uninterrupted_run_bitwise(
    states, concept, tmp_path
):
    """Two micro-batches a step, so that a step begins where the batches' order goes on."""
    settings = {
        "retention": {"states": states, "per_step": 2},
        "train": {"gradient_accumulation_steps": 2},
    }
    straight, broken = (
        recipe_of(concept, tmp_path, name, **settings) for name in ("straight", "broken")
    )
    logs = [report.log for report in train(straight)]
    assert logs[0]["retention"] == 0 and logs[-1]["retention"] > 0
    list(train(replace_steps(broken, 2)))
    list(train(broken, resume="latest"))
    expected, resumed = state_of(straight), state_of(broken)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def replace_steps(recipe: Recipe, max_steps: int) -> Recipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"max_steps": max_steps})}
    )


def test_a_run_is_not_resumed_with_another_retention(concept, tmp_path):
    list(train(replace_steps(recipe_of(concept, tmp_path), 2)))
    other = recipe_of(concept, tmp_path, retention={"weight": 2})
    with pytest.raises(ValueError, match=r"begun with retention\.weight = 1\.0, now it is 2\.0"):
        next(train(other, resume="latest"))


def test_check_counts_a_replayed_prompt_once_a_step(concept, tmp_path):
    """SFT takes 3 an image; a step of two micro-batches of two images replays one prompt, for 4."""
    train_keys, method = {"gradient_accumulation_steps": 2}, {"nfe": 4}
    for retention, share in (({"weight": 0}, 0), ({}, 1), ({"states": "step"}, 5.5 / 4)):
        recipe = recipe_of(concept, tmp_path, retention=retention, train=train_keys, method=method)
        assert check(resolve(recipe)).forwards_per_image == 3 + share


def test_more_prompts_than_images_are_refused_where_images_are_needed(concept, tmp_path):
    many = {"prompts": ["one", "two", "three", "four"]}
    with pytest.raises(ValueError, match=r"set retention\.samples to 4 or more"):
        check(resolve(recipe_of(concept, tmp_path, retention=many)))
    check(resolve(recipe_of(concept, tmp_path, retention=many | {"states": "walk"})))


def test_replayed_prompts_come_from_a_list_or_a_file(concept, tmp_path):
    assert resolve(recipe_of(concept, tmp_path)).replay_prompts == ("",)
    file = tmp_path / "prompts.txt"
    with_file = recipe_of(concept, tmp_path, retention={"prompts": str(file)})
    with pytest.raises(ValueError, match=r"prompts\.txt does not exist"):
        resolve(with_file)
    file.write_text("a cat\n\n a dog \n")
    assert resolve(with_file).replay_prompts == ("a cat", "a dog")
    off = recipe_of(concept, tmp_path, retention={"prompts": str(file), "weight": 0})
    assert resolve(off).replay_prompts == ()
