"""SDXL-Turbo and SDXL-DMD2: two CLIP text encoders, a UNet that predicts noise at discrete
timesteps, KL autoencoder.

The UNet reads x / sqrt(1 + sigma^2) = z / sqrt((1-t)^2 + t^2) and predicts the noise, so that
velocity = (noise - z) / (1 - t). Times and samplers are in `sdxl_sampler`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.flow import Schedule, per_row
from dopsd.files import read_tensors, shorten, write_json
from dopsd.models.base import MethodTraits, Size, TeacherVision, Usage, plain_usage
from dopsd.models.clip import ClipTextEncoders, count_tokens
from dopsd.models.distilled_weights import KEY, address_of, kind_of
from dopsd.models.hub import Checkpoint, variant_of, weights_file
from dopsd.models.lora import merge_loras
from dopsd.models.lora_source import LoraFile
from dopsd.models.sdxl_lora import NAMES
from dopsd.models.sdxl_sampler import Sampler
from dopsd.models.vae import KLVAE, empty_autoencoder, load_autoencoder

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
LCM, EULER = "LCMScheduler", "EulerDiscreteScheduler"
LCM_LINE = f"pipeline.scheduler = {LCM}.from_config(pipeline.scheduler.config)"
TRAILING_LINE = (
    f"pipeline.scheduler = {EULER}.from_config(pipeline.scheduler.config, "
    'timestep_spacing="trailing")'
)
FUSE_LINES = ("pipeline.fuse_lora()", "pipeline.unload_lora_weights()")
# Of PSO's released customization script for SDXL-Turbo: rank 16, 600 steps of 4 images.
STARTING_POINTS = {
    "lora.rank": 16,
    "train.max_steps": 600,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 2e-4,
}


class SDXL:
    """An SDXL checkpoint. See `models.base.Family` for what each member is."""

    name = "sdxl"
    repo = "stabilityai/sdxl-turbo"
    teacher_contexts = ()
    teacher_context = None
    reference_size = None
    native_space = "noise"
    lora_targets = (
        r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
        r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
    )
    quantizable = (
        r".*\.transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
    )
    export_prefix = "unet"
    module_names, comfyui_names = NAMES, "kohya"
    distillable = True
    base_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base"
    unrelated_prompts = ()

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: Mapping[str, Any],
        teacher_vision: TeacherVision | None = None,
        distilled_by: str | None = None,
    ):
        """distilled_by: a safetensors file that makes a base checkpoint a few-step one, DMD2's or
        SDXL-Lightning's, a LoRA or a whole UNet: a path, or owner/name/file on the hub."""
        self.checkpoint, self.distilled_by = checkpoint, distilled_by
        checkpoint.refuse_missing(PARTS, index, "SDXL")
        with checkpoint.reading("unet"):
            self._unet: dict[str, Any] = UNet2DConditionModel.load_config(
                checkpoint.folder / "unet"
            )
            self.channels: int = self._unet["in_channels"]
            if self._unet.get("time_cond_proj_dim"):
                raise ValueError(
                    "its UNet reads the guidance scale as a condition, as SDXL-LCM does, which is "
                    "not supported"
                )
            halvings = len(self._unet["block_out_channels"]) - 1
        with checkpoint.reading("vae"):
            vae = AutoencoderKL.load_config(checkpoint.folder / "vae")
            self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
            self.multiple = self.vae_scale_factor * 2**halvings
            self.resolution: int = self._unet["sample_size"] * self.vae_scale_factor
        self._sampler = Sampler(checkpoint, distilled_by)
        kind = self._sampler.kind
        self.default_nfe, self.distilled = kind.default_nfe, kind.distilled
        # The licence of weights from other files is not known.
        names = ("dmd2", "lightning")
        known = not distilled_by or any(name in distilled_by.lower() for name in names)
        self.licence = kind.licence if known else "other"
        self.hub_licence = kind.hub_licence if known else "other"

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        return self._sampler.schedule(nfe)

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> ClipTextEncoders:
        return ClipTextEncoders(self.checkpoint, device, dtype)

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> KLVAE:
        return KLVAE(load_autoencoder(AutoencoderKL, self.checkpoint, device, dtype), tiled)

    def empty_vae(self, tiled: bool) -> KLVAE:
        return KLVAE(empty_autoencoder(AutoencoderKL, self.checkpoint), tiled)

    def empty_denoiser(self) -> "SDXLDenoiser":
        with self.checkpoint.reading("unet"):
            return SDXLDenoiser(
                UNet2DConditionModel.from_config(self._unet),
                self._sampler.times,
                self.vae_scale_factor,
            )

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> "SDXLDenoiser":
        file = weights_file(self.distilled_by, KEY) if self.distilled_by else None
        if file and kind_of(file) == "unet":
            network = self._unet_of(file, dtype)
        else:
            part = self.checkpoint.part("unet")
            with self.checkpoint.reading("unet"):
                network = UNet2DConditionModel.from_pretrained(
                    part, torch_dtype=dtype, variant=variant_of(part)
                )
            if file:
                merge_loras(network, [LoraFile(file)], self)
        return SDXLDenoiser(network.to(device), self._sampler.times, self.vae_scale_factor)

    def _unet_of(self, file: Path, dtype: torch.dtype) -> UNet2DConditionModel:
        """The network with a whole UNet's weights from a file, in place of the checkpoint's own."""
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(self._unet)
        weights = {name: tensor.to(dtype) for name, tensor in read_tensors(file).items()}
        try:
            network.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # names or shapes that differ
            raise ValueError(
                f"{file} is not a UNet of {self.checkpoint.name} ({shorten(str(error))})."
            ) from error
        return network.eval()

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        assert sizes is None, "no encoder here reads images"
        with self.checkpoint.reading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.folder / "tokenizer")
        return count_tokens(tokenizer, prompts)

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        self.count_tokens(prompts, sizes)
        with self.checkpoint.reading("text_encoder_2"):
            pooled = AutoConfig.from_pretrained(
                self.checkpoint.folder / "text_encoder_2"
            ).projection_dim
        with self.checkpoint.reading("tokenizer"):
            length = AutoTokenizer.from_pretrained(
                self.checkpoint.folder / "tokenizer"
            ).model_max_length
        tokens = torch.zeros(len(prompts), length, self._unet["cross_attention_dim"])
        return Context(
            tokens, (length,) * len(prompts), {"pooled": torch.zeros(len(prompts), pooled)}
        )

    def usage(self, nfe: int) -> Usage:
        arguments, scheduler, line = plain_usage(nfe).arguments, EULER, TRAILING_LINE
        if self._sampler.kind.steps == "renoise":
            timesteps = self._sampler.renoise_timesteps(nfe).tolist()
            arguments, scheduler, line = f"{timesteps=}, guidance_scale=0.0", LCM, LCM_LINE
        if not self.distilled_by:
            return Usage(arguments)
        imports, setup = [f"from diffusers import {scheduler}"], [line]
        where, file = address_of(self.distilled_by)
        if kind_of(weights_file(self.distilled_by, KEY)) == "unet":
            imports.append("from safetensors.torch import load_file")
            setup.append(f'pipeline.unet.load_state_dict(load_file("{where}/{file}"))')
        else:
            setup += [f'pipeline.load_lora_weights("{where}", weight_name="{file}")', *FUSE_LINES]
        return Usage(arguments, tuple(imports), tuple(setup))

    def settle(self, folder: Path) -> None:
        if self.distilled_by:
            scheduler = self._sampler.save(folder / "scheduler")
            file = folder / "model_index.json"
            index = json.loads(file.read_text(encoding="utf-8"))
            write_json(file, index | {"scheduler": ["diffusers", scheduler]})

    def starting_points(self, method: MethodTraits) -> dict[str, Any]:
        settings = STARTING_POINTS | {"retention.space": self.native_space}
        if self.native_space in method.loss_spaces:
            settings["method.space"] = self.native_space
        if self.distilled_by:
            settings["model.distilled_by"] = self.distilled_by
        return settings


class SDXLDenoiser(Denoiser):
    """UNet2DConditionModel in this package's time and velocity."""

    def __init__(self, network: UNet2DConditionModel, times: Tensor, vae_scale_factor: int):
        """times: float32 [T], rising, t of the timesteps 0 ... T-1."""
        super().__init__()
        self.network, self.times, self.vae_scale_factor = network, times, vae_scale_factor

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        height, width = (side * self.vae_scale_factor for side in z.shape[-2:])
        # original size, crop, target size
        size = z.new_tensor([height, width, 0, 0, height, width])
        at = per_row(t, z).to(z)
        conditions = {
            "text_embeds": context.extras["pooled"].to(dtype),
            "time_ids": size.expand(len(z), 6),
        }
        noise = self.network(
            (z / torch.hypot(1 - at, at)).to(dtype),
            self.timesteps(t),
            context.tokens.to(dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return (noise.float() - z) / (1 - at)

    def timesteps(self, t: Tensor) -> Tensor:
        """t [B] as float32 timesteps: exactly k at the time of timestep k, interpolated linearly
        between two times, clamped at the ends."""
        times = self.times.to(t.device)
        t = t.float().clamp(times[0], times[-1])
        below = (torch.searchsorted(times, t, right=True) - 1).clamp(max=len(times) - 2)
        return below + (t - times[below]) / (times[below + 1] - times[below])
