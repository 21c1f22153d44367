"""The report of a run, made from small files and read back as a browser would."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from html_page import Page, read_page
from PIL import Image

from dopsd.evaluation.health import METRICS
from dopsd.evaluation.plots import MAX_POINTS
from dopsd.runs.outputs import definitions
from dopsd.runs.outputs.record import MAX_PREVIEWS
from dopsd.runs.outputs.report import write_report

OLD_RUN = Path(__file__).parent / "old_run"  # text files of a run of November 2026
PROMPTS = ["a small red circle on night", 'a toy <script>alert(1)</script> & "more" at the left']
FOLDER = "/home/someone/secret/pictures"
GREY = {"base": 100, "teacher": 200, "student": 100}


def grey_image(value: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def write_preview(
    run: Path,
    step: int,
    roles: tuple[str, ...] = ("base", "teacher", "student"),
    student: int = 100,
    side: int = 64,
) -> None:
    """student: the grey level of the student's image of the first prompt; that of the second is
    the base's."""
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for role in roles:
        for index in range(len(PROMPTS)):
            grey = student if role == "student" and index == 0 else GREY[role]
            grey_image(grey + index, side).save(folder / f"{role}_{index}_{7 + index}.png")
    images = [
        {
            "prompt": prompt,
            "seed": 7 + index,
            "sigmas": [1.0, 0.7, 0.30000001192092896, 0.0],
            "teacher_image": {"name": f"{index}.png", "caption": PROMPTS[0]},
        }
        for index, prompt in enumerate(PROMPTS)
    ]
    text = json.dumps({"rows": roles, "images": images})
    (folder / "preview.json").write_text(text, encoding="utf-8")


def write_metrics(run: Path, steps: int) -> None:
    rows = [
        {
            "step": step,
            "loss": 1 / step,
            "loss_at_0": 2 / step,
            "loss_at_1": 0.5 / step,
            "grad_norm": 0.1 * step,
            "learning_rate": 1e-4,
            "images": 4,
            "seconds": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_health(run: Path, *sharpness: tuple[int, float]) -> None:
    """(step, sharpness) of health checks with a limit of 0.9."""
    rows = []
    for step, value in sharpness:
        metric = {"value": value, "error": 0.01, "floor": 0.02, "limit": 0.9}
        rows.append({"step": step, "healthy": value > 0.9})
        rows[-1] |= {"sharpness": metric | {"healthy": value > 0.9}}
        rows[-1] |= {"diversity": metric | {"value": 1.0, "limit": 0.8, "healthy": True}}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "health.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def new_run(tmp_path: Path) -> Path:
    """A recipe, and nothing else yet."""
    run = tmp_path / "zib"
    run.mkdir()
    config = (
        f"model: {{name_or_path: pocket}}\ndata:\n  folder: {FOLDER}\n"
        "method: {name: dopsd}\ntrain: {max_steps: 40}\nrun_name: zib\n"
    )
    (run / "config.yaml").write_text(config, encoding="utf-8")
    return run


@pytest.fixture
def run(new_run: Path) -> Path:
    """30 steps with three previews."""
    write_metrics(new_run, 30)
    for step, student in ((0, 100), (15, 120), (30, 140)):
        write_preview(new_run, step, student=student)
    for index in range(2):
        grey_image(30 + index).save(new_run / "samples" / f"data-{index}.png")
        grey_image(60 + index).save(new_run / "samples" / f"teacher-image-{index}.png")
    environment = {
        "torch": "2.13",
        "device": "cpu (2)",
        "licence_of_base": "Apache-2.0",
        "images": 4,
        "refused": [["broken.png", f"{FOLDER}/broken.png cannot be decoded."]],
        "data": {
            "images": 4,
            "source": ".txt files",
            "buckets": {"64 x 64": 4},
            "sha256": "0" * 64,
            "examples": ["a zib at the left", "a big zib"],
        },
    }
    (new_run / "env.json").write_text(json.dumps(environment), encoding="utf-8")
    return new_run


def page_of(run: Path, state="finished") -> Page:
    return read_page(write_report(run, state))


def verdict_in(page: Page) -> str:
    match = re.search(r'<p class="verdict">(.*?)</p>', page.html)
    assert match
    return match[1].replace("&#39;", "'")


def files_in(page: Page) -> dict[str, str]:
    table = re.search(r'<table class="words files">(.*?)</table>', page.html, re.DOTALL)
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', table[1]) if table else []
    return {name: use.replace("&#34;", '"') for name, use in rows}


def points_of(page: Page) -> list[int]:
    return [len(line["points"].split()) for line in page.all("polyline")]


def test_each_prompt_shows_your_image_the_teacher_the_base_and_the_student_step_by_step(run):
    page = page_of(run)
    labels = [image["alt"].removeprefix(f"{PROMPTS[0]} (seed 7): ") for image in page.all("img")]
    assert labels[:6] == [
        "your image 0.png, seen by the teacher",
        "teacher, step 30",
        "base",
        "student, step 0",
        "student, step 15",
        "student, step 30",
    ]
    greys = [np.asarray(image.convert("L"))[0, 0] for image in page.images()]
    assert greys == [60, 200, 100, 100, 120, 140, 61, 201, 101, 101, 101, 101, 30, 31]


def test_a_long_run_shows_its_previews_evenly_spaced_with_both_ends(new_run):
    write_metrics(new_run, 100)
    for step in range(0, 101, 2):
        write_preview(new_run, step, roles=("base", "student"))
    alts = [image["alt"] for image in page_of(new_run).all("img") if PROMPTS[0] in image["alt"]]
    steps = [int(match[1]) for alt in alts if (match := re.search(r"student, step (\d+)", alt))]
    assert len(steps) == MAX_PREVIEWS and (steps[0], steps[-1]) == (0, 100)
    assert set(np.diff(steps)) <= {8, 10}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("running", "Running: step 30 of 40 when this page was written; "),
        ("stopped", "Stopped at step 30 of 40; "),
        ("finished", "Finished at step 30 of 40, by the limit of train.max_seconds; "),
    ],
)
def test_the_verdict_says_how_far_the_run_is(run, state, sentence):
    assert verdict_in(page_of(run, state)).startswith(sentence)


def test_the_length_of_a_resumed_run_is_that_of_its_last_start(run):
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(environment | {"max_steps": 30}))
    assert verdict_in(page_of(run)).startswith("Finished: 30 of 30 steps; ")


def test_the_verdict_names_the_unhealthy_metric_and_the_last_healthy_step(run):
    write_health(run, (15, 0.95), (30, 0.8))
    verdict = verdict_in(page_of(run))
    assert (
        "few-step health is bad in sharpness (0.80, limit 0.90), last healthy at step 15."
        in verdict
    )


def test_the_verdict_says_when_the_last_health_check_was(run):
    write_health(run, (15, 0.95))
    assert "few-step health is good at step 15 in all 2 metrics." in verdict_in(page_of(run))


def test_the_verdict_says_how_near_the_student_is_to_the_teacher_on_captions_of_the_data(run):
    # The second prompt is not the caption of the image that its teacher saw, and does not count:
    # of base 100 and teacher 200 the student at 140 has covered 40%.
    verdict = verdict_in(page_of(run))
    assert verdict.endswith(
        "On your captions the student's previews are 40% nearer to the teacher's images than the "
        "base model's are (0.235 against 0.392)."
    )


def test_without_a_teacher_the_verdict_says_how_far_the_student_is_from_the_base(new_run):
    write_metrics(new_run, 1)
    write_preview(new_run, 1, roles=("base", "student"), student=151)
    page = page_of(new_run)
    assert "the student's images are 0.100 from the base model's." in verdict_in(page)
    assert len(page.all("img")) == 4 and "teacher" not in page.text


def test_a_finished_run_names_its_lora_and_how_to_load_it(run):
    (run / "intermediate").mkdir()
    on_the_way = ("zib-healthy.safetensors", "zib-step000015.safetensors")
    for name in ("zib.safetensors", *(f"intermediate/{name}" for name in on_the_way)):
        (run / name).touch()
    write_health(run, (15, 0.95), (30, 0.8))
    assert files_in(page_of(run)) == {
        "LoRA": "zib.safetensors",
        "last healthy LoRA": "intermediate/zib-healthy.safetensors",
        "diffusers": 'pipeline.load_lora_weights(".", weight_name="zib.safetensors")',
        "ComfyUI": "copy zib.safetensors into models/loras and load it with strength 1",
    }


def test_a_stopped_run_names_its_newest_lora_and_how_to_go_on(run):
    (run / "intermediate").mkdir()
    on_the_way = ("zib-step000015.safetensors", "zib-step000005.safetensors")
    for name in ("zib.safetensors", *(f"intermediate/{name}" for name in on_the_way)):
        (run / name).touch()
    files = files_in(page_of(run, "stopped"))
    assert files["LoRA"] == "intermediate/zib-step000015.safetensors"
    assert files["to go on"] == "dopsd train RECIPE --resume latest"


def test_a_fully_tuned_model_is_opened_as_a_folder(run):
    with (run / "config.yaml").open("a") as file:
        file.write("adapter: full\n")
    (run / "zib").mkdir()
    assert files_in(page_of(run)) == {
        "model": "zib",
        "diffusers": 'DiffusionPipeline.from_pretrained("zib")',
    }


def test_every_metric_is_defined_where_it_stands(run):
    write_health(run, (15, 0.95), (30, 0.8))
    page = page_of(run)
    health = page.text[page.text.index("Few-step health") : page.text.index("Training")]
    for term in ("sharpness", "diversity"):
        assert definitions.HEALTH[term] in health
    assert all(meaning in health for meaning in definitions.HEALTH_COLUMNS.values())
    training = page.text[page.text.index("Training") :]
    for meaning in (definitions.LOSS, definitions.AT_STEPS, definitions.TRAINING["grad_norm"]):
        assert meaning in training


def test_every_health_metric_has_a_definition():
    assert definitions.HEALTH.keys() == {*METRICS, "text", "drift"}


def test_prompts_are_escaped(run):
    page = page_of(run)
    assert page.all("script") == [] and PROMPTS[1] in page.text


def test_a_report_needs_no_network_and_names_no_folder_of_the_machine(run):
    html = page_of(run).html
    assert not re.search(r"https?://|url\(|@import|<link|<script", html)
    assert "someone" not in html and str(run.parent) not in html
    assert "folder: …/pictures" in html and ">broken.png cannot be decoded." in html


def test_a_recipe_without_absolute_folders_is_shown_as_it_is(run):
    config = (run / "config.yaml").read_text(encoding="utf-8")
    config = config.replace(FOLDER, "pictures  # four of them")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert config in page_of(run).text


def test_the_facts_add_up_the_metrics(run):
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page_of(run).html.split("<main>")[0]))
    assert facts == {
        "method": "dopsd",
        "base model": "pocket",
        "licence of the base": "Apache-2.0",
        "images": "4",
        "images seen, with repeats": "120",
        "training time": "15 s",
        "a step (median)": "0.5 s",
        "device": "cpu (2)",
    }


def test_a_report_names_the_noise_levels_of_the_sampler(run):
    assert "at the noise levels 1 → 0.7 → 0.3 → 0 (1 is pure noise)." in page_of(run).text


def test_curves_have_a_point_for_each_step(run):
    page = page_of(run)
    assert len(page.all("svg")) == 3
    # loss and gradient norm: measured and smoothed; the loss at two steps of the sampler
    assert points_of(page) == [30] * 6


def test_the_teachers_pull_is_one_curve_over_the_noise_levels_with_its_definition(run):
    rows = [
        {
            "step": step,
            "loss": 1.0,
            "pull_cosine_at_t0.50-0.75": 0.5,
            "pull_cosine_at_t0.75-1.00": 0.25,
            "pull_ratio_at_t0.50-0.75": 1.0,
        }
        for step in range(1, 31)
    ]
    text = "".join(json.dumps(row | {"images": 4, "seconds": 0.5}) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    page = page_of(run)
    assert len(page.all("svg")) == 3
    titles = ("pull_cosine at each noise level", "pull_ratio at each noise level")
    assert all(title in page.text for title in titles)
    assert "0: it does not show it at this noise level" in page.text


def test_a_curve_of_a_long_run_is_thinned_and_says_so(run):
    write_metrics(run, 2 * MAX_POINTS + 1)
    page = page_of(run)
    assert set(points_of(page)) == {(2 * MAX_POINTS + 1 + 2) // 3}
    assert "Each point is the mean of 3 steps." in page.text


def test_curves_stay_inside_their_drawing(run):
    lines = page_of(run).all("polyline")
    places = [place.split(",") for line in lines for place in line["points"].split()]
    assert all(0 <= float(x) <= 480 and 0 <= float(y) <= 190 for x, y in places)


def test_a_run_without_a_step_has_a_report_of_its_first_previews(new_run):
    write_preview(new_run, 0)
    page = page_of(new_run, "running")
    assert verdict_in(page).startswith("Running: step 0 of 40")
    assert len(page.all("img")) == 6 and page.all("svg") == []


def test_one_step_and_no_images_make_a_report(new_run):
    write_metrics(new_run, 1)
    page = page_of(new_run)
    assert page.all("img") == [] and page.all("polyline") == []
    assert len(page.all("circle")) == 4  # loss, at two steps of the sampler, gradient norm
    assert "Previews" not in page.text and "Refused" not in page.text


def test_an_unfinished_preview_is_passed_over(run):
    (run / "samples" / "step-000030" / "preview.json").unlink()
    page = page_of(run)
    assert "student, step 15" in page.text and "student, step 30" not in page.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("student_1_8.png", b"\x89PNG, or so"),
        ("preview.json", b'{"rows": []}'),
        ("student_1_8.png", None),
    ],
)
def test_a_damaged_preview_is_left_out_and_the_report_says_why(run, file, content):
    path = run / "samples" / "step-000015" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    page = page_of(run)
    assert "The previews in step-000015 are left out: " in page.text
    assert "student, step 15" not in page.text and "student, step 30" in page.text
    assert str(run) not in page.html


def test_a_folder_that_is_no_run_is_refused(run):
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml is missing"):
        write_report(run, "finished")
    assert not (run / "report.html").exists()


def test_a_config_that_is_no_recipe_is_refused(run):
    (run / "config.yaml").write_text("- just: [a", encoding="utf-8")
    with pytest.raises(ValueError, match="not the recipe of a run"):
        write_report(run, "finished")


def test_a_row_that_was_cut_is_left_out(run):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 31, "lo')
    assert points_of(page_of(run)) == [30] * 6


def test_the_report_of_a_run_folder_of_an_earlier_version(tmp_path):
    run = tmp_path / "old"
    shutil.copytree(OLD_RUN, run)
    preview = run / "samples" / "step-000004"
    preview.mkdir(parents=True)
    (run / "preview.json").rename(preview / "preview.json")
    for role in GREY:
        for index in range(2):
            grey_image(GREY[role]).save(preview / f"{role}_{index}_{index}.png")
    page = page_of(run)
    assert len(page.all("img")) == 6
    assert verdict_in(page) == (
        "Finished: 4 of 4 steps; few-step health is bad in sharpness (0.84, limit 0.90), last "
        "healthy at step 2. In the previews the student's images are 0.000 from the base model's."
    )
    assert "images seen, with repeats</dt><dd>16</dd>" in page.html
