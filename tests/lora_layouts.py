"""One LoRA in the layouts that tools write, by family: its tensors, metadata and PEFT settings,
and the deltas that it means, computed here by their definitions.

The layouts are those of kohya, musubi, ai-toolkit, OneTrainer, SimpleTuner, DiffSynth, LyCORIS,
PEFT, diffusers, ComfyUI and older diffusers.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK
AB, UP_DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# Diffusers module -> (out, in).
ZIMAGE = {
    "layers.0.attention.to_q": (12, 8),
    "layers.0.attention.to_k": (12, 8),
    "layers.0.attention.to_v": (12, 8),
    "layers.11.attention.to_out.0": (8, 12),
    "noise_refiner.1.feed_forward.w1": (10, 8),
    "context_refiner.0.feed_forward.w2": (8, 10),
}
KLEIN = {
    "transformer_blocks.1.attn.add_q_proj": (12, 8),
    "transformer_blocks.1.attn.add_k_proj": (12, 8),
    "transformer_blocks.1.attn.add_v_proj": (12, 8),
    "transformer_blocks.0.attn.to_add_out": (8, 12),
    "transformer_blocks.0.ff.linear_in": (20, 8),
    "transformer_blocks.2.ff_context.linear_out": (8, 10),
    "single_transformer_blocks.10.attn.to_qkv_mlp_proj": (56, 8),
    "single_transformer_blocks.3.attn.to_out": (8, 22),
}
SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (8, 8),
    "mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0": (8, 8),
    "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": (24, 8),
    "up_blocks.0.attentions.1.proj_in": (8, 8),
}
# The original model's names, written down from its code: (name, diffusers modules).
NATIVE = {
    "zimage": {
        "layers.0.attention.qkv": [f"layers.0.attention.to_{each}" for each in "qkv"],
        "layers.11.attention.out": ["layers.11.attention.to_out.0"],
        "noise_refiner.1.feed_forward.w1": ["noise_refiner.1.feed_forward.w1"],
        "context_refiner.0.feed_forward.w2": ["context_refiner.0.feed_forward.w2"],
    },
    "flux2_klein": {
        "double_blocks.1.txt_attn.qkv": [
            f"transformer_blocks.1.attn.add_{each}_proj" for each in "qkv"
        ],
        "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
        "double_blocks.2.txt_mlp.2": ["transformer_blocks.2.ff_context.linear_out"],
        "single_blocks.10.linear1": ["single_transformer_blocks.10.attn.to_qkv_mlp_proj"],
        "single_blocks.3.linear2": ["single_transformer_blocks.3.attn.to_out"],
    },
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q": [
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        ],
        "middle_block.1.transformer_blocks.3.attn2.to_out.0": [[*SDXL][1]],
        "output_blocks.5.1.transformer_blocks.0.ff.net.0.proj": [[*SDXL][2]],
        "output_blocks.1.1.proj_in": [[*SDXL][3]],
    },
}
SHAPES = {"zimage": ZIMAGE, "flux2_klein": KLEIN, "sdxl": SDXL}


@dataclass
class Layout:
    """A file: what it holds, and the deltas [out, in] in float64 that it means."""

    family: str
    tensors: dict[str, Tensor]
    deltas: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # adapter_config.json beside adapter_model.safetensors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(family: str, ranks: dict[str, int] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            random((ranks or {}).get(name, RANK), inner, seed=index),
            random(outer, (ranks or {}).get(name, RANK), seed=50 + index),
        )
        for index, (name, (outer, inner)) in enumerate(SHAPES[family].items())
    }


def product(pairs: dict[str, tuple[Tensor, Tensor]], scale: float = SCALE) -> dict[str, Tensor]:
    return {name: scale * b.double() @ a.double() for name, (a, b) in pairs.items()}


def lora(
    family: str,
    prefix: str,
    *,
    words: tuple[str, str] = AB,
    joint: str = ".",
    alpha: bool = True,
    native: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Layout:
    """LoRA behind a prefix. alpha: as tensors; else B holds the scale. native: the original model's
    names, where parts of one module have one A in common."""
    pairs = factors(family)
    if native:
        shared = {}
        for name, parts in NATIVE[family].items():
            a = pairs[parts[0]][0]
            for part in parts:
                pairs[part] = (a, pairs[part][1])
            shared[name] = (a, torch.cat([pairs[part][1] for part in parts]))
        written = shared
    else:
        written = pairs
    tensors = {}
    for name, (a, b) in written.items():
        path = prefix + name.replace(".", joint)
        tensors[f"{path}.{words[0]}"] = a.to(dtype)
        tensors[f"{path}.{words[1]}"] = (b if alpha else b * SCALE).to(dtype)
        if alpha:
            tensors[f"{path}.alpha"] = torch.tensor(ALPHA).to(dtype)
    rounded = {n: (a.to(dtype).float(), b.to(dtype).float()) for n, (a, b) in pairs.items()}
    return Layout(family, tensors, product(rounded))


def with_settings(family: str, prefix: str, in_folder: bool, **settings: Any) -> Layout:
    """Unscaled LoRA whose scale is in PEFT's settings: beside the file, or in its metadata."""
    names = list(SHAPES[family])
    odd = names[1]
    ranks = {odd: 2} if "rank_pattern" in settings else {}
    pairs = factors(family, ranks)
    config = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", "target_modules": names}
    config |= settings
    deltas = {}
    for name, (a, b) in pairs.items():
        rank = len(a)
        alpha = settings.get("alpha_pattern", {}).get(odd, ALPHA) if name == odd else ALPHA
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        deltas |= product({name: (a, b)}, scale)
    component = "unet" if family == "sdxl" else "transformer"
    tensors = {f"{prefix}{n}.{w}": t for n, p in pairs.items() for w, t in zip(AB, p, strict=True)}
    if in_folder:
        return Layout(family, tensors, deltas, config=config)
    text = json.dumps({f"{component}.{key}": value for key, value in config.items()})
    return Layout(family, tensors, deltas, {"lora_adapter_metadata": text})


def lokr(family: str, prefix: str, whole: str, joint: str = ".", native: bool = False) -> Layout:
    """LoKr. whole: which factors are stored whole, of "12"; alpha counts where one is not."""
    tensors, deltas = {}, {}
    modules = NATIVE[family] if native else {name: [name] for name in SHAPES[family]}
    for seed, (name, parts) in enumerate(modules.items()):
        outer = sum(SHAPES[family][part][0] for part in parts)
        inner = SHAPES[family][parts[0]][1]
        path = prefix + name.replace(".", joint)
        sizes = {"1": (2, 2), "2": (outer // 2, inner // 2)}
        matrices = []
        for factor, (rows, columns) in sizes.items():
            if factor in whole:
                matrix = random(rows, columns, seed=seed)
                tensors[f"{path}.lokr_w{factor}"] = matrix
                matrices.append(matrix.double())
            else:
                a, b = random(rows, RANK, seed=seed), random(RANK, columns, seed=seed)
                tensors |= {f"{path}.lokr_w{factor}_a": a, f"{path}.lokr_w{factor}_b": b}
                matrices.append(a.double() @ b.double())
        tensors[f"{path}.alpha"] = torch.tensor(ALPHA)
        delta = torch.kron(*matrices) * (1.0 if whole == "12" else SCALE)
        deltas |= dict(zip(parts, delta.chunk(len(parts)), strict=True))
    return Layout(family, tensors, deltas)


def loha(family: str, prefix: str, joint: str = ".") -> Layout:
    tensors, deltas = {}, {}
    for seed, (name, (outer, inner)) in enumerate(SHAPES[family].items()):
        path, halves = prefix + name.replace(".", joint), []
        for factor in "12":
            a, b = random(outer, RANK, seed=seed + int(factor)), random(RANK, inner, seed=seed)
            tensors |= {f"{path}.hada_w{factor}_a": a, f"{path}.hada_w{factor}_b": b}
            halves.append(a.double() @ b.double())
        tensors[f"{path}.alpha"] = torch.tensor(ALPHA)
        deltas[name] = halves[0] * halves[1] * SCALE
    return Layout(family, tensors, deltas)


def differences(family: str, prefix: str) -> Layout:
    deltas = {name: random(*shape).double() for name, shape in SHAPES[family].items()}
    tensors = {f"{prefix}{name}.diff": delta.float() for name, delta in deltas.items()}
    return Layout(family, tensors, deltas)


def convolutions(kind: str) -> Layout:
    """LyCORIS on a 3 x 3 convolution of SDXL, kohya's names."""
    path, module = "lora_unet_input_blocks_4_0_in_layers_2", "down_blocks.1.resnets.0.conv1"
    outer, inner, r = 8, 6, 2
    alpha = torch.tensor(3.0)
    tensors = {f"{path}.alpha": alpha}

    def put(**named: Tensor) -> None:
        tensors.update({f"{path}.{name.replace('__', '.')}": t for name, t in named.items()})

    core = random(r, r, 3, 3)
    if kind == "LoCon":
        a, b = random(r, inner, 3, 3), random(outer, r, 1, 1)
        put(lora_down__weight=a, lora_up__weight=b)
        delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    elif kind == "LoCon with a core":
        a, b = random(r, inner, 1, 1), random(outer, r, 1, 1)
        put(lora_down__weight=a, lora_mid__weight=core, lora_up__weight=b)
        steps = (b[:, :, 0, 0].double(), core.double(), a[:, :, 0, 0].double())
        delta = torch.einsum("or,rskl,si->oikl", *steps)
    elif kind == "LoHa with a core":
        halves = []
        for i in (1, 2):
            a, b = random(r, outer, seed=i), random(r, inner, seed=i)
            put(**{f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": core * i})
            parts = ((core * i).double(), a.double(), b.double())
            halves.append(torch.einsum("ijkl,ip,jr->prkl", *parts))
        delta = halves[0] * halves[1]
    else:
        w1, a, b = random(2, 3), random(r, outer // 2), random(r, inner // 3)
        put(lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, lokr_t2=core)
        w2 = torch.einsum("ijkl,ip,jr->prkl", core.double(), a.double(), b.double())
        delta = torch.kron(w1[:, :, None, None].double(), w2.contiguous())
    return Layout("sdxl", tensors, {module: (delta * float(alpha) / r).flatten(1)})


def old_processors() -> Layout:
    """diffusers before it used PEFT: attention processors, no alpha."""
    pairs = {n: p for n, p in factors("sdxl").items() if ".attn" in n}
    tensors = {}
    for name, (a, b) in pairs.items():
        block, _, projection = name.removesuffix(".0").rpartition(".")
        path = f"unet.{block}.processor.{projection}_lora"
        tensors |= {f"{path}.down.weight": a, f"{path}.up.weight": b}
    return Layout("sdxl", tensors, product(pairs, 1.0))


def redundant() -> Layout:
    """A fused module and, once more, its parts."""
    layout = lora("zimage", "lora_unet_", words=UP_DOWN, joint="_", native=True)
    fused = "lora_unet_layers_0_attention_qkv"
    for index, part in enumerate("qkv"):
        path = f"lora_unet_layers_0_attention_to_{part}"
        down, up = (layout.tensors[f"{fused}.{word}"] for word in UP_DOWN)
        layout.tensors |= {
            f"{path}.lora_down.weight": down.clone(),
            f"{path}.lora_up.weight": up.chunk(3)[index].clone(),
            f"{path}.alpha": torch.tensor(ALPHA),
        }
    return layout


def swapped() -> Layout:
    """klein's last modulation: shift and scale are the other way round in diffusers."""
    a, b = random(RANK, 8), random(16, RANK)
    path = "diffusion_model.final_layer.adaLN_modulation.1"
    delta = b.double() @ a.double()
    tensors = {f"{path}.{AB[0]}": a, f"{path}.{AB[1]}": b}
    return Layout("flux2_klein", tensors, {"norm_out.linear": torch.cat([delta[8:], delta[:8]])})


def beside(layout: Layout, *keys: str) -> Layout:
    layout.tensors |= {key: random(4, 8) for key in keys}
    return layout


DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")
PATTERNS = {
    "rank_pattern": {"layers.0.attention.to_k": 2},
    "alpha_pattern": {"layers.0.attention.to_k": 5.0},
}
HALF, FP8 = torch.bfloat16, torch.float8_e4m3fn
LAYOUTS: dict[str, Callable[[], Layout]] = {
    **{
        f"{family}: {name}": make
        for family in SHAPES
        for name, make in {
            "diffusers, scale in B": lambda f=family: lora(
                f, "unet." if f == "sdxl" else "transformer.", alpha=False
            ),
            "diffusers, alpha tensors": lambda f=family: lora(
                f, "unet." if f == "sdxl" else "transformer."
            ),
            "diffusers, metadata": lambda f=family: with_settings(
                f, "unet." if f == "sdxl" else "transformer.", False
            ),
            "PEFT folder": lambda f=family: with_settings(f, "base_model.model.", True),
            "PEFT folder, rsLoRA": lambda f=family: with_settings(
                f, "base_model.model.", True, use_rslora=True
            ),
            "PEFT without settings": lambda f=family: lora(f, "base_model.model.", alpha=False),
            "DiffSynth": lambda f=family: lora(f, "", words=DEFAULT, alpha=False),
            "ComfyUI, original names": lambda f=family: lora(f, "diffusion_model.", native=True),
            "checkpoint prefix": lambda f=family: lora(f, "model.diffusion_model.", native=True),
            "original names, bare": lambda f=family: lora(f, "", native=True),
            "kohya, original names": lambda f=family: lora(
                f, "lora_unet_", words=UP_DOWN, joint="_", native=True
            ),
            "kohya, diffusers' names": lambda f=family: lora(
                f, "lora_unet_", words=UP_DOWN, joint="_"
            ),
            "OneTrainer": lambda f=family: lora(f, "lora_transformer_", words=UP_DOWN, joint="_"),
            "LyCORIS": lambda f=family: lora(f, "lycoris_", words=UP_DOWN, joint="_"),
            "LyCORIS LoKr": lambda f=family: lokr(f, "lycoris_", "1", joint="_"),
            "LyCORIS LoHa": lambda f=family: loha(f, "lycoris_", joint="_"),
            "compiled": lambda f=family: lora(f, "transformer._orig_mod."),
        }.items()
    },
    "ai-toolkit, diffusers' names": lambda: lora("zimage", "diffusion_model.", alpha=False),
    "musubi, converted": lambda: lora("zimage", "diffusion_model.", words=UP_DOWN),
    "metadata, rsLoRA": lambda: with_settings("zimage", "transformer.", False, use_rslora=True),
    "metadata, patterns": lambda: with_settings("zimage", "transformer.", False, **PATTERNS),
    "PEFT folder, patterns": lambda: with_settings("zimage", "base_model.model.", True, **PATTERNS),
    "kohya, two underscores": lambda: lora("zimage", "lora_unet__", words=UP_DOWN, joint="_"),
    "dotted down and up": lambda: lora("zimage", "transformer.", words=DOTTED),
    "DiffSynth, training module": lambda: lora("zimage", "pipe.dit.", words=DEFAULT, alpha=False),
    "several processes": lambda: lora("zimage", "module.transformer.", alpha=False),
    "a fused module and its parts": redundant,
    "bfloat16": lambda: lora("zimage", "transformer.", dtype=HALF),
    "float8 with alpha": lambda: lora("zimage", "diffusion_model.", words=UP_DOWN, dtype=FP8),
    "LoKr, both whole": lambda: lokr("zimage", "diffusion_model.", "12"),
    "LoKr, none whole": lambda: lokr("zimage", "diffusion_model.", ""),
    "LoKr, second whole": lambda: lokr("zimage", "diffusion_model.", "2"),
    "LoKr on fused modules": lambda: lokr("flux2_klein", "diffusion_model.", "1", native=True),
    "whole differences": lambda: differences("zimage", "diffusion_model."),
    "klein's last modulation": swapped,
    "old attention processors": old_processors,
    **{
        kind: lambda kind=kind: convolutions(kind)
        for kind in ("LoCon", "LoCon with a core", "LoHa with a core", "LoKr with a core")
    },
    "with text encoders": lambda: beside(
        lora("sdxl", "lora_unet_", words=UP_DOWN, joint="_", native=True),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "bundle_emb.zib.string_to_param.*",
    ),
    "with text encoders, diffusers": lambda: beside(
        lora("zimage", "transformer."),
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
}
