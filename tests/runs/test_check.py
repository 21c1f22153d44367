"""What `check` announces is what training does: images seen, cache files, enlarged images."""

import numpy as np
import pytest
from image_folders import write_metadata
from PIL import Image
from safetensors.torch import load_file

from dopsd.config.recipe import parse_recipe
from dopsd.runs.check import check
from dopsd.runs.outputs.folder import read_rows, seconds_per_step
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train


def recipe_for(folder, output, shapes, **train_settings):
    """A recipe on noise images of these (width, height), each with a caption of its own."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index, (width, height) in enumerate(shapes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a zib number {index}")
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(folder), "caption_dropout": 0.2},
            "method": {"name": "dopsd"},
            "lora": {"rank": 2},
            "train": {"batch_size": 4} | train_settings,
            "sample": {"every": 0, "unrelated": 0, "prompts": ["a zib"]},
            "health": {"every": 0},
            "save": {"every": 0},
            "output_dir": str(output),
            "run_name": "checked",
        }
    )


def test_small_buckets_give_small_batches_and_check_counts_the_images_that_are_seen(tmp_path):
    shapes = [(64, 64)] * 5 + [(128, 64)] * 2
    recipe = recipe_for(tmp_path / "data", tmp_path / "runs", shapes, max_steps=2)
    checked = check(resolve(recipe))
    for _ in train(recipe):
        pass
    rows = read_rows(recipe.run_folder / "metrics.jsonl")
    assert checked.images == sum(row["images"] for row in rows) < 2 * 4
    assert sum(bucket.rows for bucket in checked.visits.values()) == len(shapes)
    assert seconds_per_step(recipe) == np.median([row["seconds"] for row in rows])


def test_the_forecast_of_the_cache_is_what_encoding_writes(tmp_path):
    shapes = [(64, 64), (64, 64), (128, 64)]
    recipe = recipe_for(tmp_path / "data", tmp_path / "runs", shapes, max_steps=1)
    forecast = check(resolve(recipe)).cache
    for _ in train(recipe):
        pass
    files = list((tmp_path / "runs" / "cache").rglob("*.safetensors"))
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert len(files) == forecast.files
    assert sum(tensor.nbytes for tensor in tensors) == forecast.bytes


def test_images_that_are_enlarged_are_listed_the_most_enlarged_first(tmp_path):
    shapes = [(64, 64), (32, 32), (16, 20)]
    checked = check(resolve(recipe_for(tmp_path / "data", tmp_path / "runs", shapes, max_steps=1)))
    assert [(image.path.name, image.factor) for image in checked.enlarged][1] == ("1.png", 2.0)
    assert [image.path.name for image in checked.enlarged] == ["2.png", "1.png"]


def test_a_teacher_that_only_reads_needs_another_prompt_than_the_student(tmp_path):
    """Each way to give it one is accepted, and its contexts are cached as forecast."""
    shapes = [(64, 64), (64, 64)]
    plain = recipe_for(tmp_path / "data", tmp_path / "runs", shapes, max_steps=1)

    def with_model(**settings):
        model = plain.model.model_copy(update={"teacher_context": "prompt", **settings})
        return plain.model_copy(update={"model": model})

    why = r"for 2 of 2 images \(first: 0.png\) it would read the student's own"
    with pytest.raises(ValueError, match=why):
        check(resolve(with_model()))
    check(resolve(with_model(teacher_suffix="on night in inked style")))
    rows = [
        {"file_name": f"{i}.png", "text": f"a zib number {i}", "teacher_text": "a zib, sharp"}
        for i in range(2)
    ]
    for file in (tmp_path / "data").glob("*.txt"):
        file.unlink()
    write_metadata(tmp_path / "data", *rows)
    recipe = with_model()
    forecast = check(resolve(recipe)).cache
    (report,) = train(recipe)
    assert report.log["loss"] > 0
    files = list((tmp_path / "runs" / "cache").rglob("*.safetensors"))
    assert len(files) == forecast.files
    assert sum(t.nbytes for f in files for t in load_file(f).values()) == forecast.bytes
    preview = recipe.run_folder / "samples" / "step-000000"
    assert (preview / "teacher_0_0.png").is_file()
    assert not (recipe.run_folder / "samples" / "teacher-image-0.png").exists()
