"""Z-Image-Turbo: Qwen3 text encoder, Qwen3-VL teacher, flow transformer, KL autoencoder.

Z-Image counts time from noise (0) to clean (1) and predicts clean - noise; `ZImageDenoiser`
reverses both. A teacher sees the image through a Qwen3-VL whose language weights are replaced by
the pipeline's text encoder (`vlm`), or reads a better prompt (`prompt`).
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.models.base import MethodTraits, Size, TeacherVision, Usage, plain_usage
from dopsd.models.hub import Checkpoint
from dopsd.models.prompt_teacher import PROMPT, PromptTeacher
from dopsd.models.qwen3 import QwenTextEncoder
from dopsd.models.qwen3_prompts import Reading, count_tokens, text_width, with_suffix
from dopsd.models.vae import KLVAE, empty_autoencoder, load_autoencoder
from dopsd.models.zimage_lora import NAMES

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
LENGTH: int = inspect.signature(ZImagePipeline.__call__).parameters["max_sequence_length"].default
# As ZImagePipeline.encode_prompt.
READING = Reading(layers=(-2,), thinking=True, padded=False, length=LENGTH)
# Of the reference code's Z-Image script: 4 images a step, 2000 steps.
TURBO_STARTING_POINTS = {
    "lora.rank": 32,
    "train.max_steps": 2000,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 1e-4,
}
DISTILLED_SHIFT = 3.0  # of Turbo's scheduler; the many-step base model ships 6.0
TURBO_NFE = 8
DOPSD_JSON_VERSION = 3  # where dopsd.json describes a model of dopsd's own


class ZImage:
    """A Z-Image checkpoint. See `models.base.Family` for what each member is."""

    name = "zimage"
    repo = "Tongyi-MAI/Z-Image-Turbo"
    licence, hub_licence = "Apache-2.0", "apache-2.0"
    teacher_contexts = ("vlm", PROMPT)
    default_vlm = "Qwen/Qwen3-VL-4B-Instruct"
    reference_size = None
    native_space = "velocity"
    lora_targets = (
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"
    )
    # Not the refiners, the embedders and the modulation: they are a seventh of the weights, and
    # every token passes them first.
    quantizable = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"
    export_prefix = "transformer"
    module_names, comfyui_names = NAMES, "diffusers"
    distillable = False
    base_version = "zimage"
    architecture = "Z-Image"

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: Mapping[str, Any],
        teacher_vision: TeacherVision | None = None,
    ):
        self.checkpoint, folder = checkpoint, checkpoint.folder
        checkpoint.refuse_missing(PARTS, index, "Z-Image")
        teacher_vision, own_vlm = teacher_vision or TeacherVision(), folder / "vlm"
        self.teacher_context = teacher_vision.context or next(iter(self.teacher_contexts), None)
        self.vlm = teacher_vision.vlm or (str(own_vlm) if own_vlm.is_dir() else self.default_vlm)
        self.suffix = teacher_vision.suffix or ""
        with checkpoint.reading("scheduler"):
            self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
            # Z-Image's base and Turbo differ only in weights and in the scheduler's shift.
            self.distilled = self._scheduler.config.shift == DISTILLED_SHIFT
        with checkpoint.reading("vae"):
            vae = AutoencoderKL.load_config(folder / "vae")
            self.channels: int = vae["latent_channels"]
            self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
            self.multiple = 2 * self.vae_scale_factor  # the patches are 2 x 2 positions
            self.resolution: int = vae["sample_size"]
        # What a checkpoint other than Turbo records of itself.
        with checkpoint.reading("dopsd.json"):
            file = folder / "dopsd.json"
            about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            self.default_nfe: int = about.get("nfe", TURBO_NFE)
            self.unrelated_prompts: tuple[str, ...] = tuple(about.get("unrelated_prompts", ()))
            self._starting_points: dict[str, Any] = about.get(
                "starting_points", TURBO_STARTING_POINTS
            )
            version = about.get("version", DOPSD_JSON_VERSION if "nfe" not in about else None)
        if version != DOPSD_JSON_VERSION:
            raise ValueError(
                f"{checkpoint.name} was made by another release of dopsd: its dopsd.json has "
                f"version {version or 'none'}, and this release reads {DOPSD_JSON_VERSION}. Use "
                "the packaged model `pocket`, or that release."
            )

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """ZImagePipeline's times: its scheduler, called as the pipeline calls it."""
        if nfe < 1:
            raise ValueError(f"nfe is {nfe}; sampling needs at least 1 forward.")
        config = self._scheduler.config
        shift = calculate_shift(
            (height // 2) * (width // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        self._scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(nfe), mu=shift)
        return Schedule(self._scheduler.sigmas.float().clone(), (0.0,) * nfe)

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> TextEncoder:
        vlm = self.vlm if images and self.teacher_context == "vlm" else None
        text = QwenTextEncoder(self.checkpoint, READING, vlm, self.suffix, device, dtype)
        reads_words = images and self.teacher_context == PROMPT
        return PromptTeacher(text, self.suffix) if reads_words else text

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> KLVAE:
        return KLVAE(load_autoencoder(AutoencoderKL, self.checkpoint, device, dtype), tiled)

    def empty_vae(self, tiled: bool) -> KLVAE:
        return KLVAE(empty_autoencoder(AutoencoderKL, self.checkpoint), tiled)

    def empty_denoiser(self) -> "ZImageDenoiser":
        with self.checkpoint.reading("transformer"):
            config = ZImageTransformer2DModel.load_config(self.checkpoint.folder / "transformer")
            return ZImageDenoiser(ZImageTransformer2DModel.from_config(config))

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        if sizes is not None and self.teacher_context == PROMPT:
            prompts, sizes = [with_suffix(prompt, self.suffix) for prompt in prompts], None
        return count_tokens(self.checkpoint, READING, prompts, self.suffix, self.vlm, sizes)

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        width, lengths = text_width(self.checkpoint), self.count_tokens(prompts, sizes)
        return Context.stack(
            [Context(torch.zeros(1, length, width), (length,)) for length in lengths]
        )

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> "ZImageDenoiser":
        part = self.checkpoint.part("transformer")
        with self.checkpoint.reading("transformer"):
            network = ZImageTransformer2DModel.from_pretrained(part, torch_dtype=dtype)
        return ZImageDenoiser(network.to(device))

    def starting_points(self, method: MethodTraits) -> dict[str, Any]:
        """With a teacher that sees the image, training takes half of Turbo's steps, as the paper's
        does."""
        halved = "privileged" in method.needs and self.default_nfe == TURBO_NFE
        return self._starting_points | ({"method.nfe": TURBO_NFE // 2} if halved else {})

    def usage(self, nfe: int) -> Usage:
        return plain_usage(nfe)

    def settle(self, folder: Path) -> None:
        pass  # the scheduler is the checkpoint's own


class ZImageDenoiser(Denoiser):
    """ZImageTransformer2DModel in this package's time and velocity."""

    def __init__(self, network: ZImageTransformer2DModel):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        captions = [row.to(dtype) for row in context.rows()]
        images = list(z.to(dtype).unsqueeze(2).unbind(0))
        prediction = self.network(images, (1 - t).to(z), captions, return_dict=False)[0]
        return -torch.stack([row.float() for row in prediction]).squeeze(2)
