"""A network as one file: diffusers' converters make the same network of it again, at full size on
meta tensors and numerically on tiny ones."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from tiny import REAL_UNET, SDXL_UNET, TINY_UNET

from dopsd.files import read_metadata
from dopsd.models import family_class
from dopsd.models.folder import write_model
from dopsd.models.native_file import export_single_file, in_scaled_fp8, native_tensors

KLEIN = {"attention_head_dim": 128, "guidance_embeds": False}
FULL_SIZE = {
    "zimage": (ZImageTransformer2DModel, {}),
    "klein-4B": (
        Flux2Transformer2DModel,
        KLEIN
        | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
        | {"joint_attention_dim": 7680},
    ),
    "klein-9B": (
        Flux2Transformer2DModel,
        KLEIN
        | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
        | {"joint_attention_dim": 12288},
    ),
    "sdxl": (UNet2DConditionModel, SDXL_UNET | REAL_UNET),
}
TINY_KLEIN = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}
TINY = {
    "zimage": (
        ZImageTransformer2DModel,
        {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
        | {"axes_dims": [4, 6, 6]},
    ),
    "klein": (
        Flux2Transformer2DModel,
        KLEIN
        | TINY_KLEIN
        | {"attention_head_dim": 16, "joint_attention_dim": 24, "axes_dims_rope": [4] * 4},
    ),
    "sdxl": (UNet2DConditionModel, SDXL_UNET | TINY_UNET),
}


def family_of(name: str):
    return family_class("flux2_klein" if name.startswith("klein") else name)


def as_diffusers(name: str, native: dict, network) -> dict[str, torch.Tensor]:
    """diffusers' own conversion of a single file."""
    if name == "zimage":
        prefixed = {f"model.diffusion_model.{key}": t for key, t in native.items()}
        return single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(prefixed)
    if name.startswith("klein"):
        return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(native))
    prefixed = {f"model.diffusion_model.{key}": t for key, t in native.items()}
    return single_file_utils.convert_ldm_unet_checkpoint(prefixed, dict(network.config))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_at_full_size_diffusers_finds_every_tensor_in_its_shape(name):
    kind, config = FULL_SIZE[name]
    with torch.device("meta"):
        network = kind(**config)
    state = network.state_dict()
    back = as_diffusers(name, native_tensors(state, family_of(name).module_names), network)
    assert {key: tensor.shape for key, tensor in back.items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


@pytest.mark.parametrize("name", TINY)
def test_the_values_are_those_of_the_network(name):
    torch.manual_seed(0)
    kind, config = TINY[name]
    network = kind(**config)
    state = network.state_dict()
    back = as_diffusers(name, native_tensors(state, family_of(name).module_names), network)
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key


def test_a_folder_is_written_in_its_own_dtype_with_its_metadata(tmp_path, pocket):
    network = pocket.load_denoiser(torch.device("cpu"), torch.bfloat16).network
    write_model(tmp_path / "model", network, pocket, {"method": "sft"})
    export_single_file(tmp_path / "model", tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    back = as_diffusers("zimage", tensors, network)
    assert all(torch.equal(back[key], t) for key, t in network.state_dict().items())
    assert read_metadata(tmp_path / "one.safetensors")["method"] == "sft"
    with pytest.raises(ValueError, match="is not overwritten"):
        export_single_file(tmp_path / "model", tmp_path / "one.safetensors")


def test_scaled_float8_times_its_scale_is_the_weight_within_its_precision():
    weights = {"a.weight": torch.randn(64, 32) * 30, "b.weight": torch.randn(4, 4)}
    written = in_scaled_fp8(weights, {"a"})
    assert written["a.weight"].dtype == torch.float8_e4m3fn and written["scaled_fp8"].numel() == 2
    restored = written["a.weight"].float() * written["a.scale_weight"]
    assert (restored - weights["a.weight"]).abs().max() <= weights["a.weight"].abs().max() / 16
    assert written["b.weight"] is weights["b.weight"] and "b.scale_weight" not in written
