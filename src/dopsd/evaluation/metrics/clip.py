"""CLIP and what was made from it: agreement of picture and prompt, PickScore's preference, LAION's aesthetic head."""

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

HEAD = "aesthetic.safetensors"  # beside the CLIP: the head's linears, in order of their names


class Clip:
    """A CLIP of transformers, hub id or folder, in float32."""

    def __init__(self, model: str, device: torch.device, called: str):
        checkpoint = Checkpoint(model, called=f"{called} {model}")
        self.folder = checkpoint.part()
        with checkpoint.reading("the model"):
            self.model = CLIPModel.from_pretrained(self.folder, dtype=torch.float32).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.processor = CLIPImageProcessorPil.from_pretrained(self.folder)
        self.most_tokens = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """Embeddings [B, D] of length 1 of pictures [B, 3, H, W] in [0, 1]."""
        images = [Image.fromarray(picture) for picture in as_bytes(pictures).numpy()]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)
        return normalize(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of length 1 of prompts; what is beyond CLIP's own limit (77 tokens) it does not see."""
        words = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.most_tokens, return_tensors="pt"
        ).to(self.model.device)
        answer = self.model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return normalize(self.model.text_projection(answer.pooler_output))


class ClipScore:
    """CLIP-S: the cosine of each picture and its prompt, [B] in [-1, 1]."""

    def __init__(self, model: str, device: torch.device, called: str = "the CLIP"):
        self.clip = Clip(model, device, called)

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.clip.see(pictures) * self.clip.read(prompts)).sum(1)


class PickScore:
    """PickScore (arXiv:2305.01569): a CLIP tuned on people's choices; cosine times its own scale, about 16 ... 25."""

    def __init__(self, model: str, device: torch.device):
        self.score = ClipScore(model, device, "PickScore's CLIP")
        self.scale = self.score.clip.model.logit_scale.detach().exp()

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * self.score(pictures, prompts)


class Aesthetic:
    """LAION's aesthetic predictor, about 1 ... 10: linears without nonlinearities on the embedding of CLIP ViT-L/14."""

    def __init__(self, model: str, device: torch.device):
        self.clip = Clip(model, device, "the aesthetic judge's CLIP")
        file = self.clip.folder / HEAD
        if not file.is_file():
            raise ValueError(f"{file} is missing: the aesthetic head, as safetensors (docs/metrics.md says how).")
        self.linears = _linears(read_tensors(file), self.clip.model.config.projection_dim, str(file), device)

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        answer = self.clip.see(pictures)
        for weight, bias in self.linears:
            answer = linear(answer, weight, bias)
        return answer[:, 0]


def _linears(tensors: dict[str, Tensor], width: int, file: str, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each linear, in order of the numbers in their names (`layers.0.weight`, ...)."""
    weights = (name for name in tensors if name.endswith("weight"))
    names = sorted(weights, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    biases = [name.removesuffix("weight") + "bias" for name in names]
    if lacking := [name for name in biases if name not in tensors]:
        raise ValueError(f"{file} has no {lacking[0]}: it is no head of linears with biases.")
    shapes = [tuple(tensors[name].shape) for name in names]
    outputs = [shape[0] for shape in shapes]
    if shapes != list(zip(outputs, [width, *outputs], strict=False)) or outputs[-1:] != [1]:
        raise ValueError(f"{file} is no head from {width} numbers to one: its weights are {shapes}.")
    return [(tensors[w].float().to(device), tensors[b].float().to(device)) for w, b in zip(names, biases, strict=True)]
