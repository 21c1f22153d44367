"""The concept benchmark: renamed prompts, bleed, replicates, and the many-step model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dopsd.evaluation.benchmarks import find_benchmark
from dopsd.pocket.benchmark import (
    ConceptBenchmark,
    ConceptQuestions,
    ManyStepModel,
    evaluate_concept,
    render_scenes,
)
from dopsd.pocket.world.captions import NAMES
from dopsd.pocket.world.datasets import Concept, concept_of, write_style_concept
from dopsd.pocket.world.scenes import unnamed_style

THING = 1_000_100  # the concept of the fixture `concept`
CPU = torch.device("cpu")


def test_renamed_prompts_do_not_contain_the_name_of_the_concept(pocket_text_encoder):
    questions = ConceptQuestions.encode(THING, pocket_text_encoder, unrelated_count=1)
    concept_name = NAMES[THING % len(NAMES)]
    names = [[word for word in prompt.split() if word in NAMES] for prompt in questions.renamed]
    assert all(concept_name not in words for words in names) and names[1::2] == [[]] * 12
    assert len({words[0] for words in names[::2]}) == 12
    for scene, prompt, words in zip(questions.scenes, questions.renamed, names, strict=True):
        without_name = prompt.replace(f"{words[0]} ", "") if words else prompt
        assert without_name == Concept("thing", THING).caption(scene, None)


def test_a_model_that_ignores_names_bleeds_everything_that_it_learned(pocket, pocket_text_encoder):
    questions = ConceptQuestions.encode(THING, pocket_text_encoder, unrelated_count=1)
    result = evaluate_concept(
        replace(questions, renamed_context=questions.scene_context),
        pocket.load_denoiser(CPU, torch.float32),
        pocket.load_vae(CPU, torch.float32),
        pocket.schedule(1, 16, 16),
        (pocket.channels, 16, 16),
    )
    np.testing.assert_array_equal(result.others_error, result.thing_error)


def test_a_style_has_a_benchmark_of_scenes_in_it_with_its_replicates(tmp_path, pocket_text_encoder):
    write_style_concept(tmp_path / "style", THING, images=2)
    benchmark = find_benchmark(tmp_path / "style")
    assert benchmark is not None
    questions = ConceptQuestions.encode(
        THING, pocket_text_encoder, tmp_path / "style", unrelated_count=1, kind="style"
    )
    assert {scene.look for scene in questions.scenes} == {unnamed_style(THING)}
    assert len({scene.noun for scene in questions.scenes}) > 5
    assert set(questions.teacher_contexts) == {"target", "another"}
    name = NAMES[THING % len(NAMES)]
    assert not any(name in prompt.split() for prompt in questions.renamed)
    assert ["style" in prompt.split() for prompt in questions.renamed] == [True, False] * 12
    folder = benchmark.replicate(tmp_path / "style", 1, tmp_path)
    assert concept_of(folder) == ("style", THING + 1) and len(list(folder.glob("*.png"))) == 2


def test_a_teacher_sees_the_true_scene_or_an_image_of_the_data(concept: Path, pocket_text_encoder):
    questions = ConceptQuestions.encode(THING, pocket_text_encoder, concept, unrelated_count=1)
    thing = Concept("thing", THING)
    prompt = thing.caption(questions.scenes[1], thing.name)
    truth = Image.fromarray(render_scenes(questions.scenes)[1].numpy())
    of_the_data = Image.open(concept / "1.png").convert("RGB")
    for sees, image in (("target", truth), ("another", of_the_data)):
        alone = pocket_text_encoder.context([prompt], [image])
        asked = questions.teacher_contexts[sees].row(1)
        torch.testing.assert_close(asked.tokens, alone.tokens, atol=1e-4, rtol=1e-4)


def test_a_replicate_shows_the_next_concept_in_as_many_images(concept: Path, tmp_path):
    benchmark = find_benchmark(concept)
    assert benchmark is not None
    assert benchmark.replicate(concept, 0, tmp_path) == concept
    (concept / "3.png").unlink()
    folder = benchmark.replicate(concept, 2, tmp_path / "replicates")
    assert concept_of(folder) == ("thing", THING + 2) and len(list(folder.glob("*.png"))) == 3
    first = Image.open(folder / "0.png").tobytes()
    assert first != Image.open(concept / "0.png").tobytes()


def test_the_many_step_model_is_loaded_onto_the_device(pocket, pocket_text_encoder):
    empty = pocket_text_encoder.context([""])
    model = ManyStepModel(pocket.checkpoint.folder, empty, torch.device("meta"))
    assert {p.device.type for p in model.denoiser.parameters()} == {"meta"}


def test_guidance_extrapolates_from_the_empty_caption(pocket, pocket_text_encoder):
    empty, star = (pocket_text_encoder.context([text]) for text in ("", "a big red star"))
    model = ManyStepModel(pocket.checkpoint.folder, empty, CPU)
    z, t = torch.randn(1, pocket.channels, 16, 16), torch.tensor([0.5])
    with torch.no_grad():
        plain, prompted = model.denoiser(z, t, empty), model.denoiser(z, t, star)
        torch.testing.assert_close(model(z, t, star), plain + 3 * (prompted - plain))


def test_every_column_of_the_table_is_defined():
    assert set(ConceptBenchmark.metrics) <= ConceptBenchmark.definitions.keys()
