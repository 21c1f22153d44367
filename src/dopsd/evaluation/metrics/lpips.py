"""LPIPS: perceptual distance from the layers of a VGG16 (arXiv:1801.03924, version 0.1).

VGG16 is implemented here, so that torchvision is not needed. Weights: `lpips_vgg16.safetensors`,
see docs/metrics.md.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu

from dopsd.files import read_tensors
from dopsd.models.hub import Checkpoint

WEIGHTS = "lpips_vgg16.safetensors"
# torchvision's indices of VGG16's convolutions, by stage
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own, of images in [-1, 1]
MIN_SIDE = 16  # pixels: four poolings leave one
EPSILON = 1e-10  # added to norms, as in the authors' code


class Lpips:
    """The VGG variant; 0 = the same image. The target is resized and center-cropped to the images'
    size."""

    def __init__(self, model: str, device: torch.device):
        file = Checkpoint(model, called=f"the model of lpips, {model},").part() / WEIGHTS
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: VGG16 with LPIPS' weights (docs/metrics.md says how to make "
                "it)."
            )
        self.weights = {
            name: tensor.float().to(device) for name, tensor in read_tensors(file).items()
        }
        wanted = [
            f"features.{n}.{kind}" for stage in STAGES for n in stage for kind in ("weight", "bias")
        ]
        wanted += [f"lin{index}.model.1.weight" for index in range(len(STAGES))]
        if lacking := [name for name in wanted if name not in self.weights]:
            raise ValueError(f"{file} has no {lacking[0]}: it is not VGG16 with LPIPS' weights.")
        self.shift, self.scale = (
            torch.tensor(each, device=device)[:, None, None] for each in (SHIFT, SCALE)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """images [B, 3, H, W] and one target [3, h, w] in [0, 1] -> [B]."""
        height, width = images.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"lpips needs images of {MIN_SIDE} pixels a side; these are {width} x {height}."
            )
        fitted = fit(target[None].float(), height, width)
        pairs = zip(self._layers(images.float()), self._layers(fitted), strict=True)
        distances = [
            conv2d((one - other).square(), self.weights[f"lin{index}.model.1.weight"]).mean(
                (1, 2, 3)
            )
            for index, (one, other) in enumerate(pairs)
        ]
        return torch.stack(distances).sum(0)

    def _layers(self, images: Tensor) -> list[Tensor]:
        """The activations of each stage, of norm 1 over channels."""
        z = (2 * images.to(self.shift.device) - 1 - self.shift) / self.scale
        activations = []
        for index, stage in enumerate(STAGES):
            z = max_pool2d(z, 2) if index else z
            for number in stage:
                z = relu(
                    conv2d(
                        z,
                        self.weights[f"features.{number}.weight"],
                        self.weights[f"features.{number}.bias"],
                        padding=1,
                    )
                )
            activations.append(z / (z.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return activations


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, 3, h, w] resized to cover height x width and center-cropped, as in training."""
    scale = max(height / images.shape[2], width / images.shape[3])
    size = (max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale)))
    if tuple(images.shape[2:]) != size:
        images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]
