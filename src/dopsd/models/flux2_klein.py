"""FLUX.2-klein, 4B and 9B: Qwen3 text, a transformer that takes images to edit as further tokens,
patched KL latents.

An image is seen by the teacher as one more reference (`edit`), or by a Qwen3-VL whose language
weights are replaced by the pipeline's text encoder (`vlm`). The network has no mask: padding is fed
to it, and a batch has one layout.
"""

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.flow import Schedule
from dopsd.models.base import Size, TeacherVision, Usage, plain_usage
from dopsd.models.hub import Checkpoint
from dopsd.models.lora import Pairs, diffusers_form
from dopsd.models.qwen3 import QwenTextEncoder, Reading, count_tokens, with_suffix
from dopsd.models.vae import KLVAE, empty_autoencoder, load_autoencoder

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_ASKED = inspect.signature(Flux2KleinPipeline.__call__).parameters
LAYERS: tuple[int, ...] = _ASKED["text_encoder_out_layers"].default
READING = Reading(
    LAYERS, thinking=False, padded=True, length=_ASKED["max_sequence_length"].default
)  # as Flux2KleinPipeline.encode_prompt
NFE = 4  # that klein was distilled for; the pipeline's default of 50 is the base models'
CELLS = 128  # the pipeline's default_sample_size: cells of the autoencoder along a side
# What Flux2ImageProcessor takes as an image to edit: pixels, side, long side by short one.
MOST_PIXELS, LEAST_SIDE, LONGEST = 1024 * 1024, 64, 8
# Words after the caption in the `edit` teacher's prompt; the second where the caption edits images
# itself.
SUFFIX = (
    "Keep the subject, its details, the background and the composition of the reference picture."
)
LAST_SUFFIX = (
    "The last reference picture is the result that is wanted: paint it again as exactly as you can."
)


@dataclass(frozen=True)
class Variant:
    """What is known of a size of klein by its name on the hub."""

    architecture: str
    licence: str
    hub_licence: str
    vlm: str


# By the width of the text encoder.
VARIANTS = {
    2560: Variant("Flux.2-klein-4b", "Apache-2.0", "apache-2.0", "Qwen/Qwen3-VL-4B-Instruct"),
    4096: Variant(
        "Flux.2-klein-9b", "FLUX-Non-Commercial-License", "other", "Qwen/Qwen3-VL-8B-Instruct"
    ),
}
UNKNOWN = Variant("Flux.2-klein", "other", "other", "Qwen/Qwen3-VL-4B-Instruct")


class Flux2Klein:
    """A FLUX.2-klein checkpoint. See `families.base.Family` for what each member is."""

    name = "flux2_klein"
    repo = "black-forest-labs/FLUX.2-klein-4B"
    teacher_contexts = ("edit", "vlm")
    native_space = "velocity"
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.(linear_in|linear_out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    quantizable = lora_targets
    export_prefix = "transformer"
    distillable = False
    base_version = "flux2_klein"
    unrelated_prompts: tuple[str, ...] = ()
    default_nfe = NFE

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: Mapping[str, Any],
        teacher_vision: TeacherVision | None = None,
    ):
        self.checkpoint, folder = checkpoint, checkpoint.folder
        checkpoint.refuse_missing(PARTS, index, "FLUX.2-klein")
        self.distilled = bool(
            index.get("is_distilled", False)
        )  # how the pipelines tell klein from its base models
        with checkpoint.reading("scheduler"):
            self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        with checkpoint.reading("vae"):
            vae = AutoencoderKLFlux2.load_config(folder / "vae")
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
            self.vae_scale_factor = self.multiple = (
                2 * scale
            )  # latents are patched before the network: 2 x 2 of the autoencoder's
            self.channels: int = 4 * vae["latent_channels"]
            self.resolution = CELLS * scale
        with checkpoint.reading("text_encoder"):
            text = AutoConfig.from_pretrained(folder / "text_encoder")
            self._text_width, depth = text.hidden_size * len(LAYERS), text.num_hidden_layers
        with checkpoint.reading("transformer"):
            wanted = Flux2Transformer2DModel.load_config(folder / "transformer")[
                "joint_attention_dim"
            ]
        if depth < max(LAYERS):
            listed = ", ".join(map(str, LAYERS))
            raise ValueError(
                f"{checkpoint.name}: klein reads the states after layers {listed} of its text encoder; this one has "
                f"{depth}, so it is another model's."
            )
        if wanted != self._text_width:
            raise ValueError(
                f"{checkpoint.name}: the transformer reads tokens of {wanted} numbers, the text encoder makes "
                f"{self._text_width}; the parts are of different sizes."
            )
        variant = VARIANTS.get(text.hidden_size, UNKNOWN)
        self.architecture = variant.architecture
        self.licence, self.hub_licence = variant.licence, variant.hub_licence
        teacher_vision, own = teacher_vision or TeacherVision(), folder / "vlm"
        self.teacher_context = teacher_vision.context or self.teacher_contexts[0]
        self.vlm = teacher_vision.vlm or (str(own) if own.is_dir() else variant.vlm)
        self.suffix = teacher_vision.suffix

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """Flux2KleinPipeline's times: its scheduler, asked as the pipeline asks it."""
        if nfe < 1:
            raise ValueError(f"nfe is {nfe}; a walk needs at least 1 forward.")
        flow = self._scheduler.config.get("use_flow_sigmas")
        sigmas = None if flow else np.linspace(1.0, 1 / nfe, nfe)
        mu = compute_empirical_mu(image_seq_len=height * width, num_steps=nfe)
        retrieve_timesteps(self._scheduler, nfe, sigmas=sigmas, mu=mu)  # type: ignore[arg-type] - numbers in a row
        return Schedule(self._scheduler.sigmas.float().clone(), (0.0,) * nfe)

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> "KleinTextEncoder":
        seeing = images and self.teacher_context == "vlm"
        text = QwenTextEncoder(
            self.checkpoint, READING, self.vlm if seeing else None, self.suffix or "", device, dtype
        )
        return KleinTextEncoder(self, text, self.load_vae(device, torch.float32))

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> "KleinVAE":
        return KleinVAE(load_autoencoder(AutoencoderKLFlux2, self.checkpoint, device, dtype), tiled)

    def empty_vae(self, tiled: bool) -> "KleinVAE":
        return KleinVAE(empty_autoencoder(AutoencoderKLFlux2, self.checkpoint), tiled)

    def empty_denoiser(self) -> "KleinDenoiser":
        with self.checkpoint.reading("transformer"):
            config = Flux2Transformer2DModel.load_config(self.checkpoint.folder / "transformer")
            return KleinDenoiser(Flux2Transformer2DModel.from_config(config))

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> "KleinDenoiser":
        part = self.checkpoint.part("transformer")
        with self.checkpoint.reading("transformer"):
            network = Flux2Transformer2DModel.from_pretrained(part, torch_dtype=dtype)
        return KleinDenoiser(network.to(device))

    def teachers_prompt(self, prompt: str, edits: bool) -> str:
        """In the `edit` context; edits: whether the student has references too."""
        default = LAST_SUFFIX if edits else SUFFIX
        return with_suffix(prompt, default if self.suffix is None else self.suffix)

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        if sizes is not None and self.teacher_context == "edit":
            return count_tokens(
                self.checkpoint, READING, [self.teachers_prompt(prompt, True) for prompt in prompts]
            )
        return count_tokens(self.checkpoint, READING, prompts, self.suffix or "", self.vlm, sizes)

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        lengths = tuple(self.count_tokens(prompts, sizes))
        shown = [self.reference_size(size) for size in references[0]] if references else []
        if sizes is not None and self.teacher_context == "edit":
            shown.append(sizes[0])
        extras = {
            _reference(i): torch.zeros(
                len(prompts),
                self.channels,
                height // self.vae_scale_factor,
                width // self.vae_scale_factor,
            )
            for i, (width, height) in enumerate(shown)
        }
        return Context(torch.zeros(len(prompts), max(lengths), self._text_width), lengths, extras)

    def reference_size(self, size: Size) -> Size:
        """By the pipeline's rule: its own aspect, at most MOST_PIXELS, sides cut down to whole
        cells."""
        width, height = size
        if min(size) < LEAST_SIDE or max(size) > LONGEST * min(size):
            raise ValueError(
                f"a picture to edit is {width} x {height}; klein takes sides of {LEAST_SIDE} pixels or more, the long "
                f"one at most {LONGEST} times the short one."
            )
        if width * height > MOST_PIXELS:
            scale = math.sqrt(MOST_PIXELS / (width * height))
            width, height = int(width * scale), int(height * scale)
        return width // self.multiple * self.multiple, height // self.multiple * self.multiple

    def starting_points(self, method: str) -> dict[str, Any]:
        """Of the reference code's klein scripts: a fifth of Z-Image's rate, at alpha = 2 rank."""
        shared = {"lora.rank": 32, "train.batch_size": 1, "train.gradient_accumulation_steps": 4}
        if method == "dopsd":
            return shared | {"lora.alpha": 64, "train.max_steps": 3000, "train.learning_rate": 2e-5}
        return shared | {"train.max_steps": 2000, "train.learning_rate": 1e-4}

    def usage(self, nfe: int) -> Usage:
        return plain_usage(nfe)

    def settle(self, folder: Path) -> None:
        pass  # the checkpoint says it itself

    def lora_in_own_form(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By diffusers' conversion, which multiplies alpha in for kohya's names only, and knows no
        prefix but its own and `diffusion_model.`."""
        if not any(name.startswith("lora_unet_") for name in tensors):
            tensors = _without_alpha(tensors)
        converted: Mapping[str, Tensor] = Flux2KleinPipeline.lora_state_dict(dict(tensors))  # type: ignore[assignment]
        return {
            f"transformer.{name.removeprefix('transformer.')}": tensor
            for name, tensor in converted.items()
        }

    def lora_in_public_form(self, pairs: Pairs) -> dict[str, Tensor]:
        return diffusers_form(self.export_prefix, pairs)


class KleinTextEncoder:
    """Prompts as Flux2KleinPipeline reads them; images to edit, and the `edit` teacher's, as their
    latents."""

    def __init__(self, family: Flux2Klein, text: QwenTextEncoder, vae: "KleinVAE"):
        self.family, self.text, self.vae = family, text, vae
        self.processor = Flux2ImageProcessor(vae_scale_factor=family.multiple)
        marks = [
            text.fingerprint,
            vae.fingerprint,
            family.teacher_context,
            str(family.suffix),
            SUFFIX,
            LAST_SUFFIX,
        ]
        self.fingerprint = hashlib.sha256("|".join(marks).encode()).hexdigest()[:16]

    @torch.no_grad()
    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        rows = [[self._fitted(each) for each in row] for row in references or [[]] * len(prompts)]
        if images is not None and self.family.teacher_context == "edit":
            prompts = [
                self.family.teachers_prompt(p, bool(row))
                for p, row in zip(prompts, rows, strict=True)
            ]
            rows = [
                [*row, self._pixels(image, image.size)]
                for row, image in zip(rows, images, strict=True)
            ]
            images = None
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        extras = {_reference(i): self.vae.latents(pixels) for i, pixels in enumerate(columns)}
        return replace(self.text.context(prompts, images), extras=extras)

    def _fitted(self, image: Image.Image) -> Tensor:
        """As the pipeline fits an image to edit: [3, H, W] in [-1, 1]."""
        size = self.family.reference_size(image.size)
        return self._pixels(self.processor._resize_if_exceeds_area(image, MOST_PIXELS), size)

    def _pixels(self, image: Image.Image, size: Size) -> Tensor:
        return self.processor.preprocess(image, height=size[1], width=size[0], resize_mode="crop")[
            0
        ]


class KleinDenoiser(Denoiser):
    """Flux2Transformer2DModel in the house's clock, which is its own."""

    def __init__(self, network: Flux2Transformer2DModel):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        if (
            len(set(context.lengths)) > 1
        ):  # there is no mask that would hide what pads the shorter rows
            rows = range(len(z))
            return torch.cat([self(z[i : i + 1], t[i : i + 1], context.row(i)) for i in rows])
        dtype, device = next(self.network.parameters()).dtype, z.device
        references = [context.extras[_reference(i)] for i in range(len(context.extras))]
        places = [Flux2KleinPipeline._prepare_latent_ids(z[:1])]
        if references:
            places.append(
                Flux2KleinPipeline._prepare_image_ids([reference[:1] for reference in references])
            )
        answer = self.network(
            hidden_states=torch.cat([each.flatten(2).mT for each in (z, *references)], dim=1).to(
                dtype
            ),
            encoder_hidden_states=context.tokens.to(dtype),
            timestep=t.to(z),
            img_ids=torch.cat(places, dim=1).to(device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(context.tokens[:1]).to(device),
            return_dict=False,
        )[0]
        own = answer[:, : z.shape[-2] * z.shape[-1]].float()
        return own.mT.reshape(z.shape)


class KleinVAE(KLVAE):
    """AutoencoderKLFlux2, its latents in patches of 2 x 2 and brought to mean 0 and variance 1 by
    its batch norm."""

    def __init__(self, vae: AutoencoderKLFlux2, tiled: bool = False):
        super().__init__(vae, tiled)
        self.vae_scale_factor *= 2
        self._mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        self._std = torch.sqrt(
            vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps
        )

    def latents(self, pixels: Tensor) -> Tensor:
        return (
            Flux2KleinPipeline._patchify_latents(super().latents(pixels)) - self._mean
        ) / self._std

    def pixels(self, latents: Tensor) -> Tensor:
        raw = latents.to(self._mean) * self._std + self._mean
        return super().pixels(Flux2KleinPipeline._unpatchify_latents(raw))


def _reference(index: int) -> str:
    """The name of a context's extra: latents of a reference, [B, channels, h, w]."""
    return f"reference_{index}"


def _without_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dotted LoRA names in peft's words, every alpha multiplied into its B."""
    words = {
        ".lora_down.": ".lora_A.",
        ".lora_up.": ".lora_B.",
        "lora.down.": "lora_A.",
        "lora.up.": "lora_B.",
    }
    named = {}
    for name, tensor in tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        named[name] = tensor
    for name in [name for name in named if name.endswith(".alpha")]:
        module, alpha = name.removesuffix(".alpha"), named.pop(name).item()
        rank = len(named[f"{module}.lora_A.weight"])
        named[f"{module}.lora_B.weight"] = named[f"{module}.lora_B.weight"] * (alpha / rank)
    return named
