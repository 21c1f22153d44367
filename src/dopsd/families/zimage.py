"""Z-Image-Turbo (and pocket, the same classes small): Qwen3 text, Qwen3-VL teacher, flow transformer, KL autoencoder.

Z-Image counts time from noise (0) to clean (1) and answers clean - noise; `ZImageDenoiser` turns both round. The
teacher reads its picture through a Qwen3-VL whose language weights are replaced by the pipeline's text encoder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
    Qwen3VLModel,
)

from dopsd.batch import Context
from dopsd.families.base import Denoiser
from dopsd.flow import Schedule

log = logging.getLogger(__name__)

TEXT_TOKENS = 512  # ZImagePipeline's max_sequence_length
PRIVILEGED_TOKENS = 1024  # of prompt and picture together, as D-OPSD's reference code
PICTURE_TOKENS = 576  # of the picture in them at most: 768 x 768 pixels at Qwen3-VL's size, as the reference code
HIDDEN_STATE = -2  # the one ZImagePipeline reads
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# Of the reference code's Z-Image script: 4 pictures a step, 2000 steps.
TURBO_STARTING_POINTS = {
    "lora.rank": 32,
    "train.max_steps": 2000,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 1e-4,
}
DISTILLED_SHIFT = 3.0  # Turbo's scheduler; the many-step base model ships 6.0


class ZImage:
    """A Z-Image checkpoint, local folder or hub id. See `families.base.Family` for what each member is."""

    name = "zimage"
    repo = "Tongyi-MAI/Z-Image-Turbo"
    licence = "Apache-2.0"
    teacher_contexts = ("vlm",)
    default_vlm = "Qwen/Qwen3-VL-4B-Instruct"
    native_space = "velocity"
    lora_targets = (
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"
    )
    export_prefix = "transformer"
    architecture = "Z-Image"

    def __init__(self, path: str, index: Mapping[str, Any], vlm: str | None = None, revision: str | None = None):
        self.path, self.revision = path, revision
        self._refuse_missing_parts(index)
        own = Path(path) / "vlm"
        self.vlm = vlm or (str(own) if own.is_dir() else self.default_vlm)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            path, subfolder="scheduler", revision=revision
        )
        vae = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
        self.channels: int = vae["latent_channels"]
        self.cell = 2 ** (len(vae["block_out_channels"]) - 1)
        self.multiple = 2 * self.cell  # the transformer's patches are 2 x 2 cells
        self.resolution: int = vae["sample_size"]
        about = Path(path) / "dopsd.json"  # what a checkpoint that is not Turbo itself says of itself
        own = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        self.default_nfe: int = own.get("nfe", 8)
        self.unrelated_prompts: tuple[str, ...] = tuple(own.get("unrelated_prompts", ()))
        self._starting_points: dict[str, Any] = own.get("starting_points", TURBO_STARTING_POINTS)
        # Z-Image's base and Turbo differ in nothing but weights and the scheduler's shift
        self.distilled = self._scheduler.config.shift == DISTILLED_SHIFT

    def _refuse_missing_parts(self, index: Mapping[str, Any]) -> None:
        if missing := [part for part in PARTS if not index.get(part)]:
            raise ValueError(f"{self.path} lacks {', '.join(missing)} in its model_index.json: it is no whole Z-Image.")
        folder = Path(self.path)
        if folder.is_dir() and (missing := [part for part in PARTS if not (folder / part).is_dir()]):
            raise ValueError(f"{self.path} lacks the folder {', '.join(missing)}: the checkpoint is incomplete.")

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """ZImagePipeline's times: its scheduler, asked as the pipeline asks it."""
        if nfe < 1:
            raise ValueError(f"nfe is {nfe}; a walk needs at least 1 forward.")
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

    def load_reader(self, device: torch.device, dtype: torch.dtype, pictures: bool) -> "QwenReader":
        return QwenReader(self, device, dtype, pictures)

    def load_painter(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> "KLPainter":
        vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", revision=self.revision, torch_dtype=dtype)
        return KLPainter(vae.to(device), tiled)

    def empty_denoiser(self) -> "ZImageDenoiser":
        config = ZImageTransformer2DModel.load_config(self.path, subfolder="transformer", revision=self.revision)
        return ZImageDenoiser(ZImageTransformer2DModel.from_config(config))

    def blank_context(self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]] | None = None) -> Context:
        tokenizer = AutoTokenizer.from_pretrained(self.path, subfolder="tokenizer", revision=self.revision)
        width = AutoConfig.from_pretrained(self.path, subfolder="text_encoder", revision=self.revision).hidden_size
        if sizes is None:
            texts = [templated(tokenizer, prompt) for prompt in prompts]
        else:
            processor = _load_processor(self.vlm)
            texts = [
                with_picture(tokenizer, prompt, picture_tokens(processor, size))
                for prompt, size in zip(prompts, sizes, strict=True)
            ]
        lengths = [len(ids) for ids in tokenizer(texts).input_ids]
        return Context.stack([Context(torch.zeros(1, length, width), (length,)) for length in lengths])

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> "ZImageDenoiser":
        network = ZImageTransformer2DModel.from_pretrained(
            self.path, subfolder="transformer", revision=self.revision, torch_dtype=dtype
        )
        return ZImageDenoiser(network.to(device))

    def starting_points(self, method: str) -> dict[str, Any]:
        walk = {"method.nfe": 4} if method == "dopsd" and self.default_nfe == 8 else {}
        return self._starting_points | walk

    def lora_in_own_form(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By diffusers' conversion, which wants bare names; raw PEFT files and ours bring a prefix."""
        bare = {name.removeprefix("base_model.model.").removeprefix("transformer."): t for name, t in tensors.items()}
        converted: Mapping[str, Tensor] = ZImagePipeline.lora_state_dict(bare)  # type: ignore[assignment]
        return {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in converted.items()}


class ZImageDenoiser(Denoiser):
    """ZImageTransformer2DModel in the house's clock."""

    def __init__(self, network: ZImageTransformer2DModel):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        captions = [row.to(dtype) for row in context.rows()]
        pictures = list(z.to(dtype).unsqueeze(2).unbind(0))
        answer = self.network(pictures, (1 - t).to(z), captions, return_dict=False)[0]
        return -torch.stack([row.float() for row in answer]).squeeze(2)


class KLPainter:
    """AutoencoderKL with shift and scale applied. Encodes to the mode, and whole, so a picture has one latent."""

    def __init__(self, vae: AutoencoderKL, tiled: bool = False):
        self.vae = vae.eval().requires_grad_(False)
        self.tiled = tiled
        self.fingerprint = f"{_fingerprint(vae)}:{vae.config.shift_factor}:{vae.config.scaling_factor}"

    def latents(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            mode = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode().float()
        return (mode - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        self.vae.use_tiling = self.tiled
        pixels = self.vae.decode(scaled + self.vae.config.shift_factor, return_dict=False)[0].float()
        self.vae.use_tiling = False
        return pixels


class QwenReader:
    """Prompts as ZImagePipeline reads them; with pictures, through the Qwen3-VL twin of its text encoder."""

    def __init__(self, family: ZImage, device: torch.device, dtype: torch.dtype, pictures: bool):
        where = {"pretrained_model_name_or_path": family.path, "revision": family.revision}
        self.tokenizer = AutoTokenizer.from_pretrained(**where, subfolder="tokenizer")
        self.encoder = AutoModel.from_pretrained(**where, subfolder="text_encoder", dtype=dtype).to(device).eval()
        self.encoder.requires_grad_(False)
        self.vlm = self.processor = None
        if pictures:
            vlm = _load_vlm(family.vlm, dtype)
            transplant(self.encoder, vlm, family.vlm)  # before the VLM moves, so that no second copy goes along
            self.vlm = vlm.to(device)
            self.processor = _load_processor(family.vlm)
            self.text_gap = self._text_gap()
            log.info("vlm=%s language_weights=replaced text_only_gap=%.2e", family.vlm, self.text_gap)
        marks = [_fingerprint(self.encoder), str(dtype), self.tokenizer.chat_template or ""]
        if self.vlm is not None:
            marks += [_fingerprint(self.vlm.visual), json.dumps(self.processor.to_dict(), default=str, sort_keys=True)]
        self.fingerprint = hashlib.sha256("|".join(marks).encode()).hexdigest()[:16]

    @torch.no_grad()
    def context(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Context:
        if images is not None:
            return Context.stack([self._privileged(p, i) for p, i in zip(prompts, images, strict=True)])
        texts = [templated(self.tokenizer, prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        self._refuse_long(prompts, tokens.attention_mask.sum(1), TEXT_TOKENS)
        tokens = tokens.to(self.encoder.device)
        states = self.encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.bool(), output_hidden_states=True
        ).hidden_states[HIDDEN_STATE]
        rows = [state[mask] for state, mask in zip(states, tokens.attention_mask.bool(), strict=True)]
        return Context.stack([Context(row[None], (len(row),)) for row in rows])

    def _privileged(self, prompt: str, image: Image.Image) -> Context:
        assert self.vlm is not None and self.processor is not None, "this reader was loaded without its VLM"
        patches = self.processor(images=[image], return_tensors="pt").to(self.vlm.device)
        count = picture_tokens(self.processor, image.size)
        text = with_picture(self.tokenizer, prompt, count)
        ids = self.tokenizer([text], return_tensors="pt").input_ids.to(self.vlm.device)
        self._refuse_long([prompt], torch.tensor([ids.shape[1]]), PRIVILEGED_TOKENS, f", {count} of them the picture's")
        states = self.vlm(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches["pixel_values"],
            image_grid_thw=patches["image_grid_thw"],
            mm_token_type_ids=(ids == self.vlm.config.image_token_id).int(),
            output_hidden_states=True,
        ).hidden_states[HIDDEN_STATE]
        return Context(states, (ids.shape[1],))

    def _refuse_long(self, prompts: Sequence[str], lengths: Tensor, limit: int, of_them: str = "") -> None:
        for prompt, length in zip(prompts, lengths.tolist(), strict=True):
            if length > limit:
                start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                raise ValueError(
                    f'the caption "{start}" makes {length} tokens{of_them}; the limit is {limit}. Shorten it.'
                )

    @torch.no_grad()
    def _text_gap(self) -> float:
        """Largest difference of the two text-only hidden states: 0 unless their rope settings or dtypes differ."""
        assert self.vlm is not None
        ids = self.tokenizer([templated(self.tokenizer, "a picture of a red house")], return_tensors="pt").input_ids
        ids = ids.to(self.encoder.device)
        plain = self.encoder(input_ids=ids, output_hidden_states=True).hidden_states[HIDDEN_STATE]
        seeing = self.vlm.language_model(input_ids=ids, output_hidden_states=True).hidden_states[HIDDEN_STATE]
        return (plain.float() - seeing.float()).abs().max().item()


def templated(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]]) -> str:
    """One user turn as ZImagePipeline writes it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


def with_picture(tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    """One user turn, a picture of `count` tokens first, then the prompt; templated once."""
    mark = "<|image_pad|>"
    text = templated(tokenizer, [{"type": "image"}, {"type": "text", "text": prompt}])
    return text.replace(mark, mark * count, 1)


def picture_tokens(processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Of a picture of (width, height) pixels."""
    return processor.get_number_of_image_patches(size[1], size[0]) // processor.merge_size**2


def _load_vlm(path: str, dtype: torch.dtype) -> Qwen3VLModel:
    try:
        return Qwen3VLModel.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    except OSError as error:
        raise ValueError(f"the teacher's VLM {path} could not be loaded ({str(error).splitlines()[0]}).") from error


def _load_processor(path: str) -> Qwen2VLImageProcessorPil:
    """The VLM's own picture processor, its largest picture limited to PICTURE_TOKENS."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    most = PICTURE_TOKENS * (processor.patch_size * processor.merge_size) ** 2
    size = {edge: min(processor.size[edge], most) for edge in ("shortest_edge", "longest_edge")}
    return Qwen2VLImageProcessorPil.from_pretrained(path, size=size)


def transplant(encoder: torch.nn.Module, vlm: Qwen3VLModel, name: str) -> None:
    """Replace the VLM's language weights by the text encoder's. Raises ValueError, listing the first keys that differ
    in name or shape: with one of them wrong the teacher would speak another language than the transformer learned."""
    mine, theirs = encoder.state_dict(), vlm.language_model.state_dict()
    differing = [
        f"{key} ({'missing' if key not in source else 'shape'})"
        for key in sorted(mine.keys() | theirs.keys())
        for source in (mine if key not in mine else theirs,)
        if key not in source or mine[key].shape != theirs[key].shape
    ]
    if differing:
        listed = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ValueError(
            f"the VLM {name} does not match the checkpoint's text encoder in {listed}. "
            "Set model.vlm to the Qwen3-VL of the same size, or use a method without a teacher that sees pictures."
        )
    vlm.language_model.load_state_dict(mine, assign=True)  # shares the tensors: one copy in memory serves both


def _fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights: shapes, dtypes, and a sample of every tensor's bytes."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
