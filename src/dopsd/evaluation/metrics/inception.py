"""Features for FID and KID: the pooled features of the Inception-V3 that FID is defined with.

The network is implemented here, so that torchvision is not needed: Inception-V3 (arXiv:1512.00567)
with TensorFlow's average pooling (padding is not counted) and max pooling in the last block, as
the weights of 2015-12-05 require. Weights: `inception_fid.safetensors`, see docs/metrics.md. Images
are resized in floating point with Pillow's antialiased bicubic filter (arXiv:2104.11222,
"clean-fid").
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from dopsd.files import read_tensors
from dopsd.images import as_bytes
from dopsd.models.hub import Checkpoint

WEIGHTS = "inception_fid.safetensors"
SIDE, DIMENSIONS = 299, 2048
ROW, COLUMN = (1, 7), (7, 1)  # kernels, (height, width)


class Spec(NamedTuple):
    """A convolution of a block. With stride 1 it keeps the size, with 2 it halves it (unpadded)."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


# Consecutive stages; the convolutions of a stage are parallel.
Branch = Sequence[Sequence[Spec]]


class Inception:
    """Maps images to features; those of an image do not depend on the rest of the batch."""

    def __init__(self, model: str, device: torch.device):
        file = Checkpoint(model, called=f"the model of fid and kid, {model},").part() / WEIGHTS
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: FID's Inception-V3 (docs/metrics.md says how to make it)."
            )
        tensors = {
            name: t
            for name, t in read_tensors(file).items()
            if not name.startswith(("fc.", "AuxLogits."))
        }
        with torch.device("meta"):
            self.network = InceptionV3().eval()
        try:
            self.network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{file} is not FID's Inception-V3 ({str(error).splitlines()[1].strip()[:200]})."
            ) from error
        self.network.float().to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> float32 [B, 2048] on the CPU."""
        resized = np.stack([_resized(image) for image in as_bytes(images).numpy()])
        pixels = (
            torch.from_numpy(resized).permute(0, 3, 1, 2) - 128
        ) / 128  # as the network was trained
        return self.network(pixels.to(next(self.network.parameters()).device)).cpu()


def _resized(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in about [0, 255], neither rounded nor clipped."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    return np.stack(
        [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels], axis=-1
    )


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        kernel: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, z: Tensor) -> Tensor:
        return relu(self.bn(self.conv(z)))


class Block(nn.Module):
    """Parallel branches whose channels are concatenated, the last one a pooling. pooled: channels
    of the convolution after the pooling; 0: none, and the block halves the size."""

    def __init__(self, inputs: int, branches: Sequence[Branch], pooled: int, pool: str = "mean"):
        super().__init__()
        self.chains, self.pool, self.pooled = (
            [[[s.name for s in st] for st in b] for b in branches],
            pool,
            pooled,
        )
        for branch in branches:
            channels = inputs
            for stage in branch:
                for name, count, kernel, stride in stage:
                    padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
                    self.add_module(name, Convolution(channels, count, kernel, stride, padding))
                channels = sum(spec.channels for spec in stage)
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, (1, 1), 1, (0, 0))

    def forward(self, z: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y = z
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if not self.pooled:
            return torch.cat([*outputs, max_pool2d(z, 3, stride=2)], dim=1)
        pooled = (
            avg_pool2d(z, 3, 1, 1, count_include_pad=False)
            if self.pool == "mean"
            else max_pool2d(z, 3, 1, 1)
        )
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """float [B, 3, 299, 299] in [-1, 1] -> [B, 2048]. Names are those of torchvision's state
    dict."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), 1, (0, 0))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _c(128),
            _c(160),
            _c(160),
            _c(192),
        )
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")

    def forward(self, z: Tensor) -> Tensor:
        z = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(z)))
        z = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(z, 3, stride=2)))
        z = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(z, 3, stride=2))))
        z = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(z)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(z))).mean((2, 3))


def _chain(name: str, *convolutions: tuple) -> Branch:
    """Consecutive convolutions `<name>_1`, `<name>_2`, ..., each (channels, kernel) or
    (channels, kernel, stride)."""
    return [[Spec(f"{name}_{place}", *rest)] for place, rest in enumerate(convolutions, start=1)]


def _alone(name: str, *rest: Any) -> Branch:
    return [[Spec(name, *rest)]]


def _a(inputs: int, pooled: int) -> Block:
    wide = _chain("branch5x5", (48, (1, 1)), (64, (5, 5)))
    double = _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
    return Block(inputs, [_alone("branch1x1", 64, (1, 1)), wide, double], pooled)


def _b(inputs: int) -> Block:
    double = _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3), 2))
    return Block(inputs, [_alone("branch3x3", 384, (3, 3), 2), double], 0)


def _c(width: int) -> Block:
    once = _chain("branch7x7", (width, (1, 1)), (width, ROW), (192, COLUMN))
    twice = _chain(
        "branch7x7dbl", (width, (1, 1)), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)
    )
    return Block(768, [_alone("branch1x1", 192, (1, 1)), once, twice], 192)


def _d(inputs: int) -> Block:
    short = _chain("branch3x3", (192, (1, 1)), (320, (3, 3), 2))
    long = _chain("branch7x7x3", (192, (1, 1)), (192, ROW), (192, COLUMN), (192, (3, 3), 2))
    return Block(inputs, [short, long], 0)


def _e(inputs: int, pool: str) -> Block:
    def fork(stem: str) -> Branch:
        return [[Spec(f"{stem}a", 384, (1, 3)), Spec(f"{stem}b", 384, (3, 1))]]

    once = [*_chain("branch3x3", (384, (1, 1))), *fork("branch3x3_2")]
    twice = [*_chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), *fork("branch3x3dbl_3")]
    return Block(inputs, [_alone("branch1x1", 320, (1, 1)), once, twice], 192, pool)
