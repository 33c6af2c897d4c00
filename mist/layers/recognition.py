"""What a module without children is, by what it computes: names of classes prove nothing.

A copy with small random parameters (or those of a norm at full size: they are one row) runs on
random numbers, and its output is compared with that of every form that is known. So a subclass that
does something else is not taken for its parent, and a class that nobody knows is taken for what it
is.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from mist.layers.activation_functions import ACTIVATIONS
from mist.layers.norms import NORM_FORMS, NormForm, default_epsilon, normalize

# Of numbers of size 1: far above the rounding of another order of operations, and below what two
# forms that are not the same differ by.
FP32_CLOSE: Final = 1e-5
FP64_CLOSE: Final = 1e-9  # some write sqrt(2 / pi) with ten digits
BF16_APART_RATIO: Final = (
    0.02  # of elements that round the other way; 0.3 where the form is another
)
COMMON_EPSILONS: Final = (1e-5, 1e-6, 1e-8, 1e-12)  # written into a forward as a number
NUM_IN, NUM_OUT, NUM_ROWS = 5, 3, 4  # of a small matrix: no two alike


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownNorm:
    """A norm: the name of its form, and its epsilon (None: by the type of its input)."""

    name: str
    eps: float | None

    @property
    def form(self) -> NormForm:
        """Which norm."""
        return NORM_FORMS[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownMatrix:
    """A linear layer with `weight` and perhaps `bias`; `flipped`: weight is [in, out]."""

    flipped: bool


def replaced(module: nn.Module) -> bool:
    """Whether the forward of this one module was replaced: it is not what its class computes."""
    return "forward" in vars(module)


def parameter_names(module: nn.Module) -> frozenset[str]:
    """The parameters that a module itself holds."""
    return frozenset(n for n, p in module._parameters.items() if p is not None)


def norm_of(module: nn.Module) -> KnownNorm | None:
    """The norm that a module is, or None."""
    names = parameter_names(module)
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    if not names and isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shapes = {tuple(module.normalized_shape)}
    if not (names <= {"weight", "bias"} and len(shapes) == 1 and len(next(iter(shapes))) == 1):
        return None
    ((width,),) = shapes
    matches = (
        KnownNorm(name=name, eps=eps)
        for name, form in NORM_FORMS.items()
        for eps in _epsilons(module)
        if _is_norm(module, width, partial(_normalized, form, eps))
    )
    return next(matches, None)


def _epsilons(module: nn.Module) -> Iterator[float | None]:
    """The numbers that may be the epsilon of a norm: its attributes, or those in use."""
    numbers = {value for value in vars(module).values() if isinstance(value, float)}
    yield from sorted(number for number in numbers if 0 < number < 1)
    if not numbers:
        yield from (*COMMON_EPSILONS, None)


def _normalized(
    form: NormForm, eps: float | None, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    number = default_epsilon(x) if eps is None else eps
    return normalize(x, weight, bias, number, form)[0]


def _is_norm(module: nn.Module, width: int, known: Callable[..., Tensor]) -> bool:
    """Equal in fp32, on rows of size 1 and so small that epsilon counts; in bf16 where rounded."""
    for dtype, size in ((torch.float32, 1.0), (torch.float32, 1e-3), (torch.bfloat16, 1.0)):
        x = _numbers(NUM_ROWS, width).to(dtype) * size
        probe = _with_parameters(module, partial(_random_like, dtype))
        found = _run(probe, x)
        expected = known(x, probe._parameters.get("weight"), probe._parameters.get("bias"))
        if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return False
        apart = (found - expected).abs() > (FP32_CLOSE if dtype == torch.float32 else 0.0)
        if apart.float().mean() > (0.0 if dtype == torch.float32 else BF16_APART_RATIO):
            return False
    return True


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that a module is, or None."""
    if any(True for _ in module.state_dict()) or isinstance(module, nn.Dropout):
        return None
    return activation_name(partial(_run, _with_parameters(module, lambda p: p)))


def activation_name(function: Callable[[Tensor], Tensor | None]) -> str | None:
    """The name of the activation that a function is, or None."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    found = function(x)
    matches = (n for n, row in ACTIVATIONS.items() if _equal(found, row.run(x), FP64_CLOSE))
    return next(matches, None)


def matrix_of_weight(module: nn.Module) -> KnownMatrix | None:
    """The linear layer that a module is, or None."""
    names = parameter_names(module)
    weight = module._parameters.get("weight")
    if not {"weight"} <= names <= {"weight", "bias"} or weight is None or weight.dim() != 2:
        return None
    for flipped in (False, True):
        shape = (NUM_IN, NUM_OUT) if flipped else (NUM_OUT, NUM_IN)
        # A bias has one dimension, and the width of the output.
        small = _with_parameters(module, partial(_small, shape))
        vars(small).update({n: NUM_OUT for n in ("nf", "out_features") if n in vars(small)})
        x, bias = _numbers(2, NUM_ROWS, NUM_IN), small._parameters.get("bias")
        matrix = small._parameters["weight"]
        assert matrix is not None
        expected = x @ (matrix if flipped else matrix.t())
        if _equal(_run(small, x), expected if bias is None else expected + bias, FP64_CLOSE):
            return KnownMatrix(flipped=flipped)
    return None


def _random_like(dtype: torch.dtype, parameter: Tensor) -> Tensor:
    return _numbers(*parameter.shape).to(dtype)


def _small(shape: tuple[int, int], parameter: Tensor) -> Tensor:
    return _numbers(*(shape if parameter.dim() == 2 else (NUM_OUT,)))


def _with_parameters(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module without hooks, whose parameters are others; the module is not touched."""
    probe = copy.copy(module)
    vars(probe).update(
        _parameters={n: p if p is None else make(p) for n, p in module._parameters.items()},
        _forward_hooks={},
        _forward_pre_hooks={},
        training=False,
    )
    return probe


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the class of a module computes, or None where it cannot."""
    try:
        with torch.no_grad():
            result: object = type(module).forward(module, x)
    except Exception:  # a module that is not asked so may fail in any way
        return None
    return result if isinstance(result, Tensor) else None


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether a forward has one argument, so that a graph of it holds for every call."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return len(parameters) == 1 and parameters[0].kind is plain


def _numbers(*shape: int) -> Tensor:
    """Random numbers that leave the state of the global generator as it is."""
    generator = torch.Generator(device="cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _equal(found: Tensor | None, expected: Tensor, close: float) -> bool:
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= close)
