"""What `check` prints about memory, and `train` about its result."""

from pathlib import Path

import pytest
import yaml

from dopsd.cli import summary
from dopsd.config.recipe import load_recipe
from dopsd.models import load_family
from dopsd.runs import memory
from dopsd.runs.check import check
from dopsd.runs.memory import Forecast
from dopsd.runs.resolve import resolve
from dopsd.training.quantize import saved_bytes

GIB = 2**30


@pytest.fixture()
def run(concept: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {
        "model": {"name_or_path": "pocket"},
        "data": {"folder": str(concept)},
        "method": {"name": "sft"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))

    def resolved(*changes: str):
        return resolve(load_recipe(Path("recipe.yaml"), changes))

    return resolved


def forecasts(monkeypatch, low: float, high: float, offloaded: float = 0.0) -> list[str]:
    """Peaks in GiB in place of the forecasts, and the levels that are asked for."""
    asked = []

    def forecast_run(run, dtype, low_memory, progress=None):
        name = "offload" if run.recipe.model.offload else "low" if low_memory else "high"
        asked.append(name)
        peak = {"low": low, "high": high, "offload": offloaded}[name]
        return Forecast(0, int(peak * GIB))

    monkeypatch.setattr(memory, "forecast_run", forecast_run)
    monkeypatch.setattr("dopsd.runs.fit.forecast_run", forecast_run)
    return asked


@pytest.mark.parametrize(
    ("low", "high", "changes", "asked", "sentence"),
    [
        (8, 16, (), ["low", "high"], "a card of 24 GiB takes both"),
        (8, 30, (), ["low", "high"], "a card of 24 GiB takes low, not high"),
        (8, 30, ("model.memory=high",), ["low", "high"], "not high; set model.memory: low"),
        (40, 99, (), ["low", "offload"], "it takes low with --set model.offload=true: 9.00 GiB"),
    ],
)
def test_what_fits_is_named_and_what_cannot_fit_is_not_forecast(
    low, high, changes, asked, sentence, run, monkeypatch, capsys
):
    calls = forecasts(monkeypatch, low, high, offloaded=9)
    summary.print_memory(run(*changes), card=24)
    assert sentence in capsys.readouterr().out and calls == asked


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_mildest_quantization_that_fits_comes_before_offloading(kind, run, monkeypatch, capsys):
    """The forecast with quantized weights is that without, less the bytes that they save."""
    family = load_family("pocket")
    network = family.empty_denoiser().network.bfloat16()
    saved = {kind: saved_bytes(network, family.quantizable, kind) for kind in ("int8", "nf4")}
    fitting = (24 * GIB - memory.RESERVED) / 1.1  # the largest peak that fits 24 GiB
    low = (fitting + saved[kind] - 1) / GIB
    calls = forecasts(monkeypatch, low, 99, offloaded=1)
    summary.print_memory(run(), card=24)
    printed = capsys.readouterr().out
    assert f"--set model.quantize={kind}" in printed and calls == ["low"]


def test_where_nothing_fits_smaller_images_are_advised(run, monkeypatch, capsys):
    forecasts(monkeypatch, 80, 99, offloaded=60)
    summary.print_memory(run(), card=24)
    assert "use a smaller data.resolution" in capsys.readouterr().out


def test_a_forecast_reports_its_forwards(run):
    calls = []
    resolved = run()
    memory.forecast_run(resolved, resolved.dtype, True, lambda *call: calls.append(call))
    assert calls and calls[-1][1:] == (calls[-1][2], resolved.recipe.method.forwards(2))
    assert all(what == "forecasting memory (low)" for what, _, _ in calls)


@pytest.mark.parametrize(
    ("adapter", "lines"),
    [
        (
            "lora",
            [
                "LoRA file  runs/star/star.safetensors",
                'pipeline.load_lora_weights("runs/star", weight_name="star.safetensors")',
                "ComfyUI/models/loras",
                "look at    runs/star/report.html",
            ],
        ),
        ("full", ['DiffusionPipeline.from_pretrained("runs/star/star")']),
    ],
)
def test_the_result_is_where_the_file_is_and_how_it_is_loaded(adapter, lines, run, capsys):
    recipe = load_recipe(Path("recipe.yaml"), (f"adapter={adapter}", "run_name=star"))
    summary.print_result(recipe)
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ((), "of the empty prompt, on 64 images that the base model generates first"),
        (("retention.prompts=[a cat, a dog]", "data.resolution=[64, 32]"), "2 prompts, on 128"),
        (("retention.states=walk", "retention.per_step=2"), "2 a step of the empty prompt, on the"),
    ],
)
def test_check_says_what_retention_replays(changes, line, run, capsys):
    resolved = run("retention.weight=1", *changes)
    summary.print_summary(resolved, check(resolved))
    assert line in capsys.readouterr().out
    plain = run()
    summary.print_summary(plain, check(plain))
    assert "retention" not in capsys.readouterr().out
