"""What loaders make of LoRA files: the table of the documentation is what is found at full size,
and what `inspect` says of diffusers is what its pipelines do."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from lora_files import FORMS, MODULES, SCALE, deltas, peft_names
from safetensors.torch import save_file

from dopsd.models.inspection import inspect_lora
from dopsd.pocket import CHECKPOINT

ROOT = Path(__file__).parents[2]
TARGETS = {"Z-Image": 238, "klein-4B": 100, "klein-9B": 144, "SDXL": 722}


@pytest.fixture(scope="module")
def measured():
    """benchmarks/lora_loaders.py as a module."""
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("lora_loaders", folder / "lora_loaders.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize("label", TARGETS)
def test_at_full_size_the_default_form_loses_no_module_where_it_is_for(label, measured):
    assert len(measured.pairs_of(label)) == TARGETS[label]
    row = measured.row_of(label, "comfyui")
    # DiffSynth knows klein by diffusers' names only.
    lossless = row if not label.startswith("klein") else {**row, "DiffSynth": "strength 1"}
    assert set(lossless.values()) == {"strength 1"}
    page = (ROOT / "docs" / "lora_files.md").read_text(encoding="utf-8")
    assert measured.line_of(label, "comfyui") in page


@pytest.mark.slow
@pytest.mark.parametrize("label", TARGETS)
def test_every_row_of_the_table_is_what_is_found(label, measured):
    page = (ROOT / "docs" / "lora_files.md").read_text(encoding="utf-8")
    for form in measured.FORMS:
        assert measured.line_of(label, form) in page


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)


def weights(pipeline) -> dict[str, torch.Tensor]:
    """The effective weight of each adapted module."""
    found = {}
    for name in MODULES:
        layer = pipeline.transformer.get_submodule(name)
        inner = layer.weight.shape[1]
        with torch.no_grad():
            found[name] = layer(torch.eye(inner)).T
    return found


@pytest.mark.parametrize("form", FORMS)
def test_inspect_says_of_diffusers_what_its_pipeline_does(form, pipeline, tmp_path):
    make, metadata = FORMS[form]
    save_file(make(), tmp_path / "lora.safetensors", metadata)
    said = dict(inspect_lora(tmp_path / "lora.safetensors").lines)["diffusers"]
    before = weights(pipeline)
    try:
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    except (ValueError, KeyError, RuntimeError):
        assert said.startswith("error: ")
        return
    after = weights(pipeline)
    pipeline.unload_lora_weights()
    changes = {name: after[name] - before[name] for name in MODULES}
    if said == "nothing is loaded, without a message":
        assert not any(change.any() for change in changes.values())
    else:
        assert said == "strength 1"
        for name, (a, b) in deltas().items():
            torch.testing.assert_close(changes[name], b @ a * SCALE, atol=1e-4, rtol=1e-4)


def test_our_file_in_diffusers_with_scales_two_at_once_swapped_fused_and_unloaded(
    pipeline, tmp_path
):
    first = peft_names("diffusion_model.", SCALE)
    save_file(first, tmp_path / "a.safetensors")
    other = {name: tensor.flip(0) for name, tensor in first.items()}
    save_file(other, tmp_path / "b.safetensors")
    base, wanted = weights(pipeline), {}
    for name in MODULES:
        key = f"diffusion_model.{name}.lora_"
        products = [t[f"{key}B.weight"] @ t[f"{key}A.weight"] for t in (first, other)]
        wanted[name] = dict(zip("ab", products, strict=True))

    def expect(**strengths: float) -> None:
        for name, weight in weights(pipeline).items():
            delta = sum(strength * wanted[name][file] for file, strength in strengths.items())
            torch.testing.assert_close(weight, base[name] + delta, atol=1e-4, rtol=1e-4)

    for name in "ab":
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters(["a"], [0.7])
    expect(a=0.7)
    pipeline.set_adapters(["a", "b"], [0.7, 0.4])
    expect(a=0.7, b=0.4)
    pipeline.delete_adapters("b")
    pipeline.set_adapters(["a"], [1.0])
    pipeline.load_lora_weights(
        tmp_path, weight_name="b.safetensors", adapter_name="a", hotswap=True
    )
    expect(b=1.0)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    expect(b=0.5)
    pipeline.transformer.load_state_dict(
        {**pipeline.transformer.state_dict(), **{f"{n}.weight": w for n, w in base.items()}}
    )
    expect()
