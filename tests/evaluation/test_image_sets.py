"""Generated image sets: their folder belongs to one plan and to the weights it was begun with."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dopsd.data.prompts import EvaluationPrompt
from dopsd.evaluation.image_sets import Plan, generate_image_sets, read_image_set, refuse_unpaired
from dopsd.pocket import CHECKPOINT

QUESTIONS = (EvaluationPrompt("a red star on night"),)


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    """A copy of pocket whose files may be changed."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def test_weights_that_changed_at_the_same_path_do_not_keep_the_old_images(model, tmp_path):
    plan = Plan(str(model), QUESTIONS, seeds=2, nfe=(1,))
    generate_image_sets(plan, tmp_path / "images", silent)
    file = next((model / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes())  # written anew, as by another training
    with pytest.raises(ValueError, match=f"was begun with other weights of {model}: choose"):
        generate_image_sets(plan, tmp_path / "images", silent)


def test_a_second_call_keeps_the_images_and_another_plan_is_refused(tmp_path):
    folder = tmp_path / "images"
    plan = Plan("pocket", QUESTIONS, seeds=2, nfe=(1,))
    first = generate_image_sets(plan, folder, silent)
    times = [image.path.stat().st_mtime_ns for each in first for image in each.images]
    again = generate_image_sets(plan, folder, silent)
    assert times == [image.path.stat().st_mtime_ns for each in again for image in each.images]
    other = Plan("pocket", (EvaluationPrompt("a tower"),), seeds=2, nfe=(1,))
    with pytest.raises(ValueError, match="was begun with prompts = "):
        generate_image_sets(other, folder, silent)


def test_images_of_one_caption_are_its_seeds_and_targets_have_the_same_stem(tmp_path):
    for folder, ending in (("images", "png"), ("targets", "jpg")):
        (tmp_path / folder).mkdir()
        for name in "abc":
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.{ending}")
            (tmp_path / folder / f"{name}.txt").write_text("a hut" if name == "c" else "a star")
    (tmp_path / "targets" / "c.jpg").unlink()
    image_set = read_image_set(tmp_path / "images", "images", True, tmp_path / "targets")
    places = {image.path.stem: (image.row, image.seed) for image in image_set.images}
    assert places == {"a": (0, 0), "b": (0, 1), "c": (1, 0)} and image_set.shape == (2, 2)
    targets = [image.target and image.target.name for image in image_set.images]
    assert targets == ["a.jpg", "b.jpg", None]

    (tmp_path / "images" / "b.txt").write_text("a barn")
    other = read_image_set(tmp_path / "images", "base", True)
    with pytest.raises(ValueError, match=r"differ in b\.png: images to compare"):
        refuse_unpaired(image_set, other)
