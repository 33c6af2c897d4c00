"""Adapters of low rank around the frozen matrices of a model (LoRA, Hu et al. 2021).

    y = x W^T + (x A^T) B^T,      A [rank, in], B [out, rank]

W [out, in] and everything else is frozen. Every matrix between embedding and head is adapted.
"""

import torch
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """A frozen matrix with a trained product of two thin ones beside it: x [..., in] to [..., out].

    `base`: torch's Linear, or GPT-2's Conv1D.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        rows, columns = weight.shape
        out, into = (rows, columns) if isinstance(base, nn.Linear) else (columns, rows)
        self.base = base
        self.down = nn.Linear(into, rank, bias=False, device="meta", dtype=weight.dtype)
        self.up = nn.Linear(rank, out, bias=False, device="meta", dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """What the frozen matrix gives, and what the thin ones add."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def add_adapters(model: nn.Module, rank: int) -> None:
    """Freeze a model [meta device] and put adapters into the layers that it repeats, in place."""
    model.requires_grad_(False)
    layers = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if _is_matrix(child):
                    setattr(parent, name, LowRankAdapter(child, rank))


def _is_matrix(module: nn.Module) -> bool:
    """Whether it is one matrix of its own: no adapter's, and no table of embeddings."""
    is_conv = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    weight = getattr(module, "weight", None)
    frozen = isinstance(weight, torch.Tensor) and not weight.requires_grad
    return (isinstance(module, nn.Linear) or is_conv) and frozen
