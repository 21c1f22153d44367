"""FID's Inception-V3: its published size, its blocks in plain torch, and its preprocessing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from dopsd.evaluation.metrics.inception import WEIGHTS, Inception, InceptionV3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    torch.manual_seed(0)
    network = InceptionV3().eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.02, 0.1)  # so that a random network does not fade to nothing
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return network


def test_it_has_the_published_number_of_weights(network):
    assert (
        sum(p.numel() for p in network.parameters()) == 21_785_568
    )  # torchvision's, without its 1000-class head


@torch.no_grad()
def plainly(tensors: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """The network from the names and shapes of its weights, one line a convolution."""

    def replicate(
        name: str, z: torch.Tensor, stride: int = 1, pad: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        mean, var, scale, shift = (
            tensors[f"{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        z = conv2d(z, tensors[f"{name}.conv.weight"], stride=stride, padding=pad)
        return ((z - mean) / torch.sqrt(var + 0.001) * scale + shift).clamp(min=0)

    def around(z: torch.Tensor) -> torch.Tensor:
        inside = avg_pool2d(torch.ones_like(z), 3, 1, 1)  # what share of each window is image
        return avg_pool2d(z, 3, 1, 1) / inside

    z = replicate(
        "Conv2d_2b_3x3", replicate("Conv2d_2a_3x3", replicate("Conv2d_1a_3x3", z, 2)), pad=(1, 1)
    )
    z = max_pool2d(
        replicate("Conv2d_4a_3x3", replicate("Conv2d_3b_1x1", max_pool2d(z, 3, 2))), 3, 2
    )
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = replicate(f"{n}.branch5x5_2", replicate(f"{n}.branch5x5_1", z), pad=(2, 2))
        three = replicate(f"{n}.branch3x3dbl_2", replicate(f"{n}.branch3x3dbl_1", z), pad=(1, 1))
        three = replicate(f"{n}.branch3x3dbl_3", three, pad=(1, 1))
        z = torch.cat(
            [replicate(f"{n}.branch1x1", z), five, three, replicate(f"{n}.branch_pool", around(z))],
            1,
        )
    three = replicate(
        "Mixed_6a.branch3x3dbl_2", replicate("Mixed_6a.branch3x3dbl_1", z), pad=(1, 1)
    )
    three = replicate("Mixed_6a.branch3x3dbl_3", three, 2)
    z = torch.cat([replicate("Mixed_6a.branch3x3", z, 2), three, max_pool2d(z, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = replicate(f"{n}.branch7x7_2", replicate(f"{n}.branch7x7_1", z), pad=(0, 3))
        seven = replicate(f"{n}.branch7x7_3", seven, pad=(3, 0))
        twice = replicate(f"{n}.branch7x7dbl_1", z)
        for k, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            twice = replicate(f"{n}.branch7x7dbl_{k}", twice, pad=pad)
        z = torch.cat(
            [
                replicate(f"{n}.branch1x1", z),
                seven,
                twice,
                replicate(f"{n}.branch_pool", around(z)),
            ],
            1,
        )
    three = replicate("Mixed_7a.branch3x3_2", replicate("Mixed_7a.branch3x3_1", z), 2)
    seven = replicate("Mixed_7a.branch7x7x3_2", replicate("Mixed_7a.branch7x7x3_1", z), pad=(0, 3))
    seven = replicate(
        "Mixed_7a.branch7x7x3_4", replicate("Mixed_7a.branch7x7x3_3", seven, pad=(3, 0)), 2
    )
    z = torch.cat([three, seven, max_pool2d(z, 3, 2)], 1)
    for n in ("Mixed_7b", "Mixed_7c"):
        one = replicate(f"{n}.branch3x3_1", z)
        two = replicate(f"{n}.branch3x3dbl_2", replicate(f"{n}.branch3x3dbl_1", z), pad=(1, 1))
        parts = [replicate(f"{n}.branch1x1", z)]
        parts += [
            replicate(f"{n}.branch3x3_2{k}", one, pad=pad)
            for k, pad in (("a", (0, 1)), ("b", (1, 0)))
        ]
        parts += [
            replicate(f"{n}.branch3x3dbl_3{k}", two, pad=pad)
            for k, pad in (("a", (0, 1)), ("b", (1, 0)))
        ]
        pooled = around(z) if n == "Mixed_7b" else max_pool2d(z, 3, 1, 1)
        z = torch.cat([*parts, replicate(f"{n}.branch_pool", pooled)], 1)
    return z.mean((2, 3))


@torch.no_grad()
def test_its_blocks_are_those_of_the_plain_network(network):
    z = torch.rand(1, 3, 107, 107) * 2 - 1
    features, expected = network(z), plainly(network.state_dict(), z)
    assert features.shape == (1, 2048) and features.std() > 1e-3
    assert torch.allclose(features, expected, atol=1e-5 * features.abs().max().item())


@torch.no_grad()
def test_images_are_resized_by_pillow_and_scaled_as_the_network_needs(network, tmp_path):
    save_file(
        network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)},
        tmp_path / WEIGHTS,
    )
    image = (np.random.default_rng(0).uniform(size=(64, 96, 3)) * 255).round()
    features = Inception(str(tmp_path), CPU)(torch.from_numpy(image / 255).permute(2, 0, 1)[None])
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(
            (299, 299), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(c) for c in channels]))
    wanted = network((pixels[None] - 128) / 128)
    assert features.dtype == torch.float32
    assert torch.allclose(features, wanted, atol=1e-5 * wanted.abs().max().item())


def test_other_weights_are_one_sentence(network, tmp_path):
    tensors = dict(network.state_dict())
    tensors.pop("Mixed_7c.branch_pool.conv.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"is not FID's Inception-V3 .*Missing key.*Mixed_7c\.branch_pool"
    ):
        Inception(str(tmp_path), CPU)
    Path(tmp_path / WEIGHTS).rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is missing: FID's Inception-V3"):
        Inception(str(tmp_path), CPU)
