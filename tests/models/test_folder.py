"""A model's folder: diffusers generates with it what dopsd does, and what is there is not lost."""

import pytest
import torch
from diffusers import ZImagePipeline
from latents import sample_latents
from lora_files import SCALE, peft_names
from safetensors.torch import save_file

from dopsd.diffusion.sampling import noise_for
from dopsd.models.folder import fuse, is_model, tuning_metadata, write_model

PROMPTS = ["a big red star"]


def test_diffusers_generates_with_a_fused_folder_what_dopsd_generates_with_the_lora(
    tmp_path, pocket
):
    lora = tmp_path / "lora.safetensors"
    save_file({name: each * 0.1 for name, each in peft_names("transformer.", SCALE).items()}, lora)
    fuse("pocket", lora, tmp_path / "fused", strength=0.5)
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "fused", torch_dtype=torch.float32)
    noise = noise_for([3], pocket.channels, 16, 16)
    expected = sample_latents(pocket, PROMPTS, noise, lora, strength=0.5)
    base = sample_latents(pocket, PROMPTS, noise)
    latents = pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        latents=noise.start,
        output_type="latent",
    ).images
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(latents.float(), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        fuse("pocket", lora, tmp_path / "fused")


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
