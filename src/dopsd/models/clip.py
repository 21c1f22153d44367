"""A pair of CLIP text encoders: prompts as SDXL's pipelines encode them."""

import hashlib
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
)

from dopsd.diffusion.batch import Context
from dopsd.models.base import fingerprint_of
from dopsd.models.hub import Checkpoint, variant_of
from dopsd.models.prompt_limits import refuse_unfit


class ClipTextEncoders:
    """Prompts padded to the limit: the penultimate states of both encoders, concatenated, and the
    second one's pooled output as the extra `pooled`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.device, self.encoders, self.tokenizers = device, [], []
        for end, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            part = checkpoint.part(f"text_encoder{end}")
            with checkpoint.reading(f"tokenizer{end}"):
                self.tokenizers.append(
                    AutoTokenizer.from_pretrained(checkpoint.folder / f"tokenizer{end}")
                )
            with checkpoint.reading(f"text_encoder{end}"):
                encoder = kind.from_pretrained(part, dtype=dtype, variant=variant_of(part))
            self.encoders.append(encoder.to(device).eval().requires_grad_(False))
        identity = [*(fingerprint_of(encoder) for encoder in self.encoders), str(dtype)]
        self.fingerprint = hashlib.sha256("|".join(identity).encode()).hexdigest()[:16]

    @torch.no_grad()
    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        assert images is None and references is None, "no encoder here reads images"
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            count_tokens(tokenizer, prompts)
            limit = tokenizer.model_max_length
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=limit, return_tensors="pt"
            ).input_ids
            output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        tokens = torch.cat(states, dim=-1)
        return Context(tokens, (tokens.shape[1],) * len(tokens), {"pooled": output.text_embeds})


def count_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt. Raises UnfitPrompts for those that the pipeline would truncate, and
    for marks of the tokenizer in them."""
    # verbose=False: a prompt that is too long is refused below, not warned about.
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
    refuse_unfit(tokenizer, prompts, lengths, [tokenizer.model_max_length] * len(lengths))
    return lengths
