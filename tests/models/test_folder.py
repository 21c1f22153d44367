"""A model's folder: diffusers generates with it what dopsd does, and what is there is not lost."""

import shutil

import pytest
import torch
from diffusers import ZImagePipeline
from latents import sample_latents
from lora_files import MODULES, SCALE, deltas, peft_names
from safetensors.torch import save_file

from dopsd.diffusion.sampling import noise_for
from dopsd.models import load_family
from dopsd.models.folder import fuse, is_model, network_dtype, tuning_metadata, write_model

PROMPTS = ["a big red star"]


def test_diffusers_generates_with_a_fused_folder_what_dopsd_generates_with_the_lora(
    tmp_path, pocket
):
    lora = tmp_path / "lora.safetensors"
    save_file({name: each * 0.1 for name, each in peft_names("transformer.", SCALE).items()}, lora)
    fuse("pocket", lora, tmp_path / "fused", strength=0.5)
    fused = load_family(str(tmp_path / "fused"))
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "fused", torch_dtype=torch.float32)
    noise = noise_for([3], pocket.channels, 16, 16)
    expected = sample_latents(fused, PROMPTS, noise)
    base = sample_latents(pocket, PROMPTS, noise)
    latents = pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=pocket.default_nfe,
        guidance_scale=0.0,
        latents=noise.start,
        output_type="latent",
    ).images
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(latents.float(), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        fuse("pocket", lora, tmp_path / "fused")


def test_fused_weights_are_rounded_once_to_the_checkpoints_own_dtype(tmp_path, pocket):
    lora = tmp_path / "lora.safetensors"
    save_file(peft_names("transformer.", SCALE), lora)
    fuse("pocket", [lora], tmp_path / "fused", strength=0.3)
    fused = load_family(str(tmp_path / "fused")).load_denoiser(torch.device("cpu"), torch.bfloat16)
    base = pocket.load_denoiser(torch.device("cpu"), torch.bfloat16).network.state_dict()
    for name, tensor in fused.network.state_dict().items():
        module = name.removesuffix(".weight")
        expected = base[name].double()
        if module in MODULES:
            a, b = deltas()[module]
            expected = expected + 0.3 * (b * SCALE).double() @ a.double()
        assert torch.equal(tensor, expected.bfloat16()), name
    assert network_dtype(load_family(str(tmp_path / "fused"))) == torch.bfloat16


def test_only_what_a_pipeline_reads_is_copied(tmp_path, pocket):
    source = tmp_path / "source"
    shutil.copytree(pocket.checkpoint.folder, source)
    foreign = ("whole_1.0_fp16.safetensors", "README.md", "run.py", "vae/extra.bin", "images/a.png")
    for name in foreign:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    (source / "LICENSE.md").touch()
    family = load_family(str(source))
    network = family.load_denoiser(torch.device("cpu"), torch.bfloat16).network
    write_model(tmp_path / "model", network, family)
    assert not any((tmp_path / "model" / name).exists() for name in foreign)
    assert (tmp_path / "model" / "LICENSE.md").exists()
    assert (tmp_path / "model" / "vae" / "config.json").exists()


def test_a_written_folder_holds_its_metadata_beside_the_checkpoints_own(tmp_path, pocket):
    network = pocket.load_denoiser(torch.device("cpu"), torch.float32).network
    assert not is_model(tmp_path / "model") and tuning_metadata(pocket.checkpoint.folder) == {}
    write_model(tmp_path / "model", network, pocket, {"method": "sft"})
    assert is_model(tmp_path / "model")
    assert tuning_metadata(tmp_path / "model") == {"method": "sft"}
    assert not (tmp_path / "model" / "README.md").exists()


def test_a_folder_that_does_not_hold_the_network_is_not_left_behind(tmp_path, pocket, monkeypatch):
    network = pocket.load_denoiser(torch.device("cpu"), torch.float32).network
    save = type(network).save_pretrained

    def save_other(network, folder):
        with torch.no_grad():
            parameter = next(network.parameters())
            parameter.add_(1.0)
            save(network, folder)
            parameter.sub_(1.0)

    monkeypatch.setattr(type(network), "save_pretrained", save_other)
    with pytest.raises(ValueError, match="reads back with other values than were written"):
        write_model(tmp_path / "model", network, pocket)
    assert not (tmp_path / "model").exists()
