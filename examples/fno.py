"""A Fourier neural operator on a square grid: it learns the map from one field to another.

Li et al. 2021 (arXiv 2010.08895), as for the Navier-Stokes equations, wider. The sequence length is
the number of points on a side of the grid: mist plan examples/fno.py --gpus 8 --seq 256
"""

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS_IN, CHANNELS, MODES, LAYERS = 3, 128, 16, 4


class SpectralConvolution(nn.Module):
    """Multiplies the lowest frequencies by a complex matrix each."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        shape = (2, channels, channels, modes, modes)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m, side = self.modes, x.shape[-1]
        spectrum = torch.fft.rfft2(x.float())
        low = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight[0])
        high = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], self.weight[1])
        rows = F.pad(low, (0, 0, 0, side - 2 * m)), high
        full = F.pad(torch.cat(rows, dim=2), (0, side // 2 + 1 - m))
        return torch.fft.irfft2(full, s=(side, side)).to(x.dtype)


class Layer(nn.Module):
    """The global convolution beside a local one."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.spectral = SpectralConvolution(channels, modes)
        self.local = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.spectral(x) + self.local(x))


class FourierNeuralOperator(nn.Module):
    """Fields [b, channels, side, side] to a field [b, 1, side, side]."""

    def __init__(self, channels: int = CHANNELS, modes: int = MODES, layers: int = LAYERS) -> None:
        super().__init__()
        self.lift = nn.Conv2d(CHANNELS_IN, channels, kernel_size=1)
        self.layers = nn.ModuleList(Layer(channels, modes) for _ in range(layers))
        self.project = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        for layer in self.layers:
            x = layer(x)
        return self.project(x)


def build_model() -> nn.Module:
    return FourierNeuralOperator()


def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(batch, CHANNELS_IN, seq, seq)}


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32))
