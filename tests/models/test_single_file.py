"""Models of one file: the folder that is written holds the very weights, and what is not read is
named."""

import json
import shutil
from pathlib import Path

import native_names
import pytest
import torch
from safetensors.torch import save_file
from tiny_klein import write_klein

from dopsd.config.recipe import parse_recipe
from dopsd.models import load_family
from dopsd.models.single_file import convert, import_model, layout_of
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.runs.resolve import open_family


def refuse_difference(converted: Path, original: Path, part: str) -> None:
    ours, theirs = native_names.weights(converted / part), native_names.weights(original / part)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_zimage_transformer_in_native_names_becomes_its_folder(prefix, tmp_path):
    save_file(native_names.zimage(POCKET / "transformer", prefix), tmp_path / "z.safetensors")
    convert(tmp_path / "z.safetensors", str(POCKET), tmp_path / "out")
    refuse_difference(tmp_path / "out", POCKET, "transformer")
    family = load_family(str(tmp_path / "out"))
    assert family.name == "zimage" and family.default_nfe == load_family("pocket").default_nfe
    family.load_denoiser(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_klein_transformer_in_native_names_becomes_its_folder(prefix, tmp_path):
    original = write_klein(tmp_path / "klein")
    save_file(
        native_names.flux2_klein(original / "transformer", prefix), tmp_path / "k.safetensors"
    )
    convert(tmp_path / "k.safetensors", str(original), tmp_path / "out")
    refuse_difference(tmp_path / "out", original, "transformer")
    assert load_family(str(tmp_path / "out")).name == "flux2_klein"


def test_a_whole_sdxl_becomes_its_folder_with_the_scheduler_of_its_config(sdxl, tmp_path):
    save_file(native_names.sdxl(sdxl("turbo")), tmp_path / "x.safetensors")
    for kind in ("turbo", "base"):
        out = tmp_path / kind
        convert(tmp_path / "x.safetensors", str(sdxl(kind)), out)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            refuse_difference(out, sdxl("turbo"), part)
        assert load_family(str(out)).distilled == (kind == "turbo")


def test_a_recipe_takes_a_single_file_with_a_config_and_converts_it_once(tmp_path):
    file = tmp_path / "z.safetensors"
    save_file(native_names.zimage(POCKET / "transformer"), file)

    def opened(**model):
        tree = {
            "model": {"name_or_path": str(file), **model},
            "data": {"folder": str(tmp_path)},
            "method": {"name": "sft"},
            "output_dir": str(tmp_path / "runs"),
            "run_name": "x",
        }
        return open_family(parse_recipe(tree))

    with pytest.raises(ValueError, match=r"is a single file of zimage, .*as model\.config"):
        opened()
    first = opened(config=str(POCKET)).checkpoint.folder
    before = (first / "model_index.json").stat().st_mtime_ns
    assert opened(config=str(POCKET)).checkpoint.folder == first
    assert (first / "model_index.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"model\.config stands beside a single file"):
        opened(name_or_path=str(POCKET), config=str(POCKET))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf", "is a GGUF of quantized weights"),
        ("m.ckpt", "is a pickle"),
        ("m.pt", "is a pickle"),
        ("m.bin", "is a pickle"),
        ("m.onnx", "is a compiled graph"),
        ("m.zip", "is a file: give a diffusers folder"),
    ],
)
def test_files_of_other_formats_are_named(name, words, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=words):
        load_family(str(tmp_path / name))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("transformer.layers.0.attention.to_q.lora_A.weight", "is a LoRA: give it with --lora"),
        ("model.diffusion_model.label_emb.0.0.weight", "without its text encoders or VAE"),
        ("double_blocks.0.img_attn.qkv.weight", "is a FLUX.1"),
        ("cond_stage_model.transformer.weight", "is a Stable Diffusion 1"),
        ("model.diffusion_model.joint_blocks.0.weight", "is a Stable Diffusion 3"),
        ("something.else", "no model that is known .something"),
    ],
)
def test_safetensors_of_other_models_are_named(key, words, tmp_path):
    save_file({key: torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=words):
        load_family(str(tmp_path / "m.safetensors"))


def test_a_name_that_ends_like_a_file_is_no_repository():
    with pytest.raises(ValueError, match=r"models/x\.safetensors does not exist"):
        load_family("models/x.safetensors")


def test_quantized_incomplete_and_mismatched_files_are_refused(sdxl, tmp_path):
    tensors = native_names.zimage(POCKET / "transformer")
    file = tmp_path / "z.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match="holds quantized weights"):
        convert(file, str(POCKET), tmp_path / "out")
    lacking = {k: v for k, v in tensors.items() if "layers.0.attention.out" not in k}
    save_file(lacking, file)
    with pytest.raises(ValueError, match=r"z\.safetensors does not fit the configs of"):
        convert(file, str(POCKET), tmp_path / "out")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is no ZImagePipeline checkpoint"):
        convert(file, str(sdxl("turbo")), tmp_path / "out")
    with pytest.raises(ValueError, match=r"dopsd import .* --config"):
        import_model(file, None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and layout_of(file).family == "zimage"


def test_only_what_the_pipeline_reads_is_copied_from_the_config(tmp_path):
    shutil.copytree(POCKET, tmp_path / "base")
    for name in ("all_in_one.safetensors", "README.md", ".hidden"):
        (tmp_path / "base" / name).write_bytes(b"x")
    save_file(native_names.zimage(POCKET / "transformer"), tmp_path / "z.safetensors")
    convert(tmp_path / "z.safetensors", str(tmp_path / "base"), tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.name[0] == "." or p.suffix == ".md"]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())
