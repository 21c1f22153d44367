"""benchmarks/gpu.py on the CPU: the pocket checkpoint, and random weights of tiny shapes."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
KLEIN = "black-forest-labs/FLUX.2-klein-4B"
SIDE = 64


@pytest.fixture()
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu

    monkeypatch.setattr(sys.modules["gpu_steps"], "MEASURED", 2)
    return gpu


@pytest.fixture()
def dino(tmp_path: Path) -> Path:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.mark.slow
def test_pocket_is_measured_and_the_same_command_goes_on(gpu, dino, concept, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gpu_claim"], "PROMPTS", 2)
    monkeypatch.setattr(gpu, "METHODS", ("sft",))
    out = tmp_path / "gpu"
    measure = partial(
        gpu.main, "pocket", data=concept, sizes=str(SIDE), looks="1,2", dino=dino, folder=out
    )

    # No time: nothing is measured, and the page says so.
    measure(minutes=0, clip="none/such")
    assert json.loads((out / "results.json").read_text())["rows"] == {}
    assert "no time yet" in (out / "report.html").read_text(encoding="utf-8")

    measure(clip="none/such")
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert not [key for key, row in rows.items() if "failed" in row]
    parity, step = rows[f"parity {SIDE}"], rows[f"step sft {SIDE}"]
    assert parity["latents"]["max"] <= 1e-4 < parity["latents"]["std"]
    assert parity["image"]["max"] <= 1
    assert step["memory"] == "high" and step["steps"] == 2 and step["seconds"] > 0
    looks = [rows[f"claim {arm} {steps}"] for arm in ("sft", "ours") for steps in (1, 2)]
    assert [(row["arm"], row["step"]) for row in looks] == [
        *(("sft", 1), ("sft", 2), ("ours", 1), ("ours", 2))
    ]
    assert all(len(row["values"]["dino"]) == len(row["values"]["sharpness"]) == 2 for row in looks)
    assert "none/such" in looks[0]["notes"]["clip"]
    assert {"healthy", "sharpness"} <= looks[0]["health"].keys()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "sharpness than SFT where both have learned equally much" in page

    # Again: nothing is measured twice.
    measure(clip="none/such")
    assert json.loads((out / "results.json").read_text()) == results
    with pytest.raises(ValueError, match="is of model pocket, now it is elsewhere"):
        gpu.Results(out / "results.json", results["machine"] | {"model": "elsewhere"})


def test_the_flops_of_a_step_are_those_of_a_real_one(gpu, tmp_path):
    """D-OPSD on pocket, against a count over a step of its recipe."""
    from gpu_steps import measure_step
    from torch.utils.flop_counter import FlopCounterMode

    from dopsd.config.recipe import load_recipe
    from dopsd.runs.train import train

    row = measure_step("pocket", "dopsd", SIDE, tmp_path, lambda what, done, total: None)
    changes = (f"data.folder={tmp_path / 'images' / str(SIDE)}", f"output_dir={tmp_path}")
    recipe = load_recipe(
        SCRIPTS.parent / "recipes" / "pocket-identity-dopsd.yaml",
        (*changes, "train.batch_size=1", "sample.every=0", "run_name=real"),
    )
    steps = train(recipe)
    next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    steps.close()
    assert row["flops"] == counter.get_total_flops() and row["nfe"] == 2


def test_without_weights_random_ones_of_the_same_shapes_are_measured(gpu, tmp_path, monkeypatch):
    full_size = sys.modules["full_size"]
    vae = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    monkeypatch.setattr(full_size, "VAE", full_size.BLOCKS | vae)
    monkeypatch.setitem(full_size.MROPE, "mrope_section", [2, 1, 1])
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = full_size.QWEN | heads | {"num_hidden_layers": 28, "vocab_size": 600}
    text |= {"hidden_size": 16, "intermediate_size": 32}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    transformer = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48}
    transformer |= {"num_attention_heads": 2, "attention_head_dim": 16}
    transformer |= {"axes_dims_rope": (4, 4, 4, 4)}
    tiny = partial(full_size.klein, transformer, text, vision)
    monkeypatch.setitem(full_size.FOLDERS, KLEIN, tiny)
    monkeypatch.setattr(gpu, "METHODS", ("dopsd",))

    # The hub is off in tests, so that the checkpoint cannot be had.
    gpu.main(KLEIN, sizes=str(SIDE), data=tmp_path, folder=tmp_path / "gpu")
    results = json.loads((tmp_path / "gpu" / "results.json").read_text())
    assert results["machine"]["weights"] == "random"
    assert results["rows"].keys() == {f"parity {SIDE}", f"step dopsd {SIDE}"}
    parity = results["rows"][f"parity {SIDE}"]["latents"]
    assert parity["max"] <= 1e-3 * parity["std"]
    page = (tmp_path / "gpu" / "report.html").read_text(encoding="utf-8")
    assert "The claim was not measured: it needs own weights" in page


def test_a_model_of_unknown_shapes_is_refused(gpu, tmp_path):
    with pytest.raises(ValueError, match=r"none/such is not a local folder"):
        gpu.main("none/such", folder=tmp_path)
    with pytest.raises(ValueError, match="the shapes of none/such are not known: give Tongyi"):
        gpu.main("none/such", random=True, folder=tmp_path)


def looks_of(arm: str, kept: float) -> dict:
    """A row of results.json: the error falls by half, and a share of the rest is kept."""
    values = {"dino": [[0.2], [0.3]], "sharpness": [[kept], [1.1 * kept]]}
    row = {"values": values, "notes": {}, "images": [], "prompts": [[], []]}
    return row | {"arm": arm, "step": 10, "seconds": 1.0, "health": {"healthy": True}}


def test_the_claims_sentence_says_what_is_shown_and_why_it_is_not_known(gpu):
    from gpu_page import claim_sentence, curves_of

    base = looks_of("base", 1.0) | {"values": {"dino": [[0.4], [0.6]], "sharpness": [[1.0], [1.1]]}}
    del base["arm"]
    rows = {"claim base": base, "claim sft 10": looks_of("sft", 0.5)}
    assert "was not measured" in claim_sentence(curves_of(rows), rows)
    rows["claim ours 10"] = looks_of("ours", 0.9)
    assert "keeps more sharpness than SFT" in claim_sentence(curves_of(rows), rows)
    for row in rows.values():
        del row["values"]["dino"]
    base["notes"]["dino"] = "dino has no such model."
    sentence = claim_sentence(curves_of(rows), rows)
    assert sentence == "The claim is not shown, for want of dino: dino has no such model."
