"""The parts of the pocket checkpoint: a tiny Z-Image-Turbo in the diffusers folder layout.

The folder holds what `ZImagePipeline.from_pretrained` opens (`transformer`, `vae`, `text_encoder`,
`tokenizer`, `scheduler`), in `vlm` a Qwen3-VL whose language model is the text encoder, and in
`parent` the transformer before distillation (the many-step model).
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from dopsd.files import write_json
from dopsd.models.zimage import DOPSD_JSON_VERSION
from dopsd.pocket.world.captions import vocabulary

WIDTH = 128  # of the text encoder and of the transformer
LATENT_CHANNELS = 8
SHIFT = 3.0  # that of Z-Image-Turbo
DISTILLED_NFE = 4  # of the first distillation, by chords of the many-step model
NFE = 2  # of the packaged model
STARTING_POINTS = {
    "model.memory": "high",
    "lora.rank": 16,
    "train.max_steps": 240,
    "train.batch_size": 4,
    "train.learning_rate": 1e-3,
}
UNRELATED_PROMPTS = (
    "a big red star on night",
    "a small blue hut at the left",
    "a green tree on beach",
    "a cross in inked style",
    "a big yellow moon on slate",
    "a purple circle at the top on paper",
    "a heart in striped style",
    "a cyan tower",
)
GUIDANCE = 3.0  # of the many-step model: empty caption + 3 x (caption - empty caption)
IMAGE = 64  # pixels
PATCH = 8  # pixels a side of the vision tower's patches
CAPTION_TOKENS = 32  # limit of the prompt without an image

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)

# Qwen's chat template, reduced to turns, images and Qwen3's `enable_thinking`.
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


@dataclass(frozen=True)
class VisionTower:
    """Size of the VLM's vision tower. merge: patches a side of one image token."""

    merge: int
    width: int
    mlp_width: int

    @property
    def side(self) -> int:
        """Image tokens a side."""
        return IMAGE // PATCH // self.merge

    @property
    def tokens(self) -> int:
        """Image tokens of one image in the VLM's context."""
        return self.side**2

    @property
    def prompt_tokens(self) -> int:
        """Limit of the prompt with an image, a multiple of the transformer's 32."""
        return 96 if self.tokens > CAPTION_TOKENS else 64


# The first tower was trained jointly with the language model; the second replaced it, with a token
# for each of the transformer's image tokens (docs/experiments.md).
FIRST_TOWER = VisionTower(merge=2, width=64, mlp_width=192)
TOWER = VisionTower(merge=1, width=128, mlp_width=256)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every caption word is one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [*vocabulary(), "user", "assistant"]
    core.train_from_iterator([f"{w} {w}\n" for w in words for _ in range(4)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )


def make_vlm(tokenizer: PreTrainedTokenizerFast, tower: VisionTower = TOWER) -> Qwen3VLModel:
    """A Qwen3-VL with about 1 M parameters. Prompts are encoded by the second to last hidden state,
    as in Z-Image, so the third text layer is not used."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config=_text_settings(len(tokenizer))
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                }
            },
            vision_config={
                "depth": 2,
                "hidden_size": tower.width,
                "intermediate_size": tower.mlp_width,
                "num_heads": 4,
                "patch_size": PATCH,
                "spatial_merge_size": tower.merge,
                "temporal_patch_size": 2,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": (IMAGE // PATCH) ** 2,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )


def text_encoder_of(vlm: Qwen3VLModel) -> Qwen3Model:
    """The VLM's language model as the Qwen3 that the pipeline encodes prompts with."""
    config = Qwen3Config(
        **_text_settings(vlm.config.text_config.vocab_size),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    encoder = Qwen3Model(config)
    encoder.load_state_dict(vlm.language_model.state_dict())
    return encoder


def _text_settings(vocab_size: int) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
    }


def make_vae() -> AutoencoderKL:
    """64 x 64 pixels to 8 x 16 x 16 latents; without attention, so that other sizes work too."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=IMAGE,
    )


def make_transformer() -> ZImageTransformer2DModel:
    """Z-Image's transformer with 2.0 M parameters: 64 image tokens of 32 numbers, width 128."""
    return ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=WIDTH,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[12, 10, 10],
        axes_lens=[256, 64, 64],
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Z-Image-Turbo's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False
    )


def make_image_processor(tower: VisionTower = TOWER) -> Qwen2VLImageProcessorPil:
    """The VLM's image processor: every image becomes 64 x 64 pixels, `tower.tokens` tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=tower.merge,
        temporal_patch_size=2,
        size={"shortest_edge": IMAGE * IMAGE, "longest_edge": IMAGE * IMAGE},
    )


def save_pipeline(
    folder: Path,
    transformer: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    vlm: Qwen3VLModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write the diffusers folder, and in `vlm` the Qwen3-VL with tokenizer and image processor."""
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder_of(vlm).to(vlm.dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    make_scheduler().save_pretrained(folder / "scheduler")
    vlm.save_pretrained(folder / "vlm")
    tokenizer.save_pretrained(folder / "vlm")
    make_image_processor().save_pretrained(folder / "vlm")
    about = {
        "version": DOPSD_JSON_VERSION,
        "nfe": NFE,
        "starting_points": STARTING_POINTS,
        "unrelated_prompts": UNRELATED_PROMPTS,
    }
    write_json(folder / "dopsd.json", about)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": "0.36.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
