"""Z-Image's modules in LoRA files and single-file checkpoints."""

from dopsd.models.lora_names import ModuleNames, Row, same

STACKS = ("layers", "noise_refiner", "context_refiner")


def _block(stack: str) -> tuple[Row, ...]:
    block, attention = f"{stack}.{{}}", f"{stack}.{{}}.attention"
    return (
        Row(f"{attention}.qkv", tuple(f"{attention}.to_{each}" for each in "qkv")),
        Row(f"{attention}.out", (f"{attention}.to_out.0",)),
        Row(f"{attention}.q_norm", (f"{attention}.norm_q",)),
        Row(f"{attention}.k_norm", (f"{attention}.norm_k",)),
        *same(
            *(f"{block}.feed_forward.w{each}" for each in "123"),
            *(f"{block}.{kind}_norm{each}" for kind in ("attention", "ffn") for each in "12"),
            f"{block}.adaLN_modulation.0",
        ),
    )


NAMES = ModuleNames(
    rows=(
        *(row for stack in STACKS for row in _block(stack)),
        Row("x_embedder", ("all_x_embedder.2-1",)),
        Row("final_layer.linear", ("all_final_layer.2-1.linear",)),
        Row("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
        *same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
    ),
    aliases=tuple(
        Row(f"{stack}.{{}}.attention.to_out", (f"{stack}.{{}}.attention.to_out.0",))
        for stack in STACKS
    ),
)
