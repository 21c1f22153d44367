"""SDXL's modules in LoRA files and single-file checkpoints.

The original UNet counts its blocks through (`input_blocks.4.1`), diffusers by resolution
(`down_blocks.1.attentions.0`); inside a transformer the names are the same.
"""

from collections.abc import Iterator

from dopsd.models.lora_names import ModuleNames, Row

LEVELS, LAYERS = 3, 2  # resolutions, and layers of each on the way down; one more on the way up
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = "transformer_blocks.{}"
ATTENTION = (
    "norm",
    "proj_in",
    "proj_out",
    *(f"{_TRANSFORMER}.norm{each}" for each in "123"),
    *(
        f"{_TRANSFORMER}.attn{i}.{each}"
        for i in "12"
        for each in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    f"{_TRANSFORMER}.ff.net.0.proj",
    f"{_TRANSFORMER}.ff.net.2",
)
OTHERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _blocks() -> Iterator[tuple[str, str]]:
    """(original, diffusers) names of every residual block, attention and resampling."""
    for level in range(LEVELS):
        for layer in range(LAYERS):
            index = 1 + level * (LAYERS + 1) + layer
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}"
            yield f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"
        index = (level + 1) * (LAYERS + 1)
        yield f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(LAYERS + 1):
            index = level * (LAYERS + 1) + layer
            yield f"output_blocks.{index}.0", f"up_blocks.{level}.resnets.{layer}"
            yield f"output_blocks.{index}.1", f"up_blocks.{level}.attentions.{layer}"
        yield f"output_blocks.{index}.2.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"


def _rows() -> Iterator[Row]:
    for native, module in _blocks():
        if ".resnets." in module:
            for there, here in RESNET.items():
                yield Row(f"{native}.{there}", (f"{module}.{here}",))
        elif ".attentions." in module:
            for name in ATTENTION:
                yield Row(f"{native}.{name}", (f"{module}.{name}",))
        else:
            yield Row(native, (module,))
    for native, module in OTHERS.items():
        yield Row(native, (module,))


ROWS = tuple(_rows())
NAMES = ModuleNames(
    ROWS,
    # old attention processors: to_out for to_out.0
    aliases=tuple(
        Row(part.removesuffix(".0"), (part,))
        for row in ROWS
        for part in row.parts
        if part.endswith(".to_out.0")
    ),
)
