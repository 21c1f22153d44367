"""SDXL-Turbo and SDXL-DMD2: two CLIP text encoders, a UNet that answers noise at discrete
timesteps, KL autoencoder.

SDXL counts noise by x = clean + sigma noise. In the house's clock t = sigma / (1 + sigma) and z = x
/ (1 + sigma); the UNet reads z / sqrt((1-t)^2 + t^2) and answers the noise, so that velocity =
(noise - z) / (1 - t). Which sampler a checkpoint was distilled for, if any, its scheduler's class
says.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.flow import Schedule, per_row
from dopsd.files import read_tensors, shorten, write_json
from dopsd.models.base import Size, TeacherVision, Usage, plain_usage
from dopsd.models.clip import ClipTextEncoders, count_tokens
from dopsd.models.distilled_weights import KEY, address_of, kind_of, refuse_no_distiller
from dopsd.models.hub import Checkpoint, variant_of, weights_file
from dopsd.models.lora import Pairs, merge_lora
from dopsd.models.vae import KLVAE, empty_autoencoder, load_autoencoder

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PARTNERS = (("lora_down", "lora_up"), ("lora_A", "lora_B"))
Steps = Literal["euler", "ancestral", "renoise"]


@dataclass(frozen=True)
class Kind:
    """What a scheduler's class says of a checkpoint: how its sampler steps, and what follows from
    it."""

    steps: Steps
    default_nfe: int
    licence: str
    hub_licence: str

    @property
    def distilled(self) -> bool:
        return self.steps != "euler"


BASE = Kind("euler", 50, "openrail++", "openrail++")  # 50: the pipeline's own default
TURBO = Kind("ancestral", 4, "Stability AI Community License", "other")
DMD2 = Kind("renoise", 4, "cc-by-nc-4.0", "cc-by-nc-4.0")
LCM_LINE = "pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)"
FUSE_LINES = ("pipeline.fuse_lora()", "pipeline.unload_lora_weights()")
# Of PSO's released customization script for SDXL-Turbo: rank 16, 600 steps of 4 images.
STARTING_POINTS = {
    "lora.rank": 16,
    "train.max_steps": 600,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 2e-4,
}


class SDXL:
    """An SDXL checkpoint. See `families.base.Family` for what each member is."""

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
        """distilled_by: a safetensors file that makes a base checkpoint a few-step one in DMD2's
        way, a LoRA or a whole UNet: a path, or owner/name/file on the hub."""
        self.checkpoint, self.distilled_by = checkpoint, distilled_by
        checkpoint.refuse_missing(PARTS, index, "SDXL")
        with checkpoint.reading("unet"):
            self._unet: dict[str, Any] = UNet2DConditionModel.load_config(
                checkpoint.folder / "unet"
            )
            self.channels: int = self._unet["in_channels"]
            halvings = len(self._unet["block_out_channels"]) - 1
        with checkpoint.reading("vae"):
            vae = AutoencoderKL.load_config(checkpoint.folder / "vae")
            self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
            self.multiple = self.vae_scale_factor * 2**halvings
            self.resolution: int = self._unet["sample_size"] * self.vae_scale_factor
        self._open_scheduler()
        self.default_nfe, self.distilled = self._kind.default_nfe, self._kind.distilled
        self.licence, self.hub_licence = "other", "other"
        if "dmd2" in (distilled_by or "dmd2").lower():
            self.licence, self.hub_licence = self._kind.licence, self._kind.hub_licence

    def _open_scheduler(self) -> None:
        """Which sampler the checkpoint is for. Raises ValueError for one that is not here."""
        with self.checkpoint.reading("scheduler"):
            config = EulerDiscreteScheduler.load_config(self.checkpoint.folder / "scheduler")
            said, spacing = config["_class_name"], config.get("timestep_spacing")
        if self.distilled_by:
            if (
                said == "LCMScheduler" or spacing == "trailing"
            ):  # whatever else is there, DMD2's sampler takes its place
                raise ValueError(
                    f"{self.checkpoint.name} is a few-step model already: leave model.distilled_by out."
                )
            refuse_no_distiller(self.distilled_by)
            said = "LCMScheduler"
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"{self.checkpoint.name} predicts {config['prediction_type']}; dopsd knows SDXL's epsilon."
            )
        if said == "LCMScheduler":
            self._kind, self._scheduler = DMD2, LCMScheduler.from_config(config)
        elif said == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
            self._kind, self._scheduler = TURBO, EulerAncestralDiscreteScheduler.from_config(config)
        elif said == "EulerDiscreteScheduler" and spacing != "trailing":
            self._kind, self._scheduler = BASE, EulerDiscreteScheduler.from_config(config)
        else:
            raise ValueError(
                f"{self.checkpoint.name} is an SDXL for the {said} with {spacing} spacing; dopsd knows "
                "EulerAncestralDiscreteScheduler with trailing spacing (SDXL-Turbo), LCMScheduler (DMD2) and "
                "EulerDiscreteScheduler (the base)."
            )
        sigmas = ((1 - self._scheduler.alphas_cumprod) / self._scheduler.alphas_cumprod) ** 0.5
        self._times = _clock(sigmas)  # of timesteps 0, 1, ...

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """The pipeline's times: its scheduler, asked as the pipeline asks it; for DMD2 with the
        timesteps its authors give (999, 749, 499, 249 of 4), which are those of trailing spacing.
        """
        trained = self._scheduler.config.num_train_timesteps
        if not 1 <= nfe <= trained:
            raise ValueError(f"nfe is {nfe}; a walk of SDXL has 1 to {trained} forwards.")
        if self._kind.steps == "renoise":
            times = torch.cat([self._times[self._renoised(nfe)], torch.zeros(1)])
            start = math.hypot(
                1 - times[0].item(), times[0].item()
            )  # unit noise at x / sqrt(1 + sigma^2)
            return Schedule(times, (1.0,) * (nfe - 1) + (0.0,), start)
        self._scheduler.set_timesteps(nfe)
        sigmas = self._scheduler.sigmas
        start = float(self._scheduler.init_noise_sigma) / (1 + sigmas[0].item())
        shares = (0.0,) * nfe
        if self._kind.steps == "ancestral":  # sigma_up / sigma'; the last step ends without noise
            pairs = zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True)
            shares = (*(math.sqrt(1 - (after / now) ** 2) for now, after in pairs), 0.0)
        return Schedule(_clock(sigmas), shares, start)

    def _renoised(self, nfe: int) -> Tensor:
        """Timesteps int64 [nfe] of a walk that renoises."""
        trained = self._scheduler.config.num_train_timesteps
        return (
            torch.arange(trained, 0, -trained / nfe, dtype=torch.float64).round().long()[:nfe] - 1
        )

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
                UNet2DConditionModel.from_config(self._unet), self._times, self.vae_scale_factor
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
                merge_lora(network, file, self)
        return SDXLDenoiser(network.to(device), self._times, self.vae_scale_factor)

    def _unet_of(self, file: Path, dtype: torch.dtype) -> UNet2DConditionModel:
        """The network with a whole UNet's weights, the checkpoint's own not being read."""
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(self._unet)
        weights = {name: tensor.to(dtype) for name, tensor in read_tensors(file).items()}
        try:
            network.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # names or shapes that differ
            raise ValueError(
                f"{file} is no UNet of {self.checkpoint.name} ({shorten(str(error))})."
            ) from error
        return network.eval()

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        assert sizes is None, "no encoder here reads pictures"
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

    def lora_in_own_form(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By diffusers' conversion: kohya's names, of the original model's modules or of
        diffusers', its own old and new ones. Alphas are multiplied in before, for it only hands
        them on."""
        bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        for name in [name for name in bare if name.endswith(".alpha")]:
            module, alpha = name.removesuffix("alpha"), bare.pop(name).item()
            down, up = next(pair for pair in PARTNERS if f"{module}{pair[0]}.weight" in bare)
            bare[f"{module}{up}.weight"] = bare[f"{module}{up}.weight"] * (
                alpha / len(bare[f"{module}{down}.weight"])
            )
        shape = SimpleNamespace(layers_per_block=self._unet["layers_per_block"])
        named = StableDiffusionXLLoraLoaderMixin.lora_state_dict(bare, unet_config=shape)[0]
        if others := [name for name in named if name.startswith("text_encoder")]:
            raise ValueError(
                f"it adapts text encoders as well ({others[0]}), which dopsd leaves as they are"
            )
        return {
            f"unet.{n.removeprefix('unet.')}": t
            for n, t in convert_unet_state_dict_to_peft(named).items()
        }

    def usage(self, nfe: int) -> Usage:
        if self._kind.steps != "renoise":
            return plain_usage(nfe)
        arguments = f"timesteps={self._renoised(nfe).tolist()}, guidance_scale=0.0"
        if not self.distilled_by:
            return Usage(arguments)
        imports, setup = ["from diffusers import LCMScheduler"], [LCM_LINE]
        where, file = address_of(self.distilled_by)
        if kind_of(weights_file(self.distilled_by, KEY)) == "unet":
            imports.append("from safetensors.torch import load_file")
            setup.append(f'pipeline.unet.load_state_dict(load_file("{where}/{file}"))')
        else:
            setup += [f'pipeline.load_lora_weights("{where}", weight_name="{file}")', *FUSE_LINES]
        return Usage(arguments, tuple(imports), tuple(setup))

    def settle(self, folder: Path) -> None:
        if self.distilled_by:
            self._scheduler.save_pretrained(folder / "scheduler")
            file = folder / "model_index.json"
            index = json.loads(file.read_text(encoding="utf-8"))
            write_json(file, index | {"scheduler": ["diffusers", type(self._scheduler).__name__]})

    def lora_in_public_form(self, pairs: Pairs) -> dict[str, Tensor]:
        """kohya's names of diffusers' modules, with alpha = rank: the form that SDXL's interfaces
        read."""
        tensors = {}
        for module, (a, b) in pairs.items():
            path = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b}
            tensors[f"{path}.alpha"] = torch.tensor(float(len(a)))
        return tensors

    def starting_points(self, method: str) -> dict[str, Any]:
        own = {"method.space": self.native_space} if method in ("sft", "dreambooth", "dpo") else {}
        return (
            STARTING_POINTS
            | own
            | ({"model.distilled_by": self.distilled_by} if self.distilled_by else {})
        )


def _clock(sigmas: Tensor) -> Tensor:
    """t = sigma / (1 + sigma), float32."""
    return (sigmas / (1 + sigmas)).float()


class SDXLDenoiser(Denoiser):
    """UNet2DConditionModel in the house's clock. times: float32 [T], rising, t of the timesteps 0
    ... T-1."""

    def __init__(self, network: UNet2DConditionModel, times: Tensor, vae_scale_factor: int):
        super().__init__()
        self.network, self.times, self.vae_scale_factor = network, times, vae_scale_factor

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        height, width = (side * self.vae_scale_factor for side in z.shape[-2:])
        size = z.new_tensor(
            [height, width, 0, 0, height, width]
        )  # original size, crop, target size
        at = per_row(t, z).to(z)
        seen = {
            "text_embeds": context.extras["pooled"].to(dtype),
            "time_ids": size.expand(len(z), 6),
        }
        noise = self.network(
            (z / torch.hypot(1 - at, at)).to(dtype),
            self.timesteps(t),
            context.tokens.to(dtype),
            added_cond_kwargs=seen,
            return_dict=False,
        )[0]
        return (noise.float() - z) / (1 - at)

    def timesteps(self, t: Tensor) -> Tensor:
        """t [B] as float32 timesteps: exactly k at the time of timestep k, between two times in
        proportion, at the ends the first and the last."""
        times = self.times.to(t.device)
        t = t.float().clamp(times[0], times[-1])
        below = (torch.searchsorted(times, t, right=True) - 1).clamp(max=len(times) - 2)
        return below + (t - times[below]) / (times[below + 1] - times[below])
