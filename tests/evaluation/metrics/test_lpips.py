"""LPIPS against a VGG16 of torch.nn and, where it is installed, the authors' package; both on
random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dopsd.evaluation.metrics.lpips import WEIGHTS, Lpips, fit

CPU = torch.device("cpu")


def vgg(widths: tuple[int, ...]) -> nn.Sequential:
    """VGG16's features as torchvision builds them, from their published list (D of
    arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def written(folder: Path, widths: tuple[int, ...]) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """A random VGG and heads, and the file of both."""
    torch.manual_seed(0)
    network, heads = vgg(widths), [torch.rand(1, width, 1, 1) for width in widths]
    tensors = {f"features.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"lin{k}.model.1.weight": head for k, head in enumerate(heads)}
    save_file(tensors, folder / WEIGHTS)
    return network, heads


@torch.no_grad()
def plainly(
    network: nn.Sequential, heads: list[torch.Tensor], one: torch.Tensor, other: torch.Tensor
) -> float:
    """The distance of two images, layer by layer; ReLUs 3, 8, 15, 22, 29 are LPIPS' five."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = [
        ((2 * p.permute(1, 2, 0) - 1 - shift) / scale).permute(2, 0, 1)[None] for p in (one, other)
    ]
    total, stage = 0.0, 0
    for index, layer in enumerate(network):
        pair = [layer(z) for z in pair]
        if index in (3, 8, 15, 22, 29):
            replicate = [
                z / (torch.linalg.vector_norm(z, dim=1, keepdim=True) + 1e-10) for z in pair
            ]
            total += ((replicate[0] - replicate[1]) ** 2 * heads[stage]).sum(1).mean().item()
            stage += 1
    return total


def test_it_is_the_weighted_distance_of_unit_activations(tmp_path):
    network, heads = written(tmp_path, (8, 12, 16, 16, 16))
    distance = Lpips(str(tmp_path), CPU)
    images, target = torch.rand(3, 3, 32, 48), torch.rand(3, 32, 48)
    distances = distance(images, target)
    assert distances.tolist() == pytest.approx(
        [plainly(network, heads, p, target) for p in images], rel=1e-4
    )
    assert distances.min() > 1e-3 and distance(target[None], target).item() == 0


def test_it_equals_the_authors_package_where_that_is_installed(tmp_path):
    lpips = pytest.importorskip(
        "lpips", reason="the lpips package (and torchvision) is not installed"
    )
    network, heads = written(tmp_path, (64, 128, 256, 512, 512))
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False)
    convolutions = [m for m in reference.net.modules() if isinstance(m, nn.Conv2d)]
    for convolution, other in zip(
        (m for m in network if isinstance(m, nn.Conv2d)), convolutions, strict=True
    ):
        other.load_state_dict(convolution.state_dict())
    for head, line in zip(heads, reference.lins, strict=True):
        line.model[-1].weight.data = head
    one, other = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = reference.eval()(one[None], other[None], normalize=True).item()
    assert Lpips(str(tmp_path), CPU)(one[None], other).item() == pytest.approx(wanted, rel=1e-4)


def test_a_target_of_another_shape_is_center_cropped():
    left_to_right = torch.arange(60.0).expand(1, 3, 20, 60) / 60
    cut = fit(left_to_right, 20, 20)
    assert torch.equal(cut, left_to_right[..., 20:40])
    assert fit(torch.rand(1, 3, 40, 120), 20, 20).shape == (1, 3, 20, 20)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("none", "holds no .safetensors"),
        ("other", "is missing: VGG16"),
        ("cut", r"has no lin4\.model\.1\.weight"),
    ],
)
def test_weights_that_are_not_there_are_one_sentence(fault, sentence, tmp_path):
    if fault == "other":
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    if fault == "cut":
        network, heads = written(tmp_path, (4, 4, 4, 4, 4))
        tensors = {f"features.{name}": tensor for name, tensor in network.state_dict().items()}
        save_file(
            tensors | {f"lin{k}.model.1.weight": heads[k] for k in range(4)}, tmp_path / WEIGHTS
        )
    with pytest.raises(ValueError, match=sentence):
        Lpips(str(tmp_path), CPU)


def test_an_image_too_small_for_four_poolings_is_refused(tmp_path):
    written(tmp_path, (4, 4, 4, 4, 4))
    with pytest.raises(ValueError, match="16 pixels a side; these are 8 x 32"):
        Lpips(str(tmp_path), CPU)(torch.rand(1, 3, 32, 8), torch.rand(3, 32, 8))
