"""Kernels of gated products in triton's interpreter, against torch in fp64."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mist.layers import activation_functions
from mist.layers.recipes import recipe_of

NAME = "mist.layers.triton_kernels"
SHAPES = ((3, 701), (2, 4, 512), (1,))  # a block that is not full, two that are, one element


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels, interpreted on this CPU, in the place of torch's."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(NAME, None)
    activation_functions._triton_kernels.cache_clear()
    found = activation_functions._triton_kernels(torch.device("cpu"))
    assert found is not None
    monkeypatch.setattr(activation_functions, "_kernels", lambda *_: found)
    yield found
    sys.modules.pop(NAME)  # what others import is compiled
    activation_functions._triton_kernels.cache_clear()


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradient, gate, product's other factor; magnitudes at which sigmoids are 0 and 1, too."""
    torch.manual_seed(0)
    return [(factor * torch.randn(shape)).to(dtype) for factor in (1, 20, 3)]


def gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The product, and gradients of gate and up, by the layer's own function."""
    gate, up = (each.detach().requires_grad_() for each in (gate, up))
    product = activation_functions.gated(gate, up, "silu", "fused")
    return (product.detach(), *torch.autograd.grad(product, (gate, up), grad))


def true(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same by torch in fp64."""
    gate, up = (each.double().requires_grad_() for each in (gate, up))
    product = F.silu(gate) * up
    return (product.detach(), *torch.autograd.grad(product, (gate, up), grad.double()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_compute_in_fp32_and_round_once(
    shape: tuple[int, ...], dtype: torch.dtype, kernels: ModuleType
) -> None:
    grad, gate, up = drawn(shape, dtype)
    # To round is half a step of the type at most; the interpreter cuts bf16, which is a whole one.
    # In fp32 sums of terms up to the largest value cancel: a few of its steps of 1.2e-7.
    info = torch.finfo(dtype)
    step = info.eps * (1.0 if dtype == torch.bfloat16 else 0.5)
    for found, expected in zip(gradients(gate, up, grad), true(gate, up, grad), strict=True):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        most = (step + 5e-7) * expected.abs() + 5e-7 * expected.abs().max() + info.smallest_normal
        assert ((found.double() - expected).abs() <= most).all()


def test_a_dropped_product_is_made_again_bit_for_bit(kernels: ModuleType) -> None:
    _, gate, up = drawn((3, 701), torch.float32)
    product = activation_functions.gated(gate.requires_grad_(), up, "silu", "drop")
    recipe = recipe_of(product)
    assert recipe is not None
    assert torch.equal(recipe.rebuild.again(*recipe.sources), product)


def test_only_whole_tensors_on_a_gpu_run_in_one_kernel() -> None:
    assert activation_functions._kernels("silu", *drawn((3, 8), torch.float32)) is None


def test_where_kernels_do_not_run_torch_does_the_work() -> None:
    activation_functions._triton_kernels.cache_clear()
    assert activation_functions._triton_kernels(torch.device("cpu")) is None  # not interpreted
