"""A U-Net of residual blocks: down to small and wide images, and up again with what was kept.

Ronneberger et al. 2015 (arXiv 1505.04597) with the blocks of He et al. 2016 (arXiv 1512.03385). The
sequence length is the number of pixels on a side: mist plan examples/unet.py --gpus 8 --seq 256
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS_IN, CLASSES, WIDTHS = 3, 21, (64, 128, 256, 512, 1024)


class Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input goes by."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.skip(x))


class Down(nn.Module):
    """Half the side, more channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.block = Residual(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.pool(x))


class Up(nn.Module):
    """Twice the side, beside the image of that size on the way down."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.block = Residual(2 * outputs, outputs)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat((kept, self.grow(x)), dim=1))


class UNet(nn.Module):
    """Images [b, 3, side, side] to a class for each pixel."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.stem = Residual(CHANNELS_IN, widths[0])
        self.down = nn.ModuleList(Down(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(Up(wide, narrow) for narrow, wide in reversed(pairs))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        kept = []
        for down in self.down:
            kept.append(x)
            x = down(x)
        for up in self.up:
            x = up(x, kept.pop())
        return self.head(x)


def build_model() -> nn.Module:
    return UNet()


def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    return {"images": torch.zeros(batch, CHANNELS_IN, seq, seq)}


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    classes = torch.zeros_like(output[:, 0], dtype=torch.int64)
    return F.cross_entropy(output.float(), classes)
