"""FLUX.2-klein, 4B and 9B: Qwen3 text encoder, a transformer that takes images to edit as further
tokens, patched KL latents.

A teacher sees the image as one more reference (`edit`), or through a Qwen3-VL whose language
weights are replaced by the pipeline's text encoder (`vlm`), or it reads a better prompt (`prompt`).
The network has no mask: it also reads the padding, and all rows of a batch have one layout.
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
from dopsd.diffusion.components import TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.models.base import MethodTraits, Size, TeacherVision, Usage, plain_usage
from dopsd.models.flux2_klein_components import KleinDenoiser, KleinVAE, reference_key
from dopsd.models.flux2_klein_lora import NAMES
from dopsd.models.hub import Checkpoint
from dopsd.models.prompt_teacher import PROMPT, PromptTeacher
from dopsd.models.qwen3 import QwenTextEncoder
from dopsd.models.qwen3_prompts import Reading, count_tokens, with_suffix
from dopsd.models.vae import empty_autoencoder, load_autoencoder

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_CALL = inspect.signature(Flux2KleinPipeline.__call__).parameters
LAYERS: tuple[int, ...] = _CALL["text_encoder_out_layers"].default
READING = Reading(
    LAYERS, thinking=False, padded=True, length=_CALL["max_sequence_length"].default
)  # as Flux2KleinPipeline.encode_prompt
NFE = 4  # that klein was distilled for; the pipeline's default of 50 is that of the base models
SAMPLE_SIZE = 128  # the pipeline's default_sample_size, in positions of the autoencoder
# What Flux2ImageProcessor accepts as an image to edit: pixels, side, long side by short side.
MAX_PIXELS, MIN_SIDE, MAX_ASPECT = 1024 * 1024, 64, 8
# After the caption in the `edit` teacher's prompt; the second where the student edits images too.
# Both are part of what was measured: changing a word changes the teacher.
SUFFIX = (
    "Keep the subject, its details, the background and the composition of the reference picture."
)
LAST_SUFFIX = (
    "The last reference picture is the result that is wanted: paint it again as exactly as you can."
)


@dataclass(frozen=True)
class Variant:
    """Facts about one size of klein that are not in its configs."""

    architecture: str
    base_version: str
    licence: str
    hub_licence: str
    vlm: str


# By the width of the text encoder's hidden states.
VARIANTS = {
    2560: Variant(
        "Flux.2-klein-4b",
        "flux2_klein_4b",
        "Apache-2.0",
        "apache-2.0",
        "Qwen/Qwen3-VL-4B-Instruct",
    ),
    4096: Variant(
        "Flux.2-klein-9b",
        "flux2_klein_9b",
        "FLUX-Non-Commercial-License",
        "other",
        "Qwen/Qwen3-VL-8B-Instruct",
    ),
}
UNKNOWN = Variant("Flux.2-klein", "flux2_klein", "other", "other", "Qwen/Qwen3-VL-4B-Instruct")


class Flux2Klein:
    """A FLUX.2-klein checkpoint. See `models.base.Family` for what each member is."""

    name = "flux2_klein"
    repo = "black-forest-labs/FLUX.2-klein-4B"
    teacher_contexts = ("edit", "vlm", PROMPT)
    native_space = "velocity"
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.(linear_in|linear_out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    quantizable = lora_targets
    module_names, comfyui_names = NAMES, "native"
    export_prefix = "transformer"
    distillable = False
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
        # The pipeline's own mark that tells klein from its base models.
        self.distilled = bool(index.get("is_distilled", False))
        with checkpoint.reading("scheduler"):
            self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        with checkpoint.reading("vae"):
            vae = AutoencoderKLFlux2.load_config(folder / "vae")
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
            # 2 x 2 positions of the autoencoder are one latent position of the network.
            self.vae_scale_factor = self.multiple = 2 * scale
            self.channels: int = 4 * vae["latent_channels"]
            self.resolution = SAMPLE_SIZE * scale
        with checkpoint.reading("text_encoder"):
            text = AutoConfig.from_pretrained(folder / "text_encoder")
            self._text_width, depth = text.hidden_size * len(LAYERS), text.num_hidden_layers
        with checkpoint.reading("transformer"):
            config = Flux2Transformer2DModel.load_config(folder / "transformer")
            token_width = config["joint_attention_dim"]
        if depth < max(LAYERS):
            listed = ", ".join(map(str, LAYERS))
            raise ValueError(
                f"{checkpoint.name}: klein reads the states after layers {listed} of its text "
                f"encoder; this one has {depth} layers, so it belongs to another model."
            )
        if token_width != self._text_width:
            raise ValueError(
                f"{checkpoint.name}: the transformer reads tokens of width {token_width}, the text "
                f"encoder makes {self._text_width}: the parts belong to different models."
            )
        variant = VARIANTS.get(text.hidden_size, UNKNOWN)
        self.architecture, self.base_version = variant.architecture, variant.base_version
        self.licence, self.hub_licence = variant.licence, variant.hub_licence
        teacher_vision, own = teacher_vision or TeacherVision(), folder / "vlm"
        self.teacher_context = teacher_vision.context or self.teacher_contexts[0]
        self.vlm = teacher_vision.vlm or (str(own) if own.is_dir() else variant.vlm)
        self.suffix = teacher_vision.suffix

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """Flux2KleinPipeline's times: its scheduler, called as the pipeline calls it."""
        if nfe < 1:
            raise ValueError(f"nfe is {nfe}; sampling needs at least 1 forward.")
        own_sigmas = self._scheduler.config.get("use_flow_sigmas")
        sigmas = None if own_sigmas else np.linspace(1.0, 1 / nfe, nfe)
        mu = compute_empirical_mu(image_seq_len=height * width, num_steps=nfe)
        retrieve_timesteps(self._scheduler, nfe, sigmas=sigmas, mu=mu)  # type: ignore[arg-type] - an array
        return Schedule(self._scheduler.sigmas.float().clone(), (0.0,) * nfe)

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> TextEncoder:
        vlm = self.vlm if images and self.teacher_context == "vlm" else None
        text = QwenTextEncoder(self.checkpoint, READING, vlm, self.suffix or "", device, dtype)
        encoder = KleinTextEncoder(self, text, self.load_vae(device, torch.float32))
        reads_words = images and self.teacher_context == PROMPT
        return PromptTeacher(encoder, self.suffix or "") if reads_words else encoder

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> KleinVAE:
        return KleinVAE(load_autoencoder(AutoencoderKLFlux2, self.checkpoint, device, dtype), tiled)

    def empty_vae(self, tiled: bool) -> KleinVAE:
        return KleinVAE(empty_autoencoder(AutoencoderKLFlux2, self.checkpoint), tiled)

    def empty_denoiser(self) -> KleinDenoiser:
        with self.checkpoint.reading("transformer"):
            config = Flux2Transformer2DModel.load_config(self.checkpoint.folder / "transformer")
            return KleinDenoiser(Flux2Transformer2DModel.from_config(config))

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> KleinDenoiser:
        part = self.checkpoint.part("transformer")
        with self.checkpoint.reading("transformer"):
            network = Flux2Transformer2DModel.from_pretrained(part, torch_dtype=dtype)
        return KleinDenoiser(network.to(device))

    def edit_prompt(self, prompt: str, edits: bool) -> str:
        """The teacher's prompt in the `edit` context; edits: whether the student has references."""
        default = LAST_SUFFIX if edits else SUFFIX
        return with_suffix(prompt, default if self.suffix is None else self.suffix)

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        if sizes is not None and self.teacher_context == "edit":
            return count_tokens(
                self.checkpoint, READING, [self.edit_prompt(prompt, True) for prompt in prompts]
            )
        if sizes is not None and self.teacher_context == PROMPT:
            prompts, sizes = [with_suffix(prompt, self.suffix or "") for prompt in prompts], None
        return count_tokens(self.checkpoint, READING, prompts, self.suffix or "", self.vlm, sizes)

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        lengths = tuple(self.count_tokens(prompts, sizes))
        seen = [self.reference_size(size) for size in references[0]] if references else []
        if sizes is not None and self.teacher_context == "edit":
            seen.append(sizes[0])
        scale = self.vae_scale_factor
        extras = {
            reference_key(i): torch.zeros(
                len(prompts), self.channels, height // scale, width // scale
            )
            for i, (width, height) in enumerate(seen)
        }
        return Context(torch.zeros(len(prompts), max(lengths), self._text_width), lengths, extras)

    def reference_size(self, size: Size) -> Size:
        """By the pipeline's rule: its own aspect ratio, at most MAX_PIXELS, sides rounded down to
        multiples."""
        width, height = size
        if min(size) < MIN_SIDE or max(size) > MAX_ASPECT * min(size):
            raise ValueError(
                f"an image to edit is {width} x {height}; klein takes sides of {MIN_SIDE} pixels "
                f"or more, the long one at most {MAX_ASPECT} times the short one."
            )
        if width * height > MAX_PIXELS:
            scale = math.sqrt(MAX_PIXELS / (width * height))
            width, height = int(width * scale), int(height * scale)
        return width // self.multiple * self.multiple, height // self.multiple * self.multiple

    def starting_points(self, method: MethodTraits) -> dict[str, Any]:
        """Of the reference code's klein scripts: with a teacher that sees the image, a fifth of
        Z-Image's learning rate at alpha = 2 rank."""
        shared = {"lora.rank": 32, "train.batch_size": 1, "train.gradient_accumulation_steps": 4}
        if "privileged" in method.needs:
            return shared | {"lora.alpha": 64, "train.max_steps": 3000, "train.learning_rate": 2e-5}
        return shared | {"train.max_steps": 2000, "train.learning_rate": 1e-4}

    def usage(self, nfe: int) -> Usage:
        return plain_usage(nfe)

    def settle(self, folder: Path) -> None:
        pass  # the scheduler is the checkpoint's own


class KleinTextEncoder:
    """Prompts as Flux2KleinPipeline encodes them; images to edit, and the image that the `edit`
    teacher sees, as their latents."""

    def __init__(self, family: Flux2Klein, text: QwenTextEncoder, vae: KleinVAE):
        self.family, self.text, self.vae = family, text, vae
        self.processor = Flux2ImageProcessor(vae_scale_factor=family.multiple)
        identity = [
            text.fingerprint,
            vae.fingerprint,
            family.teacher_context,
            str(family.suffix),
            SUFFIX,
            LAST_SUFFIX,
        ]
        self.fingerprint = hashlib.sha256("|".join(identity).encode()).hexdigest()[:16]

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
                self.family.edit_prompt(prompt, edits=bool(row))
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            rows = [
                [*row, self._pixels(image, image.size)]
                for row, image in zip(rows, images, strict=True)
            ]
            images = None
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        extras = {reference_key(i): self.vae.latents(pixels) for i, pixels in enumerate(columns)}
        return replace(self.text.context(prompts, images), extras=extras)

    def _fitted(self, image: Image.Image) -> Tensor:
        """An image to edit as the pipeline resizes it: [3, H, W] in [-1, 1]."""
        size = self.family.reference_size(image.size)
        return self._pixels(self.processor._resize_if_exceeds_area(image, MAX_PIXELS), size)

    def _pixels(self, image: Image.Image, size: Size) -> Tensor:
        width, height = size
        return self.processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
