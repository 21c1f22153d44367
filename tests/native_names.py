"""Weights of diffusers checkpoints under the names of the models' authors, as single files have
them. Written from the models' published code, for tests."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]


def weights(part: Path) -> Tensors:
    """All tensors of a folder of a diffusers checkpoint."""
    return {k: v for file in sorted(part.glob("*.safetensors")) for k, v in load_file(file).items()}


def _fused(tensors: Mapping[str, Tensor], parts: tuple[str, str, str], whole: str) -> Tensors:
    """With each triple of `parts` as one tensor."""
    fused = {}
    for name, tensor in tensors.items():
        if parts[0] in name:
            triple = [tensors[name.replace(parts[0], part)] for part in parts]
            fused[name.replace(parts[0], whole)] = torch.cat(triple)
        elif parts[1] not in name and parts[2] not in name:
            fused[name] = tensor
    return fused


def _renamed(tensors: Mapping[str, Tensor], pairs: Mapping[str, str], prefix: str = "") -> Tensors:
    """With regular expressions replaced in the names, the first that matches of each name."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in pairs.items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                name = new
        renamed[prefix + name] = tensor
    return renamed


def zimage(transformer: Path, prefix: str = "model.diffusion_model.") -> Tensors:
    fused = _fused(weights(transformer), ("to_q.", "to_k.", "to_v."), "qkv.")
    pairs = {
        r"^all_final_layer\.2-1\.": "final_layer.",
        r"^all_x_embedder\.2-1\.": "x_embedder.",
        r"attention\.to_out\.0\.": "attention.out.",
        r"attention\.norm_k\.": "attention.k_norm.",
        r"attention\.norm_q\.": "attention.q_norm.",
    }
    return _renamed(fused, pairs, prefix)


def flux2_klein(transformer: Path, prefix: str = "") -> Tensors:
    tensors = weights(transformer)
    # scale and shift are in the other order there
    scale, shift = tensors.pop("norm_out.linear.weight").chunk(2)
    tensors["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    tensors = _fused(tensors, (".attn.to_q.", ".attn.to_k.", ".attn.to_v."), ".img_attn.qkv.")
    added = tuple(f".attn.add_{letter}_proj." for letter in "qkv")
    tensors = _fused(tensors, added, ".txt_attn.qkv.")
    pairs = {
        SINGLE + r"to_qkv_mlp_proj\.": r"single_blocks.\1.linear1.",
        SINGLE + r"to_out\.": r"single_blocks.\1.linear2.",
        SINGLE + r"norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
        SINGLE + r"norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
        r"^transformer_blocks\.": "double_blocks.",
        r"\.attn\.norm_q\.weight": ".img_attn.norm.query_norm.scale",
        r"\.attn\.norm_k\.weight": ".img_attn.norm.key_norm.scale",
        r"\.attn\.norm_added_q\.weight": ".txt_attn.norm.query_norm.scale",
        r"\.attn\.norm_added_k\.weight": ".txt_attn.norm.key_norm.scale",
        r"\.attn\.to_out\.0\.": ".img_attn.proj.",
        r"\.attn\.to_add_out\.": ".txt_attn.proj.",
        r"\.ff\.linear_in\.": ".img_mlp.0.",
        r"\.ff\.linear_out\.": ".img_mlp.2.",
        r"\.ff_context\.linear_in\.": ".txt_mlp.0.",
        r"\.ff_context\.linear_out\.": ".txt_mlp.2.",
        r"^x_embedder\.": "img_in.",
        r"^context_embedder\.": "txt_in.",
        r"^time_guidance_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
        r"^time_guidance_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
        r"^((?:double|single)_stream_modulation\w*)\.linear\.": r"\1.lin.",
        r"^proj_out\.": "final_layer.linear.",
    }
    return _renamed(tensors, pairs, prefix)


SINGLE = r"^single_transformer_blocks\.(\d+)\.attn\."
RESNET = {
    r"norm1\.": "in_layers.0.",
    r"conv1\.": "in_layers.2.",
    r"time_emb_proj\.": "emb_layers.1.",
    r"norm2\.": "out_layers.0.",
    r"conv2\.": "out_layers.3.",
    r"conv_shortcut\.": "skip_connection.",
}


def _unet(part: Path, blocks: int = 3, layers: int = 2) -> Tensors:
    """By the numbering of the original UNet: input blocks 0 ... 3*2+2, output blocks likewise."""
    with_attention = {"down": [False, True, True], "up": [True, True, False]}
    pairs: dict[str, str] = {}
    for i in range(blocks):
        for j in range(layers):
            number = i * (layers + 1) + j + 1
            pairs[rf"^down_blocks\.{i}\.resnets\.{j}\."] = f"input_blocks.{number}.0."
            pairs[rf"^down_blocks\.{i}\.attentions\.{j}\."] = f"input_blocks.{number}.1."
        number = (i + 1) * (layers + 1)
        pairs[rf"^down_blocks\.{i}\.downsamplers\.0\.conv\."] = f"input_blocks.{number}.0.op."
        for j in range(layers + 1):
            number = i * (layers + 1) + j
            pairs[rf"^up_blocks\.{i}\.resnets\.{j}\."] = f"output_blocks.{number}.0."
            pairs[rf"^up_blocks\.{i}\.attentions\.{j}\."] = f"output_blocks.{number}.1."
        place = 2 if with_attention["up"][i] else 1
        number = i * (layers + 1) + layers
        up = f"output_blocks.{number}.{place}.conv."
        pairs[rf"^up_blocks\.{i}\.upsamplers\.0\.conv\."] = up
    pairs |= {
        r"^mid_block\.resnets\.0\.": "middle_block.0.",
        r"^mid_block\.attentions\.0\.": "middle_block.1.",
        r"^mid_block\.resnets\.1\.": "middle_block.2.",
        r"^conv_in\.": "input_blocks.0.0.",
        r"^conv_norm_out\.": "out.0.",
        r"^conv_out\.": "out.2.",
        r"^time_embedding\.linear_1\.": "time_embed.0.",
        r"^time_embedding\.linear_2\.": "time_embed.2.",
        r"^add_embedding\.linear_1\.": "label_emb.0.0.",
        r"^add_embedding\.linear_2\.": "label_emb.0.2.",
    }
    resnet = {
        rf"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.{k}": rf"\1.{v}"
        for k, v in RESNET.items()
    }
    return _renamed(weights(part), pairs | resnet, "model.diffusion_model.")


def _vae(part: Path, blocks: int = 4) -> Tensors:
    pairs = {
        r"conv_shortcut\.": "nin_shortcut.",
        r"conv_norm_out\.": "norm_out.",
        r"mid_block\.attentions\.0\.group_norm\.": "mid.attn_1.norm.",
        r"mid_block\.attentions\.0\.to_out\.0\.": "mid.attn_1.proj_out.",
        r"mid_block\.attentions\.0\.to_([qkv])\.": r"mid.attn_1.\1.",
        r"mid_block\.resnets\.0\.": "mid.block_1.",
        r"mid_block\.resnets\.1\.": "mid.block_2.",
        r"down_blocks\.(\d+)\.resnets\.(\d+)\.": r"down.\1.block.\2.",
        r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.": r"down.\1.downsample.conv.",
    }
    for i in range(blocks):  # counted from the other end there
        pairs[rf"up_blocks\.{i}\.resnets\.(\d+)\."] = rf"up.{blocks - 1 - i}.block.\1."
        pairs[rf"up_blocks\.{i}\.upsamplers\.0\.conv\."] = f"up.{blocks - 1 - i}.upsample.conv."
    renamed = _renamed(weights(part), pairs, "first_stage_model.")
    # attention as 1 x 1 convolutions
    return {
        name: tensor[..., None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def _open_clip(part: Path) -> Tensors:
    tensors = _fused(
        {k.removeprefix("text_model."): v for k, v in weights(part).items()},
        (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
        ".attn.in_proj_",
    )
    projection = tensors.pop("text_projection.weight")
    pairs = {
        r"^encoder\.layers\.": "transformer.resblocks.",
        r"\.self_attn\.out_proj\.": ".attn.out_proj.",
        r"\.layer_norm1\.": ".ln_1.",
        r"\.layer_norm2\.": ".ln_2.",
        r"\.mlp\.fc1\.": ".mlp.c_fc.",
        r"\.mlp\.fc2\.": ".mlp.c_proj.",
        r"^embeddings\.token_embedding\.weight": "token_embedding.weight",
        r"^embeddings\.position_embedding\.weight": "positional_embedding",
        r"^final_layer_norm\.": "ln_final.",
    }
    prefix = "conditioner.embedders.1.model."
    return {
        **_renamed(tensors, pairs, prefix),
        f"{prefix}text_projection": projection.T.contiguous(),
    }


def sdxl(folder: Path) -> Tensors:
    first = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in weights(folder / "text_encoder").items()
    }
    return {
        **_unet(folder / "unet"),
        **_vae(folder / "vae"),
        **first,
        **_open_clip(folder / "text_encoder_2"),
    }
