"""Looks along a training: what a recipe is trained on, and what is measured of it."""

import numpy as np
import pytest

from dopsd.models.lora_source import LoraFile
from dopsd.models.pipeline import ImagePipeline
from dopsd.pocket.curves import BATCH, DRIFT, Bench, concept_recipe
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.train import train


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    data = tmp_path_factory.mktemp("curves") / "images"
    write_concept(data, 1_000_100)
    return Bench(data, unrelated=2)


def test_sections_stand_over_the_settings_that_all_arms_share(bench, tmp_path):
    train_section = {"learning_rate": 2e-3, "max_steps": 3}
    recipe = concept_recipe(
        {"method": {"name": "sft"}, "train": train_section}, bench.data, tmp_path, "arm"
    )
    assert (recipe.method.name, recipe.train.batch_size) == ("sft", BATCH)
    assert (recipe.train.learning_rate, recipe.train.max_steps) == (2e-3, 3)
    assert recipe.sample.every == recipe.save.every == 0


def test_a_look_measures_what_the_finished_run_of_the_same_recipe_exports(bench, tmp_path):
    sections = {
        "method": {"name": "sft"},
        "train": {"learning_rate": 3e-3, "max_steps": 2, "warmup_steps": 0},
    }
    recipe = concept_recipe(sections, bench.data, tmp_path, "arm")
    first, last = bench.curve(recipe, [1, 2])
    assert [(look.step, look.forwards) for look in (first, last)] == [(1, 12), (2, 24)]
    assert not recipe.run_folder.exists()
    for _ in train(recipe):
        pass
    exported = ImagePipeline(bench.family).load_denoiser([LoraFile(recipe.result())])
    alone = bench.look(exported)
    np.testing.assert_allclose(alone.values["thing_error"], last.values["thing_error"], atol=2e-3)
    np.testing.assert_allclose(alone.values[DRIFT], last.values[DRIFT], rtol=1e-3)


def test_drift_is_zero_at_the_base_model_and_the_size_of_a_shift_elsewhere(bench):
    assert bench.drift(bench.base).max() == 0
    shifted = bench.drift(lambda z, t, context: bench.base(z, t, context) + 0.25)
    np.testing.assert_allclose(shifted, 0.25, rtol=1e-4)


def test_other_streams_ask_other_unrelated_prompts(bench):
    usual = bench.questions.stated
    other = Bench(bench.data, unrelated=2, stream=1_000_100).questions.stated
    assert usual != other and len(other) == 2
