"""One of two ranks that share the means of norms: what the whole norm gives, and its gradients.

python -m tests.exec.norm_rank
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mist.exec.build.process_group import process_group
from mist.exec.build.shared_norms import share_means

WIDTH = 12


class Written(nn.Module):
    """A norm in single operations, centered, and over tokens too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centered = x - torch.mean(x, dim=-1, keepdim=True)
        deviation = centered.pow(2).mean([-1], keepdim=True)
        # Of tokens: each rank has all that are of its own numbers.
        shifted = centered - centered.mean(1, keepdim=True)
        return self.weight * shifted * torch.rsqrt(deviation + 1e-5)


NORMS = {
    "written": Written,
    "rms": lambda width: nn.RMSNorm(width, eps=1e-5),
    "rms, its own epsilon": nn.RMSNorm,
    "rms without weight": lambda width: nn.RMSNorm(width, elementwise_affine=False),
}


def outcome(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The result, the gradient of the input, and that of the weight."""
    x = x.detach().requires_grad_()
    result = norm(x)
    result.backward(grad)
    return [result, x.grad, *(p.grad for p in norm.parameters())]


def main() -> None:
    torch.set_default_dtype(torch.float64)
    with process_group(300.0):
        mesh = init_device_mesh("cpu", (2,))
        first = mesh.get_local_rank() * WIDTH // 2
        own = slice(first, first + WIDTH // 2)
        for name, make in NORMS.items():
            torch.manual_seed(0)
            x, grad, weight = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH), torch.rand(WIDTH)
            whole, part = make(WIDTH), make(WIDTH // 2)
            for norm, values in ((whole, weight), (part, weight[own])):
                for parameter in norm.parameters():
                    parameter.data.copy_(values)
            share_means(part, mesh)
            expected = [each[..., own] for each in outcome(whole, x, grad)]
            for a, b in zip(outcome(part, x[..., own], grad[..., own]), expected, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-12), name
    print("equal")


if __name__ == "__main__":
    main()
