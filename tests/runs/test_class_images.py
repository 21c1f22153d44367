"""Class images and rejected images: generated once, equal to the images of `dopsd sample`, and
resumable."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_image
from PIL import Image

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.models.pipeline import sample
from dopsd.runs.check import check
from dopsd.runs.class_images import FIRST_SEED, generate_once, with_generated
from dopsd.runs.resolve import open_family, resolve


def recipe_of(concept: Path, folder: Path, **method) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket"},
            "data": {"folder": str(concept)},
            "method": method,
            "output_dir": str(folder),
            "run_name": "run",
        }
    )


def test_class_images_equal_those_of_sample_and_are_generated_once(concept, tmp_path, pocket):
    recipe = recipe_of(
        concept, tmp_path, name="dreambooth", class_prompt="a red star", class_images=3
    )
    _, class_images = with_generated(resolve(recipe))
    assert len(class_images) == 3
    assert {example.caption for example in class_images} == {"a red star"}
    expected = sample("pocket", ["a red star"] * 3, seed=FIRST_SEED)
    for example, image in zip(class_images, expected, strict=True):
        levels = np.asarray(Image.open(example.path)).astype(int) - np.asarray(image)
        assert np.abs(levels).max() <= 1  # batches of other sizes round differently
    folder = class_images[0].path.parent
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert with_generated(resolve(recipe))[1] == class_images
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": example.path.name, "text": "a red star"} for example in class_images
    ]


def test_changed_weights_at_the_same_path_get_a_new_image_folder(
    concept, tmp_path, sdxl, dmd2_lora
):
    def folder_of(model: dict) -> Path:
        tree = recipe_of(
            concept, tmp_path, name="dreambooth", class_prompt="a red star", class_images=1
        ).model_dump()
        recipe = parse_recipe(
            tree | {"model": model, "data": {"folder": str(concept), "resolution": 64}}
        )
        kinds = [("a red star", (64, 64))]
        (files,) = generate_once(recipe, open_family(recipe), kinds, 1).values()
        return files[0].parent

    base, turbo = tmp_path / "base", tmp_path / "turbo"
    for kind, folder in (("base", base), ("turbo", turbo)):
        shutil.copytree(sdxl(kind), folder)
    distilled = folder_of({"name_or_path": str(base), "distilled_by": str(dmd2_lora)})
    assert folder_of({"name_or_path": str(base), "allow_base": True}) != distilled
    before = folder_of({"name_or_path": str(turbo)})
    assert folder_of({"name_or_path": str(turbo)}) == before
    shutil.copy(turbo / "unet" / "diffusion_pytorch_model.safetensors", turbo / "other")
    os.replace(turbo / "other", turbo / "unet" / "diffusion_pytorch_model.safetensors")
    assert folder_of({"name_or_path": str(turbo)}) != before


def test_an_interrupted_folder_gets_only_its_missing_images(concept, tmp_path, pocket):
    recipe = recipe_of(
        concept, tmp_path, name="dreambooth", class_prompt="a red star", class_images=3
    )
    kinds = [("a red star", (64, 64))]
    (files,) = generate_once(recipe, pocket, kinds, 3).values()
    before = [path.read_bytes() for path in files]
    files[1].unlink()
    progress = []
    generate_once(recipe, pocket, kinds, 3, lambda *counts: progress.append(counts))
    assert [path.read_bytes() for path in files] == before and progress == [(2, 3)]


def test_every_image_gets_rejected_images_for_its_own_caption(concept, tmp_path, pocket):
    rows = [
        {"file_name": f"{i}.png", "text": ["a zib at the left", f"zib number {i}"]}
        for i in range(4)
    ]
    (concept / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_of(concept, tmp_path, name="pso", form="forward", losers=2)
    (listing,), class_images = with_generated(resolve(recipe))
    assert class_images == () and len(listing.examples) == 8
    assert all(not example.also for example in listing.examples)
    by_caption = {example.caption: example.rejected for example in listing.examples}
    assert (
        len({path for files in by_caption.values() for path in files}) == 2 * len(by_caption) == 10
    )
    folder = listing.examples[0].rejected[0].parent
    caption_of_file = {
        row["file_name"]: row["text"]
        for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    }
    for caption, files in by_caption.items():
        assert all(caption_of_file[path.name] == caption for path in files)
    of_one_prompt = {"losers": 2, "loser_prompt": "a star"}
    recipe = recipe_of(concept, tmp_path, name="pso", form="forward", **of_one_prompt)
    (with_one_prompt,), _ = with_generated(resolve(recipe))
    assert len(with_one_prompt.examples) == 4
    assert len({example.rejected for example in with_one_prompt.examples}) == 1


def test_losers_have_the_shape_that_their_winner_is_trained_at(tmp_path, pocket):
    """A wide, a tall and a square winner under one caption, at two resolutions."""
    folder = tmp_path / "shapes"
    for name, size in (("wide", (200, 100)), ("tall", (100, 200)), ("square", (90, 90))):
        write_image(folder / f"{name}.png", size=size)
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket"},
            "data": {"folder": str(folder), "instance_prompt": "a star", "resolution": [64, 32]},
            "method": {"name": "pso", "form": "forward", "losers": 2},
            "output_dir": str(tmp_path),
            "run_name": "run",
        }
    )
    run = resolve(recipe)
    listings, _ = with_generated(run)
    assert len(listings) == len(run.sizes) == 2
    for listing, sizes in zip(listings, run.sizes, strict=True):
        assert len(set(sizes)) == 3
        for example, size in zip(listing.examples, sizes, strict=True):
            assert len(example.rejected) == 2
            assert {Image.open(file).size for file in example.rejected} == {size}
    (width, height), file = run.sizes[0][0], listings[0].examples[0].rejected[0]
    place = int(file.name[:4])
    (expected,) = sample(
        "pocket", ["a star"], seed=FIRST_SEED + 2 * place, width=width, height=height
    )
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "dpo"}, "dpo learns from pairs, and 4 of 4 images"),
        (
            {"name": "pso", "nfe": 1, "last_step": "left_out"},
            "a sampler of one step has only the last",
        ),
        ({"name": "pso", "eta": "own"}, "eta: own takes the noise that the model's own sampler"),
        ({"name": "pso_online", "reward": "red", "nfe": 1}, "needs a sampler of 2 steps or more"),
        ({"name": "pso_online", "reward": "read"}, "Did you mean red"),
        (
            {"name": "pso_online", "reward": "red", "stochastic_steps": [3]},
            "names step 3, and a sampler of 2 steps",
        ),
        ({"name": "dopsd", "loss_steps": 5}, "asks for 5 of the 2 steps of the sampler"),
        ({"name": "dreambooth", "class_prompt": "a " * 600}, "tokens"),
    ],
)
def test_check_refuses_settings_that_a_method_cannot_use(method, message, concept, tmp_path):
    recipe = recipe_of(concept, tmp_path, **method)
    with pytest.raises(ValueError, match=message):
        check(resolve(recipe))
    assert open_family(recipe) is not None
