"""`dopsd evaluate` on the pocket model and on folders: images, values, resuming and refusals."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.evaluation.image_sets import FIRST_NOISE, MOST_SEEDS, OTHER_NOISE, read_image_set
from dopsd.evaluation.metrics.fid import fid
from dopsd.evaluation.metrics.inception import WEIGHTS, Inception, InceptionV3
from dopsd.evaluation.statistics import bootstrap, paired
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.pipeline import sample

PROMPTS = ("a red star on night", "a big blue tree at the left")
RED = ["--metric", "red"]


def run(*words: object) -> Result:
    model = [] if "--model" in words else ["--model", "pocket"]
    return CliRunner().invoke(app, ["evaluate", *model, *map(str, words)])


def numbers_of(folder: Path, *words: object) -> list[dict]:
    result = run(folder, *words, "--json", folder.parent / "numbers.json")
    assert result.exit_code == 0, result.output
    return json.loads((folder.parent / "numbers.json").read_text())


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA for pocket that changes what is generated."""
    family = load_family("pocket")
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in family.empty_denoiser().network.named_modules():
        if name.endswith(("to_q", "to_v")):
            key = f"{family.export_prefix}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, module.in_features, generator=rng) / 4
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=rng) / 4
    path = tmp_path_factory.mktemp("lora") / "random.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def generated(lora, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder generated once for the tests that only read it, and its numbers."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return folder, numbers_of(
        folder, "--prompts", prompts, "--lora", lora, "--seeds", 2, "--nfe", "1,2", *RED
    )


def redness(path: Path) -> float:
    red, green, blue = np.asarray(Image.open(path)).reshape(-1, 3).mean(0) / 255
    return red - (green + blue) / 2


def test_base_and_tuned_are_what_sample_generates_on_the_same_noise_and_again_is_on_other(
    generated, lora
):
    folder, _ = generated
    for name, file, first in (
        ("base", None, FIRST_NOISE),
        ("tuned", lora, FIRST_NOISE),
        ("again", None, OTHER_NOISE),
    ):
        wanted = sample("pocket", PROMPTS[1:], file, nfe=2, seed=first + MOST_SEEDS + 1)[0]
        generated_image = Image.open(folder / name / "nfe-2" / "0001_01.png")
        assert np.abs(np.asarray(generated_image, int) - np.asarray(wanted, int)).max() <= 1, name


def test_what_was_generated_can_be_read_again_as_a_folder_with_its_prompts(generated):
    for name in ("base", "again", "tuned"):
        again = read_image_set(generated[0] / name / "nfe-2", name, captioned=True)
        assert [(p.path.name, p.prompt) for p in again.images] == [
            (f"{row:04}_{seed:02}.png", prompt)
            for row, prompt in enumerate(PROMPTS)
            for seed in range(2)
        ]


def test_values_differences_and_floors_are_of_the_generated_images(generated):
    folder, numbers = generated
    assert [(row["image_set"], row["nfe"]) for row in numbers] == [
        ("base", 1),
        ("base", 2),
        ("tuned", 1),
        ("tuned", 2),
    ]
    tables = {
        name: np.array(
            [
                [redness(folder / name / "nfe-2" / f"{r:04}_{s:02}.png") for s in range(2)]
                for r in range(2)
            ]
        )
        for name in ("base", "again", "tuned")
    }
    base, tuned = numbers[1], numbers[3]
    assert (
        base["value"] == pytest.approx(bootstrap(tables["base"]), abs=1e-6)
        and base["difference"] is None
    )
    assert tuned["value"][0] == pytest.approx(tables["tuned"].mean(), abs=1e-6)
    assert tuned["difference"] == pytest.approx(paired(tables["tuned"], tables["base"]), abs=1e-6)
    assert (
        base["floor"]
        == tuned["floor"]
        == pytest.approx(np.abs(paired(tables["again"], tables["base"])[1:]).max(), abs=1e-6)
    )


def test_a_second_call_goes_on_and_more_seeds_keep_the_first(generated, lora, tmp_path):
    folder, numbers = generated
    prompts = folder.parent / "prompts.txt"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    (gone := folder / "base" / "nfe-1" / "0000_01.png").unlink()
    again = numbers_of(
        folder, "--prompts", prompts, "--lora", lora, "--seeds", 2, "--nfe", "1,2", *RED
    )
    assert again == numbers
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == {gone}
    rows = [
        json.loads(line)
        for line in next((folder / "scores").glob("red-*")).read_text().splitlines()
    ]
    assert len(rows) == len({row["key"] for row in rows}) == 24


def test_another_plan_in_the_same_folder_is_refused(generated, lora):
    folder, _ = generated
    result = run(folder, "--prompts", folder.parent / "prompts.txt", "--seeds", 2, *RED)
    assert (
        result.exit_code == 2
        and "was begun with lora" in result.output
        and "choose another folder" in result.output
    )


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    """Six images of three prompts, ever redder, as somebody may bring them."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for k in range(6):
        Image.new("RGB", (48, 32), (40 * k, 60, 60)).save(folder / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "prompt": f"prompt {k // 2}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_folder_of_images_is_measured_by_prompt_and_beside_another(images, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for k in range(6):
        Image.new("RGB", (48, 32), (40 * k, 70, 50)).save(base / f"{k}.png")
    (base / "metadata.jsonl").write_text((images / "metadata.jsonl").read_text())
    given, base_row = numbers_of(images, *RED, "--base", base)
    table = np.array([[(40 * k - 60) / 255 for k in (2 * p, 2 * p + 1)] for p in range(3)])
    assert given["value"] == pytest.approx(bootstrap(table), abs=1e-6)
    assert (
        given["difference"] == pytest.approx([0, 0, 0], abs=1e-6)
        and "no difference beyond noise" in given["note"]
    )
    assert base_row["image_set"] == "base" and base_row["floor"] is None
    (base / "5.png").rename(base / "6.png")
    (base / "metadata.jsonl").write_text(
        (base / "metadata.jsonl").read_text().replace("5.png", "6.png")
    )
    result = run(images, *RED, "--base", base)
    assert result.exit_code == 2 and "the two folders differ in 5.png and others" in result.output


def test_targets_of_the_same_names_and_fid_on_them(images, tmp_path):
    torch.manual_seed(0)
    DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=8,
            image_size=32,
        )
    ).save_pretrained(tmp_path / "dino")
    (tmp_path / "inception").mkdir()
    for k in (3, 4, 5):
        (images / f"{k}.png").unlink()
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join(lines[:3]))
    network = InceptionV3()
    save_file(network.state_dict(), tmp_path / "inception" / WEIGHTS)
    targets = tmp_path / "targets"
    targets.mkdir()
    for k in range(2):
        Image.new("RGB", (32, 32), (30, 50 * k, 60)).save(targets / f"{k}.jpg")
    words = (
        "--targets",
        targets,
        "--metric",
        f"dino={tmp_path / 'dino'}",
        "--metric",
        f"fid={tmp_path / 'inception'}",
    )
    dino, distance, spread = numbers_of(images, *words, "--metric", f"kid={tmp_path / 'inception'}")
    assert (
        dino["value"][0] > 0 and dino["better"] == "lower"
    )  # 2.png has no target and is not asked
    assert dino["note"] == "not comparable with numbers by dinov3-vits16plus-pretrain-lvd1689m"
    look = Inception(str(tmp_path / "inception"), torch.device("cpu"))

    def seen(folder: Path, names: list[str]) -> torch.Tensor:
        arrays = [
            np.asarray(Image.open(folder / name).convert("RGB"), np.float32) / 255 for name in names
        ]
        return torch.cat([look(torch.from_numpy(a).permute(2, 0, 1)[None]) for a in arrays])

    wanted = fid(
        seen(images, [f"{k}.png" for k in range(3)]), seen(targets, [f"{k}.jpg" for k in range(2)])
    )
    assert distance["value"] == [pytest.approx(wanted, rel=1e-6), None, None]
    assert "3 images against 2; few images" in distance["note"] and "over subsets" in spread["note"]


def test_missing_models_are_named_gaps_beside_what_could_be_measured(images):
    metrics = ["clip", "dino=/gone", "lpips", "fid", "no_such.module:judge", "vlm_style", "red"]
    numbers = numbers_of(images, *(word for name in metrics for word in ("--metric", name)))
    assert [row["metric"] for row in numbers] == [name.partition("=")[0] for name in metrics]
    assert all(
        row["value"] is None and row["note"].startswith("not measured: ") for row in numbers[:-1]
    )
    assert numbers[-1]["value"] is not None


def test_a_measure_that_needs_targets_says_so_where_there_are_none(images, vlm):
    (row,) = numbers_of(images, "--metric", f"vlm_object={vlm}")
    assert row["note"] == "not measured: no prompt has a target image to compare with."


def test_answers_that_are_no_grade_are_counted_and_another_model_is_labelled(images, vlm):
    (row,) = numbers_of(images, "--metric", f"vlm_object={vlm}", "--targets", images)
    assert row["value"] == [None, None, None]
    assert "6 of 6 images without a score" in row["note"]
    assert "not comparable with numbers by Qwen3-VL-8B-Instruct" in row["note"]


def test_an_unreadable_image_is_named_and_the_scores_before_it_stay(images):
    good = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(good[: len(good) // 2])
    result = run(images, *RED)
    assert result.exit_code == 2 and "3.png" in result.output and "Traceback" not in result.output
    (store,) = (images / "scores").glob("red-*")
    assert len(store.read_text().splitlines()) == 3
    (images / "3.png").write_bytes(good)
    assert numbers_of(images, *RED)[0]["value"] is not None
    assert len(store.read_text().splitlines()) == 6


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """A limit on the size of files, in bytes: a write beyond it fails as on a full disk."""
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_while_scoring_ends_with_a_sentence_and_the_next_call_goes_on(
    images, monkeypatch
):
    monkeypatch.setattr("dopsd.evaluation.scores.BATCH", 1)
    with no_room_beyond(300):
        result = run(images, *RED)
    assert (
        result.exit_code == 2
        and "cannot be written" in result.output
        and "finished before are intact" in result.output
    )
    (store,) = (images / "scores").glob("red-*")
    assert 0 < len(store.read_bytes()) <= 300
    straight = numbers_of(images, *RED)
    assert straight[0]["value"] is not None
    assert all(json.loads(line) for line in store.read_text().splitlines() if line.endswith("}"))
    assert numbers_of(images, *RED) == straight


def test_a_full_disk_while_generating_leaves_no_half_image(tmp_path):
    (tmp_path / "p.txt").write_text("a red star on night")
    with no_room_beyond(900):
        result = run(
            tmp_path / "run", "--prompts", tmp_path / "p.txt", "--nfe", "1", "--seeds", "2", *RED
        )
    assert result.exit_code == 2 and "cannot be written" in result.output
    assert not list((tmp_path / "run").rglob("*.part")) and not list(
        (tmp_path / "run").rglob("*.png")
    )
    assert numbers_of(
        tmp_path / "run", "--prompts", tmp_path / "p.txt", "--nfe", "1", "--seeds", "2", *RED
    )[0]["value"]


GENERATE = ("{folder}/run", "--prompts", "{p}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{folder}/gone"], "is not a folder: give a folder of images"),
        (["{folder}/empty"], "looked for .jpg"),
        (["{folder}/empty", "--metric", "fid=/gone"], "looked for .jpg"),
        (["{folder}", "--metric", "redd"], "redd is no metric: give red"),
        (["{folder}", "--metric", "bright=/model"], "bright takes no model"),
        (["{folder}", "--targets", "{folder}/empty"], "--targets wants a folder of images"),
        (["{folder}", "--nfe", "4"], "are for generating: give --prompts as well"),
        (["{folder}", "--layout", "geneval"], "and --prompts, the benchmark's own"),
        (
            ["{folder}", "--base", "{folder}", "--prompts", "{p}"],
            "--base is for images that are there",
        ),
        (["{folder}/run", "--prompts", "{folder}/gone.txt"], "does not exist: give a .txt"),
        ([*GENERATE, "--nfe", "4,x"], "--nfe 4,x: give numbers"),
        ([*GENERATE, "--nfe", "0"], "--nfe 0: give numbers"),
        ([*GENERATE, "--seeds", "1"], "1 seeds a prompt"),
        ([*GENERATE, "--width", "65"], "must be multiples of"),
        ([*GENERATE, "--lora", "{folder}/gone.safetensors"], "gone.safetensors"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_generated(words, sentence, images, tmp_path):
    (images / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a red star")
    result = run(*(word.format(folder=images, p=tmp_path / "p.txt") for word in words), *RED)
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not (images / "run").exists()


def test_the_family_is_not_needed_for_images_that_are_there(images, pocket: Family):
    (row,) = numbers_of(images, *RED, "--model", "/no/model")
    assert row["value"] is not None
