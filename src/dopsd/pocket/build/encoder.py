"""Qwen3-VL on stacked tensors of equal sizes, for training the pocket model.

transformers' forward attends image by image and embeds patches with a 3-D convolution, which is
slow on a CPU. This is the same computation for images of one size and prompts of one padded length
(tests/pocket/build/test_train.py compares the two).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import BEFORE_IMAGE

FIRST_IMAGE_TOKEN = BEFORE_IMAGE + 1  # in a prompt with an image, after <|vision_start|>


class StackedEncoder:
    """The VLM's prompts with and without an image, as contexts of the transformer: the hidden
    states before its last layer, as in Z-Image."""

    def __init__(self, vlm: Qwen3VLModel):
        self._vlm = vlm
        vision, tower = vlm.config.vision_config, vlm.visual
        self.tower = parts.VisionTower(
            vision.spatial_merge_size, vision.hidden_size, vision.intermediate_size
        )
        side = parts.IMAGE // parts.PATCH
        grid = torch.tensor([[1, side, side]])
        self._places, self._place_weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.tower.merge,
            kwargs={},
        )
        positions = get_vision_position_ids(grid, self.tower.merge, kwargs={})
        self._vision_rope = tower.rotary_pos_emb(torch.zeros(1), positions)

    def image_tokens(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images uint8 [B, 64, 64, 3] -> the tower's output [B, tokens, 128], and what it adds
        after the first language layers, one tensor of that shape each."""
        tower, batch = self._vlm.visual, len(images)
        patches = vlm_patches(images, self.tower).view(batch, -1, 6 * parts.PATCH**2)
        embed = tower.patch_embed.proj
        x = patches @ embed.weight.flatten(1).T + embed.bias
        x = x + (tower.pos_embed(self._places) * self._place_weights[:, :, None]).sum(1)
        cos, sin = (each[:, None] for each in self._vision_rope)
        added = []
        for index, block in enumerate(tower.blocks):
            attention = block.attn
            heads = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            query, key, value = heads.unbind(2)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            x = x + attention.proj(_attend(query, key, value))
            x = x + block.mlp(block.norm2(x))
            if index in tower.deepstack_visual_indexes:
                place = tower.deepstack_visual_indexes.index(index)
                added.append(self._merge(tower.deepstack_merger_list[place], x))
        return self._merge(tower.merger, x), added

    def _merge(self, merger: nn.Module, x: Tensor) -> Tensor:
        return merger(x.reshape(-1, x.shape[-1])).view(len(x), self.tower.tokens, -1)

    def plain(self, ids: Tensor) -> Tensor:
        """Tokens [B, L] -> context [B, L, 128]."""
        length = ids.shape[1]
        embedded = self._vlm.language_model.embed_tokens(ids)
        return self._read(embedded, torch.arange(length).expand(3, 1, length), [])

    def privileged(self, ids: Tensor, images: Tensor) -> Tensor:
        """Tokens [B, L] with an image's, images uint8 [B, 64, 64, 3] -> context [B, L, 128]."""
        tokens, added = self.image_tokens(images)
        embedded = self._vlm.language_model.embed_tokens(ids)
        end = FIRST_IMAGE_TOKEN + self.tower.tokens
        embedded = torch.cat(
            [embedded[:, :FIRST_IMAGE_TOKEN], tokens.to(embedded), embedded[:, end:]], dim=1
        )
        return self._read(embedded, text_positions(ids.shape[1], self.tower), added)

    def _read(self, x: Tensor, positions: Tensor, added: list[Tensor]) -> Tensor:
        """Run all language layers but the last. Attention is causal, so the padding at the end
        changes nothing before it."""
        model = self._vlm.language_model
        cos, sin = (each[0][None, :, None] for each in model.rotary_emb(x[:1], positions))
        before, after = FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + self.tower.tokens
        for index, layer in enumerate(model.layers[:-1]):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                project(normed).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query = _rotate(attention.q_norm(query), cos, sin)
            key = _rotate(attention.k_norm(key), cos, sin)
            x = x + attention.o_proj(_attend(query, key, value, is_causal=True))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if index < len(added):
                inside = x[:, before:after] + added[index]
                x = torch.cat([x[:, :before], inside, x[:, after:]], dim=1)
        return x


def text_positions(length: int, tower: parts.VisionTower) -> Tensor:
    """Qwen3-VL's three rotary positions [3, 1, length] for a prompt that starts with one image."""
    before, side = FIRST_IMAGE_TOKEN, tower.side
    positions = torch.arange(length).repeat(3, 1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack(
        [torch.zeros(side * side, dtype=torch.long), rows.flatten(), columns.flatten()]
    )
    positions[:, before : before + side * side] = grid + before
    after = before + side * side
    positions[:, after:] = torch.arange(length - after) + before + side
    return positions[:, None]


def vlm_patches(images: Tensor, tower: parts.VisionTower) -> Tensor:
    """The image processor's normalised patches [B * 64, 3 * 2 * 8 * 8] of 64 x 64 images."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's, the processor's own
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    size, merge = parts.PATCH, tower.merge
    pixels = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = pixels.reshape(len(images), 3, tower.side, merge, size, tower.side, merge, size)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = patches.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # the image as two video frames
    return repeated.reshape(-1, 3 * 2 * size * size)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, tokens, heads, d] at rotary positions; its halves are the pairs' two numbers."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """[B, tokens, heads, d] each -> [B, tokens, heads * d]; the query may have more heads."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=is_causal,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2).flatten(2)
