"""FLUX.2-klein's modules in LoRA files and single-file checkpoints."""

from dopsd.models.lora_names import ModuleNames, Row

DOUBLE, DOUBLE_DIFFUSERS = "double_blocks.{}", "transformer_blocks.{}"
SINGLE, SINGLE_DIFFUSERS = "single_blocks.{}", "single_transformer_blocks.{}.attn"
_FUSED = {
    "img_attn": ("to_q", "to_k", "to_v"),
    "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_DOUBLE_MODULES = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE_MODULES = {
    "linear1": "to_qkv_mlp_proj",
    "linear2": "to_out",
    "norm.query_norm": "norm_q",
    "norm.key_norm": "norm_k",
}
_EMBEDDING = "time_guidance_embed"
_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{_EMBEDDING}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_EMBEDDING}.timestep_embedder.linear_2",
    "guidance_in.in_layer": f"{_EMBEDDING}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_EMBEDDING}.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}

NAMES = ModuleNames(
    rows=(
        *(
            Row(f"{DOUBLE}.{part}.qkv", tuple(f"{DOUBLE_DIFFUSERS}.attn.{each}" for each in fused))
            for part, fused in _FUSED.items()
        ),
        *(
            Row(f"{DOUBLE}.{native}", (f"{DOUBLE_DIFFUSERS}.{module}",))
            for native, module in _DOUBLE_MODULES.items()
        ),
        *(
            Row(f"{SINGLE}.{native}", (f"{SINGLE_DIFFUSERS}.{module}",))
            for native, module in _SINGLE_MODULES.items()
        ),
        *(Row(native, (module,)) for native, module in _OTHERS.items()),
        # shift before scale there, scale before shift in diffusers
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    ),
    weights={"query_norm": "scale", "key_norm": "scale"},
)
