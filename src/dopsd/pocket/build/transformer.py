"""Z-Image's transformer on stacked tensors, written so that torch.compile fuses it.

diffusers' forward takes lists of tensors, its backward is quadratic in the batch size, and its
rotary positions are complex numbers, which the compiler leaves alone. This is the same computation
for contexts of one padded length (tests/pocket/build/test_train.py compares the two).
"""

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from dopsd.pocket.build.encoder import FIRST_IMAGE_TOKEN

# (joint layer, head) that are trained to attend to the context token of their own place.
GUIDED_HEADS = ((0, 0), (1, 0))


def rotary_positions(
    model: ZImageTransformer2DModel, length: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [2, tokens, head_dim / 2] at the positions of rows x columns image tokens and
    of `length` context tokens, as diffusers numbers them."""
    device = torch.device("cpu")
    image = model.create_coordinate_grid((1, rows, columns), (length + 1, 0, 0), device)
    caption = model.create_coordinate_grid((length, 1, 1), (1, 0, 0), device)
    image_rope = model.rope_embedder(image.flatten(0, 2))
    caption_rope = model.rope_embedder(caption.flatten(0, 2))
    return (
        torch.stack([image_rope.real, image_rope.imag]).clone(),
        torch.stack([caption_rope.real, caption_rope.imag]).clone(),
    )


def velocity_and_gaze(
    model: ZImageTransformer2DModel,
    z: Tensor,
    time: Tensor,
    context: Tensor,
    mask: Tensor,
    positions: tuple[Tensor, Tensor],
    guided: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ZImageTransformer2DModel.forward` for contexts of one padded length, time [B], 1 = clean.

    Also returns, where guided, the mean cross-entropy (0-d, nats) of the guided heads against
    looking from each image token at the context's image token of the same place, else 0.
    """
    batch, channels, height, width = z.shape
    rows, columns = height // 2, width // 2
    places = rows * columns
    image_rope, caption_rope = positions
    emb = model.t_embedder(time * model.t_scale).type_as(z)
    patches = z.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
    x = model.all_x_embedder["2-1"](patches.reshape(batch, places, -1))
    for layer in model.noise_refiner:
        x = _block(layer, x, image_rope, emb)
    c = torch.where(mask[..., None], model.cap_embedder(context), model.cap_pad_token)
    for layer in model.context_refiner:
        c = _block(layer, c, caption_rope, None)
    joint = torch.cat([x, c], dim=1)
    rope = torch.cat([image_rope, caption_rope], dim=1)
    gaze = z.new_zeros(())
    for index, layer in enumerate(model.layers):
        for _, head in (each for each in GUIDED_HEADS if guided and each[0] == index):
            gaze = gaze + _gaze(layer, joint, rope, emb, head, places) / len(GUIDED_HEADS)
        joint = _block(layer, joint, rope, emb)
    out = model.all_final_layer["2-1"](joint, c=emb)[:, :places]
    out = out.reshape(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, channels, height, width), gaze


def _block(layer: nn.Module, x: Tensor, rope: Tensor, emb: Tensor | None) -> Tensor:
    if emb is None:
        x = x + layer.attention_norm2(_attend(layer.attention, layer.attention_norm1(x), rope))
        return x + layer.ffn_norm2(layer.feed_forward(layer.ffn_norm1(x)))
    scale_a, gate_a, scale_f, gate_f = layer.adaLN_modulation(emb).unsqueeze(1).chunk(4, 2)
    attended = _attend(layer.attention, layer.attention_norm1(x) * (1 + scale_a), rope)
    x = x + gate_a.tanh() * layer.attention_norm2(attended)
    fed = layer.feed_forward(layer.ffn_norm1(x) * (1 + scale_f))
    return x + gate_f.tanh() * layer.ffn_norm2(fed)


def _attend(attention: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    query, key, value = _heads(attention, x, rope)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return attention.get_submodule("to_out.0")(out.transpose(1, 2).flatten(2))


def _heads(attention: nn.Module, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key with their positions, and value, each [B, tokens, heads, head_dim]."""
    query, key, value = (
        project(x).unflatten(-1, (attention.heads, -1))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    return _rotate(attention.norm_q(query), rope), _rotate(attention.norm_k(key), rope), value


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, tokens, heads, d] with neighbouring numbers rotated by rope [2, tokens, d / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[0][None, :, None], rope[1][None, :, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _gaze(layer: nn.Module, x: Tensor, rope: Tensor, emb: Tensor, head: int, places: int) -> Tensor:
    """Cross-entropy of one head's attention from image token i to context image token i."""
    scale = layer.adaLN_modulation(emb).unsqueeze(1).chunk(4, 2)[0]
    query, key, _ = _heads(layer.attention, layer.attention_norm1(x) * (1 + scale), rope)
    query, key = query[:, :places, head], key[:, :, head]
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    first = places + FIRST_IMAGE_TOKEN
    own = scores[:, :, first : first + places].diagonal(dim1=1, dim2=2)
    return (torch.logsumexp(scores, -1) - own).mean()
