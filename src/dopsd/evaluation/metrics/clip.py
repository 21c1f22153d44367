"""CLIP and metrics on top of it: image-text agreement, PickScore, LAION's aesthetic predictor."""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dopsd.files import read_tensors
from dopsd.images import as_bytes
from dopsd.models.hub import Checkpoint

HEAD = "aesthetic.safetensors"  # beside the CLIP: the head's linear layers, ordered by name


class Clip:
    """A CLIP model of transformers in float32. model: hub id or folder."""

    def __init__(self, model: str, device: torch.device, called: str):
        checkpoint = Checkpoint(model, called=f"{called} {model}")
        self.folder = checkpoint.part()
        with checkpoint.reading("the model"):
            self.model = (
                CLIPModel.from_pretrained(self.folder, dtype=torch.float32).to(device).eval()
            )
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.processor = CLIPImageProcessorPil.from_pretrained(self.folder)
        self.most_tokens = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> embeddings [B, D] of norm 1."""
        pil_images = [Image.fromarray(image) for image in as_bytes(images).numpy()]
        pixels = self.processor(pil_images, return_tensors="pt")["pixel_values"].to(
            self.model.device
        )
        return normalize(
            self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        )

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts, truncated to CLIP's limit (77 tokens) -> embeddings [B, D] of norm 1."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.most_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return normalize(self.model.text_projection(output.pooler_output))


class ClipScore:
    """CLIP score: the cosine between each image and its prompt, [B] in [-1, 1]."""

    def __init__(self, model: str, device: torch.device, called: str = "the CLIP"):
        self.clip = Clip(model, device, called)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.clip.embed_images(images) * self.clip.embed_prompts(prompts)).sum(1)


class PickScore:
    """PickScore (arXiv:2305.01569): a CLIP tuned on human preferences; the cosine times its logit
    scale, about 16 to 25."""

    def __init__(self, model: str, device: torch.device):
        self.score = ClipScore(model, device, "PickScore's CLIP")
        self.scale = self.score.clip.model.logit_scale.detach().exp()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * self.score(images, prompts)


class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: linear layers, without nonlinearities, on the
    embedding of CLIP ViT-L/14."""

    def __init__(self, model: str, device: torch.device):
        self.clip = Clip(model, device, "the CLIP of aesthetic,")
        file = self.clip.folder / HEAD
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: the aesthetic head as safetensors (docs/metrics.md says how "
                "to make it)."
            )
        self.linears = _linears(
            read_tensors(file), self.clip.model.config.projection_dim, str(file), device
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        output = self.clip.embed_images(images)
        for weight, bias in self.linears:
            output = linear(output, weight, bias)
        return output[:, 0]


def _linears(
    tensors: dict[str, Tensor], width: int, file: str, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer, ordered by the numbers in their names
    (`layers.0.weight`, ...)."""
    weights = (name for name in tensors if name.endswith("weight"))
    names = sorted(weights, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    biases = [name.removesuffix("weight") + "bias" for name in names]
    if lacking := [name for name in biases if name not in tensors]:
        raise ValueError(
            f"{file} has no {lacking[0]}: it is not a head of linear layers with biases."
        )
    shapes = [tuple(tensors[name].shape) for name in names]
    outputs = [shape[0] for shape in shapes]
    if shapes != list(zip(outputs, [width, *outputs], strict=False)) or outputs[-1:] != [1]:
        raise ValueError(
            f"{file} is not a head from {width} numbers to one: its weights are {shapes}."
        )
    return [
        (tensors[w].float().to(device), tensors[b].float().to(device))
        for w, b in zip(names, biases, strict=True)
    ]
